"""The vectors of the contract, literally: does each implementation write them, in every step?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nsa_verify import MetadataBuffers, Mode, Setup
from nsa_verify.core.implementation import registered
from nsa_verify.kernels import BUILTIN_MODULES

NAMES = (
    "python-loop",
    "vectorized",
    "triton-fused",
    "triton-inplace",
    "precomputed-copy",
    "precomputed-batched-copy",
    "onepass",
)
SEQ_LENS = [13, 5, 1]


class Vector(NamedTuple):
    """Expected one-dimensional outputs for K = 8, N = 3 and the lengths above; the third request is padding."""

    mode: Mode
    accept_lens: list[int]
    cache_seqlens: list[int]
    cu_seqlens_k: list[int]
    expanded: list[int]
    nsa_cache_seqlens: list[int]
    nsa_cu_seqlens_k: list[int]
    owners: list[int]


VECTORS = (
    Vector(
        mode=Mode.DECODE,
        accept_lens=[],
        cache_seqlens=[13, 5, 1],
        cu_seqlens_k=[0, 13, 18, 19],
        expanded=[13, 5, 1],
        nsa_cache_seqlens=[8, 5, 1],
        nsa_cu_seqlens_k=[0, 8, 13, 14],
        owners=[0, 1, 2],
    ),
    Vector(
        mode=Mode.TARGET_VERIFY,
        accept_lens=[],
        cache_seqlens=[16, 8, 4],
        cu_seqlens_k=[0, 16, 24, 28],
        expanded=[14, 15, 16, 6, 7, 8, 2, 3, 4],
        nsa_cache_seqlens=[8, 8, 8, 6, 7, 8, 2, 3, 4],
        nsa_cu_seqlens_k=[0, 8, 16, 24, 30, 37, 45, 47, 50, 54],
        owners=[0, 0, 0, 1, 1, 1, 2, 2, 2],
    ),
    Vector(
        mode=Mode.DRAFT_EXTEND,
        accept_lens=[2, 3, 1],
        cache_seqlens=[13, 5, 1],
        cu_seqlens_k=[0, 13, 18, 19],
        expanded=[12, 13, 3, 4, 5, 1],
        nsa_cache_seqlens=[8, 8, 3, 4, 5, 1],
        nsa_cu_seqlens_k=[0, 8, 16, 19, 23, 28, 29],
        owners=[0, 0, 1, 1, 1, 2],
    ),
    Vector(
        mode=Mode.DRAFT_EXTEND_V2,
        accept_lens=[3, 3, 3],
        cache_seqlens=[13, 5, 1],
        cu_seqlens_k=[0, 13, 18, 19],
        expanded=[11, 12, 13, 3, 4, 5, 0, 0, 1],
        nsa_cache_seqlens=[8, 8, 8, 3, 4, 5, 0, 0, 1],
        nsa_cu_seqlens_k=[0, 8, 16, 24, 27, 31, 36, 36, 36, 37],
        owners=[0, 0, 0, 1, 1, 1, 2, 2, 2],
    ),
)


def _assert_step(step: MetadataBuffers, vector: Vector, pool: Tensor, page_size: int) -> None:
    rows = len(vector.expanded)
    assert step.cache_seqlens.tolist() == vector.cache_seqlens
    assert step.cu_seqlens_k.tolist() == vector.cu_seqlens_k
    assert step.nsa_seqlens_expanded[:rows].tolist() == vector.expanded
    assert step.nsa_cache_seqlens[:rows].tolist() == vector.nsa_cache_seqlens
    assert step.nsa_cu_seqlens_k[: rows + 1].tolist() == vector.nsa_cu_seqlens_k
    for row, owner in enumerate(vector.owners):
        kv_len = vector.cache_seqlens[owner]
        slots = pool[owner].tolist()
        assert step.page_table_1[row, :kv_len].tolist() == slots[:kv_len]
        pages = [slot // page_size for slot in slots[:kv_len:page_size]]
        assert step.real_page_table[row, : len(pages)].tolist() == pages


@pytest.mark.parametrize("vector", VECTORS, ids=[str(vector.mode) for vector in VECTORS])
@pytest.mark.parametrize("name", NAMES)
def test_vectors(make_backend: Callable[..., Any], name: str, vector: Vector) -> None:
    setup = Setup(
        num_draft_tokens=3, index_topk=8, page_size=16, table_width=18, pool_width=24, num_steps=2, buckets=(3,)
    )
    backend = make_backend(setup, vector.mode, SEQ_LENS, vector.accept_lens)
    registered()[name].refresh(backend.inputs, backend.steps, setup)
    for step in backend.steps:
        _assert_step(step, vector, backend.inputs.req_to_token, setup.page_size)


@pytest.mark.parametrize(
    ("lengths", "num_sms", "entries"),
    [
        ([1000, 0, 300, 513], 4, [[0, 0], [0, 3], [2, 1], [3, 1], [4, 0]]),
        ([1, 1], 5, [[0, 0], [1, 0], [2, 0], [2, 0], [2, 0], [2, 0]]),
        ([0, 0, 0], 2, [[3, 0], [3, 0], [3, 0]]),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_schedule_vectors(
    make_backend: Callable[..., Any], name: str, lengths: list[int], num_sms: int, entries: list[list[int]]
) -> None:
    setup = Setup(
        table_width=1024, pool_width=1040, buckets=(len(lengths),), num_sms=num_sms, schedule=True, num_steps=2
    )
    backend = make_backend(setup, Mode.DECODE, lengths)
    registered()[name].refresh(backend.inputs, backend.steps, setup)
    for step in backend.steps:
        assert step.paged_mqa_schedule is not None
        assert step.paged_mqa_schedule.tolist() == entries


@pytest.mark.parametrize("name", NAMES)
def test_no_accepted_token_leaves_everything_but_the_totals(make_backend: Callable[..., Any], name: str) -> None:
    setup = Setup(num_draft_tokens=2, table_width=8, buckets=(2,), schedule=True)
    backend = make_backend(setup, Mode.DRAFT_EXTEND, [7, 1], [0, 0])
    (step,) = backend.steps
    assert step.paged_mqa_schedule is not None
    untouched = (step.nsa_seqlens_expanded, step.nsa_cache_seqlens, step.page_table_1, step.paged_mqa_schedule)
    before = [buffer.clone() for buffer in untouched]
    registered()[name].refresh(backend.inputs, backend.steps, setup)
    assert step.cache_seqlens.tolist() == [7, 1]
    assert step.cu_seqlens_k.tolist() == [0, 7, 8]
    assert step.nsa_cu_seqlens_k[0].item() == 0
    assert torch.equal(step.nsa_cu_seqlens_k[1:], torch.full_like(step.nsa_cu_seqlens_k[1:], -77))
    assert all(torch.equal(buffer, was) for buffer, was in zip(untouched, before, strict=True))


def test_the_matrix_has_these_rows_in_this_order() -> None:
    sources = {name: registered()[name].refresh.__module__ for name in NAMES}
    assert tuple(sources.values()) == BUILTIN_MODULES
