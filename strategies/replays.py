"""The sequence of replays over one setup."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple

from hypothesis import strategies as st
from hypothesis.internal.conjecture.data import ConjectureData

from nsa_verify.core.case import MAX_REPLAYS, Mode, Replay, Setup, SlotKind
from nsa_verify.strategies.choice import between, composed, pick
from nsa_verify.strategies.limits import Limits
from nsa_verify.strategies.requests import draw_empty, draw_requests
from nsa_verify.strategies.swarm import Feature, Swarm
from nsa_verify.strategies.turns import Before, Turn, allowed_sizes, given, turns

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


@composed
def _replays(
    data: ConjectureData, setup: Setup, modes: tuple[Mode, ...], swarm: Swarm, limits: Limits
) -> tuple[Replay, ...]:
    return draw_replays(data, setup, modes, swarm, limits)


@lru_cache(maxsize=16)
def _counts(usual: int, most: int) -> tuple[int, ...]:
    """1..usual, the fewer the likelier; one more at times; rarely even more, up to ``most``."""
    weights = {1: 24, 2: 16, **dict.fromkeys(range(3, usual + 1), 12), usual + 1: 4}
    return tuple(count for count in range(1, most + 1) for _ in range(weights.get(count, 1)))


CYCLE: Final = {
    Mode.DECODE: (Mode.TARGET_VERIFY,),
    Mode.TARGET_VERIFY: (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2),
    Mode.DRAFT_EXTEND: (Mode.DECODE,),
    Mode.DRAFT_EXTEND_V2: (Mode.DECODE,),
}
"""What engines go on to: they verify what was drafted, extend the draft's context by what was accepted, and draft."""


class _Theme(IntEnum):
    """What the replays of a case have in common, if anything.

    A theme narrows the ranges that choices are drawn from, and does no more: the case is the same without it, and goes
    on shrinking.
    """

    NONE = 0
    SWINGS = 1
    """Short and long batches in the usual mode."""
    ENGINE = 2
    """The modes in an engine's order, of requests that go on, leave and join."""


_TURNS_OF: Final = {
    _Theme.SWINGS: frozenset({Turn.SHORTEST, Turn.LONGEST}),
    _Theme.ENGINE: frozenset({Turn.CONTINUED, Turn.LEFT, Turn.JOINED, Turn.REPLACED}),
}
_USUAL, _ANY, _NEXT = 6, 3, 4
"""How often of so many a replay has the usual mode, any mode, or one that follows the mode before."""


class _Draft(NamedTuple):
    replay: Replay
    batch: Before
    """What the requests were drawn as, also where they were then left out."""


class _Case(NamedTuple):
    """What is settled for all replays of a case."""

    setup: Setup
    modes: tuple[Mode, ...]
    """All that a replay may have, the simplest first."""
    usual_mode: Mode
    swarm: Swarm
    limits: Limits
    bucket: int | None
    """The only one, or None for any."""
    turns: tuple[Turn, ...]
    theme: _Theme


def draw_replays(
    data: ConjectureData, setup: Setup, modes: tuple[Mode, ...], swarm: Swarm, limits: Limits
) -> tuple[Replay, ...]:
    """Draw the replays of a case."""
    usual_mode = pick(data, modes)
    if Feature.MODE_SWITCHES not in swarm:
        modes = (usual_mode,)
    bucket = None if Feature.BUCKET_SWITCHES in swarm else pick(data, setup.buckets)
    themes = _themes(modes, swarm)
    theme = pick(data, themes) if len(themes) > 1 else themes[0]
    case = _Case(setup, modes, usual_mode, swarm, limits, bucket, turns(swarm), theme)
    earlier: list[_Draft] = []
    draft = _drafts(case, earlier)
    # A count, and right behind it what it counts: Hypothesis can take the first ones out as well as the last.
    for _ in range(pick(data, _counts_for(setup, swarm, limits))):
        earlier.append(data.draw(draft))  # noqa: PERF401 - the next one looks at it
    return tuple(it.replay for it in earlier)


def _themes(modes: tuple[Mode, ...], swarm: Swarm) -> tuple[_Theme, ...]:
    if Feature.SEVERAL_REPLAYS not in swarm:
        return (_Theme.NONE,)
    themes = [_Theme.NONE] * 6
    if Feature.LENGTH_SWINGS in swarm:
        themes += [_Theme.SWINGS] * 2
    if Feature.MODE_CYCLES in swarm and len(modes) > 1:
        themes += [_Theme.ENGINE]
    return tuple(themes)


