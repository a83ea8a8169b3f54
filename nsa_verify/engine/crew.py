"""Who runs the work: this process, or several worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from nsa_verify.engine import worker
from nsa_verify.engine.plan import Plan

P = ParamSpec("P")
T = TypeVar("T")


class EngineError(Exception):
    """The engine could not do its job; the message is one sentence with the remedy."""


class Crew:
    """``submit`` work, get futures. With one worker the work is done in this process, at once.

    Worker processes are spawned, never forked: they may hold a CUDA context, and threads.
    """

    def __init__(self, workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self.workers = workers
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._stop = context.Event()
            self._pool = ProcessPoolExecutor(workers, context, worker.obey, (self._stop, context.Barrier(workers)))

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future of ``work(*args)``; its exceptions are the future's."""
        if self._pool is not None:
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
        return results[0]

    def stop(self) -> None:
        """Ask the workers to end what they are doing with what they have."""
        if self._pool is not None:
            self._stop.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is None:
            return
        if kind is not None:
            self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise EngineError(
                "a worker process died while it ran a case; run again with --workers 1 to see which implementation"
                " takes the process down"
            ) from error
