"""What engines pass, and whether it can be taken: forward modes, batches, the switch between the two paths, devices.

Every refusal is decided on the host, from what a tensor says of itself: nothing here waits for the device.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
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
    """``[>=bs]`` int32 or int64; None, which ``bs`` of up to ``max_bs`` may have: all N tokens of every request."""


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


def path_for(device: torch.device, use_triton_metadata: bool | str | None = None) -> MetadataPath:
    """The path that ``use_triton_metadata`` asks for; None: that the environment asks for, as it is now.

    Where the Triton path was asked for and Triton cannot be imported, or not run on ``device``, a warning is logged,
    once for each backend. Raises ``ValueError`` for anything but 1 and 0, as text or as a truth value.
    """
    asked = os.environ.get(SWITCH, "1") if use_triton_metadata is None else use_triton_metadata
    if asked not in ("0", "1", False, True):
        raise ValueError(f"{SWITCH} = {asked!r}: must be 1 (the Triton path) or 0 (the Python path)")
    if asked in ("0", False):
        return MetadataPath(uses_triton=False)
    reason = _why_triton_cannot(device)
    if reason is None:
        return MetadataPath(uses_triton=True)
    missing = f"Triton cannot {reason}: the metadata takes the Python path"
    logging.getLogger(__name__).warning(missing)
    return MetadataPath(False, missing)


def _why_triton_cannot(device: torch.device) -> str | None:
    try:
        import triton
    except Exception as error:  # noqa: BLE001 - an installation that is broken raises whatever it likes
        return f"be imported ({_in_short(error)})"
    try:
        if triton.knobs.runtime.interpret:
            return None
        if device.type == "cpu":
            return "run on the CPU (its interpreter is off: TRITON_INTERPRET=1 before it is imported)"
        # What a launch asks first: without a driver, or the compiler that builds its helper, this raises.
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # noqa: BLE001 - as above
        return f"run on {device} ({_in_short(error)})"
    return None


def _in_short(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def with_index(device: torch.device | str) -> torch.device:
    """``device``; for ``cuda`` without an index the device that is current, so that it compares with a tensor's."""
    found = torch.device(device)
    if found == torch.device("cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


_HERE: Final = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """What launches go to ``device`` in, since Triton launches on the current device, wherever its arguments are.

    Nothing is done for the CPU, nor where ``device`` is current already.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_INTEGERS: Final = (torch.int32, torch.int64)


def check_lengths(bs: int, device: torch.device, **vectors: Tensor) -> None:
    """Refuse what a launch would read past its end or misread: all must be ``[>=bs]`` int32 or int64 on ``device``."""
    for name, vector in vectors.items():
        if vector.dim() != 1 or vector.shape[0] < bs or vector.dtype not in _INTEGERS:
            found = f"{vector.dtype} {list(vector.shape)}"
            raise ValueError(f"{name} is {found}, where bs = {bs} needs a vector of at least {bs} int32 or int64")
        if vector.device != device:
            raise ValueError(f"{name} is on {vector.device}, must be on {device}")


def check_req_to_token(table: Tensor, width: int, device: torch.device) -> None:
    """Refuse a table that a gather of ``width`` (W) columns would misread: it must be int32 ``[rows, >=W]``.

    W columns must be there whatever the lengths are: the gather is clipped by W, as its destination is. Columns are
    neighbours in memory; a row stride may be anything.
    """
    if table.dim() != 2 or table.shape[1] < width or table.dtype is not torch.int32:
        found = f"{table.dtype} {list(table.shape)}"
        raise ValueError(f"req_to_token is {found}, must be int32 of two dimensions and at least W = {width} columns")
    if table.stride(1) != 1 and table.shape[1] > 1:
        strides = list(table.stride())
        raise ValueError(f"req_to_token has strides {strides}, must have a column stride of 1: give a contiguous one")
    if table.device != device:
        raise ValueError(f"req_to_token is on {table.device}, must be on {device}")


def check_expansion(
    extend_seq_lens: Tensor,
    seq_lens: Tensor,
    out_seqlens_expanded: Tensor | None = None,
    out_nsa_cache_seqlens: Tensor | None = None,
) -> None:
    """Refuse what a launch of the ragged expansion would misread, or read past its end.

    Both inputs must be ``[B]``, int32 or int64, of any element stride; the two outputs, if they are given, int32, 1-D
    and contiguous, without an element in common; everything on one device. Raises ``ValueError``.
    """
    first, second = out_seqlens_expanded, out_nsa_cache_seqlens
    device = extend_seq_lens.device
    # What is right passes by cheap questions alone: a call takes 20 us, and each attribute of a tensor 0.1.
    is_right = (
        extend_seq_lens.dim() == seq_lens.dim() == 1
        and extend_seq_lens.numel() == seq_lens.numel()
        and seq_lens.device == device
        and extend_seq_lens.dtype in _INTEGERS
        and seq_lens.dtype in _INTEGERS
    )
    if is_right and (first is None or second is None or _are_outputs(first, second, device)):
        return
    outputs = {"out_seqlens_expanded": first, "out_nsa_cache_seqlens": second}
    raise ValueError(_misread(extend_seq_lens, seq_lens, {name: it for name, it in outputs.items() if it is not None}))


def _are_outputs(first: Tensor, second: Tensor, device: torch.device) -> bool:
    if not (
        first.dim() == second.dim() == 1
        and first.dtype is second.dtype is torch.int32
        and first.device == second.device == device
        and first.is_contiguous()
        and second.is_contiguous()
    ):
        return False
    one, other = first.data_ptr(), second.data_ptr()
    return one + 4 * first.numel() <= other or other + 4 * second.numel() <= one


def _misread(extend_seq_lens: Tensor, seq_lens: Tensor, outputs: dict[str, Tensor]) -> str:
    """What is wrong with something that is."""
    for name, lens in (("extend_seq_lens", extend_seq_lens), ("seq_lens", seq_lens)):
        if lens.dim() != 1 or lens.dtype not in _INTEGERS:
            return f"{name} is {lens.dtype} of shape {list(lens.shape)}, not 1-D and int32 or int64"
    batch_size, device = extend_seq_lens.shape[0], extend_seq_lens.device
    if seq_lens.shape[0] != batch_size:
        return f"seq_lens has {seq_lens.shape[0]} elements, must have {batch_size} as extend_seq_lens has"
    for name, it in {"seq_lens": seq_lens, **outputs}.items():
        if it.device != device:
            return f"{name} is on {it.device}, must be on {device} as extend_seq_lens is"
    for name, out in outputs.items():
        if out.dtype is not torch.int32 or out.dim() != 1 or not out.is_contiguous():
            return f"{name} is {out.dtype} of shape {list(out.shape)}, not contiguous, 1-D and int32"
    return f"{' and '.join(outputs)} share memory, must be tensors of their own"
