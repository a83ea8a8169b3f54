"""A campaign: many searches over one corpus, each over a share of what there is, until the time is up.

Saved cases come first. Then slices: a slice is a search with a seed of its own, so that no two draw the same cases, and
what it finds is shrunk before the next one begins. What was found before is told again and not shrunk again. Everything
that a later campaign goes on from is in the corpus after each slice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from random import Random
from typing import Final

from msgspec.structs import replace

from nsa_verify.core.findings import Finding, Outcome
from nsa_verify.core.labels import possible_pairs
from nsa_verify.engine.closing import accepted, finished, open_cases
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, Provenance, SavedFinding, dumps, scan
from nsa_verify.engine.crew import Deferred
from nsa_verify.engine.events import (
    CampaignStarted,
    CaseReplayed,
    CheckFailed,
    Disagreement,
    DisagreementSeen,
    Event,
    Recovered,
    Reliability,
    RoundFinished,
    RunFinished,
    RunStarted,
    SliceFinished,
    SliceStarted,
    StopReason,
)
from nsa_verify.engine.exchange import Exchange, opened
from nsa_verify.engine.filing import put_instead, remove
from nsa_verify.engine.keeping import entry_of, keep
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Hint, Pattern, Plan
from nsa_verify.engine.record import Record, recorded, save_record
from nsa_verify.engine.replaying import Replayed, Status, replay_saved
from nsa_verify.engine.saving import search_and_save
from nsa_verify.engine.sharing import Choice, choose
from nsa_verify.engine.totals import Ask, Totals
from nsa_verify.engine.triage import Bug, Saved, groups, measure

CHANGE: Final = "change"
BATCH: Final = "batch"
ENDLESS: Final = 10_000_000
"""Cases of a slice: its time ends it."""
SLICES: Final = 20
"""Slices that a campaign is meant to have; each starts workers anew, and shrinks what it found."""
SHORTEST_SLICE_S: Final = 20.0
LONGEST_SLICE_S: Final = 600.0
NOT_RUN: Final = "NOT RUN"
"""Told of a saved case that nobody here can run."""
RATE_POINTS: Final = 400
"""Points of the curve of cases over time that are kept."""


def campaign(ask: Ask) -> Iterator[Event]:
    """Run it. Raises as ``search`` does, ``CorpusError``, and ``ExchangeError`` if the database is not there at first.

    Ctrl-C ends the search that is running as it ends any, and then the campaign.
    """
    began = time.monotonic()
    totals = Totals()
    with Deferred() as deferred, recorded(ask.root) as record, opened(ask.database) as exchange:
        if not record.slices:
            record.seed = ask.plan.seed
        record.forget_all_but({str(bug) for bug in groups(ask.root)[0]})
        yield CampaignStarted(
            version=ask.version,
            command=ask.command,
            kind=ask.kind,
            seed=record.seed,
            budget_s=ask.budget_s,
            workers=ask.plan.workers,
            corpus=ask.root,
            slices=record.slices,
            environment=ask.environment,
        )
        yield from [exchange.begin(ask.root)] if exchange else []
        paths = [path for kind in (Kind.REGRESSION, Kind.CRASHING) for path in _files(ask.root / kind)]
        stop = yield from _replay(ask, record, totals, paths, exchange)
        if stop is None:
            stop = yield from _slices(ask, record, totals, began, exchange, deferred)
        if exchange and exchange.waiting:
            yield exchange.go_on(ask.root, totals.fixed, take=False)
            totals.problems.extend(exchange.unsent())
        yield finished(ask, record, totals, stop, time.monotonic() - began)


def _replay(
    ask: Ask, record: Record, totals: Totals, paths: Collection[Path], exchange: Exchange | None
) -> Generator[Event, None, StopReason | None]:
    """Saved cases first: what disagrees again is not new, and what was mended must stay so."""
    if not paths:
        return None
    now = _now()
    try:
        for told in replay_saved(replace(ask.plan, workers=min(ask.plan.workers, len(paths))), list(paths)):
            if isinstance(told, Hello):
                continue
            entry, status = told.entry, NOT_RUN if told.not_loaded else told.status
            bug = Bug.of(entry.finding) if entry is not None and entry.finding is not None else None
            event = CaseReplayed(
                told.path, status, entry.title if entry else "", told.problem, str(bug) if bug is not None else ""
            )
            yield event
            if told.status is Status.FAILED:
                _see_again(ask, record, totals, told, event, now)
            elif told.status is Status.ERROR and not told.not_loaded:
                totals.problems.append(told.problem)
            elif bug is not None and told.path.is_relative_to(ask.root / Kind.CRASHING) and _is_mended(told):
                _note_mended(record, totals, told.path, bug)
    except KeyboardInterrupt:
        return StopReason.INTERRUPTED
    if exchange:
        for bug in exchange.settle(ask.root, totals.failed):
            totals.findings.pop(bug, None)  # that of the case which is gone
    save_record(ask.root, record)
    return StopReason.NEW if ask.kind == CHANGE and totals.failing else None


def _see_again(ask: Ask, record: Record, totals: Totals, told: Replayed, event: CaseReplayed, now: str) -> None:
    assert told.entry is not None
    if told.path.is_relative_to(ask.root / Kind.REGRESSION):
        totals.failing.append(event)
        return
    known = groups(ask.root)[0]
    accused = told.entry.finding
    own = Bug.of(accused) if accused is not None else None
    for verdict in told.verdicts:
        shown: dict[Bug, Finding] = {}
        for finding in verdict.findings:
            shown.setdefault(Bug.of(SavedFinding.of(finding)), finding)
        symptoms = [it.symptom for it in shown]
        is_own = own is not None and own.implementation == verdict.implementation
        if own is not None and is_own and own.symptom in symptoms and _is_shrunk(told.entry):
            record.learn(own, now, symptoms)
        # What is accepted stands for what is shown beside it, and nothing else.
        candidates = [it for it in known if ask.baseline.accepts(it) is None or it.symptom in symptoms]
        standing = {bug: record.stands_for(bug, candidates) for bug in shown}
        for bug, group in standing.items():
            if group is not None:
                totals.findings.setdefault(group, (shown[bug], Reliability(1, 1)))
                totals.executors.setdefault(group, set()).add(verdict.executor)
                record.see(group, shown[bug].signature_in(True) if bug.symptom == group.symptom else None, now)
            elif _is_shrunk(told.entry) or own not in standing.values():
                # The case fails in another way too, or elsewhere: a search is to find and shrink that.
                totals.unclaimed.setdefault(bug, told.path)
        if own in standing.values():
            totals.failed.add(told.path)
        elif own is not None and accused is not None and is_own and shown and verdict.executor == accused.executor:
            totals.instead[own] = str(next(iter(shown)))
            record.disown(own, symptoms)
            is_reached = min(it.replay for it in shown.values()) >= accused.replay
            others = standing.values()
            if is_reached and _failed_always(told.entry) and all(it and ask.baseline.accepts(it) for it in others):
                _note_mended(record, totals, told.path, own)


def _note_mended(record: Record, totals: Totals, path: Path, bug: Bug) -> None:
    totals.fixed.add(path)
    record.unlearn(bug)


def _failed_always(entry: Entry) -> bool:
    return entry.provenance.failed == entry.provenance.attempts


def _is_mended(told: Replayed) -> bool:
    """Whether the accused itself agreed, under its executor, with what it always disagreed on before."""
    if told.entry is None or told.entry.finding is None:
        return False
    accused = told.entry.finding
    pairs = {(it.implementation, it.executor) for it in told.verdicts if it.outcome is Outcome.AGREE}
    return (accused.implementation, accused.executor) in pairs and _failed_always(told.entry)


def _files(folder: Path) -> list[Path]:
    return list(scan(folder)) if folder.is_dir() else []


def _slices(
    ask: Ask, record: Record, totals: Totals, began: float, exchange: Exchange | None, deferred: Deferred
) -> Generator[Event, None, StopReason]:
    deadline = time.monotonic() + ask.budget_s
    length = ask.slice_s or min(max(ask.budget_s / SLICES, SHORTEST_SLICE_S), LONGEST_SLICE_S)
    loaded: tuple[str, ...] = ask.plan.only
    executors = ask.plan.executors
    while (left := deadline - time.monotonic()) > 0:
        number = record.slices
        choice = Choice(ask.plan.modes, (), executors)
        if totals.subjects:  # the first search has everything: each that was asked for is judged
            choice = choose(record.shares, number, record.seed, ask.plan.modes, loaded, executors, totals.subjects)
        plan = replace(_plan(ask, record, totals, choice, number, min(length, left)), besides=executors)
        ended: RunFinished | None = None
        yield SliceStarted(number, plan.max_time_s, choice.modes, choice.implementations or loaded, choice.executors)
        has_started = False
        try:
            for event in search_and_save(plan, ask.root, ask.version, {}, ask.command, _saver(ask, record, totals)):
                if isinstance(event, RunStarted):
                    has_started = True
                    loaded = loaded or tuple(it.name for it in event.subjects)
                    executors = executors or event.executors
                    totals.subjects |= {it.name: it.modes for it in event.subjects}
                elif isinstance(event, RunFinished):
                    ended = event
                _listen(record, totals, plan, event, began)
                yield event
        except KeyboardInterrupt:
            if has_started:  # the second one: the first ends the search with what it has
                raise
            return StopReason.INTERRUPTED
        assert ended is not None
        totals.seconds = time.monotonic() - began
        choice = Choice(choice.modes, choice.implementations or loaded, choice.executors or executors)
        yield _count(ask, record, totals, choice, ended, plan)
        told = [exchange.go_on(ask.root, totals.fixed)] if exchange else []
        yield from told
        if deferred.asked or ended.stop is StopReason.INTERRUPTED:
            return StopReason.INTERRUPTED
        stop = yield from _replay(ask, record, totals, [path for it in told for path in it.taken], exchange)
        if stop is not None:
            return stop
        if ask.kind == CHANGE and totals.new - accepted(ask, totals.new):
            return StopReason.NEW
    return StopReason.TIME


def _listen(record: Record, totals: Totals, plan: Plan, event: Event, began: float) -> None:
    if isinstance(event, RoundFinished):
        _mark_rate(totals, time.monotonic() - began, totals.cases + event.cases_done)
    elif isinstance(event, DisagreementSeen) and event.signature in plan.known:
        record.see_again(event.signature, _now())
    elif isinstance(event, CheckFailed):
        totals.unknown += 1
    elif isinstance(event, Recovered):
        totals.problems.extend(event.unsaved)


def _plan(ask: Ask, record: Record, totals: Totals, choice: Choice, number: int, seconds: float) -> Plan:
    # A case that is as it was drawn, since its shrink was cut short, is to be shrunk when it is seen again.
    found = {bug: [it for it in saved if _is_shrunk(it.entry)] for bug, saved in groups(ask.root)[0].items()}
    as_drawn = {str(bug) for bug, shrunk in found.items() if not shrunk}
    again = {bug: it.signatures for bug, it in record.sightings.items() if bug in as_drawn - totals.tried}
    known = {bug: it.signatures for bug, it in record.sightings.items() if bug not in again}
    return replace(
        ask.plan,
        seed=Random(f"{record.seed}/slice/{number}").getrandbits(32),
        max_examples=ENDLESS,
        max_time_s=seconds,
        modes=choice.modes,
        only=choice.implementations or ask.plan.only,
        executors=choice.executors,
        coverage=True,
        detail=True,
        known=tuple(chain.from_iterable(known.values())),
        again=tuple(chain.from_iterable(again.values())),
        accepted=_accepted_patterns(ask, record, found),
        hints=tuple(Hint(bug.signature, shrunk[0].entry.case) for bug, shrunk in found.items() if shrunk),
        until_new=ask.kind == CHANGE,
    )


def _accepted_patterns(ask: Ask, record: Record, found: Iterable[Bug]) -> tuple[Pattern, ...]:
    """What the baseline accepts, each with what the minimal cases of its groups show beside it."""
    bugs = list(found)
    return tuple(
        pattern._replace(
            beside=frozenset(
                chain.from_iterable(record.symptoms(it, pattern.mode) for it in bugs if pattern.matches(it))
            )
        )
        for pattern in ask.baseline.patterns
    )


def _saver(ask: Ask, record: Record, totals: Totals) -> Callable[[Disagreement, Path, Provenance], Disagreement]:
    def save(found: Disagreement, root: Path, provenance: Provenance) -> Disagreement:
        """One file for each group: the smaller of the case that it has and this one."""
        bug = Bug.of(SavedFinding.of(found.finding))
        known = {it: open_cases(saved, totals) for it, saved in groups(root)[0].items()}
        known = {it: saved for it, saved in known.items() if saved}
        # What is accepted, or mended, stands for nothing but itself.
        others = [it for it in known if ask.baseline.accepts(it) is None]
        is_shrunk = bool(found.reliability.runs)
        if is_shrunk and bug in known and not any(_is_shrunk(it.entry) for it in known[bug]):
            # It was kept as it was drawn, so nobody knew yet which group it is of.
            shrunk = [it for it in others if it != bug and any(_is_shrunk(case.entry) for case in known[it])]
            other = record.same(bug, found.symptoms, shrunk)
            if other is not None:
                _drop(root, totals, known.pop(bug))
                record.merge(bug, other)
        else:
            other = None if bug in known else record.same(bug, found.symptoms, others)
        if not is_shrunk:
            totals.tried.update(name for name, it in record.sightings.items() if found.signature in it.signatures)
        if other is not None and is_shrunk and not any(_is_shrunk(it.entry) for it in known[other]):
            record.rename(other, bug)  # the minimal case says what the group is called
            known[bug], other = known.pop(other), None
        if other is not None:
            record.see(other, found.signature, _now())
            totals.executors.setdefault(other, set()).add(found.finding.executor)
            return replace(found, path=known[other][0].path, same_as=str(other))
        older = known.get(bug, [])
        told = _replaced(found, root, entry_of(found, provenance), older[0]) if older else keep(found, root, provenance)
        if told.path is not None:
            if record.see(bug, found.signature, _now(), found.symptoms):
                totals.new.add(bug)
            if not older or told.path != older[0].path:
                totals.findings[bug] = found.finding, found.reliability
            totals.executors.setdefault(bug, set()).add(found.finding.executor)
        return told

    return save


def _replaced(found: Disagreement, root: Path, entry: Entry, older: Saved) -> Disagreement:
    """``found`` in the place of the group's case, if it is smaller than that, or shrunk and that is not."""
    path = older.path
    first = replace(entry.provenance, date=older.entry.provenance.date or entry.provenance.date)
    entry = replace(entry, provenance=first)
    if measure(entry) < measure(older.entry) or (_is_shrunk(entry) and not _is_shrunk(older.entry)):
        try:
            path = put_instead(root, older.path, older.entry, Kind.CRASHING, entry)
        except CorpusError as error:
            return replace(found, problem=str(error), json=dumps(entry))
    return replace(found, path=path)


