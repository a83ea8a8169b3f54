"""Saved cases made smaller: each still shows its finding, at its place and in its mode, and nothing is lost by it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from engine.corpora import SLUG, case_of, check_every_kill, content, entry_of, saved
from msgspec.structs import replace
from shell.commands import registry_of_its_own, written

from nsa_verify import Case, Code, Mode, Replay, Request, Setup
from nsa_verify.engine import minimizing
from nsa_verify.engine.corpus import Entry, Kind, Provenance, load, scan
from nsa_verify.engine.minimizing import Minimized, Result, minimize
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.simplifying import measure
from nsa_verify.engine.triage import groups

EVERYWHERE = """
from nsa_verify import Mode, implementation
from nsa_verify.kernels.vectorized import refresh as right

@implementation("short-top-k", modes=list(Mode), extent="full")
def refresh(inputs, steps, setup):
    right(inputs, steps, setup)
    steps[0].cache_seqlens.add_(1)
"""
REMEMBERS = """
from nsa_verify import Mode, implementation
from nsa_verify.kernels.vectorized import refresh as right

long = False

@implementation("short-top-k", modes=[Mode.DECODE], extent="full")
def refresh(inputs, steps, setup):
    global long
    long = long or bool((inputs.seq_lens[: inputs.batch_size] >= 16).any())
    right(inputs, steps, setup)
    if long:
        steps[0].nsa_cache_seqlens.sub_(1)
"""
TWO_PLACES = """
from nsa_verify import Mode, implementation
from nsa_verify.kernels.vectorized import refresh as right

@implementation("short-top-k", modes=[Mode.DECODE], extent="full")
def refresh(inputs, steps, setup):
    right(inputs, steps, setup)
    long = bool((inputs.seq_lens[: inputs.batch_size] >= 16).any())
    (steps[0].nsa_cache_seqlens if long else steps[0].page_table_1).sub_(1)
