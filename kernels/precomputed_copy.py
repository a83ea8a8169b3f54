"""``precomputed-copy``: the metadata is computed once and copied, buffer by buffer, into every step.

Contract section 6, form 2, with individual copies. The page-table transform takes its strided columns from one cached
``arange`` per device; what is cached is the plain ``0, 1, 2, ...``, which the page size and the width only slice, so a
change of either cannot find a stale entry.

The graph form, for the uniform modes: a captured region may freeze no host value, so there the tables are copied to
their full width instead of to the batch's maximum. Nor does it share the cache: a graph would keep the address of an
``arange`` that is replaced when it grows, and what it allocates itself holds nothing until it is replayed. Ragged
DRAFT_EXTEND cannot be captured: its number of rows, R, is read on the host and is the shape of what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_verify.core.case import CtxLens, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs, implementation


@dataclass(frozen=True, slots=True)
class PrecomputedMetadata:
    """One replay's metadata, shared by all steps. Tensors are int32 and fully written; R is ``seqlens_expanded_size``.

    ``cache_seqlens`` ``[B]``; ``cu_seqlens_k`` ``[B+1]``; ``page_indices`` ``[R, max_len]``; ``real_page_table``
    ``[R, ceil(max_len/p)]``, or None where p = 1; ``seqlens_expanded`` and ``nsa_cache_seqlens`` ``[R]``;
    ``nsa_cu_seqlens_k`` ``[R+1]``. ``max_seqlen_k`` is the longest KV length, or under capture the longest that a row
    of ``req_to_token`` holds; ``max_len`` is the same clipped to W. ``mode`` is what it was computed for, or None where
    whoever made it does not say.
    """

    cache_seqlens: Tensor
    cu_seqlens_k: Tensor
    page_indices: Tensor
    real_page_table: Tensor | None
    seqlens_expanded: Tensor
    nsa_cache_seqlens: Tensor
    nsa_cu_seqlens_k: Tensor
    seqlens_expanded_size: int
    max_len: int
    max_seqlen_k: int
    mode: Mode | None = None


@implementation(
    "precomputed-copy",
    extent=Extent.FULL,
    capturable={Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2},
    optional_outputs=OPTIONAL_OUTPUTS,
)
def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Compute once and copy into every step. Reads the maximum on the host unless captured, and R in ragged batches."""
    copy_into_all(steps, precompute(inputs, setup), inputs.mode, setup)


def copy_into_all(steps: Sequence[MetadataBuffers], precomputed: PrecomputedMetadata, mode: Mode, setup: Setup) -> None:
    """Place ``precomputed`` in every step's buffers, and what derives from it: own ctx lens, and the schedule."""
    own_ctx_lens = setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY
    schedule = None
    if setup.schedule and precomputed.seqlens_expanded_size:
        ctx_lens = precomputed.cache_seqlens if own_ctx_lens else precomputed.seqlens_expanded
        schedule = _schedule(ctx_lens, setup.num_sms)
    for step in steps:
        copy_into(step, precomputed, mode)
        if own_ctx_lens and step.paged_mqa_ctx_lens is not None:
            step.paged_mqa_ctx_lens.copy_(precomputed.cache_seqlens.view(-1, 1))
        if schedule is not None and step.paged_mqa_schedule is not None:
            step.paged_mqa_schedule.copy_(schedule)


def precompute(inputs: ReplayInputs, setup: Setup) -> PrecomputedMetadata:
    """What every step of this replay shares, in fresh tensors: no step's buffer is read or referred to."""
    batch_size, mode, tokens = inputs.batch_size, inputs.mode, setup.num_draft_tokens
    added = tokens if mode is Mode.TARGET_VERIFY else 0
    cache_seqlens = (inputs.seq_lens[:batch_size] + added).to(torch.int32)
    capturing = _is_capturing()
    if capturing:
        max_seqlen_k = inputs.req_to_token.shape[1]
    else:
        lengths = cache_seqlens if inputs.seq_lens_cpu is None else inputs.seq_lens_cpu[:batch_size] + added
        max_seqlen_k = int(lengths.max())
    max_len = min(max_seqlen_k, setup.table_width)

    owner, expanded = _expanded_rows(inputs, cache_seqlens, tokens)
    clamped = expanded.clamp(max=setup.index_topk)
    pool_rows = inputs.req_pool_indices[:batch_size].to(torch.int64).index_select(0, owner)
    page_indices = inputs.req_to_token[:, :max_len].index_select(0, pool_rows)
    real_page_table = None
    if setup.page_size > 1:
        device = cache_seqlens.device
        columns = torch.arange(max_len, device=device) if capturing else _columns(max_len, device)
        strided = columns[:: setup.page_size]
        real_page_table = page_indices.index_select(1, strided).div(setup.page_size, rounding_mode="floor")
    return PrecomputedMetadata(
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=pad(cache_seqlens.cumsum(0, dtype=torch.int32), (1, 0)),
        page_indices=page_indices,
        real_page_table=real_page_table,
        seqlens_expanded=expanded,
        nsa_cache_seqlens=clamped,
        nsa_cu_seqlens_k=pad(clamped.cumsum(0, dtype=torch.int32), (1, 0)),
        seqlens_expanded_size=expanded.shape[0],
        max_len=max_len,
        max_seqlen_k=max_seqlen_k,
        mode=mode,
    )


