"""What a run is a function of."""

from __future__ import annotations

import pytest

from nsa_verify.engine.plan import FIRST_SEASON, ROUND_CASES, Plan, digest


@pytest.mark.parametrize("cases", [1, ROUND_CASES - 1, ROUND_CASES, ROUND_CASES + 1, 3 * ROUND_CASES, 1000, 1001])
def test_rounds_make_up_the_cases(cases: int) -> None:
    plan = Plan(max_examples=cases)
    sizes = [plan.round_cases(index) for index in range(plan.rounds)]
    assert sum(sizes) == cases
    assert all(size == ROUND_CASES for size in sizes[:-1])
    assert 1 <= sizes[-1] <= ROUND_CASES


def test_rounds_differ_and_depend_on_the_seed_alone() -> None:
    seeds = {Plan(seed=seed).round_seed(index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert Plan(seed=3, workers=1).round_seed(5) == Plan(seed=3, workers=8, max_examples=9).round_seed(5)
    assert Plan(seed=0).round_seed(0) == 2_220_271_774_497_122_242, "old seeds would draw other cases"


@pytest.mark.parametrize("rounds", [1, 99, 100, 101, 103, 104, 999, 1000, 1001, 1016, 1017, 2000])
def test_legs_are_all_the_rounds_in_order(rounds: int) -> None:
    plan = Plan(max_examples=rounds * ROUND_CASES)
    legs = list(plan.legs())
    assert [index for leg in legs for index in leg] == list(range(rounds))
    assert all(len(leg) > 0 for leg in legs)
    assert all(len(leg) == 1 for leg in legs if leg.start < 100)
    assert all(len(leg) == 4 for leg in legs[:-1] if 100 <= leg.start < 1000)
    assert all(len(leg) == 16 for leg in legs[:-1] if leg.start >= 1000)


def test_a_leg_is_a_season_and_a_season_a_leg() -> None:
    plan = Plan(seed=4, max_examples=2000 * ROUND_CASES)
    seasons = [[plan.season(index) for index in leg] for leg in plan.legs()]
    assert seasons[:FIRST_SEASON] == [[None]] * FIRST_SEASON
    assert seasons[FIRST_SEASON:] == [[leg.start] * len(leg) for leg in plan.legs() if leg.start >= FIRST_SEASON]


def test_seasons_are_named_whoever_asks_and_however_long_the_run() -> None:
    long, short = Plan(seed=3, max_examples=20_000, workers=1), Plan(seed=3, max_examples=9, workers=8)
    for index in (0, 19, 20, 99, 100, 101, 103, 104, 999, 1000, 1015, 1016, 5000):
        assert long.season(index) == short.season(index)
        assert long.season_seed(index) == short.season_seed(index)


def test_each_season_of_each_seed_has_a_seed_of_its_own() -> None:
    seeds = {Plan(seed=seed).season_seed(index) for seed in range(20) for index in (20, 21, 99, 100, 104, 1000, 1016)}
    assert len(seeds) == 140
    assert Plan(seed=1).season_seed(19) is None
    assert len({Plan(seed=1).season_seed(index) for index in range(1000, 1016)}) == 1


def test_a_digest_tells_lists_apart() -> None:
    assert digest(["a", "b"]) == digest(["a", "b"])
    assert len({digest(parts) for parts in ([], ["a"], ["a", "b"], ["b", "a"], ["ab"])}) == 5
