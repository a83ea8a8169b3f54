"""``python-loop``: stage 0, as the engines first wrote it.

Lengths travel to the host with ``tolist``, the expanded lengths are a Python list of one ``arange`` per request, and
the page table is cut at the batch's maximum. Every step computes everything again (contract section 6, form 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_verify.core.case import CtxLens, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs, implementation


@implementation("python-loop", extent=Extent.MAX, capturable=False, optional_outputs=OPTIONAL_OUTPUTS)
def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Write the metadata of every step; reads lengths on the host, so it cannot be captured."""
    for step in steps:
        _refresh_step(inputs, step, setup)


def _refresh_step(inputs: ReplayInputs, step: MetadataBuffers, setup: Setup) -> None:
    batch_size, mode = inputs.batch_size, inputs.mode
    kv_lens, extend_lens = _host_lens(inputs, setup)
    added = setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0
    step.cache_seqlens.copy_(inputs.seq_lens[:batch_size] + added)
    _prefix_sum(step.cache_seqlens, step.cu_seqlens_k)

    rows = sum(extend_lens)
    if rows == 0:
        # torch.cat refuses an empty list, and nothing but the leading 0 is defined.
        step.nsa_cu_seqlens_k[:1].zero_()
        return

    device = step.cache_seqlens.device
    if mode is Mode.DECODE:
        expanded = step.cache_seqlens
    else:
        ranges = [
            torch.arange(kv_len - extend_len + 1, kv_len + 1, dtype=torch.int32, device=device)
            for kv_len, extend_len in zip(kv_lens, extend_lens, strict=True)
        ]
        expanded = torch.cat(ranges).clamp(min=0)
        step.nsa_seqlens_expanded[:rows].copy_(expanded)
    step.nsa_cache_seqlens[:rows].copy_(expanded.clamp(max=setup.index_topk))
    _prefix_sum(step.nsa_cache_seqlens[:rows], step.nsa_cu_seqlens_k)

    width = min(_longest(inputs, setup), setup.table_width)
    page_indices = inputs.req_to_token[inputs.req_pool_indices[:batch_size].long(), :width]
    if mode is Mode.DRAFT_EXTEND:
        page_indices = page_indices.repeat_interleave(inputs.accept_lens[:batch_size].long(), dim=0)
    elif mode is not Mode.DECODE:
        page_indices = page_indices.repeat_interleave(setup.num_draft_tokens, dim=0)
    step.page_table_1[:rows, :width].copy_(page_indices)
    if setup.page_size > 1:
        real_pages = page_indices[:, :: setup.page_size] // setup.page_size
        step.real_page_table[:rows, : real_pages.shape[1]].copy_(real_pages)

    ctx_lens = expanded.tolist()
    if setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY:
        ctx_lens = kv_lens
        if step.paged_mqa_ctx_lens is not None:
            step.paged_mqa_ctx_lens.copy_(step.cache_seqlens[:, None])
    if step.paged_mqa_schedule is not None:
        step.paged_mqa_schedule.copy_(torch.tensor(_schedule(ctx_lens, setup.num_sms), dtype=torch.int32))


def _host_lens(inputs: ReplayInputs, setup: Setup) -> tuple[list[int], list[int]]:
    """KV lengths and rows per request, on the host."""
    kv_lens: list[int] = inputs.seq_lens[: inputs.batch_size].tolist()
    if inputs.mode is Mode.DECODE:
        return kv_lens, [1] * inputs.batch_size
    if inputs.mode is Mode.DRAFT_EXTEND:
        return kv_lens, inputs.accept_lens[: inputs.batch_size].tolist()
    if inputs.mode is Mode.TARGET_VERIFY:
        kv_lens = [seq_len + setup.num_draft_tokens for seq_len in kv_lens]
    return kv_lens, [setup.num_draft_tokens] * inputs.batch_size


def _longest(inputs: ReplayInputs, setup: Setup) -> int:
    lengths = inputs.seq_lens if inputs.seq_lens_cpu is None else inputs.seq_lens_cpu
    longest = int(lengths[: inputs.batch_size].max().item())
    return longest + setup.num_draft_tokens if inputs.mode is Mode.TARGET_VERIFY else longest


def _prefix_sum(lengths: Tensor, out: Tensor) -> None:
    count = lengths.shape[0]
    out[:1].zero_()
    out[1 : count + 1].copy_(torch.cumsum(lengths, dim=0, dtype=torch.int32))


def _schedule(ctx_lens: Sequence[int], num_sms: int) -> list[tuple[int, int]]:
    """The contract's section 7, by walking the rows and the SMs side by side."""
    segments = [(length + 255) // 256 for length in ctx_lens]
    share, extra = divmod(sum(segments), num_sms)
    entries: list[tuple[int, int]] = []
    row, before = 0, 0
    for sm in range(num_sms + 1):
        start = sm * share + min(sm, extra)
        while row < len(segments) and before + segments[row] <= start:
            before += segments[row]
            row += 1
        entries.append((row, start - before if row < len(segments) else 0))
    return entries
