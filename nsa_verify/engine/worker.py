"""What a worker does: settle the device, load the implementations, judge cases.

The worker is a process of its own (``serve``), which an engine can lose without harm, or, for debugging, the engine's
own process (``Desk``). This is the one module of the engine that needs the device side.
"""

from __future__ import annotations

import faulthandler
import fcntl
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from nsa_verify.core.case import Case, Mode
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.marks import MARKS, SIZE, Marks, Phase
from nsa_verify.core.registry import ImplementationError, load
from nsa_verify.core.spent import JUDGE, TRANSPORT, spending, taken
from nsa_verify.engine.blinding import blinded
from nsa_verify.engine.events import Subject
from nsa_verify.engine.messages import (
    ENCODER,
    REQUESTS,
    Applicable,
    Ask,
    Batch,
    Broken,
    Died,
    Done,
    Hello,
    Judged,
    Judgement,
    Pair,
    Prepare,
    Refused,
    Reply,
    Skip,
    Starting,
    Task,
)
from nsa_verify.engine.plan import Plan

if TYPE_CHECKING:
    from nsa_verify.device.batch import Job
    from nsa_verify.device.driving import Executor

DEVICE_DIED: Final = 86
"""Exit code of a worker whose device's context is dead."""


@lru_cache(maxsize=1)
def prepare(device: str, references: tuple[str, ...], only: tuple[str, ...]) -> tuple[str, tuple[Implementation, ...]]:
    """Settle the device and load the implementations, once per process.

    Raises ``DeviceError`` and ``ImplementationError``.
    """
    from nsa_verify.device.select import resolve, single_thread

    chosen = resolve(device)
    single_thread()
    known = load(references)
    if missing := [name for name in only if name not in known]:
        raise ImplementationError(f"--only {missing[0]}: no such implementation; there are {', '.join(sorted(known))}")
    return chosen, tuple(it for name, it in known.items() if not only or name in only)


def drivers(device: str, names: tuple[str, ...]) -> tuple[Executor, ...]:
    """The executors called ``names``, or all that ``device`` has if none is named.

    Raises ``DeviceError`` for one that needs another device, ``ValueError`` for one that there is not.
    """
    from nsa_verify.device.executors import executors_for

    return executors_for(device, names)


def close() -> None:
    """Give back what was kept for the next case: graphs are destroyed now, and not in whatever order Python ends in."""
    if "nsa_verify.device.rig" in sys.modules:
        from nsa_verify.device.rig import close_rigs

        close_rigs()


def refusal(refused: Refused) -> Exception:
    """The exception that ``Desk`` raised in another process."""
    from nsa_verify.device.select import DeviceError

    kinds = {"implementation": ImplementationError, "device": DeviceError, "value": ValueError}
    return kinds[refused.kind](refused.sentence)


def is_death(error: BaseException) -> bool:
    """Whether ``error`` says that the device's context is dead."""
    from nsa_verify.device.health import DeviceDied

    return isinstance(error, DeviceDied)


class Desk:
    """Judges tasks in this very process. Raises as ``prepare`` and ``drivers`` do."""

    def __init__(self, plan: Plan) -> None:
        from nsa_verify.device.select import describe

        self._device, implementations = prepare(plan.device, plan.references, plan.only)
        self._implementations = {it.name: it for it in implementations}
        asked = drivers(self._device, plan.executors)
        besides = drivers(self._device, plan.besides) if plan.besides else ()
        self._executors = {it.name: it for it in (*asked, *besides)}
        subjects = tuple(
            Subject(it.name, it.source, str(it.extent), tuple(mode for mode in plan.modes if mode in it.modes))
            for it in implementations
        )
        self._blind = plan.blind
        self.base_bytes = 0
        """The memory that this process had when it was up."""
        self.hello = Hello(self._device, describe(self._device), subjects, tuple(it.name for it in asked))

    def warm_up(self) -> None:
        """Create the device's context now and not in the first case."""
        from nsa_verify.device.select import warm_up

        warm_up(self._device)

    def applicable(self, case: Case) -> tuple[Pair, ...]:
        """The pairs that run at least one replay of ``case``."""
        return tuple(pair for pair in self.hello.pairs if self._applies(case, pair)[0])

    def judge(self, tasks: Sequence[Task], careful: bool = False) -> Generator[Starting | Judged]:
        """``Judged`` for each task, in order; with ``careful`` for each pair, behind its ``Starting``.

        Raises ``DeviceDied``.
        """
        return self._carefully(tasks) if careful else self._swiftly(tasks)

    def _carefully(self, tasks: Sequence[Task]) -> Generator[Starting | Judged]:
        from nsa_verify.device.batch import judge_batch

        for number, task in enumerate(tasks):
            for place, pair in enumerate(task.pairs):
                modes, skips = self._applies(task.case, pair)
                yield Starting(number, place, modes, skips)
                ((_, _, verdict),) = judge_batch([self._job(task, (pair,))], self._device, careful=True)
                judgement = Judgement(blinded(verdict, self._blind), skips)
                yield Judged(number, place, (judgement,), (MARKS[0].slowest_s(0, 0),))

    def _swiftly(self, tasks: Sequence[Task]) -> Generator[Judged]:
        from nsa_verify.device.batch import judge_batch

        judged = judge_batch([self._job(task, task.pairs) for task in tasks], self._device)
        for number, task in enumerate(tasks):
            judgements, slowest = [], []
            for place, pair in enumerate(task.pairs):
                _, _, verdict = next(judged)
                judgements.append(Judgement(blinded(verdict, self._blind), self._applies(task.case, pair)[1]))
                slowest.append(MARKS[0].slowest_s(number, place))
            yield Judged(number, 0, tuple(judgements), tuple(slowest))
        for _ in judged:
            raise AssertionError("more verdicts than pairs")

    def _job(self, task: Task, pairs: Iterable[Pair]) -> Job:
        from nsa_verify.device.batch import Job

        named = [(self._implementations[name], self._executors[executor]) for name, executor in pairs]
        return Job(task.case, named, task.repeat, task.delay, task.fresh, task.picture, task.rerun)

    def _applies(self, case: Case, pair: Pair) -> tuple[tuple[Mode, ...], tuple[Skip, ...]]:
        """The modes of the case that ``pair`` runs, and those that it skips."""
        implementation, executor = self._implementations[pair[0]], self._executors[pair[1]]
        modes, skips = [], []
        for mode in dict.fromkeys(replay.mode for replay in case.replays):
            reason = executor.not_applicable(implementation, case.setup, mode)
            if reason is None:
                modes.append(mode)
            else:
                skips.append(Skip(mode, reason, implementation.not_applicable(case.setup, mode) is None))
        return tuple(modes), tuple(skips)


