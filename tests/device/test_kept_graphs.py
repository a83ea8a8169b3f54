"""Graphs that are kept from case to case: which serve, which do not, and that no verdict depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NO_GPU
from device.subjects import Steps, capturable
from device.test_graph_sessions import BIG, BOTH, GRAPH, SETUP, SMALL

from nsa_verify import (
    Case,
    Code,
    Implementation,
    Mode,
    Outcome,
    Replay,
    ReplayInputs,
    Request,
    Setup,
    Verdict,
    fallback,
)
from nsa_verify.core import implementation as registry
from nsa_verify.core.registry import find, load_reference
from nsa_verify.device import graph, kept
from nsa_verify.device.batch import Job, judge_batch
from nsa_verify.device.driving import Executor, KeptGraph
from nsa_verify.device.executors import EXECUTORS
from nsa_verify.device.kept import KeptGraphs
from nsa_verify.device.rig import close_rigs, rig_for
from nsa_verify.device.select import resolve
from nsa_verify.device.tape import Tape

DEVICE = "cpu" if NO_GPU else "cuda"
SMALLER = Case(SETUP, (Replay(Mode.DECODE, (Request(7, 1),)),))
MODES = Case(SETUP, (Replay(Mode.TARGET_VERIFY, (Request(7, 1),)), Replay(Mode.DECODE, (Request(7, 1),))))


@pytest.fixture(autouse=True)
def _no_graph_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    resolve("auto")
    close_rigs()
    open_tapes: set[int] = set()
    make, close = Tape.__init__, Tape.close

    def made(self: Tape, *args: Any) -> None:
        make(self, *args)
        open_tapes.add(id(self))

    def closed(self: Tape) -> None:
        close(self)
        open_tapes.remove(id(self))

    monkeypatch.setattr(Tape, "__init__", made)
    monkeypatch.setattr(Tape, "close", closed)
    yield
    close_rigs()
    assert graph.CapturedGraph.open_graphs == 0
    assert not open_tapes


def judged(case: Case, implementation: Implementation, fresh: bool = False) -> Verdict:
    """The verdict of the graph executor, in a batch of its own."""
    job = Job(case, [(implementation, EXECUTORS[GRAPH])], fresh=fresh)
    ((_, _, verdict),) = judge_batch([job], DEVICE)
    return verdict


def counted() -> tuple[Implementation, list[tuple[Mode, int]]]:
    """One that is right, and the keys of the calls that were made of it, graphs' replays left out."""
    calls: list[tuple[Mode, int]] = []

    def count(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        calls.append((inputs.mode, inputs.batch_size))

    return capturable(count), calls


CALLS_OF_A_CAPTURE = 3


def test_a_case_is_composed_of_graphs_that_others_captured() -> None:
    implementation, calls = counted()
    for case in (SMALL, BIG, BOTH, SMALLER, MODES, BOTH, MODES):
        assert judged(case, implementation).outcome is Outcome.AGREE
    keys = [(Mode.DECODE, 2), (Mode.DECODE, 4), (Mode.TARGET_VERIFY, 2)]
    assert calls == [key for key in keys for _ in range(CALLS_OF_A_CAPTURE)]


def test_afresh_they_are_captured_together_and_in_order() -> None:
    implementation, calls = counted()
    for case in (SMALL, BIG):
        judged(case, implementation)
    calls.clear()
    both = [key for key in ((Mode.DECODE, 2), (Mode.DECODE, 4)) for _ in range(CALLS_OF_A_CAPTURE)]
    assert judged(BOTH, implementation, fresh=True).outcome is Outcome.AGREE
    assert calls == both, "the last to be replayed comes first"
    assert judged(BOTH, implementation, fresh=True).outcome is Outcome.AGREE
    assert calls == both, "what was captured together for these keys serves them again"
    other_way = Case(SETUP, BOTH.replays[::-1])
    assert judged(other_way, implementation, fresh=True).outcome is Outcome.AGREE
    assert calls[len(both) :] == both[::-1]


def _grows(kept_memory: dict[str, torch.Tensor]) -> Implementation:
    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        rows = inputs.batch_size
        if "memory" not in kept_memory or kept_memory["memory"].shape[0] < rows:
            kept_memory["memory"] = torch.zeros(rows, dtype=torch.int32, device=inputs.seq_lens.device)
        kept_memory["memory"][:rows].copy_(steps[0].nsa_cache_seqlens)
        steps[0].nsa_cache_seqlens.copy_(kept_memory["memory"][:rows])

    return capturable(bug, modes=(Mode.DECODE,))


def test_a_graph_that_uses_memory_of_others_serves_no_other_case() -> None:
    """The workspace moves when the larger graph is captured behind the smaller one: put together, none would see it."""
    memory: dict[str, torch.Tensor] = {}
    implementation = _grows(memory)
    for case in (SMALL, BIG):
        memory.clear()
        assert judged(case, implementation).outcome is Outcome.AGREE
    memory.clear()
    verdict = judged(BOTH, implementation)
    assert verdict.primary is not None
    assert verdict.primary.code is Code.MOVED


STATEFUL = """
import torch

from nsa_verify import Mode, implementation
from nsa_verify.kernels import vectorized

_seen = {kept}


@implementation("stateful", modes=(Mode.DECODE,), extent="full")
def refresh(inputs, steps, setup):
    {note}
    vectorized.refresh(inputs, steps, setup)
    {use}
"""
REMEMBERS = {
    "a number": ("0", "global _seen; _seen = max(_seen, inputs.batch_size)", "widest = _seen"),
    "a set": ("set()", "_seen.add(inputs.batch_size)", "widest = max(_seen)"),
    "a dict of numbers": ("{}", "_seen[inputs.batch_size] = inputs.batch_size", "widest = max(_seen)"),
    "attributes": (
        "type('Seen', (), {'__module__': __name__, 'widest': 0})()",
        "_seen.widest = max(_seen.widest, inputs.batch_size)",
        "widest = _seen.widest",
    ),
}


@pytest.mark.parametrize("name", REMEMBERS)
def test_a_graph_that_depends_on_numbers_kept_by_others(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone each bucket is right; the wider one, captured first, spoils the narrower."""
    kept_, note, widest = REMEMBERS[name]
    use = f"{widest}; steps[0].nsa_cache_seqlens.add_(widest - inputs.batch_size)"
    path = tmp_path / "stateful.py"
    path.write_text(STATEFUL.format(kept=kept_, note=note, use=use), encoding="utf-8")
    monkeypatch.setattr(registry, "_registered", registry._registered.copy())
    implementation = find(*load_reference(str(path)))
    spoilt = Case(SETUP, BOTH.replays[::-1])
    for case in (SMALL, BIG):
        assert judged(case, implementation).outcome is Outcome.AGREE
    assert judged(BOTH, implementation).outcome is Outcome.AGREE
    verdict = judged(spoilt, implementation)
    assert verdict.outcome is Outcome.DISAGREE, "as if it had been captured for this case alone"
    close_rigs()
    assert judged(spoilt, implementation) == verdict


def test_a_cache_of_tensors_that_no_graph_uses_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "caching.py"
    note = "_seen.setdefault(inputs.batch_size, torch.zeros(3))"
    path.write_text(STATEFUL.format(kept="{}", note=note, use=""), encoding="utf-8")
    monkeypatch.setattr(registry, "_registered", registry._registered.copy())
    (name,) = load_reference(str(path))
    implementation = find(name)
    captured: list[object] = []
    executor: Any = type(EXECUTORS[GRAPH])
    original: Callable[..., KeptGraph] = executor.capture

    def capture(self: Executor, *args: Any) -> KeptGraph:
        captured.append(args[-1])
        return original(self, *args)

    monkeypatch.setattr(executor, "capture", capture)
    for case in (SMALL, BIG, BOTH, SMALLER):
        assert judged(case, implementation).outcome is Outcome.AGREE
    assert captured == [(Mode.DECODE, 2), (Mode.DECODE, 4)]


def test_a_kept_graph_that_goes_wrong_is_captured_again_with_the_case() -> None:
    memory: dict[str, torch.Tensor] = {}
    implementation = _grows(memory)
    assert judged(SMALL, implementation).outcome is Outcome.AGREE
    memory.clear()  # what it kept is gone: no fault of the case that comes next
    assert judged(SMALLER, implementation).outcome is Outcome.AGREE


def test_forgetting_one_leaves_the_others() -> None:
    (one, calls), (other, other_calls) = counted(), counted()
    for implementation in (one, other):
        judged(SMALL, implementation)
    rig_for(SETUP, DEVICE).keeping(KeptGraphs).forget(one)
    for implementation in (one, other):
        assert judged(SMALL, implementation).outcome is Outcome.AGREE
    assert (len(calls), len(other_calls)) == (2 * CALLS_OF_A_CAPTURE, CALLS_OF_A_CAPTURE)


@pytest.mark.parametrize("fresh", [False, True])
def test_no_more_are_kept_than_the_limit(fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_GRAPHS", 3)
    implementation, calls = counted()
    for case in (SMALL, BIG, MODES, BOTH, MODES, SMALL, BIG, BOTH):
        assert judged(case, implementation, fresh).outcome is Outcome.AGREE
        assert len(rig_for(SETUP, DEVICE).keeping(KeptGraphs)._entries) <= 3
    assert len(calls) >= 3 * CALLS_OF_A_CAPTURE


def test_fallbacks_of_a_composed_case_are_those_of_its_graphs() -> None:
    def reports(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        fallback(f"bucket {inputs.batch_size}")

    implementation = capturable(reports)
    assert set(judged(SMALL, implementation).fallbacks) == {"bucket 2"}
    for case, told in ((BOTH, {"bucket 2", "bucket 4"}), (BIG, {"bucket 4"}), (BOTH, {"bucket 2", "bucket 4"})):
        assert set(judged(case, implementation).fallbacks) == told
