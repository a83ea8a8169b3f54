"""``nsa-verify bench``: measurements."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from msgspec import Struct

from nsa_verify import __version__
from nsa_verify.core.case import INT32_MAX, MAX_BATCH_SIZE, MAX_STEPS, MAX_TABLE_WIDTH
from nsa_verify.core.findings import Outcome
from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine.events import Event, RoundFinished, RunFinished, RunStarted, StopReason
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.search import search
from nsa_verify.shell import gpus
from nsa_verify.shell import options as opt
from nsa_verify.shell.options import ExitCode, Unable
from nsa_verify.shell.render import columns, counted, json_text
from nsa_verify.shell.reporter import console, say
from nsa_verify.shell.timing_tables import times
from nsa_verify.shell.timings import LEAST

ENDLESS = 10_000_000
LONG = 20
"""Digits that no size has."""
WORKER = "worker: "


def _sizes(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """``B,W,LONGEST``, ``B,W,LONGEST,S`` or ``B,W,LONGEST,S,REST`` as five numbers, each once."""
    found = []
    for value in values:
        numbers = value.split(",")
        if len(numbers) not in (3, 4, 5) or not all(it.isdecimal() and len(it) < LONG and int(it) for it in numbers):
            raise click.BadParameter(f"{value!r} is not B,W,LONGEST[,S[,REST]], as 32,131080,4000", param=parameter)
        count, width, longest, steps, rest = (*map(int, numbers), *(1, 0)[len(numbers) - 3 :])
        if refusal := _refusal(count, width, longest, steps, rest):
            raise click.BadParameter(f"{value!r}: {refusal}", param=parameter)
        found.append((count, width, longest, steps, rest))
    return tuple(dict.fromkeys(found))


def _refusal(count: int, width: int, longest: int, steps: int, rest: int) -> str | None:
    """Why no engine has this size, and which one it has."""
    from nsa_verify.device.timing import Size

    if longest > width:
        return f"a KV length of {longest} is wider than the table"
    size = Size(batch_size=count, table_width=width, longest=longest, num_steps=steps, rest=rest)
    tokens = size.num_draft_tokens
    for name, value, least, most in (
        ("B", count, 1, MAX_BATCH_SIZE),
        ("W", width, tokens + 1, MAX_TABLE_WIDTH),
        ("LONGEST", longest, tokens, width),
        ("S", steps, 1, MAX_STEPS),
        ("REST", rest or longest, tokens, longest),
    ):
        if not least <= value <= most:
            return f"{name} = {value} must be between {least} and {most}"
    if rest and count == 1:
        return f"REST = {rest} is of all requests but the first, and B = 1 has no other; leave it out"
    if rest and longest + (count - 1) * rest + count * tokens > INT32_MAX:
        return f"sums of {count - 1} lengths of {rest} exceed int32; ask for fewer requests or shorter ones"
    if not rest and count * (longest + tokens) > INT32_MAX:
        return f"sums of {count} lengths of {longest} exceed int32; ask for fewer requests or shorter ones"
    try:
        size.setup()
    except ValueError as error:
        return str(error)
    return None


@click.group(cls=opt.Group, invoke_without_command=True)
@opt.together(opt.IMPL, opt.ONLY, opt.MODE, opt.DEVICE, opt.WORKERS)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    callback=_sizes,
    metavar="B,W,LONGEST[,S[,REST]]",
    help="Requests, columns, the longest KV length, steps, the KV length of all requests but the first; may be"
    " repeated. [default: see docs/performance.md]",
)
@click.option(
    "--schedule", is_flag=True, help="Measure each size with paged_mqa_schedule and paged_mqa_ctx_lens refreshed too."
)
@click.option("--seed", type=opt.SEEDS, default=0, help="Of cases and of lengths. [default: 0]")
@click.option(
    "-n",
    "--max-examples",
    type=click.IntRange(1),
    default=200,
    help="Cases that are drawn; each implementation must agree on those that it runs before it is timed, on"
    f" {LEAST} at least of each mode, eagerly and from captured graphs. [default: 200]",
)
@click.option(
    "--repetitions", type=click.IntRange(3), default=9, help="Medians are of so many, interleaved. [default: 9]"
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write it to FILE too, as a page with charts; needs nsa-verify[report].",
)
@opt.together(opt.JSON, opt.NO_COLOR)
@click.pass_context
def bench(
    context: click.Context,
    references: tuple[str, ...],
    only: tuple[str, ...],
    modes: tuple[Any, ...],
    device: str,
    workers: str,
    sizes: tuple[tuple[int, ...], ...],
    schedule: bool,
    seed: int,
    max_examples: int,
    repetitions: int,
    html: Path | None,
    as_json: bool,
    no_color: bool,
) -> None:
    """Measure how fast implementations are, after they agreed with the oracle; or what the search costs.

    Prints for each implementation, mode and size the host time of a call, and on a GPU the device time of a call inside
    a captured graph, its launches, waits and allocations, what it moves at least by the write extent it declares, and
    how many times the floor it takes: an empty node, and what is live at the bandwidth of a copy through DRAM, both
    measured in the same run; nodes use the same buffers again, so what fits into L2 is warm and may be faster. Numbers
    are microseconds, medians with the least and the most. On a GPU it also counts the forms of Triton kernels that were
    compiled, over all sizes of as many steps. What disagrees, there or on the inputs that are timed, is not timed: exit
    code 1. What was judged in too few cases is not timed either: exit code 2.
    """
    if context.invoked_subcommand is not None:
        _refuse_lost(context)
        return
    plan = Plan(
        seed=seed,
        max_examples=max_examples,
        modes=tuple(dict.fromkeys(modes)) or Plan().modes,
        device=device,
        references=references,
        only=only,
        shrink=False,
        isolate=True,
        workers=opt.worker_count(workers, device, False, max_examples),
        gpus=gpus.placement(gpus.gpus_for(device)),
    )
    times(plan, sizes, schedule, repetitions, as_json, html, console(no_color))


def _refuse_lost(context: click.Context) -> None:
    """Raises ``Unable`` for options in front of a subcommand, which has its own."""
    given = [
        max(it.opts, key=len)
        for it in context.command.params
        if context.get_parameter_source(it.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        command = context.invoked_subcommand
        raise Unable(
            f"{', '.join(given)} in front of {command} would be lost: give {command} its options behind its name"
        )


class Rate(Struct, frozen=True):
    """What was measured: cases in seconds, and the seconds of searchers and workers by name, all of them together;
    ``stop`` is why it ended."""

    description: str
    subjects: tuple[str, ...]
    executors: tuple[str, ...]
    seed: int
    workers: int
    cases: int
    seconds: float
    spent: dict[str, float]
    stop: StopReason

    @property
    def cases_per_s(self) -> float:
        """In total."""
        return self.cases / self.seconds if self.seconds else 0.0


@bench.command("search")
@opt.together(opt.IMPL, opt.ONLY, opt.MODE, opt.EXECUTOR, opt.DEVICE, opt.WORKERS, opt.NO_ISOLATION)
@click.option("--seed", type=opt.SEEDS, default=0, help="The same seed draws the same cases. [default: 0]")
@click.option("--warm-up", default="5s", metavar="TIME", help="Run for so long before measuring. [default: 5s]")
@click.option("--max-time", default="10s", metavar="TIME", help="Measure for so long. [default: 10s]")
@opt.together(opt.JSON, opt.NO_COLOR)
def search_rate(
    references: tuple[str, ...],
    only: tuple[str, ...],
    modes: tuple[Any, ...],
    executors: tuple[str, ...],
    device: str,
    workers: str,
    no_isolation: bool,
    seed: int,
    warm_up: str,
    max_time: str,
    as_json: bool,
    no_color: bool,
) -> None:
    """Cases a second, per worker and in total, and what a case's time is spent on.

    Cases are small, of one to three replays; they are drawn and judged as by ``run``, and nothing is saved. Exit code 1
    if an implementation disagrees: a rate of wrong results is none.
    """
    warm_up_s, measured_s = opt.seconds("--warm-up", warm_up), opt.seconds("--max-time", max_time)
    plan = Plan(
        seed=seed,
        max_examples=ENDLESS,
        max_time_s=warm_up_s + measured_s,
        modes=tuple(dict.fromkeys(modes)) or Plan().modes,
        executors=tuple(dict.fromkeys(executors)),
        device=device,
        references=references,
        only=only,
        shrink=False,
        short_cases=True,
        isolate=not no_isolation,
        workers=opt.worker_count(workers, device, no_isolation, ENDLESS),
        gpus=gpus.placement(gpus.gpus_for(device)),
    )
    rate, finished = _measure(plan, warm_up_s)
    out = console(no_color)
    if as_json:
        split = {name: seconds / rate.cases if rate.cases else 0.0 for name, seconds in rate.spent.items()}
        say(out, json_text({"rate": rate, "cases_per_s": rate.cases_per_s, "seconds_per_case": split}))
    else:
        for line in _lines(rate):
            say(out, line)
    if finished.stop is StopReason.INTERRUPTED:
        raise SystemExit(ExitCode.INTERRUPTED)
    if finished.signatures or finished.matrix.total(Outcome.UNKNOWN):
        raise SystemExit(ExitCode.DISAGREE if finished.signatures else ExitCode.UNABLE)
    if not rate.cases:
        raise Unable("no case was judged after the warm-up; give it more time with --max-time")


def _measure(plan: Plan, warm_up_s: float) -> tuple[Rate, RunFinished]:
    """Run ``plan``, and count from the first round on that ends after the warm-up."""
    from nsa_verify.device.select import DeviceError

    started: RunStarted | None = None
    began = warm = last = 0.0
    cases, spent = 0, Counter[str]()
    try:
        for event in _quietly(plan):
            now = time.perf_counter()
            if isinstance(event, RunStarted):
                started, began = event, now
            elif isinstance(event, RoundFinished) and not warm:
                warm = now if now - began > warm_up_s else 0.0
            elif isinstance(event, RoundFinished):
                cases, last = cases + event.cases, now
                spent.update(event.spent)
            elif isinstance(event, RunFinished):
                assert started is not None
                names = tuple(subject.name for subject in started.subjects)
                rate = Rate(
                    description=started.device,
                    subjects=names,
                    executors=started.executors,
                    seed=plan.seed,
                    workers=plan.workers,
                    cases=cases,
                    seconds=last - warm if cases else 0.0,
                    spent=dict(spent),
                    stop=event.stop,
                )
                return rate, event
    except (DeviceError, EngineError, ImplementationError) as error:
        raise Unable(str(error)) from error
    raise AssertionError("a search ends with RunFinished")


def _quietly(plan: Plan) -> Iterator[Event]:
    return search(plan, lambda found: found, __version__, {})


def _lines(rate: Rate) -> Iterator[str]:
    yield f"nsa-verify {__version__} on {rate.description}"
    yield f"{counted(len(rate.subjects), 'implementation')}, executors {', '.join(rate.executors)}; seed {rate.seed}"
    per_worker = rate.cases_per_s / rate.workers
    yield (
        f"{counted(rate.cases, 'case')} in {rate.seconds:.1f} s: {rate.cases_per_s:.1f} cases/s in total,"
        f" {per_worker:.1f} per worker, {counted(rate.workers, 'worker')}; {rate.stop}"
    )
    if not rate.cases:
        return
    rows = [["process", "spent on", "ms a case", "share"]]
    for process, prefix in (("searcher", ""), ("worker", WORKER)):
        mine = {
            name.removeprefix(WORKER): seconds
            for name, seconds in rate.spent.items()
            if name.startswith(WORKER) == bool(prefix)
        }
        whole = sum(mine.values()) or 1.0
        for name, seconds in sorted(mine.items(), key=lambda item: -item[1]):
            rows.append([process, name, f"{1e3 * seconds / rate.cases:.3f}", f"{100 * seconds / whole:.0f}%"])
    yield from columns(rows)
