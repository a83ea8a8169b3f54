"""Values, lengths, regions: one replay shows them."""

from __future__ import annotations

from typing import Final

from nsa_verify.core.findings import Code
from nsa_verify.mutants.mutant import EAGER, LEFT, Mutant, Size

_SEQ_LENS: Final = "    seq_lens = inputs.seq_lens[: inputs.batch_size]\n"
_GATHER: Final = "inputs.req_to_token[:, : setup.table_width].index_select(0, pool_rows)"
_COPY_TABLE: Final = "    step.page_table_1[:rows].copy_(page_table)\n"

VALUES: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="no-clamp-at-0",
        kind="padded rows underflow",
        trigger="a padded row whose fill is less than N - 1",
        module="python_loop",
        changes={"torch.cat(ranges).clamp(min=0)": "torch.cat(ranges)"},
        codes=(Code.INVARIANT,),
        seen_by=(EAGER,),
        size=Size(rows=3),
    ),
    Mutant(
        name="uniform-expansion-not-clamped",
        kind="padded rows underflow",
        trigger="V2 with a padded row whose fill is less than N - 1",
        module="vectorized",
        changes={"+ offsets).clamp(min=0)": "+ offsets)"},
        codes=(Code.INVARIANT,),
        size=Size(rows=3),
    ),
    Mutant(
        name="top-k-comparison",
        kind="top-k minimum off at its bound",
        trigger="an expanded row of length K",
        module="vectorized",
        changes={
            "original_seq_lens.clamp(max=nsa_index_topk).to(torch.int32)": (
                "((original_seq_lens < nsa_index_topk) * original_seq_lens"
                " + (original_seq_lens > nsa_index_topk) * nsa_index_topk).to(torch.int32)"
            )
        },
        codes=(Code.WRONG_VALUE,),
        size=Size(rows=8, length=8),
    ),
    Mutant(
        name="top-k-of-the-whole-length",
        kind="top-k minimum of the wrong length",
        trigger="two draft tokens, fewer than K tokens before them",
        module="precomputed_copy",
        changes={
            "    clamped = expanded.clamp(max=setup.index_topk)\n": (
                "    clamped = cache_seqlens.clamp(max=setup.index_topk).index_select(0, owner)\n"
            )
        },
        codes=(Code.INVARIANT,),
        size=Size(rows=2),
    ),
    Mutant(
        name="prefix-sum-of-unclamped-lengths",
        kind="prefix sum before the top-k minimum",
        trigger="an expanded row longer than K",
        module="precomputed_copy",
        changes={"pad(clamped.cumsum(": "pad(expanded.cumsum("},
        codes=(Code.INVARIANT,),
        size=Size(length=9),
    ),
    Mutant(
        name="padding-left-out-of-the-sum",
        kind="raw-batch sum next to padded lengths",
        trigger="a row as long as the padding",
        module="precomputed_copy",
        changes={
            "pad(cache_seqlens.cumsum(0,": "pad((cache_seqlens * (cache_seqlens > setup.fill_seq_len)).cumsum(0,",
        },
        codes=(Code.INVARIANT,),
    ),
    Mutant(
        name="prefix-sum-without-0",
        kind="unwritten entry that is zero in a fresh buffer",
        trigger="any request",
        module="python_loop",
        changes={"    out[:1].zero_()\n": ""},
        codes=LEFT,
        seen_by=(EAGER,),
    ),
    Mutant(
        name="zero-lengths-not-written",
        kind="unwritten entry that is zero in a fresh buffer",
        trigger="a padded row of no length",
        module="vectorized",
        changes={
            "        step.nsa_seqlens_expanded[:rows].copy_(expanded)\n": (
                "        lengths = step.nsa_seqlens_expanded[:rows]\n"
                "        lengths.copy_(torch.where(expanded > 0, expanded, lengths))\n"
            )
        },
        codes=LEFT,
        size=Size(replays=2, rows=2, length=2),
    ),
    Mutant(
        name="one-past-the-prefix-sum",
        kind="one element too many",
        trigger="any request",
        module="python_loop",
        changes={
            "    _prefix_sum(step.nsa_cache_seqlens[:rows], step.nsa_cu_seqlens_k)\n": (
                "    _prefix_sum(step.nsa_cache_seqlens[:rows], step.nsa_cu_seqlens_k)\n"
                "    sums = step.nsa_cu_seqlens_k\n"
                "    sums.as_strided((1,), (1,), sums.storage_offset() + sums.shape[0]).fill_(rows)\n"
            )
        },
        codes=(Code.GUARD_WRITTEN,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="page-column-off-by-one",
        kind="page table off by one",
        trigger="any request",
        module="vectorized",
        changes={
            "inputs.req_to_token[:, : setup.table_width]": (
                "inputs.req_to_token.roll(-1, dims=1)[:, : setup.table_width]"
            )
        },
        codes=(Code.WRONG_VALUE,),
    ),
    Mutant(
        name="columns-past-the-length-zeroed",
        kind="slack filled with something of one's own",
        trigger="a request shorter than the table is wide",
        module="vectorized",
        changes={
            "    step.page_table_1[:rows].copy_(page_table)\n": (
                "    kv_lens = step.cache_seqlens.index_select(0, owner).unsqueeze(1)\n"
                "    unused = torch.arange(setup.table_width, device=owner.device) >= kv_lens\n"
                "    step.page_table_1[:rows].copy_(page_table.masked_fill(unused, 0))\n"
            )
        },
        codes=(Code.WRONG_VALUE,),
    ),
    Mutant(
        name="input-behind-the-batch-zeroed",
        kind="an input tidied up",
        trigger="inputs longer than the bucket",
        module="vectorized",
        changes={
            "    for step in steps:\n": "    inputs.seq_lens[inputs.batch_size :].zero_()\n    for step in steps:\n"
        },
        codes=(Code.INPUT_MUTATED,),
    ),
    Mutant(
        name="row-past-the-total-zeroed",
        kind="rows past the total written",
        trigger="fewer tokens accepted than there are captured rows",
        module="vectorized",
        changes={_COPY_TABLE: _COPY_TABLE + "    step.page_table_1[rows : rows + 1].zero_()\n"},
        codes=(Code.FRAME_WRITTEN,),
        seen_by=(EAGER,),
        size=Size(rows=2),
    ),
    Mutant(
        name="table-without-draft-tokens",
        kind="page table as wide as the context",
        trigger="verify, with host lengths",
        module="precomputed_copy",
        changes={"inputs.seq_lens_cpu[:batch_size] + added": "inputs.seq_lens_cpu[:batch_size]"},
        codes=LEFT,
        seen_by=(EAGER,),
        size=Size(replays=2, rows=1, length=2),
    ),
    Mutant(
        name="source-past-the-table",
        kind="source and destination clipped by different bounds",
        trigger="a request longer than the table is wide",
        module="python_loop",
        changes={"min(_longest(inputs, setup), setup.table_width)": "_longest(inputs, setup)"},
        codes=(Code.EXCEPTION,),
        seen_by=(EAGER,),
        size=Size(replays=1, rows=4, length=2),
    ),
    Mutant(
        name="maximum-over-the-whole-input",
        kind="elements past the bucket used",
        trigger="junk behind the inputs, or a bucket below the largest",
        module="python_loop",
        changes={"int(lengths[: inputs.batch_size].max().item())": "int(lengths.max().item())"},
        codes=(Code.FRAME_WRITTEN,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="pool-row-stride-ignored",
        kind="row stride ignored",
        trigger="a pool row after the first, in a pool whose rows lie apart",
        module="vectorized",
        changes={
            _GATHER: (
                "inputs.req_to_token.as_strided("
                "(setup.pool_rows, setup.table_width), (setup.pool_width, 1)).index_select(0, pool_rows)"
            )
        },
        codes=(*LEFT, Code.WRONG_VALUE),
        size=Size(rows=2),
    ),
    Mutant(
        name="table-taken-for-dense",
        kind="row stride ignored",
        trigger="two rows of a table whose rows lie apart",
        module="vectorized",
        changes={
            _COPY_TABLE: (
                "    dense = step.page_table_1.as_strided((rows, setup.table_width), (setup.table_width, 1))\n"
                "    dense.copy_(page_table)\n"
            )
        },
        codes=(Code.FRAME_WRITTEN,),
        size=Size(rows=2),
    ),
    Mutant(
        name="source-stride-of-the-table",
        kind="source and destination row strides confused",
        trigger="a pool row after the first, and a table with another row stride than the pool",
        module="triton_inplace",
        changes={"req_to_token + pool_row * token_stride": "req_to_token + pool_row * table_stride"},
        codes=(*LEFT, Code.WRONG_VALUE),
        size=Size(rows=2),
    ),
    Mutant(
        name="page-size-forgotten",
        kind="page size division forgotten",
        trigger="pages of several tokens",
        module="vectorized",
        changes={'torch.div(pages, setup.page_size, rounding_mode="floor")': "pages"},
        codes=(Code.WRONG_VALUE,),
    ),
    Mutant(
        name="page-columns-divided",
        kind="page size division applied twice",
        trigger="a request of more than one page",
        module="precomputed_copy",
        changes={"columns[:: setup.page_size]": "columns[:: setup.page_size] // setup.page_size"},
        codes=(Code.WRONG_VALUE, Code.FROZEN),
        size=Size(length=17),
    ),
    Mutant(
        name="real-table-of-one-token-pages",
        kind="an alias written as if it were a buffer of its own",
        trigger="pages of one token",
        module="precomputed_copy",
        changes={
            "    real_page_table = None\n": (
                "    real_page_table = torch.zeros_like(page_indices[:, :: setup.page_size])\n"
            )
        },
        codes=(Code.WRONG_VALUE,),
    ),
    Mutant(
        name="rows-by-the-number-of-steps",
        kind="stride of num_steps + 1 where N belongs",
        trigger="N is not S + 1, and two requests on different pool rows",
        module="vectorized",
        changes={
            "    return requests.repeat_interleave(tokens), (": (
                "    row = torch.arange(batch_size * tokens, device=device)\n"
                '    owner = row.div(setup.num_steps + 1, rounding_mode="floor").clamp(max=batch_size - 1)\n'
                "    return owner, ("
            )
        },
        codes=(Code.WRONG_VALUE,),
        size=Size(rows=2),
    ),
    Mutant(
        name="seq-lens-in-place",
        kind="draft tokens added in place",
        trigger="verify",
        module="python_loop",
        changes={"inputs.seq_lens[:batch_size] + added": "inputs.seq_lens[:batch_size].add_(added)"},
        codes=(Code.INPUT_MUTATED,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="draft-tokens-in-the-maximum-twice",
        kind="draft tokens added twice",
        trigger="verify without host lengths, in a table wider than the longest request",
        module="triton_fused",
        changes={
            "        return int(kv_lens.amax().item())\n"
            "    added = setup.num_draft_tokens if inputs.mode is Mode.TARGET_VERIFY else 0\n": (
                "        inputs = replace(inputs, seq_lens_cpu=kv_lens.cpu())\n"
                "    added = setup.num_draft_tokens if inputs.mode is Mode.TARGET_VERIFY else 0\n"
            ),
            "from collections.abc import Sequence\n": (
                "from collections.abc import Sequence\nfrom dataclasses import replace\n"
            ),
        },
        codes=(Code.FRAME_WRITTEN,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="zero-accept-counted",
        kind="zero-length accept rows",
        trigger="a request that accepted nothing",
        module="vectorized",
        changes={
            "_expand_ragged(inputs.accept_lens[:batch_size].long(), seq_lens, requests)": (
                "_expand_ragged(inputs.accept_lens[:batch_size].long().clamp(min=1), seq_lens, requests)"
            )
        },
        codes=(Code.FRAME_WRITTEN,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="owners-marked-and-not-counted",
        kind="zero-length accept rows",
        trigger="a request that accepted nothing, before one that did",
        module="precomputed_copy",
        changes={
            "        owner = torch.bucketize(row, ends, right=True)\n": (
                "        begins = torch.zeros(row.shape[0] + 1, dtype=torch.int64, device=device)\n"
                "        begins[ends - inputs.accept_lens[:batch_size]] = 1\n"
                "        owner = begins[:-1].cumsum(0) - 1\n"
            )
        },
        codes=(Code.WRONG_VALUE,),
        seen_by=(EAGER,),
        size=Size(rows=2),
    ),
    Mutant(
        name="concatenation-of-nothing",
        kind="empty batch",
        trigger="nothing is accepted",
        module="python_loop",
        changes={
            "    if rows == 0:\n": "    if batch_size == 0:\n",
            "in zip(kv_lens, extend_lens, strict=True)\n": (
                "in zip(kv_lens, extend_lens, strict=True)\n            if extend_len\n"
            ),
        },
        codes=(Code.EXCEPTION,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="nothing-accepted-and-no-0",
        kind="empty batch",
        trigger="nothing is accepted",
        module="vectorized",
        changes={"        step.nsa_cu_seqlens_k[:1].zero_()\n": ""},
        codes=LEFT,
        seen_by=(EAGER,),
    ),
    Mutant(
        name="uniform-if-the-total-divides",
        kind="fast path for uniform lengths taken on a total",
        trigger="accept lengths that differ and sum to a multiple of the bucket",
        module="vectorized",
        changes={
            "    owner = requests.repeat_interleave(accept_lens, output_size=rows)\n": (
                "    if rows % accept_lens.shape[0] == 0:\n"
                "        accept_lens = torch.full_like(accept_lens, rows // accept_lens.shape[0])\n"
                "    owner = requests.repeat_interleave(accept_lens, output_size=rows)\n"
            )
        },
        codes=(Code.WRONG_VALUE,),
        seen_by=(EAGER,),
        size=Size(rows=12, length=4),
    ),
    Mutant(
        name="length-by-pool-row",
        kind="a dictionary by what may repeat",
        trigger="two requests of different lengths on one pool row, not in decode",
        module="python_loop",
        changes={
            "    kv_lens, extend_lens = _host_lens(inputs, setup)\n": (
                "    kv_lens, extend_lens = _host_lens(inputs, setup)\n"
                "    pool_rows = inputs.req_pool_indices[:batch_size].tolist()\n"
                "    kv_len_of = dict(zip(pool_rows, kv_lens, strict=True))\n"
                "    kv_lens = [kv_len_of[row] for row in pool_rows]\n"
            )
        },
        codes=(Code.WRONG_VALUE,),
        seen_by=(EAGER,),
        size=Size(rows=2, length=2),
    ),
    Mutant(
        name="schedule-rounds-to-zero",
        kind="ceiling by a division that truncates",
        trigger="a schedule",
        module="vectorized",
        changes={
            'torch.div(ctx_lens.long() + 255, 256, rounding_mode="floor")': (
                'torch.div(-ctx_lens.long(), 256, rounding_mode="trunc").neg()'
            )
        },
        codes=(Code.WRONG_VALUE,),
    ),
    Mutant(
        name="segment-more-at-multiples-of-256",
        kind="ceiling off at exact multiples",
        trigger="a schedule, and a length that is a multiple of 256, 0 included",
        module="precomputed_copy",
        changes={
            "(ctx_lens.to(torch.int64) + 255).bitwise_right_shift(8)": (
                "ctx_lens.to(torch.int64).bitwise_right_shift(8) + 1"
            )
        },
        codes=(Code.WRONG_VALUE,),
        size=Size(rows=6, length=256),
    ),
    Mutant(
        name="schedule-of-no-work",
        kind="zero work: the search reads one past",
        trigger="a schedule, and all lengths 0",
        module="triton_fused",
        changes={
            "    if total == 0:\n        out[:, 0].fill_(rows)\n        out[:, 1].zero_()\n        return\n": "",
        },
        codes=(Code.EXCEPTION,),
        seen_by=(EAGER,),
    ),
    Mutant(
        name="element-stride-ignored",
        kind="element stride of an input ignored",
        trigger="two requests whose lengths lie apart",
        module="vectorized",
        changes={_SEQ_LENS: "    seq_lens = inputs.seq_lens.as_strided((inputs.batch_size,), (1,))\n"},
        codes=(*LEFT, Code.INVARIANT),
        size=Size(rows=3),
    ),
    Mutant(
        name="storage-offset-ignored",
        kind="storage offset of an input ignored",
        trigger="any request",
        module="vectorized",
        changes={
            _SEQ_LENS: (
                "    seq_lens = torch.as_strided(inputs.seq_lens, (inputs.batch_size,), inputs.seq_lens.stride(), 0)\n"
            )
        },
        codes=(*LEFT, Code.INVARIANT),
        size=Size(rows=2),
    ),
    Mutant(
        name="int64-read-as-int32",
        kind="integer width of an input assumed",
        trigger="two requests with lengths of 64 bits",
        module="precomputed_copy",
        changes={
            "(inputs.seq_lens[:batch_size] + added)": (
                "(inputs.seq_lens[:batch_size].contiguous().view(torch.int32)[:batch_size] + added)"
            )
        },
        codes=(*LEFT, Code.WRONG_VALUE, Code.EXCEPTION),
        size=Size(rows=2, length=2),
    ),
    Mutant(
        name="seq-lens-in-16-bits",
        kind="narrow integers",
        trigger="a length of 32768",
        module="vectorized",
        changes={_SEQ_LENS: "    seq_lens = inputs.seq_lens[: inputs.batch_size].to(torch.int16)\n"},
        codes=(Code.INVARIANT, Code.WRONG_VALUE),
        size=Size(length=65_536),  # from there on a length may be wrong and not negative
    ),
    Mutant(
        name="slots-taken-for-a-run",
        kind="layout of the inputs assumed",
        trigger="a table of two columns whose slots do not follow each other",
        module="vectorized",
        changes={
            "    step.page_table_1[:rows].copy_(page_table)\n": (
                "    page_table = page_table[:, :1] + torch.arange(page_table.shape[1], device=page_table.device)\n"
                "    step.page_table_1[:rows].copy_(page_table)\n"
            )
        },
        codes=(Code.WRONG_VALUE, Code.INVARIANT),
    ),
    Mutant(
        name="top-k-in-11-bits",
        kind="narrow integers",
        trigger="a top-k of 2048",
        module="vectorized",
        changes={"original_seq_lens.clamp(max=nsa_index_topk)": "original_seq_lens.clamp(max=nsa_index_topk & 2047)"},
        codes=(Code.INVARIANT, Code.WRONG_VALUE),
        size=Size(length=1),
    ),
)
