"""What is timed is what it says it is: bytes by hand, the order of repetitions, what a call does on a GPU."""

from __future__ import annotations

import ctypes
import os
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace as replace_fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import draw_many
from msgspec.structs import replace

from nsa_verify.core.buffers import TABLES, alias_of, shapes
from nsa_verify.core.case import Case, Mode
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, MetadataBuffers, ReplayInputs
from nsa_verify.core.oracle import Expectation, batch, expect, schedule
from nsa_verify.core.registry import find
from nsa_verify.device import timing
from nsa_verify.device.answers import POISON, Answers, WrongResult
from nsa_verify.device.health import DeviceDied
from nsa_verify.device.pool import slot_table
from nsa_verify.device.timing import (
    NODES,
    Compiled,
    Floor,
    Merged,
    Size,
    Subject,
    compilations,
    is_no_memory,
    measure,
    prepared,
    refresh_of,
    work,
)
from nsa_verify.strategies import Limits, cases

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
def test_extent_bytes_cell_by_cell(mode: Mode, extent: Extent, with_schedule: bool) -> None:
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
    assert given.extent_bytes(extent, block=8) == 4 * (read + 2 * written)
    assert extent is not Extent.LIVE or given.live_bytes == given.extent_bytes(extent)


@pytest.mark.parametrize("mode", list(Mode))
def test_one_long_request_among_short_ones(mode: Mode) -> None:
    size = replace(SIZE, rest=5)
    assert str(size) == "B 3 W 40 one of 20 rest 5 S 2"
    given = work(size, mode, "cpu", seed=3)
    assert given.inputs.seq_lens.tolist() == [20, 5, 5]
    refresh = refresh_of(find("vectorized"), given)
    prepared("right", refresh, False, "cpu", Answers(given.inputs, given.steps, given.setup).check)
    assert work(replace(size, schedule=True), mode, "cpu", seed=3).inputs.accept_lens.equal(given.inputs.accept_lens)


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


def answers_of(case: Case, index: int) -> tuple[Answers, MetadataBuffers, Expectation]:
    """The form's answers to a replay, one step of buffers, and what the oracle says of it."""
    setup, replay, given = case.setup, case.replays[index], batch(case, index)
    lengths = torch.tensor(given.seq_lens, dtype=torch.int32)
    inputs = ReplayInputs(
        mode=replay.mode,
        batch_size=given.bucket,
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        req_pool_indices=torch.tensor(given.pool_rows),
        req_to_token=slot_table(setup, replay, "cpu").int(),
        accept_lens=torch.tensor(given.accept_lens, dtype=torch.int32),
    )
    made: dict[str, torch.Tensor] = {}
    for name, shape in shapes(setup, replay.mode, given.bucket).items():
        alias = alias_of(setup, replay.mode, name)
        size = shape if name in (*TABLES, *OPTIONAL_OUTPUTS) else (shape.columns,)
        made[name] = made[alias].view(size) if alias else torch.zeros(size, dtype=torch.int32)
    step = MetadataBuffers(**made)
    return Answers(inputs, [step], setup), step, expect(case, index)


def fill(step: MetadataBuffers, wanted: Expectation, spoilt: tuple[str, int, int] | None = None) -> None:
    """What the oracle wants, and nothing else; one too many in the ``spoilt`` buffer, row and column."""
    for name, rows in wanted.buffers.items():
        for row, it in enumerate(rows):
            line(step, name, row)[: len(it.values)] = torch.tensor(it.values)
    if spoilt is not None:
        line(step, *spoilt[:2])[spoilt[2]] += 1


def line(step: MetadataBuffers, name: str, row: int) -> torch.Tensor:
    """One row of a buffer; 1-D buffers are row 0."""
    buffer: torch.Tensor = getattr(step, name)
    return buffer[row] if buffer.ndim == 2 else buffer


