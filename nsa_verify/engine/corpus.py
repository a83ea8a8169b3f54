"""The corpus is the record of cases: JSON files that are readable, versioned, strict on load and written atomically.

A file lies at ``corpus/{seeds,regression,crashing}/<mode>/<slug>-<hash12>.json``. The mode is that of the replay that
fails, or of the last one; the hash is that of the case alone, so that the same case found twice is one file. Whatever
stops a file from being read or written is a ``CorpusError``; no other exception leaves this module for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Self

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct

from nsa_verify.core.case import Case, Mode
from nsa_verify.core.findings import Code, Finding, place_of

FORMAT: Final = "nsa-verify-case"
VERSIONS: Final = (1,)
"""The versions of the format that this program reads; it writes the last."""
HASH_DIGITS: Final = 12
LINE_COLUMNS: Final = 120
"""A list or object of plain values that fits in this many columns is written on one line."""
LOCK_NAME: Final = ".lock"
LOCK_TIMEOUT_S: Final = 30.0

_HASHED_STEM: Final = re.compile(rf"(?P<slug>.*)-(?P<hash>[0-9a-f]{{{HASH_DIGITS}}})")


class CorpusError(Exception):
    """A file or folder of the corpus cannot be used; the message is one sentence that names it, why, and the remedy."""


class Kind(StrEnum):
    """The three folders of a corpus."""

    SEEDS = "seeds"
    """Hand picked, shipped with the project."""
    REGRESSION = "regression"
    """Disagreements that were mended and must stay so."""
    CRASHING = "crashing"
    """What a search found and nobody has mended yet."""


class Provenance(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Where a case comes from; every field is optional."""

    version: str = ""
    """Version of nsa-verify that found it."""
    seed: int | None = None
    example: int | None = None
    """Number of the example, within the run, that first showed the finding."""
    command: str = ""
    date: str = ""
    """UTC, ISO 8601."""
    device: str = ""
    impl: tuple[str, ...] = ()
    """The ``--impl`` references as the user gave them."""
    failed: int | None = None
    """In how many of ``attempts`` runs of the case the finding showed."""
    attempts: int | None = None


