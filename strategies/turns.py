"""How the requests of a replay follow from those before: what of a batch is settled before the rest of it is drawn."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from nsa_verify.core.case import Request, Setup
from nsa_verify.strategies.swarm import Feature, Swarm

DISTINCT_REQUESTS = 8
"""A larger batch repeats its requests: tables drawn element by element do not shrink."""


class Turn(IntEnum):
    """Where the requests of a replay come from. If nothing came before, or a turn cannot be, they are drawn."""

    DRAWN = 0
    SHORTEST = 1
    """Drawn, but each as short as may be."""
    LONGEST = 2
    REPEATED = 3
    """Those of the replay before, as they were; the slots in ``req_to_token`` may be others."""
    CONTINUED = 4
    """Those of the replay before, each longer by what it accepted."""
    LEFT = 5
    """Some of them are gone, the first at least; the others go on in order."""
    JOINED = 6
    """All of them go on, and others come behind them."""
    REPLACED = 7
    """About half of them go on, and others come behind them, first of all on the pool rows that became free."""


class Stretch(IntEnum):
    """Which lengths are drawn, of those that are legal."""

    ANY = 0
    SHORTEST = 1
    LONGEST = 2


class Before(NamedTuple):
    """The latest batch that was not empty: its different requests, and its size."""

    requests: tuple[Request, ...]
    size: int


class Given(NamedTuple):
    """What of a batch is settled. Everything else is drawn, and with the defaults everything is.

    What is settled takes the same choices as what is drawn, each from a range of one value. So once the turn shrinks to
    ``Turn.DRAWN`` the batch stays what it is, and goes on shrinking on its own.
    """

    kept: tuple[Request, ...] = ()
    """Go on as the first ones; where they are more than there is room for, those left over are spread evenly."""
    rows: tuple[int, ...] = ()
    """Pool rows for the first of those that join."""
    fewest: int = 1
    most: int = DISTINCT_REQUESTS
    """Different requests."""
    sizes: Sequence[int] = ()
    """The batch sizes, ascending, to choose from; none for all that are allowed."""
    stretch: Stretch = Stretch.ANY
    growing: bool = True
    """Those that go on are longer by what they accepted; else they accepted as much as before, and are as long."""

    def staying(self, count: int) -> tuple[Request, ...]:
        """Those of ``kept`` that go on in a batch of ``count`` different requests."""
        return spread(self.kept, min(count, len(self.kept)))


def spread(requests: Sequence[Request], count: int) -> tuple[Request, ...]:
    """``count`` of ``requests``, evenly spread and in order; of fewer than all, the first is not among them."""
    total = len(requests)
    return tuple(it for index, it in enumerate(requests) if (index + 1) * count // total > index * count // total)


def turns(swarm: Swarm) -> tuple[Turn, ...]:
    """The turns that ``swarm`` allows, in order, the usual ones more often."""
    found = [Turn.DRAWN] * 9
    if Feature.LENGTH_SWINGS in swarm:
        found += [Turn.SHORTEST, Turn.LONGEST]
    if Feature.SEVERAL_REPLAYS not in swarm:
        return tuple(found)
    if Feature.REPETITION in swarm:
        found += [Turn.REPEATED] * 2
    if Feature.CONTINUATION in swarm:
        found += [Turn.CONTINUED] * 3
    if Feature.DEPARTURES in swarm:
        found += [Turn.LEFT] * 2
    if Feature.ARRIVALS in swarm:
        found += [Turn.JOINED] * 2
    if {Feature.DEPARTURES, Feature.ARRIVALS} <= swarm.features:
        found += [Turn.REPLACED] * 2
    return tuple(found)


def allowed_sizes(setup: Setup, swarm: Swarm, bucket: int | None) -> Sequence[int]:
    """The sizes, ascending, of a batch that is not empty: all that ``bucket`` serves, or without one any bucket."""
    if Feature.PADDING not in swarm:
        return setup.buckets if bucket is None else (bucket,)
    if bucket is None:
        return range(1, setup.buckets[-1] + 1)
    return range(max((size for size in setup.buckets if size < bucket), default=0) + 1, bucket + 1)


def given(turn: Turn, before: Before | None, allowed: Sequence[int]) -> Given:
    """What ``turn`` settles of a batch whose size is one of ``allowed``, after ``before``."""
    if turn is Turn.SHORTEST:
        return Given(stretch=Stretch.SHORTEST)
    if turn is Turn.LONGEST:
        return Given(stretch=Stretch.LONGEST)
    if turn is Turn.DRAWN or before is None:
        return Given()
    requests, distinct = before.requests, len(before.requests)
    more = min(distinct + 1, DISTINCT_REQUESTS)
    smaller = allowed[: bisect_left(allowed, before.size)]
    larger = allowed[bisect_right(allowed, before.size) :]
    if turn in (Turn.REPEATED, Turn.CONTINUED):
        growing = turn is Turn.CONTINUED
        return Given(requests, fewest=distinct, most=distinct, sizes=(before.size,), growing=growing)
    if turn is Turn.LEFT:
        return Given(requests, most=max(1, distinct - 1), sizes=smaller) if smaller else Given()
    if turn is Turn.JOINED:
        return Given(requests, fewest=more, sizes=larger) if larger else Given()
    kept = spread(requests, distinct // 2)
    used = {request.pool_row for request in kept}
    rows = tuple(dict.fromkeys(it.pool_row for it in requests if it.pool_row not in used))
    return Given(kept, rows, fewest=len(kept) + 1)
