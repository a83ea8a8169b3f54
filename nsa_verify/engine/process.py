"""One worker process: how it is started, watched, and ended."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection as connections
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from nsa_verify.core.findings import Code
from nsa_verify.core.marks import SIZE, Mark, Marks
from nsa_verify.engine import worker
from nsa_verify.engine.messages import ENCODER, REPLIES, Batch, Hello, Prepare, Refused, Reply, Request
from nsa_verify.engine.plan import Plan

POLL_S: Final = 0.05
START_S: Final = 300.0
"""How long a worker may take to import implementations and to create the device's context."""
GRACE_S: Final = 2.0
STARTS: Final = 3
STOPPED_S: Final = 0.5
"""A pause between two looks that only somebody who was stopped can make."""
MEMORY_SHARE: Final = 0.5
"""What all workers together may use of the memory that is free when the engine starts."""
LEAST_MEMORY: Final = 1 << 30
MARKS_SUFFIX: Final = ".marks"
TASKS_SUFFIX: Final = ".tasks"
"""The file of the batch that a worker was handed last; it is there while the worker is."""


class EngineError(Exception):
    """The engine could not do its job; the message is one sentence with the remedy."""


class Death(NamedTuple):
    """How a worker ended, where, and whether the engine ended it because it was silent."""

    sentence: str
    mark: Mark
    hang: bool

    @property
    def code(self) -> Code:
        """NV402 for a hang, NV401 for anything else."""
        return Code.HANG if self.hang else Code.DEATH


class WorkerDied(Exception):
    """The worker is gone; ``death`` tells how."""

    def __init__(self, death: Death) -> None:
        super().__init__(death.sentence)
        self.death = death


