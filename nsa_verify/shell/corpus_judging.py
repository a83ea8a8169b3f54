"""``nsa-verify corpus minimize`` and ``corpus promote``: what comes of running saved cases changes the corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine.corpus import CorpusError, Entry, check_writable
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.minimizing import Minimized, Result
from nsa_verify.engine.minimizing import minimize as minimized
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.promoting import Promoted
from nsa_verify.engine.promoting import promote as promoted
from nsa_verify.engine.replaying import Status
from nsa_verify.mutants import Size
from nsa_verify.shell import gpus
from nsa_verify.shell import options as opt
from nsa_verify.shell.corpus_names import crashing
from nsa_verify.shell.options import ExitCode, Unable
from nsa_verify.shell.render import counted, json_text
from nsa_verify.shell.reporter import console, say

Change = Minimized | Promoted
Work = Callable[[Plan, Path, Sequence[Path]], Iterator[Hello | Change]]

_OPTIONS = opt.together(
    *(opt.IMPL, opt.ONLY, opt.EXECUTOR, opt.DEVICE, opt.WORKERS, opt.NO_ISOLATION, opt.DEADLINE, opt.MAX_MEMORY),
    *(opt.CORPUS, opt.JSON, opt.NO_COLOR),
)
_STYLES = {"SMALLER": "green", "FIXED": "green", "OTHER": "red", "FAILED": "bold red", "ERROR": "bold yellow"}


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@_OPTIONS
def minimize(names: tuple[str, ...], corpus: str, as_json: bool, no_color: bool, **judging: Any) -> None:
    """Make crashing cases smaller, each still with the finding that it was saved for.

    NAME is a path, a file's stem or the start of its hash; without any, all crashing cases. A smaller case takes the
    place of its file. A case that does not fail any more is FIXED: it is left for corpus promote. The exit code is 2 if
    a case could not be judged.
    """
    raise SystemExit(_run(minimized, Result, names, Path(corpus), as_json, no_color, judging))


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@_OPTIONS
def promote(names: tuple[str, ...], corpus: str, as_json: bool, no_color: bool, **judging: Any) -> None:
    """Move crashing cases that are mended to regression.

    NAME is a path, a file's stem or the start of its hash; without any, all crashing cases. FIXED: it is a regression
    case now. FAILED: some implementation disagrees. ERROR: it could not be judged. The exit code is 2 if there is an
    ERROR, else 1 if there is a FAILED, else 0.
    """
    raise SystemExit(_run(promoted, Status, names, Path(corpus), as_json, no_color, judging))


def _run(
    work: Work,
    statuses: type[StrEnum],
    names: Sequence[str],
    root: Path,
    as_json: bool,
    no_color: bool,
    judging: dict[str, Any],
) -> ExitCode:
    """Do the work on the cases called so, tell what becomes of each, and make the exit code of it."""
    out = console(no_color)
    paths, mended = crashing(names, root)
    results: list[Change] = []
    interrupted = False
    width = max(map(len, statuses))
    try:
        for event in _events(work, root, paths, judging):
            if isinstance(event, Hello):
                if not as_json:
                    executors = ",".join(event.executors)
                    say(out, f"{counted(len(paths), 'case')} on {event.description}; executors {executors}", "bold")
                continue
            results.append(event)
            if not as_json:
                say(out, f"{event.status:{width}} {_told(event)}", _STYLES.get(event.status))
    except KeyboardInterrupt:
        interrupted = True
    counts = {str(status): sum(it.status == status for it in results) for status in statuses}
    left = len(paths) - len(results)
    if as_json:
        promoted_before = [str(path) for path in mended]
        told = {"cases": [_builtins(it) for it in results], "counts": counts, "not_judged": left}
        say(out, json_text(told | {"regression_already": promoted_before}))
    else:
        for path in mended:
            say(out, f"{path} is a regression case already")
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        summary += "" if any(it.target for it in results) else "; nothing was changed"
        say(out, summary + (f"; interrupted, {left} not judged" if interrupted else ""))
    failed = ExitCode.DISAGREE if counts.get(Status.FAILED) else ExitCode.AGREE
    code = ExitCode.UNABLE if counts[Status.ERROR] else failed
    return ExitCode.INTERRUPTED if interrupted else code


def _events(work: Work, root: Path, paths: Sequence[Path], judging: dict[str, Any]) -> Iterator[Hello | Change]:
    """What the work says; without cases no worker is started. What stops it is ``Unable``."""
    from nsa_verify.device.select import DeviceError

    try:
        plan = _plan(len(paths), **judging)
        if paths:
            check_writable(root)
            yield from work(plan, root, paths)
    except (CorpusError, DeviceError, EngineError, ImplementationError) as error:
        raise Unable(str(error)) from error


def _plan(
    cases: int,
    references: tuple[str, ...],
    only: tuple[str, ...],
    executors: tuple[str, ...],
    device: str,
    workers: str,
    no_isolation: bool,
    deadline: str,
    max_memory: str,
) -> Plan:
    return Plan(
        device=device,
        references=references,
        only=only,
        executors=tuple(dict.fromkeys(executors)),
        workers=opt.worker_count(workers, device, no_isolation, cases),
        isolate=not no_isolation,
        gpus=gpus.placement(gpus.gpus_for(device)),
        deadline_s=opt.seconds("--deadline", deadline),
        memory_bytes=opt.size("--max-memory", max_memory),
    )


def _told(change: Change) -> str:
    """What became of a case, in a line."""
    if change.problem:
        return change.problem
    if isinstance(change, Promoted):
        return f"{change.path} -> {change.target}"
    probes = counted(change.probes, "probe") + ("" if change.done else ", not done yet: run it again to go on")
    match change.status:
        case Result.SMALLER:
            assert change.before is not None
            assert change.after is not None
            size = f"{_size(change.before)} -> {_size(change.after)}"
            return f"{change.path} -> {change.target} ({size}; {probes})"
        case Result.SAME:
            return f"{change.path}: {change.target} has the same case, and stays"
        case Result.FIXED:
            return f"{change.path} does not fail any more; nsa-verify corpus promote moves it to regression"
    return f"{change.path} ({probes})"


def _size(entry: Entry) -> str:
    """Replays x expanded rows x longest ``seq_len``, and the cases to run before."""
    earlier = f" after {counted(len(entry.before), 'case')}" if entry.before else ""
    return f"{Size.of(entry.case)}{earlier}"


def _builtins(change: Change) -> dict[str, object]:
    told: dict[str, object] = {"path": str(change.path), "status": change.status, "problem": change.problem}
    told["target"] = str(change.target) if change.target is not None else None
    return told | ({"probes": change.probes, "done": change.done} if isinstance(change, Minimized) else {})
