"""Which executors a run drives, and what it says of implementations that can, cannot, or will not be captured."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from shell.commands import DECODE, executor_of_another_device, graph_executor, invoke, refused, saved, written

from nsa_verify import Mode
from nsa_verify.device.executors import EXECUTORS
from nsa_verify.engine.corpus import load, scan
from nsa_verify.shell import options, pytest_plugin

GRAPH = graph_executor()
FEW = ("-n", 10, "--seed", 7, "-w", 1)
SHARED = ("-n", 20, "--seed", 7)
"""Rounds for two workers."""
MINE = ("--impl", "mine.py", "--only", "mine", "--mode", "decode")


def _write(folder: Path, lines: str, of: str = "    for step in steps:\n", **more: str) -> None:
    """``mine.py`` with a right implementation of DECODE called ``mine``, and ``lines`` before its loop."""
    text = DECODE.format(name="mine", too_low=0)
    for old, new in {of: lines + of, **more}.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.py").write_text(text)


def _matrix(text: str) -> dict[tuple[str, str], list[str]]:
    """The cells of the printed matrix, header included, by implementation and mode."""
    rows = [re.split(r"  +", line) for line in text.splitlines()]
    modes = {"mode", *Mode}
    return {(row[0], row[1]): row[2:] for row in rows if len(row) > 2 and row[1] in modes}


def test_the_names_are_those_of_the_device_side() -> None:
    assert tuple(EXECUTORS) == options.EXECUTORS
    parser = pytest.Parser(_ispytest=True)
    pytest_plugin.pytest_addoption(parser)
    (group,) = (it for it in parser._groups if it.name == "nsa-verify")
    (option,) = (it for it in group.options if "--nsa-executor" in it.names())
    assert tuple(option.attrs()["choices"]) == tuple(EXECUTORS)


def test_every_executor_of_the_device_by_default(folder: Path) -> None:
    only = ("--only", "vectorized", "--only", "precomputed-batched-copy", "--only", "python-loop")
    done = invoke("run", *only, *FEW)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"; executors eager,{GRAPH}; " in done.stdout
    cells = _matrix(done.stdout)
    assert cells["implementation", "mode"] == ["eager", GRAPH]
    for mode in Mode:
        eager = cells["vectorized", mode][0]
        assert re.fullmatch(r"\d+ agree", eager)
        assert cells["precomputed-batched-copy", mode] == [eager, eager]
        assert cells["python-loop", mode] == [eager, "not capturable"]
        captured = "not capturable" if mode is Mode.DRAFT_EXTEND else eager
        assert cells["vectorized", mode] == [eager, captured]
    assert max(map(len, done.stdout.splitlines()[3:])) <= 110
    assert "no disagreement\n" in done.stdout
    drawn = {mode: int(cells["vectorized", mode][0].split()[0]) for mode in Mode}
    told = [line for line in done.stdout.splitlines() if line.startswith("n/a  ")]
    assert told == [
        f"n/a  python-loop  {GRAPH}: declared not capturable (every mode: {sum(drawn.values())})",
        f"n/a  vectorized   {GRAPH}: declared not capturable (draft-extend {drawn[Mode.DRAFT_EXTEND]})",
    ]


def test_json_says_what_was_driven_and_what_was_not(folder: Path) -> None:
    done = invoke("run", "--only", "vectorized", "--only", "python-loop", *FEW, "--json")
    told: dict[str, Any] = json.loads(done.stdout)
    assert (done.exit_code, told["executors"], told["options"]["executors"]) == (0, ["eager", GRAPH], f"eager,{GRAPH}")
    for mode in Mode:
        eager = told["matrix"]["vectorized"]["eager"][mode]
        loop = told["matrix"]["python-loop"][GRAPH][mode]
        assert loop == {
            "cases": 0,
            "disagree": 0,
            "unknown": 0,
            "not_applicable": eager["cases"],
            "not_capturable": eager["cases"],
            "reasons": {"declared not capturable": eager["cases"]},
        }
    assert told["matrix"]["vectorized"][GRAPH]["decode"]["cases"] >= 1
    assert told["matrix"]["vectorized"][GRAPH]["decode"]["not_capturable"] == 0


def test_executors_can_be_chosen(folder: Path) -> None:
    def run(*executors: str) -> dict[str, Any]:
        chosen = [word for it in executors for word in ("--executor", it)]
        told: dict[str, Any] = json.loads(invoke("run", "--only", "vectorized", *FEW, "--json", *chosen).stdout)
        return told

    every, both, twice, graph = run(), run("eager", GRAPH), run(GRAPH, GRAPH), run(GRAPH)
    assert [it["executors"] for it in (every, both, twice, graph)] == [["eager", GRAPH]] * 2 + [[GRAPH]] * 2
    assert every["digest"] == both["digest"] != graph["digest"] == twice["digest"]
    assert list(graph["matrix"]["vectorized"]) == [GRAPH]


def test_what_is_never_captured_was_not_tested_by_graphs_alone(folder: Path) -> None:
    done = invoke("run", "--only", "python-loop", "--executor", GRAPH, *FEW)
    assert refused(done) == "nothing was tested; declared not capturable, so give --executor eager"


def test_a_host_read_that_was_not_declared(folder: Path) -> None:
    _write(folder, "    longest = lens.max().item()\n")
    line = next(
        number for number, text in enumerate((folder / "mine.py").read_text().splitlines(), 1) if ".item()" in text
    )
    done = invoke("run", *MINE, *FEW)
    assert (done.exit_code, done.stderr) == (1, "")
    at = done.stdout.index(f"mine [{GRAPH}] NV301 illegal while a graph is captured\n")
    shown = done.stdout[at:]
    sentence = rf"while capturing \(decode, bucket 1\): .*item.* \(mine\.py:{line} in refresh\)\n"
    assert re.search(rf"^  replay 1: {sentence}", shown, flags=re.MULTILINE), shown
    assert "1 distinct disagreement:\n" in shown
    assert re.fullmatch(r"\d+ agree", _matrix(done.stdout)["mine", "decode"][0])
    (path,) = scan(folder / "corpus")
    entry = load(path)
    assert entry.finding is not None
    assert (entry.finding.code, entry.finding.executor) == ("NV301", GRAPH)

    again = invoke("replay", *MINE[:4])
    assert again.exit_code == 1
    assert f"FAILED {path.relative_to(folder)} (1 of 2 agree)\n  mine [{GRAPH}] NV301 " in again.stdout
    assert invoke("replay", *MINE[:4], "--executor", "eager").exit_code == 0
    (reproduce,) = (it for it in shown.splitlines() if it.startswith("  reproduce "))
    assert f" --only mine --executor {GRAPH} --impl mine.py" in reproduce
    assert "(0 of 1 agree)" in invoke(*shlex.split(reproduce)[2:]).stdout

    text = (folder / "mine.py").read_text()
    (folder / "mine.py").write_text(text.replace('extent="full"', 'extent="full", capturable=False'))
    declared = invoke("run", *MINE, *FEW)
    assert declared.exit_code == 0
    assert _matrix(declared.stdout)["mine", "decode"][1] == "not capturable"


def test_a_maximum_frozen_on_the_host_is_shrunk_and_saved(folder: Path) -> None:
    _write(
        folder,
        "    width = min(int(inputs.seq_lens_cpu[: inputs.batch_size].max()), setup.table_width)\n",
        **{
            'extent="full"': 'extent="full", host_lengths=True',
            "step.page_table_1.copy_(slots)": "step.page_table_1[:, :width].copy_(slots[:, :width])",
        },
    )
    done = invoke("run", *MINE, *FEW)
    assert (done.exit_code, done.stderr) == (1, "")
    assert "1 distinct disagreement:\n" in done.stdout
    (path,) = scan(folder / "corpus")
    entry = load(path)
    assert entry.finding is not None
    assert (entry.finding.code, entry.finding.executor, entry.finding.buffer) == ("NV302", GRAPH, "page_table_1")
    (replay,) = entry.case.replays
    (request,) = replay.requests
    assert request.seq_len == entry.case.setup.fill_seq_len + 1
    assert f"mine [{GRAPH}] NV302 " in done.stdout
    again = invoke("replay", *MINE[:4])
    assert (again.exit_code, "(1 of 2 agree)" in again.stdout) == (1, True)


def test_one_bug_under_two_executors_is_two_files(folder: Path) -> None:
    written(folder)
    run = ("run", "--impl", "mine.py", "--only", "short-top-k", "--mode", "decode")
    done = invoke(*run, *FEW)
    assert done.exit_code == 1
    assert "2 distinct disagreements:\n" in done.stdout
    entries = [load(path) for path in scan(folder / "corpus")]
    assert len({entry.case for entry in entries}) == 1
    assert sorted(entry.finding.executor for entry in entries if entry.finding) == ["eager", GRAPH]
    for executor in ("eager", GRAPH):
        assert re.search(rf"^  reproduce .* --only short-top-k --executor {executor} ", done.stdout, re.MULTILINE)


def test_a_finding_of_another_device_can_be_replayed(folder: Path) -> None:
    path = saved(folder)
    other, _ = executor_of_another_device()
    path.write_text(path.read_text().replace('"eager"', f'"{other}"'))
    written(folder)
    done = invoke("replay", path, "--impl", "mine.py", "--only", "short-top-k")
    assert done.exit_code == 1
    assert "(0 of 2 agree)" in done.stdout
    assert f"; executors eager,{GRAPH}\n" in done.stdout
    told = json.loads(invoke("replay", path, "--only", "vectorized", "--json").stdout)
    assert [it["executor"] for it in told["cases"][0]["verdicts"]] == ["eager", GRAPH]


FALLBACK = """\
    if inputs.batch_size > 1:
        from nsa_verify import fallback

        fallback(f"no fast path for {'many' if inputs.batch_size > 2 else 'two'}")
