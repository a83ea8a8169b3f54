"""What one replay leaves for the next, what steps share, what a copy forgets."""

from __future__ import annotations

from typing import Final

from nsa_verify.core.findings import Code
from nsa_verify.mutants.mutant import EAGER, GRAPH, LEFT, Mutant, Size

_STEPS: Final = "    for step in steps:\n        _refresh_step(inputs, step, setup)\n"
_SEQ_LENS: Final = "    seq_lens = inputs.seq_lens[: inputs.batch_size]\n"
_ACCUMULATE: Final = "    _accumulate(step.cache_seqlens, step.cu_seqlens_k)\n"

SEQUENCES: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="earlier-replay-left",
        kind="a cumulative tail left from a larger batch",
        trigger="a longer request, then a shorter one",
        module="python_loop",
        changes={
            "out[1 : count + 1].copy_(torch.cumsum(lengths, dim=0, dtype=torch.int32))": (
                "out[1 : count + 1].copy_("
                "torch.maximum(out[1 : count + 1], torch.cumsum(lengths, dim=0, dtype=torch.int32)))"
            )
        },
        codes=(Code.STALE,),
        seen_by=(EAGER,),
        size=Size(replays=2, length=2),
    ),
    Mutant(
        name="tail-never-runs-backwards",
        kind="a cumulative tail left from a larger batch",
        trigger="two requests in one bucket, then shorter ones",
        module="vectorized",
        changes={
            _ACCUMULATE: (
                "    earlier = step.cu_seqlens_k[2:].clone()\n"
                f"{_ACCUMULATE}"
                "    torch.maximum(step.cu_seqlens_k[2:], earlier, out=step.cu_seqlens_k[2:])\n"
            )
        },
        codes=(Code.STALE,),
        size=Size(replays=2, rows=2, length=2),
    ),
    Mutant(
        name="maximum-taken-for-the-batch",
        kind="a cache keyed on too little",
        trigger="two batches whose longest requests are of one length; or aliased seq_lens",
        module="vectorized",
        changes={
            _SEQ_LENS: _SEQ_LENS + "    same = step.cache_seqlens.amax() == seq_lens.amax()\n",
            _ACCUMULATE: (
                "    earlier = step.cu_seqlens_k.clone()\n"
                f"{_ACCUMULATE}"
                "    step.cu_seqlens_k.copy_(torch.where(same, earlier, step.cu_seqlens_k))\n"
            ),
        },
        codes=LEFT,
        size=Size(replays=2, rows=2, length=4),
    ),
    Mutant(
        name="padding-of-one-field",
        kind="padding of one field forgotten",
        trigger="a longer request, then padding",
        module="precomputed_copy",
        changes={
            "    step.nsa_cache_seqlens[:rows].copy_(precomputed.nsa_cache_seqlens)\n": (
                "    kept = step.nsa_cache_seqlens[:rows]\n"
                "    good_enough = (precomputed.seqlens_expanded <= 1) & (kept > 0)\n"
                "    kept.copy_(torch.where(good_enough, kept, precomputed.nsa_cache_seqlens))\n"
            )
        },
        codes=(Code.STALE,),
        size=Size(replays=2, length=2),
    ),
    Mutant(
        name="lengths-only-grow",
        kind="stale rows when the batch shrinks",
        trigger="a longer request, then a shorter one, not in decode",
        module="precomputed_batched_copy",
        changes={
            "                tl.store(to_expanded[step] + row, length, mask=defined)\n": (
                "                held = tl.load(to_expanded[step] + row, mask=defined)\n"
                "                tl.store(to_expanded[step] + row, tl.maximum(length, held), mask=defined)\n"
            )
        },
        codes=(Code.STALE,),
        size=Size(replays=2, length=2),
    ),
    Mutant(
        name="rows-of-the-same-length-kept",
        kind="only what changed is copied, by a wrong comparison",
        trigger="a request, then another of the same length; or aliased seq_lens",
        module="vectorized",
        changes={
            _SEQ_LENS: _SEQ_LENS + "    same = step.cache_seqlens == seq_lens\n",
            "    step.page_table_1[:rows].copy_(page_table)\n": (
                "    kept = same.index_select(0, owner).unsqueeze(1)\n"
                "    step.page_table_1[:rows].copy_(torch.where(kept, step.page_table_1[:rows], page_table))\n"
            ),
        },
        codes=LEFT,
        size=Size(replays=2, length=2),
    ),
    Mutant(
        name="nothing-accepted-nothing-refreshed",
        kind="early return that leaves what is defined",
        trigger="nothing is accepted",
        module="python_loop",
        changes={
            "    added = setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0\n": (
                "    added = setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0\n"
                "    if not sum(extend_lens):\n"
                "        step.nsa_cu_seqlens_k[:1].zero_()\n"
                "        return\n"
            )
        },
        codes=LEFT,
        seen_by=(EAGER,),
        size=Size(replays=2, length=2),
    ),
    Mutant(
        name="map-of-the-previous-mode",
        kind="a map left from the previous mode",
        trigger="verify, then decode of two requests on different pool rows",
        module="vectorized",
        changes={
            "def _expand(": "_maps: dict[tuple[int, int, torch.device], Tensor] = {}\n\n\ndef _expand(",
            "        return requests, seq_lens\n": (
                "        long_enough = (owner for owner in _maps.values() if owner.shape[0] >= batch_size)\n"
                "        return next(long_enough, requests)[:batch_size], seq_lens\n"
            ),
            "    return requests.repeat_interleave(tokens), (": (
                "    key = batch_size, tokens, device\n"
                "    if key not in _maps:\n"
                "        _maps[key] = requests.repeat_interleave(tokens)\n"
                "    return _maps[key], ("
            ),
        },
        codes=(Code.FROZEN, Code.WRONG_VALUE),
        seen_by=(GRAPH,),
        size=Size(replays=3, rows=4),
    ),
    Mutant(
        name="width-of-the-first-call",
        kind="a cache keyed on too little that survives calls",
        trigger="a request, then a longer one in the same mode and bucket",
        module="python_loop",
        changes={
            "from torch import Tensor\n": "from torch import Tensor\n\n_widths: dict[tuple[str, int], int] = {}\n",
            "    added = setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0\n": (
                "    added = setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0\n"
                "    if step.nsa_cu_seqlens_k[0] != 0:  # nothing was written so far\n"
                "        _widths[mode, batch_size] = min(_longest(inputs, setup), setup.table_width)\n"
            ),
            "    width = min(_longest(inputs, setup), setup.table_width)\n": "    width = _widths[mode, batch_size]\n",
        },
        codes=(*LEFT, Code.FRAME_WRITTEN),
        seen_by=(EAGER,),
        size=Size(replays=2, length=2),
    ),
    Mutant(
        name="every-third-replay",
        kind="wrong on every third replay only",
        trigger="a graph that is replayed until its counter reaches a multiple of 3",
        module="vectorized",
        changes={
            "from torch import Tensor\n": "from torch import Tensor\n\n_turns: dict[torch.device, Tensor] = {}\n",
            _STEPS: (
                "    device = inputs.seq_lens.device\n"
                "    if device not in _turns:\n"
                "        _turns[device] = torch.zeros((), dtype=torch.int64, device=device)\n"
                "    turn = _turns[device].add_(1)\n"
                f"{_STEPS}"
                "        step.cache_seqlens.add_(turn % 3 == 0)\n"
            ),
        },
        codes=(
            Code.WRONG_VALUE,
            Code.NOT_IDEMPOTENT,
            Code.NOT_DETERMINISTIC,
        ),  # the graph may have been replayed before
        seen_by=(GRAPH,),
        size=Size(replays=3),
    ),
    Mutant(
        name="same-batch-added-twice",
        kind="a step taken for the next one since its batch is the same",
        trigger="the same batch twice",
        module="vectorized",
        changes={
            "    step.page_table_1[:rows].copy_(page_table)\n": (
                "    again = (step.page_table_1[:rows] == page_table).all() & (page_table != 0).any()\n"
                "    step.page_table_1[:rows].copy_(page_table)\n"
                "    step.cu_seqlens_k[1:] += again\n"
            ),
        },
        codes=(Code.NOT_IDEMPOTENT, Code.STALE, Code.WRONG_VALUE, Code.INVARIANT),
        size=Size(replays=2, length=2),
    ),
    Mutant(
        name="last-step-not-written",
        kind="a step of the fan-out skipped",
        trigger="two steps",
        module="vectorized",
        changes={"    for step in steps:\n": "    for step in steps[: max(1, len(steps) - 1)]:\n"},
        codes=LEFT,
    ),
    Mutant(
        name="only-step-0",
        kind="only step 0 refreshed",
        trigger="two steps",
        module="triton_inplace",
        changes={"    for step in steps:\n": "    for step in steps[:1]:\n"},
        codes=LEFT,
    ),
    Mutant(
        name="schedule-of-step-0-only",
        kind="only step 0 refreshed",
        trigger="two steps with a schedule",
        module="precomputed_copy",
        changes={
            "if schedule is not None and step.paged_mqa_schedule is not None:\n": (
                "if schedule is not None and step.paged_mqa_schedule is not None and step is steps[0]:\n"
            )
        },
        codes=LEFT,
    ),
    Mutant(
        name="expanded-skipped-in-verify",
        kind="a field skipped in the copy",
        trigger="verify",
        module="precomputed_copy",
        changes={"    if mode is not Mode.DECODE:\n": "    if mode not in (Mode.DECODE, Mode.TARGET_VERIFY):\n"},
        codes=LEFT,
    ),
    Mutant(
        name="view-that-the-next-step-overwrites",
        kind="step k's output is a view that step k+1 overwrites",
        trigger="decode in two steps",
        module="vectorized",
        changes={
            _STEPS: (
                "    moving = inputs.seq_lens[: inputs.batch_size].clone()\n"
                "    views = []\n"
                "    for number, step in enumerate(steps):\n"
                "        _refresh_step(inputs, step, setup)\n"
                "        moving.add_(min(number, 1))  # a draft step is a token further\n"
                "        views.append(moving[:])\n"
                "    if inputs.mode is Mode.DECODE:\n"
                "        for number, (step, view) in enumerate(zip(steps, views, strict=True)):\n"
                "            step.cache_seqlens.copy_(view - number)\n"
            )
        },
        codes=(Code.WRONG_VALUE,),
    ),
    Mutant(
        name="pages-divided-in-place",
        kind="a buffer used again by the next step",
        trigger="two steps, and pages of several tokens",
        module="triton_fused",
        changes={
            "page_table[:, :: setup.page_size] // setup.page_size": (
                "page_table[:, :: setup.page_size].floor_divide_(setup.page_size)"
            )
        },
        codes=(Code.WRONG_VALUE,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="alias-zeroed-before-it-is-read",
        kind="input and output are the same memory",
        trigger="decode with aliased seq_lens",
        module="vectorized",
        changes={"step.cache_seqlens.copy_(seq_lens)": "step.cache_seqlens.zero_().add_(seq_lens)"},
        codes=(Code.WRONG_VALUE,),
    ),
)
