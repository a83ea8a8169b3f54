"""SIGKILL, at any moment and to anybody: the corpus loads, nothing that was reported is lost, the next run goes on."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from shell.commands import PROGRAM, invoke, saved, started, written

from nsa_verify.engine.corpus import load, scan
from nsa_verify.engine.inflight import FOLDER

KILLS = int(os.environ.get("NSA_VERIFY_TEST_KILLS", "6"))
"""How many random moments are tried; a person who changes this part tries 50."""
MOMENTS = (("", 2.0), ("seen ", 0.5), ("shrinking ", 1.5))
"""Behind a line that begins so, and at most how many seconds later: it starts, it has drawn something, it shrinks."""

MINE = """
import os
from nsa_verify import implementation
from nsa_verify.kernels.vectorized import refresh as right

@implementation("wrong", modes=["decode"], extent="full")
def wrong(inputs, steps, setup):
    right(inputs, steps, setup)
    if int(inputs.seq_lens[: inputs.batch_size].max()) >= 12:
        steps[0].cache_seqlens.add_(1)

@implementation("exits", modes=["decode"], extent="full")
def exits(inputs, steps, setup):
    if int(inputs.seq_lens[: inputs.batch_size].max()) >= 20:
        os._exit(3)
    right(inputs, steps, setup)
"""
SLOW = """
import time
from nsa_verify import implementation
from nsa_verify.kernels.vectorized import refresh as right

@implementation("slow", modes=["decode"], extent="full")
def refresh(inputs, steps, setup):
    open("called", "w").close()
    time.sleep(0.5)
    right(inputs, steps, setup)
"""
RUN = ("run", "--impl", "mine.py", "--only", "wrong", "--only", "exits", "--only", "vectorized", "--mode", "decode")
EAGER = ("--executor", "eager")
SLOWLY = ("run", "--impl", "slow.py", "--only", "slow", "--mode", "decode", *EAGER, "-w", "1")


def _wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def wait_for(folder: Path, pattern: str) -> None:
    """Until there is a file like that."""
    _wait_until(lambda: bool(list(folder.glob(pattern))), f"there is no {pattern}")


def _family(group: int) -> list[int]:
    """The processes of a session of its own, its leader first. Workers are in groups of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its) == group and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found, key=lambda pid: (pid != group, pid))


