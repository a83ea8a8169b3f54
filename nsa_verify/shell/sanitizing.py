"""What ``replay --sanitizer`` needs before it can begin, and what it shows while it runs."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status

from nsa_verify.core.sanitizers import Sanitizer
from nsa_verify.engine.plan import EAGER
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.sanitizing import Running, require
from nsa_verify.shell.options import Unable
from nsa_verify.shell.reporter import PLAIN_PROGRESS_EVERY_S, say


def refuse(
    sanitizer: Sanitizer, device: str, executors: tuple[str, ...], workers: str, no_isolation: bool, max_memory: str
) -> None:
    """Raise ``Unable`` for whatever does not go together with ``sanitizer``, or is not there for it."""
    option = f"--sanitizer {sanitizer}"
    if other := [it for it in executors if it != EAGER]:
        raise Unable(f"{option}: implementations are called, not captured; leave out --executor {other[0]}")
    if no_isolation:
        raise Unable(f"{option}: runs in a process of its own; leave out --no-isolation")
    if workers not in ("auto", "1"):
        raise Unable(f"{option}: runs one process at a time; leave out --workers {workers}")
    if max_memory != "0":
        raise Unable(f"{option}: memory is not limited under it; leave out --max-memory {max_memory}")
    if sanitizer.device == "cpu" and device == "cuda":
        raise Unable(f"{option}: runs on the CPU; leave out --device cuda, or take --sanitizer memcheck")
    if sanitizer.device == "cuda":
        _refuse_without_cuda(option, device)
    try:
        require(sanitizer)
    except EngineError as error:
        raise Unable(str(error)) from error


def _refuse_without_cuda(option: str, device: str) -> None:
    from nsa_verify.device.select import DeviceError, resolve

    if device == "cpu":
        raise Unable(f"{option}: runs on CUDA; leave out --device cpu, or take --sanitizer oob")
    try:
        resolve("cuda")
    except DeviceError as error:
        raise Unable(
            f"{option}: needs CUDA, and PyTorch sees no CUDA device here; take --sanitizer oob, which runs on the CPU"
        ) from error


@contextmanager
def interruptible(sanitizer: Sanitizer | None) -> Iterator[None]:
    """Under a sanitizer SIGTERM is as Ctrl-C, if nobody handles it; without one the workers' engine sees to that."""
    number = signal.SIGTERM
    is_main = threading.current_thread() is threading.main_thread()
    if sanitizer is None or not is_main or signal.getsignal(number) is not signal.SIG_DFL:
        yield
        return
    signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


class Progress:
    """One line that changes, on a terminal; elsewhere a line every few seconds."""

    def __init__(self, out: Console, sanitizer: Sanitizer | None) -> None:
        self._out, self._sanitizer = out, sanitizer
        self._status: Status | None = None
        self._last_s = time.monotonic()

    def show(self, running: Running) -> None:
        """Say what runs now."""
        case = f"case {running.number} of {running.cases}, {running.path}"
        text = f"{self._sanitizer}: {running.implementation}, {case}"
        if self._out.is_terminal:
            self._status = self._status or self._out.status("")
            self._status.update(text.replace("[", r"\["))
            self._status.start()
        elif time.monotonic() - self._last_s > PLAIN_PROGRESS_EVERY_S:
            self._last_s = time.monotonic()
            say(self._out, text)

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self._status is not None:
            self._status.stop()
