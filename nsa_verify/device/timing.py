"""How long implementations take: on the host for a call, on the GPU as a node of a captured graph.

The memory is laid out like an engine's, without the guard zones of a ``Rig``, which large tables leave no room for.
Calls and nodes work on the same buffers again and again: what fits into the caches of a GPU is warm.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import torch
from msgspec import Struct

from nsa_verify.core.buffers import FROZEN, TABLES, alias_of, shapes
from nsa_verify.core.case import CtxLens, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Extent, Implementation, MetadataBuffers, ReplayInputs
from nsa_verify.device.answers import Slots
from nsa_verify.device.health import DeviceDied, refuse_dead
from nsa_verify.device.launches import Launch, intercepted

Call = Callable[[], object]
Check = Callable[[Call], object]
"""Makes the call, and raises ``WrongResult`` unless its results are right."""

NODES: Final = 40
"""Calls that are captured into one graph: its launch is then a small part of a call's time."""
WARM_UPS: Final = 3
COPIED: Final = 256 << 20
"""Bytes of the copy that bandwidth is measured with; more than the caches hold, so it is that of DRAM."""
TOP_K: Final = 2048
NO_MEMORY: Final = (MemoryError, torch.OutOfMemoryError)
SAID: Final = ("out of memory", "can't allocate memory")
"""What an error says that CUDA, Triton or the CPU's allocator raises for want of memory."""


