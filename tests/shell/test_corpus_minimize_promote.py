"""``corpus minimize`` and ``corpus promote``: what they say of each case, and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from engine.corpora import content, entry_of, saved
from shell.commands import invoke, refused, started, written

from nsa_verify.engine.corpus import Kind, load, scan

MINE = ("--impl", "mine.py", "--only", "short-top-k", "--executor", "eager")
HERE = (*MINE, "--no-isolation")


def test_minimize(folder: Path) -> None:
    (large,) = saved(Path("corpus"), entry_of(20, num_steps=2))
    written(folder)
    done = invoke("corpus", "minimize", *MINE)
    assert (done.exit_code, done.stderr) == (0, "")
    (small,) = scan(Path("corpus"))
    header, line, summary = done.stdout.splitlines()
    assert header.startswith("1 case on ")
    assert line.startswith(f"SMALLER {large} -> {small} (1 x 1 x 20 -> 1 x 1 x 8; ")
    assert line.endswith(" probes)")
    assert summary == "1 SMALLER, 0 MINIMAL, 0 SAME, 0 FIXED, 0 OTHER, 0 ERROR"
    before = content(Path("corpus"))
    again = invoke("corpus", "minimize", *HERE)
    assert again.stdout.splitlines()[1].startswith(f"MINIMAL {small} (")
    nothing = "0 SMALLER, 1 MINIMAL, 0 SAME, 0 FIXED, 0 OTHER, 0 ERROR; nothing was changed"
    assert (again.exit_code, again.stdout.splitlines()[2]) == (0, nothing)
    assert content(Path("corpus")) == before
    replayed = invoke("replay", small, *HERE)
    assert (replayed.exit_code, "NV101" in replayed.stdout) == (1, True)


def test_what_minimize_says_of_the_others(folder: Path) -> None:
    others = [entry_of(8), entry_of(8), entry_of(5), entry_of(20, buffer="page_table_1"), entry_of(21, executor="x")]
    paths = [saved(Path("corpus"), it, slug=slug)[0] for it, slug in zip(others, "abcde", strict=True)]
    otherwise = "fails otherwise than when it was saved: short-top-k [eager] NV101 decode nsa_cache_seqlens inside"
    written(folder)
    done = invoke("corpus", "minimize", *HERE)
    assert (done.exit_code, done.stderr) == (2, "")
    lines = done.stdout.splitlines()[1:]
    assert lines[0].startswith(f"MINIMAL {paths[0]} (")
    assert lines[1:] == [
        f"SAME    {paths[1]}: {paths[0]} has the same case, and stays",
        f"FIXED   {paths[2]} does not fail any more; nsa-verify corpus promote moves it to regression",
        f"OTHER   {paths[3]}: {otherwise}",
        f"ERROR   {paths[4]}: was found under x, and here are eager; give others with --executor or --device",
        "0 SMALLER, 1 MINIMAL, 1 SAME, 1 FIXED, 1 OTHER, 1 ERROR",
    ]


def test_minimize_what_is_named(folder: Path) -> None:
    first, second, third = saved(Path("corpus"), *(entry_of(length) for length in (20, 21, 22)))
    (mended,) = saved(Path("corpus"), entry_of(30), kind=Kind.REGRESSION)
    written(folder)
    names = (str(folder / first), second.stem, second.stem[-12:], mended.stem)
    done = invoke("corpus", "minimize", *names, *HERE, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert [it["path"] for it in told["cases"]] == sorted([str(first), str(second)])
    assert {it["status"] for it in told["cases"]} == {"SMALLER"}
    assert len({it["target"] for it in told["cases"]}) == 1
    assert all(it["done"] and it["probes"] > 5 and it["problem"] == "" for it in told["cases"])
    assert (told["counts"]["SMALLER"], told["not_judged"]) == (2, 0)
    assert told["regression_already"] == [str(mended)]
    assert third.exists()
    assert not first.exists()


def test_promote(folder: Path) -> None:
    (fixed,) = saved(Path("corpus"), entry_of(5))
    (failing,) = saved(Path("corpus"), entry_of(8))
    written(folder)
    done = invoke("corpus", "promote", *MINE)
    assert (done.exit_code, done.stderr) == (1, "")
    shown = "short-top-k [eager] NV101 decode nsa_cache_seqlens inside: nsa_cache_seqlens[0]: expected 8, got 7"
    header, *lines = done.stdout.splitlines()
    assert header.startswith("2 cases on ")
    mended = Path(str(fixed).replace("crashing", "regression"))
    assert sorted(lines) == sorted(
        [
            f"FIXED  {fixed} -> {mended}",
            f"FAILED {failing}: {shown}",
            "1 FIXED, 1 FAILED, 0 ERROR",
        ]
    )
    assert load(mended) == entry_of(5)
    written(folder, too_low=0)
    done = invoke("corpus", "promote", failing, *HERE)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "1 FIXED, 0 FAILED, 0 ERROR")
    before = content(Path("corpus"))
    assert {name.partition("/")[0] for name in before} == {"regression"}
    for names, line in (
        ((), []),
        ((failing.stem,), [f"{mended.with_name(failing.name)} is a regression case already"]),
    ):
        again = invoke("corpus", "promote", *names, *HERE)
        assert (again.exit_code, again.stderr) == (0, "")
        assert again.stdout.splitlines() == [*line, "0 FIXED, 0 FAILED, 0 ERROR; nothing was changed"]
    assert content(Path("corpus")) == before
    replayed = invoke("replay", "corpus", *HERE)
    assert (replayed.exit_code, "2 FIXED" in replayed.stdout) == (0, True)


def test_an_error_outweighs_a_failure(folder: Path) -> None:
    (failing,) = saved(Path("corpus"), entry_of(8))
    (unknown,) = saved(Path("corpus"), entry_of(5, implementation="warp"), slug="nv101-warp")
    failing.with_name("aaa.json").write_text("{")
    written(folder)
    done = invoke("corpus", "promote", *HERE, "--json")
    assert (done.exit_code, done.stderr) == (2, "")
    told = json.loads(done.stdout)
    assert told["counts"] == {"FIXED": 0, "FAILED": 1, "ERROR": 2}
    by_path = {it["path"]: it for it in told["cases"]}
    assert by_path[str(failing)]["status"] == "FAILED"
    assert by_path[str(failing)]["target"] is None
    assert "which is not loaded; give it with --impl mine.py" in by_path[str(unknown)]["problem"]


def test_without_the_implementation_nothing_is_promoted(folder: Path) -> None:
    """Others agree, of course."""
    (path,) = saved(Path("corpus"), entry_of(8))
    done = invoke("corpus", "promote", "--only", "vectorized", "--executor", "eager", "--no-isolation")
    assert done.exit_code == 2
    assert done.stdout.splitlines()[1:] == [
        f"ERROR  {path}: was found in 'short-top-k', which is not loaded; give it with --impl mine.py",
        "0 FIXED, 0 FAILED, 1 ERROR; nothing was changed",
    ]


@pytest.mark.parametrize("command", ["minimize", "promote"])
def test_a_corpus_that_cannot_be_written(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(Path("corpus"), entry_of(20))
    before = content(Path("corpus"))
    written(folder, too_low=int(command == "minimize"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = invoke("corpus", command, *HERE)
    assert done.exit_code == 2
    assert "cannot save cases here: " in done.stdout
    assert "no space left on device" in done.stdout
    assert content(Path("corpus")) == before


def test_a_corpus_whose_folder_is_a_file(folder: Path) -> None:
    saved(Path("corpus"), entry_of(20))
    (Path("corpus") / "crashing" / "target-verify").write_text("")
    assert refused(invoke("corpus", "minimize", *HERE)).startswith("corpus: cannot save cases here: ")


@pytest.mark.parametrize("command", ["minimize", "promote"])
def test_ctrl_c(folder: Path, command: str) -> None:
    for length in range(20, 60):
        saved(Path("corpus"), entry_of(length))
    mine = written(folder, too_low=int(command == "minimize"))
    slow = mine.read_text().replace("import torch", "import time, torch")
    mine.write_text(slow.replace("    for step", "    time.sleep(0.02)\n    for step", 1))
    with started("corpus", command, *MINE, "-w", "1") as process:
        assert process.stdout is not None
        first = [process.stdout.readline(), process.stdout.readline()]
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, ""), first
    assert "; interrupted, " in rest.splitlines()[-1]
    entries = [load(path) for path in scan(Path("corpus"))]
    assert entries
    lengths = {it.provenance.seed for it in entries}
    assert command == "minimize" or lengths == set(range(20, 60))
