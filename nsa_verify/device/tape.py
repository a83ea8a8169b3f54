"""A captured region without a GPU: what it did, as a list of calls that are made again at every replay.

Tensors are recorded by identity of their memory and scalars by value, as in a CUDA graph: Python does not run again.
Memory that the region allocated belongs to the tape. Memory that existed before and is not the rig's is not kept alive,
and a tape whose memory is gone cannot be replayed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass, replace
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_verify.core.findings import Code
from nsa_verify.device.blame import line_now
from nsa_verify.device.launches import Launch, intercepted
from nsa_verify.device.memory import Kind, Memory, revived, tensors_in
from nsa_verify.device.rules import CaptureFunctions, check_operator, divided, fresh, is_divisible, is_own
from nsa_verify.device.stops import CaptureRefused, ImplementationRaised
from nsa_verify.device.temporaries import poison

aten = torch.ops.aten

_ALLOCATIONS: Final = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.empty_permuted.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
"""They leave nothing to do at a replay: their memory is there."""


class _Elsewhere(NamedTuple):
    """A recorded tensor whose memory the tape does not own."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The tensor itself; its memory is alive, which was checked."""
        storage = revived(self.storage)
        assert storage is not None
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class _Wrapped(NamedTuple):
    """An object of Triton's around a tensor whose memory the tape does not own."""

    wrapper: Any
    base: _Elsewhere

    @classmethod
    def of(cls, wrapper: Any, base: _Elsewhere) -> _Wrapped:
        """``wrapper`` without its tensor."""
        return cls(_around(wrapper, torch.empty(0, dtype=base.dtype)), base)

    def object(self) -> Any:
        """The object itself."""
        return _around(self.wrapper, self.base.tensor())


def _around(wrapper: Any, base: Tensor) -> Any:
    """``wrapper`` around ``base`` instead."""
    if is_dataclass(wrapper):
        return replace(wrapper, base=base)  # type: ignore[type-var]
    return type(wrapper)(base, wrapper.dtype)


class _Call(NamedTuple):
    """One recorded call. ``outputs`` are the recorded tensors that its fresh results are copied into."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: tuple[Tensor | None, ...]
    line: str
    looks_up: bool
    """Whether a tensor among the arguments must be looked up in memory that the tape does not own."""

    @classmethod
    def of(
        cls, function: Callable[..., Any], args: Any, kwargs: Any, outputs: Sequence[Tensor | None], line: str
    ) -> _Call:
        """The call ``function(*args, **kwargs)``."""
        kept = tuple(outputs) if any(output is not None for output in outputs) else ()
        return cls(function, args, kwargs, kept, line, _holds_elsewhere(args) or _holds_elsewhere(kwargs))

    def run(self) -> None:
        """Make the call again."""
        if self.looks_up:
            results = self.function(*_thawed(self.args), **_thawed(self.kwargs))
        else:
            results = self.function(*self.args, **self.kwargs)
        if self.outputs:
            for output, result in zip(self.outputs, tensors_in(results), strict=True):
                if output is not None:
                    output.copy_(result)


class Tape:
    """The recorded calls of one region. ``memory`` says what it uses, ``own`` are the tensors it allocated."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.calls: list[_Call] = []
        self.own: list[Tensor] = []
        self.fallbacks: tuple[str, ...] = ()
        self.holds: object = None

    @property
    def uses_others(self) -> bool:
        """Whether it uses memory that is neither the rig's nor its own."""
        return bool(self.memory.others)

    def scribble(self) -> None:
        """Poison the memory that the tape owns: before its replay it holds nothing."""
        for tensor in self.own:
            poison(tensor)

    def replay(self) -> None:
        """Make every call again.

        Raises ``CaptureRefused`` if memory is gone, ``ImplementationRaised`` for what a call raises: on a GPU that
        would be an assertion on the device.
        """
        self.memory.refuse_freed()
        for call in self.calls:
            try:
                call.run()
            except Exception as error:
                raise ImplementationRaised(error, line=call.line) from error

    def close(self) -> None:
        """Let go of what was recorded."""
        self.calls.clear()
        self.own.clear()
        self.holds = None


