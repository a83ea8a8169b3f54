"""``nsa-verify bench --html``: the page shows what was measured, needs nothing else, and is refused in time."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from conftest import NO_GPU
from msgspec.structs import replace
from shell.commands import invoke, refused

from nsa_verify.shell import timing_page, timing_tables
from nsa_verify.shell.options import Unable
from nsa_verify.shell.timing_charts import Chart, charts
from nsa_verify.shell.timings import EXPANSION, Compilations, Rejected, Spread, Timing, Timings

SMALL = ("bench", "--size", "2,64,20", "--mode", "decode", "-n", 20, "--repetitions", 3, "-w", 1)
TWO = ("--only", "python-loop", "--only", "vectorized")
ODD = "a$b$ <i>&核"


def timing(name: str, mode: str, size: str, node_us: float | None) -> Timing:
    """Made up: a host time of 123 us, a floor of 1 us."""
    node = None if node_us is None else Spread(node_us, 0.9 * node_us, 1.1 * node_us)
    host = Spread(123.0, 122.0, 124.0)
    return Timing(implementation=name, mode=mode, size=size, host=host, node=node, floor_us=1.0)


TIMINGS = [
    timing("python-loop", "decode", "B 2", None),
    timing("onepass", "decode", "B 2", 2.0),
    timing(ODD, "decode", "B 2", 3.0),
    timing("onepass", "target-verify", "B 2", 4.0),
    timing("onepass", "decode", "B 4", 2.0),
    timing("vectorized", "decode", "B 4", 200.0),
    timing("onepass", EXPANSION, "B 1", 1.5),
    timing("onepass", EXPANSION, "B 3", 1.5),
]


COMPILED = Compilations(
    implementation="onepass", mode="decode", steps=2, schedule=False, sizes=3, kernels=1, compilations=1
)


def page_of(timings: list[Timing], device: str) -> str:
    """As the command makes it; ``mine`` was rejected."""
    told = Timings(device="H <200>", timings=timings, rejected=[Rejected("mine", "<disagrees>")])
    told.compilations = [COMPILED]
    facts, tables = list(timing_tables.facts(told, device)), list(timing_tables.tables(told, device))
    return timing_page.page(told, device, facts, tables)


def count(chart: Chart, kind: str) -> int:
    """How many elements of one kind a chart has; it must be one well-formed element."""
    svg = ET.fromstring(f'<page xmlns:xlink="xlink">{chart.svg}</page>')[0]
    assert (svg.tag, svg.get("aria-label")) == ("svg", chart.title)
    found = svg.findall(f".//g[@class='{kind}']")
    assert all(it.find("path") is not None for it in found)
    return len(found)


def test_a_bar_for_each_device_time_and_a_floor_for_each_panel() -> None:
    found = charts(TIMINGS, on_gpu=True)
    assert [(it.title, count(it, "bar"), count(it, "spread"), count(it, "floor")) for it in found] == [
        ("B 2", 3, 3, 2),
        ("B 4", 2, 2, 1),
        (EXPANSION, 2, 2, 2),
    ]
    assert [it.svg.count(">not captured<") for it in found] == [1, 0, 0]
    assert ">2.00 (2.00x)<" in found[0].svg


def test_without_a_gpu_bars_are_host_times() -> None:
    found = charts([replace(it, node=None, floor_us=0.0) for it in TIMINGS], on_gpu=False)
    assert [(count(it, "bar"), count(it, "floor")) for it in found] == [(4, 0), (2, 0), (2, 0)]
    assert found[0].svg.count(">123<") == 4


def test_the_scale_is_logarithmic_where_it_must_be() -> None:
    assert ["logarithmic" in it.svg for it in charts(TIMINGS, on_gpu=True)] == [False, True, False]


def test_nothing_captured_is_a_chart_too() -> None:
    (found,) = charts(TIMINGS[:1], on_gpu=True)
    assert (count(found, "bar"), count(found, "floor")) == (0, 1)


def test_charts_are_the_same_every_time() -> None:
    assert charts(TIMINGS, on_gpu=True) == charts(TIMINGS, on_gpu=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_page_has_everything_and_needs_nothing(device: str) -> None:
    page = page_of(TIMINGS, device)
    for name in ("python-loop", "onepass", "vectorized", "a$b$ &lt;i&gt;&amp;核"):
        assert f'<th scope="row">{name}</th>' in page
    assert page.count("<svg ") == 3
    assert "H &lt;200&gt;" in page
    assert "mine is not timed: it &lt;disagrees&gt;" in page
    for other in ("<i>", "<200>", "<script", "http", "src=", "@import", "<link"):
        assert other not in page
    references = re.findall(r"(?:href=\"|url\()([^\")]*)", page)
    ids = re.findall(r"\bid=\"([^\"]*)", page)
    assert {it.removeprefix("#") for it in references} <= set(ids)
    assert len(ids) == len(set(ids))
    assert ("MB by extent" in page) == (device == "cuda")
    assert "<h3>compiled by Triton over all sizes, S 2</h3>" in page
    assert "<td>1 of 1 kernel, 3 sizes</td>" in page


def test_nothing_timed_is_said() -> None:
    page = page_of([], "cpu")
    assert "Nothing was timed." in page
    assert "<svg" not in page


def test_the_page_of_a_run(folder: Path) -> None:
    done = invoke(*SMALL, *TWO, "--html", "page.html")
    assert done.exit_code == 0
    page = (folder / "page.html").read_text(encoding="utf-8")
    for cell in done.stdout.splitlines()[-1].split("  "):
        assert cell.strip() in page
    assert "of 20 cases each implementation agreed on all that it runs first; seed 0" in page
    assert page.count('class="bar"') == (2 if NO_GPU else 1), "python-loop is not captured"


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_said_before_anything_is_measured(
    library: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    done = invoke(*SMALL, *TWO, "--html", "page.html")
    assert refused(done) == f"--html: needs {library}, which is missing; pip install 'nsa-verify[report]'"
    assert (done.stdout, list(folder.iterdir())) == ("", [])
    assert invoke(*SMALL, *TWO).exit_code == 0


@pytest.mark.parametrize(
    ("file", "reason"), [("missing/page.html", "No such file or directory"), (".", "Is a directory")]
)
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    file: str, reason: str, folder: Path
) -> None:
    done = invoke(*SMALL, *TWO, "--html", file)
    assert refused(done) == f"--html {file}: cannot be written ({reason})"
    assert done.stdout == ""


def test_a_look_changes_no_file(folder: Path) -> None:
    (folder / "old.html").write_text("old", encoding="utf-8")
    timing_page.check(folder / "old.html")
    timing_page.check(folder / "new.html")
    assert [it.name for it in folder.iterdir()] == ["old.html"]
    assert (folder / "old.html").read_text(encoding="utf-8") == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file here is always full")
def test_a_full_disk_is_one_sentence() -> None:
    with pytest.raises(Unable, match=r"^--html /dev/full: cannot be written \(No space left on device\)$"):
        timing_page.write(Path("/dev/full"), "page")
