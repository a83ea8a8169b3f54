"""What Triton launches while somebody listens: the kernel, its arguments, and the key under which it is compiled.

Triton is patched only while a listener is there, and only if an implementation has imported it; but for the note that
it compiles, which stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from inspect import signature
from typing import Any, Final, NamedTuple

import torch

from nsa_verify.core.marks import MARKS

Proceed = Callable[[], Any]


class Launch(NamedTuple):
    """One launch. ``kernel`` is Triton's object; ``run`` its unpatched method, called ``run(kernel, *args, ...)``."""

    kernel: Any
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """With ``grid`` and ``warmup``, as Triton passes them."""

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(getattr(self.kernel, "__name__", "kernel"))


Listener = Callable[[Launch], Any]
"""Gets a launch instead of Triton and returns what the caller gets; to let it happen it calls ``launch.run``."""

_AUTOTUNER = "triton.runtime.autotuner", "Autotuner"
_RUNNERS = (("triton.runtime.interpreter", "InterpretedFunction"), ("triton.runtime.jit", "JITFunction"))


@contextmanager
def intercepted(listener: Listener) -> Iterator[None]:
    """Every launch goes to ``listener`` while the block runs, but for those that an autotuner times."""
    tuning: list[bool] = []
    classes = [getattr(sys.modules[module], name) for module, name in _RUNNERS if module in sys.modules]
    replaced = [(it, "run", it.run, _detour(it.run, listener, tuning)) for it in classes]
    if _AUTOTUNER[0] in sys.modules:
        autotuner = getattr(sys.modules[_AUTOTUNER[0]], _AUTOTUNER[1])
        replaced.append((autotuner, "_bench", autotuner._bench, _marked(autotuner._bench, tuning)))
    for owner, name, _, instead in replaced:
        setattr(owner, name, instead)
    try:
        yield
    finally:
        for owner, name, original, _ in replaced:
            setattr(owner, name, original)


def _detour(original: Callable[..., Any], listener: Listener, tuning: list[bool]) -> Callable[..., Any]:
    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if tuning:
            return original(kernel, *args, **kwargs)
        return listener(Launch(kernel, original, args, kwargs))

    return run


def _marked(original: Callable[..., Any], tuning: list[bool]) -> Callable[..., Any]:
    def bench(*args: Any, **kwargs: Any) -> Any:
        tuning.append(True)
        try:
            return original(*args, **kwargs)
        finally:
            tuning.pop()

    return bench


def announce_compilations() -> None:
    """Have what Triton compiles noted while it is compiled: whoever waits for this process then waits longer.

    Triton's own hooks are not used: they write a kernel's constants as JSON, and fail where that cannot be.
    """
    jit = getattr(sys.modules.get("triton.runtime.jit"), "JITFunction", None)
    original = getattr(jit, "_do_compile", None)
    if original is None or getattr(original, "is_announced", False):
        return

    @wraps(original)
    def announced(*args: Any, **kwargs: Any) -> Any:
        MARKS[0].compiling(True)
        try:
            return original(*args, **kwargs)
        finally:
            MARKS[0].compiling(False)

    announced.is_announced = True  # type: ignore[attr-defined]
    jit._do_compile = announced  # type: ignore[union-attr]


class _Parameter(NamedTuple):
    name: str
    constant: bool
    specialized: bool
    aligned: bool


@lru_cache(maxsize=256)
def _parameters(kernel: Any) -> tuple[_Parameter, ...]:
    """How Triton treats each parameter of ``kernel``; the interpreter's object keeps less than the compiler's."""
    options = getattr(kernel, "kwargs", None) or vars(kernel)
    plain, unaligned = (
        set(options.get(name) or ()) for name in ("do_not_specialize", "do_not_specialize_on_alignment")
    )
    return tuple(
        _Parameter(
            name,
            str(getattr(it.annotation, "__name__", it.annotation)).rpartition(".")[2] == "constexpr",
            index not in plain and name not in plain,
            index not in unaligned and name not in unaligned,
        )
        for index, (name, it) in enumerate(signature(kernel.fn).parameters.items())
    )


class CompileKey(NamedTuple):
    """What a launch is compiled for. ``constants`` may take any value, one compilation for each; ``classes`` are the
    few ways in which Triton specialises an argument, and the launch's options."""

    kernel: str
    constants: tuple[tuple[str, str], ...]
    classes: tuple[str, ...]

    def __str__(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}({constants}; {' '.join(self.classes)})"


def compile_key(launch: Launch) -> CompileKey:
    """The key of ``launch``, by Triton's rules: constants by value, integers by width, equality to 1 and divisibility
    by 16, pointers by type and alignment, launch options by value."""
    parameters = _parameters(launch.kernel)
    names = [it.name for it in parameters]
    given = dict(zip(names, launch.args, strict=False)) | launch.kwargs
    given.pop("grid", None)
    given.pop("warmup", None)
    constants = [(it.name, repr(given[it.name])) for it in parameters if it.constant and it.name in given]
    options = sorted(f"{name}={value!r}" for name, value in given.items() if name not in names)
    classes = tuple(_class(it, given[it.name]) for it in parameters if not it.constant and it.name in given)
    return CompileKey(launch.name, tuple(constants), (*classes, *options))


_IN_A_TUPLE: Final = _Parameter("", constant=False, specialized=True, aligned=True)
"""What is said of a parameter that is a tuple does not reach its elements."""


def _class(parameter: _Parameter, value: Any) -> str:
    if isinstance(value, tuple):
        return f"({' '.join(_class(_IN_A_TUPLE, element) for element in value)})"
    if isinstance(value, torch.Tensor):
        aligned = parameter.specialized and parameter.aligned and value.data_ptr() % 16 == 0
        return f"*{str(value.dtype).rpartition('.')[2]}{':16' if aligned else ''}"
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value).__name__ if value is not None else "None"
    width = "i32" if -(2**31) <= value < 2**31 else "i64"
    if not parameter.specialized:
        return width
    if value == 1:
        return "1"
    return f"{width}{':16' if parameter.aligned and value % 16 == 0 else ''}"
