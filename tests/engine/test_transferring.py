"""A case in another mode: the same KV lengths or the same ``seq_len``, and only what that mode allows."""

from __future__ import annotations

import pytest

from nsa_verify import Case, Mode, Replay, Request, Setup
from nsa_verify.engine.transferring import transferred

DECODE, VERIFY, RAGGED, UNIFORM = Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2


def case_of(mode: Mode, *requests: Request, tokens: int = 3) -> Case:
    setup = Setup(num_draft_tokens=tokens, table_width=20, pool_width=20, buckets=(2,))
    return Case(setup, (Replay(mode, requests),))


def lengths(cases: list[Case]) -> list[list[tuple[int, int]]]:
    """``seq_len`` and ``accept_len`` of the requests of the last replay, of each case."""
    return [[(it.seq_len, it.accept_len) for it in case.replays[-1].requests] for case in cases]


@pytest.mark.parametrize(
    ("was", "given", "mode", "expected"),
    [
        (DECODE, Request(9), VERIFY, [[(6, 1)], [(9, 1)]]),  # 9 tokens, the three drafted ones among them
        (DECODE, Request(2), VERIFY, [[(1, 1)], [(2, 1)]]),  # at least one was committed
        (VERIFY, Request(9), DECODE, [[(12, 3)], [(9, 3)]]),
        (VERIFY, Request(17), UNIFORM, [[(20, 3)], [(17, 3)]]),
        (DECODE, Request(19), VERIFY, [[(16, 1)], [(17, 1)]]),  # no longer than its pool row
        (DECODE, Request(1), UNIFORM, [[(3, 1)]]),  # both are the same then
        (UNIFORM, Request(5), RAGGED, [[(5, 3)]]),
        (DECODE, Request(5), RAGGED, [[(5, 1)]]),
        (RAGGED, Request(5, accept_len=2), VERIFY, [[(2, 2)], [(5, 2)]]),
    ],
)
def test_lengths(was: Mode, given: Request, mode: Mode, expected: list[list[tuple[int, int]]]) -> None:
    moved = list(transferred(case_of(was, given), was, mode))
    assert lengths(moved) == expected
    assert {it.replays[0].mode for it in moved} == {mode}


def test_only_replays_of_that_mode_are_moved() -> None:
    one, other = Replay(DECODE, (Request(4),)), Replay(VERIFY, (Request(5),), padded_accept_len=3)
    case = Case(case_of(DECODE).setup, (one, other))
    (moved,) = transferred(case, DECODE, UNIFORM)
    assert moved.replays == (Replay(UNIFORM, (Request(4),)), other)


def test_padded_rows_have_as_many_rows_as_before() -> None:
    (moved, _) = transferred(case_of(VERIFY, Request(5)), VERIFY, RAGGED)
    assert moved.replays[0].padded_accept_len == 3


def test_what_the_other_mode_does_not_allow_is_left_out() -> None:
    """With eight tokens more in each, the sum of so many lengths would exceed int32."""
    count = (2**31 - 1) // 65_008
    setup = Setup(num_draft_tokens=8, table_width=16, pool_width=66_000, buckets=(count,))
    case = Case(setup, (Replay(VERIFY, (Request(65_000),) * count),))
    (moved,) = transferred(case, VERIFY, DECODE)
    assert moved.replays[0].requests[0].seq_len == 65_000
