"""``eager``: the implementation is called directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.findings import Code
from nsa_verify.core.implementation import Implementation, reported_fallbacks
from nsa_verify.device.driving import Note, call
from nsa_verify.device.launches import CompileKey, Launch, compile_key, intercepted
from nsa_verify.device.recompiling import Served, growth
from nsa_verify.device.rig import Rig
from nsa_verify.device.stops import GraphKey
from nsa_verify.device.temporaries import WatchedCalls

DELAY_CYCLES: Final = 10_000_000
"""About five milliseconds of a GPU's clock: longer than the host takes for a call and the preparation of the next."""


class EagerSession:
    """Calls ``refresh`` directly, with its uninitialised temporaries poisoned.

    ``served`` are the compile keys of every call. With ``delay`` the calls run behind a long kernel on the stream,
    while the host goes on: what it overwrites too early, as a staging buffer that is used again, is then wrong.
    """

    def __init__(self, rig: Rig, implementation: Implementation) -> None:
        self._rig, self.implementation = rig, implementation
        self.fallbacks: tuple[str, ...] = ()
        self.holds: object = None
        self._source = implementation.file
        self.delay = False
        self.served: list[Served] = []
        self._notes: list[Note] = []

    def begin(self) -> None:
        """Forget what was seen."""
        self.served, self._notes = [], []

    def replay(self, mode: Mode, bucket: int) -> None:
        """Call ``refresh`` once."""
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

        if self.delay and call_number == 0 and self._rig.device == "cuda":
            torch.cuda._sleep(DELAY_CYCLES)
        with intercepted(launch):
            call(self._rig, self.implementation, (mode, bucket), watched)
        moved = self._rig.moved(mode, bucket, self.implementation.writes(self._rig.setup))
        if moved is not None:
            self._notes.append(Note(Code.MOVED, call_number, moved))
        if watched.errors and reported_fallbacks() == reported:
            self._notes.append(Note(Code.SILENT_FALLBACK, call_number, f"{watched.errors[0]}; refresh() went on"))

    def end(self) -> list[Note]:
        """Buffers that moved, errors that were swallowed, kernels that would be compiled again and again."""
        grown = growth(self.served)
        return self._notes if grown is None else [*self._notes, Note(Code.RECOMPILES, *grown)]

    def close(self) -> None:
        """Nothing is held."""


class Eager:
    """``eager``: values, memory discipline and idempotence, on any device."""

    name = "eager"
    device = None

    def not_applicable(self, implementation: Implementation, setup: Setup, mode: Mode) -> str | None:
        """What the implementation does not declare."""
        return implementation.not_applicable(setup, mode)

    def open(self, rig: Rig, implementation: Implementation, keys: Sequence[GraphKey]) -> EagerSession:  # noqa: ARG002
        """Start a session; nothing is run."""
        return EagerSession(rig, implementation)
