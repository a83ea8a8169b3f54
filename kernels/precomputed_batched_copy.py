"""``precomputed-batched-copy``: the metadata is computed once, and one launch copies every buffer of every step.

Contract section 6, form 2, with a batched copy. The intermediates are contiguous; each destination has a row stride of
its own. Page rows are kept once per request, and the copy repeats them for the request's expanded rows. Their memory is
as wide as the table, and like the destinations' it is written, and read, over the live prefix only.

Nothing is read on the host: ragged batches are expanded over all ``B*N`` captured rows, and those past the total of the
accept lengths name no request and are not copied. So every mode can be captured. It takes three launches: the lists, in
which each row looks for its request; the page rows; the copy.

Arithmetic is 64 bit throughout: no product can overflow, and Triton's interpreter, which checks every 32-bit operation
for overflow, runs several times faster. Nothing that varies with the batch is a ``constexpr``; the copy is compiled per
number of steps and per set of optional fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_verify.core.case import CtxLens, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs, implementation

_LANES = 32
"""Expanded rows that a program of the lists computes."""
_SEARCHED = 64
"""Requests that they are compared with at a time."""
_ENTRIES = 256
"""Elements of the schedule that a program copies at a time."""

# tl.sum and its like are functions of Triton code, and the interpreter patches the whole language at every such call
# (0.8 ms); their combine functions given to tl.reduce are not called at all there.
_SUM = tl.standard._sum_combine
_MAX = tl.standard._elementwise_max


@dataclass(frozen=True, slots=True)
class SharedMetadata:
    """One replay's metadata as all steps share it, contiguous. R_max is B in DECODE and B*N elsewhere, R <= R_max.

    ``owners`` ``[R_max]`` int64: the request of each expanded row, and B for rows past R. The others are int32:
    ``cache_seqlens`` ``[B]``; ``cu_seqlens_k`` ``[B+1]``; ``seqlens_expanded``, ``nsa_cache_seqlens`` ``[R_max]`` and
    ``nsa_cu_seqlens_k`` ``[R_max+1]``, of which the first R (+1) count; ``page_indices`` ``[B, W]`` and
    ``real_page_table`` ``[B, ceil(W/p)]``, a row per request, written over ``cache_seqlens`` tokens only, the latter
    None where p = 1; ``schedule`` ``[num_sms+1, 2]`` or None.
    """

    owners: Tensor
    cache_seqlens: Tensor
    cu_seqlens_k: Tensor
    seqlens_expanded: Tensor
    nsa_cache_seqlens: Tensor
    nsa_cu_seqlens_k: Tensor
    page_indices: Tensor
    real_page_table: Tensor | None
    schedule: Tensor | None


@implementation("precomputed-batched-copy", extent=Extent.LIVE, capturable=True, optional_outputs=OPTIONAL_OUTPUTS)
def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Compute once and copy into all steps with one launch; nothing is read on the host."""
    copy_into_all(steps, precompute(inputs, setup), inputs.mode, setup)


def precompute(inputs: ReplayInputs, setup: Setup) -> SharedMetadata:
    """What every step of this replay shares, in fresh tensors: no step's buffer is read or referred to."""
    batch_size, mode = inputs.batch_size, inputs.mode
    rows = setup.captured_rows(mode, batch_size)
    owners = torch.empty(rows, dtype=torch.int64, device=inputs.seq_lens.device)
    sizes = (batch_size, batch_size + 1, rows, rows, rows + 1)
    lists = torch.empty(sum(sizes), dtype=torch.int32, device=owners.device).split(sizes)
    cache_seqlens, cu_seqlens_k, expanded, nsa_cache_seqlens, nsa_cu_seqlens_k = lists
    _expand_rows[(triton.cdiv(rows, _LANES),)](
        inputs.seq_lens,
        inputs.seq_lens.stride(0),
        inputs.accept_lens,
        inputs.accept_lens.stride(0),
        owners,
        *lists,
        batch_size,
        rows,
        setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0,
        1 if mode is Mode.DECODE else setup.num_draft_tokens,
        setup.index_topk,
        RAGGED=mode is Mode.DRAFT_EXTEND,
        LANES=_LANES,
        SEARCHED=_SEARCHED,
    )
    page_indices, real_page_table = _gather(inputs, cache_seqlens, setup)
    schedule = None
    if setup.schedule:
        if setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY:
            schedule = _schedule(cache_seqlens.long(), batch_size, setup.num_sms)
        else:
            schedule = _schedule(expanded.long(), (owners < batch_size).sum(0, keepdim=True), setup.num_sms)
    return SharedMetadata(
        owners=owners,
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        seqlens_expanded=expanded,
        nsa_cache_seqlens=nsa_cache_seqlens,
        nsa_cu_seqlens_k=nsa_cu_seqlens_k,
        page_indices=page_indices,
        real_page_table=real_page_table,
        schedule=schedule,
    )


