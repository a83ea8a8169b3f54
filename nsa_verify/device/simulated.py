"""``simulated-graph``: the semantics of captured graphs on the CPU, without a GPU."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.findings import Code
from nsa_verify.core.implementation import Implementation, take_fallbacks
from nsa_verify.device.driving import WARM_UPS, Note, call, capturable, while_capturing
from nsa_verify.device.memory import Memory
from nsa_verify.device.rig import Rig
from nsa_verify.device.stops import CaptureRefused, GraphKey
from nsa_verify.device.tape import Recorder, Tape
from nsa_verify.device.temporaries import WatchedCalls


class SimulatedSession:
    """One tape per graph key."""

    def __init__(self, implementation: Implementation, tapes: dict[GraphKey, Tape]) -> None:
        self.implementation, self.fallbacks = implementation, take_fallbacks()
        self._tapes = tapes
        self.holds: object = None

    def begin(self) -> None:
        """Nothing that a graph allocated holds anything before its first replay."""
        for tape in self._tapes.values():
            tape.scribble()

    def replay(self, mode: Mode, bucket: int) -> None:
        """Play the tape of ``(mode, bucket)``."""
        self._tapes[mode, bucket].replay()

    def end(self) -> list[Note]:
        """Nothing: memory that was given back is noticed when a tape is played."""
        return []

    def close(self) -> None:
        """Let the tapes go."""
        self._tapes.clear()
        self.holds = None


class SimulatedGraph:
    """Captures once per (mode, bucket) with the fill inputs, then replays the tape for every replay of the case."""

    name = "simulated-graph"
    device = "cpu"

    def not_applicable(self, implementation: Implementation, setup: Setup, mode: Mode) -> str | None:
        """What the implementation does not declare, capturability included."""
        return capturable(implementation, setup, mode)

    def open(self, rig: Rig, implementation: Implementation, keys: Sequence[GraphKey]) -> SimulatedSession:
        """Warm up and capture every key."""
        tapes: dict[GraphKey, Tape] = {}
        for key in keys:
            with while_capturing(key):
                tapes[key] = _capture(rig, implementation, key)
        if any(tape.memory.others for tape in tapes.values()):
            gc.collect(1)  # Triton's interpreter leaves cycles that keep what it was given alive
        return SimulatedSession(implementation, tapes)


def _capture(rig: Rig, implementation: Implementation, key: GraphKey) -> Tape:
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
