"""``triton-inplace``: stage 2. Triton kernels write straight into the frozen buffers, nothing is allocated or copied.

Per step one launch for the lengths, the prefix sums and the page tables (bounded by live lengths), and one for the
schedule where it is kept. No program waits for another: each sums what lies before its own requests. Grids depend on
what is frozen at capture alone (bucket, N, W) and the number of ragged rows stays on the device, so every mode can be
captured.

All four modes are one formula: with the KV length ``k[b]`` (the draft tokens included) and ``a[b]`` rows (1 in DECODE,
N in the uniform modes), row ``off[b] + j`` is ``max(0, k[b] - a[b] + j + 1)``.

Arithmetic is 64 bit throughout: no product can overflow, and Triton's interpreter, which checks every 32-bit operation
for overflow, runs several times faster. Nothing that varies with the batch is a ``constexpr``, and neither integers nor
addresses are specialised on, so the number of compilations stays small and does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_verify.core.case import CtxLens, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs, implementation
from nsa_verify.kernels.backend_arguments import check_expansion, on_device

_COLUMNS = 128
"""Columns of ``page_table_1`` that a tile takes, and to which the written part of a row is therefore rounded up."""
_LANES = 32
"""Pairs of request and token per program; at least as many as a request has."""
_EARLIER = 512
"""Lanes of earlier programs that are summed at a time."""
_PROGRAM_COLUMNS = 512
_MAX_PROGRAMS = 32
"""Programs along a row: one per 512 columns of the table, up to 32, which take the live tiles in turn."""
_BLOCK = 128
"""Rows that the schedule's kernel takes at a time."""
_ENTRIES = 32
"""Entries of the schedule per program."""

# tl.sum and its like are functions of Triton code, and the interpreter patches the whole language at every such call
# (0.8 ms); their combine functions given to tl.reduce are not called at all there.
_SUM = tl.standard._sum_combine
_MAX = tl.standard._elementwise_max


