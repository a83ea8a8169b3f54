"""Does the vectorised form say what the oracle says, and would its comparison notice if a buffer did not?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import pytest
import torch
from helpers import draw_many
from scale import vectorised
from scale.vectorised import Expected, Mismatch, expectation, schedule
from torch import Tensor

from nsa_verify import Case, Extent, Mode, Replay, Request, Setup
from nsa_verify.core.buffers import FROZEN, TABLES, shapes
from nsa_verify.core.oracle import Region, batch, expect
from nsa_verify.device.pool import slot_table
from nsa_verify.strategies import Limits, cases

POISON = -77
GAP = 3
"""Columns between one row and the next."""
CASES = 100
"""Per mode."""


class Image(NamedTuple):
    """What the oracle wants of one replay, as buffers int32 ``[rows, columns]`` whose frame is poison."""

    case: Case
    replay: int
    extent: Extent
    block: int
    buffers: dict[str, Tensor]

    def expected(self, form: Any = vectorised) -> Expected:
        """The same, as the vectorised form has it."""
        given = batch(self.case, self.replay)
        inputs = (torch.tensor(it) for it in (given.seq_lens, given.pool_rows, given.accept_lens))
        return cast("Expected", form.expectation(given.mode, *inputs, self.case.setup))

    def mismatches(self, expected: Expected, cells: int = 1 << 24, form: Any = vectorised) -> dict[str, Mismatch]:
        """What the comparison finds, by buffer."""
        setup = self.case.setup
        pool = slot_table(setup, self.case.replays[self.replay], "cpu")
        found = {}
        for name, got in self.buffers.items():
            if name in TABLES:
                how = (setup, POISON, self.extent, self.block, cells)
                it = form.compare_table(name, got, expected, lambda row, column: pool[row][:, column], *how)
            else:
                it = form.compare_small(name, got, expected.small.get(name), POISON)
            if it:
                found[name] = it
        return found


def _image(case: Case, index: int, extent: Extent, block: int, slack_written: bool) -> Image:
    wanted = expect(case, index, extent, block)
    buffers = {}
    for name, shape in shapes(case.setup, wanted.mode, wanted.bucket).items():
        if name not in FROZEN:
            buffers[name] = torch.full((shape.rows, shape.columns + GAP * (name in TABLES)), POISON, dtype=torch.int32)
            for at, row in enumerate(wanted.buffers.get(name, ())):
                written = row.extent if slack_written else row.live
                buffers[name][at, :written] = torch.tensor(row.values[:written], dtype=torch.int32)
    return Image(case, index, extent, block, buffers)


@cache
def _drawn(mode: Mode) -> list[Case]:
    limits = replace(Limits.short(), width=160, long_width=2_000, top_k_width=400, pool_cells=8_000, many_rows=64)
    return draw_many(cases([mode], limits=limits), CASES, seeded=1)


def _images(mode: Mode, extents: tuple[Extent, ...]) -> Iterator[Image]:
    for number, case in enumerate(_drawn(mode)):
        for index in range(len(case.replays)):
            for extent in extents:
                yield _image(case, index, extent, (1, 16, 128)[number % 3], slack_written=number % 2 == 0)


@pytest.mark.parametrize("mode", Mode)
def test_it_agrees_with_the_oracle_on_drawn_cases(mode: Mode) -> None:
    seen = set()
    for image in _images(mode, (Extent.LIVE,)):
        expected = image.expected()
        wanted = expect(image.case, image.replay)
        assert image.mismatches(expected) == {}, image
        assert {*expected.small} == {*wanted.buffers} - {*TABLES}
        assert len(expected.owners) == wanted.defined_rows
        for name, values in expected.small.items():
            assert values.tolist() == [list(row.values) for row in wanted.buffers[name]], (image, name)
        seen |= {*wanted.buffers}
    optional = {"paged_mqa_ctx_lens", "paged_mqa_schedule"}
    assert seen == {*shapes(Setup(), mode, 1)} - {*FROZEN} | optional


@pytest.mark.parametrize("extent", [it for it in Extent if it is not Extent.LIVE])
@pytest.mark.parametrize("mode", Mode)
def test_slack_ends_where_the_oracle_ends_it(mode: Mode, extent: Extent) -> None:
    for image in list(_images(mode, (extent,)))[:40]:
        expected, wanted = image.expected(), expect(image.case, image.replay, extent, image.block)
        assert image.mismatches(expected, cells=64) == {}, image
        for name in TABLES if wanted.defined_rows else ():
            last = wanted.defined_rows - 1
            end = wanted.buffers[name][last].extent
            image.buffers[name][last, end] = 0
            assert image.mismatches(expected, cells=64) == {name: Mismatch(name, last, end, POISON, 0)}
            image.buffers[name][last, end] = POISON


def _example() -> Image:
    """Two requests, one without an accepted token, and a padded row; slack up to the longest, not written."""
    setup = Setup(
        num_draft_tokens=3,
        index_topk=8,
        page_size=16,
        table_width=40,
        pool_rows=2,
        pool_width=48,
        buckets=(4,),
        schedule=True,
    )
    requests = (Request(35, 1, 2), Request(20, 0, 0), Request(17, 0, 3))
    case = Case(setup, (Replay(Mode.DRAFT_EXTEND, requests, padded_accept_len=3),))
    return _image(case, 0, Extent.MAX, 1, slack_written=False)


PLANTED = [
    ("cache_seqlens", 0, 1, Region.LIVE),
    ("cu_seqlens_k", 0, 4, Region.LIVE),
    ("nsa_seqlens_expanded", 0, 7, Region.LIVE),
    ("nsa_cache_seqlens", 0, 0, Region.LIVE),
    ("nsa_cu_seqlens_k", 0, 0, Region.LIVE),
    ("nsa_cu_seqlens_k", 0, 12, Region.FRAME),
    ("paged_mqa_schedule", 4, 1, Region.LIVE),
    ("page_table_1", 1, 34, Region.LIVE),
    ("page_table_1", 2, 17, Region.SLACK),
    ("page_table_1", 0, 35, Region.FRAME),
    ("page_table_1", 8, 0, Region.FRAME),
    ("page_table_1", 11, 42, Region.FRAME),
    ("real_page_table", 4, 1, Region.LIVE),
    ("real_page_table", 7, 2, Region.SLACK),
    ("real_page_table", 7, 3, Region.FRAME),
]


@pytest.mark.parametrize("cells", [1, 100, 1 << 24])
@pytest.mark.parametrize(("buffer", "row", "column", "region"), PLANTED)
def test_a_planted_cell_is_the_one_that_is_reported(
    buffer: str, row: int, column: int, region: Region, cells: int
) -> None:
    image = _example()
    expected = image.expected()
    assert image.mismatches(expected, cells) == {}
    wanted = expect(image.case, 0, image.extent, image.block)
    assert wanted.region(buffer, row, column) is region
    value = POISON if region is Region.FRAME else wanted.buffers[buffer][row].values[column]
    image.buffers[buffer][-1, -1] = 5  # one more, behind it
    image.buffers[buffer][row, column] = value + 1
    assert image.mismatches(expected, cells) == {buffer: Mismatch(buffer, row, column, value, value + 1)}


def test_the_first_of_many_wrong_cells_is_reported() -> None:
    image = _example()
    table = image.buffers["page_table_1"]
    table[3, 7], table[3, 41], table[2, 42], table[9, 0] = 5, 5, 5, 5
    assert image.mismatches(image.expected())["page_table_1"] == Mismatch("page_table_1", 2, 42, POISON, 5)


class Fault(NamedTuple):
    """A change to the text of the vectorised form, and the cell of the example where it first shows."""

    old: str
    new: str
    cell: Mismatch


FAULTS = {
    "no clamp at 0": Fault("clamp(min=0)", "clamp(min=-9)", Mismatch("nsa_seqlens_expanded", 0, 5, -1, 0)),
    "no top-k minimum": Fault("max=setup.index_topk", "max=99", Mismatch("nsa_cache_seqlens", 0, 0, 34, 8)),
    "sums of what is not cut": Fault("_sums(clamped)", "_sums(lengths)", Mismatch("nsa_cu_seqlens_k", 0, 1, 34, 8)),
    "rows of the neighbour": Fault("rows.long()", "rows.long().roll(1)", Mismatch("page_table_1", 0, 0, 1000, 1048)),
    "neighbouring columns": Fault("column * page", "column", Mismatch("real_page_table", 0, 1, 65, 66)),
    "remainder to one SM": Fault("clamp(max=more)", "clamp(max=1)", Mismatch("paged_mqa_schedule", 2, 0, 3, 4)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_formula_is_no_agreement(fault: Fault) -> None:
    text = Path(str(vectorised.__file__)).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    form = ModuleType("form")
    exec(text.replace(fault.old, fault.new), form.__dict__)
    image = _example()
    found = image.mismatches(image.expected(form), form=form)
    assert found[fault.cell.buffer] == fault.cell


def test_vectors_of_the_schedule() -> None:
    assert schedule(torch.tensor([1000, 0, 300, 513]), 4).tolist() == [[0, 0], [0, 3], [2, 1], [3, 1], [4, 0]]
    assert schedule(torch.tensor([1, 1]), 5).tolist() == [[0, 0], [1, 0], [2, 0], [2, 0], [2, 0], [2, 0]]
    assert schedule(torch.tensor([0, 0, 0]), 2).tolist() == [[3, 0], [3, 0], [3, 0]]


def test_a_sum_that_is_no_int32_is_refused() -> None:
    setup = Setup(pool_width=1 << 20, index_topk=1 << 20)
    long = torch.full((2049,), 1 << 20)
    with pytest.raises(ValueError, match=r"cu_seqlens_k reaches 2148532224"):
        expectation(Mode.DECODE, long, torch.zeros(2049), torch.zeros(2049), setup)
