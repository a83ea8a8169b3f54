"""How ``onepass`` should share its work out, side by side in one run. Needs a GPU.

``python -P benchmarks/onepass_shapes.py [--steps S] [--mode MODE]... [--shape NAME=VALUE,...]...`` prints, for each
mode and size of ``nsa-verify bench`` with that many steps, the device time of one call inside a captured graph for each
shape: fields of ``onepass._Shape`` that differ from what is usual. ``docs/performance.md`` says what came of it. What
is wrong is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.registry import find
from nsa_verify.device import timing
from nsa_verify.device.answers import Answers
from nsa_verify.kernels import onepass
from nsa_verify.shell.timing_tables import SIZES, sized

SHAPES = ("", "turns=16", "tails=132", "tails=528", "columns=256", "warps=4", "portions=32", "tail_portions=256")
USUAL = onepass._shape


def shaped(changes: dict[str, int]) -> Callable[..., onepass._Shape]:
    """What ``onepass`` asks for the shape of its launch; a head stays as many tiles for each of its programs."""

    def shape(batch_size: int, setup: Setup, seq_lens: Tensor, steps: int) -> onepass._Shape:
        usual = USUAL(batch_size, setup, seq_lens, steps)
        found = usual._replace(**changes)
        tiles = usual.head // (usual.turns * usual.columns)
        return found._replace(head=changes.get("head", tiles * found.turns * found.columns))

    return shape


def changes_of(text: str) -> dict[str, int]:
    """``name=value,...``; raises ``ArgumentTypeError``."""
    try:
        found = {name: int(value) for name, value in (it.split("=") for it in text.split(",") if it)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,..., as columns=256,tails=132") from None
    if unknown := found.keys() - set(onepass._Shape._fields):
        fields = ", ".join(onepass._Shape._fields)
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is no field of a shape; there are {fields}")
    return found


def cell(subject: timing.Subject) -> str:
    """Its device time, or what it raised while it was timed."""
    return f"[{subject.error}]" if subject.error else f"{median(subject.node_us):6.2f}"


def main() -> None:
    """Measure all shapes, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1, choices=sorted({it.num_steps for it in sized(SIZES, False)}))
    parser.add_argument("--mode", action="append", type=Mode, metavar="MODE", help=", ".join(Mode))
    parser.add_argument("--shape", action="append", type=changes_of, metavar="NAME=VALUE,...")
    parser.add_argument("--schedule", action="store_true")
    parser.add_argument("--repetitions", type=int, default=7)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("onepass_shapes needs a GPU: Triton's interpreter says nothing about the device")
    shapes = asked.shape or [changes_of(it) for it in SHAPES]
    floor = timing.floor(asked.repetitions)
    print(f"us a call; empty node {floor.empty_node_us:.2f}, {floor.bytes_per_us / 1e6:.2f} TB/s")
    names = [",".join(f"{name}={value}" for name, value in it.items()) or "usual" for it in shapes]
    print("mode, size, floor:", *names)
    for mode in asked.mode or Mode:
        for size in sized(SIZES, asked.schedule):
            if size.num_steps != asked.steps:
                continue
            given = timing.work(size, mode, "cuda")
            answers = Answers(given.inputs, given.steps, given.setup, given.slots)
            call = timing.refresh_of(find("onepass"), given)
            subjects = []
            for name, changes in zip(names, shapes, strict=True):
                onepass._shape = shaped(changes)
                subjects.append(timing.prepared(name, call, True, "cuda", answers.check))
            timing.measure(subjects, "cuda", asked.repetitions)
            times = " ".join(map(cell, subjects))
            print(f"{mode:16s} {size!s:44s} {floor.us(given.live_bytes):6.2f} | {times}", flush=True)
            del given, answers, call, subjects
            timing.forget("cuda")


if __name__ == "__main__":
    main()
