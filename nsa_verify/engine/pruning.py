"""Pruning: the saved cases that nothing would be lost without.

What stays covers every pair of labels that the corpus covered, and has for every group of findings its smallest case.
Seeds stay. Of the others, those with the most pairs that nobody else has yet are chosen first, of equals the smaller;
what the later ones made superfluous is taken out again. A corpus that was pruned is its own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from nsa_verify.core.case import size_of
from nsa_verify.core.labels import Pair, labels_of, pairs
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, changing, load, scan
from nsa_verify.engine.triage import Bug

TRIES = 5
"""How often is begun anew since somebody else changed what was to stay."""


class Superfluous(Struct, frozen=True):
    """A file to remove. ``group`` is that of its finding, which ``kept_in`` stands for."""

    path: Path
    group: str = ""
    kept_in: Path | None = None


class Pruned(Struct, frozen=True):
    """What goes and what stays; ``pairs_after`` are the pairs of labels of what stays. ``problems`` are the files that
    cannot be read: they count for nothing, and stay."""

    removed: tuple[Superfluous, ...]
    kept: int
    pairs_before: int
    pairs_after: int
    problems: tuple[str, ...] = ()


class _Stamp(NamedTuple):
    """Tells whether a file was changed."""

    inode: int
    changed_ns: int
    size: int


class _File(NamedTuple):
    path: Path
    stamp: _Stamp | None
    kind: Kind
    entry: Entry
    pairs: int
    """The pairs of labels of its case, a bit each."""

    @property
    def order(self) -> tuple[int, tuple[int, ...], Path]:
        """The smaller first, as ``triage.groups`` has them."""
        return len(self.entry.before), size_of(self.entry.case), self.path


def prune(root: Path, dry_run: bool = False) -> Pruned:
    """Remove from ``root`` what is superfluous; only tell it if ``dry_run``. Raises ``CorpusError``.

    The files are removed one by one, so whoever is killed in between leaves some of them for the next time. If another
    process changes what is to stay, it is begun anew.
    """
    for _ in range(TRIES):
        files, problems = _read(root)
        kept = _choose(files)
        chosen = {it.path for it in kept}
        gone = [it for it in files if it.path not in chosen]
        if dry_run or not gone or _remove(root, kept, gone):
            return _told(files, kept, gone, problems)
    raise CorpusError(f"{root}: other processes change it all the time; end them, and run again")


def _read(root: Path) -> tuple[list[_File], list[str]]:
    """The files of the three folders, by path, and what is wrong with others."""
    scan(root)  # whoever names a folder that is not there is told so
    numbers: dict[Pair, int] = {}
    files: list[_File] = []
    problems: list[str] = []
    for kind in Kind:
        for path in scan(root / kind) if (root / kind).is_dir() else ():
            stamp = _stamp(path)
            try:
                entry = load(path)
            except CorpusError as error:
                problems.append(str(error))
                continue
            found = {numbers.setdefault(pair, len(numbers)) for pair in pairs(labels_of(entry.case))}
            files.append(_File(path, stamp, kind, entry, sum(1 << number for number in found)))
    return files, problems


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _Stamp(found.st_ino, found.st_mtime_ns, found.st_size)


def _choose(files: Sequence[_File]) -> list[_File]:
    """What stays: seeds, the smallest case of each group, and others for the pairs that those do not have."""
    ordered = sorted(files, key=lambda it: it.order)
    minimal = _minimal(ordered)
    kept = [it for it in ordered if it.kind is Kind.SEEDS or minimal.get(_group(it)) is it]
    must = {it.path for it in kept}
    rest = [it for it in ordered if it.path not in must]
    covered, left = _union(kept), _union(ordered)
    picked: list[_File] = []
    while left & ~covered:
        best = max(rest, key=lambda it: (it.pairs & ~covered).bit_count())  # the first of equals: the smaller
        picked.append(best)
        covered |= best.pairs
    for it in sorted(picked, key=lambda it: it.order, reverse=True):
        others = [other for other in picked if other is not it]
        if not it.pairs & ~(_union(kept) | _union(others)):
            picked = others
    return kept + picked


def _union(files: Sequence[_File]) -> int:
    covered = 0
    for it in files:
        covered |= it.pairs
    return covered


def _minimal(ordered: Sequence[_File]) -> dict[tuple[Kind, Bug] | None, _File]:
    """The smallest case of each group; one that crashes and one that was mended are two."""
    found: dict[tuple[Kind, Bug] | None, _File] = {}
    for it in ordered:
        if (group := _group(it)) is not None:
            found.setdefault(group, it)
    return found


def _group(it: _File) -> tuple[Kind, Bug] | None:
    return (it.kind, Bug.of(it.entry.finding)) if it.entry.finding is not None else None


def _remove(root: Path, kept: Sequence[_File], gone: Sequence[_File]) -> bool:
    """Remove files if nothing was changed since they were read; whether that was so."""
    with changing(root):
        if any(_stamp(it.path) != it.stamp for it in kept):
            return False
        if any(_stamp(it.path) not in (it.stamp, None) for it in gone):
            return False
        for it in gone:
            it.path.unlink(missing_ok=True)
    return True


def _told(files: Sequence[_File], kept: Sequence[_File], gone: Sequence[_File], problems: Sequence[str]) -> Pruned:
    minimal = _minimal(sorted(kept, key=lambda it: it.order))
    removed = []
    for it in gone:
        group = _group(it)
        removed.append(Superfluous(it.path, str(group[1]) if group else "", minimal[group].path if group else None))
    after = _union(kept).bit_count()
    return Pruned(tuple(removed), len(kept), _union(files).bit_count(), after, tuple(problems))
