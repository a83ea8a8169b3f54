"""``nsa-verify replay``: run saved cases again."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from nsa_verify.core.findings import Outcome
from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine.corpus import CorpusError, scan
from nsa_verify.engine.crew import EngineError
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.replaying import Replayed, Status, replay_saved
from nsa_verify.engine.worker import Hello
from nsa_verify.shell import options as opt
from nsa_verify.shell.options import ExitCode, Unable
from nsa_verify.shell.render import case_lines, finding_lines, json_text, title
from nsa_verify.shell.reporter import console, say

_STYLES = {Status.FIXED: "green", Status.FAILED: "bold red", Status.ERROR: "bold yellow"}


@click.command()
@click.argument("path", required=False)
@opt.together(
    opt.IMPL, opt.ONLY, opt.EXECUTOR, opt.DEVICE, opt.WORKERS, opt.NO_ISOLATION, opt.CORPUS, opt.JSON, opt.NO_COLOR
)
def replay(
    path: str | None,
    references: tuple[str, ...],
    only: tuple[str, ...],
    executors: tuple[str, ...],
    device: str,
    workers: str,
    no_isolation: bool,
    corpus: str,
    as_json: bool,
    no_color: bool,
) -> None:
    """Run saved cases again: a file, a folder, or the whole corpus.

    FIXED: every applicable implementation agrees. FAILED: one disagrees. ERROR: the case could not be judged. The exit
    code is 2 if there is an ERROR, else 1 if there is a FAILED, else 0.
    """
    from nsa_verify.device.select import DeviceError

    out = console(no_color)
    try:
        paths = list(scan(Path(path if path is not None else corpus)))
        if not paths:
            raise Unable(f"{path or corpus}: holds no saved case; nothing was tested")
        count = opt.worker_count(workers, device, no_isolation, 1 + len(paths) // 20)
        chosen = tuple(dict.fromkeys(executors)) or ("eager",)
        plan = Plan(device=device, references=references, only=only, executors=chosen, workers=count)
        results = []
        for event in replay_saved(plan, paths):
            if isinstance(event, Hello):
                if not as_json:
                    say(out, f"{len(paths)} saved cases on {event.description}", "bold")
            else:
                results.append(event)
                if not as_json:
                    _show(out, event)
    except (CorpusError, DeviceError, EngineError, ImplementationError) as error:
        raise Unable(str(error)) from error
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise SystemExit(ExitCode.INTERRUPTED) from None
    counts = {status: sum(result.status is status for result in results) for status in Status}
    if as_json:
        say(out, json_text({"cases": [_builtins(result) for result in results], "counts": counts}))
    else:
        say(out, ", ".join(f"{count} {status}" for status, count in counts.items()))
    failed = ExitCode.DISAGREE if counts[Status.FAILED] else ExitCode.AGREE
    raise SystemExit(ExitCode.UNABLE if counts[Status.ERROR] else failed)


def _show(out: object, result: Replayed) -> None:
    from rich.console import Console

    assert isinstance(out, Console)
    judged = [verdict for verdict in result.verdicts if verdict.outcome in (Outcome.AGREE, Outcome.DISAGREE)]
    wrong = [verdict for verdict in judged if verdict.outcome is Outcome.DISAGREE]
    say(
        out,
        f"{result.status:6} {result.path} ({len(judged) - len(wrong)} of {len(judged)} agree)",
        _STYLES[result.status],
    )
    if result.problem:
        say(out, f"       {result.problem}")
    for verdict in wrong:
        finding = verdict.primary
        assert finding is not None
        say(out, f"  {finding.implementation} [{finding.executor}] {title(finding.code)}", "red")
        assert result.entry is not None
        for line in [*case_lines(result.entry.case, finding.replay), *finding_lines(finding)]:
            say(out, f"    {line}")


def _builtins(result: Replayed) -> dict[str, object]:
    return {
        "path": str(result.path),
        "status": result.status,
        "problem": result.problem,
        "verdicts": msgspec.to_builtins(result.verdicts),
    }
