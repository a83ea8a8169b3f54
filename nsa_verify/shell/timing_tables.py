"""The tables of ``nsa-verify bench``, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click
from rich.console import Console

from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.shell.options import Unable
from nsa_verify.shell.render import columns, counted, json_text
from nsa_verify.shell.reporter import say
from nsa_verify.shell.timings import Ask, Timing, Timings, measured, verified

SIZES = (
    *((32, 131_080, 4_000), (128, 131_080, 4_000), (128, 131_080, 32_000), (512, 131_080, 4_000)),
    *((32, 131_080, 131_000), (32, 131_080, 4_000, 4), (32, 131_080, 4_000, 8)),
)
"""Requests, columns, the longest KV length; and steps."""
CPU_SIZES = ((1, 4_096, 1_000), (8, 4_096, 1_000), (8, 4_096, 1_000, 4))
EXPANSIONS = (1, 3, 32, 256)
NO_GPU = "no GPU: host times only, and of Triton kernels none, since the interpreter runs them"


def times(plan: Plan, sizes: Sequence[tuple[int, ...]], repetitions: int, as_json: bool, out: Console) -> None:
    """Verify, measure, and print; ends the process with what the verifier said."""
    from nsa_verify.device.select import DeviceError, resolve

    try:
        device = resolve(plan.device)
        told = Timings(seed=plan.seed, repetitions=repetitions)
        passed, code = verified(plan, told, device)
    except (DeviceError, EngineError, ImplementationError) as error:
        raise Unable(str(error)) from error
    chosen = sizes or (SIZES if device == "cuda" else CPU_SIZES)
    if passed:
        expansions = EXPANSIONS if not sizes and not plan.only else ()
        asked = Ask(plan=plan, sizes=_sizes(chosen), expansions=expansions, repetitions=repetitions)
        measured(asked, passed, told, device, lambda text: click.echo(f"measured {text}", err=True))
    if as_json:
        say(out, json_text({"timings": told}))
    else:
        for line in lines(told, device):
            say(out, line)
    for it in told.rejected:
        click.echo(f"{it.implementation} is not timed: it {it.reason}; see nsa-verify run --only NAME", err=True)
    if code:
        raise SystemExit(code)
    if not told.timings:
        raise Unable("nothing was timed: no implementation was judged in the modes that were asked for")


def _sizes(numbers: Sequence[tuple[int, ...]]) -> tuple[object, ...]:
    from nsa_verify.device.timing import Size

    return tuple(Size(batch_size=it[0], table_width=it[1], longest=it[2], num_steps=(*it, 1)[3]) for it in numbers)


def lines(told: Timings, device: str) -> Iterator[str]:
    """The run in one line, then a table per mode and size."""
    yield f"nsa-verify {told.version} on {told.device}"
    after = f"each implementation agreed on {counted(told.cases, 'case')} first; seed {told.seed}"
    yield f"medians of {told.repetitions} interleaved repetitions, in microseconds (least-most); {after}"
    if device == "cuda":
        yield f"an empty node takes {told.empty_node_us:.2f} us, a copy moves {told.bytes_per_us / 1e6:.2f} TB/s"
    else:
        yield f"{NO_GPU} (left out: {', '.join(told.interpreted) or 'none'})"
    tables: dict[tuple[str, str], list[Timing]] = {}
    for it in told.timings:
        tables.setdefault((it.mode, it.size), []).append(it)
    for (mode, size), timings in tables.items():
        yield ""
        moved = f", {timings[0].live_bytes / 1e6:.2f} MB live" if device == "cuda" else ""
        yield f"{mode}, {size}{moved}"
        yield from columns(_table(timings, device == "cuda"))


def _table(timings: Sequence[Timing], on_gpu: bool) -> list[tuple[str, ...]]:
    heads = ("implementation", "host", "x faster than python-loop")
    of_gpu = ("node", "x the floor", "launches", "syncs", "allocations")
    rows: list[tuple[str, ...]] = [(*heads, *of_gpu) if on_gpu else heads]
    for it in timings:
        row: tuple[str, ...] = (it.implementation, str(it.host), f"{it.host_ratio:.1f}" if it.host_ratio else "-")
        if on_gpu:
            ratio = it.floor_ratio
            node = (str(it.node), f"{ratio:.2f}") if it.node is not None and ratio is not None else ("-", "-")
            row = (*row, *node, str(it.launches or "-"), str(it.syncs), str(it.allocations))
        rows.append(row)
    return rows
