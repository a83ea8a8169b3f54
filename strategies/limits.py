"""How large a drawn case may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of what is drawn. Where two are given, the second is for the rare large case of a feature."""

    batch_size: int
    """The largest usual bucket."""
    rows: int
    """The most expanded rows of a usual bucket (bucket times draft tokens)."""
    many_rows: int
    """The most expanded rows under ``Feature.MANY_ROWS``."""
    width: int
    """The widest row of ``req_to_token``, in tokens."""
    many_rows_width: int
    """The same where there are many rows."""
    top_k_width: int
    """The same where ``index_topk`` is 2048 and rows are few."""
    pool_rows: int
    steps: int
    replays: int
    """Usually at most this many; one more in rare cases."""

    @classmethod
    def small(cls) -> Limits:
        """For Triton's interpreter on a CPU, where a program costs about 0.2 ms per operation."""
        return cls(
            batch_size=8,
            rows=24,
            many_rows=160,
            width=320,
            many_rows_width=64,
            top_k_width=2112,
            pool_rows=8,
            steps=4,
            replays=3,
        )

    @classmethod
    def large(cls) -> Limits:
        """For a GPU, where the oracle's plain integers are what costs."""
        return cls(
            batch_size=32,
            rows=128,
            many_rows=1056,
            width=1100,
            many_rows_width=320,
            top_k_width=4224,
            pool_rows=33,
            steps=8,
            replays=6,
        )
