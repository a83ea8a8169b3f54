"""How large a drawn case may be."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    long_width: int
    """The same under ``Feature.LONG_CONTEXT``, where the page table is narrow."""
    pool_cells: int
    """The most cells of ``req_to_token``: its memory is written and compared whole, however little of it is used."""
    pool_rows: int
    steps: int
    """Usually at most this many."""
    most_steps: int
    replays: int
    """Usually at most this many; one more at times."""
    most_replays: int
    """The same under ``Feature.LONG_SEQUENCES``."""

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
            long_width=66_000,
            pool_cells=140_000,
            pool_rows=8,
            steps=4,
            most_steps=4,
            replays=3,
            most_replays=8,
        )

    @classmethod
    def large(cls) -> Limits:
        """For a GPU, where the oracle's plain integers are what costs: about four times a small case."""
        return cls(
            batch_size=32,
            rows=128,
            many_rows=1056,
            width=900,
            many_rows_width=64,
            top_k_width=3200,
            long_width=140_000,
            pool_cells=4_000_000,
            pool_rows=33,
            steps=4,
            most_steps=8,
            replays=7,
            most_replays=8,
        )

    @classmethod
    def short(cls) -> Limits:
        """``small``, and one to three replays: what rates are measured with."""
        return replace(cls.small(), replays=2, most_replays=3)

    @classmethod
    def for_device(cls, device: str) -> Limits:
        """``small`` for ``cpu``, ``large`` for ``cuda``, with or without an index; ``ValueError`` for any other."""
        limits = {"cpu": cls.small, "cuda": cls.large}.get(device.partition(":")[0])
        if limits is None:
            raise ValueError(f"device = {device!r}: must be cpu or cuda")
        return limits()
