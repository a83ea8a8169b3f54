"""Whose fault is what compute-sanitizer wrote down, and what becomes of a run of it that went wrong.

A script takes the tool's place, and that of the process under it: it does what the lengths of a case tell it to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import pytest
from msgspec.structs import replace

from nsa_verify import Case, Code, Mode, Outcome, Replay, Request, Setup, Verdict
from nsa_verify.core.sanitizers import Sanitizer, Sequence
from nsa_verify.engine import sanitizing
from nsa_verify.engine.plan import EAGER, Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.sanitizing import COUNTED, Running, _Processes, require


class Does(IntEnum):
    """What the length of a request has the script do."""

    NOTHING = 1
    READ = 2
    TWICE = 3
    WRITE = 4
    STRANGE = 5
    NOTE = 6
    BESIDE = 7
    DIE = 8
    EXIT = 9
    HANG = 10
    END = 11
    RAISE = 12
    COUNT = 13
    DAMAGE = 14
    NO_XML = 15
    MIX = 16


TOOL = """
import json, os, signal, sys, time
from pathlib import Path

folder, words = Path(sys.argv[-1]), sys.argv[1:]
xml = Path(words[words.index("--save") + 1].replace("%p", "7"))
with open(LOG, "a") as log:
    print(*words, file=log)
errand = json.loads((folder / "errand.json").read_text())
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
print("========= COMPUTE-SANITIZER", flush=True)
records, counted, whole = [], False, True
told = dict(implementation="mine", executor="eager")


def access(kind, line=0):
    at = f"<file>m.py</file><line>{line}</line>" if line else ""
    return f"<record><text>Invalid __global__ {kind} of size 4 bytes</text><func>k</func>{at}</record>"


with open(folder / "report.jsonl", "a", buffering=1) as report:
    for number, sequence in enumerate(errand["sequences"]):
        print(json.dumps({"number": number}), file=report)
        findings = []
        for index, replay in enumerate(sequence["case"]["replays"]):
            what = replay["requests"][0]["seq_len"]
            if what == READ:
                records.append(access("read", 3))
            if what == TWICE:
                records += [access("read", 5), access("read", 5), access("read", 6)]
            if what == WRITE:
                records.append(access("write"))
            if what == MIX:
                records += [access("read", 3), "<record><kind>Moon</kind></record>"]
            if what == STRANGE:
                records.append("<record><kind>Moon</kind></record>")
            if what == NOTE:
                records.append("<record><severity>INFO</severity><text>Potential WAW hazard</text></record>")
            if what == BESIDE and len(errand["sequences"]) > 1:
                records.append(access("read", 4))
            if what == DIE:
                os.kill(os.getpid(), signal.SIGSEGV)
            if what == EXIT:
                print("no more room")
                print("========= ERROR SUMMARY: 0 errors")
                sys.exit(3)
            if what == HANG:
                time.sleep(60)
            if what == END:
                sys.exit(0)
            if what == RAISE:
                findings.append(told | dict(code="NV403", replay=index, mode="decode"))
            counted |= what == COUNT
            whole = {DAMAGE: False, NO_XML: None}.get(what, whole)
        verdict = told | dict(outcome="disagree" if findings else "agree", modes=["decode"], findings=findings)
        print(json.dumps({"number": number, "verdict": verdict}), file=report)
if whole is not None:
    xml.write_text("<ComputeSanitizerOutput>" + "".join(records) + ("</ComputeSanitizerOutput>" if whole else ""))
