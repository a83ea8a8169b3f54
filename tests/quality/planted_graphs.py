"""Bugs of captured graphs, of sequences of replays and of the fan-out, planted into copies of our implementations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from quality.planted import KERNELS, Smallest, _replace_once
from quality.smallest import (
    batch_of_two_then_shorter,
    longer_than_the_capture,
    longer_then_padding,
    one_request_in,
    one_request_of_length_1,
    one_request_padded_to_two,
    schedule_of_two_steps,
    strided_batch_of,
    two_buckets,
    two_graphs,
    two_replays_of_one_request,
    two_rows_with_a_stride,
    two_steps,
    two_totals_in_one_bucket,
    verify_and_decode,
    verify_between_decodes,
)

from nsa_verify import Code, Mode


class Eagerly(Enum):
    """What calling the copy directly says of the case that its graphs were shrunk to."""

    SAME = "the same code"
    AGREES = "nothing is wrong"
    UNASKED = "it depends on the order of the calls, or on how fast they are"
    ONLY = "it is found by calling, and not in graphs"


@dataclass(frozen=True)
class GraphBug:
    """Changes to the text of ``kernels/<module>.py``, the code they must be found under, and its smallest cases.

    It must be found in captured graphs unless it is found ``eagerly`` only. ``also`` are codes that are as right, with
    their smallest cases: which is found first depends on the cases. The message must say ``told`` and name the planted
    line that holds ``blamed``. Cases of ``modes`` are drawn: fewer than all only to save time. What a bug that
    ``races`` leaves depends on time as well, and that may be said (NV501) of cases that are not small.
    """

    name: str
    module: str
    changes: tuple[tuple[str, str], ...]
    code: Code
    smallest: Smallest
    eagerly: Eagerly = Eagerly.SAME
    also: Mapping[Code, Smallest] = field(default_factory=dict)
    told: str = ""
    blamed: str = ""
    modes: tuple[Mode, ...] = tuple(Mode)
    races: bool = False

    @property
    def copy_name(self) -> str:
        """What the implementation is called once the bug is in it."""
        return f"bug-{self.name}"

    def text(self, planted: bool = True) -> str:
        """The source of the copy, with the bug or without."""
        text = (KERNELS / f"{self.module}.py").read_text(encoding="utf-8")
        text = _replace_once(text, f'"{self.module.replace("_", "-")}"', f'"{self.copy_name}"')
        for right, wrong in self.changes if planted else ():
            text = _replace_once(text, right, wrong)
        return text

    @property
    def file_name(self) -> str:
        """What the file of the copy is called."""
        return f"{self.name.replace('-', '_')}.py"

    def plant(self, folder: Path, planted: bool = True) -> Path:
        """Write the copy into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        path.write_text(self.text(planted), encoding="utf-8")
        return path

    @property
    def blamed_line(self) -> int:
        """The number of the line that holds ``blamed`` in the copy with the bug."""
        (number,) = (number for number, line in enumerate(self.text().splitlines(), 1) if self.blamed in line)
        return number


_NEEDS_HOST_LENGTHS: Final = "    capturable=False,\n    host_lengths=True,\n"
_STEPS: Final = "    for step in steps:\n        _refresh_step(inputs, step, setup)\n"
_SEQ_LENS: Final = "    seq_lens = inputs.seq_lens[: inputs.batch_size]\n"
_CLAMPED: Final = "    step.nsa_cache_seqlens[:rows].copy_(compute_nsa_seqlens(expanded, setup.index_topk))\n"
_GATHER: Final = "    page_table = inputs.req_to_token[:, : setup.table_width].index_select(0, pool_rows)  # [R, W]\n"
_COPY_TABLE: Final = "    step.page_table_1[:rows].copy_(page_table)\n"
_START: Final = "    start = seq_lens + 1 if inputs.mode is Mode.TARGET_VERIFY else seq_lens - tokens + 1\n"

