"""What a constructor refuses, and that its message shows the field and the offending value."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nsa_verify import Case, Layout, Mode, Replay, Request, Setup
from nsa_verify.core.case import longest, shortest, size_of


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens = 0: must be between 1 and 8"),
        ({"num_draft_tokens": 9}, "num_draft_tokens = 9"),
        ({"index_topk": 0}, "index_topk = 0"),
        ({"page_size": 8}, "page_size = 8: must be one of 1, 16, 32, 64, 128"),
        ({"pool_rows": 0}, "pool_rows = 0"),
        ({"pool_width": 0}, "pool_width = 0"),
        ({"table_width": 0}, "table_width = 0"),
        ({"table_width": 33, "pool_width": 32}, "table_width = 33: must be between 1 and 32"),
        ({"table_width": 2**20 + 1, "pool_width": 2**20 + 60}, "table_width = 1048577"),
        ({"pool_row_stride": 31}, "pool_row_stride = 31"),
        ({"table_row_stride": 15}, "table_row_stride = 15"),
        ({"table_row_stride": -1}, "table_row_stride = -1"),
        ({"stride_skew": -1}, "stride_skew = -1"),
        ({"num_steps": 0}, "num_steps = 0"),
        ({"num_steps": 9}, "num_steps = 9"),
        ({"buckets": ()}, r"buckets = \(\)"),
        ({"buckets": (0,)}, "buckets = 0"),
        ({"buckets": (65_537,)}, "buckets = 65537"),
        ({"buckets": (2, 1)}, r"buckets = \(2, 1\): must be strictly ascending"),
        ({"buckets": (2, 2)}, r"buckets = \(2, 2\)"),
        ({"fill_seq_len": 2}, "fill_seq_len = 2"),
        ({"fill_seq_len": -1}, "fill_seq_len = -1"),
        ({"num_sms": 0}, "num_sms = 0"),
        ({"input_tail": -1}, "input_tail = -1"),
        ({"table_width": 4, "pool_width": 4, "num_draft_tokens": 4}, "fill_seq_len = 1: .*pool_width = 4"),
        ({"aliased_seq_lens": True, "seq_lens_dtype": "int64"}, "aliased_seq_lens = True"),
        ({"aliased_seq_lens": True, "layout": Layout.STRIDED}, "aliased_seq_lens = True"),
        ({"aliased_seq_lens": True, "input_tail": 1}, "aliased_seq_lens = True"),
    ],
)
def test_setup_refuses(fields: dict[str, Any], shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        Setup(**fields)


SETUP = Setup(num_draft_tokens=3, table_width=16, pool_width=20, pool_rows=2, buckets=(1, 2))


@pytest.mark.parametrize(
    ("replay", "shown"),
    [
        (Replay(requests=(Request(),) * 3), r"replays\[0\]\.requests = '3 requests': no bucket of \(1, 2\)"),
        (Replay(padded_accept_len=2), r"replays\[0\]\.padded_accept_len = 2: must be 1 or N = 3"),
        (Replay(padded_pool_row=2), r"replays\[0\]\.padded_pool_row = 2"),
        (Replay(requests=(Request(), Request(pool_row=2))), r"replays\[0\]\.requests\[1\]\.pool_row = 2"),
        (Replay(requests=(Request(pool_row=-1),)), r"pool_row = -1"),
        (Replay(requests=(Request(accept_len=4),)), r"replays\[0\]\.requests\[0\]\.accept_len = 4: .* 0 and 3"),
        (Replay(requests=(Request(accept_len=-1),)), r"accept_len = -1"),
        (Replay(requests=(Request(0),)), r"seq_len = 0: a real request in decode has at least 1"),
        (Replay(requests=(Request(21),)), r"seq_len = 21: longer than its pool row .*pool_width = 20, at most 20"),
        (Replay(Mode.TARGET_VERIFY, (Request(18),)), r"seq_len = 18: .*at most 17 in target-verify"),
        (Replay(Mode.DRAFT_EXTEND, (Request(1, 0, 2),)), r"seq_len = 1: .*at least 2"),
        (Replay(Mode.DRAFT_EXTEND, (Request(0, 0, 0),)), r"seq_len = 0: .*at least 1"),
        (Replay(Mode.DRAFT_EXTEND_V2, (Request(2),)), r"seq_len = 2: a real request in draft-extend-v2 .*at least 3"),
    ],
)
def test_case_refuses(replay: Replay, shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        Case(SETUP, (replay,))


def test_case_names_the_replay_that_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"replays\[2\]\.requests\[0\]\.seq_len = 99"):
        Case(SETUP, (Replay(), Replay(), Replay(requests=(Request(99),))))


@pytest.mark.parametrize("count", [0, 9])
def test_case_refuses_no_replay_and_more_than_eight(count: int) -> None:
    with pytest.raises(ValueError, match=f"number of replays = {count}: must be between 1 and 8"):
        Case(SETUP, (Replay(),) * count)


@pytest.mark.parametrize("seed", [-1, 65_536])
def test_replay_refuses_a_pool_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=f"pool_seed = {seed}"):
        Replay(pool_seed=seed)


@pytest.mark.parametrize("mode", list(Mode))
def test_the_shortest_and_the_longest_request_are_accepted_and_one_beyond_is_not(mode: Mode) -> None:
    for accept_len in range(SETUP.num_draft_tokens + 1):
        low, high = shortest(SETUP, mode, accept_len), longest(SETUP, mode)
        for seq_len in (low, high):
            Case(SETUP, (Replay(mode, (Request(seq_len, 1, accept_len),)),))
        for seq_len in (low - 1, high + 1):
            with pytest.raises(ValueError, match=f"seq_len = {seq_len}"):
                Case(SETUP, (Replay(mode, (Request(seq_len, 1, accept_len),)),))


def test_a_stride_of_zero_is_the_width_so_equal_setups_compare_equal() -> None:
    plain = Setup(table_width=16, pool_width=32)
    assert (plain.table_row_stride, plain.pool_row_stride) == (16, 32)
    assert plain == Setup(table_width=16, pool_width=32, table_row_stride=16, pool_row_stride=32)
    assert hash(plain) == hash(Setup(table_width=16, pool_width=32, table_row_stride=16))


@pytest.mark.parametrize(("requests", "bucket"), [(0, 1), (1, 1), (2, 2)])
def test_the_bucket_is_the_smallest_that_holds_the_requests(requests: int, bucket: int) -> None:
    assert Case(SETUP, (Replay(requests=(Request(),) * requests),)).bucket(0) == bucket


def test_no_bucket_for_more_requests_than_the_largest() -> None:
    with pytest.raises(ValueError, match="none holds 3 requests"):
        SETUP.bucket_for(3)


@pytest.mark.parametrize(("width", "page", "real"), [(16, 16, 1), (17, 16, 2), (15, 16, 1), (5, 1, 5), (129, 128, 2)])
def test_real_table_width_is_rounded_up(width: int, page: int, real: int) -> None:
    assert Setup(table_width=width, pool_width=140, page_size=page).real_table_width == real


def test_captured_rows() -> None:
    assert [SETUP.captured_rows(mode, 2) for mode in Mode] == [2, 6, 6, 6]


def test_a_case_survives_json() -> None:
    case = Case(SETUP, (Replay(Mode.DRAFT_EXTEND, (Request(5, 1, 0), Request(20, 0, 3))),))
    assert msgspec.json.decode(msgspec.json.encode(case), type=Case) == case


@pytest.mark.parametrize(
    "larger",
    [
        Case(SETUP, (Replay(), Replay(requests=(Request(),)))),
        Case(SETUP, (Replay(requests=(Request(), Request())),)),
        Case(SETUP, (Replay(requests=(Request(2),)),)),
        Case(msgspec.structs.replace(SETUP, num_steps=2), (Replay(requests=(Request(),)),)),
        Case(msgspec.structs.replace(SETUP, stride_skew=1), (Replay(requests=(Request(),)),)),
    ],
)
def test_size_of_grows_with_every_part(larger: Case) -> None:
    assert size_of(Case(SETUP, (Replay(requests=(Request(),)),))) < size_of(larger)
