"""What must be live after a call that is timed, as 64-bit tensor arithmetic, for sizes that plain Python cannot reach.

It shares no code with the oracle, nor with any implementation. What lies past the live cells was judged before, at
small sizes; here it may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
SLOT_LIMIT: Final = 1 << 30
INPUT: Final = "an input"
INPUTS: Final = ("seq_lens", "seq_lens_cpu", "req_pool_indices", "accept_lens")
"""Those of ``ReplayInputs`` that are small enough to be kept twice."""


class WrongResult(Exception):
    """A live element is not what it must be, or what must not change was changed.

    The message names the first such element, what it must be or was, and what it is.
    """


class Kept:
    """A tensor that no call may change, and a copy of it; ``role`` is what it is to those who change it."""

    def __init__(self, name: str, role: str, tensor: Tensor) -> None:
        self._name, self._role, self._tensor, self._copy = name, role, tensor, tensor.clone()

    def refuse_changed(self) -> None:
        """Raises ``WrongResult`` unless it holds what it held."""
        _refuse_changed(self._name, self._role, 0, self._tensor, self._copy)

    def restore(self) -> None:
        """Have it hold what it held."""
        self._tensor.copy_(self._copy)


class Slots:
    """``req_to_token`` of random slots, int32 ``[rows, width]``, which no call may change.

    It may be too large to be kept twice: what it held is drawn from ``seed`` again, ``CELLS`` of it at a time.
    """

    def __init__(self, rows: int, width: int, device: str, seed: int) -> None:
        self.table = torch.empty((rows, width), dtype=torch.int32, device=device)
        self._seed, self._height = seed, max(1, CELLS // width)
        self.restore()

    def refuse_changed(self) -> None:
        """Raises ``WrongResult`` unless it holds what it held."""
        for start, rows, chance in self._pieces():
            held = torch.empty_like(rows).random_(0, SLOT_LIMIT, generator=chance)
            _refuse_changed("req_to_token", INPUT, start, rows, held)

    def restore(self) -> None:
        """Have it hold what it held."""
        for _, rows, chance in self._pieces():
            rows.random_(0, SLOT_LIMIT, generator=chance)

    def _pieces(self) -> Iterator[tuple[int, Tensor, torch.Generator]]:
        """The first row, the rows, and the chance to draw all their slots from, before the next ones are asked for."""
        chance = torch.Generator(self.table.device).manual_seed(self._seed)
        for start in range(0, len(self.table), self._height):
            yield start, self.table[start : start + self._height], chance


class Answers:
    """What one refresh of ``inputs`` must leave in each of ``steps``.

    ``lists`` holds the live rows of every buffer that is no table, int64; ``owners`` ``[R]`` names the request of each
    defined row of a table, ``kv_lens`` ``[B]`` its tokens. Inputs and frozen buffers must stay as they are now; of a
    ``req_to_token`` that is no ``slots`` a copy is kept.
    """

    def __init__(
        self, inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup, slots: Slots | None = None
    ) -> None:
        self._inputs, self._steps, self._setup = inputs, steps, setup
        self._kept = list(_kept(inputs, steps))
        self._kept.append(slots or Kept("req_to_token", INPUT, inputs.req_to_token))
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
        """Poison every output, run ``call``, and raise ``WrongResult`` unless what must be live then is there.

        It raises likewise if an input or a frozen buffer was changed; ``restore`` undoes that.
        """
        for step in self._steps:
            for name in shapes(self._setup, self._inputs.mode, self._inputs.batch_size):
                if name not in FROZEN and alias_of(self._setup, self._inputs.mode, name) is None:
                    getattr(step, name).fill_(POISON)
        # It may work on streams of its own.
        wait = torch.cuda.synchronize if self.kv_lens.is_cuda else int
        wait()
        call()
        wait()
        for kept in self._kept:
            kept.refuse_changed()
        for index, step in enumerate(self._steps):
            where = _step(index, self._steps)
            for name, want in self.lists.items():
                got = getattr(step, name)[: want.shape[0]]
                _compare(name, where, 0, got, want, got != want)
            for name in TABLES:
                self._compare_table(name, where, getattr(step, name))

    def restore(self) -> None:
        """Have inputs and frozen buffers hold what they held, whatever a call did to them."""
        for kept in self._kept:
            kept.restore()

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


def _kept(inputs: ReplayInputs, steps: Sequence[MetadataBuffers]) -> Iterator[Kept | Slots]:
    for name in INPUTS:
        if (tensor := getattr(inputs, name)) is not None:
            yield Kept(name, INPUT, tensor)
    for index, step in enumerate(steps):
        for name in FROZEN:
            yield Kept(f"{name}{_step(index, steps)}", "frozen", getattr(step, name))


def _step(index: int, steps: Sequence[MetadataBuffers]) -> str:
    """Which one, where there are several."""
    return f" of step {index}" if len(steps) > 1 else ""


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


def _refuse_changed(name: str, role: str, row: int, got: Tensor, held: Tensor) -> None:
    """``got`` begins at ``row`` of the tensor."""
    if torch.equal(got, held):
        return
    element, at = _first(row, got != held)
    raise WrongResult(f"{name}, which is {role}, was changed: [{element}] was {int(held[at])} and is {int(got[at])}")


def _first(row: int, wrong: Tensor) -> tuple[str, tuple[int, ...]]:
    """The first element that is ``wrong``, as it is called in a buffer in which they begin at ``row``."""
    at = tuple(wrong.nonzero()[0].tolist())
    return ", ".join(map(str, (row + at[0], *at[1:]))), at


def _compare(name: str, where: str, row: int, got: Tensor, want: Tensor, wrong: Tensor) -> None:
    """``got`` begins at ``row`` of the buffer."""
    if not wrong.any():
        return
    element, at = _first(row, wrong)
    value = int(got[at])
    is_now = f"{value}, which it was before the call" if value == POISON else str(value)
    raise WrongResult(f"{name}[{element}]{where} must be {int(want[at])} and is {is_now}")