@pytest.mark.parametrize("cells", [1, 1 << 24])
@pytest.mark.parametrize("mode", list(Mode))
def test_answers_are_those_of_the_oracle(mode: Mode, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_verify.device.answers.CELLS", cells)
    for case in draw_many(cases([mode], limits=replace_fields(Limits.short(), width=160, top_k_width=400)), 60):
        for index in range(len(case.replays)):
            answers, step, wanted = answers_of(case, index)
            answers.check(partial(fill, step, wanted))
            for name, rows in wanted.buffers.items():
                row = next((row for row, it in enumerate(rows) if it.live), None)
                if row is not None:
                    with pytest.raises(WrongResult, match=r" must be \d+ and is \d+$"):
                        answers.check(partial(fill, step, wanted, (name, row, rows[row].live - 1)))


@pytest.mark.parametrize("mode", list(Mode))
def test_doing_nothing_is_seen(mode: Mode) -> None:
    given = work(replace(SIZE, longest=40, schedule=True), mode, "cpu")
    refresh = refresh_of(find("vectorized"), given)
    answers = Answers(given.inputs, given.steps, given.setup)
    prepared("right", refresh, False, "cpu", answers.check)
    with pytest.raises(WrongResult, match=rf"cache_seqlens\[0\] of step 0 must be \d+ and is {POISON}, which it was "):
        prepared("nothing", lambda: None, False, "cpu", answers.check)


def test_what_raises_while_it_is_timed_is_timed_no_more() -> None:
    subjects = [Subject("raises", [].pop), Subject("works", lambda: None)]
    measure(subjects, "cpu", repetitions=3, calls=1)
    assert [it.error for it in subjects] == ["IndexError: pop from empty list", ""]
    assert [len(it.host_us) for it in subjects] == [0, 3]


def raised(error: Exception, before: Exception | None = None) -> Exception:
    """What is caught where ``error`` is raised while ``before`` is handled."""
    try:
        if before is None:
            raise error
        try:
            raise before
        except type(before):
            raise error  # noqa: B904 - that is how a capture ends which memory lacked in
    except type(error) as caught:
        return caught


def test_want_of_memory_is_known_by_what_raised_or_what_it_says() -> None:
    starved = (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    )
    assert all(is_no_memory(raised(it)) for it in starved)
    assert is_no_memory(raised(RuntimeError("operation failed due to a previous error"), starved[1]))
    for error in (ValueError("out of memory"), RuntimeError("illegal address"), DeviceDied("out of memory")):
        assert not is_no_memory(raised(error))
    assert not is_no_memory(raised(DeviceDied("illegal address"), starved[1]))


def test_more_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * (3 * 40 + 2 * (3 + 4 + 3 + 4 + 3 * 40 + 3 * 3 + 4 + 4))
    for free, is_refused in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(timing, "_free_bytes", lambda _, free=free: free)
        if is_refused:
            with pytest.raises(
                MemoryError, match=r"^it needs 0\.0 GB and 0\.0 GB are free; ask for fewer requests or "
            ):
                work(SIZE, Mode.DECODE, "cpu")
        else:
            work(SIZE, Mode.DECODE, "cpu")


def test_free_memory_is_not_all_memory() -> None:
    assert 0 < timing._free_bytes("cpu") < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Kernel:
    """As much of Triton's ``JITFunction`` as is seen of a launch: a form for each constant."""

    __name__ = "kernel"

    def __init__(self) -> None:
        self.forms: dict[int, object] = {}

    def run(self, constant: int) -> object:
        """Launch it."""
        return self.forms.setdefault(constant, object())


def test_every_form_of_a_kernel_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.runtime.jit.JITFunction", Kernel)
    kernels = Kernel(), Kernel()
    found: Compiled = {}
    for constants in ((1, 1), (1, 2), (1, 1)):
        with compilations(found):
            for kernel, constant in zip(kernels, constants, strict=True):
                assert kernel.run(constant) is kernel.forms[constant]
    kernels[0].run(3)
    assert sorted(kernels.index(kernel) for kernel, _ in found.values()) == [0, 1, 1]
    seen = prepared("two", lambda: [kernel.run(1) for kernel in kernels], False, "cpu").compiled
    assert list(seen) == [id(kernel.forms[1]) for kernel in kernels]


class Graph:
    """As much of ``torch.cuda.CUDAGraph`` as is captured into, counted and replayed; a node for each ``launch``."""

    recording: Graph | None = None

    def __init__(self, keep_graph: bool = False) -> None:
        assert keep_graph, "else its nodes cannot be counted"
        self.nodes: list[int] = []
        self.is_instantiated, self.replays = False, 0

    @contextmanager
    def record(self) -> Iterator[None]:
        """Capture what is launched meanwhile."""
        Graph.recording = self
        try:
            yield
        finally:
            Graph.recording = None

    def raw_cuda_graph(self) -> int:
        """No address, but the number of nodes."""
        return len(self.nodes)

    def instantiate(self) -> None:
        """It can be replayed then."""
        self.is_instantiated = True

    def replay(self) -> None:
        """Count it."""
        assert self.is_instantiated
        self.replays += 1


def launch(kernels: int) -> None:
    """Launch so many, into the graph if one is captured."""
    if Graph.recording is not None:
        Graph.recording.nodes += range(kernels)


@pytest.fixture
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that captures, as far as ``prepared`` sees one."""

    def nodes(handle: ctypes.c_void_p, _: None, count: Any) -> int:
        count._obj.value = handle.value or 0
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(cuGraphGetNodes=nodes))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.record)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"allocation.all.allocated": 0})
    for name in ("synchronize", "current_stream", "set_stream", "get_sync_debug_mode", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)


@pytest.mark.usefixtures("_graphs")
def test_all_calls_are_captured_and_replayed_once_before_they_are_timed() -> None:
    subject = prepared("two", lambda: launch(2), True, "cuda", lambda call: call())
    graph: Any = subject.graph
    assert (subject.launches, len(graph.nodes), graph.replays) == (2, 2 * NODES, 1)


@pytest.mark.usefixtures("_graphs")
@pytest.mark.parametrize(("first", "others"), [(3, 0), (3, 2), (1, 2)])
def test_calls_that_share_work_in_a_capture_are_refused(first: int, others: int) -> None:
    seen: list[Graph | None] = []

    def call() -> None:
        launch(others if Graph.recording in seen else first)
        seen.append(Graph.recording)

    nodes = first + (NODES - 1) * others
    sentence = f"^captures {nodes} nodes for 40 calls, which are not 40 times the {first} of one call$"
    with pytest.raises(Merged, match=sentence):
        prepared("shares", call, True, "cuda", lambda _: None)


@pytest.mark.usefixtures("_graphs")
def test_what_is_compiled_for_a_check_or_a_capture_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.runtime.jit.JITFunction", Kernel)
    kernel = Kernel()

    def check(call: timing.Call) -> None:
        kernel.run(1)
        call()

    subject = prepared("captured", lambda: kernel.run(2 if Graph.recording else 0), True, "cuda", check)
    assert list(subject.compiled) == [id(kernel.forms[it]) for it in (0, 1, 2)]
    assert len(prepared("checked", lambda: kernel.run(0), False, "cpu", check).compiled) == 2


def test_a_shape_that_raises_is_shown_as_what_it_raised() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "onepass_shapes.py"
    cell = runpy.run_path(str(script))["cell"]
    assert cell(Subject("timed", lambda: None, node_us=[3.0, 1.0, 2.0])) == "  2.00"
    assert cell(Subject("raises", lambda: None, node_us=[1.0], error="OutOfResources: shared")) == (
        "[OutOfResources: shared]"
    )


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
    given = work(SIZE, Mode.DECODE, "cuda")
    answers, refresh = Answers(given.inputs, given.steps, given.setup), refresh_of(find("vectorized"), given)
    assert prepared("right", refresh, True, "cuda", answers.check).graph is not None

    def eager_only() -> None:
        target.copy_(source)
        if not torch.cuda.is_current_stream_capturing():
            refresh()

    with pytest.raises(WrongResult):
        prepared("eager-only", eager_only, True, "cuda", answers.check)
    assert len(prepared("onepass", refresh_of(find("onepass"), given), True, "cuda", answers.check).compiled) == 1
    assert not prepared("right", refresh, True, "cuda").compiled
    waits = prepared("waits", lambda: source.sum().item(), False, "cuda")
    assert (waits.launches, waits.graph) == (None, None)
    assert waits.syncs >= 1
    assert waits.allocations >= 1
