"""Workloads by what is large in them. Tests of the harness ask for small ones of the same making."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from scale.harness import Workload
from torch import Tensor

from nsa_verify import CtxLens, Mode, Setup

PADDED: Final = 3
"""Rows at the end of each batch that no request fills."""


def batch_of(mode: Mode, rows: int, tokens: int) -> int:
    """A batch that expands to ``rows``: exactly in DECODE, rounded down where uniform, three in four where ragged."""
    if mode is Mode.DECODE:
        return rows
    return 4 * rows // (3 * tokens) + 1 if mode is Mode.DRAFT_EXTEND else rows // tokens


def workload(setup: Setup, mode: Mode, longest: int, rows: int = 0, real_row_stride: int = 0) -> Workload:
    """A batch of the bucket's size: ragged lengths, the last of them ``longest``, and padding.

    Ragged batches expand to ``rows``, and some of their requests accept nothing. The last requests use the last rows of
    ``req_to_token``.
    """
    (batch_size,) = setup.buckets
    chance = torch.Generator().manual_seed(batch_size + longest)
    tokens, real = setup.num_draft_tokens, batch_size - PADDED
    accepted = torch.full((batch_size,), tokens)
    if mode is Mode.DRAFT_EXTEND:
        accepted[:real] = _accepted(real, tokens, rows - PADDED * tokens, chance)
    kv_lens = torch.randint(1, longest + 1, (real,), generator=chance)
    kv_lens[-1] = longest
    seq_lens = torch.full((batch_size,), setup.fill_seq_len)
    if mode is Mode.TARGET_VERIFY:
        seq_lens[:real] = (kv_lens - tokens).clamp(min=1)
    else:
        # In DECODE and of requests that accept nothing, 1 is legal.
        seq_lens[:real] = kv_lens if mode is Mode.DECODE else kv_lens.maximum(accepted[:real])
    pool_rows = torch.zeros(batch_size, dtype=torch.int64)
    pool_rows[:real] = torch.arange(setup.pool_rows - real, setup.pool_rows) % setup.pool_rows
    real_row_stride = real_row_stride or setup.real_table_width
    return Workload(setup, mode, seq_lens, pool_rows, accepted, real_row_stride)


def _accepted(requests: int, tokens: int, rows: int, chance: torch.Generator) -> Tensor:
    """Accept lengths from 0 to ``tokens`` that sum to ``rows``."""
    accepted = torch.randint(0, tokens + 1, (requests,), generator=chance)
    missing = rows - int(accepted.sum())
    order = torch.randperm(requests, generator=chance)
    room = (tokens - accepted if missing > 0 else accepted)[order]
    change = (abs(missing) - room.cumsum(0) + room).clamp(min=0).minimum(room)
    accepted[order] += change if missing > 0 else -change
    assert int(accepted.sum()) == rows, f"{requests} requests cannot accept {rows} tokens"
    return accepted


def tall_tables(mode: Mode, rows: int, row_stride: int, longest: int) -> Workload:
    """Both tables with so long a way from row to row that the last rows lie past 2**31 elements."""
    setup = Setup(
        num_draft_tokens=4,
        index_topk=2048,
        page_size=64,
        table_width=longest,
        table_row_stride=row_stride,
        pool_rows=97,
        pool_width=longest + 9,
        buckets=(batch_of(mode, rows, 4),),
        host_lengths=False,
    )
    return workload(setup, mode, longest, rows, real_row_stride=row_stride + 1)


def many_rows(mode: Mode, rows: int) -> Workload:
    """More expanded rows than a grid's second axis has programs, few columns, two steps of different strides."""
    setup = Setup(
        num_draft_tokens=4,
        index_topk=32,
        page_size=16,
        table_width=72,
        stride_skew=5,
        pool_rows=61,
        pool_width=83,
        pool_row_stride=85,
        num_steps=2,
        buckets=(batch_of(mode, rows, 4),),
        fill_seq_len=0,
        num_sms=132,
        seq_lens_dtype="int64",
        host_lengths=False,
        ctx_lens=CtxLens.VIEW,
        schedule=True,
    )
    return workload(setup, mode, 79, rows)


def large_batch(mode: Mode, batch_size: int, longest: int) -> Workload:
    """The largest batch that engines capture, N = 8, ragged with requests that accept nothing."""
    setup = Setup(
        num_draft_tokens=8,
        index_topk=2048,
        page_size=64,
        table_width=longest + 96,
        table_row_stride=longest + 98,
        stride_skew=3,
        pool_rows=batch_size,
        pool_width=longest + 108,
        num_steps=2,
        buckets=(batch_size,),
        num_sms=132,
        host_lengths=False,
        ctx_lens=CtxLens.OWN,
        schedule=True,
    )
    return workload(setup, mode, longest, rows=7 * batch_size)


