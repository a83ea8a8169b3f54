"""The one comparison sees every cell of the arena; what is allowed in the slack is allowed, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from device.subjects import Bug, Steps, right, subject
from torch.overrides import TorchFunctionMode

from nsa_verify import Case, Code, CtxLens, Extent, Implementation, Mode, Outcome, Replay, ReplayInputs, Request, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS
from nsa_verify.device.executors import EXECUTORS
from nsa_verify.device.images import FRAME, LIVE, SLACK, ImageKey, paint
from nsa_verify.device.judge import Judge, verify
from nsa_verify.device.layout import arena_layout
from nsa_verify.device.rig import rig_for
from nsa_verify.device.select import resolve

SETUP = Setup(
    num_draft_tokens=3,
    page_size=16,
    table_width=40,
    table_row_stride=44,
    stride_skew=3,
    pool_rows=3,
    pool_width=48,
    pool_row_stride=50,
    num_steps=2,
    buckets=(2, 4),
    ctx_lens=CtxLens.OWN,
    schedule=True,
    input_tail=1,
)
REQUESTS = (Request(13, 1, 2), Request(20, 2, 0))
CASES = {mode: Case(SETUP, (Replay(mode, REQUESTS),)) for mode in Mode}
CODES = {
    ("buffer", LIVE): {Code.WRONG_VALUE, Code.INVARIANT, Code.POISON},
    ("buffer", SLACK): {Code.WRONG_VALUE, Code.POISON},
    ("buffer", FRAME): {Code.FRAME_WRITTEN},
    ("guard", FRAME): {Code.GUARD_WRITTEN},
    ("input", LIVE): {Code.INPUT_MUTATED},
}


def cells(case: Case, kind: str, region: int, extent: Extent) -> list[int]:
    """The arena elements of one kind of zone and one region, in the first replay."""
    _, classes = paint(case, ImageKey((extent, 0, OPTIONAL_OUTPUTS)))
    zones = [zone for zone in arena_layout(case.setup).zones if zone.kind == kind]
    return [index for zone in zones for index in range(zone.start, zone.end) if classes[index] == region]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("kind", "region"), CODES)
def test_a_flipped_bit_anywhere_is_found(kind: str, region: int, mode: Mode) -> None:
    case, rng = CASES[mode], random.Random(f"{kind} {region} {mode}")
    there = cells(case, kind, region, Extent.FULL)
    for index in [there[0], there[-1], *rng.sample(there, 12)]:
        bit = rng.randrange(31)

        def flip(inputs: ReplayInputs, steps: Steps, _: Setup, index: int = index, bit: int = bit) -> None:
            arena = steps[0].cache_seqlens.as_strided((1,), (1,), index)
            arena.bitwise_xor_(1 << bit)

        verdict = verify(case, subject(flip, extent=Extent.FULL))
        assert verdict.outcome is Outcome.DISAGREE, f"element {index}, bit {bit}: {arena_layout(SETUP).zone_at(index)}"
        assert verdict.primary is not None
        assert verdict.primary.code in CODES[kind, region] | {Code.NOT_IDEMPOTENT}
        assert verdict.primary.count == 1


def fill_columns(first: int, last: int, row: int = 0) -> Bug:
    """Write what the formula gives into columns ``[first, last)`` of ``page_table_1``, live or not."""

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        slots = inputs.req_to_token[int(inputs.req_pool_indices[row])]
        for step in steps:
            step.page_table_1[row, first:last].copy_(slots[first:last])

    return bug


def decode(*seq_lens: int) -> Case:
    setup = Setup(table_width=40, pool_rows=3, pool_width=48, num_steps=2, buckets=(len(seq_lens),))
    return Case(setup, (Replay(requests=tuple(Request(length, row) for row, length in enumerate(seq_lens))),))


@pytest.mark.parametrize(("extent", "reach"), [(Extent.LIVE, 5), (Extent.ROW, 8), (Extent.MAX, 21), (Extent.FULL, 40)])
@pytest.mark.parametrize("row", [0, 2])
def test_the_declared_extent_and_not_a_column_more(extent: Extent, reach: int, row: int) -> None:
    case = decode(5, 21, 5)
    for last in range(5, reach + 1):
        within = subject(fill_columns(5, last, row), extent=extent, block=8)
        assert verify(case, within).outcome is Outcome.AGREE
    if reach < 40:
        verdict = verify(case, subject(fill_columns(reach, reach + 1, row), extent=extent, block=8))
        assert [(it.code, it.element, it.region) for it in verdict.findings] == [
            (Code.FRAME_WRITTEN, (row, reach), "frame"),
            (Code.FRAME_WRITTEN, (row, reach), "frame"),
        ]
        assert [it.step for it in verdict.findings] == [0, 1]


def test_the_row_extent_is_clipped_to_the_table() -> None:
    assert verify(decode(33), subject(fill_columns(33, 40), extent=Extent.ROW, block=16)).outcome is Outcome.AGREE


def test_a_wrong_value_in_the_slack_is_wrong() -> None:
    def bug(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        steps[0].page_table_1[0, 7] = 1006

    verdict = verify(decode(5), subject(bug, extent=Extent.FULL))
    (finding,) = verdict.findings
    assert (finding.code, finding.element, finding.region) == (Code.WRONG_VALUE, (0, 7), "slack")
    assert (finding.expected, finding.got) == (1007, 1006)


def test_slack_may_keep_what_an_earlier_replay_left() -> None:
    setup = decode(5).setup
    replays = (Replay(requests=(Request(20),)), Replay(requests=(Request(5),), pool_seed=3))
    assert verify(Case(setup, replays), subject(extent=Extent.FULL)).outcome is Outcome.AGREE
    assert verify(Case(setup, replays), subject(extent=Extent.LIVE)).outcome is Outcome.AGREE


def test_slack_must_not_get_what_an_earlier_replay_would_have_left() -> None:
    """A value of the first replay's table, written in the second: neither what was there nor what belongs there."""
    replays = (Replay(requests=(Request(5),)), Replay(requests=(Request(5),), pool_seed=3))

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        if int(inputs.req_to_token[0, 0]) == 4000:
            steps[0].page_table_1[0, 7] = 1007

    verdict = verify(Case(decode(5).setup, replays), subject(bug, extent=Extent.FULL))
    (finding,) = verdict.findings
    assert (finding.replay, finding.code, finding.expected, finding.got) == (1, Code.WRONG_VALUE, 4007, 1007)


