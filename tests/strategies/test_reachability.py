"""Is it found? Every boundary of the design and every trigger of the bug classes is drawn within 500 examples, or the
number that a test names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise, tee
from typing import NamedTuple

import pytest
from helpers import draw_many, find_any

from nsa_verify.core.case import PAGE_SIZES, Case, CtxLens, Layout, Mode, Replay, Request, Setup, SlotKind, longest
from nsa_verify.core.oracle import Batch, batch
from nsa_verify.strategies import Limits, cases

EXAMPLES = 500
MORE_SEEDS = (1, 2)


class View(NamedTuple):
    """One replay of a case, with what the predicates ask about it."""

    setup: Setup
    replay: Replay
    batch: Batch
    kv_lens: list[int]
    """Of all B rows, padded ones last."""
    lengths: list[int]
    """Of the expanded rows."""

    @property
    def real(self) -> int:
        return len(self.replay.requests)

    @property
    def real_kv_lens(self) -> list[int]:
        return self.kv_lens[: self.real]

    @property
    def accepts(self) -> list[int]:
        return [request.accept_len for request in self.replay.requests] if self.mode is Mode.DRAFT_EXTEND else []

    @property
    def mode(self) -> Mode:
        return self.replay.mode

    @property
    def bucket(self) -> int:
        return self.batch.bucket


def views(case: Case) -> Iterator[View]:
    setup = case.setup
    for index, replay in enumerate(case.replays):
        given = batch(case, index)
        verify = replay.mode is Mode.TARGET_VERIFY
        kv_lens = [length + setup.num_draft_tokens * verify for length in given.seq_lens]
        lengths = kv_lens
        if replay.mode is not Mode.DECODE:
            pairs = zip(kv_lens, given.accept_lens, strict=True)
            lengths = [max(0, kv_len - accept + row + 1) for kv_len, accept in pairs for row in range(accept)]
        yield View(setup, replay, given, kv_lens, lengths)


Predicate = Callable[[Case], bool]


def some(predicate: Callable[[View], bool]) -> Predicate:
    """Some replay of the case is like this."""
    return lambda case: any(predicate(view) for view in views(case))


def after(predicate: Callable[[View, View], bool]) -> Predicate:
    """Some replay and the one right behind it are like this."""
    return lambda case: any(predicate(*both) for both in pairwise(views(case)))


def setup_is(predicate: Callable[[Setup], bool]) -> Predicate:
    return lambda case: predicate(case.setup)


def a_length(*values: Callable[[Setup], int]) -> Predicate:
    """Some expanded row of a real batch has one of these lengths."""
    return some(lambda view: view.real > 0 and any(value(view.setup) in view.lengths for value in values))


def a_kv_len(unit: Callable[[Setup], int], past: int) -> Predicate:
    """Some real KV length is a multiple (not 0) of ``unit``, and ``past`` more; pages of one token do not count."""

    def holds(view: View) -> bool:
        size = unit(view.setup)
        return size > 1 and any(kv_len > past and (kv_len - past) % size == 0 for kv_len in view.real_kv_lens)

    return some(holds)


def beyond_wall(low: int, high: int) -> Predicate:
    return some(lambda view: any(low <= kv_len - view.setup.table_width <= high for kv_len in view.real_kv_lens))


def empty_in(mode: Mode) -> Predicate:
    return some(lambda view: view.mode is mode and view.real == 0)


def several_in(mode: Mode) -> Predicate:
    return some(lambda view: view.mode is mode and view.real > 1)


def rows_are(rows: int) -> Predicate:
    return some(lambda view: len(view.lengths) == rows)


def pages_with(size: int, kind: SlotKind) -> Predicate:
    return some(lambda view: view.setup.page_size == size and view.replay.slots is kind)


def grown(before: View, view: View) -> bool:
    pairs = list(zip(before.replay.requests, view.replay.requests, strict=False))
    same = before.real == view.real > 1
    return same and all(
        old.pool_row == new.pool_row and new.seq_len - old.seq_len in range(1, before.setup.num_draft_tokens + 1)
        for old, new in pairs
    )


def same_place(before: View, view: View) -> bool:
    return before.mode is view.mode and before.bucket == view.bucket


def almost_uniform(view: View) -> bool:
    accepts = view.accepts
    return len(accepts) > 2 and len(set(accepts)) == 2 and min(map(accepts.count, set(accepts))) == 1


LENGTHS: dict[str, Predicate] = {
    "length 1": some(lambda view: 1 in view.batch.seq_lens[: view.real]),
    "length 0 of a padded row": some(lambda view: 0 in view.kv_lens[view.real :]),
    "fill 1 of a padded row": some(lambda view: 1 in view.batch.seq_lens[view.real :]),
    "N - 1": a_length(lambda setup: setup.num_draft_tokens - 1),
    "N": a_length(lambda setup: setup.num_draft_tokens),
    "N + 1": a_length(lambda setup: setup.num_draft_tokens + 1),
    "K - 1": a_length(lambda setup: setup.index_topk - 1),
    "K": a_length(lambda setup: setup.index_topk),
    "K + 1": a_length(lambda setup: setup.index_topk + 1),
    "K crossed within one request's rows": some(
        lambda view: (
            view.mode is not Mode.DECODE and {view.setup.index_topk, view.setup.index_topk + 1} <= {*view.lengths}
        )
    ),
    "beyond a K of 2048": some(lambda view: view.setup.index_topk == 2048 < max(view.lengths, default=0)),
    **{f"pages {past:+d}": a_kv_len(lambda setup: setup.page_size, past) for past in (-1, 0, 1)},
    **{f"128 {past:+d}": a_kv_len(lambda _: 128, past) for past in (-1, 0, 1)},
    **{f"256 {past:+d}": a_kv_len(lambda _: 256, past) for past in (-1, 0, 1)},
    **{f"wall {past:+d}": beyond_wall(past, past) for past in (-1, 0, 1, 2)},
    "wall by more than N": some(
        lambda view: max(view.real_kv_lens, default=0) > view.setup.table_width + view.setup.num_draft_tokens
    ),
    "wall in verify only by the draft tokens": some(
        lambda view: (
            view.mode is Mode.TARGET_VERIFY
            and any(0 < kv_len - view.setup.table_width < view.setup.num_draft_tokens for kv_len in view.real_kv_lens)
        )
    ),
    "end of the pool row": some(
        lambda view: longest(view.setup, view.mode) in view.batch.seq_lens[: view.real] and view.setup.pool_width > 32
    ),
    "a partly filled last page": some(
        lambda view: any(0 < kv_len % view.setup.page_size < kv_len for kv_len in view.real_kv_lens)
    ),
}
LONG: dict[str, Predicate] = {
    "a length past 15 bits": some(lambda view: maximum(view) >= 1 << 15),
    "a length past 16 bits": some(lambda view: maximum(view) >= 1 << 16),
    "lengths whose sum only does not fit 15 bits": some(lambda view: maximum(view) < 1 << 15 <= sum(view.kv_lens)),
    "a prefix sum past 16 bits": some(lambda view: sum(view.kv_lens) >= 1 << 16),
    "a prefix sum past 16 bits, several requests": some(lambda view: view.real > 1 and sum(view.kv_lens) >= 1 << 16),
    "the last length of 15 bits, or the next": a_length(lambda _: (1 << 15) - 1, lambda _: 1 << 15),
    "the last length of 16 bits, or the next": a_length(lambda _: (1 << 16) - 1, lambda _: 1 << 16),
    "a schedule of a long context": some(lambda view: view.setup.schedule and maximum(view) >= 1 << 15),
}
BATCHES: dict[str, Predicate] = {
    "1: padding underflows": some(
        lambda view: (
            view.mode in (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2)
            and view.real < view.bucket
            and view.setup.fill_seq_len < view.batch.accept_lens[-1]
        )
    ),
    "2: fill 0 and N >= 2": some(
        lambda view: view.real < view.bucket and view.setup.fill_seq_len == 0 and view.setup.num_draft_tokens >= 2
    ),
    "5: padded, with longer rows": some(lambda view: 0 < view.real < view.bucket and max(view.kv_lens) > 8),
    "14: more rows than a block": some(lambda view: len(view.lengths) > 128),
    "14: more rows than a block, real ones among them": some(lambda view: view.real > 1 and len(view.lengths) > 128),
    "14: more columns than a block": some(lambda view: max(view.real_kv_lens, default=0) > 128),
    **{f"25: no request in {mode}": empty_in(mode) for mode in Mode},
    "25: zero accepts": some(lambda view: 0 in view.accepts),
    "25: zero accepts between others": some(lambda view: 0 in view.accepts[1:-1] and 0 not in view.accepts[::-1][:1]),
    "25: all accepts zero, padding left": some(lambda view: view.real < view.bucket and {*view.accepts} == {0}),
    "25: no expanded row at all": some(lambda view: not view.lengths),
    "26: uniform accepts in a padded batch": some(
        lambda view: 1 < view.real < view.bucket and len({*view.accepts}) == 1
    ),
    "uniform accepts of N": some(
        lambda view: view.real > 1 and {*view.accepts} == {view.setup.num_draft_tokens} != {1}
    ),
    "almost uniform accepts": some(almost_uniform),
    "ragged accepts": some(lambda view: len({*view.accepts}) >= 3),
    "27: 32 rows of length 0": some(
        lambda view: len(view.lengths) > 0 == len(view.lengths) % 32 and not any(view.lengths)
    ),
    "27: all rows of length 0": some(lambda view: len(view.lengths) > 1 and not any(view.lengths)),
    **{f"{rows} rows": rows_are(rows) for rows in (1, 31, 32, 33)},
    "padded accepts of N": some(
        lambda view: view.mode is Mode.DRAFT_EXTEND and view.real < view.bucket and view.batch.accept_lens[-1] > 1
    ),
    "a stale pool row for padding": some(lambda view: view.real < view.bucket and view.batch.pool_rows[-1] > 0),
    "a pool row twice": some(lambda view: len({request.pool_row for request in view.replay.requests}) < view.real),
    "distinct pool rows": some(lambda view: len({request.pool_row for request in view.replay.requests}) > 1),
    "a full bucket of several": some(lambda view: view.real == view.bucket > 1),
    "an accepted length that is all there is": some(
        lambda view: any(it.seq_len == it.accept_len > 1 for it in view.replay.requests) and bool(view.accepts)
    ),
}


def replays_are(count: int) -> Predicate:
    return lambda case: len(case.replays) == count


def steps_are(count: int) -> Predicate:
    return setup_is(lambda it: it.num_steps == count)


def lined_up(count: int, predicate: Callable[..., bool]) -> Predicate:
    """Some ``count`` replays, one right behind the other, are like this."""
    return lambda case: any(
        predicate(*some) for some in zip(*([*views(case)][skip:] for skip in range(count)), strict=False)
    )


def going_on(before: View, view: View) -> list[tuple[int, int]]:
    """Which requests of ``before`` are which of ``view``: in order, on the same row, by 0 to N longer."""
    found: list[tuple[int, int]] = []
    rest: Iterator[tuple[int, Request]] = iter(enumerate(view.replay.requests))
    for index, old in enumerate(before.replay.requests):
        longer = range(before.setup.num_draft_tokens + 1)
        ahead, rest = tee(rest)
        at = next(
            (at for at, new in ahead if new.pool_row == old.pool_row and new.seq_len - old.seq_len in longer), None
        )
        if at is not None:
            found.append((index, at))
            rest = ahead
    return found


def left(before: View, view: View) -> bool:
    """Everyone went on but for some, the first among them."""
    pairs = going_on(before, view)
    return 0 < len(pairs) == view.real < before.real and pairs[0][0] > 0


def joined(before: View, view: View) -> bool:
    """Everyone went on, and others came behind them."""
    return [at for _, at in going_on(before, view)] == [*range(before.real)] and 0 < before.real < view.real


def row_reused(before: View, view: View) -> bool:
    """Someone went on, and the pool row of someone who left has another request."""
    pairs = going_on(before, view)
    staying, known = {index for index, _ in pairs}, {at for _, at in pairs}
    free = {it.pool_row for index, it in enumerate(before.replay.requests) if index not in staying}
    return bool(pairs) and any(it.pool_row in free for at, it in enumerate(view.replay.requests) if at not in known)


def engine_like(*run: View) -> bool:
    """Verify, extend by what was accepted, draft; and verify again, if so many."""
    extend = (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2)
    order = ((Mode.TARGET_VERIFY,), extend, (Mode.DECODE,), (Mode.TARGET_VERIFY,))
    return all(view.mode in modes for view, modes in zip(run, order, strict=False))


def at_fill(view: View) -> bool:
    """Every real length is what capture saw."""
    return view.setup.fill_seq_len == 1 and {*view.batch.seq_lens[: view.real]} == {1}


def in_one_place(*run: View) -> bool:
    return all(same_place(*both) for both in pairwise(run))


def maximum(view: View) -> int:
    return max(view.kv_lens)


SEQUENCES: dict[str, Predicate] = {
    "3: a big, then a small batch in one bucket": after(lambda a, b: same_place(a, b) and a.real > b.real > 0),
    "4: padding after a larger batch": after(lambda a, b: same_place(a, b) and a.real > b.real and b.real < b.bucket),
    "11: verify, then decode": after(
        lambda a, b: a.mode is Mode.TARGET_VERIFY and b.mode is Mode.DECODE and a.setup.num_draft_tokens > 1 < b.bucket
    ),
    "13: verify twice": after(lambda a, b: a.mode is b.mode is Mode.TARGET_VERIFY and b.real > 0),
    "16: short, then long": after(lambda a, b: same_place(a, b) and max(a.kv_lens) * 2 < max(b.kv_lens)),
    "16: long, then short": after(lambda a, b: same_place(a, b) and max(a.kv_lens) > 2 * max(b.kv_lens)),
    "28: a larger, then a smaller bucket": after(lambda a, b: a.bucket > b.bucket and b.real > 0),
    "a smaller, then a larger bucket": after(lambda a, b: 0 < a.bucket < b.bucket),
    "16: as short as at capture, then long": after(lambda a, b: same_place(a, b) and at_fill(a) and maximum(b) > 8),
    "16: as short as may be, then long": after(
        lambda a, b: same_place(a, b) and {*a.batch.seq_lens[: a.real]} == {1} and maximum(b) > 8
    ),
    "16: several as short as at capture, then long": after(
        lambda a, b: same_place(a, b) and a.real > 1 and at_fill(a) and maximum(b) > 8
    ),
    "16: longer than at capture first, then another maximum": lambda case: any(
        same_place(a, b) and 4 < maximum(a) != maximum(b) for a, b in zip(views(case), [*views(case)][1:], strict=False)
    ),
    "long, short, long": lined_up(
        3, lambda a, b, c: in_one_place(a, b, c) and maximum(a) > 2 * maximum(b) < maximum(c)
    ),
    "short, long, short": lined_up(
        3, lambda a, b, c: in_one_place(a, b, c) and 2 * maximum(a) < maximum(b) > 2 * maximum(c)
    ),
    "big, small, big": lined_up(3, lambda a, b, c: a.real > b.real < c.real),
    "big, small, big in one bucket": lined_up(
        3, lambda a, b, c: a.bucket == b.bucket == c.bucket and a.real > b.real < c.real and b.real > 0
    ),
    "big, small, big in one bucket and mode": lined_up(
        3, lambda a, b, c: in_one_place(a, b, c) and a.real > b.real < c.real and b.real > 0
    ),
    "a bucket, another, and back": lined_up(3, lambda a, b, c: a.bucket == c.bucket != b.bucket),
    "a mode, another, and back": lined_up(3, lambda a, b, c: a.mode is c.mode is not b.mode),
    "idle between": lined_up(3, lambda a, b, c: a.real > 0 == b.real < c.real),
    "idle between, and the same requests go on": lined_up(
        3, lambda a, b, c: a.real > 0 == b.real < c.real == len(going_on(a, c))
    ),
    "idle between, in one place": lined_up(3, lambda a, b, c: in_one_place(a, b, c) and a.real > 0 == b.real < c.real),
    "another size in one bucket": after(lambda a, b: a.bucket == b.bucket and a.real != b.real),
    "requests left": after(left),
    "several left at once": after(lambda a, b: left(a, b) and a.real - b.real > 1),
    "requests joined": after(joined),
    "several joined at once": after(lambda a, b: joined(a, b) and b.real - a.real > 1),
    "requests joined in a larger bucket": after(lambda a, b: joined(a, b) and b.bucket > a.bucket),
    "a pool row reused": after(row_reused),
    "modes as in an engine": lined_up(3, engine_like),
    "modes as in an engine, all around": lined_up(4, engine_like),
    "modes as in an engine, and requests go on": lined_up(
        3, lambda a, b, c: engine_like(a, b, c) and bool(going_on(a, b)) and bool(going_on(b, c))
    ),
    "another number of expanded rows each time": lined_up(
        3,
        lambda a, b, c: (
            in_one_place(a, b, c)
            and a.mode is Mode.DRAFT_EXTEND
            and len({len(a.lengths), len(b.lengths), len(c.lengths)}) == 3
        ),
    ),
    "fewer expanded rows in draft-extend": after(
        lambda a, b: same_place(a, b) and b.mode is Mode.DRAFT_EXTEND and len(a.lengths) > len(b.lengths)
    ),
    **{f"{count} replays": replays_are(count) for count in range(1, 9)},
    "three modes": lambda case: len({replay.mode for replay in case.replays}) >= 3,
    "req_to_token rewritten": after(lambda a, b: a.replay.pool_seed != b.replay.pool_seed),
    "the same requests, grown": after(grown),
    **{f"every mode: {mode}": several_in(mode) for mode in Mode},
}
SETUPS: dict[str, Predicate] = {
    "8: row strides that differ from step to step": setup_is(lambda it: it.num_steps > 1 and it.stride_skew > 0),
    "8: differing odd row strides": setup_is(
        lambda it: it.pool_row_stride % 2 == it.table_row_stride % 2 == 1 and it.pool_row_stride != it.table_row_stride
    ),
    "8: strides beyond the widths": setup_is(
        lambda it: it.table_row_stride > it.table_width and it.pool_row_stride > it.pool_width
    ),
    "9: pages, and slots that are not aligned to them": some(
        lambda view: view.setup.page_size > 1 and view.replay.slots is SlotKind.SCATTERED
    ),
    **{f"pages of {size}, {kind} slots": pages_with(size, kind) for size in PAGE_SIZES for kind in SlotKind},
    "10: N != S + 1 and B > 1": some(
        lambda view: view.setup.num_draft_tokens != view.setup.num_steps + 1 and view.bucket > 1
    ),
    "12: several steps": setup_is(lambda it: it.num_steps > 1),
    **{f"{count} steps": steps_are(count) for count in range(1, 5)},
    "22: strided seq_lens": setup_is(lambda it: it.layout is Layout.STRIDED),
    "22: offset seq_lens": setup_is(lambda it: it.layout is Layout.OFFSET),
    "longer inputs than the bucket": setup_is(lambda it: it.input_tail > 0),
    "int64 seq_lens": setup_is(lambda it: it.seq_lens_dtype == "int64"),
    "int64 seq_lens, int32 pool indices": setup_is(
        lambda it: it.seq_lens_dtype == "int64" and it.pool_index_dtype == "int32"
    ),
    "aliased seq_lens in decode": some(lambda view: view.setup.aliased_seq_lens and view.mode is Mode.DECODE),
    "aliased seq_lens over several steps": setup_is(lambda it: it.aliased_seq_lens and it.num_steps > 1),
    "no host lengths": setup_is(lambda it: not it.host_lengths),
    "host lengths": setup_is(lambda it: it.host_lengths),
    "schedule and ctx_lens": setup_is(lambda it: it.schedule and it.ctx_lens is not CtxLens.ABSENT),
    "schedule without ctx_lens": setup_is(lambda it: it.schedule and it.ctx_lens is CtxLens.ABSENT),
    "schedule over several steps": setup_is(lambda it: it.schedule and it.num_steps > 1),
    "own ctx_lens in verify": some(lambda view: view.setup.ctx_lens is CtxLens.OWN and view.mode is Mode.TARGET_VERIFY),
    "schedule of more than one segment a row": some(lambda view: view.setup.schedule and max(view.kv_lens) > 256),
    "three buckets": setup_is(lambda it: len(it.buckets) == 3),
    "eight draft tokens": setup_is(lambda it: it.num_draft_tokens == 8),
    "one draft token": setup_is(lambda it: it.num_draft_tokens == 1),
    "top-k of 2048": setup_is(lambda it: it.index_topk == 2048),
    "a table narrower than the pool row": setup_is(lambda it: it.table_width < it.pool_width),
    "a table that ends within a page": setup_is(lambda it: it.table_width % it.page_size > 0),
}
SOON = ("a length past 15 bits", "a prefix sum past 16 bits")
TRIGGERS: dict[str, Predicate] = {**{name: LONG[name] for name in SOON}, **LENGTHS, **BATCHES, **SEQUENCES, **SETUPS}
LARGE: dict[str, Predicate] = {
    **SEQUENCES,
    **LONG,
    **{f"{count} steps": steps_are(count) for count in range(1, 9)},
    "a bucket and mode, another, and back": lined_up(
        3, lambda a, b, c: same_place(a, c) and a.bucket != b.bucket and a.mode is not b.mode
    ),
    "more requests than are drawn one by one": some(lambda view: view.real > 8),
    "more rows than 1024": some(lambda view: len(view.lengths) > 1024),
    "a sum of top-k lengths past 15 bits": some(
        lambda view: sum(min(length, view.setup.index_topk) for length in view.lengths) >= 1 << 15
    ),
}
"""With the limits for a GPU."""
COMMON: dict[str, float] = {
    "16: as short as may be, then long": 0.005,
    "16: longer than at capture first, then another maximum": 0.08,
    "another size in one bucket": 0.15,
    "a bucket, another, and back": 0.01,
    "a mode, another, and back": 0.03,
    "big, small, big in one bucket": 0.01,
    "fewer expanded rows in draft-extend": 0.01,
    "idle between": 0.02,
    "modes as in an engine": 0.02,
    "requests left": 0.02,
    "requests joined": 0.02,
    "a pool row reused": 0.03,
}
"""What graphs get wrong, and in which share of the cases it is at least."""


@cache
def drawn(seeded: int, large: bool = False) -> list[Case]:
    return draw_many(cases(limits=Limits.large() if large else Limits.small()), EXAMPLES, seeded)


@pytest.mark.parametrize("name", TRIGGERS)
def test_is_drawn_within_500_examples(name: str) -> None:
    found = find_any(cases(), TRIGGERS[name], max_examples=EXAMPLES)
    assert TRIGGERS[name](found)


@pytest.mark.parametrize("name", TRIGGERS)
def test_is_drawn_whatever_the_seed(name: str) -> None:
    missed = [seeded for seeded in MORE_SEEDS if not any(map(TRIGGERS[name], drawn(seeded)))]
    assert missed == []


@pytest.mark.parametrize("name", LONG)
def test_long_contexts_are_drawn_within_1000_examples(name: str) -> None:
    assert any(map(LONG[name], drawn(1) + drawn(2)))


@pytest.mark.parametrize("name", LARGE)
def test_is_drawn_within_500_large_examples(name: str) -> None:
    assert any(map(LARGE[name], drawn(1, large=True)))


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_what_graphs_get_wrong_is_common(name: str, large: bool) -> None:
    found = [SEQUENCES[name](case) for seeded in MORE_SEEDS for case in drawn(seeded, large)]
    assert sum(found) / len(found) >= COMMON[name]


def test_a_predicate_that_no_case_satisfies_is_not_found() -> None:
    assert not any(case.setup.num_steps > 4 for case in drawn(1))
