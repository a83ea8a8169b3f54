"""Searchers on a real Ray cluster of two nodes, one of which is killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from socket import create_server, socket
from threading import Thread
from typing import Any, Self

import msgspec
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from nsa_verify import __version__
from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine import actor, cluster
from nsa_verify.engine.crew import TRIES
from nsa_verify.engine.events import Disagreement, Event, RoundFinished, RunFinished, StopReason
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.search import search
from nsa_verify.shell.cli import cli
from nsa_verify.shell.engines import settled

WRONG = """
from nsa_verify import implementation
from nsa_verify.kernels.vectorized import refresh as right

@implementation("wrong", modes=["decode"], extent="full")
def refresh(inputs, steps, setup):
    right(inputs, steps, setup)
    if (inputs.seq_lens[: inputs.batch_size] >= 40).any():
        steps[0].cu_seqlens_k[-1:].add_(1)
"""
OTHER = """
import os
from nsa_verify import implementation
from nsa_verify.kernels.vectorized import refresh as right

written = []

@implementation("other", modes=["decode"], extent="full")
def refresh(inputs, steps, setup):
    if not written:
        written.append(True)
        with open({diary!r}, "a") as file:
            file.write(f"{{os.getpid()}} ")
    right(inputs, steps, setup)
    if (inputs.seq_lens[: inputs.batch_size] >= 30).any():
        steps[0].cache_seqlens.zero_()
"""
"""Says in which processes it was called."""
DIE = """
import os, signal
from pathlib import Path
with open({diary!r}, "a") as file:
    file.write(f"{{os.getpid()}} ")
if len(Path({diary!r}).read_text().split()) <= {times}:
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""Takes its process down, the first so many times. Source, because a searcher does not import tests."""
DRIVER = """
import os, sys, time
from nsa_verify.engine import cluster
from nsa_verify.engine.plan import Plan

plan = Plan(only=("vectorized",), executors=("eager",), isolate=True, engine="ray", address=sys.argv[1])
with cluster.crew_of(plan) as crew:
    crew.hello(plan)
    print(crew.submit(os.getpid).result(), flush=True)
    crew.submit(time.sleep, 600).result()
"""
SOON_S = 180.0
"""More than anything takes on a machine that is busy: nothing here waits this long unless it has failed."""
STOPPED_S = 45.0
"""Within so long a search of hours ends once it is asked to."""

Told = tuple[list[Event], list[Disagreement]]


@pytest.fixture(autouse=True)
def _disconnected() -> Iterator[None]:
    yield
    cluster.disconnect()


@pytest.fixture(name="plan", scope="module")
def _plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    mine = tmp_path_factory.mktemp("plan") / "wrong.py"
    mine.write_text(WRONG, encoding="utf-8")
    return Plan(
        seed=7,
        max_examples=100,
        references=(str(mine),),
        only=("wrong", "vectorized"),
        executors=("eager",),
        device="cpu",
        isolate=True,
        workers=2,
    )


def run(plan: Plan, listen: Callable[[Event], None] = lambda _: None) -> Told:
    events: list[Event] = []
    kept: list[Disagreement] = []

    def keep(found: Disagreement) -> Disagreement:
        kept.append(found)
        return found

    for event in search(plan, keep, "1.0", {}):
        events.append(event)
        listen(event)
    return events, kept


def finished(told: Told) -> RunFinished:
    assert isinstance(told[0][-1], RunFinished)
    return told[0][-1]


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started, and those that they started."""
    children = [
        int(word)
        for tasks in Path(f"/proc/{pid}/task").glob("*/children")
        for word in tasks.read_text(encoding="ascii").split()
    ]
    return [*children, *(it for child in children for it in descendants(child))]


def runs(pid: int) -> bool:
    """Whether it runs; the dead that nobody has buried yet do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.05)


class Nodes:
    """Two nodes with one CPU each; the second can be killed, and started again."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        lost = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 3}
        checks = {f"health_check_{name}": value for name, value in lost.items()}
        checks["worker_niceness"] = 0  # 15 by itself: beside other tests its processes hardly ran
        self._size: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
        self.cluster: Any = Cluster(
            initialize_head=True, head_node_args={**self._size, "include_dashboard": False, "_system_config": checks}
        )
        self.address = str(self.cluster.address)
        self.second = self.cluster.add_node(**self._size)

    def shutdown(self) -> None:
        left = descendants(self.cluster.head_node.all_processes["raylet"][0].process.pid)
        self.cluster.shutdown()
        for pid in left:  # Ray's agents outlive a head that was killed
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def again(self) -> None:
        self.second = self.cluster.add_node(**self._size)


