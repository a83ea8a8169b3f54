"""Are the bugs of captured graphs, sequences and fan-out found, under the right code, and shrunk to what shows them?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import NO_GPU
from msgspec.structs import replace
from quality.conftest import unload
from quality.planted_graphs import (
    FROZEN_MAXIMUM,
    GPU_BUGS,
    GRAPH_BUGS,
    MAP_OF_THE_PREVIOUS_MODE,
    SILENT,
    Eagerly,
    GraphBug,
)
from quality.test_planted_bugs import Run

from nsa_verify import Case, Code, Mode, Outcome, Replay, Request, Setup, Verdict, verify
from nsa_verify.core import implementation as registry
from nsa_verify.core.registry import load_reference
from nsa_verify.engine.corpus import load
from nsa_verify.engine.events import Disagreement, DisagreementSeen, RoundFinished
from nsa_verify.engine.plan import EAGER, ROUND_CASES, Plan
from nsa_verify.engine.replaying import Replayed, Status, replay_saved
from nsa_verify.engine.search import search
from nsa_verify.engine.worker import prepare

GRAPH = "simulated-graph" if NO_GPU else "graph"
SEEDS = (0,)
WITHIN = 300
"""Cases that may be drawn before a bug is found."""
INNOCENT = "vectorized"
"""Runs beside every planted bug, and must not be accused."""

SLOW = {
    "batch-size-compiled",
    "total-compiled",
    "workspace-that-grows",
    "map-of-the-previous-mode",
    "field-not-copied",
    "schedule-of-step-0-only",
    "element-stride-ignored",
    "repeats-of-v2",
    "view-that-the-next-step-overwrites",
}
"""They take longest; others of their kinds are left."""
BUGS = [
    *(pytest.param(it, id=it.name, marks=[pytest.mark.slow] if it.name in SLOW else []) for it in GRAPH_BUGS),
    *(pytest.param(bug, id=bug.name, marks=pytest.mark.gpu) for bug in GPU_BUGS),
]


def executor_of(bug: GraphBug) -> str:
    """The executor that must find the bug."""
    return EAGER if bug.eagerly is Eagerly.ONLY else GRAPH


def hunt(bug: GraphBug, path: Path, seed: int, corpus: Path) -> Run:
    """Draw until the bug is seen, beside an innocent implementation, and shrink it.

    The first rounds of a run are the same however many follow.
    """
    plan = Plan(
        seed=seed,
        max_examples=bug.at_first,
        modes=bug.modes,
        short_cases=bug.short,
        executors=(executor_of(bug),),
        references=(str(path),),
        only=(bug.copy_name, INNOCENT),
    )
    run = Run(plan, corpus)
    if accused(bug, run):
        return run
    alone = replace(plan, max_examples=WITHIN, only=(bug.copy_name,), shrink=False)
    return Run(replace(plan, max_examples=_cases_until_seen(bug, alone)), corpus)


def accused(bug: GraphBug, run: Run) -> list[Disagreement]:
    """What was found, less what is said of a race before it is shrunk."""
    return [it for it in run.found if not (bug.races and it.signature.code is Code.NOT_DETERMINISTIC)]


def _cases_until_seen(bug: GraphBug, plan: Plan) -> int:
    cases = 0
    for event in search(plan, lambda found: found, "test", {}):
        if isinstance(event, RoundFinished):
            cases = event.cases_done
        if isinstance(event, DisagreementSeen) and event.signature.code in (bug.code, *bug.also):
            return cases
    raise AssertionError(f"not found in {cases} cases")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bug", BUGS)
def test_found_shrunk_saved_replayed_and_fixed(
    bug: GraphBug, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bug.plant(tmp_path / "planted")
    run = hunt(bug, path, seed, tmp_path / "corpus")
    assert accused(bug, run)
    for found in accused(bug, run):
        assert found.path is not None
        assert load(found.path).case == found.case
        assert_accused(bug, found)
        if bug.races and (found.note or found.reliability.disagreed < found.reliability.runs):
            continue  # whether a race shows again is up to the machine; it was found, and said so
        assert_right_and_small(bug, found)
        replayed = replay(found, path)
        assert replayed.status is Status.FAILED
        (verdict,) = replayed.verdicts
        assert verdict.primary == found.finding
        assert_eagerly(bug, found, path, monkeypatch)

    monkeypatch.delitem(registry._registered, bug.copy_name)
    mended = bug.plant(tmp_path / "mended", planted=False)
    for found in accused(bug, run):
        replayed = replay(found, mended)
        assert (replayed.status, replayed.problem) == (Status.FIXED, "")
        assert [verdict.outcome for verdict in replayed.verdicts] == [Outcome.AGREE]


def assert_accused(bug: GraphBug, found: Disagreement) -> None:
    """The right copy is accused by the right executor, under a right code."""
    assert (found.signature.implementation, found.signature.executor) == (bug.copy_name, executor_of(bug))
    assert found.signature.code in (bug.code, *bug.also), found.finding


def assert_right_and_small(bug: GraphBug, found: Disagreement) -> None:
    """The smallest case is one that a person would have written."""
    smallest = {bug.code: bug.smallest, **bug.also}
    assert found.shrunk
    assert not found.note
    assert (found.reliability.disagreed, found.reliability.runs) == (5, 5)
    assert smallest[found.signature.code](found.case), found.case
    assert bug.told in found.finding.message
    if bug.blamed:
        assert f"({bug.file_name}:{bug.blamed_line} in " in found.finding.message.replace("captured at ", "(")


def assert_eagerly(bug: GraphBug, found: Disagreement, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calling says of the case that the graphs were shrunk to, in a copy that nobody has called before."""
    if bug.eagerly in (Eagerly.ONLY, Eagerly.UNASKED):
        return
    verdict = verify_afresh(found.case, path, bug, monkeypatch)
    if bug.eagerly is Eagerly.AGREES:
        assert verdict.outcome is Outcome.AGREE, verdict
    else:
        assert verdict.primary is not None
        assert verdict.primary.code is found.signature.code


