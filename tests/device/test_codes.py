"""Every code that the eager executor can see: what provokes it, and what the finding says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from device.subjects import Bug, Steps, bare, beyond, copy_of_uninitialised, right, subject

from nsa_verify import (
    Case,
    Code,
    CtxLens,
    Extent,
    Finding,
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
from nsa_verify.device.layout import POISON_LOW, POISON_SPAN, arena_layout, poison

POISONED = range(POISON_LOW, POISON_LOW + POISON_SPAN)

SETUP = Setup(
    num_draft_tokens=3,
    page_size=16,
    table_width=40,
    pool_rows=3,
    pool_width=48,
    pool_row_stride=50,
    num_steps=2,
    buckets=(2, 4),
)
DECODE = Case(SETUP, (Replay(Mode.DECODE, (Request(13, 1), Request(5, 2))),))
VERIFY = Case(SETUP, (Replay(Mode.TARGET_VERIFY, (Request(13, 1), Request(5, 2))),))
RAGGED = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, (Request(13, 1, 2), Request(5, 2, 3))),))
TWICE = Case(SETUP, (Replay(Mode.DECODE, (Request(20, 1), Request(9, 2))), *DECODE.replays))


def disagreement(case: Case, implementation: Implementation) -> Verdict:
    verdict = verify(case, implementation)
    assert verdict.outcome is Outcome.DISAGREE, verdict
    for finding in verdict.findings:
        assert (finding.implementation, finding.executor) == ("subject", "eager")
        assert finding.mode is case.replays[finding.replay].mode
    return verdict


def only_finding(case: Case, implementation: Implementation) -> Finding:
    (finding,) = disagreement(case, implementation).findings
    return finding


def told(finding: Finding) -> dict[str, object]:
    names = ("code", "buffer", "replay", "step", "element", "region", "expected", "got", "count")
    return {name: getattr(finding, name) for name in names}


@pytest.mark.parametrize("case", [DECODE, VERIFY, RAGGED, TWICE])
def test_the_subject_is_right(case: Case) -> None:
    assert verify(case, subject()).outcome is Outcome.AGREE


@dataclass(frozen=True)
class Spoilt:
    """A bug, the case that shows it, and what the one finding says of the first wrong cell."""

    case: Case
    bug: Bug
    code: Code
    buffer: str
    element: tuple[int, ...]
    expected: int
    got: int
    region: str = "live"
    step: int | None = 0
    count: int = 1


def _spoil(buffer: str, at: Any, value: int, step: int = 0) -> Bug:
    def bug(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        getattr(steps[step], buffer)[at] = value

    return bug


WRONG_VALUES = [
    Spoilt(DECODE, _spoil("cache_seqlens", 1, 6), Code.WRONG_VALUE, "cache_seqlens", (1,), 5, 6),
    Spoilt(DECODE, _spoil("cu_seqlens_k", 1, 12, step=1), Code.WRONG_VALUE, "cu_seqlens_k", (1,), 13, 12, step=1),
    Spoilt(DECODE, _spoil("nsa_cache_seqlens", 0, 7), Code.WRONG_VALUE, "nsa_cache_seqlens", (0,), 8, 7),
    Spoilt(DECODE, _spoil("page_table_1", (1, 4), 7), Code.WRONG_VALUE, "page_table_1", (1, 4), 1100, 7),
    Spoilt(VERIFY, _spoil("real_page_table", (2, 0), 7), Code.WRONG_VALUE, "real_page_table", (2, 0), 65, 7),
    Spoilt(VERIFY, _spoil("nsa_seqlens_expanded", 4, 9), Code.WRONG_VALUE, "nsa_seqlens_expanded", (4,), 7, 9),
]
BROKEN_INVARIANTS = [
    Spoilt(DECODE, _spoil("cache_seqlens", 1, -4), Code.INVARIANT, "cache_seqlens", (1,), 5, -4),
    Spoilt(VERIFY, _spoil("nsa_seqlens_expanded", 0, -1), Code.INVARIANT, "nsa_seqlens_expanded", (0,), 14, -1),
    Spoilt(VERIFY, _spoil("nsa_cache_seqlens", 5, 9), Code.INVARIANT, "nsa_cache_seqlens", (5,), 8, 9),
    Spoilt(DECODE, _spoil("cu_seqlens_k", 0, 1), Code.INVARIANT, "cu_seqlens_k", (0,), 0, 1),
    Spoilt(DECODE, _spoil("cu_seqlens_k", 1, 19), Code.INVARIANT, "cu_seqlens_k", (1,), 13, 19),
    Spoilt(RAGGED, _spoil("nsa_cu_seqlens_k", 5, 29), Code.INVARIANT, "nsa_cu_seqlens_k", (5,), 28, 29),
]
IN_THE_FRAME = [
    Spoilt(
        RAGGED,
        lambda _, steps, __: steps[1].page_table_1[5].zero_(),
        *(Code.FRAME_WRITTEN, "page_table_1", (5, 0), 0, 0, "frame", 1, 40),
    ),
    Spoilt(
        RAGGED, _spoil("nsa_seqlens_expanded", 5, 3), Code.FRAME_WRITTEN, "nsa_seqlens_expanded", (5,), 0, 3, "frame"
    ),
    Spoilt(DECODE, _spoil("page_table_1", (0, 13), 7), Code.FRAME_WRITTEN, "page_table_1", (0, 13), 0, 7, "frame"),
    Spoilt(DECODE, _spoil("real_page_table", (1, 1), 7), Code.FRAME_WRITTEN, "real_page_table", (1, 1), 0, 7, "frame"),
    Spoilt(DECODE, _spoil("cu_seqlens_q", 1, 7), Code.FRAME_WRITTEN, "cu_seqlens_q", (1,), 1, 7, "frame"),
    Spoilt(RAGGED, _spoil("nsa_cu_seqlens_q", 6, 0), Code.FRAME_WRITTEN, "nsa_cu_seqlens_q", (6,), 6, 0, "frame"),
]


@pytest.mark.parametrize("spoilt", [*WRONG_VALUES, *BROKEN_INVARIANTS, *IN_THE_FRAME])
def test_one_spoilt_cell_is_named(spoilt: Spoilt) -> None:
    finding = only_finding(spoilt.case, subject(spoilt.bug))
    assert told(finding) == {
        "code": spoilt.code,
        "buffer": spoilt.buffer,
        "replay": 0,
        "step": spoilt.step,
        "element": spoilt.element,
        "region": spoilt.region,
        "expected": finding.expected if spoilt.region == "frame" and spoilt.expected == 0 else spoilt.expected,
        "got": spoilt.got,
        "count": spoilt.count,
    }
    if spoilt.region == "frame" and spoilt.expected == 0:
        assert finding.expected in POISONED
        assert finding.before == finding.expected
    here = [cell for cell in finding.window if cell.element == spoilt.element]
    assert [(cell.got, cell.expected, cell.differs) for cell in here] == [(finding.got, finding.expected, True)]
    assert len(finding.window) > 1 or spoilt.buffer == "real_page_table"


def test_two_faults_are_two_findings_gravest_first() -> None:
    def bug(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        steps[1].page_table_1[0, 0] = 3
        steps[0].page_table_1[0, 30] = 4

    found = disagreement(DECODE, subject(bug)).findings
    assert [(it.code, it.step, it.element) for it in found] == [
        (Code.FRAME_WRITTEN, 0, (0, 30)),
        (Code.WRONG_VALUE, 1, (0, 0)),
    ]


def test_stale_value_of_an_earlier_replay() -> None:
    def left_from_the_first(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        kept = int(steps[1].cu_seqlens_k[2])
        right(inputs, steps, setup)
        if kept == 29:
            steps[1].cu_seqlens_k[2] = kept

    finding = only_finding(TWICE, bare(left_from_the_first))
    assert told(finding) == {
        "code": Code.STALE,
        "buffer": "cu_seqlens_k",
        "replay": 1,
        "step": 1,
        "element": (2,),
        "region": "live",
        "expected": 18,
        "got": 29,
        "count": 1,
    }
    assert finding.before == 29


def test_a_wrong_value_that_was_there_already_is_not_stale() -> None:
    """The first replay may leave what the second writes by mistake; without the first it is written all the same."""
    first = Replay(Mode.DECODE, (Request(13, 1), Request(7, 2)))
    case = Case(SETUP, (first, *DECODE.replays))

    def always_seven(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        steps[0].cache_seqlens[1] = 7

    finding = only_finding(case, subject(always_seven))
    assert (finding.code, finding.replay, finding.before, finding.got) == (Code.WRONG_VALUE, 1, 7, 7)


def test_poison_where_nothing_was_written() -> None:
    def only_step_0(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        right(inputs, steps[:1], setup)

    found = disagreement(DECODE, bare(only_step_0)).findings
    assert {it.code for it in found} == {Code.POISON}
    assert {(it.step, it.region, it.replay) for it in found} == {(1, "live", 0)}
    cache = next(it for it in found if it.buffer == "cache_seqlens")
    place = arena_layout(SETUP).places[1, Mode.DECODE, 2, "cache_seqlens"]
    assert (cache.element, cache.expected, cache.got, cache.count) == ((0,), 13, poison(place.offset), 2)


def test_the_leading_0_left_out_is_poison() -> None:
    def no_leading_0(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        kept = steps[0].nsa_cu_seqlens_k[0].clone()
        right(inputs, steps, setup)
        steps[0].nsa_cu_seqlens_k[0] = kept

    finding = only_finding(RAGGED, bare(no_leading_0))
    assert (finding.code, finding.buffer, finding.element) == (Code.POISON, "nsa_cu_seqlens_k", (0,))
    assert finding.expected == 0
    assert finding.got in POISONED


UNINITIALISED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "empty": lambda like: torch.empty(like.shape, dtype=like.dtype),
    "empty_like": torch.empty_like,
    "empty_strided": lambda like: torch.empty_strided(like.shape, (1,), dtype=like.dtype),
    "empty_permuted": lambda like: torch.empty_permuted(like.shape, (0,), dtype=like.dtype),
    "new_empty": lambda like: like.new_empty(like.shape),
    "new_empty_strided": lambda like: like.new_empty_strided(like.shape, (1,)),
    "empty int64": lambda like: torch.empty(like.shape, dtype=torch.int64),
}


@pytest.mark.parametrize("make", UNINITIALISED.values(), ids=UNINITIALISED)
def test_an_uninitialised_temporary_copied_into_the_live_region(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def bug(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        steps[0].cu_seqlens_k.copy_(make(steps[0].cu_seqlens_k))

    finding = only_finding(DECODE, subject(bug))
    assert (finding.code, finding.buffer, finding.element, finding.count) == (Code.POISON, "cu_seqlens_k", (0,), 3)
    assert (finding.expected, finding.region) == (0, "live")
    assert finding.got in POISONED


def test_an_uninitialised_temporary_copied_into_the_slack() -> None:
    finding = only_finding(DECODE, subject(copy_of_uninitialised, extent=Extent.FULL))
    assert (finding.code, finding.buffer, finding.element) == (Code.POISON, "page_table_1", (0, 13))
    assert (finding.region, finding.count, finding.expected) == ("slack", 40 - 13, 1061)
    assert finding.got in POISONED


def test_a_float_temporary_is_nan() -> None:
    seen: list[bool] = []

    def bug(_: ReplayInputs, __: Steps, ___: Setup) -> None:
        seen.append(bool(torch.empty(3).isnan().all()))

    assert verify(DECODE, subject(bug)).outcome is Outcome.AGREE
    assert seen
    assert all(seen)


@pytest.mark.parametrize("elements", [0, 5])
def test_a_write_past_a_buffer(elements: int) -> None:
    def bug(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        beyond(steps[1].nsa_cu_seqlens_k, elements).fill_(9)

    finding = only_finding(RAGGED, subject(bug))
    layout = arena_layout(SETUP)
    place = layout.places[1, Mode.DRAFT_EXTEND, 2, "nsa_cu_seqlens_k"]
    before = poison(place.offset + place.columns + elements)
    assert told(finding) == {
        "code": Code.GUARD_WRITTEN,
        "buffer": "nsa_cu_seqlens_k",
        "replay": 0,
        "step": 1,
        "element": (elements,),
        "region": "guard",
        "expected": before,
        "got": 9,
        "count": 1,
    }
    assert "guard zone behind nsa_cu_seqlens_k" in finding.message


def test_a_write_to_the_buffers_of_another_bucket() -> None:
    case = Case(SETUP, (*DECODE.replays, Replay(Mode.DECODE, (Request(3),) * 4)))
    kept: dict[int, torch.Tensor] = {}

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        kept[inputs.batch_size] = steps[0].cu_seqlens_k
        if inputs.batch_size == 4:
            kept[2][1] = 4

    finding = only_finding(case, subject(bug))
    assert (finding.code, finding.buffer, finding.replay, finding.step) == (Code.FRAME_WRITTEN, "cu_seqlens_k", 1, 0)
    assert (finding.element, finding.expected, finding.got, finding.region) == ((1,), 13, 4, "frame")
    assert "of the buffers of (decode, bucket 2)" in finding.message


def test_a_write_between_the_rows_of_a_table() -> None:
    setup = Setup(table_width=16, table_row_stride=19, pool_width=16, buckets=(2,), stride_skew=2, num_steps=2)
    case = Case(setup, (Replay(requests=(Request(), Request())),))

    def bug(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        beyond(steps[1].page_table_1[0], 1).fill_(4)

    finding = only_finding(case, subject(bug))
    assert (finding.code, finding.buffer, finding.element) == (Code.FRAME_WRITTEN, "page_table_1", (0, 17))
    assert (finding.step, finding.region) == (1, "frame")


def test_a_table_of_one_row_has_a_row_and_a_column() -> None:
    finding = only_finding(Case(Setup(), (Replay(requests=(Request(),)),)), subject(_spoil("page_table_1", (0, 0), 5)))
    assert (finding.buffer, finding.element, finding.message) == (
        "page_table_1",
        (0, 0),
        "page_table_1[0, 0]: expected 1000, got 5",
    )


def test_optional_outputs_are_checked_where_they_are_declared() -> None:
    setup = Setup(num_draft_tokens=2, ctx_lens=CtxLens.OWN, schedule=True, num_sms=2, pool_width=32)
    case = Case(setup, (Replay(Mode.TARGET_VERIFY, (Request(4),)),))
    schedule = only_finding(case, subject(_spoil("paged_mqa_schedule", (1, 1), 7)))
    assert (schedule.code, schedule.buffer, schedule.element) == (Code.WRONG_VALUE, "paged_mqa_schedule", (1, 1))
    assert (schedule.expected, schedule.got) == (0, 7)
    ctx_lens = only_finding(case, subject(_spoil("paged_mqa_ctx_lens", (0, 1), 5)))
    assert (ctx_lens.code, ctx_lens.buffer, ctx_lens.element) == (Code.WRONG_VALUE, "paged_mqa_ctx_lens", (0, 1))
    assert (ctx_lens.expected, ctx_lens.got) == (6, 5)

    def given_nothing(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        assert (steps[0].paged_mqa_ctx_lens, steps[0].paged_mqa_schedule) == (None, None)

    assert verify(case, subject(given_nothing, optional_outputs=frozenset())).outcome is Outcome.AGREE


def _raise_on_2(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
    if inputs.batch_size == 2:
        raise ZeroDivisionError("no rows to divide\nand more")


def _exit(_: ReplayInputs, __: Steps, ___: Setup) -> NoReturn:
    raise SystemExit("gave up")


def _index_error(inputs: ReplayInputs, _: Steps, __: Setup) -> object:
    return inputs.seq_lens[1000]


@pytest.mark.parametrize(
    ("bug", "start"),
    [
        (_raise_on_2, "ZeroDivisionError: no rows to divide"),
        (_exit, "SystemExit: gave up ("),
        (_index_error, "IndexError: index 1000 is out of bounds"),
    ],
)
def test_an_exception_is_named_with_its_line(bug: Bug, start: str) -> None:
    finding = only_finding(TWICE, subject(bug))
    assert (finding.code, finding.replay, finding.mode) == (Code.EXCEPTION, 0, Mode.DECODE)
    assert (finding.step, finding.buffer, finding.element, finding.region) == (None, None, (), None)
    assert finding.message.startswith(start)
    assert "\n" not in finding.message
    # The innermost line of the file that the implementation is in, which for these is that of ``subject``.
    assert f"({Path(subject().source.rpartition(':')[0]).name}:" in finding.message


def test_the_line_of_an_exception_is_the_one_that_raised(tmp_path: Path) -> None:
    source = tmp_path / "falls_over.py"
    source.write_text("def refresh(inputs, steps, setup):\n    helper(steps)\n\ndef helper(steps):\n    steps[99]\n")
    namespace: dict[str, Any] = {}
    exec(compile(source.read_text(), str(source), "exec"), namespace)
    finding = only_finding(DECODE, bare(namespace["refresh"]))
    assert finding.message == "IndexError: tuple index out of range (falls_over.py:5 in helper)"


def test_an_exception_in_a_later_replay_names_that_replay() -> None:
    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        if inputs.mode is Mode.DRAFT_EXTEND:
            raise RuntimeError

    case = Case(SETUP, (*DECODE.replays, *RAGGED.replays))
    finding = only_finding(case, subject(bug))
    assert (finding.code, finding.replay, finding.mode) == (Code.EXCEPTION, 1, Mode.DRAFT_EXTEND)
    assert finding.message.startswith("RuntimeError: no message (")


def test_a_wrong_value_before_an_exception_comes_first() -> None:
    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        if inputs.mode is Mode.DRAFT_EXTEND:
            raise RuntimeError("later")
        steps[0].cache_seqlens[0] = 3

    case = Case(SETUP, (*DECODE.replays, *RAGGED.replays))
    finding = only_finding(case, subject(bug))
    assert (finding.code, finding.replay) == (Code.WRONG_VALUE, 0)


def test_not_idempotent() -> None:
    """The draft tokens are added onto what the buffer holds, unless that is poison."""

    def accumulates(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        held = int(steps[1].cache_seqlens[0])
        right(inputs, steps, setup)
        if held not in POISONED:
            steps[1].cache_seqlens[0] += 3

    found = disagreement(VERIFY, bare(accumulates)).findings
    assert [it.code for it in found] == [Code.NOT_IDEMPOTENT, Code.WRONG_VALUE]
    assert told(found[0]) == {**told(found[1]), "code": Code.NOT_IDEMPOTENT}
    assert (found[0].buffer, found[0].step, found[0].replay, found[0].element) == ("cache_seqlens", 1, 0, (0,))
    assert (found[0].expected, found[0].got, found[0].region) == (16, 19, "live")
    assert found[0].message.startswith(
        "the first call was right; after a second with the same inputs: cache_seqlens[0]"
    )


def test_an_exception_on_the_second_call_is_not_idempotent() -> None:
    def bug(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        if int(steps[0].cu_seqlens_q[0]) == 0 and int(steps[0].cache_seqlens[0]) not in POISONED:
            raise RuntimeError("been here")

    finding = only_finding(DECODE, subject(before=bug))
    assert (finding.code, finding.replay) == (Code.NOT_IDEMPOTENT, 0)
    assert "RuntimeError: been here" in finding.message
    assert finding.message.endswith("on a second call")


class _Calls:
    """How often an implementation was called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


