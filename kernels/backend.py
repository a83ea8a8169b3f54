"""The metadata backend under the names and signatures by which engines call it.

``NativeSparseAttnBackend`` owns the frozen buffers of one set of layers and brings them up to date before a captured
graph is replayed; ``NativeSparseAttnMultiStepBackend`` does so for all draft steps at once. Nothing is computed here:
``onepass`` (the Triton path) or ``python-loop`` (the Python path) writes in place, ``precomputed-copy`` where the
metadata is computed first and copied later. ``nsa_verify.kernels.backend_rows`` makes rows of the matrix of it.

What a model runner would give comes otherwise:

- the constructor's ``Setup`` says N, K, p, W, row strides and which optional outputs are kept
- ``req_to_token`` ``[pool_rows, pool_width]`` int32, W columns at least, is an argument of the constructor, or the
  attribute set later
- ``bs`` is the bucket, as an engine's graph runner passes it: the inputs hold at least that many elements, those of the
  padded rows filled as the contract's section 4 says
- the environment variable ``SGLANG_NSA_USE_TRITON_METADATA`` is read by the constructor: 1, or unset, is the Triton
  path and 0 the Python path. Where Triton cannot be imported, or not run on the device, the Python path is taken
  instead, and each time that is reported with ``nsa_verify.fallback``
- launches go to the backend's own device, whichever is current
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from nsa_verify.core.buffers import FROZEN, TABLES, Shape, alias_of, shapes
from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, MetadataBuffers, ReplayInputs
from nsa_verify.kernels import precomputed_copy, python_loop
from nsa_verify.kernels.backend_arguments import (
    ForwardBatch,
    SpecInfo,
    check_lengths,
    check_req_to_token,
    mode_of,
    on_device,
    path_for,
    with_index,
)
from nsa_verify.kernels.precomputed_copy import PrecomputedMetadata

_DRAFT_EXTEND: Final = (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2)
_HOST: Final = torch.device("cpu")


def _refresh_onepass(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    from nsa_verify.kernels import onepass  # needs Triton

    onepass.refresh(inputs, steps, setup)


def _sizes(name: str, shape: Shape) -> tuple[int, ...]:
    return tuple(shape) if name in TABLES or name in OPTIONAL_OUTPUTS else (shape.columns,)


def _is_memory_of(view: Tensor, owner: Tensor) -> bool:
    """Whether two tensors of as many rows, whose columns are neighbours, have every row in common."""
    return view.data_ptr() == owner.data_ptr() and (len(view) == 1 or view.stride(0) == owner.stride(0))


class _Backing(NamedTuple):
    """What all buckets share."""

    max_bs: int
    max_num_tokens: int
    page_table_1: Tensor
    real_page_table: Tensor
    every_token: Tensor
    """``[max_bs]``: the accept lengths of requests of which all N tokens are accepted."""


class NativeSparseAttnBackend:
    """One backend and its frozen buffers.

    ``captured`` holds them by mode and bucket; ``decode_cuda_graph_metadata``, by bucket as engines look them up, holds
    those that were prepared last for it, and ``forward_metadata`` those that were prepared last of all: the page tables
    are shared, so no others are valid. ``step`` is the number of the draft step, which the row stride depends on if
    the setup's ``stride_skew`` says so. Own buffers are never the memory of an input; those that are adopted may be.
    """

    def __init__(
        self,
        device: torch.device | str,
        setup: Setup,
        use_triton_metadata: bool | str | None = None,
        *,
        req_to_token: Tensor | None = None,
        step: int = 0,
    ) -> None:
        self.device, self.setup, self.step = with_index(device), setup, step
        self.req_to_token = req_to_token
        self.path = path_for(self.device, use_triton_metadata)
        self.forward_metadata: MetadataBuffers | None = None
        self.decode_cuda_graph_metadata: dict[int, MetadataBuffers] = {}
        self.captured: dict[tuple[Mode, int], MetadataBuffers] = {}
        self._backing: _Backing | None = None

    @property
    def req_to_token(self) -> Tensor | None:
        """The table that replays read, int32 ``[pool_rows, >=W]``; None: not set yet."""
        return self._req_to_token

    @req_to_token.setter
    def req_to_token(self, table: Tensor | None) -> None:
        """Set it; one that is narrower, strided along a row, of another dtype or device is refused with ``ValueError``.

        What was set before stays then.
        """
        if table is not None:
            check_req_to_token(table, self.setup.table_width, self.device)
        self._req_to_token = table

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what all buckets share: tables of ``max_num_tokens`` rows, for batches of up to ``max_bs``.

        Whatever was captured or adopted before is forgotten: its graphs hold the addresses of other tables.
        """
        if not 1 <= max_bs <= max_num_tokens:
            raise ValueError(f"max_bs = {max_bs}, max_num_tokens = {max_num_tokens}: must be at least 1 and max_bs")
        setup = self.setup
        padding = setup.table_row_stride - setup.table_width + self.step * setup.stride_skew

        def table(width: int) -> Tensor:
            return self._zeros(max_num_tokens, width + padding)[:, :width]

        page_table_1 = table(setup.table_width)
        self._backing = _Backing(
            max_bs=max_bs,
            max_num_tokens=max_num_tokens,
            page_table_1=page_table_1,
            real_page_table=page_table_1 if setup.page_size == 1 else table(setup.real_table_width),
            every_token=self._zeros(max_bs).fill_(setup.num_draft_tokens),
        )
        self.captured.clear()
        self.decode_cuda_graph_metadata.clear()
        self.forward_metadata = None

    def adopt(self, mode: Mode, bucket: int, buffers: MetadataBuffers) -> None:
        """Take given memory for the frozen buffers of ``(mode, bucket)``, as if they had been captured here.

        Nothing is written. They must hold what a capture leaves: 0 at the start of the prefix sums, the frozen aranges.
        Raises ``ValueError`` for a buffer that is not int32 of the setup's shape on the backend's device, with
        neighbouring columns, or not the memory that it has to share; an optional one may be left out.
        """
        self._check_adopted(mode, bucket, buffers)
        self.captured[mode, bucket] = buffers

    def _check_adopted(self, mode: Mode, bucket: int, buffers: MetadataBuffers) -> None:
        kept = shapes(self.setup, mode, bucket)
        for name in sorted(OPTIONAL_OUTPUTS - kept.keys()):
            if getattr(buffers, name) is not None:
                raise ValueError(f"{name} of step {self.step} is given, must be None: the setup keeps none")
        for name, shape in kept.items():
            tensor: Tensor | None = getattr(buffers, name)
            if tensor is None and name in OPTIONAL_OUTPUTS:
                continue
            wanted = _sizes(name, shape)
            if tensor is None or tensor.dtype is not torch.int32 or tensor.shape != wanted:
                found = "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                needs = f"{mode} of {bucket} needs torch.int32 {list(wanted)}"
                raise ValueError(f"{name} of step {self.step} is {found}, where {needs}")
            if tensor.device != self.device:
                raise ValueError(f"{name} of step {self.step} is on {tensor.device}, must be on {self.device}")
            row_stride = tensor.stride(0) if shape.rows > 1 else shape.columns
            if row_stride < shape.columns or (shape.columns > 1 and tensor.stride(-1) != 1):
                needs = f"must have a column stride of 1 and a row stride of at least {shape.columns}"
                raise ValueError(f"{name} of step {self.step} has strides {list(tensor.stride())}, {needs}")
            alias = alias_of(self.setup, mode, name)
            if alias is not None and not _is_memory_of(tensor, getattr(buffers, alias)):
                raise ValueError(f"{name} of step {self.step} must be the memory of {alias} in {mode}")

    def init_forward_metadata_capture_cuda_graph(
        self,
        bs: int,
        num_tokens: int,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None,  # noqa: ARG002 - engines pass it; such models have none
        forward_mode: Any,
        spec_info: SpecInfo | None,  # noqa: ARG002 - as for encoder_lens; all N tokens are accepted at capture
    ) -> None:
        """Make the buffers of the bucket ``bs`` unless they are there, and fill them for a batch of padding.

        Every length is the setup's ``fill_seq_len``, every table zero: what the inputs hold is not looked at, so that
        nothing of it can be frozen. Raises ``ValueError`` for inputs that are too short or on another device, for a
        ``num_tokens`` that is not the setup's, and for more rows than ``init_cuda_graph_state`` made.
        """
        mode, setup = mode_of(forward_mode), self.setup
        rows = setup.captured_rows(mode, bs)
        if num_tokens != rows:
            raise ValueError(f"num_tokens = {num_tokens}: {mode} of bs = {bs} has {rows}")
        check_lengths(bs, self.device, req_pool_indices=req_pool_indices, seq_lens=seq_lens)
        buffers = self.captured.get((mode, bs)) or self._make(mode, bs)
        self.captured[mode, bs] = buffers
        buffers.page_table_1.zero_()
        buffers.real_page_table.zero_()
        padding = ReplayInputs(
            mode=mode,
            batch_size=bs,
            seq_lens=self._zeros(bs).fill_(setup.fill_seq_len),
            seq_lens_cpu=None,
            req_pool_indices=self._zeros(bs).long(),
            req_to_token=self._zeros(1, setup.table_width),
            accept_lens=self._zeros(bs).fill_(setup.num_draft_tokens),
        )
        self._refresh(padding, buffers)
        self._prepared(bs, buffers)

    def init_forward_metadata_replay_cuda_graph(
        self,
        bs: int,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        seq_lens_sum: int | None,  # noqa: ARG002 - engines pass it; the sum is computed on the device
        encoder_lens: Tensor | None,  # noqa: ARG002 - as at capture
        forward_mode: Any,
        spec_info: SpecInfo | None,
        seq_lens_cpu: Tensor | None,
    ) -> None:
        """Refresh the buffers of the bucket ``bs`` in place, by the path that the constructor settled.

        On the Triton path nothing is read on the host and nothing allocated. Raises ``ValueError`` for a bucket that
        was not captured in this mode, for inputs that are too short or elsewhere, and for accept lengths left out of
        more than ``max_bs`` requests, as an adopted bucket may have; nothing is written then.
        """
        mode = mode_of(forward_mode)
        buffers = self._frozen(mode, bs)
        self._refresh(self._inputs(bs, req_pool_indices, seq_lens, seq_lens_cpu, mode, spec_info), buffers)
        self._prepared(bs, buffers)

    def _precompute_replay_metadata(
        self,
        bs: int,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        seq_lens_cpu: Tensor | None,
        forward_mode: Any,
        spec_info: SpecInfo | None,
    ) -> PrecomputedMetadata:
        """One replay's metadata in fresh tensors, for any number of backends; no buffer is read or written.

        torch alone computes it, on either path. DRAFT_EXTEND reads R on the host, the other modes the longest length,
        from ``seq_lens_cpu`` if it is given; while a graph is captured only DRAFT_EXTEND does, and must not be.
        """
        mode = mode_of(forward_mode)
        inputs = self._inputs(bs, req_pool_indices, seq_lens, seq_lens_cpu, mode, spec_info)
        with on_device(self.device):
            return precomputed_copy.precompute(inputs, self.setup)

    def init_forward_metadata_replay_cuda_graph_from_precomputed(
        self, bs: int, precomputed: PrecomputedMetadata, forward_mode: Any
    ) -> None:
        """Copy ``precomputed`` into the buffers of the bucket ``bs``, and what derives from it: lengths, schedule.

        Raises ``ValueError`` for a bucket that was not captured in this mode, and for the metadata of another batch,
        mode or width; nothing is written then.
        """
        _copy_everywhere([self], bs, precomputed, mode_of(forward_mode))

    def _inputs(
        self,
        bs: int,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        seq_lens_cpu: Tensor | None,
        mode: Mode,
        spec_info: SpecInfo | None,
    ) -> ReplayInputs:
        table = self._req_to_token
        if table is None:
            raise ValueError("req_to_token is not set: give it to the constructor, or set the attribute")
        check_lengths(bs, self.device, req_pool_indices=req_pool_indices, seq_lens=seq_lens)
        if seq_lens_cpu is not None:
            check_lengths(bs, _HOST, seq_lens_cpu=seq_lens_cpu)
        # The other modes read no accept lengths, but every launch has an argument for them.
        accept_lens = self._accept_lens(bs, spec_info) if mode in _DRAFT_EXTEND else seq_lens
        return ReplayInputs(mode, bs, seq_lens, seq_lens_cpu, req_pool_indices, table, accept_lens)

    def _accept_lens(self, bs: int, spec_info: SpecInfo | None) -> Tensor:
        given = None if spec_info is None else spec_info.accept_length
        if given is not None:
            check_lengths(bs, self.device, accept_length=given)
            return given
        backing = self._backing
        if backing is None:
            raise ValueError("accept_length is None: all N tokens are known after init_cuda_graph_state only")
        if bs > backing.max_bs:
            known = f"all N tokens are known up to max_bs = {backing.max_bs} only"
            raise ValueError(f"accept_length is None, where bs = {bs}: {known}")
        return backing.every_token

    def _refresh(self, inputs: ReplayInputs, buffers: MetadataBuffers) -> None:
        refresh = _refresh_onepass if self.path.take() else python_loop.refresh
        with on_device(self.device):
            refresh(inputs, [buffers], self.setup)

    def _frozen(self, mode: Mode, bs: int) -> MetadataBuffers:
        found = self.captured.get((mode, bs))
        if found is None:
            there = ", ".join(str(bucket) for of, bucket in sorted(self.captured) if of is mode) or "none"
            raise ValueError(f"bs = {bs} was not captured in {mode}; captured there: {there}")
        return found

    def _prepared(self, bs: int, buffers: MetadataBuffers) -> None:
        self.decode_cuda_graph_metadata[bs] = self.forward_metadata = buffers

    def _make(self, mode: Mode, bs: int) -> MetadataBuffers:
        setup, backing = self.setup, self._backing
        if backing is None:
            raise ValueError(f"bs = {bs} cannot be captured: call init_cuda_graph_state first")
        rows = setup.captured_rows(mode, bs)
        if not 1 <= bs <= backing.max_bs or rows > backing.max_num_tokens:
            most = f"max_bs = {backing.max_bs} and max_num_tokens = {backing.max_num_tokens}"
            raise ValueError(f"bs = {bs} in {mode} has {rows} rows, which exceeds {most}")
        made: dict[str, Tensor] = {}
        for name, shape in shapes(setup, mode, bs).items():
            alias = alias_of(setup, mode, name)
            if name in TABLES:
                made[name] = getattr(backing, name)[:rows]
            elif alias is not None:
                made[name] = made[alias].view(*shape) if name == "paged_mqa_ctx_lens" else made[alias]
            elif name in FROZEN:
                made[name] = torch.arange(shape.columns, dtype=torch.int32, device=self.device)
            else:
                made[name] = self._zeros(*_sizes(name, shape))
        if setup.page_size == 1:
            made["real_page_table"] = made["page_table_1"]
        return MetadataBuffers(**made)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)


