"""Saved cases, run again: each is FIXED, FAILED or ERROR."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from nsa_verify.core.findings import Outcome, Verdict
from nsa_verify.engine.cluster import crew_of
from nsa_verify.engine.corpus import CorpusError, Entry, load
from nsa_verify.engine.crew import Promise
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.searcher import judge_saved


class Status(StrEnum):
    """What became of a saved case."""

    FIXED = "FIXED"
    """Every applicable implementation agrees."""
    FAILED = "FAILED"
    """At least one disagrees."""
    ERROR = "ERROR"
    """It could not be judged."""


class Replayed(Struct, frozen=True):
    """One saved case, run again. ``problem`` is the sentence of an ERROR."""

    path: Path
    status: Status
    entry: Entry | None
    verdicts: tuple[Verdict, ...] = ()
    problem: str = ""
    not_loaded: bool = False
    """Whether it is an ERROR since the implementation that it was found in is not here, or none is applicable."""


def replay_saved(plan: Plan, paths: list[Path]) -> Iterator[Hello | Replayed]:
    """Run the cases of ``paths`` again, in their order, after the ``Hello``. A bad file is an ERROR.

    Raises ``KeyboardInterrupt`` on Ctrl-C, and ``ImplementationError``, ``DeviceError`` and ``EngineError``.
    """
    with crew_of(plan) as crew:
        said = crew.hello(plan)
        yield said
        known = {subject.name for subject in said.subjects}
        opened = [(path, *opened_entry(path)) for path in paths]
        promises: list[Promise[list[Verdict]] | None] = [None] * len(opened)
        for index, (path, entry, problem) in enumerate(opened):
            ahead = range(index, min(len(opened), index + 2 * crew.workers))
            for later in ahead if crew.workers > 1 else (index,):
                saved = opened[later][1]
                if promises[later] is None and saved is not None:
                    promises[later] = crew.submit(judge_saved, plan, saved.case, saved.before)
            promise = promises[index]
            if entry is None or promise is None:
                yield Replayed(path, Status.ERROR, entry, problem=problem)
                continue
            verdicts = crew.result(*crew.wait([promise]))
            if verdicts is not None:
                yield status_of(path, entry, tuple(verdicts), known, plan)
            if crew.interrupted:
                raise KeyboardInterrupt


def opened_entry(path: Path) -> tuple[Entry | None, str]:
    """What a file holds, or the sentence that says what is wrong with it."""
    try:
        return load(path), ""
    except CorpusError as error:
        return None, str(error)


def status_of(path: Path, entry: Entry, verdicts: tuple[Verdict, ...], known: set[str], plan: Plan) -> Replayed:
    """What became of a saved case by the verdicts of the implementations that the run has, ``known`` by name."""
    if any(verdict.outcome is Outcome.DISAGREE for verdict in verdicts):
        return Replayed(path, Status.FAILED, entry, verdicts)
    problem, not_loaded = "", False
    if unknown := [verdict for verdict in verdicts if verdict.outcome is Outcome.UNKNOWN]:
        problem = f"{path}: {unknown[0].implementation}: {unknown[0].reason}"
    elif all(verdict.outcome is Outcome.NOT_APPLICABLE for verdict in verdicts):
        not_loaded = True
        problem = f"{path}: no implementation of this run is applicable; choose others with --only or --impl"
    elif entry.finding is not None and not plan.only and entry.finding.implementation not in known:
        not_loaded = True
        given = " ".join(f"--impl {reference}" for reference in entry.provenance.impl) or "--impl"
        problem = (
            f"{path}: was found in {entry.finding.implementation!r}, which is not loaded; give it with {given},"
            " or choose others with --only"
        )
    return Replayed(path, Status.ERROR if problem else Status.FIXED, entry, verdicts, problem, not_loaded)
