"""The backend as an engine calls it: over buffers of its own, from capture through replays of any bucket and mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import msgspec
import pytest
import torch
from helpers import draw_many
from torch import Tensor

from nsa_verify import Case, CtxLens, MetadataBuffers, Mode, Replay, Setup
from nsa_verify.core.buffers import TABLES
from nsa_verify.core.case import row_slots
from nsa_verify.core.implementation import take_fallbacks
from nsa_verify.core.oracle import Expectation, batch, expect
from nsa_verify.kernels import (
    ForwardMode,
    NativeSparseAttnBackend,
    NativeSparseAttnMultiStepBackend,
)
from nsa_verify.kernels.backend_arguments import mode_of
from nsa_verify.strategies import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
JUNK = 1_234_567
SETUP = Setup(
    num_draft_tokens=3,
    index_topk=8,
    page_size=16,
    table_width=18,
    table_row_stride=21,
    pool_rows=4,
    pool_width=24,
    buckets=(2, 3, 4),
    ctx_lens=CtxLens.OWN,
    schedule=True,
    num_sms=3,
)
PATHS = pytest.mark.parametrize("path", ["0", "1"])
MODES = pytest.mark.parametrize("mode", list(Mode))


BackendT = TypeVar("BackendT", NativeSparseAttnBackend, NativeSparseAttnMultiStepBackend)


@dataclass
class SpecInfo:
    """What carries the accept lengths."""

    accept_length: Tensor | None


@dataclass
class Batch:
    """An engine's forward batch."""

    forward_mode: Any
    batch_size: int
    req_pool_indices: Tensor
    seq_lens: Tensor
    seq_lens_cpu: Tensor | None = None
    spec_info: SpecInfo | None = None


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _batch(mode: Mode | ForwardMode, seq_lens: list[int], accept_lens: list[int] | None = None) -> Batch:
    """Requests in the first rows of the pool."""
    return Batch(
        forward_mode=ForwardMode(mode),
        batch_size=len(seq_lens),
        req_pool_indices=torch.arange(len(seq_lens), device=DEVICE),
        seq_lens=_ints(*seq_lens),
        spec_info=None if accept_lens is None else SpecInfo(_ints(*accept_lens)),
    )


def _drawn_batch(case: Case, index: int) -> tuple[Batch, Tensor]:
    """What an engine passes for one replay of ``case``, and the table that it reads."""
    given, setup = batch(case, index), case.setup
    rows = [row_slots(setup, case.replays[index], row, setup.pool_width) for row in range(setup.pool_rows)]
    found = _batch(given.mode, list(given.seq_lens), list(given.accept_lens))
    found.req_pool_indices = torch.tensor(given.pool_rows, device=DEVICE)
    found.seq_lens_cpu = found.seq_lens.cpu() if setup.host_lengths else None
    return found, torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def _pool() -> Tensor:
    """Slot j of row b is ``1000 b + 3 j``."""
    return 1000 * torch.arange(4, device=DEVICE).int()[:, None] + 3 * torch.arange(24, device=DEVICE).int()


def _capture(backend: Any, batch: Batch) -> None:
    if isinstance(backend, NativeSparseAttnMultiStepBackend):
        backend.init_forward_metadata_capture_cuda_graph(batch)
        return
    rows = backend.setup.captured_rows(mode_of(batch.forward_mode), batch.batch_size)
    backend.init_forward_metadata_capture_cuda_graph(
        batch.batch_size, rows, batch.req_pool_indices, batch.seq_lens, None, batch.forward_mode, batch.spec_info
    )


def _replay(backend: Any, batch: Batch, bs: int | None = None) -> None:
    bs = batch.batch_size if bs is None else bs
    if isinstance(backend, NativeSparseAttnMultiStepBackend):
        backend.init_forward_metadata_replay_cuda_graph(batch, bs)
        return
    backend.init_forward_metadata_replay_cuda_graph(
        bs=bs,
        req_pool_indices=batch.req_pool_indices,
        seq_lens=batch.seq_lens,
        seq_lens_sum=None,
        encoder_lens=None,
        forward_mode=batch.forward_mode,
        spec_info=batch.spec_info,
        seq_lens_cpu=batch.seq_lens_cpu,
    )


