"""The sequence of replays over one setup."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from hypothesis import strategies as st

from nsa_verify.core.case import MAX_REPLAYS, Mode, Replay, Request, Setup, SlotKind
from nsa_verify.strategies.choice import pick
from nsa_verify.strategies.lengths import length_range
from nsa_verify.strategies.limits import Limits
from nsa_verify.strategies.requests import draw_requests, empty_in_ten, has_room, may_be_empty
from nsa_verify.strategies.swarm import Feature, Swarm

POOL_SEEDS = 8


def replays(
    setup: Setup,
    modes: Sequence[Mode] = tuple(Mode),
    swarm: Swarm | None = None,
    limits: Limits | None = None,
) -> st.SearchStrategy[tuple[Replay, ...]]:
    """The replays of a case over ``setup``, in ``modes`` (the first is the simplest); at least one.

    ``setup`` may be any legal one, drawn or not. Raises ``ValueError`` for no modes.
    """
    if not modes:
        raise ValueError("modes = (): name at least one mode")
    return _replays(setup, tuple(modes), swarm or Swarm.everything(), limits or Limits.small())


@st.composite
def _replays(
    draw: st.DrawFn, setup: Setup, modes: tuple[Mode, ...], swarm: Swarm, limits: Limits
) -> tuple[Replay, ...]:
    return draw_replays(draw, setup, modes, swarm, limits)


@lru_cache(maxsize=16)
def _counts(most: int) -> tuple[int, ...]:
    """1..most, the fewer the likelier, and one more at times."""
    usual = [count for count in range(1, most + 1) for _ in range({1: 6, 2: 4}.get(count, 3))]
    return tuple(count for count in (*usual, most + 1) if count <= MAX_REPLAYS)


class _Turn(IntEnum):
    """Where the requests of a replay come from."""

    DRAWN = 0
    NONE = 1
    CONTINUED = 2
    """From the replay before, each longer by what it accepted."""


class _Draft(NamedTuple):
    replay: Replay
    turn: _Turn


def draw_replays(
    draw: st.DrawFn, setup: Setup, modes: tuple[Mode, ...], swarm: Swarm, limits: Limits
) -> tuple[Replay, ...]:
    """Draw the replays of a case."""
    mode = pick(draw, modes)
    choices: tuple[Mode, ...] = (mode,)
    if Feature.MODE_SWITCHES in swarm:
        choices = (mode,) * 4 + tuple(other for other in modes if other is not mode)
    bucket = None if Feature.BUCKET_SWITCHES in swarm else pick(draw, setup.buckets)
    counts = _counts(limits.replays) if Feature.SEVERAL_REPLAYS in swarm else (1,)
    if setup.buckets[-1] * setup.num_draft_tokens > limits.rows:
        counts = counts[: max(1, len(counts) * 2 // 3)]
    draft = _drafts(setup, choices, swarm, limits, bucket)
    chained: list[Replay] = []
    # A count, and right behind it what it counts: Hypothesis can take the first ones out as well as the last.
    for _ in range(pick(draw, counts)):
        replay, turn = draw(draft)
        continued = turn is _Turn.CONTINUED and chained and has_room(setup, replay.mode)
        chained.append(_continue(setup, chained[-1], replay, swarm) if continued else replay)
    return tuple(chained)


@st.composite
def _drafts(
    draw: st.DrawFn, setup: Setup, modes: tuple[Mode, ...], swarm: Swarm, limits: Limits, bucket: int | None
) -> _Draft:
    mode = pick(draw, modes) if len(modes) > 1 else modes[0]
    batch = draw_requests(draw, setup, mode, swarm, bucket)
    slots, pool_seed = pick(draw, _pools(Feature.SLOT_KINDS in swarm, Feature.POOL_SEEDS in swarm))
    # After the requests: an empty batch is then no shorter to draw than a batch of one, and does not count as simpler.
    turn = pick(draw, _turns(setup, swarm, limits, bucket))
    if turn is _Turn.NONE:
        batch = ()
    # Whether or not there are padded rows: a case with none is then no longer to draw than one with some.
    padded_accept_len = pick(draw, (1, setup.num_draft_tokens)) if mode is Mode.DRAFT_EXTEND else 1
    padded_pool_row = pick(draw, (0, 0, 1, setup.pool_rows - 1)) if Feature.POOL_ROWS in swarm else 0
    if len(batch) == setup.bucket_for(len(batch)):
        padded_accept_len, padded_pool_row = 1, 0
    padded_pool_row = min(padded_pool_row, setup.pool_rows - 1)
    return _Draft(Replay(mode, batch, slots, pool_seed, padded_accept_len, padded_pool_row), turn)


@lru_cache(maxsize=4)
def _pools(kinds: bool, seeds: bool) -> tuple[tuple[SlotKind, int], ...]:
    return tuple(
        (slots, seed)
        for slots in (tuple(SlotKind) if kinds else (SlotKind.SEQUENTIAL,))
        for seed in range(POOL_SEEDS if seeds else 1)
    )


def _turns(setup: Setup, swarm: Swarm, limits: Limits, bucket: int | None) -> tuple[_Turn, ...]:
    none = empty_in_ten(setup, limits) if may_be_empty(setup, swarm, bucket) else 0
    continued = 2 if {Feature.CONTINUATION, Feature.SEVERAL_REPLAYS} <= swarm.features else 0
    return (_Turn.DRAWN,) * max(1, 10 - none - continued) + (_Turn.NONE,) * none + (_Turn.CONTINUED,) * continued


def _continue(setup: Setup, before: Replay, drawn: Replay, swarm: Swarm) -> Replay:
    """``drawn`` with the requests of ``before``, each longer by what it accepted, up to the longest there may be."""
    batch = []
    for index, request in enumerate(before.requests):
        accept_len = request.accept_len
        if drawn.mode is Mode.DRAFT_EXTEND and drawn.requests:
            accept_len = drawn.requests[index % len(drawn.requests)].accept_len
        low, high = length_range(setup, drawn.mode, accept_len, swarm)
        seq_len = min(max(request.seq_len + accept_len, low), high)
        kept = accept_len if drawn.mode is Mode.DRAFT_EXTEND else 1
        batch.append(Request(seq_len, request.pool_row, kept))
    padding = drawn.padded_accept_len, drawn.padded_pool_row
    return Replay(drawn.mode, tuple(batch), drawn.slots, drawn.pool_seed, *padding)
