"""Uninitialised memory of an implementation's own temporaries, made to hold poison; and errors that it swallows."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nsa_verify.device.blame import line_now
from nsa_verify.device.layout import POISON_LOW
from nsa_verify.device.stops import words_of

TEMPORARY_POISON: Final = POISON_LOW + 1234
"""What uninitialised integer memory of an implementation's own temporaries holds."""

_UNINITIALISED: Final = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.empty_permuted,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }
)


class WatchedCalls(TorchFunctionMode):
    """Fills what ``torch.empty`` and its kin return, so that copying it out is seen, and seen every time.

    ``errors`` are those that calls of torch raised, each with the line that called.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source
        self.errors: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            name = getattr(func, "__name__", str(func))
            if not _is_probe(name, error):
                self.failed(name, error)
            raise
        if func in _UNINITIALISED and result.numel():
            poison(result)
        return result

    def failed(self, what: str, error: Exception) -> None:
        """Note that ``what`` raised ``error`` at the implementation's current line."""
        said = (words_of(error).splitlines() or [""])[0]
        self.errors.append(f"{what} raised {type(error).__name__}: {said} ({line_now(self._source)})")


def _is_probe(name: str, error: Exception) -> bool:
    """Whether this is how Python asks what an object can do: ``hasattr``, ``len`` of what has no length."""
    return isinstance(error, AttributeError) or name in ("__get__", "__len__", "__iter__")


def poison(tensor: Tensor) -> None:
    """Overwrite ``tensor`` with what no right value is."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype in (torch.int32, torch.int64):
        tensor.fill_(TEMPORARY_POISON)
    elif not tensor.is_complex():
        tensor.fill_(1)
