"""The command line. Exit codes: 0 agree, 1 disagreement, 2 could not do its job, 130 interrupted."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import msgspec

from nsa_verify import __version__
from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Code, Outcome
from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine.closing import untested
from nsa_verify.engine.corpus import CorpusError, check_writable
from nsa_verify.engine.events import Disagreement, Event, Recovered, RunFinished, RunStarted, StopReason
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.saving import search_and_save
from nsa_verify.shell import gpus
from nsa_verify.shell import options as opt
from nsa_verify.shell.bench_commands import bench
from nsa_verify.shell.corpus_commands import corpus
from nsa_verify.shell.doctor import doctor
from nsa_verify.shell.fuzz_command import fuzz
from nsa_verify.shell.mutants_command import mutants
from nsa_verify.shell.options import ExitCode, Unable, command_line
from nsa_verify.shell.render import explanation_lines
from nsa_verify.shell.replay_command import replay
from nsa_verify.shell.reporter import GuardedReporter, JsonReporter, Reporter, TerminalReporter, console, say
from nsa_verify.shell.reports.opening import open_reports
from nsa_verify.strategies.profiles import PROFILES


@click.group(cls=opt.Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="nsa-verify")
def cli() -> None:
    """Verify native-sparse-attention metadata kernels against an independent oracle.

    Exit codes: 0 all agree, 1 a disagreement, 2 could not do its job (nothing tested counts), 130 interrupted.
    """


@cli.command()
@opt.together(opt.IMPL, opt.ONLY, opt.MODE, opt.EXECUTOR, opt.DEVICE)
@click.option("-n", "--max-examples", type=click.IntRange(1), help="Cases to draw. [default: the profile's]")
@click.option("--seed", type=opt.SEEDS, help="The same seed draws the same cases. [default: random]")
@click.option(
    "--max-time", default="0", metavar="TIME", help="Stop drawing after 90, 90s, 15m or 6h. [default: no limit]"
)
@click.option(
    "--profile",
    type=click.Choice(list(PROFILES)),
    default="dev",
    envvar="NSA_VERIFY_PROFILE",
    help="Hypothesis settings and number of cases. [default: dev]",
)
@click.option("--no-shrink", is_flag=True, help="Keep disagreeing cases as they were drawn.")
@click.option("--coverage", is_flag=True, help="Tell which features the cases had, and which pairs of them none had.")
@opt.together(opt.WORKERS, opt.NO_ISOLATION, opt.DEADLINE, opt.MAX_MEMORY, opt.CORPUS)
@opt.together(opt.REPORT, opt.JSON, opt.NO_COLOR)
def run(
    references: tuple[str, ...],
    only: tuple[str, ...],
    modes: tuple[Mode, ...],
    executors: tuple[str, ...],
    device: str,
    max_examples: int | None,
    seed: int | None,
    max_time: str,
    profile: str,
    no_shrink: bool,
    coverage: bool,
    workers: str,
    no_isolation: bool,
    deadline: str,
    max_memory: str,
    corpus: str,
    reports: tuple[str, ...],
    as_json: bool,
    no_color: bool,
) -> None:
    """Draw cases, run every implementation on each, compare every byte, shrink and save what disagrees."""
    out = console(no_color)
    plan = Plan(
        seed=secrets.randbelow(2**32) if seed is None else seed,
        max_examples=max_examples or PROFILES[profile],
        max_time_s=opt.seconds("--max-time", max_time),
        modes=tuple(mode for mode in Mode if mode in modes) or tuple(Mode),
        executors=tuple(dict.fromkeys(executors)),
        device=device,
        references=references,
        only=only,
        profile=profile,
        shrink=not no_shrink,
        coverage=coverage,
        isolate=not no_isolation,
        deadline_s=opt.seconds("--deadline", deadline),
        memory_bytes=opt.size("--max-memory", max_memory),
    )
    workers_wanted = opt.worker_count(workers, device, no_isolation, plan.rounds)
    plan = msgspec.structs.replace(plan, workers=workers_wanted, gpus=gpus.placement(gpus.gpus_for(device)))
    reporter = JsonReporter(out, plan) if as_json else TerminalReporter(out, plan)
    opened = open_reports(reports, plan, command_line())
    raise SystemExit(_run(opened.needs(plan), Path(corpus), opened.beside(GuardedReporter(reporter))))


def _run(plan: Plan, root: Path, reporter: Reporter) -> ExitCode:
    """Drive the search, tell the reporter, and make the exit code of what happened."""
    code, problem = ExitCode.UNABLE, ""
    try:
        check_writable(root)
        code, problem = _listen(plan, root, reporter)
    except (CorpusError, EngineError, ImplementationError, Unable) as error:
        problem = str(error)
    finally:
        reporter.close(code, problem)
    if problem:
        click.echo(problem if code is ExitCode.INTERRUPTED else f"Error: {problem}", err=True)
    return code


def _listen(plan: Plan, root: Path, reporter: Reporter) -> tuple[ExitCode, str]:
    finished: RunFinished | None = None
    started: RunStarted | None = None
    unsaved: list[str] = []
    try:
        for event in _events(plan, root):
            reporter.handle(event)
            if isinstance(event, RunStarted):
                started = event
            elif isinstance(event, RunFinished):
                finished = event
            elif isinstance(event, Recovered):
                unsaved.extend(event.unsaved)
            elif isinstance(event, Disagreement) and event.problem:
                unsaved.append(event.problem)
    except KeyboardInterrupt:
        lost = "before the first case was judged" if started is None else "twice: the next run saves what is not saved"
        return ExitCode.INTERRUPTED, f"interrupted {lost}"
    assert finished is not None
    assert started is not None
    return exit_code(finished, started, plan, unsaved)


def _events(plan: Plan, root: Path) -> Iterator[Event]:
    from nsa_verify.device.select import DeviceError

    chosen = {
        "cases": str(plan.max_examples),
        "modes": ",".join(plan.modes),
        "executors": ",".join(plan.executors),
        "profile": plan.profile,
        "workers": str(plan.workers),
        "corpus": str(root),
    }
    if plan.max_time_s:
        chosen["max-time"] = f"{plan.max_time_s:g} s"
    if plan.only:
        chosen["only"] = ",".join(plan.only)
    try:
        yield from search_and_save(plan, root, __version__, chosen, command_line())
    except DeviceError as error:
        raise Unable(str(error)) from error


def exit_code(finished: RunFinished, started: RunStarted, plan: Plan, unsaved: Sequence[str]) -> tuple[ExitCode, str]:
    """The exit code of a finished run, and the sentence that says what kept it from doing its job, or ``""``."""
    if finished.stop is StopReason.INTERRUPTED:
        return ExitCode.INTERRUPTED, ""
    if unsaved:
        return ExitCode.UNABLE, unsaved[0]
    if finished.signatures:
        return ExitCode.DISAGREE, ""
    if finished.matrix.total(Outcome.UNKNOWN):
        return ExitCode.UNABLE, "some verdicts are unknown: the check itself failed, see above"
    more = "give it more time" if finished.stop is StopReason.TIME else "draw more cases, or other modes with --mode"
    names = [it.name for it in started.subjects]
    problem = untested(finished.matrix, names, bool(plan.references or plan.only), more)
    return (ExitCode.UNABLE, problem) if problem else (ExitCode.AGREE, "")


@cli.command()
@click.argument("code")
def explain(code: str) -> None:
    """Say what a code means, what usually causes it and what to do."""
    known = {str(found).upper(): found for found in Code}
    if code.upper() not in known:
        raise Unable(f"{code}: no such code; there are {', '.join(known)}")
    for line in explanation_lines(known[code.upper()]):
        say(console(no_color=True), line)


cli.add_command(bench)
cli.add_command(replay)
cli.add_command(corpus)
cli.add_command(doctor)
cli.add_command(mutants)
cli.add_command(fuzz)
