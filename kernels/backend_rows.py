"""The methods of the backend, and the ragged expansions alone, as rows: ``--impl nsa_verify.kernels.backend_rows``.

Not in ``BUILTIN_MODULES``, since each row costs time in every run, and not beside the backend itself, since whoever
imports that would have them in each later run. Every call makes a new backend, which adopts the verifier's buffers and
replays once: the state that a backend keeps from replay to replay is a matter of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs, implementation
from nsa_verify.kernels.backend import NativeSparseAttnBackend, NativeSparseAttnMultiStepBackend
from nsa_verify.kernels.backend_arguments import ForwardMode, MetadataPath
from nsa_verify.kernels.onepass import fill_draft_extend_metadata_onepass
from nsa_verify.kernels.onepass import refresh as refresh_onepass
from nsa_verify.kernels.triton_inplace import fill_draft_extend_metadata_inplace

WITHOUT_TRITON: Final = MetadataPath(False, "Triton is taken for missing: the metadata takes the Python path")
"""What ``path_for`` returns where Triton was asked for and cannot be had, the warning left out."""


@dataclass(slots=True)
class SpecInfo:
    """As much of an engine's ``spec_info`` as is read."""

    accept_length: Tensor | None


@dataclass(slots=True)
class ForwardBatch:
    """As much of an engine's ``forward_batch`` as is read."""

    forward_mode: ForwardMode
    batch_size: int
    req_pool_indices: Tensor
    seq_lens: Tensor
    seq_lens_cpu: Tensor | None
    spec_info: SpecInfo | None


