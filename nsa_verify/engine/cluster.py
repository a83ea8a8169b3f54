"""A crew whose searchers are actors of a Ray cluster: they are replaced when they die, or their node does.

Ray is imported when a cluster is asked for, and not before. Here is who draws, who saves and who merges: actors get
work and give results, and know neither the corpus nor each other.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

from msgspec.structs import replace

from nsa_verify import __version__
from nsa_verify.engine import searcher
from nsa_verify.engine.actor import Searcher, Up
from nsa_verify.engine.crew import GRACE_S, POLL_S, TRIES, BaseCrew, Crew
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import START_S, EngineError

P = ParamSpec("P")
T = TypeVar("T")

RAY: Final = "ray"
"""The engine of a plan whose searchers are on a cluster."""
ADDRESS: Final = "RAY_ADDRESS"
ON_A_GPU: Final = 8
"""Searchers on a GPU if nobody says how many there are to be: their workers take 16 GiB of it at most."""
MOST: Final = 256
STARTS: Final = 3
"""How often in a row a searcher may die before it is up."""
SETTLE_S: Final = 5.0
"""How long after one searcher has come up the next is waited for before the work begins."""
AGAIN_S: Final = 1.0
ANSWER_S: Final = 5.0
HTTP2_SETTINGS: Final = b"\x04"
HTTP2_HELLO: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0" + HTTP2_SETTINGS + b"\0\0\0\0\0"
"""What a client of gRPC says first, and the kind of the frame that it is answered with."""
CONTROL: Final = "control"
"""The threads of an actor that hear what it is told while it works."""


class _Lost(Exception):
    """An actor is gone, or is not wanted any more."""


class Cluster:
    """The cluster that this process is connected to, and the searchers that wait there for the next crew."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.ray = _imported()
        self.is_ours = not self.ray.is_initialized()
        """Whether the connection was made here; a program that uses Ray itself keeps its own."""
        self.is_proven = False
        """Whether a crew has been at work here: who cannot work now came later, and the others go on without."""
        self._left_out: set[str] = set()
        self._spares: list[tuple[str, float, Any]] = []
        self._lock = threading.Lock()
        with _quiet():
            if self.is_ours:
                _connect(self.ray, address)
            self._actors = self.ray.remote(
                num_cpus=1,
                max_restarts=0,
                max_task_retries=0,
                concurrency_groups={CONTROL: 1},
                scheduling_strategy="SPREAD",
            )(Searcher)

    def total(self, name: str) -> float:
        """How much of a resource, such as ``CPU``, all nodes have together."""
        return float(self.ray.cluster_resources().get(name, 0.0))

    def room(self, gpu_share: float) -> int:
        """How many more searchers can start now, those that wait here included."""
        free = self.ray.available_resources()
        places = free.get("CPU", 0.0)
        if gpu_share:
            places = min(places, free.get("GPU", 0.0) / gpu_share)
        return int(places) + len(self._spares)

    def searcher(self, device: str, gpu_share: float) -> tuple[Any, bool]:
        """One that waits here, or a new one; and whether it is new."""
        with self._lock:
            for place, (of, share, actor) in enumerate(self._spares):
                if (of, share) == (device, gpu_share):
                    del self._spares[place]
                    return actor, False
        return self._actors.options(num_gpus=gpu_share or None).remote(os.getcwd(), list(sys.path)), True

    def keep(self, device: str, gpu_share: float, actor: Any) -> None:
        """Have a searcher wait for the next crew: its process has everything imported."""
        with self._lock:
            self._spares.append((device, gpu_share, actor))

    def leave_out(self, problem: Exception) -> None:
        """Tell once why a searcher does not take part."""
        if self.is_proven and str(problem) not in self._left_out:
            self._left_out.add(str(problem))
            logging.getLogger(__name__).warning("a searcher is left out: %s", problem)

    def kill(self, actor: Any) -> None:
        """End an actor and its worker, whatever it is doing, or give up its place in the queue."""
        with suppress(Exception):  # it is gone, or the connection is
            self.ray.kill(actor)

    def close(self) -> None:
        """End the searchers that wait, and the connection if it is ours."""
        for *_, actor in self._spares:
            self.kill(actor)
        self._spares.clear()
        if self.is_ours:
            self.ray.shutdown()


