"""What a case is an example of: labels like ``padding:some``, each a value of a dimension that authors of kernels ask
about, and counts of the pairs of labels that cases had.

A label says that some replay of the case is like this, so that a case may have several values of one dimension, and
none where the question does not arise. Lengths are those of real requests, unless a dimension is about padded rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, NamedTuple

from msgspec import Struct

from nsa_verify.core.buffers import has_own_ctx_lens
from nsa_verify.core.case import Case, CtxLens, Layout, Mode, Setup, SlotKind

Label = str
"""``dimension:value``."""
Pair = tuple[Label, Label]
TILES: Final = (128, 256)
"""Columns and tokens that kernels and the paged-MQA schedule work in."""


class _View(NamedTuple):
    """One replay as the dimensions see it."""

    mode: Mode
    bucket: int
    kv_lens: Sequence[int]
    """Of the real requests."""
    accepts: Sequence[int]
    """Of the real requests, in DRAFT_EXTEND only."""
    pool_rows: Sequence[int]
    rows: int
    """Defined expanded rows, the padded ones included."""
    padded_accept: int
    total: int
    """The largest prefix sum of the KV lengths, the padded ones included."""
    slots: SlotKind

    @property
    def longest(self) -> int:
        return max(self.kv_lens, default=0)


class _Facts(NamedTuple):
    """A case as the dimensions see it."""

    setup: Setup
    views: Sequence[_View]
    kv_lens: frozenset[int]
    expanded: frozenset[tuple[int, int]]
    """The first and the last expanded length of each real request that has any; between them are all."""


def _view(setup: Setup, case: Case, index: int) -> _View:
    replay = case.replays[index]
    mode, requests = replay.mode, replay.requests
    tokens, bucket = setup.num_draft_tokens, setup.bucket_for(len(requests))
    padded, added = bucket - len(requests), tokens if mode is Mode.TARGET_VERIFY else 0
    kv_lens = [request.seq_len + added for request in requests]
    accepts: list[int] = []
    padded_accept, rows = tokens, bucket * tokens
    if mode is Mode.DRAFT_EXTEND:
        accepts, padded_accept = [request.accept_len for request in requests], replay.padded_accept_len
        rows = sum(accepts) + padded * padded_accept
    elif mode is Mode.DECODE:
        padded_accept, rows = 1, bucket
    total = sum(kv_lens) + padded * (setup.fill_seq_len + added)
    pool_rows = [request.pool_row for request in requests]
    return _View(mode, bucket, kv_lens, accepts, pool_rows, rows, padded_accept, total, replay.slots)


def _facts(case: Case) -> _Facts:
    setup = case.setup
    views = [_view(setup, case, index) for index in range(len(case.replays))]
    kv_lens: set[int] = set()
    expanded: set[tuple[int, int]] = set()
    for view in views:
        kv_lens.update(view.kv_lens)
        if view.mode is Mode.DRAFT_EXTEND:
            both = zip(view.kv_lens, view.accepts, strict=True)
            expanded.update([(length - accept + 1, length) for length, accept in both if accept])
        else:
            before = view.padded_accept - 1
            expanded.update([(length - before, length) for length in view.kv_lens])
    return _Facts(setup, views, frozenset(kv_lens), frozenset(expanded))


def _mode(it: _Facts) -> Iterable[str]:
    return {view.mode for view in it.views}


def _padding(it: _Facts) -> Iterator[str]:
    for view in it.views:
        real = len(view.kv_lens)
        yield "none" if real == view.bucket else "some" if real else "only"


def _padded_start(it: _Facts) -> Iterator[str]:
    """Where the expanded lengths of a padded row of the two DRAFT_EXTEND modes begin, before the clamp at 0."""
    for view in it.views:
        if len(view.kv_lens) < view.bucket and view.mode in (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2):
            yield "below-0" if it.setup.fill_seq_len < view.padded_accept - 1 else "0-or-more"


def _accepts(it: _Facts) -> Iterator[str]:
    """Accept lengths of the real requests of a DRAFT_EXTEND replay."""
    for view in it.views:
        accepts = view.accepts
        if not accepts:
            continue
        values = set(accepts)
        if 0 in values:
            yield "some-zero" if len(values) > 1 else "all-zero"
        if len(values) > 1:
            almost = len(values) == 2 and len(accepts) > 2 and min(map(accepts.count, values)) == 1
            yield "uniform-but-one" if almost else "ragged"
        elif 0 not in values:
            yield "uniform"


def _top_k(it: _Facts) -> Iterator[str]:
    """Expanded lengths beside the top-k."""
    top_k = it.setup.index_topk
    for low, high in it.expanded:
        if low < top_k - 1:
            yield "below"
        if high > top_k + 1:
            yield "above"
        if high >= top_k - 1 and low <= top_k + 1:
            if low <= top_k - 1:
                yield "K-1"
            if low <= top_k <= high:
                yield "K"
            if high >= top_k + 1:
                yield "K+1"


def _page_edge(it: _Facts) -> Iterator[str]:
    """KV lengths beside a multiple of the page size, where pages have several tokens."""
    page = it.setup.page_size
    if page > 1:
        for length in it.kv_lens:
            past = length % page
            yield "on" if past == 0 else "after" if past == 1 < length else "before" if past == page - 1 else "within"


def _tile_edge(it: _Facts) -> Iterator[str]:
    """KV lengths beside a multiple of 256, or beside one of 128 that is none of 256."""
    for length in it.kv_lens:
        found = _TILE_EDGES.get(length % TILES[1])
        if found is not None and length > 1:
            yield found


_TILE_EDGES: Final = {
    (tile + past) % TILES[1]: f"{where}-{tile}"
    for tile in TILES
    for past, where in ((-1, "before"), (0, "on"), (1, "after"))
}


def _wall(it: _Facts) -> Iterator[str]:
    """KV lengths beside the width of the page table."""
    width = it.setup.table_width
    for length in it.kv_lens:
        yield "below" if length < width else "at" if length == width else "beyond"


def _rows(it: _Facts) -> Iterator[str]:
    for view in it.views:
        yield _ROWS[bisect_right(_MOST_ROWS, view.rows - 1)]


_MOST_ROWS: Final = (0, 1, 30, 33, 128)
_ROWS: Final = ("0", "1", "2-30", "31-33", "34-128", "129-")


def _bits(it: _Facts) -> Iterable[str]:
    """What the largest length, or prefix sum of KV lengths, of the case needs."""
    if max(it.kv_lens, default=0) >= 1 << 16:
        return ("length-17",)
    total = max(view.total for view in it.views)
    return ("sum-17" if total >= 1 << 16 else "16" if total >= 1 << 15 else "15",)


def _sequence(it: _Facts) -> Iterator[str]:
    """How the graph of a replay follows from the one before."""
    if len(it.views) == 1:
        yield "one"
    for before, view in pairwise(it.views):
        if before.mode is not view.mode:
            yield "mode-switch"
        if before.bucket != view.bucket:
            yield "bucket-switch"
        elif before.mode is view.mode:
            yield "same-graph"


def _change(it: _Facts) -> Iterator[str]:
    """How the batch of a replay follows from the one before; an empty batch has length 0."""
    for before, view in pairwise(it.views):
        if before.longest != view.longest:
            yield "shorter" if view.longest < before.longest else "longer"
        if len(before.kv_lens) != len(view.kv_lens):
            yield "fewer" if len(view.kv_lens) < len(before.kv_lens) else "more"


def _pool_rows(it: _Facts) -> Iterator[str]:
    """Whether requests of a batch share a row of ``req_to_token``."""
    for view in it.views:
        if len(view.pool_rows) > 1:
            yield "distinct" if len(set(view.pool_rows)) == len(view.pool_rows) else "shared"


def _slots(it: _Facts) -> Iterable[str]:
    return {view.slots for view in it.views}


def _input(it: _Facts) -> Iterator[str]:
    """How ``seq_lens`` lies in memory, and whether the inputs are longer than the bucket."""
    yield it.setup.layout
    if it.setup.input_tail:
        yield "tail"


def _strides(it: _Facts) -> Iterator[str]:
    """Row strides of ``req_to_token`` (pool) and of the page tables."""
    setup = it.setup
    wide_pool, wide_table = setup.pool_row_stride > setup.pool_width, setup.table_row_stride > setup.table_width
    if wide_pool:
        yield "wide-pool"
    if wide_table:
        yield "wide-table"
    if setup.stride_skew and setup.num_steps > 1:
        yield "per-step"
    elif not wide_pool and not wide_table:
        yield "tight"


def _steps(it: _Facts) -> Iterator[str]:
    steps, tokens = it.setup.num_steps, it.setup.num_draft_tokens
    if steps <= 2:
        yield str(steps)
    if tokens - 1 <= steps <= tokens:
        yield "N" if steps == tokens else "N-1"
    elif steps > 2:
        yield "other"


def _alias(it: _Facts) -> Iterator[str]:
    """Whether ``cache_seqlens`` is ``seq_lens``, which is so in DECODE alone."""
    yield "yes" if it.setup.aliased_seq_lens and any(view.mode is Mode.DECODE for view in it.views) else "no"


def _ctx_lens(it: _Facts) -> Iterator[str]:
    """Which ``paged_mqa_ctx_lens`` there is: a tensor of its own in TARGET_VERIFY alone, elsewhere a view."""
    kind = it.setup.ctx_lens
    own = any(has_own_ctx_lens(it.setup, view.mode) for view in it.views)
    yield CtxLens.VIEW if kind is CtxLens.OWN and not own else kind


@dataclass(frozen=True)
class Dimension:
    """A question about cases: its name, the possible answers in order, and the answers for one case."""

    name: str
    values: tuple[str, ...]
    of: Callable[[_Facts], Iterable[str]]
    """May name a value more than once."""
    labels: dict[str, Label] = field(init=False)
    """By value."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", {str(value): f"{self.name}:{value}" for value in self.values})


