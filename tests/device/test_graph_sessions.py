"""What a graph is captured with, what it may rely on, and what is left of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from conftest import NO_GPU
from device.subjects import Steps, capturable

import nsa_verify
from nsa_verify import Case, Code, Implementation, Mode, Outcome, Replay, ReplayInputs, Request, Setup, Verdict, verify
from nsa_verify.device import graph, rig
from nsa_verify.device.layout import is_poison
from nsa_verify.kernels import vectorized

GRAPH = "simulated-graph" if NO_GPU else "graph"
SETUP = Setup(num_draft_tokens=3, page_size=16, table_width=40, pool_rows=3, pool_width=48, buckets=(2, 4))
LONG = (Request(33, 1), Request(5, 2))
SMALL = Case(SETUP, (Replay(Mode.DECODE, LONG),))
BIG = Case(SETUP, (Replay(Mode.DECODE, LONG * 2),))
BOTH = Case(SETUP, (Replay(Mode.DECODE, LONG * 2), Replay(Mode.DECODE, LONG)))


@pytest.fixture(autouse=True)
def _no_graph_is_left() -> Iterator[None]:
    rig.close_rigs()
    yield
    rig.close_rigs()
    assert graph.CapturedGraph.open_graphs == 0


@triton.jit  # type: ignore[untyped-decorator]
def _copy(x: tl.tensor, out: tl.tensor, count: tl.tensor, SIZE: tl.constexpr) -> None:  # noqa: N803
    lane = tl.arange(0, SIZE)
    tl.store(out + lane, tl.load(x + lane, mask=lane < count), mask=lane < count)


@triton.jit  # type: ignore[untyped-decorator]
def _copy_one(x: tl.tensor, out: tl.tensor, count: tl.tensor) -> None:
    lane = tl.program_id(0)
    tl.store(out + lane, tl.load(x + lane, mask=lane < count), mask=lane < count)


def _tuned() -> Any:
    """A kernel that times its configurations anew for every ``count``; without a GPU nothing can be timed."""

    def time(call: Any, quantiles: object) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    configs = [triton.Config({"SIZE": size}) for size in (16, 32)]
    return triton.autotune(configs=configs, key=["count"], do_bench=time if NO_GPU else None)(_copy)


def judged(case: Case, implementation: Implementation) -> tuple[Outcome, Code | None]:
    verdict = verify(case, implementation, GRAPH)
    assert verdict.outcome is not Outcome.UNKNOWN, verdict
    return verdict.outcome, verdict.primary.code if verdict.primary else None


@pytest.mark.parametrize("fill", [0, 1])
def test_a_graph_is_captured_with_the_fill_inputs(fill: int) -> None:
    seen: list[dict[str, Any]] = []
    setup = Setup(num_draft_tokens=3, table_width=8, pool_rows=2, pool_width=12, buckets=(2,), fill_seq_len=fill)

    def looks(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        if len(seen) < 2:  # the warm-ups; a captured call must not read
            assert inputs.seq_lens_cpu is not None
            names = ("seq_lens", "seq_lens_cpu", "req_pool_indices", "accept_lens")
            numbers = {name: getattr(inputs, name)[: inputs.batch_size].tolist() for name in names}
            table = bool((inputs.req_to_token == 0).all())
            poisoned = all(is_poison(it) for it in steps[0].nsa_cache_seqlens.tolist())
            seen.append({**numbers, "table": table, "poisoned": poisoned})
        vectorized.refresh(inputs, steps, setup)

    case = Case(setup, (Replay(Mode.DRAFT_EXTEND_V2, (Request(9, 1),)),))
    assert judged(case, capturable(refresh=looks)) == (Outcome.AGREE, None)
    numbers = {"seq_lens": [fill] * 2, "seq_lens_cpu": [fill] * 2, "req_pool_indices": [0] * 2, "accept_lens": [3] * 2}
    assert seen == [{**numbers, "table": True, "poisoned": True}] * 2


def test_a_graph_that_relies_on_another_is_found() -> None:
    """What one capture allocates and fills holds nothing until that graph is replayed."""
    kept: dict[str, torch.Tensor] = {}

    def refresh(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        vectorized.refresh(inputs, steps, setup)
        if _capturing() and "zeros" not in kept:
            kept["zeros"] = torch.zeros(4, dtype=torch.int32, device=inputs.seq_lens.device)
        if "zeros" in kept:
            steps[0].nsa_cache_seqlens.add_(kept["zeros"][: inputs.batch_size])

    def fresh() -> Implementation:
        kept.clear()
        return capturable(refresh=refresh, modes=(Mode.DECODE,))

    assert judged(SMALL, fresh()) == (Outcome.AGREE, None)
    assert judged(BOTH, fresh())[0] is Outcome.DISAGREE


def _capturing() -> bool:
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # a CPU build, outside of a simulated capture
        return False


def test_torch_reads_what_a_kernel_wrote() -> None:
    def refresh(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        vectorized.refresh(inputs, steps, setup)
        rows = torch.empty(inputs.batch_size, dtype=torch.int64, device=inputs.seq_lens.device)
        _copy[(1,)](inputs.req_pool_indices, rows, inputs.batch_size, 16)
        steps[0].page_table_1.copy_(inputs.req_to_token[:, : setup.table_width].index_select(0, rows))

    assert judged(BOTH, capturable(refresh=refresh, modes=(Mode.DECODE,))) == (Outcome.AGREE, None)


def test_a_grid_is_frozen_at_capture() -> None:
    def refresh(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        vectorized.refresh(inputs, steps, setup)
        assert inputs.seq_lens_cpu is not None
        mirror = inputs.seq_lens_cpu[: inputs.batch_size]
        steps[0].nsa_cache_seqlens.zero_()
        _copy_one[lambda _: (int(mirror.max()),)](
            inputs.seq_lens.clamp(max=setup.index_topk), steps[0].nsa_cache_seqlens, inputs.batch_size
        )

    implementation = capturable(refresh=refresh, modes=(Mode.DECODE,), host_lengths=True)
    assert verify(SMALL, implementation).outcome is Outcome.AGREE
    assert judged(SMALL, implementation) == (Outcome.DISAGREE, Code.FROZEN)


def test_a_grid_may_not_read_the_device() -> None:
    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        _copy[lambda _: (int(inputs.seq_lens.max()) * 0 + 1,)](inputs.seq_lens, steps[0].cache_seqlens, 0, 16)

    assert judged(SMALL, capturable(bug)) == (Outcome.DISAGREE, Code.ILLEGAL_IN_CAPTURE)


def test_a_kernel_may_not_tune_itself_in_a_capture() -> None:
    tuned = _tuned()
    calls: list[int] = []

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        calls.append(1)
        tuned[(1,)](inputs.seq_lens, steps[0].cache_seqlens, -len(calls))

    # On CUDA it is the timing that fails first.
    code = Code.ILLEGAL_IN_CAPTURE if NO_GPU else Code.NEEDS_SYNC
    assert judged(SMALL, capturable(bug, modes=(Mode.DECODE,))) == (Outcome.DISAGREE, code)


def test_launches_that_an_autotuner_times_are_no_recompilation() -> None:
    tuned = _tuned()

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        tuned[(1,)](inputs.seq_lens, steps[0].cache_seqlens, 0)

    case = Case(SETUP, (Replay(Mode.DECODE, LONG), Replay(Mode.DECODE, LONG[:1])))
    assert verify(case, capturable(bug, modes=(Mode.DECODE,))).outcome is Outcome.AGREE


@pytest.mark.skipif(not NO_GPU, reason="Triton itself refuses a host tensor when it is compiled")
def test_a_kernel_may_not_be_given_host_memory() -> None:
    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        _copy[(1,)](inputs.seq_lens_cpu, steps[0].cache_seqlens, 0, 16)

    assert judged(SMALL, capturable(bug, host_lengths=True)) == (Outcome.DISAGREE, Code.ILLEGAL_IN_CAPTURE)


def test_host_memory_cached_in_the_warm_up_is_known_at_capture() -> None:
    cached: dict[str, torch.Tensor] = {}

    def copies(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        table = cached.setdefault("table", torch.arange(64, dtype=torch.int32))
        steps[0].cache_seqlens.copy_(table[: inputs.batch_size], non_blocking=True)
        steps[0].cache_seqlens.copy_(inputs.seq_lens[: inputs.batch_size])

    def reads(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        table = cached.setdefault("table", torch.arange(64, dtype=torch.int32))
        vectorized.refresh(inputs, steps, setup)
        steps[0].cache_seqlens.add_(int(table[0]))

    assert judged(SMALL, capturable(copies)) == (Outcome.DISAGREE, Code.ILLEGAL_IN_CAPTURE)
    cached.clear()
    assert judged(SMALL, capturable(refresh=reads)) == (Outcome.AGREE, None)


def test_a_kept_graph_is_not_held_against_what_other_cases_did() -> None:
    """A workspace that grew for a larger bucket of another case: the smaller one alone is right before and after."""
    kept: dict[str, torch.Tensor] = {}

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        rows = inputs.batch_size
        if "memory" not in kept or kept["memory"].shape[0] < rows:
            kept["memory"] = torch.zeros(rows, dtype=torch.int32, device=inputs.seq_lens.device)
        kept["memory"][:rows].copy_(steps[0].nsa_cache_seqlens)
        steps[0].nsa_cache_seqlens.copy_(kept["memory"][:rows])

    implementation = capturable(bug, modes=(Mode.DECODE,))
    for case in (SMALL, BIG, SMALL, BIG):
        assert judged(case, implementation) == (Outcome.AGREE, None)
    kept.clear()
    rig.close_rigs()
    assert judged(BOTH, implementation) == (Outcome.DISAGREE, Code.MOVED)


def test_an_empty_view_does_not_pass_for_memory_of_the_graph() -> None:
    def bug(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        nothing = steps[0].cu_seqlens_k[:0]
        torch.maximum(nothing, nothing.clone(), out=nothing)

    assert judged(BOTH, capturable(bug)) == (Outcome.AGREE, None)


def test_a_workspace_that_only_kernels_use() -> None:
    """Nothing but Triton's own cycles keeps the old one alive, for a while."""
    kept: dict[str, torch.Tensor] = {}

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        rows = inputs.batch_size
        if "memory" not in kept or kept["memory"].shape[0] < rows:
            kept["memory"] = torch.zeros(rows, dtype=torch.int32, device=inputs.seq_lens.device)
        _copy[(1,)](steps[0].nsa_cache_seqlens, kept["memory"], rows, 16)
        _copy[(1,)](kept["memory"], steps[0].nsa_cache_seqlens, rows, 16)

    gc.disable()
    try:
        assert judged(BOTH, capturable(bug, modes=(Mode.DECODE,))) == (Outcome.DISAGREE, Code.MOVED)
    finally:
        gc.enable()


