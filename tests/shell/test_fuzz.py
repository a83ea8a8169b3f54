"""Campaigns, from the command line: what they find, group, go on from, accept, and survive."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import Result
from conftest import NO_GPU
from filelock import FileLock
from msgspec.structs import replace
from shell.commands import invoke, refused, saved, started, written

from nsa_verify.core.case import Mode
from nsa_verify.engine.corpus import Kind, load, save, scan
from nsa_verify.engine.crew import Crew
from nsa_verify.engine.record import FILE, FOLDER
from nsa_verify.shell import fuzz_command
from nsa_verify.shell.reports.opening import WrittenAtTheEnd

TWO_BUGS = """
from nsa_verify import Mode, implementation
from nsa_verify.kernels.vectorized import refresh as right

@implementation("twice", extent="full")
def refresh(inputs, steps, setup):
    right(inputs, steps, setup)
    if inputs.mode is Mode.DECODE and inputs.batch_size > 1:
        steps[0].cu_seqlens_k[-1:].add_({first})
    if inputs.mode is Mode.TARGET_VERIFY:
        steps[0].page_table_1[:1, :1].add_({second})
"""


# On CUDA the first seconds of a campaign go into its context.
SLICE_S = 3 if NO_GPU else 12
HERE = ("--seed", "3", "--executor", "eager", "-w", "1", "--no-isolation")
QUICK = (*HERE, "--max-time", f"{2 * SLICE_S}s", "--slice", f"{SLICE_S}s")
UNTIL_FOUND = (*HERE, "--mode", "change", "--max-time", "2m", "--slice", "1m")
SHORT = (*HERE, "--max-time", f"{SLICE_S}s")
REPLAYED = (*HERE, "--max-time", "1s" if NO_GPU else f"{SLICE_S}s")
"""Enough where saved cases tell all that is asked."""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def twice(first: int, second: int) -> tuple[str, ...]:
    """An implementation with two bugs that no case shows together; 0 mends one."""
    Path("twice.py").write_text(TWO_BUGS.format(first=first, second=second), encoding="utf-8")
    return "--impl", "twice.py", "--only", "twice"


def fuzz(*arguments: str) -> Result:
    return invoke("fuzz", *arguments)


def crashing() -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in scan(Path("corpus/crashing")))


def record() -> dict[str, object]:
    found: dict[str, object] = json.loads(Path("corpus", FOLDER, FILE).read_bytes())
    return found


def test_two_bugs_are_two_groups_and_the_next_campaigns_go_on() -> None:
    first = fuzz(*twice(1, 1), *QUICK)
    assert first.exit_code == 1, first.output
    assert crashing() == ["nv101-twice", "nv104-twice"]
    assert "2 findings open, 2 of them new" in first.stdout
    assert "twice NV104 an invariant of the metadata is broken: decode cu_seqlens_k inside (new)" in first.stdout
    assert "target-verify page_table_1 inside (new)" in first.stdout
    slices = record()["slices"]
    assert isinstance(slices, int)
    assert slices

    second = fuzz(*twice(1, 1), *REPLAYED)
    assert second.exit_code == 1
    assert f"goes on after {slices} search" in second.stdout
    assert "saved cases replayed: 2 FAILED" in second.stdout
    assert "2 findings open, 0 of them new" in second.stdout
    assert "shrinking" not in second.stdout
    assert crashing() == ["nv101-twice", "nv104-twice"]
    assert record()["slices"] > slices  # type: ignore[operator]

    mended = fuzz(*twice(0, 0), *REPLAYED)
    assert mended.exit_code == 0, mended.output
    assert "it agrees now: nsa-verify corpus promote" in mended.stdout
    assert "no finding" in mended.stdout
    promoted = invoke("corpus", "promote", "--impl", "twice.py", "--no-isolation")
    assert promoted.exit_code == 0, promoted.output
    assert crashing() == []
    broken = fuzz(*twice(1, 0), *UNTIL_FOUND)
    assert broken.exit_code == 1
    assert broken.stdout.count("FAILED corpus/regression/") == 1
    assert "disagrees again" in broken.stdout
    assert "nothing was tested" not in broken.output


def test_what_was_promoted_and_comes_back_is_new() -> None:
    assert fuzz(*twice(1, 0), *UNTIL_FOUND).exit_code == 1
    twice(0, 0)
    assert invoke("corpus", "promote", "--impl", "twice.py", "--no-isolation").exit_code == 0
    back = fuzz(*twice(1, 0), *SHORT)
    assert back.exit_code == 1
    assert "1 finding open, 1 of them new" in back.stdout


def test_a_case_that_is_as_it_was_drawn_is_shrunk_by_the_next_campaign() -> None:
    assert fuzz(*twice(1, 0), *UNTIL_FOUND).exit_code == 1
    (path,) = scan(Path("corpus/crashing"))
    entry = load(path)
    assert entry.provenance.attempts == 5
    replays = entry.case.replays * 3
    drawn = replace(
        entry, case=replace(entry.case, replays=replays), provenance=replace(entry.provenance, attempts=None)
    )
    path.unlink()
    larger = save(Path("corpus"), Kind.CRASHING, drawn, "nv104-twice")
    again = fuzz(*twice(1, 0), *SHORT)
    assert "1 finding open, 0 of them new" in again.stdout
    assert not larger.exists()
    (smaller,) = scan(Path("corpus/crashing"))
    assert (smaller, load(smaller).provenance.attempts) == (path, 5)


@pytest.mark.slow
def test_a_case_as_it_was_drawn_in_another_mode_makes_room_for_the_minimal_one() -> None:
    """As a search that was killed leaves it: the finding is what it showed first, and there is no record of it."""
    both = "inputs.mode in (Mode.DECODE, Mode.TARGET_VERIFY)"
    assert fuzz(*once(both), *UNTIL_FOUND).exit_code == 1
    (path,) = scan(Path("corpus/crashing"))
    entry = load(path)
    assert entry.finding is not None
    mode = Mode.TARGET_VERIFY if entry.finding.mode is not Mode.TARGET_VERIFY else Mode.DECODE
    path.unlink()
    Path("corpus", FOLDER, FILE).unlink()
    drawn = saved(Path(), seq_len=9, implementation="once", mode=mode)
    finding = replace(entry.finding, mode=mode)
    left = save(Path("corpus"), Kind.CRASHING, replace(load(drawn), finding=finding), "nv101-once")
    drawn.unlink(missing_ok=drawn == left)
    again = fuzz(*once(both), *SHORT)
    assert "1 finding open" in again.stdout, again.output
    (minimal,) = scan(Path("corpus/crashing"))
    assert load(minimal).provenance.attempts == 5
    assert load(minimal).case.replays[0].requests[0].seq_len < 9
    assert "shrinking" not in fuzz(*once(both), *SHORT).stdout


def test_change_ends_at_the_first_new_finding() -> None:
    began = time.monotonic()
    found = fuzz(*twice(1, 1), *UNTIL_FOUND)
    assert found.exit_code == 1, found.output
    assert "something new was found" in found.stdout
    assert time.monotonic() - began < 60


def test_prune_minimises_and_drops_what_others_cover() -> None:
    twice(0, 1)
    case = saved(Path(), seq_len=9, implementation="twice", mode=Mode.TARGET_VERIFY)
    told = fuzz("--mode", "prune", "--impl", "twice.py", "--no-isolation")
    assert told.exit_code == 0, told.output
    assert not case.exists()
    (smaller,) = scan(Path("corpus/crashing"))
    assert load(smaller).case.replays[0].requests[0].seq_len < 9
    assert "pairs of labels covered" in told.stdout
    again = fuzz("--mode", "prune", "--impl", "twice.py", "--no-isolation")
    assert (again.exit_code, list(scan(Path("corpus/crashing")))) == (0, [smaller])


def test_prune_that_is_interrupted_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str | None] = []

    def interrupted(_: click.Context, command: click.Command, **__: object) -> int:
        done.append(command.name)
        return 130

    monkeypatch.setattr(fuzz_command, "_code_of", interrupted)
    assert invoke("fuzz", "--mode", "prune").exit_code == 130
    assert done == ["minimize"]


@pytest.mark.parametrize(("expires", "code"), [("2999-01-01", 0), ("2001-01-01", 1)])
def test_a_baseline_accepts_until_it_expires(expires: str, code: int) -> None:
    Path("known.toml").write_text(
        f'[[accepted]]\nimplementation = "twice"\nreason = "rewritten soon"\nexpires = {expires}\n'
        f'[[accepted]]\nimplementation = "nobody"\nreason = "gone"\nexpires = 2999-01-01\n',
        encoding="utf-8",
    )
    told = fuzz(*twice(1, 0), *(SHORT if code == 0 else UNTIL_FOUND), "--baseline", "known.toml")
    assert told.exit_code == code, told.output
    assert "baseline: matches nothing: nobody (gone)" in told.stdout
    assert ("accepted: rewritten soon" in told.stdout) is (code == 0)
    assert ("baseline: expired: twice" in told.stdout) is (code == 1)


ONE_BUG = """
from nsa_verify import Mode, implementation
from nsa_verify.kernels.vectorized import refresh as right

