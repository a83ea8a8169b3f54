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
        changes={"    while start < end:\n": "    while start + COLUMNS <= end:\n"},
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=1, rows=1, length=1),
    ),
    Mutant(
        name="only-the-first-requests-before-counted",
        kind="a loop that never comes to its second round",
        trigger="ragged, more requests than the 16 of a block on a CPU, than the 8 that are summed at a time on a GPU",
        module="onepass",
        changes={"                before += tl.reduce(counted_wide, 0, _SUM)\n": ""},
        codes=(Code.WRONG_VALUE, *LEFT, Code.FROZEN, Code.FRAME_WRITTEN, Code.NOT_DETERMINISTIC),
        size=Size(replays=1, rows=18, length=1),
    ),
    Mutant(
        name="tile-between-two-shares-left",
        kind="work dealt out with the remainder forgotten",
        trigger="a row longer than its head, whose other tiles are shared by two programs",
        module="onepass",
        changes={"tl.minimum(tiles, (high - weight + cost - 1) // cost)": "tl.minimum(tiles, (high - weight) // cost)"},
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=1, rows=1, length=257),
    ),
    Mutant(
        name="rows-of-earlier-portions-forgotten",
        kind="prefix sum right up to one block",
        trigger="ragged, a long row behind rows of another portion of the batch",
        module="onepass",
        changes={
            "tl.where(mine, tl.associative_scan(rows, 0, _SUM) - rows, 0)": "tl.where(mine, rows - rows, 0)",
        },
        codes=(*LEFT, Code.WRONG_VALUE, Code.FRAME_WRITTEN, Code.NOT_DETERMINISTIC),
        size=Size(replays=1, rows=6, length=257),
    ),
    Mutant(
        name="first-portion-of-a-share-alone",
        kind="a share that ends where it changes hands",
        trigger="two long rows in two portions of the batch, in one program's share",
        module="onepass",
        changes={"            reached = weight\n": "            reached = high\n"},
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=1, rows=16, length=900),
    ),
    Mutant(
        name="request-behind-the-owner-passed",
        kind="a search that goes on behind what it looks for",
        trigger="a schedule, and more requests than portions: a short one behind a long one",
        module="onepass",
        changes={"        ahead = ahead & (first + place": "        ahead = (first + place"},
        codes=(Code.WRONG_VALUE, Code.INVARIANT),
        size=Size(replays=1, rows=10, length=600),
    ),
)
