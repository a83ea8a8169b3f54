"""Hypothesis as the engine uses it: draw cases of a round, and shrink one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import Phase, given, seed, settings
from hypothesis.errors import FlakyFailure, FlakyReplay
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from nsa_verify.core.case import Case
from nsa_verify.engine.plan import Plan
from nsa_verify.strategies import Limits, Swarm, cases
from nsa_verify.strategies.profiles import profile

BACKEND = "nsa-verify"


class SeededProvider(HypothesisProvider):
    """Draws depend on the seed alone.

    Hypothesis mixes in integers that it finds in the source of whatever modules are loaded; then the same seed would
    draw other cases in another process, or beside another ``--impl``.
    """

    def _maybe_draw_constant(self, *_: Any, **__: Any) -> None:
        return None


@contextmanager
def _without_constants() -> Iterator[None]:
    """The shrinker draws now and then, and from Hypothesis's own provider whatever the backend is."""
    usual = HypothesisProvider._maybe_draw_constant
    HypothesisProvider._maybe_draw_constant = SeededProvider._maybe_draw_constant  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        HypothesisProvider._maybe_draw_constant = usual  # type: ignore[method-assign]


class Found(Exception):
    """The case shows what is being shrunk."""


def draw_round(plan: Plan, device: str, index: int, visit: Callable[[Case], None]) -> None:
    """Call ``visit`` with every case of round ``index``, as large as suits ``device`` (``cpu`` or ``cuda``)."""

    def body(case: Case) -> None:
        visit(case)

    _drive(plan, device, index, body, (Phase.generate,))


def shrink_round(plan: Plan, device: str, index: int, shows: Callable[[Case], bool]) -> bool:
    """Draw round ``index`` again and shrink the first case for which ``shows`` holds.

    ``shows`` is called with every probe and keeps what it wants to keep. False if the probes contradicted each other,
    as they do for an implementation that is not deterministic.
    """

    def body(case: Case) -> None:
        if shows(case):
            raise Found

    try:
        _drive(plan, device, index, body, (Phase.generate, Phase.shrink))
    except Found:
        return True
    except (FlakyFailure, FlakyReplay):
        return False
    return False


def _drive(plan: Plan, device: str, index: int, body: Callable[[Case], None], phases: tuple[Phase, ...]) -> None:
    AVAILABLE_PROVIDERS[BACKEND] = SeededProvider
    chosen = settings(
        profile(plan.profile).settings,
        max_examples=plan.round_cases(index),
        phases=phases,
        report_multiple_bugs=False,
        backend=BACKEND,
    )
    limits = Limits.for_device(device)
    strategy = cases(modes=plan.modes, swarm=Swarm.for_round(plan.seed, index), limits=limits)

    def test(case: Case) -> None:
        body(case)

    with _without_constants():
        seed(plan.round_seed(index))(chosen(given(case=strategy)(test)))()
