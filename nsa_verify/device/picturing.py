"""The buffers of a replay that disagrees, cell by cell, for people to look at; cut to what they can look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Finding, Picture, Square
from nsa_verify.device.diagnosis import Snapshot, region_of
from nsa_verify.device.images import is_allowed
from nsa_verify.device.layout import TWO_DIMENSIONAL, ArenaLayout, Zone

MOST_ROWS: Final = 64
MOST_COLUMNS: Final = 128
"""Of one picture, around the first difference."""
MOST_CELLS: Final = 6000
"""Of all pictures of a finding."""
KEPT_CELLS: Final = 1000
"""Of these for buffers that are as they should be."""
FEW_ROWS: Final = 16
FEW_COLUMNS: Final = 32
"""Where there is less room, rather so many rows than more columns, and rather so many columns than more rows."""
FEWEST_CELLS: Final = 16
"""For which a picture is cut to the room that is left; where there is less, it is left out."""
GUARD_CELLS: Final = 4
"""Of the guard zone behind a buffer of one row, so that it can be seen where the buffer ends."""
_AHEAD: Final = 4
"""One part in so many of a cut picture lies before the first difference."""


class _Wrong(NamedTuple):
    """The wrong cells of a zone: the first, and how many."""

    first: int
    number: int


class _Grid(NamedTuple):
    """A zone as rows of equal length; ``beyond`` are the cells of the guard zone that are shown with it."""

    zone: Zone
    rows: int
    columns: int
    beyond: int

    @property
    def drawn_rows(self) -> int:
        """With the row of the guard zone below a buffer of several."""
        return self.rows + (self.beyond > 0 and self.rows > 1)

    @property
    def drawn_columns(self) -> int:
        """With the gap behind the row of a table, or the guard zone behind a single row."""
        width = self.zone.stride or self.columns
        return width if self.rows > 1 else width + self.beyond

    @property
    def cells(self) -> int:
        """How many there are to draw."""
        return min(self.drawn_rows, MOST_ROWS) * min(self.drawn_columns, MOST_COLUMNS)


def pictures(snapshot: Snapshot, primary: Finding) -> tuple[Picture, ...]:
    """Every buffer of the replay, and whatever else was written: first the place that ``primary`` names, then the
    other wrong ones, then the rest. Small ones are never cut for the sake of large ones."""
    wrong = _wrong(snapshot)
    layout = snapshot.layout
    own = _own(snapshot)
    grids = [
        _grid(layout, zone, zone.start in own) for zone in layout.zones if zone.start in own or zone.start in wrong
    ]
    rooms = _rooms(grids, wrong)
    drawn = {
        start: _picture(snapshot, grid, wrong.get(start), own.get(start, ()), rooms[start])
        for start, grid in ((grid.zone.start, grid) for grid in grids)
    }

    def place(grid: _Grid) -> tuple[bool, bool, bool, int]:
        zone = grid.zone
        named = (zone.name, zone.step) == (primary.buffer, primary.step) and zone.kind == _kind(primary)
        return zone.start not in wrong, not named, zone.step != primary.step, zone.start

    return tuple(drawn[grid.zone.start] for grid in sorted(grids, key=place))


def _rooms(grids: Sequence[_Grid], wrong: Mapping[int, _Wrong]) -> dict[int, int]:
    """How many cells each may have: what small ones leave is shared by large ones, and what wrong ones leave, but for
    a part that is kept for them, by the others."""
    rooms, left = {}, MOST_CELLS
    for group in (True, False):
        chosen = sorted((it for it in grids if (it.zone.start in wrong) is group), key=lambda it: it.cells)
        kept = min(KEPT_CELLS, sum(it.cells for it in grids) - sum(it.cells for it in chosen)) if group else 0
        for number, grid in enumerate(chosen):
            room = min(grid.cells, (left - kept) // (len(chosen) - number))
            rooms[grid.zone.start] = room
            left -= room
    return rooms


def _kind(finding: Finding) -> str:
    return finding.region if finding.region in ("guard", "input") else "buffer"


def _wrong(snapshot: Snapshot) -> dict[int, _Wrong]:
    """The wrong cells of each zone, by the zone's start."""
    allowed = is_allowed(snapshot.after, snapshot.before, snapshot.wanted, snapshot.classes)
    found: dict[int, _Wrong] = {}
    for index in (~allowed).nonzero().flatten().tolist():
        start = snapshot.layout.zone_at(index).start
        known = found.get(start, _Wrong(index, 0))
        found[start] = known._replace(number=known.number + 1)
    return found


