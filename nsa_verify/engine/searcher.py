"""What a searcher does: draw rounds and have their cases judged, shrink a signature, have saved cases judged.

Searchers are processes of the engine (with one worker: the engine's own process). Each keeps one worker. What they do
is a function of their arguments: which of them did it cannot be told from the results.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from multiprocessing.synchronize import Event as EventType
from multiprocessing.util import Finalize
from pathlib import Path
from threading import BrokenBarrierError

import msgspec
from msgspec import Struct

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Code, Finding, Outcome, Signature, Verdict
from nsa_verify.core.labels import Coverage
from nsa_verify.core.spent import DRAW, TRANSPORT, WAIT, spending, taken
from nsa_verify.engine.drawing import draw_round
from nsa_verify.engine.events import Cell, Matrix, Observed, Tally
from nsa_verify.engine.isolation import Inside, Keeper
from nsa_verify.engine.messages import Hello, Judgement, Pair, Task
from nsa_verify.engine.plan import EAGER, ROUND_CASES, Plan, digest

REPEAT_EVERY = 2
"""While cases are drawn, every second one is checked for idempotence; shrinking and replaying always check."""
DELAY_EVERY = (10, 50)
"""The same for the delay of the stream, which costs more; the second once cases share a Setup, in long runs."""
FRESH_EVERY = 32
"""The same for capturing graphs afresh where those of earlier cases would serve."""
LEFT_OUT = "not run again: it killed its worker, or hung, in earlier rounds"
DEATHS = (Code.DEATH, Code.HANG)


class Seen(Struct):
    """The first case of a round that showed a signature; ``index`` counts the round's cases.

    ``before`` are cases that the worker had judged before one that died, where it does not die alone.
    """

    signature: Signature
    finding: Finding
    case: Case
    index: int
    before: list[Case] = []


class Unjudged(Struct):
    """A verdict that was unknown."""

    verdict: Verdict
    case: Case


class RoundResult(Struct):
    """What a round gave. ``digests`` has, for each pair, a function of its cases and verdicts; ``stopped`` says that it
    was cut short, ``replaced`` counts the workers that died."""

    index: int
    cases: int
    matrix: Matrix
    tally: Tally
    seen: list[Seen]
    unjudged: list[Unjudged]
    digests: dict[str, str]
    stopped: bool = False
    replaced: int = 0
    spent: dict[str, float] = {}
    """Seconds of the searcher by name, and of its worker by name with ``worker: `` in front."""
    coverage: Coverage = msgspec.field(default_factory=Coverage)
    """Empty if the plan does not ask for it."""
    observed: list[Observed] = []
    """Empty if the plan does not ask for it."""


START_TIMEOUT_S = 300.0

_engine_stops: EventType | None = None
_all_ready: Barrier | None = None


class _Here:
    """What this very process was asked to do, and its worker."""

    stopping = False
    number = 0
    plan: Plan | None = None
    keeper: Keeper | Inside | None = None


def obey(stop: EventType, all_ready: Barrier, numbers: Synchronized[int]) -> None:
    """Make this process a searcher, and number it: the engine decides when to stop, not the terminal's Ctrl-C."""
    global _engine_stops, _all_ready
    with numbers.get_lock():
        _Here.number, numbers.value = numbers.value, numbers.value + 1
    # Who takes the place of a searcher that was killed has nobody to wait for.
    _engine_stops, _all_ready = stop, all_ready if _Here.number < all_ready.parties else None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    Finalize(None, close, exitpriority=0)
    threading.Thread(target=_follow_engine, daemon=True).start()


def _follow_engine() -> None:
    """An engine that was killed leaves no searchers behind."""
    engine = parent_process()
    assert engine is not None
    engine.join()
    os._exit(1)


def keeper_of(plan: Plan) -> Keeper | Inside:
    """This process's worker for ``plan``; another plan ends it."""
    if _Here.keeper is None or _Here.plan != plan:
        close()
        if plan.isolate:
            own = ("CUDA_VISIBLE_DEVICES", plan.gpus[_Here.number % len(plan.gpus)]) if plan.gpus else None
            folder = Path(plan.folder) if plan.folder else None
            _Here.keeper = Keeper(plan, folder, (own,) if own is not None else (), stopping)
        else:
            _Here.keeper = Inside(plan, stopping)
        _Here.plan = plan
    return _Here.keeper


