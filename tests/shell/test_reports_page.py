"""The HTML page: what is drawn, what is cut, and that nothing in it is taken for markup."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from msgspec.structs import replace
from shell import reading
from shell.campaigns import POISON, disagreement, finding, picture, run_events

from nsa_verify.core.findings import Code, Square
from nsa_verify.engine.events import Disagreement, Event, RunFinished, RunStarted
from nsa_verify.shell.reports import html
from nsa_verify.shell.reports.drawing import draw
from nsa_verify.shell.reports.rates import chart

HOSTILE = "</script><img src=x onerror=alert(1)>\"'`{{ 76543 * 97 }}\x00\x1b[31m\u202e\ud800 &amp;"


def _page(events: list[Event], problem: str = "") -> tuple[str, reading.Page]:
    text = reading.written(events, "html=page.html", problem=problem)
    assert "http://" not in text
    assert "https://" not in text
    return text, reading.Page(text)


def test_every_kind_of_cell_is_drawn(folder: Path) -> None:
    text, page = _page(run_events())
    for kind in ("l", "s", "f", "g", "i", "x", "p"):
        assert {f"td.{kind}", f"span.{kind}", f"rect.{kind}"} <= page.classes, kind
    style = text[text.index("<style>") : text.index("</style>")]
    used = {it.partition(".")[2] for it in page.classes} - {"legend"}
    unstyled = {it for it in used if not re.search(rf"\.{it}\b", style)}
    assert unstyled <= {"matrix"}, unstyled


def test_expected_stands_above_got(folder: Path) -> None:
    text, _ = _page(run_events())
    rows = re.findall(r"<tr class=(\w+)><th scope=row>(\w+)((?:<td class='[^']*'>[^<]*)*)", text)
    assert [(kind, name) for kind, name, _ in rows[:2]] == [("expected", "expected"), ("got", "got")]
    cells = [re.findall(r"<td class='([^']*)'>([^<]*)", row) for _, _, row in rows[:2]]
    assert cells[0] == [("l x", "8"), ("l p", "9"), ("s", "3"), ("f", "4"), ("i", "5"), ("l", "1000"), ("g", "·")]
    assert [it for _, it in cells[1]] == ["7", "poison", "3", "4", "5", "1000", "·"]


def test_a_table_is_drawn_as_squares_of_neighbours(folder: Path) -> None:
    drawn = draw(picture("page_table_1", 3, 30))
    rects = re.findall(r'<rect class="([^"]*)" x="(\d+)" y="(\d+)" width="(\d+)"', drawn.markup)
    assert rects[:6] == [
        ("l x", "0", "0", "10"),
        ("l p", "10", "0", "10"),
        ("s", "20", "0", "10"),
        ("f", "30", "0", "10"),
        ("i", "40", "0", "10"),
        ("l", "50", "0", "250"),
    ]
    assert len(rects) == 3 * 7
    assert "<th scope=col>0,0<th scope=col>0,1<th scope=col>1,0" in drawn.markup
    assert (drawn.name, drawn.notes, drawn.is_wrong) == ("page_table_1", "step 0; 6 wrong cells", True)


def test_what_is_cut_is_told(folder: Path) -> None:
    whole = picture("page_table_1", 3, 30)
    cut = replace(whole, rows=500, columns=4000, first_row=7, first_column=90)
    assert draw(cut).notes == "step 0; 6 wrong cells; rows 7 to 9 of 500; columns 90 to 120 of 4000"
    empty = draw(replace(cut, squares=(), aliases=("real_page_table",), owner="decode, bucket 4"))
    assert empty.notes == (
        "step 0; of decode, bucket 4; is real_page_table as well; 6 wrong cells; not drawn, since there was no room"
    )
    assert (empty.markup, empty.is_wrong) == ("", True)


def test_a_guard_zone_and_an_input_are_named(folder: Path) -> None:
    guard = draw(replace(picture(), kind="guard", squares=((Square("guard", POISON, 7, POISON, differs=True),),)))
    assert guard.name == "guard zone behind nsa_cache_seqlens"
    assert "<td class='g x'>poison" in guard.markup
    given = draw(replace(picture("seq_lens"), kind="input"))
    assert (given.name, given.notes) == ("input seq_lens", "step 0; in int32 words; 2 wrong cells")


@pytest.mark.parametrize("kind", ["html", "junit", "github", "json", "ndjson", "observability"])
def test_nothing_hostile_is_taken_for_markup(folder: Path, kind: str) -> None:
    told = replace(finding(HOSTILE), message=HOSTILE * 3)
    events = [_renamed(it) for it in run_events()]
    events.insert(-1, disagreement(told, path=None, problem=HOSTILE, note=HOSTILE))
    text = reading.written(events, f"{kind}=x", problem=HOSTILE)
    if kind == "html":
        page = reading.Page(text)
        assert page.fetched == ["data:,"]
        assert "</script><img src=x onerror=alert(1)>\"'`{{ 76543 * 97 }}\\x00\\x1b[31m" in page.text
        assert str(76543 * 97) not in page.text
    elif kind == "junit":
        tests = reading.tests(text)
        name = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b").replace("\ud800", "\\ud800")
        assert reading.result(tests[f"{name}.eager", "decode"]) == "failure"
    elif kind == "github":
        assert "<img" not in re.sub(r"(?s)```.*?```", "", text)
    elif kind != "json":
        assert len(reading.lines(text)) > 5


def _renamed(event: Event) -> Event:
    """With a hostile implementation beside the others."""
    if not isinstance(event, RunStarted):
        return event
    return replace(event, subjects=(*event.subjects, replace(event.subjects[0], name=HOSTILE)))


def test_ten_findings_of_the_largest_kind_are_less_than_two_megabytes(folder: Path) -> None:
    events = run_events()
    finished = events.pop()
    assert isinstance(finished, RunFinished)
    for number in range(10):
        pictures = (picture("cu_seqlens_k", 64, 90), picture("page_table_1", 64, 127))
        events.append(disagreement(finding(f"mine-{number}"), pictures=pictures))
    text, page = _page([*events, finished])
    assert 500_000 < len(text.encode()) < 2_000_000
    assert page.text.count("Its buffers are left out") >= 1
    assert len(page.anchors["id"]) == 11


def test_many_findings_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "MOST_IN_FULL", 3)
    monkeypatch.setattr(html, "MOST_LISTED", 5)
    events = run_events()
    events[-1:-1] = [disagreement(finding(f"mine-{number}", Code.POISON)) for number in range(6)]
    _, page = _page(events)
    assert "2 more are left out." in page.text
    assert "2 more findings are in the table alone." in page.text
    assert page.anchors["id"] == ["finding-1", "finding-2", "finding-3"]


def test_long_texts_are_cut(folder: Path) -> None:
    events = run_events()
    told = replace(finding("talker"), message="x" * 50_000)
    events.insert(-1, disagreement(told))
    text, page = _page(events)
    assert len(text) < 120_000
    assert "x ... (50000 characters)" in page.text


def test_a_run_without_anything(folder: Path) -> None:
    _, page = _page([], problem="it could not")
    assert "Matrix" not in page.text
    assert "Coverage" not in page.text


def test_the_chart() -> None:
    assert chart([]) == chart([(1.0, 5)]) == ""
    drawn = chart([(10.0, 100), (20.0, 400), (30.0, 400), (40.0, 500)])
    (line,) = re.findall(r'<polyline points="([^"]*)"', drawn)
    heights = [float(it.split(",")[1]) for it in line.split()]
    assert len(heights) == 8
    assert min(heights[2:4]) == heights[2] < heights[0] == heights[6] < heights[4]
    assert "seconds</text>" in drawn
    assert "hours</text>" in chart([(3600.0 * it, it) for it in range(1, 9)])
    assert "minutes</text>" in chart([(60.0 * it, it) for it in range(1, 9)])


def test_long_runs_keep_a_curve_of_few_points() -> None:
    from nsa_verify.engine.events import RoundFinished
    from nsa_verify.shell.reports.story import RATE_POINTS, Story

    story = Story(None)
    began = time.monotonic()
    for number in range(5000):
        story.handle(RoundFinished(number, 10, 10 * (number + 1), ""))
    assert RATE_POINTS / 3 < len(story.rates) <= RATE_POINTS
    assert story.rates[-1][1] == 50_000
    assert story.rates == sorted(story.rates)
    assert time.monotonic() - began < 5


def test_the_disagreement_as_it_was_told_is_not_changed(folder: Path) -> None:
    events = run_events()
    before = [it for it in events if isinstance(it, Disagreement)]
    _page(events)
    assert [it for it in events if isinstance(it, Disagreement)] == before
