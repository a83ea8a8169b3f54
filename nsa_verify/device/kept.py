"""Graphs that are kept from case to case: capturing is what costs.

A verdict is a function of its case, so a graph that was captured for another case may serve this one only if it would
have been captured the same here. One that uses no memory but the rig's and its own, and whose capture left no numbers
in the variables of its module, *stands alone*: it serves any case. Others serve the very keys that they were captured
together with. What hides its state elsewhere is found where everything is captured afresh.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from nsa_verify.core.implementation import Implementation, put_back_fallbacks, take_fallbacks
from nsa_verify.device.driving import Capturing, KeptGraph, while_capturing
from nsa_verify.device.rig import Rig
from nsa_verify.device.state import state_of
from nsa_verify.device.stops import CaptureRefused, GraphKey, ImplementationRaised

KEPT_GRAPHS: Final = 96
"""Graphs that one rig keeps; the oldest are closed."""

_Keys = tuple[GraphKey, ...]
_Subject = tuple[str, int, str]


class Served(NamedTuple):
    """The graphs for the keys of a case: whether one of them was kept from an earlier case, and whether one is new."""

    graphs: dict[GraphKey, KeptGraph]
    kept: bool
    new: bool


class _Entry(NamedTuple):
    """``implementation`` is kept alive for its identity, which is part of the key. ``entangled`` says that its capture
    left or used what others could see, ``alone`` that it and those before it did not."""

    graph: KeptGraph
    implementation: Implementation
    alone: bool
    entangled: bool


class KeptGraphs:
    """The graphs over one rig, by implementation, executor, key, and the keys that they were captured together with."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._entries: OrderedDict[tuple[_Subject, GraphKey, _Keys], _Entry] = OrderedDict()
        self._alone: dict[tuple[_Subject, GraphKey], _Keys] = {}
        self._entangled: dict[tuple[_Subject, GraphKey], Implementation] = {}

    def serve(self, executor: Capturing, implementation: Implementation, keys: _Keys, afresh: bool = True) -> Served:
        """The graphs for ``keys``; what is missing is captured, in this order, and with ``afresh`` graphs serve only
        if they were captured together.

        The order is that of the replays backwards, so that a graph which needs another to be replayed first goes wrong.
        Raises ``ImplementationRaised`` and ``CaptureRefused``.
        """
        subject = _subject(executor, implementation)
        together = [(subject, key, keys) for key in keys]
        if all(name in self._entries for name in together):
            return Served(self._use(together), kept=True, new=False)
        if not afresh and not any((subject, key) in self._entangled for key in keys):
            served = self._composed(executor, implementation, keys)
            if served is not None:
                return served
        self._capture(executor, implementation, keys)
        return Served(self._use(together), kept=False, new=True)

    def forget(self, implementation: Implementation) -> None:
        """Close the graphs of ``implementation``."""
        for name in [name for name, it in self._entries.items() if it.implementation.refresh is implementation.refresh]:
            self._close(name)

    def close(self) -> None:
        """Close every graph."""
        for name in list(self._entries):
            self._close(name)
        self._entangled.clear()

    def _composed(self, executor: Capturing, implementation: Implementation, keys: _Keys) -> Served | None:
        """Graphs that stand alone, kept or captured now; None if they cannot be had."""
        subject = _subject(executor, implementation)
        missing = tuple(key for key in keys if (subject, key) not in self._alone)
        if missing == keys:
            return None
        if missing:
            try:
                self._capture(executor, implementation, missing, room=len(keys))
            except (ImplementationRaised, CaptureRefused):
                return None  # it is what happens when all are captured in order that counts
            if any((subject, key) not in self._alone for key in keys):
                return None
        graphs = self._use([(subject, key, self._alone[subject, key]) for key in keys])
        self._trim(KEPT_GRAPHS)
        return Served(graphs, kept=True, new=bool(missing))

    def _use(self, names: Sequence[tuple[_Subject, GraphKey, _Keys]]) -> dict[GraphKey, KeptGraph]:
        for name in names:
            self._entries.move_to_end(name)
        return {name[1]: self._entries[name].graph for name in names}

    def _capture(self, executor: Capturing, implementation: Implementation, keys: _Keys, room: int = 0) -> None:
        subject = _subject(executor, implementation)
        for key, entry in _captured(self._rig, executor, implementation, keys).items():
            name = (subject, key, keys)
            self._close(name)
            self._entries[name] = entry
            if entry.entangled:
                self._entangled[subject, key] = implementation
            if entry.alone:
                self._alone.setdefault((subject, key), keys)
        self._trim(KEPT_GRAPHS + room)

    def _trim(self, limit: int) -> None:
        while len(self._entries) > limit:
            self._close(next(iter(self._entries)))

    def _close(self, name: tuple[_Subject, GraphKey, _Keys]) -> None:
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        entry.graph.close()
        subject, key, keys = name
        if self._alone.get((subject, key)) == keys:
            del self._alone[subject, key]


def _subject(executor: Capturing, implementation: Implementation) -> _Subject:
    return executor.name, id(implementation.refresh), implementation.name


def _captured(rig: Rig, executor: Capturing, implementation: Implementation, keys: _Keys) -> dict[GraphKey, _Entry]:
    """Capture ``keys`` as by an engine that has just been started."""
    state = state_of(implementation)
    state.restore()
    entries: dict[GraphKey, _Entry] = {}
    try:
        for key in keys:
            before = state.numbers()
            with while_capturing(key):
                graph = executor.capture(rig, implementation, key)
            graph.fallbacks = take_fallbacks()
            entangled = graph.uses_others or state.numbers() != before
            alone = not entangled and all(it.alone for it in entries.values())
            entries[key] = _Entry(graph, implementation, alone, entangled)
    except BaseException:
        for entry in entries.values():
            put_back_fallbacks(entry.graph.fallbacks)
            entry.graph.close()
        raise
    if any(it.graph.uses_others for it in entries.values()):
        gc.collect(1)  # what a cycle keeps alive by chance is not kept; Triton's interpreter leaves some
    held = state.held()
    for entry in entries.values():
        entry.graph.holds = held
    return entries
