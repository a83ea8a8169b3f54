"""The charts of ``nsa-verify bench --html``: inline SVG whose text and colours are those of the page around it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Final, NamedTuple

from nsa_verify.shell.timings import EXPANSION, Spread, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, BAR, FLOOR = COLOURS = ("#010201", "#010202", "#010203", "#010204", "#010205")
"""What is drawn in these is shown in the page's own, which are others in the dark."""
OF_THE_PAGE: Final = ("currentColor", "var(--muted)", "var(--line)", "var(--bar)", "var(--floor)")

WIDTH_IN: Final = 4.2
"""Narrow, so that text can be read where a phone shows the whole width."""
ROW_IN: Final = 0.2
AXIS_IN: Final = 0.48
RIGHT_IN: Final = 0.95
"""For the numbers behind the longest bar."""
CHARACTER_IN: Final = 0.07
LONGEST_NAME: Final = 26
LOG_FROM: Final = 20
"""Times the least that the most is, from which on a linear scale would hide the least."""


class Chart(NamedTuple):
    """A title and an SVG element."""

    title: str
    svg: str


def charts(timings: Sequence[Timing], on_gpu: bool) -> list[Chart]:
    """One for each size, with a panel per mode; the ragged expansion alone has a panel per size.

    On a GPU bars are device times, and what was not captured is said to be so; elsewhere they are host times.
    """
    found: dict[str, dict[str, list[Timing]]] = {}
    for it in timings:
        title, panel = (it.mode, it.size) if it.mode == EXPANSION else (it.size, it.mode)
        found.setdefault(title, {}).setdefault(panel, []).append(it)
    return [Chart(title, _svg(title, panels, on_gpu)) for title, panels in found.items()]


def _svg(title: str, panels: Mapping[str, Sequence[Timing]], on_gpu: bool) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = sum(len(timings) + 1 for timings in panels.values())
    names = [_short(it.implementation) for timings in panels.values() for it in timings]
    left = CHARACTER_IN * max(map(len, names)) + 0.12
    width, height = WIDTH_IN - left - RIGHT_IN, ROW_IN * rows + AXIS_IN
    with mpl.rc_context(), warnings.catch_warnings():
        # The font that widths are estimated with may lack a character that the reader's font has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False})
        mpl.rcParams.update({"font.size": 8.5, "text.color": INK, "font.sans-serif": ["DejaVu Sans"]})
        figure = Figure((WIDTH_IN, height))
        axes = figure.add_axes((left / WIDTH_IN, AXIS_IN / height, width / WIDTH_IN, 1 - AXIS_IN / height))
        _draw(axes, panels, on_gpu, -left / width)
        drawn = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return _inline(drawn.getvalue(), title)


def _draw(axes: Axes, panels: Mapping[str, Sequence[Timing]], on_gpu: bool, edge: float) -> None:
    """Panels below each other on one scale; ``edge`` is the left end of the figure in widths of the plot."""
    start = _scale(axes, [it for timings in panels.values() for it in timings], on_gpu)
    across = axes.get_yaxis_transform()
    row = 0
    for panel, timings in panels.items():
        axes.text(edge, row, panel, transform=across, va="center", weight="bold")
        for place, it in enumerate(timings, row + 1):
            name = _short(it.implementation)
            axes.text(-0.02, place, name, transform=across, ha="right", va="center")
            spread = it.node if on_gpu else it.host
            if spread is None:
                _note(axes, it.floor_us, place, "not captured", color=MUTED, style="italic")
            else:
                _bar(axes, place, start, spread, it.floor_ratio)
        for it in timings[:1] if on_gpu else ():
            span = (row + 0.55, row + len(timings) + 0.45)
            axes.plot([it.floor_us] * 2, span, color=FLOOR, lw=1.2, ls=(0, (3, 2)), clip_on=False, gid="floor")
        row += len(timings) + 1
    axes.set_ylim(row - 0.4, -0.5)


def _scale(axes: Axes, timings: Sequence[Timing], on_gpu: bool) -> float:
    """Fit the scale to what is shown; where bars begin."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    shown = [spread for it in timings if (spread := it.node if on_gpu else it.host) is not None]
    floors = [it.floor_us for it in timings if on_gpu]
    least, most = min([*(it.least for it in shown), *floors]), max([*(it.most for it in shown), *floors])
    logarithmic = least * LOG_FROM < most
    if logarithmic:
        start = least / 2
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 50 * start else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        start = 0.0
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(start, most)
    axes.xaxis.set_major_formatter("{x:,.12g}")
    axes.set_xlabel("microseconds a call" + (", logarithmic" if logarithmic else ""), color=INK)
    axes.set_yticks([])
    axes.tick_params(length=0, labelcolor=MUTED)
    axes.grid(axis="x", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return start


def _bar(axes: Axes, row: int, start: float, spread: Spread, ratio: float | None) -> None:
    bar = axes.barh(row, spread.median - start, left=start, height=0.68, color=BAR, clip_on=False)
    bar[0].set_gid("bar")
    axes.plot([spread.least, spread.most], [row, row], color=INK, lw=0.8, clip_on=False, gid="spread")
    _note(axes, spread.most, row, _short_number(spread.median) + (f" ({_short_number(ratio)}x)" if ratio else ""))


def _note(axes: Axes, value: float, row: int, text: str, color: str = INK, style: str = "normal") -> None:
    """Write ``text`` behind ``value``."""
    axes.annotate(text, (value, row), xytext=(3, 0), textcoords="offset points", va="center", color=color, style=style)


def _short_number(value: float) -> str:
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _inline(svg: str, title: str) -> str:
    """The element alone, in the page's colours, with classes for ids, of which a page may have one each."""
    svg = re.sub(r'<g id="([A-Za-z]+)[^"]*"', r'<g class="\1"', svg[svg.index("<svg") :])
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[^"]*pt"', "", svg)
    svg = re.sub(r" *<style.*?</style>\n", "", svg, flags=re.DOTALL)
    for colour, of_the_page in zip(COLOURS, OF_THE_PAGE, strict=True):
        svg = svg.replace(f": {colour}", f": {of_the_page}")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
