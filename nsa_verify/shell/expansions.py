"""The ragged expansion alone, stage by stage: what ``nsa-verify bench`` times beside whole refreshes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nsa_verify import kernels
from nsa_verify.device import timing
from nsa_verify.device.answers import POISON, WrongResult


class Expansions(NamedTuple):
    """What may be timed, by the name of the implementation that expands so; how to check it; bytes that must move."""

    rows: dict[str, timing.Candidate]
    check: timing.Check
    live_bytes: int


def expansions(batch_size: int, device: str, tokens: int = 4) -> Expansions:
    """The ragged expansion alone, as stages 0 to 2 do it and in one launch."""
    chance = torch.Generator().manual_seed(batch_size)
    accepts = torch.randint(1, tokens + 1, (batch_size,), generator=chance, dtype=torch.int32)
    lengths = torch.randint(2000, 4001, (batch_size,), generator=chance, dtype=torch.int32)
    both = list(zip(lengths.tolist(), accepts.tolist(), strict=True))
    expected = [length - accept + token + 1 for length, accept in both for token in range(accept)]
    rows = len(expected)
    accept_lens, seq_lens = accepts.to(device), lengths.to(device)
    expanded, clamped = (torch.zeros(batch_size * tokens, dtype=torch.int32, device=device) for _ in range(2))
    given = (accept_lens, seq_lens, timing.TOP_K)

    def stage_0() -> None:
        pairs = zip(seq_lens.tolist(), accept_lens.tolist(), strict=True)
        parts = [torch.arange(kv - qo + 1, kv + 1, dtype=torch.int32, device=device) for kv, qo in pairs]
        found = torch.cat(parts)
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

    def check(call: timing.Call) -> None:
        expanded.fill_(POISON)
        clamped.fill_(POISON)
        call()
        wanted = {"expanded": expected, "clamped": [min(it, timing.TOP_K) for it in expected]}
        for name, out in (("expanded", expanded), ("clamped", clamped)):
            for row, (want, got) in enumerate(zip(wanted[name], out[:rows].tolist(), strict=True)):
                if got != want:
                    raise WrongResult(f"{name}[{row}] must be {want} and is {got}")

    found = {
        "python-loop": timing.Candidate("python-loop (stage 0)", stage_0, False),
        "triton-fused": timing.Candidate("triton-fused (stage 1)", stage_1, False),
        "triton-inplace": timing.Candidate("triton-inplace (stage 2)", stage_2, False),
        "onepass": timing.Candidate("onepass", onepass, True),
    }
    return Expansions(found, check, 4 * (2 * batch_size + 2 * rows))
