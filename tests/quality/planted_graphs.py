"""Mutants of captured graphs, of sequences of replays and of the fan-out, and the cases that a person would write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from quality.planted import Bug, Smallest
from quality.smallest import (
    batch_of_two_then_shorter,
    longer_than_the_capture,
    longer_then_padding,
    one_request_in,
    one_request_of_length_1,
    schedule_of_two_steps,
    strided_batch_of,
    two_buckets,
    two_graphs,
    two_replays_of_one_request,
    two_rows,
    two_rows_with_a_stride,
    two_steps,
    two_totals,
    verify_and_decode,
    verify_between_decodes,
)

from nsa_verify import Code, Mode
from nsa_verify.engine.plan import ROUND_CASES


class Eagerly(Enum):
    """What calling the copy directly says of the case that its graphs were shrunk to."""

    SAME = "the same code"
    AGREES = "nothing is wrong"
    UNASKED = "it depends on the order of the calls, or on how fast they are"
    ONLY = "it is found by calling, and not in graphs"


@dataclass(frozen=True)
class GraphBug(Bug):
    """A mutant of the catalogue that shows in captured graphs, or needs a sequence or several steps.

    It must be found in captured graphs unless it is found ``eagerly`` only. ``also`` are codes that are as right, with
    their smallest cases: which is found first depends on the cases. The message must say ``told`` and name the planted
    line that holds ``blamed``. Cases of ``modes`` are drawn, so many ``at_first``, ``short`` ones of at most three
    replays: less of each than there is only to save time. What a bug that ``races`` leaves depends on time as well, and
    that may be said (NV501) of cases that are not small.
    """

    eagerly: Eagerly = Eagerly.SAME
    also: Mapping[Code, Smallest] = field(default_factory=dict)
    told: str = ""
    blamed: str = ""
    modes: tuple[Mode, ...] = tuple(Mode)
    short: bool = False
    at_first: int = ROUND_CASES
    races: bool = False

    @property
    def file_name(self) -> str:
        """What the file of the copy is called."""
        return f"{self.name.replace('-', '_')}.py"

    @property
    def blamed_line(self) -> int:
        """The number of the line that holds ``blamed`` in the copy with the bug."""
        lines = enumerate(self.mutant.text().splitlines(), 1)
        (number,) = (number for number, line in lines if self.blamed in line)
        return number


STALE_TAIL: Final = GraphBug(
    name="tail-never-runs-backwards",
    code=Code.STALE,
    smallest=batch_of_two_then_shorter,
    modes=(Mode.DECODE,),
)
PADDING_OF_ONE_FIELD: Final = GraphBug(
    name="padding-of-one-field",
    code=Code.STALE,
    smallest=longer_then_padding,
    modes=(Mode.DECODE,),
)
MAP_OF_THE_PREVIOUS_MODE: Final = GraphBug(
    name="map-of-the-previous-mode",
    code=Code.FROZEN,
    smallest=verify_and_decode,
    eagerly=Eagerly.UNASKED,
    also={Code.STALE: verify_between_decodes, Code.WRONG_VALUE: verify_between_decodes},
    modes=(Mode.DECODE, Mode.TARGET_VERIFY),
    short=True,
)
STEP_0_ONLY: Final = GraphBug(
    name="schedule-of-step-0-only",
    code=Code.POISON,
    smallest=schedule_of_two_steps,
)
FIELD_NOT_COPIED: Final = GraphBug(
    name="field-not-copied",
    code=Code.POISON,
    smallest=one_request_of_length_1,
    modes=(Mode.DECODE,),
    at_first=3,
)
FROZEN_MAXIMUM: Final = GraphBug(
    name="maximum-frozen",
    code=Code.FROZEN,
    smallest=longer_than_the_capture,
    eagerly=Eagerly.AGREES,
    told="called eagerly it agrees",
)
GROWING_WORKSPACE: Final = GraphBug(
    name="workspace-that-grows",
    code=Code.MOVED,
    smallest=two_graphs,
    eagerly=Eagerly.AGREES,
    told="freed after the capture",
    blamed="return held[:rows]",
    modes=(Mode.DECODE, Mode.TARGET_VERIFY),
)
TOLIST: Final = GraphBug(
    name="tolist-in-verify",
    code=Code.ILLEGAL_IN_CAPTURE,
    smallest=one_request_in(Mode.TARGET_VERIFY),
    eagerly=Eagerly.AGREES,
    told="tolist",
    blamed="seq_lens.tolist()",
)
REPEAT_INTERLEAVE: Final = GraphBug(
    name="repeats-of-v2",
    code=Code.ILLEGAL_IN_CAPTURE,
    smallest=one_request_in(Mode.DRAFT_EXTEND_V2),
    eagerly=Eagerly.AGREES,
    told="repeat_interleave",
    blamed="torch.full_like(requests, tokens)",
)
SIDE_STREAM: Final = GraphBug(
    name="side-stream",
    code=Code.OTHER_STREAM,
    smallest=one_request_of_length_1,
    eagerly=Eagerly.UNASKED,
    told="another stream",
    blamed="step.page_table_1[:rows].copy_(page_table)",
)
VIEW_OVERWRITTEN: Final = GraphBug(
    name="view-that-the-next-step-overwrites",
    code=Code.WRONG_VALUE,
    smallest=two_steps,
)
STRIDE_IGNORED: Final = GraphBug(
    name="element-stride-ignored",
    code=Code.POISON,
    smallest=strided_batch_of(2),
    also={Code.INVARIANT: strided_batch_of(3)},
    modes=(Mode.DECODE,),
)
OFFSET_IGNORED: Final = GraphBug(
    name="storage-offset-ignored",
    code=Code.POISON,
    smallest=one_request_of_length_1,
    also={Code.INVARIANT: two_rows},
)
SYNCHRONISES: Final = GraphBug(
    name="synchronises",
    code=Code.NEEDS_SYNC,
    smallest=one_request_of_length_1,
    eagerly=Eagerly.AGREES,
    blamed="synchronize()",
)
BATCH_SIZE_COMPILED: Final = GraphBug(
    name="batch-size-compiled",
    code=Code.RECOMPILES,
    smallest=two_buckets,
    eagerly=Eagerly.ONLY,
    told="the batch size",
    modes=(Mode.DECODE,),
)
TOTAL_COMPILED: Final = GraphBug(
    name="total-compiled",
    code=Code.RECOMPILES,
    smallest=two_totals,
    eagerly=Eagerly.ONLY,
    told="is compiled anew as",
    modes=(Mode.DRAFT_EXTEND,),
)
SILENT: Final = GraphBug(
    name="falls-back-silently",
    code=Code.SILENT_FALLBACK,
    smallest=two_rows_with_a_stride,
    eagerly=Eagerly.ONLY,
    told="view raised RuntimeError",
    blamed=".view(-1)",
)
DEFAULT_STREAM: Final = GraphBug(
    name="default-stream",
    code=Code.OTHER_STREAM,
    smallest=one_request_of_length_1,
    eagerly=Eagerly.UNASKED,
)
REUSED_STAGING: Final = GraphBug(
    name="reused-staging",
    code=Code.WRONG_VALUE,
    also={Code.STALE: two_replays_of_one_request},
    smallest=two_replays_of_one_request,
    eagerly=Eagerly.ONLY,
    races=True,
)
GRAPH_BUGS: Final = (
    STALE_TAIL,
    PADDING_OF_ONE_FIELD,
    MAP_OF_THE_PREVIOUS_MODE,
    STEP_0_ONLY,
    FIELD_NOT_COPIED,
    FROZEN_MAXIMUM,
    GROWING_WORKSPACE,
    TOLIST,
    REPEAT_INTERLEAVE,
    SIDE_STREAM,
    VIEW_OVERWRITTEN,
    STRIDE_IGNORED,
    OFFSET_IGNORED,
    SYNCHRONISES,
    BATCH_SIZE_COMPILED,
    TOTAL_COMPILED,
    SILENT,
)
GPU_BUGS: Final = (DEFAULT_STREAM, REUSED_STAGING)
"""They need CUDA: its default stream, and copies that the host does not wait for."""
