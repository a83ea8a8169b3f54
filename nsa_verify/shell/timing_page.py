"""The page of ``nsa-verify bench --html``: one file that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

import os.path
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from nsa_verify.shell.options import Unable
from nsa_verify.shell.pages import need, rendered
from nsa_verify.shell.timing_charts import charts
from nsa_verify.shell.timings import Timings

Table = tuple[str, list[tuple[str, ...]]]
"""A title, and rows of which the first is the head."""

HOST_TERMS = (
    ("B, W, to, S", "Requests, columns of the page table, the longest KV length (the shortest is half of it), steps."),
    ("one of, rest", "The KV length of the first request, and that of each other one."),
    ("with schedule", "The paged-MQA schedule and its lengths are refreshed too."),
    ("host", "A call on the host, of several in a row; the device is not waited for."),
    ("(fell back)", "At this size it reported, with nsa_verify.fallback, that it did not take its fast path."),
)
FLOOR = (
    "An empty node, and what is live at the bandwidth of a copy through DRAM, both measured in the same run."
    " Where what is live fits into L2 it is warm there, and this is no lower bound."
)
GPU_TERMS = (
    ("node", "A call on the device, of many in one captured graph; all use the same buffers, warm in L2 if they fit."),
    ("floor", FLOOR),
    ("MB live", "What must move at least: live slots read once, written once for each row of each step; the lists."),
    ("MB by extent", "The same up to the write extent that it declares; what it writes elsewhere first is not in it."),
    ("launches", "The nodes of a captured graph of one call; outside of one nobody counts what is launched."),
    ("syncs, allocations", "How often one call waits for the device, and takes memory of it."),
    ("compiled by Triton", "How many forms of how many kernels were launched: as many where each is compiled once."),
)


def check(path: Path) -> None:
    """Raises ``Unable`` where the page could not be made, since a library is missing, or not be written to ``path``."""
    need("--html", "jinja2", "matplotlib")
    new = not os.path.lexists(path)
    try:
        path.open("a", encoding="utf-8").close()
        if new:
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def write(path: Path, text: str) -> None:
    """Raises ``Unable`` for what ``check`` could not foresee, as a full disk."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> Unable:
    return Unable(f"--html {path}: cannot be written ({error.strerror})")


def page(told: Timings, device: str, facts: Sequence[str], tables: Sequence[Table]) -> str:
    """The HTML of what was measured on ``device``; ``facts`` and ``tables`` are those of the text."""
    on_gpu = device == "cuda"
    machine = (
        ("Device", told.device),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("Date", f"{datetime.now(UTC):%Y-%m-%d}"),
    )
    context = {
        "told": told,
        "on_gpu": on_gpu,
        "facts": facts[1:],
        "machine": machine,
        "terms": (*HOST_TERMS, *(GPU_TERMS if on_gpu else ())),
        "charts": charts(told.timings, on_gpu),
        "tables": tables,
    }
    return rendered("bench.html.j2", context)