def _of_setup(name: str, answers: dict[Any, str], ask: Callable[[Setup], Any]) -> Dimension:
    """A dimension of the Setup alone: what is asked of it, and the value for each answer."""
    told = {answer: (value,) for answer, value in answers.items()}
    return Dimension(name, tuple(answers.values()), lambda it: told[ask(it.setup)])


_YES_NO: Final = {False: "no", True: "yes"}
DIMENSIONS: Final = (
    Dimension("mode", tuple(Mode), _mode),
    Dimension("padding", ("none", "some", "only"), _padding),
    _of_setup("fill", {0: "0", 1: "1"}, lambda setup: setup.fill_seq_len),
    Dimension("padded-start", ("0-or-more", "below-0"), _padded_start),
    Dimension("accepts", ("uniform", "uniform-but-one", "ragged", "some-zero", "all-zero"), _accepts),
    Dimension("top-k", ("below", "K-1", "K", "K+1", "above"), _top_k),
    Dimension("page-edge", ("before", "on", "after", "within"), _page_edge),
    Dimension("tile-edge", tuple(_TILE_EDGES.values()), _tile_edge),
    Dimension("wall", ("below", "at", "beyond"), _wall),
    Dimension("rows", _ROWS, _rows),
    Dimension("bits", ("15", "16", "sum-17", "length-17"), _bits),
    Dimension("sequence", ("one", "same-graph", "mode-switch", "bucket-switch"), _sequence),
    Dimension("change", ("shorter", "longer", "fewer", "more"), _change),
    Dimension("pool-rows", ("distinct", "shared"), _pool_rows),
    Dimension("slots", tuple(SlotKind), _slots),
    Dimension("input", (*Layout, "tail"), _input),
    _of_setup("seq-lens", {"int32": "int32", "int64": "int64"}, lambda setup: setup.seq_lens_dtype),
    _of_setup("pool-indices", {"int64": "int64", "int32": "int32"}, lambda setup: setup.pool_index_dtype),
    Dimension("alias", ("no", "yes"), _alias),
    _of_setup("host-lengths", {True: "given", False: "absent"}, lambda setup: setup.host_lengths),
    Dimension("strides", ("tight", "wide-pool", "wide-table", "per-step"), _strides),
    Dimension("steps", ("1", "2", "N-1", "N", "other"), _steps),
    _of_setup("draft-tokens", {1: "1", 2: "2", 3: "3-8"}, lambda setup: min(setup.num_draft_tokens, 3)),
    _of_setup("page-size", {False: "1", True: "16-128"}, lambda setup: setup.page_size > 1),
    Dimension("ctx-lens", tuple(CtxLens), _ctx_lens),
    _of_setup("schedule", _YES_NO, lambda setup: setup.schedule),
)
LABELS: Final = tuple(label for dimension in DIMENSIONS for label in dimension.labels.values())
_PLACE: Final = {label: place for place, label in enumerate(LABELS)}
_DIMENSION: Final = tuple(number for number, dimension in enumerate(DIMENSIONS) for _ in dimension.values)
"""The dimension of each of ``LABELS``."""


