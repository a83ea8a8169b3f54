"""What is timed is what it says it is: bytes by hand, the order of repetitions, what a call does on a GPU."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from nsa_verify.core.case import Mode
from nsa_verify.core.implementation import Extent
from nsa_verify.core.oracle import schedule
from nsa_verify.core.registry import find
from nsa_verify.device.timing import Floor, Size, Subject, measure, prepared, refresh_of, work

SIZE = Size(batch_size=3, table_width=40, longest=20, num_draft_tokens=2, page_size=16, num_steps=2)


@pytest.mark.parametrize("mode", list(Mode))
def test_live_bytes_by_hand(mode: Mode) -> None:
    given = work(SIZE, mode, "cpu", seed=1)
    lengths = given.inputs.seq_lens.tolist()
    assert all(10 <= it <= 20 for it in lengths)
    cells = 3 * 3  # lengths, pool rows, accept lengths
    for length, accept in zip(lengths, given.inputs.accept_lens.tolist(), strict=True):
        rows = 1 if mode is Mode.DECODE else accept
        assert 1 <= rows <= 2
        columns = length + (2 if mode is Mode.TARGET_VERIFY else 0)
        cells += columns + 2 * rows * (columns + -(-columns // 16)) + 2 * 3 * rows
    cells += 2 * 2 * 4  # cache_seqlens and cu_seqlens_k with its 0, and the 0 of nsa_cu_seqlens_k, of both steps
    assert given.live_bytes == 4 * cells


@pytest.mark.parametrize("with_schedule", [False, True])
@pytest.mark.parametrize("extent", list(Extent))
@pytest.mark.parametrize("mode", list(Mode))
def test_moved_bytes_cell_by_cell(mode: Mode, extent: Extent, with_schedule: bool) -> None:
    given = work(replace(SIZE, table_width=36, longest=36, schedule=with_schedule), mode, "cpu", seed=14)
    lengths = [it + (2 if mode is Mode.TARGET_VERIFY else 0) for it in given.inputs.seq_lens.tolist()]
    assert (max(lengths) > 36) == (mode is Mode.TARGET_VERIFY), "columns are clipped, in one mode by every extent"
    read, written, rows = 3 * 3, 3 + 4 + 1, 0
    for length, accept in zip(lengths, given.inputs.accept_lens.tolist(), strict=True):
        block = next(it for it in range(0, 64, 8) if it >= length)
        reach = {Extent.LIVE: length, Extent.ROW: block, Extent.MAX: max(lengths), Extent.FULL: 36}[extent]
        columns = [it for it in range(36) if it < reach]
        read += len(columns)
        for _ in range(1 if mode is Mode.DECODE else accept):
            rows += 1
            written += len(columns) + len({it // 16 for it in columns})
    written += 3 * rows
    if with_schedule:
        written += 2 * 133 + (3 * 2 if mode is Mode.TARGET_VERIFY else 0)
    assert given.moved_bytes(extent, block=8) == 4 * (read + 2 * written)
    assert extent is not Extent.LIVE or given.live_bytes == given.moved_bytes(extent)


@pytest.mark.parametrize("mode", list(Mode))
def test_the_schedule_is_refreshed_too(mode: Mode) -> None:
    size = replace(SIZE, longest=40, schedule=True)
    assert str(size) == "B 3 W 40 to 40 S 2 with schedule"
    given = work(size, mode, "cpu")
    refresh_of(find("vectorized"), given)()
    lengths = given.inputs.seq_lens.tolist()
    for step in given.steps:
        assert step.paged_mqa_ctx_lens is not None
        assert step.paged_mqa_schedule is not None
        expected = [[it + 2, it + 2] for it in lengths]
        if mode is not Mode.TARGET_VERIFY:
            expected = [[it] for it in step.nsa_seqlens_expanded.tolist()]
        assert step.paged_mqa_ctx_lens.tolist() == expected
        rows = int(given.inputs.accept_lens.sum()) if mode is Mode.DRAFT_EXTEND else len(expected)
        entries = schedule([it[0] for it in expected[:rows]], 132)
        assert step.paged_mqa_schedule.tolist() == [list(it) for it in entries]


def test_the_work_is_right_for_an_implementation() -> None:
    given = work(SIZE, Mode.TARGET_VERIFY, "cpu")
    refresh_of(find("vectorized"), given)()
    for step in given.steps:
        assert step.cache_seqlens.tolist() == [it + 2 for it in given.inputs.seq_lens.tolist()]
        assert step.page_table_1.any()
        assert step.real_page_table.shape == (6, 3)


def test_repetitions_are_interleaved_and_begin_in_turn() -> None:
    order: list[str] = []
    subjects = [Subject(name, lambda name=name: order.append(name)) for name in "abc"]  # type: ignore[misc]
    measure(subjects, "cpu", repetitions=3, calls=1)
    assert "".join(order) == "abcbcacab"
    assert [len(it.host_us) for it in subjects] == [3, 3, 3]
    assert not any(it.node_us for it in subjects)


def test_the_floor_is_a_node_and_the_bytes() -> None:
    assert Floor(0.5, 4e6).us(8_000_000) == 2.5


@pytest.mark.gpu
def test_what_a_call_does_is_counted() -> None:
    source = torch.ones(1000, device="cuda")
    target = torch.empty_like(source)

    def two() -> None:
        torch.add(source, 1, out=target)
        torch.mul(target, 2, out=target)

    subject = prepared("two", two, True, "cuda")
    assert (subject.launches, subject.syncs, subject.allocations) == (2, 0, 0)
    measure([subject], "cuda", repetitions=3)
    assert len(subject.node_us) == 3
    assert all(it > 0.1 for it in subject.node_us)
    waits = prepared("waits", lambda: source.sum().item(), False, "cuda")
    assert (waits.launches, waits.graph) == (0, None)
    assert waits.syncs >= 1
    assert waits.allocations >= 1
