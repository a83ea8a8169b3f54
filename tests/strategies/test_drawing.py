"""Is drawing sound, and is it cheap?"""

from __future__ import annotations

import time

import pytest
from helpers import draw_many, find_any, minimal
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from nsa_verify.core.case import MAX_TABLE_WIDTH, Case, Mode, Setup, longest
from nsa_verify.core.invariants import content_of, violations
from nsa_verify.core.oracle import expect
from nsa_verify.strategies import Limits, boundaries, cases, lengths, replays, requests, setups

MOST_MS_PER_CASE = 6.0
"""About 0.8 ms are usual, Hypothesis's engine included; the rest is for slow and busy machines."""


def test_no_draw_is_thrown_away() -> None:
    begun = finished = 0

    @st.composite
    def counted(draw: st.DrawFn) -> Case:
        nonlocal begun, finished
        begun += 1
        case = draw(cases())
        finished += 1
        return case

    kept = len(draw_many(counted(), 300))
    assert begun == finished == kept == 300


def test_the_same_seed_draws_the_same_cases() -> None:
    assert draw_many(cases(), 30, seeded=3) == draw_many(cases(), 30, seeded=3) != draw_many(cases(), 30, seeded=4)


def test_drawing_is_cheap() -> None:
    strategy = cases()
    draw_many(strategy, 20)
    begun = time.process_time()
    examples = draw_many(strategy, 150, seeded=1)
    assert (time.process_time() - begun) * 1000 / len(examples) < MOST_MS_PER_CASE


