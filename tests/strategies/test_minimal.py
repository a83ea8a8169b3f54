"""What does it shrink to? To the literal case that a person would have written."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from random import Random

import msgspec
import pytest
from helpers import minimal
from hypothesis.internal.conjecture.data import ConjectureData

from nsa_verify.core.case import Case, CtxLens, Mode, Replay, Request, Setup
from nsa_verify.strategies import Feature, Swarm, cases, lengths, replays, requests, setups
from nsa_verify.strategies.turns import Turn

WIDE = Setup(num_draft_tokens=4, index_topk=64, page_size=64, table_width=300, pool_width=308, buckets=(4,))
SMALLEST = 2
"""One draft token and one token of context: the narrowest pool row with room for a request in every mode."""


def setup(width: int = SMALLEST, **fields: object) -> Setup:
    """A setup as simple as they come, but for ``fields``."""
    return Setup(**{"table_width": width, "pool_width": width, **fields})  # type: ignore[arg-type]


def replay(*seq_lens: int, mode: Mode = Mode.DECODE) -> Replay:
    return Replay(mode, tuple(Request(seq_len) for seq_len in seq_lens))


def any_request(predicate: Callable[[Setup, Request], bool]) -> Callable[[Case], bool]:
    return lambda case: any(predicate(case.setup, it) for replay in case.replays for it in replay.requests)


def shrinks_in_one_bucket(case: Case) -> bool:
    return any(
        first.mode is second.mode
        and len(first.requests) > len(second.requests) > 0
        and case.bucket(index) == case.bucket(index + 1)
        for index, (first, second) in enumerate(pairwise(case.replays))
    )


def on_rows(*requests: tuple[int, int]) -> Replay:
    """A replay of requests of these lengths on these pool rows."""
    return Replay(Mode.DECODE, tuple(Request(seq_len, row) for seq_len, row in requests))


def one_grown(before: tuple[Request, ...], now: tuple[Request, ...]) -> bool:
    return len(before) == len(now) == 1 and before[0].seq_len + 1 == now[0].seq_len


def lined_up(count: int, predicate: Callable[..., bool]) -> Callable[[Case], bool]:
    """Some ``count`` replays, one right behind the other, have batches like this."""
    return lambda case: any(
        predicate(*(it.requests for it in case.replays[start : start + count]))
        for start in range(len(case.replays) - count + 1)
    )


def the_first_left(before: tuple[Request, ...], now: tuple[Request, ...]) -> bool:
    going = [(it.pool_row, it.seq_len + 1) for it in before[1:]]
    return len(going) > 0 and going == [(it.pool_row, it.seq_len) for it in now] and before[0].pool_row != going[0][0]


def one_joined(before: tuple[Request, ...], now: tuple[Request, ...]) -> bool:
    going = [(it.pool_row, it.seq_len + 1) for it in before]
    return len(going) > 0 and going == [(it.pool_row, it.seq_len) for it in now[:-1]]


def row_reused(before: tuple[Request, ...], now: tuple[Request, ...]) -> bool:
    """The second stays, behind it comes another on the row of the first."""
    rows = [it.pool_row for it in before]
    return len(rows) == len(set(rows)) == 2 and [it.pool_row for it in now] == rows[::-1]


EXPECTED = {
    "anything": (lambda _: True, Case(setup(), (replay(1),))),
    "a length of 100": (any_request(lambda _, it: it.seq_len >= 100), Case(setup(100), (replay(100),))),
    "a length that is a multiple of 64": (
        any_request(lambda _, it: it.seq_len % 64 == 0),
        Case(setup(64), (replay(64),)),
    ),
    "past the second page": (
        any_request(lambda setup, it: setup.page_size == 32 and it.seq_len > 32),
        Case(setup(33, page_size=32), (replay(33),)),
    ),
    "more tokens than the top-k": (
        any_request(lambda setup, it: it.seq_len > setup.index_topk),
        Case(setup(9), (replay(9),)),
    ),
    "past the context wall": (
        any_request(lambda setup, it: it.seq_len > setup.table_width),
        Case(setup(1, pool_width=2), (replay(2),)),
    ),
    "two modes": (
        lambda case: len({replay.mode for replay in case.replays}) > 1,
        Case(setup(), (replay(1), replay(1, mode=Mode.TARGET_VERIFY))),
    ),
    "a smaller batch in the same bucket": (shrinks_in_one_bucket, Case(setup(buckets=(2,)), (replay(1, 1), replay(1)))),
    "eight replays": (lambda case: len(case.replays) == 8, Case(setup(), (replay(1),) * 8)),
    "idle between": (
        lined_up(3, lambda a, b, c: len(a) > len(b) == 0 < len(c)),
        Case(setup(), (replay(1), replay(), replay(1))),
    ),
    "big, small, big": (
        lined_up(3, lambda a, b, c: len(a) > len(b) > 0 and len(b) < len(c)),
        Case(setup(buckets=(2,)), (replay(1, 1), replay(1), replay(1, 1))),
    ),
    "a bucket and back": (
        lambda case: any(
            case.bucket(index) == case.bucket(index + 2) != case.bucket(index + 1)
            for index in range(len(case.replays) - 2)
        ),
        Case(setup(buckets=(1, 2)), (replay(1), replay(1, 1), replay(1))),
    ),
    "verify, draft-extend, decode": (
        lambda case: (
            (Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND, Mode.DECODE)
            in [tuple(it.mode for it in case.replays[start : start + 3]) for start in range(len(case.replays))]
        ),
        Case(setup(), tuple(replay(1, mode=it) for it in (Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND, Mode.DECODE))),
    ),
    "short, then long": (
        lined_up(
            2, lambda a, b: bool(a) and bool(b) and max(it.seq_len for it in b) >= 9 + max(it.seq_len for it in a)
        ),
        Case(setup(10), (replay(1), replay(10))),
    ),
    "long, then short": (
        lined_up(
            2, lambda a, b: bool(a) and bool(b) and max(it.seq_len for it in a) >= 9 + max(it.seq_len for it in b)
        ),
        Case(setup(10), (replay(10), replay(1))),
    ),
    "a pool row reused": (
        lined_up(2, row_reused),
        Case(setup(buckets=(2,), pool_rows=2), (on_rows((1, 0), (1, 1)), on_rows((1, 1), (1, 0)))),
    ),
    "a length past 15 bits": (
        any_request(lambda _, it: it.seq_len >= 1 << 15),
        Case(setup(1 << 15, table_width=65), (replay(1 << 15),)),
    ),
    "32 requests": (
        lambda case: any(len(replay.requests) >= 32 for replay in case.replays),
        Case(setup(buckets=(32,)), (replay(*[1] * 32),)),
    ),
    "a request behind a longer one": (
        lambda case: any(
            first.seq_len > second.seq_len + 9 for replay in case.replays for first, second in pairwise(replay.requests)
        ),
        Case(setup(11, buckets=(2,)), (replay(11, 1),)),
    ),
    "no request in verify": (
        lambda case: any(it.mode is Mode.TARGET_VERIFY and not it.requests for it in case.replays),
        Case(setup(), (replay(mode=Mode.TARGET_VERIFY),)),
    ),
    "a second step": (lambda case: case.setup.num_steps >= 2, Case(setup(num_steps=2), (replay(1),))),
    "three draft tokens": (
        lambda case: case.setup.num_draft_tokens >= 3,
        Case(setup(4, num_draft_tokens=3), (replay(1),)),
    ),
    "a zero accept": (
        lambda case: any(it.accept_len == 0 for replay in case.replays for it in replay.requests),
        Case(setup(), (Replay(Mode.DRAFT_EXTEND, (Request(1, 0, 0),)),)),
    ),
    "aliased": (lambda case: case.setup.aliased_seq_lens, Case(setup(aliased_seq_lens=True), (replay(1),))),
    "rows of the table with a gap between": (
        lambda case: case.setup.table_row_stride > case.setup.table_width,
        Case(setup(table_row_stride=SMALLEST + 1), (replay(1),)),
    ),
    "ctx_lens of its own": (
        lambda case: case.setup.ctx_lens is CtxLens.OWN,
        Case(setup(ctx_lens=CtxLens.OWN), (replay(1),)),
    ),
}


SEEDED = {"a bucket and back": 2, "a smaller batch in the same bucket": 6, "the_first_left": 1, "one_joined": 2}
"""Not 0 where what another seed draws shrinks in half the time."""


SLOW = {
    "big, small, big",
    "a bucket and back",
    "a pool row reused",
    "eight replays",
    "a smaller batch in the same bucket",
    "the_first_left",
    "one_joined",
    "verify, draft-extend, decode",
    "idle between",
}
"""They take longest, three replays and batches that go on; shorter sequences are left."""


def _marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if name in SLOW else []


@pytest.mark.parametrize("name", [pytest.param(it, marks=_marks(it)) for it in EXPECTED])
def test_cases_shrink_to_what_a_person_would_have_written(name: str) -> None:
    predicate, expected = EXPECTED[name]
    assert minimal(cases(), predicate, seeded=SEEDED.get(name, 0)) == expected


@pytest.mark.parametrize(
    "turn",
    [pytest.param(it, id=it.__name__, marks=_marks(it.__name__)) for it in (one_grown, the_first_left, one_joined)],
)
def test_what_depends_on_the_replay_before_shrinks_to_two_small_ones(turn: Callable[..., bool]) -> None:
    found = minimal(cases(), lined_up(2, turn), seeded=SEEDED.get(turn.__name__, 0))
    assert len(found.replays) == 2
    assert all(len(it.requests) <= 3 for it in found.replays)


@pytest.mark.parametrize("turn", Turn, ids=lambda turn: turn.name.lower())
def test_a_batch_stays_what_it_is_once_it_no_longer_looks_back(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("nsa_verify.strategies.replays")
    setup_ = msgspec.structs.replace(WIDE, pool_rows=6, buckets=(1, 2, 4, 20))
    for swarm in (Swarm.everything(), Swarm.everything().without(Feature.PADDING)):
        strategy = replays(setup_, swarm=swarm)
        for seeded in range(40):
            monkeypatch.setattr(module, "_turn", lambda *_: turn)
            data = ConjectureData(random=Random(seeded))
            looking_back = data.draw(strategy)
            monkeypatch.setattr(module, "_turn", lambda *_: Turn.DRAWN)
            assert ConjectureData.for_choices(data.choices).draw(strategy) == looking_back


def test_a_padded_row_is_one_request_in_a_bucket_of_two() -> None:
    found = minimal(cases(), lambda case: len(case.replays[0].requests) < case.bucket(0))
    assert found in (Case(setup(buckets=(2,)), (replay(1),)), Case(setup(), (replay(),)))


def test_the_first_mode_asked_for_is_the_simplest() -> None:
    modes = (Mode.DRAFT_EXTEND_V2, Mode.DECODE)
    assert minimal(cases(modes), lambda _: True) == Case(setup(), (replay(1, mode=Mode.DRAFT_EXTEND_V2),))


def test_without_padding_a_batch_fills_its_bucket() -> None:
    swarm = Swarm.everything().without(Feature.PADDING)
    found = minimal(cases(swarm=swarm), lambda case: len(case.replays[0].requests) > 2)
    assert found == Case(setup(buckets=(3,)), (replay(1, 1, 1),))


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("threshold", [17, 64, 100, 257, 299])
def test_lengths_shrink_to_the_exact_threshold(mode: Mode, threshold: int) -> None:
    assert minimal(lengths(WIDE, mode), lambda length: length >= threshold) == threshold


def test_parts_shrink_by_themselves() -> None:
    assert minimal(setups(), lambda _: True) == setup()
    assert minimal(requests(WIDE, Mode.DRAFT_EXTEND), lambda _: True) == (Request(),)
    assert minimal(requests(WIDE, Mode.DRAFT_EXTEND_V2), lambda it: len(it) > 1) == (Request(4), Request(4))
    assert minimal(replays(WIDE, (Mode.TARGET_VERIFY,)), lambda _: True) == (replay(1, mode=Mode.TARGET_VERIFY),)
