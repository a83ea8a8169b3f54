"""``precomputed-batched-copy``: one launch places everything, by each step's strides, and touches nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_verify import CtxLens, MetadataBuffers, Mode, Setup
from nsa_verify.kernels import precomputed_batched_copy
from nsa_verify.kernels.precomputed_batched_copy import SharedMetadata, copy_into_all, precompute, refresh

POISON = -77
JUNK = 123_456_789
SEQ_LENS, ACCEPT_LENS = [13, 5, 1], [2, 0, 1]
WIDTH, PAGE_SIZE, TOKENS = 18, 16, 3

EXPANDED = {
    Mode.DECODE: [13, 5, 1],
    Mode.TARGET_VERIFY: [14, 15, 16, 6, 7, 8, 2, 3, 4],
    Mode.DRAFT_EXTEND: [12, 13, 1],
    Mode.DRAFT_EXTEND_V2: [11, 12, 13, 3, 4, 5, 0, 0, 1],
}
OWNERS = {
    Mode.DECODE: [0, 1, 2],
    Mode.TARGET_VERIFY: [0, 0, 0, 1, 1, 1, 2, 2, 2],
    Mode.DRAFT_EXTEND: [0, 0, 2],
    Mode.DRAFT_EXTEND_V2: [0, 0, 0, 1, 1, 1, 2, 2, 2],
}


def _setup(**fields: Any) -> Setup:
    wide: dict[str, Any] = {"num_draft_tokens": TOKENS, "index_topk": 8, "page_size": PAGE_SIZE, "table_width": WIDTH}
    return Setup(**(wide | {"pool_width": 24, "buckets": (3,)} | fields))


def _owned(tensor: Tensor, gap: int) -> Tensor:
    """Poisoned memory of ``tensor``'s shape whose rows lie ``gap`` elements apart."""
    rows, columns = tensor.shape
    return torch.full((rows, columns + gap), POISON, dtype=torch.int32, device=tensor.device)[:, :columns]


def _spread(step: MetadataBuffers, gap: int) -> MetadataBuffers:
    """``step`` with row strides of its own."""
    found = replace(step, page_table_1=_owned(step.page_table_1, gap))
    return replace(found, real_page_table=_owned(step.real_page_table, gap + 1))


def _gaps(tensor: Tensor) -> Tensor:
    """What lies between the rows of a tensor that ``_owned`` made."""
    assert tensor._base is not None
    return tensor._base[:, tensor.shape[1] :]


