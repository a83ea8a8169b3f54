"""What exactly is wrong in a snapshot that the comparison rejected: every wrong cell gets a code and a place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from msgspec.structs import replace
from torch import Tensor

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Cell, Code, Finding
from nsa_verify.core.invariants import LENGTHS, PREFIX_SUMS, violations
from nsa_verify.core.oracle import Region, expect
from nsa_verify.device.images import FRAME, LIVE, SLACK, is_allowed
from nsa_verify.device.layout import TWO_DIMENSIONAL, ArenaLayout, InputPlace, Zone, is_poison
from nsa_verify.device.pool import Difference

WINDOW = 4
"""Cells shown on either side of the first difference."""

_REGIONS = {FRAME: Region.FRAME, LIVE: Region.LIVE, SLACK: Region.SLACK}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One call of an implementation, downloaded: flat arenas ``[size]`` on the CPU."""

    case: Case
    replay: int
    layout: ArenaLayout
    wanted: Tensor
    classes: Tensor
    before: Tensor
    after: Tensor
    inputs: Mapping[str, Difference | None]
    """What was changed in the inputs that lie outside the arena."""


@dataclass(slots=True)
class _Wrong:
    """The wrong cells of one zone that share a code."""

    zone: Zone
    code: Code
    first: int
    count: int = 1


def diagnose(snapshot: Snapshot, implementation: str, executor: str, alone: Tensor | None) -> list[Finding]:
    """One finding per (buffer, code), in the order of the arena. Never empty.

    ``alone`` is the arena after this replay without those before it, if that could be run: a cell that holds what it
    held before is stale only if the replay alone does not write the same wrong value there.
    """
    case, replay = snapshot.case, snapshot.replay
    blank = Finding(
        implementation=implementation,
        executor=executor,
        code=Code.INPUT_MUTATED,
        replay=replay,
        mode=case.replays[replay].mode,
    )
    found = [_finding(snapshot, wrong, blank) for wrong in _group(snapshot, alone)]
    found += [_outside(case, name, it, blank) for name, it in snapshot.inputs.items() if it is not None]
    if not found:
        raise RuntimeError("the comparison rejected the snapshot, but no wrong cell was found in it")
    return found


def _group(snapshot: Snapshot, alone: Tensor | None) -> list[_Wrong]:
    after, before, wanted, classes = snapshot.after, snapshot.before, snapshot.wanted, snapshot.classes
    allowed = is_allowed(after, before, wanted, classes)
    groups: dict[tuple[int, Code], _Wrong] = {}
    for index in (~allowed).nonzero().flatten().tolist():
        zone = snapshot.layout.zone_at(index)
        code = _code(snapshot, zone, index, alone)
        group = groups.get((zone.start, code))
        if group is None:
            groups[zone.start, code] = _Wrong(zone, code, index)
        else:
            group.count += 1
    _name_broken_invariants(snapshot, groups)
    return list(groups.values())


def _code(snapshot: Snapshot, zone: Zone, index: int, alone: Tensor | None) -> Code:
    if zone.kind == "guard":
        return Code.GUARD_WRITTEN
    if zone.kind == "input":
        return Code.INPUT_MUTATED
    region = int(snapshot.classes[index])
    if region == FRAME:
        return Code.FRAME_WRITTEN
    got = int(snapshot.after[index])
    if is_poison(got):
        return Code.POISON
    unchanged = region == LIVE and got == int(snapshot.before[index])
    wrong_anyway = alone is not None and got == int(alone[index])
    return Code.STALE if unchanged and not wrong_anyway else Code.WRONG_VALUE


def _name_broken_invariants(snapshot: Snapshot, groups: dict[tuple[int, Code], _Wrong]) -> None:
    """A wrong value in a buffer that breaks an invariant of lengths or prefix sums is that, and not just wrong."""
    replay = snapshot.case.replays[snapshot.replay]
    bucket = snapshot.case.bucket(snapshot.replay)
    for step in range(snapshot.case.setup.num_steps):
        for broken in violations(snapshot.case, snapshot.replay, _content(snapshot, step)):
            if broken.buffer not in (*LENGTHS, *PREFIX_SUMS):
                continue
            place = snapshot.layout.places[step, replay.mode, bucket, broken.buffer]
            zone = snapshot.layout.zone_at(place.offset)
            group = groups.pop((zone.start, Code.WRONG_VALUE), None)
            if group is not None:
                group.code = Code.INVARIANT
                groups[zone.start, Code.INVARIANT] = group


def _content(snapshot: Snapshot, step: int) -> dict[str, list[list[int]]]:
    """The defined rows of a step as the implementation left them, cut to their live prefix."""
    replay, bucket = snapshot.case.replays[snapshot.replay], snapshot.case.bucket(snapshot.replay)
    content = {}
    for name, rows in expect(snapshot.case, snapshot.replay).buffers.items():
        place = snapshot.layout.places[step, replay.mode, bucket, name]
        starts = [place.offset + index * place.stride for index in range(len(rows))]
        content[name] = [
            snapshot.after[start : start + row.live].tolist() for start, row in zip(starts, rows, strict=True)
        ]
    return content


