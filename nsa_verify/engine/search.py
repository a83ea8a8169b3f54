"""The search: draw cases in rounds, judge them, then shrink and keep the first case of every signature.

``search`` is a generator of events. Rounds and shrinks are functions of the plan alone, so the same plan gives the same
events whatever the number of workers; only their order in time differs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Final

from nsa_verify.core.case import Case, Mode
from nsa_verify.core.findings import Code, Signature
from nsa_verify.core.labels import Coverage
from nsa_verify.engine.cluster import crew_of
from nsa_verify.engine.crew import BaseCrew, Promise
from nsa_verify.engine.events import (
    CheckFailed,
    Disagreement,
    DisagreementSeen,
    Event,
    Matrix,
    Recovered,
    Reliability,
    RoundFinished,
    RunFinished,
    RunStarted,
    Shrinking,
    StopReason,
    Tally,
    WorkersReady,
)
from nsa_verify.engine.inflight import Left
from nsa_verify.engine.messages import Pair
from nsa_verify.engine.plan import ROUND_CASES, Plan, digest
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.searcher import DEATHS, RoundResult, Seen, judge_again, run_rounds
from nsa_verify.engine.shrinking import ShrinkResult, shrink
from nsa_verify.engine.transferring import transferred

Keep = Callable[[Disagreement], Disagreement]
"""Saves a disagreement and returns it with its path, or with the problem that prevented saving."""
DEATHS_BORNE: Final = 3
"""After so many rounds in which a pair killed its worker it is not run in further ones; after one in which it hung."""


@dataclass(slots=True)
class _State:
    """What the rounds gave so far."""

    matrix: Matrix = field(default_factory=Matrix)
    tally: Tally = field(default_factory=Tally)
    cases: int = 0
    digests: dict[int, dict[str, str]] = field(default_factory=dict)
    first: dict[Signature, tuple[int, Seen]] = field(default_factory=dict)
    kept: set[Signature] = field(default_factory=set)
    recovered: set[Signature] = field(default_factory=set)
    """What the cases showed that had been in flight when earlier runs were killed."""
    stop: StopReason = StopReason.EXAMPLES
    replaced: int = 0
    spent: Counter[str] = field(default_factory=Counter)
    coverage: Coverage = field(default_factory=Coverage)
    deaths: Counter[Pair] = field(default_factory=Counter)
    """How many rounds each pair has killed a worker in; a hang counts for ``DEATHS_BORNE``."""

    @property
    def without(self) -> frozenset[Pair]:
        """The pairs that are not run any more."""
        return frozenset(pair for pair, rounds in self.deaths.items() if rounds >= DEATHS_BORNE)

    def digest(self) -> str:
        """A function of the cases and verdicts of all pairs but those that killed workers: when these are no longer run
        depends on which worker was faster."""
        deadly = {f"{it.implementation} {it.executor}" for it in self.first if it.code in DEATHS}
        return digest(
            [
                f"{pair} {said}"
                for index in sorted(self.digests)
                for pair, said in sorted(self.digests[index].items())
                if pair not in deadly
            ]
        )


def search(
    plan: Plan,
    keep: Keep,
    version: str,
    options: dict[str, str],
    note: Callable[[Disagreement], None] = lambda _: None,
    left: Left | None = None,
) -> Iterator[Event]:
    """Run ``plan``. Raises ``ImplementationError``, ``DeviceError`` and ``EngineError`` when it cannot do its job.

    ``options`` are told as they are, but for ``executors``, which are told as they turn out to be on the device.
    Whatever was seen is kept, also if the run is interrupted or its searchers are killed. ``note`` is told of every
    disagreement before it is reported, as it was drawn. The cases in ``left`` are judged first.
    """
    began = time.perf_counter()
    state = _State()
    with crew_of(plan) as crew:
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
        try:
            if left is not None:
                yield from _recovered(plan, crew, state, left, keep, note)
            began = time.perf_counter()
            yield from _rounds(plan, crew, state, note)
            seconds = time.perf_counter() - began
            yield from _shrinks(plan, crew, state, keep)
        except (BrokenProcessPool, EngineError):
            yield from _leftovers(plan, state, keep, "the run ended before it was shrunk")
            raise
    reason = "interrupted before it was shrunk" if state.stop is StopReason.INTERRUPTED else "not shrunk"
    yield from _leftovers(plan, state, keep, reason)
    yield RunFinished(
        matrix=state.matrix,
        tally=state.tally.in_order(),
        cases=state.cases,
        seconds=seconds,
        stop=state.stop,
        signatures=tuple(sorted(state.recovered | set(state.first))),
        digest=state.digest(),
        replaced=state.replaced + crew.replaced,
        spent=dict(state.spent),
        coverage=state.coverage,
    )


def _recovered(
    plan: Plan, crew: BaseCrew, state: _State, left: Left, keep: Keep, note: Callable[[Disagreement], None]
) -> Iterator[Event]:
    """Judge the cases that were in flight when earlier runs were killed, those of implementations that are here."""
    loaded = {it.name for it in crew.said.subjects}
    here = [it for it in left.interrupted if it.pair is None or it.pair[0] in loaded]
    missing = {it.pair[0] for it in left.interrupted if it.pair is not None} - loaded
    if left.interrupted or left.saved or left.problems or left.unsaved:
        yield Recovered(
            saved=tuple(left.saved),
            judged=len(here),
            waiting=len(left.interrupted) - len(here),
            missing=tuple(sorted(missing)),
            problems=tuple(left.problems),
            unsaved=tuple(left.unsaved),
        )
    for it in here:
        promise = crew.submit(judge_again, plan, it.case)
        result = crew.result(*crew.wait([promise]))
        if result is None or result.stopped:
            return
        state.replaced += result.replaced
        for seen in result.seen:
            found = _as_drawn(seen, "it was in flight when an earlier run was killed")
            note(found)
            yield DisagreementSeen(seen.signature, seen.finding)
            state.recovered.add(seen.signature)
            yield keep(found)
        it.forget()


def _rounds(plan: Plan, crew: BaseCrew, state: _State, note: Callable[[Disagreement], None]) -> Iterator[Event]:
    deadline = time.time() + plan.max_time_s if plan.max_time_s else 0.0
    legs: Iterator[range] = plan.legs()
    running: set[Promise[list[RoundResult]]] = set()
    while True:
        if crew.interrupted:
            legs, state.stop = iter(()), StopReason.INTERRUPTED
        elif deadline and time.time() > deadline and state.cases < plan.max_examples:
            legs, state.stop = iter(()), StopReason.TIME
        elif _seen_enough(plan, state):
            legs, state.stop = iter(()), StopReason.SEEN
        while len(running) < crew.workers and (leg := next(legs, None)) is not None:
            running.add(crew.submit(run_rounds, plan, leg, deadline, state.without))
        if not running:
            return
        done = crew.wait(running)
        running -= done
        for promise in done:
            for result in crew.result(promise) or ():
                if result.stopped:
                    crew.stop()
                yield from _round(plan, state, result, note)


def _seen_enough(plan: Plan, state: _State) -> bool:
    """Whether what the plan looks for was seen, if it looks for anything in particular."""
    pairs = {(it.implementation, it.executor) for it in state.first}
    is_new = bool(state.first.keys() - {*plan.known, *plan.again})
    return (plan.until_new and is_new) or (bool(plan.until) and set(plan.until) <= pairs)


def _round(plan: Plan, state: _State, result: RoundResult, note: Callable[[Disagreement], None]) -> Iterator[Event]:
    state.matrix.add(result.matrix)
    state.tally.add(result.tally)
    state.cases += result.cases
    state.replaced += result.replaced
    state.spent.update(result.spent)
    state.coverage.add(result.coverage)
    state.digests[result.index] = result.digests
    for it in result.seen:
        if it.finding.code in DEATHS and not it.before:  # what came once and not again excludes nobody
            pair = it.finding.implementation, it.finding.executor
            state.deaths[pair] += DEATHS_BORNE if it.finding.code is Code.HANG else 1
    said = digest([f"{pair} {said}" for pair, said in sorted(result.digests.items())])
    yield RoundFinished(
        round=result.index,
        cases=result.cases,
        cases_done=state.cases,
        digest=said,
        spent=result.spent,
        observed=tuple(result.observed),
        pairs=len(state.coverage.counts),
        replaced=state.replaced,
    )
    for unjudged in result.unjudged:
        verdict = unjudged.verdict
        yield CheckFailed(verdict.implementation, verdict.executor, verdict.reason, unjudged.case)
    for seen in result.seen:
        known = state.first.get(seen.signature)
        if known is None:
            if seen.signature not in plan.known:
                note(_as_drawn(seen, "the run was killed before it was shrunk"))
            yield DisagreementSeen(seen.signature, seen.finding, ROUND_CASES * result.index + seen.index + 1)
        if known is None or result.index < known[0]:
            state.first[seen.signature] = (result.index, seen)


def _shrinks(plan: Plan, crew: BaseCrew, state: _State, keep: Keep) -> Iterator[Event]:
    """Shrink each signature, several at a time, until Ctrl-C.

    What one executor's case was shrunk to is tried first for the other executors that gave the same code; and moved to
    their modes, for those.
    """
    waiting = _to_shrink(plan, state)
    running: dict[Promise[ShrinkResult | None], Signature] = {}
    minimal = {hint.signature._replace(executor=""): hint.case for hint in reversed(plan.hints)}
    while True:
        if crew.interrupted:
            waiting, state.stop = [], StopReason.INTERRUPTED
        busy = {_bug(signature) for signature in running.values()}
        while len(running) < crew.workers:
            signature = next((it for it in waiting if _bug(it) not in busy), None)
            if signature is None:
                break
            waiting.remove(signature)
            busy.add(_bug(signature))
            yield Shrinking(signature)
            index, seen = state.first[signature]
            promise = crew.submit(shrink, plan, index, seen, _hints(signature, minimal))
            running[promise] = signature
        if not running:
            return
        for promise in crew.wait(running):
            signature = running.pop(promise)
            result = crew.result(promise)
            if result is not None:
                state.replaced += result.replaced
                if result.stopped:
                    crew.stop()
                elif result.stable and not result.before:
                    minimal.setdefault(signature._replace(executor=""), result.case)
            note = "the shrink was interrupted" if crew.interrupted else ""
            state.kept.add(signature)
            yield keep(_minimal(state.first[signature][1], result, note))


def _bug(signature: Signature) -> Signature:
    """What signatures have in common that may be one bug, under several executors or in several modes."""
    return signature._replace(executor="", mode="")


def _hints(signature: Signature, minimal: Mapping[Signature, Case]) -> tuple[Case, ...]:
    """Of the ``minimal`` cases, by signature without executor, what may show ``signature`` too, likeliest first."""
    found: list[Case] = []
    for known, case in minimal.items():
        if known == signature._replace(executor=""):
            found.insert(0, case)
        elif _bug(known) == _bug(signature):
            found += transferred(case, Mode(known.mode), Mode(signature.mode))
    return tuple(found)


def _to_shrink(plan: Plan, state: _State) -> list[Signature]:
    if not plan.shrink:
        return []
    if not plan.until:
        return sorted(state.first.keys() - set(plan.known))
    earliest: dict[Pair, Signature] = {}
    for signature, _ in sorted(state.first.items(), key=lambda it: (it[1][0], it[1][1].index)):
        earliest.setdefault((signature.implementation, signature.executor), signature)
    return sorted(earliest.values())


def _leftovers(plan: Plan, state: _State, keep: Keep, note: str) -> Iterator[Event]:
    """Keep what was not shrunk as it was drawn."""
    for signature, (_, seen) in sorted(state.first.items()):
        if signature not in state.kept and signature not in plan.known:
            state.kept.add(signature)
            yield keep(_as_drawn(seen, note))


def _minimal(seen: Seen, result: ShrinkResult | None, note: str = "") -> Disagreement:
    if result is None:
        return _as_drawn(seen, note or "its round, run again, agreed: the case is kept as it was drawn")
    unstable = "probes contradicted each other: the smallest case that disagreed is kept"
    if seen.before:
        unstable = "it did not come again, neither alone nor after the cases that were run before it"
    lonely = f"it needs {len(result.before)} cases to be run before it" if result.before else ""
    return Disagreement(
        signature=seen.signature,
        case=result.case,
        finding=result.finding,
        reliability=result.reliability,
        shrunk=not seen.before,
        probes=result.probes,
        note=note if result.stopped else (lonely if result.stable else unstable),
        before=tuple(result.before),
        symptoms=tuple(result.symptoms),
        pictures=result.pictures,
    )


def _as_drawn(seen: Seen, note: str) -> Disagreement:
    return Disagreement(
        signature=seen.signature,
        case=seen.case,
        finding=seen.finding,
        reliability=Reliability(0, 0),
        shrunk=False,
        probes=0,
        note=note,
        before=tuple(seen.before),
    )
