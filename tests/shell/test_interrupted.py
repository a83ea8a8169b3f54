"""Ctrl-C where the work is done in this process: ``--workers 1`` and ``replay``."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from shell.commands import invoke, saved, written

from nsa_verify import Implementation
from nsa_verify.device import batch
from nsa_verify.engine import searcher, shrinking
from nsa_verify.engine.corpus import load, scan
from nsa_verify.engine.plan import ROUND_CASES

FOUND = (
    *("run", "--impl", "mine.py", "--only", "short-top-k", "--mode", "decode", "--executor", "eager"),
    *("-n", 40, "--seed", 7, "-w", 1, "--no-isolation"),
)


@pytest.fixture(autouse=True)
def _usual_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def _press_ctrl_c_after(monkeypatch: pytest.MonkeyPatch, cases: int) -> None:
    """Ctrl-C while a case is judged, once that many were."""
    judge, judged = batch.judge_batch, 0

    def judge_and_press(jobs: Sequence[batch.Job], *more: Any, **how: Any) -> Any:
        nonlocal judged
        for number, job in enumerate(jobs):
            judged += 1
            if judged == cases + 1:
                monkeypatch.setattr(Implementation, "not_applicable", press)
            for _, pair, verdict in judge([job], *more, **how):
                yield number, pair, verdict

    def press(*_: object) -> None:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(batch, "judge_batch", judge_and_press)


def test_while_cases_are_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(folder)
    with pytest.MonkeyPatch.context() as patch:
        _press_ctrl_c_after(patch, 30)
        done = invoke(*FOUND)
    assert (done.exit_code, done.stderr) == (130, "")
    assert "\n30 cases in " in done.stdout
    assert ", interrupted; digest " in done.stdout
    assert "  case as it was drawn; interrupted before it was shrunk\n" in done.stdout
    assert "\nshort-top-k     decode  " in done.stdout
    assert len(list(scan(folder / "corpus"))) == 1


def test_while_a_case_is_shrunk(folder: Path) -> None:
    written(folder)
    with pytest.MonkeyPatch.context() as patch:
        _press_ctrl_c_after(patch, 40 + 30)
        done = invoke(*FOUND)
    assert (done.exit_code, done.stderr) == (130, "")
    assert "\n40 cases in " in done.stdout
    assert "; the shrink was interrupted\n" in done.stdout
    (path,) = scan(folder / "corpus")
    assert load(path).provenance.attempts == shrinking.RELIABILITY_RUNS


def test_json_holds_what_was_found(folder: Path) -> None:
    written(folder)
    with pytest.MonkeyPatch.context() as patch:
        _press_ctrl_c_after(patch, 30)
        done = invoke(*FOUND, "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["exit_code"], told["cases"], told["stop"]) == (130, 130, 30, "interrupted")
    assert len(told["findings"]) == 1


def test_before_the_first_case(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(searcher, "hello", press)
    done = invoke("run", "--only", "vectorized", "-n", 3, "-w", 1)
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "interrupted before the first case was judged\n"


def test_between_two_cases(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.shell.reporter import TerminalReporter

    def press(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TerminalReporter, "_advance", press)
    written(folder)
    done = invoke(*FOUND)
    assert (done.exit_code, done.stderr) == (130, "")
    assert f"\n{ROUND_CASES} cases in " in done.stdout
    assert len(list(scan(folder / "corpus"))) == 1


def test_while_saved_cases_are_replayed(folder: Path) -> None:
    for seq_len in (8, 9, 10):
        saved(folder, seq_len)
    with pytest.MonkeyPatch.context() as patch:
        _press_ctrl_c_after(patch, 2)
        done = invoke("replay", "--only", "vectorized", "--no-isolation")
    assert (done.exit_code, done.stderr) == (130, "")
    assert done.stdout.endswith("2 FIXED, 0 FAILED, 0 ERROR; interrupted, 1 not judged\n")


def test_a_second_time(folder: Path) -> None:
    written(folder)
    pressed: list[int] = []

    def press(*_: object) -> None:
        pressed.append(1)
        signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nsa_verify.shell.reporter.TerminalReporter._advance", press)
        patch.setattr("nsa_verify.shell.reporter.TerminalReporter._show", press)
        done = invoke(*FOUND)
    assert (done.exit_code, len(pressed)) == (130, 2)
    assert done.stderr == "interrupted twice: the next run saves what is not saved\n"
    assert len(list(scan(folder / "corpus"))) == 1
