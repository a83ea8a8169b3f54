"""What it takes to have tasks judged, wherever that happens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Verdict
from nsa_verify.engine.messages import Judgement, Pair, Task


class Outcomes(NamedTuple):
    """What a batch gave: judgements by task, in the order of its pairs; ``tasks`` that were left out are missing.

    ``before`` holds, for a death that could not be repeated alone, the cases that the worker had judged before.
    """

    judgements: list[list[Judgement]]
    before: dict[tuple[int, int], list[Case]]


class Judging(ABC):
    """Has tasks judged. ``stopped`` is asked whether to end with what there is."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._asked_to_stop, self._heeds = stopped, True
        self.spent: Counter[str] = Counter()
        """The seconds of workers by name."""

    @abstractmethod
    def start(self, tasks: Sequence[Task], until: float = 0.0) -> None:
        """Hand over tasks; ``finish`` has what became of them."""

    @abstractmethod
    def finish(self) -> Outcomes:
        """Wait for the tasks handed over. A task that was left out, because of ``until`` or ``stopped``, is missing."""

    @abstractmethod
    def judge_alone(self, case: Case, pair: Pair, careful: bool, rerun: bool = True) -> Verdict | None:
        """The verdict on one case; None if it was left out because everything was asked to stop.

        ``careful`` is for cases that are expected to kill: each call is finished before the next, and a death is one.
        ``rerun`` is that of ``Task``, for other cases.
        """

    def judge(self, tasks: Sequence[Task], until: float = 0.0) -> Outcomes:
        """``start`` and ``finish``."""
        self.start(tasks, until)
        return self.finish()

    def judge_whatever(self, case: Case, pair: Pair, careful: bool) -> Verdict:
        """``judge_alone``, also when everything was asked to stop: what is nearly done is worth finishing."""
        self._heeds = False
        try:
            verdict = self.judge_alone(case, pair, careful)
            assert verdict is not None
            return verdict
        finally:
            self._heeds = True

    def pictured(self, case: Case, pair: Pair) -> Verdict:
        """The verdict on one case with its pictures, also when everything was asked to stop; a death has none."""
        self._heeds = False
        try:
            return self.judge([Task(case, (pair,), picture=True)]).judgements[0][0].verdict
        finally:
            self._heeds = True

    def _judged(self, case: Case, pair: Pair, rerun: bool) -> Verdict | None:
        judged = self.judge([Task(case, (pair,), rerun=rerun)]).judgements
        return judged[0][0].verdict if judged else None

    def _stopped(self) -> bool:
        return self._heeds and self._asked_to_stop()
