"""``onepass``: from the inputs to every buffer of all steps in one launch, in each of the four modes.

Nothing is read on the host, nothing allocated, and the grid depends on what is frozen at capture alone. This is form 3
of the contract's section 6: a row's slots are read once and written to all its expanded rows of all steps, without an
intermediate.

Four kinds of programs share the launch, none waits for another, and each reads the inputs only. The first ones write
the lengths and their prefix sums, the next ones the schedule where one is kept, the last ones the heads of the rows of
tables: each takes a block of requests and, in turn with its neighbours, tiles of their columns up to the live prefix.
What a row has beyond its head, which few have, is dealt out evenly to the programs between: so one long request among
short ones costs no more than its bytes. No row looks for its request: a request knows its rows, which begin behind
those of the requests before it; that sum is a product in the uniform modes, and in ragged batches vector loads of the
accept lengths before it and one reduction.

All four modes are one formula: with the KV length ``k`` (the draft tokens included) and ``a`` rows of a request (1 in
DECODE, N in the uniform modes), row ``j`` of these has ``max(0, k - a + j + 1)`` tokens. With ``F(x)``, the sum of
``min(t, K)`` over ``t = 1..x``, their lengths after the top-k minimum sum to ``F(k) - F(k - a)``.

Addresses and sums are 64 bit. An accept length beyond N, which no engine may pass, counts as N: memory behind the rows
of a bucket is never written. Nothing that varies with the batch is a ``constexpr``, and integers are not specialised
on. Addresses are, since Triton has no way to leave that out for those in a tuple: a buffer that does not begin at a
multiple of 16 bytes, as what torch allocates does, is another compilation. Functions called within the kernel are few,
since the interpreter pays a millisecond for each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_verify.core.case import CtxLens, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs, implementation
from nsa_verify.kernels.backend_arguments import check_expansion, on_device

_LENGTHS = 32
"""Requests per program of the expansion alone."""
_EARLIER = 256
"""Requests before those that are summed at a time."""
# tl.sum and its like are functions of Triton code, and the interpreter patches the whole language at every such call
# (0.8 ms); their combine functions given to tl.reduce are not called at all there.
_SUM = tl.standard._sum_combine
_MAX = tl.standard._elementwise_max


@implementation("onepass", extent=Extent.LIVE, capturable=True, optional_outputs=OPTIONAL_OUTPUTS)
def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Write the metadata of every step with one launch; nothing is read on the host."""
    mode, batch_size = inputs.mode, inputs.batch_size
    tokens = 1 if mode is Mode.DECODE else setup.num_draft_tokens
    own_ctx_lens = setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY
    tables = [step.page_table_1 for step in steps]
    # In DECODE it is the memory of cache_seqlens, which is written anyway.
    expanded = [step.nsa_seqlens_expanded for step in steps if mode is not Mode.DECODE]
    real_tables = [step.real_page_table for step in steps if setup.page_size > 1]
    ctx_lens = [step.paged_mqa_ctx_lens for step in steps if own_ctx_lens and step.paged_mqa_ctx_lens is not None]
    schedules = [step.paged_mqa_schedule for step in steps if step.paged_mqa_schedule is not None]

    shape = _shape(batch_size, setup, inputs.seq_lens, len(steps))
    # Of each kind of programs so many rows of the grid, which has a column for each turn.
    heads = triton.cdiv(triton.cdiv(batch_size, shape.lengths), shape.turns)
    searchers = triton.cdiv(triton.cdiv(setup.num_sms + 1, shape.entries), shape.turns) if schedules else 0
    tails = triton.cdiv(shape.tails, shape.turns) if setup.table_width > shape.head else 0
    _refresh[(heads + searchers + tails + triton.cdiv(batch_size, shape.requests), shape.turns)](
        inputs.seq_lens,
        inputs.seq_lens.stride(0),
        inputs.accept_lens,
        inputs.accept_lens.stride(0),
        inputs.req_pool_indices,
        inputs.req_pool_indices.stride(0),
        inputs.req_to_token,
        inputs.req_to_token.stride(0),
        tuple(step.cache_seqlens for step in steps),
        tuple(step.cu_seqlens_k for step in steps),
        tuple(expanded or tables),
        tuple(step.nsa_cache_seqlens for step in steps),
        tuple(step.nsa_cu_seqlens_k for step in steps),
        *(tuple(tables), _strides(tables)),
        *(tuple(real_tables or tables), _strides(real_tables or tables)),
        *(tuple(ctx_lens or tables), _strides(ctx_lens or tables)),
        *(tuple(schedules or tables), _strides(schedules or tables)),
        batch_size,
        setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0,
        tokens,
        setup.index_topk,
        setup.table_width,
        setup.page_size.bit_length() - 1,
        setup.num_sms,
        heads,
        searchers,
        tails,
        shape.head,
        RAGGED=mode is Mode.DRAFT_EXTEND,
        EXPANDED=bool(expanded),
        PAGED=bool(real_tables),
        OWN_CTX_LENS=bool(ctx_lens),
        SCHEDULE=bool(schedules),
        OF_REQUESTS=own_ctx_lens,
        LENGTHS=shape.lengths,
        EARLIER=shape.earlier,
        PORTIONS=shape.portions,
        TAIL_PORTIONS=shape.tail_portions,
        TAIL_REQUESTS=shape.tail_requests,
        ENTRIES=shape.entries,
        REQUESTS=shape.requests,
        COLUMNS=shape.columns,
        PAGES=max(shape.columns // 16, 1),
        num_warps=shape.warps,
    )


class _Shape(NamedTuple):
    turns: int
    """Programs for the head of a row; the columns of the grid."""
    head: int
    """Columns of a row that these write, a multiple of ``turns * columns``."""
    tails: int
    """Programs that share what is beyond the heads of all rows."""
    lengths: int
    """Requests per program that writes lengths."""
    earlier: int
    """Requests before those of a program that it sums at a time."""
    entries: int
    """Entries of the schedule per program."""
    portions: int
    """Of the batch, one behind the other, that a program of the schedule goes through side by side."""
    requests: int
    """Of a tile in a head."""
    columns: int
    """Of a tile."""
    tail_requests: int
    """Of a tile beyond the heads."""
    tail_portions: int
    """As ``portions``, for programs that share the tails."""
    warps: int


_ONE_STEP = _Shape(
    turns=24,
    head=0,
    tails=264,
    lengths=32,
    earlier=_EARLIER,
    entries=4,
    portions=64,
    requests=1,
    columns=512,
    tail_requests=1,
    tail_portions=128,
    warps=2,
)
"""``turns`` are the most that there are, and ``head`` depends on them."""
_SEVERAL_STEPS = _ONE_STEP._replace(turns=16, tails=132, columns=256)
_MANY_STEPS = _ONE_STEP._replace(turns=32, tails=132, lengths=16, columns=128, warps=1)
_NARROW_WIDTH = 1024
_NARROW = _ONE_STEP._replace(
    turns=2, head=256, tails=16, lengths=8, earlier=8, portions=4, columns=128, tail_portions=4
)
"""For tables narrower than those of any engine, and batches as small as those of tests: they get to every loop."""
_INTERPRETED = _NARROW._replace(
    turns=1, tails=2, lengths=16, entries=32, portions=8, requests=16, tail_requests=2, tail_portions=2
)
"""The same where a program takes as long for many requests as for one, and each operation of it 0.1 ms."""


def _shape(batch_size: int, setup: Setup, seq_lens: Tensor, steps: int) -> _Shape:
    """How the work is shared out: from what is frozen at capture alone, no constant of a kernel from the batch size.

    A program without live columns costs its launch and the wait for one length, a program with many makes the others
    wait for its last store; docs/performance.md has the measurements.
    """
    if not seq_lens.is_cuda:
        return _INTERPRETED
    if setup.table_width < _NARROW_WIDTH:
        return _NARROW
    shape, programs = (_ONE_STEP, 2112) if steps == 1 else (_SEVERAL_STEPS, 528) if steps <= 4 else (_MANY_STEPS, 1056)
    turns = max(min(triton.cdiv(setup.table_width, shape.columns), programs // batch_size, shape.turns), 1)
    return shape._replace(turns=turns, head=8 * turns * shape.columns)


def _strides(destinations: Sequence[Tensor]) -> tuple[int, ...]:
    """Row strides s as 2s + 1; a single one if all steps have the same, which saves registers.

    Triton specialises integers in a tuple, whatever ``do_not_specialize`` says, on being 1 and on being a multiple of
    16; 2s + 1 is neither, so that a stride chooses no compilation.
    """
    strides = tuple(2 * destination.stride(0) + 1 for destination in destinations)
    return strides[:1] if len(set(strides)) == 1 else strides


@triton.jit
def _copy_tiles(
    start: tl.tensor,
    step_columns: tl.tensor,  # from one tile to the next
    edge: tl.tensor,  # [REQUESTS]: where each request's columns end
    source: tl.tensor,  # [REQUESTS]: its row of req_to_token
    row: tl.tensor,  # [REQUESTS]: the first row that it is written to
    accept: tl.tensor,  # [REQUESTS]: rows that it is written to
    slot: tl.tensor,  # [REQUESTS, COLUMNS]: of the first tile
    tables: tl.tuple,
    page_shift: tl.tensor,
    PAGED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,
) -> None:
    # Tiles from start on, each read once and written to all rows of all steps.
    to_page_table, table_strides, to_real_table, real_strides = tables
    offset = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    copies = tl.reduce(accept, 0, _MAX)
    end = tl.reduce(edge, 0, _MAX)
    while start < end:
        live = start + offset < edge[:, None]
        if PAGED:
            # Page c begins in column c*p; the first that does so in this tile is rounded up to.
            page = (start + (1 << page_shift) - 1 >> page_shift) + tl.arange(0, PAGES).to(tl.int64)[None, :]
            leader = page << page_shift
            leads = (leader < edge[:, None]) & (leader < start + COLUMNS)  # [REQUESTS, PAGES]
            page_slot = tl.load(source[:, None] + leader, mask=leads) >> page_shift
        for copy in tl.range(0, copies, disable_licm=True):
            copied = (row + copy)[:, None]
            wanted = (accept > copy)[:, None]
            for step in tl.static_range(len(to_page_table)):
                stride = table_strides[step if len(table_strides) > 1 else 0]
                target = to_page_table[step] + (copied * stride - copied >> 1)
                # Tables are larger than what is read again and again: they are the first to leave the cache.
                tl.store(target + start + offset, slot, mask=live & wanted, eviction_policy="evict_first")
            if PAGED:
                for step in tl.static_range(len(to_real_table)):
                    stride = real_strides[step if len(real_strides) > 1 else 0]
                    target = to_real_table[step] + (copied * stride - copied >> 1)
                    tl.store(target + page, page_slot, mask=leads & wanted)
        start += step_columns
        slot = tl.load(source[:, None] + start + offset, mask=start + offset < edge[:, None])


@triton.jit
def _fill_heads_of_rows(
    block: tl.tensor,
    turn: tl.tensor,
    batch: tl.tuple,
    pool: tl.tuple,
    tables: tl.tuple,
    width: tl.tensor,  # no more columns than these are written here
    page_shift: tl.tensor,
    turns: tl.tensor,
    RAGGED: tl.constexpr,
    PAGED: tl.constexpr,
    EARLIER: tl.constexpr,
    REQUESTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,
) -> None:
    # Tables: REQUESTS requests from the block's first, COLUMNS columns at a time, in turn with the neighbours.
    seq_lens, seq_stride, accept_lens, accept_stride, batch_size, added, tokens = batch
    pool_indices, pool_stride, req_to_token, token_stride = pool
    first = block * REQUESTS
    request = first + tl.arange(0, REQUESTS)
    held = request < batch_size
    kv_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64) + added
    pool_row = tl.load(pool_indices + request * pool_stride, mask=held, other=0).to(tl.int64)
    edge = tl.where(held, tl.minimum(kv_len, width), 0)
    if RAGGED:
        accept = tl.minimum(tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64), tokens)
        edge = tl.where(accept > 0, edge, 0)
        # Asked for here, so that it is there with the first slots.
        lane = tl.arange(0, EARLIER).to(tl.int64)
        counted = tl.minimum(tl.load(accept_lens + lane * accept_stride, mask=lane < first, other=0), tokens)
    else:
        accept = tl.full((REQUESTS,), 0, tl.int64) + tokens
    start = turn * COLUMNS
    if start < tl.reduce(edge, 0, _MAX):
        source = req_to_token + pool_row * token_stride
        column = start + tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        slot = tl.load(source[:, None] + column, mask=column < edge[:, None])  # [REQUESTS, COLUMNS]
        # The first slots are on their way while it is found out where they go.
        if RAGGED:
            before = tl.reduce(counted, 0, _SUM).to(tl.int64)
            if first > EARLIER:
                wide = tl.arange(0, 4 * EARLIER).to(tl.int64)
                counted_wide = tl.full((4 * EARLIER,), 0, tl.int32)
                for earlier in range(EARLIER, first, 4 * EARLIER):
                    more = earlier + wide
                    found = tl.load(accept_lens + more * accept_stride, mask=more < first, other=0).to(tl.int32)
                    counted_wide += tl.minimum(found, tokens)
                before += tl.reduce(counted_wide, 0, _SUM)
            row = before + tl.associative_scan(accept, 0, _SUM) - accept
        else:
            row = request * tokens
        _copy_tiles(
            start,
            turns * COLUMNS,
            edge,
            source,
            row,
            accept,
            slot,
            tables,
            page_shift,
            PAGED,
            COLUMNS,
            PAGES,
        )


@triton.jit
def _tails(batch: tl.tuple, request: tl.tensor, width: tl.tensor, head: tl.tensor, RAGGED: tl.constexpr) -> tl.tuple:
    """Columns of requests beyond ``head``, up to which one ends, and the rows that it is written to."""
    seq_lens, seq_stride, accept_lens, accept_stride, batch_size, added, tokens = batch
    held = request < batch_size
    # It is 32 bit where tiles are counted, as most strides are: their product is not.
    request = request.to(tl.int64)
    kv_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int32) + added
    if RAGGED:
        accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int32)
        accept = tl.minimum(accept, tokens)
    else:
        accept = tl.where(held, tokens, 0)
    return tl.where(accept > 0, tl.maximum(tl.minimum(kv_len, width) - head, 0), 0), accept


