"""Compile, without a GPU, the kernels that compare: run as a script, with no interpreter.

Prints a line per compilation; setups of all sizes, and cases of all modes, must share them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from kernels.compile_launches import REAL_RUN, AbsentGpu
from triton.runtime.jit import JITFunction

from nsa_verify import Case, Mode, Replay, Request, Setup
from nsa_verify.core.registry import find
from nsa_verify.device.comparing import loads, upload
from nsa_verify.device.fused import FusedComparison
from nsa_verify.device.images import ImageKey
from nsa_verify.device.rig import Rig


def launch(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """What replaces a launch: compile what it would have run."""
    cache = self.device_caches[0][0]
    before = len(cache)
    REAL_RUN(self, *args, grid=grid, warmup=True, **kwargs)
    if len(cache) > before:
        print(f"compiled {self.fn.__name__}", flush=True)


def main() -> None:
    """Begin and check as a batch would."""
    triton.runtime.driver.set_active(AbsentGpu())
    JITFunction.run = launch
    implementation = find("vectorized")
    for setup in (Setup(), Setup(page_size=16, buckets=(1, 7), pool_rows=5, pool_width=99, pool_row_stride=131)):
        for mode in Mode:
            case = Case(setup, (Replay(mode, (Request(5, 0),)), Replay(mode, (Request(4, 0),), pool_seed=1)))
            rig = Rig(setup, "cpu")
            comparison, given = FusedComparison(rig), loads(rig, case)
            image = upload(rig, case, (key := ImageKey.of(implementation, setup),))[key]
            flags = torch.zeros(40, dtype=torch.int32)
            comparison.begin(image, given[0])
            for flag in (0, 1, 16, 33):
                comparison.check(image, given[0], flags, flag, given[1])
                comparison.check(image, given[1], flags, flag, None)


if __name__ == "__main__":
    main()
