"""The real requests of one replay."""

from __future__ import annotations

from enum import IntEnum
from itertools import cycle, islice
from typing import NamedTuple

from hypothesis import strategies as st

from nsa_verify.core.case import Mode, Request, Setup, longest, shortest
from nsa_verify.strategies.choice import below, chance, pick
from nsa_verify.strategies.lengths import draw_length
from nsa_verify.strategies.limits import Limits
from nsa_verify.strategies.swarm import Feature, Swarm

DISTINCT_REQUESTS = 8
"""A larger batch repeats its requests: tables drawn element by element do not shrink."""


class Pattern(IntEnum):
    """How the accept lengths of a batch relate."""

    RAGGED = 0
    UNIFORM = 1
    ALMOST_UNIFORM = 2


class _Accepts(NamedTuple):
    """The accept lengths that a request may have, and the one of the last request where it differs."""

    pattern: Pattern
    choices: tuple[int, ...]
    last: int


def requests(
    setup: Setup,
    mode: Mode,
    swarm: Swarm | None = None,
    limits: Limits | None = None,
    bucket: int | None = None,
) -> st.SearchStrategy[tuple[Request, ...]]:
    """The requests of a replay of ``mode``: usually one or more, none at all if ``swarm`` allows it.

    With ``bucket`` the batch is one that this bucket serves; otherwise any bucket of ``setup`` may. The simplest is one
    request of the shortest length. A setup whose pool row has no room for a real request gives empty batches.
    """
    return _requests(setup, mode, swarm or Swarm.everything(), limits or Limits.small(), bucket)


@st.composite
def _requests(
    draw: st.DrawFn, setup: Setup, mode: Mode, swarm: Swarm, limits: Limits, bucket: int | None
) -> tuple[Request, ...]:
    batch = draw_requests(draw, setup, mode, swarm, bucket)
    # Drawn last: an empty batch is then no shorter to draw than a batch of one, and does not count as simpler.
    empty = may_be_empty(setup, swarm, bucket) and chance(draw, empty_in_ten(setup, limits))
    return () if empty else batch


def draw_requests(draw: st.DrawFn, setup: Setup, mode: Mode, swarm: Swarm, bucket: int | None) -> tuple[Request, ...]:
    """Draw a batch that is not empty, unless no real request fits."""
    if not has_room(setup, mode):
        return ()
    least, most = _batch_sizes(draw, setup, swarm, bucket)
    accepts = _accepts(draw, setup, mode, swarm)
    # A count, and right behind it what it counts: Hypothesis can take the first ones out as well as the last.
    count = 1 + below(draw, min(most, DISTINCT_REQUESTS))
    drawn = [_request(draw, setup, mode, swarm, accepts) for _ in range(count)]
    size = max(least, len(drawn))
    if most > DISTINCT_REQUESTS and size < most:
        size += below(draw, most - size + 1)
    batch = list(islice(cycle(drawn), size))
    if Feature.POOL_ROWS not in swarm:
        batch = [Request(it.seq_len, index % setup.pool_rows, it.accept_len) for index, it in enumerate(batch)]
    if accepts.pattern is Pattern.ALMOST_UNIFORM:
        batch[-1] = Request(batch[-1].seq_len, batch[-1].pool_row, accepts.last)
    return tuple(batch)


def has_room(setup: Setup, mode: Mode) -> bool:
    """Whether the pool row holds a real request of ``mode`` at all; in a drawn setup it does."""
    return shortest(setup, mode, 1) <= longest(setup, mode)


def may_be_empty(setup: Setup, swarm: Swarm, bucket: int | None) -> bool:
    """Whether no request at all is allowed; the smallest bucket serves that."""
    allowed = Feature.PADDING in swarm and Feature.EMPTY_BATCHES in swarm
    return allowed and bucket in (None, setup.buckets[0])


def empty_in_ten(setup: Setup, limits: Limits) -> int:
    """How many batches of ten are empty; more where there are many rows, since only padded rows have length 0."""
    return 5 if setup.buckets[0] * setup.num_draft_tokens > limits.rows else 1


def _batch_sizes(draw: st.DrawFn, setup: Setup, swarm: Swarm, bucket: int | None) -> tuple[int, int]:
    """The fewest (but for none) and the most requests."""
    if Feature.PADDING not in swarm:
        exact = bucket if bucket is not None else pick(draw, setup.buckets)
        return exact, exact
    if bucket is None:
        return 1, setup.buckets[-1]
    smaller = max((size for size in setup.buckets if size < bucket), default=0)
    return smaller + 1, bucket


def _accepts(draw: st.DrawFn, setup: Setup, mode: Mode, swarm: Swarm) -> _Accepts:
    if mode is not Mode.DRAFT_EXTEND:
        return _Accepts(Pattern.RAGGED, (1,), 1)
    tokens = setup.num_draft_tokens
    zero = (0,) if Feature.ZERO_ACCEPTS in swarm else ()
    choices = (1, *zero, *range(2, tokens + 1), tokens)
    pattern = pick(draw, tuple(Pattern)) if Feature.UNIFORM_ACCEPTS in swarm else Pattern.RAGGED
    if pattern is Pattern.RAGGED:
        return _Accepts(pattern, choices, 1)
    common = pick(draw, choices)
    if pattern is Pattern.UNIFORM:
        return _Accepts(pattern, (common,), common)
    last = common - 1 if common - 1 in choices else min(common + 1, tokens)
    return _Accepts(pattern, (common,), last)


def _request(draw: st.DrawFn, setup: Setup, mode: Mode, swarm: Swarm, accepts: _Accepts) -> Request:
    accept_len = pick(draw, accepts.choices) if len(accepts.choices) > 1 else accepts.choices[0]
    seq_len = draw_length(draw, setup, mode, max(accept_len, accepts.last), swarm)
    return Request(seq_len, below(draw, setup.pool_rows) if Feature.POOL_ROWS in swarm else 0, accept_len)
