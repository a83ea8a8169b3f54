"""Buffers as they are drawn on the page: page tables as squares, one for each slot; others as cells with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from nsa_verify.core.buffers import TABLES
from nsa_verify.core.findings import Cell, Finding, Picture, Square
from nsa_verify.device.layout import is_poison
from nsa_verify.shell.render import counted, number

REGIONS: Final = {"live": "l", "slack": "s", "frame": "f", "guard": "g", "input": "i"}
"""The class of a cell by its region."""
WRONG: Final = "x"
POISON: Final = "p"
"""The classes besides of what is wrong, and of what is wrong and poison."""
UNTOUCHED: Final = "·"
"""Poison where poison should be."""
MOST_LISTED: Final = 6
"""Wrong squares whose numbers stand below."""
UNIT: Final = 10
"""Of a square's side, in the picture's own coordinates."""


class Drawn(NamedTuple):
    """One picture for the page: ``markup`` is made here, of numbers and known words alone; the rest is plain text."""

    name: str
    notes: str
    markup: str
    is_wrong: bool


def draw(picture: Picture) -> Drawn:
    """The picture, or an empty ``markup`` where there was no room for it."""
    drawn = picture.squares
    is_wrong = picture.wrong > 0 or any(square.differs for row in drawn for square in row)
    name = picture.buffer if picture.kind == "buffer" else f"{picture.kind} {picture.buffer}"
    name = f"guard zone behind {picture.buffer}" if picture.kind == "guard" else name
    is_table = picture.kind == "buffer" and picture.buffer in TABLES
    markup = (_squares(picture) + _list(picture)) if is_table else _numbers(picture)
    return Drawn(name, "; ".join(_notes(picture)), markup if drawn else "", is_wrong)


def draw_window(finding: Finding) -> str:
    """The cells around the first difference, or that one alone, which is all that there is without pictures."""
    cells = finding.window
    if not cells and finding.region is not None and finding.expected is not None and finding.got is not None:
        cells = (Cell(finding.element, finding.region, finding.expected, finding.got, differs=True),)
    row = [Square(it.region, it.expected, it.got, it.expected, it.differs) for it in cells]
    labels = [",".join(map(str, it.element)) for it in cells]
    return _table([("", labels, row)]) if row else ""


def _notes(picture: Picture) -> Iterator[str]:
    if picture.step is not None:
        yield f"step {picture.step}"
    if picture.owner:
        yield f"of {picture.owner}"
    if picture.aliases:
        yield f"is {', '.join(picture.aliases)} as well"
    if picture.kind == "input":
        yield "in int32 words"
    if picture.wrong:
        yield counted(picture.wrong, "wrong cell")
    if not picture.squares:
        yield "not drawn, since there was no room"
        return
    rows, columns = len(picture.squares), len(picture.squares[0])
    for shown, whole, first, noun in (
        (rows, picture.rows, picture.first_row, "row"),
        (columns, picture.columns, picture.first_column, "column"),
    ):
        if first or shown < whole:
            yield f"{noun}s {first} to {min(first + shown, whole) - 1} of {whole}"


def _class(square: Square) -> str:
    letter = REGIONS.get(square.region, "f")
    if not square.differs:
        return letter
    return f"{letter} {POISON if is_poison(square.got) else WRONG}"


def _numbers(picture: Picture) -> str:
    rows = []
    for at, row in enumerate(picture.squares, picture.first_row):
        labels = [str(it) if it < picture.columns else "" for it, _ in enumerate(row, picture.first_column)]
        name = "" if picture.rows == 1 else f"row {at} " if at < picture.rows else "guard "
        rows.append((name, labels, row))
    return _table(rows)


def _table(rows: Sequence[tuple[str, Sequence[str], Sequence[Square]]]) -> str:
    """A name, labels of the cells and the cells, for each row; end tags that HTML does without are left out."""
    told = ["<table class=cells>"]
    for at, (name, labels, row) in enumerate(rows):
        if at == 0:
            told.append(f"<tr><th>element{''.join(f'<th scope=col>{label}' for label in labels)}")
        for kind in ("expected", "got"):
            told.append(f"<tr class={kind}><th scope=row>{name}{kind}")
            told += [f"<td class='{_class(square)}'>{_content(square, kind)}" for square in row]
    return "".join([*told, "</table>"])


def _content(square: Square, kind: str) -> str:
    value = square.expected if kind == "expected" else square.got
    return UNTOUCHED if is_poison(value) and not square.differs else number(value)


def _squares(picture: Picture) -> str:
    """The table as SVG: neighbours of one class are one rectangle, and a grid lies over all."""
    rows, columns = len(picture.squares), len(picture.squares[0]) if picture.squares else 0
    side = 14 if columns <= 24 else UNIT
    letters = 11 * UNIT / side
    left, top = 0.62 * letters * (len(str(picture.first_row + rows)) + 1), 1.5 * letters
    width, height = columns * UNIT, rows * UNIT
    told = [f'<g transform="translate({left:.1f} {top:.1f})">']
    for at, row in enumerate(picture.squares):
        start = 0
        for kind, run in groupby(row, _class):
            length = len(list(run))
            place = f'x="{start * UNIT}" y="{at * UNIT}" width="{length * UNIT}" height="{UNIT}"'
            told.append(f'<rect class="{kind}" {place}/>')
            start += length
    told.append(f'<rect class="grid" width="{width}" height="{height}"/>')
    told += _axes(picture, rows, columns, letters)
    told.append("</g>")
    box = f"0 0 {left + width + 1:.1f} {top + height + 1:.1f}"
    scale = side / UNIT
    size = f'width="{(left + width + 1) * scale:.0f}" height="{(top + height + 1) * scale:.0f}"'
    return f'<svg class="squares" viewBox="{box}" {size} font-size="{letters:.1f}">{"".join(told)}</svg>'


def _axes(picture: Picture, rows: int, columns: int, letters: float) -> Iterator[str]:
    named = min(columns, picture.columns - picture.first_column)
    for at in _ticks(picture.first_column, named, len(str(picture.first_column + columns)) * letters / UNIT):
        x = (at - picture.first_column + 0.5) * UNIT
        yield f'<text x="{x:.0f}" y="{-0.4 * letters:.1f}" text-anchor="middle">{at}</text>'
    for at in _ticks(picture.first_row, min(rows, picture.rows - picture.first_row), 1.2 * letters / UNIT):
        y = (at - picture.first_row + 0.5) * UNIT + 0.35 * letters
        yield f'<text x="{-0.4 * letters:.1f}" y="{y:.1f}" text-anchor="end">{at}</text>'


def _ticks(first: int, count: int, least: float) -> range:
    """Multiples of a round number that is at least ``least``."""
    step = next(it for it in (1, 2, 4, 8, 16, 32, 64) if it >= least)
    return range(-(-first // step) * step, first + count, step)


def _list(picture: Picture) -> str:
    """The numbers of the first wrong squares."""
    found = [
        (row, column, square)
        for row, squares in enumerate(picture.squares, picture.first_row)
        for column, square in enumerate(squares, picture.first_column)
        if square.differs
    ]
    if not found:
        return ""
    labels = [f"{row},{column}" for row, column, _ in found[:MOST_LISTED]]
    return _table([("", labels, [square for _, _, square in found[:MOST_LISTED]])])
