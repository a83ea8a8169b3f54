"""``triton-fused``: stage 1. One Triton kernel returns the expanded lengths in fresh tensors, which are then copied.

The ragged kernel takes the prefix sum of the accept lengths on the device and gives each output row a lane, which
searches for its request. Page tables are torch gathers up to the batch's maximum. The row count and the maximum are
fetched to the host, so this form cannot be captured.

Arithmetic is 64 bit throughout: no product can overflow, and Triton's interpreter, which checks every 32-bit operation
for overflow, runs several times faster. Nothing that varies with the batch is a ``constexpr``.
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

_ROWS = 128
"""Output rows per program, a lane each."""
_REQUESTS = 32
"""Requests that a program's search takes at a time."""

# tl.sum and its like are functions of Triton code, and the interpreter patches the whole language at every such call
# (0.8 ms); their combine functions given to tl.reduce are not called at all there.
_SUM = tl.standard._sum_combine
_MAX = tl.standard._elementwise_max


@triton.jit(
    do_not_specialize=["extend_stride", "seq_stride", "batch_size", "rows", "index_topk"],
    do_not_specialize_on_alignment=["extend_lens", "seq_lens", "out_expanded", "out_clamped"],
)
def _expand_ragged(
    extend_lens: tl.tensor,  # [B]
    extend_stride: tl.tensor,
    seq_lens: tl.tensor,  # [B]
    seq_stride: tl.tensor,
    out_expanded: tl.tensor,  # [R]
    out_clamped: tl.tensor,  # [R]
    batch_size: tl.tensor,
    rows: tl.tensor,
    index_topk: tl.tensor,
    ROWS: tl.constexpr,
    REQUESTS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, REQUESTS).to(tl.int64)
    owner = tl.full((ROWS,), 0, tl.int64)
    first = tl.full((ROWS,), 0, tl.int64)
    total = tl.full((), 0, tl.int64)
    for start in range(0, batch_size, REQUESTS):
        request = lane + start
        lens = tl.load(extend_lens + request * extend_stride, mask=request < batch_size, other=0).to(tl.int64)
        ends = tl.associative_scan(lens, 0, _SUM) + total
        # Lanes past the batch repeat the total, which no row in use has reached.
        done = ends[None, :] <= row[:, None]  # [ROWS, REQUESTS]
        owner += tl.reduce(done.to(tl.int64), 1, _SUM)
        first = tl.maximum(first, tl.reduce(tl.where(done, ends[None, :], 0), 1, _MAX))
        total += tl.reduce(lens, 0, _SUM)
    used = row < rows
    seq_len = tl.load(seq_lens + owner * seq_stride, mask=used, other=0).to(tl.int64)
    extend_len = tl.load(extend_lens + owner * extend_stride, mask=used, other=0).to(tl.int64)
    expanded = tl.maximum(seq_len - extend_len + (row - first) + 1, 0)
    tl.store(out_expanded + row, expanded, mask=used)
    tl.store(out_clamped + row, tl.minimum(expanded, index_topk), mask=used)


