"""The backend's methods as rows of the matrix: judged byte by byte, eagerly and captured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from helpers import draw_many

from nsa_verify import Case, CtxLens, Mode, Outcome, Replay, Request, Setup, verify
from nsa_verify.core import implementation as declaring
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, registered
from nsa_verify.core.registry import load, load_builtin, load_reference
from nsa_verify.device.rig import close_rigs
from nsa_verify.engine.events import Tally
from nsa_verify.kernels import BACKEND_ROWS, BUILTIN_MODULES, backend
from nsa_verify.shell.render import tally_lines
from nsa_verify.strategies import cases

NAMES = (
    "engine-triton",
    "engine-python",
    "engine-multistep",
    "engine-multistep-python",
    "engine-fallback",
    "engine-precomputed",
)
EXPANSIONS = ("engine-expansion", "engine-expansion-inplace")
GRAPH = "graph" if torch.cuda.is_available() else "simulated-graph"
DRAWN = 30 if torch.cuda.is_available() else 16
"""Cases; interpreted, each launch takes milliseconds."""
UNIFORM = {Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2}


@pytest.fixture(scope="module", autouse=True)
def _rows() -> Iterator[None]:
    """The rows, loaded as ``--impl`` does; what other tests find registered stays what it was."""
    load_builtin()
    before = registered()
    sys.modules.pop(BACKEND_ROWS, None)
    assert load_reference(BACKEND_ROWS) == (*NAMES, *EXPANSIONS)
    yield
    close_rigs()
    declaring._registered.clear()
    declaring._registered.update(before)


@cache
def _drawn() -> tuple[Case, ...]:
    return tuple(draw_many(cases(), DRAWN, seeded=11))


def _sequences() -> Iterator[Any]:
    """Every mode after every other and each bucket after each other, with padding, over one page table."""
    wide: dict[str, Any] = {"num_draft_tokens": 3, "page_size": 16, "table_width": 36, "pool_rows": 4, "pool_width": 43}
    setup = Setup(**wide, buckets=(1, 2, 4), num_steps=2, stride_skew=3, schedule=True, num_sms=3, ctx_lens=CtxLens.OWN)
    rows = tuple(Request(seq_len=length, pool_row=row, accept_len=row) for row, length in enumerate((20, 3, 36, 9)))
    modes = list(Mode)
    for turn in range(4):
        counts = (4, 1, 0, 2, 3, 1, 4, 0)
        replays = tuple(
            Replay(mode=modes[(turn + index * (1 + turn % 3)) % 4], requests=rows[:count], pool_seed=index)
            for index, count in enumerate(counts)
        )
        yield pytest.param(Case(setup=setup, replays=replays), id=f"turn-{turn}")


def _assert_agrees(case: Case, name: str, executor: str) -> bool:
    """Whether anything was run; what was has agreed."""
    verdict = verify(case, name, executor=executor)
    run = {replay.mode for replay in case.replays} & registered()[name].capturable
    if executor == "eager" or run:
        assert verdict.outcome is Outcome.AGREE, (case, verdict)
        return True
    assert verdict.outcome is Outcome.NOT_APPLICABLE, (case, verdict)
    return False


def test_the_drawn_cases_have_what_matters() -> None:
    drawn = _drawn()
    assert {replay.mode for case in drawn for replay in case.replays} == set(Mode)
    assert sum(len({case.bucket(index) for index in range(len(case.replays))}) > 1 for case in drawn) >= 2
    assert sum(len({replay.mode for replay in case.replays}) > 1 for case in drawn) >= 2
    assert any(case.setup.num_steps > 1 for case in drawn)
    assert any(case.setup.aliased_seq_lens for case in drawn)


@pytest.mark.parametrize("name", NAMES)
def test_drawn_cases(name: str) -> None:
    for case in _drawn():
        assert _assert_agrees(case, name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_drawn_cases_captured(name: str) -> None:
    captured = sum(_assert_agrees(case, name, GRAPH) for case in _drawn()[: DRAWN // 2])
    assert captured >= DRAWN // 4 or not registered()[name].capturable


@pytest.mark.parametrize("executor", ["eager", GRAPH])
@pytest.mark.parametrize("case", list(_sequences()))
@pytest.mark.parametrize("name", NAMES)
def test_sequences_across_buckets_and_modes(name: str, case: Case, executor: str) -> None:
    assert _assert_agrees(case, name, executor) or not registered()[name].capturable


def test_the_rows_declare_what_they_are() -> None:
    rows = registered()
    declared = {name: (str(rows[name].extent), set(rows[name].capturable)) for name in NAMES}
    assert declared == {
        "engine-triton": ("live", set(Mode)),
        "engine-python": ("max", set()),
        "engine-multistep": ("live", set(Mode)),
        "engine-multistep-python": ("full", UNIFORM),
        "engine-fallback": ("max", set()),
        "engine-precomputed": ("full", UNIFORM),
    }
    for name in NAMES:
        assert rows[name].modes == set(Mode)
        assert rows[name].optional_outputs == OPTIONAL_OUTPUTS
        assert not rows[name].host_lengths


def test_the_rows_come_by_reference_only() -> None:
    assert BACKEND_ROWS not in BUILTIN_MODULES
    assert list(load([BACKEND_ROWS]))[-8:] == [*NAMES, *EXPANSIONS]
    assert load_reference(BACKEND_ROWS) == (*NAMES, *EXPANSIONS)


@cache
def _ragged() -> tuple[Case, ...]:
    return tuple(draw_many(cases(modes=[Mode.DRAFT_EXTEND]), DRAWN, seeded=12))


@pytest.mark.parametrize(
    ("name", "executor"), [(EXPANSIONS[0], "eager"), (EXPANSIONS[0], GRAPH), (EXPANSIONS[1], "eager")]
)
def test_the_expansions_alone(name: str, executor: str) -> None:
    agreed = [verify(case, name, executor=executor) for case in _ragged()]
    assert {it.outcome for it in agreed} <= {Outcome.AGREE, Outcome.NOT_APPLICABLE}, agreed
    assert sum(it.outcome is Outcome.AGREE for it in agreed) >= DRAWN * 3 // 5


@pytest.mark.parametrize(("rows", "off"), [(slice(1, 2), 1), (slice(3, 4), 0)])
@pytest.mark.parametrize("name", EXPANSIONS)
def test_an_expansion_that_does_wrong_is_found(
    name: str, rows: slice, off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong live row, and a row behind them that is written."""
    requests = tuple(Request(seq_len=9, accept_len=accept_len) for accept_len in (2, 1))
    setup = Setup(num_draft_tokens=2, buckets=(2,))
    case = Case(setup=setup, replays=(Replay(mode=Mode.DRAFT_EXTEND, requests=requests),))
    assert verify(case, name).outcome is Outcome.AGREE
    function = "fill_draft_extend_metadata_" + ("inplace" if name.endswith("inplace") else "onepass")
    right = getattr(sys.modules[BACKEND_ROWS], function)

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        arguments[3][rows].add_(1 + off)

    monkeypatch.setattr(sys.modules[BACKEND_ROWS], function, wrong)
    assert verify(case, name).outcome is Outcome.DISAGREE


