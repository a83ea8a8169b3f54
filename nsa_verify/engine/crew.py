"""Who runs the work: this process, or several worker processes; and what Ctrl-C does to it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from nsa_verify.engine import worker
from nsa_verify.engine.plan import Plan

P = ParamSpec("P")
T = TypeVar("T")

GRACE_S = 2.0
"""How long after Ctrl-C a worker process may take to end its case before it is killed."""
POLL_S = 0.2


class EngineError(Exception):
    """The engine could not do its job; the message is one sentence with the remedy."""


class Crew:
    """``submit`` work, get futures. With one worker the work is done in this process, at once.

    Whoever did the work gives back at the end what it kept from case to case, captured graphs above all.

    Worker processes are spawned, never forked: they may hold a CUDA context, and threads. While the crew is entered the
    first Ctrl-C asks the work to end with what it has and sets ``interrupted``; a second one, or one that comes before
    the workers are up, is a ``KeyboardInterrupt`` wherever it strikes.
    """

    def __init__(self, workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self.workers = workers
        self.interrupted = False
        self._up = False
        self._interrupted_at_s = 0.0
        self._handler: Any = None
        self._strangers: set[BaseProcess] = set(multiprocessing.active_children())
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._stop = context.Event()
            self._pool = ProcessPoolExecutor(workers, context, worker.obey, (self._stop, context.Barrier(workers)))

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future of ``work(*args)``; its exceptions are the future's."""
        if self._pool is not None:
            with _deaf_children():
                return self._pool.submit(work, *args, **kwargs)
        future: Future[T] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it reaches whoever asks for the result
            future.set_exception(error)
        return future

    def hello(self, plan: Plan) -> worker.Hello:
        """Have every worker start up, and return what they say. Raises what kept one from starting."""
        futures = [self.submit(worker.hello, plan) for _ in range(self.workers)]
        results = [future.result() for future in futures]
        self._up = True
        return results[0]

    def wait(self, futures: Iterable[Future[T]]) -> set[Future[T]]:
        """Those that are done, at least one; a worker that outstays ``GRACE_S`` after Ctrl-C is killed for it."""
        pending = set(futures)
        while True:
            done, _ = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
            if done:
                return done
            if self.interrupted and time.monotonic() - self._interrupted_at_s > GRACE_S:
                self._kill()

    def result(self, future: Future[T]) -> T | None:
        """What a future that is done gave; None if its worker was killed because of Ctrl-C."""
        try:
            return future.result()
        except BrokenProcessPool:
            if self.interrupted:
                return None
            raise

    def stop(self) -> None:
        """Ask the workers to end what they are doing with what they have."""
        self.interrupted = True
        self._interrupted_at_s = time.monotonic()
        worker.stop()
        if self._pool is not None:
            self._stop.set()

    def __enter__(self) -> Self:
        worker.stop(False)
        # Whoever has a handler of his own, or calls from another thread, keeps what he has.
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.getsignal(signal.SIGINT)
            if self._handler is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self._pool is not None:
                if kind is not None:
                    self.stop()
                    if not issubclass(kind, Exception):
                        self._kill()
                self._pool.shutdown(wait=True, cancel_futures=True)
        finally:
            worker.stop(False)
            if self._handler is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._handler)
            worker.close()
        if isinstance(error, BrokenProcessPool):
            raise EngineError(
                "a worker process died while it ran a case; run again with --workers 1 to see which implementation"
                " takes the process down"
            ) from error

    def _on_interrupt(self, _: int, __: FrameType | None) -> None:
        if self.interrupted or not self._up:
            raise KeyboardInterrupt
        self.stop()

    def _kill(self) -> None:
        for child in set(multiprocessing.active_children()) - self._strangers:
            child.kill()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started here never hear the terminal's Ctrl-C, not even before their first line of Python has run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