class Size(Struct, frozen=True, kw_only=True):
    """What is refreshed: B requests of KV lengths from half of ``longest`` (tokens) to that, in tables of W columns.

    With ``rest`` the first request has ``longest`` tokens and each other one ``rest``. With ``schedule`` also the
    paged-MQA schedule and its lengths, which TARGET_VERIFY keeps as ``[B, N]`` of its own.
    """

    batch_size: int
    table_width: int
    longest: int
    num_draft_tokens: int = 4
    page_size: int = 64
    num_steps: int = 1
    rest: int = 0
    schedule: bool = False

    def setup(self) -> Setup:
        """The Setup of an engine that refreshes this."""
        return Setup(
            num_draft_tokens=self.num_draft_tokens,
            index_topk=TOP_K,
            page_size=self.page_size,
            table_width=self.table_width,
            pool_rows=self.batch_size,
            pool_width=self.table_width,
            num_steps=self.num_steps,
            buckets=(self.batch_size,),
            num_sms=132,
            ctx_lens=CtxLens.OWN if self.schedule else CtxLens.ABSENT,
            schedule=self.schedule,
        )

    def __str__(self) -> str:
        lengths = f"one of {self.longest} rest {self.rest}" if self.rest else f"to {self.longest}"
        steps = f" S {self.num_steps}" if self.num_steps > 1 else ""
        schedule = " with schedule" if self.schedule else ""
        return f"B {self.batch_size} W {self.table_width} {lengths}{steps}{schedule}"

    def lengths(self, chance: torch.Generator) -> torch.Tensor:
        """The KV lengths, int64 ``[B]``."""
        count = self.batch_size
        if self.rest:
            lengths = torch.full((count,), self.rest)
            lengths[0] = self.longest
            return lengths
        return torch.randint(
            max(self.longest // 2, self.num_draft_tokens), self.longest + 1, (count,), generator=chance
        )


class Work(Struct, frozen=True):
    """The memory of one size in one mode."""

    setup: Setup
    inputs: ReplayInputs
    steps: tuple[MetadataBuffers, ...]
    slots: Slots
    """What ``inputs.req_to_token`` is the table of."""

    @property
    def live_bytes(self) -> int:
        """What must move at least: what is live is read once and written once for each row of each step."""
        return self.extent_bytes(Extent.LIVE)

    def extent_bytes(self, extent: Extent, block: int = 1) -> int:
        """What moves at least where rows are written up to ``extent``, and the pages of those columns with them.

        Slots are read once for each request; they and pages are written for each row of each step, lists for each step.
        It is a function of the declared extent alone: what an implementation writes elsewhere first, and reads again,
        is not in it.
        """
        setup, inputs, tokens = self.setup, self.inputs, self.setup.num_draft_tokens
        assert inputs.seq_lens_cpu is not None
        kv_lens = inputs.seq_lens_cpu.long() + (tokens if inputs.mode is Mode.TARGET_VERIFY else 0)
        columns = _reach(kv_lens, setup.table_width, extent, block)
        pages = (columns + setup.page_size - 1).div(setup.page_size, rounding_mode="floor") * (setup.page_size > 1)
        rows = inputs.accept_lens.cpu() if inputs.mode is not Mode.DECODE else torch.ones_like(columns)
        lists = 2 * (inputs.batch_size + 1) + 3 * int(rows.sum())
        for name, shape in shapes(setup, inputs.mode, inputs.batch_size).items():
            own = name in OPTIONAL_OUTPUTS and alias_of(setup, inputs.mode, name) is None
            lists += shape.rows * shape.columns if own else 0
        written = int(((columns + pages) * rows).sum()) + lists
        return 4 * (int(columns.sum()) + setup.num_steps * written + 3 * inputs.batch_size)


def _reach(kv_lens: torch.Tensor, width: int, extent: Extent, block: int) -> torch.Tensor:
    """How many columns of ``page_table_1`` are written in a row of each request."""
    match extent:
        case Extent.LIVE:
            reach = kv_lens
        case Extent.ROW:
            reach = (kv_lens + block - 1).div(block, rounding_mode="floor") * block
        case Extent.MAX:
            reach = kv_lens.max().expand_as(kv_lens)
        case Extent.FULL:
            reach = torch.full_like(kv_lens, width)
    return reach.clamp(max=width)


def work(size: Size, mode: Mode, device: str, seed: int = 0) -> Work:
    """Inputs of ``size`` drawn from ``seed``, and buffers of 0 beside the frozen aranges; accept lengths are 1 to N in
    DRAFT_EXTEND.

    Raises ``MemoryError`` for what is more than the device has free.
    """
    setup = size.setup()
    _refuse_larger(setup, mode, device)
    chance = torch.Generator().manual_seed(seed)
    count, tokens = size.batch_size, size.num_draft_tokens
    lengths = size.lengths(chance)
    accepts = torch.full((count,), tokens)
    if mode is Mode.DRAFT_EXTEND:
        accepts = torch.randint(1, tokens + 1, (count,), generator=chance)
    host = lengths.to(torch.int32)
    slots = Slots(count, size.table_width, device, seed)
    inputs = ReplayInputs(
        mode=mode,
        batch_size=count,
        seq_lens=host.to(device),
        seq_lens_cpu=host,
        req_pool_indices=torch.randperm(count, generator=chance).to(device),
        req_to_token=slots.table,
        accept_lens=accepts.to(torch.int32).to(device),
    )
    steps = tuple(_buffers(setup, mode, count, device) for _ in range(size.num_steps))
    return Work(setup, inputs, steps, slots)


def _refuse_larger(setup: Setup, mode: Mode, device: str) -> None:
    count, owned = setup.buckets[-1], 0
    for name, shape in shapes(setup, mode, count).items():
        owned += shape.rows * shape.columns if alias_of(setup, mode, name) is None else 0
    needed = 4 * (setup.pool_rows * setup.pool_width + setup.num_steps * owned)
    free = _free_bytes(device)
    if needed > free:
        sizes = f"it needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        raise MemoryError(f"{sizes}; ask for fewer requests or columns")


def _free_bytes(device: str) -> int:
    if device == "cuda":
        # What torch keeps of what it was given back is free to it.
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_no_memory(error: BaseException | None) -> bool:
    """Whether ``error`` was raised for want of memory, or while one that was so was handled, as in a capture.

    Not if the device died of it.
    """
    while error is not None and not isinstance(error, DeviceDied):
        said = str(error).lower()
        if isinstance(error, NO_MEMORY) or (isinstance(error, RuntimeError) and any(it in said for it in SAID)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _buffers(setup: Setup, mode: Mode, count: int, device: str) -> MetadataBuffers:
    made: dict[str, torch.Tensor] = {}
    for name, shape in shapes(setup, mode, count).items():
        alias = alias_of(setup, mode, name)
        size = shape if name in (*TABLES, *OPTIONAL_OUTPUTS) else (shape.columns,)
        if alias is not None:
            made[name] = made[alias].view(size)
        elif name in FROZEN:
            made[name] = torch.arange(shape.columns, dtype=torch.int32, device=device)
        else:
            made[name] = torch.zeros(size, dtype=torch.int32, device=device)
    return MetadataBuffers(**made)


Compiled = dict[int, tuple[Any, Any]]
"""What Triton launched: each compiled form by its id, behind the kernel that it is a form of."""


@contextmanager
def compilations(found: Compiled) -> Iterator[None]:
    """Note in ``found`` what Triton launches meanwhile: forms of one kernel are compiled one by one.

    Nothing is noted of kernels that the interpreter runs.
    """

    def listen(launch: Launch) -> Any:
        form = launch.run(launch.kernel, *launch.args, **launch.kwargs)
        if form is not None:
            found[id(form)] = launch.kernel, form
        return form

    with intercepted(listen):
        yield


class Subject(Struct):
    """One call that is timed, and what was measured of it: microseconds per call, one number per repetition."""

    name: str
    call: Call
    graph: torch.cuda.CUDAGraph | None = None
    host_us: list[float] = []
    node_us: list[float] = []
    launches: int | None = None
    """Kernels and copies of a captured call; None: it was not captured."""
    syncs: int = 0
    allocations: int = 0
    compiled: Compiled = {}
    fallbacks: tuple[str, ...] = ()
    """Why the fast path was not taken, as it said itself."""
    error: str = ""
    """What it raised while it was timed; then nothing is known of it."""
    is_starved: bool = False
    """Whether it raised that for want of memory."""


class Merged(Exception):
    """Calls are captured into one graph as other nodes than they are one by one, so that their time is that of no call.

    The message says what is captured.
    """


class Candidate(NamedTuple):
    """A call that may be timed; ``capture``: also as a node of a graph."""

    name: str
    call: Call
    capture: bool


def refresh_of(implementation: Implementation, given: Work) -> Call:
    """A call of ``implementation`` on ``given``."""
    inputs, steps, setup = given.inputs, given.steps, given.setup
    return lambda: implementation.refresh(inputs, steps, setup)


def _unchecked(call: Call) -> object:
    return call()


def prepared(name: str, call: Call, capture: bool, device: str, check: Check = _unchecked) -> Subject:
    """Warm ``call`` up, look at what it does, and capture ``NODES`` calls of it if it may be captured.

    ``check`` makes one call and one replay of that graph. Raises ``WrongResult`` as it does, ``Merged``, and what
    ``call`` raises.
    """
    subject = Subject(name, call)
    with compilations(subject.compiled):
        for _ in range(WARM_UPS):
            call()
        check(call)
        if device == "cuda":
            _look(subject, capture, check)
    return subject


def _look(subject: Subject, capture: bool, check: Check) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with _counted_syncs() as found:
        subject.call()
    subject.syncs = len(found)
    subject.allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    if capture:
        subject.launches = _captured(subject.call, 1)[1]
        subject.graph, nodes = _captured(subject.call, NODES)
        if nodes != NODES * subject.launches:
            one = f"{NODES} times the {subject.launches} of one call"
            raise Merged(f"captures {nodes} nodes for {NODES} calls, which are not {one}")
        subject.graph.instantiate()
        check(subject.graph.replay)
    torch.cuda.synchronize()


@contextmanager
def _recorded(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Capture into ``graph``; a capture that fails does not leave its stream behind as the current one."""
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            yield
    finally:
        torch.cuda.set_stream(stream)


@contextmanager
def _counted_syncs() -> Iterator[list[warnings.WarningMessage]]:
    """The waits for the device that torch knows of, once it is left."""
    mode = torch.cuda.get_sync_debug_mode()
    waits: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            # Others, of a file that is collected unclosed, come at any time.
            waits += [it for it in found if "synchronizing CUDA operation" in str(it.message)]


def _captured(call: Call, calls: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of so many calls, which is to be instantiated, and how many nodes it has."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with _recorded(graph):
        for _ in range(calls):
            call()
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    error = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count))
    if error:
        raise RuntimeError(f"cuGraphGetNodes returned {error}")
    return graph, count.value


def measure(subjects: Sequence[Subject], device: str, repetitions: int, calls: int = 20) -> None:
    """Time all ``subjects``, interleaved: one repetition of each, then the next, another one first each time.

    One that raises notes its ``error`` and is not called again. Raises ``DeviceDied`` if it took the device with it.
    """
    for repetition in range(repetitions):
        for place in range(len(subjects)):
            subject = subjects[(place + repetition) % len(subjects)]
            if subject.error:
                continue
            try:
                subject.host_us.append(_host_us(subject.call, calls, device))
                if subject.graph is not None:
                    subject.node_us.append(_node_us(subject.graph))
            except Exception as error:  # noqa: BLE001 - an implementation may raise anything
                subject.error, subject.is_starved = sentence(error), is_no_memory(error)
                refuse_dead(device, error)


def sentence(error: BaseException) -> str:
    """What was raised, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")


def _host_us(call: Call, calls: int, device: str) -> float:
    """From the first call to the return of the last; the device is not waited for, unless they do."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - began
    wait()
    return 1e6 * seconds / calls


def _node_us(graph: torch.cuda.CUDAGraph, replays: int = 3) -> float:
    """From the first node to the last, over the number of calls."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()  # the device is busy when the clock is started
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(1e3 * start.elapsed_time(end) / (replays * NODES))


class Floor(Struct, frozen=True):
    """An empty kernel as a node, and bytes at the bandwidth of a copy through DRAM, both measured.

    No implementation whose bytes come from DRAM can be faster. Nodes work on the same buffers again, though: where
    those fit into L2 they are warm, and the floor is no lower bound.
    """

    empty_node_us: float
    bytes_per_us: float

    def us(self, live_bytes: int) -> float:
        """For so many bytes."""
        return self.empty_node_us + live_bytes / self.bytes_per_us


def floor(repetitions: int) -> Floor:
    """Measure it on this GPU; what is copied is larger than L2, so that it moves through DRAM.

    Raises ``DeviceDied``, and whatever ``is_no_memory`` says of that there is none for the copy.
    """
    from nsa_verify.device.nothing import nothing

    source = torch.zeros(COPIED // 4, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    subjects = [
        prepared("nothing", nothing, True, "cuda"),
        prepared("copy", lambda: target.copy_(source), True, "cuda"),
    ]
    measure(subjects, "cuda", repetitions)
    if errors := [it.error for it in subjects if it.error]:
        raise RuntimeError(errors[0])
    return Floor(median(subjects[0].node_us), 2 * COPIED / median(subjects[1].node_us))


def forget(device: str) -> None:
    """Give back what is not used any more, before the next size."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