def _precompute(backend: NativeSparseAttnBackend, batch: Batch) -> Any:
    return backend._precompute_replay_metadata(
        bs=batch.batch_size,
        req_pool_indices=batch.req_pool_indices,
        seq_lens=batch.seq_lens,
        seq_lens_cpu=batch.seq_lens_cpu,
        forward_mode=batch.forward_mode,
        spec_info=batch.spec_info,
    )


def _replay_from_precomputed(backend: NativeSparseAttnBackend, batch: Batch) -> None:
    backend.init_forward_metadata_replay_cuda_graph_from_precomputed(
        bs=batch.batch_size, precomputed=_precompute(backend, batch), forward_mode=batch.forward_mode
    )


def _capture_all(backend: BackendT, setup: Setup) -> BackendT:
    """``backend`` with every bucket captured in every mode."""
    backend.init_cuda_graph_state(setup.buckets[-1], setup.buckets[-1] * setup.num_draft_tokens)
    for bucket in setup.buckets:
        for mode in Mode:
            _capture(backend, _batch(mode, [setup.fill_seq_len] * bucket))
    return backend


def _backend(setup: Setup = SETUP, path: str = "1", **arguments: Any) -> NativeSparseAttnBackend:
    return _capture_all(NativeSparseAttnBackend(DEVICE, setup, path, req_to_token=_pool(), **arguments), setup)


def _multi_step(setup: Setup, path: str = "1") -> NativeSparseAttnMultiStepBackend:
    return _capture_all(NativeSparseAttnMultiStepBackend(DEVICE, setup, path, req_to_token=_pool()), setup)


def _assert_holds(buffers: MetadataBuffers, expected: Expectation) -> None:
    for name, rows in expected.buffers.items():
        tensor = getattr(buffers, name)
        for found, row in zip(tensor if tensor.dim() == 2 else [tensor], rows, strict=False):
            assert found[: row.live].tolist() == list(row.values[: row.live]), name


def _tensors(buffers: MetadataBuffers) -> dict[str, Tensor]:
    found = {it.name: getattr(buffers, it.name) for it in fields(buffers)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _pointers(backend: NativeSparseAttnBackend) -> dict[Any, int]:
    return {
        (*key, name): tensor.data_ptr()
        for key, buffers in backend.captured.items()
        for name, tensor in _tensors(buffers).items()
    }


@pytest.fixture(autouse=True)
def _no_fallback_is_left() -> Iterator[None]:
    take_fallbacks()
    yield
    assert take_fallbacks() == ()


VECTORS: dict[Mode, dict[str, list[int]]] = {
    Mode.DECODE: {
        "cache_seqlens": [13, 5, 1],
        "cu_seqlens_k": [0, 13, 18, 19],
        "nsa_cache_seqlens": [8, 5, 1],
        "nsa_cu_seqlens_k": [0, 8, 13, 14],
    },
    Mode.TARGET_VERIFY: {
        "cache_seqlens": [16, 8, 4],
        "cu_seqlens_k": [0, 16, 24, 28],
        "nsa_seqlens_expanded": [14, 15, 16, 6, 7, 8, 2, 3, 4],
        "nsa_cache_seqlens": [8, 8, 8, 6, 7, 8, 2, 3, 4],
        "nsa_cu_seqlens_k": [0, 8, 16, 24, 30, 37, 45, 47, 50, 54],
    },
    Mode.DRAFT_EXTEND: {
        "cache_seqlens": [13, 5, 1],
        "nsa_seqlens_expanded": [12, 13, 3, 4, 5, 1],
        "nsa_cache_seqlens": [8, 8, 3, 4, 5, 1],
        "nsa_cu_seqlens_k": [0, 8, 16, 19, 23, 28, 29],
    },
    Mode.DRAFT_EXTEND_V2: {
        "nsa_seqlens_expanded": [11, 12, 13, 3, 4, 5, 0, 0, 1],
        "nsa_cache_seqlens": [8, 8, 8, 3, 4, 5, 0, 0, 1],
        "nsa_cu_seqlens_k": [0, 8, 16, 24, 27, 31, 36, 36, 36, 37],
    },
}


@pytest.mark.parametrize(
    ("path", "refresh"), [("0", _replay), ("1", _replay), ("0", _replay_from_precomputed)], ids=["0", "1", "copied"]
)
@MODES
def test_the_vectors_of_the_contract(
    mode: Mode, path: str, refresh: Callable[[NativeSparseAttnBackend, Batch], None]
) -> None:
    backend = _backend(path=path)
    refresh(backend, _batch(mode, [13, 5, 1], [2, 3, 1]))
    buffers = backend.captured[mode, 3]
    for name, values in VECTORS[mode].items():
        assert getattr(buffers, name)[: len(values)].tolist() == values, name
    assert buffers.page_table_1[0, :13].tolist() == list(range(0, 39, 3))
    assert buffers.real_page_table[0, 0].item() == 0
    second = 1 if mode is Mode.DECODE else 2 if mode is Mode.DRAFT_EXTEND else 3
    assert buffers.page_table_1[second, :5].tolist() == [1000, 1003, 1006, 1009, 1012]
    assert buffers.real_page_table[second, 0].item() == 62


@MODES
def test_both_paths_write_the_same_bytes(mode: Mode) -> None:
    python, triton = (_backend(path=path) for path in "01")
    for seq_lens, accept_lens in (([13, 5, 1], [2, 3, 1]), ([17, 2, 9], [0, 1, 0]), ([3, 3, 3], [3, 3, 3])):
        given = _batch(mode, seq_lens, accept_lens)
        _replay(python, given)
        _replay(triton, given)
        ours, theirs = _tensors(python.captured[mode, 3]), _tensors(triton.captured[mode, 3])
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"page_table_1", "real_page_table"}:
            assert torch.equal(ours[name], theirs[name]), name
        rows = sum(accept_lens) if mode is Mode.DRAFT_EXTEND else len(ours["nsa_cache_seqlens"])
        added = SETUP.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0
        shortest = min(seq_lens) + added  # live in every row
        assert torch.equal(ours["page_table_1"][:rows, :shortest], theirs["page_table_1"][:rows, :shortest])
        assert torch.equal(ours["real_page_table"][:rows, :1], theirs["real_page_table"][:rows, :1])


