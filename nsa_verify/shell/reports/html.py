"""``--report html``: one page that needs nothing else, neither scripts nor a network, and fits on a phone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct

from nsa_verify import __version__
from nsa_verify.core.case import Mode
from nsa_verify.core.findings import EXPLANATIONS, Explanation
from nsa_verify.engine.events import CampaignFinished, Cell
from nsa_verify.shell.coverage import coverage_document, never_met
from nsa_verify.shell.options import ExitCode
from nsa_verify.shell.pages import rendered
from nsa_verify.shell.render import case_lines, cell_text, counted, reason_lines, tally_lines
from nsa_verify.shell.reports.drawing import Drawn, draw, draw_window
from nsa_verify.shell.reports.plain import printable
from nsa_verify.shell.reports.rates import chart
from nsa_verify.shell.reports.story import Found, Story, environment_line, facts

TEMPLATE: Final = "report.html.j2"
MOST_DRAWN_BYTES: Final = 1_200_000
"""Of all pictures; the findings after that are told without."""
MOST_IN_FULL: Final = 50
MOST_LISTED: Final = 500
"""Findings in full, and in the table; the rest is counted."""
LONGEST_TEXT: Final = 1500
MOST_LINES: Final = 60
NO_ROOM: Final = "Its buffers are left out, since the page would be too large; those of the findings above are there."


class Part(Struct, kw_only=True):
    """A finding as the page has it."""

    found: Found
    anchor: str
    message: str
    case: list[str]
    reproduce: str
    explanation: Explanation
    wrong: list[Drawn]
    others: list[Drawn]
    window: str
    note: str


def text(story: Story) -> str:
    """The page."""
    return rendered(TEMPLATE, _context(story), lambda value: printable(value) if type(value) is str else value)


def _context(story: Story) -> dict[str, Any]:
    found = story.found
    parts = list(_parts(story, found[:MOST_IN_FULL]))
    unknown = [(it.implementation, it.executor, _cut(it.reason)) for it in story.unknown]
    return {
        "story": story,
        "version": __version__,
        "mood": {ExitCode.AGREE: "agree", ExitCode.DISAGREE: "disagree"}.get(ExitCode(story.code), "unable"),
        "facts": [*facts(story), ("environment", environment_line(story))],
        "found": found[:MOST_LISTED],
        "left_out": len(found) - MOST_LISTED,
        "parts": parts,
        "unknown": unknown[:MOST_LINES],
        "matrix": list(_matrix(story, parts)),
        "notes": [_cut(it) for it in [*reason_lines(story.matrix), *tally_lines(story.tally)][:MOST_LINES]],
        "coverage": _coverage(story),
        "chart": chart(story.rates),
        "rates": f"{counted(story.cases, 'case')}, {story.rate:.1f} a second on average",
        "replayed": [it for it in story.replayed if it.status != "FIXED"][:MOST_LISTED],
        "fixed": sum(it.status == "FIXED" for it in story.replayed),
        "remarks": [_cut(it) for it in _remarks(story)][:MOST_LINES],
        "cut": _cut,
        "when": lambda time: time.replace("T", " ").replace("+00:00", " UTC"),
        "searches": lambda count: "1 search" if count == 1 else f"{count} searches",
    }


def _cut(value: str) -> str:
    return value if len(value) <= LONGEST_TEXT else f"{value[:LONGEST_TEXT]} ... ({len(value)} characters)"


def _parts(story: Story, found: Sequence[Found]) -> Iterator[Part]:
    room = MOST_DRAWN_BYTES
    for number, it in enumerate(found, 1):
        drawn = [draw(picture) for picture in it.pictures]
        size = sum(len(picture.markup) for picture in drawn)
        fits, room = size <= room, room - min(size, room)
        yield Part(
            found=it,
            anchor=f"finding-{number}",
            message=_cut(it.finding.message),
            case=case_lines(it.case, it.finding.replay),
            reproduce=story.reproduce(it),
            explanation=EXPLANATIONS[it.finding.code],
            wrong=[picture for picture in drawn if picture.is_wrong and fits],
            others=[picture for picture in drawn if not picture.is_wrong and fits],
            window="" if drawn and fits else draw_window(it.finding),
            note="" if fits else NO_ROOM,
        )


class Row(Struct):
    """A row of the matrix: for each executor what the cell says, how it looks, and the finding that it leads to."""

    implementation: str
    mode: Mode
    height: int
    """How many rows the name of the implementation is for; 0: it stands above."""
    cells: list[tuple[str, str, str]]


def _matrix(story: Story, parts: Sequence[Part]) -> Iterator[Row]:
    leads = {
        (it.found.finding.implementation, executor, mode): it.anchor
        for it in reversed(parts)
        for executor in it.found.executors
        for mode in (it.found.group.modes if it.found.group is not None else (it.found.finding.mode,))
    }
    for subject in story.subjects.values() if story.matrix.cells else ():
        for mode in story.modes:
            keys = [(subject.name, executor, mode) for executor in story.executors]
            cells = [(story.matrix.cells.get(key), leads.get(key, "")) for key in keys]
            height = len(story.modes) if mode is story.modes[0] else 0
            yield Row(subject.name, mode, height, [(cell_text(cell), _look(cell), lead) for cell, lead in cells])


def _look(cell: Cell | None) -> str:
    if cell is None or not cell.cases:
        return "idle"
    return "disagree" if cell.disagree else "unable" if cell.unknown else "agree"


def _coverage(story: Story) -> dict[str, Any]:
    """Empty if nothing was counted."""
    if not story.coverage.counts:
        return {}
    modes = story.modes or tuple(Mode)
    rows, left = never_met(story.coverage, modes)
    return coverage_document(story.coverage, modes) | {"never": rows, "left": left}


def _remarks(story: Story) -> Iterator[str]:
    """What went on besides."""
    if story.recovered is not None:
        for path in story.recovered.saved:
            yield f"{path}: saved for an earlier run that was killed"
        yield from story.recovered.problems
    if isinstance(story.finished, CampaignFinished):
        yield from (f"Baseline: expired: {it}" for it in story.finished.expired)
        yield from (f"Baseline: matches nothing: {it}" for it in story.finished.unmatched)
        yield from story.finished.problems
    yield from (it.problem for it in story.found if it.problem)
