"""``graph``: captured CUDA graphs, replayed."""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.findings import Code
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.spent import CALL, spending
from nsa_verify.device.blame import line_now, line_of
from nsa_verify.device.driving import WARM_UPS, KeptGraph, Note, call, capturable
from nsa_verify.device.launches import Launch, intercepted
from nsa_verify.device.memory import Memory, tensors_in
from nsa_verify.device.rig import Rig
from nsa_verify.device.rules import divided, fresh, is_divisible
from nsa_verify.device.stops import CaptureRefused, GraphKey, ImplementationRaised, words_of
from nsa_verify.device.temporaries import TEMPORARY_POISON, WatchedCalls

BLOCK_SIZES: Final = tuple(512 << power for power in range(0, 13, 2))
"""Bytes of the unrelated allocations that are scribbled on: one for each of the allocator's classes of small blocks."""
BLOCKS_OF_A_SIZE: Final = 4
ALLOCATION_UNIT: Final = 512
"""Bytes that torch's allocator rounds up to."""
SCRIBBLE: Final = TEMPORARY_POISON + 1
STREAM_NON_BLOCKING: Final = 1
"""CU_STREAM_NON_BLOCKING of the driver."""


class CapturedGraph:
    """A CUDA graph with an owner, who must close it: destroying one while another is captured breaks that capture.

    ``open_graphs`` counts those that are not closed.
    """

    open_graphs = 0

    def __init__(self) -> None:
        self.raw: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        CapturedGraph.open_graphs += 1

    def close(self) -> None:
        """Destroy the graph now."""
        if self.raw is not None:
            self.raw.reset()
            self.raw = None
            CapturedGraph.open_graphs -= 1

    def __del__(self) -> None:
        if self.raw is not None:
            warnings.warn("a CUDA graph was not closed by its owner", ResourceWarning, stacklevel=2)


class Watch(TorchDispatchMode):
    """Sees what a region does while it is captured: whose memory it uses, and on which stream."""

    def __init__(self, memory: Memory, source: str) -> None:
        super().__init__()
        self._memory, self._source = memory, source
        self._stream = torch.cuda.current_stream()
        self.elsewhere: str | None = None
        """What worked on another stream first."""
        self.own: dict[int, int] = {}
        """Address and bytes of the memory that was allocated inside the region."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Where torch asks this, it imports its compiler (1.5 s) for a mode that says yes.
        return "torch._dynamo" in sys.modules

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = [*tensors_in(args), *tensors_in(kwargs)]
        self._note(func, used)
        if is_divisible(func):
            with self:
                return divided(func, args, kwargs or {}, torch._C.DispatchKey.CUDA)
        result = func(*args, **(kwargs or {}))
        for tensor in fresh(result, used):
            if tensor is not None and tensor.is_cuda:
                self._memory.add_own(tensor)
                storage = tensor.untyped_storage()
                self.own[storage.data_ptr()] = storage.nbytes()
        return result

    def launch(self, it: Launch) -> Any:
        """Note a launch, and let it happen."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            self._note(f"the kernel {it.name}", [*tensors_in(it.args), *tensors_in(it.kwargs)])
            return it.run(it.kernel, *it.args, **it.kwargs)

    def _note(self, what: object, used: Sequence[Tensor]) -> None:
        if self.elsewhere is None and torch.cuda.current_stream() != self._stream:
            line = line_now(self._source)
            self.elsewhere = f"{what} works on another stream than the capturing one ({line})"
        self._memory.use([tensor for tensor in used if tensor.is_cuda], lambda: line_now(self._source))


class Captured:
    """The graph of one key, and what it uses."""

    def __init__(self, graph: CapturedGraph, memory: Memory, own: dict[int, int]) -> None:
        self.graph, self.memory = graph, memory
        self.fallbacks: tuple[str, ...] = ()
        self.holds: object = None
        self._own = [_words(*it) for it in _stretches(own)]

    @property
    def uses_others(self) -> bool:
        """Whether it uses memory that is neither the rig's nor its own."""
        return bool(self.memory.others)

    def scribble(self) -> None:
        """Poison the memory that the graph allocated for itself: before its replay it holds nothing."""
        for words in self._own:
            words.fill_(TEMPORARY_POISON)

    def replay(self) -> None:
        """Launch the graph. Raises ``CaptureRefused`` if memory it uses was freed."""
        self.memory.refuse_freed()
        assert self.graph.raw is not None
        self.graph.raw.replay()

    def close(self) -> None:
        """Destroy the graph."""
        self._own.clear()
        self.graph.close()
        self.holds = None