def close() -> None:
    """End this process's worker, and give back what was kept for the next case."""
    keeper, _Here.keeper, _Here.plan = _Here.keeper, None, None
    if keeper is not None:
        keeper.close()


def stop(stopping: bool = True) -> None:
    """Ask what runs in this very process to end; False takes it back."""
    _Here.stopping = stopping


def stopping() -> bool:
    """Whether this process was asked to end what it does, with what it has."""
    return _Here.stopping or (_engine_stops is not None and _engine_stops.is_set())


def hello(plan: Plan) -> Hello:
    """Start up and say what is here; returns when every searcher has got that far, or one has failed to."""
    global _all_ready
    others, _all_ready = _all_ready, None  # whatever is run later is this searcher's alone
    try:
        said = keeper_of(plan).hello()
    except BaseException:
        if others is not None:
            others.abort()
        raise
    if others is not None:
        with suppress(BrokenBarrierError):  # the searcher that broke it reports why
            others.wait(START_TIMEOUT_S)
    return said


def run_rounds(
    plan: Plan, indices: Sequence[int], deadline: float = 0.0, without: frozenset[Pair] = frozenset()
) -> list[RoundResult]:
    """Judge every case of the rounds ``indices``; past ``deadline`` (epoch seconds, 0: none) cases are left out.

    Pairs in ``without`` are not run: they killed workers in earlier rounds. While a round is judged the next is drawn.
    """
    keeper = keeper_of(plan)
    said = keeper.hello()
    results: list[RoundResult] = []
    waiting: list[Task] = []
    for index in indices:
        tasks = _drawn(plan, said, index, without)
        if waiting:
            results.append(_round_result(plan, keeper, indices[len(results)], waiting, without))
            waiting = []
        if stopping():
            break
        with spending(TRANSPORT):
            keeper.start(tasks, deadline)
        waiting = tasks
    if waiting:
        results.append(_round_result(plan, keeper, indices[len(results)], waiting, without))
    return results


def _drawn(plan: Plan, said: Hello, index: int, without: frozenset[Pair]) -> list[Task]:
    """The tasks of round ``index``."""
    pairs = tuple(pair for pair in said.pairs if pair not in without)
    tasks: list[Task] = []
    alone = plan.season(index) is None
    delay_every = DELAY_EVERY[0] if alone else DELAY_EVERY[1]

    def visit(case: Case) -> None:
        number = ROUND_CASES * index + len(tasks)
        repeat, delay = number % REPEAT_EVERY == 0, number % delay_every == delay_every // 2
        tasks.append(Task(case, pairs, repeat, delay, alone or number % FRESH_EVERY == FRESH_EVERY - 1))

    with spending(DRAW):
        draw_round(plan, said.device, index, visit)
    return tasks


def _round_result(
    plan: Plan, keeper: Keeper | Inside, index: int, tasks: Sequence[Task], without: frozenset[Pair]
) -> RoundResult:
    result = RoundResult(index, 0, Matrix(), Tally(), [], [], {})
    lines: dict[Pair, list[str]] = {}
    replaced = keeper.replaced
    try:
        with spending(WAIT):
            outcomes = keeper.finish()
    except KeyboardInterrupt:
        result.stopped = True
        return result
    for number, (task, judgements) in enumerate(zip(tasks, outcomes.judgements, strict=False)):
        left_out = f"{msgspec.json.encode(task.case).decode()} "
        for place, judgement in enumerate(judgements):
            before = outcomes.before.get((number, place), [])
            _count(result, task.case, judgement, before, plan)
            lines.setdefault(task.pairs[place], []).append(left_out + _summary(judgement.verdict))
        for pair in without:
            _leave_out(result, task.case, pair)
        if plan.coverage:
            result.coverage.count(task.case)
        if plan.observe:
            result.observed.append(_observed(task.case, judgements, plan))
        result.cases += 1
    result.spent = taken() | {f"worker: {name}": seconds for name, seconds in keeper.spent.items()}
    keeper.spent.clear()
    result.digests = {" ".join(pair): digest(said) for pair, said in lines.items()}
    result.stopped = stopping() and result.cases < len(tasks)
    result.replaced = keeper.replaced - replaced
    return result


