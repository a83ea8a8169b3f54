"""What a worker does: judge the cases of a round, shrink one signature, judge saved cases.

The functions here run in a worker process, or in the engine's own where isolation is off. They are pure functions of
their arguments: which worker ran what cannot be told from the results.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from multiprocessing import parent_process
from multiprocessing.synchronize import Barrier
from multiprocessing.synchronize import Event as EventType
from multiprocessing.util import Finalize
from threading import BrokenBarrierError
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from nsa_verify.core.case import Case, size_of
from nsa_verify.core.findings import Finding, Outcome, Signature, Verdict
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.registry import ImplementationError, load
from nsa_verify.engine.drawing import draw_round, shrink_round
from nsa_verify.engine.events import Cell, Matrix, Reliability, Subject, Tally
from nsa_verify.engine.plan import EAGER, Plan, digest

if TYPE_CHECKING:
    from nsa_verify.device.driving import Executor
    from nsa_verify.device.judge import Judge

RELIABILITY_RUNS = 5
REPEAT_EVERY = 2
"""While cases are drawn, every second one is checked for idempotence; shrinking and replaying always check."""
DELAY_EVERY = 10
"""The same for the delay of the stream, which costs more. The first case of a round is too simple to show anything."""


class Hello(Struct):
    """What a worker says once it is up."""

    device: str
    description: str
    subjects: tuple[Subject, ...]
    executors: tuple[str, ...]


class Seen(Struct):
    """The first case of a round that showed a signature; ``index`` counts the round's cases."""

    signature: Signature
    finding: Finding
    case: Case
    index: int


class Unjudged(Struct):
    """A verdict that was unknown."""

    verdict: Verdict
    case: Case


class RoundResult(Struct):
    """What a round gave; ``digest`` is a function of its cases and verdicts, ``stopped`` says it was cut short."""

    index: int
    cases: int
    matrix: Matrix
    tally: Tally
    seen: list[Seen]
    unjudged: list[Unjudged]
    digest: str
    seconds: float
    stopped: bool = False


class ShrinkResult(Struct):
    """The smallest case of a signature.

    ``stable`` is False if probes contradicted each other, ``stopped`` says that the shrink was cut short.
    """

    case: Case
    finding: Finding
    probes: int
    stable: bool
    reliability: Reliability
    stopped: bool = False


START_TIMEOUT_S = 300.0

_engine_stops: EventType | None = None
_all_ready: Barrier | None = None


class _Here:
    """What this very process was asked to do."""

    stopping = False


def obey(stop: EventType, all_ready: Barrier) -> None:
    """Make this process a worker: the engine decides when to stop, not the terminal's Ctrl-C."""
    global _engine_stops, _all_ready
    _engine_stops, _all_ready = stop, all_ready
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Finalize(None, close, exitpriority=0)
    threading.Thread(target=_follow_engine, daemon=True).start()


def _follow_engine() -> None:
    """An engine that was killed leaves no workers behind."""
    engine = parent_process()
    assert engine is not None
    engine.join()
    os._exit(1)


def close() -> None:
    """Give back what was kept for the next case: graphs are destroyed now, and not in whatever order Python ends in."""
    if "nsa_verify.device.rig" in sys.modules:
        from nsa_verify.device.rig import close_rigs

        close_rigs()


def stop(stopping: bool = True) -> None:
    """Ask what runs in this very process to end; False takes it back."""
    _Here.stopping = stopping


def stop_if_asked() -> None:
    """Between two cases: end what this worker does, with what it has."""
    if _Here.stopping or (_engine_stops is not None and _engine_stops.is_set()):
        raise KeyboardInterrupt


@lru_cache(maxsize=1)
def prepare(device: str, references: tuple[str, ...], only: tuple[str, ...]) -> tuple[str, tuple[Implementation, ...]]:
    """Settle the device and load the implementations, once per process.

    Raises ``DeviceError`` and ``ImplementationError``.
    """
    from nsa_verify.device.select import resolve, single_thread

    chosen = resolve(device)
    single_thread()
    known = load(references)
    if missing := [name for name in only if name not in known]:
        raise ImplementationError(f"--only {missing[0]}: no such implementation; there are {', '.join(sorted(known))}")
    return chosen, tuple(it for name, it in known.items() if not only or name in only)


def drivers(device: str, names: tuple[str, ...]) -> tuple[Executor, ...]:
    """The executors called ``names``, or all that ``device`` has if none is named.

    Raises ``DeviceError`` for one that needs another device, ``ValueError`` for one that there is not.
    """
    from nsa_verify.device.executors import executors_for

    return executors_for(device, names)


def hello(plan: Plan) -> Hello:
    """Start up and say what is here; returns when every worker has got that far, or one has failed to."""
    from nsa_verify.device.select import describe

    try:
        device, implementations = prepare(plan.device, plan.references, plan.only)
        executors = tuple(it.name for it in drivers(device, plan.executors))
    except BaseException:
        if _all_ready is not None:
            _all_ready.abort()
        raise
    if _all_ready is not None:
        with suppress(BrokenBarrierError):  # the worker that broke it reports why
            _all_ready.wait(START_TIMEOUT_S)
    subjects = tuple(
        Subject(it.name, it.source, str(it.extent), tuple(mode for mode in plan.modes if mode in it.modes))
        for it in implementations
    )
    return Hello(device, describe(device), subjects, executors)