def test_cases_are_cheap_on_average() -> None:
    drawn = draw_many(cases(), 200)
    rows = sorted(
        case.setup.captured_rows(replay.mode, case.bucket(index))
        for case in drawn
        for index, replay in enumerate(case.replays)
    )
    widths = sorted(case.setup.table_width for case in drawn)
    assert rows[len(rows) * 2 // 3] <= 12
    assert rows[len(rows) * 9 // 10] <= 33
    assert widths[len(widths) * 3 // 4] <= 160
    assert sum(len(case.replays) for case in drawn) <= 2.3 * len(drawn)
    assert max(case.setup.pool_rows * case.setup.pool_width for case in drawn) <= Limits.small().pool_cells


def test_composed_strategies_are_spans_that_can_be_told_apart() -> None:
    one, other = setups(), setups(limits=Limits.large())
    assert one.label == other.label
    labels = {it.label for it in (one, cases(), replays(Setup()), requests(Setup(), Mode.DECODE))}
    assert len(labels) == 4


@pytest.mark.parametrize("mode", Mode)
def test_a_single_mode_can_be_asked_for(mode: Mode) -> None:
    assert {replay.mode for case in draw_many(cases([mode]), 40) for replay in case.replays} == {mode}


def test_no_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"modes = \(\)"):
        cases(())
    with pytest.raises(ValueError, match=r"modes = \(\)"):
        replays(Setup(), ())


def test_the_oracle_keeps_its_invariants_over_drawn_cases() -> None:
    for case in draw_many(cases(), 100, seeded=5):
        for index in range(len(case.replays)):
            assert list(violations(case, index, content_of(expect(case, index)))) == []


def test_large_limits_draw_larger_cases() -> None:
    limits = Limits.large()
    drawn = draw_many(cases(limits=limits), 60)
    assert any(case.setup.buckets[-1] > Limits.small().batch_size for case in drawn)
    assert any(Limits.small().width < case.setup.table_width for case in drawn)
    assert all(case.setup.buckets[-1] * case.setup.num_draft_tokens <= limits.many_rows for case in drawn)


def test_large_cases_are_cheap_next_to_small_ones() -> None:
    def cost_s(limits: Limits) -> float:
        times = []
        for _ in range(3):  # the least is what other work on the machine disturbed least
            begun = time.process_time()
            for case in draw_many(cases(limits=limits), 60):
                for index in range(len(case.replays)):
                    expect(case, index)
            times.append(time.process_time() - begun)
        return min(times)

    assert cost_s(Limits.large()) < 4 * cost_s(Limits.small())


def test_limits_go_by_the_device() -> None:
    assert Limits.for_device("cpu") == Limits.small()
    assert Limits.for_device("cuda") == Limits.for_device("cuda:1") == Limits.large()
    with pytest.raises(ValueError, match="device = 'auto': must be cpu or cuda"):
        Limits.for_device("auto")


@pytest.mark.parametrize("limits", [Limits.small(), Limits.large()], ids=["small", "large"])
def test_limits_are_kept(limits: Limits) -> None:
    for case in draw_many(cases(limits=limits), 300, seeded=7):
        assert len(case.replays) <= limits.most_replays
        assert case.setup.num_steps <= limits.most_steps
        assert case.setup.pool_rows * case.setup.pool_width <= limits.pool_cells
        assert case.setup.table_width <= max(limits.width, limits.top_k_width)
        assert case.setup.pool_width <= limits.long_width


PRODUCTION = Setup(
    num_draft_tokens=4,
    index_topk=2048,
    page_size=16,
    table_width=MAX_TABLE_WIDTH,
    pool_rows=512,
    pool_width=MAX_TABLE_WIDTH + 8,
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
)
LARGEST_SUMS = Setup(
    num_draft_tokens=8,
    index_topk=2**31 - 1,
    page_size=64,
    table_width=MAX_TABLE_WIDTH,
    pool_width=MAX_TABLE_WIDTH + 16,
    buckets=(4096, 8192),
)
"""As long a batch of as long requests as the table allows would not fit int32."""
NO_ROOM = Setup(num_draft_tokens=4, fill_seq_len=0, table_width=4, pool_width=4, buckets=(2,))


GIVEN = {"production": PRODUCTION, "largest sums": LARGEST_SUMS, "no room": NO_ROOM, "default": Setup()}


@pytest.mark.parametrize("setup", GIVEN.values(), ids=GIVEN)
def test_replays_of_a_given_setup_are_legal(setup: Setup) -> None:
    for chain in draw_many(replays(setup), 30):
        assert Case(setup, chain).setup is setup


def test_a_pool_row_without_room_for_a_real_request_gives_empty_batches() -> None:
    assert set(draw_many(requests(NO_ROOM, Mode.TARGET_VERIFY), 10)) == {()}


@pytest.mark.parametrize("mode", Mode)
def test_boundaries_are_legal_lengths_in_order(mode: Mode) -> None:
    for setup in (PRODUCTION, *draw_many(setups(), 50)):
        found = boundaries(setup, mode)
        assert list(found) == sorted(set(found))
        assert 1 <= found[0] <= found[-1] == longest(setup, mode)


def test_boundaries_are_the_ones_of_the_design() -> None:
    setup = Setup(num_draft_tokens=2, index_topk=20, page_size=16, table_width=40, pool_width=44)
    assert boundaries(setup, Mode.DECODE) == (1, 2, 3, 15, 16, 17, 19, 20, 21, 31, 32, 33, *range(38, 45))
    verify = {1, 2, 3, 13, 14, 15, 16, 17, *range(17, 22), 29, 30, 31, 32, 33, *range(38, 43)}
    assert boundaries(setup, Mode.TARGET_VERIFY) == tuple(sorted(verify))


@pytest.mark.parametrize("accept_len", [0, 1, 4])
def test_lengths_cover_what_was_accepted(accept_len: int) -> None:
    drawn = draw_many(lengths(PRODUCTION, Mode.DRAFT_EXTEND, accept_len), 60)
    assert max(1, accept_len) == min(drawn) < max(drawn) <= PRODUCTION.pool_width


def test_helpers_say_when_nothing_is_found() -> None:
    with pytest.raises(NoSuchExample):
        find_any(st.integers(0, 5), lambda value: value > 5, max_examples=30)
    with pytest.raises(NoSuchExample):
        minimal(st.integers(0, 5), lambda value: value > 5, max_examples=30)
