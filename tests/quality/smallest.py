"""The smallest cases of bugs of captured graphs and sequences: as short as what shows each bug allows."""

from __future__ import annotations

from quality.planted import Smallest

from nsa_verify import Case, Layout, Mode
from nsa_verify.core.case import shortest
from nsa_verify.core.oracle import batch


def modes_of(case: Case) -> list[Mode]:
    """The modes of the replays."""
    return [replay.mode for replay in case.replays]


def lengths_of(case: Case) -> list[list[int]]:
    """``seq_len`` of the requests of every replay."""
    return [[request.seq_len for request in replay.requests] for replay in case.replays]


def rows_of(case: Case) -> list[int]:
    """The captured rows of the graph that serves each replay."""
    return [case.setup.captured_rows(replay.mode, case.bucket(index)) for index, replay in enumerate(case.replays)]


def _are_shortest(case: Case) -> bool:
    """Every request is as short as its mode allows."""
    return all(
        request.seq_len == shortest(case.setup, replay.mode, request.accept_len)
        for replay in case.replays
        for request in replay.requests
    )


def one_request_of_length_1(case: Case) -> bool:
    """In one replay, without padding."""
    return lengths_of(case) == [[1]] and case.setup.buckets == (1,)


def two_rows(case: Case) -> bool:
    """One replay of two requests of length 1, or of one and a padded row."""
    return lengths_of(case) in ([[1]], [[1, 1]]) and case.setup.buckets == (2,)


def one_request_in(mode: Mode) -> Smallest:
    """One replay of ``mode`` with one request."""
    return lambda case: modes_of(case) == [mode] and len(case.replays[0].requests) == 1 and _are_shortest(case)


def longer_than_the_capture(case: Case) -> bool:
    """One replay with one request, a token longer than those that the graph was captured with."""
    return lengths_of(case) == [[case.setup.fill_seq_len + 1]]


def two_steps(case: Case) -> bool:
    """One request of length 1, in two steps."""
    return case.setup.num_steps == 2 and lengths_of(case) == [[1]]


def schedule_of_two_steps(case: Case) -> bool:
    """The same with the schedule, which is optional."""
    return two_steps(case) and case.setup.schedule


def strided_batch_of(size: int) -> Smallest:
    """One replay of the shortest requests, or padding, with a stride between their lengths."""
    return lambda case: (
        len(case.replays) == 1
        and _are_shortest(case)
        and case.setup.layout is Layout.STRIDED
        and case.setup.buckets == (size,)
    )


def two_rows_with_a_stride(case: Case) -> bool:
    """One replay; in some step the rows of the page table do not follow each other without a gap."""
    setup = case.setup
    last_stride = setup.table_row_stride + (setup.num_steps - 1) * setup.stride_skew
    return rows_of(case) == [2] and setup.num_steps <= 2 and last_stride > setup.table_width


def batch_of_two_then_shorter(case: Case) -> bool:
    """Two replays of one mode in the one bucket of two; each row is a token shorter the second time, or the last is."""
    least = shortest(case.setup, case.replays[0].mode, 1)
    lengths = lengths_of(case)
    shorter = len(lengths) == 2 and max(lengths[0]) == least + 1 and set(lengths[1]) <= {least}
    return shorter and len(set(modes_of(case))) == 1 and case.setup.buckets == (2,)


def longer_then_padding(case: Case) -> bool:
    """Two replays of one mode: a row of length 2, then of length 1, as a request or as padding."""
    rows = lengths_of(case) in ([[2], [1]], [[2], []])
    return rows and len(set(modes_of(case))) == 1 and case.setup.buckets == (1,)


def verify_and_decode(case: Case) -> bool:
    """Two replays in the one bucket of two, with two tokens; what is decoded lies on different rows of the pool."""
    return sorted(modes_of(case)) == [Mode.DECODE, Mode.TARGET_VERIFY] and _decodes_two_rows(case)


def verify_between_decodes(case: Case) -> bool:
    """The same, and the first mode once more."""
    return modes_of(case) == [Mode.DECODE, Mode.TARGET_VERIFY, Mode.DECODE] and _decodes_two_rows(case)


def _decodes_two_rows(case: Case) -> bool:
    decoded = [batch(case, index) for index, mode in enumerate(modes_of(case)) if mode is Mode.DECODE]
    apart = len(set(decoded[-1].pool_rows)) == 2 and _are_shortest(case)
    return apart and case.setup.buckets in ((2,), (1, 2)) and case.setup.num_draft_tokens == 2


def two_graphs(case: Case) -> bool:
    """Two replays, in two buckets or in two modes: one of one row and one of two."""
    return sorted(rows_of(case)) == [1, 2] and _are_shortest(case)


def two_buckets(case: Case) -> bool:
    """Two replays of one mode in different buckets, of four at most; 1, 2 and 4 alone may be taken for rounding up."""
    buckets = [case.bucket(index) for index in range(len(case.replays))]
    small = len(buckets) == len(set(buckets)) == 2 and max(buckets) <= 4
    return small and len(set(modes_of(case))) == 1 and _are_shortest(case)


def two_totals(case: Case) -> bool:
    """Two ragged replays that do not accept as many tokens, of one graph or of those for 1 and 3 requests."""
    totals = {sum(batch(case, index).accept_lens) for index in range(len(case.replays))}
    return modes_of(case) == [Mode.DRAFT_EXTEND] * 2 and rows_of(case) in ([2, 2], [1, 3]) and len(totals) == 2


def two_replays_of_one_request(case: Case) -> bool:
    """Two replays, without padding, whose requests are not of one length."""
    lengths = lengths_of(case)
    return case.setup.buckets == (1,) and len(lengths) == 2 and lengths[0] != lengths[1]
