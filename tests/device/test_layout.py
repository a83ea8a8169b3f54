"""The arena: nothing overlaps but what the contract shares, guards lie between, and all of it is poison at first."""

from __future__ import annotations

import itertools

import pytest
import torch
from device.subjects import subject
from torch import Tensor

from nsa_verify import Case, CtxLens, Layout, Mode, Replay, Request, Setup
from nsa_verify.core.buffers import FROZEN, TABLES, alias_of, shapes
from nsa_verify.core.case import IntType
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS
from nsa_verify.device.images import ImageKey, initial_image, paint
from nsa_verify.device.layout import ALIGNMENT, GUARD, Place, arena_layout, is_poison, poison
from nsa_verify.device.rig import Rig

WIDE = Setup(
    num_draft_tokens=3,
    page_size=16,
    table_width=40,
    table_row_stride=43,
    stride_skew=5,
    pool_rows=3,
    pool_width=44,
    pool_row_stride=51,
    num_steps=3,
    buckets=(1, 2, 5),
    ctx_lens=CtxLens.OWN,
    schedule=True,
    input_tail=2,
)
SETUPS = {
    "plain": Setup(),
    "wide": WIDE,
    "pages of one token": Setup(num_draft_tokens=2, buckets=(1, 3), num_steps=2, ctx_lens=CtxLens.VIEW),
    "aliased": Setup(buckets=(2, 4), aliased_seq_lens=True, pool_index_dtype="int32"),
    "strided int64": Setup(layout=Layout.STRIDED, seq_lens_dtype="int64", buckets=(3,)),
    "offset int64": Setup(layout=Layout.OFFSET, seq_lens_dtype="int64", buckets=(3,)),
}
setups = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)


def cells_of(place: Place) -> set[int]:
    return {place.offset + row * place.stride + column for row in range(place.rows) for column in range(place.columns)}


@setups
def test_zones_tile_the_arena_and_guards_lie_between(setup: Setup) -> None:
    layout = arena_layout(setup)
    assert layout.zones[0].start == 0
    assert layout.zones[-1].end == layout.size
    for zone, following in itertools.pairwise(layout.zones):
        assert zone.end == following.start
        assert (zone.kind == "guard") != (following.kind == "guard")
    for zone in layout.zones:
        assert zone.start < zone.end
        if zone.kind == "guard":
            assert zone.end - zone.start >= GUARD
        else:
            assert zone.start % ALIGNMENT == 0
    assert layout.zones[0].kind == layout.zones[-1].kind == "guard"


@setups
def test_guards_behind_tables_hold_two_rows(setup: Setup) -> None:
    zones = arena_layout(setup).zones
    behind = [
        (zone, guard) for zone, guard in itertools.pairwise(zones) if zone.kind == "buffer" and zone.name in TABLES
    ]
    assert len(behind) == setup.num_steps * (1 if setup.page_size == 1 else 2)
    for zone, guard in behind:
        assert guard.end - guard.start >= 2 * zone.stride
        assert (guard.name, guard.step) == (zone.name, zone.step)


@setups
def test_zone_at_finds_every_element(setup: Setup) -> None:
    layout = arena_layout(setup)
    for zone in layout.zones:
        assert layout.zone_at(zone.start) == layout.zone_at(zone.end - 1) == zone


@setups
def test_only_declared_aliases_and_table_backings_share_memory(setup: Setup) -> None:
    layout = arena_layout(setup)
    owners: dict[int, tuple[object, ...]] = {}
    for (step, mode, bucket, name), place in layout.places.items():
        owned = alias_of(setup, mode, name) or name
        owner: tuple[object, ...] = (step, owned) if owned in TABLES else (step, mode, bucket, owned)
        zone = layout.zone_at(place.offset)
        assert (zone.kind, zone.name, zone.step) == ("buffer", owned, step)
        for cell in cells_of(place):
            assert owners.setdefault(cell, owner) == owner
            assert zone.start <= cell < zone.end