@triton.jit(
    do_not_specialize=[
        "seq_stride",
        "accept_stride",
        "pool_stride",
        "token_stride",
        "ctx_stride",
        "table_stride",
        "real_stride",
        "batch_size",
        "added",
        "tokens",
        "index_topk",
        "width",
        "page_shift",
        "bound",
    ],
    do_not_specialize_on_alignment=[
        "seq_lens",
        "accept_lens",
        "pool_indices",
        "req_to_token",
        "cache_seqlens",
        "cu_seqlens_k",
        "expanded",
        "nsa_cache_seqlens",
        "nsa_cu_seqlens_k",
        "ctx_lens",
        "page_table",
        "real_table",
    ],
)
def _fill_metadata(
    seq_lens: tl.tensor,  # [B]
    seq_stride: tl.tensor,
    accept_lens: tl.tensor,  # [B]; read if RAGGED
    accept_stride: tl.tensor,
    pool_indices: tl.tensor,  # [B]
    pool_stride: tl.tensor,
    req_to_token: tl.tensor,  # [pool_rows, pool_width]
    token_stride: tl.tensor,
    cache_seqlens: tl.tensor,  # [B]
    cu_seqlens_k: tl.tensor,  # [B+1]
    expanded: tl.tensor,  # [R]; in DECODE the memory of cache_seqlens, which then gets its own values once more
    nsa_cache_seqlens: tl.tensor,  # [R]
    nsa_cu_seqlens_k: tl.tensor,  # [R+1]
    ctx_lens: tl.tensor,  # [B, N]; written if OWN_CTX_LENS
    ctx_stride: tl.tensor,
    page_table: tl.tensor,  # [R, W]
    table_stride: tl.tensor,
    real_table: tl.tensor,  # [R, ceil(W/p)]; written if PAGED
    real_stride: tl.tensor,
    batch_size: tl.tensor,
    added: tl.tensor,
    tokens: tl.tensor,
    index_topk: tl.tensor,
    width: tl.tensor,
    page_shift: tl.tensor,  # log2(p)
    bound: tl.tensor,  # lanes of a request, at least its rows
    RAGGED: tl.constexpr,
    WHOLE: tl.constexpr,  # False: only expanded and nsa_cache_seqlens
    PAGED: tl.constexpr,
    OWN_CTX_LENS: tl.constexpr,
    LANES: tl.constexpr,
    EARLIER: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # A lane is a pair of request and token, bound lanes a request; it is defined if the request has that many rows.
    # A running count of defined lanes is then a lane's row, whatever the requests' numbers of rows are.
    first_lane = tl.program_id(0).to(tl.int64) * LANES
    turn = tl.program_id(1)
    rows = tl.full((), 0, tl.int64)
    kv_sum = tl.full((), 0, tl.int64)
    nsa_sum = tl.full((), 0, tl.int64)
    for start in range(0, first_lane, EARLIER):
        lane = tl.arange(0, EARLIER) + tl.cast(start, tl.int64)
        request = lane // bound
        token = lane - request * bound
        held = lane < first_lane
        accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64) if RAGGED else tokens
        counted = (held & (token < accept)).to(tl.int64)
        rows += tl.reduce(counted, 0, _SUM)
        if WHOLE:
            kv_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64) + added
            clamped = tl.minimum(tl.maximum(kv_len - accept + token + 1, 0), index_topk)
            nsa_sum += tl.reduce(clamped * counted, 0, _SUM)
            kv_sum += tl.reduce(tl.where(held & (token == 0), kv_len, 0), 0, _SUM)

    lane = tl.arange(0, LANES) + first_lane
    request = lane // bound
    token = lane - request * bound
    held = request < batch_size
    kv_len = tl.load(seq_lens + request * seq_stride, mask=held).to(tl.int64) + added
    accept = tl.load(accept_lens + request * accept_stride, mask=held).to(tl.int64) if RAGGED else tokens
    defined = held & (token < accept)
    counted = defined.to(tl.int64)
    end = tl.associative_scan(counted, 0, _SUM) + rows
    row = end - 1
    if turn == 0:
        length = tl.maximum(kv_len - accept + token + 1, 0)
        clamped = tl.minimum(length, index_topk)
        tl.store(expanded + row, length, mask=defined)
        tl.store(nsa_cache_seqlens + row, clamped, mask=defined)
        if WHOLE:
            leads = held & (token == 0)
            kv_ends = tl.associative_scan(kv_len * leads.to(tl.int64), 0, _SUM) + kv_sum
            tl.store(cu_seqlens_k, 0)
            tl.store(cu_seqlens_k + 1 + request, kv_ends, mask=leads)
            tl.store(cache_seqlens + request, kv_len, mask=leads)
            tl.store(nsa_cu_seqlens_k, 0)
            tl.store(nsa_cu_seqlens_k + end, tl.associative_scan(clamped * counted, 0, _SUM) + nsa_sum, mask=defined)
        if OWN_CTX_LENS:
            tl.store(ctx_lens + request * ctx_stride + token, kv_len, mask=defined)
    if WHOLE:
        reach = tl.minimum((kv_len + (COLUMNS - 1)) & -COLUMNS, width) * counted
        pool_row = tl.load(pool_indices + request * pool_stride, mask=defined).to(tl.int64)
        source = req_to_token + pool_row * token_stride
        target = page_table + row * table_stride
        real_target = real_table + row * real_stride
        offsets = tl.arange(0, COLUMNS).to(tl.int64)
        for column in range(turn.to(tl.int64) * COLUMNS, tl.reduce(reach, 0, _MAX), tl.num_programs(1) * COLUMNS):
            columns = offsets + column
            mask = columns[None, :] < reach[:, None]  # [LANES, COLUMNS]
            slot = tl.load(source[:, None] + columns[None, :], mask=mask)
            tl.store(target[:, None] + columns[None, :], slot, mask=mask)
            if PAGED:
                # The column that leads page c, c*p, holds a slot of that page.
                page = columns >> page_shift
                mask = mask & (page << page_shift == columns)[None, :]
                tl.store(real_target[:, None] + page[None, :], slot >> page_shift, mask=mask)


