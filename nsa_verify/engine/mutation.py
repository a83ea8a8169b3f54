"""Whether the search kills mutants: each is hunted in a run of its own, beside the correct one that it was made of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Code, Finding
from nsa_verify.engine.crew import Crew, Promise
from nsa_verify.engine.events import (
    CheckFailed,
    Disagreement,
    DisagreementSeen,
    RunFinished,
    StopReason,
    WorkersReady,
)
from nsa_verify.engine.plan import EAGER, Plan
from nsa_verify.engine.search import search
from nsa_verify.mutants import GRAPH, Mutant, Size

HELLO: tuple[str, ...] = ("vectorized",)
"""What is loaded to ask what there is."""


class Hunt(Struct, frozen=True, kw_only=True):
    """What mutants are hunted with: the same for all of them.

    ``executors`` of () means all that the device has, which ``hunt_all`` asks for; ``without`` are features that no
    case has.
    """

    seed: int = 0
    max_cases: int = 500
    executors: tuple[str, ...] = ()
    device: str = "auto"
    folder: str
    """Where the mutants' source is put."""
    shrink: bool = True
    without: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()
    """Checks that are not made."""
    gpus: tuple[str, ...] = ()


class Kill(Struct, kw_only=True):
    """What an executor saw of a mutant: its first disagreement, by the number of the case from 1 and the seconds of
    drawing and judging until then; 0: none. ``size`` and ``case`` are those of the minimal case, if it was shrunk."""

    executor: str
    cases: int = 0
    seconds: float = 0.0
    code: str = ""
    message: str = ""
    case: Case | None = None
    size: tuple[int, int, int] | None = None
    disagreed: int = 0
    runs: int = 0
    note: str = ""
    """What was said of its shrink."""
    problem: str = ""
    """Why this is no kill as it should be; empty: it is one."""


class Hunted(Struct, kw_only=True):
    """What became of one mutant. ``problems`` are those beside its kills': a correct implementation that was accused, a
    check that failed."""

    name: str
    kills: list[Kill]
    problems: list[str] = []
    cases: int = 0
    seconds: float = 0.0
    """All of it: starting, drawing, judging, shrinking."""
    interrupted: bool = False

    @property
    def killed(self) -> bool:
        """Whether every executor that should see it did, as it should, and nobody else was accused."""
        seen = bool(self.kills) and all(kill.cases and not kill.problem for kill in self.kills)
        return seen and not self.problems and not self.interrupted


def executors_of(mutant: Mutant, executors: Sequence[str]) -> tuple[str, ...]:
    """Those of ``executors`` that should see ``mutant``."""
    return tuple(it for it in executors if (EAGER if it == EAGER else GRAPH) in mutant.seen_by)


def hunt(mutant: Mutant, given: Hunt) -> Hunted:
    """Draw until every executor that should see ``mutant`` has, or ``max_cases`` were drawn; shrink what they saw.

    Raises ``MutantError``, ``ValueError`` for a hunt without executors that should see it, and what ``search`` raises.
    """
    began = ready = time.perf_counter()
    executors = executors_of(mutant, given.executors)
    if not executors:
        raise ValueError(f"{mutant.name}: none of the executors {', '.join(given.executors) or '()'} can see it")
    plan = Plan(
        seed=given.seed,
        max_examples=given.max_cases,
        executors=executors,
        device=given.device,
        references=(str(mutant.plant(Path(given.folder))),),
        only=(mutant.copy_name, mutant.original),
        shrink=given.shrink and Code.HANG not in mutant.codes,  # each probe would be waited for
        isolate=True,
        gpus=given.gpus,
        until=tuple((mutant.copy_name, it) for it in executors),
        without=given.without,
        blind=given.blind,
    )
    found = Hunted(name=mutant.name, kills=[Kill(executor=it) for it in executors])
    kills = {it.executor: it for it in found.kills}
    for event in search(plan, lambda it: it, "", {}):
        if isinstance(event, WorkersReady):
            ready = time.perf_counter()
        elif isinstance(event, CheckFailed):
            found.problems.append(f"the check failed on {event.implementation} [{event.executor}]: {event.reason}")
        elif isinstance(event, DisagreementSeen):
            name, executor = event.signature.implementation, event.signature.executor
            if name != mutant.copy_name:
                said = f"{event.finding.code} {event.finding.message}"
                found.problems.append(f"{name} [{executor}] is correct and was accused: {said}")
            elif not kills[executor].cases:
                _seen(kills[executor], mutant, event.finding, event.number, time.perf_counter() - ready)
        elif isinstance(event, Disagreement) and event.signature.implementation == mutant.copy_name:
            _shrunk(kills[event.signature.executor], mutant, event)
        elif isinstance(event, RunFinished):
            found.cases, found.interrupted = event.cases, event.stop is StopReason.INTERRUPTED
    for kill in found.kills if not found.interrupted else ():
        _asked(kill, mutant, found.cases, plan.shrink)
    found.seconds = time.perf_counter() - began
    return found


