"""What a run or a campaign came to, gathered from its events: reports that are written at the end tell it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from msgspec import Struct

from nsa_verify.core.case import Case, Mode
from nsa_verify.core.findings import Finding, Outcome, Picture
from nsa_verify.core.labels import Coverage
from nsa_verify.engine.corpus import SavedFinding
from nsa_verify.engine.events import (
    CampaignFinished,
    CampaignStarted,
    CaseReplayed,
    CheckFailed,
    Disagreement,
    Event,
    Group,
    Matrix,
    Recovered,
    Reliability,
    RoundFinished,
    RunFinished,
    RunStarted,
    SliceFinished,
    SliceStarted,
    StopReason,
    Subject,
    Tally,
    WorkersReady,
)
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.triage import Bug
from nsa_verify.shell.options import ExitCode
from nsa_verify.shell.render import case_lines, counted, finding_lines, how_it_was_got, reproduce, title

RATE_POINTS: Final = 600
"""Points of the curve of cases over time that are kept."""


class Found(Struct, kw_only=True):
    """A disagreement of a run, or a group of a campaign; ``group`` is empty in the former."""

    finding: Finding
    case: Case
    executors: tuple[str, ...]
    reliability: Reliability
    path: Path | None = None
    how: str = ""
    """How its case was got, in a sentence."""
    problem: str = ""
    """Why it could not be saved."""
    pictures: tuple[Picture, ...] = ()
    told: Disagreement | None = None
    """The event that it is, in a run."""
    group: Group | None = None

    @property
    def accepted(self) -> str:
        """The reason that a baseline gives for it."""
        return self.group.accepted if self.group is not None else ""

    @property
    def counts(self) -> bool:
        """Whether it makes the verdict red: it is neither accepted nor fixed."""
        return self.group is None or not (self.group.accepted or self.group.is_fixed)

    @property
    def state(self) -> str:
        """In a campaign: accepted, fixed, new or known."""
        if self.group is None:
            return ""
        if self.group.accepted:
            return "accepted"
        return "fixed" if self.group.is_fixed else "new" if self.group.is_new else "known"

    @property
    def headline(self) -> str:
        """Who disagrees where, and the code with its title."""
        return f"{self.finding.implementation} [{', '.join(self.executors)}] {title(self.finding.code)}"

    @property
    def lines(self) -> list[str]:
        """The case and the finding, as ``run`` prints them."""
        told = [*case_lines(self.case, self.finding.replay), *finding_lines(self.finding)]
        return [*told, self.how] if self.how else told


class Story:
    """Takes in every event; the fields are what is known so far.

    In a campaign counts are those of all searches: what is added up until ``CampaignFinished`` says it once more.
    """

    def __init__(self, plan: Plan | None, command: str = "", environment: Mapping[str, str] | None = None) -> None:
        self.plan, self.command, self.environment = plan, command, dict(environment or {})
        self.began = datetime.now(UTC)
        self.campaign: CampaignStarted | None = None
        self.started: RunStarted | None = None
        """Of a campaign the last of its searches."""
        self.finished: RunFinished | CampaignFinished | None = None
        self.subjects: dict[str, Subject] = {}
        self.executors: tuple[str, ...] = ()
        self.disagreements: list[Disagreement] = []
        self._unknown: dict[tuple[str, str, str], CheckFailed] = {}
        """The first of each implementation, executor and reason."""
        self.recovered: Recovered | None = None
        self.replayed: list[CaseReplayed] = []
        self.slices: list[tuple[SliceStarted, SliceFinished]] = []
        self.matrix, self.tally, self.coverage = Matrix(), Tally(), Coverage()
        self.cases, self.seconds, self.replaced = 0, 0.0, 0
        self.rates: list[tuple[float, int]] = []
        """Cases so far at some seconds since the drawing began."""
        self.stop: StopReason | None = None
        self.digest = ""
        self.code, self.problem = int(ExitCode.UNABLE), ""
        self._ready_s: float | None = None
        self._cases_before = 0
        self._slice: SliceStarted | None = None

    def handle(self, event: Event) -> None:
        """Take one event in."""
        self._handle_campaign(event)
        match event:
            case RunStarted():
                self._start(event)
            case WorkersReady() if self._ready_s is None:
                self._ready_s = time.monotonic()
            case RoundFinished():
                self._mark(event)
            case Disagreement():
                self.disagreements.append(event)
            case CheckFailed():
                self._unknown.setdefault((event.implementation, event.executor, event.reason), event)
            case Recovered():
                self.recovered = event
            case RunFinished():
                self._add(event)
            case _:
                pass

    def _handle_campaign(self, event: Event) -> None:
        match event:
            case CampaignStarted():
                self.campaign = event
                self.environment |= event.environment
            case CaseReplayed():
                self.replayed.append(event)
            case SliceStarted():
                self._slice = event
            case SliceFinished() if self._slice is not None:
                self.slices.append((self._slice, event))
            case CampaignFinished():
                self._finish(event)
            case _:
                pass

    def close(self, code: int, problem: str) -> None:
        """The exit code, and the sentence that says what stopped it."""
        self.code, self.problem = int(code), problem
        if code == ExitCode.UNABLE and not problem:
            self.problem = "nsa-verify itself failed"

    @property
    def kind(self) -> str:
        """``run``, or ``fuzz`` and the kind of the campaign."""
        return f"fuzz {self.campaign.kind}" if self.campaign is not None else "run"

    @property
    def seed(self) -> int | None:
        """Of the campaign or the run."""
        begun = self.campaign or self.started or self.plan
        return begun.seed if begun is not None else None

    @property
    def device(self) -> str:
        """The device line, once it is known."""
        return self.started.device if self.started is not None else self.environment.get("device", "")

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Those that were to be drawn."""
        drawn = {mode for _, _, mode in self.matrix.cells}
        return self.plan.modes if self.plan is not None else tuple(mode for mode in Mode if mode in drawn)

    @property
    def rate(self) -> float:
        """Cases a second."""
        return self.cases / self.seconds if self.seconds else 0.0

    @property
    def found(self) -> list[Found]:
        """In order: of a campaign that ended its groups, those that count first; else the disagreements."""
        if isinstance(self.finished, CampaignFinished):
            groups = [self._grouped(it) for it in self.finished.groups]
            return sorted(groups, key=lambda it: (not it.counts, it.state != "new"))
        told = {(it.signature, it.path, it.problem): it for it in self.disagreements}
        return [_found(it) for it in sorted(told.values(), key=lambda it: it.signature)]

    @property
    def headline(self) -> str:
        """The outcome in a few words."""
        cases = f"in {counted(self.cases, 'case')}"
        if self.code == ExitCode.INTERRUPTED:
            return f"interrupted after {counted(self.cases, 'case')}"
        if self.code == ExitCode.UNABLE:
            return f"could not do its job: {self.problem}"
        count = sum(it.counts for it in self.found)
        if isinstance(self.finished, CampaignFinished):
            return self._campaign_headline(count, cases)
        return f"{counted(count, 'distinct disagreement')} {cases}" if count else f"no disagreement {cases}"

    def reproduce(self, found: Found) -> str:
        """The command that runs its case again; empty if it was not saved."""
        if found.path is None:
            return ""
        executor = found.finding.executor if len(found.executors) == 1 else ""
        return reproduce(found.path, found.finding.implementation, executor, self.plan)

    def unknown_verdicts(self) -> int:
        """How many verdicts were unknown."""
        return self.matrix.total(Outcome.UNKNOWN)

    @property
    def unknown(self) -> list[CheckFailed]:
        """Checks that failed: the first of each implementation, executor and reason."""
        return list(self._unknown.values())

    def _start(self, event: RunStarted) -> None:
        self.started = event
        self.subjects |= {it.name: it for it in event.subjects}
        self.executors = tuple(dict.fromkeys((*self.executors, *event.executors)))

    def _mark(self, event: RoundFinished) -> None:
        now = time.monotonic()
        if self._ready_s is None:
            self._ready_s = now
        self.cases = self._cases_before + event.cases_done
        self.seconds = now - self._ready_s
        self.rates.append((round(self.seconds, 2), self.cases))
        if len(self.rates) > RATE_POINTS:
            self.rates = self.rates[1::2]

    def _add(self, event: RunFinished) -> None:
        self.matrix.add(event.matrix)
        self.tally.add(event.tally)
        self.coverage.add(event.coverage)
        self._cases_before += event.cases
        self.cases, self.stop = self._cases_before, event.stop
        self.replaced += event.replaced
        if self.campaign is None:
            self.finished, self.seconds, self.digest = event, event.seconds, event.digest

    def _finish(self, event: CampaignFinished) -> None:
        self.finished = event
        self.matrix, self.tally, self.coverage = event.matrix, event.tally, event.coverage
        self.cases, self.seconds, self.replaced, self.stop = event.cases, event.seconds, event.replaced, event.stop
        self.rates = list(event.rates) or self.rates

    def _campaign_headline(self, count: int, cases: str) -> str:
        assert isinstance(self.finished, CampaignFinished)
        parts = []
        if count:
            new = sum(it.counts and it.state == "new" for it in self.found)
            parts.append(f"{counted(count, 'open finding')}, {new} new")
        if self.finished.failing:
            parts.append(f"{counted(len(self.finished.failing), 'regression case')} disagreeing again")
        accepted = sum(bool(it.accepted) for it in self.finished.groups)
        return ", ".join([*(parts or ["no open finding"]), *([f"{accepted} accepted"] if accepted else []), cases])

    def _grouped(self, group: Group) -> Found:
        """A group, with what the event that made its minimal case says besides."""
        bug = bug_of(group)
        told = next((it for it in reversed(self.disagreements) if _is_of(it, group, bug)), None)
        return Found(
            finding=told.finding if told is not None else group.finding,
            case=group.case,
            executors=group.executors or (group.finding.executor,),
            reliability=group.reliability,
            path=group.path,
            how=told.note if told is not None else "",
            pictures=told.pictures if told is not None else (),
            group=group,
        )


