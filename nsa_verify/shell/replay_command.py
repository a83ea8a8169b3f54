"""``nsa-verify replay``: run saved cases again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

import click
import msgspec
from rich.console import Console

from nsa_verify import __version__
from nsa_verify.core.findings import Outcome
from nsa_verify.core.registry import ImplementationError
from nsa_verify.core.sanitizers import Sanitizer
from nsa_verify.engine.corpus import CorpusError, scan
from nsa_verify.engine.events import Event
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.replaying import Replayed, Status, replay_saved
from nsa_verify.engine.sanitizing import Running, sanitize_saved
from nsa_verify.shell import options as opt
from nsa_verify.shell.environment import environment
from nsa_verify.shell.options import ExitCode, Unable, command_line
from nsa_verify.shell.render import case_lines, counted, finding_lines, json_text, title
from nsa_verify.shell.reporter import console, say
from nsa_verify.shell.reports.opening import GITHUB, KINDS, Filed, Reports
from nsa_verify.shell.reports.plain import plain
from nsa_verify.shell.sanitizing import Progress, interruptible, refuse

_STYLES = {Status.FIXED: "green", Status.FAILED: "bold red", Status.ERROR: "bold yellow"}
_CLEAN = "CLEAN"
"""What FIXED is called under a sanitizer, which says nothing of values."""
_MOST_LETTERS: Final = 100_000
"""Of a summary: GitHub shows 1 MiB of a step, and the weekly job's has a summary for each sanitizer."""


class _Story:
    """What became of the cases so far."""

    def __init__(self, tool: Sanitizer | None, cases: int) -> None:
        self.tool, self.cases = tool, cases
        self.began = datetime.now(UTC)
        self.device = ""
        self.results: list[Replayed] = []
        self.interrupted = False

    def word(self, status: Status) -> str:
        return _CLEAN if self.tool is not None and status is Status.FIXED else status

    @property
    def counts(self) -> dict[str, int]:
        return {self.word(status): sum(it.status is status for it in self.results) for status in Status}

    @property
    def left(self) -> int:
        return self.cases - len(self.results)

    @property
    def summary(self) -> str:
        not_judged = f"; interrupted, {self.left} not judged" if self.interrupted else ""
        return ", ".join(f"{count} {word}" for word, count in self.counts.items()) + not_judged

    @property
    def code(self) -> ExitCode:
        if self.interrupted:
            return ExitCode.INTERRUPTED
        failed = ExitCode.DISAGREE if self.counts[Status.FAILED] else ExitCode.AGREE
        return ExitCode.UNABLE if self.counts[Status.ERROR] else failed

    def document(self) -> dict[str, Any]:
        cases = [
            {
                "path": str(it.path),
                "status": self.word(it.status),
                "problem": it.problem,
                "verdicts": msgspec.to_builtins(it.verdicts, order="sorted"),
            }
            for it in self.results
        ]
        return {"cases": cases, "counts": self.counts, "not_judged": self.left, "sanitizer": self.tool}

    def lines(self, event: Replayed) -> Iterator[tuple[str, str | None]]:
        """A case as a person reads it: lines, each with its style."""
        style, word = _STYLES[event.status], self.word(event.status)
        if event.problem:
            yield f"{word:6} {event.problem}", style
            return
        judged = [verdict for verdict in event.verdicts if verdict.outcome in (Outcome.AGREE, Outcome.DISAGREE)]
        wrong = [verdict for verdict in judged if verdict.outcome is Outcome.DISAGREE]
        right = "agree" if self.tool is None else "clean"
        yield f"{word:6} {event.path} ({len(judged) - len(wrong)} of {len(judged)} {right})", style
        for verdict in wrong:
            assert event.entry is not None
            for finding in verdict.findings if self.tool is not None else verdict.findings[:1]:
                yield f"  {finding.implementation} [{finding.executor}] {title(finding.code)}", "red"
                for line in [*case_lines(event.entry.case, finding.replay), *finding_lines(finding)]:
                    yield f"    {line}", None


