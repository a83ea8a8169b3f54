"""What a campaign looks like: a live line on a terminal, plain lines in a pipe, and the groups at the end."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Signature
from nsa_verify.engine.events import (
    CampaignFinished,
    CampaignStarted,
    CaseReplayed,
    CheckFailed,
    Disagreement,
    DisagreementSeen,
    Event,
    Exchanged,
    Group,
    Recovered,
    RoundFinished,
    RunStarted,
    Shrinking,
    SliceFinished,
    SliceStarted,
    Subject,
)
from nsa_verify.engine.plan import Plan
from nsa_verify.shell.coverage import coverage_lines
from nsa_verify.shell.render import case_lines, counted, finding_lines, matrix_rows, reproduce, tally_lines, title
from nsa_verify.shell.reporter import PLAIN_PROGRESS_EVERY_S, TerminalReporter, print_matrix, say


class FuzzReporter:
    """For people. What searches say is passed on but for their own beginnings and ends."""

    def __init__(self, out: Console, plan: Plan) -> None:
        self._out, self._plan = out, plan
        self._inner = TerminalReporter(out, plan)
        self._started: CampaignStarted | None = None
        self._subjects: dict[str, Subject] = {}
        self._executors: dict[str, None] = {}
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began = self._last_line = time.monotonic()
        self._cases = self._slice_cases = self._replaced = 0
        self._seen: set[Signature] = set()
        self._paths: set[Path | None] = set()
        self._pairs = ""
        self._slice_pairs = self._slice_replaced = 0
        self._replayed: dict[str, int] = {}

    def handle(self, event: Event) -> None:
        """Print what the event says."""
        match event:
            case CampaignStarted():
                self._start(event)
            case CaseReplayed():
                self._replay(event)
            case SliceStarted():
                self._begin_slice(event)
            case RunStarted():
                self._subjects |= {it.name: it for it in event.subjects}
                self._executors |= dict.fromkeys(event.executors)
            case RoundFinished():
                self._slice_cases = event.cases_done
                self._slice_pairs, self._slice_replaced = event.pairs, event.replaced
                self._show_progress()
            case DisagreementSeen():
                if event.signature not in self._seen:
                    self._seen.add(event.signature)
                    self._pass_on(event)
            case Disagreement():
                self._found(event)
            case Shrinking() | CheckFailed() | Recovered() | Exchanged():
                self._pass_on(event)
            case SliceFinished():
                self._end_slice(event)
            case CampaignFinished():
                self._finish(event)
            case _:
                pass

    def close(self, code: int, problem: str) -> None:
        """Leave the terminal as it was."""
        self._end_progress()
        self._inner.close(code, problem)

    def _found(self, event: Disagreement) -> None:
        if event.same_as:
            self._end_progress()
            self._line(f"{event.signature}: another sight of {event.same_as}")
            return
        self._paths.add(event.path)
        self._pass_on(event)

    def _pass_on(self, event: Event) -> None:
        """Above the live line, which comes back with the next round."""
        self._end_progress()
        self._inner.handle(event)

    def _line(self, text: str = "", style: str | None = None) -> None:
        say(self._progress.console if self._progress is not None else self._out, text, style)

    def _start(self, event: CampaignStarted) -> None:
        self._started = event
        goes_on = f"goes on after {_searches(event.slices)}" if event.slices else "new"
        self._line(f"nsa-verify {event.version} fuzz {event.kind}, {_time(event.budget_s)}, {goes_on}", "bold")
        self._line(f"seed {event.seed}; {counted(event.workers, 'worker')}; corpus {event.corpus}")

    def _replay(self, event: CaseReplayed) -> None:
        self._replayed[event.status] = self._replayed.get(event.status, 0) + 1
        if event.status not in ("FIXED", "NOT RUN"):  # those are counted
            problem = event.problem.removeprefix(f"{event.path}: ")
            self._line(f"{event.status:6} {event.path}{f': {problem}' if problem else ''}", "yellow")

    def _begin_slice(self, event: SliceStarted) -> None:
        if self._replayed:
            told = ", ".join(f"{count} {status}" for status, count in sorted(self._replayed.items()))
            self._line(f"saved cases replayed: {told}")
            self._replayed = {}
        self._slice_cases = 0
        if not self._out.is_terminal:
            whom = ", ".join(event.implementations) or "all implementations"
            modes = ", ".join(event.modes) if len(event.modes) < len(Mode) else "all modes"
            self._line(f"search {event.number + 1}, {_time(event.seconds)}: {modes}; {whom}")

    def _show_progress(self) -> None:
        seconds = time.monotonic() - self._began
        cases = self._cases + self._slice_cases
        rate = cases / seconds if seconds else 0.0
        told = f"{counted(cases, 'case')}, {rate:.1f}/s, {counted(len(self._paths), 'new finding')}{self._pairs}"
        if self._slice_pairs:
            told += f", {counted(self._slice_pairs, 'label pair')} in this search"
        if replaced := self._replaced + self._slice_replaced:
            told += f", {counted(replaced, 'worker')} replaced"
        if not self._out.is_terminal:
            if time.monotonic() - self._last_line > PLAIN_PROGRESS_EVERY_S:
                self._last_line = time.monotonic()
                self._line(told)
            return
        if self._progress is None:
            parts = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._progress = Progress(*parts, console=self._out, transient=True)
            self._progress.start()
            budget = self._started.budget_s if self._started is not None else None
            self._task = self._progress.add_task(told, total=budget)
        assert self._task is not None
        self._progress.update(self._task, description=told, completed=seconds)

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _end_slice(self, event: SliceFinished) -> None:
        self._cases, self._slice_cases, self._replaced = event.cases, 0, event.replaced
        self._slice_pairs = self._slice_replaced = 0
        self._pairs = f", {event.pairs} of {event.possible_pairs} label pairs"
        if not self._out.is_terminal:
            pairs = counted(event.new_pairs, "new label pair")
            self._line(f"search {event.number + 1} done: {counted(event.slice_cases, 'case')}, {pairs}")

    def _finish(self, event: CampaignFinished) -> None:
        self._end_progress()
        rows = matrix_rows(event.matrix, self._subjects.values(), tuple(self._executors), tuple(Mode))
        if len(rows) > 1:
            self._line()
            print_matrix(self._out, rows)
            for line in tally_lines(event.tally):
                self._line(line)
        if event.coverage.counts:
            self._line()
            for line in coverage_lines(event.coverage, tuple(Mode)):
                self._line(line)
        for group in event.groups:
            self._group(group)
        self._line()
        rate = event.cases / event.seconds if event.seconds else 0.0
        self._line(f"{counted(event.cases, 'case')} in {_time(event.seconds)} ({rate:.1f} cases/s), {event.stop}")
        for case in event.failing:
            self._line(f"regression {case.path} disagrees again: {case.title}", "bold red")
        for text in event.stray:
            self._line(text, "bold red")
        for text in event.expired:
            self._line(f"baseline: expired: {text}", "yellow")
        for text in event.unmatched:
            self._line(f"baseline: matches nothing: {text}", "yellow")
        for text in event.problems:
            self._line(text, "yellow")
        self._summary(event)

    def _group(self, group: Group) -> None:
        state = "accepted" if group.accepted else "fixed" if group.is_fixed else "new" if group.is_new else "known"
        self._line()
        head = f"{group.implementation} {title(group.code)}: {group.mode} {group.place}".rstrip()
        self._line(f"{head} ({state})", "bold red" if state in ("new", "known") else "yellow")
        if state == "new":
            for line in [*case_lines(group.case, group.finding.replay), *finding_lines(group.finding)]:
                self._line(f"  {line}")
        seen = f"first seen {group.first_seen}, last {group.last_seen}, in {_searches(group.seen)}"
        runs = group.reliability
        again = f"; disagreed in {runs.disagreed} of {runs.runs} runs" if runs.runs else ""
        also = f"; also in {', '.join(others)}" if (others := [it for it in group.modes if it != group.mode]) else ""
        self._line(f"  {', '.join(group.executors)}{also}; {seen}{again}")
        if group.accepted:
            self._line(f"  accepted: {group.accepted}")
        if group.instead:
            self._line(f"  its case shows {group.instead} instead now")
        if group.is_fixed and not group.instead:
            self._line(f"  it agrees now: nsa-verify corpus promote {group.path.stem}")
        else:
            self._line(f"  reproduce {reproduce(group.path, group.implementation, plan=self._plan)}")

    def _summary(self, event: CampaignFinished) -> None:
        open_groups = [it for it in event.groups if not it.accepted and not it.is_fixed]
        if open_groups:
            new = sum(it.is_new for it in open_groups)
            self._line(f"{counted(len(open_groups), 'finding')} open, {new} of them new", "bold red")
        elif not event.failing and not event.stray:
            self._line("no finding" if event.cases else "nothing was judged", "green" if event.cases else None)


def _searches(count: int) -> str:
    return "1 search" if count == 1 else f"{count} searches"


def _time(seconds: float) -> str:
    """``90 s``, ``15 min`` or ``6.0 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
