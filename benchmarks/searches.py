"""How a row of a ragged batch finds its request: three ways, side by side in one run. Needs a GPU.

``python -P benchmarks/searches.py`` prints, for several batch sizes, the device time of the ragged expansion alone
inside a captured graph: *request* writes the rows of each request (``fill_draft_extend_metadata_onepass``), *linear*
compares each row with where all requests end, *binary* halves the prefix sum of the accept lengths, which a launch
before it writes. Each is checked against a plain count first. ``docs/performance.md`` says what came of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_verify.device import timing
from nsa_verify.device.select import resolve
from nsa_verify.kernels import fill_draft_extend_metadata_onepass

BATCH_SIZES = (1, 3, 32, 256, 512, 2048)
TOKENS = 4
LANES = 32
SEARCHED = 64


@triton.jit(do_not_specialize=["batch_size", "index_topk"])
def _linear(
    seq_lens: tl.tensor,  # [B]
    accept_lens: tl.tensor,  # [B]
    expanded: tl.tensor,  # [B*N]
    clamped: tl.tensor,  # [B*N]
    batch_size: tl.tensor,
    index_topk: tl.tensor,
    lanes: tl.constexpr,
    searched: tl.constexpr,
) -> None:
    row = tl.program_id(0) * lanes + tl.arange(0, lanes)
    owner = tl.full((lanes,), 0, tl.int32)
    first = tl.full((lanes,), 0, tl.int32)
    end = tl.full((), 0, tl.int32)
    for start in range(0, batch_size, searched):
        request = start + tl.arange(0, searched)
        accept = tl.load(accept_lens + request, mask=request < batch_size, other=0)
        ends = end + tl.cumsum(accept, 0)
        passed = (request < batch_size)[None, :] & (ends[None, :] <= row[:, None])
        owner += tl.sum(passed.to(tl.int32), 1)
        first += tl.sum(tl.where(passed, accept[None, :], 0), 1)
        end += tl.sum(accept, 0)
    defined = owner < batch_size
    length = tl.load(seq_lens + owner, mask=defined) - tl.load(accept_lens + owner, mask=defined) + row - first + 1
    tl.store(expanded + row, tl.maximum(length, 0), mask=defined)
    tl.store(clamped + row, tl.minimum(tl.maximum(length, 0), index_topk), mask=defined)


@triton.jit(do_not_specialize=["batch_size", "index_topk"])
def _binary(
    seq_lens: tl.tensor,  # [B]
    ends: tl.tensor,  # [B]
    expanded: tl.tensor,  # [B*N]
    clamped: tl.tensor,  # [B*N]
    batch_size: tl.tensor,
    index_topk: tl.tensor,
    lanes: tl.constexpr,
) -> None:
    row = tl.program_id(0) * lanes + tl.arange(0, lanes)
    low = tl.full((lanes,), 0, tl.int32)
    high = tl.full((lanes,), 0, tl.int32) + batch_size
    left = batch_size
    while left > 0:
        middle = (low + high) // 2
        unsettled = low < high
        past = unsettled & (tl.load(ends + middle, mask=unsettled, other=0) <= row)
        low = tl.where(past, middle + 1, low)
        high = tl.where(unsettled & (past == 0), middle, high)
        left = left // 2
    defined = low < batch_size
    # Where the draft tokens are among the KV length, a row has end - row - 1 tokens behind it.
    length = tl.load(seq_lens + low, mask=defined) - tl.load(ends + low, mask=defined) + row + 1
    tl.store(expanded + row, tl.maximum(length, 0), mask=defined)
    tl.store(clamped + row, tl.minimum(tl.maximum(length, 0), index_topk), mask=defined)


def ways(accept_lens: Tensor, seq_lens: Tensor, expanded: Tensor, clamped: Tensor) -> dict[str, Callable[[], object]]:
    """Calls that expand the batch, by name."""
    batch_size = accept_lens.shape[0]
    grid = (triton.cdiv(expanded.shape[0], LANES),)
    ends = torch.empty_like(accept_lens)

    def linear() -> None:
        _linear[grid](seq_lens, accept_lens, expanded, clamped, batch_size, timing.TOP_K, LANES, SEARCHED)

    def binary() -> None:
        torch.cumsum(accept_lens, 0, dtype=torch.int32, out=ends)
        _binary[grid](seq_lens, ends, expanded, clamped, batch_size, timing.TOP_K, LANES)

    def request() -> None:
        fill_draft_extend_metadata_onepass(accept_lens, seq_lens, timing.TOP_K, expanded, clamped)

    return {"request": request, "linear": linear, "binary": binary}


def checked(batch_size: int, device: str) -> dict[str, Callable[[], object]]:
    """The ways for a batch that some requests of accepted nothing in; raises ``AssertionError`` for a wrong one."""
    chance = torch.Generator().manual_seed(batch_size)
    accepts = torch.randint(0, TOKENS + 1, (batch_size,), generator=chance, dtype=torch.int32)
    lengths = torch.randint(2000, 4001, (batch_size,), generator=chance, dtype=torch.int32)
    both = zip(lengths.tolist(), accepts.tolist(), strict=True)
    expected = [length - accept + token + 1 for length, accept in both for token in range(accept)]
    expanded, clamped = (torch.zeros(batch_size * TOKENS, dtype=torch.int32, device=device) for _ in range(2))
    found = ways(accepts.to(device), lengths.to(device), expanded, clamped)
    for name, call in found.items():
        expanded.zero_()
        clamped.zero_()
        call()
        rest = [0] * (batch_size * TOKENS - len(expected))
        if (
            expanded.tolist() != expected + rest
            or clamped.tolist() != [min(it, timing.TOP_K) for it in expected] + rest
        ):
            raise AssertionError(f"{name} expands {batch_size} requests wrongly")
    return found


def main() -> None:
    """Check and measure all ways, interleaved."""
    if resolve("auto") != "cuda":
        sys.exit("searches needs a GPU: Triton's interpreter says nothing about the device")
    for batch_size in BATCH_SIZES:
        subjects = [timing.prepared(name, call, True, "cuda") for name, call in checked(batch_size, "cuda").items()]
        timing.measure(subjects, "cuda", 9)
        times = ", ".join(f"{it.name} {median(it.node_us):.2f} us in {it.launches}" for it in subjects)
        print(f"B {batch_size}: {times}", flush=True)


if __name__ == "__main__":
    main()
