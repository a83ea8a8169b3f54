"""Do the switches switch? Features that are off do not appear, and rounds choose them by seed alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from random import Random
from typing import TypeVar

import msgspec
import pytest
from hypothesis import strategies as st

from nsa_verify.core.case import Case, CtxLens, Layout, Mode, Replay, Request, Setup, SlotKind
from nsa_verify.core.oracle import batch
from nsa_verify.engine.drawing import SeededProvider, _Unrecorded
from nsa_verify.strategies import Feature, Limits, Swarm, boundaries, cases, lengths, replays, requests, setups
from nsa_verify.strategies.swarm import SETUP_FEATURES

T = TypeVar("T")
Shows = Callable[[Case], bool]


def drawn_by_engine(strategy: st.SearchStrategy[T], examples: int) -> list[T]:
    """As the engine draws, each from a chance of its own: the same every time."""
    chances = (Random(f"example {number}") for number in range(examples))
    return [_Unrecorded(random=chance, provider=SeededProvider).draw(strategy) for chance in chances]


def setup_shows(predicate: Callable[[Setup], bool]) -> Shows:
    return lambda case: predicate(case.setup)


def beyond_the_wall(case: Case) -> bool:
    tokens = case.setup.num_draft_tokens
    return any(
        max(batch(case, index).seq_lens) + tokens * (replay.mode is Mode.TARGET_VERIFY) > case.setup.table_width
        for index, replay in enumerate(case.replays)
    )


def free_pool_rows(case: Case) -> bool:
    return any(
        replay.padded_pool_row > 0 or len({it.pool_row for it in replay.requests}) < len(replay.requests)
        for replay in case.replays
    )


APPEARS: dict[Feature, Shows] = {
    Feature.PADDING: lambda case: any(len(it.requests) < case.bucket(index) for index, it in enumerate(case.replays)),
    Feature.EMPTY_BATCHES: lambda case: any(not it.requests for it in case.replays),
    Feature.ZERO_ACCEPTS: lambda case: any(it.accept_len == 0 for replay in case.replays for it in replay.requests),
    Feature.CONTEXT_WALL: beyond_the_wall,
    Feature.LONG_CONTEXT: setup_shows(lambda it: it.pool_width > Limits.small().top_k_width),
    Feature.SEVERAL_REPLAYS: lambda case: len(case.replays) > 1,
    Feature.LONG_SEQUENCES: lambda case: len(case.replays) > Limits.small().replays + 1,
    Feature.MODE_SWITCHES: lambda case: len({it.mode for it in case.replays}) > 1,
    Feature.BUCKET_SWITCHES: lambda case: len(case.setup.buckets) > 1,
    Feature.SEVERAL_STEPS: setup_shows(lambda it: it.num_steps > 1),
    Feature.SEQ_LENS_LAYOUT: setup_shows(lambda it: it.layout is not Layout.CONTIGUOUS),
    Feature.INTEGER_WIDTHS: setup_shows(lambda it: (it.seq_lens_dtype, it.pool_index_dtype) != ("int32", "int64")),
    Feature.ROW_STRIDES: setup_shows(
        lambda it: it.table_row_stride > it.table_width or it.pool_row_stride > it.pool_width or it.stride_skew > 0
    ),
    Feature.INPUT_TAIL: setup_shows(lambda it: it.input_tail > 0),
    Feature.ALIASED_SEQ_LENS: setup_shows(lambda it: it.aliased_seq_lens),
    Feature.NO_HOST_LENGTHS: setup_shows(lambda it: not it.host_lengths),
    Feature.OPTIONAL_OUTPUTS: setup_shows(lambda it: it.schedule or it.ctx_lens is not CtxLens.ABSENT),
    Feature.SLOT_KINDS: lambda case: any(it.slots is not SlotKind.SEQUENTIAL for it in case.replays),
    Feature.POOL_SEEDS: lambda case: any(it.pool_seed for it in case.replays),
    Feature.POOL_ROWS: free_pool_rows,
    Feature.FILL_ZERO: setup_shows(lambda it: it.fill_seq_len == 0),
    Feature.MANY_ROWS: setup_shows(lambda it: it.buckets[-1] * it.num_draft_tokens > 24),
    Feature.LARGE_TOP_K: setup_shows(lambda it: it.index_topk == 2048),
}
"""How a feature shows in a case. The others only make likelier what chance brings as well."""
LIKELIER = {
    *(Feature.BOUNDARY_LENGTHS, Feature.UNIFORM_ACCEPTS, Feature.LENGTH_SWINGS),
    *(Feature.REPETITION, Feature.CONTINUATION, Feature.DEPARTURES, Feature.ARRIVALS, Feature.MODE_CYCLES),
}
NEEDS = {
    Feature.EMPTY_BATCHES: Feature.PADDING,
    Feature.LONG_CONTEXT: Feature.CONTEXT_WALL,
    Feature.LONG_SEQUENCES: Feature.SEVERAL_REPLAYS,
    Feature.MODE_SWITCHES: Feature.SEVERAL_REPLAYS,
}
SWARMS = {
    "nothing": Swarm(frozenset()),
    "first half": Swarm(frozenset(list(Feature)[:12])),
    "second half": Swarm(frozenset(list(Feature)[12:])),
    "odd": Swarm(frozenset(list(Feature)[1::2])),
    "even": Swarm(frozenset(list(Feature)[::2])),
}


@cache
def drawn(name: str) -> list[Case]:
    return drawn_by_engine(cases(swarm=SWARMS[name]), 300)


def test_every_feature_is_looked_at() -> None:
    assert APPEARS.keys() | LIKELIER == set(Feature)
    for feature in Feature:
        assert sum(feature not in swarm for swarm in SWARMS.values()) >= 3


@pytest.mark.parametrize("name", SWARMS)
def test_a_feature_that_is_off_never_appears(name: str) -> None:
    off = [feature for feature in APPEARS if feature not in SWARMS[name]]
    assert [feature for feature in off if any(map(APPEARS[feature], drawn(name)))] == []


@pytest.mark.parametrize("name", SWARMS)
def test_a_feature_that_is_on_appears(name: str) -> None:
    swarm = SWARMS[name]
    on = [feature for feature in APPEARS if feature in swarm]
    missing = [feature for feature in on if not any(map(APPEARS[feature], drawn(name)))]
    assert missing == [feature for feature in on if feature in NEEDS and NEEDS[feature] not in swarm]


WIDE = Setup(num_draft_tokens=4, index_topk=64, page_size=64, table_width=300, pool_width=308, buckets=(1, 2, 4))


ROOMY = msgspec.structs.replace(WIDE, pool_rows=6)


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def test_boundary_lengths_are_at_least_half_of_all() -> None:
    edges = set(boundaries(WIDE, Mode.TARGET_VERIFY))
    off = Swarm.everything().without(Feature.BOUNDARY_LENGTHS)
    at_edge = [length in edges for length in drawn_by_engine(lengths(WIDE, Mode.TARGET_VERIFY), 300)]
    by_chance = [length in edges for length in drawn_by_engine(lengths(WIDE, Mode.TARGET_VERIFY, swarm=off), 300)]
    assert share(at_edge) >= 0.5
    assert share(by_chance) < share(at_edge) - 0.2


def test_uniform_accepts_are_likelier_when_on() -> None:
    def uniform(swarm: Swarm) -> float:
        batches = [
            it for it in drawn_by_engine(requests(WIDE, Mode.DRAFT_EXTEND, swarm, bucket=4), 300) if len(it) == 4
        ]
        return share([len({request.accept_len for request in batch}) == 1 for batch in batches])

    everything = Swarm.everything()
    assert uniform(everything) > 0.2 > uniform(everything.without(Feature.UNIFORM_ACCEPTS))


def grown(requests: Sequence[Request]) -> list[tuple[int, int]]:
    """Pool row and length, in decode, of requests one replay later."""
    return [(request.pool_row, request.seq_len + 1) for request in requests]


def rows_and_lengths(requests: Sequence[Request]) -> list[tuple[int, int]]:
    return [(request.pool_row, request.seq_len) for request in requests]


def all_go_on(before: Replay, now: Replay) -> bool:
    return len(before.requests) > 1 and grown(before.requests) == rows_and_lengths(now.requests)


def same_with_other_slots(before: Replay, now: Replay) -> bool:
    return len(before.requests) > 1 and before.requests == now.requests and before.pool_seed != now.pool_seed


def some_left(before: Replay, now: Replay) -> bool:
    going = iter(grown(before.requests))
    return 0 < len(now.requests) < len(before.requests) and all(it in going for it in rows_and_lengths(now.requests))


def some_joined(before: Replay, now: Replay) -> bool:
    going = grown(before.requests)
    return len(now.requests) > len(going) > 0 and going == rows_and_lengths(now.requests)[: len(going)]


def row_reused(before: Replay, now: Replay) -> bool:
    """Half of them go on in front, and a row that became free has a request that is not the one it had."""
    going = grown(before.requests)
    found = rows_and_lengths(now.requests)
    kept, others = found[: len(going) // 2], found[len(going) // 2 :]
    free = {row for row, _ in going} - {row for row, length in found if (row, length) in going}
    in_order = iter(going)
    return len(kept) > 0 and all(it in in_order for it in kept) and any(row in free for row, _ in others)


def next_in_an_engine(before: Replay, now: Replay) -> bool:
    extend = (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2)
    order = {Mode.DECODE: (Mode.TARGET_VERIFY,), Mode.TARGET_VERIFY: extend}
    return now.mode in order.get(before.mode, (Mode.DECODE,))


def all_as_extreme(before: Replay, _: Replay) -> bool:
    lengths_ = {request.seq_len for request in before.requests}
    return len(before.requests) > 1 and lengths_ in ({1}, {WIDE.pool_width})


PAIRS: dict[str, tuple[Feature, Sequence[Mode], Callable[[Replay, Replay], bool], float]] = {
    "the same with other slots": (Feature.REPETITION, (Mode.DRAFT_EXTEND,), same_with_other_slots, 0.02),
    "the same, not without pool seeds": (Feature.POOL_SEEDS, (Mode.DRAFT_EXTEND,), same_with_other_slots, 0.02),
    "all go on": (Feature.CONTINUATION, (Mode.DECODE,), all_go_on, 0.03),
    "some left": (Feature.DEPARTURES, (Mode.DECODE,), some_left, 0.03),
    "some joined": (Feature.ARRIVALS, (Mode.DECODE,), some_joined, 0.015),
    "rows reused, with departures": (Feature.DEPARTURES, (Mode.DECODE,), row_reused, 0.015),
    "rows reused, with arrivals": (Feature.ARRIVALS, (Mode.DECODE,), row_reused, 0.015),
    "engine order": (Feature.MODE_CYCLES, tuple(Mode), next_in_an_engine, 0.35),
    "extremes": (Feature.LENGTH_SWINGS, (Mode.DECODE,), all_as_extreme, 0.06),
}
"""A feature, and what share of two successive replays at least it makes like this; without it they are far fewer."""


@pytest.mark.parametrize("name", PAIRS)
def test_what_follows_is_likelier_when_on(name: str) -> None:
    feature, modes, predicate, least = PAIRS[name]

    def found(swarm: Swarm) -> float:
        chains = drawn_by_engine(replays(ROOMY, modes, swarm), 500)
        return share([predicate(*both) for chain in chains for both in pairwise(chain) if both[0].requests])

    everything = Swarm.everything()
    with_it, without = found(everything), found(everything.without(feature))
    assert with_it > least
    assert without < 0.65 * with_it


def test_without_bucket_switches_a_given_setup_is_used_in_one_bucket() -> None:
    swarm = Swarm.everything().without(Feature.BUCKET_SWITCHES)
    for chain in drawn_by_engine(replays(WIDE, swarm=swarm), 100):
        assert len({WIDE.bucket_for(len(it.requests)) for it in chain}) == 1


def test_without_padding_a_given_setup_has_full_buckets_only() -> None:
    swarm = Swarm.everything().without(Feature.PADDING)
    sizes = {len(it.requests) for chain in drawn_by_engine(replays(WIDE, swarm=swarm), 100) for it in chain}
    assert sizes == {1, 2, 4}


def test_round_0_has_everything_and_others_about_three_quarters() -> None:
    assert Swarm.for_round(7, 0) == Swarm.everything()
    sizes = [len(Swarm.for_round(seed, number).features) for seed in range(20) for number in range(1, 21)]
    assert 0.7 < sum(sizes) / len(sizes) / len(Feature) < 0.8
    assert len({Swarm.for_round(0, number) for number in range(50)}) > 45


def test_the_features_of_a_setup_are_those_it_is_drawn_by() -> None:
    for limits in (Limits.small(), Limits.large()):
        usual = drawn_by_engine(setups(limits=limits), 300)
        found = {
            feature
            for feature in Feature
            if drawn_by_engine(setups(Swarm.everything().without(feature), limits), 300) != usual
        }
        assert found == SETUP_FEATURES


def test_a_season_decides_on_what_its_setup_may_have_and_each_round_on_the_rest() -> None:
    season, rounds = Swarm.for_round(3, 1000), [Swarm.for_round(3, number, 1000) for number in range(1001, 1016)]
    assert all(it.features & SETUP_FEATURES == season.features & SETUP_FEATURES for it in rounds)
    for number, swarm in enumerate(rounds, start=1001):
        assert swarm.features - SETUP_FEATURES == Swarm.for_round(3, number).features - SETUP_FEATURES
    assert len({it.features for it in rounds}) == len(rounds)
    assert Swarm.for_round(3, 50, 50) == Swarm.for_round(3, 50) == Swarm.for_round(3, 50, None)


def test_rounds_are_the_same_in_every_process() -> None:
    code = "from nsa_verify.strategies import Swarm; print(*(Swarm.for_round(5, it) for it in range(1, 6)), sep='\\n')"
    printed = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "99"}, capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines() == [str(Swarm.for_round(5, number)) for number in range(1, 6)]


def test_a_swarm_says_in_words_what_is_off() -> None:
    everything = Swarm.everything()
    assert str(everything) == "everything"
    assert str(everything.without(Feature.PADDING, Feature.MANY_ROWS)) == "everything but padding, many rows"
    assert str(Swarm(frozenset())) == "nothing"
    assert str(Swarm(frozenset({Feature.PADDING}))) == "only padding"
