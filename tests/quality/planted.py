"""Ten mutants as people make them, and the cases that a person would write to show each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nsa_verify import Case, Code, Mode
from nsa_verify.core.case import shortest
from nsa_verify.core.oracle import batch, expect
from nsa_verify.mutants import CATALOGUE, Mutant

Smallest = Callable[[Case], bool]
"""Whether a case is the one that a person would have written to show the bug."""


@dataclass(frozen=True)
class Bug:
    """A mutant of the catalogue, the code it must be found under here, and its smallest cases."""

    name: str
    code: Code
    smallest: Smallest

    @property
    def mutant(self) -> Mutant:
        """What is planted."""
        return CATALOGUE[self.name]

    @property
    def copy_name(self) -> str:
        """What the implementation is called once the bug is in it."""
        return self.mutant.copy_name

    def plant(self, folder: Path, planted: bool = True) -> Path:
        """Write the copy into ``folder``."""
        return self.mutant.plant(folder, planted)


def requests_of(case: Case) -> list[tuple[int, int]]:
    """``(seq_len, accept_len)`` of every request of a case that has one replay."""
    (replay,) = case.replays
    return [(request.seq_len, request.accept_len) for request in replay.requests]


def _one_request_of_length_1(case: Case) -> bool:
    return [seq_len for seq_len, _ in requests_of(case)] == [1]


def _only_padding_underflows(case: Case) -> bool:
    """At most one real request, as short as its mode allows."""
    (replay,) = case.replays
    lengths = [(it.seq_len, shortest(case.setup, replay.mode, it.accept_len)) for it in replay.requests]
    given = batch(case, 0)
    too_short = given.seq_lens[-1] - given.accept_lens[-1] + 1 < 0
    return len(lengths) <= 1 and all(length == least for length, least in lengths) and too_short


def _one_row_of_length_top_k(case: Case) -> bool:
    (row,) = expect(case, 0).buffers["nsa_seqlens_expanded"]
    return len(requests_of(case)) == 1 and case.setup.index_topk in row.values


def _one_row_past_the_total(case: Case) -> bool:
    """Two tokens of which one is accepted; or of two requests with one token each, one accepted and one not."""
    if case.replays[0].mode is not Mode.DRAFT_EXTEND or any(seq_len != 1 for seq_len, _ in requests_of(case)):
        return False
    rows = case.setup.captured_rows(Mode.DRAFT_EXTEND, case.bucket(0))
    return (rows, expect(case, 0).defined_rows) == (2, 1)


def _verify_of_one_token(case: Case) -> bool:
    return case.replays[0].mode is Mode.TARGET_VERIFY and _one_request_of_length_1(case)


def _two_steps(case: Case) -> bool:
    return case.setup.num_steps == 2 and _one_request_of_length_1(case)


def _two_then_one(case: Case) -> bool:
    lengths = [[request.seq_len for request in replay.requests] for replay in case.replays]
    return lengths == [[2], [1]] and case.replays[0].mode is case.replays[1].mode


def _nothing_accepted(case: Case) -> bool:
    return case.replays[0].mode is Mode.DRAFT_EXTEND and requests_of(case) == [(1, 0)]


BUGS: Final = (
    Bug("no-clamp-at-0", Code.INVARIANT, _only_padding_underflows),
    Bug("top-k-comparison", Code.WRONG_VALUE, _one_row_of_length_top_k),
    Bug("page-column-off-by-one", Code.WRONG_VALUE, _one_request_of_length_1),
    Bug("prefix-sum-without-0", Code.POISON, _one_request_of_length_1),
    Bug("one-past-the-prefix-sum", Code.GUARD_WRITTEN, _one_request_of_length_1),
    Bug("row-past-the-total-zeroed", Code.FRAME_WRITTEN, _one_row_past_the_total),
    Bug("seq-lens-in-place", Code.INPUT_MUTATED, _verify_of_one_token),
    Bug("last-step-not-written", Code.POISON, _two_steps),
    Bug("earlier-replay-left", Code.STALE, _two_then_one),
    Bug("zero-accept-counted", Code.FRAME_WRITTEN, _nothing_accepted),
)