def judge_again(plan: Plan, case: Case) -> RoundResult:
    """Judge a case that was in flight when its run was killed, as a round of its own, number -1."""
    keeper = keeper_of(plan)
    tasks = [Task(case, keeper.hello().pairs)]
    keeper.start(tasks)
    return _round_result(plan, keeper, -1, tasks, frozenset())


def judge_saved(plan: Plan, case: Case, before: Sequence[Case] = ()) -> list[Verdict]:
    """The verdicts on a saved case; ``before`` are cases to judge first, in the same worker."""
    keeper = keeper_of(plan)
    pairs = keeper.hello().pairs
    if before:
        keeper.renew()
    judged = judge_after(keeper, before, case, pairs)
    if stopping() or judged is None:
        raise KeyboardInterrupt
    return judged


def judge_after(
    keeper: Keeper | Inside, before: Sequence[Case], case: Case, pairs: tuple[Pair, ...]
) -> list[Verdict] | None:
    """The verdicts of ``pairs`` on ``case``, after the cases ``before``; None if it was left out.

    A pair that dies of one of those has its death for a verdict: the case was found because of what came before.
    """
    judged = keeper.judge([Task(it, pairs) for it in (*before, case)]).judgements
    if len(judged) <= len(before):
        return None
    verdicts = []
    for place in range(len(pairs)):
        told = [judgements[place].verdict for judgements in judged]
        deaths = [it for it in told if it.primary is not None and it.primary.code in DEATHS]
        verdicts.append(_moved(deaths[0], case) if deaths else told[-1])
    return verdicts


def _moved(death: Verdict, case: Case) -> Verdict:
    """A death of an earlier case, told of ``case``."""
    assert death.primary is not None
    replay = min(death.primary.replay, len(case.replays) - 1)
    finding = msgspec.structs.replace(death.primary, replay=replay, mode=case.replays[replay].mode)
    return msgspec.structs.replace(death, findings=(finding,))


def _count(result: RoundResult, case: Case, judgement: Judgement, before: list[Case], plan: Plan) -> None:
    verdict, skipped = judgement.verdict, {skip.mode: skip for skip in judgement.skips}
    primary = plan.named(verdict)
    result.tally.count(verdict, eager=verdict.executor == EAGER)
    unknown = verdict.outcome is Outcome.UNKNOWN
    if unknown:
        result.unjudged.append(Unjudged(verdict, case))
    signature = primary.signature_in(plan.detail) if primary is not None else None
    if primary is not None and signature is not None and all(seen.signature != signature for seen in result.seen):
        result.seen.append(Seen(signature, primary, case, result.cases, before))
    for mode in dict.fromkeys(replay.mode for replay in case.replays):
        cell, skip = Cell(), skipped.get(mode)
        if skip is None and (unknown or mode in verdict.modes):
            cell.cases = 1
            cell.unknown = int(unknown)
            cell.disagree = int(primary is not None and primary.mode is mode)
        else:
            cell.not_applicable = 1
            cell.not_capturable = int(skip is not None and skip.not_capturable)
            cell.reasons[verdict.reason if skip is None else skip.reason] = 1
        result.matrix.cell(verdict.implementation, verdict.executor, mode).add(cell)


def _observed(case: Case, judgements: Sequence[Judgement], plan: Plan) -> Observed:
    verdicts = [it.verdict for it in judgements if it.verdict.outcome is not Outcome.NOT_APPLICABLE]
    return Observed(
        case,
        tuple(found.signature_in(plan.detail) for it in verdicts if (found := plan.named(it)) is not None),
        tuple(it.reason for it in verdicts if it.outcome is Outcome.UNKNOWN),
        len(verdicts),
    )


def _leave_out(result: RoundResult, case: Case, pair: Pair) -> None:
    """Count a case that a pair was spared, because it killed workers before."""
    for mode in dict.fromkeys(replay.mode for replay in case.replays):
        result.matrix.cell(*pair, mode).add(Cell(not_applicable=1, reasons={LEFT_OUT: 1}))


def _summary(verdict: Verdict) -> str:
    primary = verdict.primary
    where = f"{primary.code} {primary.replay} {primary.step} {primary.buffer} {primary.element}" if primary else ""
    return f"{verdict.implementation} {verdict.executor} {verdict.outcome} {where}"