def _own(snapshot: Snapshot) -> dict[int, tuple[str, ...]]:
    """The zones of the buffers of this replay's mode and bucket by their start, and their other names in it."""
    layout, own = snapshot.layout, (snapshot.case.replays[snapshot.replay].mode, snapshot.case.bucket(snapshot.replay))
    found: dict[int, tuple[str, ...]] = {}
    for (_, mode, bucket, name), place in layout.places.items():
        if (mode, bucket) == own:
            zone = layout.zone_at(place.offset)
            found[zone.start] = (*found.get(zone.start, ()), *(() if zone.name == name else (name,)))
    return found


def _grid(layout: ArenaLayout, zone: Zone, own: bool) -> _Grid:
    length = zone.end - zone.start
    if zone.kind != "buffer" or zone.name not in TWO_DIMENSIONAL:
        return _Grid(zone, 1, length, GUARD_CELLS if own else 0)
    rows = length // zone.stride
    behind = layout.zone_at(zone.end)
    return _Grid(zone, rows, zone.columns, min(zone.stride if rows > 1 else GUARD_CELLS, behind.end - behind.start))


def _picture(snapshot: Snapshot, grid: _Grid, wrong: _Wrong | None, aliases: tuple[str, ...], room: int) -> Picture:
    zone = grid.zone
    picture = Picture(
        buffer=zone.name,
        kind=zone.kind,
        step=zone.step,
        owner=_owner(snapshot, zone),
        aliases=aliases,
        rows=grid.rows,
        columns=grid.columns,
        wrong=wrong.number if wrong is not None else 0,
    )
    few = max(FEW_COLUMNS, room // min(grid.drawn_rows, FEW_ROWS))
    columns = min(grid.drawn_columns, MOST_COLUMNS, few, room)
    if columns < min(grid.drawn_columns, FEWEST_CELLS):
        return picture
    rows = min(grid.drawn_rows, MOST_ROWS, room // columns)
    width = zone.stride or grid.drawn_columns
    row, column = divmod((wrong.first if wrong is not None else zone.start) - zone.start, width)
    first_row = _first(row, rows, grid.drawn_rows)
    first_column = _first(column, columns, grid.drawn_columns)
    starts = (zone.start + at * width + first_column for at in range(first_row, first_row + rows))
    squares = tuple(tuple(_squares(snapshot, range(start, start + columns))) for start in starts)
    return replace(picture, first_row=first_row, first_column=first_column, squares=squares)


def _owner(snapshot: Snapshot, zone: Zone) -> str:
    replay = snapshot.case.replays[snapshot.replay]
    other = zone.mode is not None and (zone.mode, zone.bucket) != (replay.mode, snapshot.case.bucket(snapshot.replay))
    return f"{Mode(zone.mode)}, bucket {zone.bucket}" if other and zone.mode is not None else ""


def _first(at: int, shown: int, whole: int) -> int:
    """Where a stretch of ``shown`` begins that has ``at`` in it, most of it behind."""
    return max(0, min(at - shown // _AHEAD, whole - shown))


def _squares(snapshot: Snapshot, cells: range) -> Iterable[Square]:
    stretch = slice(cells.start, cells.stop)
    arrays = (snapshot.wanted, snapshot.before, snapshot.after, snapshot.classes)
    told = zip(cells, *(array[stretch].tolist() for array in arrays), strict=True)
    for index, wanted, before, after, region in told:
        name, expected, allowed = region_of(snapshot.layout.zone_at(index), region, wanted, before, after)
        yield Square(name, expected, after, before, not allowed)