@pytest.fixture(name="nodes")
def _nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="needs Ray (the extra ray)")
    before = signal.getsignal(signal.SIGTERM)  # which Ray takes for itself
    nodes = Nodes()
    yield nodes
    cluster.disconnect()
    nodes.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.first
def test_a_cluster_does_what_this_machine_does(nodes: Nodes, plan: Plan) -> None:
    """Few tests, so that few clusters are started: pytest-xdist gives each test to any of its processes."""
    there = settled(replace(plan, engine=cluster.RAY, address=nodes.address), None)
    assert (there.workers, there.device, there.gpu_share) == (2, "cpu", 0.0)
    with pytest.raises(EngineError, match=r"--device cuda: no node of the Ray cluster has a GPU; use --device cpu"):
        settled(replace(there, device="cuda"), None)
    _same_as_here(nodes, plan, there)


@pytest.mark.first
@pytest.mark.slow
def test_a_cluster_that_loses_what_works_in_it(
    nodes: Nodes, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = settled(replace(plan, engine=cluster.RAY, address=nodes.address), None)
    _searchers_that_are_killed(there, tmp_path, caplog)
    _work_that_kills(replace(there, isolate=False), tmp_path)
    _stopped(there)
    _other_environments(there)
    cluster.disconnect()
    _driver_that_is_killed(nodes, tmp_path)
    _campaigns_that_lose_a_node_and_the_head(nodes, plan, tmp_path)


def _same_as_here(nodes: Nodes, plan: Plan, there: Plan) -> None:
    here = run(plan)
    assert [str(it.signature) for it in here[1]] == ["wrong [eager] NV104"]

    lost: list[int] = []

    def kill(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.cases_done == 30:
            lost.extend(descendants(nodes.second.all_processes["raylet"][0].process.pid))
            nodes.kill()

    told = run(there, kill)
    assert told[1] == here[1]
    assert finished(told).digest == finished(here).digest
    assert (finished(told).cases, finished(told).stop) == (plan.max_examples, StopReason.EXAMPLES)
    assert finished(told).replaced == finished(here).replaced + 1
    assert len(lost) > 4
    wait_until(lambda: not any(map(runs, lost)))
    nodes.again()


def _searchers_that_are_killed(there: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    diary = tmp_path / "killed"
    with cluster.crew_of(there) as crew:
        crew.hello(there)
        pids: set[int] = set()
        while len(pids) < 2:
            pids.add(crew.submit(os.getpid).result())
        workers = {pid: descendants(pid) for pid in pids}
        assert all(workers.values())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "START_S", 0.5)
            with pytest.raises(EngineError, match="has had no room for a searcher"), cluster.crew_of(there) as other:
                other.hello(there)
        promise = crew.submit(exec, DIE.format(diary=str(diary), times=1))
        assert crew.wait([promise]) == {promise}
        assert crew.result(promise) is None
        killed, again = map(int, diary.read_text(encoding="ascii").split())
        assert killed != again
        wait_until(lambda: not any(map(runs, workers[killed])))
        wait_until(lambda: crew.replaced == 1)
        with pytest.raises(ValueError, match="no number"):
            crew.submit(int, "no number").result()
        wait_until(lambda: crew.submit(os.getpid).result() not in pids)  # who takes its place is up
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "__version__", "9.9")
            promise = crew.submit(exec, DIE.format(diary=str(tmp_path / "later"), times=1))
            assert crew.result(*crew.wait([promise])) is None
            wait_until(lambda: bool(caplog.messages))
        assert crew.submit(abs, -1).result() == 1
    (told,) = caplog.messages
    assert "a searcher is left out" in told
    assert "install the same on every node" in told


def _work_that_kills(there: Plan, tmp_path: Path) -> None:
    work = DIE.format(diary=str(tmp_path / "again"), times=TRIES)
    with (
        pytest.raises(EngineError, match=f"were lost {TRIES} times, or their nodes; see"),
        cluster.crew_of(there) as crew,
    ):
        crew.result(*crew.wait([crew.submit(exec, work)]))


def _stopped(there: Plan) -> None:
    asked: list[float] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, Disagreement):
            return
        if isinstance(event, RoundFinished) and not asked:
            asked.append(time.monotonic())
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        told = run(replace(there, max_examples=100_000), interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - asked[0] < STOPPED_S
    assert (finished(told).stop, finished(told).replaced) == (StopReason.INTERRUPTED, 0)
    assert {it.signature for it in told[1]} == set(finished(told).signatures)


def _other_environments(there: Plan) -> None:
    cluster.connected(there.address).is_proven = False  # later the others would go on without
    with pytest.raises(ImplementationError, match=r"--impl gone.py: there is no such file \(on "):
        run(replace(there, references=("gone.py",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "__version__", "9.9")
        with pytest.raises(EngineError, match=r"has nsa-verify .*, and this machine 9.9; install the same on every"):
            run(there)


def _driver_that_is_killed(nodes: Nodes, tmp_path: Path) -> None:
    program = tmp_path / "driver.py"
    program.write_text(DRIVER, encoding="utf-8")
    command = [sys.executable, "-P", str(program), nodes.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        pids = [pid, *descendants(pid)]
        assert len(pids) > 2
        process.kill()
    wait_until(lambda: not any(map(runs, pids)))


class Campaign:
    """``nsa-verify fuzz`` as a process of its own, which is gone in the end."""

    def __init__(self, *arguments: str, root: Path) -> None:
        self.document, self._lines = root.with_suffix(".json"), root.with_suffix(".ndjson")
        command = [sys.executable, "-P", "-m", "nsa_verify.shell", "fuzz", *arguments, "--corpus", str(root)]
        command += ["--report", f"json={self.document}", "--report", f"ndjson={self._lines}"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Its events of this type so far."""
        assert self.process.poll() is None, "it has ended"
        written = self._lines.read_text(encoding="utf-8") if self._lines.exists() else ""
        events = map(msgspec.json.decode, written.rpartition("\n")[0].splitlines())
        return [it for it in events if it["type"] == kind]

    def ended(self) -> tuple[int, str]:
        """Exit code and standard error."""
        problem = self.process.communicate(timeout=SOON_S)[1]
        return self.process.returncode, problem


def found_in(root: Path) -> list[Path]:
    """The minimal cases of a corpus: by their names the same groups, and the same cases."""
    return sorted(it.relative_to(root) for it in (root / "crashing").rglob("*.json"))


def _campaigns_that_lose_a_node_and_the_head(nodes: Nodes, plan: Plan, tmp_path: Path) -> None:
    diary, other = tmp_path / "called", tmp_path / "other.py"
    diary.touch()
    other.write_text(OTHER.format(diary=str(diary)), encoding="utf-8")
    options = ["--impl", plan.references[0], "--impl", str(other), "--only", "wrong", "--only", "other"]
    options += ["--device", "cpu", "--executor", "eager", "--seed", "7"]
    there = ["--engine", "ray", "--ray-address", nodes.address]
    raylet = nodes.second.all_processes["raylet"][0].process.pid
    with Campaign(*options, *there, "--max-time", "4s", root=tmp_path / "there") as campaign:
        wait_until(lambda: bool({*map(int, diary.read_text().split())} & {*descendants(raylet)}))
        wait_until(lambda: bool(campaign.told("RoundFinished")))
        nodes.kill()
        assert not campaign.told("SliceFinished")
        assert campaign.ended() == (1, "")
    document = msgspec.json.decode(campaign.document.read_bytes())
    assert (document["stop"], document["slices"][-1]["replaced"]) == ("the time was up", 1)
    with Campaign(*options, *there, "--max-time", "1h", root=tmp_path / "lost") as campaign:
        wait_until(lambda: bool(campaign.told("DisagreementSeen")))
        nodes.cluster.head_node.all_processes["gcs_server"][0].process.kill()
        short = ["--max-time", "2s", "-w", "1", "--corpus", str(tmp_path / "here")]
        here = CliRunner().invoke(cli, ["fuzz", *options, *short])
        code, problem = campaign.ended()
    assert (code, problem.count("\n")) == (2, 1), problem
    assert "is gone; what was found is kept" in problem
    assert msgspec.json.decode(campaign.document.read_bytes())["exit_code"] == 2
    assert found_in(tmp_path / "lost")
    assert (here.exit_code, here.stderr) == (1, "")
    assert found_in(tmp_path / "there") == found_in(tmp_path / "here")
    assert len(found_in(tmp_path / "there")) == 2


@pytest.mark.parametrize(
    ("workers", "resources", "expected"),
    [
        (None, {"CPU": 12.0}, (12, "cpu", 0.0)),
        (40, {"CPU": 12.0}, (40, "cpu", 0.0)),
        (None, {"CPU": 64.0, "GPU": 4.0}, (32, "cuda", 0.125)),
        (None, {"CPU": 6.0, "GPU": 4.0}, (6, "cuda", 0.5)),
        (3, {"CPU": 64.0, "GPU": 8.0}, (3, "cuda", 1.0)),
        (6, {"CPU": 64.0, "GPU": 2.0}, (6, "cuda", 0.3333)),
        (None, {"CPU": 1000.0}, (256, "cpu", 0.0)),
    ],
)
def test_workers_share_what_the_cluster_has(
    workers: int | None, resources: dict[str, float], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", lambda _: _Counted(resources))
    plan = settled(Plan(engine="ray"), workers)
    assert (plan.workers, plan.device, plan.gpu_share) == expected


class _Counted:
    def __init__(self, resources: dict[str, float]) -> None:
        self._resources = resources

    def total(self, name: str) -> float:
        return self._resources.get(name, 0.0)


def refusal(*arguments: str) -> str:
    """The sentence on standard error."""
    done = CliRunner().invoke(cli, ["fuzz", *arguments])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    return done.stderr


def test_options_without_a_cluster_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--ray-address auto: only --engine ray has a cluster; give both" in refusal("--ray-address", "auto")
    assert "leave out --no-isolation" in refusal("--engine", "ray", "--no-isolation")
    assert "must be a number from 1 to 256" in refusal("--engine", "ray", "-w", "many")
    assert "leave out --engine" in refusal("--engine", "ray", "--mode", "prune")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "Ray is not installed; pip install 'nsa-verify[ray]'" in refusal("--engine", "ray")


def test_a_cluster_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray (the extra ray)")
    assert "--ray-address x: must be HOST:PORT" in refusal("--engine", "ray", "--ray-address", "x")
    assert "run it on a node of the cluster" in refusal("--engine", "ray", "--ray-address", "ray://x:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "RAY_ADDRESS=127.0.0.1:1: nothing answers there (Connection refused)" in refusal("--engine", "ray")
    monkeypatch.delenv("RAY_ADDRESS")
    with create_server(("127.0.0.1", 0)) as server:
        Thread(target=answer, args=(server,), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "no Ray cluster" in refusal("--engine", "ray", "--ray-address", address)
    monkeypatch.setattr(ray, "init", raising(ConnectionError("Could not find any running Ray instance.")))
    assert "start one with `ray start --head`" in refusal("--engine", "ray")
    monkeypatch.setattr(ray, "init", raising(RuntimeError("Version mismatch:\n  Ray: 2.0.0\n  Python: 3.9.1")))
    said = refusal("--engine", "ray")
    assert "cannot connect to the Ray cluster: Version mismatch: Ray: 2.0.0 Python: 3.9.1; this machine must" in said


def answer(server: socket) -> None:
    """As a web server does."""
    with server.accept()[0] as there:
        there.recv(100)
        there.sendall(b"HTTP/1.1 400 Bad Request")


def raising(error: Exception) -> Callable[..., None]:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


def test_a_node_without_the_folder_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "gone")])
    monkeypatch.setattr(sys, "modules", {**sys.modules, "__main__": sys})
    theirs = actor.Searcher(str(tmp_path / "gone"), ["/of/the/driver"])
    assert sys.path[-1] == "/of/the/driver"
    assert str(tmp_path / "gone") not in sys.path

    def load() -> None:
        raise ImplementationError("--impl mine: there is no module 'mine'")

    value, error = theirs.do(load, (), {})
    assert value is None
    assert str(error).endswith("gone: nodes need the same files there)")
    assert theirs.up() == (os.uname().nodename, os.getpid(), __version__)


def test_what_an_actor_is_told_leaves_the_corpus_out() -> None:
    plan = Plan(seed=3, folder="corpus", gpus=("0",), engine="ray", address="auto", gpu_share=0.5, workers=4)
    assert cluster._theirs(plan) == Plan(seed=3, workers=4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=Plan) == plan
