"""A ``Case`` is a recipe: what is frozen at capture (``Setup``) and the replays that follow.

It holds no tensors. It is what is drawn, sent to a worker, stored, replayed and shrunk. Constructors refuse what
cannot be, so whoever holds a ``Case`` holds one that the contract gives a meaning; the refusal is a ``ValueError``
whose message shows the offending field and value.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from typing import Final, Literal, NoReturn

import msgspec
from msgspec import Struct

MAX_BATCH_SIZE: Final = 65_536
MAX_DRAFT_TOKENS: Final = 8
MAX_REPLAYS: Final = 8
MAX_STEPS: Final = 8
MAX_TABLE_WIDTH: Final = 1 << 20
INT32_MAX: Final = 2**31 - 1
PAGE_SIZES: Final = (1, 16, 32, 64, 128)
SLOT_MODULUS: Final = 2**31 - 1
"""Slots are below this prime, so they are non-negative int32 and collide rarely."""


class Mode(StrEnum):
    """What the replay prepares for (contract, section 2)."""

    DECODE = "decode"
    TARGET_VERIFY = "target-verify"
    DRAFT_EXTEND = "draft-extend"
    DRAFT_EXTEND_V2 = "draft-extend-v2"


class Layout(StrEnum):
    """How ``seq_lens`` lies in memory: the contract allows any element stride and any storage offset."""

    CONTIGUOUS = "contiguous"
    STRIDED = "strided"
    OFFSET = "offset"


class CtxLens(StrEnum):
    """Which form of the optional ``paged_mqa_ctx_lens`` the backend keeps."""

    ABSENT = "absent"
    VIEW = "view"
    """A view of the per-row lengths in every mode."""
    OWN = "own"
    """As ``VIEW``, but TARGET_VERIFY has its own ``[B, N]`` buffer with every column ``s[b] + N``."""


class SlotKind(StrEnum):
    """How ``req_to_token`` is filled."""

    SEQUENTIAL = "sequential"
    """Small numbers that a person can read: 1000, 1001, ... along a row."""
    PAGED = "paged"
    """Page aligned: the p tokens of a page have consecutive slots, pages are scattered."""
    SCATTERED = "scattered"
    """Any slot anywhere in the int32 range, not page aligned."""


IntType = Literal["int32", "int64"]


def _refuse(field: str, value: object, why: str) -> NoReturn:
    raise ValueError(f"{field} = {value!r}: {why}")


def _settle(it: Struct, field: str, kind: type) -> None:
    """Take a list for a tuple, and an enum's value for its member, as code written by hand gives them."""
    value = getattr(it, field)
    if type(value) is kind:
        return
    try:
        msgspec.structs.force_setattr(it, field, kind(value))
    except (TypeError, ValueError):
        names = f" ({', '.join(kind)})" if issubclass(kind, StrEnum) else ""
        _refuse(field, value, f"must be a {kind.__name__}{names}")


def _between(field: str, value: int, low: int, high: int) -> None:
    if type(value) is not int:
        _refuse(field, value, "must be an integer")
    if not low <= value <= high:
        _refuse(field, value, f"must be between {low} and {high}")


