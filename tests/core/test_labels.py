"""Labels of cases: right on cases written by hand, all of them reached, pairs counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import combinations
from random import Random

import pytest

from nsa_verify.core.case import Case, CtxLens, Layout, Mode, Replay, Request, Setup, SlotKind
from nsa_verify.core.labels import (
    DIMENSIONS,
    IMPOSSIBLE,
    LABELS,
    Coverage,
    Novelty,
    labels_of,
    pairs,
    possible_labels,
    possible_pairs,
    reason_against,
)
from nsa_verify.core.oracle import expect
from nsa_verify.engine.drawing import draw_round
from nsa_verify.engine.plan import FIRST_SEASON, ROUND_CASES, Plan

EXTEND, UNIFORM, VERIFY = Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2, Mode.TARGET_VERIFY
SEEDS = range(8)
"""So many runs of 200 cases reach every label."""


@cache
def drawn() -> tuple[Case, ...]:
    cases: list[Case] = []
    for seed in SEEDS:
        plan = Plan(seed=seed, max_examples=FIRST_SEASON * ROUND_CASES)
        for index in range(plan.rounds):
            draw_round(plan, "cpu", index, cases.append)
    return tuple(cases)


def values(case: Case, dimension: str) -> str:
    """What a case is in one dimension, in the order of its values."""
    labels = labels_of(case)
    (it,) = (it for it in DIMENSIONS if it.name == dimension)
    return " ".join(value for value, label in it.labels.items() if label in labels)


def batch(*lengths: int, mode: Mode = Mode.DECODE, accepts: tuple[int, ...] = (), rows: tuple[int, ...] = ()) -> Replay:
    own = accepts or (1,) * len(lengths)
    on = rows or (0,) * len(lengths)
    return Replay(mode, tuple(Request(*it) for it in zip(lengths, on, own, strict=True)))


def of(setup: Setup, *replays: Replay) -> Case:
    return Case(setup, replays or (batch(1),))


WIDE = Setup(
    num_draft_tokens=3, index_topk=8, table_width=300, pool_width=310, buckets=(2, 4), page_size=16, pool_rows=4
)
ONE = Setup(index_topk=8, table_width=300, pool_width=310)
LONG = Setup(num_draft_tokens=2, table_width=16, pool_width=70_000, buckets=(2,))
ALIASED, OWN = Setup(aliased_seq_lens=True), Setup(ctx_lens=CtxLens.OWN)
FILL_0 = Setup(num_draft_tokens=2, fill_seq_len=0, buckets=(2,))
FILL_1 = Setup(num_draft_tokens=2, fill_seq_len=1, buckets=(2,))
BY_HAND = [
    ("mode", of(ONE, batch(1, mode=VERIFY), batch(1)), "decode target-verify"),
    ("padding", of(WIDE, batch(5, 5)), "none"),
    ("padding", of(WIDE, batch(5, 5, 5), batch()), "some only"),
    ("fill", of(FILL_0), "0"),
    ("fill", of(FILL_1), "1"),
    ("padded-start", of(FILL_0, batch(5, mode=UNIFORM)), "below-0"),
    ("padded-start", of(FILL_1, batch(5, mode=UNIFORM)), "0-or-more"),
    ("padded-start", of(FILL_0, batch(5, mode=EXTEND)), "0-or-more"),
    ("padded-start", of(FILL_0, Replay(EXTEND, padded_accept_len=2)), "below-0"),
    ("padded-start", of(FILL_0, batch(5, 5, mode=UNIFORM), batch(5, mode=VERIFY), batch()), ""),
    ("accepts", of(WIDE, batch(5, 5, 5, mode=EXTEND, accepts=(2, 2, 2))), "uniform"),
    ("accepts", of(WIDE, batch(5, mode=EXTEND, accepts=(0,))), "all-zero"),
    ("accepts", of(WIDE, batch(5, 5, 5, mode=EXTEND, accepts=(2, 2, 1))), "uniform-but-one"),
    ("accepts", of(WIDE, batch(5, 5, 5, mode=EXTEND, accepts=(2, 2, 0))), "uniform-but-one some-zero"),
    ("accepts", of(WIDE, batch(5, 5, mode=EXTEND, accepts=(2, 1))), "ragged"),
    ("accepts", of(WIDE, batch(5, 5, 5, mode=EXTEND, accepts=(0, 2, 1))), "ragged some-zero"),
    ("accepts", of(WIDE, batch(5, 5, mode=VERIFY, accepts=(2, 1)), batch(mode=EXTEND)), ""),
    ("top-k", of(ONE, batch(6)), "below"),
    ("top-k", of(ONE, batch(7), batch(8)), "K-1 K"),
    ("top-k", of(ONE, batch(9), batch(10)), "K+1 above"),
    ("top-k", of(WIDE, batch(6, mode=VERIFY)), "K-1 K K+1"),
    ("top-k", of(WIDE, batch(8, mode=UNIFORM)), "below K-1 K"),
    ("top-k", of(WIDE, batch(10, mode=EXTEND, accepts=(2,))), "K+1 above"),
    ("top-k", of(WIDE, batch(10, mode=EXTEND, accepts=(0,))), ""),
    ("page-edge", of(WIDE, batch(15, 32), batch(17, 24)), "before on after within"),
    ("page-edge", of(WIDE, batch(13, mode=VERIFY)), "on"),
    ("page-edge", of(WIDE, batch(1)), "within"),
    ("page-edge", of(ONE, batch(16)), ""),
    ("tile-edge", of(WIDE, batch(127, 128), batch(129)), "before-128 on-128 after-128"),
    ("tile-edge", of(WIDE, batch(255, 256), batch(257)), "before-256 on-256 after-256"),
    ("tile-edge", of(WIDE, batch(1, 64), batch(126, 130)), ""),
    ("wall", of(WIDE, batch(299, 300), batch(298, mode=VERIFY)), "below at beyond"),
    ("rows", of(ONE, batch(4), batch(4, mode=EXTEND, accepts=(0,))), "0 1"),
    ("rows", of(Setup(buckets=(2, 30, 31, 33)), *(batch(*[1] * size) for size in (2, 30))), "2-30"),
    ("rows", of(Setup(buckets=(31, 33, 34)), *(batch(*[1] * size) for size in (30, 32, 34))), "31-33 34-128"),
    ("rows", of(Setup(buckets=(128, 129)), *(batch(*[1] * size) for size in (1, 129))), "34-128 129-"),
    ("bits", of(LONG, batch(16_000, 16_767)), "15"),
    ("bits", of(LONG, batch(16_000, 16_768)), "16"),
    ("bits", of(LONG, batch(32_767, 32_769)), "sum-17"),
    ("bits", of(LONG, batch(65_534, mode=VERIFY)), "length-17"),
    ("bits", of(LONG, batch(32_766)), "15"),
    ("bits", of(LONG, batch(32_767)), "16"),
    ("bits", of(LONG, batch(32_763, mode=VERIFY)), "16"),
    ("alias", of(ALIASED, batch(5, mode=VERIFY)), "no"),
    ("alias", of(ALIASED, batch(5, mode=VERIFY), batch(5)), "yes"),
    ("ctx-lens", of(OWN, batch(5)), "view"),
    ("ctx-lens", of(OWN, batch(5), batch(5, mode=VERIFY)), "own"),
    ("sequence", of(WIDE), "one"),
    ("sequence", of(WIDE, batch(5), batch(5, 6)), "same-graph"),
    ("sequence", of(WIDE, batch(5), batch(5, mode=VERIFY), batch(5, 5, 5, mode=VERIFY)), "mode-switch bucket-switch"),
    ("change", of(WIDE, batch(5), batch(5)), ""),
    ("change", of(WIDE, batch(5, 6), batch(5)), "shorter fewer"),
    ("change", of(WIDE, batch(), batch(5)), "longer more"),
    ("pool-rows", of(WIDE, batch(5)), ""),
    ("pool-rows", of(WIDE, batch(5, 5), batch(5, 5, rows=(0, 1))), "distinct shared"),
    ("slots", of(WIDE, Replay(slots=SlotKind.PAGED), Replay(slots=SlotKind.SCATTERED)), "paged scattered"),
    ("input", of(Setup(layout=Layout.STRIDED, input_tail=2)), "strided tail"),
    ("strides", of(WIDE), "tight"),
    ("strides", of(Setup(pool_row_stride=40, table_row_stride=17)), "wide-pool wide-table"),
    ("strides", of(Setup(num_steps=2, stride_skew=1)), "per-step"),
    ("strides", of(Setup(num_steps=1, stride_skew=1)), "tight"),
    ("steps", of(Setup(num_draft_tokens=1, num_steps=1)), "1 N"),
    ("steps", of(Setup(num_draft_tokens=3, num_steps=2)), "2 N-1"),
    ("steps", of(Setup(num_draft_tokens=4, num_steps=4)), "N"),
    ("steps", of(Setup(num_draft_tokens=8, num_steps=1)), "1"),
    ("steps", of(Setup(num_draft_tokens=4, num_steps=5)), "other"),
    ("draft-tokens", of(Setup(num_draft_tokens=8)), "3-8"),
]


@pytest.mark.parametrize(("dimension", "case", "expected"), BY_HAND)
def test_by_hand(dimension: str, case: Case, expected: str) -> None:
    assert values(case, dimension) == expected


def test_every_dimension_is_told_of_the_plainest_case() -> None:
    told = {it.name: values(Case(Setup(), (batch(1),)), it.name) for it in DIMENSIONS}
    assert {name: value for name, value in told.items() if value} == {
        "mode": "decode",
        "padding": "none",
        "fill": "1",
        "top-k": "below",
        "wall": "below",
        "rows": "1",
        "bits": "15",
        "sequence": "one",
        "slots": "sequential",
        "input": "contiguous",
        "seq-lens": "int32",
        "pool-indices": "int64",
        "alias": "no",
        "host-lengths": "given",
        "strides": "tight",
        "steps": "1 N",
        "draft-tokens": "1",
        "page-size": "1",
        "ctx-lens": "absent",
        "schedule": "no",
    }


def test_every_label_is_drawn() -> None:
    assert set(LABELS) == {label for case in drawn() for label in labels_of(case)}


def test_rows_and_lengths_are_those_of_the_oracle() -> None:
    for case in drawn()[:150]:
        rows = {expect(case, index).defined_rows for index in range(len(case.replays))}
        assert values(case, "rows").split() == [
            name
            for name, some in zip(
                ("0", "1", "2-30", "31-33", "34-128", "129-"),
                (range(1), range(1, 2), range(2, 31), range(31, 34), range(34, 129), range(129, 10_000)),
                strict=True,
            )
            if not rows.isdisjoint(some)
        ]


def test_dimensions_and_labels_have_names_of_their_own() -> None:
    assert len({it.name for it in DIMENSIONS}) == len(DIMENSIONS)
    assert len(set(LABELS)) == len(LABELS)
    assert all(len(it.values) >= 2 for it in DIMENSIONS)
    assert not any(" " in label for label in LABELS)


def test_pairs_are_unordered_and_of_different_dimensions() -> None:
    found = list(pairs(LABELS))
    assert found == list(pairs(reversed(LABELS)))
    assert {frozenset(it) for it in found} == {
        frozenset(it) for it in combinations(LABELS, 2) if it[0].split(":")[0] != it[1].split(":")[0]
    }
    assert len(found) == len(set(found))
    assert list(pairs(["fill:0", "mode:decode", "mode:draft-extend"])) == [
        ("mode:decode", "fill:0"),
        ("mode:draft-extend", "fill:0"),
    ]


def test_what_cannot_be_has_a_reason() -> None:
    assert all(it.some and it.others and it.reason for it in IMPOSSIBLE)
    every = set(pairs(LABELS))
    assert every - set(possible_pairs()) == {pair for pair in every if reason_against(pair)}
    assert reason_against(("alias:yes", "seq-lens:int64")) == reason_against(("seq-lens:int64", "alias:yes"))
    assert len(every) - len(possible_pairs()) < 20


def test_a_mode_alone_cannot_be_what_another_is() -> None:
    uniform, every = possible_pairs((UNIFORM, VERIFY)), possible_pairs()
    for pair in (("rows:1", "draft-tokens:3-8"), ("rows:1", "steps:N-1")):
        assert pair in every
        assert pair not in uniform
        assert pair in possible_pairs((VERIFY, Mode.DECODE))
    assert ("rows:1", "draft-tokens:1") in uniform
    assert "alias:yes" not in possible_labels((VERIFY,))
    assert "ctx-lens:own" not in possible_labels((Mode.DECODE,))


def test_novelty_counts_the_pairs_that_were_not_met() -> None:
    novelty = Novelty()
    first, second = drawn()[:2]
    assert novelty.of(first) == len(set(pairs(labels_of(first)))) > 100
    novelty.add(first)
    assert novelty.of(first) == 0
    assert novelty.of(second) == len(set(pairs(labels_of(second))) - set(pairs(labels_of(first))))


def test_no_case_has_what_cannot_be(random_case: Callable[[Random], Case]) -> None:
    cases = [*drawn(), *(random_case(Random(seed)) for seed in range(300))]
    met = {pair for case in cases for pair in pairs(labels_of(case))}
    assert not {pair for pair in met if reason_against(pair)}
    assert len(met) > 0.97 * len(possible_pairs()), "most of what is called possible is drawn"


@pytest.mark.parametrize("modes", [(Mode.DECODE,), (EXTEND,), (UNIFORM, VERIFY)])
def test_cases_in_some_modes_have_their_labels_only(modes: tuple[Mode, ...]) -> None:
    plan = Plan(seed=1, max_examples=200, modes=modes)
    met: set[str] = set()
    for index in range(plan.rounds):
        draw_round(plan, "cpu", index, lambda case: met.update(labels_of(case)))
    assert met <= set(possible_labels(modes))
    missing = set(possible_labels(modes)) - met
    assert all(label.startswith(("bits:", "rows:", "tile-edge:", "alias:")) for label in missing), missing
    assert set(possible_pairs(modes)) < set(possible_pairs())


def test_a_coverage_counts_labels_and_pairs_once_a_case() -> None:
    cases, coverage, labels, both = drawn()[:60], Coverage(), Counter[str](), Counter[tuple[str, str]]()
    for case in cases:
        coverage.count(case)
        labels.update(labels_of(case))
        both.update(pairs(labels_of(case)))
    assert {label: coverage.of(label) for label in LABELS} == {label: labels[label] for label in LABELS}
    assert all(coverage.of_pair(pair) == both[pair] for pair in pairs(LABELS))
    assert len(coverage.counts) == len(labels) + len(both)


def test_coverages_add_up_in_any_order() -> None:
    whole, parts = Coverage(), [Coverage() for _ in range(3)]
    for number, case in enumerate(drawn()[:60]):
        whole.count(case)
        parts[number % 3].count(case)
    for order in ((0, 1, 2), (2, 0, 1)):
        sum_of = Coverage()
        for index in order:
            sum_of.add(parts[index])
        assert sum_of == whole
    assert Coverage().counts == {}
