"""The contract stated a second time, one cell at a time, and compared with the oracle over random cases.

It shares with the oracle only ``slot`` (what ``req_to_token`` holds) and the shapes of the buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from random import Random

import pytest

from nsa_verify import Case, CtxLens, Extent, Mode, Replay
from nsa_verify.core.buffers import shapes
from nsa_verify.core.case import slot
from nsa_verify.core.oracle import Region, batch, expect

Cells = dict[tuple[str, int, int], int]


class Padded:
    """The B rows of a replay, as CONTRACT.md's symbols name them."""

    def __init__(self, case: Case, replay: Replay) -> None:
        setup, real = case.setup, list(replay.requests)
        self.N, self.K, self.p, self.W = setup.num_draft_tokens, setup.index_topk, setup.page_size, setup.table_width
        self.B = min(bucket for bucket in setup.buckets if bucket >= len(real))
        self.s = [setup.fill_seq_len] * self.B
        self.q = [replay.padded_pool_row] * self.B
        self.a = [replay.padded_accept_len] * self.B
        for b, request in enumerate(real):
            self.s[b], self.q[b], self.a[b] = request.seq_len, request.pool_row, request.accept_len
        self.L = [s + self.N for s in self.s] if replay.mode is Mode.TARGET_VERIFY else list(self.s)


def _expanded_rows(given: Padded, mode: Mode) -> Iterator[tuple[int, int]]:
    """``(b, length)`` of every row, counted down from the last token of each request."""
    for b in range(given.B):
        if mode is Mode.DECODE:
            yield b, given.s[b]
            continue
        count = given.a[b] if mode is Mode.DRAFT_EXTEND else given.N
        for left in reversed(range(count)):
            yield b, given.L[b] - left if given.L[b] > left else 0


def _segments(lens: list[int], num_sms: int) -> list[tuple[int, int]]:
    """Deal the 256-token segments, in order, to the SMs: the first ``total % num_sms`` of them get one more."""
    work = [(row, segment) for row, length in enumerate(lens) for segment in range((length + 255) // 256)]
    shares = [len(work) // num_sms + (sm < len(work) % num_sms) for sm in range(num_sms)]
    starts = [0, *accumulate(shares)]
    return [work[start] if start < len(work) else (len(lens), 0) for start in starts]


def live_cells(case: Case, index: int) -> Cells:
    """Every cell that the replay must define, with its value."""
    replay, setup = case.replays[index], case.setup
    given, mode = Padded(case, replay), replay.mode
    rows = list(_expanded_rows(given, mode))
    lines: dict[str, list[int]] = {"cache_seqlens": given.L, "cu_seqlens_k": [0, *accumulate(given.L)]}
    lines["nsa_seqlens_expanded"] = [length for _, length in rows]
    lines["nsa_cache_seqlens"] = [min(given.K, length) for _, length in rows]
    lines["nsa_cu_seqlens_k"] = [0, *accumulate(lines["nsa_cache_seqlens"])]
    cells = {(name, 0, column): value for name, values in lines.items() for column, value in enumerate(values)}
    for r, (b, _) in enumerate(rows):
        for c in range(given.W):
            value = slot(setup, replay, given.q[b], c)
            if c < given.L[b]:
                cells["page_table_1", r, c] = value
            if c % given.p == 0 and c < given.L[b]:
                cells["real_page_table", r, c // given.p] = (value - value % given.p) // given.p
    return cells | _optional_cells(case, given, mode, lines["nsa_seqlens_expanded"])


def _optional_cells(case: Case, given: Padded, mode: Mode, per_row: list[int]) -> Cells:
    cells: Cells = {}
    if not per_row:
        return cells
    own = case.setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY
    if own:
        cells |= {("paged_mqa_ctx_lens", b, j): given.s[b] + given.N for b in range(given.B) for j in range(given.N)}
    elif case.setup.ctx_lens is not CtxLens.ABSENT:
        cells |= {("paged_mqa_ctx_lens", row, 0): length for row, length in enumerate(per_row)}
    if case.setup.schedule:
        entries = _segments(given.L if own else per_row, case.setup.num_sms)
        cells |= {("paged_mqa_schedule", i, side): entry[side] for i, entry in enumerate(entries) for side in (0, 1)}
    return cells


def is_slack(case: Case, index: int, extent: Extent, block: int, cell: tuple[str, int, int]) -> bool:
    """Whether a table cell that is not live lies within the write extent."""
    buffer, row, column = cell
    given, mode = Padded(case, case.replays[index]), case.replays[index].mode
    rows = list(_expanded_rows(given, mode))
    if buffer not in ("page_table_1", "real_page_table") or row >= len(rows):
        return False
    page = given.p if buffer == "real_page_table" else 1
    if column * page >= given.W:
        return False
    if extent is Extent.FULL:
        return True
    if extent is Extent.MAX:
        return any(column * page < length for length in given.L)
    first_of_block = column // block * block
    return extent is Extent.ROW and first_of_block * page < given.L[rows[row][0]]


def table_value(case: Case, index: int, cell: tuple[str, int, int]) -> int:
    """What the formula gives for any cell of a defined table row, live or not."""
    buffer, row, column = cell
    replay = case.replays[index]
    given = Padded(case, replay)
    owner, _ = list(_expanded_rows(given, replay.mode))[row]
    page = given.p if buffer == "real_page_table" else 1
    return slot(case.setup, replay, given.q[owner], column * page) // page


@pytest.mark.parametrize("seed", range(10))
def test_the_oracle_agrees_with_the_second_statement(seed: int, random_case: Callable[[Random], Case]) -> None:
    rng = Random(seed)
    for _ in range(40):
        case = random_case(rng)
        for index, replay in enumerate(case.replays):
            extent, block = rng.choice(list(Extent)), rng.choice([1, 3, 16, 128])
            expected = expect(case, index, extent, block)
            found = {
                (name, r, c): row.values[c]
                for name, rows in expected.buffers.items()
                for r, row in enumerate(rows)
                for c in range(row.live)
            }
            assert found == live_cells(case, index), case
            assert expected.defined_rows == len(list(_expanded_rows(Padded(case, replay), replay.mode)))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("extent", list(Extent))
def test_every_cell_has_the_region_of_the_second_statement(
    seed: int, extent: Extent, random_case: Callable[[Random], Case]
) -> None:
    rng = Random(seed)
    for _ in range(4):
        case = random_case(rng)
        index, block = rng.randrange(len(case.replays)), rng.choice([1, 3, 16, 128])
        expected, live = expect(case, index, extent, block), live_cells(case, index)
        for name, shape in shapes(case.setup, case.replays[index].mode, batch(case, index).bucket).items():
            for row in range(shape.rows):
                for column in {0, 1, shape.columns - 1, *(rng.randrange(shape.columns) for _ in range(12))}:
                    if column >= shape.columns:
                        continue
                    cell = (name, row, column)
                    region = expected.region(*cell)
                    if cell in live:
                        assert region is Region.LIVE, (case, cell)
                    elif is_slack(case, index, extent, block, cell):
                        assert region is Region.SLACK, (case, cell)
                        assert expected.buffers[name][row].values[column] == table_value(case, index, cell)
                    else:
                        assert region is Region.FRAME, (case, cell)


def test_the_expectation_of_a_replay_does_not_depend_on_the_replays_before_it(
    random_case: Callable[[Random], Case],
) -> None:
    rng = Random(11)
    for _ in range(50):
        case = random_case(rng)
        for index, replay in enumerate(case.replays):
            assert expect(case, index) == expect(Case(case.setup, (replay,)), 0)
