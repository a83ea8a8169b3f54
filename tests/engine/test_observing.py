"""What a search brings along if it is asked to: every case with who disagreed on it, and pictures of minimal cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import deadly
from msgspec.structs import replace
from shell.commands import plan_of, registry_of_its_own

from nsa_verify.core.findings import Signature
from nsa_verify.engine import shrinking
from nsa_verify.engine.events import Disagreement, Event, Observed, RoundFinished, RunFinished
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.search import search


@pytest.fixture(autouse=True, scope="module")
def _registry() -> Iterator[None]:
    with registry_of_its_own():
        yield


@pytest.fixture(name="plan", scope="module")
def _plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(tmp_path_factory.mktemp("plan"), 30)


def _events(plan: Plan) -> list[Event]:
    return list(search(plan, lambda it: it, "1.0", {}))


def _observed(events: list[Event]) -> list[Observed]:
    return [it for event in events if isinstance(event, RoundFinished) for it in event.observed]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_case_is_told_with_who_disagreed(plan: Plan, workers: int) -> None:
    asked = replace(plan, observe=True, pictures=True, workers=workers, isolate=workers > 1)
    events = _events(asked)
    observed, finished = _observed(events), events[-1]
    assert isinstance(finished, RunFinished)
    assert len(observed) == finished.cases == 30
    mine = Signature("short-top-k", "eager", finished.signatures[0].code)
    assert {it for seen in observed for it in seen.disagreed} == {mine}
    disagreed = sum(cell.disagree for cell in finished.matrix.cells.values())
    assert sum(len(it.disagreed) for it in observed) == disagreed
    assert {it.ran for it in observed} == {1, 2}
    assert not any(it.unknown for it in observed)
    (found,) = [it for it in events if isinstance(it, Disagreement)]
    assert found.pictures[0].buffer == found.finding.buffer == "nsa_cache_seqlens"
    first = found.pictures[0].squares[0][0]
    assert (first.expected, first.got, first.differs) == (found.finding.expected, found.finding.got, True)


def test_nothing_is_told_unless_it_is_asked_for(plan: Plan) -> None:
    events = _events(plan)
    assert not _observed(events)
    assert [it.pictures for it in events if isinstance(it, Disagreement)] == [()]


def test_who_does_not_run_a_case_is_not_counted(plan: Plan) -> None:
    alone = _observed(_events(replace(plan, only=("short-top-k",), observe=True)))
    assert {it.ran for it in alone} == {0, 1}


def test_unknown_verdicts_have_their_reason(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.device.judge import Judge

    monkeypatch.setattr(Judge, "_check_oracle", lambda _: "the oracle contradicts itself")
    observed = _observed(_events(replace(plan, max_examples=3, only=("vectorized",), observe=True)))
    assert [it.unknown for it in observed] == [("the oracle contradicts itself",)] * 3


def test_what_is_not_shrunk_is_not_drawn(plan: Plan) -> None:
    events = _events(replace(plan, shrink=False, pictures=True))
    assert [it.pictures for it in events if isinstance(it, Disagreement)] == [()]


def test_of_a_case_that_agrees_nothing_is_drawn(plan: Plan) -> None:
    from nsa_verify import Case, Code, Replay, Request, Setup

    case = Case(Setup(), (Replay(requests=(Request(),)),))
    assert shrinking.pictures_of(plan, case, Signature("vectorized", "eager", Code.WRONG_VALUE)) == ()


def test_a_death_leaves_nothing_to_draw() -> None:
    source = str(Path(deadly.__file__))
    plan = Plan(seed=3, max_examples=20, references=(source,), only=("exits",), executors=("eager",), isolate=True)
    (found,) = [it for it in _events(replace(plan, pictures=True)) if isinstance(it, Disagreement)]
    assert (found.finding.code, found.pictures) == ("NV401", ())