@triton.jit(
    do_not_specialize=["seq_stride", "accept_stride", "batch_size", "rows", "added", "tokens", "index_topk"],
    do_not_specialize_on_alignment=[
        "seq_lens",
        "accept_lens",
        "owners",
        "cache_seqlens",
        "cu_seqlens_k",
        "expanded",
        "nsa_cache_seqlens",
        "nsa_cu_seqlens_k",
    ],
)
def _expand_rows(
    seq_lens: tl.tensor,  # [B]
    seq_stride: tl.tensor,
    accept_lens: tl.tensor,  # [B]; read if RAGGED
    accept_stride: tl.tensor,
    owners: tl.tensor,  # [R_max]
    cache_seqlens: tl.tensor,  # [B]
    cu_seqlens_k: tl.tensor,  # [B+1]
    expanded: tl.tensor,  # [R_max]
    nsa_cache_seqlens: tl.tensor,  # [R_max]
    nsa_cu_seqlens_k: tl.tensor,  # [R_max+1]
    batch_size: tl.tensor,
    rows: tl.tensor,
    added: tl.tensor,  # tokens that the KV length has and seq_lens has not
    tokens: tl.tensor,  # rows of a request, if not RAGGED
    index_topk: tl.tensor,
    RAGGED: tl.constexpr,
    LANES: tl.constexpr,
    SEARCHED: tl.constexpr,
) -> None:
    # A row counts the requests that end at or before it, which are those before its own, and sums what these have.
    # Row by row they are compared only where one of them ends in the block; else all of its rows pass them, or none.
    block = tl.program_id(0).to(tl.int64) * LANES
    row = block + tl.arange(0, LANES)
    owner = tl.full((LANES,), 0, tl.int64)
    first = tl.full((LANES,), 0, tl.int64)  # the first row of its request
    kv_end = tl.full((LANES,), 0, tl.int64)
    nsa_end = tl.full((LANES,), 0, tl.int64)
    end = tl.full((), 0, tl.int64)
    for start in range(0, batch_size, SEARCHED):
        request = tl.arange(0, SEARCHED).to(tl.int64) + start
        held = request < batch_size
        kv_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64)
        kv_len += tl.where(held, added, 0)
        if RAGGED:
            accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64)
        else:
            accept = tl.where(held, tokens, 0).to(tl.int64)
        if start + SEARCHED <= block:
            kv_end += tl.reduce(kv_len, 0, _SUM)
        elif start < block + LANES:
            counted = request[None, :] <= row[:, None]  # [LANES, SEARCHED]
            kv_end += tl.reduce(tl.where(counted, kv_len[None, :], 0), 1, _SUM)
        before = end
        end += tl.reduce(accept, 0, _SUM)
        if before < block + LANES:
            of_request = _clamped_sum(kv_len, index_topk) - _clamped_sum(kv_len - accept, index_topk)
            if end <= block:
                owner += tl.minimum(batch_size - start, SEARCHED)
                first += end - before
                nsa_end += tl.reduce(of_request, 0, _SUM)
            else:
                ends = before + tl.associative_scan(accept, 0, _SUM)
                passed = held[None, :] & (ends[None, :] <= row[:, None])
                owner += tl.reduce(passed.to(tl.int64), 1, _SUM)
                first += tl.reduce(tl.where(passed, accept[None, :], 0), 1, _SUM)
                nsa_end += tl.reduce(tl.where(passed, of_request[None, :], 0), 1, _SUM)
    captured = row < rows
    defined = captured & (owner < batch_size)
    kv_len = tl.load(seq_lens + owner * seq_stride, mask=defined, other=0).to(tl.int64) + added
    if RAGGED:
        accept = tl.load(accept_lens + owner * accept_stride, mask=defined, other=0).to(tl.int64)
    else:
        accept = tl.full((LANES,), 0, tl.int64) + tokens
    last = kv_len - accept + row - first + 1  # the row's own length, below 0 on padded ones
    length = tl.where(defined, tl.maximum(last, 0), 0)
    nsa_end += _clamped_sum(last, index_topk) - _clamped_sum(kv_len - accept, index_topk)
    tl.store(owners + row, owner, mask=captured)
    tl.store(expanded + row, length, mask=captured)
    tl.store(nsa_cache_seqlens + row, tl.minimum(length, index_topk), mask=captured)
    tl.store(nsa_cu_seqlens_k, 0)
    tl.store(nsa_cu_seqlens_k + 1 + row, nsa_end, mask=defined)
    request = row < batch_size
    own_kv_len = tl.load(seq_lens + row * seq_stride, mask=request, other=0).to(tl.int64) + added
    tl.store(cache_seqlens + row, own_kv_len, mask=request)
    tl.store(cu_seqlens_k, 0)
    tl.store(cu_seqlens_k + 1 + row, kv_end, mask=request)


