"""Batches are judged without looking at every call: whatever is wrong must still be seen, and looked at."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import torch
from conftest import NO_GPU
from device.subjects import Bug, Steps, bare, beyond, capturable, copy_of_uninitialised, right, subject
from device.test_isolation import DRIVEN, SETUP
from helpers import draw_many
from torch.overrides import TorchFunctionMode

from nsa_verify import (
    Case,
    Code,
    Extent,
    Implementation,
    Mode,
    Outcome,
    Replay,
    ReplayInputs,
    Request,
    Setup,
    Verdict,
    verify,
)
from nsa_verify.core.marks import MARKS, Phase
from nsa_verify.core.registry import load
from nsa_verify.device import batch, comparing, graph, judge, screening
from nsa_verify.device.batch import Job, judge_batch
from nsa_verify.device.executors import EAGER, EXECUTORS
from nsa_verify.device.judge import Judge
from nsa_verify.device.rig import close_rigs, rig_for
from nsa_verify.device.select import resolve
from nsa_verify.strategies import replays

GRAPH = EXECUTORS["simulated-graph" if NO_GPU else "graph"]
LONG = (Request(20, 1), Request(9, 2))
CASE = Case(SETUP, (Replay(Mode.DECODE, LONG), Replay(Mode.DECODE, LONG[:1], pool_seed=3)))
DEVICE = "cpu" if NO_GPU else "cuda"


@pytest.fixture(autouse=True)
def _no_rig_is_left() -> Iterator[None]:
    resolve("auto")
    close_rigs()
    yield
    close_rigs()


def judged(*subjects: Implementation, case: Case = CASE, **how: bool) -> list[Verdict]:
    """The verdicts of one job."""
    return [verdict for *_, verdict in judge_batch([Job(case, [(it, EAGER) for it in subjects], **how)], DEVICE)]


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the implementations that are judged call by call from now on."""
    names: list[str] = []
    original = Judge.judge

    def record(self: Judge, implementation: Implementation, *rest: Any, **how: Any) -> Verdict:
        names.append(implementation.name)
        return original(self, implementation, *rest, **how)

    monkeypatch.setattr(Judge, "judge", record)
    return names


@pytest.mark.parametrize("repeat", [True, False])
def test_the_verdicts_are_those_of_looking_at_every_call(repeat: bool) -> None:
    cases = [Case(SETUP, drawn) for drawn in draw_many(replays(SETUP), 8, seeded=7)]
    pairs = [(it, EXECUTORS[executor]) for (_, executor), it in DRIVEN.items()]
    jobs = [Job(case, pairs, repeat=repeat) for case in cases]
    alone = {}
    for number, job in enumerate(jobs):
        for place, (implementation, executor) in enumerate(pairs):
            close_rigs()
            alone[number, place] = Judge(job.case, DEVICE).judge(implementation, executor, repeat)
    close_rigs()
    told = {(number, place): verdict for number, place, verdict in judge_batch(jobs, DEVICE)}
    assert list(told) == [(number, place) for number in range(len(jobs)) for place in range(len(pairs))]
    for key, verdict in told.items():
        assert verdict == alone[key], key
    assert {verdict.outcome for verdict in told.values()} >= {Outcome.AGREE, Outcome.DISAGREE, Outcome.NOT_APPLICABLE}


def test_what_agrees_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    names = looked_at(monkeypatch)
    pairs = [(subject(), EAGER), (capturable(), GRAPH), (subject(modes=(Mode.TARGET_VERIFY,)), EAGER)]
    for fresh in (True, False, False):
        outcomes = [verdict.outcome for *_, verdict in judge_batch([Job(CASE, pairs, fresh=fresh)], DEVICE)]
        assert outcomes == [Outcome.AGREE, Outcome.AGREE, Outcome.NOT_APPLICABLE]
    assert names == []


def test_careful_looks_at_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    names = looked_at(monkeypatch)
    job = Job(CASE, [(subject(), EAGER), (capturable(), GRAPH)])
    assert [verdict.outcome for *_, verdict in judge_batch([job], DEVICE, careful=True)] == [Outcome.AGREE] * 2
    assert names == ["subject"] * 2


def _cell(_: ReplayInputs, steps: Steps, __: Setup) -> None:
    steps[1].cu_seqlens_k[1] += 1