def _assert_tables(step: MetadataBuffers, mode: Mode, pool: Tensor, cache_seqlens: list[int]) -> None:
    """The live prefix of every defined row holds the pool's slots and pages, and every other cell is poison."""
    slots = torch.full_like(step.page_table_1, POISON)
    pages = torch.full_like(step.real_page_table, POISON)
    for row, owner in enumerate(OWNERS[mode]):
        live = pool[owner, : cache_seqlens[owner]]
        slots[row, : len(live)] = live
        pages[row, : len(live[::PAGE_SIZE])] = live[::PAGE_SIZE] // PAGE_SIZE
    assert torch.equal(step.page_table_1, slots)
    assert torch.equal(step.real_page_table, pages)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched, in order."""
    names: list[str] = []
    kind = type(precomputed_batched_copy._copy_everywhere)
    run = kind.run

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counting)
    return names


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_one_launch_copies_everything(
    make_backend: Callable[..., Any], launches: list[str], mode: Mode, num_steps: int
) -> None:
    setup = _setup(num_steps=num_steps, ctx_lens=CtxLens.OWN, schedule=True)
    backend = make_backend(setup, mode, SEQ_LENS, ACCEPT_LENS)
    refresh(backend.inputs, backend.steps, setup)
    assert launches == ["_expand_rows", "_gather_pages", "_copy_everywhere"]
    shared = precompute(backend.inputs, setup)
    rows, first = len(EXPANDED[mode]), backend.steps[0]
    assert shared.schedule is not None
    for step in backend.steps:
        assert step.cache_seqlens.tolist() == shared.cache_seqlens.tolist()
        assert step.nsa_seqlens_expanded[:rows].tolist() == EXPANDED[mode]
        assert torch.equal(step.page_table_1, first.page_table_1)
        assert torch.equal(step.real_page_table, first.real_page_table)
        assert torch.equal(step.paged_mqa_schedule, shared.schedule)
        lens = [16] * 3 + [8] * 3 + [4] * 3 if mode is Mode.TARGET_VERIFY else EXPANDED[mode]
        assert step.paged_mqa_ctx_lens.flatten()[:rows].tolist() == lens


@pytest.mark.parametrize("mode", list(Mode))
def test_every_destination_has_its_own_row_stride(make_backend: Callable[..., Any], mode: Mode) -> None:
    setup = _setup(num_steps=4)
    backend = make_backend(setup, mode, SEQ_LENS, ACCEPT_LENS)
    steps = [_spread(step, gap) for step, gap in zip(backend.steps, (7, 0, 46, 3), strict=True)]
    refresh(backend.inputs, steps, setup)
    for step in steps:
        _assert_tables(step, mode, backend.inputs.req_to_token, step.cache_seqlens.tolist())
        assert _gaps(step.page_table_1).eq(POISON).all()
        assert _gaps(step.real_page_table).eq(POISON).all()


def test_optional_fields_are_placed_by_their_strides(make_backend: Callable[..., Any]) -> None:
    setup = _setup(num_steps=3, ctx_lens=CtxLens.OWN, schedule=True, num_sms=2)
    backend = make_backend(setup, Mode.TARGET_VERIFY, [300, 5, 600], ACCEPT_LENS)
    steps = [
        replace(
            step,
            paged_mqa_ctx_lens=_owned(step.paged_mqa_ctx_lens, gap),
            paged_mqa_schedule=_owned(step.paged_mqa_schedule, gap + 2),
        )
        for gap, step in enumerate(backend.steps)
    ]
    # 2 + 1 + 3 segments for two SMs: the first takes rows 0 and 1, the second row 2.
    refresh(replace(backend.inputs, req_to_token=backend.inputs.req_to_token.repeat(1, 30)), steps, setup)
    for step in steps:
        assert step.paged_mqa_ctx_lens is not None
        assert step.paged_mqa_schedule is not None
        assert step.paged_mqa_ctx_lens.tolist() == [[303] * 3, [8] * 3, [603] * 3]
        assert step.paged_mqa_schedule.tolist() == [[0, 0], [2, 0], [3, 0]]
        assert _gaps(step.paged_mqa_ctx_lens).eq(POISON).all()
        assert _gaps(step.paged_mqa_schedule).eq(POISON).all()


def test_a_step_need_not_keep_what_another_keeps(make_backend: Callable[..., Any]) -> None:
    setup = _setup(num_steps=4, ctx_lens=CtxLens.OWN, schedule=True)
    backend = make_backend(setup, Mode.TARGET_VERIFY, SEQ_LENS)
    first, second, third, fourth = backend.steps
    steps = [
        replace(first, paged_mqa_ctx_lens=None, paged_mqa_schedule=None),
        replace(second, paged_mqa_ctx_lens=None),
        replace(third, paged_mqa_schedule=None),
        fourth,
    ]
    refresh(backend.inputs, steps, setup)
    kept = [step.paged_mqa_schedule.tolist() for step in backend.steps]
    assert kept == [[[POISON] * 2] * 5, kept[1], [[POISON] * 2] * 5, kept[1]]
    assert kept[1] == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 0]]
    lens = [[16] * 3, [8] * 3, [4] * 3]
    assert [step.paged_mqa_ctx_lens.tolist() for step in backend.steps] == [[[POISON] * 3] * 3] * 2 + [lens, lens]
    for step in backend.steps:
        assert step.nsa_seqlens_expanded.tolist() == EXPANDED[Mode.TARGET_VERIFY]


def test_the_alias_of_decode_is_not_copied_a_second_time(make_backend: Callable[..., Any]) -> None:
    setup = _setup(num_steps=2)
    backend = make_backend(setup, Mode.DECODE, SEQ_LENS)
    apart = [replace(step, nsa_seqlens_expanded=torch.full_like(step.cache_seqlens, POISON)) for step in backend.steps]
    refresh(backend.inputs, apart, setup)
    for step in apart:
        assert step.cache_seqlens.tolist() == SEQ_LENS
        assert step.nsa_seqlens_expanded.eq(POISON).all()


def test_page_size_one_writes_one_table(make_backend: Callable[..., Any]) -> None:
    setup = _setup(page_size=1, num_steps=2)
    backend = make_backend(setup, Mode.DECODE, SEQ_LENS)
    apart = [replace(step, real_page_table=torch.full_like(step.page_table_1, POISON)) for step in backend.steps]
    refresh(backend.inputs, apart, setup)
    assert precompute(backend.inputs, setup).real_page_table is None
    for step in apart:
        assert step.page_table_1[0, :13].tolist() == [3 * column for column in range(13)]
        assert step.real_page_table.eq(POISON).all()


def _spoil(shared: SharedMetadata, rows: int) -> None:
    """Junk in every element of the intermediates that stands for nothing: past R, and past the live prefix."""
    shared.seqlens_expanded[rows:] = JUNK
    shared.nsa_cache_seqlens[rows:] = JUNK
    shared.nsa_cu_seqlens_k[rows + 1 :] = JUNK
    for request, length in enumerate(shared.cache_seqlens.tolist()):
        shared.page_indices[request, length:] = JUNK
        if shared.real_page_table is not None:
            shared.real_page_table[request, -(-length // PAGE_SIZE) :] = JUNK


@pytest.mark.parametrize("mode", list(Mode))
def test_what_the_intermediates_hold_beyond_their_content_stays_there(
    make_backend: Callable[..., Any], mode: Mode
) -> None:
    setup = _setup(num_steps=2)
    backend = make_backend(setup, mode, SEQ_LENS, ACCEPT_LENS)
    shared = precompute(backend.inputs, setup)
    rows = len(EXPANDED[mode])
    _spoil(shared, rows)
    copy_into_all(backend.steps, shared, mode, setup)
    for step in backend.steps:
        _assert_tables(step, mode, backend.inputs.req_to_token, step.cache_seqlens.tolist())
        assert step.nsa_seqlens_expanded[:rows].tolist() == EXPANDED[mode]
        assert step.nsa_cache_seqlens[rows:].eq(POISON).all()
        assert step.nsa_cu_seqlens_k[rows + 1 :].eq(POISON).all()
        if mode is not Mode.DECODE:
            assert step.nsa_seqlens_expanded[rows:].eq(POISON).all()


def test_rows_past_the_total_have_no_owner(make_backend: Callable[..., Any]) -> None:
    setup = _setup()
    for accept_lens, owners in (([2, 0, 1], [0, 0, 2]), ([0, 0, 0], []), ([3, 3, 3], [0, 0, 0, 1, 1, 1, 2, 2, 2])):
        shared = precompute(make_backend(setup, Mode.DRAFT_EXTEND, SEQ_LENS, accept_lens).inputs, setup)
        assert shared.owners.tolist() == owners + [3] * (9 - len(owners))


def test_the_launch_is_as_large_for_any_batch_of_a_bucket(
    make_backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = _setup(schedule=True, num_steps=2)
    kind = type(precomputed_batched_copy._copy_everywhere)
    grids: set[Any] = set()
    monkeypatch.setattr(kind, "run", lambda kernel, *_, grid, **__: grids.add((kernel.fn.__name__, grid)))
    for seq_lens, accept_lens in (([1, 1, 1], [0, 0, 0]), ([18, 18, 18], [3, 3, 3])):
        backend = make_backend(setup, Mode.DRAFT_EXTEND, seq_lens, accept_lens)
        refresh(backend.inputs, backend.steps, setup)
    assert len(grids) == 3
