"""What a campaign says in the end, of a corpus and totals made by hand."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from engine.corpora import entry_of, saved
from msgspec.structs import asdict

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Finding, Signature
from nsa_verify.engine.closing import finished
from nsa_verify.engine.events import CampaignFinished, CaseReplayed, Cell, Reliability, StopReason
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.record import Record
from nsa_verify.engine.totals import Ask, Totals
from nsa_verify.engine.triage import Accepted, Baseline, Bug

SAVED = entry_of(implementation="mine").finding
assert SAVED is not None
MINE, BUG = Finding(**asdict(SAVED)), Bug.of(SAVED)
NOTHING = "nothing was tested; give it more time"


def ended(
    root: Path, totals: Totals, stop: StopReason, record: Record | None = None, *accepted: Accepted
) -> CampaignFinished:
    ask = Ask(
        kind="change",
        plan=Plan(references=("mine.py",)),
        root=root,
        budget_s=1,
        version="1",
        command="",
        baseline=Baseline(accepted),
    )
    return finished(ask, record or Record(), totals, stop, 1.0)


def test_before_the_first_search_what_ended_it_is_said_alone(tmp_path: Path) -> None:
    """A case of ``regression`` fails again, and one of ``crashing`` as before; nothing was drawn."""
    saved(tmp_path, entry_of(implementation="mine"), entry_of(9, implementation="elsewhere"))
    failing = [CaseReplayed(tmp_path / "regression" / "it.json", "FAILED", "was mended once")]
    again = ended(tmp_path, Totals(failing=failing, findings={BUG: (MINE, Reliability(1, 1))}), StopReason.NEW)
    assert (again.exit_code, again.problems, again.failing) == (1, (), tuple(failing))
    assert [(it.implementation, it.is_fixed) for it in again.groups] == [("mine", False)]


def test_a_campaign_that_is_interrupted_at_once_is_that_alone(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, entry_of(implementation="mine"))
    told = ended(tmp_path, Totals(fixed={path}), StopReason.INTERRUPTED)
    assert (told.exit_code, told.problems) == (130, ())
    assert [(it.implementation, it.is_fixed) for it in told.groups] == [("mine", True)]


def test_a_campaign_that_tested_nothing_is_not_green(tmp_path: Path) -> None:
    told = ended(tmp_path, Totals(), StopReason.TIME)
    assert (told.exit_code, told.problems, told.groups) == (2, (NOTHING,), ())


def accept(mode: str) -> Accepted:
    return Accepted(implementation="mine", reason="known", expires=date(2999, 1, 1), mode=mode)


ALONE = (
    "mine disagreed in target-verify, in 3 cases: mine NV101 decode nsa_cache_seqlens inside shows there too, and the"
    " baseline accepts it in decode alone"
)


@pytest.mark.parametrize(
    ("modes", "stray", "unmatched"),
    [
        (("decode",), (ALONE,), ()),
        (("decode", "target-verify"), (), ()),
        (("",), (), ()),
        (("decode", "target-verify", "draft-extend"), (), ("mine draft-extend (known)",)),
    ],
)
def test_a_group_of_two_modes_is_accepted_in_each(
    modes: tuple[str, ...], stray: tuple[str, ...], unmatched: tuple[str, ...], tmp_path: Path
) -> None:
    saved(tmp_path, entry_of(implementation="mine"))
    totals, record = Totals(), Record()
    for mode in (Mode.DECODE, Mode.TARGET_VERIFY):
        totals.matrix.cell("mine", "eager", mode).add(Cell(cases=9, disagree=3))
        record.see(BUG, Signature("mine", "eager", BUG.code, BUG.place, mode), "2030-01-01")
    told = ended(tmp_path, totals, StopReason.TIME, record, *map(accept, modes))
    assert (told.exit_code, told.stray, told.unmatched) == (int(bool(stray)), stray, unmatched)
    assert [(it.modes, it.accepted) for it in told.groups] == [((Mode.DECODE, Mode.TARGET_VERIFY), "known")]


def test_what_no_group_stands_for_is_said(tmp_path: Path) -> None:
    saved(tmp_path, entry_of(implementation="mine"))
    totals = Totals()
    totals.matrix.cell("mine", "eager", Mode.DRAFT_EXTEND).add(Cell(cases=9, disagree=2))
    told = ended(tmp_path, totals, StopReason.TIME, None, accept("decode"))
    assert told.stray == ("mine disagreed in draft-extend, in 2 cases, and no group stands for it",)
    assert told.exit_code == 1
