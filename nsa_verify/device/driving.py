"""How an implementation is driven. An executor opens a session per case; the session serves its replays in order."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeGuard

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.findings import Code
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.marks import Phase, note
from nsa_verify.core.spent import CALL, spending
from nsa_verify.device.rig import Rig
from nsa_verify.device.stops import CaptureRefused, GraphKey, ImplementationRaised
from nsa_verify.device.temporaries import WatchedCalls

if TYPE_CHECKING:
    from torch import Tensor


class Note(NamedTuple):
    """Something wrong that the content of the buffers does not show, at call number ``call`` of the session."""

    code: Code
    call: int
    sentence: str


class KeptGraph(Protocol):
    """The captured graph of one key; the rig that it was captured over keeps it for later cases, and closes it."""

    fallbacks: tuple[str, ...]
    """What the implementation reported while it was captured."""
    holds: object
    """What the implementation kept by then; alive for as long as the graph."""

    @property
    def uses_others(self) -> bool:
        """Whether it uses memory that is neither the rig's nor its own."""

    def close(self) -> None:
        """Give back what it holds. Must be called; may be called once."""


class Session(Protocol):
    """One implementation over one rig, for one case. ``implementation`` is the one that is driven; ``fallbacks`` are
    those that it reported while it was captured."""

    implementation: Implementation
    fallbacks: tuple[str, ...]

    def begin(self, disturb: bool = True) -> None:
        """The replays of a case follow. With ``disturb`` everything is disturbed that a careless implementation could
        depend on, and not only what costs little."""

    def replay(self, mode: Mode, bucket: int) -> None:
        """Refresh the metadata of ``(mode, bucket)`` from the inputs that are in place.

        Raises ``ImplementationRaised`` for whatever the implementation raises, ``CaptureRefused`` if a graph cannot be
        replayed.
        """

    def trespassed(self) -> Tensor | None:
        """The replays are over: a 0-d bool tensor on the device that is true if ``end`` has to say what only the device
        knows; None where there is no such thing."""

    def end(self) -> list[Note]:
        """The replays are over; what was seen besides the content of the buffers. May wait for the device where
        ``trespassed`` is not None."""


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

    def open(self, rig: Rig, implementation: Implementation, graphs: Mapping[GraphKey, KeptGraph]) -> Session:
        """Start a session over ``graphs``, which this executor has captured over ``rig``; nothing is run."""


class Capturing(Executor, Protocol):
    """An executor that replays captured graphs."""

    def capture(self, rig: Rig, implementation: Implementation, key: GraphKey) -> KeptGraph:
        """Warm up, and capture the graph of ``key``.

        Leaves junk in the rig's memory. Raises ``ImplementationRaised`` and ``CaptureRefused``.
        """


def captures(executor: Executor) -> TypeGuard[Capturing]:
    """Whether ``executor`` replays captured graphs."""
    return hasattr(executor, "capture")


WARM_UPS: Final = 2
"""Eager calls before a capture, as engines make them."""


def capturable(implementation: Implementation, setup: Setup, mode: Mode) -> str | None:
    """What keeps ``implementation`` from being captured in ``mode``, by its own declaration, or None."""
    reason = implementation.not_applicable(setup, mode)
    if reason is None and mode not in implementation.capturable:
        reason = "declared not capturable"
    return reason


def call(rig: Rig, implementation: Implementation, key: GraphKey, watched: WatchedCalls | None) -> None:
    """Call ``refresh`` once on the inputs and buffers of ``key``; where nobody watches it, within ``unseeded``.

    Raises ``ImplementationRaised`` for what it raises, but lets ``CaptureRefused`` through.
    """
    inputs, steps = rig.inputs(*key), rig.steps(*key, implementation.writes(rig.setup))
    try:
        with spending(CALL):
            if watched is None:
                implementation.refresh(inputs, steps, rig.setup)
            else:
                with watched, unseeded():
                    implementation.refresh(inputs, steps, rig.setup)
    except CaptureRefused:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            raise  # Ctrl-C, where implementations run in the process that hears it
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