class WorkerProcess:
    """One worker process, from its start to its end."""

    def __init__(self, plan: Plan, folder: Path, name: str, environment: tuple[tuple[str, str], ...]) -> None:
        folder = folder.absolute()
        self._marks_path, self._fault_path = folder / f"{name}{MARKS_SUFFIX}", folder / f"{name}.fault"
        self._tasks_path = folder / f"{name}{TASKS_SUFFIX}"
        self._marks_path.write_bytes(bytes(SIZE))
        with open(self._marks_path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE)
        self.marks = Marks(memoryview(self._memory))
        context = fork_context(plan.device)
        self._connection, theirs = context.Pipe()
        their_lifeline, self._lifeline = context.Pipe(duplex=False)
        place = worker.Place(
            theirs, their_lifeline, str(self._marks_path), str(self._fault_path), os.getcwd(), environment
        )
        self._process = _started(context, place)
        theirs.close()
        their_lifeline.close()
        self.send(Prepare(plan))
        self.hello: Hello | None = None
        self.ended = False
        """Whether it was killed."""
        self._base_bytes = 0
        self.pid = self._process.pid

    def send(self, request: Request) -> None:
        """Hand over a request; a worker that is dead shows when its reply is read."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(ENCODER.encode(request))

    def write_down(self, batch: Batch) -> None:
        """Keep what it is about to be handed, in one step."""
        temporary = self._tasks_path.with_suffix(".tmp")
        try:
            temporary.write_bytes(ENCODER.encode(batch))
            temporary.replace(self._tasks_path)
        except OSError as error:
            raise EngineError(
                f"{temporary.parent}: cannot keep the cases in flight: {error.strerror}; make room there, or give"
                " another folder with --corpus"
            ) from error

    def ready(self, stopped: Callable[[], bool]) -> Hello:
        """Wait until it is up. Raises what kept it from that."""
        if self.hello is None:
            reply = self.receive(lambda _: START_S, 0, stopped)
            if isinstance(reply, Refused):
                raise worker.refusal(reply)
            assert isinstance(reply, Hello), reply
            self.hello = reply
            self._base_bytes = self._resident()
        return self.hello

    def receive(self, patience_s: Callable[[Mark], float], allowance: int, stopped: Callable[[], bool]) -> Reply:
        """The next reply. Raises ``WorkerDied`` if there is none: it ended, was silent, or took more memory than
        ``allowance`` bytes (0: no limit) and was ended for it."""
        watched = self.marks.read()
        since = looked = time.monotonic()
        waited = self._queued_s()
        asked_at: float | None = None
        while True:
            ready = connections.wait([self._connection, self._process.sentinel], POLL_S)
            self._refuse_appetite(allowance)
            if self._connection in ready:
                return self._read()
            if ready:  # it is gone, and whoever holds its end of the connection has nothing to say
                raise WorkerDied(Death(self._how_it_ended(), self.marks.read(), False))
            now = time.monotonic()
            if now - looked > STOPPED_S:  # this very process was stopped, or had no core
                since += now - looked
            looked = now
            mark = self.marks.read()
            if mark.beat != watched.beat:
                watched, since, waited = mark, time.monotonic(), self._queued_s()
            if stopped():
                self.marks.ask_to_stop()
                asked_at = asked_at or time.monotonic()
                if time.monotonic() - asked_at > GRACE_S:
                    self.kill()
                    raise KeyboardInterrupt
            silent = time.monotonic() - since - (self._queued_s() - waited)
            if silent > patience_s(mark):
                self._tell_where()
                self.kill()
                raise WorkerDied(Death(f"no sign of life for {silent:.1f} s{self._where()}", mark, True))

    def _read(self) -> Reply:
        try:
            reply: Reply = REPLIES.decode(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise WorkerDied(Death(self._how_it_ended(), self.marks.read(), False)) from None
        except msgspec.MsgspecError:
            mark = self.marks.read()
            self.kill()
            raise WorkerDied(Death("it wrote into its worker's connection to the engine", mark, False)) from None
        return reply

    def _refuse_appetite(self, allowance: int) -> None:
        if allowance and self._resident() - self._base_bytes > allowance:
            mark = self.marks.read()
            self._tell_where()
            self.kill()
            sentence = f"{worker.appetite(allowance)}{self._where()}"
            raise WorkerDied(Death(sentence, mark, False))

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self.ended = True
        self._process.kill()
        self._process.join(30)

    def end(self) -> None:
        """Let it give back what it holds, then make sure that it is gone. May be called again."""
        if self._connection.closed:
            return
        self._connection.close()
        self._process.join(GRACE_S)
        if self._process.is_alive():
            self.kill()
        self._lifeline.close()
        self._process.close()
        for path in (self._tasks_path, self._marks_path, self._fault_path):
            path.unlink(missing_ok=True)

    def _how_it_ended(self) -> str:
        self._process.join(GRACE_S)
        code = self._process.exitcode
        if code is None:
            self.kill()
            return "its process closed its connection and went on"
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return f"its process was killed by {name}{self._where()}"
        return f"its process ended itself with exit code {code}{self._where()}"

    def _tell_where(self) -> None:
        """Ask a silent worker for its line; answered by a signal handler in C, also if the interpreter is stuck."""
        assert self.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 0.5
        while not self._fault_path.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)

    def _where(self) -> str:
        """The innermost line outside of this package that the worker's last words name."""
        with suppress(OSError):
            words = self._fault_path.read_text(encoding="utf-8", errors="replace")
            frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', words)
            for file, line, function in frames:
                if not file.startswith("<") and not any(part in file for part in _MACHINERY):
                    return f" ({Path(file).name}:{line} in {function})"
        return ""

    def _queued_s(self) -> float:
        """How long it has been ready to run but had no core: silence that is no fault of its own."""
        with suppress(OSError, IndexError, ValueError):
            return int(Path(f"/proc/{self.pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
        return 0.0

    def _resident(self) -> int:
        return worker.resident(self.pid or os.getpid())


_OWN: Final = Path(__file__).parent.parent
_MACHINERY: Final = (
    *(str(_OWN / folder) + os.sep for folder in ("core", "device", "engine", "shell")),
    *(f"{os.sep}{part}{os.sep}" for part in ("torch", "triton", "numpy", "ctypes", "multiprocessing")),
)
"""Parts of the paths of files that no death is blamed on."""


def fork_context(device: str) -> ForkServerContext:
    """Processes forked from one that has imported everything, for ``device``, and has no CUDA context."""
    context = multiprocessing.get_context("forkserver")
    if _share_forkserver():
        return context
    context.set_forkserver_preload(["nsa_verify.engine.preload"])
    resource_tracker.ensure_running()  # it lifts the block on signals that is set below
    # What lies in the working directory must not be imported for what is installed.
    variables = {"PYTHONSAFEPATH": "1"} | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    with deaf_children(), _environment(**variables):
        forkserver.ensure_running()
    return context


def _share_forkserver() -> bool:
    """Whether this process was forked from a fork server itself, which then serves it as well.

    By default it would start another, which would have to import everything anew.
    """
    server: Any = forkserver._forkserver
    if getattr(server, "_forkserver_pid", None) is None and getattr(server, "_forkserver_address", None):
        server.ensure_running = lambda: None
        return True
    return False


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Processes started here have these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _started(context: ForkServerContext, place: worker.Place) -> ForkServerProcess:
    """A worker; the server that it is forked from may have been killed, and then another is started, if that can be."""
    for _ in range(STARTS):
        process: ForkServerProcess = context.Process(target=worker.serve, args=(place,), daemon=True)
        try:
            with deaf_children():
                process.start()
        except (OSError, EOFError):
            time.sleep(0.2)
        else:
            return process
    raise EngineError("no worker can be started: the process that they are forked from was killed; run again")


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started here hear neither Ctrl-C nor a SIGTERM to the group until they are ready for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def memory_allowance(workers: int) -> int:
    """Bytes that each of so many workers may take beyond what it takes when it is up."""
    free = [_meminfo()]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            free.append(int(Path(limit).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii")))
    return max(LEAST_MEMORY, int(min(free) * MEMORY_SHARE) // workers)


def _meminfo() -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 40
