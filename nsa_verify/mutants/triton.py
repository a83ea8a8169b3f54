"""In Triton kernels: widths, blocks, grids, masks, addresses, searches, races."""

from __future__ import annotations

from typing import Final

from nsa_verify.core.findings import Code
from nsa_verify.mutants.mutant import EAGER, LEFT, Mutant, Size

_COPIED_ROW: Final = "    row = block * LANES + tl.arange(0, LANES)\n"
_LANES_GRID: Final = "(triton.cdiv(batch_size * bound, _LANES), programs)"
_REACH: Final = "    reach = tl.minimum(kv_len, width)\n"
_POOL_ROW: Final = (
    "    pool_row = tl.load(pool_indices + request * pool_stride, mask=held, other=0).to(tl.int64)\n"
    "    source = (req_to_token + pool_row * token_stride)[:, None]\n"
)
_INPLACE_POOL_ROW: Final = (
    "        pool_row = tl.load(pool_indices + request * pool_stride, mask=defined).to(tl.int64)\n"
)
_NSA_ENDS: Final = "_SUM) + nsa_sum, mask=defined)\n"

_BLOCKS: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="block-offset-missing",
        kind="block offset missing in a tiled kernel",
        trigger="more expanded rows than one block of 32",
        module="precomputed_batched_copy",
        changes={_COPIED_ROW: "    row = tl.arange(0, LANES).to(tl.int64)\n"},
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=1, rows=40, length=1),  # rows come in groups of N
    ),
    Mutant(
        name="blocks-past-the-axis",
        kind="more rows than an axis of the grid has programs",
        trigger="more expanded rows than two blocks of 32, which stand for the 65,535 of an axis",
        module="precomputed_batched_copy",
        changes={"tl.program_id(0).to(tl.int64)\n    turn": "tl.program_id(0).to(tl.int64) & 1\n    turn"},
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=1, rows=72, length=1),  # rows come in groups of N
    ),
    Mutant(
        name="tile-offset-missing",
        kind="block offset missing in a tiled kernel",
        trigger="a request longer than one tile of 128 columns, of 512 on a GPU",
        module="precomputed_batched_copy",
        changes={
            "        column = offset + start\n        live = column[None, :] < reach[:, None]": (
                "        column = offset\n        live = column[None, :] < reach[:, None]"
            )
        },
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=1, rows=1, length=513),
    ),
    Mutant(
        name="last-block-not-launched",
        kind="grid rounded down",
        trigger="more requests and tokens than the 32 lanes of a program, and no multiple of it",
        module="triton_inplace",
        changes={_LANES_GRID: "(max(batch_size * bound // _LANES, 1), programs)"},
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=1, rows=40, length=1),  # rows come in groups of N
    ),
    Mutant(
        name="sum-restarts-at-a-block",
        kind="prefix sum right up to one block",
        trigger="more requests and tokens than the 32 lanes of a program",
        module="triton_inplace",
        changes={" + kv_sum\n": "\n"},
        codes=(Code.INVARIANT,),
        size=Size(replays=1, rows=33, length=1),
    ),
    Mutant(
        name="one-schedule-entry-too-many",
        kind="mask with <= for <",
        trigger="a schedule",
        module="triton_inplace",
        changes={"    written = entry <= num_sms\n": "    written = entry <= num_sms + 1\n"},
        codes=(Code.GUARD_WRITTEN,),
    ),
    Mutant(
        name="one-page-too-many",
        kind="page count rounded up where it is exact",
        trigger="a KV length that is a multiple of the page size, and less than the table is wide",
        module="precomputed_batched_copy",
        changes={
            "pages = (reach + (1 << page_shift) - 1) >> page_shift": (
                "pages = tl.minimum((reach >> page_shift) + 1, real_width) * defined.to(tl.int64)"
            )
        },
        codes=(Code.FRAME_WRITTEN,),
        size=Size(replays=1, rows=1, length=16),
    ),
    Mutant(
        name="last-block-not-masked",
        kind="mask missing on the last block",
        trigger="fewer expanded rows than a multiple of a block",
        module="precomputed_batched_copy",
        changes={
            "tl.store(to_nsa_cache_seqlens[step] + row, clamped, mask=defined)": (
                "tl.store(to_nsa_cache_seqlens[step] + row, clamped)"
            )
        },
        codes=(Code.GUARD_WRITTEN, Code.FRAME_WRITTEN),  # the latter where blocks are of one row, as on a GPU
    ),
    Mutant(
        name="rows-past-the-total-copied",
        kind="mask by the captured rows instead of the defined ones",
        trigger="ragged, with fewer tokens accepted than captured",
        module="precomputed_batched_copy",
        changes={
            "tl.store(to_expanded[step] + row, length, mask=defined)": (
                "tl.store(to_expanded[step] + row, length, mask=captured)"
            )
        },
        codes=(Code.FRAME_WRITTEN,),
        size=Size(replays=1, rows=2, length=2),
    ),
    Mutant(
        name="tile-bound-without-draft-tokens",
        kind="live length without the draft tokens",
        trigger="TARGET_VERIFY of a committed length of 0 (fill 0), or at the end of a tile of 128",
        module="triton_inplace",
        changes={
            "((kv_len + (COLUMNS - 1)) & -COLUMNS, width)": "((kv_len - added + (COLUMNS - 1)) & -COLUMNS, width)"
        },
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=2, rows=8, length=129),
    ),
    Mutant(
        name="wall-rounded-up-to-the-page",
        kind="columns clipped to the pages' end instead of the table's",
        trigger="a KV length past a table whose width is no multiple of the page size",
        module="triton_inplace",
        changes={
            "        reach = tl.minimum((kv_len + (COLUMNS - 1)) & -COLUMNS, width) * counted\n": (
                "        pages = (width + (1 << page_shift) - 1) >> page_shift\n"
                "        reach = tl.minimum(kv_len, pages << page_shift) * counted\n"
            )
        },
        codes=(Code.FRAME_WRITTEN, Code.GUARD_WRITTEN, Code.WRONG_VALUE, Code.NOT_DETERMINISTIC),
        size=Size(replays=1, rows=2, length=2),
    ),
    Mutant(
        name="ceiling-by-negation",
        kind="truncation where the floor is meant",
        trigger="a KV length that is no multiple of the page size",
        module="precomputed_batched_copy",
        changes={"pages = (reach + (1 << page_shift) - 1) >> page_shift": "pages = -(-reach // (1 << page_shift))"},
        codes=LEFT,
    ),
    Mutant(
        name="loads-past-the-pool-row",
        kind="out-of-bounds read that changes nothing",
        trigger="any request shorter than its tile, on the last pool row; only a sanitizer can see it",
        module="precomputed_batched_copy",
        changes={
            "        slot = tl.load(source + column[None, :], mask=live)\n": (
                "        slot = tl.load(source + column[None, :])\n"
            )
        },
        codes=(),
        seen_by=(),
    ),
)
_ADDRESSES: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="sums-in-16-bits",
        kind="prefix sum narrowed to 16 bits",
        trigger="KV lengths whose sum is 2**15 or more",
        module="triton_inplace",
        changes={" + kv_sum\n": " + kv_sum\n            kv_ends = kv_ends.to(tl.int16)\n"},
        codes=(Code.INVARIANT,),
        size=Size(replays=1, rows=40, length=32768),  # fewer rows, or shorter ones: neither leads to the other
    ),
    Mutant(
        name="row-offset-in-16-bits",
        kind="row times stride narrowed",
        trigger="a pool row that begins 2**16 elements or more behind the first",
        module="precomputed_batched_copy",
        changes={
            "    source = (req_to_token + pool_row * token_stride)[:, None]\n": (
                "    source = (req_to_token + (pool_row * token_stride).to(tl.uint16).to(tl.int64))[:, None]\n"
            )
        },
        codes=(*LEFT, Code.WRONG_VALUE, Code.INVARIANT),
        size=Size(replays=1, rows=1, length=1),
    ),
    Mutant(
        name="pool-rows-read-as-int32",
        kind="pointer cast to the narrower integer",
        trigger="int64 req_pool_indices, two requests, the second on another pool row than the first one",
        module="precomputed_batched_copy",
        changes={
            _POOL_ROW: (
                "    indices = pool_indices.to(tl.pointer_type(tl.int32))\n"
                + _POOL_ROW.replace("pool_indices +", "indices +")
            )
        },
        codes=(Code.WRONG_VALUE,),
        size=Size(replays=1, rows=2, length=1),
    ),
    Mutant(
        name="ragged-stride-ignored",
        kind="element stride of an input ignored",
        trigger="ragged, two requests of strided seq_lens",
        module="triton_fused",
        changes={
            "seq_len = tl.load(seq_lens + owner * seq_stride, mask=used, other=0).to(tl.int64)\n    extend_len": (
                "seq_len = tl.load(seq_lens + owner, mask=used, other=0).to(tl.int64)\n    extend_len"
            )
        },
        codes=(Code.WRONG_VALUE,),
        seen_by=(EAGER,),
        size=Size(replays=1, rows=2, length=1),
    ),
    Mutant(
        name="table-stride-of-the-first-step",
        kind="row strides of two steps confused",
        trigger="two steps with different row strides, two rows",
        module="precomputed_batched_copy",
        changes={"(row * table_strides[step] - row >> 1)": "(row * table_strides[0] - row >> 1)"},
        codes=(Code.FRAME_WRITTEN, *LEFT),
        size=Size(replays=1, rows=2, length=1),
    ),
    Mutant(
        name="pages-of-every-second-step",
        kind="step pointer wrong in the fan-out copy",
        trigger="two steps and pages",
        module="precomputed_batched_copy",
        changes={
            "target = to_real_table[step] + (row * real_strides[step] - row >> 1)": (
                "target = to_real_table[step // 2] + (row * real_strides[step // 2] - row >> 1)"
            ),
        },
        codes=LEFT,
    ),
    Mutant(
        name="field-not-copied",
        kind="field skipped in the fan-out copy",
        trigger="any request",
        module="precomputed_batched_copy",
        changes={"            tl.store(to_nsa_cache_seqlens[step] + row, clamped, mask=defined)\n": ""},
        codes=LEFT,
    ),
    Mutant(
        name="page-shift-on-the-column-only",
        kind="page rescale forgotten",
        trigger="pages of more than one token",
        module="triton_inplace",
        changes={"page[None, :], slot >> page_shift, mask=mask)": "page[None, :], slot, mask=mask)"},
        codes=(Code.WRONG_VALUE,),
    ),
    Mutant(
        name="slots-rebuilt-from-pages",
        kind="slots taken for page aligned",
        trigger="pages, and a request whose slots are scattered",
        module="triton_inplace",
        changes={
            "            slot = tl.load(source[:, None] + columns[None, :], mask=mask)\n": (
                "            offset = columns & (1 << page_shift) - 1\n"
                "            leader = tl.load(source[:, None] + (columns - offset)[None, :], mask=mask)\n"
                "            slot = (leader >> page_shift << page_shift) + offset[None, :]\n"
            )
        },
        codes=(Code.WRONG_VALUE,),
    ),
    Mutant(
        name="short-rows-on-the-first-pool-row",
        kind="padded rows told by their length",
        trigger="two rows, one of length 1 that is not on the first one's pool row",
        module="triton_inplace",
        changes={
            _INPLACE_POOL_ROW: _INPLACE_POOL_ROW + "        padded = kv_len - added <= 1\n"
            "        pool_row = tl.where(padded, tl.load(pool_indices).to(tl.int64), pool_row)\n"
        },
        codes=(Code.WRONG_VALUE,),
        size=Size(replays=1, rows=2, length=1),
    ),
    Mutant(
        name="lengths-kept-by-pool-row",
        kind="requests that share a pool row confused",
        trigger="two requests on one pool row, the later one shorter",
        module="precomputed_batched_copy",
        changes={
            "    page_indices, real_page_table = _gather(inputs, cache_seqlens, setup)\n": (
                "    pool_rows = inputs.req_pool_indices[:batch_size].to(torch.int64)\n"
                "    kept = cache_seqlens.new_zeros(setup.pool_rows).scatter_(0, pool_rows, cache_seqlens)\n"
                "    page_indices, real_page_table = _gather(inputs, kept.index_select(0, pool_rows), setup)\n"
            )
        },
        codes=LEFT,
        size=Size(replays=1, rows=2, length=2),
    ),
)
_ROWS: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="binary-search-stops-at-a-hit",
        kind="search among equal offsets",
        trigger="ragged, three requests of which one accepted nothing",
        module="triton_fused",
        changes={
            "    extend_lens: tl.tensor,  # [B]\n": (
                "    extend_lens: tl.tensor,  # [B]\n    starts: tl.tensor,  # [B]\n"
            ),
            '["extend_lens", "seq_lens", "out_expanded", "out_clamped"]': (
                '["extend_lens", "starts", "seq_lens", "out_expanded", "out_clamped"]'
            ),
            "            extend_seq_lens,\n            extend_seq_lens.stride(0),\n            seq_lens,\n": (
                "            extend_seq_lens,\n"
                "            extend_seq_lens.cumsum(0) - extend_seq_lens,\n"
                "            extend_seq_lens.stride(0),\n"
                "            seq_lens,\n"
            ),
            (
                "    lane = tl.arange(0, REQUESTS).to(tl.int64)\n"
                "    owner = tl.full((ROWS,), 0, tl.int64)\n"
                "    first = tl.full((ROWS,), 0, tl.int64)\n"
                "    total = tl.full((), 0, tl.int64)\n"
                "    for start in range(0, batch_size, REQUESTS):\n"
                "        request = lane + start\n"
                "        lens = tl.load(extend_lens + request * extend_stride, mask=request < batch_size, other=0)"
                ".to(tl.int64)\n"
                "        ends = tl.associative_scan(lens, 0, _SUM) + total\n"
                "        # Lanes past the batch repeat the total, which no row in use has reached.\n"
                "        done = ends[None, :] <= row[:, None]  # [ROWS, REQUESTS]\n"
                "        owner += tl.reduce(done.to(tl.int64), 1, _SUM)\n"
                "        first = tl.maximum(first, tl.reduce(tl.where(done, ends[None, :], 0), 1, _MAX))\n"
                "        total += tl.reduce(lens, 0, _SUM)\n"
                "    used = row < rows\n"
            ): (
                "    used = row < rows\n"
                "    owner = tl.full((ROWS,), 0, tl.int64)\n"
                "    end = tl.full((ROWS,), 0, tl.int64) + batch_size\n"
                "    for _ in range(17):\n"
                "        middle = (owner + end) // 2\n"
                "        start = tl.load(starts + middle, mask=used, other=0)\n"
                "        owner = tl.where(start <= row, middle, owner)\n"
                "        end = tl.where(start < row, end, middle)\n"
                "    first = tl.load(starts + owner, mask=used, other=0)\n"
            ),
        },
        codes=(Code.WRONG_VALUE,),
        seen_by=(EAGER,),
        size=Size(replays=1, rows=3, length=1),
    ),
    Mutant(
        name="empty-requests-not-counted",
        kind="search that leaves out requests which accepted nothing",
        trigger="ragged, a request that accepted nothing before one that did",
        module="triton_fused",
        changes={
            "        owner += tl.reduce(done.to(tl.int64), 1, _SUM)\n": (
                "        owner += tl.reduce((done & (lens > 0)[None, :]).to(tl.int64), 1, _SUM)\n"
            )
        },
        codes=(Code.WRONG_VALUE,),
        seen_by=(EAGER,),
        size=Size(replays=1, rows=2, length=2),
    ),
    Mutant(
        name="zero-lengths-left-out-of-the-sum",
        kind="rows of length 0 skipped, and with them their sum",
        trigger="a padded row of length 0: fill 0, or V2 with two tokens",
        module="triton_inplace",
        changes={_NSA_ENDS: _NSA_ENDS.replace("mask=defined", "mask=defined & (clamped > 0)")},
        codes=(*LEFT, Code.INVARIANT),
        size=Size(replays=2, rows=16, length=4),
    ),
    Mutant(
        name="nothing-accepted-nothing-written",
        kind="early return that leaves the leading 0 unwritten",
        trigger="ragged, with nothing accepted",
        module="triton_inplace",
        changes={
            "            tl.store(nsa_cu_seqlens_k, 0)\n": (
                "            tl.store(nsa_cu_seqlens_k, 0, mask=tl.reduce(counted, 0, _MAX) > 0)\n"
            )
        },
        codes=(Code.INVARIANT, *LEFT),
    ),
    Mutant(
        name="row-bounded-by-its-own-length",
        kind="wrong with pages of one token only",
        trigger="p = 1, and two tokens outside DECODE",
        module="precomputed_batched_copy",
        changes={
            _REACH: _REACH + "    if not PAGED:\n"
            "        # The top-k transform alone reads the table then, and each row up to its own length.\n"
            "        own = tl.load(expanded + row, mask=defined, other=0).to(tl.int64)\n"
            "        reach = tl.minimum(own, width)\n"
        },
        codes=LEFT,
        size=Size(replays=2, rows=2, length=2),
    ),
    Mutant(
        name="ctx-lens-in-the-first-step",
        kind="one field written to the first step alone",
        trigger="TARGET_VERIFY with ctx lens of their own, and two steps",
        module="precomputed_batched_copy",
        changes={"cell = to_ctx_lens[step] +": "cell = to_ctx_lens[0] +"},
        codes=(*LEFT, Code.INVARIANT),
    ),
    Mutant(
        name="schedule-row-not-bounded",
        kind="search that saturates past the last row",
        trigger="a schedule",
        module="triton_inplace",
        changes={"tl.store(cell, tl.minimum(owner, count), mask=written)": "tl.store(cell, owner, mask=written)"},
        codes=(Code.WRONG_VALUE,),
    ),
    Mutant(
        name="sum-from-the-program-before",
        kind="race between programs",
        trigger="more requests and tokens than the 32 lanes of a program, on a GPU",
        module="triton_inplace",
        changes={
            "            kv_sum += tl.reduce(tl.where(held & (token == 0), kv_len, 0), 0, _SUM)\n": "",
            " + kv_sum\n": (
                "\n"
                "            # Where the program before stopped.\n"
                "            kv_ends += tl.load(cu_seqlens_k + first_lane // bound, mask=first_lane > 0, other=0)\n"
            ),
        },
        codes=(Code.INVARIANT, *LEFT, Code.WRONG_VALUE, Code.NOT_DETERMINISTIC, Code.NOT_IDEMPOTENT),
        size=Size(replays=2, rows=256, length=2),
        needs_gpu=True,
    ),
)

TRITON: Final[tuple[Mutant, ...]] = (*_BLOCKS, *_ADDRESSES, *_ROWS)