"""
DEADLY = (
    REMEMBERS.replace("steps[0].nsa_cache_seqlens.sub_(1)", "import os; os._exit(3)")
    .replace("    right(", "    dies = long and int(inputs.seq_lens[0]) == 4\n    right(")
    .replace("    if long:", "    if dies:")
)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with registry_of_its_own():
        yield


@pytest.fixture(name="plan")
def _plan(tmp_path: Path) -> Plan:
    """``short-top-k`` in this process."""
    mine = written(tmp_path)
    return Plan(references=(str(mine),), only=("short-top-k", "vectorized"), executors=("eager",))


def _wrong(plan: Plan, text: str) -> Plan:
    """The plan with another implementation of that name."""
    Path(plan.references[0]).write_text(text)
    return plan


def _minimized(plan: Plan, root: Path) -> list[Minimized]:
    return [it for it in minimize(plan, root, list(scan(root / "crashing"))) if isinstance(it, Minimized)]


def test_a_smaller_case_takes_the_place_of_the_file(plan: Plan, tmp_path: Path) -> None:
    root, large = tmp_path / "corpus", entry_of(20, num_steps=2, date="2025-01-31")
    (path,) = saved(root, large)
    (told,) = _minimized(plan, root)
    assert (told.path, told.status, told.before, told.done) == (path, Result.SMALLER, large, True)
    assert told.target is not None
    assert list(scan(root)) == [told.target]
    entry = load(told.target)
    assert told.after == entry
    assert entry.case == case_of(8)
    assert (entry.title, entry.provenance) == (large.title, large.provenance)
    assert entry.finding is not None
    assert (entry.finding.place, entry.finding.code) == ("nsa_cache_seqlens inside", Code.WRONG_VALUE)
    assert told.target.name.startswith(f"{SLUG}-")
    before = content(root)
    (again,) = _minimized(plan, root)
    assert (again.status, again.target) == (Result.MINIMAL, None)
    assert content(root) == before


def test_the_title_says_what_the_smaller_case_shows(plan: Plan, tmp_path: Path) -> None:
    old = "nsa_cache_seqlens[3]: expected 5, got 4"
    saved(tmp_path / "corpus", replace(entry_of(20, message=old), title=f"short-top-k: wrong: {old}"))
    (told,) = _minimized(plan, tmp_path / "corpus")
    assert told.after is not None
    assert told.after.title == "short-top-k: wrong: nsa_cache_seqlens[0]: expected 8, got 7"


@pytest.mark.parametrize("mode", list(Mode))
def test_a_smaller_case_is_of_the_same_mode(plan: Plan, tmp_path: Path, mode: Mode) -> None:
    root = tmp_path / "corpus"
    setup = Setup(num_draft_tokens=2, pool_width=20, table_width=18, buckets=(1, 3), num_steps=2)
    case = Case(setup, (Replay(mode, (Request(9), Request(4))), Replay(Mode.DECODE, (Request(7),))))
    finding = entry_of(buffer="cache_seqlens").finding
    assert finding is not None
    saved(root, Entry(title="Wrong.", case=case, finding=replace(finding, mode=mode)))
    before = set(groups(root)[0])
    (told,) = _minimized(_wrong(plan, EVERYWHERE), root)
    assert told.status is Result.SMALLER
    assert told.after is not None
    assert [it.mode for it in told.after.case.replays] == [mode]
    assert measure(told.after.case) < measure(case)
    assert set(groups(root)[0]) == before


def test_what_does_not_fail_any_more_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    saved(root, entry_of(20))
    before = content(root)
    written(tmp_path, too_low=0)
    (told,) = _minimized(plan, root)
    assert (told.status, told.target, told.problem) == (Result.FIXED, None, "")
    assert content(root) == before


def test_what_fails_otherwise_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    (path,) = saved(root, entry_of(20, buffer="page_table_1"))
    before = content(root)
    (told,) = _minimized(plan, root)
    assert told.status is Result.OTHER
    shown = "short-top-k [eager] NV101 decode nsa_cache_seqlens inside"
    assert told.problem == f"{path}: fails otherwise than when it was saved: {shown}"
    assert content(root) == before


def test_a_finding_that_does_not_say_where_may_be_anywhere(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    paths = saved(root, *(entry_of(length, buffer=None, region=None) for length in (8, 20, 16)))
    told = {it.path: it for it in _minimized(plan, root)}
    assert [told[path].status for path in paths] == [Result.MINIMAL, Result.SMALLER, Result.SMALLER]
    assert list(scan(root)) == [paths[0]]


def test_what_is_not_said_is_settled_by_what_the_case_itself_shows(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    saved(root, entry_of(20, num_steps=2, buffer=None, region=None))
    (told,) = _minimized(_wrong(plan, TWO_PLACES), root)
    assert told.after is not None
    assert told.after.case == case_of(16)
    assert told.after.finding is not None
    assert told.after.finding.buffer == "nsa_cache_seqlens"


def test_what_cannot_be_judged(plan: Plan, tmp_path: Path) -> None:
    root, here = tmp_path / "corpus", ("NVIDIA H200", "cuda")
    from nsa_verify.device.select import resolve

    if resolve("auto") == "cuda":
        here = ("CPU", "cpu")
    damaged = root / "crashing" / "decode" / "aaa.json"
    elsewhere = replace(entry_of(21), provenance=Provenance(device=f"{here[0]}, torch 2.11.0"))
    others = [entry_of(20, implementation="warp"), entry_of(20, executor="stone"), entry_of(20, found=False), elsewhere]
    paths = [saved(root, it, slug=slug)[0] for it, slug in zip(others, "bcde", strict=True)]
    damaged.write_text("{")
    before = content(root)
    told = _minimized(plan, root)
    assert [(it.path, it.status) for it in told] == [(path, Result.ERROR) for path in (damaged, *paths)]
    sentences = [
        f"{damaged}: not valid JSON",
        f"{paths[0]}: was found in 'warp', which is not loaded; give it with --impl mine.py",
        f"{paths[1]}: was found under stone, and here are eager; give others with --executor or --device",
        f"{paths[2]}: has no finding that a smaller case could be held to; leave it, or write one into it",
        f"{paths[3]}: was found on {here[0]}, torch 2.11.0, and this is ",
    ]
    assert all(it.problem.startswith(sentence) for it, sentence in zip(told, sentences, strict=True))
    assert told[4].problem.endswith(f"; run it with --device {here[1]}")
    assert content(root) == before


def test_cases_of_a_group_that_end_up_the_same_become_one_file(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    first, second = (saved(root, entry_of(8, date=date), slug=slug)[0] for slug, date in (("a", "2026"), ("b", "2025")))
    (large,) = saved(root, entry_of(20), slug="c")
    told = _minimized(plan, root)
    ends = [(Result.MINIMAL, None), (Result.SAME, first), (Result.SMALLER, first)]
    assert [(it.status, it.target) for it in told] == ends
    assert list(scan(root)) == [first]
    assert not second.exists()
    assert not large.exists()


def test_killed_at_any_moment(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()

    def fresh() -> Path:
        root = tmp_path / str(next(numbers))
        saved(root, entry_of(9), entry_of(10))
        return root

    check_every_kill(fresh, lambda root: _minimized(plan, root), monkeypatch, 8)


def test_a_file_that_was_changed_meanwhile_is_left_alone(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "corpus"
    (path,) = saved(root, entry_of(20))
    real = minimizing.shrink_saved

    def meanwhile(plan: Plan, entry: Entry) -> minimizing.Shrunk:
        saved(root, replace(entry, title="Said otherwise."))
        return real(plan, entry)

    monkeypatch.setattr(minimizing, "shrink_saved", meanwhile)
    (told,) = _minimized(plan, root)
    sentence = f"{path}: was changed by somebody else meanwhile and is left alone; run it again"
    assert (told.status, told.problem) == (Result.ERROR, sentence)
    assert load(path).title == "Said otherwise."


def test_what_it_shrinks_to_must_not_need_the_cases_before_it(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    (path,) = saved(root, entry_of(20))
    (told,) = _minimized(replace(_wrong(plan, REMEMBERS), isolate=True), root)
    assert told.status is Result.ERROR
    assert told.problem == (
        f"{path}: what it shrinks to shows the finding only after other cases; it was left as it is"
    )
    assert load(path) == entry_of(20)


@pytest.mark.parametrize("workers", [1, 2])
def test_deaths_in_workers(plan: Plan, tmp_path: Path, workers: int) -> None:
    root = tmp_path / "corpus"
    source = Path(__file__).with_name("deadly.py")
    death: dict[str, Any] = {"implementation": "exits", "code": Code.DEATH, "buffer": None, "region": None}
    saved(root, entry_of(12, **death), entry_of(10, **death), slug="nv401-exits")
    plan = replace(plan, references=(str(source),), only=("exits",), isolate=True, workers=workers)
    assert {it.status for it in _minimized(plan, root)} == {Result.SMALLER}
    (path,) = scan(root)
    assert load(path).case.replays[0].requests == (Request(9),)


def test_a_death_that_needs_other_cases_keeps_the_fewest(plan: Plan, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    death: dict[str, Any] = {"code": Code.DEATH, "buffer": None, "region": None, "message": "its process ended"}
    entry = replace(entry_of(4, **death), before=(case_of(2), case_of(16), case_of(3), case_of(5)))
    (path,) = saved(root, entry)
    plan = _wrong(plan, DEADLY)
    (told,) = _minimized(plan, root)
    assert told.problem == f"{path}: kills its process after other cases; run it without --no-isolation"
    plan = replace(plan, isolate=True)
    (told,) = _minimized(plan, root)
    assert (told.status, told.target) == (Result.SMALLER, path)
    assert load(path) == replace(entry, before=(case_of(16),))
    before = content(root)
    assert [it.status for it in _minimized(plan, root)] == [Result.MINIMAL]
    assert content(root) == before
    assert os.listdir(root / Kind.CRASHING) == ["decode"]
