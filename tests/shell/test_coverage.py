"""``nsa-verify run --coverage``: what the cases were examples of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from shell.commands import invoke

from nsa_verify.core.case import Case, Mode, Replay, Request, Setup
from nsa_verify.core.labels import DIMENSIONS, Coverage, labels_of, possible_pairs
from nsa_verify.shell.coverage import MOST_CHARACTERS, MOST_GROUPS, coverage_document, coverage_lines

RUN = ("run", "--only", "vectorized", "--executor", "eager", "-n", 30, "--seed", 2, "-w", 1)
MODES = tuple(Mode)


@pytest.fixture(name="told", scope="module")
def _told(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("coverage"))
        return invoke(*RUN, "--coverage")


def plainest() -> Case:
    return Case(Setup(), (Replay(requests=(Request(),)),))


def test_it_comes_behind_the_matrix(told: Result) -> None:
    assert (told.exit_code, told.stderr) == (0, "")
    order = [told.stdout.index(text) for text in ("\nvectorized ", "\n\ncoverage, in cases:\n", "\n\n30 cases in ")]
    assert order == sorted(order)


def test_a_line_for_each_dimension_and_a_number_for_each_value(told: Result) -> None:
    lines = told.stdout.splitlines()
    at = lines.index("coverage, in cases:") + 1
    for dimension, line in zip(DIMENSIONS, lines[at : at + len(DIMENSIONS)], strict=True):
        name, counts = line.split(maxsplit=1)
        assert name == dimension.name
        assert [it.rsplit(" ", 1)[0] for it in counts.split(", ")] == [str(value) for value in dimension.values]
        assert all(0 <= int(it.rsplit(" ", 1)[1]) <= 30 for it in counts.split(", "))


def test_pairs_met_and_never_met_are_all_pairs(told: Result) -> None:
    met, possible = map(int, re.findall(r"^pairs: (\d+) of (\d+) that can be were met$", told.stdout, re.MULTILINE)[0])
    (never,) = re.findall(r"^never met, (\d+) pairs:$", told.stdout, re.MULTILINE)
    assert possible == len(possible_pairs())
    assert met + int(never) == possible
    assert 0.4 * possible < met < 0.9 * possible


def test_a_pipe_gets_plain_lines_and_not_too_many(told: Result) -> None:
    assert told.stdout.isascii()
    assert "\x1b" not in told.stdout
    assert not any(line.endswith(" ") for line in told.stdout.splitlines())
    shown = told.stdout[told.stdout.index("never met, ") :].split("\n\n")[0].splitlines()[1:]
    assert len(shown) == MOST_GROUPS + 1
    assert all(len(line) < MOST_CHARACTERS + 60 for line in shown)
    assert re.fullmatch(r"  \.\.\. and \d+ more pairs; --json has them all", shown[-1])


def test_json_has_all_of_it(told: Result, folder: Path) -> None:
    done = invoke(*RUN, "--coverage", "--json")
    document: dict[str, Any] = json.loads(done.stdout)["coverage"]
    pairs = {(first, second): count for first, others in document["pairs"].items() for second, count in others.items()}
    assert set(pairs) == set(possible_pairs())
    assert document["possible"] == len(pairs)
    assert document["met"] == sum(count > 0 for count in pairs.values())
    assert f"pairs: {document['met']} of {document['possible']} " in told.stdout
    modes = document["labels"]["mode"]
    assert f"  mode          {', '.join(f'{mode} {modes[mode]}' for mode in MODES)}\n" in told.stdout


def test_nothing_is_told_unless_asked_for(folder: Path) -> None:
    assert "coverage" not in invoke(*RUN).stdout
    assert "coverage" not in json.loads(invoke(*RUN, "--json").stdout)


def test_what_no_case_had_comes_first() -> None:
    coverage = Coverage()
    coverage.count(plainest())
    lines = coverage_lines(coverage, MODES)
    had = labels_of(plainest())
    at = next(number for number, line in enumerate(lines) if line.startswith("never met, "))
    groups = [line.split() for line in lines[at + 1 : -1]]
    assert all(words[0] not in had and words[1:] == ["with", "anything"] for words in groups)
    met = len(had) * (len(had) - 1) // 2 - 1  # of the two values of steps no pair is made
    assert lines[at - 1] == f"pairs: {met} of {len(possible_pairs())} that can be were met"


def test_groups_hold_each_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.shell import coverage as module

    monkeypatch.setattr(module, "MOST_GROUPS", 1000)
    monkeypatch.setattr(module, "MOST_CHARACTERS", 100_000)
    coverage = Coverage()
    for pair in possible_pairs()[: len(possible_pairs()) // 2]:
        coverage.counts[module_key(pair)] = 1
    lines = coverage_lines(coverage, MODES)
    never = {pair for pair in possible_pairs() if not coverage.of_pair(pair)}
    told = list(module._groups(coverage, sorted(never), MODES))
    shown = [frozenset({label, other}) for label, others in told for other in others]
    assert len(shown) == len(never)
    assert set(shown) == {frozenset(pair) for pair in never}
    assert not lines[-1].startswith("  ... ")


def module_key(pair: tuple[str, str]) -> int:
    from nsa_verify.core.labels import LABELS

    return LABELS.index(pair[0]) * len(LABELS) + LABELS.index(pair[1])


def test_only_the_modes_that_are_drawn() -> None:
    coverage = Coverage()
    coverage.count(plainest())
    lines = "\n".join(coverage_lines(coverage, (Mode.DECODE,)))
    assert "  mode          decode 1\n" in lines
    assert not re.search("verify|accepts|padded-start", lines)
    document = coverage_document(coverage, (Mode.DECODE,))
    assert document["possible"] == len(possible_pairs((Mode.DECODE,))) < len(possible_pairs())
    assert document["labels"]["rows"] == {"1": 1, "2-30": 0, "31-33": 0, "34-128": 0, "129-": 0}


def test_one_line_of_few_labels_and_none_of_none() -> None:
    coverage = Coverage({module_key(pair): 1 for pair in possible_pairs()})
    assert (
        coverage_lines(coverage, MODES)[-1]
        == f"pairs: {len(possible_pairs())} of {len(possible_pairs())} that can be were met"
    )
    del coverage.counts[module_key(("mode:decode", "wall:at"))]
    for label in ("mode:decode", "wall:at"):
        coverage.counts[module_key((label, label))] = 1
    assert coverage_lines(coverage, MODES)[-2:] == ["never met, 1 pair:", "  mode:decode  with  wall:at"]
