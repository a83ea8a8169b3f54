"""Lengths of requests, drawn where implementations break: at the boundaries of the contract."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from hypothesis import strategies as st
from hypothesis.internal.conjecture.data import ConjectureData

from nsa_verify.core.case import INT32_MAX, Mode, Setup, longest, shortest
from nsa_verify.strategies.choice import composed, near
from nsa_verify.strategies.swarm import Feature, Swarm
from nsa_verify.strategies.turns import Stretch

MOST_MULTIPLES = 256
TILES = (128, 256)
"""Columns and tokens that kernels and the paged-MQA schedule work in."""
NARROW = (1 << 15, 1 << 16)
"""The first lengths that do not fit 15, or 16, bits."""


def boundaries(setup: Setup, mode: Mode) -> tuple[int, ...]:
    """The ``seq_len`` values, ascending, at which the metadata of ``mode`` changes its shape.

    1, fill, N-1..N+1; the lengths that put an expanded row at K-1..K+1; those whose KV length is a multiple of p or of
    a tile of 128 or 256 (in very wide tables: of many of them), give or take one; W-N..W+N; the end of the pool row;
    2**15 and 2**16, and one less.
    Only those that a real request may have.
    """
    return tuple(sorted({value for group in _boundaries(setup, mode) for value in group}))


@lru_cache(maxsize=1024)
def _boundaries(setup: Setup, mode: Mode) -> tuple[tuple[int, ...], ...]:
    """The boundaries in groups: the smallest lengths, those of the top-k, of the wall, of the pages, of the tiles, of
    narrow integers."""
    tokens, end = setup.num_draft_tokens, longest(setup, mode)
    verify = mode is Mode.TARGET_VERIFY
    smallest = {1, setup.fill_seq_len, tokens - 1, tokens, tokens + 1}
    wall = {*range(setup.table_width - tokens, setup.table_width + tokens + 1), end - 1, end}
    before = tokens if verify else 0
    after = tokens if mode in (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2) else 1
    top_k = range(setup.index_topk - 1 - before, setup.index_topk + 1 + after)
    pages, tiles = (
        {multiple + past - added for multiple in multiples for past in (-1, 0, 1) for added in {0, before}}
        for multiples in (
            _multiples(setup.page_size, end + before + 1),
            [multiple for tile in TILES for multiple in _multiples(tile, end + before + 1)],
        )
    )
    if setup.page_size == 1:
        pages = set()
    narrow = {width + past - added for width in NARROW for past in (-1, 0) for added in {0, before}}
    # Three times: where they are legal at all they are few of very many lengths, and nothing else brings them.
    return tuple(_legal(group, end) for group in (smallest, top_k, wall, pages, tiles, narrow, narrow, narrow))


def _multiples(unit: int, most: int) -> Iterable[int]:
    """The multiples of ``unit`` up to ``most``; where they are very many, the outer ones and some between."""
    every = range(unit, most + 1, unit)
    if len(every) <= MOST_MULTIPLES:
        return every
    outer = MOST_MULTIPLES // 4
    between = every[outer:-outer]
    return (*every[:outer], *between[:: len(between) // (2 * outer)], *every[-outer:])


def _legal(values: Iterable[int], end: int) -> tuple[int, ...]:
    return tuple(sorted(value for value in values if 1 <= value <= end))


def length_range(setup: Setup, mode: Mode, accept_len: int, swarm: Swarm) -> tuple[int, int]:
    """The shortest and the longest ``seq_len`` to draw; with ``CONTEXT_WALL`` off its KV length fits the table."""
    low, high = shortest(setup, mode, accept_len), longest(setup, mode)
    if Feature.CONTEXT_WALL not in swarm:
        added = setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0
        high = min(high, setup.table_width - added)
    return low, max(low, min(high, _longest_summable(setup)))


def _longest_summable(setup: Setup) -> int:
    """The length up to which the prefix sums of the largest bucket fit int32."""
    bucket, tokens = setup.buckets[-1], setup.num_draft_tokens
    addends = bucket if bucket * tokens * setup.index_topk <= INT32_MAX else bucket * tokens
    return INT32_MAX // addends - tokens


def draw_length(
    data: ConjectureData,
    setup: Setup,
    mode: Mode,
    accept_len: int,
    swarm: Swarm,
    stretch: Stretch = Stretch.ANY,
    wanted: int | None = None,
) -> int:
    """Draw a ``seq_len``: ``wanted`` or what is legal next to it; else the extreme of ``stretch``.

    A function, since a strategy made anew for every draw costs more than the draw.
    """
    low, high = length_range(setup, mode, accept_len, swarm)
    if wanted is not None:
        return near(data, low, high, (min(max(wanted, low), high),), plain_in_ten=0)
    if stretch is not Stretch.ANY:
        return near(data, low, high, (low if stretch is Stretch.SHORTEST else high,), plain_in_ten=0)
    favourites = _favourites(setup, mode, low, high) if Feature.BOUNDARY_LENGTHS in swarm else ()
    return near(data, low, high, favourites, plain_in_ten=4)


@lru_cache(maxsize=1024)
def _favourites(setup: Setup, mode: Mode, low: int, high: int) -> tuple[int, ...]:
    groups = [[value for value in group if low <= value <= high] for group in _boundaries(setup, mode)]
    most = max(map(len, groups))
    # The groups weigh the same, so that K and W are not lost among the pages of a wide table.
    return tuple(value for group in groups if group for value in group * (most // len(group)))


def lengths(setup: Setup, mode: Mode, accept_len: int = 1, swarm: Swarm | None = None) -> st.SearchStrategy[int]:
    """``seq_len`` of a real request that accepted ``accept_len`` tokens, at least half of the time at a boundary.

    It shrinks to the exact threshold of a predicate. ``accept_len`` matters in DRAFT_EXTEND only.
    """
    return _lengths(setup, mode, accept_len, swarm or Swarm.everything())


@composed
def _lengths(data: ConjectureData, setup: Setup, mode: Mode, accept_len: int, swarm: Swarm) -> int:
    return draw_length(data, setup, mode, accept_len, swarm)
