"""What kills a worker, or hangs, is a finding on the implementation that did it, and costs nobody else anything."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from engine.deadly import TRIGGER

from nsa_verify import Case, Code, Mode, Outcome, Replay, Request, Setup
from nsa_verify.engine.events import CheckFailed, Disagreement, RunFinished
from nsa_verify.engine.isolation import Keeper
from nsa_verify.engine.messages import Task
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import TASKS_SUFFIX, EngineError
from nsa_verify.engine.search import search

SOURCE = str(Path(__file__).with_name("deadly.py"))
PLAN = Plan(
    seed=3,
    max_examples=40,
    modes=(Mode.DECODE,),
    executors=("eager",),
    references=(SOURCE,),
    isolate=True,
    deadline_s=0.4,
    memory_bytes=300 << 20,
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
    "eats": r"it took more than 300 MiB of memory and was ended \(deadly.py:\d+ in eats\)",
    "raises": r"ValueError: from C \(deadly.py:\d+ in raises\)",
}


def _only(*names: str, **more: object) -> Plan:
    return msgspec.structs.replace(PLAN, only=names, **more)


def _case(seq_len: int = 1) -> Case:
    return Case(Setup(table_width=64, pool_width=64), (Replay(requests=(Request(seq_len=seq_len),)),))


BAD, GOOD = _case(TRIGGER), _case(TRIGGER - 1)


@pytest.fixture(name="found", scope="module")
def _found() -> tuple[dict[str, Disagreement], RunFinished]:
    """One run with all of them, and a correct implementation."""
    plan = _only(*CODES, "vectorized", workers=2)
    events = list(search(plan, lambda found: msgspec.structs.replace(found, problem="kept here"), "test", {}))
    assert not [event for event in events if isinstance(event, CheckFailed)]
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    return {it.signature.implementation: it for it in events if isinstance(it, Disagreement)}, finished


@pytest.mark.parametrize("name", CODES)
def test_each_is_one_finding_shrunk_to_its_trigger(
    name: str, found: tuple[dict[str, Disagreement], RunFinished]
) -> None:
    it = found[0][name]
    assert (it.signature.executor, it.signature.code) == ("eager", CODES[name])
    assert re.fullmatch(SAID[name], it.finding.message), it.finding.message
    assert it.shrunk
    assert (it.reliability.disagreed, it.reliability.runs) == (5, 5)
    (replay,) = it.case.replays
    assert [request.seq_len for request in replay.requests] == [TRIGGER]


def test_the_others_are_complete(found: tuple[dict[str, Disagreement], RunFinished]) -> None:
    every, finished = found
    assert set(every) == set(CODES)
    cell = finished.matrix.cells["vectorized", "eager", Mode.DECODE]
    assert (cell.cases, cell.disagree, cell.unknown) == (PLAN.max_examples, 0, 0)
    assert finished.replaced >= len(CODES) - 1


@pytest.fixture(name="keeper")
def _keeper(tmp_path: Path) -> Iterator[Keeper]:
    keeper = Keeper(_only("segfaults", "exits", "spoils", "trips", "vectorized"), tmp_path)
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


def test_a_death_of_the_past_keeps_its_past(keeper: Keeper) -> None:
    """The case that spoils was judged before; the one that trips does not die alone."""
    pairs = tuple((name, "eager") for name in ("trips", "spoils"))
    outcomes = keeper.judge([Task(BAD, pairs), Task(GOOD, pairs)])
    (_, (trips, spoils)) = outcomes.judgements
    assert (trips.verdict.outcome, spoils.verdict.outcome) == (DISAGREE, AGREE)
    assert trips.verdict.primary is not None
    assert trips.verdict.primary.message.endswith("not again when the case was run alone")
    assert outcomes.before == {(1, 0): [BAD]}
    assert keeper.dies_of([Task(GOOD, pairs[:1])]) is None
    assert keeper.dies_of([Task(BAD, pairs), Task(GOOD, pairs)]) is Code.DEATH


def test_a_worker_that_is_killed_while_idle_costs_nothing(keeper: Keeper) -> None:
    pairs = (("vectorized", "eager"),)
    assert _outcomes(keeper, Task(GOOD, pairs)) == [{"vectorized": AGREE}]
    assert keeper._now.pid is not None
    os.kill(keeper._now.pid, signal.SIGKILL)
    keeper._now._process.join(10)
    assert _outcomes(keeper, Task(GOOD, pairs)) == [{"vectorized": AGREE}]
    assert keeper.replaced == 1


def test_replacing_a_worker_is_quick(keeper: Keeper) -> None:
    """From the second on: one is kept in reserve as soon as one has died."""
    pairs, took = (("exits", "eager"),), []
    for _ in range(4):
        keeper.dies_of([Task(BAD, pairs)])
        keeper.hello()
        time.sleep(1.0)  # the one in reserve comes up meanwhile
        began = time.monotonic()
        keeper._replace()
        took.append(time.monotonic() - began)
    assert sorted(took)[len(took) // 2] < 0.5, took


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