class SavedFinding(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The minimal finding of a case; the fields of ``Finding`` that identify it."""

    implementation: str
    executor: str
    code: Code
    replay: int
    mode: Mode
    step: int | None = None
    buffer: str | None = None
    element: tuple[int, ...] = ()
    region: str | None = None
    expected: int | None = None
    got: int | None = None
    message: str = ""

    @property
    def place(self) -> str:
        """As ``Finding.place``."""
        return place_of(self.code, self.buffer, self.region, self.message)

    @classmethod
    def of(cls, finding: Finding) -> Self:
        """What is kept of ``finding``."""
        return cls(**{name: getattr(finding, name) for name in cls.__struct_fields__})


class Entry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of the corpus. Its constructor refuses, with a ``ValueError``, a finding that is not of this case."""

    format: Literal["nsa-verify-case"] = FORMAT
    version: Literal[1] = VERSIONS[-1]
    title: str
    """One sentence that says what the case is for."""
    case: Case
    finding: SavedFinding | None = None
    provenance: Provenance = Provenance()
    bug_classes: tuple[int, ...] = ()
    """Rows of BUG_CLASSES.md that a seed stands for."""
    before: tuple[Case, ...] = ()
    """Cases to run first, in the same process: the finding was not seen without them."""

    def __post_init__(self) -> None:
        if not self.title.strip() or "\n" in self.title:
            raise ValueError(f"title = {self.title!r}: must be one sentence on one line")
        if self.finding is None:
            return
        last = len(self.case.replays) - 1
        if not 0 <= self.finding.replay <= last:
            raise ValueError(f"finding.replay = {self.finding.replay}: the case has replays 0 to {last}")
        mode = self.case.replays[self.finding.replay].mode
        if self.finding.mode is not mode:
            told, where = self.finding.mode.value, self.finding.replay
            raise ValueError(f"finding.mode = {told!r}: replay {where} is {mode.value!r}")

    @property
    def mode(self) -> Mode:
        """The mode of the replay that fails, or of the last one."""
        return self.case.replays[-1 if self.finding is None else self.finding.replay].mode


def case_hash(case: Case) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the case's canonical JSON."""
    return _digest(msgspec.to_builtins(case))


def file_name(entry: Entry, slug: str) -> str:
    """``<slug>-<hash12>.json``; characters that do not belong in a file name become ``-``."""
    plain = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")[:80].strip("-")
    return f"{plain or 'case'}-{case_hash(entry.case)}.json"


def path_of(root: Path, kind: Kind, entry: Entry, slug: str) -> Path:
    """Where ``save`` puts the entry."""
    return root / kind / entry.mode / file_name(entry, slug)


def slug_of(path: Path) -> str:
    """The slug in a file's name; of a name without a hash, as a person may choose it, the whole stem."""
    found = _HASHED_STEM.fullmatch(path.stem)
    return found["slug"] if found else path.stem


def _digest(case: Any) -> str:
    canonical = json.dumps(case, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:HASH_DIGITS]


def dumps(entry: Entry) -> str:
    """The entry as the text of its file: sorted keys, indented, each request on one line."""
    content = msgspec.to_builtins(entry)
    if not entry.before:
        del content["before"]
    return _pretty(content, 0, 0) + "\n"


def _pretty(value: Any, depth: int, column: int) -> str:
    """``value`` as JSON; ``depth`` is its indentation, ``column`` where it starts on its line, both in characters."""
    flat = json.dumps(value, sort_keys=True)
    if not isinstance(value, (dict, list, tuple)):
        return flat
    items = value.values() if isinstance(value, dict) else value
    if not any(isinstance(item, (dict, list, tuple)) and item for item in items) and column + len(flat) < LINE_COLUMNS:
        return flat
    inner = depth + 2
    if isinstance(value, dict):
        keys = {key: " " * inner + json.dumps(key) + ": " for key in sorted(value)}
        lines = [start + _pretty(value[key], inner, len(start)) for key, start in keys.items()]
        return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
    lines = [" " * inner + _pretty(item, inner, inner) for item in value]
    return "[\n" + ",\n".join(lines) + "\n" + " " * depth + "]"


def load(path: Path) -> Entry:
    """Read one file. Raises ``CorpusError`` naming the file, the field and the remedy if anything about it is wrong.

    A name that ends in a hash must carry that of the content; a file with another name (written by hand) has none to
    carry.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        _refuse(path, f"cannot be read: {_reason(error)}", "check the path and its permissions")
    entry, actual = _parsed(path, text)
    found = _HASHED_STEM.fullmatch(path.stem)
    if found and found["hash"] != actual:
        name = f"{found['slug']}-{actual}{path.suffix}"
        _refuse(path, f"the case was changed: its hash is {actual}, not {found['hash']}", f"rename the file to {name}")
    return entry


def loads(text: bytes, where: str) -> Entry:
    """The entry that ``dumps`` made ``text`` of. Raises ``CorpusError`` as ``load`` does; ``where`` names the text."""
    return _parsed(where, text)[0]


def _parsed(path: Path | str, text: bytes) -> tuple[Entry, str]:
    """What the text of a file says, and the hash of the case as it says it."""
    content = _read(path, text)
    _check_format(path, content)
    try:
        entry = msgspec.convert(content, Entry)
    except msgspec.ValidationError as error:
        _refuse(path, _field_sentence(str(error)), "correct the field or remove the file")
    return entry, _digest(content["case"])


def _read(path: Path | str, encoded: bytes) -> dict[str, Any]:
    """The JSON object in a file, each of its keys given once."""
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        _refuse(path, f"not UTF-8 text (byte {error.start})", "save it as UTF-8 or remove it")
    if not text.strip():
        _refuse(path, "the file is empty", "restore or remove it")
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        _refuse(path, f"not valid JSON, perhaps truncated, at {where}: {error.msg}", "restore or remove it")
    except (RecursionError, ValueError) as error:
        _refuse(path, f"not valid JSON: {error}", "correct or remove it")
    if not isinstance(content, dict):
        _refuse(path, f"holds a JSON {type(content).__name__} where an object belongs", "restore or remove it")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice in one object")
        found[key] = value
    return found


def _check_format(path: Path | str, content: dict[str, Any]) -> None:
    if content.get("format") != FORMAT:
        told = f"is {content['format']!r}" if "format" in content else "is missing"
        _refuse(path, f'field format {told}, so this is no case; a case says "{FORMAT}"', "restore or remove it")
    version = content.get("version")
    if type(version) is not int or version not in VERSIONS:
        told = f"is {version!r}" if "version" in content else "is missing"
        readable = ", ".join(map(str, VERSIONS))
        _refuse(path, f"field version {told}; this program reads {readable}", "use the nsa-verify that wrote the file")


def _field_sentence(message: str) -> str:
    """A message of msgspec, ``what - at `$.path```, with the field in front."""
    what, _, where = message.partition(" - at `$")
    where = where.rstrip("`").lstrip(".")
    if re.match(r"[a-z_]+[\w.\[\]]* = ", what):
        return f"field {where}.{what}" if where else f"field {what}"
    what = what[0].lower() + what[1:]
    return f"field {where}: {what}" if where else what


def _refuse(path: Path | str, what: str, remedy: str) -> NoReturn:
    raise CorpusError(f"{path}: {what}; {remedy}")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def scan(root_or_file: Path) -> Iterator[Path]:
    """The files of a corpus or of any folder in it, sorted by path; a file is its own only one.

    Hidden files and folders, such as what a killed writer left, and files that do not end in ``.json`` are passed over.
    Raises ``CorpusError`` at once for a path that does not exist or a folder that cannot be listed.
    """
    if os.path.isfile(root_or_file):
        return iter([root_or_file])
    if not os.path.isdir(root_or_file):
        _refuse(root_or_file, "there is no such file or folder", "check the path")
    found = []
    for folder, folders, names in os.walk(root_or_file, onerror=_unlistable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(".json") and not name.startswith(".")]
    return iter(sorted(found))


def _unlistable(error: OSError) -> NoReturn:
    _refuse(Path(error.filename), f"cannot be listed: {_reason(error)}", "check its permissions")


def check_writable(root: Path) -> None:
    """Raise ``CorpusError`` if a crashing case could not be saved under ``root``; creates and leaves nothing."""
    for folder in [root, *(root / Kind.CRASHING / mode for mode in Mode)]:
        existing = folder
        while not os.path.lexists(existing):
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            _unwritable(root, existing, error)


def _unwritable(root: Path, where: Path, error: OSError) -> NoReturn:
    sentence = f"{root}: cannot save cases here: {where}: {_reason(error)}"
    raise CorpusError(f"{sentence}; make it writable, or give another folder with --corpus") from error


def save(root: Path, kind: Kind, entry: Entry, slug: str) -> Path:
    """Write the entry under ``root`` and return its path; folders are created as needed.

    Saving a case again under the same slug keeps the file and its older provenance. Safe against other processes that
    save at the same time, and against being killed: a reader sees the old file or the new one. Raises ``CorpusError``
    if the file cannot be written; the caller still has ``dumps(entry)`` to show.
    """
    path = path_of(root, kind, entry, slug)
    with changing(root, path):
        write(path, _with_older_provenance(path, entry))
    return path


@contextmanager
def changing(root: Path, path: Path | None = None) -> Iterator[None]:
    """Be the only one who changes the corpus ``root``, for as long as the ``with`` lasts: no longer than need be.

    Raises ``CorpusError`` if that cannot be had, and for an ``OSError`` inside; ``path`` is what it is about.
    """
    try:
        with _locked(root):
            _remove_leftovers(root)
            yield
    except OSError as error:
        _unwritable(root, path or root, error)


def write(path: Path, entry: Entry) -> bool:
    """Make ``path`` the file of ``entry``, inside ``changing``, in one step; whether anything had to be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = dumps(entry).encode()
    if path.is_file() and path.read_bytes() == text:
        return False
    _write(path, text)
    return True


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / LOCK_NAME, timeout=LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout:
        _refuse(root, f"another process holds {LOCK_NAME} for more than {LOCK_TIMEOUT_S:.0f} s", "end that process")
    except NotImplementedError:
        _refuse(root, "this file system has no file locks", "give a folder on another with --corpus")
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(root: Path) -> None:
    """Whoever holds the lock is the only writer, so a temporary file is that of a writer that was killed."""
    for leftover in root.glob("*/*/.*.json.tmp"):
        leftover.unlink(missing_ok=True)


def _with_older_provenance(path: Path, entry: Entry) -> Entry:
    if not path.exists():
        return entry
    try:
        older = load(path).provenance
    except CorpusError:  # what is damaged holds nothing to keep: the name says that the case is the same
        return entry
    return msgspec.structs.replace(entry, provenance=older)


def _write(path: Path, text: bytes) -> None:
    """Replace ``path`` in one step; what is under the name is complete at every moment, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


__all__ = [
    "FORMAT",
    "VERSIONS",
    "CorpusError",
    "Entry",
    "Kind",
    "Provenance",
    "SavedFinding",
    "case_hash",
    "changing",
    "check_writable",
    "dumps",
    "file_name",
    "load",
    "loads",
    "path_of",
    "save",
    "scan",
    "slug_of",
    "write",
]
