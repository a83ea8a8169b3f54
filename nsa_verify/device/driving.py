"""How an implementation is driven. An executor opens a session per case; the session serves its replays in order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, Protocol

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.findings import Code
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.marks import Phase, note
from nsa_verify.device.rig import Rig
from nsa_verify.device.stops import CaptureRefused, GraphKey, ImplementationRaised
from nsa_verify.device.temporaries import WatchedCalls


class Note(NamedTuple):
    """Something wrong that the content of the buffers does not show, at call number ``call`` of the session."""

    code: Code
    call: int
    sentence: str


class Session(Protocol):
    """One implementation over one rig, for the graph keys it was opened with.

    ``implementation`` is the one that is driven; ``fallbacks`` are those that it reported while it was captured.
    """

    implementation: Implementation
    fallbacks: tuple[str, ...]
    holds: object
    """What the implementation kept when the session was opened; alive for as long as its graphs."""

    def begin(self) -> None:
        """The replays of a case follow: disturb what a careless implementation could depend on."""

    def replay(self, mode: Mode, bucket: int) -> None:
        """Refresh the metadata of ``(mode, bucket)`` from the inputs that are in place.

        Raises ``ImplementationRaised`` for whatever the implementation raises, ``CaptureRefused`` if a graph cannot be
        replayed.
        """

    def end(self) -> list[Note]:
        """The replays are over; what was seen besides the content of the buffers."""

    def close(self) -> None:
        """Give back what the session holds. Must be called; may be called once."""


class Executor(Protocol):
    """A way to drive implementations: a name, the device it needs (None: any), and sessions."""

    @property
    def name(self) -> str:
        """What it is called on the command line and in findings."""

    @property
    def device(self) -> str | None:
        """``cpu`` or ``cuda``, or None for any."""

    def not_applicable(self, implementation: Implementation, setup: Setup, mode: Mode) -> str | None:
        """Why ``implementation`` is not driven this way in ``mode`` under ``setup``, or None if it is."""

    def open(self, rig: Rig, implementation: Implementation, keys: Sequence[GraphKey]) -> Session:
        """Start a session that can serve ``keys``; a graph executor captures them, in this order.

        The order is that of the replays backwards, so that a graph which needs another to be replayed first goes wrong.
        Leaves junk in the rig's memory. Raises ``ImplementationRaised`` and ``CaptureRefused``.
        """


WARM_UPS: Final = 2
"""Eager calls before a capture, as engines make them."""


def capturable(implementation: Implementation, setup: Setup, mode: Mode) -> str | None:
    """What keeps ``implementation`` from being captured in ``mode``, by its own declaration, or None."""
    reason = implementation.not_applicable(setup, mode)
    if reason is None and mode not in implementation.capturable:
        reason = "declared not capturable"
    return reason


def call(rig: Rig, implementation: Implementation, key: GraphKey, watched: WatchedCalls) -> None:
    """Call ``refresh`` once on the inputs and buffers of ``key``.

    Raises ``ImplementationRaised`` for what it raises, but lets ``CaptureRefused`` through.
    """
    inputs, steps = rig.inputs(*key), rig.steps(*key, implementation.writes(rig.setup))
    try:
        with watched, unseeded():
            implementation.refresh(inputs, steps, rig.setup)
    except CaptureRefused:
        raise
    except (Exception, SystemExit) as error:
        raise ImplementationRaised(error) from error


@contextmanager
def while_capturing(key: GraphKey) -> Iterator[None]:
    """Name ``key`` in what stops its capture."""
    note(Phase.CAPTURING)
    try:
        yield
    except ImplementationRaised as raised:
        raise ImplementationRaised(raised.error, key, raised.line) from raised
    except CaptureRefused as refused:
        raise CaptureRefused(refused.code, refused.sentence, key) from refused


@contextmanager
def unseeded() -> Iterator[None]:
    """Hypothesis gives every example the same ``random``; an implementation that depends on it must still show."""
    before = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(before)
