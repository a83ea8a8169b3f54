"""The last steps of a shrink end at the case that a person would have written, and never leave what is to be shown."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from helpers import draw_many

from nsa_verify import Case, CtxLens, Layout, Mode, Replay, Request, Setup, SlotKind
from nsa_verify.core.case import shortest
from nsa_verify.core.oracle import batch, expect
from nsa_verify.engine.simplifying import measure, simplified
from nsa_verify.strategies import cases

Shows = Callable[[Case], bool]


def _long(case: Case) -> bool:
    return any(request.seq_len >= 9 for replay in case.replays for request in replay.requests)


def _underflows(case: Case) -> bool:
    given = [batch(case, index) for index in range(len(case.replays))]
    return any(
        it.mode is Mode.DRAFT_EXTEND_V2 and length - case.setup.num_draft_tokens + 1 < 0
        for it in given
        for length in it.seq_lens
    )


def _shrinks(case: Case) -> bool:
    sizes = [len(replay.requests) for replay in case.replays]
    return any(later < earlier for earlier, later in pairwise(sizes))


def _reaches_top_k(case: Case) -> bool:
    expected = [expect(case, index).buffers for index in range(len(case.replays))]
    rows = [row for buffers in expected for row in buffers.get("nsa_seqlens_expanded", ())]
    return any(case.setup.index_topk in row.values for row in rows)


LARGE = Case(
    Setup(
        num_draft_tokens=4,
        index_topk=21,
        page_size=16,
        table_width=48,
        table_row_stride=51,
        pool_rows=3,
        pool_width=64,
        pool_row_stride=70,
        num_steps=3,
        buckets=(2, 5),
        fill_seq_len=0,
        layout=Layout.STRIDED,
        seq_lens_dtype="int64",
        ctx_lens=CtxLens.OWN,
        schedule=True,
    ),
    (
        Replay(Mode.TARGET_VERIFY, (Request(30, 1), Request(17, 2), Request(9)), SlotKind.SCATTERED, 7, 4, 2),
        Replay(Mode.DRAFT_EXTEND_V2, (Request(12, 1), Request(8, 2)), SlotKind.PAGED, 3),
        Replay(Mode.DRAFT_EXTEND, (Request(21, 1, 3), Request(8, 2, 0), Request(5)), SlotKind.PAGED),
        Replay(Mode.DRAFT_EXTEND_V2, (Request(12, 1),), SlotKind.PAGED, 3),
    ),
)


@pytest.mark.parametrize(
    ("shows", "minimal"),
    [
        (lambda _: True, [(Mode.DECODE, [1], 1)]),
        (_long, [(Mode.DECODE, [9], 1)]),
        (_underflows, [(Mode.DRAFT_EXTEND_V2, [], 1)]),
        (_shrinks, [(Mode.DECODE, [1], 1), (Mode.DECODE, [], 1)]),
        (_reaches_top_k, [(Mode.DECODE, [8], 1)]),
    ],
    ids=["anything", "long", "underflows", "shrinks", "reaches-top-k"],
)
def test_minimal(shows: Shows, minimal: list[tuple[Mode, list[int], int]]) -> None:
    found = simplified(LARGE, shows, 2000)
    assert shows(found)
    told = [(it.mode, [r.seq_len for r in it.requests], found.bucket(at)) for at, it in enumerate(found.replays)]
    assert told == minimal
    assert found.setup.num_steps == found.setup.page_size == found.setup.pool_rows == 1
    assert found.setup.layout is Layout.CONTIGUOUS
    assert not found.setup.schedule
    assert simplified(found, shows, 2000) == found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shows", [_long, _underflows, _shrinks, _reaches_top_k])
def test_steps_only_lead_to_smaller_cases_that_show(shows: Shows, seed: int) -> None:
    case = next(it for it in draw_many(cases(), 300, seed) if shows(it))
    probes: list[Case] = []

    def asked(it: Case) -> bool:
        probes.append(it)
        return shows(it)

    found = simplified(case, asked, 300)
    assert shows(found)
    taken = [case, *(it for it in probes if shows(it))]
    assert found == taken[-1]
    assert all(measure(after) < measure(before) for before, after in pairwise(taken))
    assert len(probes) == len(set(probes)) <= 300
    for index, replay in enumerate(found.replays):
        assert all(it.seq_len >= shortest(found.setup, replay.mode, it.accept_len) for it in replay.requests)
        assert found.bucket(index) >= len(replay.requests)


def test_the_number_of_probes_is_kept() -> None:
    probes: list[Case] = []

    def no(it: Case) -> bool:
        probes.append(it)
        return False

    assert simplified(LARGE, no, 7) == LARGE
    assert len(probes) == 7
    assert simplified(LARGE, lambda _: True, 0) == LARGE
