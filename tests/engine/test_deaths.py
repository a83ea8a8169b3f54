"""What kills a worker, or hangs, is a finding on the implementation that did it, and costs nobody else anything."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import NO_GPU
from engine.deadly import TRIGGER

from nsa_verify import Case, Code, Mode, Outcome, Replay, Request, Setup
from nsa_verify.core.findings import Finding
from nsa_verify.core.marks import Mark, Phase
from nsa_verify.engine import isolation, searcher, shrinking
from nsa_verify.engine.events import CheckFailed, Disagreement, Event, RunFinished
from nsa_verify.engine.isolation import Keeper
from nsa_verify.engine.messages import Judgement, Pair, Task
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import TASKS_SUFFIX, EngineError
from nsa_verify.engine.search import search
from nsa_verify.engine.searcher import judge_after
from nsa_verify.strategies import Feature

SOURCE = str(Path(__file__).with_name("deadly.py"))
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHORT_S = 1.5 if CUDA else 0.4
MEMORY = 3000 if CUDA else 300
"""MiB; a CUDA context and what it loads are memory too."""
PLAN = Plan(
    seed=3,
    max_examples=40,
    modes=(Mode.DECODE,),
    executors=("eager",),
    references=(SOURCE,),
    isolate=True,
    deadline_s=20.0,
    memory_bytes=MEMORY << 20,
)
CODES = {
    "segfaults": Code.DEATH,
    "exits": Code.DEATH,
    "aborts": Code.DEATH,
    "hangs": Code.HANG,
    "eats": Code.DEATH,
    "raises": Code.EXCEPTION,
}
SAID = {
    "segfaults": r"its process was killed by SIGSEGV \(deadly.py:\d+ in segfaults\)",
    "exits": r"its process ended itself with exit code 3",
    "aborts": r"its process was killed by SIGABRT \(deadly.py:\d+ in aborts\)",
    "hangs": r"no sign of life for \d\.\d s \(deadly.py:\d+ in hangs\)",
    "eats": rf"it took more than {MEMORY} MiB of memory and was ended \(deadly.py:\d+ in eats\)",
    "raises": r"ValueError: from C \(deadly.py:\d+ in raises\)",
}


def _only(*names: str, **more: object) -> Plan:
    return msgspec.structs.replace(PLAN, only=names, **more)


def _case(seq_len: int = 1) -> Case:
    return Case(Setup(table_width=64, pool_width=64), (Replay(requests=(Request(seq_len=seq_len),)),))


BAD, GOOD = _case(TRIGGER), _case(TRIGGER - 1)


def _run(plan: Plan) -> list[Event]:
    events = list(search(plan, lambda found: msgspec.structs.replace(found, problem="kept here"), "test", {}))
    assert not [event for event in events if isinstance(event, CheckFailed)]
    return events


def test_each_is_one_finding_shrunk_to_its_trigger() -> None:
    """One run with them, and a correct implementation; but for what hangs, which is given less time.

    What only makes cases larger is left out, since most probes of a shrink cost a worker; but not for what exits.
    """
    plain = tuple(Feature)
    apart = _run(_only("hangs", deadline_s=SHORT_S, without=plain)) + _run(_only("exits", max_examples=10, seed=6))
    others = (name for name in CODES if name not in ("hangs", "exits"))
    events = _run(_only(*others, "vectorized", workers=2, without=plain))
    found = [it for it in apart + events if isinstance(it, Disagreement)]
    assert sorted(it.signature.implementation for it in found) == sorted(CODES)
    for it in found:
        name = it.signature.implementation
        assert (it.signature.executor, it.signature.code) == ("eager", CODES[name])
        assert re.fullmatch(SAID[name], it.finding.message), it.finding.message
        assert it.shrunk, name
        assert (it.reliability.disagreed, it.reliability.runs) == (5, 5), name
        (replay,) = it.case.replays
        assert [request.seq_len for request in replay.requests] == [TRIGGER], name
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    cell = finished.matrix.cells["vectorized", "eager", Mode.DECODE]
    assert (cell.cases, cell.disagree, cell.unknown) == (PLAN.max_examples, 0, 0)
    assert finished.replaced >= len(CODES) - 3


@pytest.fixture(name="keeper")
def _keeper(tmp_path: Path) -> Iterator[Keeper]:
    keeper = Keeper(_only(), tmp_path)
    yield keeper
    keeper.close()


def _outcomes(keeper: Keeper, *tasks: Task) -> list[dict[str, Outcome]]:
    judged = keeper.judge(tasks).judgements
    return [{it.verdict.implementation: it.verdict.outcome for it in judgements} for judgements in judged]


AGREE, DISAGREE, LEFT_OUT = Outcome.AGREE, Outcome.DISAGREE, Outcome.NOT_APPLICABLE


def test_verdicts_of_the_others_are_kept_and_the_rest_of_the_round_is_spared(keeper: Keeper) -> None:
    pairs = tuple((name, "eager") for name in ("vectorized", "segfaults", "exits"))
    told = _outcomes(keeper, *(Task(case, pairs) for case in (GOOD, BAD, GOOD)))
    assert told == [
        {"vectorized": AGREE, "segfaults": AGREE, "exits": AGREE},
        {"vectorized": AGREE, "segfaults": DISAGREE, "exits": DISAGREE},
        {"vectorized": AGREE, "segfaults": LEFT_OUT, "exits": LEFT_OUT},
    ]
    assert _outcomes(keeper, Task(GOOD, pairs)) == [{"vectorized": AGREE, "segfaults": AGREE, "exits": AGREE}]


def test_who_spoils_the_memory_is_accused_and_not_who_trips_over_it(keeper: Keeper) -> None:
    pairs = tuple((name, "eager") for name in ("vectorized", "spoils", "trips"))
    (told,) = _outcomes(keeper, Task(BAD, pairs))
    assert told == {"vectorized": AGREE, "spoils": DISAGREE, "trips": AGREE}


def test_who_spoilt_the_memory_in_an_earlier_case_is_accused(keeper: Keeper) -> None:
    """The case that spoils was judged before; the one that trips does not die alone."""
    pairs = tuple((name, "eager") for name in ("vectorized", "trips", "spoils"))
    outcomes = keeper.judge([Task(BAD, pairs), Task(GOOD, pairs)])
    told = [judgement.verdict for judgement in outcomes.judgements[1]]
    assert [it.outcome for it in told] == [AGREE, AGREE, DISAGREE]
    assert told[2].primary is not None
    assert told[2].primary.message.endswith("not again when the case was run alone")
    assert outcomes.before == {(1, 2): [BAD]}


def test_judging_again_is_not_misled_by_the_cases_judged_again_before(keeper: Keeper) -> None:
    """As where several cases are screened at once: each of them is judged again, and only the fifth call dies."""
    keeper.judge([Task(BAD, (("exits", "eager"),))])
    judged: list[dict[Pair, Judgement]] = []
    pairs = (("counts", "eager"),)
    assert [keeper._careful(Task(GOOD, pairs), {}, judged) for _ in range(4)] == [False] * 4
    assert [it[pairs[0]].verdict.outcome for it in judged] == [AGREE] * 4


def test_a_death_that_needs_an_earlier_case_is_kept_with_it(keeper: Keeper) -> None:
    keeper.judge([Task(GOOD, (("vectorized", "eager"),)), Task(BAD, (("exits", "eager"),))])  # another worker's past
    keeper.renew()
    keeper.judge([Task(BAD, (("vectorized", "eager"),))])
    pairs = (("counts", "eager"),)
    outcomes = keeper.judge([Task(GOOD, pairs)] * 3)
    told = [judgements[0].verdict for judgements in outcomes.judgements]
    assert [it.outcome for it in told] == [AGREE, AGREE, DISAGREE]
    assert outcomes.before == {(2, 0): [BAD, GOOD, GOOD]}
    assert keeper.dies_of([Task(GOOD, pairs)] * 2) is None
    assert keeper.dies_of([Task(GOOD, pairs)] * 3) is Code.DEATH
    verdicts = judge_after(keeper, [GOOD, GOOD, GOOD], GOOD, pairs)
    assert verdicts is not None
    verdict = verdicts[0]
    assert verdict.primary is not None
    assert verdict.primary.code is Code.DEATH, "the death of a case before is that of the case"


def test_a_sequence_is_made_shorter(tmp_path: Path) -> None:
    plan = _only("counts", folder=str(tmp_path))
    finding = Finding(implementation="counts", executor="eager", code=Code.DEATH, replay=0, mode=Mode.DECODE)
    seen = searcher.Seen(finding.signature, finding, GOOD, 0, before=[GOOD] * 9)
    try:
        result = shrinking.shrink(plan, 0, seen)
    finally:
        searcher.close()
    assert result is not None
    assert (len(result.before), result.stable) == (2, True)
    assert (result.reliability.disagreed, result.reliability.runs) == (5, 5)


def _flooded(plan: Plan) -> RunFinished:
    """With as short a deadline as spares the others, which a busy machine may keep from their work for a second."""
    for deadline_s in (max(1.0, SHORT_S), 5.0, PLAN.deadline_s):
        *_, finished = search(msgspec.structs.replace(plan, deadline_s=deadline_s), lambda found: found, "test", {})
        assert isinstance(finished, RunFinished)
        if not finished.matrix.cells["vectorized", "eager", Mode.DECODE].disagree:
            break
    assert isinstance(finished, RunFinished)
    return finished


@pytest.mark.parametrize(("name", "rounds"), [("always-exits", 3), ("always-hangs", 1)])
def test_a_flood_of_deaths_is_not_explored(name: str, rounds: int) -> None:
    digests, first = set(), 0
    for workers in (1, 2):
        finished = _flooded(_only(name, "vectorized", max_examples=100, workers=workers, shrink=False))
        cell = finished.matrix.cells[name, "eager", Mode.DECODE]
        first = first or cell.disagree
        assert rounds <= cell.disagree <= rounds + workers - 1
        assert cell.reasons[searcher.LEFT_OUT] >= 100 - 10 * (rounds + workers - 1)
        right = finished.matrix.cells["vectorized", "eager", Mode.DECODE]
        assert (right.cases, right.disagree) == (100, 0)
        digests.add(finished.digest)
    assert first == rounds
    assert len(digests) == 1


def test_patience_is_that_of_the_implementation(keeper: Keeper) -> None:
    keeper._plan = msgspec.structs.replace(keeper._plan, deadline_s=0.0)
    pair = ("vectorized", "eager")
    keeper.judge([Task(GOOD, (("segfaults", "eager"),))])
    keeper._sent = (Task(GOOD, (pair,)),)
    mark = Mark(1, 0, 0, Phase.CALLING, 0)
    assert keeper._patience_s(mark) == isolation.FIRST_S[DEVICE]
    assert keeper._patience_s(mark._replace(phase=Phase.COMPILING)) == isolation.COMPILE_S
    keeper._slowest[pair] = 0.01
    assert keeper._patience_s(mark) == isolation.LEAST_S[DEVICE]
    keeper._slowest[pair] = 7.0
    assert keeper._patience_s(mark) == 70.0, "ten times the slowest step"
    keeper._slowest[pair] = 0.01
    keeper._hung.add(pair)
    assert keeper._patience_s(mark) == isolation.LEAST_S[DEVICE] / 3


def test_an_engine_that_was_stopped_takes_nobody_for_hung(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-Z: the clock jumps between two looks."""
    jump, real = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + jump[0])
    wait = connection.wait

    def and_stop(*arguments: Any) -> Any:
        jump[0] += 2 * PLAN.deadline_s
        return wait(*arguments)

    keeper.start([Task(GOOD, (("vectorized", "eager"),))])
    monkeypatch.setattr(connection, "wait", and_stop)
    assert keeper.finish().judgements[0][0].verdict.outcome is AGREE


