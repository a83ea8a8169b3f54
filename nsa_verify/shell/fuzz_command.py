"""``nsa-verify fuzz``: a campaign, for minutes before a merge or for the night."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from click.core import ParameterSource

from nsa_verify import __version__
from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine import cluster
from nsa_verify.engine.campaign import BATCH, CHANGE, campaign
from nsa_verify.engine.corpus import CorpusError, check_writable
from nsa_verify.engine.crew import Deferred
from nsa_verify.engine.events import CampaignFinished, Disagreement, Event
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.totals import Ask
from nsa_verify.engine.triage import Baseline
from nsa_verify.shell import options as opt
from nsa_verify.shell.corpus_commands import prune_corpus
from nsa_verify.shell.corpus_judging import minimize
from nsa_verify.shell.engines import placed
from nsa_verify.shell.environment import environment
from nsa_verify.shell.fuzz_reporter import FuzzReporter
from nsa_verify.shell.options import ExitCode, Unable, command_line
from nsa_verify.shell.reporter import GuardedReporter, Reporter, console
from nsa_verify.shell.reports.opening import open_reports

BUDGETS: Final = {CHANGE: "10m", BATCH: "6h"}
PRUNE: Final = "prune"


@click.command()
@click.option(
    "--max-time",
    metavar="TIME",
    callback=opt.not_empty,
    help="How long: 90s, 15m or 6h. [default: 10m for change, 6h for batch]",
)
@click.option(
    "--mode",
    "kind",
    type=click.Choice([*BUDGETS, PRUNE]),
    default=BATCH,
    help="batch uses all of its time; change ends at the first finding that is new; prune draws nothing, and does what"
    " corpus minimize and corpus prune do. [default: batch]",
)
@click.option(
    "--baseline",
    metavar="FILE",
    callback=opt.not_empty,
    help="Findings that are accepted until a date; see docs/nightly.md.",
)
@click.option(
    "--slice", "slice_time", default="0", metavar="TIME", help="How long each search is. [default: by --max-time]"
)
@click.option("--seed", type=opt.SEEDS, help="Of a new campaign; one that goes on keeps its own. [default: random]")
@click.option(
    "--database",
    default="",
    envvar="NSA_VERIFY_DATABASE",
    callback=opt.not_empty,
    metavar="URL|DIR",
    help="Share minimal cases with campaigns on other machines: redis://host:port/number (needs nsa-verify[redis]), or"
    " a folder that all of them have.",
)
@opt.together(opt.IMPL, opt.ONLY, opt.EXECUTOR, opt.DEVICE, opt.WORKERS, opt.NO_ISOLATION, opt.DEADLINE, opt.MAX_MEMORY)
@opt.together(opt.ENGINE, opt.RAY_ADDRESS, opt.CORPUS, opt.REPORT, opt.NO_COLOR)
def fuzz(
    max_time: str | None,
    kind: str,
    baseline: str | None,
    slice_time: str,
    seed: int | None,
    database: str,
    references: tuple[str, ...],
    only: tuple[str, ...],
    executors: tuple[str, ...],
    device: str,
    workers: str,
    no_isolation: bool,
    deadline: str,
    max_memory: str,
    engine: str,
    ray_address: str,
    corpus: str,
    reports: tuple[str, ...],
    no_color: bool,
) -> None:
    """Search for a given time with many workers, and go on from what the corpus has of earlier campaigns.

    Saved cases are replayed first. Modes, implementations and executors that are behind, or find new things, get more
    of the time. Findings are grouped; each group has one minimal case in the corpus. Exit code 1 if any group is open
    that no baseline accepts.
    """
    if kind == PRUNE:
        raise SystemExit(_prune(click.get_current_context()))
    budget = opt.seconds("--max-time", max_time or BUDGETS[kind])
    if not budget:
        raise Unable(f"--max-time {max_time}: give a campaign some time, such as 15m or 6h")
    plan = Plan(
        seed=secrets.randbelow(2**32) if seed is None else seed,
        executors=tuple(dict.fromkeys(executors)),
        device=device,
        references=references,
        only=only,
        isolate=not no_isolation,
        deadline_s=opt.seconds("--deadline", deadline),
        memory_bytes=opt.size("--max-memory", max_memory),
    )
    slice_s, accepted = opt.seconds("--slice", slice_time), _baseline(baseline)
    reporter = opened = open_reports(reports, plan, command_line())
    code, problem = ExitCode.UNABLE, ""
    with Deferred():  # a signal that comes when the campaign is over ends no report
        try:
            check_writable(Path(corpus))
            plan = placed(plan, engine, ray_address, workers)
            reporter = opened.beside(GuardedReporter(FuzzReporter(console(no_color), plan)))
            ask = Ask(
                kind=kind,
                plan=opened.needs(plan),
                root=Path(corpus),
                budget_s=budget,
                version=__version__,
                command=command_line(),
                environment=environment(),
                baseline=accepted,
                slice_s=slice_s,
                database=database,
            )
            code, problem = _listen(ask, reporter)
        except (CorpusError, EngineError, ImplementationError, Unable) as error:
            problem = str(error)
        finally:
            reporter.close(code, problem)
            cluster.disconnect()
    raise SystemExit(_told(code, problem))


def _told(code: ExitCode, problem: str) -> ExitCode:
    """``code``, once what goes with it is on standard error."""
    if problem:
        click.echo(problem if code is ExitCode.INTERRUPTED else f"Error: {problem}", err=True)
    return code


def _prune(context: click.Context) -> int:
    """Minimise, and drop what others cover; the graver exit code of both."""
    given = context.params
    if context.get_parameter_source("database") is ParameterSource.COMMANDLINE:
        raise Unable("--mode prune finds nothing to share: leave out --database")
    if (
        any(given[it] for it in ("max_time", "baseline", "reports"))
        or given["seed"] is not None
        or opt.seconds("--slice", given["slice_time"])
    ):
        raise Unable("--mode prune draws nothing: leave out --max-time, --slice, --seed, --baseline and --report")
    if given["engine"] == cluster.RAY or given["ray_address"]:
        raise Unable("--mode prune works on this machine alone: leave out --engine and --ray-address")
    names = [it.name for it in minimize.params]
    shared = {name: value for name, value in given.items() if name in names}
    where = {name: given[name] for name in ("corpus", "no_color")}
    minimized = _code_of(context, minimize, names=(), as_json=False, **shared)
    if minimized == ExitCode.INTERRUPTED:
        return minimized
    return max(minimized, _code_of(context, prune_corpus, dry_run=False, as_json=False, **where))


def _code_of(context: click.Context, command: click.Command, **given: object) -> int:
    try:
        context.invoke(command, **given)
    except SystemExit as error:
        return int(error.code or 0)
    return ExitCode.AGREE


def _baseline(name: str | None) -> Baseline:
    try:
        return Baseline.read(Path(name)) if name else Baseline()
    except CorpusError as error:
        raise Unable(str(error)) from error


def _listen(ask: Ask, reporter: Reporter) -> tuple[ExitCode, str]:
    finished: CampaignFinished | None = None
    unsaved = ""
    try:
        for event in _events(ask):
            reporter.handle(event)
            if isinstance(event, CampaignFinished):
                finished = event
            elif isinstance(event, Disagreement):
                unsaved = unsaved or event.problem
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED, "interrupted twice: the next campaign saves what is not saved"
    assert finished is not None
    if unsaved:
        return ExitCode.UNABLE, unsaved
    code = ExitCode(finished.exit_code)
    problem = ""
    if code is ExitCode.UNABLE:
        problem = next(iter(finished.problems), "some verdicts are unknown: the check itself failed, see above")
    return code, problem


def _events(ask: Ask) -> Iterator[Event]:
    from nsa_verify.device.select import DeviceError

    try:
        yield from campaign(ask)
    except DeviceError as error:
        raise Unable(str(error)) from error
