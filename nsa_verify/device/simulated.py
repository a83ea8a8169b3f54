"""``simulated-graph``: the semantics of captured graphs on the CPU, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.findings import Code
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.spent import CALL, spending
from nsa_verify.device.driving import WARM_UPS, KeptGraph, Note, call, capturable
from nsa_verify.device.memory import Memory
from nsa_verify.device.rig import Rig
from nsa_verify.device.stops import CaptureRefused, GraphKey
from nsa_verify.device.tape import Recorder, Tape
from nsa_verify.device.temporaries import WatchedCalls

if TYPE_CHECKING:
    from torch import Tensor


class SimulatedSession:
    """One tape per graph key."""

    def __init__(self, implementation: Implementation, tapes: Mapping[GraphKey, Tape]) -> None:
        self.implementation = implementation
        self.fallbacks = tuple(it for tape in tapes.values() for it in tape.fallbacks)
        self._tapes = tapes

    def begin(self, disturb: bool = True) -> None:  # noqa: ARG002 - it costs little
        """Nothing that a graph allocated holds anything before its first replay."""
        for tape in self._tapes.values():
            tape.scribble()

    def replay(self, mode: Mode, bucket: int) -> None:
        """Play the tape of ``(mode, bucket)``."""
        with spending(CALL):
            self._tapes[mode, bucket].replay()

    def trespassed(self) -> Tensor | None:
        """Memory that was given back is noticed when a tape is played."""
        return None

    def end(self) -> list[Note]:
        """Nothing."""
        return []


class SimulatedGraph:
    """Captures once per (mode, bucket) with the fill inputs, then replays the tape for every replay of the case."""

    name = "simulated-graph"
    device = "cpu"

    def not_applicable(self, implementation: Implementation, setup: Setup, mode: Mode) -> str | None:
        """What the implementation does not declare, capturability included."""
        return capturable(implementation, setup, mode)

    def capture(self, rig: Rig, implementation: Implementation, key: GraphKey) -> Tape:
        """Warm up, and record the tape of ``key``."""
        source = implementation.file
        host = [rig.host_seq_lens] if rig.setup.host_lengths else []
        recorder = Recorder(Memory(static=[rig.arena, rig.pool.table], host=host), source)
        for _ in range(WARM_UPS):
            rig.load_capture(*key)
            with recorder.marking():
                call(rig, implementation, key, WatchedCalls(source))
        rig.load_capture(*key)
        with recorder.recording():
            call(rig, implementation, key, WatchedCalls(source))
        moved = rig.moved(*key, implementation.writes(rig.setup))
        if moved is not None:
            raise CaptureRefused(Code.MOVED, moved)
        return recorder.tape

    def open(self, rig: Rig, implementation: Implementation, graphs: Mapping[GraphKey, KeptGraph]) -> SimulatedSession:  # noqa: ARG002
        """Start a session; nothing is run."""
        return SimulatedSession(implementation, cast("Mapping[GraphKey, Tape]", graphs))
