"""What is in flight in a worker: noted before it is run, in memory that outlives the worker.

The worker writes, its engine reads, also when the worker is dead or stuck with every lock held. The words are written
one after the other; ``beat`` is the last, and changes with every note.
"""

from __future__ import annotations

import struct
import time
from enum import IntEnum
from typing import Final, NamedTuple


class Phase(IntEnum):
    """What a worker is doing."""

    IDLE = 0
    LOADING = 1
    """Importing implementations and creating the device's context."""
    CAPTURING = 2
    """Warming up or capturing the graphs of an implementation."""
    CALLING = 3
    """Inside the implementation, or replaying its graph."""
    CHECKING = 4
    """Comparing what it left."""
    COMPILING = 5
    """A Triton kernel of the implementation is being compiled."""


class Mark(NamedTuple):
    """The last note: the phase, and of what. ``job`` and ``pair`` count within the batch, ``replay`` within the case;
    -1 where there is none."""

    beat: int
    job: int
    pair: int
    phase: Phase
    replay: int


_WORDS: Final = struct.Struct("<5q")
SIZE: Final = 64
"""Bytes that marks need; the word past those of the mark is the engine's wish that the worker stop."""
_STOP: Final = struct.Struct("<q")


class Marks:
    """Notes in ``memory``, a writable buffer of ``SIZE`` bytes, usually a shared mapping."""

    def __init__(self, memory: memoryview | bytearray) -> None:
        self._memory = memory
        self._job = self._pair = -1
        self._last = (Phase.IDLE, -1)
        self._beat = 0
        self._noted_s = time.perf_counter()
        self._slowest: dict[tuple[int, int], float] = {}

    def take(self, job: int, pair: int) -> None:
        """What follows is about this job and pair of the batch."""
        self._time()
        self._job, self._pair = job, pair
        self._last = (Phase.IDLE, -1)

    def slowest_s(self, job: int, pair: int) -> float:
        """The longest time between two notes about ``pair`` of ``job``, compilations left out; forgotten when told."""
        return self._slowest.pop((job, pair), 0.0)

    def _time(self) -> None:
        now = time.perf_counter()
        key, took = (self._job, self._pair), now - self._noted_s
        if took > self._slowest.get(key, 0.0):
            self._slowest[key] = took
        self._noted_s = now

    def note(self, phase: Phase, replay: int | None = None) -> None:
        """Say what comes next; without ``replay`` it is still about the last one."""
        self._time()
        self._beat += 1
        if replay is None:
            replay = self._last[1]
        self._last = (phase, replay)
        _WORDS.pack_into(self._memory, 0, self._beat, self._job, self._pair, phase, replay)

    def compiling(self, now: bool) -> None:
        """A compilation begins inside what is in flight, or ends."""
        if now:
            self._time()
        else:
            self._noted_s = time.perf_counter()
        self._beat += 1
        phase, replay = self._last
        shown = Phase.COMPILING if now else phase
        _WORDS.pack_into(self._memory, 0, self._beat, self._job, self._pair, shown, replay)

    def read(self) -> Mark:
        """The last note."""
        beat, job, pair, phase, replay = _WORDS.unpack_from(self._memory, 0)
        if phase not in set(Phase):  # somebody else wrote here
            return Mark(beat, -1, -1, Phase.IDLE, -1)
        return Mark(beat, job, pair, Phase(phase), replay)

    def clear(self) -> None:
        """Forget everything, as for a new worker."""
        self._memory[:SIZE] = bytes(SIZE)
        self._job, self._pair, self._last = -1, -1, (Phase.IDLE, -1)
        self._slowest.clear()

    def ask_to_stop(self, stop: bool = True) -> None:
        """Have the worker end after the job that it is at; False takes it back."""
        _STOP.pack_into(self._memory, _WORDS.size, int(stop))

    @property
    def asked_to_stop(self) -> bool:
        """Whether it was."""
        return bool(_STOP.unpack_from(self._memory, _WORDS.size)[0])


MARKS: Final = [Marks(bytearray(SIZE))]
"""Where this process notes what it does: its one element is replaced in a worker."""


def note(phase: Phase, replay: int | None = None) -> None:
    """Say what comes next in this process."""
    MARKS[0].note(phase, replay)