@implementation("once", extent="full")
def refresh(inputs, steps, setup):
    right(inputs, steps, setup)
    if {condition}:
        steps[0].page_table_1[:1, :1].add_(1)
"""


def once(condition: str) -> tuple[str, ...]:
    """An implementation that is wrong under a condition."""
    Path("once.py").write_text(ONE_BUG.format(condition=condition), encoding="utf-8")
    return "--impl", "once.py", "--only", "once"


def test_what_is_accepted_in_one_mode_is_not_in_another() -> None:
    Path("known.toml").write_text(
        '[[accepted]]\nimplementation = "once"\nmode = "decode"\nreason = "known"\nexpires = 2999-01-01\n',
        encoding="utf-8",
    )
    told = fuzz(*once("inputs.mode in (Mode.DECODE, Mode.TARGET_VERIFY)"), *SHORT, "--baseline", "known.toml")
    assert told.exit_code == 1, told.output
    assert fuzz(*once("inputs.mode is Mode.DECODE"), *SHORT, "--baseline", "known.toml").exit_code == 0


def test_what_is_mended_by_half_is_found_again() -> None:
    assert fuzz(*once("inputs.mode is Mode.DECODE"), *UNTIL_FOUND).exit_code == 1
    again = fuzz(*once("inputs.mode is Mode.DECODE and inputs.batch_size > 1"), *QUICK)
    assert again.exit_code == 1, again.output
    assert "1 finding open" in again.stdout
    cases = [load(path).case for path in scan(Path("corpus/crashing"))]
    assert sorted(case.bucket(0) for case in cases) == [1, 2]


def test_a_regression_that_nobody_here_can_run_waits() -> None:
    path = saved(Path(), implementation="good", mode=Mode.TARGET_VERIFY)
    Path("corpus/regression/target-verify").mkdir(parents=True)
    path.rename(Path("corpus/regression/target-verify", path.name))
    mine = written(Path(), name="good", too_low=0)
    told = fuzz("--impl", str(mine), "--only", "good", *SHORT)
    assert told.exit_code == 0, told.output
    assert "no finding" in told.stdout


def test_a_regression_that_is_not_loaded_waits() -> None:
    path = saved(Path(), implementation="elsewhere")
    Path("corpus/regression/decode").mkdir(parents=True)
    path.rename(Path("corpus/regression/decode", path.name))
    told = fuzz("--only", "vectorized", *SHORT)
    assert told.exit_code == 0, told.output
    assert "ERROR" not in told.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-time", "0"), "give a campaign some time"),
        (("--max-time", "soon"), "--max-time soon: must be a time"),
        (("--slice", "x"), "--slice x: must be a time"),
        (("--mode", "prune"), "--mode prune draws nothing"),
        (("--mode", "night"), "--mode"),
        (("--baseline", "none.toml"), "none.toml: cannot be read"),
        (("--only", "nobody"), "nobody"),
        (("--executor", "gpu"), "--executor"),
        (("--max-time", ""), "'--max-time': is empty"),
        (("--corpus", ""), "'--corpus': is empty"),
    ],
)
def test_bad_options_are_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(invoke("fuzz", "--max-time", "5s", "-w", "1", "--no-isolation", *arguments))


DAMAGED = (
    b'{"format": "something else"}',
    b'{"slices": 1, "shares": {"modes": {"decode": {"cases": -1}}}}',
    b'{"pairs": {"mode:decode": -5}}',
    b'{"slices": 3',
    b'{"sightings": {"\xff": {}}}',
    b'{"sightings": {"it": {"first_seen": "", "last_seen": "", "symptoms": ["x"]}}}',
    b'{"sightings": {"it": {"first_seen": "", "last_seen": "", "symptoms": ["NV101 night x"]}}}',
    b'{"sightings": {"it": {"first_seen": "", "last_seen": "", "signatures": [["it", "", "NV101", "", "night"]]}}}',
)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_named_and_kept(content: bytes) -> None:
    path = Path("corpus", FOLDER, FILE)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    said = refused(invoke("fuzz", "--only", "vectorized", *QUICK))
    assert str(path) in said
    assert "remove it" in said
    assert path.read_bytes() == content


def test_one_campaign_at_a_time() -> None:
    Path("corpus", FOLDER).mkdir(parents=True)
    with FileLock(Path("corpus", FOLDER, "lock")):
        assert "another campaign is running" in refused(invoke("fuzz", "--only", "vectorized", *QUICK))


def start(*arguments: str) -> subprocess.Popen[str]:
    common = ("--max-time", "5m", "--slice", "3s", "--seed", "5", "--executor", "eager")
    return started("fuzz", *common, *arguments, stderr=subprocess.STDOUT)


def wait_for_slices(count: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        path = Path("corpus", FOLDER, FILE)
        if path.exists() and int(record()["slices"]) >= count:  # type: ignore[call-overload]
            return
        time.sleep(0.1)
    raise AssertionError("no search ended")


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, "1"), pytest.param(signal.SIGTERM, "2", marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_with_what_it_has(number: signal.Signals, workers: str) -> None:
    process = start(*twice(1, 1), "-w", workers)
    wait_for_slices(1)
    process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "interrupted" in told
    assert re.search(r"\d findings? open", told), told


def test_a_signal_while_a_search_ends_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    end = Crew._end

    def interrupted(crew: Crew) -> None:
        signal.raise_signal(signal.SIGINT)
        end(crew)

    monkeypatch.setattr(Crew, "_end", interrupted)
    told = invoke("fuzz", "--only", "vectorized", *HERE, "--max-time", "30s", "--slice", "1s")
    assert told.exit_code == 130, told.output
    assert record()["slices"] == 1


def test_a_signal_while_reports_are_written_ends_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    close = WrittenAtTheEnd.close

    def interrupted(report: WrittenAtTheEnd, code: int, problem: str) -> None:
        signal.raise_signal(signal.SIGINT)
        close(report, code, problem)

    monkeypatch.setattr(WrittenAtTheEnd, "close", interrupted)
    told = invoke("fuzz", "--only", "vectorized", *HERE, "--max-time", "1s", "--report", "json")
    assert json.loads(Path("nsa-verify-report.json").read_bytes())["exit_code"] == told.exit_code != 130, told.output
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_and_started_again_nothing_that_was_seen_is_lost() -> None:
    process = start(*twice(1, 1), "-w", "2")
    assert process.stdout is not None
    seen = next(found for line in process.stdout if (found := re.match(r"seen twice \[eager\] (NV\d+)", line)))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not Path("corpus/crashing").exists(), "it was not killed before it had saved anything"
    again = fuzz(*twice(0, 0), *REPLAYED)  # which finds nothing by itself
    assert "an earlier run reported it and was killed" in again.stdout
    assert seen[1] in {entry.finding.code for entry in map(load, scan(Path("corpus"))) if entry.finding}


def test_killed_and_started_again_it_goes_on() -> None:
    process = start(*twice(1, 1), "-w", "1")
    wait_for_slices(1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    slices = record()["slices"]
    for path in scan(Path("corpus")):
        if FOLDER not in path.parts:
            load(path)
    again = fuzz(*twice(1, 1), *REPLAYED)
    assert again.exit_code == 1, again.output
    assert f"goes on after {slices} search" in again.stdout
    assert record()["slices"] > slices  # type: ignore[operator]


def test_options_that_a_terminal_shows(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-P", "-m", "nsa_verify.shell", "fuzz", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    for option in ("--max-time", "--mode", "--baseline", "--slice", "--impl", "--corpus"):
        assert option in told