@triton.jit(
    do_not_specialize=["seq_stride", "rows", "tokens", "shift", "index_topk"],
    do_not_specialize_on_alignment=["seq_lens", "out_expanded", "out_clamped"],
)
def _expand_uniform(
    seq_lens: tl.tensor,  # [B]
    seq_stride: tl.tensor,
    out_expanded: tl.tensor,  # [B*N]
    out_clamped: tl.tensor,  # [B*N]
    rows: tl.tensor,
    tokens: tl.tensor,
    shift: tl.tensor,
    index_topk: tl.tensor,
    ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = row < rows
    owner = row // tokens
    seq_len = tl.load(seq_lens + owner * seq_stride, mask=used, other=0).to(tl.int64)
    expanded = tl.maximum(seq_len + (row - owner * tokens) + shift, 0)
    tl.store(out_expanded + row, expanded, mask=used)
    tl.store(out_clamped + row, tl.minimum(expanded, index_topk), mask=used)


def fill_draft_extend_metadata_fused_simple(
    extend_seq_lens: Tensor, seq_lens: Tensor, nsa_index_topk: int
) -> tuple[Tensor, Tensor]:
    """The ragged expansion in fresh tensors: ``(seqlens_expanded, nsa_cache_seqlens)``, both int32 ``[R]``.

    ``extend_seq_lens`` and ``seq_lens`` are ``[B]``, int32 or int64, of any element stride; R is the sum of the former.
    Row ``off[b] + j`` is ``max(0, s[b] - a[b] + j + 1)``, and its minimum with ``nsa_index_topk``. Waits for the
    device once, to learn R. Raises ``ValueError`` for inputs of other shapes or dtypes, and where the two differ in
    length or device.
    """
    check_expansion(extend_seq_lens, seq_lens)
    rows = int(extend_seq_lens.sum().item())
    expanded = torch.empty(rows, dtype=torch.int32, device=seq_lens.device)
    clamped = torch.empty_like(expanded)
    if rows == 0:
        return expanded, clamped
    with on_device(seq_lens.device):
        _expand_ragged[(triton.cdiv(rows, _ROWS),)](
            extend_seq_lens,
            extend_seq_lens.stride(0),
            seq_lens,
            seq_lens.stride(0),
            expanded,
            clamped,
            extend_seq_lens.shape[0],
            rows,
            nsa_index_topk,
            ROWS=_ROWS,
            REQUESTS=_REQUESTS,
            num_warps=8,
        )
    return expanded, clamped


def _fused_uniform(seq_lens: Tensor, tokens: int, shift: int, index_topk: int) -> tuple[Tensor, Tensor]:
    """``max(0, s[b] + j + shift)`` for ``j < tokens``, and its minimum with ``index_topk``, in fresh tensors."""
    rows = seq_lens.shape[0] * tokens
    expanded = torch.empty(rows, dtype=torch.int32, device=seq_lens.device)
    clamped = torch.empty_like(expanded)
    _expand_uniform[(triton.cdiv(rows, _ROWS),)](
        seq_lens, seq_lens.stride(0), expanded, clamped, rows, tokens, shift, index_topk, ROWS=_ROWS
    )
    return expanded, clamped


@implementation("triton-fused", extent=Extent.MAX, capturable=False, optional_outputs=OPTIONAL_OUTPUTS)
def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Compute the lengths in one launch, and copy them into every step."""
    seq_lens = inputs.seq_lens[: inputs.batch_size]
    expanded, clamped = _expand(inputs, seq_lens, setup)
    kv_lens = seq_lens + setup.num_draft_tokens if inputs.mode is Mode.TARGET_VERIFY else seq_lens
    rows = expanded.shape[0]
    longest = _longest(inputs, kv_lens, setup)
    page_table = _gather_pages(inputs, rows, min(longest, setup.table_width), setup)
    own_ctx_lens = setup.ctx_lens is CtxLens.OWN and inputs.mode is Mode.TARGET_VERIFY
    for step in steps:
        step.cache_seqlens.copy_(kv_lens)
        step.cu_seqlens_k[0].zero_()
        step.cu_seqlens_k[1:].copy_(kv_lens.cumsum(0))
        step.nsa_cu_seqlens_k[0].zero_()
        if rows == 0:
            continue
        if inputs.mode is not Mode.DECODE:
            step.nsa_seqlens_expanded[:rows].copy_(expanded)
        step.nsa_cache_seqlens[:rows].copy_(clamped)
        step.nsa_cu_seqlens_k[1 : rows + 1].copy_(clamped.cumsum(0))
        step.page_table_1[:rows, : page_table.shape[1]].copy_(page_table)
        if setup.page_size > 1:
            pages = page_table[:, :: setup.page_size] // setup.page_size
            step.real_page_table[:rows, : pages.shape[1]].copy_(pages)
        if own_ctx_lens and step.paged_mqa_ctx_lens is not None:
            step.paged_mqa_ctx_lens.copy_(kv_lens.view(-1, 1).expand(-1, setup.num_draft_tokens))
        if step.paged_mqa_schedule is not None:
            _fill_schedule(kv_lens if own_ctx_lens else expanded, step.paged_mqa_schedule, setup.num_sms)


def _expand(inputs: ReplayInputs, seq_lens: Tensor, setup: Setup) -> tuple[Tensor, Tensor]:
    if inputs.mode is Mode.DRAFT_EXTEND:
        accept_lens = inputs.accept_lens[: inputs.batch_size]
        return fill_draft_extend_metadata_fused_simple(accept_lens, seq_lens, setup.index_topk)
    tokens, shift = {
        Mode.DECODE: (1, 0),
        Mode.TARGET_VERIFY: (setup.num_draft_tokens, 1),
        Mode.DRAFT_EXTEND_V2: (setup.num_draft_tokens, 1 - setup.num_draft_tokens),
    }[inputs.mode]
    return _fused_uniform(seq_lens, tokens, shift, setup.index_topk)


def _longest(inputs: ReplayInputs, kv_lens: Tensor, setup: Setup) -> int:
    if inputs.seq_lens_cpu is None:
        return int(kv_lens.amax().item())
    added = setup.num_draft_tokens if inputs.mode is Mode.TARGET_VERIFY else 0
    return int(inputs.seq_lens_cpu[: inputs.batch_size].amax().item()) + added


def _gather_pages(inputs: ReplayInputs, rows: int, width: int, setup: Setup) -> Tensor:
    """The first ``width`` columns of every expanded row, ``[R, width]``."""
    pool_rows = inputs.req_pool_indices[: inputs.batch_size].to(torch.int64)
    if inputs.mode is Mode.DRAFT_EXTEND:
        repeats = inputs.accept_lens[: inputs.batch_size].to(torch.int64)
        pool_rows = torch.repeat_interleave(pool_rows, repeats, output_size=rows)
    elif inputs.mode is not Mode.DECODE:
        pool_rows = torch.repeat_interleave(pool_rows, setup.num_draft_tokens)
    return inputs.req_to_token.narrow(1, 0, width)[pool_rows]


def _fill_schedule(ctx_lens: Tensor, out: Tensor, num_sms: int) -> None:
    """The contract's section 7 from a list of all segments: an SM's entry is the segment at its start."""
    rows = ctx_lens.shape[0]
    counts = ((ctx_lens + 255) // 256).to(torch.int64)
    row_of = torch.repeat_interleave(counts)  # [total]
    total = row_of.shape[0]
    sm = torch.arange(num_sms + 1, device=ctx_lens.device)
    start = sm * (total // num_sms) + sm.clamp(max=total % num_sms)
    inside = start < total
    if total == 0:
        out[:, 0].fill_(rows)
        out[:, 1].zero_()
        return
    row = row_of[start.clamp(max=total - 1)]
    before = counts.cumsum(0) - counts
    out[:, 0].copy_(torch.where(inside, row, rows))
    out[:, 1].copy_(torch.where(inside, start - before[row], 0))