def verify_afresh(case: Case, path: Path, bug: GraphBug, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    """Import the copy again and call it."""
    monkeypatch.delitem(registry._registered, bug.copy_name)
    unload(set(sys.modules))
    prepare.cache_clear()
    load_reference(str(path))
    return verify(case, bug.copy_name)


def replay(found: Disagreement, reference: Path) -> Replayed:
    plan = Plan(
        references=(str(reference),), only=(found.signature.implementation,), executors=(found.signature.executor,)
    )
    assert found.path is not None
    (replayed,) = (event for event in replay_saved(plan, [found.path]) if isinstance(event, Replayed))
    return replayed


def test_a_frozen_maximum_is_right_when_it_is_called(tmp_path: Path) -> None:
    path = FROZEN_MAXIMUM.plant(tmp_path)
    run = Run(
        Plan(max_examples=40, references=(str(path),), only=(FROZEN_MAXIMUM.copy_name,), executors=(EAGER,)), tmp_path
    )
    assert (run.found, run.finished.cases) == ([], 40)


def test_a_map_of_the_previous_mode_is_wrong_when_it_is_called_too(tmp_path: Path) -> None:
    load_reference(str(MAP_OF_THE_PREVIOUS_MODE.plant(tmp_path)))
    requests = (Request(1, 0), Request(1, 1))
    verified, decoded = (Replay(mode, requests) for mode in (Mode.TARGET_VERIFY, Mode.DECODE))
    setup = Setup(num_draft_tokens=2, buckets=(2,), pool_rows=2)
    assert verify(Case(setup, (decoded, decoded)), MAP_OF_THE_PREVIOUS_MODE.copy_name).outcome is Outcome.AGREE
    finding = verify(Case(setup, (verified, decoded)), MAP_OF_THE_PREVIOUS_MODE.copy_name).primary
    assert finding is not None
    assert (finding.replay, finding.buffer, finding.element) == (1, "page_table_1", (1, 0))
    assert finding.before == finding.got, "it is request 0's, as verify left it"


def test_a_fallback_that_is_reported_is_shown_and_no_fault(tmp_path: Path) -> None:
    text = SILENT.mutant.text()
    for silent, reported in (
        ("import torch\n", "import torch\n\nimport nsa_verify\n"),
        ("    except RuntimeError:\n", '    except RuntimeError:\n        nsa_verify.fallback("rows lie apart")\n'),
    ):
        assert text.count(silent) == 1
        text = text.replace(silent, reported)
    path = tmp_path / "reported.py"
    path.write_text(text, encoding="utf-8")
    load_reference(str(path))

    def told(table_row_stride: int) -> tuple[Outcome, set[str]]:
        setup = Setup(buckets=(2,), table_row_stride=table_row_stride)
        verdict = verify(Case(setup, (Replay(Mode.DECODE, (Request(1), Request(2))),)), SILENT.copy_name)
        return verdict.outcome, set(verdict.fallbacks)

    assert told(16) == (Outcome.AGREE, set())
    assert told(17) == (Outcome.AGREE, {"rows lie apart"})


@pytest.mark.parametrize("module", sorted({bug.mutant.module for bug in GRAPH_BUGS}))
def test_without_a_bug_the_copies_agree(module: str, tmp_path: Path) -> None:
    bug = next(bug for bug in GRAPH_BUGS if bug.mutant.module == module)
    path = bug.plant(tmp_path, planted=False)
    run = Run(Plan(max_examples=ROUND_CASES, references=(str(path),), only=(bug.copy_name,)), tmp_path)
    assert (run.found, run.finished.signatures, run.finished.cases) == ([], (), ROUND_CASES)
