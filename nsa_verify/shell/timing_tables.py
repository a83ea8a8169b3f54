"""The tables of ``nsa-verify bench``, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console

from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine.events import Tally
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.shell import timing_page
from nsa_verify.shell.options import ExitCode, Unable
from nsa_verify.shell.render import columns, counted, json_text, tally_lines
from nsa_verify.shell.reporter import say
from nsa_verify.shell.timings import Ask, Timing, Timings, measured, verified

SIZES = (
    *((32, 131_080, 4_000), (128, 131_080, 4_000), (128, 131_080, 32_000), (512, 131_080, 4_000)),
    *((32, 131_080, 131_000), (32, 131_080, 4_000, 4), (32, 131_080, 4_000, 8)),
)
"""Requests, columns, the longest KV length; and steps."""
CPU_SIZES = ((1, 4_096, 1_000), (8, 4_096, 1_000), (8, 4_096, 1_000, 4))
EXPANSIONS = (1, 3, 32, 256)
NOT_JUDGED = "no implementation was judged in the modes that were asked for"
UNSCHEDULED = "left out, since they do not write both paged_mqa_schedule and paged_mqa_ctx_lens"
NO_GPU = "no GPU: host times only, and of Triton kernels none, since the interpreter runs them"


def times(
    plan: Plan,
    sizes: Sequence[tuple[int, ...]],
    schedule: bool,
    repetitions: int,
    as_json: bool,
    html: Path | None,
    out: Console,
) -> None:
    """Verify, measure, and print; ends the process with what the verifier said."""
    from nsa_verify.device.select import DeviceError, resolve

    if html is not None:
        timing_page.check(html)
    try:
        device = resolve(plan.device)
        told = Timings(seed=plan.seed, repetitions=repetitions)
        passed, code = verified(plan, told, device)
    except (DeviceError, EngineError, ImplementationError) as error:
        raise Unable(str(error)) from error
    chosen = sizes or (SIZES if device == "cuda" else CPU_SIZES)
    if passed:
        expansions = EXPANSIONS if not sizes and not plan.only else ()
        asked = Ask(plan=plan, sizes=_sizes(chosen, schedule), expansions=expansions, repetitions=repetitions)
        measured(asked, passed, told, device, lambda text: click.echo(f"measured {text}", err=True))
    if as_json:
        say(out, json_text({"timings": told}))
    else:
        for line in lines(told, device):
            say(out, line)
    if html is not None:
        timing_page.write(html, timing_page.page(told, device, list(facts(told, device)), list(tables(told, device))))
    for it in told.rejected:
        click.echo(str(it) if it.size else f"{it}; see nsa-verify run --only NAME", err=True)
    if any(it.size for it in told.rejected):
        code = ExitCode.DISAGREE
    if code:
        raise SystemExit(code)
    if told.skipped:
        raise Unable("; ".join(told.skipped))
    if not told.timings:
        raise Unable(f"nothing was timed: {_unscheduled(told) if told.unscheduled else NOT_JUDGED}")


def _sizes(numbers: Sequence[tuple[int, ...]], schedule: bool) -> tuple[object, ...]:
    from nsa_verify.device.timing import Size

    return tuple(
        Size(batch_size=it[0], table_width=it[1], longest=it[2], num_steps=(*it, 1)[3], schedule=schedule)
        for it in numbers
    )


def lines(told: Timings, device: str) -> Iterator[str]:
    """The run in a few lines, then a table per mode and size."""
    yield from facts(told, device)
    for title, rows in tables(told, device):
        yield ""
        yield title
        yield from columns(rows)


def facts(told: Timings, device: str) -> Iterator[str]:
    """What was measured where and how, and what was left out."""
    yield f"nsa-verify {told.version} on {told.device}"
    after = f"of {counted(told.cases, 'case')} each implementation agreed on all that it runs first; seed {told.seed}"
    yield f"medians of {told.repetitions} interleaved repetitions, in microseconds (least-most); {after}"
    if device == "cuda":
        bandwidth = f"{told.bytes_per_us / 1e6:.2f} TB/s"
        yield f"an empty node takes {told.empty_node_us:.2f} us, a copy through DRAM moves {bandwidth}"
    else:
        yield f"{NO_GPU} (left out: {', '.join(told.interpreted) or 'none'})"
    if told.unscheduled:
        yield _unscheduled(told)
    yield from told.skipped
    yield from tally_lines(Tally(told.fallbacks))


def _unscheduled(told: Timings) -> str:
    return f"{UNSCHEDULED}: {', '.join(told.unscheduled)}"


def tables(told: Timings, device: str) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """A title per mode and size, and its rows, the head first."""
    found: dict[tuple[str, str], list[Timing]] = {}
    for it in told.timings:
        found.setdefault((it.mode, it.size), []).append(it)
    for (mode, size), timings in found.items():
        live = f", {timings[0].live_bytes / 1e6:.2f} MB live" if device == "cuda" else ""
        yield f"{mode}, {size}{live}", _table(timings, device == "cuda")


def _table(timings: Sequence[Timing], on_gpu: bool) -> list[tuple[str, ...]]:
    heads = ("implementation", "host", "x faster than python-loop")
    of_gpu = ("node", "x the floor", "MB moved", "launches", "syncs", "allocations")
    rows: list[tuple[str, ...]] = [(*heads, *of_gpu) if on_gpu else heads]
    for it in timings:
        name = f"{it.implementation} (fell back)" if it.fallbacks else it.implementation
        row: tuple[str, ...] = (name, str(it.host), f"{it.host_ratio:.1f}" if it.host_ratio else "-")
        if on_gpu:
            ratio = it.floor_ratio
            node = (str(it.node), f"{ratio:.2f}") if it.node is not None and ratio is not None else ("-", "-")
            counts = (str(it.launches or "-"), str(it.syncs), str(it.allocations))
            row = (*row, *node, f"{it.moved_bytes / 1e6:.2f}", *counts)
        rows.append(row)
    return rows
