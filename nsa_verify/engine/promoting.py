"""Promoting: a crashing case that was mended becomes a regression case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from msgspec import Struct

from nsa_verify.core.findings import Outcome
from nsa_verify.engine.accused import problem_of, runs_needed
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, load
from nsa_verify.engine.filing import put_instead
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.replaying import Replayed, Status, replay_saved


class Promoted(Struct, frozen=True):
    """What became of one crashing case: it is FIXED and at ``target`` now, or stays where it was."""

    path: Path
    status: Status
    target: Path | None = None
    problem: str = ""
    """What it still shows if it FAILED, and the sentence of an ERROR."""


def promote(plan: Plan, root: Path, paths: Sequence[Path]) -> Iterator[Hello | Promoted]:
    """Run the crashing cases ``paths`` of ``root`` again, and move each that is FIXED to ``regression`` at once.

    It is fixed if what it was found in agrees, under the executor and on the kind of device that it was found with, and
    everybody else agrees; if it did not show in every run before, in as many runs as it takes. Raises as
    ``replay_saved`` does.
    """
    runs = [path for path in paths for _ in range(_runs(path))]
    events = replay_saved(plan, runs)
    for said in events:
        assert isinstance(said, Hello)
        yield said
        replays = (it for it in events if isinstance(it, Replayed))
        for path, results in groupby(replays, key=lambda it: it.path):
            yield _settled(root, path, list(results), said)


def _runs(path: Path) -> int:
    try:
        return runs_needed(load(path).provenance)
    except CorpusError:  # the replay says what is wrong with it
        return 1


def _settled(root: Path, path: Path, results: Sequence[Replayed], said: Hello) -> Promoted:
    entry = results[-1].entry
    for it in results:
        if it.status is Status.FAILED:
            return Promoted(path, it.status, problem=_failure(path, it))
    if entry is None or any(it.entry != entry for it in results):
        return Promoted(path, Status.ERROR, problem=results[-1].problem or f"{path}: was changed meanwhile; run again")
    unsure = [problem_of(path, entry, said), *(it.problem or _unjudged(path, entry, it) for it in results)]
    if problem := next(filter(None, unsure), ""):
        return Promoted(path, Status.ERROR, problem=problem)
    try:
        return Promoted(path, Status.FIXED, put_instead(root, path, entry, Kind.REGRESSION, entry))
    except CorpusError as error:
        return Promoted(path, Status.ERROR, problem=str(error))


def _failure(path: Path, result: Replayed) -> str:
    found = [it.primary for it in result.verdicts if it.outcome is Outcome.DISAGREE and it.primary is not None]
    return f"{path}: {found[0].signature_in(True)}: {found[0].message}" if found else f"{path}: disagrees"


def _unjudged(path: Path, entry: Entry, result: Replayed) -> str:
    """Why the accused itself was not judged, or ``""`` if it was."""
    finding = entry.finding
    if finding is None:
        return ""
    own = [
        it for it in result.verdicts if (it.implementation, it.executor) == (finding.implementation, finding.executor)
    ]
    if any(it.outcome is Outcome.AGREE for it in own):
        return ""
    why = own[0].reason if own else "it was not run"
    return f"{path}: {finding.implementation} [{finding.executor}], which it was found in, was not judged: {why}"
