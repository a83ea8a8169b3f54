"""Batches of jobs: what a worker is given at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Verdict
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.marks import MARKS, Phase
from nsa_verify.device.driving import Executor
from nsa_verify.device.judge import Judge


class Job(NamedTuple):
    """A case, and the pairs of implementation and executor that are judged on it; ``repeat`` and ``delay`` are those of
    ``Judge.judge``."""

    case: Case
    pairs: Sequence[tuple[Implementation, Executor]]
    repeat: bool = True
    delay: bool = True


def judge_batch(jobs: Sequence[Job], device: str, careful: bool = False) -> Iterator[tuple[int, int, Verdict]]:
    """``(job, pair, verdict)`` of every pair of every job, in order.

    With ``careful`` the device has finished every call before the next begins, so that what is noted as in flight is
    what kills the process. Raises ``DeviceDied``.
    """
    marks = MARKS[0]
    for number, job in enumerate(jobs):
        marks.take(number, -1)
        marks.note(Phase.CHECKING)
        judge = Judge(job.case, device, careful)
        for pair, (implementation, executor) in enumerate(job.pairs):
            marks.take(number, pair)
            yield number, pair, judge.judge(implementation, executor, job.repeat, job.delay)
    marks.take(-1, -1)
    marks.note(Phase.IDLE)