class NativeSparseAttnMultiStepBackend:
    """One backend per draft step, ``attn_backends``, all prepared from one batch: what they hold is the same.

    Each has tables and buffers of its own. Arguments are those of ``NativeSparseAttnBackend``; there are as many steps
    as the setup says.
    """

    def __init__(
        self,
        device: torch.device | str,
        setup: Setup,
        use_triton_metadata: bool | str | None = None,
        *,
        req_to_token: Tensor | None = None,
    ) -> None:
        self.device, self.setup = with_index(device), setup
        self.path = path_for(self.device, use_triton_metadata)
        self.speculative_num_steps = setup.num_steps
        self.attn_backends = [
            NativeSparseAttnBackend(self.device, setup, use_triton_metadata, req_to_token=req_to_token, step=step)
            for step in range(setup.num_steps)
        ]

    @property
    def req_to_token(self) -> Tensor | None:
        """The table that all steps read."""
        return self.attn_backends[0].req_to_token

    @req_to_token.setter
    def req_to_token(self, table: Tensor | None) -> None:
        """Set it for every step; refused for all of them as a backend alone refuses it."""
        for backend in self.attn_backends:
            backend.req_to_token = table

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what each step's buckets share."""
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def adopt(self, mode: Mode, bucket: int, steps: Sequence[MetadataBuffers]) -> None:
        """Take given memory for the frozen buffers of ``(mode, bucket)``, one set per step.

        Raises ``ValueError`` for another number of sets, and where a step's own ``adopt`` does; no step adopts then.
        """
        if len(steps) != len(self.attn_backends):
            raise ValueError(f"buffers of {len(steps)} steps; the setup has {len(self.attn_backends)}")
        both = list(zip(self.attn_backends, steps, strict=True))
        for backend, buffers in both:
            backend._check_adopted(mode, bucket, buffers)
        for backend, buffers in both:
            backend.captured[mode, bucket] = buffers

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
        """Make and fill every step's buffers of the bucket ``forward_batch.batch_size``."""
        bs, mode = forward_batch.batch_size, forward_batch.forward_mode
        for backend in self.attn_backends:
            backend.init_forward_metadata_capture_cuda_graph(
                bs=bs,
                num_tokens=self.setup.captured_rows(mode_of(mode), bs),
                req_pool_indices=forward_batch.req_pool_indices,
                seq_lens=forward_batch.seq_lens,
                encoder_lens=None,
                forward_mode=mode,
                spec_info=forward_batch.spec_info,
            )

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        """Refresh every step's buffers of the bucket ``bs``: one launch for all on the Triton path, computed once and
        copied into each on the Python path."""
        first, mode = self.attn_backends[0], mode_of(forward_batch.forward_mode)
        given = bs, forward_batch.req_pool_indices, forward_batch.seq_lens, forward_batch.seq_lens_cpu
        buffers = [backend._frozen(mode, bs) for backend in self.attn_backends]
        if self.path.take():
            inputs = first._inputs(*given, mode, forward_batch.spec_info)
            with on_device(self.device):
                _refresh_onepass(inputs, buffers, self.setup)
            for backend, own in zip(self.attn_backends, buffers, strict=True):
                backend._prepared(bs, own)
        else:
            shared = first._precompute_replay_metadata(*given, forward_batch.forward_mode, forward_batch.spec_info)
            _copy_everywhere(self.attn_backends, bs, shared, mode)


