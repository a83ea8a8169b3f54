"""The pictures of a verdict: what the buffers hold and should hold, in which order, and what is cut."""

from __future__ import annotations

from typing import Any

import pytest
from device.subjects import Bug, Steps, subject

from nsa_verify import Case, Code, Extent, Implementation, Mode, Replay, ReplayInputs, Request, Setup
from nsa_verify.core.findings import Picture, Square, Verdict
from nsa_verify.core.oracle import expect
from nsa_verify.device.executors import EAGER
from nsa_verify.device.judge import Judge
from nsa_verify.device.layout import is_poison
from nsa_verify.device.picturing import KEPT_CELLS, MOST_CELLS, MOST_COLUMNS, MOST_ROWS
from nsa_verify.device.select import resolve

SETUP = Setup(
    num_draft_tokens=2,
    page_size=16,
    table_width=40,
    table_row_stride=44,
    pool_rows=3,
    pool_width=48,
    num_steps=2,
    buckets=(2, 4),
    schedule=True,
)
CASE = Case(SETUP, (Replay(Mode.DECODE, (Request(13, 1), Request(5, 2))),))


def pictured(bug: Bug | None, case: Case = CASE, **more: Any) -> Verdict:
    """The verdict on ``case`` of what is right but for ``bug``, with pictures."""
    implementation: Implementation = subject(bug, **more)
    return Judge(case, resolve("auto")).judge(implementation, EAGER, picture=True)


def named(verdict: Verdict, buffer: str, kind: str = "buffer", step: int | None = 0) -> Picture:
    """The one picture that is called so."""
    (found,) = [it for it in verdict.pictures if (it.buffer, it.kind, it.step) == (buffer, kind, step)]
    return found


