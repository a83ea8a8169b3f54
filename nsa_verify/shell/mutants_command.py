"""``nsa-verify mutants``: planted bugs, and whether the search kills them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from statistics import median

import click
from msgspec import Struct
from rich.console import Console

from nsa_verify import __version__
from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine.mutation import Hunt, Hunted, Kill, executors_of, hunt_all
from nsa_verify.engine.plan import EAGER
from nsa_verify.engine.process import EngineError
from nsa_verify.mutants import CATALOGUE, Mutant, MutantError, Size
from nsa_verify.shell import gpus
from nsa_verify.shell import options as opt
from nsa_verify.shell.options import ExitCode, Unable
from nsa_verify.shell.render import columns, counted, json_text
from nsa_verify.shell.reporter import console, say

UNSEEN = "no mutant was hunted: none of those asked for can be seen here; see nsa-verify mutants --list"
ONLY = click.option("--only", multiple=True, metavar="NAME", help="Hunt this mutant only; may be repeated.")


class Summary(Struct, kw_only=True):
    """The kill matrix in numbers; cases and seconds are those to the kill, of all executors together.

    What was interrupted is neither killed nor a survivor, and not among ``mutants``.
    """

    mutants: int
    killed: int
    survivors: list[str]
    unseen: list[str]
    """Those that no executor here should see."""
    seconds: float
    median_cases: float
    most_cases: int
    seed: int
    max_cases: int
    interrupted: bool


@click.command()
@ONLY
@click.option("--seed", type=opt.SEEDS, default=0, help="The same seed draws the same cases. [default: 0]")
@click.option(
    "--max-cases", type=click.IntRange(1), default=500, help="A mutant that lives longer survives. [default: 500]"
)
@opt.together(opt.EXECUTOR, opt.DEVICE, opt.WORKERS)
@click.option("--no-shrink", is_flag=True, help="Do not shrink what is found: sizes are not asked for.")
@click.option("--list", "listed", is_flag=True, help="Say what there is, and hunt nothing.")
@opt.together(opt.JSON, opt.NO_COLOR)
def mutants(
    only: tuple[str, ...],
    seed: int,
    max_cases: int,
    executors: tuple[str, ...],
    device: str,
    workers: str,
    no_shrink: bool,
    listed: bool,
    as_json: bool,
    no_color: bool,
) -> None:
    """Plant bugs in correct implementations and see whether the search finds them: the proof that it can.

    Each mutant is hunted with the cases of a run of that seed, beside the implementation that it was made of, until
    every executor that should see it has. Exit code 1 if one survives, is reported under a code that does not fit,
    shrinks to a case larger than it should, or if a correct implementation is accused; 130 if it was interrupted.
    """
    out = console(no_color)
    chosen = _chosen(only)
    if listed:
        for line in _catalogue_lines(chosen, as_json):
            say(out, line)
        return
    count = opt.worker_count(workers, device, False, len(chosen))
    found: list[Hunted] = []
    interrupted, failed = False, None
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="nsa-verify-mutants-") as folder:
        given = Hunt(
            seed=seed,
            max_cases=max_cases,
            executors=tuple(dict.fromkeys(executors)),
            device=device,
            folder=folder,
            shrink=not no_shrink,
            gpus=gpus.placement(gpus.gpus_for(device)),
        )
        try:
            for it in _hunted(chosen, given, count):
                found.append(it)
                if not as_json:
                    say(out, _progress_line(it, len(found), len(chosen)), None if it.killed else "bold red")
        except KeyboardInterrupt:
            interrupted = True
        except Unable as error:  # what was hunted until then is told all the same
            failed = error
    summary = _summary(chosen, found, given, time.perf_counter() - began, interrupted)
    _end(out, chosen, found, summary, failed, as_json)


def _end(
    out: Console,
    chosen: Sequence[Mutant],
    found: Sequence[Hunted],
    summary: Summary,
    failed: Unable | None,
    as_json: bool,
) -> None:
    """Tell what was hunted, and exit; what kept the rest from being hunted is told last."""
    if not found and not summary.interrupted:
        raise failed or Unable(UNSEEN)
    if as_json:
        say(out, json_text({"summary": summary, "mutants": [_document(it) for it in found], "version": __version__}))
    else:
        _print(out, chosen, found, summary)
    if summary.interrupted:
        raise SystemExit(ExitCode.INTERRUPTED)
    if failed:
        raise failed
    if summary.survivors:
        raise SystemExit(ExitCode.DISAGREE)


def _chosen(only: Sequence[str]) -> list[Mutant]:
    for name in only:
        if name not in CATALOGUE:
            raise Unable(f"--only {name}: no such mutant; see nsa-verify mutants --list")
    return [it for it in CATALOGUE.values() if not only or it.name in only]


def _hunted(chosen: Sequence[Mutant], given: Hunt, workers: int) -> Iterator[Hunted]:
    from nsa_verify.device.select import DeviceError

    try:
        yield from hunt_all(chosen, given, workers)
    except (DeviceError, EngineError, ImplementationError, MutantError) as error:
        raise Unable(str(error)) from error


def _progress_line(it: Hunted, done: int, planned: int) -> str:
    verdict = "killed" if it.killed else "interrupted" if it.interrupted else "NOT KILLED"
    return f"{done:3d} of {planned}  {verdict}  {it.name} ({it.seconds:.1f} s)"


def _catalogue_lines(chosen: Sequence[Mutant], as_json: bool) -> Iterator[str]:
    if as_json:
        yield json_text({"mutants": [_declared(it) for it in chosen], "version": __version__})
        return
    rows = [("mutant", "made of", "class", "seen by", "codes", "size", "trigger")]
    for it in chosen:
        seen = ", ".join(it.seen_by) + (" on a GPU" if it.needs_gpu else "") if it.seen_by else "nobody"
        rows.append((it.name, it.original, it.kind, seen, " ".join(it.codes), str(it.size), it.trigger))
    yield from columns(rows)


def _summary(
    chosen: Sequence[Mutant], found: Sequence[Hunted], given: Hunt, seconds: float, interrupted: bool
) -> Summary:
    hunted = {it.name for it in found}
    cases = [kill.cases for it in found for kill in it.kills if kill.cases]
    done = [it for it in found if not it.interrupted]
    return Summary(
        mutants=len(done),
        killed=sum(it.killed for it in done),
        survivors=[it.name for it in done if not it.killed],
        unseen=[it.name for it in chosen if it.name not in hunted] if not interrupted else [],
        seconds=seconds,
        median_cases=median(cases) if cases else 0.0,
        most_cases=max(cases, default=0),
        seed=given.seed,
        max_cases=given.max_cases,
        interrupted=interrupted,
    )


def _document(it: Hunted) -> dict[str, object]:
    return {"hunted": it, "killed": it.killed, "declared": _declared(CATALOGUE[it.name])}


def _declared(mutant: Mutant) -> dict[str, object]:
    return {
        "name": mutant.name,
        "made_of": mutant.original,
        "kind": mutant.kind,
        "trigger": mutant.trigger,
        "codes": mutant.codes,
        "seen_by": mutant.seen_by,
        "needs_gpu": mutant.needs_gpu,
        "size": (mutant.size.replays, mutant.size.rows, mutant.size.length),
    }


def _print(out: Console, chosen: Sequence[Mutant], found: Sequence[Hunted], summary: Summary) -> None:
    say(out)
    order = {it.name: place for place, it in enumerate(chosen)}
    for line in columns(list(_matrix(sorted(found, key=lambda it: order[it.name])))):
        say(out, line)
    for it in found:
        for problem in (*(f"[{kill.executor}] {kill.problem}" for kill in it.kills if kill.problem), *it.problems):
            say(out, f"{it.name} {problem}", "bold red")
    if summary.unseen:
        say(out, f"not hunted, since no executor here can see them: {', '.join(summary.unseen)}")
    say(out)
    cases = f"{summary.median_cases:g} cases to the kill in the median, {summary.most_cases} at most"
    text = f"{summary.killed} of {counted(summary.mutants, 'mutant')} killed in {summary.seconds:.1f} s; {cases}"
    say(out, f"{text}; seed {summary.seed}", "bold green" if not summary.survivors else "bold red")


def _matrix(found: Sequence[Hunted]) -> Iterator[tuple[str, ...]]:
    """A row per mutant; per executor the code, the case that killed it, the seconds until then, the minimal size."""
    executors = list(dict.fromkeys(kill.executor for it in found for kill in it.kills))
    executors.sort(key=lambda it: it != EAGER)
    yield ("mutant", "class", *executors)
    for it in found:
        kills = {kill.executor: kill for kill in it.kills}
        mutant = CATALOGUE[it.name]
        cells = [_cell(kills[name], it.interrupted) if name in kills else _unasked(mutant, name) for name in executors]
        yield (it.name, mutant.kind, *cells)


def _unasked(mutant: Mutant, executor: str) -> str:
    return "cannot see it" if not executors_of(mutant, [executor]) else ""


def _cell(kill: Kill, interrupted: bool) -> str:
    if not kill.cases:
        return "interrupted" if interrupted else "SURVIVED"
    size = f"  {Size(*kill.size)}" if kill.size is not None else ""
    return f"{kill.code}  case {kill.cases}, {kill.seconds:.1f} s{size}{'  !' if kill.problem else ''}"