"""


def test_fallbacks_are_counted_and_shown(folder: Path) -> None:
    _write(folder, FALLBACK)
    run = ("run", *MINE, *SHARED)
    one, two = (json.loads(invoke(*run, "--json", "-w", workers).stdout) for workers in (1, 2))
    counts = one["fallbacks"]["mine"]
    assert set(counts) == {"no fast path for many", "no fast path for two"}
    assert all(count >= 1 for count in counts.values())
    assert one["fallbacks"] == two["fallbacks"]
    text = invoke(*run, "-w", 1)
    assert text.exit_code == 0
    shown = [f"fallbacks: mine: {reason} x {count}" for reason, count in sorted(counts.items())]
    assert [line for line in text.stdout.splitlines() if line.startswith("fallbacks: ")] == shown
    graphs = invoke(*run, "-w", 1, "--executor", GRAPH)
    assert "fallbacks: mine: no fast path for two (while a graph was captured)\n" in graphs.stdout
    assert "fallbacks" not in invoke("run", "--only", "vectorized", *FEW).stdout


@pytest.mark.slow
def test_compile_keys_are_counted_and_shown(folder: Path) -> None:
    run = ("run", "--only", "vectorized", "--only", "triton-inplace", "--mode", "decode", "-n", 12, "--seed", 7)
    one, two = (json.loads(invoke(*run, "--json", "-w", workers).stdout) for workers in (1, 2))
    assert list(one["compile_keys"]) == ["triton-inplace"]
    keys = one["compile_keys"]["triton-inplace"]
    assert keys == sorted(set(keys))
    assert len({key.partition("(")[0] for key in keys}) >= 1
    assert one["compile_keys"] == two["compile_keys"]
    assert f"\ncompile keys: triton-inplace {len(keys)}\n" in invoke(*run, "-w", 1).stdout
    assert "compile keys" not in invoke("run", "--only", "vectorized", "-n", 3, "--seed", 7, "-w", 1).stdout


CLOSING = """
import os
from pathlib import Path
from nsa_verify.device import rig

close = rig.close_rigs

def told():
    kept = len(rig._RIGS)
    close()
    Path(f"closed-{os.getpid()}").write_text(f"{kept} {len(rig._RIGS)}")

rig.close_rigs = told
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_graphs_are_closed_at_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    from nsa_verify.device import rig

    monkeypatch.setattr(rig, "close_rigs", rig.close_rigs)
    _write(folder, "")
    (folder / "mine.py").write_text((folder / "mine.py").read_text() + CLOSING)
    done = invoke("run", *MINE, "-n", 30, "--seed", 7, "-w", workers)
    assert done.exit_code == 0
    said = [path.read_text().split() for path in folder.glob("closed-*")]
    judged = [(kept, left) for kept, left in said if kept != "0"]
    assert len(judged) == workers
    assert {left for _, left in said} == {"0"}