def _asked(kill: Kill, mutant: Mutant, cases: int, shrink: bool) -> None:
    """Note what is missing when all is done; a race need not come again, and so need not be shrunk."""
    if not kill.cases:
        kill.problem = f"survived {cases} case{'s' * (cases != 1)}"
    elif shrink and kill.size is None and not kill.problem and Code.NOT_DETERMINISTIC not in mutant.codes:
        kill.problem = f"was seen at case {kill.cases}, and not shrunk: {kill.note or 'nothing was said of it'}"


def _seen(kill: Kill, mutant: Mutant, finding: Finding, number: int, seconds: float) -> None:
    kill.cases, kill.seconds, kill.code, kill.message = number, seconds, str(finding.code), finding.message
    if finding.code not in mutant.codes:
        kill.problem = f"reported as {finding.code}, and not as {' or '.join(mutant.codes)}: {finding.message}"


def _shrunk(kill: Kill, mutant: Mutant, event: Disagreement) -> None:
    """Note the minimal case of what was seen first; other signatures of the pair are left as they were drawn."""
    if event.signature.code != kill.code:
        return
    kill.note = event.note
    if not event.probes:
        return
    size = Size.of(event.case)
    kill.case, kill.size = event.case, (size.replays, size.rows, size.length)
    kill.disagreed, kill.runs = event.reliability.disagreed, event.reliability.runs
    races = Code.NOT_DETERMINISTIC in mutant.codes  # and then a smaller case need not show it again
    if not kill.problem and not races and not size.fits(mutant.size):
        kill.problem = f"its minimal case is {size}, and should be at most {mutant.size}"


def hunt_all(mutants: Sequence[Mutant], given: Hunt, workers: int) -> Iterator[Hunted]:
    """``hunt`` each, several at a time; those that are done, in the order in which they are.

    Raises what ``hunt`` raises, and what keeps the workers from starting; a mutant that no longer fits its
    implementation is told before any is hunted. After Ctrl-C what is under way comes back as
    far as it got, no more is begun, and a ``KeyboardInterrupt`` is the end.
    """
    with Crew(workers, given.device) as crew:
        said = crew.hello(Plan(device=given.device, only=HELLO, isolate=True, gpus=given.gpus))
        chosen = given.executors or said.executors
        given = replace(given, executors=chosen)
        waiting = [it for it in mutants if executors_of(it, chosen) and (said.device == "cuda" or not it.needs_gpu)]
        for mutant in waiting:
            mutant.text()
        running: set[Promise[Hunted]] = set()
        while True:
            while waiting and len(running) < crew.workers and not crew.interrupted:
                running.add(crew.submit(hunt, waiting.pop(0), given))
            if not running:
                break
            done = crew.wait(running)
            running -= done
            for promise in done:
                result = crew.result(promise)
                if result is not None:
                    yield result
        if crew.interrupted:
            raise KeyboardInterrupt