def _finding(snapshot: Snapshot, wrong: _Wrong, blank: Finding) -> Finding:
    index, zone = wrong.first, wrong.zone
    region = int(snapshot.classes[index])
    expected = int(snapshot.before[index]) if region == FRAME else int(snapshot.wanted[index])
    got = int(snapshot.after[index])
    element = _element(snapshot.layout, zone, index)
    where = f"{zone.name}[{_comma(element)}]"
    if zone.kind == "guard":
        where = f"the guard zone behind {zone.name}, element {element[0]}"
    elif zone.kind == "input" and _is_beside(snapshot.layout.inputs[zone.name], index):
        where = f"the memory beside {where}"
    elif zone.mode is not None and (zone.mode, zone.bucket) != _own(snapshot):
        where += f" of the buffers of ({zone.mode}, bucket {zone.bucket})"
    return replace(
        blank,
        code=wrong.code,
        step=zone.step,
        buffer=zone.name,
        element=element,
        region=zone.kind if zone.kind != "buffer" else _REGIONS[region],
        expected=expected,
        got=got,
        # The inputs of this replay were put in place after the snapshot.
        before=expected if zone.kind == "input" else int(snapshot.before[index]),
        count=wrong.count,
        message=f"{where}: expected {_show(expected)}, got {_show(got)}",
        window=tuple(_window(snapshot, zone, index)),
    )


def _outside(case: Case, name: str, difference: Difference, blank: Finding) -> Finding:
    """The finding for an input that does not lie in the arena."""
    if not difference.element:
        return replace(blank, buffer=name, region="input", message=f"{name} was changed, and not when it was run again")
    expected, got = difference.expected, difference.got
    where = f"{name}[{_comma(difference.element)}]"
    if name == "req_to_token":
        row, column = difference.element
        inside = 0 <= row < case.setup.pool_rows and column < case.setup.pool_width
        where = where if inside else f"the memory beside {where}"
    return replace(
        blank,
        buffer=name,
        element=difference.element,
        region="input",
        expected=expected,
        got=got,
        before=expected,
        count=difference.count,
        message=f"{where}: expected {_show(expected)}, got {_show(got)}",
    )


def _comma(element: tuple[int, ...]) -> str:
    return ", ".join(map(str, element))


def _own(snapshot: Snapshot) -> tuple[object, object]:
    return snapshot.case.replays[snapshot.replay].mode, snapshot.case.bucket(snapshot.replay)


def _show(value: int) -> str:
    return "poison" if is_poison(value) else str(value)


def _element(layout: ArenaLayout, zone: Zone, index: int) -> tuple[int, ...]:
    """Row and column in tables and other 2-D buffers, the element of an input, otherwise the position in the zone."""
    if zone.kind == "input":
        place = layout.inputs[zone.name]
        return ((index - place.offset) // (place.words * place.stride),)
    at = index - zone.start
    return divmod(at, zone.stride) if zone.kind == "buffer" and zone.name in TWO_DIMENSIONAL else (at,)


def _is_beside(place: InputPlace, index: int) -> bool:
    """Whether arena element ``index`` lies before the input, or in the gap that its stride leaves."""
    return index < place.offset or (index - place.offset) % (place.words * place.stride) >= place.words


def _window(snapshot: Snapshot, zone: Zone, index: int) -> Iterator[Cell]:
    """The cells around ``index`` in its zone, and for tables in its row."""
    low, high, unit = zone.start, zone.end, 1
    if zone.kind == "buffer" and zone.stride:
        low = index - (index - zone.start) % zone.stride
        high = min(zone.end, low + zone.stride)
    if zone.kind == "input":
        place = snapshot.layout.inputs[zone.name]
        unit = place.words * place.stride
    for at in range(index - WINDOW * unit, index + WINDOW * unit + 1, unit):
        if not low <= at < high:
            continue
        region, wanted = int(snapshot.classes[at]), int(snapshot.wanted[at])
        before, got = int(snapshot.before[at]), int(snapshot.after[at])
        name, expected, allowed = region_of(zone, region, wanted, before, got)
        yield Cell(_element(snapshot.layout, zone, at), name, expected, got, not allowed)


def region_of(zone: Zone, region: int, wanted: int, before: int, got: int) -> tuple[str, int, bool]:
    """The region of a cell of ``zone`` by name, what it should hold, and whether it may hold what it does."""
    allowed = (region != FRAME and got == wanted) or (region != LIVE and got == before)
    expected = before if region == FRAME else wanted
    return zone.kind if zone.kind != "buffer" else _REGIONS[region].value, expected, allowed
