"""Live, slack and frame under the four write extents (CONTRACT.md, section 3)."""

from __future__ import annotations

import pytest

from nsa_verify import Case, Extent, Mode, Replay, Request, Setup
from nsa_verify.core.case import row_slots
from nsa_verify.core.oracle import Region, expect

SETUP = Setup(num_draft_tokens=2, page_size=16, table_width=100, pool_width=106, pool_rows=2, buckets=(3,))


def _spans(case: Case, buffer: str, extent: Extent, block: int = 128) -> list[tuple[int, int]]:
    """``(live, extent)`` of each defined row."""
    return [(row.live, row.extent) for row in expect(case, 0, extent, block).buffers[buffer]]


def _decode(*lens: int) -> Case:
    return Case(SETUP, (Replay(requests=tuple(Request(length) for length in lens)),))


@pytest.mark.parametrize(
    ("extent", "block", "tokens", "pages"),
    [
        (Extent.LIVE, 128, [(40, 40), (17, 17), (1, 1)], [(3, 3), (2, 2), (1, 1)]),
        (Extent.ROW, 128, [(40, 100), (17, 100), (1, 100)], [(3, 7), (2, 7), (1, 7)]),
        (Extent.ROW, 32, [(40, 64), (17, 32), (1, 32)], [(3, 7), (2, 7), (1, 7)]),
        (Extent.ROW, 2, [(40, 40), (17, 18), (1, 2)], [(3, 4), (2, 2), (1, 2)]),
        (Extent.ROW, 1, [(40, 40), (17, 17), (1, 1)], [(3, 3), (2, 2), (1, 1)]),
        (Extent.MAX, 128, [(40, 40), (17, 40), (1, 40)], [(3, 3), (2, 3), (1, 3)]),
        (Extent.FULL, 128, [(40, 100), (17, 100), (1, 100)], [(3, 7), (2, 7), (1, 7)]),
    ],
)
def test_extents(extent: Extent, block: int, tokens: list[tuple[int, int]], pages: list[tuple[int, int]]) -> None:
    case = _decode(40, 17)
    assert _spans(case, "page_table_1", extent, block) == tokens
    assert _spans(case, "real_page_table", extent, block) == pages


@pytest.mark.parametrize("extent", list(Extent))
def test_at_the_context_wall_columns_are_clipped_and_lengths_are_not(extent: Extent) -> None:
    case = _decode(106, 101, 100)
    expected = expect(case, 0, extent)
    assert expected.buffers["cache_seqlens"][0].values == (106, 101, 100)
    assert _spans(case, "page_table_1", extent) == [(100, 100)] * 3
    assert _spans(case, "real_page_table", extent) == [(7, 7)] * 3


def test_verify_at_the_wall_counts_the_draft_tokens() -> None:
    case = Case(SETUP, (Replay(Mode.TARGET_VERIFY, (Request(104), Request(97))),))
    expected = expect(case, 0, Extent.MAX)
    assert expected.buffers["nsa_seqlens_expanded"][0].values == (105, 106, 98, 99, 2, 3)
    assert _spans(case, "page_table_1", Extent.MAX) == [(live, 100) for live in (100, 100, 99, 99, 3, 3)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_live_pages_are_rounded_up(length: int) -> None:
    assert _spans(_decode(length), "real_page_table", Extent.LIVE)[0] == (-(-length // 16),) * 2


def test_the_maximum_is_that_of_the_whole_batch_with_padding() -> None:
    case = Case(Setup(page_size=16, table_width=40, pool_width=40, buckets=(2,)), (Replay(),))
    assert _spans(case, "page_table_1", Extent.MAX) == [(1, 1), (1, 1)]
    empty = Case(Setup(table_width=40, pool_width=40, buckets=(2,), fill_seq_len=0), (Replay(),))
    for extent in (Extent.LIVE, Extent.ROW, Extent.MAX):
        assert _spans(empty, "page_table_1", extent) == [(0, 0), (0, 0)]
    assert _spans(empty, "page_table_1", Extent.FULL) == [(0, 40), (0, 40)]


def test_slack_holds_what_the_formula_gives_for_that_very_column() -> None:
    case = _decode(40, 17)
    for row in expect(case, 0, Extent.FULL).buffers["page_table_1"]:
        assert row.values == row_slots(SETUP, case.replays[0], 0, 100)
    for row in expect(case, 0, Extent.FULL).buffers["real_page_table"]:
        assert row.values == tuple((1000 + 16 * page) // 16 for page in range(7))


def test_the_last_page_of_a_width_that_is_no_multiple_of_the_page_is_read_inside_the_width() -> None:
    setup = Setup(page_size=16, table_width=17, pool_width=17)
    expected = expect(Case(setup, (Replay(requests=(Request(17),)),)), 0)
    assert expected.buffers["real_page_table"][0].values == (1000 // 16, 1016 // 16)


def test_region_of_a_cell() -> None:
    expected = expect(_decode(40, 17), 0, Extent.MAX)
    live, slack, frame = Region.LIVE, Region.SLACK, Region.FRAME
    tokens = [expected.region("page_table_1", 1, column) for column in (0, 16, 17, 39, 40, 99)]
    assert tokens == [live, live, slack, slack, frame, frame]
    assert [expected.region("real_page_table", 1, column) for column in (1, 2, 3)] == [live, slack, frame]
    assert expected.region("page_table_1", 3, 0) is frame
    assert expected.region("cache_seqlens", 0, 2) is live
    assert expected.region("cache_seqlens", 0, 3) is frame


@pytest.mark.parametrize("buffer", ["cu_seqlens_q", "nsa_cu_seqlens_q"])
@pytest.mark.parametrize("mode", list(Mode))
def test_the_frozen_aranges_are_frame(buffer: str, mode: Mode) -> None:
    expected = expect(Case(SETUP, (Replay(mode, (Request(5),)),)), 0, Extent.FULL)
    assert {expected.region(buffer, 0, column) for column in range(7)} == {Region.FRAME}


@pytest.mark.parametrize("extent", list(Extent))
def test_rows_past_the_ragged_total_are_frame_under_every_extent(extent: Extent) -> None:
    case = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, (Request(9, 0, 2), Request(9, 0, 0))),))
    expected = expect(case, 0, extent)
    assert expected.defined_rows == 3
    for buffer in ("page_table_1", "real_page_table"):
        assert expected.region(buffer, 2, 0) is Region.LIVE
        assert expected.region(buffer, 3, 0) is Region.FRAME
    for buffer, last in (("nsa_seqlens_expanded", 2), ("nsa_cache_seqlens", 2), ("nsa_cu_seqlens_k", 3)):
        assert expected.region(buffer, 0, last) is Region.LIVE
        assert expected.region(buffer, 0, last + 1) is Region.FRAME


@pytest.mark.parametrize("extent", list(Extent))
def test_without_rows_the_tables_are_frame(extent: Extent) -> None:
    case = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, (Request(9, 0, 0),) * 3),))
    expected = expect(case, 0, extent)
    for buffer in ("page_table_1", "real_page_table", "nsa_seqlens_expanded", "nsa_cache_seqlens"):
        assert expected.region(buffer, 0, 0) is Region.FRAME
    assert expected.region("nsa_cu_seqlens_k", 0, 0) is Region.LIVE
    assert expected.region("nsa_cu_seqlens_k", 0, 1) is Region.FRAME
