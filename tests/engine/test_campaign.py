"""Campaigns in one process: what is a group, what makes one red, and what it says of what it could not do."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from engine.corpora import entry_of, saved
from msgspec.structs import replace
from shell.commands import graph_executor, registry_of_its_own

from nsa_verify.core.case import Mode
from nsa_verify.engine.campaign import BATCH, CHANGE, NOT_RUN, campaign
from nsa_verify.engine.corpus import Kind, load, scan
from nsa_verify.engine.events import CampaignFinished, CaseReplayed, Disagreement, Event, SliceStarted
from nsa_verify.engine.inflight import FOLDER
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.search import search
from nsa_verify.engine.totals import Ask
from nsa_verify.engine.triage import Accepted, Baseline

WRONG = """
from nsa_verify import Mode, implementation
from nsa_verify.kernels.vectorized import refresh as right

@implementation("{name}", extent="full", capturable={capturable})
def refresh(inputs, steps, setup):
    right(inputs, steps, setup)
    if {condition}:
        steps[0].page_table_1[:1, :1].add_(1)
"""
DECODE_ALONE = "inputs.mode is Mode.DECODE and inputs.batch_size > 1"
VERIFY_ALONE = "inputs.mode is Mode.TARGET_VERIFY and setup.num_draft_tokens > 1"
ROWS = "(inputs.mode is not Mode.DRAFT_EXTEND or int(inputs.accept_lens[: inputs.batch_size].sum()) > 0)"
"""Without a row there is nothing that may be written: that would be another finding."""
ALL_MODES = f"setup.page_size > 1 and {ROWS}"


def asked(folder: Path, condition: str, name: str = "wrong", capturable: object = True, **more: Any) -> Ask:
    path = folder / f"{name}.py"
    path.write_text(WRONG.format(name=name, condition=condition, capturable=capturable), encoding="utf-8")
    plan = Plan(references=(str(path),), only=(name,), executors=("eager",), seed=3, isolate=False)
    return replace(Ask(kind=BATCH, plan=plan, root=folder / "corpus", budget_s=1, version="1", command=""), **more)


def run(ask: Ask) -> tuple[CampaignFinished, list[Event]]:
    with registry_of_its_own():
        told = list(campaign(ask))
    assert isinstance(told[-1], CampaignFinished)
    return told[-1], told


def run_until(ask: Ask, *modes: tuple[Mode, ...]) -> CampaignFinished:
    """Campaigns over one corpus, as many as a slow machine needs to have seen these ``modes`` of its groups."""
    for _ in range(20):
        ended, _ = run(ask)
        if [it.modes for it in ended.groups] == [*modes]:
            break
    return ended


def test_two_bugs_of_one_place_in_two_modes_are_two_groups(tmp_path: Path) -> None:
    ask = asked(tmp_path, f"({DECODE_ALONE}) or ({VERIFY_ALONE})")
    ended = run_until(ask, (Mode.DECODE,), (Mode.TARGET_VERIFY,))
    assert [(str(it.mode), it.place, it.modes) for it in ended.groups] == [
        ("decode", "page_table_1 inside", (Mode.DECODE,)),
        ("target-verify", "page_table_1 inside", (Mode.TARGET_VERIFY,)),
    ]
    assert len(list(scan(ask.root / Kind.CRASHING))) == 2


def test_one_bug_in_all_modes_is_one_group_whichever_search_meets_it(tmp_path: Path) -> None:
    ask = asked(tmp_path, ALL_MODES)
    for modes in ((Mode.TARGET_VERIFY,), tuple(Mode)):
        ended = run_until(replace(ask, plan=replace(ask.plan, modes=modes)), modes)
        (group,) = ended.groups
        assert (group.mode, group.modes) == (Mode.TARGET_VERIFY, modes)
        assert len(list(scan(ask.root / Kind.CRASHING))) == 1
        assert ended.exit_code == 1
    assert not group.is_new


RAGGED_MORE = f"{ROWS} and (inputs.mode is Mode.DRAFT_EXTEND or inputs.batch_size > 1)"
"""In draft-extend a request alone shows it; the smallest case of another mode shows it there too."""


@pytest.mark.parametrize("first", [Mode.DRAFT_EXTEND, Mode.TARGET_VERIFY])
def test_a_mode_that_cannot_be_captured_tells_of_what_graphs_show_elsewhere(tmp_path: Path, first: Mode) -> None:
    """One bug: seen in draft-extend, which is run eagerly alone, and in graphs that hold no draft-extend."""
    ask = asked(tmp_path, RAGGED_MORE, capturable="[Mode.TARGET_VERIFY]")
    ask = replace(ask, plan=replace(ask.plan, executors=("eager", graph_executor())))
    for modes in ((first,), (Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND)):
        seen = tuple(it for it in Mode if it in modes)
        (group,) = run_until(replace(ask, plan=replace(ask.plan, modes=modes)), seen).groups
        assert group.mode is first
        if Mode.TARGET_VERIFY in seen:
            assert group.executors == ("eager", graph_executor())
    assert len(list(scan(ask.root / Kind.CRASHING))) == 1


def test_only_executors_that_were_asked_for_tell_of_what_is_found(tmp_path: Path) -> None:
    """Others may be what an implementation does not survive."""
    ask = asked(tmp_path, RAGGED_MORE, capturable="[Mode.TARGET_VERIFY]")
    plan = replace(ask.plan, modes=(Mode.TARGET_VERIFY,), executors=(graph_executor(),), detail=True, max_examples=20)
    for besides, modes in ((), {"target-verify"}), (("eager",), {*Mode}):
        with registry_of_its_own():
            told = list(search(replace(plan, besides=besides), lambda found: found, "1", {}))
        (found,) = (it for it in told if isinstance(it, Disagreement))
        assert {it.split()[1] for it in found.symptoms} == modes


LENGTHS = "steps[0].cache_seqlens[:1].add_(1)"
SLOTS = "steps[0].page_table_1[:1, :1].add_(7)"
ACCEPTS = Accepted(
    implementation="wrong", code="NV101", mode="decode", place="cache_seqlens inside", reason="r", expires=date.max
)


def broken(folder: Path, *faults: str, **more: Any) -> Ask:
    """A campaign over an implementation with these faults, in whatever has a request."""
    ask = asked(folder, "inputs.batch_size", budget_s=0.5, **more)
    (path,) = map(Path, ask.plan.references)
    path.write_text(path.read_text().replace("steps[0].page_table_1[:1, :1].add_(1)", "; ".join(faults) or "pass"))
    return replace(ask, plan=replace(ask.plan, modes=(Mode.DECODE,)))


FROZEN = "steps[0].cache_seqlens[:1].fill_(int(inputs.seq_lens_cpu[0]) + setup.num_draft_tokens)"


def test_what_only_graphs_show_is_not_what_is_wrong_eagerly_elsewhere(tmp_path: Path) -> None:
    """Two bugs of one place: a length frozen into graphs, and a wrong one in a mode that is not captured."""
    fault = f"({FROZEN} if inputs.mode is Mode.TARGET_VERIFY else {LENGTHS})"
    ask = broken(tmp_path, fault, capturable="[Mode.TARGET_VERIFY], host_lengths=True")
    modes = (Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND)
    ask = replace(ask, plan=replace(ask.plan, modes=modes, executors=("eager", graph_executor())))
    ended = run_until(ask, (Mode.DRAFT_EXTEND,), (Mode.TARGET_VERIFY,))
    assert [(str(it.code), it.place) for it in ended.groups] == [
        ("NV101", "cache_seqlens inside"),
        ("NV302", "cache_seqlens inside"),
    ]


def places(ended: CampaignFinished) -> list[tuple[str, bool, str]]:
    """Of each group its place, whether it is accepted, and what its case shows instead."""
    return [(it.place, bool(it.accepted), it.instead) for it in ended.groups]


@pytest.mark.parametrize("accepted", [LENGTHS, SLOTS])
def test_what_is_accepted_hides_no_other_bug_of_its_cases(tmp_path: Path, accepted: str) -> None:
    """Not the one that is graver, nor the one that is less grave, though no case shows it alone."""
    place, other = ("cache_seqlens inside", "page_table_1 inside")[:: 1 if accepted is LENGTHS else -1]
    baseline = Baseline((replace(ACCEPTS, place=place),))
    first, _ = run(broken(tmp_path, accepted, baseline=baseline))
    assert (first.exit_code, places(first)) == (0, [(place, True, "")])
    ended = run_until(broken(tmp_path, LENGTHS, SLOTS, baseline=baseline), (Mode.DECODE,), (Mode.DECODE,))
    assert ended.exit_code == 1
    assert sorted(places(ended)) == sorted([(place, True, ""), (other, False, "")])
    again, _ = run(broken(tmp_path, accepted, baseline=baseline))
    assert again.exit_code == 0


def test_a_case_that_shows_another_bug_now_does_not_stand_for_it(tmp_path: Path) -> None:
    run_until(broken(tmp_path, LENGTHS), (Mode.DECODE,))
    run(broken(tmp_path, LENGTHS, SLOTS))
    ended = run_until(broken(tmp_path, SLOTS), (Mode.DECODE,), (Mode.DECODE,))
    other = "page_table_1 inside"
    assert places(ended) == [("cache_seqlens inside", False, f"wrong NV101 decode {other}"), (other, False, "")]
    mended, _ = run(broken(tmp_path))
    assert (mended.exit_code, [it.is_fixed for it in mended.groups]) == (0, [True, True])


def test_cases_kept_as_they_were_drawn_become_one_group_once_they_are_shrunk(tmp_path: Path) -> None:
    ask = asked(tmp_path, ALL_MODES)
    ask = replace(ask, plan=replace(ask.plan, modes=(Mode.DECODE, Mode.TARGET_VERIFY)))
    drawn = replace(ask, plan=replace(ask.plan, shrink=False))
    run_until(drawn, (Mode.DECODE,), (Mode.TARGET_VERIFY,))
    assert len(list(scan(ask.root / Kind.CRASHING))) == 2
    ended = run_until(ask, (Mode.DECODE, Mode.TARGET_VERIFY))
    (path,) = scan(ask.root / Kind.CRASHING)
    (group,) = ended.groups
    assert (group.path, group.modes, ended.problems) == (path, (Mode.DECODE, Mode.TARGET_VERIFY), ())


def test_a_saved_case_that_fails_for_another_is_red(tmp_path: Path) -> None:
    """It disagrees on what was saved for somebody else, which no search finds in time."""
    ask = asked(tmp_path, "setup.pool_width == 777", budget_s=1)
    entry = entry_of(8)
    setup = replace(entry.case.setup, pool_width=777, pool_row_stride=777)
    saved(ask.root, replace(entry, case=replace(entry.case, setup=setup)))
    ended, told = run(ask)
    assert [it.status for it in told if isinstance(it, CaseReplayed)] == ["FAILED"]
    assert ended.exit_code == 1
    (stray,) = ended.stray
    assert "shows wrong NV101 decode page_table_1 inside, and no group stands for it" in stray


def test_what_nobody_judged_is_not_green(tmp_path: Path) -> None:
    ask = asked(tmp_path, "True", capturable=False, budget_s=1)
    ended, _ = run(replace(ask, plan=replace(ask.plan, executors=(graph_executor(),))))
    assert (ended.exit_code, ended.problems) == (
        2,
        ("nothing was tested; declared not capturable, so give --executor eager",),
    )


def test_saved_cases_take_no_time_from_the_search_and_those_that_cannot_run_are_said(tmp_path: Path) -> None:
    ask = asked(tmp_path, "False", budget_s=1)
    (path,) = saved(ask.root, entry_of(8, implementation="gone"), kind=Kind.REGRESSION)
    ask = replace(ask, plan=replace(ask.plan, only=(), modes=(Mode.DECODE,)))
    ended, told = run(ask)
    (replayed,) = [it for it in told if isinstance(it, CaseReplayed)]
    assert (replayed.path, replayed.status, replayed.group) == (
        path,
        NOT_RUN,
        "gone NV101 decode nsa_cache_seqlens inside",
    )
    assert "'gone', which is not loaded" in replayed.problem
    (search,) = [it for it in told if isinstance(it, SliceStarted)]
    assert search.seconds == pytest.approx(ask.budget_s, abs=0.1)  # the time of the case is not taken from it
    assert ended.exit_code == 0


def test_the_day_it_was_first_seen_stays_when_its_case_becomes_smaller(tmp_path: Path) -> None:
    ask = asked(tmp_path, DECODE_ALONE)
    run(replace(ask, kind=CHANGE, budget_s=60))
    (path,) = scan(ask.root / Kind.CRASHING)
    entry = load(path)
    path.unlink()
    larger = replace(entry, case=replace(entry.case, replays=entry.case.replays * 2))
    older = replace(entry.provenance, date="2026-01-01T00:00:00+00:00", attempts=None)
    saved(ask.root, replace(larger, provenance=older))
    ended, _ = run(ask)
    (group,) = ended.groups
    assert group.case == entry.case
    assert load(group.path).provenance.date == group.first_seen == "2026-01-01T00:00:00+00:00"


def test_a_finding_of_a_killed_run_that_cannot_be_read_is_not_green(tmp_path: Path) -> None:
    ask = asked(tmp_path, "False", budget_s=1)
    left = ask.root / FOLDER / "123-abcd"
    left.mkdir(parents=True)
    (left / "reported.json").write_bytes(b"\xff\xfe")
    (left / "interrupted.case").write_bytes(b'["w\xff", "eager"]')
    ended, _ = run(ask)
    assert ended.exit_code == 2
    (problem,) = ended.problems
    assert "reported.json: not UTF-8" in problem
    assert [it.name for it in left.glob("*.*")] == ["reported.json"]  # it stays, and the next campaign says so too
