"""What a run looks like: a reporter for people, and one document for programs. Neither can change the verdict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nsa_verify.core.case import Mode
from nsa_verify.engine.events import (
    CheckFailed,
    Disagreement,
    DisagreementSeen,
    Event,
    RoundFinished,
    RunFinished,
    RunStarted,
    Shrinking,
    WorkersReady,
)
from nsa_verify.shell.render import case_lines, finding_lines, json_text, matrix_rows, title

PLAIN_PROGRESS_EVERY_S = 5.0


class Reporter(Protocol):
    """Listens to the events of a run."""

    def handle(self, event: Event) -> None:
        """Take note of one event."""

    def close(self) -> None:
        """The run is over, or was broken off."""


def console(no_color: bool, stderr: bool = False) -> Console:
    """A console that wraps nothing, and colours only on a terminal."""
    made = Console(no_color=no_color or None, highlight=False, soft_wrap=True, stderr=stderr)
    if not made.is_terminal:
        made.width = 10_000
    return made


def say(out: Console, text: str = "", style: str | None = None) -> None:
    """Print one piece of text as it is: square brackets are no markup."""
    out.print(text, style=style, markup=False, emoji=False)


class TerminalReporter:
    """For people: progress, findings as they are shrunk, the matrix. On a pipe plain lines without colour."""

    def __init__(self, out: Console, modes: Sequence[Mode], references: Sequence[str]) -> None:
        self._out, self._modes, self._references = out, modes, references
        self._started: RunStarted | None = None
        self._found: list[Disagreement] = []
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = time.monotonic()

    def handle(self, event: Event) -> None:
        """Print what the event says."""
        match event:
            case RunStarted():
                self._start(event)
            case WorkersReady():
                self._begin_progress()
            case RoundFinished():
                self._advance(event)
            case DisagreementSeen():
                self._line(f"seen {event.signature}: {event.finding.message}", "yellow")
            case CheckFailed():
                self._line(f"UNKNOWN {event.implementation} [{event.executor}]: {event.reason}", "red")
            case Shrinking():
                self._end_progress()
                self._line(f"shrinking {event.signature} ...")
            case Disagreement():
                self._found.append(event)
                self._show(event)
            case RunFinished():
                self._end_progress()
                self._finish(event)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._end_progress()

    def _line(self, text: str = "", style: str | None = None) -> None:
        say(self._progress.console if self._progress is not None else self._out, text, style)

    def _start(self, event: RunStarted) -> None:
        self._started = event
        self._line(f"nsa-verify {event.version} on {event.device}", "bold")
        self._line(f"seed {event.seed}; {'; '.join(f'{name} {value}' for name, value in event.options.items())}")
        given = [subject for subject in event.subjects if not subject.source.startswith("built-in")]
        self._line(f"{len(event.subjects)} implementations: {', '.join(subject.name for subject in given)}")

    def _begin_progress(self) -> None:
        if self._out.is_terminal and self._started is not None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self._out, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("cases", total=self._started.planned_cases)

    def _advance(self, event: RoundFinished) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=event.cases_done)
        elif time.monotonic() - self._last_line > PLAIN_PROGRESS_EVERY_S:
            self._last_line = time.monotonic()
            self._line(f"{event.cases_done} cases")

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show(self, found: Disagreement) -> None:
        finding = found.finding
        self._line()
        self._line(f"{finding.implementation} [{finding.executor}] {title(finding.code)}", "bold red")
        for line in case_lines(found.case, finding.replay):
            self._line(f"  {line}")
        for line in finding_lines(finding):
            self._line(f"  {line}", "red" if line.lstrip().startswith(("got", "^")) else None)
        runs = found.reliability
        how = f"minimal case, {found.probes} probes" if found.shrunk else "case as it was drawn"
        again = f"; disagreed in {runs.disagreed} of {runs.runs} further runs" if runs.runs else ""
        self._line(f"  {how}{again}{f'; {found.note}' if found.note else ''}")
        if found.path is not None:
            self._line(f"  saved     {found.path}")
            self._line(f"  reproduce {reproduce(found, self._references)}")
        else:
            self._line(f"  not saved: {found.problem}; the case itself:", "red")
            self._line(found.json)

    def _finish(self, event: RunFinished) -> None:
        assert self._started is not None
        rows = matrix_rows(event.matrix, self._started.subjects, self._modes)
        self._line()
        if self._out.is_terminal:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for name in rows[0]:
                table.add_column(name, overflow="fold")
            for row in rows[1:]:
                table.add_row(*(f"[red]{cell}[/]" if "DISAGREE" in cell or "UNKNOWN" in cell else cell for cell in row))
            self._out.print(table)
        else:
            from nsa_verify.shell.render import columns

            for line in columns(rows):
                self._line(line)
        self._line()
        rate = event.cases / event.seconds if event.seconds else 0.0
        self._line(
            f"{event.cases} cases in {event.seconds:.1f} s ({rate:.1f} cases/s), {event.stop}; digest {event.digest}"
        )
        if not event.signatures:
            self._line("no disagreement", "green" if event.cases else None)
            return
        self._line(f"{len(event.signatures)} distinct disagreements:", "bold red")
        for found in self._found:
            self._line(f"  {found.signature}  {found.path or 'NOT SAVED'}")


def reproduce(found: Disagreement, references: Sequence[str]) -> str:
    """The command that runs the saved case again."""
    given = "".join(f" --impl {reference}" for reference in references)
    return f"nsa-verify replay {found.path} --only {found.signature.implementation}{given}"


class JsonReporter:
    """One document at the end: options, matrix, findings, outcome."""

    def __init__(self, out: Console, modes: Sequence[Mode], references: Sequence[str]) -> None:
        self._out, self._modes, self._references = out, modes, references
        self._document: dict[str, Any] = {"findings": [], "unknown": []}

    def handle(self, event: Event) -> None:
        """Take the event into the document."""
        match event:
            case RunStarted():
                self._document |= msgspec.to_builtins(event)
            case Disagreement():
                saved = str(event.path) if event.path else None
                finding = msgspec.to_builtins(event.finding) | {"case": event.case, "path": saved, "note": event.note}
                finding |= {"problem": event.problem, "shrunk": event.shrunk, "reliability": event.reliability}
                finding["reproduce"] = reproduce(event, self._references) if saved else None
                self._document["findings"].append(finding)
            case CheckFailed():
                self._document["unknown"].append(event)
            case RunFinished():
                self._finish(event)
            case _:
                pass

    def close(self) -> None:
        """Print the document."""
        self._out.print(json_text(self._document), markup=False, emoji=False)

    def _finish(self, event: RunFinished) -> None:
        matrix: dict[str, Any] = {}
        for (implementation, executor, mode), cell in sorted(event.matrix.cells.items()):
            matrix.setdefault(implementation, {}).setdefault(executor, {})[str(mode)] = cell
        rate = event.cases / event.seconds if event.seconds else 0.0
        self._document |= {"matrix": matrix, "cases": event.cases, "seconds": event.seconds, "cases_per_s": rate}
        self._document |= {"stop": str(event.stop), "digest": event.digest}
