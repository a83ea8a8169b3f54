"""Memory in which every tensor is an allocation of its own: it holds what a case says, and ends where tensors end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_verify import Case, Mode, Outcome, Replay, Request, Setup
from nsa_verify.core.case import CtxLens, Layout
from nsa_verify.core.implementation import Extent, MetadataBuffers
from nsa_verify.core.oracle import expect
from nsa_verify.core.registry import load
from nsa_verify.core.sanitizers import Sanitizer, Sequence
from nsa_verify.device import sanitized
from nsa_verify.device.separate import GAP_BYTES, Separate
from nsa_verify.engine.corpus import load as load_entry
from nsa_verify.engine.corpus import scan

SEEDS = sorted(scan(Path(__file__).resolve().parents[2] / "corpus" / "seeds"))[::4]


def _live(buffers: MetadataBuffers, name: str, rows: int) -> list[list[int]]:
    tensor: Tensor = getattr(buffers, name)
    return tensor.reshape(1, -1).tolist() if tensor.dim() == 1 else tensor[:rows].tolist()


@pytest.mark.parametrize("path", [pytest.param(it, id=it.stem) for it in SEEDS])
def test_implementations_leave_in_it_what_the_oracle_expects(path: Path) -> None:
    case = load_entry(path).case
    implementation = load()["vectorized"]
    memory = Separate(case, "cpu")
    writes = implementation.writes(case.setup)
    for replay, it in enumerate(case.replays):
        if implementation.not_applicable(case.setup, it.mode) is not None:
            continue
        steps = memory.steps(replay, writes)
        implementation.refresh(memory.inputs(replay, steps), steps, case.setup)
        for buffers in steps:
            for name, rows in expect(case, replay, Extent.LIVE).buffers.items():
                if name.startswith("paged_mqa_") and name not in writes:
                    continue
                found = _live(buffers, name, len(rows))
                assert [row[: it.live] for row, it in zip(found, rows, strict=False)] == [
                    list(it.values[: it.live]) for it in rows
                ]


WIDE = Setup(
    num_draft_tokens=2,
    page_size=16,
    table_width=20,
    table_row_stride=24,
    stride_skew=3,
    pool_rows=3,
    pool_width=40,
    pool_row_stride=44,
    num_steps=2,
    buckets=(1, 4),
    seq_lens_dtype="int64",
    layout=Layout.STRIDED,
    input_tail=7,
    ctx_lens=CtxLens.OWN,
    schedule=True,
)
ALL_OUTPUTS = frozenset({"paged_mqa_ctx_lens", "paged_mqa_schedule"})


def _memory(setup: Setup, mode: Mode = Mode.TARGET_VERIFY) -> Separate:
    return Separate(Case(setup, (Replay(mode, (Request(3), Request(4))),)), "cpu")


def test_every_allocation_ends_with_its_tensor() -> None:
    memory = _memory(WIDE)
    steps = memory.steps(0, ALL_OUTPUTS)
    inputs = memory.inputs(0, steps)
    ends = {(span.name, span.step): span.end for span in memory.spans}
    starts = {(span.name, span.step): span.start for span in memory.spans}
    names = ["seq_lens", "req_pool_indices", "req_to_token", "accept_lens"]
    tensors: dict[tuple[str, int | None], Tensor] = {(name, None): getattr(inputs, name) for name in names}
    for step, buffers in enumerate(steps):
        tensors |= {(name, step): getattr(buffers, name) for name in MetadataBuffers.__dataclass_fields__}
    assert tensors.keys() == ends.keys()
    for key, tensor in tensors.items():
        last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        assert ends[key] == tensor.data_ptr() + (last + 1) * tensor.element_size(), key
        assert starts[key] == tensor.data_ptr(), key


def test_strides_are_the_cases_and_inputs_have_no_tail() -> None:
    memory = _memory(WIDE)
    steps = memory.steps(0, ALL_OUTPUTS)
    inputs = memory.inputs(0, steps)
    assert (inputs.seq_lens.shape, inputs.seq_lens.stride(), inputs.seq_lens.dtype) == ((4,), (3,), torch.int64)
    assert inputs.seq_lens.tolist() == [3, 4, 1, 1]
    assert inputs.seq_lens_cpu is not None
    assert inputs.seq_lens_cpu.tolist() == [3, 4, 1, 1]
    assert inputs.req_to_token.stride() == (44, 1)
    assert [it.page_table_1.stride() for it in steps] == [(24, 1), (27, 1)]
    assert [it.real_page_table.stride() for it in steps] == [(6, 1), (9, 1)]
    assert [it.page_table_1.shape for it in steps] == [(8, 20), (8, 20)]


def test_allocations_lie_far_apart() -> None:
    memory = _memory(WIDE)
    memory.inputs(0, memory.steps(0, ALL_OUTPUTS))
    spans = sorted(memory.spans)
    assert all(after.start - before.end >= GAP_BYTES for before, after in pairwise(spans))


def test_addresses_stay_for_as_long_as_it_lives() -> None:
    memory = Separate(Case(Setup(buckets=(1, 2)), tuple(Replay(requests=(Request(it),) * 2) for it in (1, 5))), "cpu")
    before, after = (memory.steps(replay, frozenset()) for replay in range(2))
    first = memory.inputs(0, before)
    address = first.seq_lens.data_ptr()
    second = memory.inputs(1, after)
    assert before is after
    assert second.seq_lens.data_ptr() == address
    assert second.seq_lens.tolist() == [5, 5]


def test_memory_that_cannot_be_had_says_nothing_of_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("no more room")

    monkeypatch.setattr(sanitized, "Separate", refuse)
    subject = sanitized.Subject(load()["vectorized"], Sanitizer.OOB)
    verdict = subject.judge(Sequence(Case(Setup(), (Replay(requests=(Request(),)),))))
    assert verdict.outcome is Outcome.UNKNOWN
    assert verdict.reason.startswith("the check itself failed: MemoryError: no more room (test_separate.py:")


def test_aliases_share_memory() -> None:
    memory = _memory(Setup(buckets=(2,), aliased_seq_lens=True, ctx_lens=CtxLens.VIEW), Mode.DECODE)
    (buffers,) = memory.steps(0, ALL_OUTPUTS)
    inputs = memory.inputs(0, (buffers,))
    assert buffers.paged_mqa_ctx_lens is not None
    same = [inputs.seq_lens, buffers.cache_seqlens, buffers.nsa_seqlens_expanded, buffers.paged_mqa_ctx_lens]
    assert len({it.data_ptr() for it in same}) == 1
    assert buffers.paged_mqa_ctx_lens.tolist() == [[3], [4]]
    assert buffers.real_page_table.data_ptr() == buffers.page_table_1.data_ptr()
