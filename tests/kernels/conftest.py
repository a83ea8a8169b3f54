"""A backend with buffers of its own, so that these tests lean on neither the arena nor the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nsa_verify import CtxLens, MetadataBuffers, Mode, ReplayInputs, Setup
from nsa_verify.core.registry import load_builtin

POISON = -77
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where compiled kernels run; without CUDA they are interpreted."""

load_builtin()


@dataclass(frozen=True)
class Backend:
    """The inputs of one replay and poisoned buffers for every step."""

    setup: Setup
    inputs: ReplayInputs
    steps: list[MetadataBuffers]


def _buffers(setup: Setup, mode: Mode, batch_size: int) -> MetadataBuffers:
    def poisoned(*shape: int) -> Tensor:
        return torch.full(shape, POISON, dtype=torch.int32, device=DEVICE)

    rows = setup.captured_rows(mode, batch_size)
    cache_seqlens = poisoned(batch_size)
    expanded = cache_seqlens if mode is Mode.DECODE else poisoned(rows)
    page_table = poisoned(rows, setup.table_width)
    ctx_lens = None
    if setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY:
        ctx_lens = poisoned(batch_size, setup.num_draft_tokens)
    elif setup.ctx_lens is not CtxLens.ABSENT:
        ctx_lens = expanded.view(rows, 1)
    return MetadataBuffers(
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=poisoned(batch_size + 1),
        nsa_seqlens_expanded=expanded,
        nsa_cache_seqlens=poisoned(rows),
        nsa_cu_seqlens_k=poisoned(rows + 1),
        page_table_1=page_table,
        real_page_table=page_table if setup.page_size == 1 else poisoned(rows, setup.real_table_width),
        cu_seqlens_q=poisoned(batch_size + 1),
        nsa_cu_seqlens_q=poisoned(rows + 1),
        paged_mqa_ctx_lens=ctx_lens,
        paged_mqa_schedule=poisoned(setup.num_sms + 1, 2) if setup.schedule else None,
    )


MakeBackend = Callable[..., Backend]


@pytest.fixture
def make_backend() -> MakeBackend:
    """``make_backend(setup, mode, seq_lens, accept_lens)``; slot j of request b is ``1000 b + 3 j``."""

    def make(setup: Setup, mode: Mode, seq_lens: Sequence[int], accept_lens: Sequence[int] = ()) -> Backend:
        batch_size = len(seq_lens)
        columns = torch.arange(setup.pool_width, dtype=torch.int32, device=DEVICE)
        requests = torch.arange(batch_size, dtype=torch.int32, device=DEVICE)
        inputs = ReplayInputs(
            mode=mode,
            batch_size=batch_size,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int64, device=DEVICE),
            seq_lens_cpu=None,
            req_pool_indices=torch.arange(batch_size, device=DEVICE),
            req_to_token=1000 * requests[:, None] + 3 * columns[None, :],
            accept_lens=torch.tensor(list(accept_lens) or [POISON] * batch_size, dtype=torch.int32, device=DEVICE),
        )
        return Backend(setup, inputs, [_buffers(setup, mode, batch_size) for _ in range(setup.num_steps)])

    return make
