"""``nsa-verify mutants``: the kill matrix, its exit codes, its document."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from shell.commands import graph_executor, invoke, refused

from nsa_verify.engine import mutation
from nsa_verify.engine.mutation import Hunt, Hunted, Kill
from nsa_verify.engine.process import EngineError
from nsa_verify.mutants import CATALOGUE, Mutant

EASY, EAGER_ONLY = "page-column-off-by-one", "no-clamp-at-0"


def test_the_matrix(folder: Path) -> None:
    done = invoke("mutants", "--only", EASY, "--only", EAGER_ONLY, "-w", 1)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"  1 of 2  killed  {EAGER_ONLY} (")
    assert lines[3].split() == ["mutant", "class", "eager", graph_executor()]
    rows = {line.split()[0]: line for line in lines[4:6]}
    assert "NV101  case 1, " in rows[EASY]
    assert rows[EASY].count("1 x 1 x 1") == 2
    assert "NV104  case " in rows[EAGER_ONLY]
    assert rows[EAGER_ONLY].endswith("cannot see it")
    assert lines[-1].startswith("2 of 2 mutants killed in ")
    assert lines[-1].endswith(" at most; seed 0")
    assert list(folder.iterdir()) == []


def test_the_document() -> None:
    done = invoke("mutants", "--only", EASY, "-w", 1, "--json", "--seed", 3)
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert (told["summary"]["killed"], told["summary"]["survivors"], told["summary"]["seed"]) == (1, [], 3)
    (mutant,) = told["mutants"]
    assert mutant["killed"]
    assert mutant["declared"]["kind"] == CATALOGUE[EASY].kind
    assert [kill["executor"] for kill in mutant["hunted"]["kills"]] == ["eager", graph_executor()]
    assert all(kill["case"]["replays"] for kill in mutant["hunted"]["kills"])


def test_a_survivor_is_exit_code_1() -> None:
    done = invoke("mutants", "--only", EAGER_ONLY, "-w", 1, "--max-cases", 1)
    assert done.exit_code == 1
    assert f"  1 of 1  NOT KILLED  {EAGER_ONLY} (" in done.stdout
    assert "SURVIVED" in done.stdout
    assert f"{EAGER_ONLY} [eager] survived 1 case" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 of 1 mutant killed in ")


def test_what_nobody_can_see_is_no_kill() -> None:
    sentence = refused(invoke("mutants", "--only", EAGER_ONLY, "--executor", graph_executor(), "-w", 1))
    assert sentence == "no mutant was hunted: none of those asked for can be seen here; see nsa-verify mutants --list"


def test_ctrl_c_is_told_and_nothing_is_said_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(mutant: Mutant, _: Hunt) -> Hunted:
        signal.raise_signal(signal.SIGINT)
        return Hunted(name=mutant.name, kills=[Kill(executor="eager")], interrupted=True)

    monkeypatch.setattr(mutation, "hunt", interrupted)
    done = invoke("mutants", "--only", EASY, "--only", EAGER_ONLY, "-w", 1)
    assert done.exit_code == 130
    assert "not hunted" not in done.stdout
    assert "SURVIVED" not in done.stdout
    assert f"  1 of 2  interrupted  {EAGER_ONLY} (" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 of 0 mutants killed in ")
    told = json.loads(invoke("mutants", "--only", EASY, "-w", 1, "--json").stdout)
    assert (told["summary"]["mutants"], told["summary"]["survivors"], told["summary"]["interrupted"]) == (0, [], True)


def test_what_was_hunted_is_told_before_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def hunted(mutant: Mutant, _: Hunt) -> Hunted:
        if mutant.name == EASY:
            raise EngineError("the worker cannot be started")
        return Hunted(name=mutant.name, kills=[Kill(executor="eager", cases=3, code="NV101", problem="too large")])

    monkeypatch.setattr(mutation, "hunt", hunted)
    arguments = ("mutants", "--only", EASY, "--only", EAGER_ONLY, "-w", 1)
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "NV101  case 3, 0.0 s  !" in done.stdout
    assert f"{EAGER_ONLY} [eager] too large" in done.stdout
    assert "the worker cannot be started" in done.stderr
    assert json.loads(invoke(*arguments, "--json").stdout)["summary"]["survivors"] == [EAGER_ONLY]


def test_the_list_as_a_document() -> None:
    told = json.loads(invoke("mutants", "--list", "--only", EASY, "--json").stdout)
    assert [it["name"] for it in told["mutants"]] == [EASY]
    assert told["mutants"][0]["size"] == [1, 1, 1]
    assert told["mutants"][0]["seen_by"] == ["eager", "graph"]


def test_the_list_names_every_mutant() -> None:
    done = invoke("mutants", "--list")
    assert done.exit_code == 0
    rows = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert rows == list(CATALOGUE)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--only", "warp"), "--only warp: no such mutant; see nsa-verify mutants --list"),
        (("--max-cases", "0"), "Invalid value for '--max-cases': 0 is not in the range x>=1"),
        (("--workers", "many"), "--workers many: must be a number from 1 to 256, or auto"),
    ],
)
def test_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    assert refused(invoke("mutants", *arguments)).startswith(sentence)
