"""The real requests of one replay."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import chain, cycle, islice
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.internal.conjecture.data import ConjectureData

from nsa_verify.core.case import Mode, Request, Setup, longest, shortest
from nsa_verify.strategies.choice import between, composed
from nsa_verify.strategies.lengths import draw_length
from nsa_verify.strategies.limits import Limits
from nsa_verify.strategies.swarm import Feature, Swarm
from nsa_verify.strategies.turns import DISTINCT_REQUESTS, Before, Given, Stretch, allowed_sizes


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


class _Place(NamedTuple):
    """What of one request is settled: which one goes on, its pool row, which lengths are drawn."""

    kept: Request | None
    pool_row: int | None
    stretch: Stretch
    growing: bool


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


@composed
def _requests(
    data: ConjectureData, setup: Setup, mode: Mode, swarm: Swarm, limits: Limits, bucket: int | None
) -> tuple[Request, ...]:
    batch, _ = draw_requests(data, setup, mode, swarm, bucket)
    # Drawn last: an empty batch is then no shorter to draw than a batch of one, and does not count as simpler.
    return () if draw_empty(data, setup, swarm, limits, bucket) else batch


def draw_requests(
    data: ConjectureData, setup: Setup, mode: Mode, swarm: Swarm, bucket: int | None, given: Given | None = None
) -> tuple[tuple[Request, ...], Before]:
    """Draw a batch that is not empty, unless no real request fits; and what the next one may follow from."""
    if not has_room(setup, mode):
        return (), Before((), 0)
    given = given or Given()
    allowed, sizes = _sizes(data, setup, swarm, bucket, given)
    accepts = _accepts(data, setup, mode, swarm, given.growing)
    # A count, and right behind it what it counts: Hypothesis can take the first ones out as well as the last.
    highest = min(given.most, sizes[-1], DISTINCT_REQUESTS)
    count = 1 + between(data, min(given.fewest, highest) - 1, highest - 1)
    kept = given.staying(count)
    rows = (*(request.pool_row for request in kept), *given.rows)
    drawn = []
    for index in range(count):
        place = _Place(
            kept=kept[index] if index < len(kept) else None,
            pool_row=rows[index] if index < len(rows) else None,
            stretch=given.stretch,
            growing=given.growing,
        )
        drawn.append(_request(data, setup, mode, swarm, accepts, place))
    size, least = next(size for size in sizes if size >= count), max(allowed[0], count)
    # Only a batch of all the different requests there may be is larger than they are: what shows in two requests then
    # has two that were drawn, and shows in a small bucket too. Without a choice as well, so that nothing shifts.
    repeated = count == DISTINCT_REQUESTS and least < allowed[-1]
    more = between(data, size - least, sizes[-1] - least) if repeated else between(data, 0, 0)
    size = least + more if repeated else size
    batch = list(islice(cycle(drawn), size))
    if Feature.POOL_ROWS not in swarm:
        batch = _with_own_rows(setup, batch, rows)
    if accepts.pattern is Pattern.ALMOST_UNIFORM:
        batch[-1] = Request(batch[-1].seq_len, batch[-1].pool_row, accepts.last)
    return tuple(batch), Before(tuple(batch[:count]), size)


def has_room(setup: Setup, mode: Mode) -> bool:
    """Whether the pool row holds a real request of ``mode`` at all; in a drawn setup it does."""
    return shortest(setup, mode, 1) <= longest(setup, mode)


def draw_empty(data: ConjectureData, setup: Setup, swarm: Swarm, limits: Limits, bucket: int | None) -> bool:
    """Draw whether a batch is empty: one of ten, a third where the fill is 0, half of them where there are many rows.

    Only there all lengths are 0, or, of many rows, any. No draw where it cannot be: the smallest bucket serves it.
    """
    if not {Feature.PADDING, Feature.EMPTY_BATCHES} <= swarm.features or bucket not in (None, setup.buckets[0]):
        return False
    many = setup.buckets[0] * setup.num_draft_tokens > limits.rows
    return between(data, 8 if many else 7 if setup.fill_seq_len == 0 else 0, 9) == 9


def _sizes(
    data: ConjectureData, setup: Setup, swarm: Swarm, bucket: int | None, given: Given
) -> tuple[Sequence[int], Sequence[int]]:
    """The batch sizes that there may be, and those to choose from."""
    allowed = allowed_sizes(setup, swarm, bucket)
    sizes = given.sizes or allowed
    if Feature.PADDING in swarm:
        return allowed, sizes
    if bucket is None:
        first = allowed.index(sizes[0])
        bucket = allowed[between(data, first, first + len(sizes) - 1)]
    return (bucket,), (bucket,)


def _with_own_rows(setup: Setup, batch: Sequence[Request], rows: Sequence[int]) -> list[Request]:
    """``batch`` on ``rows``, then on the lowest that are free, as long as there are any."""
    settled = rows[: len(batch)]
    free = [row for row in range(setup.pool_rows) if row not in settled] or [0]
    every = chain(settled, cycle(free))
    return [Request(it.seq_len, row, it.accept_len) for it, row in zip(batch, every, strict=False)]


def _accepts(data: ConjectureData, setup: Setup, mode: Mode, swarm: Swarm, free: bool) -> _Accepts:
    ragged = mode is Mode.DRAFT_EXTEND
    tokens = setup.num_draft_tokens if ragged else 1
    zero = (0,) if ragged and Feature.ZERO_ACCEPTS in swarm else ()
    choices = (1, *zero, *range(2, tokens + 1), tokens)
    # As many choices in every mode: a mode shrinks to another where nothing shifts.
    pattern = Pattern.RAGGED
    if Feature.UNIFORM_ACCEPTS in swarm:
        # Requests that accept what they did before have no other pattern.
        pattern = Pattern(between(data, 0, len(Pattern) - 1 if ragged and free else 0))
    common = choices[between(data, 0, len(choices) - 1 if pattern is not Pattern.RAGGED else 0)]
    if pattern is Pattern.RAGGED:
        return _Accepts(pattern, choices, 1)
    if pattern is Pattern.UNIFORM:
        return _Accepts(pattern, (common,), common)
    last = common - 1 if common - 1 in choices else min(common + 1, tokens)
    return _Accepts(pattern, (common,), last)


def _request(data: ConjectureData, setup: Setup, mode: Mode, swarm: Swarm, accepts: _Accepts, place: _Place) -> Request:
    choices, kept = accepts.choices, place.kept
    settled = kept is not None and not place.growing and kept.accept_len in choices
    lowest = choices.index(kept.accept_len) if kept is not None and settled else 0
    accept_len = choices[between(data, lowest, lowest if settled else len(choices) - 1)]
    wanted = None
    if kept is not None:
        wanted = kept.seq_len + (_added(setup, mode, accept_len) if place.growing else 0)
    seq_len = draw_length(data, setup, mode, max(accept_len, accepts.last), swarm, place.stretch, wanted)
    if Feature.POOL_ROWS not in swarm:
        return Request(seq_len, 0, accept_len)
    lowest, highest = (0, setup.pool_rows - 1) if place.pool_row is None else (place.pool_row, place.pool_row)
    return Request(seq_len, between(data, lowest, highest), accept_len)


def _added(setup: Setup, mode: Mode, accept_len: int) -> int:
    """By how much a request is longer when it comes to ``mode``."""
    if mode is Mode.DRAFT_EXTEND:
        return accept_len
    return setup.num_draft_tokens if mode is Mode.DRAFT_EXTEND_V2 else 1