@setups
def test_every_buffer_has_the_shape_of_the_contract(setup: Setup) -> None:
    places = arena_layout(setup).places
    for step in range(setup.num_steps):
        for mode, bucket in itertools.product(Mode, setup.buckets):
            wanted = shapes(setup, mode, bucket)
            found = {name: places[step, mode, bucket, name][1:3] for name in wanted}
            assert found == {name: tuple(shape) for name, shape in wanted.items()}


def test_table_backings_are_shared_by_buckets_and_modes() -> None:
    places = arena_layout(WIDE).places
    for step, name in itertools.product(range(3), TABLES):
        starts = {places[step, mode, bucket, name].offset for mode in Mode for bucket in WIDE.buckets}
        assert len(starts) == 1
    assert len({places[step, Mode.DECODE, 1, "page_table_1"].offset for step in range(3)}) == 3


def test_strides_grow_from_step_to_step() -> None:
    places = arena_layout(WIDE).places
    strides = [[places[step, Mode.DECODE, 5, name].stride for step in range(3)] for name in TABLES]
    assert strides == [[43, 48, 53], [6, 11, 16]]


@setups
def test_the_initial_image_is_poison_and_nowhere_zero(setup: Setup) -> None:
    layout, image = arena_layout(setup), initial_image(setup)
    frozen = set()
    for (_, _, _, name), place in layout.places.items():
        if name in FROZEN:
            frozen |= cells_of(place)
            assert list(image[place.offset : place.offset + place.columns]) == list(range(place.columns))
    assert len(image) == layout.size
    for index, value in enumerate(image):
        if index not in frozen:
            assert value == poison(index)
            assert is_poison(value)


def test_poison_differs_over_a_million_elements() -> None:
    values = (torch.arange(1 << 20) * 7919) % (1 << 20)
    assert len(set(values.tolist())) == 1 << 20
    assert [poison(index) - poison(0) for index in (1, 2, 1 << 20)] == [7919, 15838, 0]
    assert not is_poison(-1)
    assert not is_poison(poison(0) + (1 << 20))
    assert all(is_poison(poison(index)) for index in (0, 1, 132, 133, (1 << 20) - 1))


def address(tensor: Tensor) -> int:
    return tensor.data_ptr()


@setups
def test_views_are_the_places(setup: Setup) -> None:
    rig = Rig(setup, "cpu")
    for mode, bucket in itertools.product(Mode, setup.buckets):
        for step, buffers in enumerate(rig.steps(mode, bucket, OPTIONAL_OUTPUTS)):
            for name, shape in shapes(setup, mode, bucket).items():
                place, view = rig.layout.places[step, mode, bucket, name], getattr(buffers, name)
                two_dimensional = name in TABLES or name in OPTIONAL_OUTPUTS
                assert tuple(view.shape) == (tuple(shape) if two_dimensional else (shape.columns,))
                assert view.dtype is torch.int32
                assert address(view) == address(rig.arena) + 4 * place.offset
                assert view.stride() == ((place.stride, 1) if two_dimensional else (1,))


def test_aliases_have_one_address() -> None:
    rig = Rig(SETUPS["pages of one token"], "cpu")
    decode = rig.steps(Mode.DECODE, 3, OPTIONAL_OUTPUTS)[1]
    assert decode.paged_mqa_ctx_lens is not None
    assert address(decode.nsa_seqlens_expanded) == address(decode.cache_seqlens) == address(decode.paged_mqa_ctx_lens)
    assert decode.real_page_table is decode.page_table_1
    extend = rig.steps(Mode.DRAFT_EXTEND, 3, OPTIONAL_OUTPUTS)[1]
    assert extend.paged_mqa_ctx_lens is not None
    assert address(extend.nsa_seqlens_expanded) == address(extend.paged_mqa_ctx_lens) != address(extend.cache_seqlens)


