"""What holds of any metadata that a consumer can read safely (contract, section 5), whatever the exact values.

Checked on the oracle's own expectation as well as on what an implementation left, so that it holds both to account.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from nsa_verify.core.case import Case, Mode, Replay, Setup, row_slots
from nsa_verify.core.oracle import Expectation, batch

LENGTHS = ("cache_seqlens", "nsa_seqlens_expanded", "nsa_cache_seqlens", "paged_mqa_ctx_lens")
PREFIX_SUMS = {"cu_seqlens_k": "cache_seqlens", "nsa_cu_seqlens_k": "nsa_cache_seqlens"}

Content = Mapping[str, Sequence[Sequence[int]]]
"""The defined rows of each buffer, each cut to its live prefix."""


class Violation(NamedTuple):
    """A broken invariant: where it shows first, and what is broken."""

    buffer: str
    row: int
    column: int
    sentence: str


def content_of(expected: Expectation) -> dict[str, list[tuple[int, ...]]]:
    """The live part of an expectation, in the form that ``violations`` reads."""
    return {name: [row.values[: row.live] for row in rows] for name, rows in expected.buffers.items()}


def violations(
    case: Case, replay: int, content: Content, without: Collection[str] = frozenset()
) -> Iterator[Violation]:
    """Every invariant that ``content`` breaks, at its first element; those named in ``without`` are not asked for."""
    for name, broken in INVARIANTS.items():
        if name not in without:
            yield from broken(case, replay, content)


def _negative(_: Case, __: int, content: Content) -> Iterator[Violation]:
    for name in LENGTHS:
        for row, values in enumerate(content.get(name, ())):
            if min(values, default=0) < 0:
                column, value = next((at, value) for at, value in enumerate(values) if value < 0)
                yield Violation(name, row, column, f"negative length {value}, read as {value % 2**32} tokens")
                break


def _starts(_: Case, __: int, content: Content) -> Iterator[Violation]:
    for name in PREFIX_SUMS:
        first = content[name][0][0]
        if first != 0:
            yield Violation(name, 0, 0, f"starts at {first}, not at 0")


def _backwards(_: Case, __: int, content: Content) -> Iterator[Violation]:
    for name in PREFIX_SUMS:
        for column, (before, value) in enumerate(pairwise(content[name][0]), start=1):
            if value < before:
                yield Violation(name, 0, column, f"runs backwards: {before} then {value}")
                break


def _ends(_: Case, __: int, content: Content) -> Iterator[Violation]:
    for name, lengths in PREFIX_SUMS.items():
        sums, total = content[name][0], sum(content.get(lengths, ((),))[0])
        if sums[-1] != total:
            yield Violation(name, 0, len(sums) - 1, f"ends at {sums[-1]}, the lengths sum to {total}")


def _top_k(case: Case, _: int, content: Content) -> Iterator[Violation]:
    setup = case.setup
    if "nsa_cache_seqlens" not in content:
        return
    pairs = zip(content["nsa_cache_seqlens"][0], content["nsa_seqlens_expanded"][0], strict=True)
    for column, (clamped, expanded) in enumerate(pairs):
        if clamped > expanded or clamped > setup.index_topk:
            sentence = f"{clamped} exceeds min(expanded = {expanded}, top-k = {setup.index_topk})"
            yield Violation("nsa_cache_seqlens", 0, column, sentence)
            return


def _tables(case: Case, replay: int, content: Content) -> Iterator[Violation]:
    given, setup = batch(case, replay), case.setup
    repeats = [1] * given.bucket if given.mode is Mode.DECODE else given.accept_lens
    owners = [request for request, rows in enumerate(repeats) for _ in range(rows)]
    for name, page in (("page_table_1", 1), ("real_page_table", setup.page_size)):
        seen: tuple[int, Sequence[int]] = (-1, ())
        for row, values in enumerate(content.get(name, ())):
            pool_row = given.pool_rows[owners[row]]
            if values is seen[1] and pool_row == seen[0]:
                continue
            seen = pool_row, values
            stray = _stray(setup, case.replays[replay], pool_row, page, tuple(values))
            if stray is not None:
                yield Violation(name, row, stray, f"{values[stray]} is no slot of the request's row of req_to_token")
                return


def _stray(setup: Setup, replay: Replay, pool_row: int, page: int, values: tuple[int, ...]) -> int | None:
    """The first of ``values`` that is nowhere in the row of ``req_to_token``.

    As a rule they are the row from its first column on. Only if they are not, all of the row, which may be very long,
    has to be looked at.
    """
    row = row_slots(setup, replay, pool_row, setup.table_width)[::page]
    if values == tuple([slot // page for slot in row[: len(values)]]):
        return None
    allowed = {slot // page for slot in row_slots(setup, replay, pool_row, setup.pool_width)}
    return next((column for column, value in enumerate(values) if value not in allowed), None)


INVARIANTS: Final[Mapping[str, Callable[[Case, int, Content], Iterator[Violation]]]] = {
    "lengths are not negative": _negative,
    "prefix sums start at 0": _starts,
    "prefix sums do not run backwards": _backwards,
    "prefix sums end at the sum": _ends,
    "the top-k minimum is one": _top_k,
    "tables hold slots of the request": _tables,
}
"""In the order in which they are asked for."""
