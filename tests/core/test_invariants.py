"""Every invariant holds of the oracle's own expectation, and fires when the content is corrupted accordingly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from random import Random

import pytest

from nsa_verify import Case, CtxLens, Mode, Replay, Request, Setup, SlotKind
from nsa_verify.core.case import slot
from nsa_verify.core.invariants import INVARIANTS, Violation, content_of, violations
from nsa_verify.core.oracle import batch, expect

SETUP = Setup(
    num_draft_tokens=3, page_size=16, table_width=40, pool_width=48, pool_rows=2, buckets=(3,), ctx_lens=CtxLens.OWN
)
CASE = Case(SETUP, (Replay(Mode.TARGET_VERIFY, (Request(20, 0), Request(5, 1)), SlotKind.SCATTERED),))


def _corrupted(buffer: str, row: int, column: int, value: int, case: Case = CASE) -> list[Violation]:
    content: dict[str, list[list[int]]] = {
        name: [list(values) for values in rows] for name, rows in content_of(expect(case, 0)).items()
    }
    content[buffer][row][column] = value
    return list(violations(case, 0, content))


@pytest.mark.parametrize("seed", range(8))
def test_the_oracle_keeps_every_invariant(seed: int, random_case: Callable[[Random], Case]) -> None:
    rng = Random(1000 + seed)
    for _ in range(40):
        case = random_case(rng)
        for replay in range(len(case.replays)):
            assert list(violations(case, replay, content_of(expect(case, replay)))) == [], case


@pytest.mark.parametrize("buffer", ["cache_seqlens", "nsa_seqlens_expanded", "nsa_cache_seqlens", "paged_mqa_ctx_lens"])
def test_a_negative_length(buffer: str) -> None:
    first = _corrupted(buffer, 0, 1, -4)[0]
    assert (first.buffer, first.row, first.column) == (buffer, 0, 1)
    assert first.sentence == "negative length -4, read as 4294967292 tokens"


@pytest.mark.parametrize("buffer", ["cu_seqlens_k", "nsa_cu_seqlens_k"])
@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [(0, 1, "starts at 1, not at 0"), (2, 1, "runs backwards"), (-1, 9_999, "ends at 9999, the lengths sum to")],
)
def test_a_prefix_sum(buffer: str, column: int, value: int, sentence: str) -> None:
    (found,) = _corrupted(buffer, 0, column, value)
    assert found.buffer == buffer
    assert sentence in found.sentence


def test_a_clamped_length_beyond_top_k() -> None:
    found = _corrupted("nsa_cache_seqlens", 0, 0, 9)
    assert ("nsa_cache_seqlens", 0, 0, "9 exceeds min(expanded = 21, top-k = 8)") in found


def test_a_clamped_length_beyond_the_expanded_one() -> None:
    found = _corrupted("nsa_cache_seqlens", 0, 6, 3)
    assert ("nsa_cache_seqlens", 0, 6, "3 exceeds min(expanded = 2, top-k = 8)") in found


@pytest.mark.parametrize("buffer", ["page_table_1", "real_page_table"])
def test_a_table_cell_that_is_no_slot_of_the_request(buffer: str) -> None:
    other_row = expect(CASE, 0).buffers[buffer][3].values[0]
    (found,) = _corrupted(buffer, 2, 1, other_row)
    assert (found.buffer, found.row, found.column) == (buffer, 2, 1)
    assert f"{other_row} is no slot" in found.sentence


def test_a_page_that_was_not_divided() -> None:
    slot = expect(CASE, 0).buffers["page_table_1"][0].values[16]
    assert [found.buffer for found in _corrupted("real_page_table", 0, 1, slot)] == ["real_page_table"]


@pytest.mark.parametrize("buffer", ["page_table_1", "real_page_table"])
def test_rows_that_are_one_object_are_held_to_their_own_requests(buffer: str) -> None:
    content = content_of(expect(CASE, 0))
    shared = content[buffer][0][:1]
    content[buffer] = [shared] * len(content[buffer])
    found = [(it.row, it.column) for it in violations(CASE, 0, content) if it.buffer == buffer]
    assert found == [(3, 0)], "rows 0..2 are those of request 0, row 3 is the first of request 1 on another pool row"


@pytest.mark.parametrize("seed", range(4))
def test_the_cells_that_are_refused_are_those_nowhere_in_the_row(
    seed: int, random_case: Callable[[Random], Case]
) -> None:
    """Any slot of the row is one that a consumer may read, also in another column and past the table's width."""
    rng, refused = Random(seed), 0
    for _ in range(150):
        case = random_case(rng)
        replay, setup = case.replays[0], case.setup
        expected = expect(case, 0)
        for name, page in (("page_table_1", 1), ("real_page_table", setup.page_size)):
            rows = [row for row, it in enumerate(expected.buffers.get(name, ())) if it.live]
            if not rows:
                continue
            row = rng.choice(rows)
            column = rng.randrange(expected.buffers[name][row].live)
            pool_row = batch(case, 0).pool_rows[owner_of(case, row)]
            here, anywhere = (slot(setup, replay, it, rng.randrange(setup.pool_width)) for it in (pool_row, 0))
            value = rng.choice([here // page, anywhere // page, here, here // page + 1, 0, -1])
            allowed = {slot(setup, replay, pool_row, it) // page for it in range(setup.pool_width)}
            found = [it for it in _corrupted(name, row, column, value, case) if it.buffer == name]
            assert [(it.row, it.column) for it in found] == [(row, column)] * (value not in allowed)
            refused += len(found)
    assert refused > 30


def owner_of(case: Case, row: int) -> int:
    """The request that an expanded row belongs to."""
    given = batch(case, 0)
    rows = [1] * given.bucket if given.mode is Mode.DECODE else given.accept_lens
    return next(request for request in range(given.bucket) if sum(rows[: request + 1]) > row)


def test_table_rows_of_a_ragged_batch_belong_to_the_request_that_accepted_them() -> None:
    replay = Replay(Mode.DRAFT_EXTEND, (Request(9, 0, 0), Request(9, 1, 2), Request(9, 0, 1)), SlotKind.SCATTERED)
    case = Case(SETUP, (replay,))
    rows = expect(case, 0).buffers["page_table_1"]
    assert _corrupted("page_table_1", 1, 0, rows[1].values[3], case) == []
    assert len(_corrupted("page_table_1", 2, 0, rows[1].values[0], case)) == 1


def test_the_v2_form_without_the_clamp_that_real_engines_shipped() -> None:
    setup = Setup(num_draft_tokens=3, table_width=16, pool_width=24, pool_rows=2, buckets=(3,))
    case = Case(setup, (Replay(Mode.DRAFT_EXTEND_V2, (Request(13, 0), Request(5, 1))),))
    content = content_of(expect(case, 0))
    content["nsa_seqlens_expanded"] = [(11, 12, 13, 3, 4, 5, -1, 0, 1)]
    content["nsa_cache_seqlens"] = [(8, 8, 8, 3, 4, 5, -1, 0, 1)]
    content["nsa_cu_seqlens_k"] = [(0, 8, 16, 24, 27, 31, 36, 35, 35, 36)]
    found = [(violation.buffer, violation.column) for violation in violations(case, 0, content)]
    assert found == [("nsa_seqlens_expanded", 6), ("nsa_cache_seqlens", 6), ("nsa_cu_seqlens_k", 7)]


def test_without_rows_only_the_leading_zero_is_looked_at() -> None:
    case = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, (Request(9, 0, 0),) * 3),))
    assert list(violations(case, 0, content_of(expect(case, 0)))) == []
    told = [found.sentence for found in _corrupted("nsa_cu_seqlens_k", 0, 0, 5, case)]
    assert told == ["starts at 5, not at 0", "ends at 5, the lengths sum to 0"]