def _killed(folder: Path, line: str, later_s: float, everybody: bool, choose: random.Random) -> str:
    """What a run said that was killed, or lost a process, ``later_s`` after it had said such a line."""
    said = folder / "said"
    with open(said, "w", encoding="utf-8") as file:
        process = started(*RUN, *EAGER, "-w", "2", "-n", "30", "--seed", "5", stdout=file, stderr=subprocess.STDOUT)
    try:
        _wait_until(lambda: f"\n{line}" in f"\n{said.read_text(encoding='utf-8')}", f"it has not said {line!r}")
        time.sleep(later_s)
        family = _family(process.pid)
        victim = process.pid if everybody else choose.choice(family or [process.pid])
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        process.wait(timeout=120)
    finally:
        deadline = time.monotonic() + 10
        while (left := _family(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert not left, "processes outlived their engine"
    return said.read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [pytest.param(it, marks=[] if it == 2 else pytest.mark.slow) for it in range(KILLS)])
def test_nothing_that_was_reported_is_lost(folder: Path, number: int) -> None:
    (folder / "mine.py").write_text(MINE)
    choose = random.Random(number)
    line, latest_s = MOMENTS[number % len(MOMENTS)]
    said = _killed(folder, line, choose.uniform(0, latest_s), number % 2 == 0, choose)
    for path in scan(folder / "corpus") if (folder / "corpus").exists() else ():
        load(path)
    # It finds nothing by itself: what is in the corpus behind it was saved by the run that was killed, or recovered.
    (folder / "corpus").mkdir(exist_ok=True)
    done = invoke("run", "--only", "vectorized", *EAGER, "-w", 1, "-n", 5)
    assert done.exit_code in (0, 1), done.output
    assert ("recovered" in done.stdout) <= (done.exit_code == 0)
    kept = {
        (entry.finding.implementation, str(entry.finding.code))
        for entry in map(load, scan(folder / "corpus"))
        if entry.finding
    }
    reported = set(re.findall(r"^seen (\S+) \[eager\] (NV\d+)", said, flags=re.MULTILINE))
    assert reported <= kept, said
    assert reported or not line, said
    done = invoke(*RUN, *EAGER, "-w", 1, "-n", 10, "--seed", 6, "--no-shrink")
    assert done.exit_code == 1, done.output
    assert not (folder / "corpus" / FOLDER).exists()


def test_a_finding_that_was_reported_survives_the_run(folder: Path) -> None:
    """Killed while what ends its workers is shrunk, which takes long: only the folder of the run knows it."""
    (folder / "mine.py").write_text(MINE)
    command = [PROGRAM, *RUN, *EAGER, "-w", "1", "-n", "12", "--seed", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("shrinking"):
                break
        os.killpg(process.pid, signal.SIGKILL)
    assert not list(scan(folder / "corpus"))
    done = invoke("run", "--only", "vectorized", *EAGER, "-w", 1, "-n", 1)
    assert "an earlier run reported it and was killed" in done.stdout
    kept = [load(path).finding for path in scan(folder / "corpus")]
    assert {it.implementation for it in kept if it is not None} == {"wrong", "exits"}


def test_a_signal_to_the_whole_group_accuses_nobody(folder: Path) -> None:
    """As ``timeout`` and service managers send it."""
    (folder / "slow.py").write_text(SLOW)
    command = [PROGRAM, *SLOWLY, "-n", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(folder, "called")
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "NV40" not in said
    assert not list(scan(folder / "corpus")) if (folder / "corpus").exists() else True


def test_a_full_disk_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (folder / "mine.py").write_text(MINE)
    monkeypatch.setattr(Path, "write_text", full)
    done = invoke(*RUN, *EAGER, "-w", 1, "-n", 20, "--seed", 5)
    assert done.exit_code == 2
    assert "cannot keep what was found: No space left on device; make room there" in done.stderr
    assert "Traceback" not in done.output


def test_the_case_in_flight_is_judged_again_and_said(folder: Path) -> None:
    (folder / "slow.py").write_text(SLOW)
    run = (*SLOWLY, "-n", "20", "--seed", "1")
    process = subprocess.Popen([PROGRAM, *run], stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(folder, "called")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    other = invoke("run", "--only", "vectorized", "-n", 1, "-w", 1, *EAGER)
    assert "1 case in flight when a run was killed: waiting for slow (--impl)\n" in other.stdout
    (folder / "slow.py").write_text((folder / "slow.py").read_text().replace("0.5", "0.0"))
    done = invoke(*run)
    assert done.exit_code == 0, done.output
    assert "recovered 1 case in flight when a run was killed: judged again first\n" in done.stdout
    assert not (folder / "corpus" / FOLDER).exists()


@pytest.mark.slow
def test_a_pytest_worker_that_is_killed_costs_its_test_only(folder: Path) -> None:
    for seq_len in range(1, 4):
        saved(folder, seq_len)
    written(folder, "right", too_low=0)
    (folder / "conftest.py").write_text(
        "import os, signal, pytest\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_runtest_call(item):\n"
        "    if 'right' in item.name and not os.path.exists('killed'):\n"
        "        open('killed', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", "--nsa-corpus", "corpus"]
    done = subprocess.run(
        [
            *command,
            "--nsa-impl",
            "mine.py",
            "--nsa-only",
            "right",
            "--nsa-only",
            "vectorized",
            "--nsa-executor",
            "eager",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "killed").exists()
    assert "1 failed, 5 passed" in done.stdout, done.stdout


def test_two_runs_over_one_corpus(folder: Path) -> None:
    """The second begins and ends while cases of the first are in flight."""
    (folder / "mine.py").write_text(MINE)
    run = (*RUN, *EAGER, "-w", "1", "-n", "20", "--seed", "5", "--no-shrink")
    with subprocess.Popen([PROGRAM, *run], stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        wait_for(folder, f"corpus/{FOLDER}/*/*.tasks")
        os.kill(first.pid, signal.SIGSTOP)
        try:
            second = invoke(*run)
        finally:
            os.kill(first.pid, signal.SIGCONT)
        said = first.communicate()[0]
    assert (first.returncode, second.exit_code) == (1, 1), said + second.output
    assert "recovered" not in said + second.output
    entries = [load(path) for path in scan(folder / "corpus")]
    found = [(it.finding.implementation, it.finding.code) for it in entries if it.finding is not None]
    assert sorted(found) == [("exits", "NV401"), ("wrong", "NV101")]
    assert not (folder / "corpus" / FOLDER).exists()


@pytest.mark.slow
def test_two_runs_at_once_over_one_corpus(folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)
    only = ("run", "--impl", "mine.py", "--only", "wrong", "--mode", "decode", *EAGER)
    command = [PROGRAM, *only, "-w", "1", "-n", "6", "--seed", "5"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [1, 1], said
    assert "recovered" not in "".join(said)
    (path,) = scan(folder / "corpus")
    assert load(path).provenance.attempts == 5
    assert not (folder / "corpus" / FOLDER).exists()
