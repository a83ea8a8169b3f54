"""Findings in groups: one minimal case for each bug that can be told apart, and what is accepted for a while.

A group is what its minimal finding says: implementation, code, mode, buffer and side of it (inside is what may be
written, outside what lies around it). The corpus holds the groups, a file for each in ``crashing``; what is known of
them besides is kept by whoever runs campaigns.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct

from nsa_verify.core.case import Mode, size_of
from nsa_verify.core.findings import Code, Signature, symptom_of
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, SavedFinding, load, scan
from nsa_verify.engine.plan import Pattern


class Bug(NamedTuple):
    """What the findings of one group have in common."""

    implementation: str
    code: Code
    mode: Mode
    place: str
    """The buffer and the side of it, or what stands for them (``Finding.place``)."""

    @classmethod
    def of(cls, finding: SavedFinding) -> Bug:
        """The group of ``finding``."""
        return cls(finding.implementation, finding.code, finding.mode, finding.place)

    @property
    def signature(self) -> Signature:
        """What its findings have under every executor."""
        return Signature(self.implementation, "", self.code, self.place, self.mode)

    @property
    def symptom(self) -> str:
        """``Finding.symptom`` of its minimal finding."""
        return symptom_of(self.code, self.mode, self.place)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.implementation, self.code, self.mode, self.place)))


class Saved(NamedTuple):
    """One file of the corpus that has a finding."""

    path: Path
    entry: Entry
    finding: SavedFinding


def measure(entry: Entry) -> tuple[int, tuple[int, ...]]:
    """How large an entry is: of one group the smallest stands for it."""
    return len(entry.before), size_of(entry.case)


def groups(root: Path) -> tuple[dict[Bug, list[Saved]], list[str]]:
    """The crashing cases under ``root`` by group, in each the smallest case first; and what is wrong with other files.

    Raises ``CorpusError`` if the folder cannot be listed; one that is not there is empty.
    """
    found: dict[Bug, list[Saved]] = {}
    problems: list[str] = []
    folder = root / Kind.CRASHING
    for path in scan(folder) if folder.is_dir() else ():
        try:
            entry = load(path)
        except CorpusError as error:
            problems.append(str(error))
            continue
        if entry.finding is not None:
            found.setdefault(Bug.of(entry.finding), []).append(Saved(path, entry, entry.finding))
    for saved in found.values():
        saved.sort(key=lambda it: (measure(it.entry), it.path))
    return dict(sorted(found.items())), problems


class Accepted(Struct, frozen=True, kw_only=True):
    """One entry of a baseline: findings that are known, and do not make a run fail until ``expires``.

    Whatever of ``code``, ``mode`` and ``place`` is empty matches any.
    """

    implementation: str
    reason: str
    expires: date
    code: str = ""
    mode: str = ""
    place: str = ""

    @property
    def pattern(self) -> Pattern:
        """What it is about."""
        return Pattern(self.implementation, self.code, self.mode, self.place)

    def matches(self, bug: Bug) -> bool:
        """Whether it is about ``bug``."""
        return self.pattern.matches(bug)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.implementation, self.code, self.mode, self.place)))


class Baseline(NamedTuple):
    """The findings that are accepted for a while, from a file ``--baseline``."""

    entries: tuple[Accepted, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read TOML: a table ``[[accepted]]`` for each entry.

        ``implementation``, ``reason`` and ``expires`` (a date) are required, ``code``, ``mode`` and ``place`` are not.
        Raises ``CorpusError``, one sentence, for anything wrong.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read: {error.strerror}; check the path of --baseline") from error
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{path}: not valid TOML: {error}; correct it") from error
        tables = content.get("accepted", [])
        if content.keys() - {"accepted"} or not isinstance(tables, list):
            raise CorpusError(f"{path}: holds {', '.join(sorted(content))}; a baseline holds [[accepted]] tables alone")
        return cls(tuple(_accepted(path, number, table) for number, table in enumerate(tables, 1)))

    def accepts(self, bug: Bug, today: date | None = None) -> Accepted | None:
        """The entry that accepts ``bug``, if one that has not expired does."""
        now = today or datetime.now(UTC).date()
        return next((it for it in self.entries if it.expires >= now and it.matches(bug)), None)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Of the entries that have not expired."""
        now = datetime.now(UTC).date()
        return tuple(it.pattern for it in self.entries if it.expires >= now)

    def expired(self, today: date | None = None) -> tuple[Accepted, ...]:
        """Entries that accept nothing any more."""
        now = today or datetime.now(UTC).date()
        return tuple(it for it in self.entries if it.expires < now)

    def unmatched(self, bugs: Iterable[Bug]) -> tuple[Accepted, ...]:
        """Entries that are about none of ``bugs``: what they accept is not there, or not any more."""
        found = tuple(bugs)
        return tuple(it for it in self.entries if not any(it.matches(bug) for bug in found))


_REQUIRED = ("implementation", "reason", "expires")
_OPTIONAL = {"code": tuple(Code), "mode": tuple(Mode), "place": ()}


def _accepted(path: Path, number: int, table: Any) -> Accepted:
    problem = next(_problems(table), None) if isinstance(table, dict) else "is no table"
    if problem is not None:
        raise CorpusError(f"{path}: entry {number} of [[accepted]] {problem}; correct it")
    return Accepted(**table)


def _problems(table: dict[str, Any]) -> Iterator[str]:
    for name in _REQUIRED:
        if name not in table:
            yield f"lacks {name}"
    for name, value in table.items():
        if name not in (*_REQUIRED, *_OPTIONAL):
            yield f"has {name!r}, which means nothing; there are {', '.join((*_REQUIRED, *_OPTIONAL))}"
        elif name == "expires":
            if not isinstance(value, date) or isinstance(value, datetime):
                yield f"has expires = {_shown(value)}; write a date, such as expires = 2030-01-31"
        elif not isinstance(value, str) or not value.strip():
            yield f"has {name} = {_shown(value)}; write some text"
        elif (allowed := _OPTIONAL.get(name)) and value not in allowed:
            yield f"has {name} = {value!r}; there are {', '.join(allowed)}"


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python does not write out an integer of thousands of digits
        return "a number of thousands of digits"