def bug_of(group: Group) -> Bug:
    """The name of a group."""
    return Bug(group.implementation, group.code, group.mode, group.place)


def _is_of(told: Disagreement, group: Group, bug: Bug) -> bool:
    return told.case == group.case and Bug.of(SavedFinding.of(told.finding)) == bug


def _found(told: Disagreement) -> Found:
    return Found(
        finding=told.finding,
        case=told.case,
        executors=(told.finding.executor,),
        reliability=told.reliability,
        path=told.path,
        how=how_it_was_got(told),
        problem=told.problem,
        pictures=told.pictures,
        told=told,
    )


def facts(story: Story) -> list[tuple[str, str]]:
    """What it was a function of and how it ended, as names and values; without those that are not known.

    The environment is ``story.environment``.
    """
    told = {
        "command": story.command,
        "seed": "" if story.seed is None else str(story.seed),
        "stopped because": str(story.stop or ""),
        "exit code": str(story.code),
        "cases": f"{story.cases} in {story.seconds:.1f} s ({story.rate:.1f} a second)" if story.seconds else "",
        "workers": _workers(story),
        "began": f"{story.began:%Y-%m-%d %H:%M:%S} UTC",
        "digest": story.digest,
        "device": story.device,
    }
    return [(name, value) for name, value in told.items() if value]


def environment_line(story: Story) -> str:
    """What it ran in, but for the device."""
    return ", ".join(f"{name} {value}" for name, value in story.environment.items() if name != "device")


def _workers(story: Story) -> str:
    begun = story.campaign or story.started
    replaced = f", {story.replaced} died and replaced" if story.replaced else ""
    return f"{begun.workers}{replaced}" if begun is not None else ""
