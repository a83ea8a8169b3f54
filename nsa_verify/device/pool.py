"""``req_to_token`` on the device: the slot formula in tensor arithmetic, in memory with guards and poisoned gaps."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_verify.core.case import SLOT_MODULUS, Replay, Setup, SlotKind
from nsa_verify.device.layout import GUARD, POISON_LOW

GAP = POISON_LOW + 77
"""What the gaps between rows and the guards hold."""
IMAGE_CELLS = 1 << 22
"""Cells of the images of a pool's contents that are kept."""


def slot_table(setup: Setup, replay: Replay, device: str) -> Tensor:
    """``[pool_rows, pool_width]`` int64 on ``device``: the formula of ``nsa_verify.core.case.slot``."""
    row = torch.arange(setup.pool_rows, dtype=torch.int64, device=device).unsqueeze(1)
    column = torch.arange(setup.pool_width, dtype=torch.int64, device=device).unsqueeze(0)
    seed = replay.pool_seed
    if replay.slots is SlotKind.SEQUENTIAL:
        return (row * setup.pool_width + column + 1000 * (seed + 1)) % SLOT_MODULUS
    if replay.slots is SlotKind.SCATTERED:
        return _mix(row, column, seed) % SLOT_MODULUS
    page = _mix(row, column // setup.page_size, seed) % (SLOT_MODULUS // setup.page_size)
    return page * setup.page_size + column % setup.page_size


def _mix(row: Tensor, column: Tensor, seed: int) -> Tensor:
    return row * 1_103_515_245 + column * 1_597_334_677 + seed * 747_796_405


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an input outside the arena was changed first: the element, its values, and how many elements differ.

    An element beyond the tensor's bounds lies in the memory beside it.
    """

    element: tuple[int, ...]
    expected: int
    got: int
    count: int


class Pool:
    """The memory of ``req_to_token`` under one setup. ``table`` is what implementations get."""

    def __init__(self, setup: Setup, device: str) -> None:
        self.setup, self.device = setup, device
        length = GUARD + setup.pool_rows * setup.pool_row_stride + GUARD
        self.memory = torch.full((length,), GAP, dtype=torch.int32, device=device)
        """All of it: the table, the gaps between its rows, and the guards."""
        self._image = self.memory.clone()
        self._images: OrderedDict[tuple[SlotKind, int], Tensor] = OrderedDict()
        self.table = self._view(self.memory)
        self._content: tuple[SlotKind, int] | None = None

    def fill(self, replay: Replay) -> None:
        """Make the table hold what ``replay`` sees; nothing is done if it does already."""
        content = (replay.slots, replay.pool_seed)
        if content != self._content:
            self._view(self._image).copy_(slot_table(self.setup, replay, self.device))
            self.memory.copy_(self._image)
            self._content = content

    def image_of(self, replay: Replay) -> Tensor:
        """What ``memory`` must hold for ``replay``: the same tensor for the same content while it is kept."""
        content = (replay.slots, replay.pool_seed)
        found = self._images.pop(content, None)
        if found is None:
            found = torch.full_like(self.memory, GAP)
            self._view(found).copy_(slot_table(self.setup, replay, self.device))
        self._images[content] = found
        while len(self._images) > max(1, IMAGE_CELLS // found.numel()):
            self._images.popitem(last=False)
        return found

    def zero(self) -> None:
        """Make the table hold zeros, as when graphs are captured."""
        self._view(self._image).zero_()
        self.memory.copy_(self._image)
        self._content = None

    def mutated(self) -> Tensor:
        """A 0-d bool tensor on the device: whether the memory differs from what was filled in."""
        return (self.memory != self._image).any()

    def restore(self) -> None:
        """Undo what an implementation did to the memory, or to the shape of the view it got."""
        self.memory.copy_(self._image)
        self.table = self.view()

    def view(self) -> Tensor:
        """The table, in a tensor of its own."""
        return self._view(self.memory)

    def forget_images(self) -> None:
        """Make the images anew when they are asked for next."""
        self._images.clear()

    def difference(self) -> Difference | None:
        """Where the memory differs from what was filled in, if it does; columns may lie in the gaps between rows."""
        wrong = (self.memory != self._image).nonzero().flatten().tolist()
        if not wrong:
            return None
        at = wrong[0]
        element = divmod(at - GUARD, self.setup.pool_row_stride)
        return Difference(element, int(self._image[at]), int(self.memory[at]), len(wrong))

    def _view(self, memory: Tensor) -> Tensor:
        setup = self.setup
        return memory.as_strided((setup.pool_rows, setup.pool_width), (setup.pool_row_stride, 1), GUARD)
