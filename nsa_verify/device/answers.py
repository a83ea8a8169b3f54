"""What must be live after a call that is timed, as 64-bit tensor arithmetic, for sizes that plain Python cannot reach.

It shares no code with the oracle, nor with any implementation. What lies past the live cells was judged before, at
small sizes; here it may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from nsa_verify.core.buffers import FROZEN, TABLES, alias_of, shapes
from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.implementation import MetadataBuffers, ReplayInputs

POISON: Final = -1_234_567_891
"""No length, sum, slot or page: whoever writes nothing is seen."""
CELLS: Final = 1 << 24
"""Cells of a table that are compared at a time: about 300 MiB of temporaries."""
SEGMENT: Final = 256
"""Tokens of a segment of the paged-MQA schedule."""


class WrongResult(Exception):
    """A live element is not what it must be; the message names the first one, what it must be and what it is."""


class Answers:
    """What one refresh of ``inputs`` must leave in each of ``steps``.

    ``lists`` holds the live rows of every buffer that is no table, int64; ``owners`` ``[R]`` names the request of each
    defined row of a table, ``kv_lens`` ``[B]`` its tokens.
    """

    def __init__(self, inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
        self._inputs, self._steps, self._setup = inputs, steps, setup
        mode, count, most = inputs.mode, inputs.batch_size, setup.num_draft_tokens
        seq_lens = inputs.seq_lens[:count].long()
        self._pool_rows = inputs.req_pool_indices[:count].long().clone()
        tokens = torch.full_like(seq_lens, 1 if mode is Mode.DECODE else most)
        if mode is Mode.DRAFT_EXTEND:
            tokens = inputs.accept_lens[:count].long()
        first = seq_lens - tokens + 1
        if mode is Mode.TARGET_VERIFY:
            first = seq_lens + 1
        token = torch.arange(most, device=seq_lens.device).expand(count, most)  # [B, N]
        request = torch.arange(count, device=seq_lens.device)[:, None].expand(count, most)
        defined = token < tokens[:, None]
        lengths = (first[:, None] + token)[defined].clamp(min=0)
        self.owners = request[defined]
        self.kv_lens = seq_lens + most if mode is Mode.TARGET_VERIFY else seq_lens.clone()
        self.lists = self._lists(lengths)

    def _lists(self, lengths: Tensor) -> dict[str, Tensor]:
        setup, mode, count = self._setup, self._inputs.mode, self._inputs.batch_size
        clamped = lengths.clamp(max=setup.index_topk)
        found = {
            "cache_seqlens": self.kv_lens,
            "cu_seqlens_k": _from_zero(self.kv_lens),
            "nsa_seqlens_expanded": lengths,
            "nsa_cache_seqlens": clamped,
            "nsa_cu_seqlens_k": _from_zero(clamped),
        }
        shape = shapes(setup, mode, count)
        own = "paged_mqa_ctx_lens" in shape and alias_of(setup, mode, "paged_mqa_ctx_lens") is None
        if own:
            found["paged_mqa_ctx_lens"] = self.kv_lens[:, None].expand(count, setup.num_draft_tokens)
        elif "paged_mqa_ctx_lens" in shape:
            found["paged_mqa_ctx_lens"] = lengths[:, None]
        if "paged_mqa_schedule" in shape and len(lengths):
            found["paged_mqa_schedule"] = _schedule(self.kv_lens if own else lengths, setup.num_sms)
        return found

    def check(self, call: Callable[[], object]) -> None:
        """Poison every output, run ``call``, and raise ``WrongResult`` unless what must be live then is there."""
        for step in self._steps:
            for name in shapes(self._setup, self._inputs.mode, self._inputs.batch_size):
                if name not in FROZEN and alias_of(self._setup, self._inputs.mode, name) is None:
                    getattr(step, name).fill_(POISON)
        # It may work on streams of its own.
        wait = torch.cuda.synchronize if self.kv_lens.is_cuda else int
        wait()
        call()
        wait()
        for index, step in enumerate(self._steps):
            where = f" of step {index}" if len(self._steps) > 1 else ""
            for name, want in self.lists.items():
                got = getattr(step, name)[: want.shape[0]]
                _compare(name, where, 0, got, want, got != want)
            for name in TABLES:
                self._compare_table(name, where, getattr(step, name))

    def _compare_table(self, name: str, where: str, table: Tensor) -> None:
        page = self._setup.page_size if name == "real_page_table" else 1
        live = (self.kv_lens + page - 1).div(page, rounding_mode="floor").clamp(max=table.shape[1])
        height = max(1, CELLS // table.shape[1])
        for start in range(0, len(self.owners), height):
            owners = self.owners[start : start + height]
            edge = int(live[owners].max())
            slots = self._inputs.req_to_token[:, : edge * page : page][self._pool_rows[owners]]
            want = slots.long().div(page, rounding_mode="floor")  # [rows, edge]
            got = table[start : start + len(owners), :edge]
            column = torch.arange(edge, device=table.device)
            _compare(name, where, start, got, want, (got != want) & (column < live[owners, None]))


def _from_zero(values: Tensor) -> Tensor:
    """Prefix sums, the 0 before them included."""
    return torch.nn.functional.pad(values.cumsum(0), (1, 0))


def _schedule(ctx_lens: Tensor, num_sms: int) -> Tensor:
    """The contract's section 7, ``[num_sms+1, 2]``: the row, and the segment in it, that each SM begins with."""
    ends = (ctx_lens + SEGMENT - 1).div(SEGMENT, rounding_mode="floor").cumsum(0)
    total = int(ends[-1])
    starts = [sm * (total // num_sms) + min(sm, total % num_sms) for sm in range(num_sms + 1)]
    start = torch.tensor(starts, device=ctx_lens.device)
    row = torch.searchsorted(ends, start, right=True)
    return torch.stack((row, start - torch.nn.functional.pad(ends, (1, 0))[row]), 1)


def _compare(name: str, where: str, row: int, got: Tensor, want: Tensor, wrong: Tensor) -> None:
    """``got`` begins at ``row`` of the buffer."""
    if not wrong.any():
        return
    at = tuple(wrong.nonzero()[0].tolist())
    element = ", ".join(map(str, (row + at[0], *at[1:])))
    value = int(got[at])
    is_now = f"{value}, which it was before the call" if value == POISON else str(value)
    raise WrongResult(f"{name}[{element}]{where} must be {int(want[at])} and is {is_now}")
