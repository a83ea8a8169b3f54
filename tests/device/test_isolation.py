"""A verdict depends on its case and nothing else; and what the checker cannot judge is unknown, never agreed."""

from __future__ import annotations

import random
from functools import cache
from typing import Any, NoReturn

import pytest
import torch
from conftest import NO_GPU
from device.subjects import Bug, Steps, bare, capturable, right, subject
from helpers import draw_many

from nsa_verify import Case, Code, Implementation, Mode, Outcome, Replay, ReplayInputs, Request, Setup, Verdict, verify
from nsa_verify.core.oracle import Expectation, Row, expect
from nsa_verify.device import comparing, judge
from nsa_verify.device.rig import Rig, close_rigs, rig_for
from nsa_verify.device.select import resolve
from nsa_verify.strategies import replays

SETUP = Setup(
    num_draft_tokens=2,
    page_size=16,
    table_width=20,
    pool_rows=3,
    pool_width=24,
    pool_row_stride=25,
    num_steps=2,
    buckets=(2, 3),
)
PLAIN = Case(SETUP, (Replay(Mode.DECODE, (Request(5, 1),)),))


def _unwritten(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    """Writes the first request only, and no leading 0: right where something else did so before."""
    kept = [steps[0].cu_seqlens_k[0].clone(), steps[0].page_table_1[1].clone()]
    right(inputs, steps, setup)
    steps[0].cu_seqlens_k[0] = kept[0]
    steps[0].page_table_1[1] = kept[1]


def _everything(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    """Writes zeros over all the memory it can reach: arena, inputs, pool, host mirror."""
    steps[0].cache_seqlens.as_strided((rig_for(setup, "cpu").layout.size,), (1,), 0).zero_()
    inputs.req_to_token.zero_()
    if inputs.seq_lens_cpu is not None:
        inputs.seq_lens_cpu.fill_(9)


def _shapes(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
    """Changes the tensors themselves, and not their memory."""
    inputs.req_to_token.t_()
    inputs.seq_lens.unsqueeze_(1)
    inputs.accept_lens.resize_(1)
    for step in steps:
        step.page_table_1.t_()
        step.cu_seqlens_k.data = torch.zeros_like(step.cu_seqlens_k)


def _raises(_: ReplayInputs, __: Steps, ___: Setup) -> NoReturn:
    raise RuntimeError("always")


SUBJECTS: dict[str, Implementation] = {
    "right": subject(),
    "leaves cells unwritten": bare(_unwritten),
    "writes everything": subject(_everything),
    "changes shapes": subject(_shapes),
    "raises": subject(_raises),
}


def _keeps_the_last(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    """Leaves the last sum as it was: right where something else wrote it before."""
    kept = steps[0].nsa_cu_seqlens_k[-1:].clone()
    capturable().refresh(inputs, steps, setup)
    steps[0].nsa_cu_seqlens_k[-1:].copy_(kept)


def _frozen(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
    if inputs.seq_lens_cpu is not None:
        steps[0].nsa_cache_seqlens.clamp_(max=int(inputs.seq_lens_cpu[: inputs.batch_size].max()))


def _illegal(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    if inputs.batch_size == SETUP.buckets[-1]:
        inputs.seq_lens.max().item()


GRAPH_SUBJECTS: dict[str, Implementation] = {
    "right": capturable(),
    "leaves a cell unwritten": capturable(refresh=_keeps_the_last),
    "freezes a maximum": capturable(_frozen, modes=(Mode.DECODE,), host_lengths=True),
    "cannot be captured in one bucket": capturable(_illegal),
}
GRAPH = "simulated-graph" if NO_GPU else "graph"
DRIVEN = {(name, "eager"): it for name, it in SUBJECTS.items()}
DRIVEN |= {(name, GRAPH): it for name, it in GRAPH_SUBJECTS.items()}
Job = tuple[Case, tuple[str, str], Verdict]


@cache
def _jobs_judged_alone() -> list[Job]:
    """Cases, subjects and executors, and the verdicts in memory that nothing has used before."""
    judged = []
    for drawn in draw_many(replays(SETUP), 12, seeded=7):
        case = Case(SETUP, drawn)
        for driven, implementation in DRIVEN.items():
            close_rigs()
            judged.append((case, driven, verify(case, implementation, driven[1])))
    return judged


@pytest.mark.parametrize("order", [0, *(pytest.param(it, marks=pytest.mark.slow) for it in range(1, 4))])
def test_a_verdict_does_not_depend_on_those_before_it(order: int) -> None:
    shuffled = _jobs_judged_alone().copy()
    random.Random(order).shuffle(shuffled)
    close_rigs()
    for case, driven, alone in shuffled:
        assert verify(case, DRIVEN[driven], driven[1]) == alone, driven


def test_the_subjects_do_what_they_are_called() -> None:
    outcomes: dict[tuple[str, str], set[Outcome]] = {}
    for _, driven, alone in _jobs_judged_alone():
        outcomes.setdefault(driven, set()).add(alone.outcome)
    for driven, seen in outcomes.items():
        assert (Outcome.DISAGREE in seen) is (driven[0] != "right"), driven
        assert Outcome.UNKNOWN not in seen


def test_the_rig_is_used_again() -> None:
    device = resolve("auto")
    rig = rig_for(SETUP, device)
    address = rig.inputs(Mode.DECODE, 2).seq_lens.data_ptr()
    verify(PLAIN, subject(_shapes))
    assert rig_for(SETUP, device) is rig
    assert rig.inputs(Mode.DECODE, 2).seq_lens.data_ptr() == address


def fail(*_: Any, **__: Any) -> NoReturn:
    raise ArithmeticError("a bug of the checker")


def _spoilt(_: ReplayInputs, steps: Steps, __: Setup) -> None:
    steps[0].cache_seqlens[0] = 4


CHECKER_FAULTS = {
    "diagnose": (judge, "diagnose"),
    "paint": (comparing, "paint"),
    "expect": (judge, "expect"),
    "violations": (judge, "violations"),
    "rig_for": (judge, "rig_for"),
    "compare": (judge.Judge, "_compare"),
    "reset": (Rig, "reset"),
    "load": (Rig, "load"),
    "inputs": (Rig, "inputs"),
    "steps": (Rig, "steps"),
}


@pytest.mark.parametrize(("owner", "name"), CHECKER_FAULTS.values(), ids=CHECKER_FAULTS)
@pytest.mark.parametrize("bug", [None, _spoilt])
def test_a_fault_of_the_checker_is_unknown(
    owner: Any, name: str, bug: Bug | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, fail)
    verdict = verify(PLAIN, subject(bug))
    if name == "diagnose" and bug is None:
        assert verdict.outcome is Outcome.AGREE  # nothing to diagnose
        return
    assert (verdict.outcome, verdict.findings) == (Outcome.UNKNOWN, ())
    assert verdict.reason.startswith(
        "the check itself failed: ArithmeticError: a bug of the checker (test_isolation.py:"
    )


def test_a_comparison_that_rejects_what_diagnosis_accepts_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge.Judge, "_compare", lambda *_: (0, ()))
    verdict = verify(PLAIN, subject())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "no wrong cell was found" in verdict.reason


def test_an_oracle_that_breaks_an_invariant_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, replay: int, *rest: Any) -> Expectation:
        found = expect(case, replay, *rest)
        return found._replace(buffers={**found.buffers, "cu_seqlens_k": (Row((0, 5, 4), 3, 3),)})

    monkeypatch.setattr(judge, "expect", wrong)
    for implementation in (subject(), subject(_spoilt)):
        verdict = verify(PLAIN, implementation)
        assert (verdict.outcome, verdict.findings) == (Outcome.UNKNOWN, ())
        assert verdict.reason == "the oracle breaks its own invariant: cu_seqlens_k: runs backwards: 5 then 4"


def test_ctrl_c_is_not_the_implementations_fault() -> None:
    def interrupted(_: ReplayInputs, __: Steps, ___: Setup) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(PLAIN, bare(interrupted))
    assert verify(PLAIN, subject()).outcome is Outcome.AGREE


def test_a_checker_fault_in_one_case_leaves_the_next_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Rig, "load", fail)
        assert verify(PLAIN, subject()).outcome is Outcome.UNKNOWN
    assert verify(PLAIN, subject()).outcome is Outcome.AGREE
    finding = verify(PLAIN, subject(_spoilt)).primary
    assert finding is not None
    assert finding.code is Code.WRONG_VALUE
