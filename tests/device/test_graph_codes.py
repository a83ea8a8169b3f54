"""Every code that a graph executor, or a look at the calls, can say: what provokes it, and what the finding says."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import NO_GPU
from device.subjects import Bug, Steps, bare, capturable, right, subject

import nsa_verify
from nsa_verify import Case, Code, Finding, Implementation, Mode, Outcome, Replay, ReplayInputs, Request, Setup, verify
from nsa_verify.core.findings import EXPLANATIONS
from nsa_verify.device import graph, rig
from nsa_verify.device.select import resolve
from nsa_verify.device.temporaries import TEMPORARY_POISON

GRAPH = "simulated-graph" if NO_GPU else "graph"
HERE = Path(__file__).name
SETUP = Setup(num_draft_tokens=3, page_size=16, table_width=40, pool_rows=3, pool_width=48, buckets=(2, 4))
SHORT, LONG = (Request(1, 0),), (Request(33, 1), Request(5, 2))
ONE = Case(SETUP, (Replay(Mode.DECODE, LONG),))
TWO = Case(SETUP, (Replay(Mode.DECODE, LONG), Replay(Mode.DECODE, SHORT)))
BUCKETS = Case(SETUP, (Replay(Mode.DECODE, LONG * 2), Replay(Mode.DECODE, LONG)))
MODES = Case(SETUP, tuple(Replay(mode, LONG) for mode in (Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2)))


@pytest.fixture(autouse=True)
def _no_graph_is_left() -> Iterator[None]:
    yield
    rig.close_rigs()
    assert graph.CapturedGraph.open_graphs == 0


def first(case: Case, implementation: Implementation, executor: str = GRAPH) -> Finding:
    verdict = verify(case, implementation, executor)
    assert verdict.outcome is Outcome.DISAGREE, verdict
    assert verdict.primary is not None
    assert verdict.primary.executor == executor
    return verdict.primary


@pytest.mark.parametrize("case", [ONE, TWO, BUCKETS, MODES])
@pytest.mark.parametrize("executor", ["eager", GRAPH])
def test_the_capturable_subject_is_right(case: Case, executor: str) -> None:
    assert verify(case, capturable(), executor).outcome is Outcome.AGREE


def test_what_is_declared_not_capturable_is_not_driven_and_no_failure() -> None:
    verdict = verify(ONE, subject(), GRAPH)
    assert (verdict.outcome, verdict.reason) == (Outcome.NOT_APPLICABLE, "declared not capturable")


def test_modes_that_are_not_capturable_are_left_out() -> None:
    partly = capturable(modes=(Mode.TARGET_VERIFY,))
    verdict = verify(MODES, partly, GRAPH)
    assert (verdict.outcome, verdict.modes) == (Outcome.AGREE, (Mode.TARGET_VERIFY,))


def _reads(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    inputs.seq_lens.max().item()


def _reads_in_verify(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    if inputs.mode is Mode.TARGET_VERIFY:
        _reads(inputs, steps, setup)


def test_nv301_a_host_read_names_the_line_and_the_graph() -> None:
    finding = first(ONE, capturable(_reads))
    assert (finding.code, finding.replay) == (Code.ILLEGAL_IN_CAPTURE, 0)
    assert "item" in finding.message
    assert f"{HERE}:{_reads.__code__.co_firstlineno + 1} in _reads" in finding.message
    assert "while capturing (decode, bucket 2)" in finding.message


def test_nv301_in_one_branch_is_found_at_the_replay_that_needs_it() -> None:
    finding = first(MODES, capturable(_reads_in_verify))
    assert (finding.code, finding.replay, finding.mode) == (Code.ILLEGAL_IN_CAPTURE, 1, Mode.TARGET_VERIFY)


def test_nv301_an_error_that_was_swallowed_still_spoils_the_capture() -> None:
    def swallows(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        try:
            _reads(inputs, steps, setup)
        except RuntimeError:
            return

    finding = first(ONE, capturable(swallows))
    assert finding.code is Code.ILLEGAL_IN_CAPTURE
    assert "item" in finding.message


def test_nv403_an_exception_while_capturing() -> None:
    def raises(_: ReplayInputs, __: Steps, ___: Setup) -> None:
        torch.cat([])

    finding = first(ONE, capturable(raises))
    assert finding.code is Code.EXCEPTION
    assert "while capturing (decode, bucket 2)" in finding.message
    assert f"{HERE}:" in finding.message


def _frozen_bound(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
    """Cells from the longest request of the capture on are what they were; the mirror may be read on the host."""
    assert inputs.seq_lens_cpu is not None
    bound = int(inputs.seq_lens_cpu[: inputs.batch_size].max())
    wide = inputs.req_to_token[:, :bound].index_select(0, inputs.req_pool_indices[: inputs.batch_size])
    steps[0].page_table_1[:, :bound].copy_(wide)


def _only_tables(refresh: Bug) -> Implementation:
    def whole(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        kept = steps[0].page_table_1.clone()
        capturable().refresh(inputs, steps, setup)
        steps[0].page_table_1.copy_(kept)
        refresh(inputs, steps, setup)

    return capturable(refresh=whole, modes=(Mode.DECODE,), host_lengths=True)


def test_nv302_a_maximum_is_frozen() -> None:
    implementation = _only_tables(_frozen_bound)
    assert verify(ONE, implementation).outcome is Outcome.AGREE
    finding = first(ONE, implementation)
    assert (finding.code, finding.buffer) == (Code.FROZEN, "page_table_1")
    assert "called eagerly it agrees" in finding.message
    verdict = verify(ONE, implementation, GRAPH)
    assert [it.code for it in verdict.findings] == [Code.FROZEN, Code.POISON]
    assert verify(Case(SETUP, (Replay(Mode.DECODE, SHORT),)), implementation, GRAPH).outcome is Outcome.AGREE


def test_nv302_is_not_said_of_what_is_wrong_eagerly_too() -> None:
    finding = first(ONE, capturable(lambda _, steps, __: steps[0].cache_seqlens.add_(1)))
    assert finding.code in (Code.WRONG_VALUE, Code.INVARIANT)


def _stale_tail(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    kept = steps[0].nsa_cache_seqlens[-1:].clone()
    capturable().refresh(inputs, steps, setup)
    steps[0].nsa_cache_seqlens[-1:].copy_(torch.maximum(kept, steps[0].nsa_cache_seqlens[-1:]))


@pytest.mark.parametrize("executor", ["eager", GRAPH])
def test_nv102_a_stale_tail(executor: str) -> None:
    finding = first(TWO, capturable(refresh=_stale_tail), executor)
    assert (finding.code, finding.replay, finding.buffer) == (Code.STALE, 1, "nsa_cache_seqlens")


def _counts_repeats(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    kept = steps[0].nsa_cache_seqlens.clone()
    capturable().refresh(inputs, steps, setup)
    steps[0].nsa_cache_seqlens.add_(kept == steps[0].nsa_cache_seqlens)


@pytest.mark.parametrize("executor", ["eager", GRAPH])
def test_nv502_a_second_call_adds_up(executor: str) -> None:
    finding = first(ONE, capturable(refresh=_counts_repeats), executor)
    assert (finding.code, finding.buffer) == (Code.NOT_IDEMPOTENT, "nsa_cache_seqlens")


class Workspace:
    """A workspace that grows when a larger bucket comes, as a cached one does."""

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None

    def __call__(self, inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        rows = inputs.batch_size
        if self.memory is None or self.memory.shape[0] < rows:
            self.memory = torch.zeros(rows, dtype=torch.int32, device=inputs.seq_lens.device)
        self.memory[:rows].copy_(steps[0].nsa_cache_seqlens)
        steps[0].nsa_cache_seqlens.copy_(self.memory[:rows])


def _with_workspace() -> Implementation:
    workspace = Workspace()

    def bug(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        workspace(inputs, steps, setup)

    return capturable(bug, modes=(Mode.DECODE,))


def test_nv303_a_workspace_that_grew_after_the_capture() -> None:
    assert verify(BUCKETS, _with_workspace()).outcome is Outcome.AGREE
    assert verify(ONE, _with_workspace(), GRAPH).outcome is Outcome.AGREE
    finding = first(BUCKETS, _with_workspace())
    assert (finding.code, finding.replay) == (Code.MOVED, 1)
    assert f"{HERE}:" in finding.message


def test_nv303_a_buffer_that_was_replaced() -> None:
    def replaces(inputs: ReplayInputs, steps: Steps, __: Setup) -> None:
        steps[0].nsa_cache_seqlens.set_(
            torch.zeros(9, dtype=torch.int32, device=inputs.seq_lens.device).untyped_storage()
        )

    for executor in ("eager", GRAPH):
        finding = first(ONE, capturable(replaces), executor)
        assert finding.code is Code.MOVED
        assert "step 0's nsa_cache_seqlens was moved" in finding.message


def test_nv304_work_on_another_stream() -> None:
    def side(inputs: ReplayInputs, steps: Steps, __: Setup) -> None:
        module = torch.get_device_module(inputs.seq_lens.device)
        with module.stream(module.Stream()):
            steps[0].nsa_cache_seqlens.clone()

    finding = first(ONE, capturable(side))
    assert finding.code is Code.OTHER_STREAM
    assert f"{HERE}:" in finding.message


@pytest.mark.gpu
def test_nv304_work_on_the_default_stream() -> None:
    def default(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            steps[0].nsa_cache_seqlens.clamp_(max=8)

    assert first(ONE, capturable(default)).code is Code.OTHER_STREAM


def test_nv305_a_synchronisation() -> None:
    def waits(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        torch.get_device_module(inputs.seq_lens.device).synchronize()

    finding = first(ONE, capturable(waits))
    assert finding.code is Code.NEEDS_SYNC
    assert f"{HERE}:" in finding.message


def _fails(inputs: ReplayInputs) -> None:
    torch.cat([inputs.seq_lens[:1], inputs.req_to_token[:1]])


def test_nv504_an_error_is_swallowed() -> None:
    def falls_back(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        try:
            _fails(inputs)
        except RuntimeError:
            return

    finding = first(ONE, capturable(falls_back), "eager")
    assert finding.code is Code.SILENT_FALLBACK
    assert f"{HERE}:{_fails.__code__.co_firstlineno + 1} in _fails" in finding.message


def test_a_reported_fallback_is_shown_and_no_fault() -> None:
    def falls_back(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        try:
            _fails(inputs)
        except RuntimeError:
            nsa_verify.fallback("no concatenation here")

    verdict = verify(TWO, subject(falls_back))
    assert (verdict.outcome, set(verdict.fallbacks)) == (Outcome.AGREE, {"no concatenation here"})
    assert verify(TWO, subject()).fallbacks == ()


def test_temporaries_are_poisoned_in_the_graph() -> None:
    def copies(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        steps[0].nsa_cache_seqlens.copy_(torch.empty_like(steps[0].nsa_cache_seqlens))

    finding = first(ONE, capturable(copies))
    assert (finding.code, finding.got) == (Code.POISON, TEMPORARY_POISON)


@pytest.mark.parametrize("code", [it for it in Code if it.startswith("NV3") or it in ("NV503", "NV504")])
def test_every_code_here_has_an_explanation(code: Code) -> None:
    told = EXPLANATIONS[code]
    assert all(told), code


@pytest.mark.gpu
def test_a_reused_pinned_staging_buffer_shows_behind_a_delayed_stream() -> None:
    staging = torch.empty(4, dtype=torch.int32, pin_memory=True)

    def refresh(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        assert inputs.seq_lens_cpu is not None
        size = inputs.batch_size
        staging[:size].copy_(inputs.seq_lens_cpu[:size])
        capturable().refresh(inputs, steps, setup)
        steps[0].cache_seqlens.copy_(staging[:size], non_blocking=True)

    implementation = bare(refresh, modes=(Mode.DECODE,), extent=nsa_verify.Extent.FULL, host_lengths=True)
    # The first launches of a process load their kernels, which takes longer than the delay.
    assert verify(TWO, capturable()).outcome is Outcome.AGREE
    finding = first(TWO, implementation, "eager")
    assert (finding.replay, finding.buffer) == (0, "cache_seqlens")
    assert verify(ONE, implementation).outcome is Outcome.AGREE


@pytest.mark.gpu
def test_no_collection_runs_while_a_graph_is_captured() -> None:
    class Cycle:
        """Garbage that only the collector finds."""

        def __init__(self) -> None:
            self.itself = self

    found: list[bool] = []

    def bug(_: ReplayInputs, __: Steps, ___: Setup) -> None:
        dead = weakref.ref(Cycle())
        for _number in range(2000):
            Cycle()
        found.append(dead() is not None)

    threshold = gc.get_threshold()
    gc.set_threshold(10)
    try:
        assert verify(ONE, capturable(bug), GRAPH).outcome is Outcome.AGREE
    finally:
        gc.set_threshold(*threshold)
    assert found[-1], "the last call is the captured one"


@pytest.mark.gpu
def test_a_graph_that_is_not_closed_says_so() -> None:
    leaked = graph.CapturedGraph()
    with pytest.warns(ResourceWarning, match="was not closed"):
        leaked.__del__()
    leaked.raw = None
    graph.CapturedGraph.open_graphs -= 1


def test_sessions_are_kept_and_closed_with_the_rig() -> None:
    kept = rig.rig_for(SETUP, resolve("auto"))
    calls: list[int] = []
    counted = capturable(lambda _, __, ___: calls.append(1))
    assert verify(ONE, counted, GRAPH).outcome is Outcome.AGREE
    once = len(calls)
    assert verify(TWO, counted, GRAPH).outcome is Outcome.AGREE
    assert len(calls) == once, "the same graph serves another case of the setup"
    kept.close()
    assert verify(TWO, counted, GRAPH).outcome is Outcome.AGREE
    assert len(calls) == 2 * once


def test_right_is_not_capturable() -> None:
    """The reference subject reads on the host: declared capturable, it must be refused."""
    finding = first(ONE, capturable(refresh=right))
    assert finding.code is Code.ILLEGAL_IN_CAPTURE