@triton.jit
def _clamped_sum(length: tl.tensor, index_topk: tl.tensor) -> tl.tensor:
    """The sum of min(t, K) over t = 1..length: with y = min(length, K) it is y * (y + 1) / 2 + (length - y) * K."""
    length = tl.maximum(length, 0)
    cut = tl.minimum(length, index_topk)
    return cut * (cut + 1) // 2 + (length - cut) * index_topk


def _schedule(ctx_lens: Tensor, rows: Tensor | int, num_sms: int) -> Tensor:
    """The contract's section 7, int32 ``[num_sms+1, 2]``; lengths past the first ``rows`` are 0."""
    segments = (ctx_lens + 255).div(256, rounding_mode="floor")
    ends = segments.cumsum(0)
    total = ends[-1:]
    share = total.div(num_sms, rounding_mode="floor")
    boundary = torch.arange(num_sms + 1, device=ctx_lens.device)
    start = boundary * share + boundary.minimum(total - share * num_sms)
    row = torch.bucketize(start, ends, right=True)
    inside = start < total
    begin = (ends - segments).index_select(0, row.clamp(max=ctx_lens.shape[0] - 1))
    return torch.stack((torch.where(inside, row, rows), torch.where(inside, start - begin, 0)), dim=1).to(torch.int32)


class _Tiles(NamedTuple):
    rows: int
    columns: int
    turns: int
    """Programs along a row, which take its live tiles in turn."""


