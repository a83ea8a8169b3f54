"""The oracle's expectation, laid out as the arena: what every int32 of it must hold after each replay.

An image is two flat arrays per replay: the formula's value and the region class of every arena element.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Final

from nsa_verify.core.buffers import FROZEN
from nsa_verify.core.case import Case, Mode, Setup, longest
from nsa_verify.core.implementation import Extent, Implementation
from nsa_verify.core.oracle import Row, batch, expect
from nsa_verify.device.layout import ArenaLayout, InputPlace, Place, arena_layout, poison

if TYPE_CHECKING:
    from torch import Tensor

FRAME: Final = 0
LIVE: Final = 1
SLACK: Final = 2


_known_poison = array("i")


def _poison_up_to(length: int) -> array[int]:
    """The poison of the first ``length`` elements of an arena, a copy; of whose beginning all arenas have the same."""
    known = len(_known_poison)
    if known < length:
        _known_poison.extend(map(poison, range(known, max(length, 2 * known))))
    return _known_poison[:length]


@lru_cache(maxsize=8)
def initial_image(setup: Setup) -> array[int]:
    """The arena before the first replay: poison everywhere, and the frozen aranges."""
    layout = arena_layout(setup)
    image = _poison_up_to(layout.size)
    for (_, _, _, name), place in layout.places.items():
        if name in FROZEN:
            image[place.offset : place.offset + place.columns] = array("i", range(place.columns))
    return image


class ImageKey(tuple[Extent, int, frozenset[str]]):
    """What of an implementation's declarations the expectation depends on."""

    __slots__ = ()

    @classmethod
    def of(cls, implementation: Implementation, setup: Setup) -> ImageKey:
        """The key of ``implementation`` under ``setup``."""
        block = implementation.block if implementation.extent is Extent.ROW else 0
        return cls((implementation.extent, block, implementation.writes(setup)))


def paint(case: Case, key: ImageKey) -> tuple[array[int], bytearray]:
    """``(values, classes)`` of all replays of ``case``, one arena after the other."""
    layout, replays = arena_layout(case.setup), len(case.replays)
    extent, block, writes = key
    values, classes = initial_image(case.setup) * replays, _input_regions(layout) * replays
    for replay in range(replays):
        start = replay * layout.size
        _paint_inputs(layout, case, replay, values, start)
        expected = expect(case, replay, extent, max(1, block))
        for name, rows in expected.buffers.items():
            if name.startswith("paged_mqa_") and name not in writes:
                continue
            places = [layout.places[step, expected.mode, expected.bucket, name] for step in range(case.setup.num_steps)]
            _paint_rows(rows, places, values, classes, start)
    return values, classes


def _paint_rows(
    rows: Sequence[Row], places: Sequence[Place], values: array[int], classes: bytearray, start: int
) -> None:
    """Paint the defined rows of a buffer at each of ``places``, in the image that begins at ``start``."""
    if len(rows) > 1 and all(row.live == place.stride for place in places for row in rows):
        # Nothing lies between the rows: they are one.
        everything = tuple(chain.from_iterable(row.values for row in rows))
        rows = (Row(everything, len(everything), len(everything)),)
    # Rows of one request are one object, so the work for each is done once.
    words = {id(row): array("i", row.values) for row in rows}
    regions = {id(row): _RUNS[LIVE][row.live] + _RUNS[SLACK][row.extent - row.live] for row in rows}
    for place in places:
        at = start + place.offset
        for row in rows:
            end = at + row.extent
            values[at:end] = words[id(row)]
            classes[at:end] = regions[id(row)]
            at += place.stride


class _Runs(dict[int, bytes]):
    def __init__(self, value: int) -> None:
        self.value = value

    def __missing__(self, length: int) -> bytes:
        return self.setdefault(length, bytes([self.value]) * length)


_RUNS = {LIVE: _Runs(LIVE), SLACK: _Runs(SLACK)}


def is_allowed(after: Tensor, before: Tensor, wanted: Tensor, classes: Tensor) -> Tensor:
    """Which arena elements obey their region (contract, section 3); bool, of the shape that the four share.

    Live holds what is wanted, frame what it held before, slack either.
    """
    return ((after == wanted) & (classes != FRAME)) | ((after == before) & (classes != LIVE))


def tail_length(setup: Setup, mode: Mode) -> int:
    """What ``seq_lens`` holds past the bucket: the longest legal length, so that a maximum or a sum over it is wrong.

    Plausible, as all that input elements past the bucket hold: using it shows as a wrong value and not as a crash.
    """
    return longest(setup, mode)


def _input_regions(layout: ArenaLayout) -> bytearray:
    """Inputs must come back as they were, so all of the input zones is live, the gaps between elements included."""
    regions = bytearray(layout.size)
    for zone in reversed(layout.zones):
        if zone.end <= layout.inputs_start:
            break
        if zone.kind == "input":
            regions[zone.start : zone.end] = _RUNS[LIVE][zone.end - zone.start]
    return regions


def _paint_inputs(layout: ArenaLayout, case: Case, replay: int, image: array[int], start: int) -> None:
    """What the inputs hold, in the image that begins at ``start``."""
    given = batch(case, replay)
    tail = case.setup.input_tail
    seq_lens = [*given.seq_lens, *[tail_length(case.setup, given.mode)] * tail]
    pool_rows = [*given.pool_rows, *[case.setup.pool_rows - 1] * tail]
    _scatter(image, start, layout.inputs["seq_lens"], seq_lens)
    _scatter(image, start, layout.inputs["req_pool_indices"], pool_rows)
    if given.mode in (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2):
        accepted = [*given.accept_lens, *[case.setup.num_draft_tokens] * tail]
        _scatter(image, start, layout.inputs["accept_lens"], accepted)
    alias = aliased_place(layout, given.mode, given.bucket)
    if alias is not None:
        at = start + alias.offset
        image[at : at + alias.columns] = array("i", given.seq_lens)


def _scatter(image: array[int], start: int, place: InputPlace, numbers: list[int]) -> None:
    at, step = start + place.offset, place.words * place.stride
    end = at + len(numbers) * step
    image[at:end:step] = array("i", numbers)
    if place.words == 2:
        image[at + 1 : end : step] = array("i", bytes(4 * len(numbers)))


def aliased_place(layout: ArenaLayout, mode: Mode, bucket: int) -> Place | None:
    """Step 0's ``cache_seqlens`` where it is also the ``seq_lens`` input, else None."""
    if layout.setup.aliased_seq_lens and mode is Mode.DECODE:
        return layout.places[0, mode, bucket, "cache_seqlens"]
    return None
