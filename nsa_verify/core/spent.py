"""Where the time of a process goes: seconds under a few names, measured always, since that costs next to nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

DRAW: Final = "drawing"
ORACLE: Final = "oracle and images"
CAPTURE: Final = "warming up and capturing"
CALL: Final = "the implementations themselves"
JUDGE: Final = "loading, comparing, downloading"
TRANSPORT: Final = "transport"
WAIT: Final = "waiting for the worker"
SPENT: Final[Counter[str]] = Counter()
"""Seconds by name, since the process began or ``taken`` was called last."""


class _Now:
    """The blocks that are open, and since when the innermost is being counted."""

    blocks: Final[list[str]] = []
    since = time.perf_counter()


@contextmanager
def spending(name: str) -> Iterator[None]:
    """Count the time inside the block under ``name``, less what blocks within it count for themselves."""
    now = time.perf_counter()
    if _Now.blocks:
        SPENT[_Now.blocks[-1]] += now - _Now.since  # type: ignore[assignment]
    _Now.blocks.append(name)
    _Now.since = now
    try:
        yield
    finally:
        now = time.perf_counter()
        SPENT[name] += now - _Now.since  # type: ignore[assignment]
        _Now.blocks.pop()
        _Now.since = now


def taken() -> dict[str, float]:
    """What was spent since the last time this was asked."""
    told = {name: float(seconds) for name, seconds in SPENT.items()}
    SPENT.clear()
    return told
