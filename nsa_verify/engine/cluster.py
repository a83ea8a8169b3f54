"""A crew whose searchers are actors of a Ray cluster: they are replaced when they die, or their node does.

Ray is imported when a cluster is asked for, and not before. Here is who draws, who saves and who merges: actors get
work and give results, and know neither the corpus nor each other.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
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
from nsa_verify.engine.reaching import ANSWER_S, answers, apart, ask_for_answer, line, quiet, refusal

P = ParamSpec("P")
T = TypeVar("T")

RAY: Final = "ray"
"""The engine of a plan whose searchers are on a cluster."""
ADDRESS: Final = "RAY_ADDRESS"
STARTS: Final = 3
"""How often in a row a searcher may die before it is up."""
SETTLE_S: Final = 5.0
"""How long after one searcher has come up the next is waited for before the work begins."""
AGAIN_S: Final = 1.0
LEFT_OUT: Final = 100
"""How many reasons why searchers are left out are told."""
GONE_S: Final = 10.0
"""How long the ports of the cluster may be silent. Ray itself ends this process after a minute, with exit code 1."""
CONTROL: Final = "control"
"""The threads of an actor that hear what it is told while it works."""


class _Lost(Exception):
    """An actor is gone, or is not wanted any more."""


class _Late(Exception):
    """An actor is still coming up, and the work is over."""


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
        self._spares: list[tuple[str, float, Any, bool]] = []
        self._lock = threading.Lock()
        self._vital: dict[tuple[str, int], str] = {}
        """Where the processes listen that nothing works without, and what is said if one is gone."""
        self._silent: dict[tuple[str, int], float] = {}
        self._is_gone = False
        self._looked_at_s = 0.0
        with quiet():
            if self.is_ours:
                _connect(self.ray, address)
            self._actors = self.ray.remote(
                num_cpus=1,
                max_restarts=0,
                max_task_retries=0,
                concurrency_groups={CONTROL: 1},
                scheduling_strategy="SPREAD",
            )(Searcher)
            with suppress(KeyError, StopIteration, ValueError):  # a node that Ray describes otherwise is not looked at
                self._find_vital()

    def _find_vital(self) -> None:
        context = self.ray.get_runtime_context()
        own = next(it for it in self.ray.nodes() if it["NodeID"] == context.get_node_id())
        host, _, port = str(context.gcs_address).rpartition(":")
        kept = "what was found is kept; start it again, and this command"
        for place, what in (
            ((host.strip("[]"), int(port)), f"the head of the Ray cluster, {context.gcs_address}, is gone"),
            ((own["NodeManagerAddress"], own["NodeManagerPort"]), "the Ray node of this machine is gone (its raylet)"),
        ):
            if answers(*place):
                self._vital[place] = f"--engine ray: {what}; {kept}"

    def look(self, at_once: bool = False) -> bool:
        """Whether the head of the cluster and the node of this machine answer, asked without Ray, which would block.

        Raises ``EngineError`` if one of them has not for ``GONE_S``.
        """
        now = time.monotonic()
        if at_once or now - self._looked_at_s > AGAIN_S:
            for place, sentence in self._vital.items():
                if answers(*place):
                    self._silent.pop(place, None)
                elif now - self._silent.setdefault(place, now) > GONE_S:
                    self._is_gone = True
                    raise EngineError(sentence)
            self._looked_at_s = time.monotonic()
        return not self._silent

    def _asked(self, question: Callable[[], T]) -> T:
        """What Ray says, unless the cluster goes meanwhile."""
        future: Future[T] = Future()

        def ask() -> None:
            try:
                future.set_result(question())
            except Exception as error:  # noqa: BLE001 - raised below
                future.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        while not wait([future], POLL_S).done:
            self.look()
        try:
            return future.result()
        except self.ray.exceptions.RayError as error:
            raise EngineError(f"--engine ray: the cluster does not say what it has: {line(error)}") from error

    def total(self, name: str) -> float:
        """How much of a resource, such as ``CPU``, all nodes have together."""
        return float(self._asked(self.ray.cluster_resources).get(name, 0.0))

    def room(self, gpu_share: float) -> int:
        """How many more searchers can start now, those that are up and wait here included."""
        free = self._asked(self.ray.available_resources)
        places = free.get("CPU", 0.0)
        if gpu_share:
            places = min(places, free.get("GPU", 0.0) / gpu_share)
        return int(places) + sum(is_up for *_, is_up in self._spares)

    def searcher(self, device: str, gpu_share: float) -> tuple[Any, bool]:
        """One that waits here, rather one that is up, or a new one; and whether it was up before."""
        with self._lock:
            for place, (of, share, actor, is_up) in enumerate(self._spares):
                if (of, share) == (device, gpu_share):
                    del self._spares[place]
                    return actor, is_up
        return self._actors.options(num_gpus=gpu_share or None).remote(os.getcwd(), list(sys.path)), False

    def keep(self, device: str, gpu_share: float, actor: Any, is_up: bool) -> None:
        """Have a searcher wait for the next crew: its process has everything imported, or is on its way."""
        with self._lock:
            self._spares.insert(0 if is_up else len(self._spares), (device, gpu_share, actor, is_up))

    def leave_out(self, problem: Exception) -> None:
        """Tell once why a searcher does not take part."""
        told = str(problem)
        if problem.__cause__ is not None:  # what Ray says names other actors each time
            told = told.replace(line(problem.__cause__), "")
        if self.is_proven and told not in self._left_out and len(self._left_out) < LEFT_OUT:
            self._left_out.add(told)
            logging.getLogger(__name__).warning("a searcher is left out: %s", problem)

    def kill(self, actor: Any) -> None:
        """End an actor and its worker, whatever it is doing, or give up its place in the queue."""
        if not self._is_gone:
            with suppress(Exception):  # it is gone, or the connection is
                self.ray.kill(actor)

    def close(self) -> None:
        """End the searchers that wait, and the connection if it is ours: what is gone is not waited for."""
        ending = threading.Thread(target=self._let_go, daemon=True)
        ending.start()
        while ending.is_alive() and not self._is_gone:
            ending.join(POLL_S)
            with suppress(EngineError):
                self.look()
        ending.join(ANSWER_S)

    def _let_go(self) -> None:
        for _, _, actor, _ in self._spares:
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
        with quiet():
            import ray
    except ImportError as error:
        raise EngineError("--engine ray: Ray is not installed; pip install 'nsa-verify[ray]'") from error
    return ray


def _connect(ray: Any, given: str) -> None:
    address = given or os.environ.get(ADDRESS) or "auto"
    named = f"--ray-address {given}" if given else f"{ADDRESS}={address}" if address != "auto" else "--engine ray"
    wants_token = address not in ("auto", "local") and ask_for_answer(address, named)
    options = {"include_dashboard": False} if address == "local" else {}
    with apart() as said:
        try:
            if wants_token:
                _use_token()
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:
            ray.shutdown()
            raise refusal(address, named, error, said()) from error
    _hush(ray)


def _use_token() -> None:
    """Use the token that is here, if nobody says whether to: Ray does so for ``auto`` alone."""
    with suppress(ImportError):
        from ray._private.authentication import authentication_token_setup as setup

        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _hush(ray: Any) -> None:
    """End the thread that prints what happens to nodes, which ``log_to_driver`` does not, as Ray does when it ends."""
    with suppress(AttributeError):
        own = ray._private.worker.global_worker
        own.threads_stopped.set()
        own.gcs_error_subscriber.close()
        own.listener_thread.join(ANSWER_S)
        own.threads_stopped.clear()


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
        self.queue: SimpleQueue[_Piece] = SimpleQueue()
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
        if self.cluster.look(at_once=not left) and not left and self.seats[0].problem is not None:
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
            while True:
                piece = self.queue.get_nowait()
                if piece.future.set_running_or_notify_cancel():
                    piece.future.set_exception(BrokenProcessPool("it was not begun"))

    def next(self) -> _Piece | None:
        """What is to be done next, waiting for it; None when the crew ends."""
        while not self.is_closing:
            with suppress(Empty):
                return self.queue.get(timeout=POLL_S)
        return None

    def _end(self) -> None:
        self.is_closing = True
        self._empty()
        self._join(2 * GRACE_S)
        self._kill()
        self._join(10 * POLL_S)

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for it in self.seats:
            it.join(max(0.0, deadline - time.monotonic()))


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
            actor, was_up = self._cluster.searcher(self._crew.plan.device, self._share)
            try:
                self._greet(actor)
                starts = 0
                while (piece := self._crew.next()) is not None:
                    self._do(actor, piece)
                self._let_go(actor)
                return
            except _Late:
                self._keep(actor, was_up)
                return
            except _Lost as lost:
                self._cluster.kill(actor)
                has_begun = was_up or self.said is not None
                starts += not has_begun
                self.replaced += has_begun and not self._crew.is_closing
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
        up: Up = self._awaited(actor, actor.up)
        if up.version != __version__:
            raise EngineError(
                f"--engine ray: {up.host} has nsa-verify {up.version}, and this machine {__version__}; install the same"
                " on every node"
            )
        said, error = self._awaited(actor, actor.do, searcher.hello, [self._crew.plan], {})
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
            value, error = self._awaited(actor, actor.do, piece.work, piece.args, piece.kwargs)
        except _Lost as lost:
            piece.future.set_exception(BrokenProcessPool(str(lost)))
            raise
        except Exception as failed:  # noqa: BLE001 - it reaches whoever asks for the result
            value, error = None, failed
        if error is not None:
            piece.future.set_exception(error)
        else:
            piece.future.set_result(value)

    def _awaited(self, actor: Any, method: Any, *args: Any) -> Any:
        """What an actor answers. Raises ``_Lost`` if it died or is to die, and ``_Late`` if it is not up at the end."""
        crew, asked = self._crew, False
        try:
            reference = method.remote(*args)
            while not self._ray.wait([reference], timeout=POLL_S)[0]:
                if crew.is_killed:
                    raise _Lost("it was ended")
                if crew.is_closing and self.said is None:
                    raise _Late
                if crew.interrupted and not asked:
                    asked = True
                    actor.stop.options(concurrency_group=CONTROL).remote()
            return self._ray.get(reference)
        except (_Lost, _Late):
            raise
        except self._ray.exceptions.RayTaskError as error:
            raise EngineError(f"--engine ray: a searcher failed: {line(error)}") from error
        except self._ray.exceptions.RayError as error:
            raise _Lost(line(error)) from error
        except Exception as error:
            raise EngineError(f"--engine ray: Ray itself failed: {line(error)}") from error

    def _let_go(self, actor: Any) -> None:
        """End its worker, and keep it for the next crew."""
        self._awaited(actor, actor.do, searcher.close, [], {})
        self._keep(actor, True)

    def _keep(self, actor: Any, is_up: bool) -> None:
        if self._crew.interrupted:
            self._cluster.kill(actor)
        else:
            self._cluster.keep(self._crew.plan.device, self._share, actor, is_up)
