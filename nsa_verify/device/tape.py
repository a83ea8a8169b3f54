"""A captured region without a GPU: what it did, as a list of calls that are made again at every replay.

Tensors are recorded by identity of their memory and scalars by value, as in a CUDA graph: Python does not run again.
Memory that the region allocated belongs to the tape. Memory that existed before and is not the rig's is not kept alive,
and a tape whose memory is gone cannot be replayed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nsa_verify.core.findings import Code
from nsa_verify.device.blame import line_now
from nsa_verify.device.launches import Launch, intercepted
from nsa_verify.device.memory import Kind, Memory, revived, tensors_in
from nsa_verify.device.rules import CaptureFunctions, check_operator, fresh
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


class _Call(NamedTuple):
    """One recorded call. ``outputs`` are the recorded tensors that its fresh results are copied into."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: tuple[Tensor | None, ...]
    line: str

    def run(self) -> None:
        """Make the call again."""
        results = self.function(*_thawed(self.args), **_thawed(self.kwargs))
        if any(output is not None for output in self.outputs):
            for output, result in zip(self.outputs, tensors_in(results), strict=True):
                if output is not None:
                    output.copy_(result)


class Tape:
    """The recorded calls of one region. ``memory`` says what it uses, ``own`` are the tensors it allocated."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.calls: list[_Call] = []
        self.own: list[Tensor] = []

    def scribble(self) -> None:
        """Poison the memory that the tape owns: between replays a graph's temporaries belong to anyone."""
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
                raised = RuntimeError(f"{type(error).__name__}: {error} (replaying {call.line})")
                raise ImplementationRaised(raised) from error


class Recorder(TorchDispatchMode):
    """Records the region inside ``recording``; refuses what a capture on CUDA refuses."""

    def __init__(self, memory: Memory, source: str) -> None:
        super().__init__()
        self.tape = Tape(memory)
        self._memory, self._source = memory, source
        self._functions = CaptureFunctions(memory, self._refuse)
        self._stream = torch.cpu.current_stream()
        self._refused: CaptureRefused | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Where torch asks this, it need not import its compiler (1.5 s) for a mode that never meets compiled code.
        return False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside the block. A refusal that the region swallowed is raised at its end."""
        with ExitStack() as stack:
            for owner, name, instead in self._replacements():
                stack.enter_context(_replaced(owner, name, instead))
            stack.enter_context(intercepted(self._launch))
            stack.enter_context(self)
            stack.enter_context(self._functions)
            yield
        if self._refused is not None:
            raise self._refused

    def _replacements(self) -> list[tuple[Any, str, Any]]:
        def synchronize(*_: object, **__: object) -> NoReturn:
            self._refuse("waits for the device", Code.NEEDS_SYNC)

        def tune(*_: object, **__: object) -> NoReturn:
            self._refuse("autotunes a kernel, which runs and times it")

        waits: list[tuple[Any, str]] = [(torch.cpu, "synchronize"), (torch.cuda, "synchronize")]
        waits += [(torch.accelerator, "synchronize"), (torch.cuda.Stream, "synchronize")]
        waits += [(torch.cuda.Event, "synchronize")]
        found: list[tuple[Any, str, Any]] = [(owner, name, synchronize) for owner, name in waits]
        found.append((torch.cuda, "is_current_stream_capturing", lambda: True))
        autotuner = _loaded("triton.runtime.autotuner", "Autotuner")
        return [*found, (autotuner, "_bench", tune)] if autotuner is not None else found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = [*tensors_in(args), *tensors_in(kwargs)]
        host = [tensor for tensor in used if self._memory.is_host(tensor)]
        if func is aten.lift_fresh.default or (len(host) == len(used) and (used or self._functions.making_host)):
            result = func(*args, **kwargs)
            self._memory.add_host(result)
            return result
        check_operator(func, args, kwargs, host, self._memory, self._refuse)
        line = self._note(used)
        if func.is_view:
            return func(*args, **kwargs)
        call_args, call_kwargs = self._frozen(args), self._frozen(kwargs)
        result = func(*args, **kwargs)
        outputs = tuple(fresh(result, used))
        for output in outputs:
            if output is not None:
                self._memory.add_own(output)
                self.tape.own.append(_same(output))
        if func not in _ALLOCATIONS:
            kept = tuple(None if output is None else _same(output) for output in outputs)
            self.tape.calls.append(_Call(func, call_args, call_kwargs, kept, line))
        return result

    def _note(self, used: Sequence[Tensor]) -> str:
        """Note the memory that is used, and on which stream; returns the implementation's current line."""
        if torch.cpu.current_stream() is not self._stream:
            self._refuse("works on another stream than the capturing one", Code.OTHER_STREAM)
        line = line_now(self._source)
        self._memory.use([tensor for tensor in used if not self._memory.is_host(tensor)], line)
        return line

    def _launch(self, launch: Launch) -> None:
        """Record a launch; it runs at the replays only, as on CUDA."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            self._record_launch(launch)

    def _record_launch(self, launch: Launch) -> None:
        used = [*tensors_in(launch.args), *tensors_in(launch.kwargs)]
        if any(self._memory.is_host(tensor) for tensor in used):
            self._refuse(f"the kernel {launch.name} is given a host tensor")
        line = self._note(used)
        kwargs = {name: self._frozen(value) for name, value in launch.kwargs.items() if name != "grid"}
        kwargs["grid"] = _settled(launch)
        args = (launch.kernel, *self._frozen(launch.args))
        self.tape.calls.append(_Call(launch.run, args, kwargs, (), line))

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
            frozen = [self._frozen(value) for value in values]
            return frozen if isinstance(values, list) else tuple(frozen)
        if isinstance(values, dict):
            return {name: self._frozen(value) for name, value in values.items()}
        return values

    def _refuse(self, sentence: str, code: Code = Code.ILLEGAL_IN_CAPTURE) -> NoReturn:
        refusal = CaptureRefused(code, f"{sentence} ({line_now(self._source)})")
        self._refused = self._refused or refusal
        raise refusal


def _same(tensor: Tensor) -> Tensor:
    """Another tensor of the same memory: what the implementation does to its own cannot move this one."""
    return torch.empty(0, dtype=tensor.dtype).set_(
        tensor.untyped_storage(), int(tensor.storage_offset()), tensor.size(), tensor.stride()
    )


def _thawed(values: Any) -> Any:
    if isinstance(values, _Elsewhere):
        return values.tensor()
    if isinstance(values, list):
        return [_thawed(value) for value in values]
    if isinstance(values, tuple) and type(values) is tuple:
        return tuple(_thawed(value) for value in values)
    if isinstance(values, dict):
        return {name: _thawed(value) for name, value in values.items()}
    return values


def _settled(launch: Launch) -> Any:
    """The launch's grid by value: a function of the arguments is asked once, at capture."""
    grid = launch.kwargs["grid"]
    if not callable(grid):
        return grid
    known: list[Any] = []

    def settled(arguments: Any) -> Any:
        if not known:
            known.append(grid(arguments))
        return known[0]

    return settled


def _loaded(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


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