def test_an_error_at_a_replay_that_is_none_eagerly_is_a_frozen_value() -> None:
    def refresh(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        vectorized.refresh(inputs, steps, setup)
        assert inputs.seq_lens_cpu is not None
        longest = int(inputs.seq_lens_cpu[: inputs.batch_size].max())
        table = torch.arange(longest + 1, device=inputs.seq_lens.device)
        steps[0].cache_seqlens.copy_(table.index_select(0, inputs.seq_lens[: inputs.batch_size].long()))

    if not NO_GPU:
        pytest.skip("on CUDA an index out of range kills the process's context")
    verdict = verify(SMALL, capturable(refresh=refresh, modes=(Mode.DECODE,), host_lengths=True), GRAPH)
    assert verdict.primary is not None
    assert verdict.primary.code is Code.FROZEN
    assert "in refresh" in verdict.primary.message


def _reports(_: ReplayInputs, __: Steps, ___: Setup) -> None:
    nsa_verify.fallback("slow path")


def test_fallbacks_are_told_again_from_a_kept_graph() -> None:
    implementation = capturable(_reports)
    first, again = (verify(SMALL, implementation, GRAPH) for _ in range(2))
    assert set(first.fallbacks) == set(again.fallbacks) == {"slow path"}
    assert first.fallbacks == again.fallbacks


def test_a_fallback_excuses_its_own_call_only() -> None:
    def once(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        try:
            torch.cat([inputs.seq_lens[:1], inputs.req_to_token[:1]])
        except RuntimeError:
            if not told:
                told.append(1)
                nsa_verify.fallback("slow path")

    told: list[int] = []
    verdict = verify(BOTH, capturable(once))
    assert verdict.primary is not None
    assert (verdict.primary.code, verdict.primary.replay) == (Code.SILENT_FALLBACK, 1)


def test_probing_is_no_fallback() -> None:
    def probes(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        hasattr(inputs.seq_lens, "no_such_attribute")
        with suppress(RuntimeError):
            assert inputs.seq_lens.H
        with suppress(TypeError):
            len(inputs.seq_lens[0])

    assert verify(BOTH, capturable(probes)).outcome is Outcome.AGREE


def _interrupted(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    inputs.seq_lens.clone()
    if _capturing():
        raise KeyboardInterrupt


def test_ctrl_c_in_a_capture_spoils_nothing() -> None:
    with pytest.raises(KeyboardInterrupt):
        verify(SMALL, capturable(_interrupted), GRAPH)
    assert graph.CapturedGraph.open_graphs == 0
    assert judged(BOTH, capturable()) == (Outcome.AGREE, None)


@pytest.mark.gpu
def test_nv303_a_write_to_freed_memory_through_a_raw_pointer() -> None:
    kept: dict[str, torch.Tensor] = {}

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        if "owner" not in kept and not _capturing():
            kept["owner"] = torch.zeros(128, dtype=torch.int32, device="cuda")
            address = kept["owner"].data_ptr()
            storage = torch._C._construct_storage_from_data_pointer(address, kept["owner"].device, 512)
            kept["alias"] = torch.empty(0, dtype=torch.int32, device="cuda").set_(storage, 0, (128,), (1,))
        kept["alias"][: inputs.batch_size].copy_(steps[0].cache_seqlens)
        if _capturing():
            kept["owner"] = torch.zeros(0, dtype=torch.int32)

    verdict: Verdict = verify(SMALL, capturable(bug, modes=(Mode.DECODE,)), GRAPH)
    assert verdict.primary is not None
    assert verdict.primary.code is Code.MOVED
    assert "handed out again" in verdict.primary.message


@pytest.mark.skipif(bool(NO_GPU), reason="streams are CUDA's")
def test_nobody_is_given_the_stream_that_is_captured_on() -> None:
    """Torch has 32 of each priority and hands them out in turn."""
    make: Any = torch.cuda.Stream
    given = [make(priority=priority) for _ in range(40) for priority in (0, -1)]
    assert graph.capture_stream() not in given
