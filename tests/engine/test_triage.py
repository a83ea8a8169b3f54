"""Groups of findings, and baselines."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from nsa_verify import Case, Mode, Replay, Request, Setup
from nsa_verify.core.findings import Code, Finding, Signature
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, SavedFinding, save
from nsa_verify.engine.record import Record
from nsa_verify.engine.triage import Baseline, Bug, groups

TODAY = date(2030, 1, 31)


def finding(
    name: str = "mine", code: Code = Code.STALE, buffer: str | None = "cu_seqlens_k", region: str = "live"
) -> Finding:
    return Finding(
        implementation=name, executor="eager", code=code, replay=0, mode=Mode.DECODE, buffer=buffer, region=region
    )


def bug(name: str = "mine", code: Code = Code.STALE, place: str = "cu_seqlens_k inside") -> Bug:
    return Bug(name, code, Mode.DECODE, place)


def stored(root: Path, it: Finding, length: int = 1, slug: str = "it") -> Path:
    case = Case(Setup(), (Replay(requests=(Request(seq_len=length),)),))
    return save(root, Kind.CRASHING, Entry(title="it", case=case, finding=SavedFinding.of(it)), slug)


@pytest.mark.parametrize(
    ("given", "place", "symptom"),
    [
        (finding(), "cu_seqlens_k inside", "NV102 decode cu_seqlens_k inside"),
        (finding(code=Code.POISON), "cu_seqlens_k inside", "NV102 decode cu_seqlens_k inside"),
        (finding(code=Code.WRONG_VALUE, region="slack"), "cu_seqlens_k inside", "NV101 decode cu_seqlens_k inside"),
        (finding(code=Code.FRAME_WRITTEN, region="frame"), "cu_seqlens_k outside", "NV202 decode cu_seqlens_k outside"),
        (finding(code=Code.GUARD_WRITTEN, region="guard"), "cu_seqlens_k outside", "NV201 decode cu_seqlens_k outside"),
        (finding(code=Code.INPUT_MUTATED, region="input"), "cu_seqlens_k input", "NV203 decode cu_seqlens_k input"),
        (finding(code=Code.DEATH, buffer=None), "", "NV401 decode"),
    ],
)
def test_the_place_and_the_symptom(given: Finding, place: str, symptom: str) -> None:
    assert (given.place, given.symptom) == (place, symptom)
    assert SavedFinding.of(given).place == place


def test_the_place_of_an_exception_is_its_type() -> None:
    raised = Finding(
        implementation="mine",
        executor="eager",
        code=Code.EXCEPTION,
        replay=0,
        mode=Mode.DECODE,
        message="IndexError: index 3 is out of range",
    )
    assert raised.place == "IndexError"


def test_a_group_is_implementation_code_mode_and_place_the_smallest_case_first(tmp_path: Path) -> None:
    large, small = stored(tmp_path, finding(), 9), stored(tmp_path, finding(region="slack"), 2)
    other = stored(tmp_path, finding(buffer="page_table_1"), 3)
    found, problems = groups(tmp_path)
    assert {key: [it.path for it in saved] for key, saved in found.items()} == {
        bug(): [small, large],
        bug(place="page_table_1 inside"): [other],
    }
    assert problems == []


def test_a_damaged_file_is_named_and_the_others_are_grouped(tmp_path: Path) -> None:
    path = stored(tmp_path, finding())
    damaged = path.with_name("damaged.json")
    damaged.write_text("{", encoding="utf-8")
    found, problems = groups(tmp_path)
    assert list(found) == [bug()]
    assert len(problems) == 1
    assert str(damaged) in problems[0]


def test_no_corpus_has_no_groups(tmp_path: Path) -> None:
    assert groups(tmp_path / "nothing") == ({}, [])


def test_what_shows_another_group_too_is_that_group() -> None:
    record, known = Record(), bug()
    record.see(
        known,
        Signature("mine", "eager", Code.STALE, "cu_seqlens_k inside"),
        "now",
        ["NV102 decode nsa_cu_seqlens_k inside"],
    )
    same, apart = bug(place="nsa_cu_seqlens_k inside"), bug(place="page_table_1 inside")
    assert record.same(same, [same.symptom], [known]) == known
    assert record.same(apart, [apart.symptom, known.symptom], [known]) == known
    assert record.same(apart, [apart.symptom], [known]) is None
    assert record.same(same._replace(implementation="other"), [known.symptom], [known]) is None


def test_what_shows_in_another_mode_is_that_group_if_its_case_shows_it_there() -> None:
    record, known = Record(), bug()
    record.see(known, Signature("mine", "eager", Code.STALE), "now", [known.symptom, "NV102 target-verify x inside"])
    there, elsewhere = (Bug("mine", Code.STALE, Mode.TARGET_VERIFY, place) for place in ("x inside", "y inside"))
    assert record.same(there, [there.symptom], [known]) == known
    assert record.same(elsewhere, [elsewhere.symptom, known.symptom], [known]) == known
    assert record.same(elsewhere, [elsewhere.symptom], [known]) is None


GOOD = """
[[accepted]]
implementation = "mine"
code = "NV102"
reason = "rewritten soon"
expires = 2030-01-31

[[accepted]]
implementation = "other"
reason = "experimental"
expires = 2029-12-31
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "baseline.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_baseline_accepts_until_it_expires(tmp_path: Path) -> None:
    baseline = Baseline.read(written(tmp_path, GOOD))
    accepted = baseline.accepts(bug(), TODAY)
    assert accepted is not None
    assert accepted.reason == "rewritten soon"
    assert baseline.accepts(bug(), date(2030, 2, 1)) is None
    assert baseline.accepts(bug(code=Code.POISON), TODAY) is None
    assert baseline.accepts(bug("other"), TODAY) is None
    assert [it.implementation for it in baseline.expired(TODAY)] == ["other"]
    assert [it.implementation for it in baseline.unmatched([bug()])] == ["other"]
    assert baseline.unmatched([bug(), bug("other")]) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("accepted = " + 20_000 * "[", "not valid TOML"),
        ("[[accepted", "not valid TOML"),
        ("accepted = " + 5_000 * "9", "not valid TOML"),
        ("[other]\na = 1", "holds other"),
        ('[[accepted]]\nimplementation = "a"\nreason = "b"', "lacks expires"),
        ('[[accepted]]\nimplementation = "a"\nreason = "b"\nexpires = "2030-01-01"', "write a date"),
        (f'[[accepted]]\nimplementation = 0x{5_000 * "f"}\nreason = "b"\nexpires = 2030-01-01', "thousands of digits"),
        ('[[accepted]]\nimplementation = "a"\nreason = ""\nexpires = 2030-01-01', "write some text"),
        ('[[accepted]]\nimplementation = "a"\nreason = "b"\nexpires = 2030-01-01\ncode = "NV1"', "there are NV101"),
        ('[[accepted]]\nimplementation = "a"\nreason = "b"\nexpires = 2030-01-01\nwho = "c"', "means nothing"),
        ("accepted = [1]", "is no table"),
    ],
)
def test_a_bad_baseline_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(CorpusError) as raised:
        Baseline.read(path)
    assert words in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_baseline_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="--baseline"):
        Baseline.read(tmp_path / "none.toml")
