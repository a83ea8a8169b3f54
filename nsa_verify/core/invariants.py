"""What holds of any metadata that a consumer can read safely (contract, section 5), whatever the exact values.

Checked on the oracle's own expectation as well as on what an implementation left, so that it holds both to account.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

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


def violations(case: Case, replay: int, content: Content) -> Iterator[Violation]:
    """Every invariant that ``content`` breaks, at its first element."""
    for name in LENGTHS:
        yield from _negative(name, content.get(name, ()))
    for name, lengths in PREFIX_SUMS.items():
        yield from _prefix_sum(name, content[name][0], content.get(lengths, ((),))[0])
    yield from _top_k(case.setup, content)
    yield from _tables(case, replay, content)


def _negative(name: str, rows: Sequence[Sequence[int]]) -> Iterator[Violation]:
    for row, values in enumerate(rows):
        if min(values, default=0) >= 0:
            continue
        for column, value in enumerate(values):
            if value < 0:
                yield Violation(name, row, column, f"negative length {value}, read as {value % 2**32} tokens")
                return


def _prefix_sum(name: str, sums: Sequence[int], lengths: Sequence[int]) -> Iterator[Violation]:
    if sums[0] != 0:
        yield Violation(name, 0, 0, f"starts at {sums[0]}, not at 0")
        return
    for column, (before, value) in enumerate(pairwise(sums), start=1):
        if value < before:
            yield Violation(name, 0, column, f"runs backwards: {before} then {value}")
            return
    if sums[-1] != sum(lengths):
        yield Violation(name, 0, len(sums) - 1, f"ends at {sums[-1]}, the lengths sum to {sum(lengths)}")


def _top_k(setup: Setup, content: Content) -> Iterator[Violation]:
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