class Setup(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that is frozen when the graphs are captured.

    Sizes are counts of int32 elements, rows or columns. ``pool_row_stride``, ``table_row_stride`` of 0 mean "as wide
    as the row" and are replaced by that width, so that equal setups compare equal.
    """

    num_draft_tokens: int = 1
    index_topk: int = 8
    page_size: int = 1
    table_width: int = 16
    """Columns of ``page_table_1`` (W); at most ``pool_width``."""
    table_row_stride: int = 0
    """Elements from a row of the page-table backing to the next, at step 0; >= ``table_width``."""
    stride_skew: int = 0
    """Step i's row stride is ``table_row_stride + i * stride_skew``: steps need not share strides."""
    pool_rows: int = 1
    pool_width: int = 32
    pool_row_stride: int = 0
    num_steps: int = 1
    buckets: tuple[int, ...] = (1,)
    """The captured batch sizes, strictly ascending."""
    fill_seq_len: int = 1
    """``seq_lens`` of padded rows and of everything at capture."""
    num_sms: int = 4
    seq_lens_dtype: IntType = "int32"
    pool_index_dtype: IntType = "int64"
    layout: Layout = Layout.CONTIGUOUS
    aliased_seq_lens: bool = False
    """In DECODE step 0's ``cache_seqlens`` IS the ``seq_lens`` input. Needs int32, contiguous, no ``input_tail``."""
    input_tail: int = 0
    """Elements beyond the bucket in each 1-D input; they hold junk and must not be used."""
    host_lengths: bool = True
    """Whether the host mirror ``seq_lens_cpu`` is given."""
    ctx_lens: CtxLens = CtxLens.ABSENT
    schedule: bool = False
    """Whether the backend keeps ``paged_mqa_schedule``."""

    def __post_init__(self) -> None:
        for field, kind in (("buckets", tuple), ("layout", Layout), ("ctx_lens", CtxLens)):
            _settle(self, field, kind)
        for field in ("seq_lens_dtype", "pool_index_dtype"):
            if getattr(self, field) not in ("int32", "int64"):
                _refuse(field, getattr(self, field), "must be int32 or int64")
        for field in ("aliased_seq_lens", "host_lengths", "schedule"):
            if type(getattr(self, field)) is not bool:
                _refuse(field, getattr(self, field), "must be true or false")
        _between("num_draft_tokens", self.num_draft_tokens, 1, MAX_DRAFT_TOKENS)
        _between("index_topk", self.index_topk, 1, 2**31 - 1)
        _between("page_size", self.page_size, 1, PAGE_SIZES[-1])
        if self.page_size not in PAGE_SIZES:
            _refuse("page_size", self.page_size, f"must be one of {', '.join(map(str, PAGE_SIZES))}")
        _between("pool_rows", self.pool_rows, 1, 1 << 20)
        _between("pool_width", self.pool_width, 1, MAX_TABLE_WIDTH + 64)
        _between("table_width", self.table_width, 1, min(MAX_TABLE_WIDTH, self.pool_width))
        if self.pool_row_stride == 0:
            msgspec.structs.force_setattr(self, "pool_row_stride", self.pool_width)
        if self.table_row_stride == 0:
            msgspec.structs.force_setattr(self, "table_row_stride", self.table_width)
        _between("pool_row_stride", self.pool_row_stride, self.pool_width, 2**31 - 1)
        _between("table_row_stride", self.table_row_stride, self.table_width, 2**31 - 1)
        _between("stride_skew", self.stride_skew, 0, 1024)
        _between("num_steps", self.num_steps, 1, MAX_STEPS)
        self._check_buckets()
        _between("fill_seq_len", self.fill_seq_len, 0, 1)
        _between("num_sms", self.num_sms, 1, 1024)
        _between("input_tail", self.input_tail, 0, 1024)
        wall = self.pool_width - self.num_draft_tokens
        if self.fill_seq_len > wall:
            _refuse(
                "fill_seq_len", self.fill_seq_len, f"with num_draft_tokens it exceeds pool_width = {self.pool_width}"
            )
        plain = self.seq_lens_dtype == "int32" and self.layout is Layout.CONTIGUOUS and self.input_tail == 0
        if self.aliased_seq_lens and not plain:
            _refuse("aliased_seq_lens", True, "needs int32, contiguous seq_lens without input_tail")

    def _check_buckets(self) -> None:
        if not self.buckets:
            _refuse("buckets", self.buckets, "must name at least one batch size")
        for bucket in self.buckets:
            _between("buckets", bucket, 1, MAX_BATCH_SIZE)
        if list(self.buckets) != sorted(set(self.buckets)):
            _refuse("buckets", self.buckets, "must be strictly ascending")

    @property
    def real_table_width(self) -> int:
        """Columns of ``real_page_table``: ``ceil(W / p)``."""
        return -(-self.table_width // self.page_size)

    def bucket_for(self, batch_size: int) -> int:
        """The smallest captured batch size that holds ``batch_size`` requests."""
        for bucket in self.buckets:
            if bucket >= batch_size:
                return bucket
        _refuse("buckets", self.buckets, f"none holds {batch_size} requests")

    def captured_rows(self, mode: Mode, bucket: int) -> int:
        """Rows of the expanded buffers of ``(mode, bucket)``: B in DECODE, B*N elsewhere."""
        return bucket if mode is Mode.DECODE else bucket * self.num_draft_tokens


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """One real request of a replay. ``accept_len`` has a meaning in DRAFT_EXTEND only."""

    seq_len: int = 1
    pool_row: int = 0
    accept_len: int = 1


class Replay(Struct, frozen=True, forbid_unknown_fields=True):
    """One refresh of the metadata: the mode, the real requests, and what ``req_to_token`` holds."""

    mode: Mode = Mode.DECODE
    requests: tuple[Request, ...] = ()
    slots: SlotKind = SlotKind.SEQUENTIAL
    pool_seed: int = 0
    padded_accept_len: int = 1
    """``accept_lens`` of padded rows: 1 or N."""
    padded_pool_row: int = 0
    """``req_pool_indices`` of padded rows: 0, or stale but in range."""

    def __post_init__(self) -> None:
        for field, kind in (("requests", tuple), ("mode", Mode), ("slots", SlotKind)):
            _settle(self, field, kind)
        _between("pool_seed", self.pool_seed, 0, 65_535)


class Case(Struct, frozen=True, forbid_unknown_fields=True):
    """A setup and 1 to 8 replays over it, in order; modes and buckets may change between them."""

    setup: Setup
    replays: tuple[Replay, ...]

    def __post_init__(self) -> None:
        _settle(self, "replays", tuple)
        _between("number of replays", len(self.replays), 1, MAX_REPLAYS)
        for index, replay in enumerate(self.replays):
            self._check_replay(f"replays[{index}]", replay)

    def _check_replay(self, where: str, replay: Replay) -> None:
        setup = self.setup
        if len(replay.requests) > setup.buckets[-1]:
            _refuse(f"{where}.requests", f"{len(replay.requests)} requests", f"no bucket of {setup.buckets} holds them")
        if replay.padded_accept_len not in (1, setup.num_draft_tokens):
            _refuse(
                f"{where}.padded_accept_len", replay.padded_accept_len, f"must be 1 or N = {setup.num_draft_tokens}"
            )
        _between(f"{where}.padded_pool_row", replay.padded_pool_row, 0, setup.pool_rows - 1)
        for index, request in enumerate(replay.requests):
            self._check_request(f"{where}.requests[{index}]", replay.mode, request)
        self._check_sums(where, replay)

    def _check_request(self, where: str, mode: Mode, request: Request) -> None:
        setup = self.setup
        _between(f"{where}.accept_len", request.accept_len, 0, setup.num_draft_tokens)
        _between(f"{where}.pool_row", request.pool_row, 0, setup.pool_rows - 1)
        if type(request.seq_len) is not int:
            _refuse(f"{where}.seq_len", request.seq_len, "must be an integer")
        least = shortest(setup, mode, request.accept_len)
        if request.seq_len < least:
            _refuse(f"{where}.seq_len", request.seq_len, f"a real request in {mode} has at least {least}")
        most = longest(setup, mode)
        if request.seq_len > most:
            reason = f"longer than its pool row holds (pool_width = {setup.pool_width}, at most {most} in {mode})"
            _refuse(f"{where}.seq_len", request.seq_len, reason)

    def _check_sums(self, where: str, replay: Replay) -> None:
        """The prefix sums of the longest mode must fit int32, the padded rows included."""
        setup = self.setup
        tokens = setup.num_draft_tokens
        kv_lens = [request.seq_len + tokens for request in replay.requests]
        kv_lens += [setup.fill_seq_len + tokens] * (setup.buckets[-1] - len(kv_lens))
        largest = max(sum(kv_lens), tokens * sum(min(length, setup.index_topk) for length in kv_lens))
        if largest > INT32_MAX:
            _refuse(f"{where}.requests", f"lengths whose prefix sum reaches {largest}", "prefix sums must fit int32")

    def bucket(self, replay: int) -> int:
        """The captured batch size that serves replay number ``replay``."""
        return self.setup.bucket_for(len(self.replays[replay].requests))


def shortest(setup: Setup, mode: Mode, accept_len: int) -> int:
    """The smallest legal ``seq_len`` of a real request."""
    if mode is Mode.DRAFT_EXTEND:
        return max(1, accept_len)
    return setup.num_draft_tokens if mode is Mode.DRAFT_EXTEND_V2 else 1


def longest(setup: Setup, mode: Mode) -> int:
    """The largest legal ``seq_len``: its KV length must fit its row of ``req_to_token``."""
    return setup.pool_width - (setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0)


_ROW, _COLUMN, _SEED = 1_103_515_245, 1_597_334_677, 747_796_405
"""Multipliers below the slot modulus; every product and sum stays below 2**53."""


def slot(setup: Setup, replay: Replay, row: int, column: int) -> int:
    """``req_to_token[row, column]`` as this replay sees it: a formula, so no table need be stored.

    The device side evaluates the same formula in tensor arithmetic (``nsa_verify.device.pool``).
    """
    if replay.slots is SlotKind.SEQUENTIAL:
        return (row * setup.pool_width + column + 1000 * (replay.pool_seed + 1)) % SLOT_MODULUS
    if replay.slots is SlotKind.SCATTERED:
        return (row * _ROW + column * _COLUMN + replay.pool_seed * _SEED) % SLOT_MODULUS
    pages = SLOT_MODULUS // setup.page_size
    page = (row * _ROW + (column // setup.page_size) * _COLUMN + replay.pool_seed * _SEED) % pages
    return page * setup.page_size + column % setup.page_size


@lru_cache(maxsize=1024)
def _row_slots(
    slots: SlotKind, pool_seed: int, pool_width: int, page_size: int, row: int, columns: int
) -> tuple[int, ...]:
    """``slot`` of the first columns of a row, whole stretches at a time."""
    if slots is SlotKind.SEQUENTIAL:
        first = row * pool_width + 1000 * (pool_seed + 1)
        return tuple([value % SLOT_MODULUS for value in range(first, first + columns)])
    first = row * _ROW + pool_seed * _SEED
    if slots is SlotKind.SCATTERED:
        return tuple([value % SLOT_MODULUS for value in range(first, first + columns * _COLUMN, _COLUMN)])
    pages, own = SLOT_MODULUS // page_size, -(-columns // page_size)
    starts = [value % pages * page_size for value in range(first, first + own * _COLUMN, _COLUMN)]
    return tuple([start + past for start in starts for past in range(page_size)][:columns])


def row_slots(setup: Setup, replay: Replay, row: int, columns: int) -> tuple[int, ...]:
    """The first ``columns`` cells of a row of ``req_to_token``; kept for those who ask again."""
    return _row_slots(replay.slots, replay.pool_seed, setup.pool_width, setup.page_size, row, columns)


@lru_cache(maxsize=1024)
def _row_pages(
    slots: SlotKind, pool_seed: int, pool_width: int, page_size: int, row: int, columns: int
) -> tuple[int, ...]:
    found = _row_slots(slots, pool_seed, pool_width, page_size, row, columns)
    return tuple([value // page_size for value in found[::page_size]])


def row_pages(setup: Setup, replay: Replay, row: int, columns: int) -> tuple[int, ...]:
    """The pages that every p-th of the first ``columns`` cells of a row of ``req_to_token`` lies in; kept as well."""
    return _row_pages(replay.slots, replay.pool_seed, setup.pool_width, setup.page_size, row, columns)


def size_of(case: Case) -> tuple[int, ...]:
    """A measure for "smaller": fewer replays, smaller batches, fewer special features, smaller numbers, less padding.

    A padded row is no smaller than a request like it: a batch of one request is simpler than an empty one.
    """
    setup, plain = case.setup, Setup()
    requests = [request for replay in case.replays for request in replay.requests]
    features = sum(getattr(setup, field) != getattr(plain, field) for field in _FEATURES)
    features += (setup.pool_row_stride != setup.pool_width) + (setup.table_row_stride != setup.table_width)
    features += sum((replay.slots is not SlotKind.SEQUENTIAL) + (replay.pool_seed != 0) for replay in case.replays)
    padded = [case.bucket(index) - len(replay.requests) for index, replay in enumerate(case.replays)]
    lengths = sum(request.seq_len + request.pool_row for request in requests) + sum(padded) * setup.fill_seq_len
    accepted = sum(request.accept_len for request in requests)
    accepted += sum(rows * it.padded_accept_len for rows, it in zip(padded, case.replays, strict=True))
    frozen = setup.num_steps + setup.num_draft_tokens + setup.page_size + sum(setup.buckets) + setup.index_topk
    return (
        len(case.replays),
        len(requests) + sum(padded),
        features,
        lengths,
        accepted + frozen,
        setup.table_width + setup.pool_width,
        sum(padded),
    )


_FEATURES: Final = (
    *("stride_skew", "num_steps", "fill_seq_len", "num_sms", "seq_lens_dtype", "pool_index_dtype", "layout"),
    *("aliased_seq_lens", "input_tail", "host_lengths", "ctx_lens", "schedule", "page_size"),
)