def _one_each(_self: object, bs: int, _spec_info: object) -> torch.Tensor:
    return torch.ones(bs, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "method", "wrong"),
    [
        *((name, "_accept_lens", _one_each) for name in NAMES),
        ("engine-triton", "_refresh", lambda _self, _inputs, _buffers: None),
        ("engine-python", "_refresh", lambda _self, _inputs, _buffers: None),
        ("engine-multistep-python", "_prepared", lambda _self, _bs, buffers: buffers.cu_seqlens_k.zero_()),
        ("engine-fallback", "_refresh", lambda _self, _inputs, _buffers: None),
    ],
)
def test_a_method_that_does_wrong_is_found(monkeypatch: pytest.MonkeyPatch, name: str, method: str, wrong: Any) -> None:
    requests = tuple(Request(seq_len=9, accept_len=accept_len) for accept_len in (2, 0))
    case = Case(
        setup=Setup(num_draft_tokens=2, buckets=(2,)), replays=(Replay(mode=Mode.DRAFT_EXTEND, requests=requests),)
    )
    assert verify(case, name).outcome is Outcome.AGREE
    monkeypatch.setattr(backend.NativeSparseAttnBackend, method, wrong)
    assert verify(case, name).outcome is Outcome.DISAGREE


TWO_STEPS = Case(
    setup=Setup(buckets=(2,), num_steps=2, schedule=True),
    replays=(Replay(requests=(Request(seq_len=9), Request(seq_len=3))),),
)


def test_each_fallback_is_shown_with_its_count() -> None:
    tally = Tally()
    for name in NAMES:
        verdict = verify(TWO_STEPS, name)
        assert verdict.outcome is Outcome.AGREE
        tally.count(verdict, eager=True)
    (shown,) = [line for line in tally_lines(tally) if line.startswith("fallbacks: ")]
    calls = shown.rpartition(" x ")[2]
    assert shown == f"fallbacks: engine-fallback: {sys.modules[BACKEND_ROWS].WITHOUT_TRITON.missing} x {calls}"
    assert int(calls) > 0
    assert int(calls) % TWO_STEPS.setup.num_steps == 0


def test_a_schedule_refreshed_in_one_step_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TWO_STEPS
    assert verify(case, "engine-precomputed").outcome is Outcome.AGREE
    copy = backend._copy_everywhere

    def forgetful(backends: Any, bs: int, precomputed: Any, mode: Mode) -> None:
        kept = backends[0].captured[mode, bs].paged_mqa_schedule
        before = kept.clone()
        copy(backends, bs, precomputed, mode)
        if forgotten:
            kept.copy_(before)
        forgotten.append(bs)

    forgotten: list[int] = []
    monkeypatch.setattr(backend, "_copy_everywhere", forgetful)
    assert verify(case, "engine-precomputed").outcome is Outcome.DISAGREE
