"""Implementations to judge: one that is right in every mode, and the same with one thing wrong.

``subject()`` is right. ``subject(bug)`` runs the right refresh and then ``bug``, a function of the same arguments that
spoils one thing; ``subject(before=bug)`` runs it ahead; ``bare`` takes a refresh that is wrong as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nsa_verify import Extent, Implementation, MetadataBuffers, Mode, ReplayInputs, Setup
from nsa_verify.core.case import CtxLens
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Refresh
from nsa_verify.kernels import vectorized

Steps = Sequence[MetadataBuffers]
Bug = Callable[[ReplayInputs, Steps, Setup], object]


def subject(
    bug: Bug | None = None,
    *,
    before: Bug | None = None,
    modes: Sequence[Mode] = tuple(Mode),
    extent: Extent = Extent.LIVE,
    block: int = 128,
    host_lengths: bool = False,
    optional_outputs: frozenset[str] = OPTIONAL_OUTPUTS,
) -> Implementation:
    """The right implementation; with ``before`` run ahead of it and ``bug`` after it."""

    return bare(
        _between(before, right, bug),
        modes=modes,
        extent=extent,
        block=block,
        host_lengths=host_lengths,
        optional_outputs=optional_outputs,
    )


def _between(before: Bug | None, refresh: Refresh, bug: Bug | None) -> Refresh:
    def spoilt(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        if before is not None:
            before(inputs, steps, setup)
        refresh(inputs, steps, setup)
        if bug is not None:
            bug(inputs, steps, setup)

    return spoilt


def bare(
    refresh: Refresh,
    *,
    modes: Sequence[Mode] = tuple(Mode),
    extent: Extent = Extent.LIVE,
    block: int = 128,
    host_lengths: bool = False,
    optional_outputs: frozenset[str] = OPTIONAL_OUTPUTS,
) -> Implementation:
    """``refresh`` as an implementation called ``subject``, without a place in the registry."""
    code = getattr(refresh, "__code__", None)
    return Implementation(
        name="subject",
        refresh=refresh,
        modes=frozenset(modes),
        extent=extent,
        block=block,
        capturable=frozenset(),
        host_lengths=host_lengths,
        optional_outputs=optional_outputs,
        source=f"{code.co_filename}:{code.co_firstlineno}" if code else "",
    )


CAPTURABLE_MODES = (Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2)


def capturable(
    bug: Bug | None = None,
    *,
    before: Bug | None = None,
    refresh: Refresh = vectorized.refresh,
    modes: Sequence[Mode] = CAPTURABLE_MODES,
    host_lengths: bool = False,
) -> Implementation:
    """``refresh``, by default one that is right and capturable, with ``before`` ahead of it and ``bug`` after it."""

    made = bare(_between(before, refresh, bug), modes=modes, extent=Extent.FULL, host_lengths=host_lengths)
    blamed = (bug or before or refresh).__code__.co_filename
    return replace(made, capturable=frozenset(modes), source=f"{blamed}:1")


def right(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    """CONTRACT section 2, one number at a time; writes the live region and nothing else."""
    size, mode, tokens = inputs.batch_size, inputs.mode, setup.num_draft_tokens
    seq_lens: list[int] = inputs.seq_lens[:size].tolist()
    pool_rows: list[int] = inputs.req_pool_indices[:size].tolist()
    rows = [1 if mode is Mode.DECODE else tokens] * size
    if mode is Mode.DRAFT_EXTEND:
        rows = inputs.accept_lens[:size].tolist()
    kv_lens = [length + tokens if mode is Mode.TARGET_VERIFY else length for length in seq_lens]
    owners = [request for request in range(size) for _ in range(rows[request])]
    expanded = [
        max(0, kv_len - count + token + 1)
        for kv_len, count in zip(kv_lens, rows, strict=True)
        for token in range(count)
    ]
    clamped = [min(length, setup.index_topk) for length in expanded]
    for step in steps:
        _put(step.cache_seqlens, kv_lens)
        _put(step.cu_seqlens_k, _sums(kv_lens))
        _put(step.nsa_cu_seqlens_k, _sums(clamped))
        if not owners:
            continue
        _put(step.nsa_seqlens_expanded, expanded)
        _put(step.nsa_cache_seqlens, clamped)
        for row, owner in enumerate(owners):
            slots = inputs.req_to_token[pool_rows[owner], : min(kv_lens[owner], setup.table_width)]
            pages = slots[:: setup.page_size] // setup.page_size
            step.page_table_1[row, : slots.shape[0]].copy_(slots)
            step.real_page_table[row, : pages.shape[0]].copy_(pages)
        own = setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY
        if own and step.paged_mqa_ctx_lens is not None:
            step.paged_mqa_ctx_lens.copy_(torch.tensor(kv_lens)[:, None])
        if step.paged_mqa_schedule is not None:
            entries = _schedule(kv_lens if own else expanded, setup.num_sms)
            step.paged_mqa_schedule.copy_(torch.tensor(entries))


def _put(buffer: Tensor, numbers: Sequence[int]) -> None:
    buffer[: len(numbers)].copy_(torch.tensor(numbers, dtype=torch.int32))


def _sums(numbers: Sequence[int]) -> list[int]:
    return [sum(numbers[:end]) for end in range(len(numbers) + 1)]


def _schedule(lengths: Sequence[int], num_sms: int) -> list[tuple[int, int]]:
    """Deal the segments out, one list entry each, and look up where each SM starts."""
    segments = [(row, index) for row, length in enumerate(lengths) for index in range(-(-length // 256))]
    segments.append((len(lengths), 0))
    share, extra = divmod(len(segments) - 1, num_sms)
    return [segments[sm * share + min(sm, extra)] for sm in range(num_sms + 1)]


def beyond(tensor: Tensor, elements: int = 0) -> Tensor:
    """The one element ``elements`` past the end of a 1-D ``tensor``, as a view ``[1]``."""
    at = tensor.storage_offset() + tensor.shape[0] * tensor.stride(0) + elements * tensor.stride(0)
    return tensor.as_strided((1,), (1,), at)


def copy_of_uninitialised(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    """A temporary as wide as the table, filled over the live prefix of a row, and copied over the whole row."""
    live = int(inputs.seq_lens[0])
    row = torch.empty(setup.table_width, dtype=torch.int32, device=steps[0].page_table_1.device)
    row[:live] = steps[0].page_table_1[0, :live]
    steps[0].page_table_1[0].copy_(row)
