"""Executors as the engine drives them: which, how thoroughly, and what is counted and given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Any

import pytest
from msgspec.structs import replace
from shell.commands import executor_of_another_device, graph_executor, registry_of_its_own

from nsa_verify import Case, Code, Implementation, Mode, Outcome, Replay, Request, Setup, fallback, implementation
from nsa_verify.core.findings import Finding, Verdict
from nsa_verify.device import rig
from nsa_verify.device.batch import Job, judge_batch
from nsa_verify.device.select import DeviceError
from nsa_verify.engine import searcher, shrinking, worker
from nsa_verify.engine.crew import Crew
from nsa_verify.engine.events import Cell, RunStarted, Tally
from nsa_verify.engine.isolation import Inside
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.search import search

CASE = Case(Setup(), (Replay(requests=(Request(),)),))


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with registry_of_its_own():
        yield


def test_all_of_the_device_unless_named() -> None:
    graph = graph_executor()
    assert searcher.hello(Plan()).executors == ("eager", graph)
    assert searcher.hello(Plan(executors=(graph,))).executors == (graph,)
    started = next(search(Plan(only=("vectorized",)), lambda found: found, "1.0", {"executors": "", "a": "b"}))
    assert isinstance(started, RunStarted)
    assert started.executors == ("eager", graph)
    assert list(started.options.items()) == [("executors", f"eager,{graph}"), ("a", "b")]


@pytest.mark.parametrize("workers", [1, 2])
def test_one_of_another_device_is_refused_before_any_event(workers: int) -> None:
    name, sentence = executor_of_another_device()
    plan = Plan(executors=("eager", name), workers=workers)
    with pytest.raises(DeviceError, match=sentence):
        next(search(plan, lambda found: found, "1.0", {}))


def _judged(subjects: Sequence[Implementation], executors: tuple[str, ...], device: str) -> list[Verdict]:
    pairs = [(it, executor) for executor in worker.drivers(device, executors) for it in subjects]
    return [verdict for *_, verdict in judge_batch([Job(CASE, pairs)], device)]


def test_verdicts_come_for_every_executor() -> None:
    device, subjects = worker.prepare("auto", (), ("python-loop", "vectorized"))
    told = {(it.implementation, it.executor): it.outcome for it in _judged(subjects, (), device)}
    graph = graph_executor()
    assert told == {
        ("python-loop", "eager"): Outcome.AGREE,
        ("python-loop", graph): Outcome.NOT_APPLICABLE,
        ("vectorized", "eager"): Outcome.AGREE,
        ("vectorized", graph): Outcome.AGREE,
    }


def test_some_cases_are_judged_thoroughly_and_every_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    how: list[tuple[bool, bool, bool]] = []

    def judge(jobs: Sequence[Job], device: str, careful: bool = False) -> Iterator[tuple[int, int, Verdict]]:
        finding = Finding(implementation="vectorized", executor="eager", code=Code.MOVED, replay=0, mode=Mode.DECODE)
        verdict = Verdict(implementation="vectorized", executor="eager", outcome=Outcome.DISAGREE, findings=(finding,))
        for number, job in enumerate(jobs):
            how.append((job.repeat, job.delay, job.rerun))
            yield number, 0, verdict

    monkeypatch.setattr("nsa_verify.device.batch.judge_batch", judge)
    plan = Plan(max_examples=10, only=("vectorized",), executors=("eager",))
    (result,) = searcher.run_rounds(plan, [0])
    assert [repeat for repeat, _, _ in how] == [True, False] * 5
    assert [number for number, (_, delay, _) in enumerate(how) if delay] == [5]
    assert [seen.signature.code for seen in result.seen] == [Code.MOVED]
    how.clear()
    assert shrinking.shrink(plan, 0, result.seen[0]) is not None
    searcher.judge_saved(plan, CASE)
    assert len(how) > shrinking.RELIABILITY_RUNS
    probes = [rerun for _, _, rerun in how].index(True)
    assert probes > 0
    assert how[:probes] == [(True, True, False)] * probes  # whether it does so every time is asked of the minimal case
    assert set(how[probes:]) == {(True, True, True)}


@pytest.mark.parametrize("settles", [True, False])
def test_what_is_not_the_same_when_it_is_run_again_is_shrunk_with_care(
    settles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small cases disagree in one way in a single run, and in another when that is repeated."""
    wrong = Finding(implementation="vectorized", executor="eager", code=Code.MOVED, replay=0, mode=Mode.DECODE)
    flickers = replace(wrong, code=Code.NOT_DETERMINISTIC)
    small = Case(Setup(), (Replay(Mode.DECODE, (Request(seq_len=2),)),))

    def judge(jobs: Sequence[Job], device: str, careful: bool = False) -> Iterator[tuple[int, int, Verdict]]:
        for number, job in enumerate(jobs):
            found = flickers if job.rerun and job.case == small and not settles else wrong
            said = Verdict(implementation="vectorized", executor="eager", outcome=Outcome.DISAGREE, findings=(found,))
            yield number, 0, said

    def shrink_round(plan: Plan, device: str, index: int, shows: Callable[[Case], bool]) -> bool:
        for case in (CASE, small):
            shows(case)
        return True

    monkeypatch.setattr("nsa_verify.device.batch.judge_batch", judge)
    monkeypatch.setattr(shrinking, "shrink_round", shrink_round)
    monkeypatch.setattr(shrinking, "simplified", lambda case, *_: case)
    plan = Plan(only=("vectorized",), executors=("eager",))
    result = shrinking.shrink(plan, 0, searcher.Seen(wrong.signature, wrong, CASE, 0))
    assert result is not None
    assert (result.case, result.finding.code) == (small if settles else CASE, Code.MOVED)
    assert result.probes == (2 if settles else 4)


