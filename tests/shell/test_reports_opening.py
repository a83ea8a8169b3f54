"""What ``--report`` is given wrongly, and reports that fail: neither changes what a run finds."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from msgspec.structs import replace
from shell import reading
from shell.campaigns import run_events
from shell.commands import invoke, refused, written

from nsa_verify.engine import saving
from nsa_verify.engine.corpus import Entry, load, scan
from nsa_verify.engine.events import Disagreement, Event
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.search import Keep
from nsa_verify.shell.reports import github, html, json_summary, junit, opening
from nsa_verify.shell.reports.ndjson import Ndjson
from nsa_verify.shell.reports.observability import Observability
from nsa_verify.shell.reports.story import Story

RUN = ("run", "--impl", "mine.py", "--only", "short-top-k", "--executor", "eager", "--mode", "decode")
FOUND = (*RUN, "-n", 20, "--seed", 5, "-w", 1)
SCRIPTED = ("run", "--seed", 7, "-w", 1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (["pdf"], "--report pdf: there is no kind 'pdf'; there are junit, ndjson, json, github, html, observability"),
        ([""], "--report : there is no kind ''; there are"),
        (["=x.xml"], "--report =x.xml: there is no kind ''; there are"),
        (["JUnit"], "--report JUnit: there is no kind 'JUnit'; there are"),
        (["html="], "--report html=: names no file; give one behind the =, or leave the = out"),
        (["json=."], "--report json=.: . cannot be written: Is a directory; name another file"),
        (["junit=no/where/x.xml"], "no/where/x.xml cannot be written: No such file or directory; name another file"),
        (["junit=a\0b"], "cannot be written: embedded null byte; name another file"),
        (["github"], "--report github: GITHUB_STEP_SUMMARY is not set here; name a file, as in --report github=summ"),
        (["html=x", "junit=x"], "--report junit=x: html=x writes to x already; give each a file of its own"),
        (["json=x", "json=./x"], "--report json=./x: json=x writes to x already; give each a file of its own"),
        (["ndjson=/dev/full"], "--report ndjson=/dev/full: /dev/full cannot be written: No space left on device"),
    ],
)
def test_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], sentence: str) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    options = [it for value in values for it in ("--report", value)]
    done = invoke("run", "--only", "vectorized", "-n", 2, "-w", 1, *options)
    assert sentence in refused(done)
    assert done.stdout == ""
    assert list(folder.iterdir()) == []


def test_files_stay_as_they_were_if_another_cannot_be_written(folder: Path) -> None:
    (folder / "old.xml").write_text("old")
    done = invoke("run", "--only", "vectorized", "-n", 2, "-w", 1, "--report", "junit=old.xml", "--report", "json=.")
    assert "cannot be written" in refused(done)
    assert (folder / "old.xml").read_text() == "old"


def test_jinja_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = invoke("run", "--only", "vectorized", "-n", 2, "-w", 1, "--report", "html")
    assert refused(done) == "--report html: needs jinja2, which is missing; pip install 'nsa-verify[report]'"
    assert list(folder.iterdir()) == []


def _fail(*_: object) -> Any:
    raise ValueError("cannot [write]")


@pytest.fixture(name="scripted")
def _scripted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``run`` is told what happened instead of searching; it finds, saves and reports as ever."""

    def search(_plan: Plan, keep: Keep, _version: str, _options: object, note: Keep, _left: object) -> Iterator[Event]:
        for event in run_events():
            if isinstance(event, Disagreement):
                note(event)
                yield keep(replace(event, path=None))
            else:
                yield event

    monkeypatch.setattr(saving, "search", search)


def _entry(folder: Path) -> Entry:
    """The one case that was saved, without what differs from run to run; it is gone afterwards."""
    (path,) = scan(folder / "corpus")
    entry = load(path)
    path.unlink()
    return replace(entry, provenance=replace(entry.provenance, date="", command=""))


FAILURES: dict[str, tuple[str, Any, str]] = {
    "junit": ("text", junit, "nsa-verify-report.xml"),
    "json": ("text", json_summary, "nsa-verify-report.json"),
    "github=x.md": ("text", github, "x.md"),
    "html": ("text", html, "nsa-verify-report.html"),
    "ndjson": ("close", Ndjson, "nsa-verify-report.ndjson"),
    "observability": ("handle", Observability, "nsa-verify-observations.jsonl"),
}


