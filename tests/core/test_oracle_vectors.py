"""The vectors of CONTRACT.md, sections 2 and 7, and the cases around them that it settles in words."""

from __future__ import annotations

import msgspec
import pytest

from nsa_verify import Case, CtxLens, Mode, Replay, Request, Setup
from nsa_verify.core.buffers import alias_of, shapes
from nsa_verify.core.case import PAGE_SIZES
from nsa_verify.core.oracle import batch, expect, schedule

SETUP = Setup(num_draft_tokens=3, index_topk=8, table_width=16, pool_width=24, pool_rows=2, buckets=(3,))


def _vector_case(mode: Mode) -> Case:
    """K=8, N=3, s=[13,5,1], the third row padding; a=[2,3,1] in DRAFT_EXTEND."""
    return Case(SETUP, (Replay(mode, (Request(13, 0, 2), Request(5, 1, 3))),))


def _lines(case: Case, replay: int = 0) -> dict[str, list[int]]:
    """The 1-D buffers of an expectation."""
    expected = expect(case, replay)
    tables = ("page_table_1", "real_page_table", "paged_mqa_ctx_lens", "paged_mqa_schedule")
    return {name: list(rows[0].values) for name, rows in expected.buffers.items() if name not in tables}


def _rows(case: Case, name: str, replay: int = 0) -> list[tuple[int, ...]]:
    return [row.values for row in expect(case, replay).buffers[name]]


def test_decode() -> None:
    assert _lines(_vector_case(Mode.DECODE)) == {
        "cache_seqlens": [13, 5, 1],
        "cu_seqlens_k": [0, 13, 18, 19],
        "nsa_seqlens_expanded": [13, 5, 1],
        "nsa_cache_seqlens": [8, 5, 1],
        "nsa_cu_seqlens_k": [0, 8, 13, 14],
    }


def test_target_verify() -> None:
    assert _lines(_vector_case(Mode.TARGET_VERIFY)) == {
        "cache_seqlens": [16, 8, 4],
        "cu_seqlens_k": [0, 16, 24, 28],
        "nsa_seqlens_expanded": [14, 15, 16, 6, 7, 8, 2, 3, 4],
        "nsa_cache_seqlens": [8, 8, 8, 6, 7, 8, 2, 3, 4],
        "nsa_cu_seqlens_k": [0, 8, 16, 24, 30, 37, 45, 47, 50, 54],
    }


def test_draft_extend() -> None:
    case = _vector_case(Mode.DRAFT_EXTEND)
    assert _lines(case) == {
        "cache_seqlens": [13, 5, 1],
        "cu_seqlens_k": [0, 13, 18, 19],
        "nsa_seqlens_expanded": [12, 13, 3, 4, 5, 1],
        "nsa_cache_seqlens": [8, 8, 3, 4, 5, 1],
        "nsa_cu_seqlens_k": [0, 8, 16, 19, 23, 28, 29],
    }
    assert expect(case, 0).defined_rows == 6


def test_draft_extend_v2() -> None:
    assert _lines(_vector_case(Mode.DRAFT_EXTEND_V2)) == {
        "cache_seqlens": [13, 5, 1],
        "cu_seqlens_k": [0, 13, 18, 19],
        "nsa_seqlens_expanded": [11, 12, 13, 3, 4, 5, 0, 0, 1],
        "nsa_cache_seqlens": [8, 8, 8, 3, 4, 5, 0, 0, 1],
        "nsa_cu_seqlens_k": [0, 8, 16, 24, 27, 31, 36, 36, 36, 37],
    }


def test_the_raw_batch_sum_of_bug_class_5_is_that_of_the_padded_batch() -> None:
    case = Case(Setup(buckets=(4,)), (Replay(requests=(Request(10), Request(11))),))
    assert _lines(case)["cu_seqlens_k"] == [0, 10, 21, 22, 23]


