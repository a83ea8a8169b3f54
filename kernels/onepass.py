"""``onepass``: from the inputs to every buffer of all steps in one launch, in each of the four modes.

Nothing is read on the host, nothing allocated, and the grid depends on what is frozen at capture alone. This is form 3
of the contract's section 6: a row's slots are read once and written to all its expanded rows of all steps, without an
intermediate.

Three kinds of programs share the launch, none waits for another, and each reads the inputs only. The first ones write
the lengths and their prefix sums, the next ones the schedule where one is kept, the others the tables: each takes a
block of requests and, in turn with its neighbours, tiles of their columns up to the live prefix. No row looks for its
request: a request knows its rows, which begin behind those of the requests before it; that sum is a product in the
uniform modes, and in ragged batches a vector load and a reduction for every 256 requests before it.

All four modes are one formula: with the KV length ``k`` (the draft tokens included) and ``a`` rows of a request (1 in
DECODE, N in the uniform modes), row ``j`` of these has ``max(0, k - a + j + 1)`` tokens. With ``F(x)``, the sum of
``min(t, K)`` over ``t = 1..x``, their lengths after the top-k minimum sum to ``F(k) - F(k - a)``.

Addresses and sums are 64 bit. Nothing that varies with the batch is a ``constexpr``, and integers are not specialised
on. Addresses are, since Triton has no way to leave that out for those in a tuple: a buffer that does not begin at a
multiple of 16 bytes, as what torch allocates does, is another compilation. Functions called within the kernel are few,
since the interpreter pays a millisecond for each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_verify.core.case import CtxLens, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs, implementation

_LENGTHS = 32
"""Requests per program that writes lengths, usually."""
_EARLIER = 256
"""Requests that are summed at a time."""
_SEARCHED = 32
"""Requests that entries of the schedule are compared with at a time."""
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
    heads = triton.cdiv(batch_size, shape.lengths)
    searchers = triton.cdiv(setup.num_sms + 1, shape.entries) if schedules else 0
    _refresh[(heads + searchers + triton.cdiv(batch_size, shape.requests), shape.turns)](
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
        RAGGED=mode is Mode.DRAFT_EXTEND,
        EXPANDED=bool(expanded),
        PAGED=bool(real_tables),
        OWN_CTX_LENS=bool(ctx_lens),
        SCHEDULE=bool(schedules),
        OF_REQUESTS=own_ctx_lens,
        LENGTHS=shape.lengths,
        EARLIER=_EARLIER,
        SEARCHED=_SEARCHED,
        ENTRIES=shape.entries,
        REQUESTS=shape.requests,
        COLUMNS=shape.columns,
        PAGES=max(shape.columns // 16, 1),
        num_warps=2,
    )


class _Shape(NamedTuple):
    requests: int
    """Of a tile."""
    columns: int
    """Of a tile."""
    turns: int
    """Programs along a row."""
    lengths: int
    """Requests per program that writes lengths."""
    entries: int
    """Entries of the schedule per program."""


def _shape(batch_size: int, setup: Setup, seq_lens: Tensor, steps: int) -> _Shape:
    """How the work is shared out: from what is frozen at capture alone.

    A program without live columns costs its launch and the wait for one length, a program with many makes the others
    wait for its last store; docs/performance.md has the measurements. The interpreter takes as long for a large tile as
    for a small one.
    """
    if not seq_lens.is_cuda:
        return _Shape(16, 128, min(triton.cdiv(setup.table_width, 128), 2), _LENGTHS, 32)
    columns, programs = (512, 1584) if steps == 1 else (256, 528)
    lengths = _LENGTHS if steps <= 4 else 8
    turns = max(min(triton.cdiv(setup.table_width, columns), programs // batch_size), 1)
    return _Shape(1, columns, turns, lengths, 4)


def _strides(destinations: Sequence[Tensor]) -> tuple[int, ...]:
    """Row strides s as 2s + 1; a single one if all steps have the same, which saves registers.

    Triton specialises integers in a tuple, whatever ``do_not_specialize`` says, on being 1 and on being a multiple of
    16; 2s + 1 is neither, so that a stride chooses no compilation.
    """
    strides = tuple(2 * destination.stride(0) + 1 for destination in destinations)
    return strides[:1] if len(set(strides)) == 1 else strides


@triton.jit
def _fill_tables(
    block: tl.tensor,
    batch: tl.tuple,
    first_column: tl.tensor,  # of this program; its next tile is all_columns further
    all_columns: tl.tensor,
    pool_indices: tl.tensor,
    pool_stride: tl.tensor,
    req_to_token: tl.tensor,
    token_stride: tl.tensor,
    to_page_table: tl.tuple,
    table_strides: tl.tuple,
    to_real_table: tl.tuple,
    real_strides: tl.tuple,
    width: tl.tensor,
    page_shift: tl.tensor,
    RAGGED: tl.constexpr,
    PAGED: tl.constexpr,
    EARLIER: tl.constexpr,
    REQUESTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,
) -> None:
    # Tables: REQUESTS requests from the block's first, COLUMNS columns at a time.
    seq_lens, seq_stride, accept_lens, accept_stride, batch_size, added, tokens = batch
    first = block * REQUESTS
    request = first + tl.arange(0, REQUESTS)
    held = request < batch_size
    kv_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64) + added
    pool_row = tl.load(pool_indices + request * pool_stride, mask=held, other=0).to(tl.int64)
    reach = tl.where(held, tl.minimum(kv_len, width), 0)
    if RAGGED:
        accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64)
        reach = tl.where(accept > 0, reach, 0)
        copies = tl.reduce(accept, 0, _MAX)
        # Asked for here, so that it is there with the first slots.
        lane = tl.arange(0, EARLIER).to(tl.int64)
        counted = tl.load(accept_lens + lane * accept_stride, mask=lane < first, other=0)
    else:
        accept = tl.full((REQUESTS,), 0, tl.int64) + tokens
        copies = tokens
    start = first_column
    end = tl.reduce(reach, 0, _MAX)
    if start < end:
        source = (req_to_token + pool_row * token_stride)[:, None]
        offset = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        slot = tl.load(source + start + offset, mask=start + offset < reach[:, None])  # [REQUESTS, COLUMNS]
        # The first slots are on their way while it is found out where they go.
        if RAGGED:
            before = tl.reduce(counted, 0, _SUM).to(tl.int64)
            for earlier in range(EARLIER, first, EARLIER):
                counted = tl.load(accept_lens + (earlier + lane) * accept_stride, mask=earlier + lane < first, other=0)
                before += tl.reduce(counted, 0, _SUM)
            row = before + tl.associative_scan(accept, 0, _SUM) - accept
        else:
            row = request * tokens
        while start < end:
            column = start + offset
            live = column < reach[:, None]
            if PAGED:
                # Page c begins in column c*p; the first that does so in this tile is rounded up to.
                page = (start + (1 << page_shift) - 1 >> page_shift) + tl.arange(0, PAGES).to(tl.int64)[None, :]
                leader = page << page_shift
                leads = (leader < reach[:, None]) & (leader < start + COLUMNS)  # [REQUESTS, PAGES]
                page_slot = tl.load(source + leader, mask=leads) >> page_shift
            for copy in tl.range(0, copies, disable_licm=True):
                copied = (row + copy)[:, None]
                wanted = (accept > copy)[:, None]
                for step in tl.static_range(len(to_page_table)):
                    stride = table_strides[step if len(table_strides) > 1 else 0]
                    target = to_page_table[step] + (copied * stride - copied >> 1)
                    tl.store(target + column, slot, mask=live & wanted)
                if PAGED:
                    for step in tl.static_range(len(to_real_table)):
                        stride = real_strides[step if len(real_strides) > 1 else 0]
                        target = to_real_table[step] + (copied * stride - copied >> 1)
                        tl.store(target + page, page_slot, mask=leads & wanted)
            start += all_columns
            slot = tl.load(source + start + offset, mask=start + offset < reach[:, None])


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
    to_cache_seqlens: tl.tuple,
    to_cu_seqlens_k: tl.tuple,
    to_expanded: tl.tuple,
    to_nsa_cache_seqlens: tl.tuple,
    to_nsa_cu_seqlens_k: tl.tuple,
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
    seq_lens, seq_stride, accept_lens, accept_stride, batch_size, added, tokens = batch
    first = block * LENGTHS
    rows = tl.full((), 0, tl.int64)
    kv_sum = tl.full((), 0, tl.int64)
    nsa_sum = tl.full((), 0, tl.int64)
    for start in range(0, first, EARLIER):
        lane = start + tl.arange(0, EARLIER).to(tl.int64)
        held = lane < first
        kv_len = tl.load(seq_lens + lane * seq_stride, mask=held, other=0).to(tl.int64)
        kv_len += tl.where(held, added, 0)
        if RAGGED:
            accept = tl.load(accept_lens + lane * accept_stride, mask=held, other=0).to(tl.int64)
        else:
            accept = tl.where(held, tokens, 0)
        rows += tl.reduce(accept, 0, _SUM)
        kv_sum += tl.reduce(kv_len, 0, _SUM)
        nsa_sum += tl.reduce(_clamped_sum(kv_len, accept, index_topk), 0, _SUM)
    request = first + tl.arange(0, LENGTHS)
    held = request < batch_size
    kv_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64) + added
    if RAGGED:
        accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64)
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
    SEARCHED: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    # ENTRIES entries: each counts the requests that end at or before it, and then the rows of the next one.
    seq_lens, seq_stride, accept_lens, accept_stride, batch_size, added, tokens = batch
    lane = tl.arange(0, SEARCHED).to(tl.int64)
    total = tl.full((), 0, tl.int64)
    rows = tl.full((), 0, tl.int64)
    for start in range(0, batch_size, SEARCHED):
        request = lane + start
        held = request < batch_size
        accept, segments = _segments(batch, request, held, RAGGED, OF_REQUESTS)
        total += tl.reduce(segments, 0, _SUM)
        rows += tl.reduce(accept, 0, _SUM)
    if OF_REQUESTS:
        rows = tl.full((), 0, tl.int64) + batch_size
    entry = block * ENTRIES + tl.arange(0, ENTRIES)
    share = total // num_sms
    begin = entry * share + tl.minimum(entry, total - share * num_sms)
    owner = tl.full((ENTRIES,), 0, tl.int64)
    row = tl.full((ENTRIES,), 0, tl.int64)
    passed = tl.full((ENTRIES,), 0, tl.int64)
    end = tl.full((), 0, tl.int64)
    for start in range(0, batch_size, SEARCHED):
        request = lane + start
        held = request < batch_size
        accept, segments = _segments(batch, request, held, RAGGED, OF_REQUESTS)
        ends = end + tl.associative_scan(segments, 0, _SUM)
        done = (held[None, :] & (ends[None, :] <= begin[:, None])).to(tl.int64)  # [ENTRIES, SEARCHED]
        owner += tl.reduce(done, 1, _SUM)
        row += tl.reduce(done * accept[None, :], 1, _SUM)
        passed += tl.reduce(done * segments[None, :], 1, _SUM)
        end += tl.reduce(segments, 0, _SUM)
    if OF_REQUESTS:
        row = owner
    else:
        held = owner < batch_size
        kv_len = tl.load(seq_lens + owner * seq_stride, mask=held, other=0).to(tl.int64) + added
        if RAGGED:
            accept = tl.load(accept_lens + owner * accept_stride, mask=held, other=0).to(tl.int64)
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
    tokens: tl.tensor,  # rows of a request, if not RAGGED
    index_topk: tl.tensor,
    width: tl.tensor,
    page_shift: tl.tensor,  # log2(p)
    num_sms: tl.tensor,
    heads: tl.tensor,  # programs for lengths
    searchers: tl.tensor,  # programs for the schedule
    RAGGED: tl.constexpr,
    EXPANDED: tl.constexpr,
    PAGED: tl.constexpr,
    OWN_CTX_LENS: tl.constexpr,
    SCHEDULE: tl.constexpr,
    OF_REQUESTS: tl.constexpr,  # the schedule's rows are the requests
    LENGTHS: tl.constexpr,
    EARLIER: tl.constexpr,
    SEARCHED: tl.constexpr,
    ENTRIES: tl.constexpr,
    REQUESTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGES: tl.constexpr,  # at least the pages that begin in a tile
) -> None:
    program = tl.program_id(0)
    turn = tl.program_id(1)
    batch = (seq_lens, seq_stride, accept_lens, accept_stride, batch_size, added, tokens)
    if program >= heads + searchers:
        block = (program - heads - searchers).to(tl.int64)
        first_column = turn.to(tl.int64) * COLUMNS
        all_columns = tl.num_programs(1) * COLUMNS
        _fill_tables(
            block,
            batch,
            first_column,
            all_columns,
            pool_indices,
            pool_stride,
            req_to_token,
            token_stride,
            to_page_table,
            table_strides,
            to_real_table,
            real_strides,
            width,
            page_shift,
            RAGGED,
            PAGED,
            EARLIER,
            REQUESTS,
            COLUMNS,
            PAGES,
        )
    elif turn == 0:
        if program < heads:
            block = program.to(tl.int64)
            _fill_lengths(
                block,
                batch,
                to_cache_seqlens,
                to_cu_seqlens_k,
                to_expanded,
                to_nsa_cache_seqlens,
                to_nsa_cu_seqlens_k,
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
            block = (program - heads).to(tl.int64)
            _fill_schedule(
                block,
                batch,
                to_schedule,
                schedule_strides,
                num_sms,
                RAGGED,
                OF_REQUESTS,
                SEARCHED,
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
    past R are not touched. R is not known on the host, so outputs that are too short cannot be refused: they must hold
    B*N rows. Raises ``ValueError`` for outputs that are not int32, 1-D and contiguous.
    """
    for name, out in (("out_seqlens_expanded", out_seqlens_expanded), ("out_nsa_cache_seqlens", out_nsa_cache_seqlens)):
        if out.dtype is not torch.int32 or out.dim() != 1 or not out.is_contiguous():
            raise ValueError(f"{name} is {out.dtype} of shape {list(out.shape)}, not contiguous, 1-D and int32")
    batch_size = extend_seq_lens.shape[0]
    if batch_size:
        _expand[(triton.cdiv(batch_size, _LENGTHS),)](
            seq_lens,
            seq_lens.stride(0),
            extend_seq_lens,
            extend_seq_lens.stride(0),
            out_seqlens_expanded,
            out_nsa_cache_seqlens,
            batch_size,
            nsa_index_topk,
            LENGTHS=_LENGTHS,
            EARLIER=_EARLIER,
            num_warps=4,
        )


@triton.jit(
    do_not_specialize=["seq_stride", "accept_stride", "batch_size", "index_topk"],
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
    index_topk: tl.tensor,
    LENGTHS: tl.constexpr,
    EARLIER: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * LENGTHS
    request = first + tl.arange(0, LENGTHS)
    held = request < batch_size
    accept = tl.load(accept_lens + request * accept_stride, mask=held, other=0).to(tl.int64)
    seq_len = tl.load(seq_lens + request * seq_stride, mask=held, other=0).to(tl.int64)
    rows = tl.full((), 0, tl.int64)
    for start in range(0, first, EARLIER):
        lane = start + tl.arange(0, EARLIER).to(tl.int64)
        counted = tl.load(accept_lens + lane * accept_stride, mask=lane < first, other=0)
        rows += tl.reduce(counted.to(tl.int64), 0, _SUM)
    row = rows + tl.associative_scan(accept, 0, _SUM) - accept
    for token in range(tl.reduce(accept, 0, _MAX)):
        defined = token < accept
        length = tl.maximum(seq_len - accept + token + 1, 0)
        tl.store(out_expanded + row + token, length, mask=defined)
        tl.store(out_nsa_cache_seqlens + row + token, tl.minimum(length, index_topk), mask=defined)
