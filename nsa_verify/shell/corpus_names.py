"""What people call saved cases: a path, a file's stem, the start of its hash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nsa_verify.engine.corpus import CorpusError, Kind, scan
from nsa_verify.shell.options import Unable


def scanned(folder: Path) -> list[Path]:
    """As ``corpus.scan``; ``Unable`` if there is no such folder."""
    try:
        return list(scan(folder))
    except CorpusError as error:
        raise Unable(str(error)) from error


def called(name: str, paths: Sequence[Path]) -> list[Path]:
    """Those of ``paths`` that ``name`` may mean."""
    if Path(name).is_file():
        here = Path(name).resolve()
        return [path for path in paths if path.resolve() == here]
    return [path for path in paths if path.stem == name or path.stem.rpartition("-")[2].startswith(name)]


def the_one(name: str, paths: Sequence[Path], what: str, root: Path) -> Path:
    """The one of ``paths``, each of which is a ``what`` of ``root``, that is called ``name``; ``Unable`` if not one."""
    matches = called(name, paths)
    if not matches:
        raise Unable(f"{name}: no {what} of {root} has this path, stem or start of hash; see nsa-verify corpus list")
    if len(matches) > 1:
        stems = ", ".join(path.stem for path in matches)
        raise Unable(f"{name}: {len(matches)} {what}s of {root} are called so ({stems}); give more of the name")
    return matches[0]


def crashing(names: Sequence[str], root: Path) -> tuple[list[Path], list[Path]]:
    """The crashing cases of ``root`` that are called so, by path; all of them if none is named.

    Behind them the regression cases that are: somebody promoted them.
    """
    scanned(root)  # a folder that is not there is no empty one
    paths, mended = (
        scanned(root / kind) if (root / kind).is_dir() else [] for kind in (Kind.CRASHING, Kind.REGRESSION)
    )
    if not names:
        return paths, []
    chosen, promoted = set(), set()
    for name in names:
        before = called(name, mended)
        if not called(name, paths) and len(before) == 1:
            promoted.update(before)
        else:
            chosen.add(the_one(name, paths, "crashing case", root))
    return sorted(chosen), sorted(promoted)