@pytest.mark.parametrize(
    ("mode", "rows"),
    [
        (Mode.DECODE, [0, 1, 0]),
        (Mode.TARGET_VERIFY, [0, 0, 0, 1, 1, 1, 0, 0, 0]),
        (Mode.DRAFT_EXTEND, [0, 0, 1, 1, 1, 0]),
        (Mode.DRAFT_EXTEND_V2, [0, 0, 0, 1, 1, 1, 0, 0, 0]),
    ],
)
def test_every_table_row_is_that_of_its_request(mode: Mode, rows: list[int]) -> None:
    lens = {0: 13, 1: 5}
    added = 3 if mode is Mode.TARGET_VERIFY else 0
    found = _rows(_vector_case(mode), "page_table_1")
    padded = len(rows) - {Mode.DECODE: 1, Mode.DRAFT_EXTEND: 1}.get(mode, 3)
    assert [values[0] for values in found] == [1000 + 24 * row for row in rows]
    assert [len(values) for values in found[:padded]] == [min(lens[row] + added, 16) for row in rows[:padded]]
    assert {len(values) for values in found[padded:]} == {1 + added}
    assert all(values == tuple(range(values[0], values[0] + len(values))) for values in found)


@pytest.mark.parametrize("page", PAGE_SIZES)
def test_the_real_table_is_every_pth_slot_divided_by_p(page: int) -> None:
    setup = Setup(page_size=page, table_width=300, pool_width=300)
    case = Case(setup, (Replay(requests=(Request(257),)),))
    pages = -(-257 // page)
    assert _rows(case, "real_page_table") == [tuple((1000 + page * index) // page for index in range(pages))]


def test_page_size_1_makes_the_real_table_the_page_table() -> None:
    case = _vector_case(Mode.TARGET_VERIFY)
    assert _rows(case, "real_page_table") == _rows(case, "page_table_1")
    assert alias_of(SETUP, Mode.TARGET_VERIFY, "real_page_table") == "page_table_1"


def test_ragged_batch_without_a_single_row_defines_three_buffers_only() -> None:
    case = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, (Request(4, 0, 0), Request(1, 0, 0), Request(2, 0, 0))),))
    assert _lines(case) == {"cache_seqlens": [4, 1, 2], "cu_seqlens_k": [0, 4, 5, 7], "nsa_cu_seqlens_k": [0]}
    assert set(expect(case, 0).buffers) == {"cache_seqlens", "cu_seqlens_k", "nsa_cu_seqlens_k"}
    assert expect(case, 0).defined_rows == 0


def test_a_zero_accept_gives_no_row() -> None:
    case = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, (Request(5, 0, 2), Request(9, 1, 0), Request(3, 1, 1))),))
    assert _lines(case)["nsa_seqlens_expanded"] == [4, 5, 3]
    assert [values[0] for values in _rows(case, "page_table_1")] == [1000, 1000, 1024]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("fill", [0, 1])
def test_an_idle_rank_is_all_padding(mode: Mode, fill: int) -> None:
    setup = Setup(num_draft_tokens=2, pool_rows=3, buckets=(2,), fill_seq_len=fill)
    case = Case(setup, (Replay(mode, padded_accept_len=2, padded_pool_row=2),))
    lens = {
        Mode.DECODE: [fill, fill],
        Mode.TARGET_VERIFY: [fill + 1, fill + 2] * 2,
        Mode.DRAFT_EXTEND: [0, fill] * 2,
        Mode.DRAFT_EXTEND_V2: [0, fill] * 2,
    }[mode]
    assert _lines(case)["nsa_seqlens_expanded"] == lens
    assert batch(case, 0).pool_rows == (2, 2)


def test_padded_accept_lens_count_in_the_rows() -> None:
    for padded, lens in ((1, [1]), (3, [0, 0, 1])):
        case = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, (Request(4, 0, 1), Request(4, 0, 1)), padded_accept_len=padded),))
        assert _lines(case)["nsa_seqlens_expanded"] == [4, 4, *lens]


def _with_optional(mode: Mode, ctx_lens: CtxLens) -> Case:
    setup = msgspec.structs.replace(SETUP, num_sms=2, ctx_lens=ctx_lens, schedule=True)
    return Case(setup, (Replay(mode, (Request(13, 0, 2), Request(5, 1, 3))),))


