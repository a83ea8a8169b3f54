"""Compile, without a GPU, every Triton launch that an implementation makes: run as a script, with no interpreter.

``refresh`` is called on CPU tensors with each launch turned into Triton's own warm-up, which specialises the arguments
and compiles as the launch would have, for an sm_90 GPU: that is where a kernel that only ever ran interpreted would
fail. Prints a line per compilation. Then batch sizes and lengths vary, and nothing more may be compiled.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from msgspec.structs import replace
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nsa_verify import Case, CtxLens, Mode, Replay, Request, Setup
from nsa_verify.core.case import IntType
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Implementation
from nsa_verify.core.registry import find
from nsa_verify.device.images import ImageKey, paint
from nsa_verify.device.rig import Rig

REAL_RUN = JITFunction.run
compiled: list[str] = []


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
        compiled.append(f"{self.fn.__name__} {' '.join(constants)}")
        print(f"compiled {compiled[-1]}", flush=True)


def refresh(implementation: Implementation, setup: Setup, replay: Replay) -> None:
    """Serve ``replay`` once, with every optional output."""
    case = Case(setup, (replay,))
    rig = Rig(setup, "cpu")
    values, _ = paint(case, ImageKey.of(implementation, setup))
    rig.load(case, 0, torch.frombuffer(values, dtype=torch.int32))
    bucket = case.bucket(0)
    implementation.refresh(rig.inputs(replay.mode, bucket), rig.steps(replay.mode, bucket, OPTIONAL_OUTPUTS), setup)


def setups() -> list[Setup]:
    """Every form of setup that chooses another kernel or constexpr."""
    forms: tuple[tuple[int, IntType], ...] = ((1, "int32"), (16, "int64"))
    return [
        Setup(
            num_draft_tokens=3,
            page_size=page_size,
            pool_width=40,
            table_width=40,
            buckets=(2,),
            num_steps=2,
            stride_skew=8,
            seq_lens_dtype=wide,
            pool_index_dtype=wide,
            ctx_lens=CtxLens.OWN,
            schedule=True,
        )
        for page_size, wide in forms
    ]


def main(name: str) -> None:
    """Refresh in every mode and form of setup; then again with other batch sizes, lengths and row strides."""
    triton.runtime.driver.set_active(AbsentGpu())
    JITFunction.run = launch
    implementation = find(name)
    for setup in setups():
        for mode in Mode:
            refresh(implementation, setup, Replay(mode, (Request(9, 0, 2), Request(5, 0, 3))))
    first = len(compiled)
    if not first:
        sys.exit(f"{name} launched nothing")
    for setup in setups():
        for bucket, width, longest in ((1, 40, 1), (5, 64, 37), (16, 513, 400), (33, 40, 9)):
            other = replace(
                setup, buckets=(bucket,), table_width=width, table_row_stride=width, pool_width=600, pool_row_stride=600
            )
            requests = tuple(Request(3 + (7 * row) % longest, 0, row % 4) for row in range(bucket))
            for mode in Mode:
                refresh(implementation, other, Replay(mode, requests))
    if len(compiled) > first:
        sys.exit(f"compiled again for another batch: {'; '.join(compiled[first:])}")


if __name__ == "__main__":
    main(sys.argv[1])
