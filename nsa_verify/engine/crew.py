"""Who does the work: this process, or several searchers; and what Ctrl-C and SIGTERM do to it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any, ClassVar, Generic, ParamSpec, Self, TypeVar

from nsa_verify.engine import searcher
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError, deaf_children, fork_context

P = ParamSpec("P")
T = TypeVar("T")

GRACE_S = 4.0
"""How long after Ctrl-C a searcher may take to end its case before it is killed; longer than it gives its worker."""
POLL_S = 0.2
TRIES = 3
"""How often work is begun whose searchers are killed from outside."""
_SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Those that ask the work to end, and the handler that shows that nobody else handles them."""


class Promise(Generic[T]):
    """Work that was submitted. ``begin`` begins it, again if need be."""

    def __init__(self, begin: Callable[[], Future[T]]) -> None:
        self._begin, self._tries = begin, 1
        self.future = begin()

    def begin_again(self) -> bool:
        """Begin it anew if its searcher was killed; False if it failed by itself, or too often."""
        if self._tries >= TRIES or not isinstance(self.future.exception(), BrokenProcessPool):
            return False
        self._tries += 1
        self.future = self._begin()
        return True

    def result(self) -> T:
        """What the work gave, waiting for it; its exceptions are raised."""
        return self.future.result()


class Deferred:
    """While it is entered, and no crew is, Ctrl-C and SIGTERM are noted in ``asked``; a second one interrupts.

    One that a crew has heard is noted when the crew ends, and is none of the two. One inside another takes its place:
    it begins with what that has noted, and what it notes is its own. Whoever has handlers of his own, or calls from
    another thread, keeps what he has.
    """

    def __init__(self) -> None:
        self.asked = False
        self._has_heard = False
        self._before: dict[int, Any] = {}

    def __call__(self, _: int, __: FrameType | None) -> None:
        """Be the handler."""
        if self._has_heard:
            raise KeyboardInterrupt
        self.asked = self._has_heard = True

    def __enter__(self) -> Self:
        _replace_usual(self, self._before)
        if _was_asked(self._before):
            self.asked = True
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def _replace_usual(handler: Any, before: dict[int, Any]) -> None:
    """Have ``handler`` hear the signals that nobody handles, or a ``Deferred``; ``before`` gets what heard them."""
    if threading.current_thread() is threading.main_thread():
        for number, usual in _SIGNALS.items():
            now = signal.getsignal(number)
            if now is usual or isinstance(now, Deferred):
                before[number] = now
                signal.signal(number, handler)


def _was_asked(before: dict[int, Any]) -> bool:
    """Whether a ``Deferred`` of these handlers has noted a signal: to be asked when no more can come to it."""
    return any(isinstance(it, Deferred) and it.asked for it in before.values())


