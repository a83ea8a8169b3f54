"""Several replays over the same memory: modes and buckets change, the page tables are shared."""

from __future__ import annotations

import itertools

import pytest
from device.subjects import Steps, bare, right, subject
from helpers import draw_many

from nsa_verify import Case, Code, Extent, Mode, Outcome, Replay, ReplayInputs, Request, Setup, verify
from nsa_verify.core.registry import ImplementationError
from nsa_verify.device.layout import arena_layout, poison
from nsa_verify.strategies import cases

SETUP = Setup(
    num_draft_tokens=2,
    page_size=16,
    table_width=30,
    pool_rows=4,
    pool_width=34,
    pool_row_stride=37,
    num_steps=2,
    buckets=(1, 2, 4),
    fill_seq_len=0,
)
LONG = (Request(30, 1, 2), Request(29, 2, 2), Request(17, 3, 1), Request(9, 0, 0))
SHORT = (Request(3, 2, 1),)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(Mode, Mode)))
def test_every_mode_after_every_other_in_another_bucket(first: Mode, second: Mode) -> None:
    replays = (Replay(first, LONG), Replay(second, SHORT), Replay(first, ()), Replay(second, LONG, pool_seed=1))
    for extent in Extent:
        verdict = verify(Case(SETUP, replays), subject(extent=extent))
        assert verdict.outcome is Outcome.AGREE
        assert verdict.modes == tuple(dict.fromkeys((first, second)))


def test_the_subject_agrees_on_whatever_is_drawn() -> None:
    for case in draw_many(cases(), 150, seeded=3):
        assert verify(case, subject()).outcome is Outcome.AGREE, case


def test_rows_past_the_ragged_total_keep_what_the_larger_batch_left() -> None:
    case = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, LONG), Replay(Mode.DRAFT_EXTEND, LONG[2:])))

    def swept(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        if inputs.batch_size == 2:
            steps[0].page_table_1[1] = 0

    assert verify(case, subject()).outcome is Outcome.AGREE
    finding = verify(case, subject(swept)).primary
    assert finding is not None
    assert (finding.code, finding.replay, finding.element) == (Code.FRAME_WRITTEN, 1, (1, 0))
    assert (finding.expected, finding.got) == (1000 + 34, 0)


def test_the_frame_keeps_what_is_there_and_not_what_was_there_first() -> None:
    """Poison put back over what the larger batch left is a write like any other."""
    case = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, LONG), Replay(Mode.DRAFT_EXTEND, LONG[2:])))
    place = arena_layout(SETUP).places[0, Mode.DRAFT_EXTEND, 2, "page_table_1"]
    at = place.offset + place.stride

    def put_back(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        if inputs.batch_size == 2:
            steps[0].page_table_1[1, 0] = poison(at)

    finding = verify(case, subject(put_back)).primary
    assert finding is not None
    assert (finding.code, finding.replay, finding.element) == (Code.FRAME_WRITTEN, 1, (1, 0))
    assert (finding.expected, finding.got, finding.count) == (1034, poison(at), 1)


def test_a_disagreement_names_the_first_replay_that_shows_it() -> None:
    replays = (Replay(Mode.DECODE, LONG), Replay(Mode.TARGET_VERIFY, SHORT), Replay(Mode.TARGET_VERIFY, LONG))

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        if inputs.mode is Mode.TARGET_VERIFY:
            steps[1].cache_seqlens[0] = 1

    finding = verify(Case(SETUP, replays), subject(bug)).primary
    assert finding is not None
    assert (finding.replay, finding.mode, finding.step) == (1, Mode.TARGET_VERIFY, 1)


def test_replays_of_undeclared_modes_are_left_out() -> None:
    replays = (Replay(Mode.DECODE, LONG), Replay(Mode.TARGET_VERIFY, LONG), Replay(Mode.DECODE, SHORT))
    served = []

    def bug(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
        served.append((inputs.mode, inputs.batch_size))

    verdict = verify(Case(SETUP, replays), subject(bug, modes=[Mode.DECODE]))
    assert (verdict.outcome, verdict.modes) == (Outcome.AGREE, (Mode.DECODE,))
    assert served == [(Mode.DECODE, 4), (Mode.DECODE, 1), (Mode.DECODE, 1)]  # the last one twice


def test_a_bug_in_a_replay_behind_one_that_is_left_out() -> None:
    replays = (Replay(Mode.TARGET_VERIFY, LONG), Replay(Mode.DECODE, SHORT))

    def bug(_: ReplayInputs, steps: Steps, __: Setup) -> None:
        steps[0].cache_seqlens[0] = 1

    verdict = verify(Case(SETUP, replays), subject(bug, modes=[Mode.DECODE]))
    (finding,) = verdict.findings
    assert (finding.replay, finding.mode, verdict.modes) == (1, Mode.DECODE, (Mode.DECODE,))


def test_not_applicable_when_no_mode_is_declared() -> None:
    verdict = verify(Case(SETUP, (Replay(Mode.DECODE, LONG),)), subject(modes=[Mode.DRAFT_EXTEND]))
    assert (verdict.outcome, verdict.reason) == (Outcome.NOT_APPLICABLE, "mode not declared")
    assert (verdict.modes, verdict.findings) == ((), ())


def test_not_applicable_without_host_lengths() -> None:
    without = Case(Setup(host_lengths=False), (Replay(requests=(Request(3),)),))
    verdict = verify(without, subject(host_lengths=True))
    assert (verdict.outcome, verdict.reason) == (Outcome.NOT_APPLICABLE, "needs seq_lens_cpu")
    assert verify(without, subject()).outcome is Outcome.AGREE
    with_lengths = Case(Setup(), without.replays)
    assert verify(with_lengths, subject(host_lengths=True)).outcome is Outcome.AGREE


def test_without_host_lengths_there_is_no_mirror() -> None:
    given = []

    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        given.append(inputs.seq_lens_cpu)

    verify(Case(Setup(host_lengths=False), (Replay(requests=(Request(3),)),)), subject(bug))
    assert given == [None, None]


def test_an_implementation_that_serves_only_its_own_bucket_is_stale_in_the_other() -> None:
    """Whoever writes the shared table only when it is new to him leaves another bucket's rows there."""

    def caches(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
        tables = [step.page_table_1.clone() for step in steps]
        new = int(steps[0].cu_seqlens_k[0]) != 0
        right(inputs, steps, setup)
        if not new:
            for step, table in zip(steps, tables, strict=True):
                step.page_table_1.copy_(table)

    replays = (Replay(Mode.DECODE, SHORT), Replay(Mode.DECODE, LONG), Replay(Mode.DECODE, (Request(3, 3),)))
    finding = verify(Case(SETUP, replays), bare(caches)).primary
    assert finding is not None
    assert (finding.code, finding.replay, finding.buffer) == (Code.STALE, 2, "page_table_1")
    assert (finding.element, finding.expected, finding.got) == ((0, 0), 1000 + 3 * 34, 1000 + 34)


def test_unknown_names_are_refused() -> None:
    case = Case(Setup(), (Replay(requests=(Request(3),)),))
    with pytest.raises(ImplementationError, match="no-such-thing: no such implementation; there are "):
        verify(case, "no-such-thing")
    with pytest.raises(ValueError, match="executor 'no-such-executor': must be one of eager"):
        verify(case, subject(), executor="no-such-executor")
