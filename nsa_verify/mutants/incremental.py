"""What refreshes only what it takes for new: requests that stay, go on, leave or join, and histories that fill up."""

from __future__ import annotations

from typing import Final

from nsa_verify.core.findings import Code
from nsa_verify.mutants.mutant import EAGER, LEFT, Mutant, Size

_IMPORTS: Final = "from torch import Tensor\n"
_ADDED: Final = "    added = setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0\n"
_WIDTH: Final = "    width = min(_longest(inputs, setup), setup.table_width)\n"
_PAGE_TABLE: Final = "    step.page_table_1[:rows, :width].copy_(page_indices)\n"

_REMEMBERS: Final = {
    _IMPORTS: _IMPORTS + "\n_batches: dict[int, tuple[object, list[int], list[int]]] = {}\n",
    _ADDED: (
        f"{_ADDED}"
        "    memory, pool_rows = step.page_table_1.data_ptr(), inputs.req_pool_indices[:batch_size].tolist()\n"
        "    if step.page_table_1[0, 0] < 0:  # nothing was written so far\n"
        "        _batches.pop(memory, None)\n"
        "    shape, rows_before, lens_before = _batches.get(memory, (None, [], []))\n"
        "    _batches[memory] = (mode, extend_lens), pool_rows, kv_lens\n"
    ),
}
"""What was refreshed last in the same memory: ``shape``, ``rows_before`` and ``lens_before``."""
_GROWN: Final = (
    "    growth = setup.num_draft_tokens if mode is Mode.DRAFT_EXTEND_V2 else 1\n"
    "    longer = [length + growth for length in lens_before]\n"
)

INCREMENTAL: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="tables-kept-while-lengths-stay",
        kind="only what changed is refreshed, by a wrong comparison",
        trigger="the same requests of the same lengths again, their slots in req_to_token others",
        module="python_loop",
        changes={
            **_REMEMBERS,
            _WIDTH: (
                "    if ((mode, extend_lens), pool_rows, kv_lens) == (shape, rows_before, lens_before):\n"
                "        return\n"
                f"{_WIDTH}"
            ),
        },
        codes=(Code.STALE,),
        seen_by=(EAGER,),
        size=Size(replays=2),
    ),
    Mutant(
        name="only-new-columns-where-all-went-on",
        kind="only what changed is refreshed, by a wrong comparison",
        trigger="two requests, both again and longer by what the mode adds, their slots in req_to_token others",
        module="python_loop",
        changes={
            **_REMEMBERS,
            _WIDTH: _WIDTH + _GROWN,
            _PAGE_TABLE: (
                "    went_on = shape == (mode, extend_lens) and (pool_rows, kv_lens) == (rows_before, longer)\n"
                "    first_new = min(lens_before) if went_on and batch_size > 1 else 0\n"
                "    step.page_table_1[:rows, first_new:width].copy_(page_indices[:, first_new:])\n"
            ),
        },
        codes=(Code.STALE,),
        seen_by=(EAGER,),
        size=Size(replays=2, rows=4, length=4),
    ),
    Mutant(
        name="row-moved-up-when-the-first-left",
        kind="a compaction that forgets the new token",
        trigger="two requests, then the second of them alone, longer by what the mode adds",
        module="python_loop",
        changes={
            **_REMEMBERS,
            _WIDTH: (
                f"{_WIDTH}{_GROWN}"
                "    tokens = extend_lens[0]\n"
                "    left = pool_rows[0] in rows_before[1:2] and kv_lens[0] in longer[1:2] and rows >= 2 * tokens\n"
                "    moved = step.page_table_1[tokens : 2 * tokens, :width].clone()\n"
            ),
            _PAGE_TABLE: f"{_PAGE_TABLE}    if left:\n        step.page_table_1[:tokens, :width].copy_(moved)\n",
        },
        codes=LEFT,
        seen_by=(EAGER,),
        size=Size(replays=3, rows=4, length=4),
    ),
    Mutant(
        name="only-those-that-joined",
        kind="only what changed is refreshed, by a wrong comparison",
        trigger="a request, then the same one, longer by what the mode adds, and another behind it",
        module="python_loop",
        changes={
            **_REMEMBERS,
            _WIDTH: (
                f"{_WIDTH}{_GROWN}"
                "    fill = setup.fill_seq_len + added\n"
                "    earlier, real = (sum(it != fill for it in lens) for lens in (lens_before, kv_lens))\n"
            ),
            _PAGE_TABLE: (
                "    went_on = shape is not None and shape[0] is mode and 0 < earlier < real\n"
                "    went_on = went_on and shape[1][:earlier] == extend_lens[:earlier]\n"
                "    went_on = went_on and pool_rows[:earlier] == rows_before[:earlier]\n"
                "    went_on = went_on and kv_lens[:earlier] == longer[:earlier]\n"
                "    joined = sum(extend_lens[:earlier]) if went_on else 0\n"
                "    step.page_table_1[joined:rows, :width].copy_(page_indices[joined:])\n"
                "    earlier_width = min(max(lens_before, default=0), width)\n"
                "    step.page_table_1[:joined, :earlier_width].copy_(page_indices[:joined, :earlier_width])\n"
            ),
        },
        codes=LEFT,
        seen_by=(EAGER,),
        size=Size(replays=3, rows=4, length=6),
    ),
    Mutant(
        name="no-room-for-a-fifth-batch",
        kind="a history that fills up",
        trigger="five batches, each other than the one before",
        module="python_loop",
        changes={
            _IMPORTS: _IMPORTS + "\n_histories: dict[int, list[object]] = {}\n",
            _ADDED: (
                f"{_ADDED}"
                "    history = _histories.setdefault(step.page_table_1.data_ptr(), [])\n"
                "    if step.nsa_cu_seqlens_k[0] != 0:  # nothing was written so far\n"
                "        history.clear()\n"
                "    if history[-1:] != [(mode, kv_lens, extend_lens)]:\n"
                "        if len(history) == 4:\n"
                "            return\n"
                "        history.append((mode, kv_lens, extend_lens))\n"
            ),
        },
        codes=LEFT,
        seen_by=(EAGER,),
        size=Size(replays=5, rows=2, length=3),
    ),
)
