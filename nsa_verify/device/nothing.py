"""A kernel that does nothing: what a launch, and a node of a graph, cost without any work."""

from __future__ import annotations

import triton


@triton.jit  # type: ignore[untyped-decorator]
def _nothing() -> None:
    pass


def nothing() -> None:
    """Launch it."""
    _nothing[(1,)]()