def _fan_out_from_precomputed(backend: NativeSparseAttnMultiStepBackend, batch: Batch) -> None:
    shared = _precompute(backend.attn_backends[0], batch)
    for step in backend.attn_backends:
        step.init_forward_metadata_replay_cuda_graph_from_precomputed(batch.batch_size, shared, batch.forward_mode)


@pytest.mark.parametrize(
    ("path", "refresh"), [("0", _replay), ("1", _replay), ("1", _fan_out_from_precomputed)], ids=["0", "1", "copied"]
)
def test_drawn_sequences_over_own_buffers(path: str, refresh: Callable[[Any, Batch], None]) -> None:
    """One backend per case, through all its replays: what was prepared last is right, and nothing else has moved."""
    many = draw_many(cases(), 200, seeded=4)
    drawn = many[:10] + [it for it in many if len({it.bucket(index) for index in range(len(it.replays))}) > 1][:6]
    assert {replay.mode for case in drawn for replay in case.replays} == set(Mode)
    assert len(drawn) == 16
    for case in drawn:
        backend = _capture_all(NativeSparseAttnMultiStepBackend(DEVICE, case.setup, path), case.setup)
        before = [_pointers(step) for step in backend.attn_backends]
        for index in range(len(case.replays)):
            given, backend.req_to_token = _drawn_batch(case, index)
            key = mode_of(given.forward_mode), given.batch_size
            idle = [
                (tensor, tensor.clone())
                for step in backend.attn_backends
                for other, buffers in step.captured.items()
                for name, tensor in _tensors(buffers).items()
                if other != key and not name.endswith(("page_table", "page_table_1"))
            ]
            refresh(backend, given)
            for step in backend.attn_backends:
                assert step.forward_metadata is step.captured[key] is step.decode_cuda_graph_metadata[key[1]]
                _assert_holds(step.captured[key], expect(case, index))
            assert all(torch.equal(tensor, was) for tensor, was in idle)
        assert [_pointers(step) for step in backend.attn_backends] == before


