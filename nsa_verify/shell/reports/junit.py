"""``--report junit``: XML as CI servers read it, a test case per implementation, executor and mode."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element, SubElement

from msgspec import Struct

from nsa_verify.core.case import Mode
from nsa_verify.engine.events import Cell, CellKey
from nsa_verify.shell.options import ExitCode
from nsa_verify.shell.render import NOT_CAPTURABLE, cell_text
from nsa_verify.shell.reports.plain import printable
from nsa_verify.shell.reports.story import Found, Story, bug_of, facts


class Test(Struct, kw_only=True):
    """One test case. ``result`` is ``failure``, ``error``, ``skipped``, or empty: it passed."""

    group: str
    name: str
    result: str = ""
    message: str = ""
    lines: list[str] = []


def text(story: Story) -> str:
    """The document."""
    tests = list(_tests(story))
    counts = {kind: str(sum(it.result == kind for it in tests)) for kind in ("failure", "error", "skipped")}
    attributes = {
        "name": f"nsa-verify {story.kind}",
        "tests": str(len(tests)),
        "failures": counts["failure"],
        "errors": counts["error"],
    }
    root = Element("testsuites", attributes | {"time": f"{story.seconds:.3f}"})
    suite = SubElement(root, "testsuite", attributes | {"skipped": counts["skipped"], "time": f"{story.seconds:.3f}"})
    suite.set("timestamp", f"{story.began:%Y-%m-%dT%H:%M:%S}")
    properties = SubElement(suite, "properties")
    for name, value in dict([*facts(story), *story.environment.items()]).items():
        SubElement(properties, "property", {"name": printable(name), "value": printable(value)})
    for it in tests:
        case = SubElement(suite, "testcase", {"classname": printable(it.group), "name": printable(it.name)})
        if it.result:
            told = SubElement(case, it.result, {"message": printable(it.message)})
            if it.result != "skipped":
                told.set("type", "disagreement" if it.result == "failure" else "unable")
            told.text = printable("\n".join(it.lines)) or None
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _tests(story: Story) -> Iterator[Test]:
    if story.code in (ExitCode.UNABLE, ExitCode.INTERRUPTED):
        yield Test(group="nsa-verify", name=story.kind, result="error", message=story.problem or story.headline)
    yield from _replayed(story)
    found: dict[CellKey, list[Found]] = {}
    for it in story.found:
        for executor in it.executors if it.state != "fixed" else ():
            found.setdefault((it.finding.implementation, executor, it.finding.mode), []).append(it)
    for key in sorted({*story.matrix.cells, *found, *_planned(story)}):
        yield _test(story, key, found)


def _planned(story: Story) -> Iterator[CellKey]:
    """Everything that should have been run, if a run got as far as to know it."""
    for name in story.subjects if story.matrix.cells else ():
        for executor in story.executors:
            for mode in story.modes:
                yield name, executor, mode


def _test(story: Story, key: CellKey, found: dict[CellKey, list[Found]]) -> Test:
    """A finding fails the mode of its minimal case, and cases fail their own."""
    implementation, executor, mode = key
    cell = story.matrix.cells.get(key, Cell())
    test = Test(group=f"{implementation}.{executor}", name=str(Mode(mode)), message=cell_text(cell))
    here = found.get(key, [])
    others = [it for (name, by, _), its in found.items() if (name, by) == (implementation, executor) for it in its]
    if here or cell.disagree:
        about = here or others
        test.result = "failure" if not about or any(it.counts for it in about) else "skipped"
        test.message = _message(here) or f"{cell.disagree} of {cell.cases} cases disagree"
        test.lines = [line for it in here for line in _lines(story, it)]
        if not here:
            test.lines = [f"minimal case under {it.finding.mode}: {it.headline}" for it in others]
    elif cell.unknown:
        told = story.unknown
        test.result = "error"
        test.lines = [it.reason for it in told if (it.implementation, it.executor) == (implementation, executor)]
        test.message = f"{cell.unknown} of {cell.cases} verdicts are unknown"
    elif not cell.cases:
        reasons = "; ".join(cell.reasons) or ("not drawn" if not cell.not_applicable else NOT_CAPTURABLE)
        test.result, test.message = "skipped", reasons
    return test


def _message(here: list[Found]) -> str:
    if not here:
        return ""
    first = here[0]
    accepted = f"{first.state}: {first.accepted}: " if first.accepted else ""
    more = f" (and {len(here) - 1} more)" if len(here) > 1 else ""
    return f"{accepted}{first.finding.code} {first.finding.message}{more}"


def _lines(story: Story, found: Found) -> list[str]:
    """As ``run`` prints them."""
    told = [found.headline, *(f"  {line}" for line in found.lines)]
    if found.path is not None:
        return [*told, f"  saved     {found.path}", f"  reproduce {story.reproduce(found)}", ""]
    return [*told, f"  not saved: {found.problem}", ""]


def _replayed(story: Story) -> Iterator[Test]:
    """Saved cases that a campaign began with. What disagrees as it is known to is told as its group."""
    paths = {it.path for it in story.found}
    # A smaller case may have another file.
    groups = {str(bug_of(it.group)) for it in story.found if it.group is not None}
    for it in story.replayed:
        is_told = it.status == "FAILED" and (it.path in paths or it.group in groups)
        result = {"FAILED": "failure", "ERROR": "error", "NOT RUN": "skipped"}.get(it.status, "")
        result = "skipped" if is_told else result
        message = "told as a finding" if is_told else it.problem or it.title
        yield Test(group="corpus", name=str(it.path), result=result, message=message)