def _copy_everywhere(
    backends: Sequence[NativeSparseAttnBackend], bs: int, precomputed: PrecomputedMetadata, mode: Mode
) -> None:
    """Copy into the frozen buffers of every backend."""
    setup = backends[0].setup
    targets = [backend._frozen(mode, bs) for backend in backends]
    _check_precomputed(precomputed, setup, mode, bs)
    with on_device(backends[0].device):
        precomputed_copy.copy_into_all(targets, precomputed, mode, setup)
    for backend, target in zip(backends, targets, strict=True):
        backend._prepared(bs, target)


def _check_precomputed(precomputed: PrecomputedMetadata, setup: Setup, mode: Mode, bs: int) -> None:
    """Refuse what another batch, mode or width was computed for, or what would be copied in part."""
    if precomputed.mode not in (None, mode):
        raise ValueError(f"precomputed is the metadata of {precomputed.mode}, not of {mode}")
    batch, rows = precomputed.cache_seqlens.shape[0], precomputed.seqlens_expanded_size
    captured = setup.captured_rows(mode, bs)
    if batch != bs or rows > captured or (mode is not Mode.DRAFT_EXTEND and rows != captured):
        raise ValueError(f"precomputed has {batch} requests and {rows} rows; {mode} of bs = {bs} has {captured} rows")
    width, longest = precomputed.max_len, precomputed.max_seqlen_k
    if not min(longest, setup.table_width) <= width <= setup.table_width:
        found = f"max_len = {width} where max_seqlen_k = {longest}"
        raise ValueError(f"precomputed has {found}, must have max_seqlen_k clipped to W = {setup.table_width}")
    if (precomputed.real_page_table is None) != (setup.page_size == 1):
        found = "no" if precomputed.real_page_table is None else "a"
        raise ValueError(f"precomputed has {found} real_page_table, where the page size is {setup.page_size}")
    wanted: dict[str, tuple[int, ...]] = {
        "cache_seqlens": (bs,),
        "cu_seqlens_k": (bs + 1,),
        "page_indices": (rows, width),
        "real_page_table": (rows, -(-width // setup.page_size)),
        "seqlens_expanded": (rows,),
        "nsa_cache_seqlens": (rows,),
        "nsa_cu_seqlens_k": (rows + 1,),
    }
    for name, sizes in wanted.items():
        tensor: Tensor | None = getattr(precomputed, name)
        if tensor is not None and tensor.shape != sizes:
            raise ValueError(f"precomputed has {name} {list(tensor.shape)}, must have {list(sizes)}")