def test_what_the_executor_alone_refuses_is_counted_apart() -> None:
    graph = graph_executor()
    plan = Plan(seed=1, max_examples=10, only=("vectorized",), modes=(Mode.DRAFT_EXTEND,))
    cells = searcher.run_rounds(plan, [0])[0].matrix.cells
    eager, captured = (cells["vectorized", executor, Mode.DRAFT_EXTEND] for executor in ("eager", graph))
    assert (eager.cases, eager.not_capturable) == (10, 0)
    assert captured == Cell(not_applicable=10, not_capturable=10, reasons={"declared not capturable": 10})


def _tally(name: str, *reasons: str, keys: str = "", eager: bool = True) -> Tally:
    tally = Tally()
    verdict = Verdict(
        implementation=name,
        executor="any",
        outcome=Outcome.AGREE,
        fallbacks=reasons,
        compile_keys=frozenset(keys.split()),
    )
    tally.count(verdict, eager)
    return tally


def test_tallies_add_up_in_any_order() -> None:
    parts = (
        _tally("b", "slow", "slow", "odd"),
        _tally("a", "slow", keys="k2 k1"),
        _tally("b", "slow", "lost", eager=False, keys="k3"),
        _tally("a", keys="k1 k4"),
        _tally("c"),
    )
    for order in permutations(parts):
        whole = Tally()
        for part in order:
            whole.add(part)
        told = whole.in_order()
        assert list(told.fallbacks.items()) == [("a", {"slow": 1}), ("b", {"lost": 0, "odd": 1, "slow": 2})]
        assert list(told.fallbacks["b"]) == ["lost", "odd", "slow"]
        assert list(told.compile_keys.items()) == [("a", {"k1", "k2", "k4"}), ("b", {"k3"})]
    assert parts[0].fallbacks == {"b": {"slow": 2, "odd": 1}}, "adding changed what was added"


def test_a_fallback_is_that_of_who_reported_it() -> None:
    @implementation("gives-up", modes=[Mode.DECODE])
    def refresh(inputs: Any, steps: Any, setup: Any) -> None:
        fallback("gave up")
        raise RuntimeError("and then it raised")

    device, subjects = worker.prepare("auto", (), ("gives-up", "vectorized"))
    told = _judged((subjects[1], subjects[0]), (graph_executor(),), device)
    assert [it.implementation for it in told] == ["gives-up", "vectorized"]
    assert told[1].fallbacks == ()


def test_what_was_kept_is_closed_however_the_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(max_examples=3, only=("vectorized",))
    list(search(plan, lambda found: found, "1.0", {}))
    assert not rig._RIGS

    def judge_and(error: type[BaseException]) -> None:
        with Crew(1) as crew:
            crew.submit(searcher.judge_saved, plan, CASE).result()
            assert rig._RIGS
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            judge_and(error)
        assert not rig._RIGS


def test_cases_are_drawn_for_the_device_that_was_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def record(_: Plan, device: str, *__: Any) -> bool:
        asked.append(device)
        return False

    monkeypatch.setattr(Inside, "hello", lambda _: Hello("cuda", "a GPU", (), ("eager",)))
    monkeypatch.setattr(searcher, "draw_round", record)
    monkeypatch.setattr(shrinking, "shrink_round", record)
    searcher.run_rounds(Plan(), [0])
    finding = Finding(implementation="vectorized", executor="eager", code=Code.MOVED, replay=0, mode=Mode.DECODE)
    assert shrinking.shrink(Plan(), 0, searcher.Seen(finding.signature, finding, CASE, 0)) is None
    assert asked == ["cuda", "cuda"]
