"""The one launch from the inputs to every buffer: offsets, closed forms, tiles, strides of steps."""

from __future__ import annotations

from typing import Final

from nsa_verify.core.findings import Code
from nsa_verify.mutants.mutant import LEFT, Mutant, Size

ONEPASS: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="rows-before-the-block-forgotten",
        kind="prefix sum right up to one block",
        trigger="ragged, more requests than the 16 of a block (1 on a GPU)",
        module="onepass",
        changes={"            row = before + tl.associative_scan": "            row = tl.associative_scan"},
        codes=(Code.WRONG_VALUE, *LEFT, Code.FROZEN, Code.FRAME_WRITTEN, Code.NOT_DETERMINISTIC),
        size=Size(replays=1, rows=17, length=1),
    ),
    Mutant(
        name="stride-of-step-0",
        kind="a row stride taken for another's",
        trigger="two steps with tables of different strides, and two rows",
        module="onepass",
        changes={
            "stride = table_strides[step if len(table_strides) > 1 else 0]\n": "stride = table_strides[0]\n",
        },
        codes=(*LEFT, Code.FRAME_WRITTEN, Code.WRONG_VALUE),
        size=Size(replays=1, rows=2, length=2),
    ),
    Mutant(
        name="segments-of-a-request-miscounted",
        kind="a sum in closed form off by one",
        trigger="a schedule, and two tokens",
        module="onepass",
        changes={
            "high_end * (high - 128 * (high_end - 1)) - low_end * (low - 128 * (low_end - 1))\n": (
                "high_end * (high - 128 * (high_end - 1)) - low_end * (low - 128 * low_end)\n"
            )
        },
        codes=(Code.WRONG_VALUE,),
        size=Size(replays=1, rows=2, length=2),
    ),
    Mutant(
        name="negative-lengths-in-the-closed-form",
        kind="negative lengths on padded rows",
        trigger="DRAFT_EXTEND_V2, two padded rows whose lengths begin below 0",
        module="onepass",
        changes={
            "    low = tl.maximum(kv_len - accept, 0)\n    high_cut": "    low = kv_len - accept\n    high_cut",
        },
        codes=(Code.WRONG_VALUE, Code.INVARIANT),
        size=Size(replays=1, rows=8, length=1),
    ),
    Mutant(
        name="last-tile-left",
        kind="a loop that ends a tile early",
        trigger="a request that ends within a tile",
        module="onepass",
        changes={"        while start < end:\n": "        while start + COLUMNS <= end:\n"},
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=1, rows=1, length=1),
    ),
)