def _one_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *options: object) -> tuple[Result, Result]:
    """A run without reports, and one with all of them, of which ``kind`` fails; nothing else differs, but for times."""
    without = invoke(*options)
    entry = _entry(folder)
    name, owner, path = FAILURES[kind]
    monkeypatch.setattr(owner, name, _fail)
    others = [it for other in FAILURES if other != kind for it in ("--report", other)]
    done = invoke(*options, *others[:4], "--report", kind, *others[4:])
    assert (done.exit_code, without.exit_code, without.stderr) == (1, 1, "")
    said = kind.partition("=")[0]
    sentence = f"Error: the report {said} ({path}) failed (ValueError: cannot [write]); the run goes on without it\n"
    assert done.stderr == sentence
    assert _entry(folder) == entry
    for other, (_, _, file) in FAILURES.items():
        if other != kind:
            assert (folder / file).stat().st_size > 500, other
    return without, done


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_report_that_fails_changes_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, as_json: bool
) -> None:
    without, done = _one_fails(folder, monkeypatch, kind, *SCRIPTED, *(["--json"] if as_json else []))
    assert done.stdout == without.stdout
    assert len(done.stdout) > 500


def test_a_report_that_fails_while_cases_are_judged_changes_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one kind that is told of every case, in a search that is none of ours."""
    written(folder)
    without, done = _one_fails(folder, monkeypatch, "observability", *FOUND)
    assert reading.untimed(done.stdout) == reading.untimed(without.stdout)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("method", ["handle", "close"])
@pytest.mark.parametrize("error", [ValueError("planted"), SystemExit(0), OSError(28, "No space left on device")])
def test_a_story_that_fails_is_the_end_of_its_report_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Story, method, fail)
    done = invoke(*SCRIPTED, "--report", "html", "--report", "junit", "--report", "ndjson")
    assert done.exit_code == 1
    assert [it[: len("Error: the report html")] for it in done.stderr.splitlines()] == [
        "Error: the report html",
        "Error: the report junit"[: len("Error: the report html")],
    ]
    assert (folder / "nsa-verify-report.html").read_text() == ""
    assert '"type":"End"' in (folder / "nsa-verify-report.ndjson").read_text()
    assert "1 distinct disagreement:\n" in done.stdout


@pytest.mark.usefixtures("scripted")
def test_a_disk_that_is_full_at_the_end() -> None:
    done = invoke(*SCRIPTED, "--report", "junit=/dev/full")
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: the report junit (/dev/full) failed (OSError: [Errno 28] No space left on device);"
        " the run goes on without it\n"
    )


@pytest.mark.usefixtures("scripted")
def test_the_reporter_that_prints_may_fail_and_reports_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.shell.reporter import TerminalReporter

    monkeypatch.setattr(TerminalReporter, "handle", _fail)
    done = invoke(*SCRIPTED, "--report", "junit")
    assert done.exit_code == 1
    assert done.stderr == "Error: the report failed (ValueError: cannot [write]); the run goes on without it\n"
    assert '<failure message="NV101' in (folder / "nsa-verify-report.xml").read_text()


def test_a_report_goes_to_a_pipe_or_a_device(folder: Path) -> None:
    done = invoke("run", "--only", "vectorized", "-n", 2, "--seed", 1, "-w", 1, "--report", "json=/dev/null")
    assert (done.exit_code, done.stderr) == (0, "")


def test_what_an_earlier_run_wrote_is_gone_when_the_next_begins(folder: Path) -> None:
    (folder / "x.json").write_text("old" * 100_000)
    seen: list[int] = []
    reports = opening.open_reports(["json=x.json"], None, "command", {})
    seen.append((folder / "x.json").stat().st_size)
    reports.close(0, "")
    assert seen == [0]
    assert (folder / "x.json").read_text().startswith("{")


def test_without_reports_nothing_is_imported_or_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def watched(name: str, *more: Any, **how: Any) -> Any:
        assert name != "jinja2"
        return real(name, *more, **how)

    monkeypatch.setattr(builtins, "__import__", watched)
    none = opening.open_reports([], Plan(), "command")
    assert none.needs(Plan()) == Plan()
    none.close(0, "")


def test_what_reports_need_of_a_search(folder: Path) -> None:
    page = opening.open_reports(["html"], Plan(), "command", {})
    assert page.needs(Plan()) == Plan(pictures=True, coverage=True)
    page.close(0, "")
    observed = opening.open_reports(["observability"], Plan(), "command", {})
    assert observed.needs(Plan()) == Plan(observe=True)
    observed.close(0, "")
