"""The executors there are, by name, and which of them a run on a device drives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from nsa_verify.device.driving import Executor
from nsa_verify.device.eager import Eager
from nsa_verify.device.graph import Graph
from nsa_verify.device.select import DeviceError
from nsa_verify.device.simulated import SimulatedGraph

EAGER: Final[Executor] = Eager()
EXECUTORS: Final[dict[str, Executor]] = {it.name: it for it in (EAGER, Graph(), SimulatedGraph())}


def executors_for(device: str, names: Sequence[str] = ()) -> tuple[Executor, ...]:
    """The executors called ``names``, or all that ``device`` (``cpu`` or ``cuda``) has if none is named.

    Raises ``DeviceError`` for one that needs another device, ``ValueError`` for one that there is not.
    """
    here = tuple(it for it in EXECUTORS.values() if it.device in (None, device))
    for name in names:
        if name not in EXECUTORS:
            raise ValueError(f"executor {name!r}: must be one of {', '.join(EXECUTORS)}")
        if EXECUTORS[name] not in here:
            others = ", ".join(it.name for it in here)
            raise DeviceError(f"--executor {name}: needs {EXECUTORS[name].device} and not {device}; here are {others}")
    return tuple(EXECUTORS[name] for name in names) or here
