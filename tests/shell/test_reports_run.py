"""``nsa-verify run --report``: every kind, of a run that finds the one bug there is."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import Result
from shell import reading
from shell.commands import invoke, written

from nsa_verify import Mode
from nsa_verify.core.labels import labels_of
from nsa_verify.engine.events import RunFinished
from nsa_verify.shell.reports.observability import PROPERTY

KINDS = ("junit", "ndjson", "json", "html", "observability", "github=summary.md")
RUN = ("run", "--impl", "mine.py", "--only", "short-top-k", "--only", "vectorized", "--executor", "eager")
FOUND = (*RUN, "-n", 40, "--seed", 5, "-w", 1)


class Written(NamedTuple):
    """A run with all reports, and one without any."""

    folder: Path
    done: Result
    plain: Result

    def text(self, name: str) -> str:
        """A report by its file's name."""
        return (self.folder / name).read_text(encoding="utf-8")


@pytest.fixture(name="told", scope="module")
def _told(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("reports")
    written(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        plain = invoke(*FOUND)
        (saved,) = folder.glob("corpus/crashing/decode/*.json")
        saved.unlink()
        return Written(folder, invoke(*FOUND, *(it for kind in KINDS for it in ("--report", kind))), plain)


def test_nothing_else_changes(told: Written) -> None:
    assert (told.done.exit_code, told.done.stderr) == (told.plain.exit_code, told.plain.stderr) == (1, "")
    assert reading.untimed(told.done.stdout) == reading.untimed(told.plain.stdout)


def test_junit_has_a_test_for_each_implementation_executor_and_mode(told: Written) -> None:
    tests = reading.tests(told.text("nsa-verify-report.xml"))
    assert set(tests) == {(f"{name}.eager", mode) for name in ("short-top-k", "vectorized") for mode in Mode}
    results = {key: reading.result(it) for key, it in tests.items()}
    assert results.pop(("short-top-k.eager", "decode")) == "failure"
    mine = {key for key in results if key[0] == "short-top-k.eager"}
    assert {results.pop(key) for key in mine} == {"skipped"}
    assert set(results.values()) == {"passed"}


def test_junit_says_what_run_prints(told: Written) -> None:
    failure = reading.tests(told.text("nsa-verify-report.xml"))["short-top-k.eager", "decode"][0]
    assert failure.attrib["message"] == "NV101 nsa_cache_seqlens[0]: expected 8, got 7"
    assert failure.text is not None
    assert failure.text.rstrip() in told.done.stdout


def test_ndjson_has_a_line_for_each_event(told: Written) -> None:
    lines = reading.lines(told.text("nsa-verify-report.ndjson"))
    kinds = [it["type"] for it in lines]
    assert kinds[:3] == ["Begin", "RunStarted", "WorkersReady"]
    assert kinds[-3:] == ["Disagreement", "RunFinished", "End"]
    assert kinds.count("RoundFinished") == 4
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", it["time"]) for it in lines)
    assert [it["time"] for it in lines] == sorted(it["time"] for it in lines)
    assert lines[-1].items() >= {"exit_code": 1, "error": ""}.items()
    finding, finished = lines[-3], lines[-2]
    assert finding["finding"]["message"] == "nsa_cache_seqlens[0]: expected 8, got 7"
    assert finding["signature"]["implementation"] == "short-top-k"
    assert finished["matrix"]["short-top-k"]["eager"]["decode"]["disagree"] >= 1
    assert set(finished) - {"type", "time"} == set(RunFinished.__struct_fields__)
    assert "pictures" not in finding
    assert not any("observed" in it for it in lines)


def test_json_says_what_the_run_was(told: Written) -> None:
    document: dict[str, Any] = json.loads(told.text("nsa-verify-report.json"))
    assert document["kind"] == "run"
    assert (document["version"], document["seed"], document["exit_code"], document["error"]) == ("0.1.0", 5, 1, "")
    assert document["stop"] == "all cases were drawn"
    assert document["command"].startswith("nsa-verify")
    assert {"python", "torch", "triton", "platform", "device", "nsa-verify"} <= set(document["environment"])
    assert "torch" in document["environment"]["device"]
    (finding,) = document["findings"]
    assert (finding["code"], finding["expected"], finding["got"], finding["shrunk"]) == ("NV101", 8, 7, True)
    assert Path(told.folder, finding["path"]).is_file()
    assert document["matrix"]["short-top-k"]["eager"]["decode"]["disagree"] >= 1


def test_the_step_summary(told: Written) -> None:
    text = told.text("summary.md")
    assert text.startswith("\n### nsa-verify run: 1 distinct disagreement in 40 cases\n")
    assert (
        "| NV101 | short-top-k | eager | decode | nsa&#95;cache&#95;seqlens&#91;0&#93;&#58; expected 8, got 7 |" in text
    )
    assert "\nreplay 1 of 1: decode, bucket 1  <- disagrees\n" in text
    assert text.count("<details>") == text.count("</details>") == 4


def test_the_page_has_the_finding_drawn(told: Written) -> None:
    text = told.text("nsa-verify-report.html")
    page = reading.Page(text)
    assert len(text) < 200_000
    assert page.fetched == ["data:,"]
    assert not re.search("https?://", text)
    assert set(page.anchors["href"]) == set(page.anchors["id"]) == {"finding-1"}
    for words in (
        "1 distinct disagreement in 40 cases",
        "NV101 wrong value in the live region",
        "nsa_cache_seqlens[0]: expected 8, got 7",
        "replay 1 of 1: decode, bucket 1 <- disagrees",
        "reproduce nsa-verify replay corpus/crashing/decode/nv101-short-top-k-",
        "5 other buffers, which are as they should be",
        "disagreed in 5 of 5 further runs",
        "pairs that can be were met",
        "all cases were drawn",
        "seed 5",
    ):
        assert words in page.text, words
    assert {"td.l", "td.g", "td.x", "rect.l", "svg.squares", "svg.rates", "td.disagree", "td.agree"} <= page.classes
    assert "<tr class=got><th scope=row>got<td class='l x'>7<td" in text


def test_observations_are_of_every_case(told: Written) -> None:
    lines = reading.lines(told.text("nsa-verify-observations.jsonl"))
    cases = [it for it in lines if it["type"] == "test_case"]
    assert len(cases) == 40
    assert {it["property"] for it in lines} == {PROPERTY}
    assert len({it["run_start"] for it in lines}) == 1
    failed = [it for it in cases if it["status"] == "failed"]
    assert {it["status_reason"] for it in failed} == {"short-top-k [eager] NV101"}
    assert {it["status"] for it in cases} == {"failed", "passed"}
    document = json.loads(told.text("nsa-verify-report.json"))
    assert len(failed) == document["matrix"]["short-top-k"]["eager"]["decode"]["disagree"]
    (alert,) = [it for it in lines if it["type"] == "alert"]
    assert alert["title"] == "short-top-k [eager] NV101 wrong value in the live region"
    assert [it["type"] for it in lines][-1] == "info"


def test_features_are_labels(told: Written) -> None:
    import msgspec

    from nsa_verify import Case

    for it in reading.lines(told.text("nsa-verify-observations.jsonl"))[:10]:
        case = msgspec.convert(it["arguments"]["case"], Case)
        features = {f"{name}:{value}" for name, values in it["features"].items() for value in values.split(", ")}
        assert features == labels_of(case)


def test_reports_change_nothing_of_what_is_drawn(told: Written) -> None:
    digests = [re.findall("digest ([0-9a-f]{16})", it.stdout) for it in (told.done, told.plain)]
    assert digests[0] == digests[1] != []


def test_with_workers_and_an_agreement(folder: Path) -> None:
    done = invoke("run", "--only", "vectorized", "-n", 20, "--seed", 1, "-w", 2, *reports("html", "junit", "json"))
    assert (done.exit_code, done.stderr) == (0, "")
    page = reading.Page((folder / "nsa-verify-report.html").read_text())
    assert "no disagreement in 20 cases" in page.text
    assert "Findings" not in page.text
    tests = reading.tests((folder / "nsa-verify-report.xml").read_text())
    assert {reading.result(it) for key, it in tests.items() if key[0] == "vectorized.eager"} == {"passed"}


def reports(*kinds: str) -> list[str]:
    """The options for ``kinds``."""
    return [it for kind in kinds for it in ("--report", kind)]


def test_a_death_has_no_picture(folder: Path) -> None:
    mine = written(folder)
    mine.write_text(mine.read_text().replace("    lens =", "    import os\n    os._exit(3)\n    lens ="))
    done = invoke(*RUN, "-n", 5, "--seed", 1, "-w", 1, "--mode", "decode", *reports("html", "junit"))
    assert done.exit_code == 1
    page = reading.Page((folder / "nsa-verify-report.html").read_text())
    assert "NV401 the implementation killed its process" in page.text
    assert not {"svg.squares", "table.cells"} & page.classes
    (failed,) = [it for it in reading.tests((folder / "nsa-verify-report.xml").read_text()).values() if len(it)]
    assert failed[0].attrib["message"].startswith("NV401 ")


def test_what_is_not_shrunk_has_the_cells_around_the_difference(folder: Path) -> None:
    written(folder)
    done = invoke(*FOUND, "--no-shrink", *reports("html"))
    assert done.exit_code == 1
    page = reading.Page((folder / "nsa-verify-report.html").read_text())
    assert "at the first difference" in page.text
    assert "td.x" in page.classes
    assert "svg.squares" not in page.classes


def test_a_run_that_cannot_begin_is_told_too(folder: Path) -> None:
    done = invoke("run", "--only", "warp", "-w", 1, *reports("html", "junit", "json", "ndjson", "github=x.md"))
    assert done.exit_code == 2
    sentence = done.stderr.removeprefix("Error: ").rstrip()
    error = reading.tests((folder / "nsa-verify-report.xml").read_text())["nsa-verify", "run"]
    assert (reading.result(error), error[0].attrib["message"]) == ("error", sentence)
    document = json.loads((folder / "nsa-verify-report.json").read_text())
    assert (document["exit_code"], document["error"], document["stop"]) == (2, sentence, None)
    last = reading.lines((folder / "nsa-verify-report.ndjson").read_text())[-1]
    assert (last["type"], last["exit_code"], last["error"]) == ("End", 2, sentence)
    assert "--only warp: no such implementation" in reading.Page((folder / "nsa-verify-report.html").read_text()).text
    assert "could not do its job" in (folder / "x.md").read_text()


def test_the_summary_is_appended_to_what_the_step_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = folder / "step.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    done = invoke("run", "--only", "vectorized", "-n", 2, "--seed", 1, "-w", 1, *reports("github"))
    assert done.exit_code == 0
    assert summary.read_text().startswith("before\n\n### nsa-verify run: no disagreement in 2 cases\n")
    assert os.listdir(folder) == ["step.md"]
