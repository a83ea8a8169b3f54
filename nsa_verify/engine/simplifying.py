"""The last steps of a shrink: what Hypothesis cannot undo one choice at a time, tried on the case itself.

Hypothesis shortens the sequence of choices that a case was drawn from; where two of them must change together it
stops early, and which of several minimal cases it ends at depends on where it began. Here a field is set to its plain
value, a request goes together with its place in the bucket, and so on, for as long as the case gets smaller by
``size_of``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final

from msgspec.structs import replace

from nsa_verify.core.case import Case, Mode, Replay, Request, Setup, SlotKind, shortest, size_of
from nsa_verify.core.oracle import batch

Step = Callable[[Case], Iterator[Callable[[], Case]]]
"""Cases that one kind of step leads to, each still to be made; making it raises ``ValueError`` if it is none."""


def simplified(case: Case, shows: Callable[[Case], bool], most: int) -> Case:
    """The smallest case that steps lead to, each of which ``shows``; after ``most`` probes, as far as it got."""
    probes = 0
    tried = {case}
    while True:
        before = case
        for step in STEPS:
            found = True
            while found:
                found = False
                for candidate in _smaller(case, step):
                    if probes >= most:
                        return case
                    if candidate in tried:
                        continue
                    tried.add(candidate)
                    probes += 1
                    if shows(candidate):
                        case, found = candidate, True
                        break
        if case == before:
            return case


def _smaller(case: Case, step: Step) -> Iterator[Case]:
    size = measure(case)
    for make in step(case):
        with suppress(ValueError):
            candidate = make()
            if measure(candidate) < size:
                yield candidate


def measure(case: Case) -> tuple[int, ...]:
    """``size_of``, and among cases of one size those of fewer pool rows and SMs, and of plainer modes, first."""
    setup = case.setup
    return (*size_of(case), setup.pool_rows, setup.num_sms, sum(_MODES.index(it.mode) for it in case.replays))


_MODES: Final = tuple(Mode)


def _with_replay(case: Case, at: int, replay: Replay) -> Case:
    return replace(case, replays=(*case.replays[:at], replay, *case.replays[at + 1 :]))


def _with_setup(case: Case, **fields: Any) -> Case:
    return Case(replace(case.setup, **fields), case.replays)


def _without_a_replay(case: Case) -> Iterator[Callable[[], Case]]:
    for at in range(len(case.replays)):
        rest = case.replays[:at] + case.replays[at + 1 :]
        if rest:
            yield partial(replace, case, replays=rest)


def _without_a_request(case: Case) -> Iterator[Callable[[], Case]]:
    """A request less, in the bucket that it was in or in the one that fits then."""
    for at, replay in enumerate(case.replays):
        for place in range(len(replay.requests)):
            rest = replay.requests[:place] + replay.requests[place + 1 :]
            fewer = _with_replay(case, at, replace(replay, requests=rest))
            yield partial(_fitted, fewer)
            yield partial(_lowered, fewer, case.bucket(at))
            yield partial(replace, fewer)


def _first_requests(case: Case) -> Iterator[Callable[[], Case]]:
    """The first requests of a batch only: one more than a power of two, where kernels begin another block."""
    for at, replay in enumerate(case.replays):
        for count in _below(len(replay.requests), 1, (17, 33, 65)):
            fewer = _with_replay(case, at, replace(replay, requests=replay.requests[:count]))
            yield partial(_fitted, fewer)


def _fitted(case: Case) -> Case:
    """With the buckets that the batches fill."""
    filled = tuple(sorted({max(1, len(replay.requests)) for replay in case.replays}))
    return _with_setup(case, buckets=filled)


def _lowered(case: Case, bucket: int) -> Case:
    """With one place less in ``bucket``."""
    buckets = tuple(sorted({it - (it == bucket) for it in case.setup.buckets} - {0}))
    return _with_setup(case, buckets=buckets)


def _other_buckets(case: Case) -> Iterator[Callable[[], Case]]:
    yield partial(_fitted, case)
    used = tuple(sorted({case.bucket(at) for at in range(len(case.replays))}))
    yield partial(_with_setup, case, buckets=used)
    for bucket in case.setup.buckets:
        yield partial(_lowered, case, bucket)


def _plainer_setup(case: Case) -> Iterator[Callable[[], Case]]:
    """One field of the setup at its plain value; strides follow the widths that they belong to."""
    setup, plain = case.setup, Setup()
    for field in _PLAIN:
        value: Any = getattr(plain, field)
        if getattr(setup, field) != value:
            yield partial(_with_setup, case, **{field: value})
    yield partial(_with_setup, case, table_row_stride=setup.table_width)
    yield partial(_with_setup, case, pool_row_stride=setup.pool_width)


_PLAIN: Final = (
    *("num_steps", "page_size", "schedule", "ctx_lens", "stride_skew", "layout", "seq_lens_dtype", "pool_index_dtype"),
    *("input_tail", "aliased_seq_lens", "host_lengths", "fill_seq_len", "num_sms", "index_topk"),
)


def _smaller_numbers(case: Case) -> Iterator[Callable[[], Case]]:
    """Fewer draft tokens, steps and pool rows, a smaller top-k, narrower tables."""
    setup = case.setup
    for field in ("num_draft_tokens", "num_steps", "index_topk", "pool_rows", "num_sms"):
        for value in _below(getattr(setup, field), _LEAST.get(field, 1)):
            yield partial(_narrowed, case, **{field: value})
    fits = _longest(case)  # a table narrower than what it lists would be one thing more to understand
    for width in _below(setup.table_width, fits):
        yield partial(_narrowed, case, table_width=width, table_row_stride=width)
    for width in _below(setup.pool_width, setup.table_width):
        yield partial(_narrowed, case, pool_width=width, pool_row_stride=width)
    for width in _below(setup.pool_width, fits):
        both = {"table_width": width, "table_row_stride": width, "pool_width": width, "pool_row_stride": width}
        yield partial(_narrowed, case, **both)


def _longest(case: Case) -> int:
    """The longest KV length, padded rows included."""
    given = [batch(case, at) for at in range(len(case.replays))]
    added = {Mode.TARGET_VERIFY: case.setup.num_draft_tokens}
    return max(1, *(length + added.get(it.mode, 0) for it in given for length in it.seq_lens))


_LEAST: Final = {"index_topk": Setup().index_topk}
"""A smaller one would cut lengths that are short."""


def _narrowed(case: Case, **numbers: int) -> Case:
    """With other numbers in the setup, and the accept lengths within N."""
    setup = replace(case.setup, **numbers)
    most = setup.num_draft_tokens
    replays = tuple(
        replace(
            replay,
            requests=tuple(replace(it, accept_len=min(it.accept_len, most)) for it in replay.requests),
            padded_accept_len=replay.padded_accept_len if replay.padded_accept_len == 1 else most,
        )
        for replay in case.replays
    )
    return Case(setup, replays)


def _below(value: int, least: int, more: tuple[int, ...] = ()) -> list[int]:
    """Smaller numbers to try, the smallest first."""
    return sorted({it for it in (least, least + 1, *more, value // 2, value - 1) if least <= it < value})


def _plainer_replay(case: Case) -> Iterator[Callable[[], Case]]:
    for at in range(len(case.replays)):
        changes: list[dict[str, Any]] = [{"mode": mode} for mode in _MODES]
        changes += [{"slots": SlotKind.SEQUENTIAL}, {"pool_seed": 0}, {"padded_accept_len": 1}, {"padded_pool_row": 0}]
        for change in changes:
            yield partial(_with_change, case, at, change)


def _with_change(case: Case, at: int, change: dict[str, Any]) -> Case:
    return _with_replay(case, at, replace(case.replays[at], **change))


def _smaller_requests(case: Case) -> Iterator[Callable[[], Case]]:
    for at, replay in enumerate(case.replays):
        for place, request in enumerate(replay.requests):
            least = shortest(case.setup, replay.mode, request.accept_len)
            changed = [replace(request, seq_len=it) for it in _below(request.seq_len, least)]
            if replay.mode is Mode.DRAFT_EXTEND:
                changed += [replace(request, accept_len=it) for it in _below(request.accept_len, 0)]
            elif request.accept_len != 1:
                changed.append(replace(request, accept_len=1))
            changed += [replace(request, pool_row=it) for it in _below(request.pool_row, 0)]
            for it in changed:
                yield partial(_with_request, case, at, place, it)


def _with_request(case: Case, at: int, place: int, request: Request) -> Case:
    replay = case.replays[at]
    requests = (*replay.requests[:place], request, *replay.requests[place + 1 :])
    return _with_replay(case, at, replace(replay, requests=requests))


def _boundary_and_lengths(case: Case) -> Iterator[Callable[[], Case]]:
    """The top-k or the table's width smaller, and as much smaller the lengths that lie close to it."""
    for field in ("index_topk", "table_width"):
        boundary = getattr(case.setup, field)
        for value in _below(boundary, _LEAST.get(field, 1)):
            yield partial(_moved, case, field, boundary, value)


def _moved(case: Case, field: str, boundary: int, value: int) -> Case:
    near = case.setup.num_draft_tokens + 2
    less = boundary - value
    replays = tuple(
        replace(
            replay,
            requests=tuple(
                replace(it, seq_len=max(0, it.seq_len - less)) if abs(it.seq_len - boundary) <= near else it
                for it in replay.requests
            ),
        )
        for replay in case.replays
    )
    strides = {"table_row_stride": value + case.setup.table_row_stride - boundary} if field == "table_width" else {}
    return Case(replace(case.setup, **{field: value}, **strides), replays)


def _request_for_padding(case: Case) -> Iterator[Callable[[], Case]]:
    """A request where a padded row is: as short as its mode allows."""
    for at, replay in enumerate(case.replays):
        if len(replay.requests) < case.bucket(at):
            added = Request(seq_len=shortest(case.setup, replay.mode, 1))
            yield partial(_with_replay, case, at, replace(replay, requests=(*replay.requests, added)))


STEPS: Final[tuple[Step, ...]] = (
    *(_without_a_replay, _first_requests, _without_a_request, _other_buckets, _plainer_setup, _plainer_replay),
    *(_boundary_and_lengths, _smaller_numbers, _smaller_requests, _request_for_padding),
)