sys.exit(EXIT_CODE if counted or records else 0)
"""


@pytest.fixture(name="log", autouse=True)
def _tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script in the tool's place; returns the file with a line for each time that it was started."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    path = folder / "compute-sanitizer"
    names = "".join(f"{it.name} = {it.value}\n" for it in Does)
    path.write_text(f"#!{sys.executable}\nLOG, EXIT_CODE = {str(log)!r}, {COUNTED}\n{names}{TOOL}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def _case(*lengths: int) -> Case:
    replays = tuple(Replay(Mode.DECODE, (Request(seq_len=int(length)),)) for length in lengths)
    return Case(Setup(pool_width=32), replays)


def _judged(
    *cases: tuple[int, ...], sanitizer: Sanitizer = Sanitizer.MEMCHECK, deadline_s: float = 0.0
) -> tuple[list[Verdict], list[Running]]:
    """The verdicts on cases that consist of replays of these lengths, and what was told on the way."""
    given = [(Path(f"{number}.json"), Sequence(_case(*lengths))) for number, lengths in enumerate(cases)]
    plan = Plan(deadline_s=deadline_s)
    told: list[Running] = []
    judging = _Processes(plan, sanitizer, "mine", given, len(given), 0).judge()
    while True:
        try:
            told.append(next(judging))
        except StopIteration as end:
            return end.value, told


def _lines(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_clean_cases_share_a_process(log: Path) -> None:
    verdicts, told = _judged((Does.NOTHING,), (Does.NOTHING, Does.NOTHING))
    expected = Verdict(implementation="mine", executor=EAGER, outcome=Outcome.AGREE, modes=(Mode.DECODE,))
    assert verdicts == [expected, expected]
    assert told == [Running("mine", Path(f"{it}.json"), it + 1, 2) for it in range(2)]
    assert _lines(log) == 1


def test_a_record_is_put_down_to_its_case_and_replay(log: Path) -> None:
    verdicts, _ = _judged((Does.NOTHING,), (Does.NOTHING, Does.READ, Does.WRITE), (Does.RAISE,), (Does.WRITE,))
    assert [it.outcome for it in verdicts] == [Outcome.AGREE, *[Outcome.DISAGREE] * 3]
    (read,) = verdicts[1].findings
    assert (read.code, read.replay, read.mode) == (Code.OUT_OF_BOUNDS, 1, Mode.DECODE)
    assert read.message == "memcheck: Invalid __global__ read of size 4 bytes (m.py:3 in k)"
    assert [it.code for it in verdicts[2].findings] == [Code.EXCEPTION]
    (write,) = verdicts[3].findings
    assert (write.code, write.replay) == (Code.GUARD_WRITTEN, 0)
    assert write.message == "memcheck: Invalid __global__ write of size 4 bytes (k)"
    # All of them, each alone, then one and two replays of the one with several.
    assert _lines(log) == 1 + 4 + 2


def test_records_of_one_line_are_one_finding() -> None:
    ((verdict,), _) = _judged((Does.TWICE,))
    first, second = verdict.findings
    assert (first.count, second.count) == (2, 1)
    assert first.message == "memcheck: Invalid __global__ read of size 4 bytes, 2 times (m.py:5 in k)"


def test_an_exception_is_no_finding_beside_what_the_tool_saw() -> None:
    ((verdict,), _) = _judged((Does.READ, Does.RAISE))
    assert [it.code for it in verdict.findings] == [Code.OUT_OF_BOUNDS]


@pytest.mark.parametrize(
    ("length", "sentence"),
    [
        (Does.DIE, "its process under memcheck was killed by SIGSEGV"),
        (Does.EXIT, "its process under memcheck ended with exit code 3: no more room"),
        (Does.HANG, "no word for 2 s under memcheck; give more time with --deadline"),
        (Does.DAMAGE, "the XML of memcheck is damaged: no element found: line 1, column "),
        (Does.NO_XML, "memcheck left no XML: COMPUTE-SANITIZER"),
        (Does.COUNT, "memcheck counted errors, and its XML has none: COMPUTE-SANITIZER"),
        (Does.END, "its process under memcheck ended without a word: COMPUTE-SANITIZER"),
        (Does.STRANGE, "memcheck wrote what is not understood: Moon"),
    ],
)
def test_what_goes_wrong_is_unknown_and_the_other_cases_are_judged(length: int, sentence: str) -> None:
    verdicts, _ = _judged((Does.NOTHING,), (length,), (Does.READ,), deadline_s=2.0 if length == Does.HANG else 0.0)
    assert [it.outcome for it in verdicts] == [Outcome.AGREE, Outcome.UNKNOWN, Outcome.DISAGREE]
    assert verdicts[1].reason.startswith(sentence)
    assert not verdicts[1].findings


def test_what_is_not_understood_does_not_hide_what_is() -> None:
    ((verdict,), _) = _judged((Does.MIX,))
    assert [it.code for it in verdict.findings] == [Code.OUT_OF_BOUNDS]
    assert verdict.reason == "memcheck wrote what is not understood: Moon"


def test_what_no_case_shows_alone_makes_all_of_them_unknown() -> None:
    verdicts, _ = _judged((Does.NOTHING,), (Does.BESIDE,))
    assert [it.outcome for it in verdicts] == [Outcome.UNKNOWN] * 2
    assert verdicts[0].reason == (
        "memcheck saw this with the cases in one process, and nothing with each alone:"
        " Invalid __global__ read of size 4 bytes (m.py:4 in k)"
    )


def test_what_the_tool_calls_information_is_no_finding() -> None:
    verdicts, _ = _judged((Does.NOTE,), sanitizer=Sanitizer.RACECHECK)
    assert [it.outcome for it in verdicts] == [Outcome.AGREE]


@pytest.mark.parametrize("sanitizer", [it for it in Sanitizer if it.device == "cuda"])
def test_the_command(log: Path, sanitizer: Sanitizer) -> None:
    _judged((Does.NOTHING,), sanitizer=sanitizer)
    words = log.read_text().split()
    assert words[:2] == ["--tool", sanitizer]
    assert ("--padding" in words) == (sanitizer is Sanitizer.MEMCHECK)
    assert words[-5:-1] == [sys.executable, "-P", "-m", "nsa_verify.device.sanitized"]


def test_nothing_is_left_behind_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [(Path("0.json"), Sequence(_case(Does.HANG)))]
    judging = _Processes(Plan(), Sanitizer.MEMCHECK, "mine", given, 1, 0).judge()
    started: list[int] = []
    original = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = original(*args, **kwargs)
        started.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    next(judging)
    judging.close()
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_where_the_tool_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    assert sanitizing.compute_sanitizer() == str(tool)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizing.compute_sanitizer() == str(tool)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    for sanitizer in (it for it in Sanitizer if it.device == "cuda"):
        with pytest.raises(EngineError, match=f"--sanitizer {sanitizer}: compute-sanitizer is neither on the PATH nor"):
            require(sanitizer)


def test_plans_are_the_sanitizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was asked for, implementations are called, by one worker, on the device that the sanitizer needs."""
    seen: list[Plan] = []

    class Crew:
        def __init__(self, workers: int, device: str) -> None:
            assert (workers, device) == (1, "cuda")

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def hello(self, plan: Plan) -> None:
            seen.append(plan)

    monkeypatch.setattr(sanitizing, "Crew", Crew)
    asked = Plan(workers=4, executors=("graph",), device="auto")
    next(iter(sanitizing.sanitize_saved(asked, Sanitizer.SYNCCHECK, [])))
    assert seen == [replace(asked, workers=1, executors=(EAGER,), device="cuda")]