@pytest.mark.parametrize("name", ["interrupts", "surrogates", "mute"])
def test_odd_exceptions_are_exceptions(keeper: Keeper, name: str) -> None:
    (told,) = keeper.judge([Task(GOOD, ((name, "eager"), ("vectorized", "eager")))]).judgements
    assert told[0].verdict.primary is not None
    assert (told[0].verdict.primary.code, told[1].verdict.outcome) == (Code.EXCEPTION, AGREE)


def test_a_leak_is_seen_however_quick_the_replies_are(tmp_path: Path) -> None:
    keeper = Keeper(_only("leaks", "vectorized", memory_bytes=MEMORY // 3 << 20), tmp_path)
    pairs = (("leaks", "eager"), ("vectorized", "eager"))
    try:
        told = _outcomes(keeper, *[Task(GOOD, pairs)] * (MEMORY // 10))
    finally:
        keeper.close()
    assert {it["vectorized"] for it in told} == {AGREE}
    assert [it["leaks"] for it in told].count(DISAGREE) == 1


def test_a_child_that_holds_the_pipes_hides_no_death(keeper: Keeper) -> None:
    began = time.monotonic()
    (told,) = keeper.judge([Task(GOOD, (("orphans", "eager"), ("vectorized", "eager")))]).judgements
    assert told[0].verdict.primary is not None
    assert (told[0].verdict.primary.code, told[1].verdict.outcome) == (Code.DEATH, AGREE)
    assert "exit code 4" in told[0].verdict.primary.message
    assert time.monotonic() - began < (60 if CUDA else 15)


def test_junk_on_the_connection_is_the_writers(keeper: Keeper) -> None:
    (told,) = keeper.judge([Task(GOOD, (("scribbles", "eager"), ("vectorized", "eager")))]).judgements
    assert [it.verdict.outcome for it in told] == [DISAGREE, AGREE]


def test_a_worker_that_is_killed_while_idle_costs_nothing(keeper: Keeper) -> None:
    pairs = (("vectorized", "eager"),)
    assert _outcomes(keeper, Task(GOOD, pairs)) == [{"vectorized": AGREE}]
    assert keeper._now.pid is not None
    os.kill(keeper._now.pid, signal.SIGKILL)
    keeper._now._process.join(10)
    assert _outcomes(keeper, Task(GOOD, pairs)) == [{"vectorized": AGREE}]
    assert keeper.replaced == 1


QUICK_S = 0.5 if NO_GPU else 2.0
"""On a GPU that thirteen others used meanwhile it took up to 0.8 s."""


def test_replacing_a_worker_is_quick(keeper: Keeper) -> None:
    """From the second on: one is kept in reserve as soon as one has died."""
    pairs, took = (("exits", "eager"),), []
    for _ in range(4):
        keeper.dies_of([Task(BAD, pairs)])
        keeper.hello()
        assert keeper._spare is not None
        keeper._spare.ready(lambda: False)
        began = time.monotonic()
        keeper._replace()
        took.append(time.monotonic() - began)
    assert sorted(took)[len(took) // 2] < QUICK_S, took


def test_an_import_that_kills_the_worker_is_one_sentence(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("import ctypes\nctypes.string_at(0)\n")
    keeper = Keeper(msgspec.structs.replace(PLAN, references=(str(source),)), tmp_path)
    try:
        with pytest.raises(EngineError, match=r"died while it loaded --impl .*mine.py: .*SIGSEGV \(mine.py:2 in"):
            keeper.hello()
    finally:
        keeper.close()


def test_what_is_in_flight_lies_on_disk(tmp_path: Path) -> None:
    keeper = Keeper(_only("vectorized"), tmp_path)
    try:
        keeper.start([Task(GOOD, (("vectorized", "eager"),))])
        assert list(tmp_path.glob(f"*{TASKS_SUFFIX}"))
        keeper.finish()
    finally:
        keeper.close()
    assert not list(tmp_path.iterdir())
