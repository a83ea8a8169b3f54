"""The shipped seeds: each loads, and meets the minimal trigger of every row of the bug classes that it claims."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from nsa_verify import Case, Layout, Mode, Replay
from nsa_verify.core.buffers import shapes
from nsa_verify.core.invariants import content_of, violations
from nsa_verify.core.oracle import batch, expect
from nsa_verify.engine.corpus import Entry, dumps, file_name, load, scan

CORPUS = Path(__file__).parents[2] / "corpus"
PATHS = tuple(scan(CORPUS / "seeds"))
ENTRIES: dict[str, Entry] = {path.stem: load(path) for path in PATHS}
NO_CASE = {17, 18, 19, 21, 23, 24}
"""Rows that no case of this size can state; corpus/README.md says why."""

DRAFT_EXTENDS = (Mode.DRAFT_EXTEND, Mode.DRAFT_EXTEND_V2)
Trigger = Callable[[Case], bool]


def _padded(case: Case) -> Iterator[tuple[Replay, int]]:
    """Each replay with the number of its padded requests."""
    for index, replay in enumerate(case.replays):
        yield replay, case.bucket(index) - len(replay.requests)


def _underflows(case: Case, fill: int) -> bool:
    """Whether a padded request has more rows than tokens."""
    setup = case.setup
    return setup.fill_seq_len == fill and any(
        padded
        and replay.mode in DRAFT_EXTENDS
        and (setup.num_draft_tokens if replay.mode is Mode.DRAFT_EXTEND_V2 else replay.padded_accept_len) > fill
        for replay, padded in _padded(case)
    )


def _shrinks(case: Case) -> bool:
    """Whether a smaller batch follows a larger one in the same bucket and mode."""
    before_and_after = pairwise(enumerate(case.replays))
    return any(
        earlier.mode is later.mode and case.bucket(i) == case.bucket(j) and len(later.requests) < len(earlier.requests)
        for (i, earlier), (j, later) in before_and_after
    )


def _past_the_wall(case: Case, least: int) -> bool:
    """Whether a request's KV length exceeds the width of the tables by ``least`` or more."""
    setup = case.setup
    return any(
        request.seq_len + setup.num_draft_tokens * (replay.mode is Mode.TARGET_VERIFY) - setup.table_width >= least
        for replay in case.replays
        for request in replay.requests
    )


def _longest(replay: Replay) -> int:
    return max((request.seq_len for request in replay.requests), default=0)


def _rows(case: Case) -> Iterator[int]:
    for index in range(len(case.replays)):
        yield expect(case, index).defined_rows


def _accepts(case: Case) -> Iterator[tuple[int, ...]]:
    for index, replay in enumerate(case.replays):
        if replay.mode is Mode.DRAFT_EXTEND:
            yield batch(case, index).accept_lens


def _modes_change(case: Case, requests: int) -> bool:
    return any(a.mode is not b.mode and len(b.requests) >= requests for a, b in pairwise(case.replays))


def _rows_fall(case: Case) -> bool:
    """Whether rows that a replay defined are past the defined ones of the next."""
    return any(later < earlier for earlier, later in pairwise(_rows(case)))


TRIGGERS: dict[int, Trigger] = {
    1: lambda case: _underflows(case, 1),
    2: lambda case: (
        case.setup.fill_seq_len == 0 and case.setup.num_draft_tokens > 1 and any(n for _, n in _padded(case))
    ),
    3: _shrinks,
    4: _shrinks,
    5: lambda case: any(padded and len(replay.requests) > 1 for replay, padded in _padded(case)),
    6: lambda case: _past_the_wall(case, 1) and any(_longest(it) <= case.setup.table_width for it in case.replays),
    7: lambda case: any(_longest(replay) > case.setup.table_width for replay in case.replays),
    8: lambda case: case.setup.pool_row_stride % 4 != 0 and case.setup.pool_row_stride != case.setup.table_row_stride,
    9: lambda case: len({replay.slots for replay in case.replays}) > 1 or case.setup.page_size == 1,
    10: lambda case: case.setup.num_steps + 1 != case.setup.num_draft_tokens and case.setup.buckets[-1] > 1,
    11: lambda case: _modes_change(case, 1),
    12: lambda case: case.setup.num_steps > 1,
    13: lambda case: any(replay.mode is Mode.TARGET_VERIFY for replay in case.replays) and len(case.replays) > 1,
    14: lambda case: max(*_rows(case), case.setup.buckets[-1], case.setup.table_width) > 64,
    15: lambda case: case.setup.num_steps > 1 and len(case.replays) > 1,
    16: lambda case: any(_longest(b) > 16 * _longest(a) for a, b in pairwise(case.replays)),
    20: lambda case: case.setup.num_steps > 1 and _modes_change(case, 1),
    22: lambda case: case.setup.layout is not Layout.CONTIGUOUS,
    25: lambda case: any(not replay.requests for replay in case.replays) or any(0 in it for it in _accepts(case)),
    26: lambda case: any(len(set(it)) == 2 or (len(set(it)) > 1 and sum(it) % len(it) == 0) for it in _accepts(case)),
    27: lambda case: case.setup.schedule and not any(expect(case, 0).buffers["cache_seqlens"][0].values),
    28: lambda case: _shrinks(case) or _rows_fall(case) or case.setup.fill_seq_len == 0,
}


