"""The ragged expansion alone, stage by stage: what ``nsa-verify bench`` times beside whole refreshes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from nsa_verify import kernels
from nsa_verify.device import timing
from nsa_verify.device.answers import INPUT, POISON, Kept, WrongResult

EDGES: Final = ((1, 4), (5000, 0), (3, 3), (2049, 2), (0, 4), (2, 0), (100, 1))
"""Lengths and accept lengths that ``check`` deals out in turn: no row, a padded length, rows below 0 and below K."""


class Expansions(NamedTuple):
    """What may be timed, by the name of the implementation whose verdict it needs; how to check it; how to have the
    inputs hold what is timed; bytes that must move."""

    rows: dict[str, timing.Candidate]
    check: timing.Check
    restore: Callable[[], object]
    live_bytes: int


def expansions(batch_size: int, device: str, tokens: int = 4) -> Expansions:
    """The ragged expansion alone, as stages 0 to 2 do it and in one launch.

    ``check`` makes the call for ``EDGES`` too, in the same memory, so that replays of a graph are checked likewise, and
    looks at every row of the outputs, and at the inputs; it leaves the batch that is timed.
    """
    chance = torch.Generator().manual_seed(batch_size)
    accepts = torch.randint(1, tokens + 1, (batch_size,), generator=chance, dtype=torch.int32)
    lengths = torch.randint(2000, 4001, (batch_size,), generator=chance, dtype=torch.int32)
    timed = list(zip(lengths.tolist(), accepts.tolist(), strict=True))
    edges = [[EDGES[(turn + row) % len(EDGES)] for row in range(batch_size)] for turn in range(len(EDGES))]
    accept_lens, seq_lens = accepts.to(device), lengths.to(device)
    expanded, clamped = (torch.zeros(batch_size * tokens, dtype=torch.int32, device=device) for _ in range(2))
    given = (accept_lens, seq_lens, timing.TOP_K)

    def stage_0() -> None:
        pairs = zip(seq_lens.tolist(), accept_lens.tolist(), strict=True)
        parts = [torch.arange(kv - qo + 1, kv + 1, dtype=torch.int32, device=device) for kv, qo in pairs]
        found = torch.cat(parts).clamp(min=0)
        expanded[: found.shape[0]].copy_(found)
        clamped[: found.shape[0]].copy_(found.clamp(max=timing.TOP_K))

    def stage_1() -> None:
        found = kernels.fill_draft_extend_metadata_fused_simple(*given)
        for out, values in zip((expanded, clamped), found, strict=True):
            out[: values.shape[0]].copy_(values)

    def stage_2() -> None:
        kernels.fill_draft_extend_metadata_inplace(*given, expanded, clamped)

    def onepass() -> None:
        kernels.fill_draft_extend_metadata_onepass(*given, expanded, clamped)

    def load(pairs: list[tuple[int, int]]) -> None:
        values = torch.tensor(pairs, dtype=torch.int32)
        seq_lens.copy_(values[:, 0])
        accept_lens.copy_(values[:, 1])

    def check(call: timing.Call) -> None:
        try:
            for pairs in (*edges, [(5, 0)] * batch_size, timed):
                load(pairs)
                expanded.fill_(POISON)
                clamped.fill_(POISON)
                kept = [Kept(name, INPUT, it) for name, it in (("seq_lens", seq_lens), ("accept_lens", accept_lens))]
                call()
                for it in kept:
                    it.refuse_changed()
                wanted = _expanded(pairs)
                _compare("expanded", expanded, wanted)
                _compare("clamped", clamped, [min(it, timing.TOP_K) for it in wanted])
        finally:
            load(timed)

    found = {
        "python-loop": timing.Candidate("python-loop (stage 0)", stage_0, False),
        "triton-fused": timing.Candidate("triton-fused (stage 1)", stage_1, False),
        "engine-expansion-inplace": timing.Candidate("triton-inplace (stage 2)", stage_2, False),
        "engine-expansion": timing.Candidate("onepass", onepass, True),
    }
    return Expansions(found, check, lambda: load(timed), 4 * (2 * batch_size + 2 * len(_expanded(timed))))


def _expanded(pairs: list[tuple[int, int]]) -> list[int]:
    """The contract's section 2, request by request."""
    return [max(0, length - accept + token + 1) for length, accept in pairs for token in range(accept)]


def _compare(name: str, out: Tensor, wanted: list[int]) -> None:
    """Past the ``wanted`` rows there must be poison."""
    for row, got in enumerate(out.tolist()):
        if row < len(wanted) and got != wanted[row]:
            raise WrongResult(f"{name}[{row}] must be {wanted[row]} and is {got}")
        if row >= len(wanted) and got != POISON:
            raise WrongResult(f"{name}[{row}] is behind the last of {len(wanted)} rows and was overwritten with {got}")
