"""``triton-inplace``: stage 2. Triton kernels write straight into the frozen buffers, nothing is allocated or copied.

Per step one launch for every length and prefix sum, one for the page tables, bounded by live lengths, and one for the
schedule where it is kept. Grids depend on what is frozen at capture alone (bucket, N, W), ragged rows are masked by a
total that stays on the device, so every mode can be captured.

All four modes are one formula: with the KV length ``k[b]`` (the draft tokens included) and ``a[b]`` rows (1 in DECODE,
N in the uniform modes), row ``off[b] + j`` is ``max(0, k[b] - a[b] + j + 1)``.

Arithmetic is 64 bit throughout: no product can overflow, and Triton's interpreter, which checks every 32-bit operation
for overflow, runs several times faster. Nothing that varies with the batch is a ``constexpr``, and neither integers nor
addresses are specialised on, so the number of compilations stays small and does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_verify.core.case import CtxLens, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs, implementation

_BLOCK = 128
"""Columns that a row of ``page_table_1`` is rounded up to, and requests or rows that one scan takes."""
_TILE_ROWS = 16
_TILE_COLUMNS = 256
_CHUNK = 1024
"""Columns of ``page_table_1`` per program, in tiles of the above."""
_ENTRIES = 64

# tl.sum and its like are functions of Triton code, and the interpreter patches the whole language at every such call
# (0.8 ms); their combine functions given to tl.reduce are not called at all there.
_SUM = tl.standard._sum_combine
_MAX = tl.standard._elementwise_max


@triton.jit(
    do_not_specialize=["seq_stride", "accept_stride", "ctx_stride", "batch_size", "added", "tokens", "index_topk"],
    do_not_specialize_on_alignment=[
        "seq_lens",
        "accept_lens",
        "cache_seqlens",
        "cu_seqlens_k",
        "expanded",
        "nsa_cache_seqlens",
        "nsa_cu_seqlens_k",
        "ctx_lens",
    ],
)
def _fill_lengths(
    seq_lens: Any,  # [B]
    seq_stride: Any,
    accept_lens: Any,  # [B]; read if RAGGED
    accept_stride: Any,
    cache_seqlens: Any,  # [B]
    cu_seqlens_k: Any,  # [B+1]
    expanded: Any,  # [R]; in DECODE the memory of cache_seqlens, which then gets its own values once more
    nsa_cache_seqlens: Any,  # [R]
    nsa_cu_seqlens_k: Any,  # [R+1]
    ctx_lens: Any,  # [B, N]; written if OWN_CTX_LENS
    ctx_stride: Any,
    batch_size: Any,
    added: Any,
    tokens: Any,
    index_topk: Any,
    RAGGED: tl.constexpr,
    SUMS: tl.constexpr,
    OWN_CTX_LENS: tl.constexpr,
    REQUESTS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    lane = tl.arange(0, REQUESTS).to(tl.int64)
    token = tl.arange(0, TOKENS).to(tl.int64)[None, :]
    rows = tl.full((), 0, tl.int64)
    kv_sum = tl.full((), 0, tl.int64)
    nsa_sum = tl.full((), 0, tl.int64)
    if SUMS:
        tl.store(cu_seqlens_k, 0)
        tl.store(nsa_cu_seqlens_k, 0)
    for start in range(0, batch_size, REQUESTS):
        request = lane + start
        held = request < batch_size
        kv_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64) + added
        if RAGGED:
            accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64)
            ends = tl.associative_scan(accept, 0, _SUM) + rows
            row = (ends - accept)[:, None] + token  # [REQUESTS, TOKENS]
            defined = token < accept[:, None]
            rows += tl.reduce(accept, 0, _SUM)
            length = (kv_len - accept)[:, None] + (token + 1)
        else:
            row = (request * tokens)[:, None] + token
            defined = held[:, None] & (token < tokens)
            length = (kv_len - tokens)[:, None] + (token + 1)
        length = tl.maximum(length, 0)
        clamped = tl.minimum(length, index_topk)
        if SUMS:
            # Lanes past the batch come last, so what they add to a scan reaches no lane that is stored.
            tl.store(cache_seqlens + request, kv_len, mask=held)
            tl.store(cu_seqlens_k + 1 + request, tl.associative_scan(kv_len, 0, _SUM) + kv_sum, mask=held)
            kv_sum += tl.reduce(kv_len, 0, _SUM)
            counted = tl.where(defined, clamped, 0)
            total = tl.reduce(counted, 1, _SUM)
            before = tl.associative_scan(total, 0, _SUM) - total + nsa_sum
            nsa_cu = tl.associative_scan(counted, 1, _SUM) + before[:, None]
            tl.store(nsa_cu_seqlens_k + 1 + row, nsa_cu, mask=defined)
            nsa_sum += tl.reduce(total, 0, _SUM)
        tl.store(expanded + row, length, mask=defined)
        tl.store(nsa_cache_seqlens + row, clamped, mask=defined)
        if OWN_CTX_LENS:
            cell = ctx_lens + (request * ctx_stride)[:, None] + token
            tl.store(cell, tl.broadcast_to(kv_len[:, None], (REQUESTS, TOKENS)), mask=defined)


@triton.jit(
    do_not_specialize=[
        "seq_stride",
        "accept_stride",
        "pool_stride",
        "token_stride",
        "table_stride",
        "real_stride",
        "batch_size",
        "added",
        "tokens",
        "width",
        "page_size",
    ],
    do_not_specialize_on_alignment=[
        "seq_lens",
        "accept_lens",
        "pool_indices",
        "req_to_token",
        "page_table",
        "real_table",
    ],
)
def _fill_tables(
    seq_lens: Any,  # [B]
    seq_stride: Any,
    accept_lens: Any,  # [B]; read if RAGGED
    accept_stride: Any,
    pool_indices: Any,  # [B]
    pool_stride: Any,
    req_to_token: Any,  # [pool_rows, pool_width]
    token_stride: Any,
    page_table: Any,  # [R, W]
    table_stride: Any,
    real_table: Any,  # [R, ceil(W/p)]; written if PAGED
    real_stride: Any,
    batch_size: Any,
    added: Any,
    tokens: Any,
    width: Any,
    page_size: Any,
    RAGGED: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1).to(tl.int64) * CHUNK
    if RAGGED:
        lane = tl.arange(0, BLOCK).to(tl.int64)
        owner = tl.full((ROWS,), 0, tl.int64)
        rows = tl.full((), 0, tl.int64)
        for start in range(0, batch_size, BLOCK):
            request = lane + start
            accept = tl.load(accept_lens + request * accept_stride, mask=request < batch_size, other=0).to(tl.int64)
            ends = tl.associative_scan(accept, 0, _SUM) + rows
            owner += tl.reduce((ends[None, :] <= row[:, None]).to(tl.int64), 1, _SUM)
            rows += tl.reduce(accept, 0, _SUM)
        defined = row < rows
    else:
        owner = row // tokens
        defined = owner < batch_size
    kv_len = tl.load(seq_lens + owner * seq_stride, mask=defined, other=0).to(tl.int64) + added
    kv_len = tl.where(defined, kv_len, 0)
    source = req_to_token + tl.load(pool_indices + owner * pool_stride, mask=defined, other=0).to(tl.int64) * token_stride

    reach = tl.minimum((kv_len + (BLOCK - 1)) & -BLOCK, width)
    target = page_table + row * table_stride
    real_target = real_table + row * real_stride
    for column in range(first, tl.minimum(first + CHUNK, tl.reduce(reach, 0, _MAX)), COLUMNS):
        columns = tl.arange(0, COLUMNS) + tl.cast(column, tl.int64)
        mask = columns[None, :] < reach[:, None]  # [ROWS, COLUMNS]
        slot = tl.load(source[:, None] + columns[None, :], mask=mask, other=0)
        tl.store(target[:, None] + columns[None, :], slot, mask=mask)
        if PAGED:
            page = columns // page_size
            leads = page * page_size == columns
            tl.store(real_target[:, None] + page[None, :], slot // page_size, mask=mask & leads[None, :])


@triton.jit(
    do_not_specialize=["accept_stride", "schedule_stride", "batch_size", "rows", "num_sms"],
    do_not_specialize_on_alignment=["ctx_lens", "accept_lens", "schedule"],
)
def _fill_schedule(
    ctx_lens: Any,  # [rows]
    accept_lens: Any,  # [B]; read if RAGGED
    accept_stride: Any,
    schedule: Any,  # [num_sms+1, 2]
    schedule_stride: Any,
    batch_size: Any,
    rows: Any,
    num_sms: Any,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    lane = tl.arange(0, BLOCK).to(tl.int64)
    count = tl.full((), 0, tl.int64)
    if RAGGED:
        for start in range(0, batch_size, BLOCK):
            request = lane + start
            accept = tl.load(accept_lens + request * accept_stride, mask=request < batch_size, other=0).to(tl.int64)
            count += tl.reduce(accept, 0, _SUM)
    else:
        count += rows
    total = tl.full((), 0, tl.int64)
    for start in range(0, count, BLOCK):
        row = lane + start
        segments = (tl.load(ctx_lens + row, mask=row < count, other=0).to(tl.int64) + 255) // 256
        total += tl.reduce(segments, 0, _SUM)
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    share = total // num_sms
    begin = entry * share + tl.minimum(entry, total - share * num_sms)

    owner = tl.full((ENTRIES,), 0, tl.int64)
    before = tl.full((ENTRIES,), 0, tl.int64)
    end = tl.full((), 0, tl.int64)
    for start in range(0, count, BLOCK):
        row = lane + start
        segments = (tl.load(ctx_lens + row, mask=row < count, other=0).to(tl.int64) + 255) // 256
        ends = tl.associative_scan(segments, 0, _SUM) + end
        done = ends[None, :] <= begin[:, None]  # [ENTRIES, BLOCK]
        owner += tl.reduce(done.to(tl.int64), 1, _SUM)
        before = tl.maximum(before, tl.reduce(tl.where(done, ends[None, :], 0), 1, _MAX))
        end += tl.reduce(segments, 0, _SUM)
    # An entry at the total has counted the lanes past the last row too.
    owner = tl.minimum(owner, count)
    offset = tl.where(owner < count, begin - before, 0)
    written = (entry <= num_sms) & (count > 0)
    tl.store(schedule + entry * schedule_stride, owner, mask=written)
    tl.store(schedule + entry * schedule_stride + 1, offset, mask=written)


def fill_draft_extend_metadata_inplace(
    extend_seq_lens: Tensor,
    seq_lens: Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: Tensor,
    out_nsa_cache_seqlens: Tensor,
) -> int:
    """The ragged expansion into given int32 buffers; returns the number of rows written, R.

    ``extend_seq_lens`` and ``seq_lens`` are ``[B]``, int32 or int64, of any element stride. Rows ``off[b] + j`` of the
    outputs get ``max(0, s[b] - a[b] + j + 1)`` and its minimum with ``nsa_index_topk``; rows past R are not touched.
    Raises ``ValueError``, before anything is written, if an output is shorter than R, not int32 or not contiguous.
    Waits for the device once, to learn R.
    """
    batch_size = extend_seq_lens.shape[0]
    if batch_size == 0:
        return 0
    total_tokens, longest = torch.stack((extend_seq_lens.sum(), extend_seq_lens.max())).tolist()
    for name, out in (("out_seqlens_expanded", out_seqlens_expanded), ("out_nsa_cache_seqlens", out_nsa_cache_seqlens)):
        if out.dtype != torch.int32 or out.dim() != 1 or out.stride(0) != 1:
            raise ValueError(f"{name} must be a contiguous 1-D int32 tensor, not {out.dtype} of shape {list(out.shape)}")
        if out.shape[0] < total_tokens:
            raise ValueError(f"{name} holds {out.shape[0]} rows, the batch expands to {total_tokens}; nothing was written")
    if total_tokens:
        tokens = triton.next_power_of_2(longest)
        _launch_lengths(
            seq_lens, extend_seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens, batch_size, nsa_index_topk, tokens
        )
    return int(total_tokens)


def _launch_lengths(
    seq_lens: Tensor,
    accept_lens: Tensor | None,
    expanded: Tensor,
    nsa_cache_seqlens: Tensor,
    batch_size: int,
    index_topk: int,
    tokens: int,
    added: int = 0,
    sums: MetadataBuffers | None = None,
    ctx_lens: Tensor | None = None,
) -> None:
    """One program over the batch. ``tokens`` bounds the rows of a request, and is their number if not ragged."""
    bound = triton.next_power_of_2(tokens)
    _fill_lengths[(1,)](
        seq_lens,
        seq_lens.stride(0),
        seq_lens if accept_lens is None else accept_lens,
        0 if accept_lens is None else accept_lens.stride(0),
        expanded if sums is None else sums.cache_seqlens,
        expanded if sums is None else sums.cu_seqlens_k,
        expanded,
        nsa_cache_seqlens,
        nsa_cache_seqlens if sums is None else sums.nsa_cu_seqlens_k,
        expanded if ctx_lens is None else ctx_lens,
        0 if ctx_lens is None else ctx_lens.stride(0),
        batch_size,
        added,
        tokens,
        index_topk,
        RAGGED=accept_lens is not None,
        SUMS=sums is not None,
        OWN_CTX_LENS=ctx_lens is not None,
        REQUESTS=max(1, min(_BLOCK, 1024 // bound)),
        TOKENS=bound,
    )


@implementation("triton-inplace", extent=Extent.ROW, block=_BLOCK, capturable=True, optional_outputs=OPTIONAL_OUTPUTS)
def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Write the metadata of every step straight into its buffers; nothing is read on the host."""
    for step in steps:
        _refresh_step(inputs, step, setup)


