"""How ``onepass`` should share its work out: tiles and programs, side by side in one run. Needs a GPU.

``python -P benchmarks/onepass_shapes.py [--steps S] [--shape COLUMNS,PROGRAMS]...`` prints, for every mode and size of
``nsa-verify bench``, the device time of one call inside a captured graph for each shape: columns of a tile, programs in
all. ``docs/performance.md`` says what came of it. Values are not checked here; ``nsa-verify bench`` does that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median

from torch import Tensor

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.registry import find
from nsa_verify.device import timing
from nsa_verify.device.select import resolve
from nsa_verify.kernels import onepass
from nsa_verify.shell.timing_tables import SIZES

SHAPES = ["1024,2112", "1024,1584", "512,1584", "512,1056", "256,1056", "256,528"]


def shaped(columns: int, programs: int) -> Callable[..., onepass._Shape]:
    """What ``onepass`` asks for the shape of its launch; lengths are shared out as it does."""
    usual = onepass._shape

    def shape(batch_size: int, setup: Setup, seq_lens: Tensor, steps: int) -> onepass._Shape:
        turns = max(min(-(-setup.table_width // columns), programs // batch_size), 1)
        return usual(batch_size, setup, seq_lens, steps)._replace(columns=columns, turns=turns)

    return shape


def main() -> None:
    """Measure all shapes, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--shape", action="append", metavar="COLUMNS,PROGRAMS")
    parser.add_argument("--repetitions", type=int, default=7)
    asked = parser.parse_args()
    if resolve("auto") != "cuda":
        sys.exit("onepass_shapes needs a GPU: Triton's interpreter says nothing about the device")
    shapes = [tuple(map(int, it.split(","))) for it in asked.shape or SHAPES]
    floor = timing.floor(asked.repetitions)
    print(f"us a call; empty node {floor.empty_node_us:.2f}, {floor.bytes_per_us / 1e6:.2f} TB/s")
    print("mode, size, floor:", *(f"{columns}x{programs}" for columns, programs in shapes))
    for mode in Mode:
        for numbers in (it for it in SIZES if len(it) == 3 and (asked.steps == 1 or it == SIZES[0])):
            count, width, longest = numbers
            size = timing.Size(batch_size=count, table_width=width, longest=longest, num_steps=asked.steps)
            given = timing.work(size, mode, "cuda")
            call = timing.refresh_of(find("onepass"), given)
            subjects = []
            for columns, programs in shapes:
                onepass._shape = shaped(columns, programs)
                subjects.append(timing.prepared(f"{columns}x{programs}", call, True, "cuda"))
            timing.measure(subjects, "cuda", asked.repetitions)
            times = " ".join(f"{median(it.node_us):6.2f}" for it in subjects)
            print(f"{mode:16s} {size!s:28s} {floor.us(given.live_bytes):6.2f} | {times}", flush=True)
            del given, call, subjects
            timing.forget("cuda")


if __name__ == "__main__":
    main()
