"""Lengths of requests, drawn where implementations break: at the boundaries of the contract."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from hypothesis import strategies as st

from nsa_verify.core.case import Mode, Setup, longest, shortest
from nsa_verify.strategies.choice import near
from nsa_verify.strategies.swarm import Feature, Swarm

MOST_MULTIPLES = 256
TILES = (128, 256)
"""Columns and tokens that kernels and the paged-MQA schedule work in."""


def boundaries(setup: Setup, mode: Mode) -> tuple[int, ...]:
    """The ``seq_len`` values, ascending, at which the metadata of ``mode`` changes its shape.

    1, fill, N-1..N+1; the lengths that put an expanded row at K-1..K+1; those whose KV length is a multiple of p or of
    a tile of 128 or 256 (in very wide tables: of many of them), give or take one; W-N..W+N; the end of the pool row.
    Only those that a real request may have.
    """
    special, multiples = _boundaries(setup, mode)
    return tuple(sorted({*special, *multiples}))


@lru_cache(maxsize=1024)
def _boundaries(setup: Setup, mode: Mode) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The boundaries there are few of, and the multiples there are many of."""
    tokens, end = setup.num_draft_tokens, longest(setup, mode)
    verify = mode is Mode.TARGET_VERIFY
    special = {1, setup.fill_seq_len, end - 1, end}
    special.update(range(tokens - 1, tokens + 2))
    special.update(range(setup.table_width - tokens, setup.table_width + tokens + 1))
    before = tokens if verify else 0
    after = tokens if mode in (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2) else 1
    special.update(range(setup.index_topk - 1 - before, setup.index_topk + 1 + after))
    multiples: set[int] = set()
    for unit in {setup.page_size, *TILES} - {1}:
        for multiple in _multiples(unit, end + before + 1):
            multiples.update((multiple - 1, multiple, multiple + 1))
            if verify:
                multiples.update((multiple - tokens - 1, multiple - tokens, multiple - tokens + 1))
    return _legal(special, end), _legal(multiples, end)


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
        high = max(low, min(high, setup.table_width - added))
    return low, high


def draw_length(draw: st.DrawFn, setup: Setup, mode: Mode, accept_len: int, swarm: Swarm) -> int:
    """Draw a ``seq_len``; a function, since a strategy made anew for every draw costs more than the draw."""
    low, high = length_range(setup, mode, accept_len, swarm)
    favourites = _favourites(setup, mode, low, high) if Feature.BOUNDARY_LENGTHS in swarm else ()
    return near(draw, low, high, favourites, plain_in_ten=4)


@lru_cache(maxsize=1024)
def _favourites(setup: Setup, mode: Mode, low: int, high: int) -> tuple[int, ...]:
    special, multiples = _boundaries(setup, mode)
    # As many special ones as multiples, so that K and W are not lost among the pages of a wide table.
    repeats = max(1, len(multiples) // max(1, len(special)))
    return tuple(value for value in special * repeats + multiples if low <= value <= high)


def lengths(setup: Setup, mode: Mode, accept_len: int = 1, swarm: Swarm | None = None) -> st.SearchStrategy[int]:
    """``seq_len`` of a real request that accepted ``accept_len`` tokens, at least half of the time at a boundary.

    It shrinks to the exact threshold of a predicate. ``accept_len`` matters in DRAFT_EXTEND only.
    """
    return _lengths(setup, mode, accept_len, swarm or Swarm.everything())


@st.composite
def _lengths(draw: st.DrawFn, setup: Setup, mode: Mode, accept_len: int, swarm: Swarm) -> int:
    return draw_length(draw, setup, mode, accept_len, swarm)
