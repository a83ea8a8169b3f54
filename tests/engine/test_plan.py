"""What a run is a function of."""

from __future__ import annotations

import pytest

from nsa_verify.engine.plan import ROUND_CASES, Plan, digest


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


def test_a_digest_tells_lists_apart() -> None:
    assert digest(["a", "b"]) == digest(["a", "b"])
    assert len({digest(parts) for parts in ([], ["a"], ["a", "b"], ["b", "a"], ["ab"])}) == 5
