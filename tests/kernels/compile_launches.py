"""Compile, without a GPU, every Triton launch that an implementation makes: run as a script, with no interpreter.

``refresh`` is called on CPU tensors that say that they are on a GPU, with each launch turned into Triton's own warm-up,
which specialises the arguments and compiles as the launch would have, for an sm_90 GPU: that is where a kernel that
only ever ran interpreted would fail. Prints a line per compilation. Then batch sizes and lengths vary, and nothing more
may be compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nsa_verify import CtxLens, Mode, Setup
from nsa_verify.core.buffers import TABLES, alias_of, shapes
from nsa_verify.core.case import IntType
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Implementation, MetadataBuffers, ReplayInputs
from nsa_verify.core.registry import find

REAL_RUN = JITFunction.run
REAL_COMPILE = JITFunction._do_compile
STEPS = (1, 2, 8)
WIDTH = 5000
"""Columns: implementations may take tables that no engine has, as tests have them, in other shapes."""
FORMS: tuple[tuple[int, IntType, int], ...] = ((16, "int64", 0), (1, "int32", 0), (16, "int64", 8), (1, "int32", 8))
"""Page sizes, dtypes of lengths and indices, and what each step's row strides are more than those of the one before."""
COMPILED = ((1, 0, tuple(Mode)), (2, 1, (Mode.DECODE,)), (2, 2, (Mode.DRAFT_EXTEND,)), (8, 0, (Mode.DECODE,)))
"""Numbers of steps, places in ``FORMS`` and modes: all modes and numbers of steps are among them, tables with pages and
without, strides that are the same in all steps, as in engines, and strides that are not."""
FEW = ((1, 0, (Mode.DECODE,)), (2, 2, (Mode.DRAFT_EXTEND,)))
"""The two of them that are least alike."""
forms: list[str] = []
"""Of kernels, each as it was asked for first."""
compiles = [True]
"""Whether a form is compiled, or only noted, since compiling takes seconds."""


class AbsentGpu:
    """As much of a Triton driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The key of the kernels' caches."""
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002 - Triton passes it
        """Of no consequence."""
        return 0


def launch(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """What replaces a launch: compile what it would have run."""
    for parameter, value in zip(self.params, args, strict=False):
        if parameter.name.startswith("out_"):
            value.zero_()  # what follows in torch must not trip over memory that nobody wrote
    cache = self.device_caches[0][0]
    before = len(cache)
    REAL_RUN(self, *args, grid=grid, warmup=True, **kwargs)
    if len(cache) > before:
        constants = sorted(f"{name}={value}" for name, value in kwargs.items())
        forms.append(f"{self.fn.__name__} {' '.join(constants)}")
        if compiles[0]:
            print(f"compiled {forms[-1]}", flush=True)


def note(self: JITFunction[Any], key: str, *args: Any) -> object:
    """What replaces a compilation: it is asked for once, all the same."""
    if compiles[0]:
        return REAL_COMPILE(self, key, *args)
    self.device_caches[0][0][key] = object()
    return self.device_caches[0][0][key]


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """Tensors say that they are on one, so that implementations choose the shapes of launches that they have there."""
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]
    try:
        assert torch.empty(0).is_cuda
        yield
    finally:
        del torch.Tensor.is_cuda


def refresh(implementation: Implementation, setup: Setup, mode: Mode, lengths: Sequence[int]) -> None:
    """Serve one batch of ``lengths``, with every optional output; each request accepts another number of tokens."""
    count, whole = len(lengths), getattr(torch, setup.seq_lens_dtype)
    seq_lens = torch.tensor(lengths, dtype=whole)
    inputs = ReplayInputs(
        mode=mode,
        batch_size=count,
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens,
        req_pool_indices=torch.zeros(count, dtype=whole),
        req_to_token=torch.empty((1, setup.pool_width), dtype=torch.int32),
        accept_lens=torch.arange(1, count + 1, dtype=torch.int32) % (setup.num_draft_tokens + 1),
    )
    steps = [buffers(setup, mode, count, step) for step in range(setup.num_steps)]
    with on_a_gpu():
        implementation.refresh(inputs, steps, setup)


def buffers(setup: Setup, mode: Mode, count: int, step: int) -> MetadataBuffers:
    """Those of one step, of which hardly any memory is ever touched; each step's tables have a stride of their own."""
    made: dict[str, torch.Tensor] = {}
    for name, shape in shapes(setup, mode, count).items():
        alias = alias_of(setup, mode, name)
        if alias is not None:
            made[name] = made[alias].view(shape) if name in OPTIONAL_OUTPUTS else made[alias]
        elif name in (*TABLES, *OPTIONAL_OUTPUTS):
            padded = torch.empty((shape.rows, shape.columns + step * setup.stride_skew), dtype=torch.int32)
            made[name] = padded[:, : shape.columns]
        else:
            made[name] = torch.empty(shape.columns, dtype=torch.int32)
    return MetadataBuffers(**made)


def setups(num_steps: int, count: int = 2, width: int = WIDTH) -> list[Setup]:
    """Every form of setup that chooses another kernel or constexpr; strides of a single step are those of all."""
    return [
        Setup(
            num_draft_tokens=3,
            page_size=page_size,
            pool_width=width,
            table_width=width,
            buckets=(count,),
            num_steps=num_steps,
            stride_skew=stride_skew,
            seq_lens_dtype=wide,
            pool_index_dtype=wide,
            ctx_lens=CtxLens.OWN,
            schedule=True,
        )
        for page_size, wide, stride_skew in FORMS
        if num_steps > 1 or not stride_skew
    ]


def refresh_first(implementation: Implementation, few: bool) -> None:
    """In every mode, form of setup and number of steps; what ``COMPILED``, or ``FEW``, leaves out is noted."""
    chosen = FEW if few else COMPILED
    compiled = [(setups(num_steps)[form], mode) for num_steps, form, modes in chosen for mode in modes]
    noted = [(setup, mode) for num_steps in STEPS for setup in setups(num_steps) for mode in Mode]
    for compiles[0], those in ((True, compiled), (False, noted)):
        for setup, mode in those:
            refresh(implementation, setup, mode, (9, 5))


def main(name: str, few: bool) -> None:
    """Refresh, then again with other batch sizes, lengths and row strides."""
    triton.runtime.driver.set_active(AbsentGpu())
    JITFunction.run = launch
    JITFunction._do_compile = note
    implementation = find(name)
    refresh_first(implementation, few)
    first = len(forms)
    if not first:
        sys.exit(f"{name} launched nothing")
    for num_steps in STEPS:
        for count, width, longest in ((1, WIDTH, 1), (5, WIDTH + 1, 37), (33, 3 * WIDTH, 1200), (512, WIDTH, 9)):
            lengths = [3 + (7 * row) % longest for row in range(count)]
            for setup in setups(num_steps, count, width):
                for mode in Mode:
                    refresh(implementation, setup, mode, lengths)
    if len(forms) > first:
        sys.exit(f"compiled again for another batch: {'; '.join(forms[first:])}")


if __name__ == "__main__":
    main(sys.argv[1], few="few" in sys.argv[2:])
