"""The file format: round trip, readable text, content-hash names, and one clear sentence for every bad file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsa_verify import Case, Code, Finding, Mode, Replay, Request, Setup
from nsa_verify.engine.corpus import (
    CorpusError,
    Entry,
    Kind,
    Provenance,
    SavedFinding,
    case_hash,
    dumps,
    file_name,
    load,
    path_of,
    save,
)

CASE = Case(
    Setup(num_draft_tokens=2, pool_rows=2, buckets=(2, 4)),
    (Replay(requests=(Request(9, 1), Request(3))), Replay(Mode.TARGET_VERIFY, (Request(5),))),
)
FINDING = SavedFinding(
    implementation="mine",
    executor="eager",
    code=Code.STALE,
    replay=0,
    mode=Mode.DECODE,
    step=0,
    buffer="page_table_1",
    element=(1, 3),
    region="live",
    expected=1003,
    got=1035,
    message="stale",
)
ENTRY = Entry(
    title="A short batch after a long one.",
    case=CASE,
    finding=FINDING,
    provenance=Provenance(version="0.1.0", seed=7, example=12, date="2025-01-31T12:00:00Z", impl=("mine.py",)),
)


def _write(folder: Path, content: dict[str, Any], name: str = "by-hand.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def _content(entry: Entry = ENTRY) -> dict[str, Any]:
    content = json.loads(dumps(entry))
    assert isinstance(content, dict)
    return content


def _error(path: Path) -> str:
    """The sentence of the refusal: it is one line and begins with the file."""
    with pytest.raises(CorpusError) as caught:
        load(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    return sentence.removeprefix(f"{path}: ")


@pytest.mark.parametrize("entry", [ENTRY, Entry(title="No finding.", case=CASE, bug_classes=(3, 28))])
def test_an_entry_survives_the_round_trip(tmp_path: Path, entry: Entry) -> None:
    path = save(tmp_path, Kind.CRASHING, entry, "short-after-long")
    assert load(path) == entry
    assert path.read_text() == dumps(load(path))


def test_the_text_is_sorted_indented_and_shows_a_request_on_one_line() -> None:
    text = dumps(ENTRY)
    assert json.dumps(json.loads(text), sort_keys=True) == json.dumps(json.loads(text))
    assert '          {"accept_len": 1, "pool_row": 1, "seq_len": 9},\n' in text
    assert '      "buckets": [2, 4],\n' in text
    assert text.endswith("}\n")
    assert max(map(len, text.splitlines())) <= 120


def test_the_name_is_the_slug_and_the_hash_of_the_canonical_case(tmp_path: Path) -> None:
    path = save(tmp_path, Kind.REGRESSION, ENTRY, "short-after-long")
    canonical = json.dumps(_content()["case"], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    assert path == tmp_path / "regression" / "decode" / f"short-after-long-{digest}.json"
    assert path == path_of(tmp_path, Kind.REGRESSION, ENTRY, "short-after-long")


def test_the_hash_is_that_of_the_case_alone() -> None:
    assert file_name(ENTRY, "x") == file_name(Entry(title="Another title.", case=CASE), "x")
    other = Case(CASE.setup, CASE.replays[:1])
    assert case_hash(other) != case_hash(CASE)


def test_the_folder_is_the_mode_of_the_failing_or_else_the_last_replay() -> None:
    assert ENTRY.mode is Mode.DECODE
    assert Entry(title="No finding.", case=CASE).mode is Mode.TARGET_VERIFY


@pytest.mark.parametrize(
    ("slug", "stem"),
    [
        ("NV102 mine/eager", "nv102-mine-eager"),
        ("../../etc", "etc"),
        ("", "case"),
        ("ü", "case"),
        ("a" * 200, "a" * 80),
    ],
)
def test_a_slug_becomes_a_plain_file_name(slug: str, stem: str) -> None:
    assert file_name(ENTRY, slug) == f"{stem}-{case_hash(CASE)}.json"


def test_a_saved_finding_is_what_identifies_a_finding() -> None:
    finding = Finding(
        implementation="mine",
        executor="eager",
        code=Code.STALE,
        replay=0,
        mode=Mode.DECODE,
        step=0,
        buffer="page_table_1",
        element=(1, 3),
        region="live",
        expected=1003,
        got=1035,
        before=1035,
        count=6,
        message="stale",
    )
    assert SavedFinding.of(finding) == FINDING


@pytest.mark.parametrize(
    ("replay", "mode", "sentence"),
    [(2, Mode.DECODE, "finding.replay = 2"), (1, Mode.DECODE, "finding.mode = 'decode': replay 1 is 'target-verify'")],
)
def test_a_finding_belongs_to_a_replay_of_the_case(replay: int, mode: Mode, sentence: str) -> None:
    finding = SavedFinding(implementation="mine", executor="eager", code=Code.STALE, replay=replay, mode=mode)
    with pytest.raises(ValueError, match=sentence):
        Entry(title="Wrong.", case=CASE, finding=finding)


@pytest.mark.parametrize("title", ["", "  ", "two\nlines"])
def test_a_title_is_one_line(title: str) -> None:
    with pytest.raises(ValueError, match="title = "):
        Entry(title=title, case=CASE)


def _set(content: dict[str, Any], value: object, *keys: str | int) -> None:
    at: Any = content
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value


LONG = "field case.replays[0].requests[0].seq_len = 99: longer than its pool row holds (pool_width = 32"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda c: _set(c, 9.0, "case", "replays", 0, "requests", 0, "seq_len"), "expected `int`, got `float`"),
        (
            lambda c: _set(c, 9.0, "case", "replays", 0, "requests", 0, "seq_len"),
            "field case.replays[0].requests[0].seq_",
        ),
        (
            lambda c: _set(c, True, "case", "setup", "page_size"),
            "field case.setup.page_size: expected `int`, got `bool`",
        ),
        (lambda c: _set(c, "9", "case", "setup", "page_size"), "field case.setup.page_size: expected `int`, got `str`"),
        (lambda c: _set(c, 7, "case", "setup", "page_size"), "field case.setup.page_size = 7: must be one of 1, 16"),
        (lambda c: _set(c, 99, "case", "replays", 0, "requests", 0, "seq_len"), LONG),
        (lambda c: _set(c, 3, "case", "replays", 0, "requests", 0, "accept_len"), "requests[0].accept_len = 3"),
        (lambda c: _set(c, 1, "case", "setup", "colour"), "field case.setup: object contains unknown field `colour`"),
        (lambda c: _set(c, 1, "colour"), "object contains unknown field `colour`"),
        (lambda c: _set(c, 1, "provenance", "colour"), "field provenance: object contains unknown field `colour`"),
        (
            lambda c: _set(c, "warp", "case", "replays", 1, "mode"),
            "field case.replays[1].mode: invalid enum value 'warp'",
        ),
        (lambda c: _set(c, "NV999", "finding", "code"), "field finding.code: invalid enum value 'NV999'"),
        (lambda c: _set(c, 5, "finding", "replay"), "field finding.replay = 5: the case has replays 0 to 1"),
        (lambda c: _set(c, [], "case", "replays"), "field case: number of replays = 0: must be between"),
        (lambda c: _set(c, 5, "case", "replays"), "field case.replays: expected `array`, got `int`"),
        (lambda c: c.pop("case"), "object missing required field `case`"),
        (lambda c: c["case"].pop("setup"), "field case: object missing required field `setup`"),
        (lambda c: c.pop("title"), "object missing required field `title`"),
        (lambda c: c.pop("format"), "field format is missing"),
        (lambda c: _set(c, "pytest-case", "format"), "field format is 'pytest-case'"),
        (lambda c: c.pop("version"), "field version is missing; this program reads 1"),
        (lambda c: _set(c, 2, "version"), "field version is 2; this program reads 1"),
        (lambda c: _set(c, 1.0, "version"), "field version is 1.0; this program reads 1"),
        (lambda c: _set(c, True, "version"), "field version is True; this program reads 1"),
    ],
)
def test_a_damaged_field_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], object], sentence: str) -> None:
    content = _content()
    damage(content)
    assert sentence in _error(_write(tmp_path, content))


def test_the_version_is_looked_at_before_the_fields_which_another_version_may_have(tmp_path: Path) -> None:
    content = _content()
    content |= {"version": 9, "case": None, "colour": 1}
    assert _error(_write(tmp_path, content)).startswith("field version is 9")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"[]", "holds a JSON list where an object belongs"),
        (b"3", "holds a JSON int where an object belongs"),
        (b"\xff\xfe{}", "not UTF-8 text (byte 0)"),
        (b'{"format": "nsa-verify-case", "format": "x"}', "the key 'format' is given twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"version": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_what_is_no_case_at_all(tmp_path: Path, text: bytes, sentence: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    assert sentence in _error(path)


def test_a_file_truncated_anywhere_is_refused_with_one_sentence(tmp_path: Path) -> None:
    text = dumps(ENTRY)
    path = tmp_path / "x.json"
    for length in range(1, len(text) - 2, 7):
        path.write_text(text[:length])
        assert "perhaps truncated, at line " in _error(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "cannot be read: no such file" in _error(tmp_path / "missing.json")
    assert "cannot be read: is a directory" in _error(tmp_path)


def test_a_name_with_another_hash_says_what_to_rename_it_to(tmp_path: Path) -> None:
    content = _content()
    content["case"]["replays"][0]["requests"][0]["seq_len"] = 10
    path = _write(tmp_path, content, file_name(ENTRY, "changed"))
    sentence = _error(path)
    assert f"not {case_hash(CASE)}; rename the file to changed-" in sentence
    renamed = path.rename(tmp_path / sentence.rpartition(" ")[2])
    assert load(renamed).case.replays[0].requests[0].seq_len == 10


def test_a_file_written_by_hand_may_leave_out_what_has_a_default_and_carry_no_hash(tmp_path: Path) -> None:
    case = {"setup": {"buckets": [2]}, "replays": [{"requests": [{"seq_len": 9}]}]}
    content = {"format": "nsa-verify-case", "version": 1, "title": "By hand.", "case": case}
    entry = load(_write(tmp_path, content))
    assert entry.case == Case(Setup(buckets=(2,)), (Replay(requests=(Request(9),)),))
