"""Hypothesis as the engine uses it: draw cases of a round, and shrink one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, ClassVar, Final, TypeVar

from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure, FlakyReplay
from hypothesis.internal.conjecture.choice import ChoiceTemplate
from hypothesis.internal.conjecture.data import ConjectureData
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider
from hypothesis.internal.entropy import deterministic_PRNG

from nsa_verify.core.case import Case
from nsa_verify.core.labels import Novelty
from nsa_verify.engine.plan import Plan
from nsa_verify.strategies import Feature, Limits, Swarm, cases, setups
from nsa_verify.strategies.profiles import profile

T = TypeVar("T")

BACKEND = "nsa-verify"
SETUP_SPAN: Final = setups().label
"""How Hypothesis marks the choices that make a Setup."""
CANDIDATES: Final = 3
"""So many cases are drawn for one that is judged."""
UNIFORM: Final = range(-256, 256)
"""From ranges within, Hypothesis draws each value as often as any other."""


class SeededProvider(HypothesisProvider):
    """Draws depend on the seed alone; what makes the Setup, in rounds of a season, on the season's seed.

    Hypothesis mixes in integers that it finds in the source of whatever modules are loaded; then the same seed would
    draw other cases in another process, or beside another ``--impl``.

    A season's choices are choices like any others: they stand in the choice sequence of each case, and shrink.
    """

    season_seed: ClassVar[int | None] = None
    case_seeds: ClassVar[Iterator[int]] = iter(())
    """Seeds of the next cases, in place of whatever chance they are given."""

    def __init__(self, data: ConjectureData | None, /) -> None:
        super().__init__(data)
        own = next(self.case_seeds, None)
        if own is not None:
            self._random = Random(own)
        self._of_the_round = self._random
        self._spans_in_setup = 0

    @classmethod
    def of(cls, season_seed: int | None, case_seeds: Iterable[int] = ()) -> type[SeededProvider]:
        """The provider of a season, of none if ``season_seed`` is None; of the cases of ``case_seeds`` first."""
        return type(cls.__name__, (cls,), {"season_seed": season_seed, "case_seeds": iter(case_seeds)})

    def span_start(self, label: int, /) -> None:
        """Draw from the season's chance inside the span of the Setup, nested spans included."""
        if self._spans_in_setup:
            self._spans_in_setup += 1
        elif label == SETUP_SPAN and self.season_seed is not None:
            self._spans_in_setup = 1
            self._random = Random(self.season_seed)

    def span_end(self, *_: bool) -> None:
        """Draw from the round's chance again behind the span of the Setup."""
        if self._spans_in_setup:
            self._spans_in_setup -= 1
            if not self._spans_in_setup:
                self._random = self._of_the_round

    def _maybe_draw_constant(self, *_: Any, **__: Any) -> None:
        return None

    def draw_integer(
        self,
        min_value: int | None = None,
        max_value: int | None = None,
        *,
        weights: dict[int, float] | None = None,
        shrink_towards: int = 0,
    ) -> int:
        """As ``HypothesisProvider`` does, and from the same chance the same, without its detour for small numbers."""
        if weights is None and min_value in UNIFORM and max_value in UNIFORM:
            assert self._random is not None
            assert min_value is not None
            assert max_value is not None
            return min_value + int(self._random.random() * (max_value - min_value + 1))
        return super().draw_integer(min_value, max_value, weights=weights, shrink_towards=shrink_towards)


class _Unrecorded(ConjectureData):
    """Draws what a provider chooses, and keeps no record of it: nobody will ask for another case like this one."""

    def draw(self, strategy: st.SearchStrategy[T], *_: Any, **__: Any) -> T:
        self.provider.span_start(strategy.label)
        try:
            return strategy.do_draw(self)
        finally:
            self.provider.span_end(False)

    def draw_integer(
        self,
        min_value: int | None = None,
        max_value: int | None = None,
        *,
        weights: dict[int, float] | None = None,
        shrink_towards: int = 0,
        forced: int | None = None,
        **_: Any,
    ) -> int:
        if forced is not None:
            return forced
        return self.provider.draw_integer(min_value, max_value, weights=weights, shrink_towards=shrink_towards)


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
    """Call ``visit`` with every case of round ``index``, as large as suits ``device`` (``cpu`` or ``cuda``).

    The first case of round 0 is the simplest that there is. What ``visit`` raises ends the round.
    """
    # Without Hypothesis's engine: until a case is to be shrunk it would cost more than the choices, and do nothing. As
    # under it, whoever draws from the global ``random`` is given the same numbers with every case.
    for _, case in _chosen(plan, device, index):
        with deterministic_PRNG():
            visit(case)


def _chosen(plan: Plan, device: str, index: int) -> Iterator[tuple[int | None, Case]]:
    """The cases of a round, each with its seed: of some candidates the one with the most pairs of labels that are new
    in the round. Longer cases have more of everything, and cost more: their pairs count for less."""
    strategy, provider = _strategy(plan, device, index), SeededProvider.of(plan.season_seed(index))
    chance, met = Random(plan.round_seed(index)), Novelty()
    for number in range(plan.round_cases(index)):
        seeded: int | None = None
        if index == number == 0:
            case = ConjectureData.for_choices((ChoiceTemplate("simplest", count=None),)).draw(strategy)
        else:
            seeds = [chance.getrandbits(62) for _ in range(CANDIDATES if number else 1)]
            drawn = [(it, _Unrecorded(random=Random(it), provider=provider).draw(strategy)) for it in seeds]
            seeded, case = max(drawn, key=lambda it: met.of(it[1]) / len(it[1].replays) ** 0.5)
        met.add(case)
        yield seeded, case


def shrink_round(plan: Plan, device: str, index: int, shows: Callable[[Case], bool]) -> bool:
    """Draw round ``index`` again and shrink the first case for which ``shows`` holds.

    ``shows`` is called with every probe and keeps what it wants to keep. The first probe of any round is the simplest
    case that there is: if it shows, nothing is left to shrink, and if it does not, Hypothesis need not try it again.
    Then come the cases of the round, without the candidates that were not chosen. False if the probes contradicted each
    other, as they do for an implementation that is not deterministic.
    """
    seeds = [seeded for seeded, _ in _chosen(plan, device, index) if seeded is not None]
    AVAILABLE_PROVIDERS[BACKEND] = SeededProvider.of(plan.season_seed(index), seeds)
    chosen = settings(
        profile(plan.profile).settings,
        max_examples=plan.round_cases(index) + (index > 0),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        backend=BACKEND,
    )

    def test(case: Case) -> None:
        if shows(case):
            raise Found

    try:
        with _without_constants():
            seed(plan.round_seed(index))(chosen(given(case=_strategy(plan, device, index))(test)))()
    except Found:
        return True
    except (FlakyFailure, FlakyReplay):
        return False
    return False


def _strategy(plan: Plan, device: str, index: int) -> st.SearchStrategy[Case]:
    swarm = Swarm.for_round(plan.seed, index, plan.season(index)).without(*map(Feature, plan.without))
    limits = Limits.short() if plan.short_cases else Limits.for_device(device)
    return cases(modes=plan.modes, swarm=swarm, limits=limits)