class BaseCrew(ABC):
    """``submit`` work, get promises; who does it is the business of those that inherit.

    While the crew is entered the first Ctrl-C or SIGTERM asks the work to end with what it has and sets
    ``interrupted``; a second one, or one that comes before the workers are up, is a ``KeyboardInterrupt`` wherever it
    strikes, as is one that was ``Deferred`` before. The ``Deferred`` outside is told in the end of the one that came:
    nobody may have looked at ``interrupted`` any more. A searcher that is killed from outside is replaced, and what it
    did is begun again.
    """

    WERE_KILLED: ClassVar[str]
    """What is said if work cannot be had because its searchers were killed again and again."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.interrupted = False
        self.said: Hello
        """What a worker said when it was up; from ``hello`` on."""
        self._up = self._has_heard = False
        self._interrupted_at_s = 0.0
        self._handlers: dict[int, Any] = {}

    @property
    def replaced(self) -> int:
        """How many searchers died with their process or their machine, and were replaced by others."""
        return 0

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Promise[T]:
        """A promise of ``work(*args)``; its exceptions are the promise's."""
        return Promise(lambda: self._begin(work, *args, **kwargs))

    @abstractmethod
    def hello(self, plan: Plan) -> Hello:
        """Have searchers and their workers start up, and return what they say. Raises what kept one from starting."""

    @abstractmethod
    def _begin(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have it done; a future whose searcher was killed raises ``BrokenProcessPool``."""

    @abstractmethod
    def _look(self) -> None:
        """Called while work is waited for: raises ``EngineError`` if nobody will ever do it."""

    @abstractmethod
    def _ask_to_stop(self) -> None:
        """Ask the searchers to end what they do, with what they have. May come from a signal handler."""

    @abstractmethod
    def _kill(self) -> None:
        """End the searchers, whatever they are doing."""

    @abstractmethod
    def _end(self) -> None:
        """Wait for what was begun, and let the searchers go."""

    def wait(self, promises: Iterable[Promise[T]]) -> set[Promise[T]]:
        """Those that are done, at least one; a searcher that outstays ``GRACE_S`` after Ctrl-C is killed for it."""
        pending = set(promises)
        while True:
            done, _ = wait([it.future for it in pending], timeout=POLL_S, return_when=FIRST_COMPLETED)
            ended = {it for it in pending if it.future in done}
            if not self.interrupted:
                ended = {it for it in ended if not it.begin_again()}
            if ended:
                return ended
            self._look()
            if self.interrupted and time.monotonic() - self._interrupted_at_s > GRACE_S:
                self._kill()

    def result(self, promise: Promise[T]) -> T | None:
        """What a promise that is done gave; None if its searcher was killed because of Ctrl-C."""
        try:
            return promise.result()
        except BrokenProcessPool:
            if self.interrupted:
                return None
            raise

    def stop(self) -> None:
        """Ask the workers to end what they are doing with what they have."""
        self.interrupted = True
        self._interrupted_at_s = time.monotonic()
        searcher.stop()
        self._ask_to_stop()

    def __enter__(self) -> Self:
        searcher.stop(False)
        try:
            _replace_usual(self._on_interrupt, self._handlers)
            if _was_asked(self._handlers):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            self._hand_back()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is not None:
                self.stop()
                if not issubclass(kind, Exception):
                    self._kill()
            self._end()
        finally:
            self._hand_back()
            searcher.stop(False)
            searcher.close()
        if isinstance(error, BrokenProcessPool):
            raise EngineError(self.WERE_KILLED) from error

    def _hand_back(self) -> None:
        """Signals are heard again by whoever heard them before, who learns of the one that came to the crew."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for handler in self._handlers.values() if self._has_heard else ():
            if isinstance(handler, Deferred):
                handler.asked = True
        self._handlers.clear()

    def _on_interrupt(self, _: int, __: FrameType | None) -> None:
        if self.interrupted or not self._up:
            raise KeyboardInterrupt
        self._has_heard = True
        self.stop()


class Crew(BaseCrew):
    """Searchers of this machine. With one worker the work is done in this process, at once.

    Whoever did the work ends at the end the worker that it kept. Searchers are forked from a process that has no CUDA
    context and no threads.
    """

    WERE_KILLED = (
        "the processes that draw the cases were killed; see whether memory runs out here, and run again, with fewer"
        " --workers if it does"
    )

    def __init__(self, workers: int, device: str = "auto") -> None:
        super().__init__(workers)
        self._pool: ProcessPoolExecutor | None = None
        self._strangers: set[BaseProcess] = set(multiprocessing.active_children())
        if workers > 1:
            self._context = fork_context(device)
            self._stop = self._context.Event()
            self._all_ready = self._context.Barrier(workers)
            self._numbers = self._context.Value("i", 0)
            self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers, self._context, searcher.obey, (self._stop, self._all_ready, self._numbers)
        )

    def _begin(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._pool is not None:
            with deaf_children():
                try:
                    return self._pool.submit(work, *args, **kwargs)
                except BrokenProcessPool:
                    self._pool = self._new_pool()
                    return self._pool.submit(work, *args, **kwargs)
        future: Future[T] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it reaches whoever asks for the result
            future.set_exception(error)
        return future

    def hello(self, plan: Plan) -> Hello:
        """As ``BaseCrew.hello``: every searcher is up when it returns."""
        promises = [self.submit(searcher.hello, plan) for _ in range(self.workers)]
        said = [promise.result() for promise in promises]
        self.said = said[0]
        self._up = True
        return self.said

    def _look(self) -> None:
        """The futures of a pool that is broken say so."""

    def _ask_to_stop(self) -> None:
        if self._pool is not None:
            self._stop.set()

    def _kill(self) -> None:
        if self._pool is not None:
            for child in set(multiprocessing.active_children()) - self._strangers:
                child.kill()

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
