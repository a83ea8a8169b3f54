"""What goes wrong only, or first, when a graph is captured and replayed; what compiles, waits, hangs or raises."""

from __future__ import annotations

from typing import Final

from nsa_verify.core.findings import Code
from nsa_verify.mutants.mutant import EAGER, GRAPH, Mutant, Size

_CAPTURABLE: Final = "    capturable={Mode.DECODE, Mode.TARGET_VERIFY, Mode.DRAFT_EXTEND_V2},\n"
_SEQ_LENS: Final = "    seq_lens = inputs.seq_lens[: inputs.batch_size]\n"
_GATHER: Final = "    page_table = inputs.req_to_token[:, : setup.table_width].index_select(0, pool_rows)  # [R, W]\n"
_COPY_TABLE: Final = "    step.page_table_1[:rows].copy_(page_table)\n"
_START: Final = "    start = seq_lens + 1 if inputs.mode is Mode.TARGET_VERIFY else seq_lens - tokens + 1\n"

CAPTURE: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="maximum-frozen",
        kind="host value frozen in the graph",
        trigger="a request longer than the fill, with host lengths",
        module="vectorized",
        changes={
            _GATHER + _COPY_TABLE: (
                "    width = setup.table_width\n"
                "    if inputs.seq_lens_cpu is not None:\n"
                "        added = setup.num_draft_tokens if inputs.mode is Mode.TARGET_VERIFY else 0\n"
                "        width = min(int(inputs.seq_lens_cpu[: inputs.batch_size].max()) + added, width)\n"
                "    page_table = inputs.req_to_token[:, :width].index_select(0, pool_rows)  # [R, width]\n"
                "    step.page_table_1[:rows, :width].copy_(page_table)\n"
            ),
            "step.real_page_table[:rows].copy_(": "step.real_page_table[:rows, : pages.shape[1]].copy_(",
        },
        codes=(Code.FROZEN,),
        seen_by=(GRAPH,),
        size=Size(replays=1, rows=1, length=2),
    ),
    Mutant(
        name="top-k-minimum-skipped-when-short",
        kind="branch on host lengths frozen in the graph",
        trigger="a request longer than the top-k, with host lengths",
        module="precomputed_copy",
        changes={
            "    clamped = expanded.clamp(max=setup.index_topk)\n": (
                "    clamped = expanded.clamp(max=setup.index_topk)\n"
                "    if inputs.seq_lens_cpu is not None and inputs.seq_lens_cpu[:batch_size].max() + added"
                " <= setup.index_topk:\n"
                "        clamped = expanded  # nothing reaches the top-k\n"
            )
        },
        codes=(Code.FROZEN,),
        seen_by=(GRAPH,),
        size=Size(rows=4, length=9),
    ),
    Mutant(
        name="lengths-cached-by-host-lengths",
        kind="cache filled before the capture and frozen in the graph",
        trigger="a length other than the fill, with host lengths",
        module="precomputed_copy",
        changes={
            "    cache_seqlens = (inputs.seq_lens[:batch_size] + added).to(torch.int32)\n": (
                "    cache_seqlens = _kv_lens(inputs, added)\n"
            ),
            "def copy_into(": (
                "_cached_lens: dict[tuple[int, ...], Tensor] = {}\n\n\n"
                "def _kv_lens(inputs: ReplayInputs, added: int) -> Tensor:\n"
                "    batch_size = inputs.batch_size\n"
                "    if inputs.seq_lens_cpu is None:\n"
                "        return (inputs.seq_lens[:batch_size] + added).to(torch.int32)\n"
                "    key = (added, *inputs.seq_lens_cpu[:batch_size].tolist())\n"
                "    if key not in _cached_lens:\n"
                "        _cached_lens[key] = (inputs.seq_lens[:batch_size] + added).to(torch.int32)\n"
                "    return _cached_lens[key]\n\n\n"
                "def copy_into("
            ),
        },
        codes=(Code.FROZEN,),
        seen_by=(GRAPH,),
        size=Size(replays=1, rows=1, length=2),
    ),
    Mutant(
        name="workspace-that-grows",
        kind="workspace re-allocated after it was captured",
        trigger="two graphs, the second with more rows",
        module="vectorized",
        changes={
            "def _accumulate(": (
                "_workspaces: dict[torch.device, Tensor] = {}\n\n\n"
                "def _workspace(rows: int, device: torch.device) -> Tensor:\n"
                "    held = _workspaces.get(device)\n"
                "    if held is None or held.shape[0] < rows:\n"
                "        held = _workspaces[device] = torch.empty(rows, dtype=torch.int32, device=device)\n"
                "    return held[:rows]\n\n\n"
                "def _accumulate("
            ),
            "    step.nsa_cache_seqlens[:rows].copy_(compute_nsa_seqlens(expanded, setup.index_topk))\n": (
                "    clamped = _workspace(rows, expanded.device)\n"
                "    clamped.copy_(compute_nsa_seqlens(expanded, setup.index_topk))\n"
                "    step.nsa_cache_seqlens[:rows].copy_(clamped)\n"
            ),
        },
        codes=(Code.MOVED,),
        seen_by=(GRAPH,),
        size=Size(replays=2, rows=2, length=2),
    ),
    Mutant(
        name="workspace-replaced-per-batch-size",
        kind="workspace re-allocated after it was captured",
        trigger="replays in two buckets",
        module="precomputed_batched_copy",
        changes={
            "def _gather(": "_page_rows: dict[torch.device, Tensor] = {}\n\n\ndef _gather(",
            "    pages = cache_seqlens.new_empty((batch_size, setup.table_width))\n": (
                "    shape, device = (batch_size, setup.table_width), cache_seqlens.device\n"
                "    if device not in _page_rows or _page_rows[device].shape != shape:\n"
                "        _page_rows[device] = cache_seqlens.new_empty(shape)\n"
                "    pages = _page_rows[device]\n"
            ),
        },
        codes=(Code.MOVED,),
        seen_by=(GRAPH,),
        size=Size(replays=2, rows=2, length=1),
    ),
    Mutant(
        name="tolist-in-verify",
        kind="host read under capture, in one mode",
        trigger="TARGET_VERIFY",
        module="vectorized",
        changes={
            _START: (
                "    start = seq_lens - tokens + 1\n"
                "    if inputs.mode is Mode.TARGET_VERIFY:\n"
                "        starts = [length + 1 for length in seq_lens.tolist()]\n"
                "        start = torch.tensor(starts, device=device)\n"
            )
        },
        codes=(Code.ILLEGAL_IN_CAPTURE,),
        seen_by=(GRAPH,),
    ),
    Mutant(
        name="repeats-of-v2",
        kind="data-dependent repeat_interleave under capture, in one mode",
        trigger="DRAFT_EXTEND_V2",
        module="vectorized",
        changes={
            _START: _START + "    if inputs.mode is Mode.DRAFT_EXTEND_V2:\n"
            "        owner = requests.repeat_interleave(torch.full_like(requests, tokens))\n"
            "        token = torch.arange(owner.shape[0], device=device) - owner * tokens\n"
            "        return owner, (start.index_select(0, owner) + token).clamp(min=0)\n"
        },
        codes=(Code.ILLEGAL_IN_CAPTURE,),
        seen_by=(GRAPH,),
    ),
    Mutant(
        name="side-stream",
        kind="launch on another stream than the capturing one",
        trigger="any capture",
        module="vectorized",
        changes={
            _COPY_TABLE: (
                "    device = torch.get_device_module(page_table.device)\n"
                "    with device.stream(device.Stream()):\n    " + _COPY_TABLE
            )
        },
        codes=(Code.OTHER_STREAM,),
        seen_by=(GRAPH,),
    ),
    Mutant(
        name="default-stream",
        kind="launch on the default stream",
        trigger="any capture on a GPU",
        module="vectorized",
        changes={_COPY_TABLE: "    with torch.cuda.stream(torch.cuda.default_stream()):\n    " + _COPY_TABLE},
        codes=(Code.OTHER_STREAM,),
        seen_by=(GRAPH,),
        needs_gpu=True,
    ),
    Mutant(
        name="synchronises",
        kind="waits for the device under capture",
        trigger="any capture",
        module="vectorized",
        changes={_COPY_TABLE: _COPY_TABLE + "    torch.get_device_module(page_table.device).synchronize()\n"},
        codes=(Code.NEEDS_SYNC,),
        seen_by=(GRAPH,),
    ),
    Mutant(
        name="reused-staging",
        kind="staging buffer written again before its copy is done",
        trigger="two replays with different lengths, called in quick succession on a GPU",
        module="vectorized",
        changes={
            _CAPTURABLE: "    capturable=False,\n    host_lengths=True,\n",
            _SEQ_LENS: "    seq_lens = _staged(inputs)\n",
            "def _expand(": (
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
        },
        codes=(Code.WRONG_VALUE, Code.STALE, Code.NOT_DETERMINISTIC),
        seen_by=(EAGER,),
        size=Size(replays=2, rows=1, length=2),
        needs_gpu=True,
    ),
    Mutant(
        name="batch-size-compiled",
        kind="launch parameter that varies is constexpr",
        trigger="replays in two buckets",
        module="triton_fused",
        changes={
            "    rows: tl.tensor,\n    tokens: tl.tensor,\n": "    rows: tl.constexpr,\n    tokens: tl.tensor,\n",
            '"rows", "tokens", "shift", "index_topk"]': '"tokens", "shift", "index_topk"]',
        },
        codes=(Code.RECOMPILES,),
        seen_by=(EAGER,),
        size=Size(replays=2, rows=6, length=1),
    ),
    Mutant(
        name="total-compiled",
        kind="launch parameter that varies is constexpr",
        trigger="two ragged replays that accept different numbers of tokens",
        module="triton_fused",
        changes={
            "    batch_size: tl.tensor,\n    rows: tl.tensor,\n": (
                "    batch_size: tl.tensor,\n    rows: tl.constexpr,\n"
            ),
            '"seq_stride", "batch_size", "rows", "index_topk"]': '"seq_stride", "batch_size", "index_topk"]',
        },
        codes=(Code.RECOMPILES,),
        seen_by=(EAGER,),
        size=Size(replays=2, rows=3, length=2),
    ),
    Mutant(
        name="tile-as-wide-as-the-batch",
        kind="block size chosen by the lengths of a batch",
        trigger="two replays in one mode whose longest requests differ, with host lengths",
        module="triton_inplace",
        changes={
            "    programs = min(triton.cdiv(setup.table_width, _PROGRAM_COLUMNS), _MAX_PROGRAMS)\n": (
                "    programs = min(triton.cdiv(setup.table_width, _PROGRAM_COLUMNS), _MAX_PROGRAMS)\n"
                "    columns = _COLUMNS\n"
                "    if inputs.seq_lens_cpu is not None:\n"
                "        longest = int(inputs.seq_lens_cpu[:batch_size].max())\n"
                "        columns = min(triton.next_power_of_2(max(longest, 1)), _COLUMNS)\n"
            ),
            "        OWN_CTX_LENS=ctx_lens is not None,\n        LANES=_LANES,\n        EARLIER=_EARLIER,\n"
            "        COLUMNS=_COLUMNS,\n": (
                "        OWN_CTX_LENS=ctx_lens is not None,\n        LANES=_LANES,\n        EARLIER=_EARLIER,\n"
                "        COLUMNS=columns,\n"
            ),
        },
        codes=(Code.RECOMPILES,),
        seen_by=(EAGER,),
        size=Size(replays=2, rows=1, length=2),
    ),
    Mutant(
        name="falls-back-silently",
        kind="fallback behind try and except",
        trigger="two rows of the page table that do not follow each other without a gap",
        module="vectorized",
        changes={
            _COPY_TABLE: (
                "    try:\n"
                "        step.page_table_1[:rows].view(-1).copy_(page_table.view(-1))\n"
                "    except RuntimeError:\n    " + _COPY_TABLE
            )
        },
        codes=(Code.SILENT_FALLBACK,),
        seen_by=(EAGER,),
        size=Size(replays=1, rows=2, length=2),
    ),
    Mutant(
        name="accepts-squeezed",
        kind="exception for a batch of one row",
        trigger="DRAFT_EXTEND in a bucket of one",
        module="python_loop",
        changes={
            "        return kv_lens, inputs.accept_lens[: inputs.batch_size].tolist()\n": (
                "        return kv_lens, inputs.accept_lens[: inputs.batch_size].squeeze().tolist()\n"
            )
        },
        codes=(Code.EXCEPTION,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="longest-of-no-rows",
        kind="exception for an empty batch",
        trigger="DRAFT_EXTEND in which nothing was accepted",
        module="triton_fused",
        changes={"    longest = _longest(inputs, kv_lens, setup)\n": "    longest = int(expanded.amax().item())\n"},
        codes=(Code.EXCEPTION,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="searches-work-for-ever",
        kind="loop that never ends for an all-zero batch",
        trigger="a schedule, and all lengths 0: an idle batch with fill 0",
        module="python_loop",
        changes={
            "    row, before = 0, 0\n": (
                "    row, before = 0, 0\n"
                "    while not segments[row]:  # the first row that has work\n"
                "        row = (row + 1) % len(segments)\n"
            )
        },
        codes=(Code.HANG,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="host-lengths-assumed",
        kind="an optional input taken for granted",
        trigger="no seq_lens_cpu",
        module="python_loop",
        changes={
            "    lengths = inputs.seq_lens if inputs.seq_lens_cpu is None else inputs.seq_lens_cpu\n": (
                "    lengths = inputs.seq_lens_cpu\n"
            )
        },
        codes=(Code.EXCEPTION,),
        seen_by=(EAGER,),
        size=Size(rows=1, length=1),
    ),
)
"""They are right when they are called, or wrong in what no value shows."""
