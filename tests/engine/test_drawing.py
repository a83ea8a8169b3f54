"""Cases depend on the seed alone: not on what else is loaded, on the process, or on the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis.internal.conjecture.data import ConjectureData
from hypothesis.internal.conjecture.providers import HypothesisProvider

from nsa_verify import Case, Mode, Replay, Request, Setup
from nsa_verify.core.labels import labels_of, pairs
from nsa_verify.engine import drawing
from nsa_verify.engine.drawing import SeededProvider, draw_round, shrink_round
from nsa_verify.engine.plan import FIRST_SEASON, ROUND_CASES, Plan

PLAN = Plan(seed=5, max_examples=45)
LONG = Plan(seed=5, max_examples=2000 * ROUND_CASES)
SIMPLEST = Case(Setup(table_width=2, pool_width=2), (Replay(Mode.DECODE, (Request(1),)),))


def drawn(plan: Plan, index: int, device: str = "cpu") -> list[Case]:
    cases: list[Case] = []
    draw_round(plan, device, index, cases.append)
    return cases


def probed(plan: Plan, index: int, device: str = "cpu") -> list[Case]:
    """What a shrink meets if nothing shows."""
    cases: list[Case] = []

    def shows(case: Case) -> bool:
        cases.append(case)
        return False

    assert shrink_round(plan, device, index, shows) is False
    return cases


def shrunk(plan: Plan, index: int, shows: Callable[[Case], bool]) -> Case:
    """The last probe that showed it."""
    shown: list[Case] = []

    def keep(case: Case) -> bool:
        if shows(case):
            shown.append(case)
        return shows(case)

    assert shrink_round(plan, "cpu", index, keep)
    return shown[-1]


def a_season(predicate: Callable[[Setup], bool], start: int = FIRST_SEASON) -> int:
    """The first season round whose Setup is like this."""
    return next(index for index in range(start, 2000) if predicate(drawn(LONG, index)[0].setup))


def test_cases_with_pairs_of_labels_that_are_new_are_favoured(monkeypatch: pytest.MonkeyPatch) -> None:
    def pairs_met() -> int:
        return len({pair for index in range(8) for case in drawn(PLAN, index) for pair in pairs(labels_of(case))})

    favoured = pairs_met()
    monkeypatch.setattr(drawing, "CANDIDATES", 1)
    assert favoured > 1.02 * pairs_met()


PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, ".")
{imports}
from nsa_verify.engine.drawing import draw_round, shrink_round
from nsa_verify.engine.plan import Plan

plan = Plan(seed=5, max_examples=45)
long = Plan(seed=5, max_examples=20000)
drawn, probed = [], []
for index in (25, 101):
    draw_round(long, "cpu", index, lambda case: drawn.append(repr(case)))
for index in range(plan.rounds):
    draw_round(plan, "cpu", index, lambda case: drawn.append(repr(case)))

def shows(case):
    probed.append(repr(case))
    return sum(request.seq_len for replay in case.replays for request in replay.requests) > 20

stable = shrink_round(plan, "cpu", 1, shows)
print(json.dumps([drawn, probed, stable]))
"""


def _elsewhere(folder: Path, imports: str = "", **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM.format(imports=imports)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert not (folder / ".hypothesis").exists()
    return json.loads(done.stdout)


def _long(case: Case) -> bool:
    return sum(request.seq_len for replay in case.replays for request in replay.requests) > 20


def test_the_same_cases_and_the_same_shrink_in_every_process(tmp_path: Path) -> None:
    constants = "\n".join(f"x{number} = {number}" for number in range(2, 60))
    (tmp_path / "of_the_user.py").write_text(constants)
    seasons = [repr(case) for index in (25, 101) for case in drawn(LONG, index)]
    own = [repr(case) for index in range(PLAN.rounds) for case in drawn(PLAN, index)]
    probes: list[str] = []

    def shows(case: Case) -> bool:
        probes.append(repr(case))
        return _long(case)

    here = [seasons + own, probes, shrink_round(PLAN, "cpu", 1, shows)]
    assert len(own) == PLAN.max_examples
    assert here == _elsewhere(tmp_path)
    assert here == _elsewhere(tmp_path, "import of_the_user", CI="1", PYTHONHASHSEED="7")


def test_a_round_is_drawn_alone() -> None:
    first = drawn(PLAN, 2)
    drawn(PLAN, 0)
    assert first == drawn(PLAN, 2)
    assert len(first) == PLAN.round_cases(2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("index", [0, 1, 7, FIRST_SEASON, 101, 1001])
def test_a_shrink_meets_the_cases_of_the_round(index: int, device: str) -> None:
    met = probed(LONG, index, device)
    assert met[index > 0 :] == drawn(LONG, index, device)
    assert met[0] == SIMPLEST


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 9), (-256, 255), (3, 130), (1, 256), (1, 300), (0, 70_000), (-5, 100_000)]
)
def test_a_choice_is_the_one_that_hypothesis_makes_of_the_same_chance(low: int, high: int) -> None:
    class Plainly(SeededProvider):
        draw_integer = HypothesisProvider.draw_integer

    ours, plainly = (
        [ConjectureData(random=Random(seeded), provider=provider).draw_integer(low, high) for seeded in range(500)]
        for provider in (SeededProvider, Plainly)
    )
    assert ours == plainly
    assert len(set(ours)) > min(high - low, 30)


