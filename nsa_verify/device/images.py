"""The oracle's expectation, laid out as the arena: what every int32 of it must hold after each replay.

An image is two flat arrays per replay: the formula's value and the region class of every arena element.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from nsa_verify.core.buffers import FROZEN
from nsa_verify.core.case import Case, Mode, Setup, longest
from nsa_verify.core.implementation import Extent, Implementation
from nsa_verify.core.oracle import Expectation, batch, expect
from nsa_verify.device.layout import ArenaLayout, InputPlace, Place, arena_layout, poison

if TYPE_CHECKING:
    from torch import Tensor

FRAME: Final = 0
LIVE: Final = 1
SLACK: Final = 2

POISON_CHUNK: Final = 1 << 14


@lru_cache(maxsize=8)
def _poison_up_to(length: int) -> array[int]:
    return array("i", map(poison, range(length)))


@lru_cache(maxsize=8)
def initial_image(setup: Setup) -> array[int]:
    """The arena before the first replay: poison everywhere, and the frozen aranges."""
    layout = arena_layout(setup)
    image = _poison_up_to(-(-layout.size // POISON_CHUNK) * POISON_CHUNK)[: layout.size]
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
    layout = arena_layout(case.setup)
    extent, block, writes = key
    base = initial_image(case.setup)
    values, classes = array("i"), bytearray()
    for replay in range(len(case.replays)):
        image, regions = array("i", base), bytearray(layout.size)
        _paint_inputs(layout, case, replay, image, regions)
        expected = expect(case, replay, extent, max(1, block))
        for step in range(case.setup.num_steps):
            _paint_step(layout, step, expected, writes, image, regions)
        values.extend(image)
        classes.extend(regions)
    return values, classes


def _paint_step(
    layout: ArenaLayout, step: int, expected: Expectation, writes: frozenset[str], image: array[int], regions: bytearray
) -> None:
    for name, rows in expected.buffers.items():
        if name.startswith("paged_mqa_") and name not in writes:
            continue
        place = layout.places[step, expected.mode, expected.bucket, name]
        start = place.offset
        for row in rows:
            image[start : start + row.extent] = array("i", row.values)
            regions[start : start + row.extent] = _RUNS[LIVE][row.live] + _RUNS[SLACK][row.extent - row.live]
            start += place.stride


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


def _paint_inputs(layout: ArenaLayout, case: Case, replay: int, image: array[int], regions: bytearray) -> None:
    """Inputs must come back as they were, so all of the input zones is live, the gaps between elements included."""
    given = batch(case, replay)
    tail = case.setup.input_tail
    seq_lens = [*given.seq_lens, *[tail_length(case.setup, given.mode)] * tail]
    pool_rows = [*given.pool_rows, *[case.setup.pool_rows - 1] * tail]
    _scatter(image, layout.inputs["seq_lens"], seq_lens)
    _scatter(image, layout.inputs["req_pool_indices"], pool_rows)
    if given.mode in (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2):
        _scatter(image, layout.inputs["accept_lens"], [*given.accept_lens, *[case.setup.num_draft_tokens] * tail])
    for zone in layout.zones:
        if zone.kind == "input":
            regions[zone.start : zone.end] = _RUNS[LIVE][zone.end - zone.start]
    alias = aliased_place(layout, given.mode, given.bucket)
    if alias is not None:
        image[alias.offset : alias.offset + alias.columns] = array("i", given.seq_lens)


def _scatter(image: array[int], place: InputPlace, numbers: list[int]) -> None:
    step = place.words * place.stride
    for index, number in enumerate(numbers):
        at = place.offset + index * step
        image[at] = number
        if place.words == 2:
            image[at + 1] = 0


def aliased_place(layout: ArenaLayout, mode: Mode, bucket: int) -> Place | None:
    """Step 0's ``cache_seqlens`` where it is also the ``seq_lens`` input, else None."""
    if layout.setup.aliased_seq_lens and mode is Mode.DECODE:
        return layout.places[0, mode, bucket, "cache_seqlens"]
    return None
