"""Merging corpora: kind by kind, nothing twice, nothing lost, whoever is named first."""

from __future__ import annotations

import shutil
from itertools import count, permutations
from pathlib import Path

import pytest
from engine.corpora import SLUG, check_every_kill, content, entry_of, saved

from nsa_verify.engine.corpus import CorpusError, Kind, load
from nsa_verify.engine.filing import Fate
from nsa_verify.engine.merging import merge


def _fates(root: Path, *sources: Path) -> list[tuple[str, Fate | None]]:
    return [(str(it.source), it.fate) for it in merge(root, sources)]


def _corpora(folder: Path) -> tuple[Path, Path, Path]:
    root, one, two = folder / "corpus", folder / "one", folder / "two"
    saved(root, entry_of(8, date="2025-02-01"), entry_of(9))
    saved(one, entry_of(8, date="2025-01-01"), entry_of(10), entry_of(11))
    saved(two, entry_of(10, date="2025-01-01"))
    saved(two, entry_of(11), entry_of(9), kind=Kind.REGRESSION)
    saved(two, entry_of(12, found=False), kind=Kind.SEEDS, slug="seed")
    return root, one, two


def test_cases_are_copied_kind_by_kind(tmp_path: Path) -> None:
    root, one, two = _corpora(tmp_path)
    sources = content(one), content(two)
    told = list(merge(root, [one, two]))
    counts = {fate: [it.fate for it in told].count(fate) for fate in Fate}
    assert counts == {Fate.COPIED: 3, Fate.OLDER: 1, Fate.HERE: 1, Fate.LEFT: 2}
    assert not [it.problem for it in told if it.problem]
    # What crashes somewhere is crashing here, though it is a regression case elsewhere.
    crashing = {load(root / name).case.replays[0].requests[0].seq_len for name in content(root) if "crashing" in name}
    assert crashing == {8, 9, 10, 11}
    assert {name.partition("/")[0] for name in content(root)} == {"crashing", "seeds"}
    (first,) = saved(tmp_path / "again", entry_of(8, date="2025-01-01"))
    assert load(root / first.relative_to(tmp_path / "again")) == load(first)
    assert (content(one), content(two)) == sources
    assert not (one / "seeds").exists()
    ended = content(root)
    assert {it.fate for it in merge(root, [one, two])} == {Fate.HERE, Fate.LEFT}
    assert content(root) == ended


def test_the_order_of_the_sources_makes_no_difference_to_what_is_copied(tmp_path: Path) -> None:
    _, one, two = _corpora(tmp_path)
    three = tmp_path / "three"
    saved(three, entry_of(12), entry_of(10), kind=Kind.REGRESSION)
    ends = []
    for number, sources in enumerate(permutations([one, two, three])):
        list(merge(tmp_path / f"to-{number}", sources))
        ends.append({name: load(tmp_path / f"to-{number}" / name).case for name in content(tmp_path / f"to-{number}")})
    assert all(it == ends[0] for it in ends)


@pytest.mark.parametrize("here", list(Kind))
def test_crashing_in_one_and_regression_in_the_other(tmp_path: Path, here: Kind) -> None:
    root, source = tmp_path / "corpus", tmp_path / "source"
    there = Kind.CRASHING if here is Kind.REGRESSION else Kind.REGRESSION
    saved(root, entry_of(8), kind=here)
    (path,) = saved(source, entry_of(8), kind=there)
    # A seed is hand picked, whatever else the case is.
    expected = Fate.COPIED if here is Kind.SEEDS else Fate.LEFT
    assert _fates(root, source) == [(str(path), expected)]


def test_damaged_files_are_told_and_the_others_copied(tmp_path: Path) -> None:
    root, one, _ = _corpora(tmp_path)
    (one / "crashing" / "decode" / "aaa.json").write_text("{")
    (one / "stray.json").write_text("{}")
    told = list(merge(root, [one]))
    problems = sorted(it.problem for it in told if it.problem)
    assert len(problems) == 2
    assert f"{one}/crashing/decode/aaa.json: not valid JSON" in problems[0]
    kinds = "seeds, regression, crashing"
    assert problems[1] == f"{one}/stray.json: lies in none of {kinds}; move it into one of them"
    assert sum(it.fate is Fate.COPIED for it in told) == 2


def test_a_name_without_a_hash_gets_one(tmp_path: Path) -> None:
    root, source = tmp_path / "corpus", tmp_path / "source"
    (path,) = saved(source, entry_of(8), kind=Kind.SEEDS)
    path.rename(path.with_name("by-hand.json"))
    ((_, fate),) = _fates(root, source)
    assert (fate, [Path(name).name[:8] for name in content(root)]) == (Fate.COPIED, ["by-hand-"])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere", "nowhere: there is no such folder; check it"),
        ("file.json", "file.json: is a file; give the folder of a corpus"),
        ("empty", "empty: is no corpus: it holds none of seeds, regression, crashing; give the folder that does"),
        ("corpus", "corpus: is the corpus corpus itself; give another corpus, or another --corpus"),
        ("link", "link: is the corpus corpus itself; give another corpus, or another --corpus"),
        ("corpus/crashing", "corpus/crashing: lies in the corpus corpus itself; give another corpus, or another"),
    ],
)
def test_what_is_no_other_corpus_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("corpus"), entry_of(8))
    saved(Path("good"), entry_of(9))
    Path("file.json").write_text("{}")
    Path("empty").mkdir()
    Path("link").symlink_to("corpus")
    before = content(Path("corpus"))
    with pytest.raises(CorpusError) as caught:
        merge(Path("corpus"), [Path("good"), Path(source)])
    assert str(caught.value).startswith(sentence)
    assert content(Path("corpus")) == before


def test_a_corpus_among_the_cases_of_a_source_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "source", entry_of(8))
    with pytest.raises(CorpusError, match=r"source: the corpus .* lies in its cases; give another corpus"):
        merge(tmp_path / "source" / "crashing" / "corpus", [tmp_path / "source"])


def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, one, two = _corpora(tmp_path)
    numbers = count()

    def fresh() -> Path:
        root = tmp_path / str(next(numbers))
        shutil.copytree(tmp_path / "corpus", root)
        return root

    check_every_kill(fresh, lambda root: list(merge(root, [one, two])), monkeypatch, 8)


def test_a_slug_is_kept(tmp_path: Path) -> None:
    root, source = tmp_path / "corpus", tmp_path / "source"
    saved(source, entry_of(8), slug="my-case")
    saved(source, entry_of(8))
    assert {fate for _, fate in _fates(root, source)} == {Fate.COPIED}
    assert sorted(Path(name).name.rpartition("-")[0] for name in content(root)) == ["my-case", SLUG]
