"""Pruning: every pair of labels and every group stays, nothing superfluous does, and seeds are not touched."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

import pytest
from engine.corpora import check_every_kill, content, entry_of, groups_of, saved
from helpers import draw_many

from nsa_verify import Code
from nsa_verify.core.case import size_of
from nsa_verify.core.labels import Pair, labels_of, pairs
from nsa_verify.engine import pruning
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, SavedFinding, load, scan
from nsa_verify.engine.pruning import prune
from nsa_verify.engine.triage import groups
from nsa_verify.strategies import cases


def _covered(root: Path) -> set[Pair]:
    return {pair for path in scan(root) for pair in pairs(labels_of(load(path).case))}


@pytest.fixture(name="drawn", scope="module")
def _drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of drawn cases: some in groups, some of regression, some seeds, some without a finding."""
    root = tmp_path_factory.mktemp("drawn") / "corpus"
    for number, case in enumerate(dict.fromkeys(draw_many(cases(), 160))):
        finding = SavedFinding(
            implementation=f"impl-{number % 3}",
            executor="eager",
            code=Code.STALE,
            replay=0,
            mode=case.replays[0].mode,
            buffer="page_table_1",
            region="live",
        )
        entry = Entry(title="Drawn.", case=case, finding=finding if number % 2 else None)
        kind = Kind.SEEDS if number % 20 == 0 else list(Kind)[1 + number % 3 % 2]
        saved(root, entry, kind=kind, slug=f"drawn-{number}")
    return root


def _copied(root: Path, folder: Path) -> Path:
    shutil.copytree(root, folder)
    return folder


def test_what_stays(drawn: Path, tmp_path: Path) -> None:
    root = _copied(drawn, tmp_path / "corpus")
    before, by_group, covered = content(root), groups(root)[0], _covered(root)
    told = prune(root)
    after = content(root)
    assert set(before) - set(after) == {str(it.path.relative_to(root)) for it in told.removed}
    assert after.items() <= before.items()
    assert _covered(root) == covered
    assert (told.pairs_before, told.pairs_after, told.kept) == (len(covered), len(covered), len(after))
    assert {name for name in before if name.startswith("seeds")} <= set(after)
    assert groups(root)[0].keys() == by_group.keys()
    assert all(groups(root)[0][bug][0] == saved_cases[0] for bug, saved_cases in by_group.items())
    assert groups_of(root) == groups_of(drawn)
    for it in told.removed:
        finding = load(drawn / it.path.relative_to(root)).finding
        assert (it.kept_in is not None) == (finding is not None)
        assert it.kept_in is None or str(it.kept_in.relative_to(root)) in after
    assert len(after) < 0.8 * len(before)


def test_nothing_that_stays_is_superfluous(drawn: Path, tmp_path: Path) -> None:
    root = _copied(drawn, tmp_path / "corpus")
    prune(root)
    minimal = {it[0].path for it in groups(root)[0].values()}
    mended: dict[object, tuple[tuple[int, ...], Path]] = {}
    for path in scan(root / Kind.REGRESSION):
        entry = load(path)
        if entry.finding is not None:
            group = (entry.finding.implementation, entry.finding.mode)
            mended[group] = min(mended.get(group, (size_of(entry.case), path)), (size_of(entry.case), path))
    minimal |= {path for _, path in mended.values()}
    labels = {path: set(pairs(labels_of(load(path).case))) for path in scan(root)}
    for path, own in labels.items():
        others = set().union(*(it for other, it in labels.items() if other != path))
        assert path.is_relative_to(root / Kind.SEEDS) or path in minimal or own - others, path


def test_what_later_choices_made_superfluous_goes_again() -> None:
    """The first has most, but those that are needed for the last two pairs have together what it has."""
    files = [
        pruning._File(Path(f"{pairs_of:b}"), None, Kind.REGRESSION, entry_of(8, found=False), pairs_of)
        for pairs_of in (0b001111, 0b010011, 0b101100, 0b000001)
    ]
    assert [str(it.path) for it in pruning._choose(files)] == ["10011", "101100"]


def test_a_second_time_changes_nothing(drawn: Path, tmp_path: Path) -> None:
    root = _copied(drawn, tmp_path / "corpus")
    prune(root)
    ended = content(root)
    assert prune(root).removed == ()
    assert content(root) == ended


def test_a_dry_run_only_tells(drawn: Path, tmp_path: Path) -> None:
    root = _copied(drawn, tmp_path / "corpus")
    (root / ".lock").unlink()
    before = sorted(tmp_path.rglob("*"))
    dry = prune(root, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert dry == prune(root)


def test_of_a_group_the_smallest_stays(tmp_path: Path) -> None:
    paths = saved(tmp_path, *(entry_of(length) for length in (10, 20, 12)))
    told = prune(tmp_path)
    assert set(scan(tmp_path)) == {paths[0]}
    assert {it.path for it in told.removed} == set(paths[1:])
    assert {(it.group, it.kept_in) for it in told.removed} == {
        ("short-top-k NV101 decode nsa_cache_seqlens inside", paths[0])
    }


def test_what_crashes_and_what_was_mended_are_two(tmp_path: Path) -> None:
    saved(tmp_path, entry_of(10), entry_of(20))
    saved(tmp_path, entry_of(12), entry_of(21), kind=Kind.REGRESSION)
    prune(tmp_path)
    kept = {(path.parent.parent.name, load(path).case.replays[0].requests[0].seq_len) for path in scan(tmp_path)}
    assert kept == {("crashing", 10), ("regression", 12)}


def test_damaged_files_stay_and_are_told(tmp_path: Path) -> None:
    saved(tmp_path, entry_of(10), entry_of(12))
    damaged = tmp_path / "crashing" / "decode" / "aaa.json"
    damaged.write_text("{")
    told = prune(tmp_path)
    assert len(told.removed) == 1
    assert [it.partition(": not valid JSON")[0] for it in told.problems] == [str(damaged)]
    assert damaged.exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="there is no such file or folder"):
        prune(tmp_path / "nowhere")
    assert prune(tmp_path).kept == 0


def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()

    def fresh() -> Path:
        root = tmp_path / str(next(numbers))
        saved(root, *(entry_of(length) for length in (10, 12, 20)), entry_of(8, buffer="page_table_1"))
        return root

    check_every_kill(fresh, prune, monkeypatch, 4)


@pytest.mark.parametrize("what", ["kept", "gone", "added"])
def test_somebody_else_changes_the_corpus_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    small, middle, large = saved(tmp_path, *(entry_of(length) for length in (10, 12, 20)))
    choose, times = pruning._choose, 0
    added: list[Path] = []

    def meanwhile(files: list[pruning._File]) -> list[pruning._File]:
        nonlocal times
        times += 1
        if times == 1:
            if what == "kept":
                small.unlink()
            elif what == "gone":
                saved(tmp_path, entry_of(20, buffer="page_table_1"))
            else:
                added.extend(saved(tmp_path, entry_of(21)))
        return choose(files)

    monkeypatch.setattr(pruning, "_choose", meanwhile)
    prune(tmp_path)
    stays = {"kept": {middle}, "gone": {small, large}, "added": {small, *added}}
    assert (set(scan(tmp_path)), times) == (stays[what], 1 if what == "added" else 2)
