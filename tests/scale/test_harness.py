"""The harness of the scale tests at sizes that the interpreter can take: is right called right, and wrong wrong?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import pytest
import torch
from scale.harness import GUARD, POISON, Workload, first_mismatch, slot, spoil
from scale.vectorised import Mismatch
from scale.workloads import WORKLOADS, large_batch, long_pool, long_rows, many_rows, tall_tables, wide_tables

from nsa_verify import MetadataBuffers, Mode, ReplayInputs, Setup
from nsa_verify.core.implementation import registered
from nsa_verify.core.registry import load_builtin
from nsa_verify.kernels import onepass

load_builtin()

DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"
"""Where compiled kernels run; without CUDA they are interpreted."""
MAKERS: Final[dict[str, Callable[[Mode], Workload]]] = {
    "tall tables": partial(tall_tables, rows=20, row_stride=200, longest=150),
    "many rows": partial(many_rows, rows=36),
    "large batch": partial(large_batch, batch_size=7, longest=400),
    "long rows": partial(long_rows, batch_size=20, num_steps=2, width=700),
    "long rows of one token": partial(long_rows, batch_size=14, num_steps=1, width=300, tokens=1, page_size=16),
    "long rows without pages": partial(
        long_rows, batch_size=12, num_steps=5, width=300, tokens=2, page_size=1, stride_skew=3
    ),
    "wide tables": partial(wide_tables, rows=40, width=140),
    "long pool": partial(long_pool, pool_rows=9, pool_width=120, batch_size=7, table_width=50),
}
EXECUTORS: Final = pytest.mark.parametrize(
    "captured", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["eager", "captured"]
)


@EXECUTORS
@pytest.mark.parametrize("name", ["onepass", "triton-inplace", "precomputed-batched-copy"])
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_right_is_called_right(maker: str, mode: Mode, name: str, captured: bool) -> None:
    assert first_mismatch(MAKERS[maker](mode), registered()[name], DEVICE, captured) is None


PLANTED: Final = [
    (Mode.DECODE, "page_table_1", 16, 149, slot(96, 149)),
    (Mode.DECODE, "page_table_1", 19, 140, POISON),
    (Mode.DECODE, "page_table_1", 19, 199, POISON),
    (Mode.DECODE, "real_page_table", 16, 2, slot(96, 128) // 64),
    (Mode.DECODE, "req_to_token", 96, 158, slot(96, 158)),
    (Mode.DECODE, "seq_lens", 0, 16, 150),
    (Mode.DECODE, "nsa_cu_seqlens_q", 0, 20, 20),
    (Mode.DRAFT_EXTEND, "page_table_1", 20, 0, POISON),
    (Mode.DRAFT_EXTEND, "nsa_cu_seqlens_k", 0, 21, POISON),
    (Mode.DRAFT_EXTEND_V2, "nsa_seqlens_expanded", 0, 16, 0),
]


@EXECUTORS
@pytest.mark.parametrize("name", ["onepass", "triton-inplace"])
@pytest.mark.parametrize(("mode", "buffer", "row", "column", "expected"), PLANTED)
def test_one_wrong_cell_is_found(
    mode: Mode, buffer: str, row: int, column: int, expected: int, name: str, captured: bool
) -> None:
    spoiled = spoil(registered()[name], buffer, row, column, 7)
    found = first_mismatch(MAKERS["tall tables"](mode), spoiled, DEVICE, captured)
    assert found == Mismatch(buffer, row, column, expected, 7)


@pytest.mark.parametrize(
    ("buffer", "column", "guard"),
    [
        ("nsa_cache_seqlens", -1, Mismatch("guard before nsa_cache_seqlens", 0, GUARD - 1, POISON, 7)),
        ("cu_seqlens_k", 21, Mismatch("guard after cu_seqlens_k", 0, 0, POISON, 7)),
        ("page_table_1", 20 * 200 + 5, Mismatch("guard after page_table_1", 0, 5, POISON, 7)),
        ("req_pool_indices", 20, Mismatch("guard after req_pool_indices", 0, 0, POISON, 7)),
        ("req_to_token", -2, Mismatch("guard before req_to_token", 0, GUARD - 2, POISON, 7)),
    ],
)
def test_a_write_beside_a_buffer_is_found(buffer: str, column: int, guard: Mismatch) -> None:
    spoiled = spoil(registered()["onepass"], buffer, 0, column, 7)
    assert first_mismatch(MAKERS["tall tables"](Mode.DECODE), spoiled, DEVICE, captured=False) == guard


def test_the_last_step_is_looked_at() -> None:
    work = MAKERS["many rows"](Mode.DECODE)
    spoiled = spoil(registered()["onepass"], "paged_mqa_schedule", 132, 0, 7)
    assert first_mismatch(work, spoiled, DEVICE, captured=False) == Mismatch("paged_mqa_schedule", 132, 0, 36, 7)


@pytest.mark.gpu
def test_inputs_frozen_at_capture_are_found() -> None:
    """What keeps the lengths of the capture is right in eager runs alone."""
    plain = registered()["onepass"]

    def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
        if torch.cuda.is_current_stream_capturing():
            inputs = replace(inputs, seq_lens=frozen)
        plain.refresh(inputs, steps, setup)

    work, faulty = MAKERS["tall tables"](Mode.DECODE), replace(plain, refresh=refresh)
    frozen = torch.ones(work.batch_size, dtype=torch.int32, device=DEVICE)
    assert first_mismatch(work, faulty, DEVICE, captured=False) is None
    found = first_mismatch(work, faulty, DEVICE, captured=True)
    assert found is not None
    assert (found.buffer, found.row, found.got) == ("cache_seqlens", 0, 1)


@pytest.mark.parametrize("mode", Mode)
def test_the_workloads_are_what_they_say(mode: Mode) -> None:
    for rows in (36, 37, 1000):
        work = many_rows(mode, rows)
        accepted = int(work.accept_lens.sum())
        expanded = accepted if mode is Mode.DRAFT_EXTEND else work.setup.captured_rows(mode, work.batch_size)
        assert expanded == (rows if mode in (Mode.DECODE, Mode.DRAFT_EXTEND) else rows // 4 * 4)
    work = large_batch(mode, 512, 4000)
    assert int(work.seq_lens.max()) == (3992 if mode is Mode.TARGET_VERIFY else 4000)
    assert (0 in work.accept_lens) == (mode is Mode.DRAFT_EXTEND)


def test_every_form_of_onepass_that_engines_get_is_run_beyond_the_heads_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By columns of a tile, pages or none, and row strides that are the same in all steps or not."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    forms, numbers = set(), set()
    for make in WORKLOADS.values():
        work = make()
        setup = work.setup
        assert work.needed_bytes() <= 28 << 30
        if setup.table_width < 1024:
            continue
        shape = onepass._shape(work.batch_size, setup, work.seq_lens, setup.num_steps)
        written = work.seq_lens[work.accept_lens > 0].clamp(max=setup.table_width)
        if int(written.max()) > shape.head:
            strided = setup.num_steps > 1 and setup.stride_skew > 0
            forms.add((shape.columns, setup.page_size > 1, strided))
            numbers |= {f"N {setup.num_draft_tokens}", f"p {setup.page_size}", f"B {work.batch_size}"}
    single = {(columns, paged, False) for columns in (512, 256) for paged in (False, True)}
    assert forms >= single | {(256, True, True), (128, True, False), (128, True, True), (128, False, True)}
    assert numbers >= {"N 1", "N 2", "N 3", "N 4", "N 8", "p 1", "p 16", "p 64", "p 128", "B 65536"}


def test_what_the_implementation_raises_is_passed_on() -> None:
    def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
        raise RuntimeError("no")

    broken = replace(registered()["onepass"], refresh=refresh)
    with pytest.raises(RuntimeError, match="no"):
        first_mismatch(MAKERS["long pool"](Mode.DECODE), broken, DEVICE, captured=False)