Faulty = dict[str, list[tuple[int, ...]]]


def _lengths(content: Faulty) -> None:
    content["paged_mqa_ctx_lens"] = [(-1,)]


def _first_sum(content: Faulty) -> None:
    content["cu_seqlens_k"] = [(1, *content["cu_seqlens_k"][0][1:])]


def _middle_sum(content: Faulty) -> None:
    first, _, *others = content["cu_seqlens_k"][0]
    content["cu_seqlens_k"] = [(first, others[0] + 1, *others)]


def _last_sum(content: Faulty) -> None:
    *others, last = content["cu_seqlens_k"][0]
    content["cu_seqlens_k"] = [(*others, last + 1)]


def _unclamped(content: Faulty) -> None:
    content["nsa_cache_seqlens"] = content["nsa_seqlens_expanded"]
    content["nsa_cu_seqlens_k"] = [(0, *accumulate(content["nsa_seqlens_expanded"][0]))]


def _next_request(content: Faulty) -> None:
    content["page_table_1"] = [*content["page_table_1"][1:], content["page_table_1"][0]]


@pytest.mark.parametrize(
    ("name", "fault"),
    [*zip(INVARIANTS, [_lengths, _first_sum, _middle_sum, _last_sum, _unclamped, _next_request], strict=True)],
    ids=list(INVARIANTS),
)
def test_each_invariant_catches_a_faulty_oracle_that_no_other_one_does(
    name: str, fault: Callable[[Faulty], None]
) -> None:
    content = content_of(expect(CASE, 0))
    fault(content)
    assert list(violations(CASE, 0, content))
    assert list(violations(CASE, 0, content, without={name})) == []