def long_rows(
    mode: Mode,
    batch_size: int,
    num_steps: int,
    width: int,
    tokens: int = 4,
    page_size: int = 64,
    stride_skew: int = 0,
) -> Workload:
    """Few long requests among short ones, at any place of the batch, up to the width of the tables.

    Ragged batches accept half of all ``tokens``, and something of every long request.
    """
    setup = Setup(
        num_draft_tokens=tokens,
        index_topk=2048,
        page_size=page_size,
        table_width=width,
        stride_skew=stride_skew,
        pool_rows=min(batch_size, 97),
        pool_width=width + 8,
        num_steps=num_steps,
        buckets=(batch_size,),
        num_sms=132,
        host_lengths=False,
        schedule=True,
    )
    work = workload(setup, mode, min(width, 600), rows=tokens * batch_size // 2)
    chance = torch.Generator().manual_seed(batch_size)
    accepting = work.accept_lens[: batch_size - PADDED].nonzero()[:, 0]
    places = accepting[torch.randperm(len(accepting), generator=chance)[: max(len(accepting) // 40, 2)]]
    work.seq_lens[places] = torch.randint(width // 4, width + 1, (len(places),), generator=chance)
    return work


def wide_tables(mode: Mode, rows: int, width: int) -> Workload:
    """Contexts as wide as the table and past it, up to what ``req_to_token`` holds: lengths count on, columns end."""
    setup = Setup(
        num_draft_tokens=4,
        index_topk=2048,
        page_size=64,
        table_width=width,
        pool_rows=11,
        pool_width=width + 8,
        pool_row_stride=width + 11,
        buckets=(batch_of(mode, rows, 4),),
        num_sms=132,
        seq_lens_dtype="int64",
        host_lengths=False,
        schedule=True,
    )
    work = workload(setup, mode, min(width, 3000), rows)
    added = setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0
    last = work.batch_size - PADDED
    walls = torch.tensor([width - 1, width, width + 1, width + 4, width + 8])
    for at in (0, last // 2, last - len(walls)):
        work.seq_lens[at : at + len(walls)] = walls - added
    return work


def long_pool(mode: Mode, pool_rows: int, pool_width: int, batch_size: int, table_width: int) -> Workload:
    """A ``req_to_token`` whose last rows lie past 2**31 elements, and int32 indices of these rows."""
    setup = Setup(
        num_draft_tokens=4,
        index_topk=2048,
        page_size=64,
        table_width=table_width,
        pool_rows=pool_rows,
        pool_width=pool_width,
        pool_row_stride=pool_width + 3,
        buckets=(batch_size,),
        pool_index_dtype="int32",
        host_lengths=False,
    )
    return workload(setup, mode, min(pool_width, table_width + 100), rows=3 * batch_size)


RAGGED, UNIFORM = Mode.DRAFT_EXTEND, (Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2)

WORKLOADS: Final[dict[str, Callable[[], Workload]]] = {
    **{f"tall-tables-{mode}": partial(tall_tables, mode, 2300, 1_000_000, 4200) for mode in Mode},
    **{f"{rows}-rows-{Mode.DECODE}": partial(many_rows, Mode.DECODE, rows) for rows in (65_535, 65_536)},
    **{f"65536-rows-{mode}": partial(many_rows, mode, 65_536) for mode in UNIFORM},
    **{f"{rows}-rows-{RAGGED}": partial(many_rows, RAGGED, rows) for rows in (65_535, 65_536, 65_537)},
    **{f"large-batch-{mode}": partial(large_batch, mode, 512, 4000) for mode in (RAGGED, *UNIFORM)},
    **{
        f"long-rows-{batch_size}-S{steps}-{mode}": partial(long_rows, mode, batch_size, steps, 131_080)
        for batch_size, steps in ((9, 1), (131, 1), (600, 1), (300, 3), (33, 8), (259, 8))
        for mode in Mode
    },
    **{
        f"long-rows-{batch_size}-S{steps}-N{tokens}-p{page_size}-{mode}": partial(
            long_rows, mode, batch_size, steps, width, tokens, page_size, stride_skew
        )
        for batch_size, steps, width, tokens, page_size, stride_skew, modes in (
            (131, 1, 131_080, 3, 1, 0, (RAGGED, Mode.DRAFT_EXTEND_V2)),
            (40, 2, 131_080, 2, 1, 0, (Mode.DECODE,)),
            (33, 8, 131_080, 2, 1, 5, (RAGGED, Mode.TARGET_VERIFY)),
            (65_536, 1, 5000, 1, 16, 0, (RAGGED, Mode.DECODE)),
            (65_536, 5, 1500, 1, 128, 3, (RAGGED, Mode.DECODE)),
        )
        for mode in modes
    },
    **{f"wide-tables-{mode}": partial(wide_tables, mode, 2080, 1 << 20) for mode in Mode},
    **{f"long-pool-{mode}": partial(long_pool, mode, 2200, 1_000_000, 64, 4096) for mode in Mode},
}
"""A batch of 65,537 is more than ``Setup`` allows, and 65,537 is a prime: that many rows are ragged ones."""
