"""Labels and their pairs are counted over all cases of a run, if the plan asks for it, whoever draws the rounds."""

from __future__ import annotations

import msgspec
import pytest

from nsa_verify import Mode
from nsa_verify.core.labels import Coverage
from nsa_verify.device.select import resolve
from nsa_verify.engine.drawing import draw_round
from nsa_verify.engine.events import RunFinished
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.search import search

PLAN = Plan(seed=3, max_examples=45, only=("vectorized",), executors=("eager",), coverage=True)


def finished(plan: Plan) -> RunFinished:
    *_, last = search(plan, lambda found: found, "1.0", {})
    assert isinstance(last, RunFinished)
    return last


def counted(plan: Plan) -> Coverage:
    """What there is to count."""
    coverage = Coverage()
    for index in range(plan.rounds):
        draw_round(plan, resolve(plan.device), index, coverage.count)
    return coverage


@pytest.mark.parametrize("workers", [1, 2])
def test_every_case_is_counted_once_with_any_number_of_workers(workers: int) -> None:
    plan = msgspec.structs.replace(PLAN, workers=workers)
    told = finished(plan).coverage
    assert told == counted(plan)
    modes = [told.of(f"mode:{mode}") for mode in Mode]
    assert max(modes) <= plan.max_examples <= sum(modes)


def test_nothing_is_counted_that_was_not_asked_for() -> None:
    assert finished(msgspec.structs.replace(PLAN, coverage=False, max_examples=10)).coverage == Coverage()


def test_counting_changes_no_case() -> None:
    plain = finished(msgspec.structs.replace(PLAN, coverage=False))
    asked = finished(PLAN)
    assert (plain.digest, plain.cases) == (asked.digest, asked.cases)
