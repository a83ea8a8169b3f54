"""Single choices, each laid out so that it shrinks to what a person would have written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from hypothesis import strategies as st
from hypothesis.internal.conjecture.data import ConjectureData
from hypothesis.internal.conjecture.utils import calc_label_from_name

T = TypeVar("T")
P = ParamSpec("P")

PLAIN_RANGE = 127
"""Of a wider range, by this, Hypothesis draws the ends more often."""


class _Composed(st.SearchStrategy[T]):
    """What a function draws; all that it draws is one span, whose label goes by the function."""

    def __init__(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self._function, self._args, self._kwargs = function, args, kwargs

    def do_draw(self, data: ConjectureData) -> T:
        return self._function(data, *self._args, **self._kwargs)

    def calc_label(self) -> int:
        return calc_label_from_name(f"{self._function.__module__}.{self._function.__qualname__}")


def composed(function: Callable[Concatenate[ConjectureData, P], T]) -> Callable[P, st.SearchStrategy[T]]:
    """As ``hypothesis.strategies.composite``, but ``function`` draws from the data itself.

    It can then take its many small choices without the cost of a strategy for each, which is twice that of the choice.
    """

    @wraps(function)
    def strategy(*args: P.args, **kwargs: P.kwargs) -> st.SearchStrategy[T]:
        return _Composed(function, args, kwargs)

    return strategy


@lru_cache(maxsize=4096)
def _integers(low: int, high: int) -> st.SearchStrategy[int]:
    # Hypothesis takes longer to make a strategy than to draw from it.
    return st.integers(low, high)


def below(data: ConjectureData, limit: int) -> int:
    """Draw one of ``0..limit-1``."""
    return between(data, 0, limit - 1)


def between(data: ConjectureData, low: int, high: int) -> int:
    """Draw one of ``low..high``; a range of one value takes a choice too, and leaves the value there when it widens."""
    if high - low > PLAIN_RANGE:
        return data.draw(_integers(low, high))
    return data.draw_integer(low, high)


def pick(data: ConjectureData, values: Sequence[T]) -> T:
    """Draw one of ``values``; it shrinks to the first, and repeated values are drawn more often."""
    return values[between(data, 0, len(values) - 1)]


def chance(data: ConjectureData, in_ten: int) -> bool:
    """Draw True ``in_ten`` times of ten; it shrinks to False."""
    return between(data, 0, 9) >= 10 - in_ten


def near(data: ConjectureData, low: int, high: int, favourites: Sequence[int], plain_in_ten: int) -> int:
    """Draw one of ``low..high``: ``plain_in_ten`` times of ten any of them, else one of ``favourites``.

    ``favourites`` lie in the range; repeated ones are drawn more often, and without any all of the range is plain. The
    second of the two choices is the value itself, and it is the same choice either way. So once the first shrinks to
    "any", a favourite goes on shrinking from where it is, to the exact threshold of what the search looks for. A union
    of two strategies would have to find that threshold anew.
    """
    if not favourites:
        between(data, 0, 0)
        return between(data, low, high)
    plain = -(-len(favourites) * plain_in_ten // (10 - plain_in_ten))
    index = between(data, 0, plain + len(favourites) - 1) - plain
    if index < 0:
        return between(data, low, high)
    return between(data, favourites[index], favourites[index])