@PATHS
@MODES
@pytest.mark.parametrize("fill", [0, 1])
def test_capture_is_a_batch_of_padding_whatever_the_inputs_hold(mode: Mode, path: str, fill: int) -> None:
    setup = msgspec.structs.replace(SETUP, fill_seq_len=fill, buckets=(4,))
    wanted = expect(Case(setup=setup, replays=(Replay(mode=mode, padded_accept_len=3),)), 0)
    wanted = wanted._replace(buffers={name: rows for name, rows in wanted.buffers.items() if name not in TABLES})
    backend = _capture_all(NativeSparseAttnBackend(DEVICE, setup, path), setup)
    before = _pointers(backend)
    for _ in range(2):
        buffers = backend.captured[mode, 4]
        _assert_holds(buffers, wanted)
        assert not buffers.page_table_1.any()
        assert not buffers.real_page_table.any()
        assert buffers.cu_seqlens_q.tolist() == list(range(5))
        assert buffers.nsa_cu_seqlens_q.tolist() == list(range(setup.captured_rows(mode, 4) + 1))
        for name in ("page_table_1", "real_page_table", "cache_seqlens", "nsa_cache_seqlens"):
            getattr(buffers, name).fill_(JUNK)
        _capture(backend, _batch(mode, [JUNK] * 4, [JUNK] * 4))
    assert _pointers(backend) == before


@pytest.mark.parametrize("page_size", [1, 16])
def test_one_table_for_all_buckets_and_a_buffer_each_for_the_rest(page_size: int) -> None:
    setup = msgspec.structs.replace(SETUP, page_size=page_size, num_steps=2, stride_skew=5)
    backend = _multi_step(setup)
    for step, own in enumerate(backend.attn_backends):
        tables = [(it.page_table_1, it.real_page_table) for it in own.captured.values()]
        assert len({table.data_ptr() for table, _ in tables}) == len({real.data_ptr() for _, real in tables}) == 1
        assert {table.stride(0) for table, _ in tables} == {21 + 5 * step}
        assert {real.stride(0) for _, real in tables} == {(21 if page_size == 1 else 5) + 5 * step}
        assert all((real is table) == (page_size == 1) for table, real in tables)
        assert [table.shape for table, _ in tables][:2] == [(2, 18), (6, 18)]
    owned = ("cu_seqlens_k", "nsa_cache_seqlens", "cache_seqlens", "paged_mqa_schedule", "cu_seqlens_q")
    pointers = [
        getattr(buffers, name).data_ptr()
        for own in backend.attn_backends
        for buffers in own.captured.values()
        for name in owned
    ]
    assert len(set(pointers)) == len(pointers) == 2 * 3 * 4 * len(owned)
    first = backend.attn_backends[0].captured
    assert first[Mode.DECODE, 2].nsa_seqlens_expanded is first[Mode.DECODE, 2].cache_seqlens
    ctx_lens = first[Mode.DRAFT_EXTEND, 2].paged_mqa_ctx_lens
    assert ctx_lens is not None
    assert ctx_lens.data_ptr() == first[Mode.DRAFT_EXTEND, 2].nsa_seqlens_expanded.data_ptr()
    assert first[Mode.TARGET_VERIFY, 2].paged_mqa_ctx_lens.shape == (2, 3)  # type: ignore[union-attr]


@PATHS
def test_fewer_requests_than_the_bucket_and_none(path: str) -> None:
    """The engine pads: two requests in a bucket of four, then a rank that is idle."""
    backend = _backend(path=path)
    _replay(backend, _batch(Mode.DRAFT_EXTEND, [13, 5, 1, 1], [2, 0, 1, 1]))
    ragged = backend.captured[Mode.DRAFT_EXTEND, 4]
    assert ragged.nsa_seqlens_expanded[:4].tolist() == [12, 13, 1, 1]
    assert ragged.nsa_cu_seqlens_k[:5].tolist() == [0, 8, 16, 17, 18]
    assert ragged.cu_seqlens_k.tolist() == [0, 13, 18, 19, 20]
    _replay(backend, _batch(ForwardMode.IDLE, [1, 1, 1, 1]))
    idle = backend.captured[Mode.DECODE, 4]
    assert backend.forward_metadata is idle
    assert idle.cu_seqlens_k.tolist() == [0, 1, 2, 3, 4]
    assert idle.page_table_1[:, 0].tolist() == [0, 1000, 2000, 3000]