def _counts_for(setup: Setup, swarm: Swarm, limits: Limits) -> tuple[int, ...]:
    if Feature.SEVERAL_REPLAYS not in swarm:
        return (1,)
    most = limits.most_replays if Feature.LONG_SEQUENCES in swarm else limits.replays + 1
    counts = _counts(limits.replays, min(most, MAX_REPLAYS))
    if setup.buckets[-1] * setup.num_draft_tokens > limits.rows:
        return counts[: max(1, len(counts) * 5 // 8)]
    return counts


# What came before decides from which range something is drawn, never whether. So a replay stays what it is when those
# before it are taken out, once the choices that look back have shrunk to those that do not.
@composed
def _drafts(data: ConjectureData, case: _Case, earlier: Sequence[_Draft]) -> _Draft:
    """One replay behind ``earlier``, which grows between the draws: a strategy made anew costs more than the draw."""
    setup, swarm = case.setup, case.swarm
    mode = _mode(data, case, earlier[-1].replay.mode if earlier else None)
    # Before the requests: of two ways to the same batch, the one that does not look back then counts as simpler.
    turn = _turn(data, case)
    before = next((it.batch for it in reversed(earlier) if it.replay.requests), None)
    settled = given(turn, before, allowed_sizes(setup, swarm, case.bucket))
    requests, batch = draw_requests(data, setup, mode, swarm, case.bucket, settled)
    slots, pool_seed = pick(data, _pools(Feature.SLOT_KINDS in swarm, Feature.POOL_SEEDS in swarm))
    # After the requests: an empty batch is then no shorter to draw than a batch of one, and does not count as simpler.
    if draw_empty(data, setup, swarm, case.limits, case.bucket):
        requests = ()
    # Whether or not there are padded rows: a case with none is then no longer to draw than one with some.
    padded_accept_len = pick(data, (1, setup.num_draft_tokens if mode is Mode.DRAFT_EXTEND else 1))
    padded_pool_row = pick(data, (0, 0, 1, setup.pool_rows - 1)) if Feature.POOL_ROWS in swarm else 0
    if len(requests) == setup.bucket_for(len(requests)):
        padded_accept_len, padded_pool_row = 1, 0
    padded_pool_row = min(padded_pool_row, setup.pool_rows - 1)
    return _Draft(Replay(mode, requests, slots, pool_seed, padded_accept_len, padded_pool_row), batch)


def _mode(data: ConjectureData, case: _Case, before: Mode | None) -> Mode:
    """The case's usual mode, any mode, or one that follows the mode before.

    As in ``near``, the second choice is the mode itself, the same whatever the first. It counts from the usual mode:
    where only the change matters, all modes of a case shrink together.
    """
    modes, usual = case.modes, case.usual_mode
    if len(modes) == 1:
        return usual
    following = tuple(mode for mode in CYCLE.get(before, ()) if mode in modes) if before else ()
    low, high = 0, _USUAL + _ANY + _NEXT - 1
    if case.theme is _Theme.ENGINE:
        low = _USUAL + _ANY
    elif case.theme is _Theme.SWINGS:
        high = _USUAL - 1
    elif Feature.MODE_CYCLES not in case.swarm:
        high = _USUAL + _ANY - 1
    index = between(data, low, high)
    nearest, furthest = 0, len(modes) - 1
    if index not in range(_USUAL, _USUAL + _ANY):
        wanted = following[index % len(following)] if index >= _USUAL and following else usual
        nearest = furthest = (modes.index(wanted) - modes.index(usual)) % len(modes)
    return modes[(modes.index(usual) + between(data, nearest, furthest)) % len(modes)]


def _turn(data: ConjectureData, case: _Case) -> Turn:
    if len(case.turns) == 1:
        return case.turns[0]
    wanted = _TURNS_OF.get(case.theme, frozenset(Turn))
    found = [index for index, turn in enumerate(case.turns) if turn in wanted] or [0, len(case.turns) - 1]
    return case.turns[between(data, found[0], found[-1])]


@lru_cache(maxsize=4)
def _pools(kinds: bool, seeds: bool) -> tuple[tuple[SlotKind, int], ...]:
    return tuple(
        (slots, seed)
        for slots in (tuple(SlotKind) if kinds else (SlotKind.SEQUENTIAL,))
        for seed in range(POOL_SEEDS if seeds else 1)
    )
