"""What engines pass to the metadata backend: forward modes, batches, the switch between the two paths."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from nsa_verify.core.case import Mode
from nsa_verify.core.implementation import fallback

SWITCH: Final = "SGLANG_NSA_USE_TRITON_METADATA"
"""The environment variable that chooses the path."""


class ForwardMode(Enum):
    """What a batch is prepared for, with an engine's predicates. ``ForwardMode(mode)`` is the member of a ``Mode``."""

    DECODE = "decode"
    TARGET_VERIFY = "target-verify"
    DRAFT_EXTEND = "draft-extend"
    DRAFT_EXTEND_V2 = "draft-extend-v2"
    IDLE = "idle"
    """A rank without a request: all rows are padding, prepared as DECODE."""

    def is_decode_or_idle(self) -> bool:
        """Whether it is DECODE or IDLE."""
        return self in (ForwardMode.DECODE, ForwardMode.IDLE)

    def is_target_verify(self) -> bool:
        """Whether it is TARGET_VERIFY."""
        return self is ForwardMode.TARGET_VERIFY

    def is_draft_extend(self, include_v2: bool = False) -> bool:
        """Whether it is DRAFT_EXTEND, or with ``include_v2`` DRAFT_EXTEND_V2."""
        return self is ForwardMode.DRAFT_EXTEND or (include_v2 and self.is_draft_extend_v2())

    def is_draft_extend_v2(self) -> bool:
        """Whether it is DRAFT_EXTEND_V2."""
        return self is ForwardMode.DRAFT_EXTEND_V2


_PREDICATES: Final = (
    ("is_decode_or_idle", Mode.DECODE),
    ("is_target_verify", Mode.TARGET_VERIFY),
    ("is_draft_extend_v2", Mode.DRAFT_EXTEND_V2),
    ("is_draft_extend", Mode.DRAFT_EXTEND),
)


def mode_of(forward_mode: Any) -> Mode:
    """The ``Mode`` of a forward mode, ours or an engine's: it is asked by its predicates alone.

    Raises ``ValueError`` for one that answers none of them with yes.
    """
    for predicate, mode in _PREDICATES:
        if getattr(forward_mode, predicate, bool)():
            return mode
    known = ", ".join(it.name for it in ForwardMode)
    raise ValueError(f"forward mode {forward_mode!r} has no metadata; those that have: {known}")


class SpecInfo(Protocol):
    """What is read of an engine's ``spec_info``, in the two DRAFT_EXTEND modes."""

    accept_length: Tensor | None
    """``[>=bs]`` int32 or int64; None: all N tokens of every request."""


class ForwardBatch(Protocol):
    """What is read of an engine's ``forward_batch``."""

    forward_mode: Any
    batch_size: int
    """The bucket; read at capture only."""
    req_pool_indices: Tensor
    seq_lens: Tensor
    seq_lens_cpu: Tensor | None

    @property
    def spec_info(self) -> SpecInfo | None:
        """Where the accept lengths are, in the two DRAFT_EXTEND modes; None: all N tokens of every request."""


@dataclass(frozen=True, slots=True)
class MetadataPath:
    """Which implementation refreshes. ``missing`` says why it is not the one that was asked for, if it is not."""

    uses_triton: bool
    missing: str | None = None

    def take(self) -> bool:
        """Whether to take the Triton path now; reports the fallback if there is one."""
        if self.missing is not None:
            fallback(self.missing)
        return self.uses_triton


def path_for(use_triton_metadata: bool | str | None = None) -> MetadataPath:
    """The path that ``use_triton_metadata`` asks for; None: that the environment asks for, as it is now.

    Where the Triton path was asked for and cannot be had a warning is logged, once for each backend.
    Raises ``ValueError`` for anything but 1 and 0, as text or as a truth value.
    """
    asked = os.environ.get(SWITCH, "1") if use_triton_metadata is None else use_triton_metadata
    if asked not in ("0", "1", False, True):
        raise ValueError(f"{SWITCH} = {asked!r}: must be 1 (the Triton path) or 0 (the Python path)")
    if asked in ("0", False):
        return MetadataPath(uses_triton=False)
    try:
        import triton  # noqa: F401 - only whether it can be
    except ImportError as error:
        missing = f"Triton cannot be imported ({error}): the metadata takes the Python path"
        logging.getLogger(__name__).warning(missing)
        return MetadataPath(False, missing)
    return MetadataPath(uses_triton=True)


def check_lengths(bs: int, **vectors: Tensor) -> None:
    """Refuse what a launch would read past its end or misread; costs no synchronisation."""
    for name, vector in vectors.items():
        if vector.dim() != 1 or vector.shape[0] < bs or vector.dtype not in (torch.int32, torch.int64):
            found = f"{vector.dtype} {list(vector.shape)}"
            raise ValueError(f"{name} is {found}, where bs = {bs} needs a vector of at least {bs} int32 or int64")