def _guard(_: ReplayInputs, steps: Steps, __: Setup) -> None:
    beyond(steps[0].nsa_cache_seqlens, 3).fill_(7)


def _other_bucket(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    place = rig_for(setup, DEVICE).layout.places[0, Mode.DECODE, setup.buckets[-1], "cache_seqlens"]
    if inputs.batch_size != setup.buckets[-1]:
        steps[0].cache_seqlens.as_strided((1,), (1,), place.offset).fill_(7)


def _pool(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    inputs.req_to_token[1, 3] += 1


def _pool_gap(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    beyond(inputs.req_to_token[2]).fill_(0)


def _host_lengths(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    assert inputs.seq_lens_cpu is not None
    inputs.seq_lens_cpu[0] += 1


def _input(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    inputs.accept_lens[0] = 0


def _stale(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    kept = steps[0].nsa_cache_seqlens.clone()
    right(inputs, steps, setup)
    steps[0].nsa_cache_seqlens.copy_(torch.maximum(kept, steps[0].nsa_cache_seqlens))


def _adds_up(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    kept = steps[0].cache_seqlens[1].clone()  # differs from replay to replay
    right(inputs, steps, setup)
    steps[0].cache_seqlens[1] += kept == steps[0].cache_seqlens[1]


def _raises(*_: object) -> NoReturn:
    raise RuntimeError("planted")


def _raises_then(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    if int(inputs.seq_lens[1]) == 1:
        raise RuntimeError("planted")


def _moves(_: ReplayInputs, steps: Steps, __: Setup) -> None:
    steps[0].cu_seqlens_k.data = steps[0].cu_seqlens_k.clone()


def _swallows(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    try:
        torch.cat([inputs.seq_lens[:1], inputs.req_to_token[:1]])
    except RuntimeError:
        return


PLANTED: dict[str, tuple[Implementation, Code, int]] = {
    "a wrong cell": (subject(_cell), Code.WRONG_VALUE, 0),
    "a guard": (subject(_guard), Code.GUARD_WRITTEN, 0),
    "the frame": (subject(_other_bucket), Code.FRAME_WRITTEN, 0),
    "the pool": (subject(_pool), Code.INPUT_MUTATED, 0),
    "a gap of the pool": (subject(_pool_gap), Code.INPUT_MUTATED, 0),
    "the host's lengths": (subject(_host_lengths), Code.INPUT_MUTATED, 0),
    "an input": (subject(_input), Code.INPUT_MUTATED, 0),
    "what was left": (bare(_stale), Code.STALE, 1),
    "a second call": (bare(_adds_up), Code.NOT_IDEMPOTENT, 1),
    "an exception": (bare(_raises), Code.EXCEPTION, 0),
    "an exception later": (subject(_raises_then), Code.EXCEPTION, 1),
    "a buffer that moved": (subject(_moves), Code.MOVED, 0),
    "a swallowed error": (subject(_swallows), Code.SILENT_FALLBACK, 0),
}
NEEDS_WATCHING = ("a second call", "a swallowed error")


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found_and_its_neighbours_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = looked_at(monkeypatch)
    spoilt, code, at = PLANTED[name]
    before, verdict, after = judged(subject(), spoilt, subject())
    assert verdict.primary is not None
    assert (verdict.primary.code, verdict.primary.replay) == (code, at)
    assert (before.outcome, after.outcome) == (Outcome.AGREE, Outcome.AGREE)
    assert names == ["subject"], "nobody else was looked at"
    assert verdict == verify(CASE, spoilt), "a screening tells no more and no less"


@pytest.mark.parametrize("name", [name for name in PLANTED if name not in NEEDS_WATCHING])
def test_without_the_repeated_call_too(name: str) -> None:
    spoilt, code, _ = PLANTED[name]
    before, verdict, after = judged(subject(), spoilt, subject(), repeat=False)
    assert code in {finding.code for finding in verdict.findings}
    assert (before.outcome, after.outcome) == (Outcome.AGREE, Outcome.AGREE)


@pytest.mark.parametrize("name", NEEDS_WATCHING)
def test_what_only_a_repeated_case_shows(name: str) -> None:
    assert judged(PLANTED[name][0], repeat=False)[0].outcome is Outcome.AGREE


def test_an_uninitialised_temporary_is_found_where_calls_are_watched() -> None:
    case = Case(SETUP, (Replay(Mode.DECODE, (Request(9, 1), Request(7, 2))),))
    spoilt = subject(copy_of_uninitialised, extent=Extent.FULL)
    (verdict,) = judged(spoilt, case=case)
    assert [finding.code for finding in verdict.findings] == [Code.POISON]
    assert verdict == verify(case, spoilt)


def test_a_batch_goes_on_behind_an_exception() -> None:
    jobs = [Job(CASE, [(subject(), EAGER), (bare(_raises), EAGER), (capturable(), GRAPH)])] * 3
    outcomes = [(job, pair, verdict.outcome) for job, pair, verdict in judge_batch(jobs, DEVICE)]
    expected = [Outcome.AGREE, Outcome.DISAGREE, Outcome.AGREE]
    assert outcomes == [(job, pair, outcome) for job in range(3) for pair, outcome in enumerate(expected)]


def _once(bug: Bug) -> Bug:
    """``bug``, in the first call only."""
    calls: list[int] = []

    def spoil(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        calls.append(1)
        if len(calls) == 1:
            bug(inputs, steps, setup)

    return spoil


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        (_cell, "replay 0 left wrong content"),
        (_pool, "replay 0 left wrong content"),
        (_host_lengths, "seq_lens_cpu was changed"),
        (_raises, "planted"),
        (_moves, "step 0's cu_seqlens_k was moved"),
    ],
)
def test_nv501_what_was_seen_once_is_not_lost(bug: Bug, seen: str) -> None:
    before, verdict, after = judged(subject(), subject(_once(bug)), subject())
    assert verdict.primary is not None
    assert verdict.primary.code is Code.NOT_DETERMINISTIC
    assert f"run 1, among other cases: {seen}" in verdict.primary.message
    assert verdict.primary.message.endswith("run alone it agreed 3 of 3 times")
    assert (before.outcome, after.outcome) == (Outcome.AGREE, Outcome.AGREE)


def test_nv504_an_error_that_is_swallowed_once() -> None:
    """It remembers that the fast path fails, and does not try again: that is no lack of determinism."""
    (verdict,) = judged(subject(_once(_swallows)))
    assert [finding.code for finding in verdict.findings] == [Code.SILENT_FALLBACK]
    assert "cat raised RuntimeError" in verdict.findings[0].message


def test_shapes_that_are_changed_reach_nobody_else() -> None:
    def shapes(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        inputs.req_to_token.t_()
        inputs.accept_lens.resize_(1)
        steps[0].page_table_1.t_()

    once = Case(SETUP, CASE.replays[:1])
    for repeat in (False, True):
        verdicts = judged(subject(), subject(shapes), subject(), case=once, repeat=repeat)
        assert [verdicts[0].outcome, verdicts[2].outcome] == [Outcome.AGREE] * 2
        assert verdicts[1] == Judge(once, DEVICE).judge(subject(shapes), EAGER, repeat)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (judge, "expect"),
        (comparing, "paint"),
        (judge, "rig_for"),
        (comparing.TorchComparison, "begin"),
        (comparing.TorchComparison, "check"),
        (screening, "open_session"),
        (judge, "loads"),
    ],
)
def test_a_fault_of_the_checker_is_unknown(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not NO_GPU and owner is comparing.TorchComparison:
        pytest.skip("a GPU's memory is compared by a kernel")

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise ArithmeticError("a bug of the checker")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        for verdict in judged(subject(), subject(_cell)):
            assert (verdict.outcome, verdict.findings) == (Outcome.UNKNOWN, ())
            assert verdict.reason.startswith("the check itself failed: ArithmeticError: a bug of the checker")
    assert [verdict.outcome for verdict in judged(subject(), subject(_cell))] == [Outcome.AGREE, Outcome.DISAGREE]


def test_a_comparison_that_sees_nothing_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above rest on the flags: without them the wrong cell passes."""
    monkeypatch.setattr(screening.Screen, "flags", lambda self: [False] * self._used)
    assert judged(subject(_cell))[0].outcome is Outcome.AGREE


class _HostReads(TorchFunctionMode):
    """Counts what reads a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "__bool__", "__int__", "nonzero", "cpu", "numpy"):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


def test_one_read_for_all_that_is_screened_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batch.JOBS_BETWEEN_WAITS, DEVICE, 4)
    jobs = [Job(CASE, [(capturable(), EAGER), (capturable(), GRAPH)], fresh=False)] * 4
    for _ in judge_batch(jobs, DEVICE):
        pass
    with _HostReads() as counted:
        assert [verdict.outcome for *_, verdict in judge_batch(jobs, DEVICE)] == [Outcome.AGREE] * 8
    assert counted.reads == ["tolist"]


def test_what_is_in_flight_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, Phase, int]] = []

    def looks(*_: object) -> None:
        mark = MARKS[0].read()
        seen.append((mark.job, mark.pair, mark.phase, mark.replay))

    monkeypatch.setitem(batch.JOBS_BETWEEN_WAITS, DEVICE, 4)
    jobs = [Job(CASE, [(subject(), EAGER), (subject(looks), EAGER)], repeat=False)] * 2
    assert [verdict.outcome for *_, verdict in judge_batch(jobs, DEVICE)] == [Outcome.AGREE] * 4
    assert seen == [(job, 1, Phase.CALLING, replay) for job in range(2) for replay in range(2)]
    assert MARKS[0].read()[1:4] == (-1, -1, Phase.IDLE)


def test_ctrl_c_ends_the_batch() -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    state = random.getstate()
    with pytest.raises(KeyboardInterrupt):
        judged(subject(), subject(interrupted))
    assert random.getstate() == state
    assert judged(subject())[0].outcome is Outcome.AGREE


def test_chance_is_not_the_searchs() -> None:
    """Whoever seeds ``random`` for every case must not hide that an implementation depends on it."""
    drawn: list[float] = []

    def draws(*_: object) -> None:
        drawn.append(random.random())

    for repeat in (True, False):
        for _ in range(2):
            random.seed(0)
            judged(subject(draws), repeat=repeat)
            assert random.random() == random.Random(0).random()
    assert len(set(drawn)) == len(drawn)


def test_a_setup_too_large_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    names = looked_at(monkeypatch)
    monkeypatch.setattr(screening, "SCREENED_CELLS", 100)
    assert [verdict.outcome for verdict in judged(subject(), subject(_cell))] == [Outcome.AGREE, Outcome.DISAGREE]
    assert names == ["subject"] * 2


def test_a_trespass_that_only_the_device_sees_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    session: Any = type(GRAPH.open(rig_for(SETUP, DEVICE), capturable(), {}))
    real, asked = session.trespassed, []

    def seen_once(self: Any) -> Any:
        asked.append(self)
        return torch.tensor(True, device=DEVICE) if len(asked) == 1 else real(self)

    monkeypatch.setattr(session, "trespassed", seen_once)
    verdicts = [verdict for *_, verdict in judge_batch([Job(CASE, [(capturable(), GRAPH)])], DEVICE)]
    assert verdicts[0].primary is not None
    assert verdicts[0].primary.code is Code.NOT_DETERMINISTIC
    assert "handed out again" in verdicts[0].primary.message


@pytest.mark.skipif(bool(NO_GPU), reason="streams are CUDA's")
def test_work_on_another_stream_harms_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It overtakes what was asked for before it, and is late for what comes next."""
    monkeypatch.setattr(screening, "SCREENED_DELAY_CYCLES", 100_000_000)
    stream, sleep = graph.new_stream(), torch.cuda._sleep

    def roam(_inputs: ReplayInputs, steps: Steps, _setup: Setup) -> None:
        with torch.cuda.stream(stream):
            steps[0].cache_seqlens.fill_(7)
            sleep(100_000_000)  # type: ignore[no-untyped-call]
            steps[0].cache_seqlens.fill_(8)

    case = Case(Setup(table_width=64, pool_width=64), (Replay(requests=(Request(seq_len=3),)),) * 2)
    innocent = load()["vectorized"]
    pairs = [(innocent, EAGER), (subject(roam), EAGER), (innocent, EAGER)]
    told = [verdict.outcome for _, _, verdict in judge_batch([Job(case, pairs)] * 2, "cuda")]
    assert told == [Outcome.AGREE, Outcome.DISAGREE, Outcome.AGREE] * 2
