"""What reports say, read back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from nsa_verify.engine.events import Event
from nsa_verify.engine.plan import Plan
from nsa_verify.shell.reports.opening import open_reports

OPEN_ENDED = {"meta", "link", "path", "rect", "line", "polyline", "polygon"}
IMPLIED = {"td", "th", "tr"}
"""Elements whose end HTML lets be left out."""


def written(events: Iterable[Event], value: str, code: int = 1, problem: str = "", plan: Plan | None = None) -> str:
    """What the report ``value``, of the form ``KIND=PATH``, says of ``events``."""
    reports = open_reports([value], plan, "nsa-verify run --seed 7", {"python": "3.x", "platform": "a place"})
    for event in events:
        reports.handle(event)
    reports.close(code, problem)
    return Path(value.partition("=")[2]).read_text(encoding="utf-8")


def lines(text: str) -> list[dict[str, Any]]:
    """The objects of a file with one on each line."""
    return [json.loads(line) for line in text.splitlines()]


def tests(text: str) -> dict[tuple[str, str], ET.Element]:
    """The test cases of a JUnit file by class name and name, after a look at its form."""
    root = ET.fromstring(text)
    assert root.tag == "testsuites"
    (suite,) = root
    assert [it.tag for it in suite] == ["properties", *["testcase"] * (len(suite) - 1)]
    cases = {(it.attrib["classname"], it.attrib["name"]): it for it in suite.iter("testcase")}
    assert len(cases) == len(suite) - 1 == int(suite.attrib["tests"])
    for kind, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        told = [it for it in cases.values() if [child.tag for child in it] == [kind]]
        assert len(told) == int(suite.attrib[attribute])
    assert all(len(it) <= 1 for it in cases.values())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
    assert float(suite.attrib["time"]) >= 0
    return cases


def result(case: ET.Element) -> str:
    """What became of a test case."""
    return case[0].tag if len(case) else "passed"


class Page(HTMLParser):
    """A page whose elements are closed in order; its text, its classes, and whatever it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.classes: set[str] = set()
        self.fetched: list[str] = []
        self.anchors: dict[str, list[str]] = {"id": [], "href": []}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Note what it says."""
        assert tag != "script"
        told = dict(attrs)
        assert not any(name.startswith("on") for name in told)
        self.classes |= {f"{tag}.{it}" for it in (told.get("class") or "").split()}
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            if (value := told.get(name)) is not None and not value.startswith("#"):
                self.fetched.append(value)
        for name, known in self.anchors.items():
            if tag in ("a", "article") and told.get(name):
                known.append(str(told[name]).removeprefix("#"))
        if tag not in OPEN_ENDED | IMPLIED:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """It must be that of the element begun last."""
        if tag not in OPEN_ENDED | IMPLIED:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text, but for that of the style sheet."""
        if "style" not in self._open:
            self.texts.append(data)
        else:
            self.fetched += [it for it in re.findall(r"url\(([^)]*)\)|@import ([^;]*)", data) if it[0][:1] != "#"]

    @property
    def text(self) -> str:
        """All of it, with spaces for whatever lies between."""
        return re.sub(r"\s+", " ", " ".join(self.texts))


def untimed(text: str) -> str:
    """Without times, and the lines of progress that only long runs have."""
    return re.sub(r"in \d+\.\d s \(.*? to start\)|^\d+ cases\n", "", text, flags=re.MULTILINE)