@triton.jit
def _fill_tails_of_rows(
    index: tl.tensor,  # of this program, among so many
    programs: tl.tensor,
    batch: tl.tuple,
    pool: tl.tuple,
    tables: tl.tuple,
    width: tl.tensor,
    page_shift: tl.tensor,
    head: tl.tensor,  # columns that others write
    RAGGED: tl.constexpr,
    PAGED: tl.constexpr,
    PORTIONS: tl.constexpr,
    REQUESTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,
) -> None:
    # The tiles of rows beyond their heads, one behind the other, dealt out evenly: a tile counts as often as it is
    # written, and twice for being waited for. Tiles are counted by portions of the batch first, then it is looked for
    # where this program's share begins.
    batch_size = batch[4]
    pool_indices, pool_stride, req_to_token, token_stride = pool
    depth = (batch_size + REQUESTS * PORTIONS - 1) // (REQUESTS * PORTIONS)  # blocks of a portion
    opening = tl.arange(0, PORTIONS) * depth
    within = tl.arange(0, REQUESTS)
    weights = tl.full((PORTIONS,), 0, tl.int32)
    rows = tl.full((PORTIONS,), 0, tl.int32)
    for place in range(depth):
        request = ((opening + place) * REQUESTS)[:, None] + within[None, :]
        tail, accept = _tails(batch, request, width, head, RAGGED)
        tiles = (tl.reduce(tail, 1, _MAX) + COLUMNS - 1) // COLUMNS
        weights += tiles * (tl.reduce(accept, 1, _MAX) + 2)
        rows += tl.reduce(accept, 1, _SUM)
    total = tl.reduce(weights, 0, _SUM).to(tl.int64)
    low = (total * index // programs).to(tl.int32)
    high = (total * (index + 1) // programs).to(tl.int32)
    if low < high:
        ends = tl.associative_scan(weights, 0, _SUM)
        offset = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        reached = low
        while reached < high:
            mine = (ends > reached) & (ends - weights <= reached)  # one portion
            block = tl.reduce(tl.where(mine, opening, 0), 0, _SUM)
            weight = tl.reduce(tl.where(mine, ends - weights, 0), 0, _SUM)
            if RAGGED:
                before = tl.reduce(tl.where(mine, tl.associative_scan(rows, 0, _SUM) - rows, 0), 0, _SUM)
            else:
                before = block * REQUESTS * batch[6]
            for _ in range(depth):
                request = block.to(tl.int64) * REQUESTS + within
                tail, accept = _tails(batch, request, width, head, RAGGED)
                tiles = (tl.reduce(tail, 0, _MAX) + COLUMNS - 1) // COLUMNS
                cost = tl.reduce(accept, 0, _MAX) + 2
                if (weight + tiles * cost > low) & (weight < high):
                    pool_row = tl.load(pool_indices + request * pool_stride, mask=tail > 0, other=0).to(tl.int64)
                    source = req_to_token + pool_row * token_stride
                    # The tiles whose weight begins within the share.
                    start = head + (tl.maximum(low - weight + cost - 1, 0) // cost).to(tl.int64) * COLUMNS
                    end = head + tl.minimum(tiles, (high - weight + cost - 1) // cost).to(tl.int64) * COLUMNS
                    edge = tl.where(tail > 0, tl.minimum(head + tail.to(tl.int64), end), 0)
                    slot = tl.load(source[:, None] + start + offset, mask=start + offset < edge[:, None])
                    row = (before + tl.associative_scan(accept, 0, _SUM) - accept).to(tl.int64)
                    _copy_tiles(
                        start,
                        COLUMNS,
                        edge,
                        source,
                        row,
                        accept,
                        slot,
                        tables,
                        page_shift,
                        PAGED,
                        COLUMNS,
                        PAGES,
                    )
                weight += tiles * cost
                before += tl.reduce(accept, 0, _SUM)
                block += 1
            reached = weight


@triton.jit
def _clamped_sum(kv_len: tl.tensor, accept: tl.tensor, index_topk: tl.tensor) -> tl.tensor:
    """The sum of the lengths of a request's rows after the top-k minimum."""
    # The sum of min(t, K) over t = 1..x is, with y = min(x, K), y * (y + 1) / 2 + (x - y) * K.
    high = tl.maximum(kv_len, 0)
    low = tl.maximum(kv_len - accept, 0)
    high_cut = tl.minimum(high, index_topk)
    low_cut = tl.minimum(low, index_topk)
    steep = (high_cut * (high_cut + 1) - low_cut * (low_cut + 1)) // 2
    return steep + (high - high_cut - low + low_cut) * index_topk


@triton.jit
def _segments(
    batch: tl.tuple, request: tl.tensor, held: tl.tensor, RAGGED: tl.constexpr, OF_REQUESTS: tl.constexpr
) -> tl.tuple:
    """Rows, and segments of 256 tokens of all rows together, of each request; 0 where it is not ``held``."""
    seq_lens, seq_stride, accept_lens, accept_stride, _, added, tokens = batch
    kv_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64)
    kv_len += tl.where(held, added, 0)
    if RAGGED:
        accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64)
        accept = tl.minimum(accept, tokens)
    else:
        accept = tl.where(held, tokens, 0)
    if OF_REQUESTS:
        segments = (kv_len + 255) // 256
    else:
        # The sum of ceil(t / 256) over t = 1..x is, with y = ceil(x / 256), y * (x - 128 * (y - 1)).
        high = tl.maximum(kv_len, 0)
        low = tl.maximum(kv_len - accept, 0)
        high_end = (high + 255) // 256
        low_end = (low + 255) // 256
        segments = high_end * (high - 128 * (high_end - 1)) - low_end * (low - 128 * (low_end - 1))
    return accept, segments


@triton.jit
def _fill_lengths(
    block: tl.tensor,
    batch: tl.tuple,
    lists: tl.tuple,
    to_ctx_lens: tl.tuple,
    ctx_strides: tl.tuple,
    index_topk: tl.tensor,
    RAGGED: tl.constexpr,
    EXPANDED: tl.constexpr,
    OWN_CTX_LENS: tl.constexpr,
    EARLIER: tl.constexpr,
    LENGTHS: tl.constexpr,
) -> None:
    # Lengths and prefix sums of LENGTHS requests.
    to_cache_seqlens, to_cu_seqlens_k, to_expanded, to_nsa_cache_seqlens, to_nsa_cu_seqlens_k = lists
    seq_lens, seq_stride, accept_lens, accept_stride, batch_size, added, tokens = batch
    first = block * LENGTHS
    rows = tl.full((), 0, tl.int64)
    kv_sum = tl.full((), 0, tl.int64)
    nsa_sum = tl.full((), 0, tl.int64)
    if first > 0:
        rows_before = tl.full((EARLIER,), 0, tl.int64)
        kv_before = tl.full((EARLIER,), 0, tl.int64)
        nsa_before = tl.full((EARLIER,), 0, tl.int64)
        for start in range(0, first, EARLIER):
            lane = start + tl.arange(0, EARLIER).to(tl.int64)
            held = lane < first
            kv_len = tl.load(seq_lens + lane * seq_stride, mask=held, other=0).to(tl.int64)
            kv_len += tl.where(held, added, 0)
            if RAGGED:
                accept = tl.load(accept_lens + lane * accept_stride, mask=held, other=0).to(tl.int64)
                accept = tl.minimum(accept, tokens)
            else:
                accept = tl.where(held, tokens, 0).to(tl.int64)
            rows_before += accept
            kv_before += kv_len
            nsa_before += _clamped_sum(kv_len, accept, index_topk)
        rows = tl.reduce(rows_before, 0, _SUM)
        kv_sum = tl.reduce(kv_before, 0, _SUM)
        nsa_sum = tl.reduce(nsa_before, 0, _SUM)
    request = first + tl.arange(0, LENGTHS)
    held = request < batch_size
    kv_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64) + added
    if RAGGED:
        accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64)
        accept = tl.minimum(accept, tokens)
        copies = tl.reduce(accept, 0, _MAX)
    else:
        accept = tl.full((LENGTHS,), 0, tl.int64) + tokens
        copies = tokens
    kv_end = kv_sum + tl.associative_scan(kv_len, 0, _SUM)
    row = rows + tl.associative_scan(accept, 0, _SUM) - accept
    of_request = _clamped_sum(kv_len, accept, index_topk)
    nsa_end = nsa_sum + tl.associative_scan(of_request, 0, _SUM) - of_request
    for step in tl.static_range(len(to_cache_seqlens)):
        tl.store(to_cache_seqlens[step] + request, kv_len, mask=held)
        tl.store(to_cu_seqlens_k[step], 0)
        tl.store(to_cu_seqlens_k[step] + 1 + request, kv_end, mask=held)
        tl.store(to_nsa_cu_seqlens_k[step], 0)
    for token in range(copies):
        defined = held & (token < accept)
        length = tl.maximum(kv_len - accept + token + 1, 0)
        clamped = tl.minimum(length, index_topk)
        nsa_end += clamped
        for step in tl.static_range(len(to_nsa_cache_seqlens)):
            tl.store(to_nsa_cache_seqlens[step] + row + token, clamped, mask=defined)
            tl.store(to_nsa_cu_seqlens_k[step] + 1 + row + token, nsa_end, mask=defined)
        if EXPANDED:
            for step in tl.static_range(len(to_expanded)):
                tl.store(to_expanded[step] + row + token, length, mask=defined)
        if OWN_CTX_LENS:
            for step in tl.static_range(len(to_ctx_lens)):
                stride = ctx_strides[step if len(ctx_strides) > 1 else 0]
                cell = to_ctx_lens[step] + (request * stride - request >> 1) + token
                tl.store(cell, kv_len, mask=held)


