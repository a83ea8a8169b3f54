"""Whether the device still works: an illegal access on a GPU ends its context for good, and every later call fails."""

from __future__ import annotations

import torch

from nsa_verify.core.implementation import Implementation


class DeviceDied(Exception):
    """The device's context is dead, and with it what this process can do; the message is the device's own."""


def refuse_dead(device: str, error: BaseException) -> None:
    """Raise ``DeviceDied`` if ``error`` was, or came with, the end of the context of ``device``."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as fatal:  # noqa: BLE001 - a dead context fails in many ways
        lines = str(fatal).splitlines() or [type(fatal).__name__]
        raise DeviceDied(lines[0]) from error


def settle(device: str, implementation: Implementation) -> None:
    """Wait for everything that is under way on ``device``, before ``implementation`` runs and when it has run.

    Work on a stream of its own may overtake what was asked for before it, and be overtaken by what comes after it: then
    others would be accused. The built-in implementations have no streams of their own.
    """
    if device == "cuda" and not implementation.is_builtin:
        torch.cuda.synchronize()
