"""Verbs for tests of strategies. Everything is seeded: the same test draws the same examples every time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, find, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS

from nsa_verify.engine.drawing import BACKEND, SeededProvider

T = TypeVar("T")

RUN = 10
"""Examples of one Hypothesis run. From the eleventh on it puts parts of an example into the next instead of drawing
afresh, so that 500 examples of one run are variations of about 90."""


def _settings(max_examples: int, *phases: Phase) -> settings:
    AVAILABLE_PROVIDERS[BACKEND] = SeededProvider
    return settings(
        max_examples=max_examples,
        phases=phases,
        derandomize=False,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=tuple(HealthCheck),
        verbosity=Verbosity.quiet,
        backend=BACKEND,
    )


def _runs(max_examples: int, seeded: int) -> Iterator[tuple[int, random.Random]]:
    """How many examples each run draws, and its source of chance."""
    for start in range(0, max_examples, RUN):
        yield min(RUN, max_examples - start), random.Random(f"{seeded} {start}")


def _find(
    strategy: st.SearchStrategy[T], predicate: Callable[[T], bool], max_examples: int, seeded: int, *phases: Phase
) -> T:
    for examples, chance in _runs(max_examples, seeded):
        try:
            return find(strategy, predicate, settings=_settings(examples, *phases), random=chance)
        except NoSuchExample:
            continue
    raise NoSuchExample(f"any of {max_examples} examples")


def find_any(
    strategy: st.SearchStrategy[T], predicate: Callable[[T], bool], max_examples: int = 500, seeded: int = 0
) -> T:
    """A drawn example, not shrunk, that satisfies ``predicate``.

    Raises ``hypothesis.errors.NoSuchExample`` if none of the first ``max_examples`` does.
    """
    return _find(strategy, predicate, max_examples, seeded, Phase.generate)


def minimal(
    strategy: st.SearchStrategy[T], predicate: Callable[[T], bool], max_examples: int = 2000, seeded: int = 0
) -> T:
    """What the first example that satisfies ``predicate`` shrinks to.

    Raises ``hypothesis.errors.NoSuchExample`` if none of the first ``max_examples`` does.
    """
    return _find(strategy, predicate, max_examples, seeded, Phase.generate, Phase.shrink)


def draw_many(strategy: st.SearchStrategy[T], examples: int, seeded: int = 0) -> list[T]:
    """``examples`` drawn examples (fewer if the strategy has fewer), in the order in which they were drawn."""
    drawn: list[T] = []
    for size, chance in _runs(examples, seeded):

        @seed(chance.getrandbits(64))
        @_settings(size, Phase.generate)
        @given(strategy)
        def collect(example: T) -> None:
            drawn.append(example)

        collect()
    return drawn
