"""Does the search kill every mutant, under a code that fits, shrunk to what shows it, and accuse nobody else?

``NSA_VERIFY_TEST_SEEDS=5`` asks of every mutant with five seeds; by default some that are quick are hunted with one.
"""

from __future__ import annotations

import ast
import dataclasses
import os
from pathlib import Path

import pytest
from conftest import NO_GPU
from msgspec.structs import replace
from quality.planted import BUGS
from quality.planted_graphs import GPU_BUGS, GRAPH_BUGS

from nsa_verify import Case, Code, Replay, Request, Setup
from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Finding, Signature
from nsa_verify.device.select import resolve
from nsa_verify.engine import mutation
from nsa_verify.engine.events import (
    CheckFailed,
    Disagreement,
    DisagreementSeen,
    Matrix,
    Reliability,
    RunFinished,
    StopReason,
    Tally,
)
from nsa_verify.engine.mutation import Hunt, Hunted, executors_of, hunt, hunt_all
from nsa_verify.engine.plan import EAGER, ROUND_CASES, Plan
from nsa_verify.engine.search import search
from nsa_verify.kernels import BUILTIN_MODULES
from nsa_verify.mutants import CATALOGUE, Mutant, MutantError, Size, _by_name

GRAPH = "simulated-graph" if NO_GPU else "graph"
EXECUTORS = (EAGER, GRAPH)
ASKED = os.environ.get("NSA_VERIFY_TEST_SEEDS")
SEEDS = range(int(ASKED or "1"))
SLOW = ("triton_fused", "triton_inplace", "precomputed_batched_copy", "onepass")
"""Mutants of Triton kernels take long without a GPU."""
PLANTED = {it.name for it in (*BUGS, *GRAPH_BUGS, *GPU_BUGS)}
"""test_planted_bugs and test_planted_graphs hunt these, kernels among them, and ask more of them."""
QUICK = [
    it.name
    for it in CATALOGUE.values()
    if it.module not in SLOW and it.name not in PLANTED and Code.HANG not in it.codes
][::10]
ALL = [
    pytest.param(it, id=it.name, marks=[pytest.mark.gpu] if it.needs_gpu else [])
    for it in CATALOGUE.values()
    if it.seen_by and (ASKED or it.name in QUICK)
]
HARMLESS = Mutant(
    name="harmless",
    kind="none",
    trigger="none",
    module="vectorized",
    changes={"    for step in steps:\n": "    for step in list(steps):\n"},
    codes=(Code.WRONG_VALUE,),
)
"""What no case can show: it must survive."""


def hunted(mutant: Mutant, folder: Path, seed: int = 0, **more: object) -> Hunted:
    return hunt(mutant, replace(Hunt(seed=seed, executors=EXECUTORS, folder=str(folder)), **more))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mutant", ALL)
def test_killed(mutant: Mutant, seed: int, tmp_path: Path) -> None:
    found = hunted(mutant, tmp_path, seed)
    assert found.problems == []
    assert [kill.executor for kill in found.kills] == list(executors_of(mutant, EXECUTORS))
    for kill in found.kills:
        assert not kill.problem
        assert 0 < kill.cases <= 500
        assert kill.code in mutant.codes
        if not {Code.HANG, Code.NOT_DETERMINISTIC} & {*mutant.codes}:
            assert kill.case is not None
            assert Size.of(kill.case).fits(mutant.size)


def test_a_mutant_without_a_bug_survives(tmp_path: Path) -> None:
    found = hunted(HARMLESS, tmp_path, max_cases=30)
    assert not found.killed
    assert [(kill.executor, kill.problem) for kill in found.kills] == [(it, "survived 30 cases") for it in EXECUTORS]


def test_what_is_seen_otherwise_than_declared_is_no_kill(tmp_path: Path) -> None:
    mutant = CATALOGUE["page-column-off-by-one"]
    other = dataclasses.replace(mutant, name="other", codes=(Code.GUARD_WRITTEN,))
    (kill, _) = hunted(other, tmp_path).kills
    assert kill.problem.startswith(f"reported as {mutant.codes[0]}, and not as NV201: ")
    small = dataclasses.replace(mutant, name="small", size=Size(length=0))
    (kill, _) = hunted(small, tmp_path).kills
    assert kill.problem == "its minimal case is 1 x 1 x 1, and should be at most 1 x 1 x 0"