class Impossible(NamedTuple):
    """Labels that no case has together: any of ``some`` with any of ``others``; and why."""

    some: frozenset[Label]
    others: frozenset[Label]
    reason: str


def _impossible(some: str, others: str, reason: str) -> Impossible:
    """Labels as words; of ``name:*`` all of the dimension."""
    found = []
    for words in (some, others):
        stems = [word.removesuffix("*") for word in words.split()]
        found.append(frozenset(label for label in LABELS if any(_is(label, stem) for stem in stems)))
    return Impossible(found[0], found[1], reason)


def _is(label: Label, stem: str) -> bool:
    return label.startswith(stem) if stem.endswith(":") else label == stem


IMPOSSIBLE: Final = (
    _impossible("sequence:one", "change:*", "one replay follows no other"),
    _impossible("alias:yes", "seq-lens:int64", "outputs are int32, and an alias has their width"),
    _impossible(
        "alias:yes", "input:strided input:offset input:tail", "an output lies side by side and ends with the bucket"
    ),
    _impossible("page-size:1", "page-edge:*", "pages of one token have no edges"),
    _impossible("steps:1", "strides:per-step", "one step has one stride"),
    _impossible(
        "draft-tokens:1", "padded-start:below-0", "a row of one token starts at the fill, which is no less than 0"
    ),
    _impossible("draft-tokens:1", "steps:N-1", "there is no step 0 times"),
)