@implementation("engine-triton", extent=Extent.LIVE, capturable=True, optional_outputs=OPTIONAL_OUTPUTS)
def refresh_triton(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Each step's backend replays on its own, on the Triton path."""
    _replay_each(inputs, steps, setup, use_triton_metadata=True)


@implementation("engine-python", extent=Extent.MAX, capturable=False, optional_outputs=OPTIONAL_OUTPUTS)
def refresh_python(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Each step's backend replays on its own, on the Python path, which reads lengths on the host."""
    _replay_each(inputs, steps, setup, use_triton_metadata=False)


@implementation("engine-multistep", extent=Extent.LIVE, capturable=True, optional_outputs=OPTIONAL_OUTPUTS)
def refresh_multistep(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """The multi-step backend fans out, on the Triton path."""
    _fan_out(inputs, steps, setup, use_triton_metadata=True)


@implementation(
    "engine-multistep-python",
    extent=Extent.FULL,
    capturable={Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2},
    optional_outputs=OPTIONAL_OUTPUTS,
)
def refresh_multistep_python(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """The same on the Python path: computed once, copied everywhere, under capture to the tables' full width."""
    _fan_out(inputs, steps, setup, use_triton_metadata=False)


@implementation("engine-fallback", extent=Extent.MAX, capturable=False, optional_outputs=OPTIONAL_OUTPUTS)
def refresh_fallback(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """``engine-python`` as it is where the Triton path was asked for and cannot be had; each time that is reported."""
    for step in steps:
        backend = _adopting(inputs, step, setup, use_triton_metadata=False)
        backend.path = WITHOUT_TRITON
        _replay(backend, inputs)


@implementation(
    "engine-precomputed",
    extent=Extent.FULL,
    capturable={Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2},
    optional_outputs=OPTIONAL_OUTPUTS,
)
def refresh_precomputed(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """The first step's backend precomputes and every step's copies, under capture to the tables' full width."""
    backends = [_adopting(inputs, step, setup, use_triton_metadata=False) for step in steps]
    bs, mode = inputs.batch_size, ForwardMode(inputs.mode)
    precomputed = backends[0]._precompute_replay_metadata(
        bs, inputs.req_pool_indices, inputs.seq_lens, inputs.seq_lens_cpu, mode, SpecInfo(inputs.accept_lens)
    )
    for backend in backends:
        backend.init_forward_metadata_replay_cuda_graph_from_precomputed(bs, precomputed, mode)


@implementation("engine-expansion", modes=[Mode.DRAFT_EXTEND], extent=Extent.LIVE, capturable=True)
def refresh_expansion(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """``onepass``, but for the expanded rows, which are those of ``fill_draft_extend_metadata_onepass``."""
    _expand_with(fill_draft_extend_metadata_onepass, inputs, steps, setup)


@implementation("engine-expansion-inplace", modes=[Mode.DRAFT_EXTEND], extent=Extent.LIVE, capturable=False)
def refresh_expansion_inplace(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """The same with ``fill_draft_extend_metadata_inplace``, which waits for the device."""
    _expand_with(fill_draft_extend_metadata_inplace, inputs, steps, setup)


def _expand_with(
    fill: Callable[[Tensor, Tensor, int, Tensor, Tensor], object],
    inputs: ReplayInputs,
    steps: Sequence[MetadataBuffers],
    setup: Setup,
) -> None:
    """What ``fill`` leaves in memory that held -1 takes the place of what is live; what it wrote past that shows."""
    refresh_onepass(inputs, steps, setup)
    accept_lens = inputs.accept_lens
    assert accept_lens is not None
    seq_lens = inputs.seq_lens[: inputs.batch_size]
    filled = torch.full((2, steps[0].nsa_seqlens_expanded.shape[0]), -1, dtype=torch.int32, device=seq_lens.device)
    fill(accept_lens[: inputs.batch_size], seq_lens, setup.index_topk, filled[0], filled[1])
    live = torch.arange(filled.shape[1], device=seq_lens.device) < accept_lens[: inputs.batch_size].sum()
    for step in steps:
        for row, buffer in zip(filled, (step.nsa_seqlens_expanded, step.nsa_cache_seqlens), strict=True):
            buffer.copy_(torch.where(live | (row != -1), row, buffer))


def _replay_each(
    inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup, use_triton_metadata: bool
) -> None:
    for step in steps:
        _replay(_adopting(inputs, step, setup, use_triton_metadata), inputs)


def _replay(backend: NativeSparseAttnBackend, inputs: ReplayInputs) -> None:
    backend.init_forward_metadata_replay_cuda_graph(
        bs=inputs.batch_size,
        req_pool_indices=inputs.req_pool_indices,
        seq_lens=inputs.seq_lens,
        seq_lens_sum=None,
        encoder_lens=None,
        forward_mode=ForwardMode(inputs.mode),
        spec_info=SpecInfo(inputs.accept_lens),
        seq_lens_cpu=inputs.seq_lens_cpu,
    )


def _fan_out(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup, use_triton_metadata: bool) -> None:
    backend = NativeSparseAttnMultiStepBackend(
        inputs.seq_lens.device, setup, use_triton_metadata, req_to_token=inputs.req_to_token
    )
    backend.adopt(inputs.mode, inputs.batch_size, steps)
    batch = ForwardBatch(
        forward_mode=ForwardMode(inputs.mode),
        batch_size=inputs.batch_size,
        req_pool_indices=inputs.req_pool_indices,
        seq_lens=inputs.seq_lens,
        seq_lens_cpu=inputs.seq_lens_cpu,
        spec_info=SpecInfo(inputs.accept_lens),
    )
    backend.init_forward_metadata_replay_cuda_graph(batch, inputs.batch_size)


def _adopting(
    inputs: ReplayInputs, step: MetadataBuffers, setup: Setup, use_triton_metadata: bool
) -> NativeSparseAttnBackend:
    """A backend whose one bucket has the buffers ``step``."""
    backend = NativeSparseAttnBackend(
        inputs.seq_lens.device, setup, use_triton_metadata, req_to_token=inputs.req_to_token
    )
    backend.adopt(inputs.mode, inputs.batch_size, step)
    return backend