STALE_TAIL: Final = GraphBug(
    name="tail-never-runs-backwards",
    module="vectorized",
    changes=(
        (
            "    _accumulate(step.cache_seqlens, step.cu_seqlens_k)\n",
            (
                "    earlier = step.cu_seqlens_k[2:].clone()\n"
                "    _accumulate(step.cache_seqlens, step.cu_seqlens_k)\n"
                "    torch.maximum(step.cu_seqlens_k[2:], earlier, out=step.cu_seqlens_k[2:])\n"
            ),
        ),
    ),
    code=Code.STALE,
    smallest=batch_of_two_then_shorter,
    modes=(Mode.DECODE,),
)
PADDING_OF_ONE_FIELD: Final = GraphBug(
    name="padding-of-one-field",
    module="precomputed_copy",
    changes=(
        (
            "    step.nsa_cache_seqlens[:rows].copy_(precomputed.nsa_cache_seqlens)\n",
            (
                "    kept = step.nsa_cache_seqlens[:rows]\n"
                "    good_enough = (precomputed.seqlens_expanded <= 1) & (kept > 0)\n"
                "    kept.copy_(torch.where(good_enough, kept, precomputed.nsa_cache_seqlens))\n"
            ),
        ),
    ),
    code=Code.STALE,
    smallest=longer_then_padding,
    modes=(Mode.DECODE,),
)
MAP_OF_THE_PREVIOUS_MODE: Final = GraphBug(
    name="map-of-the-previous-mode",
    module="vectorized",
    changes=(
        ("def _expand(", "_maps: dict[tuple[int, int, torch.device], Tensor] = {}\n\n\ndef _expand("),
        (
            "        return requests, seq_lens\n",
            (
                "        long_enough = (owner for owner in _maps.values() if owner.shape[0] >= batch_size)\n"
                "        return next(long_enough, requests)[:batch_size], seq_lens\n"
            ),
        ),
        (
            "    return requests.repeat_interleave(tokens), (",
            (
                "    key = batch_size, tokens, device\n"
                "    if key not in _maps:\n"
                "        _maps[key] = requests.repeat_interleave(tokens)\n"
                "    return _maps[key], ("
            ),
        ),
    ),
    code=Code.FROZEN,
    smallest=verify_and_decode,
    eagerly=Eagerly.UNASKED,
    also={Code.STALE: verify_between_decodes, Code.WRONG_VALUE: verify_between_decodes},
    modes=(Mode.DECODE, Mode.TARGET_VERIFY),
)
STEP_0_ONLY: Final = GraphBug(
    name="schedule-of-step-0-only",
    module="precomputed_copy",
    changes=(
        (
            "if schedule is not None and step.paged_mqa_schedule is not None:\n",
            "if schedule is not None and step.paged_mqa_schedule is not None and step is steps[0]:\n",
        ),
    ),
    code=Code.POISON,
    smallest=schedule_of_two_steps,
)
FIELD_NOT_COPIED: Final = GraphBug(
    name="field-not-copied",
    module="precomputed_batched_copy",
    changes=(("            tl.store(to_nsa_cache_seqlens[step] + row, clamped, mask=defined)\n", ""),),
    code=Code.POISON,
    smallest=one_request_of_length_1,
    modes=(Mode.DECODE,),
)
FROZEN_MAXIMUM: Final = GraphBug(
    name="maximum-frozen",
    module="vectorized",
    changes=(
        (
            _GATHER + _COPY_TABLE,
            (
                "    width = setup.table_width\n"
                "    if inputs.seq_lens_cpu is not None:\n"
                "        added = setup.num_draft_tokens if inputs.mode is Mode.TARGET_VERIFY else 0\n"
                "        width = min(int(inputs.seq_lens_cpu[: inputs.batch_size].max()) + added, width)\n"
                "    page_table = inputs.req_to_token[:, :width].index_select(0, pool_rows)  # [R, width]\n"
                "    step.page_table_1[:rows, :width].copy_(page_table)\n"
            ),
        ),
        ("        step.real_page_table[:rows].copy_(", "        step.real_page_table[:rows, : pages.shape[1]].copy_("),
    ),
    code=Code.FROZEN,
    smallest=longer_than_the_capture,
    eagerly=Eagerly.AGREES,
    told="called eagerly it agrees",
)
GROWING_WORKSPACE: Final = GraphBug(
    name="workspace-that-grows",
    module="vectorized",
    changes=(
        (
            "def _accumulate(",
            (
                "_workspaces: dict[torch.device, Tensor] = {}\n\n\n"
                "def _workspace(rows: int, device: torch.device) -> Tensor:\n"
                "    held = _workspaces.get(device)\n"
                "    if held is None or held.shape[0] < rows:\n"
                "        held = _workspaces[device] = torch.empty(rows, dtype=torch.int32, device=device)\n"
                "    return held[:rows]\n\n\n"
                "def _accumulate("
            ),
        ),
        (
            _CLAMPED,
            (
                "    clamped = _workspace(rows, expanded.device)\n"
                "    clamped.copy_(compute_nsa_seqlens(expanded, setup.index_topk))\n"
                "    step.nsa_cache_seqlens[:rows].copy_(clamped)\n"
            ),
        ),
    ),
    code=Code.MOVED,
    smallest=two_graphs,
    eagerly=Eagerly.AGREES,
    told="freed after the capture",
    blamed="return held[:rows]",
    modes=(Mode.DECODE, Mode.TARGET_VERIFY),
)
TOLIST: Final = GraphBug(
    name="tolist-in-verify",
    module="vectorized",
    changes=(
        (
            _START,
            (
                "    start = seq_lens - tokens + 1\n"
                "    if inputs.mode is Mode.TARGET_VERIFY:\n"
                "        starts = [length + 1 for length in seq_lens.tolist()]\n"
                "        start = torch.tensor(starts, device=device)\n"
            ),
        ),
    ),
    code=Code.ILLEGAL_IN_CAPTURE,
    smallest=one_request_in(Mode.TARGET_VERIFY),
    eagerly=Eagerly.AGREES,
    told="tolist",
    blamed="seq_lens.tolist()",
)
REPEAT_INTERLEAVE: Final = GraphBug(
    name="repeats-of-v2",
    module="vectorized",
    changes=(
        (
            _START,
            _START + "    if inputs.mode is Mode.DRAFT_EXTEND_V2:\n"
            "        owner = requests.repeat_interleave(torch.full_like(requests, tokens))\n"
            "        token = torch.arange(owner.shape[0], device=device) - owner * tokens\n"
            "        return owner, (start.index_select(0, owner) + token).clamp(min=0)\n",
        ),
    ),
    code=Code.ILLEGAL_IN_CAPTURE,
    smallest=one_request_in(Mode.DRAFT_EXTEND_V2),
    eagerly=Eagerly.AGREES,
    told="repeat_interleave",
    blamed="torch.full_like(requests, tokens)",
)
SIDE_STREAM: Final = GraphBug(
    name="side-stream",
    module="vectorized",
    changes=(
        (
            _COPY_TABLE,
            "    device = torch.get_device_module(page_table.device)\n"
            "    with device.stream(device.Stream()):\n    " + _COPY_TABLE,
        ),
    ),
    code=Code.OTHER_STREAM,
    smallest=one_request_of_length_1,
    eagerly=Eagerly.UNASKED,
    told="another stream",
    blamed=_COPY_TABLE.strip(),
)
VIEW_OVERWRITTEN: Final = GraphBug(
    name="view-that-the-next-step-overwrites",
    module="vectorized",
    changes=(
        (
            _STEPS,
            (
                "    moving = inputs.seq_lens[: inputs.batch_size].clone()\n"
                "    views = []\n"
                "    for number, step in enumerate(steps):\n"
                "        _refresh_step(inputs, step, setup)\n"
                "        moving.add_(min(number, 1))  # a draft step is a token further\n"
                "        views.append(moving[:])\n"
                "    if inputs.mode is Mode.DECODE:\n"
                "        for number, (step, view) in enumerate(zip(steps, views, strict=True)):\n"
                "            step.cache_seqlens.copy_(view - number)\n"
            ),
        ),
    ),
    code=Code.WRONG_VALUE,
    smallest=two_steps,
)
STRIDE_IGNORED: Final = GraphBug(
    name="element-stride-ignored",
    module="vectorized",
    changes=((_SEQ_LENS, "    seq_lens = inputs.seq_lens.as_strided((inputs.batch_size,), (1,))\n"),),
    code=Code.POISON,
    smallest=strided_batch_of(2),
    also={Code.INVARIANT: strided_batch_of(3)},
    modes=(Mode.DECODE,),
)
OFFSET_IGNORED: Final = GraphBug(
    name="storage-offset-ignored",
    module="vectorized",
    changes=(
        (
            _SEQ_LENS,
            "    seq_lens = torch.as_strided(inputs.seq_lens, (inputs.batch_size,), inputs.seq_lens.stride(), 0)\n",
        ),
    ),
    code=Code.POISON,
    smallest=one_request_of_length_1,
    also={Code.INVARIANT: one_request_padded_to_two},
)
SYNCHRONISES: Final = GraphBug(
    name="synchronises",
    module="vectorized",
    changes=((_COPY_TABLE, _COPY_TABLE + "    torch.get_device_module(page_table.device).synchronize()\n"),),
    code=Code.NEEDS_SYNC,
    smallest=one_request_of_length_1,
    eagerly=Eagerly.AGREES,
    blamed="synchronize()",
)
BATCH_SIZE_COMPILED: Final = GraphBug(
    name="batch-size-compiled",
    module="triton_fused",
    changes=(
        ("    rows: tl.tensor,\n    tokens: tl.tensor,\n", "    rows: tl.constexpr,\n    tokens: tl.tensor,\n"),
        ('["seq_stride", "rows", "tokens", "shift", "index_topk"]', '["seq_stride", "tokens", "shift", "index_topk"]'),
    ),
    code=Code.RECOMPILES,
    smallest=two_buckets,
    eagerly=Eagerly.ONLY,
    told="the batch size",
    modes=(Mode.DECODE,),
)
TOTAL_COMPILED: Final = GraphBug(
    name="total-compiled",
    module="triton_fused",
    changes=(
        (
            "    batch_size: tl.tensor,\n    rows: tl.tensor,\n",
            "    batch_size: tl.tensor,\n    rows: tl.constexpr,\n",
        ),
        ('"seq_stride", "batch_size", "rows", "index_topk"]', '"seq_stride", "batch_size", "index_topk"]'),
    ),
    code=Code.RECOMPILES,
    smallest=two_totals_in_one_bucket,
    eagerly=Eagerly.ONLY,
    told="lengths or accepts",
    modes=(Mode.DRAFT_EXTEND,),
)
SILENT: Final = GraphBug(
    name="falls-back-silently",
    module="vectorized",
    changes=(
        (
            _COPY_TABLE,
            "    try:\n"
            "        step.page_table_1[:rows].view(-1).copy_(page_table.view(-1))\n"
            "    except RuntimeError:\n    " + _COPY_TABLE,
        ),
    ),
    code=Code.SILENT_FALLBACK,
    smallest=two_rows_with_a_stride,
    eagerly=Eagerly.ONLY,
    told="view raised RuntimeError",
    blamed=".view(-1)",
)
DEFAULT_STREAM: Final = GraphBug(
    name="default-stream",
    module="vectorized",
    changes=((_COPY_TABLE, "    with torch.cuda.stream(torch.cuda.default_stream()):\n    " + _COPY_TABLE),),
    code=Code.OTHER_STREAM,
    smallest=one_request_of_length_1,
    eagerly=Eagerly.UNASKED,
)
REUSED_STAGING: Final = GraphBug(
    name="reused-staging",
    module="vectorized",
    changes=(
        ("    capturable={Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2},\n", _NEEDS_HOST_LENGTHS),
        (_SEQ_LENS, "    seq_lens = _staged(inputs)\n"),
        (
            "def _expand(",
            (
                "_staging: list[Tensor] = []\n\n\n"
                "def _staged(inputs: ReplayInputs) -> Tensor:\n"
                "    assert inputs.seq_lens_cpu is not None\n"
                "    if not _staging:\n"
                "        _staging.append(torch.empty(65_536, dtype=torch.int64, pin_memory=True))\n"
                "    staged = _staging[0][: inputs.batch_size]\n"
                "    staged.copy_(inputs.seq_lens_cpu[: inputs.batch_size])\n"
                "    return staged.to(inputs.seq_lens.device, non_blocking=True)\n\n\n"
                "def _expand("
            ),
        ),
    ),
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