def _short(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    steps[0].nsa_cache_seqlens[1] -= 1


def test_what_agrees_has_none() -> None:
    assert pictured(None).pictures == ()


def test_none_without_being_asked() -> None:
    assert Judge(CASE, resolve("auto")).judge(subject(_short), EAGER).pictures == ()


def test_values_are_those_of_the_oracle_and_of_the_call() -> None:
    verdict = pictured(_short)
    (row,) = named(verdict, "nsa_cache_seqlens").squares
    assert [(it.region, it.expected, it.got, it.differs) for it in row[:2]] == [
        ("live", 8, 8, False),
        ("live", 5, 4, True),
    ]
    assert all(it.region == "guard" and not it.differs and is_poison(it.got) for it in row[2:])
    assert all(is_poison(it.before) for it in row)
    rows = expect(CASE, 0).buffers["page_table_1"]
    table = named(verdict, "page_table_1").squares
    for at, expected in enumerate(rows):
        live = table[at][: expected.live]
        assert [it.expected for it in live] == [it.got for it in live] == list(expected.values[: expected.live])
        assert {it.region for it in live} == {"live"}
        assert {it.region for it in table[at][expected.live :]} == {"frame"}


def test_the_place_of_the_finding_comes_first() -> None:
    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        steps[0].cache_seqlens[0] += 1
        steps[1].page_table_1[1, 2] += 1
        steps[1].cu_seqlens_q[1] = 9

    verdict = pictured(spoil)
    assert verdict.primary is not None
    assert (verdict.primary.buffer, verdict.primary.code) == ("cu_seqlens_q", Code.FRAME_WRITTEN)
    order = [(it.buffer, it.step) for it in verdict.pictures if it.wrong]
    assert order == [("cu_seqlens_q", 1), ("page_table_1", 1), ("cache_seqlens", 0)]
    assert [it.wrong for it in verdict.pictures] == sorted((it.wrong for it in verdict.pictures), reverse=True)


def test_every_buffer_of_the_replay_is_there_once() -> None:
    names = {(it.buffer, it.step) for it in pictured(_short).pictures}
    assert names == {(name, step) for name in _NAMES for step in range(2)}
    assert len(pictured(_short).pictures) == 2 * len(_NAMES)
    assert named(pictured(_short), "cache_seqlens").aliases == ("nsa_seqlens_expanded",)


_NAMES = (
    *("cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k", "page_table_1", "real_page_table"),
    *("cu_seqlens_q", "nsa_cu_seqlens_q", "paged_mqa_schedule"),
)


def test_slack_may_hold_either() -> None:
    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        steps[0].page_table_1[0, 30] = 7
        steps[0].page_table_1[0, 31] = inputs.req_to_token[1, 31]

    row = named(pictured(spoil, extent=Extent.FULL), "page_table_1").squares[0]
    assert [(it.region, it.differs) for it in row[29:32]] == [("slack", False), ("slack", True), ("slack", False)]
    assert is_poison(row[29].got)
    assert row[30].got == 7
    assert row[31].got == row[31].expected


def test_gaps_between_rows_and_the_guard_below() -> None:
    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        steps[0].page_table_1.as_strided((1,), (1,), steps[0].page_table_1.storage_offset() + 42)[0] = 7

    table = named(pictured(spoil), "page_table_1")
    assert (table.rows, table.columns, table.wrong) == (8, 40, 1)
    assert [len(row) for row in table.squares] == [44] * 9
    assert table.squares[0][42] == Square("frame", table.squares[0][42].before, 7, table.squares[0][42].before, True)
    assert {it.region for it in table.squares[8]} == {"guard"}


def test_a_guard_zone_is_drawn_if_it_was_written() -> None:
    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        sums = steps[0].nsa_cu_seqlens_k
        sums.as_strided((sums.numel() + 30,), (1,))[-1] = 7

    verdict = pictured(spoil)
    guard = verdict.pictures[0]
    assert (guard.buffer, guard.kind, guard.wrong) == ("nsa_cu_seqlens_k", "guard", 1)
    assert [at for at, it in enumerate(guard.squares[0]) if it.differs] == [29]
    assert {it.region for it in guard.squares[0]} == {"guard"}
    assert [it.kind for it in verdict.pictures].count("guard") == 1


def test_an_input_and_another_buckets_buffer_are_named() -> None:
    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        inputs.accept_lens[0] += 1

    given = named(pictured(spoil), "accept_lens", "input", None)
    assert (given.kind, given.wrong, given.squares[0][0].region) == ("input", 1, "input")

    def stray(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        lengths = steps[0].cache_seqlens
        lengths.as_strided((4096,), (1,))[_distance()] = 7

    other = next(it for it in pictured(stray).pictures if it.owner)
    assert (other.buffer, other.owner, other.wrong) == ("cache_seqlens", "decode, bucket 4", 1)


def _distance() -> int:
    from nsa_verify.device.layout import arena_layout

    places = arena_layout(SETUP).places
    own, other = (places[0, Mode.DECODE, bucket, "cache_seqlens"].offset for bucket in (2, 4))
    return other - own


LARGE = Setup(table_width=600, pool_width=700, page_size=16, num_steps=4, num_draft_tokens=4, buckets=(40,))


def test_large_buffers_are_cut_around_the_first_difference() -> None:
    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        steps[2].page_table_1[90, 300] = 7

    case = Case(LARGE, (Replay(Mode.TARGET_VERIFY, tuple(Request(500) for _ in range(40))),))
    verdict = pictured(spoil, case)
    table = verdict.pictures[0]
    assert (table.buffer, table.step, table.rows, table.columns) == ("page_table_1", 2, 160, 600)
    assert len(table.squares) <= MOST_ROWS
    assert 100 < len(table.squares[0]) <= MOST_COLUMNS
    assert table.first_row < 90 < table.first_row + len(table.squares)
    assert table.squares[90 - table.first_row][300 - table.first_column].differs
    assert table.first_column == 300 - len(table.squares[0]) // 4
    drawn = sum(len(row) for it in verdict.pictures for row in it.squares)
    assert MOST_CELLS // 2 < drawn <= MOST_CELLS


@pytest.mark.parametrize("everything", [False, True])
def test_small_buffers_are_not_cut_for_the_sake_of_large_ones(everything: bool) -> None:
    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        for step in steps if everything else steps[:1]:
            step.page_table_1.fill_(7)
            step.real_page_table.fill_(7)
            step.cache_seqlens[3] += 1

    case = Case(LARGE, (Replay(Mode.DECODE, tuple(Request(500) for _ in range(40))),))
    verdict = pictured(spoil, case)
    wrong = [it for it in verdict.pictures if it.wrong]
    assert all(len(it.squares[0]) >= it.columns for it in wrong if it.buffer == "cache_seqlens")
    assert all(len(it.squares) > 5 for it in wrong if it.rows > 1)
    cells = sum(len(row) for it in verdict.pictures for row in it.squares)
    others = sum(len(row) for it in verdict.pictures if not it.wrong for row in it.squares)
    assert cells <= MOST_CELLS
    assert others > KEPT_CELLS / 2


def test_an_exception_and_a_refused_capture_have_none() -> None:
    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        raise ValueError("planted")

    verdict = pictured(spoil)
    assert verdict.primary is not None
    assert (verdict.primary.code, verdict.pictures) == (Code.EXCEPTION, ())


def test_the_second_call_is_the_one_that_is_drawn() -> None:
    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        calls.append(1)
        if len(calls) % 2 == 0:
            steps[0].nsa_cache_seqlens[0] = 3

    calls: list[int] = []
    verdict = pictured(spoil)
    assert verdict.primary is not None
    assert verdict.primary.code in (Code.NOT_IDEMPOTENT, Code.NOT_DETERMINISTIC)
    assert named(verdict, "nsa_cache_seqlens").squares[0][0].got == 3
