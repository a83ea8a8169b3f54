"""How an implementation is driven. An executor opens a session per case; the session serves its replays in order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from nsa_verify.core.case import Mode
from nsa_verify.core.implementation import Implementation
from nsa_verify.device.layout import POISON_LOW
from nsa_verify.device.rig import Rig

TEMPORARY_POISON = POISON_LOW + 1234
"""What uninitialised integer memory of an implementation's own temporaries holds."""


class ImplementationRaised(Exception):
    """The implementation raised ``error``; any other exception out of a session is a fault of the checker."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class Session(Protocol):
    """One implementation over one rig."""

    def replay(self, mode: Mode, bucket: int) -> None:
        """Refresh the metadata of ``(mode, bucket)`` from the inputs that are in place.

        Raises ``ImplementationRaised`` for whatever the implementation raises.
        """

    def close(self) -> None:
        """Give back what the session holds. Must be called; may be called once."""


class Executor(Protocol):
    """A way to drive implementations: a name, and sessions."""

    name: str

    def open(self, rig: Rig, implementation: Implementation) -> Session:
        """Start a session; nothing is run before ``Session.replay``."""


class EagerSession:
    """Calls ``refresh`` directly, with its uninitialised temporaries poisoned."""

    def __init__(self, rig: Rig, implementation: Implementation) -> None:
        self._rig, self._implementation = rig, implementation
        self._writes = implementation.writes(rig.setup)

    def replay(self, mode: Mode, bucket: int) -> None:
        """Call ``refresh`` once."""
        inputs = self._rig.inputs(mode, bucket)
        steps = self._rig.steps(mode, bucket, self._writes)
        try:
            with PoisonTemporaries(), _unseeded():
                self._implementation.refresh(inputs, steps, self._rig.setup)
        except (Exception, SystemExit) as error:
            raise ImplementationRaised(error) from error

    def close(self) -> None:
        """Nothing is held."""


class Eager:
    """``eager``: values, memory discipline and idempotence, on any device."""

    name = "eager"

    def open(self, rig: Rig, implementation: Implementation) -> EagerSession:
        """Start a session."""
        return EagerSession(rig, implementation)


EXECUTORS: dict[str, Executor] = {"eager": Eager()}

_UNINITIALISED = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.empty_permuted,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }
)


class PoisonTemporaries(TorchFunctionMode):
    """Fills what ``torch.empty`` and its kin return, so that copying it out is seen, and seen every time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _UNINITIALISED and result.numel():
            _poison(result)
        return result


def _poison(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype in (torch.int32, torch.int64):
        tensor.fill_(TEMPORARY_POISON)
    elif not tensor.is_complex():
        tensor.fill_(1)


@contextmanager
def _unseeded() -> Iterator[None]:
    """Hypothesis gives every example the same ``random``; an implementation that depends on it must still show."""
    before = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(before)


@contextmanager
def session(executor: Executor, rig: Rig, implementation: Implementation) -> Iterator[Session]:
    """A session that is closed however the block ends."""
    opened = executor.open(rig, implementation)
    try:
        yield opened
    finally:
        opened.close()