@triton.jit(
    do_not_specialize=["accept_stride", "schedule_stride", "batch_size", "rows", "num_sms"],
    do_not_specialize_on_alignment=["ctx_lens", "accept_lens", "schedule"],
)
def _fill_schedule(
    ctx_lens: tl.tensor,  # [rows]
    accept_lens: tl.tensor,  # [B]; read if RAGGED
    accept_stride: tl.tensor,
    schedule: tl.tensor,  # [num_sms+1, 2]
    schedule_stride: tl.tensor,
    batch_size: tl.tensor,
    rows: tl.tensor,
    num_sms: tl.tensor,
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
        done = (ends[None, :] <= begin[:, None]).to(tl.int64)  # [ENTRIES, BLOCK]
        owner += tl.reduce(done, 1, _SUM)
        before += tl.reduce(done * segments[None, :], 1, _SUM)
        end += tl.reduce(segments, 0, _SUM)
    # An entry at the total has counted the lanes past the last row too; its offset is the total less itself, 0.
    cell = schedule + entry * schedule_stride
    written = entry <= num_sms
    if RAGGED:
        written = written & (count > 0)
    tl.store(cell, tl.minimum(owner, count), mask=written)
    tl.store(cell + 1, begin - before, mask=written)


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
    Raises ``ValueError``, before anything is written, if an output is shorter than R, not int32, not 1-D or not
    contiguous, if the two share memory, and for inputs of other shapes or dtypes; all are of one device, the inputs of
    one length. Waits for the device once, to learn R.
    """
    outputs = {"out_seqlens_expanded": out_seqlens_expanded, "out_nsa_cache_seqlens": out_nsa_cache_seqlens}
    check_expansion(extend_seq_lens, seq_lens, **outputs)
    batch_size = extend_seq_lens.shape[0]
    if batch_size == 0:
        return 0
    total_tokens, longest = torch.stack((extend_seq_lens.sum(), extend_seq_lens.max())).tolist()
    for name, out in outputs.items():
        if out.shape[0] < total_tokens:
            needed = f"the batch expands to {total_tokens}; nothing was written"
            raise ValueError(f"{name} holds {out.shape[0]} rows, {needed}")
    if total_tokens == 0:
        return 0
    bound = triton.next_power_of_2(longest)
    lanes = max(_LANES, bound)
    with on_device(seq_lens.device):
        _fill_metadata[(triton.cdiv(batch_size * bound, lanes), 1)](
            seq_lens,
            seq_lens.stride(0),
            extend_seq_lens,
            extend_seq_lens.stride(0),
            *(extend_seq_lens, 0, extend_seq_lens, 0),
            *(out_seqlens_expanded, out_seqlens_expanded),
            out_seqlens_expanded,
            out_nsa_cache_seqlens,
            out_nsa_cache_seqlens,
            *(out_seqlens_expanded, 0, out_seqlens_expanded, 0, out_seqlens_expanded, 0),
            batch_size,
            0,
            longest,
            nsa_index_topk,
            0,
            0,
            bound,
            RAGGED=True,
            WHOLE=False,
            PAGED=False,
            OWN_CTX_LENS=False,
            LANES=lanes,
            EARLIER=_EARLIER,
            COLUMNS=_COLUMNS,
            num_warps=8,
        )
    return int(total_tokens)


@implementation("triton-inplace", extent=Extent.ROW, block=_COLUMNS, capturable=True, optional_outputs=OPTIONAL_OUTPUTS)
def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Write the metadata of every step straight into its buffers; nothing is read on the host."""
    for step in steps:
        _refresh_step(inputs, step, setup)


def _refresh_step(inputs: ReplayInputs, step: MetadataBuffers, setup: Setup) -> None:
    mode, batch_size = inputs.mode, inputs.batch_size
    ragged = mode is Mode.DRAFT_EXTEND
    tokens = 1 if mode is Mode.DECODE else setup.num_draft_tokens
    bound = triton.next_power_of_2(tokens)
    ctx_lens = None
    if setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY:
        ctx_lens = step.paged_mqa_ctx_lens
    programs = min(triton.cdiv(setup.table_width, _PROGRAM_COLUMNS), _MAX_PROGRAMS)
    _fill_metadata[(triton.cdiv(batch_size * bound, _LANES), programs)](
        inputs.seq_lens,
        inputs.seq_lens.stride(0),
        inputs.accept_lens,
        inputs.accept_lens.stride(0),
        inputs.req_pool_indices,
        inputs.req_pool_indices.stride(0),
        inputs.req_to_token,
        inputs.req_to_token.stride(0),
        step.cache_seqlens,
        step.cu_seqlens_k,
        step.nsa_seqlens_expanded,
        step.nsa_cache_seqlens,
        step.nsa_cu_seqlens_k,
        step.cache_seqlens if ctx_lens is None else ctx_lens,
        0 if ctx_lens is None else ctx_lens.stride(0),
        step.page_table_1,
        step.page_table_1.stride(0),
        step.real_page_table,
        step.real_page_table.stride(0),
        batch_size,
        setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0,
        tokens,
        setup.index_topk,
        setup.table_width,
        setup.page_size.bit_length() - 1,
        bound,
        RAGGED=ragged,
        WHOLE=True,
        PAGED=setup.page_size > 1,
        OWN_CTX_LENS=ctx_lens is not None,
        LANES=_LANES,
        EARLIER=_EARLIER,
        COLUMNS=_COLUMNS,
        num_warps=8,
    )
    if step.paged_mqa_schedule is not None:
        own_ctx_lens = setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY
        _fill_schedule[(triton.cdiv(setup.num_sms + 1, _ENTRIES),)](
            step.cache_seqlens if own_ctx_lens else step.nsa_seqlens_expanded,
            inputs.accept_lens,
            inputs.accept_lens.stride(0),
            step.paged_mqa_schedule,
            step.paged_mqa_schedule.stride(0),
            batch_size,
            batch_size if own_ctx_lens else batch_size * tokens,
            setup.num_sms,
            RAGGED=ragged,
            BLOCK=_BLOCK,
            ENTRIES=_ENTRIES,
            num_warps=8,
        )