EASY = CATALOGUE["page-column-off-by-one"]


def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *events: object) -> Hunted:
    """What a hunt for ``EASY`` makes of a search that says ``events``."""
    monkeypatch.setattr(mutation, "search", lambda *_: iter(events))
    return hunted(EASY, tmp_path, executors=(EAGER,))


def signature(name: str = EASY.copy_name, executor: str = EAGER) -> Signature:
    return Signature(implementation=name, executor=executor, code=Code.WRONG_VALUE)


CASE = Case(Setup(), (Replay(Mode.DECODE, (Request(1),)),))
FINDING = Finding(
    implementation=EASY.copy_name, executor=EAGER, code=Code.WRONG_VALUE, replay=0, mode=Mode.DECODE, message="wrong"
)
SEEN = DisagreementSeen(signature(), FINDING, 4)
MINIMAL = Disagreement(
    signature=signature(),
    case=CASE,
    finding=FINDING,
    reliability=Reliability(5, 5),
    shrunk=True,
    probes=9,
)
AS_DRAWN = replace(MINIMAL, shrunk=False, probes=0, note="its round, run again, agreed")


@pytest.mark.parametrize(
    ("events", "problems", "killed"),
    [
        ((SEEN, MINIMAL), [""], True),
        ((), ["survived 0 cases"], False),
        ((SEEN, AS_DRAWN), ["was seen at case 4, and not shrunk: its round, run again, agreed"], False),
        ((SEEN,), ["was seen at case 4, and not shrunk: nothing was said of it"], False),
        ((SEEN, MINIMAL, DisagreementSeen(signature("vectorized"), FINDING, 5)), [""], False),
        ((SEEN, MINIMAL, CheckFailed("vectorized", EAGER, "it broke", CASE)), [""], False),
    ],
    ids=["killed", "nothing", "as drawn", "not shrunk", "another accused", "check failed"],
)
def test_what_a_hunt_makes_of_a_search(
    events: tuple[object, ...], problems: list[str], killed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = told(monkeypatch, tmp_path, *events)
    assert [kill.problem for kill in found.kills] == problems
    assert found.killed is killed
    assert bool(found.problems) is (problems == [""] and not killed)


def test_a_race_is_not_held_to_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mutation, "search", lambda *_: iter((SEEN, MINIMAL)))
    for codes, killed in ((EASY.codes, False), ((*EASY.codes, Code.NOT_DETERMINISTIC), True)):
        found = hunted(dataclasses.replace(EASY, codes=codes, size=Size(length=0)), tmp_path, executors=(EAGER,))
        assert found.killed is killed


