"""``vectorized``: the uniform and the ragged expansion without a loop, in torch operations.

Every defined row is written to the full width of the tables, so no maximum is needed and nothing in the uniform modes
reads device data on the host. The ragged mode needs its row count there, and so cannot be captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_verify.core.case import CtxLens, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs, implementation


def compute_nsa_seqlens(original_seq_lens: Tensor, nsa_index_topk: int) -> Tensor:
    """The lengths ``original_seq_lens`` (any shape, int32 or int64) cut to the index top-k; a fresh int32 tensor."""
    return original_seq_lens.clamp(max=nsa_index_topk).to(torch.int32)


@implementation(
    "vectorized",
    extent=Extent.FULL,
    capturable={Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2},
    optional_outputs=OPTIONAL_OUTPUTS,
)
def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Write the metadata of every step, each from the inputs."""
    for step in steps:
        _refresh_step(inputs, step, setup)


def _refresh_step(inputs: ReplayInputs, step: MetadataBuffers, setup: Setup) -> None:
    seq_lens = inputs.seq_lens[: inputs.batch_size]
    if inputs.mode is Mode.TARGET_VERIFY:
        torch.add(seq_lens, setup.num_draft_tokens, out=step.cache_seqlens)
    else:
        step.cache_seqlens.copy_(seq_lens)
    _accumulate(step.cache_seqlens, step.cu_seqlens_k)

    owner, expanded = _expand(inputs, seq_lens, setup)  # [R], [R]
    rows = owner.shape[0]
    if rows == 0:
        step.nsa_cu_seqlens_k[:1].zero_()
        return
    if inputs.mode is not Mode.DECODE:
        step.nsa_seqlens_expanded[:rows].copy_(expanded)
    step.nsa_cache_seqlens[:rows].copy_(compute_nsa_seqlens(expanded, setup.index_topk))
    _accumulate(step.nsa_cache_seqlens[:rows], step.nsa_cu_seqlens_k)

    # index_select and not [...]: the latter may be a boolean mask for all that a capture can tell.
    pool_rows = inputs.req_pool_indices[: inputs.batch_size].index_select(0, owner)
    page_table = inputs.req_to_token[:, : setup.table_width].index_select(0, pool_rows)  # [R, W]
    step.page_table_1[:rows].copy_(page_table)
    if setup.page_size > 1:
        pages = page_table[:, :: setup.page_size]
        step.real_page_table[:rows].copy_(torch.div(pages, setup.page_size, rounding_mode="floor"))

    ctx_lens = expanded
    if setup.ctx_lens is CtxLens.OWN and inputs.mode is Mode.TARGET_VERIFY:
        ctx_lens = step.cache_seqlens
        if step.paged_mqa_ctx_lens is not None:
            step.paged_mqa_ctx_lens.copy_(ctx_lens.unsqueeze(1).expand(-1, setup.num_draft_tokens))
    if step.paged_mqa_schedule is not None:
        step.paged_mqa_schedule.copy_(_schedule(ctx_lens, setup.num_sms))


def _expand(inputs: ReplayInputs, seq_lens: Tensor, setup: Setup) -> tuple[Tensor, Tensor]:
    """For every expanded row the request that owns it, and its length before the top-k minimum."""
    batch_size, tokens, device = inputs.batch_size, setup.num_draft_tokens, seq_lens.device
    requests = torch.arange(batch_size, device=device)
    if inputs.mode is Mode.DECODE:
        return requests, seq_lens
    if inputs.mode is Mode.DRAFT_EXTEND:
        return _expand_ragged(inputs.accept_lens[:batch_size].long(), seq_lens, requests)
    # The lengths of TARGET_VERIFY do not hold the draft tokens yet, those of DRAFT_EXTEND_V2 do.
    start = seq_lens + 1 if inputs.mode is Mode.TARGET_VERIFY else seq_lens - tokens + 1
    offsets = torch.arange(tokens, device=device).tile(batch_size)
    return requests.repeat_interleave(tokens), (start.repeat_interleave(tokens) + offsets).clamp(min=0)


def _expand_ragged(accept_lens: Tensor, seq_lens: Tensor, requests: Tensor) -> tuple[Tensor, Tensor]:
    rows = int(accept_lens.sum().item())
    owner = requests.repeat_interleave(accept_lens, output_size=rows)
    # Row r of request b is its token r - off[b], so s - a + 1 + (r - off[b]) is one gathered start plus r.
    start = seq_lens - accept_lens + 1 - (accept_lens.cumsum(0) - accept_lens)
    return owner, (start.index_select(0, owner) + torch.arange(rows, device=seq_lens.device)).clamp(min=0)


def _accumulate(lengths: Tensor, out: Tensor) -> None:
    out[:1].zero_()
    torch.cumsum(lengths, dim=0, dtype=torch.int32, out=out[1 : lengths.shape[0] + 1])


def _schedule(ctx_lens: Tensor, num_sms: int) -> Tensor:
    """The contract's section 7 as one sorted search; ``[num_sms + 1, 2]`` int64."""
    rows = ctx_lens.shape[0]
    ends = torch.div(ctx_lens.long() + 255, 256, rounding_mode="floor").cumsum(0)
    boundary = torch.arange(num_sms + 1, device=ctx_lens.device)
    share = torch.div(ends[-1:], num_sms, rounding_mode="floor")
    start = boundary * share + torch.minimum(boundary, ends[-1:] - share * num_sms)
    row = torch.searchsorted(ends, start, right=True)
    before = torch.cat([torch.zeros_like(ends[:1]), ends]).index_select(0, row)
    return torch.stack([row, torch.where(row < rows, start - before, 0)], dim=1)