class Recorder(TorchDispatchMode):
    """Records the region inside ``recording``; refuses what a capture on CUDA refuses."""

    def __init__(self, memory: Memory, source: str) -> None:
        super().__init__()
        self.tape = Tape(memory)
        self._memory, self._source = memory, source
        self._functions = CaptureFunctions(memory, self._refuse)
        self._stream = torch.cpu.current_stream()
        self._refused: CaptureRefused | None = None
        self._paused = self._marking = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Where torch asks this, it imports its compiler (1.5 s) for a mode that says yes.
        return "torch._dynamo" in sys.modules

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Only take note of what is made in host memory: what a warm-up caches is then known at the capture."""
        self._functions.refuse = None
        self._marking = True
        try:
            with _modes_restored(), self, self._functions:
                yield
        finally:
            self._functions.refuse = self._refuse
            self._marking = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside the block. A refusal that the region swallowed is raised at its end."""
        with ExitStack() as stack:
            for owner, name, instead in self._replacements():
                stack.enter_context(_replaced(owner, name, instead))
            stack.enter_context(intercepted(self._launch))
            stack.enter_context(_modes_restored())
            stack.enter_context(self)
            stack.enter_context(self._functions)
            yield
        if self._refused is not None:
            raise self._refused

    def _replacements(self) -> list[tuple[Any, str, Any]]:
        def waiting() -> Any:
            # A function of its own for every name: torch's compiler knows some of them by identity.
            def synchronize(*_: object, **__: object) -> NoReturn:
                self._refuse("waits for the device", Code.NEEDS_SYNC)

            return synchronize

        def tune(*_: object, **__: object) -> NoReturn:
            self._refuse("autotunes a kernel, which runs and times it")

        owners = (torch.cpu, torch.cuda, torch.accelerator, torch.cuda.Stream, torch.cuda.Event)
        found: list[tuple[Any, str, Any]] = [(owner, "synchronize", waiting()) for owner in owners]
        found.append((torch.cuda, "is_current_stream_capturing", lambda: True))
        found.append((torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", lambda: True))
        autotuner = getattr(sys.modules.get("triton.runtime.autotuner"), "Autotuner", None)
        return [*found, (autotuner, "_bench", tune)] if autotuner is not None else found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        result: Any = NotImplemented
        if is_divisible(func):
            calls = len(self.tape.calls)
            with self:
                result = divided(func, args, kwargs, torch._C.DispatchKey.CPU)
            if is_own(func) or len(self.tape.calls) > calls:
                return result
        used = [*tensors_in(args), *tensors_in(kwargs)]
        host = [tensor for tensor in used if self._memory.is_host(tensor)]
        all_host = len(host) == len(used) and (bool(used) or self._functions.making_host)
        if func is aten.lift_fresh.default or all_host:
            result = func(*args, **kwargs) if result is NotImplemented else result
            self._memory.add_host(result)
            return result
        if self._marking:
            return func(*args, **kwargs) if result is NotImplemented else result
        return self._record(func, args, kwargs, used, host, result)

    def _record(
        self, func: Any, args: Any, kwargs: dict[str, Any], used: list[Tensor], host: list[Tensor], result: Any
    ) -> Any:
        """Record one operator and run it, unless ``result`` says that it has run."""
        own = is_own(func)
        if own:
            check_operator(func, args, kwargs, host, self._memory, self._refuse)
        line = self._note(used)
        call_args, call_kwargs = self._frozen(args), self._frozen(kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        # What an operator that is not torch's own returns may be kept somewhere: it does not belong to the graph.
        outputs = tuple(fresh(result, used)) if own else ()
        for output in outputs:
            if output is not None:
                self._memory.add_own(output)
                self.tape.own.append(_same(output))
        is_view = not func._schema.is_mutable and all(output is None for output in outputs) and own
        if func not in _ALLOCATIONS and not is_view:
            kept = tuple(None if output is None else _same(output) for output in outputs)
            self.tape.calls.append(_Call.of(func, call_args, call_kwargs, kept, line))
        return result

    def _note(self, used: Sequence[Tensor]) -> str:
        """Note the memory that is used, and on which stream; returns the implementation's current line."""
        if torch.cpu.current_stream() is not self._stream:
            self._refuse("works on another stream than the capturing one", Code.OTHER_STREAM)
        line = line_now(self._source)
        self._memory.use([tensor for tensor in used if not self._memory.is_host(tensor)], lambda: line)
        return line

    def _launch(self, launch: Launch) -> Any:
        """Record a launch, and let it run: torch operators behind it work on what it leaves."""
        with self._pause():
            used = [*tensors_in(launch.args), *tensors_in(launch.kwargs)]
            if any(self._memory.is_host(tensor) for tensor in used):
                self._refuse(f"the kernel {launch.name} is given a host tensor")
            line = self._note(used)
            grid = self._settled(launch.kwargs["grid"])
            kwargs = {name: self._frozen(value) for name, value in launch.kwargs.items() if name != "grid"}
            args = (launch.kernel, *self._frozen(launch.args))
            self.tape.calls.append(_Call.of(launch.run, args, {**kwargs, "grid": grid}, (), line))
            return launch.run(launch.kernel, *launch.args, **{**launch.kwargs, "grid": grid})

    @contextmanager
    def _pause(self, paused: bool = True) -> Iterator[None]:
        """What runs inside the block is not of the implementation."""
        before = self._paused
        self._paused = self._functions.paused = paused
        try:
            yield
        finally:
            self._paused = self._functions.paused = before

    def _settled(self, grid: Any) -> Any:
        """A grid by value: a function of the arguments is asked once, at capture, and held to the rules."""
        if not callable(grid):
            return grid
        known: list[Any] = []

        def settled(arguments: Any) -> Any:
            if not known:
                with self._pause(paused=False):
                    known.append(grid(arguments))
            return known[0]

        return settled

    def _frozen(self, values: Any) -> Any:
        """``values`` as a tape keeps them: 0-d host tensors by value, memory of others without keeping it alive."""
        if isinstance(values, Tensor):
            kind = self._memory.kind(values)
            if kind is Kind.HOST:
                return values.clone()
            if kind is Kind.OTHER and values.numel():
                storage = StorageWeakRef(values.untyped_storage())
                place = tuple(values.size()), values.stride(), int(values.storage_offset())
                return _Elsewhere(storage, values.dtype, *place)
            return _same(values)
        if isinstance(values, (tuple, list)):
            return _alike(values, [self._frozen(value) for value in values])
        if isinstance(values, dict):
            return {name: self._frozen(value) for name, value in values.items()}
        if isinstance(getattr(values, "base", None), Tensor):
            base = self._frozen(values.base)
            return _Wrapped.of(values, base) if isinstance(base, _Elsewhere) else values
        return values

    def _refuse(self, sentence: str, code: Code = Code.ILLEGAL_IN_CAPTURE) -> NoReturn:
        refusal = CaptureRefused(code, f"{sentence} ({line_now(self._source)})")
        self._refused = self._refused or refusal
        raise refusal


def _same(tensor: Tensor) -> Tensor:
    """Another tensor of the same memory: what the implementation does to its own cannot move this one."""
    if not tensor.is_inference():
        return tensor.detach()
    with torch.inference_mode(False):
        return torch.empty(0, dtype=tensor.dtype).set_(
            tensor.untyped_storage(), int(tensor.storage_offset()), tensor.size(), tensor.stride()
        )


def _alike(values: Any, elements: list[Any]) -> Any:
    """``elements`` in a list, a tuple or a named tuple, as ``values`` is one."""
    return type(values)(*elements) if hasattr(values, "_fields") else type(values)(elements)


def _holds_elsewhere(values: Any) -> bool:
    if isinstance(values, (_Elsewhere, _Wrapped)):
        return True
    if isinstance(values, dict):
        return any(map(_holds_elsewhere, values.values()))
    return isinstance(values, (tuple, list)) and any(map(_holds_elsewhere, values))


def _thawed(values: Any) -> Any:
    if isinstance(values, _Elsewhere):
        return values.tensor()
    if isinstance(values, _Wrapped):
        return values.object()
    if isinstance(values, (tuple, list)):
        return _alike(values, [_thawed(value) for value in values])
    if isinstance(values, dict):
        return {name: _thawed(value) for name, value in values.items()}
    return values


@contextmanager
def _modes_restored() -> Iterator[None]:
    """Ctrl-C can strike where a mode is left: none must stay behind."""
    functions, dispatches = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    try:
        yield
    finally:
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > dispatches:
            torch._C._pop_torch_dispatch_stack(None)


@contextmanager
def _replaced(owner: Any, name: str, instead: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name, None)
    setattr(owner, name, instead)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