@pytest.mark.parametrize("stem", ENTRIES)
def test_a_seed_is_what_save_would_write(stem: str) -> None:
    path = next(path for path in PATHS if path.stem == stem)
    entry = ENTRIES[stem]
    assert path.read_text() == dumps(entry)
    assert path.name == file_name(entry, stem.rpartition("-")[0])
    assert path.parent.name == entry.mode
    assert entry.finding is None


@pytest.mark.parametrize("stem", ENTRIES)
def test_a_seed_meets_the_trigger_of_every_row_it_claims(stem: str) -> None:
    case = ENTRIES[stem].case
    assert [row for row in ENTRIES[stem].bug_classes if not TRIGGERS[row](case)] == []


@pytest.mark.parametrize("stem", ENTRIES)
def test_the_oracle_gives_a_seed_a_meaning_that_keeps_every_invariant(stem: str) -> None:
    case = ENTRIES[stem].case
    for replay in range(len(case.replays)):
        assert list(violations(case, replay, content_of(expect(case, replay)))) == []


@pytest.mark.parametrize("stem", ENTRIES)
def test_a_seed_is_small_enough_for_the_interpreter(stem: str) -> None:
    setup = ENTRIES[stem].case.setup
    cells = [shapes(setup, mode, setup.buckets[-1])["page_table_1"] for mode in Mode]
    used = {replay.mode for replay in ENTRIES[stem].case.replays}
    most = 140 if setup.table_width > 8 else 340
    assert all(shape.rows <= most for mode, shape in zip(Mode, cells, strict=True) if mode in used)
    assert setup.table_width <= 400


def test_every_row_of_the_bug_classes_has_a_seed_or_a_reason() -> None:
    covered = {row for entry in ENTRIES.values() for row in entry.bug_classes}
    assert covered == set(range(1, 29)) - NO_CASE
    assert set(TRIGGERS) == covered


def test_no_two_seeds_are_the_same_case() -> None:
    assert len({stem.rpartition("-")[2] for stem in ENTRIES}) == len(ENTRIES)


def test_the_seeds_reach_every_mode_and_what_the_bug_classes_do_not_name() -> None:
    setups = [entry.case.setup for entry in ENTRIES.values()]
    replays = [replay for entry in ENTRIES.values() for replay in entry.case.replays]
    assert {replay.mode for replay in replays} == set(Mode)
    assert {setup.page_size for setup in setups} == {1, 16, 32, 64, 128}
    assert {setup.ctx_lens.value for setup in setups} == {"absent", "view", "own"}
    assert {setup.layout for setup in setups} == set(Layout)
    assert any(setup.aliased_seq_lens for setup in setups)
    assert any(not setup.host_lengths for setup in setups)
    assert any(len(setup.buckets) > 1 for setup in setups)
    assert max(len(entry.case.replays) for entry in ENTRIES.values()) == 8


def _table() -> dict[int, str]:
    """The second column of the table of corpus/README.md, by row of the bug classes."""
    lines = (CORPUS / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if re.match(r"\| \d+ ", line)]
    return {int(row): rest for row, rest in cells}


def test_the_table_of_the_readme_is_that_of_the_files() -> None:
    table = _table()
    assert sorted(table) == list(range(1, 29))
    for row, told in table.items():
        slugs = {stem.rpartition("-")[0] for stem, entry in ENTRIES.items() if row in entry.bug_classes}
        assert set(re.findall(r"`([a-z0-9-]+)`", told)) == slugs, row
        assert slugs or len(told) > 20