SEVERAL_ROWS: Final = _impossible(
    "rows:1", "draft-tokens:2 draft-tokens:3-8 steps:N-1", "a request has N rows where each has as many"
)
"""What no case of TARGET_VERIFY and DRAFT_EXTEND_V2 alone has."""

_NEEDS: Final[tuple[tuple[str, frozenset[Mode], int], ...]] = (
    *((f"mode:{mode}", frozenset({mode}), 1) for mode in Mode),
    ("accepts:", frozenset({Mode.DRAFT_EXTEND}), 1),
    ("padded-start:", frozenset({Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2}), 1),
    ("rows:0", frozenset({Mode.DRAFT_EXTEND}), 1),
    ("alias:yes", frozenset({Mode.DECODE}), 1),
    ("ctx-lens:own", frozenset({Mode.TARGET_VERIFY}), 1),
    ("sequence:mode-switch", frozenset(Mode), 2),
)
"""How many of which modes a run must draw for a label, or for a dimension."""


def labels_of(case: Case) -> frozenset[Label]:
    """All labels of ``case``."""
    facts = _facts(case)
    return frozenset([dimension.labels[value] for dimension in DIMENSIONS for value in dimension.of(facts)])


def _places(labels: Iterable[Label]) -> list[int]:
    return sorted([_PLACE[label] for label in labels])


