"""Putting an entry beside others, or in the place of one: no finding is lost for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine.corpora import SLUG, content, entry_of, saved
from msgspec.structs import replace

from nsa_verify import Code
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, Provenance, load
from nsa_verify.engine.filing import Fate, fold, put_beside, put_instead

OLD, NEW = "2025-01-31T12:00:00Z", "2025-03-01T00:00:00+01:00"


def _put(root: Path, entry: Entry, slug: str = SLUG) -> tuple[Path, Fate]:
    return put_beside(root, Kind.CRASHING, entry, slug)


@pytest.mark.parametrize(
    ("here", "given", "fate", "kept"),
    [
        (NEW, OLD, Fate.OLDER, OLD),
        (OLD, NEW, Fate.HERE, OLD),
        (OLD, OLD, Fate.HERE, OLD),
        ("2025-01-31", "2025-01-30T23:59:59", Fate.OLDER, "2025-01-30T23:59:59"),
        (NEW, "", Fate.HERE, NEW),
        ("", OLD, Fate.HERE, ""),
        (NEW, "yesterday", Fate.HERE, NEW),
    ],
)
def test_the_older_provenance_stays(tmp_path: Path, here: str, given: str, fate: Fate, kept: str) -> None:
    path, first = _put(tmp_path, entry_of(date=here))
    other = replace(entry_of(date=given), title="Said otherwise.")
    assert (first, _put(tmp_path, other)) == (Fate.COPIED, (path, fate))
    assert load(path) == entry_of(date=kept)
    assert _put(tmp_path, other) == (path, Fate.HERE)


def test_another_finding_of_the_same_case_has_a_file_of_its_own(tmp_path: Path) -> None:
    entries = [entry_of(), entry_of(buffer="page_table_1"), entry_of(region="frame"), entry_of(executor="graph")]
    for _ in range(2):
        paths = [_put(tmp_path, it)[0] for it in entries]
        assert [load(path) for path in paths] == entries
    assert len(content(tmp_path)) == 4
    assert "-page-table-1-inside-" in paths[1].name
    assert "-nsa-cache-seqlens-outside-" in paths[2].name


def test_what_is_not_said_of_the_place_makes_no_difference(tmp_path: Path) -> None:
    path, _ = _put(tmp_path, entry_of())
    for vague in (entry_of(buffer=None, region=None), entry_of(region=None), entry_of(found=False)):
        assert _put(tmp_path, vague) == (path, Fate.HERE)
    assert _put(tmp_path, entry_of(buffer="page_table_1", region=None))[0] != path
    assert _put(tmp_path, entry_of(buffer=None, region=None, code=Code.STALE))[0] != path


def test_names_that_are_cut_do_not_collide(tmp_path: Path) -> None:
    long = "x" * 100
    paths = {_put(tmp_path, entry_of(buffer=f"{long}{number}"), long)[0] for number in range(4)}
    assert len(paths) == 4


def test_a_damaged_file_of_that_name_is_written_anew(tmp_path: Path) -> None:
    path, _ = _put(tmp_path, entry_of())
    path.write_text("{")
    assert _put(tmp_path, entry_of()) == (path, Fate.COPIED)
    assert load(path) == entry_of()


def test_unless_it_is_in_another_folder(tmp_path: Path) -> None:
    (mended,) = saved(tmp_path, entry_of(), kind=Kind.REGRESSION)
    assert put_beside(tmp_path, Kind.CRASHING, entry_of(), SLUG, Kind.REGRESSION) == (mended, Fate.LEFT)
    (here,) = saved(tmp_path, entry_of())
    assert put_beside(tmp_path, Kind.CRASHING, entry_of(), SLUG, Kind.REGRESSION) == (here, Fate.HERE)


def test_one_file_in_the_place_of_another(tmp_path: Path) -> None:
    large, small = entry_of(16, date=OLD), entry_of(8, date=OLD)
    (path,) = saved(tmp_path, large)
    target = put_instead(tmp_path, path, large, Kind.CRASHING, small)
    assert load(target) == small
    assert list(content(tmp_path)) == [str(target.relative_to(tmp_path))]


def test_the_case_of_another_file_of_the_group_is_not_written_twice(tmp_path: Path) -> None:
    (there,) = saved(tmp_path, entry_of(8, date=NEW), slug="named-by-hand")
    (path,) = saved(tmp_path, entry_of(16))
    assert put_instead(tmp_path, path, entry_of(16), Kind.CRASHING, entry_of(8, date=OLD)) == there
    assert load(there).provenance == Provenance(seed=8, date=OLD, impl=("mine.py",))
    assert len(content(tmp_path)) == 1


@pytest.mark.parametrize("what", ["changed", "removed", "damaged"])
def test_what_somebody_else_changed_meanwhile_is_left_alone(tmp_path: Path, what: str) -> None:
    (path,) = saved(tmp_path, entry_of(16))
    if what == "changed":
        saved(tmp_path, replace(entry_of(16), title="Said otherwise."))
    elif what == "damaged":
        path.write_text("{")
    else:
        path.unlink()
    before = content(tmp_path)
    with pytest.raises(CorpusError) as first:
        put_instead(tmp_path, path, entry_of(16), Kind.CRASHING, entry_of(8))
    with pytest.raises(CorpusError) as second:
        fold(tmp_path, path, entry_of(16))
    assert str(first.value) == str(second.value)
    assert str(first.value).startswith(f"{path}: ")
    assert content(tmp_path) == before


def test_of_files_with_the_same_case_and_group_one_stays(tmp_path: Path) -> None:
    entry = entry_of(8, date=NEW)
    first, second = (saved(tmp_path, entry, slug=slug)[0] for slug in ("a", "b"))
    by_hand = first.with_name("0.json")
    by_hand.write_bytes(first.read_bytes())
    saved(tmp_path, entry_of(8, buffer="page_table_1"), slug="another-group")
    saved(tmp_path, replace(entry, before=(entry.case,)), slug="after-another-case")
    saved(tmp_path, entry, kind=Kind.REGRESSION, slug="0")
    assert [fold(tmp_path, path, entry) for path in (second, by_hand, first)] == [first, first, first]
    assert len(content(tmp_path)) == 4
    assert first.exists()
