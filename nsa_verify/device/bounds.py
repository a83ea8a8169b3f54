"""``--sanitizer oob``: triton-viz runs the kernels, and the address of every load and store is looked at.

triton-viz's own sanitizer leaves it to a solver whether some address can be out of bounds. It has no ``tl.reduce``, no
scans and no tuples of tensors, and takes two ``tl.arange`` of one size for the same number. In a saved case everything
that addresses depend on is fixed, so there is nothing left to solve: all programs are run, and all lanes checked.

Importing this imports triton-viz, which changes how Triton's interpreter works.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import triton
import triton_viz
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import TensorHandle, interpreter_builder
from triton_viz.core.callbacks import ForLoopCallbacks, OpCallbacks
from triton_viz.core.client import Client
from triton_viz.core.data import AtomicCas, AtomicRMW, Load, Store
from triton_viz.frontends.base import OPERATION_REGISTRY

from nsa_verify.core.findings import Code
from nsa_verify.device.launches import Launch
from nsa_verify.device.separate import GAP_BYTES, Span

_OWN: Final = Path(__file__).resolve().parent
_MACHINERY: Final = (f"{_OWN}/", *(f"{Path(str(it.__file__)).parent}/" for it in (triton, triton_viz, torch)))


class Place(NamedTuple):
    """What accesses are told apart by: read or written, from which line, past which memory."""

    code: Code
    line: str
    span: Span | None
    """The memory next to the address, or None if there is none within reach."""


class Stray(NamedTuple):
    """How often an access strayed, and the element of ``Place.span`` that it hit first, counted from its start."""

    times: int
    element: int


class Bounds(Client):  # type: ignore[misc] # triton-viz has no types
    """Checks launches against ``spans`` and against the tensors that they are given; ``strays`` is what was found.

    A lane that strays is left out of the access: it reads 0, and writes nothing.
    """

    NAME = "bounds"

    def __init__(self, spans: list[Span]) -> None:
        super().__init__()
        self._own = spans
        self._given: dict[int, Span] = {}
        self._known: tuple[int, list[Span], NDArray[np.uint64], NDArray[np.uint64]] | None = None
        self._searched = False
        self.strays: dict[Place, Stray] = {}
        self.launches = 0
        self._running = False

    def launch(self, it: Launch) -> object:
        """Run a launch that was intercepted, watched."""
        if self._running:  # triton-viz launches what it was given
            return it.run(it.kernel, *it.args, **it.kwargs)
        self._given, self._known, self._searched, self._running = {}, None, False, True
        self.launches += 1
        try:
            return triton_viz.trace(self)(it.kernel).run(*it.args, **it.kwargs)
        finally:
            self._running = False

    def arg_callback(self, name: str, arg: object, arg_cvt: object) -> None:  # noqa: ARG002 - its name in triton-viz
        """Take note of an argument of the launch."""
        if isinstance(arg, (tuple, list)):
            for index, element in enumerate(arg):
                self.arg_callback(f"{name}[{index}]", element, None)
        elif isinstance(base := getattr(arg, "base", arg), Tensor):
            self._take(base, f"argument {name}")

    def _take(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if size and not any(start <= span.start < start + size for span in self._own):
            self._given.setdefault(start, Span(start, start + size, name, tensor.element_size()))
            self._known = None

    def register_op_callback(self, op_type: type, *_: object, **__: object) -> OpCallbacks:
        """Stand in for what touches memory; all else goes through one of these."""
        originals = OPERATION_REGISTRY["triton"].original_ops[interpreter_builder]

        def load(pointers: TensorHandle, mask: TensorHandle, *rest: object) -> object:
            mask = self._within(Code.OUT_OF_BOUNDS, pointers, mask)
            return originals["create_masked_load"](pointers, mask, *rest)

        def store(pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: object) -> object:
            mask = self._within(Code.GUARD_WRITTEN, pointers, mask)
            return originals["create_masked_store"](pointers, value, mask, *rest)

        def update(op: object, pointers: TensorHandle, value: object, mask: TensorHandle, *rest: object) -> object:
            mask = self._within(Code.GUARD_WRITTEN, pointers, mask)
            return originals["create_atomic_rmw"](op, pointers, value, mask, *rest)

        def swap(pointers: TensorHandle, expected: TensorHandle, *rest: object) -> object:
            everywhere = TensorHandle(np.ones_like(pointers.data, dtype=bool), triton.language.int1)
            if self._within(Code.GUARD_WRITTEN, pointers, everywhere) is not everywhere:
                return expected
            return originals["create_atomic_cas"](pointers, expected, *rest)

        overriders: dict[type, Callable[..., object]] = {Load: load, Store: store, AtomicRMW: update, AtomicCas: swap}
        return OpCallbacks(op_overrider=overriders.get(op_type))

    def _within(self, code: Code, pointers: TensorHandle, mask: TensorHandle) -> TensorHandle:
        """``mask``, less the lanes that stray, which are noted."""
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data.astype(np.uint64)
        strays = mask.data.astype(bool) & ~self._held(addresses, itemsize)
        if not strays.any():
            return mask
        if not self._searched:
            self._searched = True
            for tensor in _living():
                self._take(tensor, "a tensor of the implementation")
            strays &= ~self._held(addresses, itemsize)
        if strays.any():
            self._note(code, addresses[strays], itemsize)
        return TensorHandle(mask.data & ~strays, mask.dtype)

    def _held(self, addresses: NDArray[np.uint64], itemsize: int) -> Any:
        """Of which addresses the elements lie in memory that is known."""
        _, starts, ends = self._sorted()
        at = np.searchsorted(starts, addresses, side="right") - 1
        return (at >= 0) & (addresses + np.uint64(itemsize) <= ends[np.maximum(at, 0)])

    def _sorted(self) -> tuple[list[Span], NDArray[np.uint64], NDArray[np.uint64]]:
        spans = len(self._own)
        if self._known is None or self._known[0] != spans:
            found = sorted([*self._own, *self._given.values()])
            starts = np.array([span.start for span in found], dtype=np.uint64)
            ends = np.maximum.accumulate(np.array([span.end for span in found], dtype=np.uint64))
            self._known = spans, found, starts, ends
        return self._known[1:]

    def _note(self, code: Code, addresses: NDArray[np.uint64], itemsize: int) -> None:
        spans, line = self._sorted()[0], _line_of_kernel()
        for address in addresses.tolist():
            span = min(spans, key=lambda it: max(it.start - address, address + itemsize - it.end))
            near = max(span.start - address, address + itemsize - span.end) <= GAP_BYTES
            place = Place(code, line, span if near else None)
            element = (address - span.start) // span.itemsize
            before = self.strays.get(place)
            self.strays[place] = Stray(1, element) if before is None else before._replace(times=before.times + 1)

    def grid_callback(self, grid: tuple[int, ...]) -> None:
        """Nothing is to be done."""

    def grid_idx_callback(self, grid_idx: tuple[int, ...]) -> None:
        """Nothing is to be done."""

    def pre_run_callback(self, fn: Callable[..., object]) -> bool:  # noqa: ARG002 - its name in triton-viz
        """Run every program."""
        return True

    def post_run_callback(self, fn: Callable[..., object]) -> bool:  # noqa: ARG002 - its name in triton-viz
        """Go on to the next program."""
        return True

    def pre_warmup_callback(self, jit_fn: Callable[..., object], *_: object, **__: object) -> bool:  # noqa: ARG002
        """Compile nothing."""
        return False

    def post_warmup_callback(self, jit_fn: Callable[..., object], ret: object) -> None:
        """Nothing was compiled."""

    def register_for_loop_callback(self) -> ForLoopCallbacks:
        """Loops are left as they are."""
        return ForLoopCallbacks()

    def finalize(self) -> list[object]:
        """There is nothing to keep for triton-viz's pages."""
        return []


def _living() -> Iterable[Tensor]:
    """Every tensor of this process: a kernel may have the address of one that is no argument."""
    return [it for it in gc.get_objects() if type(it) is Tensor and it.device.type == "cpu"]


def _line_of_kernel() -> str:
    """``file.py:12 in name``: the innermost line that is neither Triton's nor triton-viz's nor this program's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*_MACHINERY, "<")):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
