"""The contract's values once more, as 64-bit tensor arithmetic on any device, for sizes that plain Python cannot reach.

It shares no code with the oracle, nor with any implementation. Small buffers are computed whole; what a table must hold
is computed and compared a few rows at a time, so that a table of many gigabytes needs no second one beside it. Slots
come from a formula instead of ``req_to_token``: a wrong address on the way to the expected value would go unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from nsa_verify import CtxLens, Extent, Mode, Setup

CELLS: Final = 1 << 24
"""Cells that are compared at a time: about 1 GiB of temporaries."""

Slots = Callable[[Tensor, Tensor], Tensor]
"""``slots(rows, columns)``: what ``req_to_token`` holds there, int64 ``[len(rows), len(columns)]``."""


class Mismatch(NamedTuple):
    """The first cell, row by row, that does not hold what it must; 1-D buffers are row 0.

    ``expected`` is the poison where nothing may have been written, and in slack the value that would have been right.
    """

    buffer: str
    row: int
    column: int
    expected: int
    got: int


class Expected(NamedTuple):
    """What a replay must leave. All int64.

    ``small`` maps every buffer that is no table to its defined cells, ``[rows, columns]`` from cell (0, 0) on, 1-D ones
    as one row; buffers that are not in it are frame. ``owners`` ``[R]`` names the request of each table row;
    ``kv_lens`` and ``pool_rows`` are ``[B]``.
    """

    small: Mapping[str, Tensor]
    owners: Tensor
    kv_lens: Tensor
    pool_rows: Tensor


def expectation(mode: Mode, seq_lens: Tensor, pool_rows: Tensor, accept_lens: Tensor, setup: Setup) -> Expected:
    """What the B requests must leave, the padded ones included; the inputs are ``[B]``, of any integer type.

    Only ragged batches look at ``accept_lens``. Raises ``ValueError`` if a value does not fit int32.
    """
    seq_len, accepted = seq_lens.long(), accept_lens.long()
    tokens = setup.num_draft_tokens
    kv_lens = seq_len + tokens if mode is Mode.TARGET_VERIFY else seq_len
    match mode:
        case Mode.DECODE:
            accepted = torch.ones_like(seq_len)
        case Mode.TARGET_VERIFY | Mode.DRAFT_EXTEND_V2:
            accepted = torch.full_like(seq_len, tokens)
    owners = torch.arange(len(seq_len), device=seq_len.device).repeat_interleave(accepted)
    token = torch.arange(len(owners), device=seq_len.device) - (accepted.cumsum(0) - accepted)[owners]
    match mode:
        case Mode.DECODE:
            lengths = seq_len
        case Mode.TARGET_VERIFY:
            lengths = seq_len[owners] + token + 1
        case Mode.DRAFT_EXTEND | Mode.DRAFT_EXTEND_V2:
            lengths = (seq_len[owners] - accepted[owners] + token + 1).clamp(min=0)
    clamped = lengths.clamp(max=setup.index_topk)
    small = {
        "cache_seqlens": kv_lens[None],
        "cu_seqlens_k": _sums(kv_lens)[None],
        "nsa_cu_seqlens_k": _sums(clamped)[None],
    }
    if len(owners):
        small |= {"nsa_seqlens_expanded": lengths[None], "nsa_cache_seqlens": clamped[None]}
        small |= _optional(mode, lengths, kv_lens, setup)
    for name, values in small.items():
        if int(values.max()) > 2**31 - 1:
            raise ValueError(f"{name} reaches {int(values.max())}, which is no int32")
    return Expected(small, owners, kv_lens, pool_rows.long())


def _sums(values: Tensor) -> Tensor:
    return torch.cat((values.new_zeros(1), values.cumsum(0)))


def _optional(mode: Mode, lengths: Tensor, kv_lens: Tensor, setup: Setup) -> dict[str, Tensor]:
    found = {}
    per_request = setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY
    if per_request:
        found["paged_mqa_ctx_lens"] = kv_lens[:, None].expand(-1, setup.num_draft_tokens)
    elif setup.ctx_lens is not CtxLens.ABSENT:
        found["paged_mqa_ctx_lens"] = lengths[:, None]
    if setup.schedule:
        found["paged_mqa_schedule"] = schedule(kv_lens if per_request else lengths, setup.num_sms)
    return found


def schedule(ctx_lens: Tensor, num_sms: int) -> Tensor:
    """The contract's section 7, int64 ``[num_sms+1, 2]``: the list of all segments, cut where each SM begins."""
    segments = (ctx_lens + 255).div(256, rounding_mode="floor")
    row = torch.arange(len(ctx_lens), device=ctx_lens.device).repeat_interleave(segments)
    segment = torch.arange(len(row), device=ctx_lens.device) - (segments.cumsum(0) - segments)[row]
    # One more, (rows, 0), for the boundaries behind the last segment.
    work = torch.stack((torch.cat((row, row.new_tensor([len(ctx_lens)]))), torch.cat((segment, row.new_zeros(1)))), 1)
    sm = torch.arange(num_sms + 1, device=ctx_lens.device)
    each, more = divmod(len(row), num_sms)
    return work[sm * each + sm.clamp(max=more)]


