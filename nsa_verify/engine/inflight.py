"""What a run that is killed leaves behind, and what the next run makes of it.

While a run lasts it has a folder ``<corpus>/.inflight/<run>``, locked by its engine. In it lie the batches that its
workers were handed, with the marks that say which case is in flight, and every disagreement that was reported and is
not in the corpus yet. A folder whose lock is free belongs to a run that was killed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Signature
from nsa_verify.core.marks import SIZE, Marks
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, dumps, load, save
from nsa_verify.engine.messages import REQUESTS, Batch, Pair
from nsa_verify.engine.process import MARKS_SUFFIX, TASKS_SUFFIX, EngineError

FOLDER: Final = ".inflight"
_LOCK: Final = "lock"
_NEW, _OLD = ".new-", ".old-"
"""What a folder's name begins with before it is locked, and once it is not any more."""
TRIES: Final = 20


class Interrupted(Struct, frozen=True):
    """A case that was in flight when its run was killed, and the pair that was being judged on it."""

    path: Path
    case: Case
    pair: Pair | None

    def forget(self) -> None:
        """It was judged again."""
        self.path.unlink(missing_ok=True)
        folder = self.path.parent
        if not any(folder.glob("*.case")) and not any(folder.glob("*.json")):
            shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(folder.parent)


class Left(Struct):
    """What killed runs left: cases that were in flight, findings that are in the corpus now, and what was wrong.

    ``unsaved`` says of findings why they are not in the corpus; their files stay.
    """

    interrupted: list[Interrupted] = []
    saved: list[Path] = []
    problems: list[str] = []
    unsaved: list[str] = []


class RunFolder:
    """The folder of this run, from its start to its end. Raises ``CorpusError`` if it cannot be had."""

    def __init__(self, root: Path) -> None:
        self._is_new = not root.exists()
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.path = root.absolute() / FOLDER / name
        new = self.path.with_name(_NEW + name)
        for _ in range(TRIES):
            try:
                new.mkdir(parents=True, exist_ok=True)
                self._lock = FileLock(new / _LOCK)
                self._lock.acquire(timeout=0)
                new.rename(self.path)  # nobody looks at it before it is locked
            except (FileNotFoundError, Timeout):  # somebody else cleans up behind a run that has ended
                continue
            except (OSError, NotImplementedError) as error:
                raise CorpusError(
                    f"{self.path}: cannot keep the cases in flight here: {error}; give another folder with --corpus"
                ) from error
            return
        raise CorpusError(f"{self.path}: other runs remove it again and again; give another folder with --corpus")

    def remember(self, signature: Signature, entry: Entry) -> None:
        """Keep a disagreement that is about to be reported, until it is in the corpus. Raises ``EngineError``."""
        path = self._path_of(signature)
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(dumps(entry), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise EngineError(
                f"{self.path}: cannot keep what was found: {error.strerror}; make room there, or give another folder"
                " with --corpus"
            ) from error

    def forget(self, signature: Signature) -> None:
        """It is in the corpus."""
        self._path_of(signature).unlink(missing_ok=True)

    def _path_of(self, signature: Signature) -> Path:
        plain = re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, signature)).lower())
        return self.path / f"{plain}.json"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not any(self.path.glob("*.json")):
            _remove(self.path, self._lock)
        self._lock.release()
        _remove_empty(self.path.parent)
        if self._is_new:
            _remove_empty(self.path.parent.parent)


def _remove(folder: Path, lock: FileLock) -> None:
    """Remove a folder whose ``lock`` is held: out of sight first, since whoever looks at it must find it locked."""
    old = folder.with_name(_OLD + folder.name)
    with suppress(OSError):
        folder.rename(old)
        lock.release()
        shutil.rmtree(old, ignore_errors=True)


def recover(root: Path) -> Left:
    """Look after what killed runs left under ``root``.

    Findings that they had reported are saved as they were drawn. The folder of a run stays while a case of it is not
    judged again.
    """
    left = Left()
    for folder in sorted((root / FOLDER).glob("*")):
        if folder.name.startswith((_NEW, _OLD)) or not folder.is_dir():
            continue
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue  # that run goes on, or another one looks after it
        try:
            _save_findings(root, folder, left)
            cases = list(_interrupted(folder, left))
            left.interrupted += cases
            if not cases and not any(folder.glob("*.json")):
                _remove(folder, lock)
        finally:
            lock.release()
    _remove_empty(root / FOLDER)
    return left


def _save_findings(root: Path, folder: Path, left: Left) -> None:
    for path in sorted(folder.glob("*.json")):
        try:
            entry = load(path)
            left.saved.append(save(root, Kind.CRASHING, entry, path.stem))
        except CorpusError as error:
            left.unsaved.append(str(error))
        else:
            path.unlink()


def _interrupted(folder: Path, left: Left) -> Iterator[Interrupted]:
    """The cases in flight, each kept in a file of its own until it was judged again."""
    for path in sorted(folder.glob(f"*{TASKS_SUFFIX}")):
        marks = path.with_suffix(MARKS_SUFFIX)
        try:
            batch = REQUESTS.decode(path.read_bytes())
            mark = Marks(bytearray(marks.read_bytes().ljust(SIZE, b"\0"))).read()
            if not isinstance(batch, Batch) or not 0 <= mark.job < len(batch.tasks):
                continue
            task = batch.tasks[mark.job]
            pair = task.pairs[mark.pair] if 0 <= mark.pair < len(task.pairs) else None
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            left.problems.append(f"{path}: cannot be read: {error}; it was removed, no finding is lost")
            with suppress(OSError):
                path.unlink()
            continue
        path.with_suffix(".case").write_bytes(msgspec.json.encode((task.case, pair)))
        path.unlink()
    for path in sorted(folder.glob("*.case")):
        try:
            case, pair = msgspec.json.decode(path.read_bytes(), type=tuple[Case, Pair | None])
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            left.problems.append(f"{path}: cannot be read: {error}; it was removed, no finding is lost")
            path.unlink(missing_ok=True)
            continue
        yield Interrupted(path, case, pair)


def _remove_empty(folder: Path) -> None:
    """Remove a folder in which nothing is left."""
    with suppress(OSError):
        folder.rmdir()
