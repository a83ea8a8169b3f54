"""Which buffers a backend owns, and their shapes: the catalogue that the oracle and the arena share.

Shapes only; no value is computed here.
"""

from __future__ import annotations

from typing import NamedTuple

from nsa_verify.core.case import CtxLens, Mode, Setup


class Shape(NamedTuple):
    """Rows and columns of a buffer; a 1-D buffer is one row."""

    rows: int
    columns: int


TABLES = ("page_table_1", "real_page_table")
FROZEN = ("cu_seqlens_q", "nsa_cu_seqlens_q")


def shapes(setup: Setup, mode: Mode, bucket: int) -> dict[str, Shape]:
    """Every buffer of one step for ``(mode, bucket)``, aliases included, in the order of the contract's section 2."""
    rows = setup.captured_rows(mode, bucket)
    found = {
        "cache_seqlens": Shape(1, bucket),
        "cu_seqlens_k": Shape(1, bucket + 1),
        "nsa_seqlens_expanded": Shape(1, rows),
        "nsa_cache_seqlens": Shape(1, rows),
        "nsa_cu_seqlens_k": Shape(1, rows + 1),
        "page_table_1": Shape(rows, setup.table_width),
        "real_page_table": Shape(rows, setup.real_table_width),
        "cu_seqlens_q": Shape(1, bucket + 1),
        "nsa_cu_seqlens_q": Shape(1, rows + 1),
    }
    if setup.ctx_lens is not CtxLens.ABSENT:
        own = has_own_ctx_lens(setup, mode)
        found["paged_mqa_ctx_lens"] = Shape(bucket, setup.num_draft_tokens) if own else Shape(rows, 1)
    if setup.schedule:
        found["paged_mqa_schedule"] = Shape(setup.num_sms + 1, 2)
    return found


def has_own_ctx_lens(setup: Setup, mode: Mode) -> bool:
    """Whether ``paged_mqa_ctx_lens`` has memory of its own rather than being a view."""
    return setup.ctx_lens is CtxLens.OWN and mode is Mode.TARGET_VERIFY


def alias_of(setup: Setup, mode: Mode, name: str) -> str | None:
    """The buffer whose memory ``name`` shares in ``mode``, or None if it has its own."""
    if name == "nsa_seqlens_expanded" and mode is Mode.DECODE:
        return "cache_seqlens"
    if name == "real_page_table" and setup.page_size == 1:
        return "page_table_1"
    if name == "paged_mqa_ctx_lens" and not has_own_ctx_lens(setup, mode):
        return "cache_seqlens" if mode is Mode.DECODE else "nsa_seqlens_expanded"
    return None