class Place(NamedTuple):
    """Where a worker finds its engine: the connection, the end of a pipe that closes with the engine, the file of its
    marks, the file that tells where it died, its working directory, and what of the environment is its own."""

    connection: Connection
    lifeline: Connection
    marks: str
    fault: str
    cwd: str
    environment: tuple[tuple[str, str], ...] = ()


def serve(place: Place) -> None:
    """Answer requests until the engine closes the connection. Runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when to stop, not the terminal's Ctrl-C
    os.setpgid(0, 0)  # nor whoever signals the engine's group
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.dup2(2, 1)  # standard output is the engine's: what an implementation prints is no part of a report
    _die_with(place.lifeline)
    _offer_to_the_oom_killer()
    os.environ.update(place.environment)
    os.chdir(place.cwd)
    with open(place.fault, "w", encoding="utf-8") as fault, open(place.marks, "r+b") as file:
        faulthandler.enable(fault, all_threads=False)
        faulthandler.register(signal.SIGUSR1, fault, all_threads=False)
        MARKS[0] = Marks(memoryview(mmap.mmap(file.fileno(), SIZE)))
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            _answer(place.connection)
        close()


def resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 if that cannot be told."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    return 0


def appetite(allowance: int) -> str:
    """What is said of a worker that has taken more memory than it may."""
    return f"it took more than {allowance >> 20} MiB of memory and was ended"


_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def _answer(connection: Connection) -> None:
    def say(reply: Reply) -> None:
        connection.send_bytes(ENCODER.encode(reply))

    desk: Desk | None = None
    while True:
        request = REQUESTS.decode(connection.recv_bytes())
        try:
            if isinstance(request, Prepare):
                desk = _prepared(request, say)
            elif desk is None:
                say(Broken("a request came before the worker was prepared"))
            elif isinstance(request, Ask):
                say(Applicable(desk.applicable(request.case)))
            else:
                _judge(desk, request, say)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except BaseException as error:  # noqa: BLE001 - the engine is told, whatever it is
            _end_if_dead(error, say)
            frame = traceback.extract_tb(error.__traceback__)[-1]
            say(Broken(f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"))


def _prepared(request: Prepare, say: Callable[[Reply], None]) -> Desk | None:
    from nsa_verify.device.select import DeviceError

    MARKS[0].note(Phase.LOADING)
    desk, refused = None, None
    try:
        desk = Desk(request.plan)
        desk.warm_up()
        desk.base_bytes = resident(os.getpid())
    except ImplementationError as error:
        refused = Refused("implementation", str(error))
    except DeviceError as error:
        refused = Refused("device", str(error))
    except ValueError as error:
        refused = Refused("value", str(error))
    MARKS[0].note(Phase.IDLE)
    if refused is not None:
        say(refused)
        return None
    assert desk is not None
    say(desk.hello)
    return desk


def _judge(desk: Desk, batch: Batch, say: Callable[[Reply], None]) -> None:
    tasks = 0
    replies = desk.judge(batch.tasks, batch.careful)
    while True:
        with spending(JUDGE):
            reply = next(replies, None)
        if batch.allowance and resident(os.getpid()) - desk.base_bytes > batch.allowance:
            say(Died(appetite(batch.allowance)))
            _end()
        if reply is None:
            break
        with spending(TRANSPORT):
            say(reply)
        if isinstance(reply, Judged) and not batch.careful:
            tasks += 1
            if MARKS[0].asked_to_stop or (batch.until and time.time() > batch.until):
                replies.close()
                break
    MARKS[0].take(-1, -1)
    MARKS[0].note(Phase.IDLE)
    say(Done(tasks if not batch.careful else len(batch.tasks), taken()))


def _end_if_dead(error: BaseException, say: Callable[[Reply], None]) -> None:
    if is_death(error):
        say(Died(str(error)))
        _end()


def _end() -> NoReturn:
    """Python's own end would call into a context that is dead."""
    sys.stdout.flush()
    os._exit(DEVICE_DIED)


def _die_with(lifeline: Connection) -> None:
    """Have the kernel kill this process when the other end of ``lifeline`` is closed, whatever this one is doing then.

    An engine that is killed leaves no worker behind, not even one that loops with the interpreter's lock held.
    """
    descriptor = lifeline.fileno()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():  # it was closed before
        os._exit(1)


_F_SETSIG: Final = 10
"""Linux's; Python names it from 3.14 on."""


def _offer_to_the_oom_killer() -> None:
    """What runs out of memory is a worker, and not its engine."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