def test_an_interrupted_hunt_is_neither_killed_nor_survived(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    end = RunFinished(Matrix(), Tally(), 5, 1.0, StopReason.INTERRUPTED, (), "")
    for events in ((end,), (SEEN, end)):
        found = told(monkeypatch, tmp_path, *events)
        assert found.interrupted
        assert not found.killed
        assert not any(kill.problem for kill in found.kills)


def test_mutants_of_a_gpu_are_hunted_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def noted(mutant: Mutant, _: Hunt) -> Hunted:
        asked.append(mutant.name)
        return Hunted(name=mutant.name, kills=[])

    monkeypatch.setattr(mutation, "hunt", noted)
    both = [dataclasses.replace(EASY, name="gpu", needs_gpu=True), EASY]
    list(hunt_all(both, Hunt(folder=str(tmp_path), device="auto"), 1))
    assert asked == (["gpu", EASY.name] if resolve("auto") == "cuda" else [EASY.name])


def test_a_mutant_that_does_not_fit_is_told_before_any_is_hunted(tmp_path: Path) -> None:
    lost = dataclasses.replace(HARMLESS, name="lost", changes={"no such text": ""})
    with pytest.raises(MutantError, match=r"^lost: "):
        next(hunt_all([EASY, lost], Hunt(folder=str(tmp_path), device="auto"), 1))


def test_a_hunt_with_nobody_to_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the executors"):
        hunt(EASY, Hunt(folder=str(tmp_path)))


def test_names_are_taken_once() -> None:
    with pytest.raises(MutantError, match="two mutants are called page-column-off-by-one"):
        _by_name(EASY, HARMLESS, dataclasses.replace(EASY, trigger="another"))


def test_no_more_is_drawn_than_is_needed(tmp_path: Path) -> None:
    assert hunted(CATALOGUE["page-column-off-by-one"], tmp_path).cases == ROUND_CASES


@pytest.mark.slow
def test_what_one_executor_was_shrunk_to_is_tried_first_for_the_other(tmp_path: Path) -> None:
    mutant = CATALOGUE["top-k-comparison"]
    plan = Plan(max_examples=30, references=(str(mutant.plant(tmp_path)),), only=(mutant.copy_name,), isolate=True)
    events = search(replace(plan, workers=2), lambda it: it, "", {})
    found = {it.signature.executor: it for it in events if isinstance(it, Disagreement)}
    assert sorted(found) == sorted(EXECUTORS)
    assert found[GRAPH].case == found[EAGER].case
    assert found[EAGER].probes > 1 == found[GRAPH].probes


def test_a_check_that_is_switched_off_sees_nothing(tmp_path: Path) -> None:
    mutant = CATALOGUE["one-past-the-prefix-sum"]
    assert not hunted(mutant, tmp_path, blind=("guard zones",), max_cases=30).killed
    assert hunted(mutant, tmp_path, blind=("frame cells",)).killed


def test_a_feature_that_is_switched_off_is_not_drawn(tmp_path: Path) -> None:
    mutant = CATALOGUE["last-step-not-written"]
    assert not hunted(mutant, tmp_path, without=("several steps",), max_cases=30).killed
    assert hunted(mutant, tmp_path, without=("padding",), shrink=False).killed


@pytest.mark.slow
def test_the_same_seed_kills_with_the_same_cases(tmp_path: Path) -> None:
    chosen = [it for it in CATALOGUE.values() if it.seen_by and it.module == "python_loop"][:2]
    given = Hunt(executors=EXECUTORS, folder=str(tmp_path))
    kills = []
    for workers in (1, 2):
        found = sorted(hunt_all(chosen, given, workers), key=lambda it: it.name)
        kills.append([(it.name, kill.executor, kill.cases, kill.size) for it in found for kill in it.kills])
    assert kills[0] == kills[1]
    assert {name for name, *_ in kills[0]} == {it.name for it in chosen}


@pytest.mark.parametrize("mutant", CATALOGUE.values(), ids=list(CATALOGUE))
def test_the_catalogue_is_in_step_with_the_implementations(mutant: Mutant) -> None:
    right, wrong = mutant.text(changed=False), mutant.text()
    assert right != wrong
    assert ast.dump(ast.parse(right)) != ast.dump(ast.parse(wrong))
    assert mutant.codes or not mutant.seen_by
    assert mutant.kind
    assert "\n" not in mutant.trigger
    assert f"nsa_verify.kernels.{mutant.module}" in BUILTIN_MODULES


def test_the_catalogue_covers_what_can_go_wrong() -> None:
    assert len(CATALOGUE) >= 40
    assert len({tuple(it.changes.items()) for it in CATALOGUE.values()}) == len(CATALOGUE)
    assert {it.module for it in CATALOGUE.values()} == {name.rpartition(".")[2] for name in BUILTIN_MODULES}
    codes = {code for it in CATALOGUE.values() for code in it.codes}
    assert not {*Code} - codes - {Code.DEATH, Code.HANG, Code.NOT_DETERMINISTIC, Code.OUT_OF_BOUNDS}


def test_a_change_that_does_not_stand_there_once_is_refused() -> None:
    for right in ("no such text", "Tensor"):
        mutant = dataclasses.replace(HARMLESS, name="lost", changes={right: ""})
        with pytest.raises(MutantError, match=rf"^lost: '{right}' stands \d+ times in vectorized.py, and must stand"):
            mutant.text()


def test_size() -> None:
    setup = Setup(num_draft_tokens=3, buckets=(1, 4), table_width=16)
    replays = (
        Replay(Mode.TARGET_VERIFY, (Request(seq_len=5), Request(seq_len=7))),
        Replay(Mode.DECODE, (Request(seq_len=9),)),
    )
    size = Size.of(Case(setup, replays))
    assert size == Size(replays=2, rows=12, length=9)
    assert str(size) == "2 x 12 x 9"
    assert size.fits(Size(2, 12, 9))
    assert not any(size.fits(it) for it in (Size(1, 12, 9), Size(2, 11, 9), Size(2, 12, 8)))