def _drop(root: Path, totals: Totals, saved: list[Saved]) -> None:
    """Remove cases of a group that another one stands for."""
    for it in saved:
        try:
            remove(root, it.path, it.entry)
        except CorpusError as error:
            totals.problems.append(str(error))


def _is_shrunk(entry: Entry) -> bool:
    return entry.provenance.attempts is not None


def _count(ask: Ask, record: Record, totals: Totals, choice: Choice, ended: RunFinished, plan: Plan) -> SliceFinished:
    """Count a slice in, and save what the next campaign goes on from."""
    totals.cases += ended.cases
    totals.replaced += ended.replaced
    totals.matrix.add(ended.matrix)
    totals.tally.add(ended.tally)
    coverage = record.coverage
    before = {pair for pair, _ in coverage.by_pair()}
    coverage.add(ended.coverage)
    record.coverage = coverage
    new_pairs = {pair for pair, _ in coverage.by_pair()} - before
    found = groups(ask.root)[0]
    record.forget_all_but({str(bug) for bug in found})
    found_now = [it for it in ended.signatures if it not in plan.known]
    record.shares.count_in(choice, ended.cases, new_pairs, found_now)
    record.slices += 1
    record.cases += ended.cases
    record.seconds += ended.seconds
    save_record(ask.root, record)
    possible = possible_pairs(tuple(ask.plan.modes))
    return SliceFinished(
        number=record.slices - 1,
        slice_cases=ended.cases,
        new_pairs=len(new_pairs),
        cases=totals.cases,
        seconds=totals.seconds,
        groups=len(found),
        pairs=sum(1 for pair in possible if coverage.of_pair(pair)),
        possible_pairs=len(possible),
        replaced=totals.replaced,
    )


def _mark_rate(totals: Totals, seconds: float, cases: int) -> None:
    """A point of the curve; when there are many, every second one goes."""
    totals.rates.append((round(seconds, 1), cases))
    if len(totals.rates) > RATE_POINTS:
        totals.rates = totals.rates[::2]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
