"""Reports of a campaign, from events made by hand: groups, what is accepted, saved cases, searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shell import reading
from shell.campaigns import campaign_events, finding, group

from nsa_verify.core.findings import Code
from nsa_verify.engine.events import CampaignFinished, Event, RoundFinished
from nsa_verify.engine.plan import Plan
from nsa_verify.shell.reports.observability import PROPERTY

PLAN = Plan(references=("mine.py",), device="cpu")
ACCEPTED = group(finding("patient", Code.STALE), accepted="known since spring", is_new=False)
KNOWN = group(finding("known-one", Code.POISON), is_new=False)
FIXED = group(finding("mended"), is_fixed=True, is_new=False)


@pytest.fixture(name="events", scope="module")
def _events() -> list[Event]:
    return campaign_events(ACCEPTED, KNOWN, FIXED)


def test_junit(folder: Path, events: list[Event]) -> None:
    tests = reading.tests(reading.written(events, "junit=x.xml", plan=PLAN))
    results = {key: reading.result(it) for key, it in tests.items()}
    assert results["mine.eager", "decode"] == results["mine.graph", "decode"] == "failure"
    assert results["known-one.eager", "decode"] == "failure"
    assert results["patient.eager", "decode"] == "skipped"
    assert tests["patient.eager", "decode"][0].attrib["message"].startswith("accepted: known since spring: NV102 ")
    assert ("mended.eager", "decode") not in results
    assert results["good.eager", "decode"] == "passed"
    assert results["good.graph", "decode"] == "error"
    assert results["good.eager", "draft-extend"] == "skipped"
    saved = {name: result for (kind, name), result in results.items() if kind == "corpus"}
    assert saved == {
        "corpus/regression/good.json": "passed",
        "corpus/regression/bad.json": "failure",
        "corpus/regression/odd.json": "error",
    }
    text = tests["mine.eager", "decode"][0].text
    assert text is not None
    assert "  reproduce nsa-verify replay corpus/crashing/decode/NV101-mine.json --only mine --impl mine.py" in text


def test_junit_of_what_is_accepted_alone_is_green(folder: Path) -> None:
    events = [it for it in campaign_events(ACCEPTED) if getattr(it, "status", "FIXED") == "FIXED"]
    finished = events[-1]
    assert isinstance(finished, CampaignFinished)
    matrix = {key: cell for key, cell in finished.matrix.cells.items() if key[0] == "patient"}
    finished.matrix.cells.clear()
    finished.matrix.cells.update(matrix)
    events[-1] = _with(finished, groups=(ACCEPTED,), failing=())
    tests = reading.tests(reading.written(events, "junit=x.xml", code=0, plan=PLAN))
    assert {reading.result(it) for it in tests.values()} == {"skipped", "passed"}


def _with(finished: CampaignFinished, **more: object) -> CampaignFinished:
    from msgspec.structs import replace

    return replace(finished, **more)


def test_json(folder: Path, events: list[Event]) -> None:
    told: dict[str, Any] = json.loads(reading.written(events, "json=x.json", plan=PLAN))
    assert (told["kind"], told["seed"], told["stop"], told["exit_code"]) == ("fuzz batch", 5, "the time was up", 1)
    assert (told["cases"], told["seconds"], told["cases_per_s"], told["replaced"]) == (40, 10.0, 4.0, 1)
    assert told["outcome"] == "2 open findings, 1 new, 1 regression case disagreeing again, 1 accepted, in 40 cases"
    assert [(it["implementation"], it["state"]) for it in told["findings"]] == [
        ("mine", "new"),
        ("known-one", "known"),
        ("patient", "accepted"),
        ("mended", "fixed"),
    ]
    first = told["findings"][0]
    assert (first["first_seen"], first["seen"]) == ("2030-01-02T03:04:05+00:00", 7)
    assert first["reliability"] == {"disagreed": 4, "runs": 5}
    assert first["reproduce"] == (
        "nsa-verify replay corpus/crashing/decode/NV101-mine.json --only mine --impl mine.py --device cpu"
    )
    assert [it["number"] for it in told["slices"]] == [3, 4]
    assert [it["status"] for it in told["replayed"]] == ["FIXED", "FAILED", "ERROR"]
    assert (told["earlier_slices"], told["corpus"]) == (3, "corpus")
    assert told["matrix"]["mine"]["eager"]["decode"]["disagree"] == 4


def test_ndjson_has_all_events(folder: Path, events: list[Event]) -> None:
    lines = reading.lines(reading.written(events, "ndjson=x.ndjson", plan=PLAN))
    assert [it["type"] for it in lines] == ["Begin", *(type(it).__name__ for it in events), "End"]
    finished = lines[-2]
    assert finished["groups"][1]["accepted"] == "known since spring"
    assert finished["coverage"]["mode:decode"] == 1
    assert finished["coverage"]["mode:decode & padding:none"] == 1


def test_ndjson_is_there_while_the_campaign_runs(folder: Path, events: list[Event]) -> None:
    from nsa_verify.shell.reports.opening import open_reports

    reports = open_reports(["ndjson=x.ndjson"], None, "command", {})
    for number, event in enumerate(events, 1):
        reports.handle(event)
        assert (folder / "x.ndjson").read_text().count("\n") == number + 1
    reports.close(0, "")


def test_ndjson_of_a_night_is_not_a_line_for_every_round(
    folder: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_verify.shell.reports.ndjson.ROUNDS", 2)
    lines = reading.lines(reading.written(events, "ndjson=x.ndjson", plan=PLAN))
    others = [type(it).__name__ for it in events if not isinstance(it, RoundFinished)]
    assert sum(isinstance(it, RoundFinished) for it in events) == 4
    assert [it["type"] for it in lines if it["type"] != "RoundFinished"] == ["Begin", *others, "End"]
    assert sum(it["type"] == "RoundFinished" for it in lines) == 2


def test_the_page_has_the_groups(folder: Path, events: list[Event]) -> None:
    page = reading.Page(reading.written(events, "html=x.html", plan=PLAN))
    for words in (
        "2 open findings, 1 new, 1 regression case disagreeing again, 1 accepted, in 40 cases",
        "first 2030-01-02 03:04:05 UTC, last 2030-02-03 04:05:06 UTC, in 7 searches",
        "disagreed in 4 of 5 further runs",
        "accepted known since spring",
        "reproduce nsa-verify replay corpus/crashing/decode/NV101-mine.json --only mine",
        "Baseline: expired: mine NV102 (later; 2020-01-01)",
        "Baseline: matches nothing: gone (never)",
        "corpus/regression/bad.json FAILED was mended once",
        "1 of 3 agree.",
        "good [graph]: the check itself failed: it is <wrong>",
        "38 agree, 2 UNKNOWN",
        "40 cases, 4.0 a second on average",
        "workers 2, 1 died and replaced",
    ):
        assert words in page.text, words
    assert page.anchors["id"] == [f"finding-{number}" for number in range(1, 5)]
    assert {"svg.squares", "svg.rates", "span.tag"} <= page.classes


def test_the_step_summary(folder: Path, events: list[Event]) -> None:
    text = reading.written(events, "github=x.md", plan=PLAN)
    assert text.startswith("\n### nsa-verify fuzz batch: 2 open findings, 1 new,")
    assert "| accepted | NV102 | patient | eager, graph | decode |" in text
    assert "corpus&#47;regression&#47;bad.json | FAILED | was mended once |" in text


def test_observations(folder: Path, events: list[Event]) -> None:
    lines = reading.lines(reading.written(events, "observability=x.jsonl", plan=PLAN))
    statuses = [it["status"] for it in lines if it["type"] == "test_case"]
    assert statuses == ["failed", "failed", "gave_up"] * 4
    assert {it["property"] for it in lines} == {PROPERTY}
    assert {it["type"] for it in lines} == {"test_case", "alert", "error", "info"}
    assert lines[0]["timing"] == {"generate:case": 0.1, "execute:test": 0.3}


def test_a_campaign_that_was_cut_short_tells_what_its_searches_found(folder: Path, events: list[Event]) -> None:
    told: dict[str, Any] = json.loads(reading.written(events[:-1], "json=x.json", 130, "interrupted twice", PLAN))
    assert (told["exit_code"], told["error"]) == (130, "interrupted twice")
    assert [it["implementation"] for it in told["findings"]] == ["mine"]
    tests = reading.tests(reading.written(events[:-1], "junit=x.xml", 130, "interrupted twice", PLAN))
    assert reading.result(tests["mine.eager", "decode"]) == "failure"
    assert reading.result(tests["nsa-verify", "fuzz batch"]) == "error"
    page = reading.Page(reading.written(events[:-1], "html=x.html", 130, "interrupted twice", PLAN))
    assert "interrupted after 40 cases" in page.text
