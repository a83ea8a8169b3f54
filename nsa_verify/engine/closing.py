"""What a campaign says in the end: every group, and whether it is green."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

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
    here = _judged(totals, found)
    told = tuple(
        _group(ask, record, totals, bug, (open_cases(saved, totals) or saved)[0]) for bug, saved in found.items()
    )
    told = tuple(it for it in told if it.implementation in here or it.is_new)
    open_groups = [it for it in told if not it.accepted and not it.is_fixed]
    idle = ""
    if stop is StopReason.TIME:  # what ended before says why
        idle = untested(totals.matrix, totals.subjects, bool(ask.plan.references or ask.plan.only), "give it more time")
    problems = list(dict.fromkeys([*totals.problems, *problems, *filter(None, [idle])]))
    stray = () if open_groups else tuple(_stray(ask, record, totals, found))
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
        unmatched=tuple(f"{it} ({it.reason})" for it in ask.baseline.unmatched(_in_all_modes(record, found))),
        problems=tuple(problems),
        rates=tuple(totals.rates),
    )


def _judged(totals: Totals, found: Mapping[Bug, Sequence[Saved]]) -> set[str]:
    """The implementations that searches judged, or that saved cases say something of."""
    told = {*totals.findings, *totals.unclaimed, *totals.instead}
    told |= {bug for bug, saved in found.items() if not totals.fixed.isdisjoint(it.path for it in saved)}
    return {name for name, _, _ in totals.matrix.cells} | {bug.implementation for bug in told}


def _stray(ask: Ask, record: Record, totals: Totals, found: Iterable[Bug]) -> Iterator[str]:
    """Disagreements that no open group and no entry of the baseline stands for: nothing is to be green over them."""
    accepted: set[tuple[str, str]] = set()
    beyond: dict[tuple[str, str], str] = {}
    for bug in found:
        entries = {it.mode: ask.baseline.accepts(it) for it in _in_all_modes(record, [bug])}
        if entries[bug.mode] is None:
            continue
        accepted |= {(bug.implementation, entry.mode) for entry in entries.values() if entry is not None}
        alone = ", ".join(mode for mode, entry in entries.items() if entry is not None)
        told = f": {bug} shows there too, and the baseline accepts it in {alone} alone"
        beyond |= {(bug.implementation, mode): told for mode, entry in entries.items() if entry is None}
    counts: Counter[tuple[str, Mode]] = Counter()
    for (implementation, _, mode), cell in totals.matrix.cells.items():
        counts[implementation, mode] += cell.disagree
    for (implementation, mode), count in sorted(counts.items()):
        if count and (implementation, "") not in accepted and (implementation, mode) not in accepted:
            why = beyond.get((implementation, mode), ", and no group stands for it")
            yield f"{implementation} disagreed in {mode}, in {count} cases{why}"
    for bug, path in totals.unclaimed.items():
        if bug not in found and ask.baseline.accepts(bug) is None:
            yield f"{path}: shows {bug}, and no group stands for it"


def _modes(record: Record, bug: Bug) -> tuple[Mode, ...]:
    """Its own, and those of its other sights."""
    sighting = record.sightings.get(str(bug))
    also = {it.mode for it in sighting.signatures} if sighting else set()
    return tuple(mode for mode in Mode if mode is bug.mode or mode in also)


def _in_all_modes(record: Record, bugs: Iterable[Bug]) -> Iterator[Bug]:
    """What an entry of the baseline may be about: each group in each mode that it was seen in."""
    return (bug._replace(mode=mode) for bug in bugs for mode in _modes(record, bug))


def _group(ask: Ask, record: Record, totals: Totals, bug: Bug, saved: Saved) -> Group:
    finding, reliability = totals.findings.get(bug, (None, None))
    origin = saved.entry.provenance
    accepted = ask.baseline.accepts(bug)
    sighting = record.sightings.get(str(bug))
    return Group(
        implementation=bug.implementation,
        code=bug.code,
        mode=bug.mode,
        place=bug.place,
        path=saved.path,
        case=saved.entry.case,
        finding=finding or _finding_of(saved),
        executors=tuple(sorted(totals.executors.get(bug, {saved.finding.executor}))),
        modes=_modes(record, bug),
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
