"""Workloads by what is large in them. Tests of the harness ask for small ones of the same making."""

from __future__ import annotations

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


def long_rows(mode: Mode, batch_size: int, num_steps: int, width: int) -> Workload:
    """Few long requests among short ones, at any place of the batch, up to the width of the tables."""
    setup = Setup(
        num_draft_tokens=4,
        index_topk=2048,
        page_size=64,
        table_width=width,
        pool_rows=min(batch_size, 97),
        pool_width=width + 8,
        num_steps=num_steps,
        buckets=(batch_size,),
        num_sms=132,
        host_lengths=False,
        schedule=True,
    )
    work = workload(setup, mode, min(width, 600), rows=2 * batch_size)
    chance = torch.Generator().manual_seed(batch_size)
    real = batch_size - PADDED
    places = torch.randperm(real, generator=chance)[: max(real // 40, 2)]
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