@pytest.mark.parametrize(
    ("mode", "ctx_lens", "rows", "steps"),
    [
        (Mode.DECODE, CtxLens.VIEW, [(13,), (5,), (1,)], [(0, 0), (2, 0), (3, 0)]),
        (Mode.DECODE, CtxLens.OWN, [(13,), (5,), (1,)], [(0, 0), (2, 0), (3, 0)]),
        (Mode.TARGET_VERIFY, CtxLens.VIEW, [(n,) for n in (14, 15, 16, 6, 7, 8, 2, 3, 4)], [(0, 0), (5, 0), (9, 0)]),
        (Mode.TARGET_VERIFY, CtxLens.OWN, [(16,) * 3, (8,) * 3, (4,) * 3], [(0, 0), (2, 0), (3, 0)]),
        (Mode.DRAFT_EXTEND, CtxLens.VIEW, [(n,) for n in (12, 13, 3, 4, 5, 1)], [(0, 0), (3, 0), (6, 0)]),
        (Mode.DRAFT_EXTEND_V2, CtxLens.OWN, [(n,) for n in (11, 12, 13, 3, 4, 5, 0, 0, 1)], [(0, 0), (4, 0), (9, 0)]),
    ],
)
def test_optional_outputs(
    mode: Mode, ctx_lens: CtxLens, rows: list[tuple[int, ...]], steps: list[tuple[int, int]]
) -> None:
    case = _with_optional(mode, ctx_lens)
    assert _rows(case, "paged_mqa_ctx_lens") == rows
    assert _rows(case, "paged_mqa_schedule") == steps


def test_optional_outputs_are_absent_unless_the_backend_keeps_them() -> None:
    expected = expect(_vector_case(Mode.DECODE), 0).buffers
    assert "paged_mqa_ctx_lens" not in expected
    assert "paged_mqa_schedule" not in expected


@pytest.mark.parametrize("mode", list(Mode))
def test_ctx_lens_are_a_view_except_for_their_own_form_in_verify(mode: Mode) -> None:
    view, own = (_with_optional(mode, form).setup for form in (CtxLens.VIEW, CtxLens.OWN))
    viewed = "cache_seqlens" if mode is Mode.DECODE else "nsa_seqlens_expanded"
    assert alias_of(view, mode, "paged_mqa_ctx_lens") == viewed
    assert alias_of(own, mode, "paged_mqa_ctx_lens") == (None if mode is Mode.TARGET_VERIFY else viewed)
    assert alias_of(own, mode, "nsa_seqlens_expanded") == ("cache_seqlens" if mode is Mode.DECODE else None)


@pytest.mark.parametrize(
    ("lens", "num_sms", "entries"),
    [
        ([1000, 0, 300, 513], 4, [(0, 0), (0, 3), (2, 1), (3, 1), (4, 0)]),
        ([1, 1], 5, [(0, 0), (1, 0), (2, 0), (2, 0), (2, 0), (2, 0)]),
        ([0, 0, 0], 3, [(3, 0)] * 4),
        ([0] * 32, 4, [(32, 0)] * 5),
        ([], 2, [(0, 0)] * 3),
        ([256], 1, [(0, 0), (1, 0)]),
        ([257], 1, [(0, 0), (1, 0)]),
        ([257], 2, [(0, 0), (0, 1), (1, 0)]),
        ([0, 256], 2, [(1, 0), (2, 0), (2, 0)]),
        ([512, 256], 3, [(0, 0), (0, 1), (1, 0), (2, 0)]),
    ],
)
def test_schedule(lens: list[int], num_sms: int, entries: list[tuple[int, int]]) -> None:
    assert schedule(lens, num_sms) == entries


def test_shapes_of_a_bucket() -> None:
    setup = _with_optional(Mode.DECODE, CtxLens.OWN).setup
    found = shapes(setup, Mode.TARGET_VERIFY, 3)
    assert {name: tuple(shape) for name, shape in found.items()} == {
        "cache_seqlens": (1, 3),
        "cu_seqlens_k": (1, 4),
        "nsa_seqlens_expanded": (1, 9),
        "nsa_cache_seqlens": (1, 9),
        "nsa_cu_seqlens_k": (1, 10),
        "page_table_1": (9, 16),
        "real_page_table": (9, 16),
        "cu_seqlens_q": (1, 4),
        "nsa_cu_seqlens_q": (1, 10),
        "paged_mqa_ctx_lens": (3, 3),
        "paged_mqa_schedule": (3, 2),
    }
    assert shapes(setup, Mode.DECODE, 3)["paged_mqa_ctx_lens"] == (3, 1)
    assert shapes(setup, Mode.DRAFT_EXTEND, 3)["paged_mqa_ctx_lens"] == (9, 1)
    assert shapes(SETUP, Mode.DECODE, 3)["nsa_cu_seqlens_k"] == (1, 4)
