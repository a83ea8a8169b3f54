"""``eager``: the implementation is called directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.findings import Code
from nsa_verify.core.implementation import Implementation, reported_fallbacks
from nsa_verify.device.driving import KeptGraph, Note, call
from nsa_verify.device.launches import CompileKey, Launch, compile_key, intercepted
from nsa_verify.device.recompiling import Served, growth
from nsa_verify.device.rig import Rig
from nsa_verify.device.stops import GraphKey
from nsa_verify.device.temporaries import WatchedCalls

DELAY_CYCLES: Final = 10_000_000
"""About five milliseconds of a GPU's clock: longer than the host takes for a call and the preparation of the next."""


class EagerSession:
    """Calls ``refresh`` directly, with its uninitialised temporaries poisoned.

    ``served`` are the compile keys of every call. With ``delay_cycles`` the calls run behind a long kernel on the
    stream, while the host goes on: what it overwrites too early, as a staging buffer that is used again, is then wrong.
    Unless it is ``watched``, refresh() is called and nothing else is seen; its caller then stands within ``unseeded``.
    """

    def __init__(self, rig: Rig, implementation: Implementation) -> None:
        self._rig, self.implementation = rig, implementation
        self.fallbacks: tuple[str, ...] = ()
        self._source = implementation.file
        self.delay_cycles = 0
        self.watched = True
        self.served: list[Served] = []
        self._calls = 0
        self._notes: list[Note] = []

    def begin(self, disturb: bool = True) -> None:  # noqa: ARG002 - nothing is kept that could be disturbed
        """Forget what was seen."""
        self.served, self._notes, self._calls = [], [], 0

    def replay(self, mode: Mode, bucket: int) -> None:
        """Call ``refresh`` once."""
        if self.delay_cycles and not self._calls and self._rig.device == "cuda":
            torch.cuda._sleep(self.delay_cycles)
        self._calls += 1
        if self.watched:
            self._watch(mode, bucket)
        else:
            call(self._rig, self.implementation, (mode, bucket), None)

    def _watch(self, mode: Mode, bucket: int) -> None:
        keys: set[CompileKey] = set()
        call_number = len(self.served)
        self.served.append(Served(mode, bucket, keys))
        watched, reported = WatchedCalls(self._source), reported_fallbacks()

        def launch(it: Launch) -> object:
            keys.add(compile_key(it))
            try:
                return it.run(it.kernel, *it.args, **it.kwargs)
            except Exception as error:
                watched.failed(f"the launch of {it.name}", error)
                raise

        with intercepted(launch):
            call(self._rig, self.implementation, (mode, bucket), watched)
        moved = self._rig.moved(mode, bucket, self.implementation.writes(self._rig.setup))
        if moved is not None:
            self._notes.append(Note(Code.MOVED, call_number, moved))
        if watched.errors and reported_fallbacks() == reported:
            self._notes.append(Note(Code.SILENT_FALLBACK, call_number, f"{watched.errors[0]}; refresh() went on"))

    def trespassed(self) -> torch.Tensor | None:
        """Nothing is known only to the device."""
        return None

    def end(self) -> list[Note]:
        """Buffers that moved, errors that were swallowed, kernels that would be compiled again and again."""
        grown = growth(self.served)
        return self._notes if grown is None else [*self._notes, Note(Code.RECOMPILES, *grown)]


class Eager:
    """``eager``: values, memory discipline and idempotence, on any device."""

    name = "eager"
    device = None

    def not_applicable(self, implementation: Implementation, setup: Setup, mode: Mode) -> str | None:
        """What the implementation does not declare."""
        return implementation.not_applicable(setup, mode)

    def open(self, rig: Rig, implementation: Implementation, graphs: Mapping[GraphKey, KeptGraph]) -> EagerSession:  # noqa: ARG002
        """Start a session; nothing is run."""
        return EagerSession(rig, implementation)