_CONNECTED: Final[list[Cluster]] = []


def connected(address: str) -> Cluster:
    """The cluster at ``address`` (see ``Plan.address``), to which this process stays connected until ``disconnect``.

    Raises ``EngineError`` if there is none, or it cannot be used from here.
    """
    if _CONNECTED and _CONNECTED[0].address != address:
        disconnect()
    if not _CONNECTED:
        _CONNECTED.append(Cluster(address))
    return _CONNECTED[0]


def disconnect() -> None:
    """End the connection to the cluster, if there is one, and every searcher there."""
    while _CONNECTED:
        _CONNECTED.pop().close()


def _imported() -> Any:
    try:
        with _quiet():
            import ray
    except ImportError as error:
        raise EngineError("--engine ray: Ray is not installed; pip install 'nsa-verify[ray]'") from error
    return ray


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray warns of what is to change in it, says what it counts, and takes SIGTERM for itself."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {it: signal.getsignal(it) for it in (signal.SIGTERM, signal.SIGINT) if is_main}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _connect(ray: Any, given: str) -> None:
    address = given or os.environ.get(ADDRESS) or "auto"
    named = f"--ray-address {given}" if given else f"{ADDRESS}={address}" if address != "auto" else "--engine ray"
    if address not in ("auto", "local"):
        _ask_for_answer(address, named)
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        sentence = f"{named}: no Ray cluster runs on this machine"
        if address != "auto":
            sentence = f"{named}: the Ray cluster there cannot be used from here: {_line(error)}"
        raise EngineError(
            f"{sentence}; start one with `ray start --head`, or join one with `ray start --address=HOST:6379`"
        ) from error
    except Exception as error:
        ray.shutdown()
        remedy = "this machine must be a node of the cluster, with its versions of Ray and Python"
        raise EngineError(f"{named}: cannot connect to the Ray cluster: {_line(error)}; {remedy}") from error
    _hush(ray)


def _hush(ray: Any) -> None:
    """End the thread that prints what happens to nodes, which ``log_to_driver`` does not, as Ray does when it ends."""
    with suppress(AttributeError):
        own = ray._private.worker.global_worker
        own.threads_stopped.set()
        own.gcs_error_subscriber.close()
        own.listener_thread.join(ANSWER_S)
        own.threads_stopped.clear()


def _ask_for_answer(address: str, named: str) -> None:
    """Ray itself would try for a long time, and tell of it in many lines."""
    if "://" in address:
        raise EngineError(
            f"{named}: a Ray client cannot be used for this; run it on a node of the cluster, with the HOST:PORT that"
            " `ray start --head` printed"
        )
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as there:
            there.sendall(HTTP2_HELLO)
            answer = there.recv(9)
    except (ValueError, OverflowError):
        raise EngineError(f"{named}: must be HOST:PORT, as in 10.0.0.1:6379, or auto, or local") from None
    except OSError as error:
        raise EngineError(
            f"{named}: nothing answers there ({error.strerror or error}); give the address that `ray start --head`"
            " printed, or start a cluster with it"
        ) from error
    if answer[3:4] != HTTP2_SETTINGS and os.environ.get("RAY_USE_TLS", "0") == "0":
        raise EngineError(
            f"{named}: what answers there is no Ray cluster; give the address that `ray start --head` printed"
        )


def _line(error: BaseException) -> str:
    """What Ray says in many lines, as part of a sentence."""
    text = " ".join(str(error).split()).rstrip(".;: ")
    return text if len(text) <= 400 else f"{text[:400]}..."


def settled(plan: Plan, wanted: int | None) -> Plan:
    """``plan`` with the device, the number of workers (None: what the cluster has) and the share of a GPU that each of
    them has on its cluster.

    More workers than the cluster has room for are asked for all the same: they join when there is room. Raises
    ``EngineError`` as ``connected`` does, and where the cluster has no GPU, or no CPU at all.
    """
    cluster = connected(plan.address)
    cpus, gpus = int(cluster.total("CPU")), int(cluster.total("GPU"))
    if plan.device == "cuda" and not gpus:
        raise EngineError(
            "--device cuda: no node of the Ray cluster has a GPU; use --device cpu, or start nodes with"
            " `ray start --num-gpus=N`"
        )
    if not cpus:
        raise EngineError(
            "--engine ray: no node of the Ray cluster has a CPU to offer; start one with"
            " `ray start --address=HOST:6379 --num-cpus=N`"
        )
    if plan.device == "cpu" or not gpus:
        return replace(plan, device="cpu", workers=min(wanted or cpus, MOST))
    workers = min(wanted or min(cpus, gpus * ON_A_GPU), MOST)
    share = math.floor(10_000 / math.ceil(workers / gpus)) / 10_000
    return replace(plan, device="cuda", workers=workers, gpu_share=share)