def copy_into(step: MetadataBuffers, precomputed: PrecomputedMetadata, mode: Mode) -> None:
    """Place ``precomputed`` in one step's buffers, the leading 0 of both prefix sums included."""
    rows = precomputed.seqlens_expanded_size
    step.cache_seqlens.copy_(precomputed.cache_seqlens)
    step.cu_seqlens_k.copy_(precomputed.cu_seqlens_k)
    step.nsa_cu_seqlens_k[: rows + 1].copy_(precomputed.nsa_cu_seqlens_k)
    if rows == 0:
        return
    if mode is not Mode.DECODE:
        # In DECODE it is the memory of cache_seqlens, which holds it already.
        step.nsa_seqlens_expanded[:rows].copy_(precomputed.seqlens_expanded)
    step.nsa_cache_seqlens[:rows].copy_(precomputed.nsa_cache_seqlens)
    step.page_table_1[:rows, : precomputed.max_len].copy_(precomputed.page_indices)
    if precomputed.real_page_table is not None:
        pages = precomputed.real_page_table.shape[1]
        step.real_page_table[:rows, :pages].copy_(precomputed.real_page_table)


def _expanded_rows(inputs: ReplayInputs, cache_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The owner ``[R]`` (int64) and the length ``[R]`` (int32, before the top-k minimum) of every expanded row."""
    batch_size, device = inputs.batch_size, cache_seqlens.device
    if inputs.mode is Mode.DECODE:
        return torch.arange(batch_size, device=device), cache_seqlens
    if inputs.mode is Mode.DRAFT_EXTEND:
        ends = inputs.accept_lens[:batch_size].cumsum(0)
        row = torch.arange(int(ends[-1]), device=device)
        owner = torch.bucketize(row, ends, right=True)
        remaining = ends[owner] - row - 1  # tokens of the same request behind this one
        return owner, (cache_seqlens[owner] - remaining).clamp(min=0).to(torch.int32)
    # cache_seqlens holds the draft tokens in both uniform modes, so one row serves both: N-1, ..., 1, 0 behind it.
    behind = torch.arange(tokens - 1, -1, -1, dtype=torch.int32, device=device)
    expanded = (cache_seqlens[:, None] - behind[None, :]).clamp(min=0).reshape(-1)
    return torch.arange(batch_size * tokens, device=device).div(tokens, rounding_mode="floor"), expanded


def _is_capturing() -> bool:
    """Whether this runs inside a captured region; a build of torch without CUDA raises instead of saying no."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:
        return False


_cached_columns: dict[torch.device, Tensor] = {}


def _columns(count: int, device: torch.device) -> Tensor:
    """``0, 1, ..., count - 1`` from the device's cached arange, which grows by doubling."""
    cached = _cached_columns.get(device)
    if cached is None or cached.shape[0] < count:
        held = 0 if cached is None else cached.shape[0]
        cached = torch.arange(max(count, 2 * held, 1024), device=device)
        _cached_columns[device] = cached
    return cached[:count]


def _schedule(ctx_lens: Tensor, num_sms: int) -> Tensor:
    """The contract's section 7 by counting: a boundary's row is how many rows end at or before it."""
    segments = (ctx_lens.to(torch.int64) + 255).bitwise_right_shift(8)
    ends = segments.cumsum(0)
    total = ends[-1]
    share = total.div(num_sms, rounding_mode="floor")
    boundary = torch.arange(num_sms + 1, device=ctx_lens.device)
    start = boundary * share + boundary.clamp(max=total - share * num_sms)
    done = ends[None, :] <= start[:, None]  # [num_sms + 1, R]
    offset = torch.where(start < total, start - (segments * done).sum(1), 0)
    return torch.stack((done.sum(1), offset), dim=1)