def _refresh_step(inputs: ReplayInputs, step: MetadataBuffers, setup: Setup) -> None:
    mode, batch_size = inputs.mode, inputs.batch_size
    ragged = mode is Mode.DRAFT_EXTEND
    tokens = 1 if mode is Mode.DECODE else setup.num_draft_tokens
    added = setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0
    own_ctx_lens = setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY
    _launch_lengths(
        inputs.seq_lens,
        inputs.accept_lens if ragged else None,
        step.nsa_seqlens_expanded,
        step.nsa_cache_seqlens,
        batch_size,
        setup.index_topk,
        tokens,
        added,
        sums=step,
        ctx_lens=step.paged_mqa_ctx_lens if own_ctx_lens else None,
    )
    rows, width = batch_size * tokens, setup.table_width
    _fill_tables[(triton.cdiv(rows, _TILE_ROWS), triton.cdiv(width, _CHUNK))](
        inputs.seq_lens,
        inputs.seq_lens.stride(0),
        inputs.accept_lens,
        inputs.accept_lens.stride(0),
        inputs.req_pool_indices,
        inputs.req_pool_indices.stride(0),
        inputs.req_to_token,
        inputs.req_to_token.stride(0),
        step.page_table_1,
        step.page_table_1.stride(0),
        step.real_page_table,
        step.real_page_table.stride(0),
        batch_size,
        added,
        tokens,
        width,
        setup.page_size,
        RAGGED=ragged,
        PAGED=setup.page_size > 1,
        BLOCK=_BLOCK,
        ROWS=_TILE_ROWS,
        COLUMNS=_TILE_COLUMNS,
        CHUNK=_CHUNK,
        num_warps=8,
    )
    if step.paged_mqa_schedule is not None:
        _fill_schedule[(triton.cdiv(setup.num_sms + 1, _ENTRIES),)](
            step.cache_seqlens if own_ctx_lens else step.nsa_seqlens_expanded,
            inputs.accept_lens,
            inputs.accept_lens.stride(0),
            step.paged_mqa_schedule,
            step.paged_mqa_schedule.stride(0),
            batch_size,
            batch_size if own_ctx_lens else rows,
            setup.num_sms,
            RAGGED=ragged,
            BLOCK=_BLOCK,
            ENTRIES=_ENTRIES,
        )
