"""What is frozen at capture."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

from hypothesis import strategies as st
from hypothesis.internal.conjecture.data import ConjectureData

from nsa_verify.core.case import MAX_DRAFT_TOKENS, PAGE_SIZES, CtxLens, IntType, Layout, Setup
from nsa_verify.strategies.choice import below, between, chance, composed, near, pick
from nsa_verify.strategies.limits import Limits
from nsa_verify.strategies.swarm import Feature, Swarm

LARGE_TOP_K = 2048
_BUCKET_COUNTS = (1, 1, 1, 2, 2, 3)
_TOP_K = (8, 8, 8, 1, 2, 3, 4, 5, 7, 12, 16, 33, 64, 100, 128)
_EXTRA_COLUMNS = (0, 1, 3, 5, 7, 32)
_DRAFT_TOKENS = (1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, *range(5, MAX_DRAFT_TOKENS + 1))
_MANY_ROWS = (32, 128, 129, 129, 129, 31, 31, 32, 32, 32, 33)
"""Expanded rows that fill warps or blocks: exactly, less one, or by one more."""
_BLOCKS = (257, 513, 1025)
"""More rows than further blocks, where the limits allow as many."""
_LONG_WIDTHS = (1 << 15, 1 << 15, 1 << 16, 1 << 16)
"""Past these a length does not fit 15, or 16, bits."""
_NARROW = (0, 65, 16, 33, 24, 129, 17)
"""Columns of the page table of a long context, at most."""
_LONG_IN = 11
"""Of so many setups one has a long context."""
_ONE_TOKEN = 5
"""From here on with one draft token, so that no number of draft tokens rounds them up."""


class _Inputs(NamedTuple):
    layout: Layout = Layout.CONTIGUOUS
    tail: int = 0
    seq_lens_dtype: IntType = "int32"
    pool_index_dtype: IntType = "int64"
    aliased: bool = False
    host_lengths: bool = True


def setups(swarm: Swarm | None = None, limits: Limits | None = None) -> st.SearchStrategy[Setup]:
    """Setups as ``swarm`` and ``limits`` allow (default: everything, small).

    The simplest has one draft token, pages of one token, one bucket of one request, one step, and a table as wide as
    the pool row. Every drawn setup has room for a real request in every mode.
    """
    return _setups(swarm or Swarm.everything(), limits or Limits.small())


# Hypothesis prefers fewer choices to smaller ones. Hence a field is drawn whatever the others are, or the simpler of
# two ways draws less: otherwise a case would shrink to the odd layout that happens to need no further choice.
@composed
def _setups(data: ConjectureData, swarm: Swarm, limits: Limits) -> Setup:
    tokens = pick(data, _DRAFT_TOKENS)
    page_size = pick(data, PAGE_SIZES)
    top_k = pick(data, _TOP_K + (LARGE_TOP_K,) * 4 if Feature.LARGE_TOP_K in swarm else _TOP_K)
    buckets, tokens, many = _buckets(data, tokens, swarm, limits)
    fill = 1
    if Feature.FILL_ZERO in swarm:
        fill = pick(data, (1, 0, 0, 0) if many else (1, 0))
    least_rows = 1 if Feature.POOL_ROWS in swarm else buckets[-1]
    long_width = _long_width(data, tokens, least_rows, swarm, limits)
    pool_width = _pool_width(data, tokens, page_size, top_k, buckets[-1] * tokens, long_width, limits)
    table_width = _table_width(data, tokens, pool_width, long_width, swarm)
    pool_rows = max(least_rows, min(pick(data, _sizes(limits.pool_rows)), limits.pool_cells // pool_width))
    inputs = _inputs(data, swarm)
    pool_extra, table_extra, skew = _strides(data, swarm)
    if pool_extra == _FAR:
        pool_extra = max(0, min(_FAR_CELLS, limits.pool_cells) // pool_rows - pool_width)
    ctx_lens, schedule, num_sms = _optional_outputs(data, swarm)
    return Setup(
        num_draft_tokens=tokens,
        index_topk=top_k,
        page_size=page_size,
        table_width=table_width,
        table_row_stride=table_width + table_extra,
        stride_skew=skew,
        pool_rows=pool_rows,
        pool_width=pool_width,
        pool_row_stride=pool_width + pool_extra,
        num_steps=pick(data, _step_counts(2, 2) if many else _step_counts(limits.steps, limits.most_steps))
        if Feature.SEVERAL_STEPS in swarm
        else 1,
        buckets=buckets,
        fill_seq_len=fill,
        num_sms=num_sms,
        seq_lens_dtype=inputs.seq_lens_dtype,
        pool_index_dtype=inputs.pool_index_dtype,
        layout=inputs.layout,
        aliased_seq_lens=inputs.aliased,
        input_tail=inputs.tail,
        host_lengths=inputs.host_lengths,
        ctx_lens=ctx_lens,
        schedule=schedule,
    )


def _buckets(data: ConjectureData, tokens: int, swarm: Swarm, limits: Limits) -> tuple[tuple[int, ...], int, bool]:
    """The captured batch sizes; the draft tokens, fewer at times; whether there are, rarely, many rows."""
    counts = _MANY_ROWS + tuple(rows for rows in _BLOCKS if rows <= limits.many_rows)
    index = below(data, 11 * len(counts)) - 10 * len(counts) if Feature.MANY_ROWS in swarm else -1
    sizes, most = _sizes(limits.batch_size), max(1, limits.rows // tokens)
    if index >= 0:
        # Drawn as one bucket, the largest: what shows in fewer rows then shows in that one, and goes on from there.
        if Feature.BUCKET_SWITCHES in swarm:
            between(data, 0, 0)
        between(data, len(sizes) - 1, len(sizes) - 1)
        tokens = tokens if index < _ONE_TOKEN else 1
        return (-(-min(counts[index], limits.many_rows // tokens * tokens) // tokens),), tokens, True
    count = pick(data, _BUCKET_COUNTS) if Feature.BUCKET_SWITCHES in swarm else 1
    return tuple(sorted({min(pick(data, sizes), most) for _ in range(count)})), tokens, False


@lru_cache(maxsize=64)
def _sizes(most: int) -> tuple[int, ...]:
    """1..most, the small ones more often."""
    return tuple(size for size in range(1, most + 1) for _ in range(4 if size <= 4 else 1))


@lru_cache(maxsize=16)
def _step_counts(usual: int, most: int) -> tuple[int, ...]:
    """1..usual, mostly 1 and 2: every implementation does its work once a step. Rarely more, up to ``most``."""
    weights = {1: 36, 2: 20, 3: 8, **dict.fromkeys(range(4, usual + 1), 4)}
    return tuple(count for count in range(1, most + 1) for _ in range(weights.get(count, 1)))


def _long_width(data: ConjectureData, tokens: int, pool_rows: int, swarm: Swarm, limits: Limits) -> int:
    """The widest row of ``req_to_token`` where the context is, rarely, long; else 0."""
    if not {Feature.LONG_CONTEXT, Feature.CONTEXT_WALL} <= swarm.features:
        return 0
    widest = min(limits.long_width, limits.pool_cells // pool_rows)
    return widest if below(data, _LONG_IN) == _LONG_IN - 1 and widest > tokens else 0


def _pool_width(
    data: ConjectureData, tokens: int, page_size: int, top_k: int, rows: int, long_width: int, limits: Limits
) -> int:
    low, high = tokens + 1, limits.width
    if long_width:
        widths = [width + past for width in _LONG_WIDTHS for past in (tokens + 2, 200)]
        return near(data, low, long_width, [min(width, long_width) for width in widths], plain_in_ten=2)
    if rows > limits.rows:
        high = limits.many_rows_width
    elif top_k == LARGE_TOP_K and 2 * rows <= limits.rows:
        high = limits.top_k_width
    return near(data, low, high, _widths(tokens, page_size, top_k, high), plain_in_ten=2)


@lru_cache(maxsize=1024)
def _widths(tokens: int, page_size: int, top_k: int, most: int) -> tuple[int, ...]:
    """Widths of ``req_to_token``: mostly small, near pages and tiles at times, wide enough for K when K is large."""
    found = [tokens + 2, 12, 16, 17, 20, 24, 31, 33, 40, 48] * 3
    found += [unit + past for unit in (page_size, 2 * page_size, 128, 256, 256) for past in (0, 1, tokens + 2)]
    found += [top_k + tokens + 2] * 3
    if top_k == LARGE_TOP_K:
        found += [LARGE_TOP_K + past for past in (0, 1, tokens, tokens + 2)] * 16
    return tuple(width for width in found if tokens < width <= most)


def _table_width(data: ConjectureData, tokens: int, pool_width: int, long_width: int, swarm: Swarm) -> int:
    """Engines have a few columns fewer than the pool row is wide; the simplest has as many.

    Of a long context the table shows only the beginning, since every one of its cells is written and compared.
    """
    fewer = (0, 1, 2, tokens, tokens + 1, tokens + 4, pool_width // 2, 0, 0)
    # One choice for both, and of a long context always some fewer: a case with few tokens past the table is then the
    # same once the context is no longer long.
    index = between(data, 1, len(_NARROW) - 1) if long_width else below(data, len(fewer))
    least = 1 if Feature.CONTEXT_WALL in swarm else tokens + 1
    return max(least, min(pool_width - fewer[index], _NARROW[index] if long_width else pool_width))


_DTYPES: tuple[tuple[IntType, IntType], ...] = (
    ("int32", "int64"),
    ("int32", "int32"),
    ("int64", "int64"),
    ("int64", "int32"),
)
"""Of ``seq_lens`` and of ``req_pool_indices``."""
_INPUT_FEATURES = frozenset(
    {
        Feature.SEQ_LENS_LAYOUT,
        Feature.INPUT_TAIL,
        Feature.INTEGER_WIDTHS,
        Feature.ALIASED_SEQ_LENS,
        Feature.NO_HOST_LENGTHS,
    }
)


def _inputs(data: ConjectureData, swarm: Swarm) -> _Inputs:
    plain = _Inputs()
    if swarm.features.isdisjoint(_INPUT_FEATURES) or not chance(data, 6):
        return plain
    layout, tail, seq_lens_dtype, pool_index_dtype, aliased, host_lengths = plain
    if Feature.SEQ_LENS_LAYOUT in swarm:
        layout = pick(data, (Layout.CONTIGUOUS, Layout.CONTIGUOUS, Layout.STRIDED, Layout.OFFSET))
    if Feature.INPUT_TAIL in swarm:
        tail = pick(data, (0, 0, 1, 3))
    if Feature.INTEGER_WIDTHS in swarm:
        seq_lens_dtype, pool_index_dtype = pick(data, _DTYPES)
    if Feature.ALIASED_SEQ_LENS in swarm:
        wanted = pick(data, (False, True, True))
        aliased = wanted and layout is Layout.CONTIGUOUS and tail == 0 and seq_lens_dtype == "int32"
    if Feature.NO_HOST_LENGTHS in swarm:
        host_lengths = pick(data, (True, False))
    return _Inputs(layout, tail, seq_lens_dtype, pool_index_dtype, aliased, host_lengths)


_FAR: Final = -1
_FAR_CELLS: Final = 140_000
"""Rows of ``req_to_token`` as far apart as so many cells allow: the last of them begin past 2**16 cells."""


def _strides(data: ConjectureData, swarm: Swarm) -> tuple[int, int, int]:
    """Elements beyond the width in a pool row and in a table row, and how the latter grows from step to step."""
    if Feature.ROW_STRIDES not in swarm or not chance(data, 5):
        return 0, 0, 0
    return pick(data, (*_EXTRA_COLUMNS, _FAR)), pick(data, _EXTRA_COLUMNS), pick(data, (0, 1, 2, 5))


def _optional_outputs(data: ConjectureData, swarm: Swarm) -> tuple[CtxLens, bool, int]:
    if Feature.OPTIONAL_OUTPUTS not in swarm or not chance(data, 5):
        return CtxLens.ABSENT, False, 4
    ctx_lens = pick(data, tuple(CtxLens))
    if not pick(data, (False, True)):
        return ctx_lens, False, 4
    return ctx_lens, True, pick(data, (4, 1, 2, 3, 7, 33))