def pairs(labels: Iterable[Label]) -> Iterator[Pair]:
    """The unordered pairs of ``labels`` of different dimensions, the earlier dimension first, in a fixed order."""
    places = _places(labels)
    for index, first in enumerate(places):
        for second in places[index + 1 :]:
            if _DIMENSION[first] != _DIMENSION[second]:
                yield LABELS[first], LABELS[second]


def reason_against(pair: Pair, more: Iterable[Impossible] = ()) -> str | None:
    """Why no case has both labels, or None if one may; ``more`` holds in some modes."""
    first, second = pair
    for it in (*IMPOSSIBLE, *more):
        if (first in it.some and second in it.others) or (second in it.some and first in it.others):
            return it.reason
    return None


def possible_labels(modes: Iterable[Mode] = tuple(Mode)) -> tuple[Label, ...]:
    """The labels that cases in ``modes`` may have, in order."""
    drawn = frozenset(modes)
    return tuple(
        label for label in LABELS if all(len(drawn & of) >= least for stem, of, least in _NEEDS if _is(label, stem))
    )


@lru_cache
def possible_pairs(modes: tuple[Mode, ...] = tuple(Mode)) -> tuple[Pair, ...]:
    """All pairs, in the order of ``pairs``, that cases in ``modes`` may have."""
    against = [] if {Mode.DECODE, Mode.DRAFT_EXTEND} & set(modes) else [SEVERAL_ROWS]
    return tuple(pair for pair in pairs(possible_labels(modes)) if reason_against(pair, against) is None)


_OTHERS: Final = tuple(sum(1 << place for place, other in enumerate(_DIMENSION) if other != own) for own in _DIMENSION)
"""For each label, as bits, the labels of other dimensions."""


class Novelty:
    """Which pairs of labels some cases had, to ask how many more another case has."""

    def __init__(self) -> None:
        self._met = [0] * len(LABELS)

    def of(self, case: Case) -> int:
        """How many pairs ``case`` has that none of the cases added so far had."""
        places = _places(labels_of(case))
        own = sum(1 << place for place in places)
        return sum((own & _OTHERS[place] & ~self._met[place]).bit_count() for place in places) // 2

    def add(self, case: Case) -> None:
        """Know the pairs of ``case`` from now on."""
        places = _places(labels_of(case))
        own = sum(1 << place for place in places)
        for place in places:
            self._met[place] |= own & _OTHERS[place]


class Coverage(Struct):
    """How many cases had each label, and each pair of labels of different dimensions."""

    counts: dict[int, int] = {}
    """By the places of a pair in ``LABELS``, as one number; a label counts as the pair of itself and itself."""

    def count(self, case: Case) -> None:
        """Count a case in."""
        counts, places = self.counts, _places(labels_of(case))
        for index, first in enumerate(places):
            row, dimension = first * len(LABELS), _DIMENSION[first]
            counts[row + first] = counts.get(row + first, 0) + 1
            for second in places[index + 1 :]:
                if _DIMENSION[second] != dimension:
                    counts[row + second] = counts.get(row + second, 0) + 1

    def add(self, other: Coverage) -> None:
        """Count in what ``other`` counted."""
        for key, count in other.counts.items():
            self.counts[key] = self.counts.get(key, 0) + count

    def by_pair(self) -> Iterator[tuple[Pair, int]]:
        """Every pair that a case had, a label alone as the pair of itself and itself, and how many cases had it."""
        for key, count in self.counts.items():
            first, second = divmod(key, len(LABELS))
            yield (LABELS[first], LABELS[second]), count

    def of(self, label: Label) -> int:
        """How many cases had ``label``."""
        return self.of_pair((label, label))

    def of_pair(self, pair: Pair) -> int:
        """How many cases had both labels of a pair, given in the order of ``pairs``."""
        return self.counts.get(_PLACE[pair[0]] * len(LABELS) + _PLACE[pair[1]], 0)
