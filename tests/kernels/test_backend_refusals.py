"""What the backend does not take, and where it launches: tables, lengths, buffers, metadata, devices.

Every refusal is a ``ValueError`` of one sentence, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from nsa_verify import CtxLens, MetadataBuffers, Mode, Setup
from nsa_verify.kernels import (
    ForwardMode,
    NativeSparseAttnBackend,
    NativeSparseAttnMultiStepBackend,
    PrecomputedMetadata,
    onepass,
    precomputed_copy,
    triton_fused,
    triton_inplace,
)
from nsa_verify.kernels import backend as backend_module
from nsa_verify.kernels.backend_arguments import on_device, with_index

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
SETUP = Setup(
    num_draft_tokens=2,
    page_size=16,
    table_width=18,
    pool_width=24,
    buckets=(2,),
    num_steps=2,
    ctx_lens=CtxLens.OWN,
    schedule=True,
)


def _batch(mode: Mode = Mode.DECODE) -> Any:
    return SimpleNamespace(
        forward_mode=ForwardMode(mode),
        batch_size=2,
        req_pool_indices=torch.zeros(2, dtype=torch.int64, device=DEVICE),
        seq_lens=torch.tensor([9, 4], dtype=torch.int32, device=DEVICE),
        seq_lens_cpu=None,
        spec_info=None,
    )


def _captured(switch: str, *modes: Mode, setup: Setup = SETUP) -> NativeSparseAttnMultiStepBackend:
    backend = NativeSparseAttnMultiStepBackend(DEVICE, setup, switch, req_to_token=_ints(1, 24))
    backend.init_cuda_graph_state(2, 4)
    for mode in modes:
        backend.init_forward_metadata_capture_cuda_graph(_batch(mode))
    return backend


def _ints(*shape: int, device: str | None = None) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device or DEVICE)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (_ints(24), r"torch.int32 \[24\], must be int32 of two dimensions and at least W = 18 columns"),
        (_ints(2, 17), r"torch.int32 \[2, 17\], must be int32 of two dimensions and at least W = 18 columns"),
        (_ints(2, 24).long(), r"torch.int64 \[2, 24\], must be"),
        (_ints(24, 24).t(), r"\[1, 24\], must have a column stride of 1: give a contiguous one"),
        (_ints(2, 48)[:, ::2], r"\[48, 2\], must have a column stride of 1"),
        (_ints(2, 24, device="meta"), f"on meta, must be on {DEVICE}"),
    ],
)
@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_table_that_the_paths_would_read_differently_is_refused(switch: str, table: Tensor, words: str) -> None:
    good = _ints(4, 48)[:, :18]
    for make in (NativeSparseAttnBackend, NativeSparseAttnMultiStepBackend):
        backend = make(DEVICE, SETUP, switch, req_to_token=good)
        with pytest.raises(ValueError, match=f"^req_to_token (is|has strides) .*{words}"):
            backend.req_to_token = table
        assert backend.req_to_token is good
        with pytest.raises(ValueError, match=words):
            make(DEVICE, SETUP, switch, req_to_token=table)
    narrow = msgspec.structs.replace(SETUP, table_width=1, table_row_stride=1)
    NativeSparseAttnBackend(DEVICE, narrow, switch, req_to_token=_ints(2, 24)[:, ::24])


@pytest.mark.parametrize("name", ["req_pool_indices", "seq_lens", "seq_lens_cpu"])
def test_lengths_of_another_device_are_refused(name: str) -> None:
    backend = _captured("0", Mode.DECODE)
    batch = SimpleNamespace(**vars(_batch()) | {name: torch.ones(2, dtype=torch.int32, device="meta")})
    with pytest.raises(ValueError, match=f"^{name} is on meta, must be on {'cpu' if name.endswith('cpu') else DEVICE}"):
        backend.init_forward_metadata_replay_cuda_graph(batch, 2)
    if not name.endswith("cpu"):
        with pytest.raises(ValueError, match=f"^{name} is on meta, must be on {DEVICE}"):
            backend.init_forward_metadata_capture_cuda_graph(batch)


def _buffers(mode: Mode, setup: Setup = SETUP) -> list[MetadataBuffers]:
    return [it.captured[mode, 2] for it in _captured("0", mode, setup=setup).attn_backends]


@pytest.mark.parametrize("name", [it.name for it in fields(MetadataBuffers)])
def test_a_buffer_that_cannot_be_adopted_is_refused_and_no_step_adopts(name: str) -> None:
    mode = Mode.TARGET_VERIFY
    first, second = _buffers(mode)
    good: Tensor = getattr(second, name)
    twice = [*good.shape[:-1], 2 * good.shape[-1]]
    refused: list[tuple[Tensor, str]] = [
        (good.long(), f"is torch.int64 {list(good.shape)}, where target-verify of 2 needs torch.int32"),
        (good[:-1], f"is torch.int32 .*, where target-verify of 2 needs torch.int32 {list(good.shape)}"),
        (good[None], "is torch.int32 .*, where"),
        (good.to("meta"), f"is on meta, must be on {DEVICE}"),
        (_ints(*twice)[..., ::2], "must have a column stride of 1 and a row stride of"),
    ]
    if good.dim() == 2:
        refused.append((good[:1].expand(good.shape), "must have a column stride of 1 and a row stride of"))
    backend = NativeSparseAttnMultiStepBackend(DEVICE, SETUP, "0")
    for wrong, words in refused:
        with pytest.raises(ValueError, match=f"^{name} of step 1 .*{words.replace('[', chr(92) + '[')}"):
            backend.adopt(mode, 2, [first, replace(second, **{name: wrong})])
        assert not backend.attn_backends[0].captured
    with pytest.raises(ValueError, match=r"^buffers of 1 steps; the setup has 2$"):
        backend.adopt(mode, 2, [first])
    backend.adopt(mode, 2, [first, second])
    assert [it.captured[mode, 2] for it in backend.attn_backends] == [first, second]


@pytest.mark.parametrize(
    ("name", "mode", "page_size"),
    [
        ("nsa_seqlens_expanded", Mode.DECODE, 16),
        ("paged_mqa_ctx_lens", Mode.DECODE, 16),
        ("paged_mqa_ctx_lens", Mode.DRAFT_EXTEND, 16),
        ("real_page_table", Mode.DRAFT_EXTEND, 1),
    ],
)
def test_a_buffer_with_memory_of_its_own_for_a_view_is_refused(name: str, mode: Mode, page_size: int) -> None:
    setup = msgspec.structs.replace(SETUP, page_size=page_size)
    given, _ = _buffers(mode, setup)
    backend = NativeSparseAttnBackend(DEVICE, setup, "0")
    with pytest.raises(ValueError, match=f"^{name} of step 0 must be the memory of .* in {mode}$"):
        backend.adopt(mode, 2, replace(given, **{name: getattr(given, name).clone()}))
    backend.adopt(mode, 2, given)


@pytest.mark.parametrize(
    ("name", "owner", "page_size"),
    [("paged_mqa_ctx_lens", "nsa_seqlens_expanded", 16), ("real_page_table", "page_table_1", 1)],
)
def test_a_view_whose_rows_begin_elsewhere_is_refused(name: str, owner: str, page_size: int) -> None:
    mode, setup = Mode.DRAFT_EXTEND, msgspec.structs.replace(SETUP, page_size=page_size)
    given, _ = _buffers(mode, setup)
    memory = _ints(200)

    def lie_in_memory(name: str, stretched: int = 1) -> Tensor:
        like: Tensor = getattr(given, name)
        return memory.as_strided(like.shape, (stretched * like.stride(0), *like.stride()[1:]))

    backend = NativeSparseAttnBackend(DEVICE, setup, "0")
    with pytest.raises(ValueError, match=f"^{name} of step 0 must be the memory of {owner} in {mode}$"):
        backend.adopt(mode, 2, replace(given, **{owner: lie_in_memory(owner), name: lie_in_memory(name, 2)}))
    assert not backend.captured
    backend.adopt(mode, 2, replace(given, **{owner: lie_in_memory(owner), name: lie_in_memory(name)}))


def test_the_row_stride_of_a_single_row_may_be_anything() -> None:
    backend = NativeSparseAttnBackend(DEVICE, msgspec.structs.replace(SETUP, page_size=1), "0")
    backend.init_cuda_graph_state(1, 2)
    given = backend._make(Mode.DECODE, 1)
    real_table = given.page_table_1.as_strided((1, 18), (7, 1))
    backend.adopt(Mode.DECODE, 1, replace(given, real_page_table=real_table))
    assert backend.captured[Mode.DECODE, 1].real_page_table is real_table


@pytest.mark.parametrize("switch", ["0", "1"])
def test_accept_lengths_left_out_of_more_requests_than_max_bs_are_refused(switch: str) -> None:
    mode, given = Mode.DRAFT_EXTEND, _buffers(Mode.DRAFT_EXTEND)
    steps = NativeSparseAttnMultiStepBackend(DEVICE, SETUP, switch, req_to_token=_ints(1, 24))
    steps.init_cuda_graph_state(1, 2)
    steps.adopt(mode, 2, given)
    batch, step = _batch(mode), steps.attn_backends[1]
    lens = batch.seq_lens
    calls: list[Callable[[], object]] = [
        lambda: steps.init_forward_metadata_replay_cuda_graph(batch, 2),
        lambda: step.init_forward_metadata_replay_cuda_graph(
            2, batch.req_pool_indices, lens, None, None, batch.forward_mode, batch.spec_info, None
        ),
        lambda: step._precompute_replay_metadata(
            2, batch.req_pool_indices, lens, None, batch.forward_mode, batch.spec_info
        ),
    ]
    words = r"^accept_length is None, where bs = 2: all N tokens are known up to max_bs = 1 only$"
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()
    assert [it.cu_seqlens_k.tolist() for it in given] == [[0, 1, 2]] * 2
    batch.spec_info = SimpleNamespace(accept_length=_ints(2) + 1)
    for call in calls:
        call()
    assert [it.cu_seqlens_k.tolist() for it in given] == [[0, 9, 13]] * 2
    assert given[1].nsa_seqlens_expanded[:2].tolist() == [9, 4]


def test_optional_buffers_may_be_left_out_and_not_be_brought_along() -> None:
    given, _ = _buffers(Mode.DECODE)
    backend = NativeSparseAttnBackend(DEVICE, SETUP, "0")
    backend.adopt(Mode.DECODE, 2, replace(given, paged_mqa_ctx_lens=None, paged_mqa_schedule=None))
    with pytest.raises(ValueError, match=r"^nsa_cache_seqlens of step 0 is None, where decode of 2 needs"):
        backend.adopt(Mode.DECODE, 2, replace(given, nsa_cache_seqlens=None))  # type: ignore[arg-type]
    without = NativeSparseAttnBackend(DEVICE, msgspec.structs.replace(SETUP, schedule=False), "0")
    with pytest.raises(
        ValueError, match=r"^paged_mqa_schedule of step 0 is given, must be None: the setup keeps none$"
    ):
        without.adopt(Mode.DECODE, 2, given)


def _precompute(backend: NativeSparseAttnBackend, mode: Mode, bs: int = 2) -> PrecomputedMetadata:
    lens = torch.tensor([9, 4], dtype=torch.int32, device=DEVICE)[:bs]
    return backend._precompute_replay_metadata(bs, torch.zeros_like(lens), lens, None, ForwardMode(mode), None)


def test_what_was_precomputed_for_another_batch_mode_or_width_is_refused_and_nothing_is_written() -> None:
    narrow = msgspec.structs.replace(SETUP, table_width=8, table_row_stride=8)
    backend, wide, unpaged = (
        _captured("0", *Mode, setup=setup).attn_backends[0]
        for setup in (narrow, SETUP, msgspec.structs.replace(narrow, page_size=1))
    )
    of = {mode: _precompute(backend, mode) for mode in Mode}
    assert {mode: it.mode for mode, it in of.items()} == {mode: mode for mode in Mode}
    decode, verifying = of[Mode.DECODE], of[Mode.TARGET_VERIFY]
    refused: list[tuple[Mode, PrecomputedMetadata, str]] = [
        (Mode.DRAFT_EXTEND_V2, of[Mode.DRAFT_EXTEND], "is the metadata of draft-extend, not of draft-extend-v2"),
        (Mode.DRAFT_EXTEND, verifying, "is the metadata of target-verify, not of draft-extend"),
        (Mode.DECODE, _precompute(backend, Mode.DECODE, 1), "1 requests and 1 rows; decode of bs = 2 has 2 rows"),
        (Mode.TARGET_VERIFY, replace(decode, mode=None), "2 requests and 2 rows; target-verify of bs = 2 has 4 rows"),
        (Mode.DECODE, replace(verifying, mode=None), "2 requests and 4 rows; decode of bs = 2 has 2 rows"),
        (Mode.DECODE, _precompute(wide, Mode.DECODE), "max_len = 9 where max_seqlen_k = 9, must .* clipped to W = 8"),
        (Mode.DECODE, replace(decode, max_len=7), "max_len = 7 where max_seqlen_k = 9, must"),
        (Mode.DECODE, _precompute(unpaged, Mode.DECODE), "no real_page_table, where the page size is 16"),
        (Mode.DECODE, replace(decode, page_indices=decode.page_indices[:, :7]), r"page_indices \[2, 7\], .*\[2, 8\]"),
        (Mode.DECODE, replace(decode, nsa_cu_seqlens_k=decode.cache_seqlens), r"nsa_cu_seqlens_k \[2\], .* \[3\]"),
    ]
    before = {mode: backend.captured[mode, 2].cu_seqlens_k.clone() for mode in Mode}
    for mode, precomputed, words in refused:
        with pytest.raises(ValueError, match=f"^precomputed .*{words}"):
            backend.init_forward_metadata_replay_cuda_graph_from_precomputed(2, precomputed, ForwardMode(mode))
    with pytest.raises(ValueError, match=r"^precomputed has a real_page_table, where the page size is 1$"):
        unpaged.init_forward_metadata_replay_cuda_graph_from_precomputed(2, decode, ForwardMode.DECODE)
    assert all(torch.equal(backend.captured[mode, 2].cu_seqlens_k, it) for mode, it in before.items())
    unsaid = replace(decode, mode=None)
    backend.init_forward_metadata_replay_cuda_graph_from_precomputed(2, unsaid, ForwardMode.DECODE)
    assert backend.captured[Mode.DECODE, 2].cu_seqlens_k.tolist() == [0, 9, 13]


def test_another_device_is_made_current_only_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(on_device(torch.device("cpu")), nullcontext)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: f"to {device}")
    assert isinstance(on_device(torch.device("cuda:1")), nullcontext)
    assert on_device(torch.device("cuda:0")) == "to cuda:0"  # type: ignore[comparison-overlap]
    assert [with_index(it) for it in ("cuda", "cuda:0", "cpu")] == [*map(torch.device, ("cuda:1", "cuda:0", "cpu"))]


def test_whatever_launches_does_so_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []
    seen: list[str] = []

    @contextmanager
    def entering(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            assert entered == [torch.device(DEVICE)], name
            seen.append(name)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    lens = _batch().seq_lens
    triton, python = _captured("1", Mode.DECODE), _captured("0", Mode.DECODE)
    for module in (backend_module, onepass, triton_fused, triton_inplace):
        monkeypatch.setattr(module, "on_device", entering)
    watch(onepass, "refresh")
    for name in ("precompute", "copy_into_all"):
        watch(precomputed_copy, name)
    triton.init_forward_metadata_replay_cuda_graph(_batch(), 2)
    python.init_forward_metadata_replay_cuda_graph(_batch(), 2)
    triton.init_forward_metadata_capture_cuda_graph(_batch())
    triton.attn_backends[1].init_forward_metadata_replay_cuda_graph(
        2, _batch().req_pool_indices, lens, None, None, ForwardMode.DECODE, None, None
    )
    assert seen == ["refresh", "precompute", "copy_into_all", *["refresh"] * 3]
    watch(type(triton_fused._expand_ragged), "run")
    triton_fused.fill_draft_extend_metadata_fused_simple(lens, lens, 8)
    triton_inplace.fill_draft_extend_metadata_inplace(lens, lens, 8, *_ints(2, 13))
    onepass.fill_draft_extend_metadata_onepass(lens, lens, 8, *_ints(2, 13))
    assert seen[6:] == ["run"] * 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_backend_works_on_its_own_gpu_while_another_is_current(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.DEVICE", "cuda:1")
    with torch.cuda.device(0):
        backend = _captured(switch, *Mode)
        for mode in Mode:
            backend.init_forward_metadata_replay_cuda_graph(_batch(mode), 2)
            assert backend.attn_backends[1].captured[mode, 2].cu_seqlens_k.device == torch.device("cuda:1")
        assert backend.attn_backends[1].captured[Mode.DECODE, 2].cu_seqlens_k.tolist() == [0, 9, 13]
        lens = _batch().seq_lens
        expanded, _ = triton_fused.fill_draft_extend_metadata_fused_simple(lens, lens, 8)
        assert expanded.tolist() == [*range(1, 10), *range(1, 5)]
        outputs = _ints(2, 13)
        onepass.fill_draft_extend_metadata_onepass(lens, lens, 8, outputs[0], outputs[1])
        assert outputs[0].tolist() == expanded.tolist()
        assert torch.cuda.current_device() == 0