@PATHS
def test_no_request_accepts_a_token(path: str) -> None:
    backend = _backend(path=path)
    _replay(backend, _batch(Mode.DRAFT_EXTEND, [13, 5], [2, 3]))
    before = {name: it.clone() for name, it in _tensors(backend.captured[Mode.DRAFT_EXTEND, 2]).items()}
    _replay(backend, _batch(Mode.DRAFT_EXTEND, [7, 4], [0, 0]))
    after = _tensors(backend.captured[Mode.DRAFT_EXTEND, 2])
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"cache_seqlens", "cu_seqlens_k"}
    assert after["cu_seqlens_k"].tolist() == [0, 7, 11]


@PATHS
def test_accept_lengths_left_out_are_all_tokens(path: str) -> None:
    backend = _backend(path=path)
    for spec_info in (None, SpecInfo(None), SpecInfo(_ints(3, 3, 3)), SpecInfo(_ints(3, 3, 3, JUNK).long())):
        given = _batch(Mode.DRAFT_EXTEND, [13, 5, 3])
        given.spec_info = spec_info
        backend.captured[Mode.DRAFT_EXTEND, 3].nsa_seqlens_expanded.zero_()
        _replay(backend, given)
        assert backend.captured[Mode.DRAFT_EXTEND, 3].nsa_seqlens_expanded.tolist() == [11, 12, 13, 3, 4, 5, 1, 2, 3]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"spec_info": SpecInfo(_ints(1, 2))},
            r"accept_length is torch.int32 \[2\], where bs = 3 needs a vector of at",
        ),
        ({"spec_info": SpecInfo(_ints(1, 2, 3)[:, None])}, r"accept_length is torch.int32 \[3, 1\]"),
        ({"spec_info": SpecInfo(_ints(1, 2, 3).float())}, r"accept_length is torch.float32 \[3\]"),
        ({"seq_lens": _ints(1, 2)}, r"seq_lens is torch.int32 \[2\], where bs = 3"),
        ({"seq_lens_cpu": torch.ones(2, dtype=torch.int32)}, r"seq_lens_cpu is torch.int32 \[2\]"),
        ({"req_pool_indices": _ints(1, 2)}, r"req_pool_indices is torch.int32 \[2\]"),
        (
            {"forward_mode": "draft-extend"},
            "forward mode 'draft-extend' has no metadata; those that have: DECODE, TARG",
        ),
    ],
)
def test_inputs_that_cannot_be_are_refused_and_nothing_is_written(wrong: dict[str, Any], words: str) -> None:
    good = _batch(Mode.DRAFT_EXTEND, [13, 5, 1], [2, 3, 1])
    for backend in (_backend(path="0"), _backend(path="1"), _multi_step(SETUP, "0"), _multi_step(SETUP, "1")):
        own = backend if isinstance(backend, NativeSparseAttnBackend) else backend.attn_backends[0]
        before = {name: it.clone() for name, it in _tensors(own.captured[Mode.DRAFT_EXTEND, 3]).items()}
        with pytest.raises(ValueError, match=words):
            _replay(backend, replace(good, **wrong), bs=3)
        with pytest.raises(ValueError, match=words):
            _precompute(own, replace(good, **wrong))
        after = _tensors(own.captured[Mode.DRAFT_EXTEND, 3])
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_bucket_that_was_not_captured_is_refused() -> None:
    for backend in (NativeSparseAttnBackend(DEVICE, SETUP), NativeSparseAttnMultiStepBackend(DEVICE, SETUP)):
        backend.req_to_token = _pool()
        backend.init_cuda_graph_state(4, 12)
        with pytest.raises(ValueError, match="bs = 3 was not captured in decode; captured there: none"):
            _replay(backend, _batch(Mode.DECODE, [1, 1, 1]))
        _capture(backend, _batch(Mode.DECODE, [1, 1, 1, 1]))
        _capture(backend, _batch(Mode.DECODE, [1, 1]))
        with pytest.raises(ValueError, match="bs = 3 was not captured in decode; captured there: 2, 4"):
            _replay(backend, _batch(Mode.DECODE, [1, 1, 1]))
        with pytest.raises(ValueError, match="bs = 0 was not captured in decode; captured there: 2, 4"):
            _replay(backend, _batch(ForwardMode.IDLE, []))
        with pytest.raises(ValueError, match="bs = 2 was not captured in target-verify; captured there: none"):
            _replay(backend, _batch(Mode.TARGET_VERIFY, [1, 1]))
        own = backend if isinstance(backend, NativeSparseAttnBackend) else backend.attn_backends[0]
        with pytest.raises(ValueError, match="bs = 2 was not captured in target-verify"):
            _replay_from_precomputed(own, _batch(Mode.TARGET_VERIFY, [1, 1]))


