"""Codes, findings and verdicts: what a check can say.

Codes are a product surface: they are stable, and ``nsa-verify explain CODE`` prints what stands here.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

from msgspec import Struct

from nsa_verify.core.case import Mode


class Code(StrEnum):
    """The kinds of finding, grouped by hundreds: content, memory, graph, death, behaviour."""

    WRONG_VALUE = "NV101"
    STALE = "NV102"
    POISON = "NV103"
    INVARIANT = "NV104"
    GUARD_WRITTEN = "NV201"
    FRAME_WRITTEN = "NV202"
    INPUT_MUTATED = "NV203"
    OUT_OF_BOUNDS = "NV204"
    ILLEGAL_IN_CAPTURE = "NV301"
    FROZEN = "NV302"
    MOVED = "NV303"
    OTHER_STREAM = "NV304"
    NEEDS_SYNC = "NV305"
    DEATH = "NV401"
    HANG = "NV402"
    EXCEPTION = "NV403"
    NOT_DETERMINISTIC = "NV501"
    NOT_IDEMPOTENT = "NV502"
    RECOMPILES = "NV503"
    SILENT_FALLBACK = "NV504"


class Explanation(NamedTuple):
    """What ``nsa-verify explain`` prints for a code."""

    title: str
    meaning: str
    typical_cause: str
    remedy: str


EXPLANATIONS: Final[dict[Code, Explanation]] = {
    Code.WRONG_VALUE: Explanation(
        "wrong value in the live region",
        "A cell that this replay must define was written, with a value that the contract does not give.",
        "An off-by-one in a column or token index, a clamp with the wrong bound, the draft tokens added twice or not at"
        " all, source and destination strides confused, a page-size division missing or applied twice.",
        "Compare expected and got in the window around the first difference: a constant offset points at the formula,"
        " another row's values at the addressing.",
    ),
    Code.STALE: Explanation(
        "stale value left from an earlier replay",
        "A cell that this replay must define still holds what an earlier replay of the case put there.",
        "Only the real batch is refreshed and not the padded rows; a tail is left when the batch shrinks; a step of the"
        " fan-out or one field of a copy is skipped; a condition caches on something that did not change.",
        "Write every defined row of the bucket on every replay, padded rows included, in every step.",
    ),
    Code.POISON: Explanation(
        "poison left or copied",
        "A cell that this replay must define holds the poison that filled the memory before the first replay, or poison"
        " that was copied from elsewhere.",
        "A row, column, step or the leading 0 of a prefix sum is not written and happens to be zero in a fresh buffer;"
        " uninitialised memory is copied from a temporary that was filled only in part.",
        "Write the cell, or narrow the copy to what was computed.",
    ),
    Code.INVARIANT: Explanation(
        "an invariant of the metadata is broken",
        "A length is negative (consumers read it as an unsigned number of billions), a prefix sum does not start at 0,"
        " runs backwards or does not end at the sum, or a clamped length exceeds its bound.",
        "No clamp at 0 on padded rows before the top-k minimum and the prefix sum; raw-batch sums next to padded"
        " lengths; a prefix sum that restarts at a block boundary.",
        "Clamp first, then take the minimum, then the prefix sum, over the padded batch.",
    ),
    Code.GUARD_WRITTEN: Explanation(
        "write outside every buffer",
        "A guard zone between two buffers was written.",
        "One element too many (N + 1 sums into N), a mask that is missing on the last block, a row count taken from"
        " another mode.",
        "Mask the store by the buffer's own bound.",
    ),
    Code.FRAME_WRITTEN: Explanation(
        "write to memory that this replay must leave alone",
        "Rows past the defined ones, columns past the declared write extent, another bucket's or mode's buffers, or the"
        " frozen aranges were changed.",
        "Padding zeroed for good measure, a page table swept to its full width under a narrower declared extent, a"
        " ragged batch treated as B*N rows.",
        "Bound the store by the rows and columns of this replay, or declare the wider extent if it is meant.",
    ),
    Code.INPUT_MUTATED: Explanation(
        "an input was changed",
        "seq_lens, its host mirror, req_pool_indices, accept_lens or req_to_token, or memory beside them, is not what"
        " it was before the call.",
        "An in-place += of the draft tokens, a clamp_ on the input, a workspace that aliases an input.",
        "Compute into a buffer of your own; the engine reads its inputs again.",
    ),
    Code.OUT_OF_BOUNDS: Explanation(
        "read outside every buffer",
        "A kernel read memory that belongs to no tensor. What it read may change nothing, so that only nsa-verify"
        " replay --sanitizer sees it; in an engine such a read can hit memory that is not mapped, and end the process.",
        "A load without a mask, or masked by another bound than that of what it reads; the last tile of a row; an index"
        " past the batch.",
        "Mask the load by what its source holds; the line is that of the load.",
    ),
    Code.ILLEGAL_IN_CAPTURE: Explanation(
        "illegal while a graph is captured",
        "Inside the captured region the implementation did what CUDA refuses there: it read device data on the host,"
        " copied from pageable host memory, or used an operation whose output shape depends on data.",
        ".item(), .tolist(), .cpu(), int() or bool() of a tensor, a boolean mask, nonzero, repeat_interleave without"
        " output_size, torch.tensor(list, device=...), autotuning; often in the branch of one mode only.",
        "Keep the value on the device and bound the work by what is known at capture (the bucket, N, W); or declare the"
        " mode as not capturable.",
    ),
    Code.FROZEN: Explanation(
        "a host value is frozen in the graph",
        "Called eagerly the implementation is right; the graph that was captured from it, with lengths at their fill"
        " value, gives something else when it is replayed.",
        "A maximum, a total, a grid or a branch computed on the host at capture (often from seq_lens_cpu), or refresh()"
        " relying on code that runs at every call: under replay only the captured device work runs.",
        "Compute on the device whatever depends on the batch, or bound it by the largest value that the graph may see.",
    ),
    Code.MOVED: Explanation(
        "a pointer moved, or memory that a graph uses was freed",
        "A buffer that was handed to the implementation no longer lies where it lay, or the captured graph reads or"
        " writes memory that was given back after the capture and now belongs to somebody else.",
        "A workspace or cache that is allocated anew when a larger batch is prepared, after an earlier graph has"
        " captured the old one; a buffer replaced (set_, resize_, .data =) where it should be written.",
        "Allocate workspaces once, for the largest bucket, before the first capture, and keep them; write buffers in"
        " place.",
    ),
    Code.OTHER_STREAM: Explanation(
        "work on another stream than the capturing one",
        "During the capture something ran on another stream: it is not part of the graph (and ran at once), or makes"
        " the graph depend on a second stream.",
        "A kernel launched on the default stream by an extension or a raw pointer; a side stream for copies.",
        "Launch on torch.cuda.current_stream().",
    ),
    Code.NEEDS_SYNC: Explanation(
        "waits for the device inside the captured region",
        "The implementation synchronises the device, a stream or an event while it is captured; a graph cannot wait"
        " for the host.",
        "torch.cuda.synchronize() or event.synchronize() left over from debugging, or before a host read.",
        "Take the synchronisation out; order device work by streams and events alone.",
    ),
    Code.DEATH: Explanation(
        "the implementation killed its process",
        "The worker process ended while it ran the implementation: a signal, an exit, more memory than it may take, or"
        " an error after which the GPU's context is dead, such as an illegal memory access. The line is that of the"
        " implementation where it died, if that can be told.",
        "A load or store without a mask, a 32-bit offset that wraps, a pointer to memory that was freed, a grid or a"
        " length taken from a tensor that was not written.",
        "Run the case with nsa-verify replay --sanitizer memcheck (oob on the CPU), or with --no-isolation under a"
        " debugger; look at the masks and at the widths of the products in addresses first.",
    ),
    Code.HANG: Explanation(
        "the implementation does not return",
        "Nothing was heard of the worker for far longer than calls of this implementation usually take, and it was"
        " ended from outside. The line is where it was then.",
        "A spin on a flag that no other program sets, a loop whose bound comes from a negative or poisoned length, a"
        " deadlock between programs of one kernel that wait for each other.",
        "Look at the bounds of the loops for the lengths of the minimal case; kernels must not wait for programs that"
        " may not be running.",
    ),
    Code.EXCEPTION: Explanation(
        "the implementation raised an exception",
        "refresh() did not return. The message and the innermost line of the implementation are shown.",
        "torch.cat of an empty list, a shape mismatch when a request reaches past the table, an index error on an empty"
        " batch or a zero accept length.",
        "Handle the empty batch, zero accepts and the context wall as ordinary input.",
    ),
    Code.NOT_DETERMINISTIC: Explanation(
        "not deterministic",
        "The same case, run again from the same memory, did not give the same result.",
        "A race between programs of a kernel, a read of uninitialised memory, a counter or cache kept between calls.",
        "Find what the result depends on besides the inputs; the report says how many of the runs disagreed.",
    ),
    Code.NOT_IDEMPOTENT: Explanation(
        "not idempotent",
        "The first call left the right content; a second call with the same inputs did not.",
        "The result is accumulated onto what the buffer held, or a buffer is used as input and output.",
        "Compute every output from the inputs alone.",
    ),
    Code.RECOMPILES: Explanation(
        "recompiles as batches vary",
        "Two replays of one setup and mode launch the same Triton kernel with different compile-time constants, so"
        " kernels are compiled while the engine serves. Between buckets, powers of two are taken for rounding up.",
        "A length, a row count or a batch size declared tl.constexpr, or a block size computed from one.",
        "Pass what varies as a plain argument (do_not_specialize where its value must not matter), and let constants"
        " depend on the setup alone.",
    ),
    Code.SILENT_FALLBACK: Explanation(
        "a fallback was taken silently",
        "An operation or a kernel launch raised an error, refresh() went on as if nothing had happened, and nobody was"
        " told.",
        "try/except around the fast path, with a slow path or nothing behind it: the launch that always fails is never"
        " noticed, and old output is kept or the speed is lost.",
        "Let the error out, or say so: nsa_verify.fallback(reason) counts the fallback and the report shows it.",
    ),
}

SEVERITY: Final = (
    Code.DEATH,
    Code.HANG,
    Code.NOT_DETERMINISTIC,
    Code.NOT_IDEMPOTENT,
    Code.EXCEPTION,
    Code.ILLEGAL_IN_CAPTURE,
    Code.NEEDS_SYNC,
    Code.OTHER_STREAM,
    Code.MOVED,
    Code.FROZEN,
    Code.INPUT_MUTATED,
    Code.GUARD_WRITTEN,
    Code.OUT_OF_BOUNDS,
    Code.FRAME_WRITTEN,
    Code.INVARIANT,
    Code.POISON,
    Code.STALE,
    Code.WRONG_VALUE,
    Code.RECOMPILES,
    Code.SILENT_FALLBACK,
)
"""The order in which the findings of one verdict are listed; the first names the bug."""


class Cell(Struct, frozen=True):
    """One cell of the window around a difference."""

    element: tuple[int, ...]
    region: str
    expected: int
    got: int
    differs: bool = False


class Square(Struct, frozen=True, array_like=True):
    """One cell of a picture: what it holds, what it should hold, and what it held when the replay began."""

    region: str
    """As in a finding: live, slack, frame, guard or input."""
    expected: int
    got: int
    before: int
    differs: bool = False


class Picture(Struct, frozen=True, kw_only=True):
    """A buffer as a replay left it, or the part of it around the first difference.

    Behind the buffer's own ``columns``, or below its ``rows``, come cells that lie between rows, and the first ones of
    the guard zone. ``squares`` has the rows from ``first_row`` on, each from ``first_column`` on; there are none where
    other pictures have taken all the room.
    """

    buffer: str
    kind: str
    """``buffer``, ``guard`` for the zone behind one, or ``input``."""
    step: int | None
    owner: str
    """The mode and bucket whose buffer it is, if they are not those of the replay."""
    aliases: tuple[str, ...]
    """Under which other names it goes in this replay."""
    rows: int
    columns: int
    wrong: int
    """Cells of the whole buffer that are wrong."""
    first_row: int = 0
    first_column: int = 0
    squares: tuple[tuple[Square, ...], ...] = ()


def place_of(code: Code, buffer: str | None, region: str | None, message: str) -> str:
    """What ``Finding.place`` is for these of its fields."""
    if buffer is None:
        return message.partition(":")[0] if code is Code.EXCEPTION else ""
    return f"{buffer} {_SIDES.get(region, region)}" if region else buffer


_SIDES: Final = {"live": "inside", "slack": "inside", "frame": "outside", "guard": "outside"}
"""Where a wrong cell is: among those that may be written, or beyond them. Which of the two regions it is on a side
depends on the case, as one request's columns are another one's slack."""


def symptom_of(code: Code, mode: Mode, place: str) -> str:
    """What two findings of one bug have in common: its mode, its place, and its code, where it makes no difference
    whether an earlier replay or nothing was there before."""
    return f"{Code.STALE if code is Code.POISON else code} {mode} {place}".rstrip()


class Finding(Struct, frozen=True, kw_only=True):
    """One thing that is wrong: what, where, expected and got.

    ``element`` is ``(i,)`` in a 1-D buffer and ``(row, column)`` in a table; in a guard zone it counts from the start
    of the zone. ``count`` is the number of cells of this buffer with this code. ``before`` is what the cell held when
    the replay began. ``window`` shows the neighbourhood.
    """

    implementation: str
    executor: str
    code: Code
    replay: int
    mode: Mode
    step: int | None = None
    buffer: str | None = None
    element: tuple[int, ...] = ()
    region: str | None = None
    expected: int | None = None
    got: int | None = None
    before: int | None = None
    count: int = 1
    message: str = ""
    window: tuple[Cell, ...] = ()

    @property
    def signature(self) -> Signature:
        """What makes two findings the same bug to a run."""
        return Signature(self.implementation, self.executor, self.code)

    @property
    def place(self) -> str:
        """The buffer and the side of it; of an exception its type, since it has neither."""
        return place_of(self.code, self.buffer, self.region, self.message)

    @property
    def symptom(self) -> str:
        """Its code, mode and place, as far as they tell bugs apart."""
        return symptom_of(self.code, self.mode, self.place)

    def signature_in(self, detail: bool) -> Signature:
        """``signature``; in ``detail`` with mode and place, which keep several bugs of one implementation apart."""
        return self.signature._replace(place=self.place, mode=self.mode) if detail else self.signature


class Signature(NamedTuple):
    """The search keeps one minimal case per signature."""

    implementation: str
    executor: str
    code: Code
    place: str = ""
    """The buffer and the kind of region, where findings are told apart in detail."""
    mode: str = ""
    """Likewise."""

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.mode, self.place)))
        return f"{self.implementation} [{self.executor}] {self.code} {where}".rstrip()


class Outcome(StrEnum):
    """Three-valued; a check that crashed is ``UNKNOWN``, and unknown is red."""

    AGREE = "agree"
    DISAGREE = "disagree"
    UNKNOWN = "unknown"
    NOT_APPLICABLE = "not applicable"


class Verdict(Struct, frozen=True, kw_only=True):
    """What one case says of one implementation under one executor.

    ``findings`` are those of the first replay that disagrees, gravest first; later replays start from memory that is
    already wrong and are not judged. ``modes`` are those of the replays that were run; replays that the implementation
    does not declare are left out. ``reason`` says why it is unknown or not applicable. ``fallbacks`` are the reasons
    that the implementation reported with ``nsa_verify.fallback``; ``compile_keys`` name what Triton compiles, or would
    compile, for the launches of an eager run: kernel and specialisation.
    """

    implementation: str
    executor: str
    outcome: Outcome
    modes: tuple[Mode, ...] = ()
    findings: tuple[Finding, ...] = ()
    reason: str = ""
    fallbacks: tuple[str, ...] = ()
    compile_keys: frozenset[str] = frozenset()
    pictures: tuple[Picture, ...] = ()
    """The buffers of the replay that disagrees, if they were asked for."""

    @property
    def primary(self) -> Finding | None:
        """The gravest finding: it names the bug."""
        return self.findings[0] if self.findings else None
