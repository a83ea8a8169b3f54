"""What does it shrink to? To the literal case that a person would have written."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from helpers import minimal

from nsa_verify.core.case import Case, CtxLens, Mode, Replay, Request, Setup
from nsa_verify.strategies import Feature, Swarm, cases, lengths, replays, requests, setups

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
    "two replays": (lambda case: len(case.replays) >= 2, Case(setup(), (replay(1), replay(1)))),
    "three replays": (lambda case: len(case.replays) >= 3, Case(setup(), (replay(1), replay(1), replay(1)))),
    "two modes": (
        lambda case: len({replay.mode for replay in case.replays}) > 1,
        Case(setup(), (replay(1), replay(1, mode=Mode.TARGET_VERIFY))),
    ),
    "two buckets": (
        lambda case: len({case.bucket(index) for index in range(len(case.replays))}) > 1,
        Case(setup(buckets=(1, 2)), (replay(1), replay(1, 1))),
    ),
    "a smaller batch in the same bucket": (shrinks_in_one_bucket, Case(setup(buckets=(2,)), (replay(1, 1), replay(1)))),
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


@pytest.mark.parametrize("name", EXPECTED)
def test_cases_shrink_to_what_a_person_would_have_written(name: str) -> None:
    predicate, expected = EXPECTED[name]
    assert minimal(cases(), predicate) == expected


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


WIDE = Setup(num_draft_tokens=4, index_topk=64, page_size=64, table_width=300, pool_width=308, buckets=(4,))


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("threshold", [17, 64, 100, 257, 299])
def test_lengths_shrink_to_the_exact_threshold(mode: Mode, threshold: int) -> None:
    assert minimal(lengths(WIDE, mode), lambda length: length >= threshold) == threshold


def test_parts_shrink_by_themselves() -> None:
    assert minimal(setups(), lambda _: True) == setup()
    assert minimal(requests(WIDE, Mode.DRAFT_EXTEND), lambda _: True) == (Request(),)
    assert minimal(requests(WIDE, Mode.DRAFT_EXTEND_V2), lambda it: len(it) > 1) == (Request(4), Request(4))
    assert minimal(replays(WIDE, (Mode.TARGET_VERIFY,)), lambda _: True) == (replay(1, mode=Mode.TARGET_VERIFY),)
