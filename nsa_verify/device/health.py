"""Whether the device still works: an illegal access on a GPU ends its context for good, and every later call fails."""

from __future__ import annotations

import torch


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
