"""The tables of ``nsa-verify bench``, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace
from rich.console import Console

from nsa_verify.core.case import Mode
from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine.events import Tally
from nsa_verify.engine.plan import EAGER, Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.shell import timing_page
from nsa_verify.shell.options import ExitCode, Unable
from nsa_verify.shell.render import columns, counted, json_text, tally_lines
from nsa_verify.shell.reporter import say
from nsa_verify.shell.timings import (
    EXPANSION,
    LEAST,
    Ask,
    Compilations,
    Timing,
    Timings,
    measured,
    verified,
    with_expansions,
)

if TYPE_CHECKING:
    from nsa_verify.device.timing import Size

SIZES = (
    *((32, 131_080, 4_000), (128, 131_080, 4_000), (128, 131_080, 32_000), (512, 131_080, 4_000)),
    *((32, 131_080, 131_000), (32, 131_080, 4_000, 4), (32, 131_080, 4_000, 8)),
    *((128, 131_080, 131_000, 1, 500), (512, 131_080, 131_000, 1, 500), (128, 131_080, 131_000, 4, 500)),
)
"""Requests, columns, the longest KV length; steps; and the length of all requests but the first."""
CPU_SIZES = ((1, 4_096, 1_000), (8, 4_096, 1_000), (8, 4_096, 1_000, 4))
EXPANSIONS = (1, 3, 32, 256)
NOT_JUDGED = "no implementation was judged in the modes that were asked for"
UNSCHEDULED = "not timed with schedule, since they do not write both paged_mqa_schedule and paged_mqa_ctx_lens"
UNDECLARED = "left out, since they declare none of the modes that were asked for"
UNJUDGED = f"judged in fewer than {LEAST} cases, and so not timed (give more with -n)"
UNCAPTURED = f"judged in fewer than {LEAST} captured cases, and so without a device time (give more with -n)"
AGREED = "cases that each agreed on before it was timed, the fewest of a mode and executor"
NOT_CAPTURED = "not captured"
LAUNCHES = "launches are the nodes of a captured graph: where a call is not captured, nobody counts them"
COMPILATIONS = "compiled by Triton over all sizes"
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
        is_whole = not (sizes or plan.only) and Mode.DRAFT_EXTEND in plan.modes
        expansions = EXPANSIONS if device == "cuda" and is_whole else ()
        asked, added = with_expansions(plan) if expansions else (plan, ())
        told = Timings(seed=plan.seed, repetitions=repetitions)
        judged, code = verified(asked, told, device)
    except (DeviceError, EngineError, ImplementationError) as error:
        raise Unable(str(error)) from error
    chosen = sizes or (SIZES if device == "cuda" else CPU_SIZES)
    if judged:
        ask = Ask(
            plan=asked, sizes=sized(chosen, schedule), expansions=expansions, added=added, repetitions=repetitions
        )
        measured(ask, judged, told, device, lambda text: click.echo(f"measured {text}", err=True))
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
    problems = list(_problems(told, plan))
    if not code and problems:
        raise Unable("; ".join(problems))
    for problem in problems:
        click.echo(problem, err=True)
    if code:
        raise SystemExit(code)


def _problems(told: Timings, plan: Plan) -> Iterator[str]:
    """What was asked for and is not timed, though it does not disagree."""
    yield from told.skipped
    yield from unjudged(told)
    if missing := [it for it in told.undeclared if it in plan.only]:
        yield f"{UNDECLARED}: {', '.join(missing)}"
    timed = {it.implementation for it in told.timings if it.mode != EXPANSION}
    if told.unscheduled and timed <= set(told.unscheduled):
        yield f"nothing was timed with schedule: {_unscheduled(told)}"
    elif not (timed or told.skipped or told.unjudged or told.undeclared or told.rejected):
        yield f"nothing was timed: {NO_GPU if told.interpreted else NOT_JUDGED}"


def sized(numbers: Sequence[tuple[int, ...]], schedule: bool) -> tuple[Size, ...]:
    """The sizes of ``SIZES`` or ``--size``; with ``schedule`` each of them twice, without it and with it."""
    from nsa_verify.device.timing import Size

    found = []
    for count, width, longest, *more in numbers:
        steps, rest = (*more, *(1, 0)[len(more) :])
        plain = Size(batch_size=count, table_width=width, longest=longest, num_steps=steps, rest=rest)
        found += [plain, replace(plain, schedule=True)] if schedule else [plain]
    return tuple(found)


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
    if least := dict(_least(told)):
        yield f"{AGREED}: {', '.join(f'{name} {cases}' for name, cases in least.items())}"
    if device == "cuda" and told.bytes_per_us:
        bandwidth = f"{told.bytes_per_us / 1e6:.2f} TB/s"
        yield f"an empty node takes {told.empty_node_us:.2f} us, a copy through DRAM moves {bandwidth}"
        if any(it.node is None for it in told.timings):
            yield LAUNCHES
    elif device != "cuda":
        yield f"{NO_GPU} (left out: {', '.join(told.interpreted) or 'none'})"
    if told.unscheduled:
        yield _unscheduled(told)
    if told.undeclared:
        yield f"{UNDECLARED}: {', '.join(told.undeclared)}"
    yield from unjudged(told)
    yield from told.skipped
    yield from tally_lines(Tally(told.fallbacks))


def _least(told: Timings) -> Iterator[tuple[str, int]]:
    """Each implementation that is judged, and on how many cases it agreed where these were fewest, but enough."""
    for name, modes in told.judged.items():
        enough = [cases for counts in modes.values() for cases in counts.values() if cases >= LEAST]
        if enough:
            yield name, min(enough)


def _unscheduled(told: Timings) -> str:
    return f"{UNSCHEDULED}: {', '.join(told.unscheduled)}"


def unjudged(told: Timings) -> Iterator[str]:
    """What was asked for and had no verdict, in a sentence each of what is not timed and what has no device time."""
    for is_eager, sentence in ((True, UNJUDGED), (False, UNCAPTURED)):
        modes: dict[str, list[str]] = {}
        for it in told.unjudged:
            if (it.executor == EAGER) == is_eager:
                modes.setdefault(it.implementation, []).append(f"{it.mode} ({it.cases})")
        if modes:
            pairs = "; ".join(f"{name} in {', '.join(missing)}" for name, missing in modes.items())
            yield f"{sentence}: {pairs}"


def tables(told: Timings, device: str) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """A title per mode and size, and its rows, the head first; behind them what Triton compiled for all sizes."""
    found: dict[tuple[str, str], list[Timing]] = {}
    for it in told.timings:
        found.setdefault((it.mode, it.size), []).append(it)
    for (mode, size), timings in found.items():
        live = f", {timings[0].live_bytes / 1e6:.2f} MB live" if device == "cuda" else ""
        yield f"{mode}, {size}{live}", _table(timings, device == "cuda")
    yield from _compilations(told)


def _compilations(told: Timings) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """A table for each number of steps; the expansions have one of their own."""
    found: dict[str, list[Compilations]] = {}
    for it in told.compilations:
        steps = f"S {it.steps}{' with schedule' if it.schedule else ''}"
        found.setdefault(EXPANSION if it.mode == EXPANSION else steps, []).append(it)
    for title, those in found.items():
        modes = list(dict.fromkeys(it.mode for it in those))
        rows = {it.implementation: ["-"] * len(modes) for it in those}
        for it in those:
            kernels = f"{it.compilations} of {counted(it.kernels, 'kernel')}"
            rows[it.implementation][modes.index(it.mode)] = f"{kernels}, {counted(it.sizes, 'size')}"
        table = [("implementation", *modes), *((name, *cells) for name, cells in rows.items())]
        yield f"{COMPILATIONS}, {title}", table


def _table(timings: Sequence[Timing], on_gpu: bool) -> list[tuple[str, ...]]:
    heads = ("implementation", "host", "x faster than python-loop")
    of_gpu = ("node", "x the floor", "MB by extent", "launches", "syncs", "allocations")
    rows: list[tuple[str, ...]] = [(*heads, *of_gpu) if on_gpu else heads]
    for it in timings:
        name = f"{it.implementation} (fell back)" if it.fallbacks else it.implementation
        row: tuple[str, ...] = (name, str(it.host), f"{it.host_ratio:.1f}" if it.host_ratio else "-")
        if on_gpu:
            ratio = it.floor_ratio
            node = (str(it.node), f"{ratio:.2f}") if it.node is not None and ratio is not None else (NOT_CAPTURED, "-")
            launches = "-" if it.launches is None else str(it.launches)
            row = (*row, *node, f"{it.extent_bytes / 1e6:.2f}", launches, str(it.syncs), str(it.allocations))
        rows.append(row)
    return rows
