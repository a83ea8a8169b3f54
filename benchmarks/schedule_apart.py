"""Whether the paged-MQA schedule belongs into the launch of ``onepass``: side by side in one run. Needs a GPU.

``python -P benchmarks/schedule_apart.py`` prints, for each mode and size of ``nsa-verify bench`` of one step, the
device time of a refresh inside a captured graph: without the schedule, with it in the same launch, and with it in a
second launch that does nothing else. What is wrong is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import triton
import triton.language as tl
from msgspec import structs

from nsa_verify.core.case import CtxLens, Mode
from nsa_verify.core.registry import find
from nsa_verify.device import timing
from nsa_verify.device.answers import Answers
from nsa_verify.kernels.onepass import _fill_schedule, _shape
from nsa_verify.shell.timing_tables import SIZES, sized


@triton.jit(do_not_specialize=["batch_size", "added", "tokens", "num_sms"])
def _schedule_alone(
    seq_lens: tl.tensor,
    accept_lens: tl.tensor,
    to_schedule: tl.tensor,
    batch_size: tl.tensor,
    added: tl.tensor,
    tokens: tl.tensor,
    num_sms: tl.tensor,
    RAGGED: tl.constexpr,
    OF_REQUESTS: tl.constexpr,
    PORTIONS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    batch = (seq_lens, 1, accept_lens, 1, batch_size, added, tokens)
    # A row has two cells; its stride s is given as 2s + 1.
    _fill_schedule(block, batch, (to_schedule,), (5,), num_sms, RAGGED, OF_REQUESTS, PORTIONS, ENTRIES)


def apart(given: timing.Work) -> Callable[[], None]:
    """A refresh by ``onepass`` without the schedule, then a launch that writes it."""
    inputs, setup, (step,) = given.inputs, given.setup, given.steps
    mode, count = inputs.mode, inputs.batch_size
    refresh = timing.refresh_of(
        find("onepass"), structs.replace(given, steps=(replace(step, paged_mqa_schedule=None),))
    )
    shape = _shape(count, setup, inputs.seq_lens, 1)
    grid = (triton.cdiv(setup.num_sms + 1, shape.entries),)

    def call() -> None:
        refresh()
        _schedule_alone[grid](
            inputs.seq_lens,
            inputs.accept_lens,
            step.paged_mqa_schedule,
            count,
            setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0,
            1 if mode is Mode.DECODE else setup.num_draft_tokens,
            setup.num_sms,
            RAGGED=mode is Mode.DRAFT_EXTEND,
            OF_REQUESTS=setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY,
            PORTIONS=shape.portions,
            ENTRIES=shape.entries,
            num_warps=shape.warps,
        )

    return call


def main() -> None:
    """Measure the three, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("schedule_apart needs a GPU: Triton's interpreter says nothing about the device")
    print("us a call: without the schedule, in the same launch, in one of its own")
    for mode in Mode:
        for size in sized(SIZES, True):
            if size.num_steps == 1 and size.schedule:
                times = " ".join(f"{median(it.node_us):6.2f}" for it in measured(size, mode, asked.repetitions))
                print(f"{mode:16s} {size!s:44s} | {times}", flush=True)


def measured(size: timing.Size, mode: Mode, repetitions: int) -> list[timing.Subject]:
    """The three, of which the first is not asked for the schedule."""
    given = timing.work(size, mode, "cuda")
    answers = Answers(given.inputs, given.steps, given.setup, given.slots)
    bare = structs.replace(given, steps=tuple(replace(it, paged_mqa_schedule=None) for it in given.steps))
    subjects = [
        timing.prepared("without", timing.refresh_of(find("onepass"), bare), True, "cuda"),
        timing.prepared("within", timing.refresh_of(find("onepass"), given), True, "cuda", answers.check),
        timing.prepared("apart", apart(given), True, "cuda", answers.check),
    ]
    timing.measure(subjects, "cuda", repetitions)
    timing.forget("cuda")
    return subjects


if __name__ == "__main__":
    main()
