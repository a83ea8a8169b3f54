"""Batches of jobs: what a worker is given at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Verdict
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.marks import MARKS, Phase
from nsa_verify.device.driving import Executor, unseeded
from nsa_verify.device.judge import Doubt, Judge
from nsa_verify.device.kept import KeptGraphs
from nsa_verify.device.screening import Screen, Screened, flags_for, is_screened

JOBS_BETWEEN_WAITS: Final = {"cuda": 16, "cpu": 1}
"""Jobs whose flags are read at once: on a GPU that processes share, each wait costs a turn."""


class Job(NamedTuple):
    """A case, and the pairs of implementation and executor that are judged on it; ``repeat``, ``delay``, ``fresh``,
    ``picture`` and ``rerun`` are ``repeat``, ``delay``, ``afresh``, ``picture`` and ``rerun`` of ``Judge.judge``."""

    case: Case
    pairs: Sequence[tuple[Implementation, Executor]]
    repeat: bool = True
    delay: bool = True
    fresh: bool = True
    picture: bool = False
    rerun: bool = True


def judge_batch(jobs: Sequence[Job], device: str, careful: bool = False) -> Iterator[tuple[int, int, Verdict]]:
    """``(job, pair, verdict)`` of every pair of every job, in order.

    With ``careful`` the device has finished every call before the next begins, so that what is noted as in flight is
    what kills the process. Otherwise jobs are screened several at a time, and only what did not agree is run again and
    looked at. Raises ``DeviceDied``.
    """
    if careful:
        yield from _carefully(jobs, device)
    else:
        together = JOBS_BETWEEN_WAITS[device]
        for start in range(0, len(jobs), together):
            yield from _swiftly(jobs[start : start + together], start, device)
    MARKS[0].take(-1, -1)
    MARKS[0].note(Phase.IDLE)


def _carefully(jobs: Sequence[Job], device: str) -> Iterator[tuple[int, int, Verdict]]:
    marks = MARKS[0]
    for number, job in enumerate(jobs):
        marks.take(number, -1)
        marks.note(Phase.CHECKING)
        judge = Judge(job.case, device, careful=True)
        for pair, (implementation, executor) in enumerate(job.pairs):
            marks.take(number, pair)
            verdict = _judged(judge, job, implementation, executor, job.fresh)
            yield number, pair, verdict


def _swiftly(jobs: Sequence[Job], first: int, device: str) -> Iterator[tuple[int, int, Verdict]]:
    """Screen all of ``jobs``, the first of which is number ``first``; then tell, and look again where it is needed."""
    screen = Screen(device, sum(flags_for(job.case, len(job.pairs)) for job in jobs))
    with unseeded():
        screened = [_screened(screen, job, number, device) for number, job in enumerate(jobs, first)]
    flags = screen.flags()
    for number, (job, found) in enumerate(zip(jobs, screened, strict=True), first):
        judge: Judge | None = None
        for pair, it in enumerate(found):
            doubts: list[Doubt] = []
            if it is not None:
                doubts = [*it.doubts, *(doubt for flag, doubt in it.flags.items() if flags[flag])]
                if not doubts and not it.look_again:
                    yield number, pair, it.said
                    continue
            MARKS[0].take(number, pair)
            judge = judge or Judge(job.case, device)
            yield number, pair, _looked_at(judge, job, pair, it, doubts)


def _screened(screen: Screen, job: Job, number: int, device: str) -> list[Screened | None]:
    """What screening every pair of ``job`` gave; None for what is not screened."""
    marks = MARKS[0]
    marks.take(number, -1)
    marks.note(Phase.CHECKING)
    judge = Judge(job.case, device)
    judge.prepare(job.pairs)
    found: list[Screened | None] = []
    for pair, (implementation, executor) in enumerate(job.pairs):
        marks.take(number, pair)
        screens = is_screened(judge)
        found.append(screen.run(judge, implementation, executor, job.repeat, job.delay, job.fresh) if screens else None)
    return found


def _looked_at(judge: Judge, job: Job, pair: int, screened: Screened | None, doubts: Sequence[Doubt]) -> Verdict:
    """The verdict of a pair that was not screened, or did not come out of it clean."""
    implementation, executor = job.pairs[pair]
    if screened is None:
        return _judged(judge, job, implementation, executor, job.fresh)
    if screened.kept:
        # What an implementation did for other cases since its graphs were captured is no fault of this one.
        judge.rig.keeping(KeptGraphs).forget(implementation)
        doubts = ()
    return _judged(judge, job, implementation, executor, doubts=doubts)


def _judged(
    judge: Judge,
    job: Job,
    implementation: Implementation,
    executor: Executor,
    afresh: bool = True,
    doubts: Sequence[Doubt] = (),
) -> Verdict:
    return judge.judge(implementation, executor, job.repeat, job.delay, afresh, doubts, job.picture, job.rerun)