def test_an_aliased_input_is_step_0s_cache_seqlens_in_decode_only() -> None:
    rig = Rig(SETUPS["aliased"], "cpu")
    for bucket in (2, 4):
        given = rig.inputs(Mode.DECODE, bucket).seq_lens
        assert address(given) == address(rig.steps(Mode.DECODE, bucket, OPTIONAL_OUTPUTS)[0].cache_seqlens)
        assert given.shape == (bucket,)
        elsewhere = rig.inputs(Mode.TARGET_VERIFY, bucket).seq_lens
        assert address(elsewhere) == address(rig.arena) + 4 * rig.layout.inputs["seq_lens"].offset


def test_undeclared_optional_outputs_are_not_handed_out() -> None:
    (step, *_) = Rig(WIDE, "cpu").steps(Mode.DECODE, 2, frozenset({"paged_mqa_schedule"}))
    assert step.paged_mqa_ctx_lens is None
    assert step.paged_mqa_schedule is not None
    assert Rig(Setup(), "cpu").steps(Mode.DECODE, 1, frozenset())[0].paged_mqa_schedule is None


@pytest.mark.parametrize("pool_index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(("layout", "stride", "lead"), [("contiguous", 1, 0), ("strided", 3, 0), ("offset", 1, 5)])
def test_inputs_read_through_their_views(
    layout: str, stride: int, lead: int, dtype: IntType, pool_index_dtype: IntType
) -> None:
    setup = Setup(
        num_draft_tokens=2,
        pool_rows=4,
        buckets=(2, 3),
        layout=Layout(layout),
        seq_lens_dtype=dtype,
        pool_index_dtype=pool_index_dtype,
        input_tail=2,
    )
    requests = (Request(9, 2, 0), Request(7, 1, 2))
    case = Case(setup, (Replay(Mode.DRAFT_EXTEND, (*requests, Request(5, 3, 1))), Replay(Mode.DRAFT_EXTEND, requests)))
    rig = Rig(setup, "cpu")
    values, _ = paint(case, ImageKey.of(subject(), setup))
    for replay, bucket in ((0, 3), (1, 2)):
        expected = torch.tensor(values).view(2, -1)[replay].to(torch.int32)
        rig.load(case, replay, expected)
        given = rig.inputs(Mode.DRAFT_EXTEND, bucket)
        assert given.seq_lens.tolist()[:bucket] == [9, 7, 5][:bucket]
        assert given.req_pool_indices.tolist()[:bucket] == [2, 1, 3][:bucket]
        assert given.accept_lens.tolist()[:bucket] == [0, 2, 1][:bucket]
        assert given.seq_lens_cpu is not None
        assert given.seq_lens_cpu.tolist()[:bucket] == [9, 7, 5][:bucket]
        for tensor in (given.seq_lens, given.req_pool_indices, given.accept_lens, given.seq_lens_cpu):
            assert tensor.shape == (bucket + 2,)
        assert given.seq_lens.dtype is given.seq_lens_cpu.dtype is getattr(torch, dtype)
        assert given.req_pool_indices.dtype is getattr(torch, pool_index_dtype)
        assert given.accept_lens.dtype is torch.int32
        assert given.seq_lens.stride() == (stride,)
        words = 2 if dtype == "int64" else 1
        start = next(zone.start for zone in rig.layout.zones if zone.kind == "input" and zone.name == "seq_lens")
        assert address(given.seq_lens) == address(rig.arena) + 4 * (start + lead * words)


def test_accept_lens_are_poison_where_they_mean_nothing() -> None:
    setup = Setup(num_draft_tokens=2, buckets=(2,))
    case = Case(setup, (Replay(Mode.TARGET_VERIFY, (Request(4),)),))
    values, _ = paint(case, ImageKey.of(subject(), setup))
    rig = Rig(setup, "cpu")
    rig.load(case, 0, torch.tensor(values, dtype=torch.int32))
    assert all(is_poison(value) for value in rig.inputs(Mode.TARGET_VERIFY, 2).accept_lens.tolist())