@click.command()
@click.argument("path", required=False)
@opt.together(opt.IMPL, opt.ONLY, opt.EXECUTOR, opt.SANITIZER, opt.DEVICE, opt.WORKERS, opt.NO_ISOLATION, opt.DEADLINE)
@opt.together(opt.MAX_MEMORY, opt.CORPUS)
@click.option(
    "--report",
    "reports",
    multiple=True,
    metavar="KIND[=PATH]",
    help="Write a report: json or github; may be repeated.",
)
@opt.together(opt.JSON, opt.NO_COLOR)
def replay(
    path: str | None,
    references: tuple[str, ...],
    only: tuple[str, ...],
    executors: tuple[str, ...],
    sanitizer: str | None,
    device: str,
    workers: str,
    no_isolation: bool,
    deadline: str,
    max_memory: str,
    corpus: str,
    reports: tuple[str, ...],
    as_json: bool,
    no_color: bool,
) -> None:
    """Run saved cases again: a file, a folder, or the whole corpus.

    FIXED: every applicable implementation agrees. FAILED: one disagrees. ERROR: the case could not be judged. The exit
    code is 2 if there is an ERROR, else 1 if there is a FAILED, else 0. With --sanitizer CLEAN stands for FIXED: the
    sanitizer has nothing to say.
    """
    tool = None if sanitizer is None else Sanitizer(sanitizer)
    if tool is not None:
        refuse(tool, device, executors, workers, no_isolation, max_memory)
    paths = _paths(Path(path if path is not None else corpus))
    plan = Plan(
        device=device,
        references=references,
        only=only,
        executors=tuple(dict.fromkeys(executors)),
        workers=opt.worker_count(workers, device, no_isolation, 1 + len(paths) // 20),
        isolate=not no_isolation,
        deadline_s=opt.seconds("--deadline", deadline),
        memory_bytes=opt.size("--max-memory", max_memory),
    )
    story = _Story(tool, len(paths))
    opened = _opened(reports, story)
    code, problem = ExitCode.UNABLE, "nsa-verify itself failed"
    try:
        problem = _run(console(no_color), plan, story, paths, as_json)
        code = ExitCode.UNABLE if problem else story.code
    finally:
        opened.close(code, problem)
    if problem:
        raise Unable(problem)
    raise SystemExit(code)


def _paths(place: Path) -> list[Path]:
    try:
        paths = list(scan(place))
    except CorpusError as error:
        raise Unable(str(error)) from error
    if not paths:
        raise Unable(f"{place}: holds no saved case; nothing was tested")
    return paths


def _run(out: Console, plan: Plan, story: _Story, paths: list[Path], as_json: bool) -> str:
    """Run the cases, each shown as it is known unless all is to be JSON; the sentence that says what stopped it."""
    from nsa_verify.device.select import DeviceError

    progress = Progress(out, story.tool)
    try:
        with interruptible(story.tool):
            for event in replay_saved(plan, paths) if story.tool is None else sanitize_saved(plan, story.tool, paths):
                if isinstance(event, Hello):
                    story.device = event.description
                elif isinstance(event, Replayed):
                    story.results.append(event)
                if isinstance(event, Running) and not as_json:
                    progress.show(event)
                elif not as_json:
                    _show(out, story, event)
    except KeyboardInterrupt:
        story.interrupted = True
    except (CorpusError, DeviceError, EngineError, ImplementationError) as error:
        return str(error)
    finally:
        progress.end()
    say(out, json_text(story.document()) if as_json else story.summary)
    return ""


def _show(out: Console, story: _Story, event: Hello | Running | Replayed) -> None:
    if isinstance(event, Hello):
        executors = ",".join(event.executors) + (f"; sanitizer {story.tool}" if story.tool is not None else "")
        say(out, f"{counted(story.cases, 'saved case')} on {event.description}; executors {executors}", "bold")
    elif isinstance(event, Replayed):
        for line, style in story.lines(event):
            say(out, line, style)


class _AtTheEnd:
    """A report that is made of the whole story."""

    def __init__(self, file: TextIO, story: _Story, text: Callable[[_Story, int, str], str]) -> None:
        self._file, self._story, self._text = file, story, text

    def handle(self, event: Event) -> None:
        """Nothing comes here: the story has it all."""

    def close(self, code: int, problem: str) -> None:
        self._file.write(self._text(self._story, int(code), problem))
        self._file.flush()


def _json(story: _Story, code: int, problem: str) -> str:
    """What ``--json`` prints, and how it came to be."""
    told = {
        "kind": "replay",
        "version": __version__,
        "command": command_line(),
        "began": story.began.isoformat(timespec="seconds"),
        "environment": environment(story.device),
        "outcome": story.summary,
        "exit_code": code,
        "error": problem,
    }
    return json_text(plain(story.document() | told)) + "\n"


def _github(story: _Story, _: int, problem: str) -> str:
    """Markdown: what came of it, and in full what is neither FIXED nor CLEAN. Only the block has text of others."""
    lines = [f"Error: {problem}"] if problem else []
    lines += [line for it in story.results if it.status is not Status.FIXED for line, _ in story.lines(it)]
    block = plain("\n".join(lines))
    left_out = "\n\nThe rest is left out: it would be more than GitHub shows.\n" if len(block) > _MOST_LETTERS else ""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block)), default=0))
    under = f" --sanitizer {story.tool}" if story.tool is not None else ""
    told = f"\n### nsa-verify replay{under}: {story.summary}\n"
    return f"{told}\n{fence}text\n{block[:_MOST_LETTERS]}\n{fence}\n{left_out}" if block else told


_REPORTS: Final = {"json": _json, "github": _github}


def _opened(values: Sequence[str], story: _Story) -> Reports:
    """What ``--report`` asks for, opened before anything is run. Raises ``Unable``; then no file is changed."""
    files: dict[str, tuple[str, str, TextIO]] = {}
    with ExitStack() as undo:
        for value in values:
            kind, _, name = value.partition("=")
            if kind not in _REPORTS:
                raise Unable(f"--report {value}: replay has no kind {kind!r}; it has {', '.join(_REPORTS)}")
            name = name or KINDS[kind].path or os.environ.get(GITHUB, "")
            if not name:
                raise Unable(f"--report {value}: {GITHUB} is not set here; name a file, as in {kind}=summary.md")
            if (place := os.path.realpath(name)) in files:
                raise Unable(f"--report {value}: another report writes to {name} already; give each its own")
            is_new = not os.path.lexists(name)
            try:
                file: TextIO = undo.enter_context(open(name, "a", encoding="utf-8", errors="backslashreplace"))
            except OSError as error:
                raise Unable(f"--report {value}: {name} cannot be written: {error.strerror}; name another") from error
            if is_new:
                undo.callback(Path(name).unlink, missing_ok=True)
            files[place] = kind, name, file
        undo.pop_all()
    reports = []
    for kind, name, file in files.values():
        if kind != "github" and os.path.isfile(name):
            file.truncate(0)
        reports.append(Filed(_AtTheEnd(file, story, _REPORTS[kind]), f"the report {kind} ({name})", file))
    return Reports(reports)
