"""The search: draw cases in rounds, judge them, then shrink and keep the first case of every signature.

``search`` is a generator of events. Rounds and shrinks are functions of the plan alone, so the same plan gives the same
events whatever the number of workers; only their order in time differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Finding, Signature
from nsa_verify.engine.crew import Crew
from nsa_verify.engine.events import (
    CheckFailed,
    Disagreement,
    DisagreementSeen,
    Event,
    Matrix,
    Reliability,
    RoundFinished,
    RunFinished,
    RunStarted,
    Shrinking,
    StopReason,
    Tally,
    WorkersReady,
)
from nsa_verify.engine.plan import Plan, digest
from nsa_verify.engine.worker import RoundResult, Seen, ShrinkResult, run_round, shrink

Keep = Callable[[Disagreement], Disagreement]
"""Saves a disagreement and returns it with its path, or with the problem that prevented saving."""


@dataclass(slots=True)
class _State:
    """What the rounds gave so far."""

    matrix: Matrix = field(default_factory=Matrix)
    tally: Tally = field(default_factory=Tally)
    cases: int = 0
    digests: dict[int, str] = field(default_factory=dict)
    first: dict[Signature, tuple[int, Seen]] = field(default_factory=dict)
    kept: set[Signature] = field(default_factory=set)
    stop: StopReason = StopReason.EXAMPLES


def search(plan: Plan, keep: Keep, version: str, options: dict[str, str]) -> Iterator[Event]:
    """Run ``plan``. Raises ``ImplementationError``, ``DeviceError`` and ``EngineError`` when it cannot do its job.

    ``options`` are told as they are, but for ``executors``, which are told as they turn out to be on the device.
    Whatever was seen is kept, also if the run is interrupted or a worker dies.
    """
    began = time.perf_counter()
    state = _State()
    with Crew(plan.workers) as crew:
        said = crew.hello(plan)
        yield RunStarted(
            seed=plan.seed,
            options=options | {"executors": ",".join(said.executors)},
            device=said.description,
            version=version,
            subjects=said.subjects,
            executors=said.executors,
            planned_cases=plan.max_examples,
            workers=plan.workers,
        )
        yield WorkersReady(time.perf_counter() - began)
        began = time.perf_counter()
        try:
            yield from _rounds(plan, crew, state)
            seconds = time.perf_counter() - began
            yield from _shrinks(plan, crew, state, keep)
        except BrokenProcessPool:
            yield from _leftovers(state, keep, "a worker died before it was shrunk")
            raise
    note = "interrupted before it was shrunk" if state.stop is StopReason.INTERRUPTED else "not shrunk"
    yield from _leftovers(state, keep, note)
    signatures = tuple(sorted(state.first))
    whole = digest([state.digests[index] for index in sorted(state.digests)])
    yield RunFinished(state.matrix, state.tally.in_order(), state.cases, seconds, state.stop, signatures, whole)


def _rounds(plan: Plan, crew: Crew, state: _State) -> Iterator[Event]:
    deadline = time.time() + plan.max_time_s if plan.max_time_s else 0.0
    waiting = list(range(plan.rounds))
    running: set[Future[RoundResult]] = set()
    while True:
        if crew.interrupted:
            waiting, state.stop = [], StopReason.INTERRUPTED
        elif deadline and time.time() > deadline and state.cases < plan.max_examples:
            waiting, state.stop = [], StopReason.TIME
        while waiting and len(running) < crew.workers:
            running.add(crew.submit(run_round, plan, waiting.pop(0), deadline))
        if not running:
            return
        done = crew.wait(running)
        running -= done
        for future in done:
            result = crew.result(future)
            if result is not None:
                if result.stopped:
                    crew.stop()
                yield from _round(state, result)


def _round(state: _State, result: RoundResult) -> Iterator[Event]:
    state.matrix.add(result.matrix)
    state.tally.add(result.tally)
    state.cases += result.cases
    state.digests[result.index] = result.digest
    yield RoundFinished(result.index, result.cases, state.cases, result.digest)
    for unjudged in result.unjudged:
        verdict = unjudged.verdict
        yield CheckFailed(verdict.implementation, verdict.executor, verdict.reason, unjudged.case)
    for seen in result.seen:
        known = state.first.get(seen.signature)
        if known is None:
            yield DisagreementSeen(seen.signature, seen.finding)
        if known is None or result.index < known[0]:
            state.first[seen.signature] = (result.index, seen)


def _shrinks(plan: Plan, crew: Crew, state: _State, keep: Keep) -> Iterator[Event]:
    """Shrink each signature, several at a time, until Ctrl-C."""
    waiting = sorted(state.first) if plan.shrink else []
    running: dict[Future[ShrinkResult | None], Signature] = {}
    while True:
        if crew.interrupted:
            waiting, state.stop = [], StopReason.INTERRUPTED
        while waiting and len(running) < crew.workers:
            signature = waiting.pop(0)
            yield Shrinking(signature)
            running[crew.submit(shrink, plan, state.first[signature][0], signature)] = signature
        if not running:
            return
        for future in crew.wait(running):
            signature = running.pop(future)
            result = crew.result(future)
            if result is not None and result.stopped:
                crew.stop()
            note = "the shrink was interrupted" if crew.interrupted else ""
            state.kept.add(signature)
            yield keep(_minimal(state.first[signature][1], result, note))


def _leftovers(state: _State, keep: Keep, note: str) -> Iterator[Event]:
    """Keep what was not shrunk as it was drawn."""
    for signature, (_, seen) in sorted(state.first.items()):
        if signature not in state.kept:
            state.kept.add(signature)
            yield keep(_as_drawn(seen.case, seen.finding, note))


def _minimal(seen: Seen, result: ShrinkResult | None, note: str = "") -> Disagreement:
    if result is None:
        return _as_drawn(
            seen.case, seen.finding, note or "its round, run again, agreed: the case is kept as it was drawn"
        )
    unstable = "" if result.stable else "probes contradicted each other: the smallest case that disagreed is kept"
    note = note if result.stopped else unstable
    return Disagreement(
        signature=seen.signature,
        case=result.case,
        finding=result.finding,
        reliability=result.reliability,
        shrunk=True,
        probes=result.probes,
        note=note,
    )


def _as_drawn(case: Case, finding: Finding, note: str) -> Disagreement:
    return Disagreement(finding.signature, case, finding, Reliability(0, 0), shrunk=False, probes=0, note=note)
