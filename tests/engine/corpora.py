"""Small corpora, and what a process that is killed leaves of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nsa_verify import Case, Code, Mode, Replay, Request, Setup
from nsa_verify.engine.corpus import Entry, Kind, Provenance, SavedFinding, load, save, scan
from nsa_verify.engine.triage import Bug

SLUG = "nv101-short-top-k"


def case_of(seq_len: int, num_steps: int = 1) -> Case:
    """One request of DECODE; from 8 tokens on ``short-top-k`` of ``shell.commands`` fails."""
    width = max(8, seq_len)
    setup = Setup(table_width=width, pool_width=width, num_steps=num_steps)
    return Case(setup, (Replay(requests=(Request(seq_len),)),))


def entry_of(seq_len: int = 8, num_steps: int = 1, found: bool = True, date: str = "", **finding: Any) -> Entry:
    """An entry of that case, as a run saves it; ``finding`` are other fields than usual of what it shows."""
    told = {
        "implementation": "short-top-k",
        "executor": "eager",
        "code": Code.WRONG_VALUE,
        "replay": 0,
        "mode": Mode.DECODE,
        "buffer": "nsa_cache_seqlens",
        "region": "live",
        "message": "nsa_cache_seqlens[0]: expected 8, got 7",
    }
    return Entry(
        title=f"short-top-k: {told['message']}",
        case=case_of(seq_len, num_steps),
        finding=SavedFinding(**(told | finding)) if found else None,  # type: ignore[arg-type]
        provenance=Provenance(seed=seq_len, date=date, impl=("mine.py",)),
    )


def saved(root: Path, *entries: Entry, kind: Kind = Kind.CRASHING, slug: str = SLUG) -> list[Path]:
    """The files of ``entries`` under ``root``."""
    return [save(root, kind, entry, slug) for entry in entries]


def content(root: Path) -> dict[str, bytes]:
    """The cases of a corpus, byte by byte."""
    return {str(path.relative_to(root)): path.read_bytes() for path in scan(root)} if root.is_dir() else {}


def groups_of(root: Path) -> set[Bug]:
    """The groups of all findings of a corpus, whatever the folder; every file of it can be read."""
    return {Bug.of(entry.finding) for entry in map(load, scan(root)) if entry.finding is not None}


class Killed(BaseException):
    """Raised where a process is killed; nothing that it would have done later happens."""


@contextmanager
def killed_at(moment: int, patch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """Inside, whoever is about to replace or remove a file for the ``moment``-th time is killed before or, in every
    second moment, after it. Gives whether that happened."""
    calls, killed = 0, False

    def deadly(real: Callable[..., None]) -> Callable[..., None]:
        def act(*arguments: Any, **options: Any) -> None:
            nonlocal calls, killed
            if killed:
                return
            calls += 1
            if calls == moment // 2 + 1:
                killed = True
                if moment % 2:
                    with suppress(OSError):
                        real(*arguments, **options)
                raise Killed
            real(*arguments, **options)

        return act

    with patch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(os, name, deadly(getattr(os, name)))
        with suppress(Killed):
            yield lambda: killed


def check_every_kill(
    fresh: Callable[[], Path], act: Callable[[Path], object], patch: pytest.MonkeyPatch, least: int
) -> None:
    """Killed at any moment, ``act`` loses no finding, and ends where it would have ended once it is run again.

    ``fresh`` makes the corpus; ``least`` is the number of moments that there are at least.
    """
    root = fresh()
    before = groups_of(root)
    act(root)
    ended = content(root)
    act(root)
    assert content(root) == ended, "a second time changes something"
    moment = 0
    while True:
        root = fresh()
        with killed_at(moment, patch) as happened:
            act(root)
        if not happened():
            break
        assert groups_of(root) >= before
        act(root)
        assert content(root) == ended, moment
        moment += 1
    assert moment >= least, moment
