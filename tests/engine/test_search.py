"""The search as a generator of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from shell.commands import plan_of, registry_of_its_own

from nsa_verify import Case, Mode, Outcome, Replay, Request, Setup
from nsa_verify.core.findings import Code, Finding, Signature
from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine import search as module
from nsa_verify.engine import searcher, shrinking
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
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.search import search
from nsa_verify.engine.searcher import RoundResult, Seen


@pytest.fixture(autouse=True, scope="module")
def _registry() -> Iterator[None]:
    with registry_of_its_own():
        yield


@pytest.fixture(name="plan", scope="module")
def _plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(tmp_path_factory.mktemp("plan"), 50)


Told = tuple[list[Event], list[Disagreement]]


@pytest.fixture(name="told", scope="module")
def _told(plan: Plan) -> Told:
    """A whole run, and what was kept of it."""
    return _events(plan)


def _events(plan: Plan) -> Told:
    kept: list[Disagreement] = []

    def keep(found: Disagreement) -> Disagreement:
        kept.append(found)
        return msgspec.structs.replace(found, problem="kept in a list")

    return list(search(plan, keep, "1.0", {"an": "option"})), kept


def test_events_come_in_order_and_tell_all(plan: Plan, told: Told) -> None:
    events, kept = told
    kinds = [type(event) for event in events]
    assert kinds[:2] == [RunStarted, WorkersReady]
    assert kinds[-3:] == [Shrinking, Disagreement, RunFinished]
    rounds = [event for event in events if isinstance(event, RoundFinished)]
    assert [event.round for event in rounds] == list(range(plan.rounds))
    assert [event.cases for event in rounds] == [plan.round_cases(index) for index in range(plan.rounds)]
    assert [event.cases_done for event in rounds] == list(accumulate(event.cases for event in rounds))
    assert kinds.count(DisagreementSeen) == len(kept) == 1
    assert kinds.index(DisagreementSeen) > kinds.index(RoundFinished)
    started, found, finished = events[0], events[-2], events[-1]
    assert isinstance(started, RunStarted)
    assert isinstance(found, Disagreement)
    assert isinstance(finished, RunFinished)
    options = {"an": "option", "executors": "eager"}
    assert (started.seed, started.options, started.version, started.planned_cases) == (7, options, "1.0", 50)
    assert (found.problem, found.shrunk, found.reliability) == ("kept in a list", True, Reliability(5, 5))
    assert (finished.cases, finished.stop, finished.signatures) == (50, StopReason.EXAMPLES, (found.signature,))


def test_the_matrix_counts_every_case_once(told: Told) -> None:
    finished = told[0][-1]
    assert isinstance(finished, RunFinished)
    mine = {mode: finished.matrix.cells["short-top-k", "eager", mode] for mode in Mode}
    right = {mode: finished.matrix.cells["vectorized", "eager", mode] for mode in Mode}
    assert all(cell.not_applicable == cell.disagree == cell.unknown == 0 for cell in right.values())
    assert sum(cell.cases for cell in right.values()) >= 50
    assert mine[Mode.DECODE].disagree >= 1
    for mode in set(Mode) - {Mode.DECODE}:
        assert (mine[mode].cases, mine[mode].not_applicable) == (0, right[mode].cases)
        assert mine[mode].reasons == {"mode not declared": right[mode].cases}


def _untimed(event: Event) -> Event:
    if isinstance(event, WorkersReady):
        return msgspec.structs.replace(event, seconds=0.0)
    if isinstance(event, RunFinished):
        return msgspec.structs.replace(event, seconds=0.0, spent={})
    return msgspec.structs.replace(event, spent={}) if isinstance(event, RoundFinished) else event


def test_the_same_plan_gives_the_same_events(plan: Plan, told: Told) -> None:
    def untimed(events: list[Event]) -> list[object]:
        return [_untimed(it) for it in events]

    assert untimed(told[0]) == untimed(_events(plan)[0])


def test_without_shrinking_the_first_case_is_kept(plan: Plan) -> None:
    events, kept = _events(msgspec.structs.replace(plan, shrink=False, max_examples=20))
    (seen,) = [event for event in events if isinstance(event, DisagreementSeen)]
    (found,) = kept
    assert Shrinking not in [type(event) for event in events]
    assert (found.finding, found.shrunk, found.note) == (seen.finding, False, "not shrunk")


def test_the_minimal_case_does_not_depend_on_who_else_is_judged(plan: Plan, told: Told) -> None:
    alone = _events(msgspec.structs.replace(plan, only=("short-top-k",)))[1]
    assert told[1][0].case == alone[0].case


def test_the_first_round_that_shows_a_signature_is_the_one_shrunk(told: Told) -> None:
    seen = told[1][0]
    state = module._State()
    noted: list[Disagreement] = []
    for index in (3, 1, 2):
        case = Case(Setup(), (Replay(requests=(Request(seq_len=1 + index),)),))
        first = Seen(seen.signature, seen.finding, case, 0)
        result = RoundResult(index, 1, Matrix(), Tally(), [first], [], {"a eager": f"d{index}"})
        list(module._round(Plan(), state, result, noted.append))
    index, kept = state.first[seen.signature]
    assert (index, kept.case.replays[0].requests[0].seq_len) == (1, 2)
    assert [it["a eager"] for _, it in sorted(state.digests.items())] == ["d1", "d2", "d3"]
    assert [it.case.replays[0].requests[0].seq_len for it in noted] == [4]


def test_what_is_not_seen_again_is_kept_as_it_was_drawn(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrinking, "shrink_round", lambda *_: True)
    (found,) = _events(msgspec.structs.replace(plan, max_examples=20))[1]
    assert (found.shrunk, found.reliability.runs) == (False, 0)
    assert found.note == "its round, run again, agreed: the case is kept as it was drawn"


def test_an_unknown_verdict_is_an_event_and_counts(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.device.judge import Judge

    monkeypatch.setattr(Judge, "_check_oracle", lambda _: "the oracle contradicts itself")
    events, kept = _events(msgspec.structs.replace(plan, max_examples=3, only=("vectorized",)))
    failed = [event for event in events if isinstance(event, CheckFailed)]
    assert [event.reason for event in failed] == ["the oracle contradicts itself"] * 3
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    assert finished.matrix.total(Outcome.UNKNOWN) >= 3
    assert not kept


def test_what_cannot_be_loaded_is_raised_before_any_event() -> None:
    with pytest.raises(ImplementationError, match="--only warp: no such implementation"):
        next(search(Plan(only=("warp",)), lambda found: found, "1.0", {}))


def test_who_listens_no_longer_stops_the_search(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    real = searcher.run_rounds

    def counted(plan: Plan, indices: range, *more: Any) -> Any:
        rounds.extend(indices)
        return real(plan, indices, *more)

    monkeypatch.setattr(module, "run_rounds", counted)
    for event in search(plan, lambda found: found, "1.0", {}):
        if isinstance(event, RoundFinished):
            break
    assert rounds == [0]


def test_reasons_are_those_of_the_mode(plan: Plan) -> None:
    plan = msgspec.structs.replace(plan, only=("short-top-k",))
    replays = (Replay(requests=(Request(),)), Replay(mode=Mode.TARGET_VERIFY, requests=(Request(),)))
    case = Case(Setup(), replays)
    result = searcher.judge_again(plan, case)
    assert result.matrix.cells["short-top-k", "eager", Mode.DECODE].cases == 1
    assert result.matrix.cells["short-top-k", "eager", Mode.TARGET_VERIFY].reasons == {"mode not declared": 1}


def test_the_last_steps_of_a_shrink_are_those_on_the_case_itself(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[Case, bool]] = []

    def noted(case: Case, shows: Callable[[Case], bool], most: int) -> Case:
        assert most == shrinking.SIMPLIFYING_PROBES
        larger = Case(replace(case.setup, num_steps=case.setup.num_steps + 1), case.replays)
        ends.append((larger, shows(larger)))
        return larger

    monkeypatch.setattr(shrinking, "simplified", noted)
    found = [it for it in search(plan, lambda it: it, "", {}) if isinstance(it, Disagreement)]
    assert ends
    assert {it.case for it in found} == {case for case, shown in ends if shown}


def test_what_is_hunted_is_shrunk_from_what_each_pair_showed_first() -> None:
    case = Case(Setup(), (Replay(Mode.DECODE, (Request(1),)),))

    def seen(code: Code, executor: str, index: int) -> tuple[Signature, Seen]:
        at = Signature("it", executor, code)
        finding = Finding(implementation="it", executor=executor, code=code, replay=0, mode=Mode.DECODE)
        return at, Seen(at, finding, case, index)

    first: dict[Signature, tuple[int, Seen]] = {}
    for code, executor, turn, index in (
        (Code.WRONG_VALUE, "eager", 1, 0),
        (Code.POISON, "eager", 0, 7),
        (Code.STALE, "eager", 0, 3),
        (Code.STALE, "graph", 4, 0),
    ):
        at, it = seen(code, executor, index)
        first[at] = (turn, it)
    state = module._State(first=first)
    both = [Signature("it", "eager", Code.STALE), Signature("it", "graph", Code.STALE)]
    assert module._to_shrink(Plan(until=(("it", "eager"),)), state) == sorted(both)
    assert module._to_shrink(Plan(), state) == sorted(first)
    assert module._to_shrink(Plan(shrink=False), state) == []
