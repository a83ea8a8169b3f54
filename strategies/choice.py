"""Single choices, each laid out so that it shrinks to what a person would have written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


@lru_cache(maxsize=4096)
def _integers(low: int, high: int) -> st.SearchStrategy[int]:
    # Hypothesis takes longer to make a strategy than to draw from it.
    return st.integers(low, high)


def below(draw: st.DrawFn, limit: int) -> int:
    """Draw one of ``0..limit-1``."""
    return draw(_integers(0, limit - 1))


def between(draw: st.DrawFn, low: int, high: int) -> int:
    """Draw one of ``low..high``; a range of one value takes a choice too, and leaves the value there when it widens."""
    return draw(_integers(low, high))


def pick(draw: st.DrawFn, values: Sequence[T]) -> T:
    """Draw one of ``values``; it shrinks to the first, and repeated values are drawn more often."""
    return values[draw(_integers(0, len(values) - 1))]


def chance(draw: st.DrawFn, in_ten: int) -> bool:
    """Draw True ``in_ten`` times of ten; it shrinks to False."""
    return draw(_integers(0, 9)) >= 10 - in_ten


def near(draw: st.DrawFn, low: int, high: int, favourites: Sequence[int], plain_in_ten: int) -> int:
    """Draw one of ``low..high``: ``plain_in_ten`` times of ten any of them, else one of ``favourites``.

    ``favourites`` lie in the range; repeated ones are drawn more often, and without any all of the range is plain. The
    second of the two choices is the value itself, and it is the same choice either way. So once the first shrinks to
    "any", a favourite goes on shrinking from where it is, to the exact threshold of what the search looks for. A union
    of two strategies would have to find that threshold anew.
    """
    if not favourites:
        draw(_integers(0, 0))
        return draw(_integers(low, high))
    plain = -(-len(favourites) * plain_in_ten // (10 - plain_in_ten))
    index = draw(_integers(0, plain + len(favourites) - 1)) - plain
    if index < 0:
        return draw(_integers(low, high))
    return draw(_integers(favourites[index], favourites[index]))
