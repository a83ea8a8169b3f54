"""Verbs for tests of strategies. Everything is seeded: the same test draws the same examples every time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, find, given, seed, settings
from hypothesis import strategies as st

T = TypeVar("T")


def _settings(max_examples: int, *phases: Phase) -> settings:
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
        backend="hypothesis",
    )


def find_any(
    strategy: st.SearchStrategy[T], predicate: Callable[[T], bool], max_examples: int = 500, seeded: int = 0
) -> T:
    """A drawn example, not shrunk, that satisfies ``predicate``.

    Raises ``hypothesis.errors.NoSuchExample`` if none of the first ``max_examples`` does.
    """
    drawing = _settings(max_examples, Phase.generate)
    return find(strategy, predicate, settings=drawing, random=random.Random(seeded))


def minimal(
    strategy: st.SearchStrategy[T], predicate: Callable[[T], bool], max_examples: int = 3000, seeded: int = 0
) -> T:
    """What the first example that satisfies ``predicate`` shrinks to.

    Raises ``hypothesis.errors.NoSuchExample`` if none of the first ``max_examples`` does.
    """
    shrinking = _settings(max_examples, Phase.generate, Phase.shrink)
    return find(strategy, predicate, settings=shrinking, random=random.Random(seeded))


def draw_many(strategy: st.SearchStrategy[T], examples: int, seeded: int = 0) -> list[T]:
    """``examples`` drawn examples (fewer if the strategy has fewer), in the order in which they were drawn."""
    drawn: list[T] = []

    @seed(seeded)
    @_settings(examples, Phase.generate)
    @given(strategy)
    def collect(example: T) -> None:
        drawn.append(example)

    collect()
    return drawn