def _words(address: int, size: int) -> Tensor:
    """The ``size`` bytes at ``address`` as int32, without owning them."""
    device = torch.device("cuda", torch.cuda.current_device())
    storage = torch._C._construct_storage_from_data_pointer(address, device, size)
    return torch.empty(0, dtype=torch.int32, device=device).set_(storage, 0, (size // 4,), (1,))


def _stretches(own: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Address and size of the blocks behind the allocations ``own``, adjacent ones joined."""
    start = end = 0
    for address, size in sorted(own.items()):
        block_end = address + -(-size // ALLOCATION_UNIT) * ALLOCATION_UNIT
        if address > end:
            if end > start:
                yield start, end - start
            start = address
        end = max(end, block_end)
    if end > start:
        yield start, end - start


class SharedPool:
    """The memory that graphs allocate from, one for all of a process, as engines have it.

    A pool of its own would keep its memory for good once its graph is gone. It needs a graph that is never closed: with
    the last one torch gives a pool up.
    """

    _anchor: torch.cuda.CUDAGraph | None = None

    @classmethod
    def handle(cls) -> Any:
        """What ``capture_begin`` takes; the pool is made when this is asked first."""
        if cls._anchor is None:
            anchor = torch.cuda.CUDAGraph()
            with torch.cuda.stream(capture_stream()), _without_gc():
                anchor.capture_begin()
                torch.zeros(1, device="cuda")
                anchor.capture_end()
            torch.cuda.synchronize()
            cls._anchor = anchor
        return cls._anchor.pool()

    @classmethod
    def give_up(cls) -> None:
        """After a capture that was refused: torch leaves the pool in the middle of a recording, and nothing can be
        captured in it any more. The next capture makes another; this one's memory goes with its last graph."""
        device, handle = torch.cuda.current_device(), cls.handle()
        with suppress(RuntimeError):  # raised where torch has ended the recording itself
            torch._C._cuda_endAllocateToPool(device, handle)
            torch._C._cuda_releasePool(device, handle)
        if cls._anchor is not None:
            cls._anchor.reset()
            cls._anchor = None
        torch.cuda.empty_cache()


class Region(NamedTuple):
    """What is captured: a call, the memory that it uses, the file whose lines are blamed, and the errors that torch has
    raised in it, swallowed ones included."""

    run: Callable[[], None]
    memory: Memory
    source: str
    errors: Sequence[str]


def record(region: Region, stream: torch.cuda.Stream) -> Captured:
    """Capture ``region`` on ``stream``; the caller closes the graph.

    Raises ``CaptureRefused`` for what cannot be captured, and what else ``region`` raises.
    """
    pool, graph, error = SharedPool.handle(), CapturedGraph(), None
    assert graph.raw is not None
    try:
        with _without_gc(), torch.cuda.stream(stream):
            watch = Watch(region.memory, region.source)
            graph.raw.capture_begin(pool=pool)
            try:
                with intercepted(watch.launch), watch:
                    region.run()
            except ImplementationRaised as raised:
                error = raised.error
            finally:
                invalid = _end(graph.raw)
            error = error or invalid
    except BaseException:
        graph.close()
        raise
    if error is None and watch.elsewhere is None:
        return Captured(graph, region.memory, watch.own)
    graph.close()
    if watch.elsewhere is not None:
        raise CaptureRefused(Code.OTHER_STREAM, watch.elsewhere)
    assert error is not None
    raise _refusal(error, region.errors, region.source)


def _end(raw: torch.cuda.CUDAGraph) -> BaseException | None:
    """End the capture; what CUDA says if it was spoilt."""
    try:
        with warnings.catch_warnings():
            # What was refused, or did nothing, leaves an empty graph; the reason is told otherwise.
            warnings.filterwarnings("ignore", "The CUDA Graph is empty", UserWarning)
            raw.capture_end()
    except RuntimeError as invalid:
        SharedPool.give_up()
        return invalid
    return None


def new_stream() -> torch.cuda.Stream:
    """A stream that nobody else is given: torch hands out its own 32 in turn, and one of them may well be what an
    implementation has for its side stream. Like them it does not wait for the legacy stream."""
    torch.cuda.current_stream()  # makes the context
    handle = ctypes.c_void_p()
    error = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(handle), STREAM_NON_BLOCKING)
    if error:
        raise RuntimeError(f"CUDA error {error} while a stream was created")
    return torch.cuda.ExternalStream(handle.value)


@lru_cache(maxsize=1)
def capture_stream() -> torch.cuda.Stream:
    """The stream that everything is captured on; memory that is freed on it comes back on it."""
    return new_stream()


class GraphSession:
    """One captured graph per key."""

    def __init__(self, implementation: Implementation, graphs: Mapping[GraphKey, Captured]) -> None:
        self.implementation = implementation
        self.fallbacks = tuple(it for graph in graphs.values() for it in graph.fallbacks)
        self._graphs = graphs
        self._blocks: list[Tensor] = []
        self._calls = 0

    def begin(self, disturb: bool = True) -> None:
        """Poison what the graphs allocated; with ``disturb`` take memory that was freed since their warm-up, and
        scribble on it."""
        for captured in self._graphs.values():
            captured.scribble()
        self._calls = 0
        if not disturb:
            return
        # The allocator hands memory out again on the stream on which it was taken. What it hands out may still be read
        # on this one: the blocks of the session before.
        capture_stream().wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(capture_stream()):
            self._blocks = [
                torch.empty(size // 4, dtype=torch.int32, device="cuda")
                for size in BLOCK_SIZES
                for _ in range(BLOCKS_OF_A_SIZE)
            ]
            torch._foreach_zero_(self._blocks)
            torch._foreach_add_(self._blocks, SCRIBBLE)
        torch.cuda.current_stream().wait_stream(capture_stream())

    def replay(self, mode: Mode, bucket: int) -> None:
        """Launch the graph of ``(mode, bucket)``."""
        self._calls += 1
        with spending(CALL):
            self._graphs[mode, bucket].replay()

    def trespassed(self) -> Tensor | None:
        """Whether a graph wrote to memory that was handed out after its capture."""
        return (torch.cat(self._blocks) != SCRIBBLE).any() if self._blocks else None

    def end(self) -> list[Note]:
        """Whether a graph wrote to memory that was handed out after its capture, and of which size that was."""
        trespassed = self.trespassed()
        blocks, self._blocks = self._blocks, []
        if trespassed is None or not bool(trespassed):
            return []
        size = next(4 * block.numel() for block in blocks if not bool((block == SCRIBBLE).all()))
        sentence = f"a graph wrote to memory that was freed after its capture and handed out again ({size} bytes)"
        return [Note(Code.MOVED, self._calls - 1, sentence)]


class Graph:
    """Captures once per (mode, bucket) with the fill inputs, then replays the graph for every replay of the case."""

    name = "graph"
    device = "cuda"

    def not_applicable(self, implementation: Implementation, setup: Setup, mode: Mode) -> str | None:
        """What the implementation does not declare, capturability included."""
        return capturable(implementation, setup, mode)

    def capture(self, rig: Rig, implementation: Implementation, key: GraphKey) -> Captured:
        """Warm up, and capture the graph of ``key`` on a stream of its own."""
        source, stream = implementation.file, capture_stream()
        for _ in range(WARM_UPS):
            rig.load_capture(*key)
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    call(rig, implementation, key, WatchedCalls(source))
            finally:
                # Whatever comes next writes the inputs that a warm-up may still read.
                torch.cuda.current_stream().wait_stream(stream)
        rig.load_capture(*key)
        before = rig.arena.clone()
        memory, watched = Memory(static=[rig.arena, rig.pool.table], on_cuda=True), WatchedCalls(source)
        region = Region(lambda: call(rig, implementation, key, watched), memory, source, watched.errors)
        # Behind the arena's copy: work that escapes the capture must not overtake it.
        torch.cuda.current_stream().synchronize()
        captured = record(region, stream)
        torch.cuda.synchronize()
        refusal = None
        if bool((rig.arena != before).any()):
            sentence = "output was written while the graph was captured, outside of it"
            refusal = CaptureRefused(Code.OTHER_STREAM, sentence)
        moved = rig.moved(*key, implementation.writes(rig.setup))
        if moved is not None:
            refusal = CaptureRefused(Code.MOVED, moved)
        if refusal is not None:
            captured.close()
            raise refusal
        return captured

    def open(self, rig: Rig, implementation: Implementation, graphs: Mapping[GraphKey, KeptGraph]) -> GraphSession:  # noqa: ARG002
        """Start a session; nothing is run."""
        return GraphSession(implementation, cast("Mapping[GraphKey, Captured]", graphs))


_STREAMS: Final = ("another stream", "legacy stream", "unjoined", "uncaptured work", "separate capture")


def _refusal(error: BaseException, errors: Sequence[str], source: str) -> Exception:
    """What ``error``, raised while a graph was captured, says; ``errors`` are those that torch raised, swallowed ones
    included."""
    text = words_of(error)
    said = " ".join(text.split("\n")[:1])
    if "captur" not in text.lower():
        return ImplementationRaised(error)
    frames = traceback.extract_tb(error.__traceback__)
    spoilt = [it for it in errors if "captur" in it.lower()]
    first = spoilt[0] if spoilt else f"{said} ({line_of(error, source)})"
    if any(words in text for words in _STREAMS):
        return CaptureRefused(Code.OTHER_STREAM, first)
    if any(frame.name == "synchronize" for frame in frames) or first.startswith("synchronize "):
        return CaptureRefused(Code.NEEDS_SYNC, first)
    return CaptureRefused(Code.ILLEGAL_IN_CAPTURE, first)


@contextmanager
def _without_gc() -> Iterator[None]:
    """Garbage that holds a graph must not be collected while another is captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
