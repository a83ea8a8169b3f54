"""``--report github``: Markdown for the summary of a step of GitHub Actions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from nsa_verify.core.case import Mode
from nsa_verify.shell.coverage import coverage_lines
from nsa_verify.shell.render import counted, matrix_rows, reason_lines, tally_lines
from nsa_verify.shell.reports.story import Found, Story, environment_line, facts

MOST_BYTES: Final = 900_000
"""GitHub refuses more than 1 MiB for all that a step says."""
MOST_IN_FULL: Final = 10
"""Findings whose cases are shown; the table has more."""
MOST_ROWS: Final = 100
LONGEST_TEXT: Final = 300


def text(story: Story) -> str:
    """The summary, which is appended to what the step has said already; what would be too much is left out."""
    told = ""
    for part in _parts(story):
        if len((told + part).encode()) > MOST_BYTES:
            return told + "\nThe rest is left out: it would be more than GitHub shows.\n"
        told += part
    return told


def _parts(story: Story) -> Iterator[str]:
    yield f"\n### nsa-verify {story.kind}: {_escaped(story.headline)}\n"
    found = story.found
    if found:
        yield "\n" + _table(_finding_rows(story, found))
        if len(found) > MOST_ROWS:
            yield f"\n{counted(len(found) - MOST_ROWS, 'more finding')}.\n"
    for it in [it for it in found if it.counts][:MOST_IN_FULL]:
        yield _details(_escaped(it.headline), [*it.lines, *_reproduce(story, it)])
    if story.unknown:
        lines = [f"{it.implementation} [{it.executor}]: {it.reason}" for it in story.unknown]
        yield _details(f"{counted(story.unknown_verdicts() or len(lines), 'verdict')} unknown", lines)
    if failed := [it for it in story.replayed if it.status != "FIXED"]:
        cases = [(str(it.path), it.status, it.problem or it.title) for it in failed[:MOST_ROWS]]
        yield "\n" + _table([("saved case", "became", "why"), *cases])
    rows = matrix_rows(story.matrix, story.subjects.values(), story.executors, story.modes)
    if len(rows) > 1:
        yield "\n" + _table(rows)
        if more := [*reason_lines(story.matrix), *tally_lines(story.tally)]:
            yield _details("Why cases were not applicable, fallbacks, compilations", more)
    if story.coverage.counts:
        yield _details("Coverage", coverage_lines(story.coverage, story.modes or tuple(Mode)))
    told = [*facts(story), ("environment", environment_line(story))]
    yield _details("What it was a function of", [f"{name}: {value}" for name, value in told])


def _finding_rows(story: Story, found: Sequence[Found]) -> Iterator[tuple[str, ...]]:
    state = ("state",) if story.campaign is not None else ()
    yield (*state, "code", "implementation", "executor", "mode", "finding", "saved case")
    for it in found[:MOST_ROWS]:
        finding = it.finding
        which = (finding.code, finding.implementation, ", ".join(it.executors), finding.mode)
        yield (*((it.state,) if state else ()), *which, finding.message, str(it.path or "not saved"))


def _reproduce(story: Story, found: Found) -> list[str]:
    command = story.reproduce(found)
    return ["", command] if command else []


def _table(rows: Iterable[Sequence[str]]) -> str:
    head, *body = [[_escaped(cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _details(title: str, lines: Sequence[str]) -> str:
    """A block to unfold; ``title`` is escaped already."""
    block = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block)), default=0))
    return f"\n<details><summary>{title}</summary>\n\n{fence}text\n{block}\n{fence}\n\n</details>\n"


def _escaped(value: str) -> str:
    """``value`` on one line, as text: nothing in it is markup."""
    value = re.sub(r"[\x00-\x1f\x7f\s]+", " ", value)
    value = value if len(value) <= LONGEST_TEXT else f"{value[:LONGEST_TEXT]}..."
    return re.sub(r"[^\w\s.,;()+=-]|_", lambda found: f"&#{ord(found[0])};", value)
