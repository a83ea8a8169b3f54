"""Changes to a corpus that lose nothing: an entry beside others, and one file in the place of another.

A new file is complete before the old one goes, so whoever is killed in between leaves both, and doing it again removes
the old one. Nothing here overwrites what stands for another finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from itertools import count
from pathlib import Path

from msgspec.structs import replace

from nsa_verify.engine.accused import same_finding
from nsa_verify.engine.corpus import (
    CorpusError,
    Entry,
    Kind,
    Provenance,
    case_hash,
    changing,
    load,
    path_of,
    slug_of,
    write,
)

_SLUG, _PLACE = 44, 28
"""How much of a slug and of a place is in a name that has both; a file's name has at most 80 characters of them."""


class Fate(StrEnum):
    """What became of an entry that was to be put beside others."""

    COPIED = "copied"
    """There is a file of it now."""
    OLDER = "older"
    """The file that was there already has the older provenance now."""
    HERE = "here"
    """The file that was there already is as it was."""
    LEFT = "left"
    """It was not wanted."""


def put_beside(root: Path, kind: Kind, entry: Entry, slug: str, unless: Kind | None = None) -> tuple[Path, Fate]:
    """Put the entry under ``root``, and say where it is.

    The same case and finding under the same slug is one file: with the older provenance of both, else as it was. If it
    is not there yet, but in the folder ``unless``, it is left out, and the path is that of the other. Raises
    ``CorpusError``.
    """
    own = path_of(root, kind, entry, slug)
    with changing(root, own):
        if unless is not None and not own.exists() and (other := path_of(root, unless, entry, slug)).exists():
            return other, Fate.LEFT
        path, there = _name_for(root, kind, entry, slug)
        if there is None:
            write(path, entry)
            return path, Fate.COPIED
        return path, Fate.OLDER if write(path, _older(there, entry)) else Fate.HERE


def put_instead(root: Path, path: Path, before: Entry, kind: Kind, entry: Entry) -> Path:
    """Put the entry where it belongs, then remove ``path``, which held ``before``; where the entry is now.

    A crashing case that another file of its group has already is not written again. Raises ``CorpusError``, also if
    ``path`` holds something else by now.
    """
    with changing(root, path):
        _check(path, before)
        if path == path_of(root, kind, entry, slug_of(path)):
            write(path, entry)
            return path
        target, there = _twin(root, kind, entry, path) if kind is Kind.CRASHING else (path, None)
        if there is None:
            target, there = _name_for(root, kind, entry, slug_of(path))
        write(target, entry if there is None else _older(there, entry))
        path.unlink(missing_ok=True)
        return target


def fold(root: Path, path: Path, before: Entry) -> Path:
    """Remove the crashing case ``path``, which holds ``before``, if another of its group is the same; which one stays.

    That is the first by name, and one that a person named only among such. Raises ``CorpusError``, also if ``path``
    holds something else by now.
    """
    with changing(root, path):
        _check(path, before)
        twin, there = _twin(root, Kind.CRASHING, before, path)
        if there is None or _rank(path) < _rank(twin):
            return path
        write(twin, _older(there, before))
        path.unlink(missing_ok=True)
        return twin


def remove(root: Path, path: Path, before: Entry) -> None:
    """Remove ``path``, which holds ``before``. Raises ``CorpusError``, also if it holds something else by now."""
    with changing(root, path):
        _check(path, before)
        path.unlink(missing_ok=True)


def _rank(path: Path) -> tuple[bool, Path]:
    return slug_of(path) == path.stem, path


def _check(path: Path, before: Entry) -> None:
    if load(path) != before:
        raise CorpusError(f"{path}: was changed by somebody else meanwhile and is left alone; run it again")


def _name_for(root: Path, kind: Kind, entry: Entry, slug: str) -> tuple[Path, Entry | None]:
    """Where the entry belongs, and what is there already if that stands for the same."""
    for name in _names(slug, entry):
        path = path_of(root, kind, entry, name)
        there = _readable(path)
        if there is None or entry.finding is None or _is_same(there, entry):
            return path, there
    raise AssertionError("names do not end")


def _names(slug: str, entry: Entry) -> Iterator[str]:
    """The slug; then, for a file whose name is taken by another finding of the same case, with the place."""
    yield slug
    place = entry.finding.place if entry.finding is not None else ""
    longer = f"{slug[:_SLUG]} {place[:_PLACE]}"
    yield longer
    for number in count(2):
        yield f"{longer} {number}"


def _readable(path: Path) -> Entry | None:
    """What a file holds; of one that is damaged, as of none, there is nothing to keep: its name says the case."""
    try:
        return load(path) if path.exists() else None
    except CorpusError:
        return None


def _is_same(one: Entry, other: Entry) -> bool:
    """Whether two entries stand for one finding, under one executor."""
    if one.finding is None or other.finding is None:
        return one.finding is other.finding
    return one.finding.executor == other.finding.executor and same_finding(one.finding, other.finding)


def _twin(root: Path, kind: Kind, entry: Entry, own: Path) -> tuple[Path, Entry | None]:
    """The first other file of the entry's group that has the same case; ``own`` and None if there is none."""
    assert entry.finding is not None
    for path in sorted((root / kind).glob(f"*/*-{case_hash(entry.case)}.json")):
        there = _readable(path) if path != own else None
        if there is None or there.finding is None or there.before != entry.before:
            continue
        if same_finding(there.finding, entry.finding):
            return path, there
    return own, None


def _older(there: Entry, entry: Entry) -> Entry:
    """``there`` with the older provenance of both; one without a date is not known to be older."""
    ours, theirs = _date(there.provenance), _date(entry.provenance)
    if ours is None or theirs is None or ours <= theirs:
        return there
    return replace(there, provenance=entry.provenance)


def _date(provenance: Provenance) -> datetime | None:
    try:
        date = datetime.fromisoformat(provenance.date)
    except ValueError:
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


__all__ = ["Fate", "fold", "put_beside", "put_instead", "remove"]