def crew_of(plan: Plan) -> BaseCrew:
    """Who is to do the work of ``plan``. Raises ``EngineError`` as ``connected`` does."""
    return RayCrew(plan) if plan.engine == RAY else Crew(plan.workers, plan.device)


class _Piece(NamedTuple):
    """Work that waits for a searcher."""

    future: Future[Any]
    work: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class RayCrew(BaseCrew):
    """Searchers on a cluster; ``plan`` is one that ``settled`` gave.

    Each has a seat, a thread that has an actor start, hands it one piece of work after the other, and has another start
    in its place when it dies. Seats whose actor has no room yet leave the work to the others.
    """

    WERE_KILLED = (
        f"the searchers that were handed the same work were lost {TRIES} times, or their nodes; see whether memory runs"
        " out there (Ray's logs say which process it ended), and run again, with fewer --workers if it does"
    )

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.workers)
        self.cluster = connected(plan.address)
        self.plan, self.gpu_share = _theirs(plan), plan.gpu_share
        self.queue: SimpleQueue[_Piece | None] = SimpleQueue()
        self.is_closing = self.is_killed = False
        self._expected = min(plan.workers, self.cluster.room(plan.gpu_share))
        self._up_at_s = time.monotonic()
        self.seats = [_Seat(self) for _ in range(plan.workers)]
        for it in self.seats:
            it.start()

    @property
    def replaced(self) -> int:
        """As ``BaseCrew.replaced``."""
        return sum(it.replaced for it in self.seats)

    def hello(self, plan: Plan) -> Hello:  # noqa: ARG002 - every searcher has greeted with the crew's own
        """As ``BaseCrew.hello``, of those that have room in the cluster; others join later."""
        last_s, up = time.monotonic(), 0
        while True:
            self._look()
            problems = [it.problem for it in self.seats if it.problem is not None]
            if problems and not self.cluster.is_proven:
                raise problems[0]
            now = sum(it.said is not None for it in self.seats)
            if now != up:
                last_s, up = time.monotonic(), now
            if up and (up + len(problems) >= self._expected or time.monotonic() - last_s > SETTLE_S):
                break
            time.sleep(POLL_S / 4)
        self.said = next(it.said for it in self.seats if it.said is not None)
        self._up = self.cluster.is_proven = True
        return self.said

    def _begin(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        theirs = [_theirs(it) if isinstance(it, Plan) else it for it in args]
        self.queue.put(_Piece(future, work, theirs, kwargs))
        return future

    def _look(self) -> None:
        left = [it for it in self.seats if it.problem is None]
        if not left and self.seats[0].problem is not None:
            raise self.seats[0].problem
        if any(it.said is not None for it in left):
            self._up_at_s = time.monotonic()
        elif time.monotonic() - self._up_at_s > START_S:
            raise EngineError(
                f"--engine ray: the cluster has had no room for a searcher for {START_S:.0f} s; see `ray status`, and"
                " wait until others are done there, or add nodes"
            )

    def _ask_to_stop(self) -> None:
        """The seats look at ``interrupted``: a signal handler must not call Ray."""

    def _kill(self) -> None:
        self.is_closing = self.is_killed = True
        self._empty()

    def _empty(self) -> None:
        """Nobody will do what waits."""
        with suppress(Empty):
            while (piece := self.queue.get_nowait()) is not None:
                if piece.future.set_running_or_notify_cancel():
                    piece.future.set_exception(BrokenProcessPool("it was not begun"))

    def _end(self) -> None:
        self.is_closing = True
        self._empty()
        for _ in self.seats:
            self.queue.put(None)
        deadline = time.monotonic() + 2 * GRACE_S
        for it in self.seats:
            while it.is_alive() and time.monotonic() < deadline:
                it.join(POLL_S)
        self._kill()
        for it in self.seats:
            it.join(10 * POLL_S)


def _theirs(plan: Plan) -> Plan:
    """What an actor is told: the corpus and the GPUs of this machine are not its own."""
    return replace(plan, folder="", gpus=(), engine="local", address="", gpu_share=0.0)


class _Seat(threading.Thread):
    """The place of one searcher in a crew."""

    def __init__(self, crew: RayCrew) -> None:
        super().__init__(daemon=True)
        self._crew, self._cluster, self._ray = crew, crew.cluster, crew.cluster.ray
        self._share = crew.gpu_share
        self.said: Hello | None = None
        """What its worker said; None while there is none."""
        self.problem: Exception | None = None
        """Why nobody will sit here any more."""
        self.replaced = 0

    def run(self) -> None:
        """Do what is in the crew's queue until the crew ends."""
        try:
            self._sit()
        except Exception as error:  # noqa: BLE001 - the crew raises it
            self.problem = error
            self.said = None
            if not self._crew.is_closing:
                self._cluster.leave_out(error)

    def _sit(self) -> None:
        starts = 0
        while not self._crew.is_closing:
            actor, is_new = self._cluster.searcher(self._crew.plan.device, self._share)
            try:
                self._greet(actor)
                starts = 0
                while (piece := self._crew.queue.get()) is not None:
                    self._do(actor, piece)
                self._let_go(actor)
                return
            except _Lost as lost:
                self._cluster.kill(actor)
                starts += is_new and self.said is None
                self.replaced += not (is_new and self.said is None)
                self.said = None
                if starts >= STARTS and not self._crew.is_closing:
                    raise EngineError(
                        f"--engine ray: searchers die on the cluster before they are up: {lost}; every node needs the"
                        f" same Python with nsa-verify {__version__}, and free memory"
                    ) from lost
            except BaseException:
                self._cluster.kill(actor)
                raise
            time.sleep(AGAIN_S)

    def _greet(self, actor: Any) -> None:
        up: Up = self._awaited(actor, actor.up.remote())
        if up.version != __version__:
            raise EngineError(
                f"--engine ray: {up.host} has nsa-verify {up.version}, and this machine {__version__}; install the same"
                " on every node"
            )
        said, error = self._awaited(actor, actor.do.remote(searcher.hello, [self._crew.plan], {}))
        if error is not None:
            raise error
        for it in self._crew.seats:
            if it.said is not None and it.said.pairs != said.pairs:
                raise EngineError(
                    f"--engine ray: {up.host} has other implementations or executors than another node; install the"
                    " same there"
                )
        self.said = said

    def _do(self, actor: Any, piece: _Piece) -> None:
        if not piece.future.set_running_or_notify_cancel():
            return
        try:
            value, error = self._awaited(actor, actor.do.remote(piece.work, piece.args, piece.kwargs))
        except _Lost as lost:
            piece.future.set_exception(BrokenProcessPool(str(lost)))
            raise
        except Exception as failed:  # noqa: BLE001 - it reaches whoever asks for the result
            value, error = None, failed
        if error is not None:
            piece.future.set_exception(error)
        else:
            piece.future.set_result(value)

    def _awaited(self, actor: Any, reference: Any) -> Any:
        """What an actor answers. Raises ``_Lost`` if it died, or is to die."""
        crew, asked = self._crew, False
        while not self._ray.wait([reference], timeout=POLL_S)[0]:
            if crew.is_killed or (crew.is_closing and self.said is None):
                raise _Lost("it was ended")
            if crew.interrupted and not asked:
                asked = True
                actor.stop.options(concurrency_group=CONTROL).remote()
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise EngineError(f"--engine ray: a searcher failed: {_line(error)}") from error
        except self._ray.exceptions.RayError as error:
            raise _Lost(_line(error)) from error

    def _let_go(self, actor: Any) -> None:
        """End its worker, and keep it for the next crew."""
        self._awaited(actor, actor.do.remote(searcher.close, [], {}))
        if self._crew.interrupted:
            self._cluster.kill(actor)
        else:
            self._cluster.keep(self._crew.plan.device, self._share, actor)
