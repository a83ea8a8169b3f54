"""Who does the work, in this process or in others, and what becomes of it when it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsa_verify.device.select import resolve
from nsa_verify.engine import crew as module
from nsa_verify.engine import searcher
from nsa_verify.engine.crew import TRIES, Crew, Deferred
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError


@pytest.fixture(name="usual_ctrl_c")
def _usual_ctrl_c() -> Iterator[None]:
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_one_worker_is_this_process() -> None:
    with Crew(1) as crew:
        future = crew.submit(os.getpid)
        assert crew.wait([future]) == {future}
        assert crew.result(future) == os.getpid()
        failed = crew.submit(int, "no number")
        with pytest.raises(ValueError, match="no number"):
            crew.result(failed)


def test_several_workers_are_others_and_hear_no_ctrl_c() -> None:
    with Crew(2) as crew:
        assert crew.submit(os.getpid).result() != os.getpid()
        assert crew.submit(signal.getsignal, signal.SIGINT).result() is signal.SIG_IGN
        assert signal.SIGINT in crew.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result()
        with pytest.raises(ValueError, match="no number"):
            crew.submit(int, "no number").result()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


DIE = """
import os, signal
from pathlib import Path
with open({diary!r}, "a") as file:
    file.write("x")
if Path({diary!r}).stat().st_size <= {times}:
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""Takes its process down, the first so many times. Source, because a searcher does not import tests."""


def test_work_whose_searcher_is_killed_is_begun_again(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Crew(2) as crew:
        promise = crew.submit(exec, DIE.format(diary=str(diary), times=TRIES - 1))
        assert crew.wait([promise]) == {promise}
        assert crew.result(promise) is None
        assert crew.submit(abs, -1).result() == 1
    assert diary.read_text() == "x" * TRIES


def test_searchers_that_are_killed_again_and_again_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="were killed; see whether memory runs out here"), Crew(2) as crew:
        crew.result(*crew.wait([crew.submit(exec, DIE.format(diary=str(tmp_path / "diary"), times=TRIES))]))


def test_a_worker_that_outstays_ctrl_c_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.3)
    with Crew(2) as crew:
        assert crew.submit(abs, -1).result() == 1
        future = crew.submit(time.sleep, 600)
        began = time.monotonic()
        crew.stop()
        assert crew.wait([future]) == {future}
        assert crew.result(future) is None
    assert time.monotonic() - began < 10


def test_ctrl_c_between_two_pieces_of_work_is_kept_for_later(usual_ctrl_c: None) -> None:
    with Crew(1) as crew:
        crew._up = True
        signal.raise_signal(signal.SIGINT)
        assert crew.interrupted
        assert searcher.stopping()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not searcher.stopping()
    with Crew(1) as crew:
        assert not crew.interrupted


def test_ctrl_c_before_the_workers_are_up_is_not_kept(usual_ctrl_c: None) -> None:
    with pytest.raises(KeyboardInterrupt), Crew(1):
        signal.raise_signal(signal.SIGINT)


BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
QUICK = Plan(only=("python-loop",), isolate=False, device=resolve("auto"))


@BOTH
def test_what_comes_between_two_crews_ends_the_next_one_before_it_begins(
    usual_ctrl_c: None, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with Deferred() as deferred:
        with Crew(1) as crew:
            crew.hello(QUICK)
        asked = [deferred.asked]
        next_one = Crew(1)
        signal.raise_signal(number)
        assert [*asked, deferred.asked] == [False, True]
        with pytest.raises(KeyboardInterrupt), next_one:
            raise AssertionError("it was entered")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@BOTH
def test_what_comes_while_a_crew_ends_is_for_the_next_one(
    usual_ctrl_c: None, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nobody looks any more at whether it was interrupted."""
    with Deferred() as deferred:
        with monkeypatch.context() as patch, Crew(1) as crew:
            crew.hello(QUICK)
            patch.setattr(crew, "_end", lambda: signal.raise_signal(number))
        assert deferred.asked
        with pytest.raises(KeyboardInterrupt), Crew(1):
            raise AssertionError("it was entered")
        signal.raise_signal(number)  # the first that no crew has heard
    assert not searcher.stopping()


@BOTH
def test_what_comes_while_a_crew_begins_ends_it(
    usual_ctrl_c: None, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just before its handlers are there; those that were there come back."""
    real = signal.signal

    def late(which: int, handler: object) -> object:
        monkeypatch.undo()
        signal.raise_signal(number)
        return real(which, handler)  # type: ignore[arg-type]

    with Deferred() as deferred:
        monkeypatch.setattr(signal, "signal", late)
        with pytest.raises(KeyboardInterrupt), Crew(1):
            raise AssertionError("it was entered")
        assert deferred.asked
        assert [signal.getsignal(it) for it in (signal.SIGINT, signal.SIGTERM)] == [deferred] * 2


def test_one_that_defers_inside_another_begins_with_what_that_has_noted(usual_ctrl_c: None) -> None:
    with Deferred() as outer:
        with Deferred() as inner:
            signal.raise_signal(signal.SIGINT)
        assert (outer.asked, inner.asked) == (False, True)
        signal.raise_signal(signal.SIGTERM)
        with Deferred() as inner:
            assert inner.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_handles_ctrl_c_himself_keeps_his_handler(usual_ctrl_c: None) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    with Crew(1) as crew:
        signal.raise_signal(signal.SIGINT)
        assert not crew.interrupted
    assert heard == [signal.SIGINT]


ENGINE = """
import time
from nsa_verify.engine.crew import Crew

if __name__ == "__main__":
    with Crew(2) as crew:
        print(*sorted({crew.submit(__import__("os").getpid).result() for _ in range(20)}), flush=True)
        crew.submit(time.sleep, 600).result()
"""


def test_workers_do_not_outlive_an_engine_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "engine.py"
    program.write_text(ENGINE)
    with subprocess.Popen(
        [sys.executable, "-P", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert pids
        process.kill()
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in pids if _is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def _is_alive(pid: int) -> bool:
    """Whether it runs; the dead that nobody has buried yet do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