def run_round(plan: Plan, index: int, deadline: float = 0.0) -> RoundResult:
    """Judge every case of round ``index``; past ``deadline`` (epoch seconds, 0: none) cases are left out."""
    device, implementations = prepare(plan.device, plan.references, plan.only)
    started = time.perf_counter()
    result = RoundResult(index, 0, Matrix(), Tally(), [], [], "", 0.0)
    lines: list[str] = []
    named = {it.name: it for it in implementations}
    executors = {it.name: it for it in drivers(device, plan.executors)}

    def visit(case: Case) -> None:
        stop_if_asked()
        if deadline and time.time() > deadline:
            return
        repeat = result.cases % REPEAT_EVERY == 0
        delay = result.cases % DELAY_EVERY == DELAY_EVERY // 2
        verdicts = judge_case(case, implementations, plan.executors, device, repeat, delay)
        stop_if_asked()
        for verdict in verdicts:
            _count(result, case, verdict, named[verdict.implementation], executors[verdict.executor])
            lines.append(f"{msgspec.json.encode(case).decode()} {_summary(verdict)}")
        result.cases += 1

    try:
        draw_round(plan, device, index, visit)
    except KeyboardInterrupt:
        result.stopped = True
    result.digest = digest(lines)
    result.seconds = time.perf_counter() - started
    return result


def judge_case(
    case: Case,
    implementations: tuple[Implementation, ...],
    executors: tuple[str, ...],
    device: str,
    repeat: bool = True,
    delay: bool = True,
) -> list[Verdict]:
    """The verdicts of every implementation under every one of ``executors`` (none: all that ``device`` has).

    ``repeat`` and ``delay`` are those of ``Judge.judge``. Raises as ``drivers`` does.
    """
    from nsa_verify.device.judge import Judge

    judge: Judge = Judge(case, device)
    executors_here = drivers(device, executors)
    return [judge.judge(it, executor, repeat, delay) for executor in executors_here for it in implementations]


def judge_saved(plan: Plan, case: Case) -> list[Verdict]:
    """The verdicts on a saved case."""
    device, implementations = prepare(plan.device, plan.references, plan.only)
    verdicts = judge_case(case, implementations, plan.executors, device)
    if _Here.stopping:
        raise KeyboardInterrupt
    return verdicts


def shrink(plan: Plan, index: int, signature: Signature) -> ShrinkResult | None:
    """The smallest case found that shows ``signature``, starting from round ``index``, which showed it.

    Only the accused implementation is run. None if the round, run again, did not show it.
    """
    device, implementations = prepare(plan.device, plan.references, plan.only)
    accused = tuple(it for it in implementations if it.name == signature.implementation)
    shown: list[tuple[Case, Finding]] = []
    """The smallest that showed it so far by our measure, and the last."""
    probes = 0

    def accuse(case: Case) -> Finding | None:
        verdict = judge_case(case, accused, (signature.executor,), device)[0]
        primary = verdict.primary
        return primary if primary is not None and primary.signature == signature else None

    def shows(case: Case) -> bool:
        nonlocal probes
        stop_if_asked()
        probes += 1
        finding = accuse(case)
        stop_if_asked()
        if finding is None:
            return False
        smallest = shown[0] if shown and size_of(shown[0][0]) < size_of(case) else (case, finding)
        shown[:] = [smallest, (case, finding)]
        return True

    stable, stopped = True, False
    try:
        stable = shrink_round(plan, device, index, shows)
    except KeyboardInterrupt:
        stopped = True
    if not shown:
        return None
    # Hypothesis ends with its minimal case, which is what a person would have written; a shrink that was cut short, or
    # went astray, ends anywhere.
    case, finding = shown[-1] if stable and not stopped else shown[0]
    disagreed = sum(_disagrees(case, accused, signature, device) for _ in range(RELIABILITY_RUNS))
    return ShrinkResult(case, finding, probes, stable, Reliability(disagreed, RELIABILITY_RUNS), stopped)


def _disagrees(case: Case, accused: tuple[Implementation, ...], signature: Signature, device: str) -> bool:
    return judge_case(case, accused, (signature.executor,), device)[0].outcome is Outcome.DISAGREE


def _count(result: RoundResult, case: Case, verdict: Verdict, judged: Implementation, executor: Executor) -> None:
    primary = verdict.primary
    result.tally.count(verdict, eager=verdict.executor == EAGER)
    if verdict.outcome is Outcome.UNKNOWN:
        result.unjudged.append(Unjudged(verdict, case))
    if primary is not None and all(seen.signature != primary.signature for seen in result.seen):
        result.seen.append(Seen(primary.signature, primary, case, result.cases))
    for mode in dict.fromkeys(replay.mode for replay in case.replays):
        cell = Cell()
        reason = executor.not_applicable(judged, case.setup, mode)
        unknown = verdict.outcome is Outcome.UNKNOWN
        if reason is None and (unknown or mode in verdict.modes):
            cell.cases = 1
            cell.unknown = int(unknown)
            cell.disagree = int(primary is not None and primary.mode is mode)
        else:
            cell.not_applicable = 1
            cell.not_capturable = int(reason is not None and judged.not_applicable(case.setup, mode) is None)
            cell.reasons[reason or verdict.reason] = 1
        result.matrix.cell(verdict.implementation, verdict.executor, mode).add(cell)


def _summary(verdict: Verdict) -> str:
    primary = verdict.primary
    where = f"{primary.code} {primary.replay} {primary.step} {primary.buffer} {primary.element}" if primary else ""
    return f"{verdict.implementation} {verdict.executor} {verdict.outcome} {where}"
