"""``nsa-verify replay``: run saved cases again."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console

from nsa_verify.core.findings import Outcome
from nsa_verify.core.registry import ImplementationError
from nsa_verify.core.sanitizers import Sanitizer
from nsa_verify.engine.corpus import CorpusError, scan
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.replaying import Replayed, Status, replay_saved
from nsa_verify.engine.sanitizing import Running, sanitize_saved
from nsa_verify.shell import options as opt
from nsa_verify.shell.options import ExitCode, Unable
from nsa_verify.shell.render import case_lines, counted, finding_lines, json_text, title
from nsa_verify.shell.reporter import console, say
from nsa_verify.shell.sanitizing import Progress, refuse

_STYLES = {Status.FIXED: "green", Status.FAILED: "bold red", Status.ERROR: "bold yellow"}
_CLEAN = "CLEAN"
"""What FIXED is called under a sanitizer, which says nothing of values."""


@click.command()
@click.argument("path", required=False)
@opt.together(
    opt.IMPL,
    opt.ONLY,
    opt.EXECUTOR,
    opt.SANITIZER,
    opt.DEVICE,
    opt.WORKERS,
    opt.NO_ISOLATION,
    opt.DEADLINE,
    opt.MAX_MEMORY,
    opt.CORPUS,
    opt.JSON,
    opt.NO_COLOR,
)
def replay(
    path: str | None,
    references: tuple[str, ...],
    only: tuple[str, ...],
    executors: tuple[str, ...],
    sanitizer: str | None,
    device: str,
    workers: str,
    no_isolation: bool,
    deadline: str,
    max_memory: str,
    corpus: str,
    as_json: bool,
    no_color: bool,
) -> None:
    """Run saved cases again: a file, a folder, or the whole corpus.

    FIXED: every applicable implementation agrees. FAILED: one disagrees. ERROR: the case could not be judged. The exit
    code is 2 if there is an ERROR, else 1 if there is a FAILED, else 0. With --sanitizer CLEAN stands for FIXED: the
    sanitizer has nothing to say.
    """
    from nsa_verify.device.select import DeviceError

    out = console(no_color)
    tool = None if sanitizer is None else Sanitizer(sanitizer)
    try:
        if tool is not None:
            refuse(tool, device, executors, workers, no_isolation, max_memory)
        paths = list(scan(Path(path if path is not None else corpus)))
        if not paths:
            raise Unable(f"{path or corpus}: holds no saved case; nothing was tested")
        count = opt.worker_count(workers, device, no_isolation, 1 + len(paths) // 20)
        plan = Plan(
            device=device,
            references=references,
            only=only,
            executors=tuple(dict.fromkeys(executors)),
            workers=count,
            isolate=not no_isolation,
            deadline_s=opt.seconds("--deadline", deadline),
            memory_bytes=opt.size("--max-memory", max_memory),
        )
        results, interrupted = _run(out, plan, tool, paths, as_json)
    except (CorpusError, DeviceError, EngineError, ImplementationError) as error:
        raise Unable(str(error)) from error
    counts = {_word(status, tool): sum(result.status is status for result in results) for status in Status}
    left = len(paths) - len(results)
    if as_json:
        cases = [_builtins(result, tool) for result in results]
        said = {"cases": cases, "counts": counts, "not_judged": left, "sanitizer": tool}
        say(out, json_text(said))
    else:
        not_judged = f"; interrupted, {left} not judged" if interrupted else ""
        say(out, ", ".join(f"{count} {word}" for word, count in counts.items()) + not_judged)
    failed = ExitCode.DISAGREE if counts[Status.FAILED] else ExitCode.AGREE
    code = ExitCode.UNABLE if counts[Status.ERROR] else failed
    raise SystemExit(ExitCode.INTERRUPTED if interrupted else code)


def _run(
    out: Console, plan: Plan, tool: Sanitizer | None, paths: list[Path], as_json: bool
) -> tuple[list[Replayed], bool]:
    """What became of the cases, each shown as it is known unless it is to be JSON; and whether it was interrupted."""
    results: list[Replayed] = []
    progress = Progress(out, tool)
    try:
        for event in replay_saved(plan, paths) if tool is None else sanitize_saved(plan, tool, paths):
            if isinstance(event, Replayed):
                results.append(event)
            if as_json:
                continue
            if isinstance(event, Running):
                progress.show(event)
            else:
                _show(out, event, len(paths), tool)
    except KeyboardInterrupt:
        return results, True
    finally:
        progress.end()
    return results, False


def _word(status: Status, tool: Sanitizer | None) -> str:
    return _CLEAN if tool is not None and status is Status.FIXED else status


def _show(out: Console, event: Hello | Replayed, paths: int, tool: Sanitizer | None) -> None:
    if isinstance(event, Hello):
        executors = ",".join(event.executors) + (f"; sanitizer {tool}" if tool is not None else "")
        say(out, f"{counted(paths, 'saved case')} on {event.description}; executors {executors}", "bold")
        return
    style, word = _STYLES[event.status], _word(event.status, tool)
    if event.problem:
        say(out, f"{word:6} {event.problem}", style)
        return
    judged = [verdict for verdict in event.verdicts if verdict.outcome in (Outcome.AGREE, Outcome.DISAGREE)]
    wrong = [verdict for verdict in judged if verdict.outcome is Outcome.DISAGREE]
    right = "agree" if tool is None else "clean"
    say(out, f"{word:6} {event.path} ({len(judged) - len(wrong)} of {len(judged)} {right})", style)
    for verdict in wrong:
        assert event.entry is not None
        for finding in verdict.findings if tool is not None else verdict.findings[:1]:
            say(out, f"  {finding.implementation} [{finding.executor}] {title(finding.code)}", "red")
            for line in [*case_lines(event.entry.case, finding.replay), *finding_lines(finding)]:
                say(out, f"    {line}")


def _builtins(result: Replayed, tool: Sanitizer | None) -> dict[str, object]:
    return {
        "path": str(result.path),
        "status": _word(result.status, tool),
        "problem": result.problem,
        "verdicts": msgspec.to_builtins(result.verdicts, order="sorted"),
    }
