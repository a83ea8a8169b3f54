"""``req_to_token`` as a formula: legal slots, aligned where it says so, and few collisions to hide a wrong index."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nsa_verify import Replay, Setup, SlotKind
from nsa_verify.core.case import PAGE_SIZES, SLOT_MODULUS, row_pages, row_slots, slot

KINDS = list(SlotKind)


def _corners(setup: Setup) -> Iterator[tuple[int, int]]:
    for row in (0, 1, setup.pool_rows // 2, setup.pool_rows - 1):
        for column in (0, 1, setup.page_size, setup.pool_width // 2, setup.pool_width - 1):
            yield row, column


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page", PAGE_SIZES)
@pytest.mark.parametrize("seed", [0, 1, 65_535])
def test_slots_are_non_negative_int32_up_to_the_largest_pool(kind: SlotKind, page: int, seed: int) -> None:
    setup = Setup(page_size=page, pool_rows=1 << 20, pool_width=1 << 20, table_width=16)
    replay = Replay(slots=kind, pool_seed=seed)
    for row, column in _corners(setup):
        value = slot(setup, replay, row, column)
        assert 0 <= value < 2**31, (row, column, value)


def test_intermediate_products_fit_the_64_bit_arithmetic_of_the_device_side() -> None:
    setup = Setup(pool_rows=1 << 20, pool_width=(1 << 20) + 64, table_width=16)
    row, column, seed = setup.pool_rows - 1, setup.pool_width - 1, 65_535
    scattered = row * 1_103_515_245 + column * 1_597_334_677 + seed * 747_796_405
    assert slot(setup, Replay(slots=SlotKind.SCATTERED, pool_seed=seed), row, column) == scattered % SLOT_MODULUS
    assert scattered < 2**53


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page", PAGE_SIZES)
@pytest.mark.parametrize("rows", [1, 1 << 20])
def test_rows_are_slot_for_slot_those_of_the_formula(kind: SlotKind, page: int, rows: int) -> None:
    for width in (1, page, 2 * page - 1, 300, 700):
        setup = Setup(
            page_size=page, pool_rows=rows, pool_width=max(width, (1 << 20) * (rows > 1)), table_width=1, fill_seq_len=0
        )
        for seed, row in ((0, 0), (9, rows - 1), (65_535, rows // 2)):
            replay = Replay(slots=kind, pool_seed=seed)
            expected = tuple(slot(setup, replay, row, column) for column in range(width))
            assert row_slots(setup, replay, row, width) == expected
            assert row_pages(setup, replay, row, width) == tuple(value // page for value in expected[::page])


@pytest.mark.parametrize("page", PAGE_SIZES)
def test_paged_slots_are_page_aligned_and_consecutive_within_a_page(page: int) -> None:
    setup = Setup(page_size=page, pool_rows=3, pool_width=300, table_width=16)
    for row in range(3):
        values = row_slots(setup, Replay(slots=SlotKind.PAGED, pool_seed=7), row, 300)
        for column, value in enumerate(values):
            assert value % page == column % page
            assert value // page == values[column - column % page] // page


@pytest.mark.parametrize("page", [page for page in PAGE_SIZES if page > 1])
def test_scattered_slots_are_not_page_aligned(page: int) -> None:
    setup = Setup(page_size=page, pool_rows=1, pool_width=300, table_width=16)
    values = row_slots(setup, Replay(slots=SlotKind.SCATTERED, pool_seed=1), 0, 300)
    assert any(values[column] % page for column in range(0, 300, page))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page", PAGE_SIZES)
def test_no_slot_is_used_twice_in_a_pool(kind: SlotKind, page: int) -> None:
    setup = Setup(page_size=page, pool_rows=40, pool_width=700, table_width=16)
    replay = Replay(slots=kind, pool_seed=3)
    values = [value for row in range(40) for value in row_slots(setup, replay, row, 700)]
    if kind is SlotKind.PAGED:  # the last page of a row may be cut short, never shared
        assert len({value // page for value in values}) == 40 * -(-700 // page)
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_changes_the_first_page_of_every_row(kind: SlotKind) -> None:
    setup = Setup(page_size=16, pool_rows=4, pool_width=64, table_width=16)
    for row in range(4):
        first = {row_slots(setup, Replay(slots=kind, pool_seed=seed), row, 1) for seed in range(5)}
        assert len(first) == 5


def test_sequential_slots_can_be_read_by_a_person() -> None:
    setup = Setup(pool_rows=2, pool_width=32)
    assert row_slots(setup, Replay(), 0, 4) == (1000, 1001, 1002, 1003)
    assert row_slots(setup, Replay(pool_seed=1), 1, 2) == (2032, 2033)
