"""What a campaign says in the end: every group, and whether it is green."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Finding, Outcome
from nsa_verify.engine.corpus import SavedFinding
from nsa_verify.engine.events import CampaignFinished, Group, Matrix, Reliability, StopReason
from nsa_verify.engine.record import Record
from nsa_verify.engine.totals import Ask, Totals
from nsa_verify.engine.triage import Bug, Saved, groups


def untested(matrix: Matrix, names: Iterable[str], were_asked_for: bool, more: str) -> str:
    """Why a run of the implementations ``names`` that found nothing did not do its job, or ``""``.

    Nothing was judged, or something that was asked for by name was not. ``more`` is the remedy, unless it is known to
    be another one.
    """
    judged = {name for (name, _, _), cell in matrix.cells.items() if cell.cases}
    idle = [name for name in names if name not in judged]
    refused = {name for (name, _, _), cell in matrix.cells.items() if cell.not_capturable}
    if idle and refused.issuperset(idle):
        more = "declared not capturable, so give --executor eager"
    if not judged:
        return f"nothing was tested; {more}"
    return f"no case was applicable to {', '.join(idle)}; {more}" if idle and were_asked_for else ""


def finished(ask: Ask, record: Record, totals: Totals, stop: StopReason, seconds: float) -> CampaignFinished:
    """The last event, and the exit code: red if a group is open or something disagreed that no group stands for."""
    found, problems = groups(ask.root)
    here = {name for name, _, _ in totals.matrix.cells}
    told = tuple(
        _group(ask, record, totals, bug, (open_cases(saved, totals) or saved)[0]) for bug, saved in found.items()
    )
    told = tuple(it for it in told if it.implementation in here or it.is_new)
    open_groups = [it for it in told if not it.accepted and not it.is_fixed]
    idle = untested(totals.matrix, totals.subjects, bool(ask.plan.references or ask.plan.only), "give it more time")
    problems = list(dict.fromkeys([*totals.problems, *problems, *filter(None, [idle])]))
    stray = () if open_groups else tuple(_stray(ask, totals, found))
    code = 0
    if open_groups or totals.failing or stray:
        code = 1
    elif problems or totals.unknown or totals.matrix.total(Outcome.UNKNOWN):
        code = 2
    if stop is StopReason.INTERRUPTED:
        code = 130
    return CampaignFinished(
        stop=stop,
        cases=totals.cases,
        seconds=seconds,
        matrix=totals.matrix,
        tally=totals.tally.in_order(),
        groups=told,
        coverage=record.coverage,
        replaced=totals.replaced,
        exit_code=code,
        failing=tuple(totals.failing),
        stray=stray,
        unknown=totals.unknown,
        expired=tuple(f"{it} ({it.reason}; {it.expires})" for it in ask.baseline.expired()),
        unmatched=tuple(f"{it} ({it.reason})" for it in ask.baseline.unmatched(found)),
        problems=tuple(problems),
        rates=tuple(totals.rates),
    )


def _stray(ask: Ask, totals: Totals, found: Iterable[Bug]) -> Iterator[str]:
    """Disagreements that no open group and no entry of the baseline stands for: nothing is to be green over them."""
    accepted = [(bug.implementation, entry.mode) for bug in found if (entry := ask.baseline.accepts(bug)) is not None]
    counts: Counter[tuple[str, Mode]] = Counter()
    for (implementation, _, mode), cell in totals.matrix.cells.items():
        counts[implementation, mode] += cell.disagree
    for (implementation, mode), count in sorted(counts.items()):
        if count and (implementation, "") not in accepted and (implementation, mode) not in accepted:
            yield f"{implementation} disagreed in {mode}, in {count} cases, and no group stands for it"
    for bug, path in totals.unclaimed.items():
        if bug not in found and ask.baseline.accepts(bug) is None:
            yield f"{path}: shows {bug}, and no group stands for it"


def _group(ask: Ask, record: Record, totals: Totals, bug: Bug, saved: Saved) -> Group:
    finding, reliability = totals.findings.get(bug, (None, None))
    origin = saved.entry.provenance
    accepted = ask.baseline.accepts(bug)
    sighting = record.sightings.get(str(bug))
    also = {it.mode for it in sighting.signatures} if sighting else set()
    return Group(
        implementation=bug.implementation,
        code=bug.code,
        mode=bug.mode,
        place=bug.place,
        path=saved.path,
        case=saved.entry.case,
        finding=finding or _finding_of(saved),
        executors=tuple(sorted(totals.executors.get(bug, {saved.finding.executor}))),
        modes=tuple(mode for mode in Mode if mode is bug.mode or mode in also),
        first_seen=min(filter(None, (origin.date, sighting.first_seen if sighting else "")), default=""),
        last_seen=sighting.last_seen if sighting else origin.date,
        seen=sighting.seen if sighting else 0,
        reliability=reliability or Reliability(origin.failed or 0, origin.attempts or 0),
        is_new=bug in totals.new,
        is_fixed=saved.path in totals.fixed and bug not in totals.findings,
        accepted=accepted.reason if accepted else "",
        instead=totals.instead.get(bug, "") if bug not in totals.findings else "",
    )


def _finding_of(saved: Saved) -> Finding:
    """What the corpus has of it."""
    return Finding(**{name: getattr(saved.finding, name) for name in SavedFinding.__struct_fields__})


def open_cases(saved: list[Saved], totals: Totals) -> list[Saved]:
    """The cases of a group but for those that agree now."""
    return [it for it in saved if it.path not in totals.fixed]


def accepted(ask: Ask, bugs: set[Bug]) -> set[Bug]:
    """Those that the baseline accepts."""
    return {bug for bug in bugs if ask.baseline.accepts(bug) is not None}
