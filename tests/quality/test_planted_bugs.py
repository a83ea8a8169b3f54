"""Are the bugs that people make found, under the right code, and shrunk to what a person would have written?"""

from __future__ import annotations

from pathlib import Path

import pytest
from quality.planted import BUGS, Bug

from nsa_verify.core import implementation as registry
from nsa_verify.core.findings import Outcome
from nsa_verify.engine.corpus import Provenance, load
from nsa_verify.engine.events import CheckFailed, Disagreement, RoundFinished, RunFinished
from nsa_verify.engine.keeping import keep
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.replaying import Replayed, Status, replay_saved
from nsa_verify.engine.search import search
from nsa_verify.engine.worker import prepare

SEEDS = (0,)
EAGER = ("eager",)
"""These bugs are not of graphs; and a copy may declare more modes capturable than its bug leaves it."""
WITHIN = (20, 60, 300)
"""Cases: the first rounds are the same however many follow, so a bug found in 20 is found in 300."""


class Run:
    """A whole run, and what it kept under ``corpus``."""

    def __init__(self, plan: Plan, corpus: Path) -> None:
        provenance = Provenance(seed=plan.seed, impl=plan.references)
        self.events = list(search(plan, lambda found: keep(found, corpus, provenance), "test", {}))
        self.found = [event for event in self.events if isinstance(event, Disagreement)]
        (self.finished,) = (event for event in self.events if isinstance(event, RunFinished))
        self.rounds = [(event.round, event.digest) for event in self.events if isinstance(event, RoundFinished)]
        assert not [event for event in self.events if isinstance(event, CheckFailed)]

    def of(self, bug: Bug) -> Disagreement | None:
        wanted = (bug.copy_name, bug.code)
        return next((it for it in self.found if (it.signature.implementation, it.signature.code) == wanted), None)


def hunt(seed: int, corpus: Path, *planted: tuple[Bug, Path]) -> Run:
    """Run until every bug is found under its code, with more cases each time."""
    for cases in WITHIN:
        run = Run(
            Plan(
                seed=seed,
                max_examples=cases,
                executors=EAGER,
                references=tuple(str(path) for _, path in planted),
                only=tuple(bug.copy_name for bug, _ in planted),
            ),
            corpus,
        )
        if all(run.of(bug) for bug, _ in planted):
            return run
    names = [bug.name for bug, _ in planted if run.of(bug) is None]
    raise AssertionError(f"not found in {WITHIN[-1]} cases: {', '.join(names)}; but {run.finished.signatures}")


def assert_small(found: Disagreement) -> None:
    assert found.shrunk
    assert not found.note
    assert len(found.case.replays) <= 2, found.case
    assert all(len(replay.requests) <= 2 for replay in found.case.replays), found.case
    assert (found.reliability.disagreed, found.reliability.runs) == (5, 5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_found_shrunk_saved_replayed_and_fixed(
    bug: Bug, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bug.plant(tmp_path / "planted")
    run = hunt(seed, tmp_path / "corpus", (bug, path))
    for other in run.found:
        assert_small(other)
    found = run.of(bug)
    assert found is not None
    assert bug.smallest(found.case), found.case

    assert found.path is not None
    assert found.path.is_relative_to(tmp_path / "corpus" / "crashing" / found.finding.mode)
    entry = load(found.path)
    assert entry.case == found.case
    assert entry.finding is not None
    assert entry.finding.code is bug.code
    replayed = replay(found.path, path, bug)
    assert replayed.status is Status.FAILED
    (verdict,) = replayed.verdicts
    assert verdict.primary == found.finding

    monkeypatch.delitem(registry._registered, bug.copy_name)
    mended = bug.plant(tmp_path / "mended", planted=False)
    for it in run.found:
        assert it.path is not None
        replayed = replay(it.path, mended, bug)
        assert (replayed.status, replayed.problem) == (Status.FIXED, "")
        assert [verdict.outcome for verdict in replayed.verdicts] == [Outcome.AGREE]


def replay(saved: Path, reference: Path, bug: Bug) -> Replayed:
    plan = Plan(references=(str(reference),), only=(bug.copy_name,), executors=EAGER)
    (replayed,) = (event for event in replay_saved(plan, [saved]) if isinstance(event, Replayed))
    return replayed


def test_a_correct_implementation_is_fixed_too(tmp_path: Path) -> None:
    bug = next(bug for bug in BUGS if bug.name == "no-clamp-at-0")
    found = hunt(0, tmp_path, (bug, bug.plant(tmp_path))).of(bug)
    assert found is not None
    assert found.path is not None
    vectorized = Plan(only=("vectorized",))
    (replayed,) = (it for it in replay_saved(vectorized, [found.path]) if isinstance(it, Replayed))
    assert replayed.status is Status.FIXED


def test_two_bugs_in_two_implementations_have_a_minimal_case_each(tmp_path: Path) -> None:
    pair = [bug for bug in BUGS if bug.name in ("earlier-replay-left", "last-step-not-written")]
    run = hunt(0, tmp_path / "corpus", *((bug, bug.plant(tmp_path)) for bug in pair))
    assert {it.signature.implementation for it in run.found} == {bug.copy_name for bug in pair}
    for bug in pair:
        found = run.of(bug)
        assert found is not None
        assert_small(found)
        assert bug.smallest(found.case), found.case
    assert len({found.path for found in run.found}) == len(run.found)


def test_without_a_bug_the_copies_agree(tmp_path: Path) -> None:
    for module in ("python_loop", "vectorized"):
        bug = next(bug for bug in BUGS if bug.mutant.module == module)
        path = bug.plant(tmp_path / module, planted=False)
        run = Run(Plan(max_examples=60, references=(str(path),), only=(bug.copy_name,), executors=EAGER), tmp_path)
        assert (run.found, run.finished.signatures, run.finished.cases) == ([], (), 60)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_in_one_process_and_in_two(tmp_path: Path) -> None:
    bug = next(bug for bug in BUGS if bug.name == "top-k-comparison")
    path = bug.plant(tmp_path)

    def run(seed: int, workers: int) -> Run:
        prepare.cache_clear()
        plan = Plan(
            seed=seed,
            max_examples=30,
            executors=EAGER,
            references=(str(path),),
            only=(bug.copy_name, "vectorized"),
            workers=workers,
        )
        return Run(plan, tmp_path / f"corpus-{seed}-{workers}")

    one, again, two, other = run(5, 1), run(5, 1), run(5, 2), run(6, 1)
    assert one.finished.digest == again.finished.digest == two.finished.digest != other.finished.digest
    assert one.rounds == again.rounds == sorted(two.rounds)
    assert one.finished.signatures == two.finished.signatures
    assert one.finished.matrix == again.finished.matrix == two.finished.matrix

    def told(of: Run) -> list[tuple[object, ...]]:
        return sorted((it.signature, it.case, it.finding, it.probes) for it in of.found)

    assert told(one) == told(again) == told(two)
    assert len(told(one)) >= 1
