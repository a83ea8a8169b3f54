"""What ``--report`` asks for, opened before anything is drawn; and all of it told as one reporter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple, TextIO

from msgspec.structs import replace

from nsa_verify.engine.events import Event
from nsa_verify.engine.plan import Plan
from nsa_verify.shell.environment import environment as here
from nsa_verify.shell.options import Unable
from nsa_verify.shell.pages import need
from nsa_verify.shell.reporter import Guarded, Reporter
from nsa_verify.shell.reports.ndjson import Ndjson
from nsa_verify.shell.reports.observability import Observability
from nsa_verify.shell.reports.story import Story

GITHUB: Final = "GITHUB_STEP_SUMMARY"
"""The variable in which GitHub Actions names the file that a step's summary is appended to."""


class Told(NamedTuple):
    """What a report is told before the first event."""

    plan: Plan | None
    command: str
    environment: Mapping[str, str]

    def story(self) -> Story:
        """A story of its own for a report."""
        return Story(self.plan, self.command, self.environment)


class WrittenAtTheEnd:
    """A report that is made of the whole story. Whatever was in its file is gone when the run begins."""

    def __init__(self, file: TextIO, story: Story, text: Callable[[Story], str]) -> None:
        self._file, self._story, self._text = file, story, text

    def handle(self, event: Event) -> None:
        """Take the event in."""
        self._story.handle(event)

    def close(self, code: int, problem: str) -> None:
        """Write the report."""
        self._story.close(code, problem)
        self._file.write(self._text(self._story))
        self._file.flush()


class Filed(Guarded):
    """A report whose file is closed when nothing more is written to it, for whatever reason."""

    def __init__(self, reporter: Reporter, name: str, file: TextIO) -> None:
        super().__init__(reporter, name)
        self._file = file

    def handle(self, event: Event) -> None:
        """Pass the event on."""
        super().handle(event)
        if self.failed:
            _release(self._file)

    def close(self, code: int, problem: str) -> None:
        """Pass it on."""
        super().close(code, problem)
        _release(self._file)


class Kind(NamedTuple):
    """A kind of report: the file that it goes into if none is named, and what makes it."""

    path: str
    make: Callable[[TextIO, Told], Reporter]
    needs: tuple[str, ...] = ()
    """Modules that the extra ``report`` brings."""


def _at_the_end(module: str) -> Callable[[TextIO, Told], Reporter]:
    def make(file: TextIO, told: Told) -> Reporter:
        return WrittenAtTheEnd(file, told.story(), import_module(module).text)

    return make


KINDS: Final[Mapping[str, Kind]] = {
    "junit": Kind("nsa-verify-report.xml", _at_the_end("nsa_verify.shell.reports.junit")),
    "ndjson": Kind("nsa-verify-report.ndjson", lambda file, told: Ndjson(file, told.command, told.environment)),
    "json": Kind("nsa-verify-report.json", _at_the_end("nsa_verify.shell.reports.json_summary")),
    "github": Kind("", _at_the_end("nsa_verify.shell.reports.github")),
    "html": Kind("nsa-verify-report.html", _at_the_end("nsa_verify.shell.reports.html"), ("jinja2",)),
    "observability": Kind("nsa-verify-observations.jsonl", lambda file, _: Observability(file)),
}


class Reports:
    """All reports as one. One that fails is named once on standard error, and changes neither the others nor anything
    else. ``kinds`` says which there are."""

    def __init__(self, reports: Sequence[Reporter] = (), kinds: frozenset[str] = frozenset()) -> None:
        self._reports, self.kinds = reports, kinds

    def needs(self, plan: Plan) -> Plan:
        """``plan`` for a search that tells what these reports are made of."""
        page = "html" in self.kinds
        return replace(
            plan,
            pictures=plan.pictures or page,
            coverage=plan.coverage or page,
            observe=plan.observe or "observability" in self.kinds,
        )

    def beside(self, reporter: Reporter) -> Reports:
        """These reports behind ``reporter``, which keeps its own failures to itself."""
        return Reports([reporter, *self._reports], self.kinds)

    def handle(self, event: Event) -> None:
        """Pass the event on."""
        for it in self._reports:
            it.handle(event)

    def close(self, code: int, problem: str) -> None:
        """Pass it on: reports are written now."""
        for it in self._reports:
            it.close(code, problem)


def open_reports(
    values: Sequence[str], plan: Plan | None, command: str, environment: Mapping[str, str] | None = None
) -> Reports:
    """The reports that the values of ``--report`` ask for, each ``KIND`` or ``KIND=PATH``.

    Files are created here and emptied, but for that of ``github``, to which is appended. ``plan`` says how a finding is
    reproduced, and which modes are drawn; without ``environment`` it is asked for here, and ``CampaignStarted`` adds
    its own. Raises ``Unable`` for what is asked wrongly or cannot be written; then no file is changed.
    """
    if not values:
        return Reports()
    asked = [_asked(value) for value in values]
    seen: dict[str, str] = {}
    for value, _, path in asked:
        with _refused(value, path):
            place = os.path.realpath(path)
        if place in seen:
            raise Unable(f"--report {value}: {seen[place]} writes to {path} already; give each a file of its own")
        seen[place] = value
    opened = _opened(asked, Told(plan, command, here() if environment is None else environment))
    return Reports(opened, frozenset(kind for _, kind, _ in asked))


def _asked(value: str) -> tuple[str, str, Path]:
    """The value, the kind and the path that it means."""
    kind, equals, path = value.partition("=")
    if kind not in KINDS:
        raise Unable(f"--report {value}: there is no kind {kind!r}; there are {', '.join(KINDS)}")
    if equals and not path:
        raise Unable(f"--report {value}: names no file; give one behind the =, or leave the = out")
    if not path:
        path = KINDS[kind].path or os.environ.get(GITHUB, "")
    if not path:
        raise Unable(f"--report {value}: {GITHUB} is not set here; name a file, as in --report {kind}=summary.md")
    need(f"--report {value}", *KINDS[kind].needs)
    return value, kind, Path(path)


def _opened(asked: Sequence[tuple[str, str, Path]], told: Told) -> list[Reporter]:
    """All of them, or none."""
    files: list[TextIO] = []
    with ExitStack() as undo:
        for value, _, path in asked:
            with _refused(value, path):
                new = not os.path.lexists(path)
                file = path.open("a", encoding="utf-8", errors="backslashreplace")
                undo.callback(_release, file)
                if new:
                    undo.callback(path.unlink, missing_ok=True)
                files.append(file)
        made = [_made(*it, file, told) for it, file in zip(asked, files, strict=True)]
        undo.pop_all()
    return made


def _made(value: str, kind: str, path: Path, file: TextIO, told: Told) -> Reporter:
    with _refused(value, path):
        if kind != "github" and path.is_file():
            file.truncate(0)
        return Filed(KINDS[kind].make(file, told), f"the report {kind} ({path})", file)


def _release(file: TextIO) -> None:
    with suppress(OSError):  # what could not be written was told when it was to be written
        file.close()


@contextmanager
def _refused(value: str, path: Path) -> Iterator[None]:
    """What the system says of ``path`` is one sentence about the option."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise Unable(f"--report {value}: {path} cannot be written: {why}; name another file") from error