def test_what_cannot_be_captured_is_refused() -> None:
    backend = NativeSparseAttnBackend(DEVICE, SETUP)
    with pytest.raises(ValueError, match="bs = 1 cannot be captured: call init_cuda_graph_state first"):
        _capture(backend, _batch(Mode.DECODE, [1]))
    for sizes in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"max_bs = {sizes[0]}, max_num_tokens = 3: must be"):
            backend.init_cuda_graph_state(*sizes)
    backend.init_cuda_graph_state(3, 6)
    with pytest.raises(ValueError, match="bs = 3 in target-verify has 9 rows, which exceeds max_bs = 3 and max_num_to"):
        _capture(backend, _batch(Mode.TARGET_VERIFY, [1, 1, 1]))
    with pytest.raises(ValueError, match="bs = 4 in decode has 4 rows, which exceeds max_bs = 3"):
        _capture(backend, _batch(Mode.DECODE, [1, 1, 1, 1]))
    with pytest.raises(ValueError, match="num_tokens = 2: target-verify of bs = 2 has 6"):
        backend.init_forward_metadata_capture_cuda_graph(
            2, 2, _ints(0, 0), _ints(1, 1), None, ForwardMode.TARGET_VERIFY, None
        )
    assert not backend.captured
    _capture(backend, _batch(Mode.TARGET_VERIFY, [1, 1]))
    with pytest.raises(ValueError, match="req_to_token is not set"):
        _replay(backend, _batch(Mode.TARGET_VERIFY, [1, 1]))
    backend.init_cuda_graph_state(3, 6)
    assert not backend.captured
    assert not backend.decode_cuda_graph_metadata
    assert backend.forward_metadata is None


@PATHS
def test_adopted_buffers_are_written_where_they_lie(path: str) -> None:
    owner, backend = _backend(path=path), NativeSparseAttnBackend(DEVICE, SETUP, path, req_to_token=_pool())
    given = owner.captured[Mode.DRAFT_EXTEND, 3]
    backend.adopt(Mode.DRAFT_EXTEND, 3, given)
    _replay(backend, _batch(Mode.DRAFT_EXTEND, [13, 5, 1], [2, 3, 1]))
    assert backend.forward_metadata is given
    assert given.nsa_seqlens_expanded[:6].tolist() == [12, 13, 3, 4, 5, 1]
    with pytest.raises(ValueError, match="accept_length is None: all N tokens are known after init_cuda_graph_state"):
        _replay(backend, _batch(Mode.DRAFT_EXTEND, [13, 5, 1]))


@PATHS
@MODES
def test_every_step_is_refreshed_alike(mode: Mode, path: str) -> None:
    setup = msgspec.structs.replace(SETUP, num_steps=3, stride_skew=1)
    backend = _multi_step(setup, path)
    assert backend.speculative_num_steps == len(backend.attn_backends) == 3
    for own in backend.attn_backends:
        own.captured[mode, 3].paged_mqa_schedule.fill_(JUNK)  # type: ignore[union-attr]
    _replay(backend, _batch(mode, [13, 5, 1], [2, 3, 1]))
    alone = _backend(path=path)
    _replay(alone, _batch(mode, [13, 5, 1], [2, 3, 1]))
    wanted = _tensors(alone.captured[mode, 3])
    for own in backend.attn_backends:
        assert own.forward_metadata is own.captured[mode, 3]
        for name, tensor in _tensors(own.captured[mode, 3]).items():
            assert name in TABLES or torch.equal(tensor, wanted[name]), name
        assert torch.equal(own.captured[mode, 3].page_table_1[0, :13], _pool()[0, :13])
