"""What a run looks like: a reporter for people, and one document for programs. Neither can change the verdict."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nsa_verify.core.findings import Outcome
from nsa_verify.engine.events import (
    CheckFailed,
    Disagreement,
    DisagreementSeen,
    Event,
    Exchanged,
    Recovered,
    RoundFinished,
    RunFinished,
    RunStarted,
    Shrinking,
    WorkersReady,
)
from nsa_verify.engine.plan import Plan
from nsa_verify.shell.coverage import coverage_lines
from nsa_verify.shell.render import (
    NOT_CAPTURABLE,
    case_lines,
    columns,
    counted,
    finding_lines,
    how_it_was_got,
    json_text,
    matrix_rows,
    reason_lines,
    reproduce,
    tally_lines,
    title,
)
from nsa_verify.shell.reports.json_summary import document
from nsa_verify.shell.reports.story import Story

PLAIN_PROGRESS_EVERY_S = 5.0


class Reporter(Protocol):
    """Listens to the events of a run."""

    def handle(self, event: Event) -> None:
        """Take note of one event."""

    def close(self, code: int, problem: str) -> None:
        """The run is over with this exit code; ``problem`` is the sentence that says what stopped it, or ``""``."""


class Guarded:
    """Keeps what goes wrong in a reporter away from the run: it is said once, and the run goes on without a report."""

    def __init__(self, reporter: Reporter, name: str = "the report") -> None:
        self._reporter: Reporter | None = reporter
        self._name = name

    @property
    def failed(self) -> bool:
        """Whether it is told nothing any more."""
        return self._reporter is None

    def handle(self, event: Event) -> None:
        """Pass the event on."""
        self._attempt(lambda reporter: reporter.handle(event))

    def close(self, code: int, problem: str) -> None:
        """Pass it on."""
        self._attempt(lambda reporter: reporter.close(code, problem))

    def _attempt(self, tell: Callable[[Reporter], None]) -> None:
        if self._reporter is None:
            return
        try:
            tell(self._reporter)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a report must not change a verdict
            self._reporter = None
            sentence = f"Error: {self._name} failed ({type(error).__name__}: {error}); the run goes on without it"
            click.echo(sentence, err=True)


class GuardedReporter(Guarded):
    """The same for the reporter that prints, in whose place an unsaved case must be printed when it fails."""

    def handle(self, event: Event) -> None:
        """Pass the event on. A case that could not be saved is printed here if there is no report to be in."""
        super().handle(event)
        if self.failed and isinstance(event, Disagreement) and event.json:
            click.echo(event.json, err=True)


class QuietPipeConsole(Console):
    """A console whose reader may go away, as in ``nsa-verify run | head``: it falls silent, all else goes on."""

    def on_broken_pipe(self) -> None:
        """Be silent from now on."""
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())


def console(no_color: bool, stderr: bool = False) -> Console:
    """A console that wraps nothing, and colours only on a terminal."""
    made = QuietPipeConsole(no_color=no_color or None, highlight=False, soft_wrap=True, stderr=stderr)
    if not made.is_terminal:
        made.width = 10_000
    return made


def say(out: Console, text: str = "", style: str | None = None) -> None:
    """Print one piece of text as it is: square brackets are no markup."""
    out.print(text, style=style, markup=False, emoji=False)


class TerminalReporter:
    """For people: progress, findings as they are shrunk, the matrix. On a pipe plain lines without colour."""

    def __init__(self, out: Console, plan: Plan) -> None:
        self._out, self._plan = out, plan
        self._started: RunStarted | None = None
        self._found: list[Disagreement] = []
        self._unknown: set[tuple[str, str, str]] = set()
        self._start_up_s = 0.0
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = time.monotonic()

    def handle(self, event: Event) -> None:
        """Print what the event says."""
        match event:
            case RunStarted():
                self._start(event)
            case WorkersReady():
                self._start_up_s = event.seconds
                self._begin_progress()
            case Recovered():
                self._recovered(event)
            case Exchanged():
                self._exchanged(event)
            case RoundFinished():
                self._advance(event)
            case DisagreementSeen():
                self._line(f"seen {event.signature}: {event.finding.message}", "yellow")
            case CheckFailed():
                self._check_failed(event)
            case Shrinking():
                self._end_progress()
                self._line(f"shrinking {event.signature} ...")
            case Disagreement():
                self._found.append(event)
                self._show(event)
            case RunFinished():
                self._end_progress()
                self._finish(event)

    def close(self, code: int, problem: str) -> None:  # noqa: ARG002 - both are on standard error
        """Leave the terminal as it was."""
        self._end_progress()

    def _line(self, text: str = "", style: str | None = None) -> None:
        say(self._progress.console if self._progress is not None else self._out, text, style)

    def _start(self, event: RunStarted) -> None:
        self._started = event
        self._line(f"nsa-verify {event.version} on {event.device}", "bold")
        self._line(f"seed {event.seed}; {'; '.join(f'{name} {value}' for name, value in event.options.items())}")
        names = [subject.name for subject in event.subjects]
        self._line(f"{counted(len(names), 'implementation')}: {', '.join(names)}")

    def _recovered(self, event: Recovered) -> None:
        for path in event.saved:
            self._line(f"recovered {path}: an earlier run reported it and was killed", "yellow")
        if event.judged:
            self._line(f"recovered {counted(event.judged, 'case')} in flight when a run was killed: judged again first")
        if event.waiting:
            missing = ", ".join(event.missing)
            self._line(
                f"{counted(event.waiting, 'case')} in flight when a run was killed: waiting for {missing} (--impl)"
            )
        for problem in (*event.problems, *event.unsaved):
            self._line(problem, "yellow")

    def _exchanged(self, event: Exchanged) -> None:
        done = {"taken": len(event.taken), "sent": event.sent, "removed": event.removed}
        if any(done.values()):
            told = ", ".join(f"{counted(count, 'case')} {what}" for what, count in done.items() if count)
            self._line(f"database {event.database}: {told}")
        if event.unreadable:
            values = counted(event.unreadable, "value")
            self._line(f"{values} of the database cannot be read and stay there: {event.example}", "yellow")
        if event.problem:
            waiting = f"; {counted(event.waiting, 'case')} still to be sent" if event.waiting else ""
            times = f" ({counted(event.failures, 'failure')} so far)" if event.failures > 1 else ""
            self._line(f"database {event.problem}{times}{waiting}", "yellow")

    def _begin_progress(self) -> None:
        if self._out.is_terminal and self._started is not None:
            parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*parts, console=self._out, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("cases", total=self._started.planned_cases)

    def _advance(self, event: RoundFinished) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=event.cases_done)
        elif time.monotonic() - self._last_line > PLAIN_PROGRESS_EVERY_S:
            self._last_line = time.monotonic()
            self._line(counted(event.cases_done, "case"))

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _check_failed(self, event: CheckFailed) -> None:
        key = (event.implementation, event.executor, event.reason)
        if key not in self._unknown:
            self._unknown.add(key)
            self._line(f"UNKNOWN {event.implementation} [{event.executor}]: {event.reason}", "red")
            for line in case_lines(event.case):
                self._line(f"  {line}")

    def _show(self, found: Disagreement) -> None:
        finding = found.finding
        self._line()
        self._line(f"{finding.implementation} [{finding.executor}] {title(finding.code)}", "bold red")
        for line in case_lines(found.case, finding.replay):
            self._line(f"  {line}")
        for line in finding_lines(finding):
            self._line(f"  {line}", "red" if line.lstrip().startswith(("got", "^")) else None)
        self._line(f"  {how_it_was_got(found)}")
        if found.path is not None:
            command = reproduce(found.path, finding.implementation, finding.executor, self._plan)
            self._line(f"  saved     {found.path}")
            self._line(f"  reproduce {command}")
        else:
            self._line(f"  not saved: {found.problem}; the case itself:", "red")
            self._line(found.json)

    def _finish(self, event: RunFinished) -> None:
        assert self._started is not None
        started = self._started
        rows = matrix_rows(event.matrix, started.subjects, started.executors, self._plan.modes)
        if len(rows) > 1:
            self._line()
            print_matrix(self._out, rows)
            for line in [*reason_lines(event.matrix), *tally_lines(event.tally)]:
                self._line(line)
        if self._plan.coverage and event.cases:
            self._line()
            for line in coverage_lines(event.coverage, self._plan.modes):
                self._line(line)
        self._line()
        rate = event.cases / event.seconds if event.seconds else 0.0
        self._line(
            f"{counted(event.cases, 'case')} in {event.seconds:.1f} s ({rate:.1f} cases/s,"
            f" after {self._start_up_s:.1f} s to start), {event.stop}; digest {event.digest}"
        )
        if event.replaced:
            self._line(
                f"{counted(event.replaced, 'worker')} died and {'was' if event.replaced == 1 else 'were'} replaced"
            )
        unknown = event.matrix.total(Outcome.UNKNOWN)
        if unknown:
            self._line(f"{counted(unknown, 'verdict')} unknown", "bold red")
        if not event.signatures:
            if not unknown:
                self._line("no disagreement" if event.cases else "nothing was judged", "green" if event.cases else None)
            return
        self._line(f"{counted(len(event.signatures), 'distinct disagreement')}:", "bold red")
        for found in sorted(self._found, key=lambda it: it.signature):
            self._line(f"  {found.signature}  {found.path or 'NOT SAVED'}")


def print_matrix(out: Console, rows: Sequence[Sequence[str]]) -> None:
    """The rows of ``matrix_rows``: a table on a terminal, plain lines elsewhere."""
    if not out.is_terminal:
        for line in columns(rows):
            say(out, line)
        return
    # A table, because on a narrow terminal it folds its cells; Text, because square brackets are no markup.
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        table.add_column(Text(name), overflow="fold", min_width=len(name))
    for row in rows[1:]:
        table.add_row(*(Text(cell, _cell_style(cell)) for cell in row))
    out.print(table)


def _cell_style(cell: str) -> str:
    if "DISAGREE" in cell or "UNKNOWN" in cell:
        return "red"
    return "dim" if cell == NOT_CAPTURABLE else ""


class JsonReporter:
    """One document at the end: options, matrix, findings, outcome. ``replay`` counts from 0 there."""

    def __init__(self, out: Console, plan: Plan) -> None:
        self._out, self._story = out, Story(plan)

    def handle(self, event: Event) -> None:
        """Take the event into the document."""
        self._story.handle(event)

    def close(self, code: int, problem: str) -> None:
        """Print the document."""
        self._story.close(code, problem)
        say(self._out, json_text(document(self._story)))