@pytest.mark.parametrize("index", [0, 1, 19, FIRST_SEASON, 150, 1001])
def test_the_simplest_case_is_visited_once_in_a_run(index: int) -> None:
    cases = drawn(LONG, index)
    assert len(cases) == ROUND_CASES
    assert [case == SIMPLEST for case in cases] == [index == 0] + [False] * (ROUND_CASES - 1)


def test_a_run_of_one_case_visits_the_simplest() -> None:
    assert drawn(Plan(seed=5, max_examples=1), 0) == [SIMPLEST]


@pytest.mark.parametrize("index", [1, FIRST_SEASON, 101])
def test_what_always_shows_shrinks_to_the_simplest_case_in_any_round(index: int) -> None:
    assert shrunk(LONG, index, lambda _: True) == SIMPLEST


def test_what_a_visit_raises_ends_the_round() -> None:
    visits = 0

    def visit(_: Case) -> None:
        nonlocal visits
        visits += 1
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        draw_round(PLAN, "cpu", 1, visit)
    assert visits == 1


def test_before_the_first_season_cases_have_setups_of_their_own() -> None:
    setups = [case.setup for index in range(FIRST_SEASON) for case in drawn(LONG, index)]
    assert len(set(setups)) > 0.9 * len(setups)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("leg", [range(20, 21), range(99, 100), range(100, 104), range(104, 108), range(1000, 1016)])
def test_the_cases_of_a_season_share_their_setup_and_nothing_else(leg: range, device: str) -> None:
    assert leg in LONG.legs()
    cases = [case for index in leg for case in drawn(LONG, index, device)]
    assert len({case.setup for case in cases}) == 1
    assert len({case.replays for case in cases}) > 0.7 * len(cases)


def test_seasons_differ() -> None:
    firsts = [leg.start for leg in LONG.legs() if leg.start >= FIRST_SEASON][:60]
    assert len({drawn(LONG, index)[0].setup for index in firsts}) > 50
    assert drawn(LONG, FIRST_SEASON)[0].setup != drawn(Plan(seed=6, max_examples=900), FIRST_SEASON)[0].setup


def test_a_setup_of_a_season_shrinks_as_far_as_any() -> None:
    index = a_season(lambda setup: setup.num_steps >= 2 and setup.page_size > 1, 100)
    found = shrunk(LONG, index, lambda case: case.setup.num_steps >= 2)
    assert found == Case(Setup(table_width=2, pool_width=2, num_steps=2), SIMPLEST.replays)


def test_a_length_in_a_season_shrinks_to_the_exact_threshold() -> None:
    def shows(case: Case) -> bool:
        return any(request.seq_len >= 21 for replay in case.replays for request in replay.requests)

    index = a_season(lambda setup: setup.table_width > 60 and setup.page_size > 1)
    assert any(map(shows, drawn(LONG, index)))
    expected = Case(Setup(table_width=21, pool_width=21), (Replay(Mode.DECODE, (Request(21),)),))
    assert shrunk(LONG, index, shows) == expected


def test_a_shrink_that_meets_contradictions_says_so() -> None:
    calls = 0

    def now_and_then(_: Case) -> bool:
        nonlocal calls
        calls += 1
        return calls == 3

    assert shrink_round(PLAN, "cpu", 0, now_and_then) is False


def test_a_shrink_that_finds_nothing_says_so() -> None:
    assert shrink_round(PLAN, "cpu", 0, lambda _: False) is False


def test_a_gpu_gets_larger_cases() -> None:
    largest: dict[str, int] = {}
    for device in ("cpu", "cuda"):
        cases = [case for index in range(PLAN.rounds) for case in drawn(PLAN, index, device)]
        largest[device] = max(case.setup.buckets[-1] for case in cases)
    assert largest["cuda"] > largest["cpu"]


def test_what_a_gpu_found_is_shrunk_among_its_own_cases() -> None:
    wide = max(case.setup.buckets[-1] for case in drawn(PLAN, 0, "cuda"))
    assert shrink_round(PLAN, "cuda", 0, lambda case: case.setup.buckets[-1] >= wide)


MOST_MS_PER_CASE = 6.0
"""About 1 ms is usual, and twice that where two threads share a core; the rest is for slow and busy machines."""


def test_drawing_a_round_is_cheap() -> None:
    drawn(LONG, 0)
    begun = time.process_time()
    cases = [case for index in range(30) for case in drawn(LONG, index)]
    assert (time.process_time() - begun) * 1000 / len(cases) < MOST_MS_PER_CASE
