"""The oracle: what every buffer must hold after a replay, in plain Python integers.

It encodes CONTRACT sections 2, 3 and 7 and shares no code with any implementation. Values are computed one element at
a time, in the words of the contract, and never from the content of an earlier replay.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple

from nsa_verify.core.buffers import has_own_ctx_lens
from nsa_verify.core.case import Case, CtxLens, Mode, Replay, Setup, row_pages, row_slots
from nsa_verify.core.implementation import Extent

SCHEDULE_TOKENS = 256
"""KV tokens of one segment of the paged-MQA schedule."""


class Region(StrEnum):
    """What a replay owes a cell (contract, section 3)."""

    LIVE = "live"
    SLACK = "slack"
    FRAME = "frame"


class Row(NamedTuple):
    """One defined row of a buffer: ``[0, live)`` is live, ``[live, extent)`` slack, what is beyond is frame.

    ``values`` holds what the formula gives for columns ``[0, extent)``.
    """

    values: tuple[int, ...]
    live: int
    extent: int


class Batch(NamedTuple):
    """The inputs of a replay as the backend sees them: B rows, the padded ones included."""

    mode: Mode
    bucket: int
    seq_lens: tuple[int, ...]
    pool_rows: tuple[int, ...]
    accept_lens: tuple[int, ...]


class Expectation(NamedTuple):
    """What a replay must leave in the buffers of any one step; all steps receive the same.

    ``buffers`` maps a buffer's name to its defined rows, from row 0 on; rows past them, and buffers that are not in
    it, are frame. Aliases (contract, section 2) are listed under each of their names.
    """

    mode: Mode
    bucket: int
    defined_rows: int
    buffers: Mapping[str, tuple[Row, ...]]

    def region(self, buffer: str, row: int, column: int) -> Region:
        """The region of one cell; 1-D buffers are row 0."""
        rows = self.buffers.get(buffer, ())
        if row >= len(rows) or column >= rows[row].extent:
            return Region.FRAME
        return Region.LIVE if column < rows[row].live else Region.SLACK


def batch(case: Case, replay: int) -> Batch:
    """The padded inputs of replay number ``replay``."""
    it, setup, bucket = case.replays[replay], case.setup, case.bucket(replay)
    padded = bucket - len(it.requests)
    if it.mode is Mode.DRAFT_EXTEND:
        accepted = [request.accept_len for request in it.requests] + [it.padded_accept_len] * padded
    else:
        accepted = [setup.num_draft_tokens] * bucket
    return Batch(
        mode=it.mode,
        bucket=bucket,
        seq_lens=(*(request.seq_len for request in it.requests), *[setup.fill_seq_len] * padded),
        pool_rows=(*(request.pool_row for request in it.requests), *[it.padded_pool_row] * padded),
        accept_lens=tuple(accepted),
    )


def expect(case: Case, replay: int, extent: Extent = Extent.LIVE, block: int = 128) -> Expectation:
    """What replay number ``replay`` must leave, for an implementation that declares ``extent``.

    ``block`` is the number of columns, of the table in question, to which ``Extent.ROW`` rounds up.
    """
    setup, given = case.setup, batch(case, replay)
    owner, expanded = _expanded(given)
    defined = len(expanded)
    added = setup.num_draft_tokens if given.mode is Mode.TARGET_VERIFY else 0
    kv_lens = [length + added for length in given.seq_lens]
    buffers: dict[str, tuple[Row, ...]] = {
        "cache_seqlens": (_line(kv_lens),),
        "cu_seqlens_k": (_line(_prefix_sum(kv_lens)),),
        "nsa_cu_seqlens_k": (_line([0]),),
    }
    if defined:
        clamped = [min(length, setup.index_topk) for length in expanded]
        buffers["nsa_seqlens_expanded"] = (_line(expanded),)
        buffers["nsa_cache_seqlens"] = (_line(clamped),)
        buffers["nsa_cu_seqlens_k"] = (_line(_prefix_sum(clamped)),)
        buffers |= _tables(setup, case.replays[replay], given, owner, kv_lens, extent, block)
        buffers |= _optional(setup, given, expanded, kv_lens)
    return Expectation(given.mode, given.bucket, defined, buffers)


def _line(values: Sequence[int]) -> Row:
    return Row(tuple(values), len(values), len(values))


def _prefix_sum(values: Sequence[int]) -> list[int]:
    return list(accumulate(values, initial=0))


def _expanded(given: Batch) -> tuple[list[int], list[int]]:
    """For every expanded row: the request it belongs to, and its length."""
    if given.mode is Mode.DECODE:
        return list(range(given.bucket)), list(given.seq_lens)
    owner, lengths = [], []
    for request, (seq_len, accepted) in enumerate(zip(given.seq_lens, given.accept_lens, strict=True)):
        for token in range(accepted):
            owner.append(request)
            if given.mode is Mode.TARGET_VERIFY:
                lengths.append(seq_len + token + 1)
            else:
                lengths.append(max(0, seq_len - accepted + token + 1))
    return owner, lengths


def _tables(
    setup: Setup,
    it: Replay,
    given: Batch,
    owner: Sequence[int],
    kv_lens: Sequence[int],
    extent: Extent,
    block: int,
) -> dict[str, tuple[Row, ...]]:
    page, width, longest = setup.page_size, setup.table_width, max(kv_lens)
    requests = list(zip(given.pool_rows, kv_lens, strict=True))
    tokens, pages = {}, {}
    for request in set(requests):
        pool_row, kv_len = request
        tokens[request] = _table_row(row_slots(setup, it, pool_row, width), kv_len, longest, extent, block)
        paged = row_pages(setup, it, pool_row, width)
        pages[request] = _table_row(paged, -(-kv_len // page), -(-longest // page), extent, block)
    return {
        "page_table_1": tuple([tokens[requests[index]] for index in owner]),
        "real_page_table": tuple([pages[requests[index]] for index in owner]),
    }


def _table_row(values: tuple[int, ...], live: int, longest: int, extent: Extent, block: int) -> Row:
    width = len(values)
    match extent:
        case Extent.LIVE:
            reach = live
        case Extent.ROW:
            reach = -(-live // block) * block
        case Extent.MAX:
            reach = longest
        case Extent.FULL:
            reach = width
    reach = min(reach, width)
    return Row(values[:reach], min(live, width), reach)


def _optional(
    setup: Setup, given: Batch, expanded: Sequence[int], kv_lens: Sequence[int]
) -> dict[str, tuple[Row, ...]]:
    found: dict[str, tuple[Row, ...]] = {}
    ctx_lens = expanded
    if has_own_ctx_lens(setup, given.mode):
        ctx_lens = kv_lens
        found["paged_mqa_ctx_lens"] = tuple(_line([length] * setup.num_draft_tokens) for length in kv_lens)
    elif setup.ctx_lens is not CtxLens.ABSENT:
        found["paged_mqa_ctx_lens"] = tuple(_line([length]) for length in expanded)
    if setup.schedule:
        found["paged_mqa_schedule"] = tuple(_line(entry) for entry in schedule(ctx_lens, setup.num_sms))
    return found


def schedule(ctx_lens: Sequence[int], num_sms: int) -> list[tuple[int, int]]:
    """``paged_mqa_schedule`` (contract, section 7): for each SM boundary the row and the segment within it."""
    ends = _prefix_sum([-(-length // SCHEDULE_TOKENS) for length in ctx_lens])[1:]
    total = ends[-1] if ends else 0
    entries = []
    for sm in range(num_sms + 1):
        start = sm * (total // num_sms) + min(sm, total % num_sms)
        row = bisect_right(ends, start)
        if row == len(ends):
            entries.append((len(ctx_lens), 0))
        else:
            entries.append((row, start - (ends[row - 1] if row else 0)))
    return entries