@triton.jit
def _fill_schedule(
    block: tl.tensor,
    batch: tl.tuple,
    to_schedule: tl.tuple,
    schedule_strides: tl.tuple,
    num_sms: tl.tensor,
    RAGGED: tl.constexpr,
    OF_REQUESTS: tl.constexpr,
    PORTIONS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    # ENTRIES entries: each passes the portions of the batch that end at or before it, then requests, then rows.
    seq_lens, seq_stride, accept_lens, accept_stride, batch_size, added, tokens = batch
    depth = (batch_size + PORTIONS - 1) // PORTIONS  # requests of a portion
    opening = tl.arange(0, PORTIONS).to(tl.int64) * depth
    in_portion = tl.full((PORTIONS,), 0, tl.int64)  # segments
    rows_in_portion = tl.full((PORTIONS,), 0, tl.int64)
    for place in range(depth):
        request = opening + place
        accept, segments = _segments(batch, request, request < batch_size, RAGGED, OF_REQUESTS)
        in_portion += segments
        rows_in_portion += accept
    total = tl.reduce(in_portion, 0, _SUM)
    rows = tl.reduce(rows_in_portion, 0, _SUM)
    if OF_REQUESTS:
        rows = tl.full((), 0, tl.int64) + batch_size
    entry = block * ENTRIES + tl.arange(0, ENTRIES)
    share = total // num_sms
    begin = entry * share + tl.minimum(entry, total - share * num_sms)
    ends = tl.associative_scan(in_portion, 0, _SUM)
    done = (ends[None, :] <= begin[:, None]).to(tl.int64)  # [ENTRIES, PORTIONS]
    first = tl.minimum(tl.reduce(done, 1, _SUM) * depth, batch_size)  # [ENTRIES]
    passed = tl.reduce(done * in_portion[None, :], 1, _SUM)
    row = tl.reduce(done * rows_in_portion[None, :], 1, _SUM)
    owner = first
    ahead = entry <= num_sms
    # With one request in each, the portion that is not passed is the owner.
    for place in range(tl.where(depth > 1, depth, 0)):
        accept, segments = _segments(batch, first + place, first + place < batch_size, RAGGED, OF_REQUESTS)
        ahead = ahead & (first + place < batch_size) & (passed + segments <= begin)
        owner += ahead.to(tl.int64)
        passed += tl.where(ahead, segments, 0)
        row += tl.where(ahead, accept, 0)
    if OF_REQUESTS:
        row = owner
    else:
        held = owner < batch_size
        kv_len = tl.load(seq_lens + owner * seq_stride, mask=held, other=0).to(tl.int64) + added
        if RAGGED:
            accept = tl.load(accept_lens + owner * accept_stride, mask=held, other=0).to(tl.int64)
            accept = tl.minimum(accept, tokens)
            copies = tl.reduce(accept, 0, _MAX)
        else:
            accept = tl.full((ENTRIES,), 0, tl.int64) + tokens
            copies = tokens
        # The last row of the owner ends behind the entry, so each row before it is passed at most once.
        for token in range(copies):
            segments = (tl.maximum(kv_len - accept + token + 1, 0) + 255) // 256
            past = held & (token < accept) & (passed + segments <= begin)
            passed += tl.where(past, segments, 0)
            row += past.to(tl.int64)
    # The boundary at the total is behind all rows, and passed is the total there.
    written = (entry <= num_sms) & (rows > 0)
    for step in tl.static_range(len(to_schedule)):
        stride = schedule_strides[step if len(schedule_strides) > 1 else 0]
        cell = to_schedule[step] + (entry * stride - entry >> 1)
        tl.store(cell, row, mask=written)
        tl.store(cell + 1, begin - passed, mask=written)


@triton.jit(
    do_not_specialize=[
        "seq_stride",
        "accept_stride",
        "pool_stride",
        "token_stride",
        "batch_size",
        "added",
        "tokens",
        "index_topk",
        "width",
        "page_shift",
        "num_sms",
        "heads",
        "searchers",
        "tails",
        "head",
    ],
    do_not_specialize_on_alignment=["seq_lens", "accept_lens", "pool_indices", "req_to_token"],
)
def _refresh(
    seq_lens: tl.tensor,  # [B]
    seq_stride: tl.tensor,
    accept_lens: tl.tensor,  # [B]; read if RAGGED
    accept_stride: tl.tensor,
    pool_indices: tl.tensor,  # [B]
    pool_stride: tl.tensor,
    req_to_token: tl.tensor,  # [pool_rows, pool_width]
    token_stride: tl.tensor,
    to_cache_seqlens: tl.tuple,  # the destinations: one of each per step that keeps it
    to_cu_seqlens_k: tl.tuple,
    to_expanded: tl.tuple,  # written if EXPANDED
    to_nsa_cache_seqlens: tl.tuple,
    to_nsa_cu_seqlens_k: tl.tuple,
    to_page_table: tl.tuple,
    table_strides: tl.tuple,  # one of each, or one for all; a stride s is given as 2s + 1
    to_real_table: tl.tuple,  # written if PAGED
    real_strides: tl.tuple,
    to_ctx_lens: tl.tuple,  # written if OWN_CTX_LENS
    ctx_strides: tl.tuple,
    to_schedule: tl.tuple,  # written if SCHEDULE
    schedule_strides: tl.tuple,
    batch_size: tl.tensor,
    added: tl.tensor,  # tokens that the KV length has and seq_lens has not
    tokens: tl.tensor,  # rows of a request; if RAGGED the most that it may have
    index_topk: tl.tensor,
    width: tl.tensor,
    page_shift: tl.tensor,  # log2(p)
    num_sms: tl.tensor,
    heads: tl.tensor,  # rows of programs for lengths
    searchers: tl.tensor,  # rows of programs for the schedule
    tails: tl.tensor,  # rows of programs for what is beyond the head of each row of tables
    head: tl.tensor,  # columns
    RAGGED: tl.constexpr,
    EXPANDED: tl.constexpr,
    PAGED: tl.constexpr,
    OWN_CTX_LENS: tl.constexpr,
    SCHEDULE: tl.constexpr,
    OF_REQUESTS: tl.constexpr,  # the schedule's rows are the requests
    LENGTHS: tl.constexpr,
    EARLIER: tl.constexpr,
    PORTIONS: tl.constexpr,
    TAIL_PORTIONS: tl.constexpr,
    TAIL_REQUESTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    REQUESTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,  # at least the pages that begin in a tile
) -> None:
    place = tl.program_id(0)
    turn = tl.program_id(1)
    turns = tl.num_programs(1)
    batch = (seq_lens, seq_stride, accept_lens, accept_stride, batch_size, added, tokens)
    pool = (pool_indices, pool_stride, req_to_token, token_stride)
    lists = (to_cache_seqlens, to_cu_seqlens_k, to_expanded, to_nsa_cache_seqlens, to_nsa_cu_seqlens_k)
    tables = (to_page_table, table_strides, to_real_table, real_strides)
    if place >= heads + searchers + tails:
        _fill_heads_of_rows(
            (place - heads - searchers - tails).to(tl.int64),
            turn.to(tl.int64),
            batch,
            pool,
            tables,
            tl.minimum(head, width),
            page_shift,
            turns.to(tl.int64),
            RAGGED,
            PAGED,
            EARLIER,
            REQUESTS,
            COLUMNS,
            PAGES,
        )
    elif place >= heads + searchers:
        _fill_tails_of_rows(
            (place - heads - searchers) * turns + turn,
            tails * turns,
            batch,
            pool,
            tables,
            width,
            page_shift,
            head,
            RAGGED,
            PAGED,
            TAIL_PORTIONS,
            TAIL_REQUESTS,
            COLUMNS,
            PAGES,
        )
    elif place < heads:
        block = place * turns + turn
        if block * LENGTHS < batch_size:
            _fill_lengths(
                block.to(tl.int64),
                batch,
                lists,
                to_ctx_lens,
                ctx_strides,
                index_topk,
                RAGGED,
                EXPANDED,
                OWN_CTX_LENS,
                EARLIER,
                LENGTHS,
            )
    elif SCHEDULE:
        block = (place - heads) * turns + turn
        if block * ENTRIES <= num_sms:
            _fill_schedule(
                block.to(tl.int64),
                batch,
                to_schedule,
                schedule_strides,
                num_sms,
                RAGGED,
                OF_REQUESTS,
                PORTIONS,
                ENTRIES,
            )


def fill_draft_extend_metadata_onepass(
    extend_seq_lens: Tensor,
    seq_lens: Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: Tensor,
    out_nsa_cache_seqlens: Tensor,
) -> None:
    """The ragged expansion into given int32 buffers, in one launch that may be captured: nobody waits for the device.

    ``extend_seq_lens`` and ``seq_lens`` are ``[B]``, int32 or int64, of any element stride. Rows ``off[b] + j`` of the
    outputs, contiguous and ``[>=R]``, get ``max(0, s[b] - a[b] + j + 1)`` and its minimum with ``nsa_index_topk``; rows
    past R are not touched. R is not known on the host, so outputs that are too short cannot be refused: rows that they
    do not have are left out, and with B*N rows they have all. Raises ``ValueError`` for inputs that are not 1-D, of one
    length and device, and int32 or int64, and for outputs that are not int32, 1-D, contiguous and on that device.
    """
    check_expansion(extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens)
    batch_size = extend_seq_lens.shape[0]
    with on_device(seq_lens.device):
        if batch_size:
            _expand[(triton.cdiv(batch_size, _LENGTHS),)](
                seq_lens,
                seq_lens.stride(0),
                extend_seq_lens,
                extend_seq_lens.stride(0),
                out_seqlens_expanded,
                out_nsa_cache_seqlens,
                batch_size,
                min(out_seqlens_expanded.numel(), out_nsa_cache_seqlens.numel()),
                nsa_index_topk,
                LENGTHS=_LENGTHS,
                EARLIER=_EARLIER,
                num_warps=4,
            )


@triton.jit(
    do_not_specialize=["seq_stride", "accept_stride", "batch_size", "capacity", "index_topk"],
    do_not_specialize_on_alignment=["seq_lens", "accept_lens", "out_expanded", "out_nsa_cache_seqlens"],
)
def _expand(
    seq_lens: tl.tensor,  # [B]
    seq_stride: tl.tensor,
    accept_lens: tl.tensor,  # [B]
    accept_stride: tl.tensor,
    out_expanded: tl.tensor,  # [R]
    out_nsa_cache_seqlens: tl.tensor,  # [R]
    batch_size: tl.tensor,
    capacity: tl.tensor,  # rows that the outputs have
    index_topk: tl.tensor,
    LENGTHS: tl.constexpr,
    EARLIER: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * LENGTHS
    request = first + tl.arange(0, LENGTHS)
    held = request < batch_size
    accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64)
    seq_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64)
    counted = tl.full((EARLIER,), 0, tl.int64)
    for start in range(0, first, EARLIER):
        lane = start + tl.arange(0, EARLIER).to(tl.int64)
        counted += tl.load(accept_lens + lane * accept_stride, mask=lane < first, other=0).to(tl.int64)
    row = tl.reduce(counted, 0, _SUM) + tl.associative_scan(accept, 0, _SUM) - accept
    for token in range(tl.reduce(accept, 0, _MAX)):
        defined = (token < accept) & (row + token < capacity)
        length = tl.maximum(seq_len - accept + token + 1, 0)
        tl.store(out_expanded + row + token, length, mask=defined)
        tl.store(out_nsa_cache_seqlens + row + token, tl.minimum(length, index_topk), mask=defined)
