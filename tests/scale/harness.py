"""Buffers of any size around one refresh, eager or in a captured graph, and the first cell that it left wrong.

The arenas of ``nsa_verify.device`` keep images of all they hold; here each byte exists once.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch
from scale.vectorised import CELLS, Mismatch, compare_small, compare_table, expectation
from torch import Tensor

from nsa_verify import Implementation, MetadataBuffers, Mode, ReplayInputs, Setup
from nsa_verify.core.buffers import FROZEN, TABLES, alias_of, shapes
from nsa_verify.device.graph import CapturedGraph

POISON: Final = -1_515_870_811
"""No length, slot or page; what outputs hold before a replay, and guards and gaps always."""
GUARD: Final = 1024
"""Elements before and after each zone."""
SCRATCH_BYTES: Final = 3 << 30
"""For comparing, which takes ``CELLS`` at a time, and for CUDA itself."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One refresh: what is frozen, and the inputs of its B rows, ``[B]`` int64 on the host, the padded ones included.

    ``real_row_stride`` is that of ``real_page_table`` at step 0; step i's is ``i * stride_skew`` more, as with
    ``page_table_1``.
    """

    setup: Setup
    mode: Mode
    seq_lens: Tensor
    pool_rows: Tensor
    accept_lens: Tensor
    real_row_stride: int

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.seq_lens)

    def strides(self, step: int) -> dict[str, int]:
        """Row strides of the tables of a step."""
        strides = (self.setup.table_row_stride, self.real_row_stride)
        return {name: stride + step * self.setup.stride_skew for name, stride in zip(TABLES, strides, strict=True)}

    def needed_bytes(self) -> int:
        """An upper bound of the memory that it takes on the device.

        Twice, eager and captured, an implementation may keep a page row and a real row per request.
        """
        setup, rows = self.setup, self.setup.captured_rows(self.mode, self.batch_size)
        cells = setup.pool_rows * setup.pool_row_stride
        cells += sum(rows * sum(self.strides(step).values()) for step in range(setup.num_steps))
        cells += 2 * self.batch_size * (setup.table_width + setup.real_table_width)
        cells += 16 * setup.num_steps * (rows + self.batch_size)
        return 4 * cells + SCRATCH_BYTES


def slots(rows: Tensor, columns: Tensor) -> Tensor:
    """What ``req_to_token`` holds, int64 ``[len(rows), len(columns)]``; neighbours differ by more than any page."""
    return (rows[:, None] * 1_000_003 + columns * 7_919 + 12_345) % (2**31 - 1)


def slot(row: int, column: int) -> int:
    """One cell of ``slots``."""
    return int(slots(torch.tensor([row]), torch.tensor([column])))


class Zone(NamedTuple):
    """One buffer with guards before and after it: ``[rows, columns]``, a row every ``stride`` elements."""

    memory: Tensor
    rows: int
    columns: int
    stride: int

    @classmethod
    def poisoned(cls, rows: int, columns: int, stride: int, device: str, dtype: torch.dtype = torch.int32) -> Zone:
        """Memory of its own."""
        return cls(torch.full((2 * GUARD + rows * stride,), POISON, dtype=dtype, device=device), rows, columns, stride)

    @property
    def whole(self) -> Tensor:
        """``[rows, stride]``: the rows with the gaps behind them."""
        return self.memory[GUARD:-GUARD].view(self.rows, self.stride)

    @property
    def view(self) -> Tensor:
        """``[rows, columns]``: what implementations get."""
        return self.whole[:, : self.columns]

    def guard_mismatch(self, name: str) -> Mismatch | None:
        """The first cell of a guard that was written to."""
        before, after = self.memory[None, :GUARD], self.memory[None, -GUARD:]
        found = compare_small(f"guard before {name}", before, None, POISON)
        return found or compare_small(f"guard after {name}", after, None, POISON)


class Backend:
    """The inputs and the buffers of every step of one workload; optional ones as the setup keeps them."""

    def __init__(self, work: Workload, device: str) -> None:
        setup, batch_size = work.setup, work.batch_size
        self.work, self.device = work, device
        self.pool = Zone.poisoned(setup.pool_rows, setup.pool_width, setup.pool_row_stride, device)
        dtypes = {
            "seq_lens": getattr(torch, setup.seq_lens_dtype),
            "req_pool_indices": getattr(torch, setup.pool_index_dtype),
            "accept_lens": torch.int32,
        }
        self.given = {name: Zone.poisoned(1, batch_size, batch_size, device, dtype) for name, dtype in dtypes.items()}
        self.zones = [self._zones(step) for step in range(setup.num_steps)]
        self.inputs = ReplayInputs(
            mode=work.mode,
            batch_size=batch_size,
            seq_lens_cpu=None,
            req_to_token=self.pool.view,
            **{name: zone.view[0] for name, zone in self.given.items()},
        )
        self.steps = [self._buffers(zones) for zones in self.zones]

    def _zones(self, step: int) -> dict[str, Zone]:
        """The buffers of a step that have memory of their own; those that are frozen hold their aranges."""
        work, strides = self.work, self.work.strides(step)
        zones = {}
        for name, shape in shapes(work.setup, work.mode, work.batch_size).items():
            if alias_of(work.setup, work.mode, name) is None:
                zones[name] = Zone.poisoned(*shape, strides.get(name, shape.columns), self.device)
        for name in FROZEN:
            zones[name].view.copy_(torch.arange(zones[name].columns))
        return zones

    def _buffers(self, zones: dict[str, Zone]) -> MetadataBuffers:
        setup, mode = self.work.setup, self.work.mode
        views = {}
        for name, shape in shapes(setup, mode, self.work.batch_size).items():
            view = zones[alias_of(setup, mode, name) or name].view
            if name.startswith("paged_mqa"):
                views[name] = view.view(shape)
            else:
                views[name] = view if name in TABLES else view[0]
        return MetadataBuffers(**views)

    def poison(self) -> None:
        """Make the outputs hold what they held before anything ran."""
        for zones in self.zones:
            for name, zone in zones.items():
                if name not in FROZEN:
                    zone.memory.fill_(POISON)

    def idle(self) -> None:
        """The inputs of a capture: fill everywhere, an empty ``req_to_token``."""
        setup = self.work.setup
        self.given["seq_lens"].view.fill_(setup.fill_seq_len)
        self.given["req_pool_indices"].view.fill_(0)
        self.given["accept_lens"].view.fill_(setup.num_draft_tokens)
        self.pool.view.fill_(0)

    def load(self) -> None:
        """The inputs of the workload; ``accept_lens`` is poison where it has no meaning."""
        for name, values in self._inputs().items():
            self.given[name].view.copy_(values)
        for start, rows in _parts(self.pool):
            row = torch.arange(start, start + len(rows), device=self.device)
            rows[:, : self.pool.columns] = slots(row, torch.arange(self.pool.columns, device=self.device))

    def _inputs(self) -> dict[str, Tensor]:
        work = self.work
        extends = work.mode in (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2)
        accepted = work.accept_lens if extends else torch.full_like(work.accept_lens, POISON)
        return {"seq_lens": work.seq_lens, "req_pool_indices": work.pool_rows, "accept_lens": accepted}

    def first_mismatch(self, implementation: Implementation) -> Mismatch | None:
        """The first cell of any step, of the inputs or of a guard that is not as it must be, or None."""
        return next((it for it in self._mismatches(implementation) if it), None)

    def _mismatches(self, implementation: Implementation) -> Iterator[Mismatch | None]:
        work, setup = self.work, self.work.setup
        seq_lens, pool_rows = work.seq_lens.to(self.device), work.pool_rows.to(self.device)
        expected = expectation(work.mode, seq_lens, pool_rows, work.accept_lens.to(self.device), setup)
        for zones in self.zones:
            for name, zone in zones.items():
                if name in FROZEN:
                    yield compare_small(name, zone.view, torch.arange(zone.columns)[None], POISON)
                elif name in TABLES:
                    how = (setup, POISON, implementation.extent, implementation.block)
                    yield compare_table(name, zone.whole, expected, slots, *how)
                else:
                    yield compare_small(name, zone.view, expected.small.get(name), POISON)
                yield zone.guard_mismatch(name)
        for name, values in self._inputs().items():
            yield compare_small(name, self.given[name].view, values[None], POISON)
            yield self.given[name].guard_mismatch(name)
        for start, rows in _parts(self.pool):
            row = torch.arange(start, start + len(rows), device=self.device)
            values = slots(row, torch.arange(self.pool.columns, device=self.device))
            if found := compare_small("req_to_token", rows, values, POISON):
                yield found._replace(row=found.row + start)
        yield self.pool.guard_mismatch("req_to_token")


def _parts(zone: Zone) -> Iterator[tuple[int, Tensor]]:
    """The rows of a zone, gaps included, a few at a time, with the number of the first."""
    height = max(1, CELLS // zone.stride)
    for start in range(0, zone.rows, height):
        yield start, zone.whole[start : start + height]


def first_mismatch(work: Workload, implementation: Implementation, device: str, captured: bool) -> Mismatch | None:
    """Run one workload and return the first wrong cell, or None if all is right.

    ``captured``: in a CUDA graph that is captured while the inputs are fill, and replayed with those of the workload.
    What the implementation raises is passed on, without the frames that would keep gigabytes alive.
    """
    try:
        return _first_mismatch(work, implementation, device, captured)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise


def _first_mismatch(work: Workload, implementation: Implementation, device: str, captured: bool) -> Mismatch | None:
    backend = Backend(work, device)

    def refresh() -> None:
        implementation.refresh(backend.inputs, backend.steps, work.setup)

    if not captured:
        backend.load()
        refresh()
        return backend.first_mismatch(implementation)
    backend.idle()
    graph = _capture(refresh)
    try:
        backend.poison()
        backend.load()
        assert graph.raw is not None
        graph.raw.replay()
        torch.cuda.synchronize()
        return backend.first_mismatch(implementation)
    finally:
        graph.close()


def _capture(region: Callable[[], None]) -> CapturedGraph:
    """Run ``region`` once, as engines do, so that it is compiled; then capture it."""
    region()
    torch.cuda.synchronize()
    graph = CapturedGraph()
    assert graph.raw is not None
    try:
        with torch.cuda.graph(graph.raw):
            region()
    except BaseException:
        graph.close()
        raise
    return graph


def spoil(implementation: Implementation, buffer: str, row: int, column: int, value: int) -> Implementation:
    """The implementation with a fault: then it writes ``value`` to one cell of the last step, or of an input.

    The cell may lie outside the buffer: in the gap behind a row, or in a guard.
    """

    def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
        implementation.refresh(inputs, steps, setup)
        tensor: Tensor = getattr(inputs if hasattr(inputs, buffer) else steps[-1], buffer)
        at = tensor.storage_offset() + column + (row * tensor.stride(0) if tensor.dim() == 2 else 0)
        tensor.as_strided((1,), (1,), at).fill_(value)

    return replace(implementation, refresh=refresh)
