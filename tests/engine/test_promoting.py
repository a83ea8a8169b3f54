"""Crashing cases that are mended become regression cases, all others stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from engine.corpora import check_every_kill, content, entry_of, saved
from msgspec.structs import replace
from shell.commands import registry_of_its_own, written

from nsa_verify.engine import promoting
from nsa_verify.engine.accused import runs_needed
from nsa_verify.engine.corpus import Entry, Kind, Provenance, load, scan
from nsa_verify.engine.filing import put_instead
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.promoting import Promoted, promote
from nsa_verify.engine.replaying import Status

NOW_AND_THEN = """
from nsa_verify import Mode, implementation
from nsa_verify.kernels.vectorized import refresh as right

calls = 0

@implementation("short-top-k", modes=[Mode.DECODE], extent="full")
def refresh(inputs, steps, setup):
    global calls
    calls += 1
    right(inputs, steps, setup)
    if calls % 11 == 0:
        steps[0].nsa_cache_seqlens.sub_(1)
"""


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with registry_of_its_own():
        yield


@pytest.fixture(name="plan")
def _plan(tmp_path: Path) -> Plan:
    """``short-top-k``, mended, in this process."""
    mine = written(tmp_path, too_low=0)
    return Plan(references=(str(mine),), only=("short-top-k", "vectorized"), executors=("eager",))


def _promoted(plan: Plan, root: Path) -> list[Promoted]:
    return [it for it in promote(plan, root, list(scan(root / "crashing"))) if isinstance(it, Promoted)]


def test_what_is_mended_moves_as_it_is(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    paths = saved(root, entry_of(8), entry_of(20, date="2025-01-31"), entry_of(9, found=False))
    before = content(root)
    told = _promoted(plan, root)
    assert {it.path for it in told} == set(paths)
    assert {it.status for it in told} == {Status.FIXED}
    assert content(root) == {name.replace("crashing", "regression"): text for name, text in before.items()}
    assert all(it.target is not None and it.target.is_file() and not it.path.exists() for it in told)


def test_what_still_fails_stays(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    (path,) = saved(root, entry_of(8))
    (short,) = saved(root, entry_of(3))
    written(tmp_path)
    told = {it.path: it for it in _promoted(plan, root)}
    assert (told[short].status, told[path].status, told[path].target) == (Status.FIXED, Status.FAILED, None)
    shown = "short-top-k [eager] NV101 decode nsa_cache_seqlens inside: nsa_cache_seqlens[0]: expected 8, got 7"
    assert told[path].problem == f"{path}: {shown}"
    assert path.is_file()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"implementation": "warp"}, "was found in 'warp', which is not loaded; give it with --impl mine.py"),
        ({"executor": "stone"}, "was found under stone, and here are eager; give others with --executor or --device"),
    ],
)
def test_others_that_agree_do_not_speak_for_the_accused(
    plan: Plan, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    root = tmp_path / "corpus"
    (path,) = saved(root, entry_of(8, **changes))
    (told,) = _promoted(plan, root)
    assert (told.status, told.problem) == (Status.ERROR, f"{path}: {sentence}")
    assert path.is_file()


def test_the_accused_must_have_been_judged(plan: Plan, tmp_path: Path) -> None:
    """It may declare the mode no more: then nobody knows."""
    root = tmp_path / "corpus"
    mine = Path(plan.references[0])
    mine.write_text(mine.read_text().replace("[Mode.DECODE]", "[Mode.TARGET_VERIFY]"))
    (path,) = saved(root, entry_of(8))
    (told,) = _promoted(plan, root)
    assert told.status is Status.ERROR
    assert told.problem.startswith(f"{path}: short-top-k [eager], which it was found in, was not judged: ")


def test_what_shows_now_and_then_is_run_more_often(plan: Plan, tmp_path: Path) -> None:
    Path(plan.references[0]).write_text(NOW_AND_THEN)
    ends = []
    for failed in (1, 5):
        root = tmp_path / str(failed)
        saved(root, replace(entry_of(8), provenance=Provenance(failed=failed, attempts=5)))
        with registry_of_its_own():
            (told,) = _promoted(plan, root)
        ends.append(told.status)
    assert ends == [Status.FAILED, Status.FIXED]


@pytest.mark.parametrize(
    ("failed", "attempts", "runs"),
    [(None, None, 1), (5, 5, 1), (4, 5, 3), (1, 5, 21), (0, 5, 44), (0, 1, 7), (1, 1000, 50), (2, None, 1), (-1, 5, 1)],
)
def test_how_many_runs_must_agree(failed: int | None, attempts: int | None, runs: int) -> None:
    assert runs_needed(Provenance(failed=failed, attempts=attempts)) == runs


def test_one_that_is_a_regression_case_already(plan: Plan, tmp_path: Path) -> None:
    """As after a promotion that was killed before the old file was removed."""
    root = tmp_path / "corpus"
    (there,) = saved(root, replace(entry_of(8, date="2025"), title="Said otherwise."), kind=Kind.REGRESSION)
    saved(root, entry_of(8, date="2026"))
    (told,) = _promoted(plan, root)
    assert (told.status, told.target) == (Status.FIXED, there)
    assert list(scan(root)) == [there]
    assert load(there).title == "Said otherwise."


def test_killed_at_any_moment(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()

    def fresh() -> Path:
        root = tmp_path / str(next(numbers))
        saved(root, entry_of(9), entry_of(10))
        return root

    check_every_kill(fresh, lambda root: _promoted(plan, root), monkeypatch, 8)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_that_was_changed_meanwhile_stays(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    root = tmp_path / "corpus"
    (path,) = saved(root, entry_of(20))

    def meanwhile(*arguments: Any) -> Path:
        if damaged:
            path.write_text("{")
        else:
            saved(root, entry_of(20, buffer="page_table_1"))
        return put_instead(*arguments)

    monkeypatch.setattr(promoting, "put_instead", meanwhile)
    (told,) = _promoted(plan, root)
    why = "not valid JSON" if damaged else "was changed by somebody else meanwhile and is left alone; run it again"
    assert told.status is Status.ERROR
    assert told.problem.startswith(f"{path}: {why}")
    assert list(scan(root)) == [path]


def test_a_damaged_file_is_an_error(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    (good,) = saved(root, entry_of(8))
    damaged = good.with_name("aaa.json")
    damaged.write_text("{")
    told = {it.path: it for it in _promoted(plan, root)}
    assert (told[damaged].status, told[good].status) == (Status.ERROR, Status.FIXED)
    assert told[damaged].problem.startswith(f"{damaged}: not valid JSON")
    assert damaged.is_file()


def test_by_two_workers(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    entries: list[Entry] = [entry_of(length) for length in (8, 9, 10, 12)]
    saved(root, *entries)
    told = _promoted(replace(plan, workers=2, isolate=True), root)
    assert [it.status for it in told] == [Status.FIXED] * 4
    assert not list(scan(root / "crashing"))
