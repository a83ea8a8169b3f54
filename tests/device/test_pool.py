"""``req_to_token`` on the device is the formula of the core, in memory whose every other element is poison."""

from __future__ import annotations

import random

import pytest
import torch

from nsa_verify import Replay, Setup, SlotKind
from nsa_verify.core.case import PAGE_SIZES, SLOT_MODULUS, slot
from nsa_verify.device.layout import GUARD, is_poison
from nsa_verify.device.pool import GAP, Difference, Pool, slot_table

LARGEST_SEED = 65_535
SHAPES = [(1, 1), (3, 200), (7, 129), (2048, 300), (3, 1 << 20), (1 << 20, 3)]
"""Both axes reach the largest row and column there is, though not in one table: that one would take 16 GiB."""


@pytest.mark.parametrize("slots", SlotKind)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_table_is_the_formula(rows: int, width: int, slots: SlotKind) -> None:
    rng = random.Random(f"{rows} {width} {slots}")
    for seed in (0, 1, LARGEST_SEED):
        page_size = rng.choice(PAGE_SIZES)
        setup = Setup(pool_rows=rows, pool_width=width, page_size=page_size, table_width=1, fill_seq_len=0)
        replay = Replay(slots=slots, pool_seed=seed)
        table = slot_table(setup, replay, "cpu")
        assert table.shape == (rows, width)
        corners = [(0, 0), (rows - 1, width - 1), (rows - 1, 0), (0, width - 1)]
        cells = corners + [(rng.randrange(rows), rng.randrange(width)) for _ in range(200)]
        assert [int(table[cell]) for cell in cells] == [slot(setup, replay, *cell) for cell in cells]
        assert 0 <= int(table.min()) <= int(table.max()) < SLOT_MODULUS


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("slots", SlotKind)
def test_production_sized_coordinates(slots: SlotKind, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 rows of a million columns: the table's arithmetic, on some of its rows and columns only."""
    rng = random.Random(f"{slots} {page_size}")
    setup = Setup(pool_rows=2048, pool_width=1 << 20, page_size=page_size)
    picked = {
        setup.pool_rows: [0, 1, 2046, 2047, *rng.sample(range(2048), 20)],
        setup.pool_width: [0, 1, page_size - 1, page_size, (1 << 20) - 1, *rng.sample(range(1 << 20), 40)],
    }
    monkeypatch.setattr(torch, "arange", lambda length, **options: torch.tensor(picked[length], **options))
    for seed in (0, 3, LARGEST_SEED):
        replay = Replay(slots=slots, pool_seed=seed)
        wanted = [
            [slot(setup, replay, row, column) for column in picked[setup.pool_width]] for row in picked[setup.pool_rows]
        ]
        assert slot_table(setup, replay, "cpu").tolist() == wanted


def test_gaps_and_guards_are_poison() -> None:
    setup = Setup(pool_rows=3, pool_width=20, pool_row_stride=23)
    pool = Pool(setup, "cpu")
    assert is_poison(GAP)
    pool.fill(Replay())
    memory = pool.table.as_strided((2 * GUARD + 3 * 23,), (1,), 0)
    rows = memory[GUARD:-GUARD].view(3, 23)
    assert rows[:, :20].tolist() == slot_table(setup, Replay(), "cpu").tolist()
    assert set(rows[:, 20:].flatten().tolist()) == {GAP}
    assert set(memory[:GUARD].tolist()) == set(memory[-GUARD:].tolist()) == {GAP}
    assert (pool.table.stride(), pool.table.storage_offset(), pool.table.dtype) == ((23, 1), GUARD, torch.int32)


def test_the_table_is_poison_before_it_is_filled() -> None:
    assert set(Pool(Setup(), "cpu").table.flatten().tolist()) == {GAP}


def test_filling_again_changes_the_content_and_not_the_address() -> None:
    setup = Setup(pool_rows=2, page_size=16)
    pool = Pool(setup, "cpu")
    address = pool.table.data_ptr()
    for replay in (
        Replay(),
        Replay(pool_seed=3),
        Replay(slots=SlotKind.PAGED),
        Replay(slots=SlotKind.SCATTERED),
        Replay(),
    ):
        pool.fill(replay)
        assert pool.table.tolist() == slot_table(setup, replay, "cpu").tolist()
        assert not pool.mutated()
        assert pool.difference() is None
    assert pool.table.data_ptr() == address


def test_a_change_is_seen_and_undone() -> None:
    pool = Pool(Setup(pool_rows=2), "cpu")
    pool.fill(Replay())
    pool.table[1, 2:5] = 8
    assert pool.mutated()
    assert pool.difference() == Difference((1, 2), 1034, 8, 3)
    pool.table.t_()
    pool.restore()
    assert not pool.mutated()
    assert pool.table.shape == (2, 32)
