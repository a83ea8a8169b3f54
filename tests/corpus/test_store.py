"""Saving and scanning: atomic, idempotent, safe beside other writers; what cannot be written is said."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

from nsa_verify import Case, Replay, Request, Setup
from nsa_verify.engine import corpus
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, Provenance, check_writable, load, save, scan

CASE = Case(Setup(), (Replay(requests=(Request(9),)),))
ENTRY = Entry(title="One request.", case=CASE, provenance=Provenance(seed=1, date="2025-01-31T12:00:00Z"))


def _entry(length: int) -> Entry:
    return Entry(title=f"Length {length}.", case=Case(Setup(), (Replay(requests=(Request(length),)),)))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != corpus.LOCK_NAME)


def test_saving_again_is_idempotent_and_keeps_the_older_provenance(tmp_path: Path) -> None:
    first = save(tmp_path, Kind.CRASHING, ENTRY, "one")
    text = first.read_bytes()
    again = msgspec.structs.replace(ENTRY, provenance=Provenance(seed=2, date="2026-01-31T12:00:00Z"))
    assert save(tmp_path, Kind.CRASHING, again, "one") == first
    assert first.read_bytes() == text
    assert _names(tmp_path) == [first.name]


def test_a_new_title_replaces_the_old_one_but_not_the_provenance(tmp_path: Path) -> None:
    path = save(tmp_path, Kind.CRASHING, ENTRY, "one")
    save(tmp_path, Kind.CRASHING, Entry(title="Better said.", case=CASE), "one")
    assert load(path) == msgspec.structs.replace(ENTRY, title="Better said.")


def test_a_damaged_file_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, Kind.CRASHING, ENTRY, "one")
    path.write_text("{")
    save(tmp_path, Kind.CRASHING, ENTRY, "one")
    assert load(path) == ENTRY


def test_a_crash_before_the_rename_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, Kind.CRASHING, ENTRY, "one")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, Kind.CRASHING, Entry(title="Never written.", case=CASE), "one")
    assert load(path) == ENTRY
    assert _names(tmp_path) == [path.name]


SAVE = """
import os, sys
from pathlib import Path
from nsa_verify import Case, Replay, Request, Setup
from nsa_verify.engine.corpus import Entry, Kind, save

def save_lengths(first, last):
    for length in range(first, last):
        case = Case(Setup(), (Replay(requests=(Request(length),)),))
        save(Path(sys.argv[1]), Kind.CRASHING, Entry(title=f"Length {length}.", case=case), "length")
"""


def _writer(root: Path, then: str) -> subprocess.Popen[bytes]:
    """Another process, which runs ``then`` with ``save_lengths(first, last)`` at hand."""
    return subprocess.Popen([sys.executable, "-c", SAVE + then, str(root)])


def test_what_a_killed_writer_leaves_is_passed_over_and_removed_by_the_next(tmp_path: Path) -> None:
    path = save(tmp_path, Kind.CRASHING, _entry(9), "length")
    path.write_text("{")
    # Ends the process, as SIGKILL would, between the write and the rename.
    assert _writer(tmp_path, "os.replace = lambda *_: os._exit(9)\nsave_lengths(9, 10)").wait(60) == 9
    assert _names(tmp_path) == [f".{path.name}.tmp", path.name]
    assert list(scan(tmp_path)) == [path]
    assert path.read_text() == "{"
    other = save(tmp_path, Kind.SEEDS, _entry(3), "other")
    assert _names(tmp_path) == sorted([other.name, path.name])


def test_two_processes_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [_writer(tmp_path, f"save_lengths({first}, {first + 20})") for first in (1, 11)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    paths = list(scan(tmp_path))
    assert sorted(load(path).case.replays[0].requests[0].seq_len for path in paths) == list(range(1, 31))
    assert len(_names(tmp_path)) == 30


def test_a_lock_that_is_never_released_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LOCK_TIMEOUT_S", 0.1)
    with (
        FileLock(tmp_path / corpus.LOCK_NAME),
        pytest.raises(CorpusError, match=r"another process holds \.lock"),
    ):
        save(tmp_path, Kind.CRASHING, ENTRY, "one")
    assert save(tmp_path, Kind.CRASHING, ENTRY, "one").is_file()


def test_scan_is_sorted_and_passes_over_what_is_no_case(tmp_path: Path) -> None:
    saved = [save(tmp_path, kind, _entry(length), "x") for length in (5, 3) for kind in (Kind.SEEDS, Kind.CRASHING)]
    (tmp_path / "README.md").write_text("No case.")
    (tmp_path / "seeds" / ".hidden.json").write_text("{")
    assert list(scan(tmp_path)) == sorted(saved)
    assert list(scan(tmp_path / "seeds")) == sorted(path for path in saved if "seeds" in path.parts)
    assert list(scan(saved[0])) == [saved[0]]


def test_scan_shows_a_dangling_link_which_then_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    (path,) = scan(tmp_path)
    with pytest.raises(CorpusError, match=r"gone\.json: cannot be read: no such file"):
        load(path)


@pytest.mark.parametrize("missing", ["nowhere", "nowhere.json"])
def test_scan_of_a_missing_path_is_refused_at_once(tmp_path: Path, missing: str) -> None:
    with pytest.raises(CorpusError, match=f"{missing}: there is no such file or folder; check the path"):
        scan(tmp_path / missing)


@pytest.mark.parametrize("where", ["", "crashing", "crashing/decode"])
def test_a_file_where_a_folder_belongs_is_unwritable(tmp_path: Path, where: str) -> None:
    root = tmp_path / "corpus"
    stone = root / where
    stone.parent.mkdir(parents=True, exist_ok=True)
    stone.write_text("")
    for attempt in (lambda: check_writable(root), lambda: save(root, Kind.CRASHING, ENTRY, "one")):
        with pytest.raises(CorpusError, match=r"corpus: cannot save cases here: .*--corpus$") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, Kind.CRASHING, ENTRY, "one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CorpusError, match="no space left on device"):
        save(tmp_path, Kind.CRASHING, Entry(title="Never written.", case=CASE), "one")
    assert load(path) == ENTRY
    assert _names(tmp_path) == [path.name]


def test_a_writable_folder_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []
