"""``precomputed-copy``: what is computed once is whole and private, and what is cached never goes stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_verify import Mode, Setup
from nsa_verify.kernels import precomputed_copy
from nsa_verify.kernels.precomputed_copy import PrecomputedMetadata, _columns, copy_into, precompute, refresh


def test_the_cached_columns_follow_page_size_and_width(make_backend: Callable[..., Any]) -> None:
    seq_lens = [2900, 1, 65]
    for page_size, width in [(16, 64), (64, 300), (16, 3000), (128, 2000), (1, 50), (32, 3000), (16, 64)]:
        setup = Setup(page_size=page_size, table_width=width, pool_width=3100, buckets=(3,))
        backend = make_backend(setup, Mode.DECODE, seq_lens)
        refresh(backend.inputs, backend.steps, setup)
        (step,) = backend.steps
        for row, seq_len in enumerate(seq_lens):
            slots = backend.inputs.req_to_token[row, : min(seq_len, width)]
            assert torch.equal(step.page_table_1[row, : len(slots)], slots)
            pages = slots[::page_size] // page_size
            assert torch.equal(step.real_page_table[row, : len(pages)], pages), (page_size, width)


def test_the_cached_columns_are_per_device_and_grow() -> None:
    meta = torch.device("meta")
    assert _columns(4, meta).device == meta
    assert _columns(4, torch.device("cpu")).tolist() == [0, 1, 2, 3]
    assert torch.equal(_columns(5000, torch.device("cpu")), torch.arange(5000))
    assert _columns(4, torch.device("cpu")).tolist() == [0, 1, 2, 3]
    assert _columns(6000, meta).shape == (6000,)


def test_the_fields_at_the_context_wall(make_backend: Callable[..., Any]) -> None:
    setup = Setup(num_draft_tokens=3, index_topk=8, page_size=16, table_width=20, pool_width=27, buckets=(2,))
    backend = make_backend(setup, Mode.TARGET_VERIFY, [22, 5])
    precomputed = precompute(backend.inputs, setup)
    assert (precomputed.max_len, precomputed.max_seqlen_k, precomputed.seqlens_expanded_size) == (20, 25, 6)
    assert precomputed.page_indices.shape == (6, 20)
    assert precomputed.real_page_table is not None
    assert precomputed.real_page_table.tolist() == [[0, 3]] * 3 + [[62, 65]] * 3
    assert precomputed.cu_seqlens_k.tolist() == [0, 25, 33]
    tensors = [getattr(precomputed, name) for name in PrecomputedMetadata.__slots__]
    dtypes = {tensor.dtype for tensor in tensors if isinstance(tensor, torch.Tensor)}
    assert dtypes == {torch.int32}


def test_nothing_of_the_batch_is_frozen_in_a_capture(
    make_backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(precomputed_copy, "_cached_columns", {})
    setup = Setup(num_draft_tokens=3, page_size=16, table_width=20, pool_width=27, buckets=(2,))
    shorter = make_backend(setup, Mode.TARGET_VERIFY, [1, 1])
    precomputed = precompute(shorter.inputs, setup)
    assert (precomputed.max_len, precomputed.max_seqlen_k, precomputed.seqlens_expanded_size) == (20, 27, 6)
    assert precomputed.page_indices.shape == (6, 20)
    # A graph would go on reading an arange that the cache has replaced since, and the cache would hand out one that
    # holds nothing before the graph is replayed.
    assert precomputed_copy._cached_columns == {}


def test_page_size_one_has_no_real_table(make_backend: Callable[..., Any]) -> None:
    setup = Setup(page_size=1, table_width=16, buckets=(1,))
    assert precompute(make_backend(setup, Mode.DECODE, [9]).inputs, setup).real_page_table is None


def test_steps_share_nothing_with_the_intermediate(make_backend: Callable[..., Any]) -> None:
    setup = Setup(num_draft_tokens=2, page_size=16, table_width=32, pool_width=40, num_steps=2, buckets=(2,))
    backend = make_backend(setup, Mode.DRAFT_EXTEND, [20, 3], [2, 1])
    precomputed = precompute(backend.inputs, setup)
    first, second = backend.steps
    copy_into(first, precomputed, Mode.DRAFT_EXTEND)
    for name in ("cache_seqlens", "nsa_seqlens_expanded", "nsa_cu_seqlens_k", "page_table_1", "real_page_table"):
        getattr(first, name).fill_(-5)
    copy_into(second, precomputed, Mode.DRAFT_EXTEND)
    assert second.cache_seqlens.tolist() == [20, 3]
    assert second.nsa_seqlens_expanded.tolist() == [19, 20, 3, -77]
    assert second.nsa_cu_seqlens_k.tolist() == [0, 8, 16, 19, -77]
    assert second.page_table_1[2, :3].tolist() == [1000, 1003, 1006]
    assert second.real_page_table[2, 0].item() == 62
