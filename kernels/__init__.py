"""The built-in implementations: one file each, registered by import; naive beside fast, one entry point.

None of them calls another, and none shares with another the code that computes a value: they are independent subjects
of the same contract. Importing this package imports neither torch nor Triton; the names that engines use are fetched
from their files when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from nsa_verify.kernels.backend import NativeSparseAttnBackend, NativeSparseAttnMultiStepBackend
    from nsa_verify.kernels.backend_arguments import ForwardMode
    from nsa_verify.kernels.onepass import fill_draft_extend_metadata_onepass
    from nsa_verify.kernels.precomputed_copy import PrecomputedMetadata
    from nsa_verify.kernels.triton_fused import fill_draft_extend_metadata_fused_simple
    from nsa_verify.kernels.triton_inplace import fill_draft_extend_metadata_inplace
    from nsa_verify.kernels.vectorized import compute_nsa_seqlens

BUILTIN_MODULES: Final[tuple[str, ...]] = (
    "nsa_verify.kernels.python_loop",
    "nsa_verify.kernels.vectorized",
    "nsa_verify.kernels.triton_fused",
    "nsa_verify.kernels.triton_inplace",
    "nsa_verify.kernels.precomputed_copy",
    "nsa_verify.kernels.precomputed_batched_copy",
    "nsa_verify.kernels.onepass",
)
"""The modules whose import registers the built-in implementations, in the order of the matrix."""

BACKEND_ROWS: Final = "nsa_verify.kernels.backend_rows"
"""The module to give to ``--impl`` to have the backend's own methods as further rows of the matrix."""

_ENGINE_NAMES: Final = {
    "ForwardMode": "nsa_verify.kernels.backend_arguments",
    "NativeSparseAttnBackend": "nsa_verify.kernels.backend",
    "NativeSparseAttnMultiStepBackend": "nsa_verify.kernels.backend",
    "PrecomputedMetadata": "nsa_verify.kernels.precomputed_copy",
    "compute_nsa_seqlens": "nsa_verify.kernels.vectorized",
    "fill_draft_extend_metadata_fused_simple": "nsa_verify.kernels.triton_fused",
    "fill_draft_extend_metadata_inplace": "nsa_verify.kernels.triton_inplace",
    "fill_draft_extend_metadata_onepass": "nsa_verify.kernels.onepass",
}

__all__ = [
    "BACKEND_ROWS",
    "BUILTIN_MODULES",
    "ForwardMode",
    "NativeSparseAttnBackend",
    "NativeSparseAttnMultiStepBackend",
    "PrecomputedMetadata",
    "compute_nsa_seqlens",
    "fill_draft_extend_metadata_fused_simple",
    "fill_draft_extend_metadata_inplace",
    "fill_draft_extend_metadata_onepass",
]


def __getattr__(name: str) -> Any:
    if name not in _ENGINE_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ENGINE_NAMES[name]), name)