def compare_small(buffer: str, got: Tensor, defined: Tensor | None, poison: int) -> Mismatch | None:
    """Where a buffer, int32 ``[rows, columns]``, differs from its defined cells, or from the poison around them."""
    want = torch.full_like(got, poison, dtype=torch.int64)
    if defined is not None:
        rows, columns = defined.shape
        want[:rows, :columns] = defined
    return _first(buffer, 0, 0, got != want, want, got)


def compare_table(
    buffer: str,
    got: Tensor,
    expected: Expected,
    slots: Slots,
    setup: Setup,
    poison: int,
    extent: Extent = Extent.LIVE,
    block: int = 128,
    cells: int = CELLS,
) -> Mismatch | None:
    """Where a page table differs from what ``extent`` (``row``: in blocks of ``block`` columns) allows it to hold.

    ``buffer`` is ``page_table_1`` or ``real_page_table``; ``got`` int32 ``[rows, row stride]``, all of it: the captured
    rows, and what lies between one row and the next. It held ``poison`` before, and still must past the extent and past
    row R. Waits for the device.
    """
    page = setup.page_size if buffer == "real_page_table" else 1
    live, reach = _bounds(expected.kv_lens, page, setup, extent, block)
    height = max(1, cells // got.shape[1])
    for start in range(0, got.shape[0], height):
        rows = got[start : start + height]
        owners = expected.owners[start : start + height]
        defined, edge = len(owners), int(reach[owners].max()) if len(owners) else 0
        found = [_first(buffer, start + defined, 0, rows[defined:] != poison, poison, rows[defined:])]
        found.append(_first(buffer, start, edge, rows[:defined, edge:] != poison, poison, rows[:defined, edge:]))
        if edge:
            column = torch.arange(edge, device=got.device)
            value = slots(expected.pool_rows[owners], column * page).div(page, rounding_mode="floor")
            allowed = column < reach[owners, None]  # [defined, edge]
            untouched = (column >= live[owners, None]) & (rows[:defined, :edge] == poison)
            right = untouched | (allowed & (rows[:defined, :edge] == value))
            want = torch.where(allowed, value, poison)
            found.append(_first(buffer, start, 0, ~right, want, rows[:defined, :edge]))
        if any(found):
            return min((it for it in found if it), key=lambda it: (it.row, it.column))
    return None


def _bounds(kv_lens: Tensor, page: int, setup: Setup, extent: Extent, block: int) -> tuple[Tensor, Tensor]:
    """Per request the columns of a table row that are live, and those that may be written."""
    width = -(-setup.table_width // page)
    pages = (kv_lens + page - 1).div(page, rounding_mode="floor")
    match extent:
        case Extent.LIVE:
            reach = pages
        case Extent.ROW:
            reach = (pages + block - 1).div(block, rounding_mode="floor") * block
        case Extent.MAX:
            reach = pages.max().expand_as(pages)
        case Extent.FULL:
            reach = torch.full_like(pages, width)
    return pages.clamp(max=width), reach.clamp(max=width)


def _first(buffer: str, row: int, column: int, wrong: Tensor, want: Tensor | int, got: Tensor) -> Mismatch | None:
    """The first wrong cell of a part of a buffer that begins at (row, column)."""
    if not wrong.any():
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    expected = want if isinstance(want, int) else int(want[at])
    return Mismatch(buffer, row + at[0], column + at[1], expected, int(got[at]))
