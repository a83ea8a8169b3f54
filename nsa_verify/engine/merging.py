"""Merging: the cases of other corpora, copied into this one kind by kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from nsa_verify.engine.corpus import CorpusError, Entry, Kind, check_writable, load, scan, slug_of
from nsa_verify.engine.filing import Fate, put_beside

_UNLESS = {
    Kind.SEEDS: None,
    # Here it is known to be mended.
    Kind.CRASHING: Kind.REGRESSION,
    # Somewhere it crashes, so nobody knows yet that it is mended here.
    Kind.REGRESSION: Kind.CRASHING,
}
"""In this order, so that what crashes in one source and not in another does not depend on which is named first."""


class Merged(Struct, frozen=True):
    """What became of one file of a source; ``problem`` says why it could not be read."""

    source: Path
    fate: Fate | None = None
    path: Path | None = None
    problem: str = ""


def merge(root: Path, sources: Sequence[Path]) -> Iterator[Merged]:
    """Copy what ``sources`` have into the corpus ``root``; nothing in them is changed.

    Nothing is written, and ``CorpusError`` raised at once, if one of them is no corpus or is part of ``root``. A file
    that cannot be read is told and passed over.
    """
    for source in sources:
        _check(root, source)
    check_writable(root)
    return _merged(root, sources)


def _merged(root: Path, sources: Sequence[Path]) -> Iterator[Merged]:
    for source in sources:
        for path in sorted(source.glob("[!.]*.json")):
            yield Merged(path, problem=f"{path}: lies in none of {', '.join(Kind)}; move it into one of them")
    for kind in _UNLESS:
        for source in sources:
            for path in scan(source / kind) if (source / kind).is_dir() else ():
                try:
                    entry = load(path)
                except CorpusError as error:
                    yield Merged(path, problem=str(error))
                    continue
                there, fate = put(root, kind, entry, slug_of(path))
                yield Merged(path, fate, there)


def put(root: Path, kind: Kind, entry: Entry, slug: str) -> tuple[Path, Fate]:
    """Put one entry of elsewhere under ``root``, by the rules of a merge. Raises ``CorpusError``."""
    return put_beside(root, kind, entry, slug, _UNLESS[kind])


def _check(root: Path, source: Path) -> None:
    if not source.is_dir():
        what = "is a file; give the folder of a corpus" if source.exists() else "there is no such folder; check it"
        raise CorpusError(f"{source}: {what}")
    if source.resolve().is_relative_to(root.resolve()):
        what = "is" if source.resolve() == root.resolve() else "lies in"
        raise CorpusError(f"{source}: {what} the corpus {root} itself; give another corpus, or another --corpus")
    if any(root.resolve().is_relative_to((source / kind).resolve()) for kind in Kind):
        raise CorpusError(f"{source}: the corpus {root} lies in its cases; give another corpus, or another --corpus")
    if not any((source / kind).is_dir() for kind in Kind):
        raise CorpusError(f"{source}: is no corpus: it holds none of {', '.join(Kind)}; give the folder that does")