def without_host_reads(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    """Right for one decode request of a bucket of one."""
    for step in steps:
        step.cache_seqlens.copy_(inputs.seq_lens[:1])
        step.nsa_cache_seqlens.copy_(step.cache_seqlens.clamp(max=setup.index_topk))
        for lengths, sums in ((step.cache_seqlens, step.cu_seqlens_k), (step.nsa_cache_seqlens, step.nsa_cu_seqlens_k)):
            sums[:1].zero_()
            sums[1:].copy_(lengths)
        step.page_table_1.copy_(
            inputs.req_to_token.index_select(0, inputs.req_pool_indices[:1])[:, : setup.table_width]
        )


HOST_READS = frozenset(
    {
        *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.to, torch.equal),
        *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__),
        *(torch.Tensor.nonzero, torch.nonzero, torch.Tensor.unique, torch.Tensor.__array__, torch.allclose),
        *(torch.Tensor.__contains__, torch.Tensor.__repr__, torch.Tensor.__format__, torch.masked_select),
    }
)


class HostReads(TorchFunctionMode):
    """Counts what would wait for a device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[HostReads]:
    with HostReads() as mode:
        yield mode


def judged(implementation: Implementation, case: Case) -> list[str]:
    """What the judgement reads on the host; the images are made before."""
    judge = Judge(case, "cpu")
    assert judge.judge(implementation, EXECUTORS["eager"]).outcome is Outcome.AGREE
    with counting() as mode:
        assert judge.judge(implementation, EXECUTORS["eager"]).outcome is Outcome.AGREE
    return mode.seen


@pytest.mark.parametrize("replays", [1, 4])
def test_one_synchronisation_when_everything_agrees(replays: int) -> None:
    setup = Setup(num_steps=3, host_lengths=False, pool_row_stride=33)
    case = Case(setup, tuple(Replay(requests=(Request(5 + index),), pool_seed=index) for index in range(replays)))
    implementation = subject(extent=Extent.FULL)
    free = Implementation(**{**fields(implementation), "refresh": without_host_reads})
    assert judged(free, case) == ["tolist"]


def test_the_host_mirror_is_compared_on_the_host() -> None:
    case = Case(Setup(), (Replay(requests=(Request(5),)),))
    free = Implementation(**{**fields(subject(extent=Extent.FULL)), "refresh": without_host_reads})
    compared = []

    def equal(left: torch.Tensor, other: torch.Tensor, original: Any = torch.equal) -> bool:
        compared.append(left.data_ptr())
        return bool(original(left, other))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "equal", equal)
        assert verify(case, free).outcome is Outcome.AGREE
    assert set(compared) == {rig_for(case.setup, resolve("auto")).host_seq_lens.data_ptr()}


def fields(implementation: Implementation) -> dict[str, Any]:
    return {name: getattr(implementation, name) for name in implementation.__dataclass_fields__}


def test_one_comparison_for_all_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SETUP, tuple(Replay(mode, REQUESTS) for mode in Mode))
    compared: list[int] = []
    original = Judge._compare

    def compare(self: Judge, implementation: Implementation, run: Any) -> Any:
        compared.append(len(run.snapshots))
        return original(self, implementation, run)

    monkeypatch.setattr(Judge, "_compare", compare)
    assert verify(case, subject()).outcome is Outcome.AGREE
    assert compared == [1 + 4 + 1]  # before the first, after each, after the repeated last


def test_every_live_cell_is_written_by_the_subject() -> None:
    """The tests above flip bits of a right content, so it must be one: nothing of the live region is poison."""
    for case in CASES.values():
        rig = rig_for(case.setup, "cpu")
        values, classes = paint(case, ImageKey.of(subject(), case.setup))
        image = torch.tensor(values, dtype=torch.int32)
        rig.reset()
        rig.load(case, 0, image)
        mode = case.replays[0].mode
        right(rig.inputs(mode, 2), rig.steps(mode, 2, OPTIONAL_OUTPUTS), case.setup)
        live = torch.frombuffer(classes, dtype=torch.uint8) == LIVE
        assert torch.equal(rig.arena[live], image[live])
