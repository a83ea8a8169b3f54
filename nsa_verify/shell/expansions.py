"""The ragged expansion alone, stage by stage: what ``nsa-verify bench`` times beside whole refreshes."""

from __future__ import annotations

import torch

from nsa_verify import kernels
from nsa_verify.device import timing


def expansions(batch_size: int, device: str, tokens: int = 4) -> tuple[list[timing.Subject], int]:
    """The ragged expansion alone, as stages 0 to 2 do it and in one launch; and the bytes that must move.

    Raises ``AssertionError`` for one whose values are wrong: such a one is not timed.
    """
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

    subjects: list[timing.Subject] = []
    for name, call in (
        ("python-loop (stage 0)", stage_0),
        ("triton-fused (stage 1)", stage_1),
        ("triton-inplace (stage 2)", stage_2),
        ("onepass", onepass),
    ):
        expanded.zero_()
        clamped.zero_()
        call()
        if expanded[:rows].tolist() != expected or clamped[:rows].tolist() != [
            min(it, timing.TOP_K) for it in expected
        ]:
            raise AssertionError(f"{name} expands {batch_size} ragged requests wrongly")
        subjects.append(timing.prepared(name, call, call is onepass, device))
    return subjects, 4 * (2 * batch_size + 2 * rows)