def test_not_deterministic_when_a_rerun_agrees() -> None:
    calls = _Calls()

    def wrong_once(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        if calls() == 1:
            steps[1].page_table_1[1, 2] = 77

    found = disagreement(DECODE, subject(wrong_once)).findings
    assert [it.code for it in found] == [Code.NOT_DETERMINISTIC, Code.WRONG_VALUE]
    first = found[0]
    assert (first.buffer, first.step, first.replay, first.element) == ("page_table_1", 1, 0, (1, 2))
    assert (first.expected, first.got, first.region) == (1098, 77, "live")
    assert first.message == f"run 1: NV101 {found[1].message}; run 2 agreed"


def test_not_deterministic_when_another_cell_is_wrong() -> None:
    calls = _Calls()

    def wandering(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        steps[0].page_table_1[0, calls() % 7] = 77

    first = disagreement(DECODE, subject(wandering)).findings[0]
    assert first.code is Code.NOT_DETERMINISTIC
    assert first.message.endswith("run 2 disagreed elsewhere")


def test_not_deterministic_when_a_cell_holds_another_wrong_value() -> None:
    calls = _Calls()

    def random_value(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        steps[0].cache_seqlens[0] = 100 + calls()

    assert disagreement(DECODE, subject(random_value)).findings[0].code is Code.NOT_DETERMINISTIC


def test_not_deterministic_when_another_call_raises() -> None:
    calls = _Calls()

    def raises_at_random(_: ReplayInputs, __: Steps, ___: Setup) -> None:
        if calls() in (2, 3):
            raise RuntimeError("now")

    found = disagreement(TWICE, subject(raises_at_random)).findings
    assert [it.code for it in found] == [Code.NOT_DETERMINISTIC, Code.EXCEPTION]


def test_a_steady_fault_is_not_called_flaky() -> None:
    assert [it.code for it in disagreement(DECODE, subject(_spoil("cache_seqlens", 0, 3))).findings] == [
        Code.WRONG_VALUE
    ]