def _tiles(rows: int, setup: Setup, of: Tensor, steps: int = 1) -> _Tiles:
    """How ``rows`` page rows are shared out; docs/performance.md has the measurements behind it."""
    if not of.is_cuda:
        # The interpreter takes as long for a large tile as for a small one.
        return _Tiles(32, 128, min(triton.cdiv(setup.table_width, 512), 32))
    columns, programs = (512, 2112) if steps == 1 else (512, 1056)
    return _Tiles(1, columns, max(min(triton.cdiv(setup.table_width, columns), programs // rows), 1))


def _gather(inputs: ReplayInputs, cache_seqlens: Tensor, setup: Setup) -> tuple[Tensor, Tensor | None]:
    """The page rows of every request, ``[B, W]`` and ``[B, ceil(W/p)]``, over their live prefix."""
    batch_size, paged = inputs.batch_size, setup.page_size > 1
    pages = cache_seqlens.new_empty((batch_size, setup.table_width))
    real_pages = cache_seqlens.new_empty((batch_size, setup.real_table_width)) if paged else pages
    tiles = _tiles(batch_size, setup, cache_seqlens)
    _gather_pages[(triton.cdiv(batch_size, tiles.rows), tiles.turns)](
        cache_seqlens,
        inputs.req_pool_indices,
        inputs.req_pool_indices.stride(0),
        inputs.req_to_token,
        inputs.req_to_token.stride(0),
        pages,
        real_pages,
        batch_size,
        setup.table_width,
        setup.real_table_width,
        setup.page_size.bit_length() - 1,
        PAGED=paged,
        REQUESTS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=2,
    )
    return pages, real_pages if paged else None


@triton.jit(
    do_not_specialize=["pool_stride", "token_stride", "batch_size", "width", "real_width", "page_shift"],
    do_not_specialize_on_alignment=["cache_seqlens", "pool_indices", "req_to_token", "page_indices", "real_pages"],
)
def _gather_pages(
    cache_seqlens: tl.tensor,  # [B]
    pool_indices: tl.tensor,  # [B]
    pool_stride: tl.tensor,
    req_to_token: tl.tensor,  # [pool_rows, pool_width]
    token_stride: tl.tensor,
    page_indices: tl.tensor,  # [B, W]
    real_pages: tl.tensor,  # [B, ceil(W/p)]; written if PAGED
    batch_size: tl.tensor,
    width: tl.tensor,
    real_width: tl.tensor,
    page_shift: tl.tensor,  # log2(p)
    PAGED: tl.constexpr,
    REQUESTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    request = tl.program_id(0).to(tl.int64) * REQUESTS + tl.arange(0, REQUESTS)
    held = request < batch_size
    reach = tl.minimum(tl.load(cache_seqlens + request, mask=held, other=0).to(tl.int64), width)
    pool_row = tl.load(pool_indices + request * pool_stride, mask=held, other=0).to(tl.int64)
    source = (req_to_token + pool_row * token_stride)[:, None]
    target = (page_indices + request * width)[:, None]
    real_target = (real_pages + request * real_width)[:, None]
    offset = tl.arange(0, COLUMNS).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * COLUMNS
    for start in range(first, tl.reduce(reach, 0, _MAX), tl.num_programs(1) * COLUMNS):
        column = offset + start
        live = column[None, :] < reach[:, None]  # [REQUESTS, COLUMNS]
        slot = tl.load(source + column[None, :], mask=live)
        tl.store(target + column[None, :], slot, mask=live)
        if PAGED:
            # The first token of page c stands in column c*p.
            page = column >> page_shift
            leads = live & (page << page_shift == column)[None, :]
            tl.store(real_target + page[None, :], slot >> page_shift, mask=leads)


def copy_into_all(steps: Sequence[MetadataBuffers], shared: SharedMetadata, mode: Mode, setup: Setup) -> None:
    """Place ``shared`` in the buffers of every step: one launch, however many steps and fields there are.

    A step need not keep what is optional. Rows past R, and columns past the live prefix, are not touched.
    """
    own_ctx_lens = setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY
    tables = [step.page_table_1 for step in steps]
    real_tables = [step.real_page_table for step in steps if shared.real_page_table is not None]
    # In DECODE it is the memory of cache_seqlens, which is copied already.
    expanded = [step.nsa_seqlens_expanded for step in steps if mode is not Mode.DECODE]
    ctx_lens = [step.paged_mqa_ctx_lens for step in steps if own_ctx_lens and step.paged_mqa_ctx_lens is not None]
    schedules = [
        step.paged_mqa_schedule for step in steps if shared.schedule is not None and step.paged_mqa_schedule is not None
    ]
    batch_size, rows = shared.cache_seqlens.shape[0], shared.owners.shape[0]
    tiles = _tiles(rows, setup, shared.owners, len(steps))
    _copy_everywhere[(triton.cdiv(rows, tiles.rows), tiles.turns)](
        shared.owners,
        shared.cache_seqlens,
        shared.cu_seqlens_k,
        shared.seqlens_expanded,
        shared.nsa_cache_seqlens,
        shared.nsa_cu_seqlens_k,
        shared.page_indices,
        shared.page_indices if shared.real_page_table is None else shared.real_page_table,
        shared.owners if shared.schedule is None else shared.schedule,
        tuple(step.cache_seqlens for step in steps),
        tuple(step.cu_seqlens_k for step in steps),
        tuple(expanded or tables),
        tuple(step.nsa_cache_seqlens for step in steps),
        tuple(step.nsa_cu_seqlens_k for step in steps),
        *(tuple(tables), _odd_strides(tables)),
        *(tuple(real_tables or tables), _odd_strides(real_tables or tables)),
        *(tuple(ctx_lens or tables), _odd_strides(ctx_lens or tables)),
        *(tuple(schedules or tables), _odd_strides(schedules or tables)),
        batch_size,
        rows,
        setup.num_draft_tokens,
        setup.table_width,
        setup.real_table_width,
        2 * (setup.num_sms + 1),
        setup.page_size.bit_length() - 1,
        EXPANDED=bool(expanded),
        PAGED=bool(real_tables),
        OWN_CTX_LENS=bool(ctx_lens),
        SCHEDULE=bool(schedules),
        LANES=tiles.rows,
        COLUMNS=tiles.columns,
        ENTRIES=_ENTRIES,
        num_warps=2,
    )


def _odd_strides(destinations: Sequence[Tensor]) -> tuple[int, ...]:
    """Row strides s as 2s + 1. Triton specialises integers in a tuple, whatever ``do_not_specialize`` says, on being 1
    and on being a multiple of 16; these are neither, so that a stride chooses no compilation."""
    return tuple(2 * destination.stride(0) + 1 for destination in destinations)


@triton.jit(
    do_not_specialize=["batch_size", "rows", "tokens", "width", "real_width", "elements", "page_shift"],
    do_not_specialize_on_alignment=[
        "owners",
        "cache_seqlens",
        "cu_seqlens_k",
        "expanded",
        "nsa_cache_seqlens",
        "nsa_cu_seqlens_k",
        "page_indices",
        "real_pages",
        "schedule",
    ],
)
def _copy_everywhere(
    owners: tl.tensor,  # [R_max]; B where a row is not defined
    cache_seqlens: tl.tensor,  # [B]
    cu_seqlens_k: tl.tensor,  # [B+1]
    expanded: tl.tensor,  # [R_max]
    nsa_cache_seqlens: tl.tensor,  # [R_max]
    nsa_cu_seqlens_k: tl.tensor,  # [R_max+1]
    page_indices: tl.tensor,  # [B, W]
    real_pages: tl.tensor,  # [B, ceil(W/p)]
    schedule: tl.tensor,  # [num_sms+1, 2]
    to_cache_seqlens: tl.tuple,  # the destinations: one of each per step that keeps it
    to_cu_seqlens_k: tl.tuple,
    to_expanded: tl.tuple,  # written if EXPANDED
    to_nsa_cache_seqlens: tl.tuple,
    to_nsa_cu_seqlens_k: tl.tuple,
    to_page_table: tl.tuple,
    table_strides: tl.tuple,  # a stride s is given as 2s + 1, so that row * s is half of row * (2s + 1) - row
    to_real_table: tl.tuple,  # written if PAGED
    real_strides: tl.tuple,
    to_ctx_lens: tl.tuple,  # written if OWN_CTX_LENS
    ctx_strides: tl.tuple,
    to_schedule: tl.tuple,  # written if SCHEDULE
    schedule_strides: tl.tuple,
    batch_size: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    real_width: tl.tensor,
    elements: tl.tensor,  # of the schedule
    page_shift: tl.tensor,  # log2(p)
    EXPANDED: tl.constexpr,
    PAGED: tl.constexpr,
    OWN_CTX_LENS: tl.constexpr,
    SCHEDULE: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    turn = tl.program_id(1).to(tl.int64)
    row = block * LANES + tl.arange(0, LANES)
    captured = row < rows
    owner = tl.load(owners + row, mask=captured)
    defined = captured & (owner < batch_size)
    kv_len = tl.load(cache_seqlens + owner, mask=defined, other=0).to(tl.int64)
    if turn == 0:
        after = row + 1
        request = row < batch_size
        own_kv_len = tl.load(cache_seqlens + row, mask=request)
        kv_end = tl.load(cu_seqlens_k + after, mask=request)
        clamped = tl.load(nsa_cache_seqlens + row, mask=defined)
        nsa_end = tl.load(nsa_cu_seqlens_k + after, mask=defined)
        for step in tl.static_range(len(to_cache_seqlens)):
            tl.store(to_cache_seqlens[step] + row, own_kv_len, mask=request)
            tl.store(to_cu_seqlens_k[step], 0)
            tl.store(to_cu_seqlens_k[step] + after, kv_end, mask=request)
            tl.store(to_nsa_cache_seqlens[step] + row, clamped, mask=defined)
            tl.store(to_nsa_cu_seqlens_k[step], 0)
            tl.store(to_nsa_cu_seqlens_k[step] + after, nsa_end, mask=defined)
        if EXPANDED:
            length = tl.load(expanded + row, mask=defined)
            for step in tl.static_range(len(to_expanded)):
                tl.store(to_expanded[step] + row, length, mask=defined)
        if OWN_CTX_LENS:
            token = row - owner * tokens
            for step in tl.static_range(len(to_ctx_lens)):
                cell = to_ctx_lens[step] + (owner * ctx_strides[step] - owner >> 1) + token
                tl.store(cell, kv_len, mask=defined)
    if SCHEDULE:
        # Without a defined row there is nothing to schedule, and the old schedule stays.
        any_row = tl.load(owners) < batch_size
        program = block * tl.num_programs(1) + turn
        for start in range(program * ENTRIES, elements, tl.num_programs(0) * tl.num_programs(1) * ENTRIES):
            element = start + tl.arange(0, ENTRIES)
            written = (element < elements) & any_row
            value = tl.load(schedule + element, mask=written)
            entry = element >> 1
            for step in tl.static_range(len(to_schedule)):
                cell = to_schedule[step] + (entry * schedule_strides[step] - entry >> 1) + (element & 1)
                tl.store(cell, value, mask=written)

    offset = tl.arange(0, COLUMNS).to(tl.int64)
    reach = tl.minimum(kv_len, width)
    for start in range(turn * COLUMNS, tl.reduce(reach, 0, _MAX), tl.num_programs(1) * COLUMNS):
        column = (offset + start)[None, :]
        live = column < reach[:, None]  # [LANES, COLUMNS]
        slot = tl.load(page_indices + (owner * width)[:, None] + column, mask=live)
        for step in tl.static_range(len(to_page_table)):
            target = to_page_table[step] + (row * table_strides[step] - row >> 1)[:, None]
            tl.store(target + column, slot, mask=live)
    if PAGED:
        pages = (reach + (1 << page_shift) - 1) >> page_shift
        for start in range(turn * COLUMNS, tl.reduce(pages, 0, _MAX), tl.num_programs(1) * COLUMNS):
            column = (offset + start)[None, :]
            live = column < pages[:, None]
            page = tl.load(real_pages + (owner * real_width)[:, None] + column, mask=live)
            for step in tl.static_range(len(to_real_table)):
                target = to_real_table[step] + (row * real_strides[step] - row >> 1)[:, None]
                tl.store(target + column, page, mask=live)
