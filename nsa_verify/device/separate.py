"""The memory of a case with every tensor in an allocation of its own, which ends where the tensor does.

The arena of a ``Rig`` makes one step past a buffer land in a guard zone, which a sanitizer takes for memory like any
other. Here it leaves the allocation.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from nsa_verify.core.buffers import FROZEN, TABLES, Shape, alias_of, shapes
from nsa_verify.core.case import Case, Layout, Mode
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, MetadataBuffers, ReplayInputs
from nsa_verify.core.oracle import batch
from nsa_verify.device.layout import POISON_LOW, TWO_DIMENSIONAL
from nsa_verify.device.pool import slot_table

GAP_BYTES: Final = 1 << 16
"""On the CPU, memory in front of and behind every allocation that belongs to nobody: what strays lands there."""
FILL: Final = POISON_LOW + 99
"""What outputs, and the gaps between rows, hold before the first replay."""


class Span(NamedTuple):
    """Addresses ``[start, end)`` of a tensor's own allocation."""

    start: int
    end: int
    name: str
    itemsize: int
    step: int | None = None


class Separate:
    """Inputs and buffers of one case, for each (mode, bucket) sized for it exactly: no bucket shares another's table,
    and no input has a tail. Addresses stay the same for as long as this lives."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.spans: list[Span] = []
        """On the CPU, where every allocation lies."""
        self._inputs: dict[tuple[Mode, int], ReplayInputs] = {}
        self._steps: dict[tuple[Mode, int, frozenset[str]], tuple[MetadataBuffers, ...]] = {}
        setup = case.setup
        rows = Shape(setup.pool_rows, setup.pool_width)
        self._pool = self._allocate("req_to_token", rows, setup.pool_row_stride)

    def steps(self, replay: int, writes: frozenset[str]) -> tuple[MetadataBuffers, ...]:
        """The buffers of every step for replay number ``replay``; of the optional outputs those in ``writes``."""
        key = (self.case.replays[replay].mode, self.case.bucket(replay), writes)
        if key not in self._steps:
            self._steps[key] = tuple(self._step(step, *key) for step in range(self.case.setup.num_steps))
        return self._steps[key]

    def inputs(self, replay: int, steps: tuple[MetadataBuffers, ...]) -> ReplayInputs:
        """The inputs of replay number ``replay``, holding what it sees; one of them may be among the ``steps``."""
        setup, given = self.case.setup, batch(self.case, replay)
        aliased = setup.aliased_seq_lens and given.mode is Mode.DECODE
        key = given.mode, given.bucket
        if key not in self._inputs:
            self._inputs[key] = self._make_inputs(*key, steps[0].cache_seqlens if aliased else None)
        found = self._inputs[key]
        found.seq_lens.copy_(torch.tensor(given.seq_lens))
        if found.seq_lens_cpu is not None:
            found.seq_lens_cpu.copy_(torch.tensor(given.seq_lens))
        found.req_pool_indices.copy_(torch.tensor(given.pool_rows))
        if given.mode in (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2):
            found.accept_lens.copy_(torch.tensor(given.accept_lens))
        self._pool.copy_(slot_table(setup, self.case.replays[replay], self.device))
        return found

    def _make_inputs(self, mode: Mode, bucket: int, aliased: Tensor | None) -> ReplayInputs:
        setup = self.case.setup
        stride = 3 if setup.layout is Layout.STRIDED else 1
        lead = 5 if setup.layout is Layout.OFFSET else 0
        lengths = getattr(torch, setup.seq_lens_dtype)
        column = Shape(bucket, 1)  # so that a row stride is the stride of the elements
        if aliased is None:
            aliased = self._allocate("seq_lens", column, stride, lengths, lead=lead)[:, 0]
        rows = self._allocate("req_pool_indices", column, 1, getattr(torch, setup.pool_index_dtype))
        return ReplayInputs(
            mode=mode,
            batch_size=bucket,
            seq_lens=aliased,
            seq_lens_cpu=torch.zeros(bucket, dtype=lengths) if setup.host_lengths else None,
            req_pool_indices=rows[:, 0],
            req_to_token=self._pool,
            accept_lens=self._allocate("accept_lens", column, 1)[:, 0],
        )

    def _step(self, step: int, mode: Mode, bucket: int, writes: frozenset[str]) -> MetadataBuffers:
        setup, views = self.case.setup, dict[str, Tensor]()
        padding = setup.table_row_stride - setup.table_width + step * setup.stride_skew
        for name, shape in shapes(setup, mode, bucket).items():
            if name in OPTIONAL_OUTPUTS and name not in writes:
                continue
            alias = alias_of(setup, mode, name)
            if alias is not None:
                views[name] = views[alias].view(shape.rows, 1) if name in OPTIONAL_OUTPUTS else views[alias]
                continue
            made = self._allocate(name, shape, shape.columns + (padding if name in TABLES else 0), step=step)
            views[name] = made if name in TWO_DIMENSIONAL else made[0]
            if name in FROZEN:
                views[name].copy_(torch.arange(shape.columns))
        return MetadataBuffers(**views)

    def _allocate(
        self,
        name: str,
        shape: Shape,
        stride: int,
        dtype: torch.dtype = torch.int32,
        lead: int = 0,
        step: int | None = None,
    ) -> Tensor:
        """``[rows, columns]`` with ``stride`` elements from row to row, ``lead`` elements into memory that ends with
        the last element."""
        length = lead + (shape.rows - 1) * stride + shape.columns
        on_cpu = self.device == "cpu"
        gap = GAP_BYTES // dtype.itemsize if on_cpu else 0
        memory = torch.empty(gap + length + gap, dtype=dtype, device=self.device)
        memory[gap : gap + length].fill_(FILL)
        view = memory.as_strided(shape, (stride, 1), gap + lead)
        if on_cpu:
            start = memory.data_ptr() + gap * dtype.itemsize
            self.spans.append(Span(start, start + length * dtype.itemsize, name, dtype.itemsize, step))
        return view
