"""A worker process and its keeper: whatever a case does to the worker becomes a finding, and the next worker goes on.

The keeper lives in the engine, draws nothing and judges nothing: it sends tasks, reads replies, watches the marks, ends
a worker that is silent or eats the memory, and finds out who was to blame.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from nsa_verify.core.case import Case, Mode
from nsa_verify.core.findings import Code, Finding, Outcome, Verdict
from nsa_verify.core.marks import Mark, Marks, Phase
from nsa_verify.core.spent import JUDGE, spending
from nsa_verify.engine import worker
from nsa_verify.engine.judging import Judging, Outcomes
from nsa_verify.engine.messages import (
    Applicable,
    Ask,
    Batch,
    Broken,
    Died,
    Done,
    Hello,
    Judged,
    Judgement,
    Pair,
    Refused,
    Reply,
    Starting,
    Task,
)
from nsa_verify.engine.plan import EAGER, Plan
from nsa_verify.engine.process import START_S, Death, EngineError, WorkerDied, WorkerProcess, memory_allowance

HISTORY: Final = 200
"""How many cases before a death are kept, in case it needs them."""
COMPILE_S: Final = 300.0
"""How long a compilation may take."""
FIRST_S: Final = {"cpu": 30.0, "cuda": 90.0}
"""How long the first call of an implementation may be silent: it may compile by means of its own."""
LEAST_S: Final = {"cpu": 10.0, "cuda": 20.0}
"""How long any later call may be, at least: a new shape may be compiled for."""
GUILTY_S: Final = 20.0
"""How long is looked for who kills only after other cases."""
SLOWER: Final = 10.0
"""How many times longer than the slowest step so far a step may take."""


class Keeper(Judging):
    """Keeps one worker of ``plan`` alive: hands it batches, and replaces it when it dies.

    ``folder`` is where marks lie (None: in a temporary folder); ``environment`` is set in the worker. ``stopped`` is
    asked while it waits: once it says yes, the batch in progress ends after the case at hand, and what takes longer is
    killed.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path | None = None,
        environment: tuple[tuple[str, str], ...] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="nsa-verify-") if folder is None else None
        self._folder = folder or Path(self._temporary.name if self._temporary is not None else "")
        super().__init__(stopped)
        self._plan, self._environment = plan, environment
        self._allowance = plan.memory_bytes or memory_allowance(plan.workers)
        self._number = 0
        self._now = self._another()
        self._spare: WorkerProcess | None = None
        self._sent: tuple[Task, ...] = ()
        self._tasks: tuple[Task, ...] = ()
        self._until = 0.0
        self._history: deque[Case] = deque(maxlen=HISTORY)
        self._slowest: dict[Pair, float] = {}
        self._hung: set[Pair] = set()
        self._unexplained = 0
        self.replaced = 0
        """How many workers have died."""

    @property
    def marks(self) -> Marks:
        """Those of the worker at work."""
        return self._now.marks

    def hello(self) -> Hello:
        """What the worker said when it was up. Raises ``ImplementationError``, ``DeviceError``, ``ValueError`` and
        ``EngineError``."""
        try:
            return self._now.ready(self._stopped)
        except WorkerDied as died:
            names = " ".join(f"--impl {it}" for it in self._plan.references) or "the built-in implementations"
            raise EngineError(
                f"the worker died while it loaded {names}: {died.death.sentence}; mend what that module does on import"
            ) from None

    def applicable(self, case: Case) -> tuple[Pair, ...]:
        """The pairs that run at least one replay of ``case``."""
        self.hello()
        self._now.send(Ask(case))
        reply = self._receive()
        assert isinstance(reply, Applicable), reply
        return reply.pairs

    def start(self, tasks: Sequence[Task], until: float = 0.0) -> None:
        """Hand over tasks; ``finish`` has what became of them."""
        self._ready()
        self._tasks, self._until = tuple(tasks), until
        self._send(self._tasks)

    def finish(self) -> Outcomes:
        """Wait for the tasks handed over. A task that was left out, because of ``until`` or ``stopped``, is missing.

        A pair that kills its worker, or hangs, disagrees with NV401 or NV402 and is not run again for the tasks behind.
        """
        found: list[dict[Pair, Judgement]] = []
        before: dict[tuple[int, int], list[Case]] = {}
        dead: dict[Pair, str] = {}
        while True:
            try:
                self._collect(found, dead)
                break
            except WorkerDied as died:
                death, sent = died.death, self._sent
            if self._stopped():  # whoever asked for that may have ended the worker as well
                raise KeyboardInterrupt
            history = list(self._history)
            self._replace()
            suspect = self._suspect(death, sent)
            if suspect is None:
                self._count_unexplained(death)
            else:
                told, last = len(found), len(self._tasks) - len(sent) + death.mark.job
                blamed = [self._careful(self._tasks[at], dead, found) for at in range(told, last + 1)]
                if not any(blamed):
                    earlier = [*history, *(it.case for it in self._tasks[told:last])]
                    guilty = self._guilty_with(earlier, self._tasks[last], suspect, death.code)
                    found[last][guilty] = self._accused(self._tasks[last], guilty, death, found[last][guilty])
                    dead[guilty] = f"not run again in its round: {_SHORT[death.code]}"
                    before[last, self._tasks[last].pairs.index(guilty)] = earlier
            if self._stopped() or (self._until and time.time() > self._until):
                break
            self._send(tuple(self._without(it, dead) for it in self._tasks[len(found) :]))
        return Outcomes([self._in_order(*it) for it in zip(self._tasks, found, strict=False)], before)

    def judge_alone(self, case: Case, pair: Pair, careful: bool, rerun: bool = True) -> Verdict | None:
        """The verdict on one case; None if it was left out because everything was asked to stop.

        ``careful`` is for cases that are expected to kill: each call is finished before the next, and a death is one.
        ``rerun`` is that of ``Task``, for other cases.
        """
        if not careful:
            return self._judged(case, pair, rerun)
        self._ready()
        self._tasks = (Task(case, (pair,)),)
        while True:
            alone, death, starting = self._one_by_one(self._tasks[0])
            if death is None:
                return alone[pair].verdict
            if starting is not None:
                return _verdict(case, pair, starting.modes, death)

    def dies_of(self, tasks: Sequence[Task]) -> Code | None:
        """NV401 or NV402 if a worker in which nothing else was run dies of these tasks, one after the other."""
        self._ready()
        self.renew()
        try:
            self._send(tuple(tasks))
            self._collect([], {})
        except WorkerDied as died:
            self._replace()
            return died.death.code
        return None

    def renew(self) -> None:
        """Go on with a worker in which nothing was run."""
        if self._history:
            self._now.end()
            self._adopt()

    def close(self) -> None:
        """End the worker."""
        for it in (self._now, self._spare):
            if it is not None:
                it.end()
        self._spare = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def _ready(self) -> None:
        """Have a worker that is up: the last one was killed if what it did was given up."""
        if self._now.ended:
            self._adopt()
        self.hello()

    def _another(self) -> WorkerProcess:
        self._number += 1
        name = f"{os.getpid()}-{self._number}"
        return WorkerProcess(self._plan, self._folder, name, self._environment)

    def _replace(self) -> None:
        """Bury the dead worker; the next one waits already, from the second death on."""
        self.replaced += 1
        self._now.end()
        self._adopt()

    def _adopt(self) -> None:
        self._history.clear()
        spare, self._spare = self._spare, None
        self._now = spare or self._another()
        self._spare = self._another() if self.replaced else None
        self.hello()

    def _send(self, tasks: tuple[Task, ...], careful: bool = False) -> None:
        """Hand over a batch that lies on disk: the marks beside it say which of its cases is in flight."""
        self._sent = tasks
        batch = Batch(tasks, careful, self._until, self._allowance)
        self._now.write_down(batch)
        self._now.marks.ask_to_stop(False)
        self._now.send(batch)

    def _receive(self) -> Reply:
        reply = self._now.receive(self._patience_s, self._allowance, self._stopped)
        if isinstance(reply, Died):
            raise WorkerDied(Death(reply.sentence, self.marks.read(), False))
        if isinstance(reply, Broken):
            raise EngineError(f"the worker failed, and no case is to blame: {reply.sentence}")
        if isinstance(reply, Refused):
            raise worker.refusal(reply)
        return reply

    def _collect(self, found: list[dict[Pair, Judgement]], dead: dict[Pair, str]) -> None:
        """Read the replies to the batch sent."""
        while True:
            reply = self._receive()
            if isinstance(reply, Done):
                self.spent.update(reply.spent)
                return
            assert isinstance(reply, Judged), reply
            task = self._sent[reply.task]
            self._note(task, reply)
            judged = dict(zip(task.pairs, reply.judgements, strict=True))
            found.append(judged | {pair: _left_out(pair, reason) for pair, reason in dead.items()})

    def _note(self, task: Task, reply: Judged) -> None:
        self._history.append(task.case)
        for place, slowest in enumerate(reply.slowest_s):
            pair = task.pairs[reply.first + place]
            self._slowest[pair] = max(slowest, self._slowest.get(pair, 0.0))
        self._unexplained = 0

    def _careful(self, task: Task, dead: dict[Pair, str], found: list[dict[Pair, Judgement]]) -> bool:
        """Judge ``task`` again, pair by pair; whether a worker died in which nothing else was run."""
        judged: dict[Pair, Judgement] = {}
        died = False
        while left := tuple(pair for pair in task.pairs if pair not in judged and pair not in dead):
            alone = not self._history
            here, death, starting = self._one_by_one(msgspec.structs.replace(task, pairs=left))
            judged |= here
            if death is None:
                break
            if starting is None or not alone:
                continue  # what an earlier case left behind may be to blame; the worker is a new one now
            pair, died = left[starting.pair], True
            guilty = self._guilty(task, tuple(here), pair)
            judged[guilty] = self._judgement(task, guilty, starting, death)
            dead[guilty] = f"not run again in its round: {_SHORT[death.code]}"
        found.append(judged | {pair: _left_out(pair, reason) for pair, reason in dead.items() if pair not in judged})
        return died

    def _one_by_one(self, task: Task) -> tuple[dict[Pair, Judgement], Death | None, Starting | None]:
        """The judgements up to the first death, the death, and whose it seems to be."""
        judged: dict[Pair, Judgement] = {}
        starting: Starting | None = None
        try:
            self._send((task,), careful=True)
            while not isinstance(reply := self._receive(), Done):
                if isinstance(reply, Starting):
                    starting = reply
                else:
                    assert isinstance(reply, Judged), reply
                    self._note(task, reply)
                    judged[task.pairs[reply.first]] = reply.judgements[0]
        except WorkerDied as died:
            death = died.death
            self._replace()
            if starting is None:
                self._count_unexplained(death)
            elif death.hang:
                self._hung.add(task.pairs[starting.pair])
            return judged, death, starting
        return judged, None, starting

    def _guilty(self, task: Task, earlier: tuple[Pair, ...], pair: Pair) -> Pair:
        """Who kills: ``pair``, in whose call the worker died, or one before it, which spoilt the memory of both."""
        if not earlier or self._dies(task, (pair,)):
            return pair
        for other in earlier:
            self.renew()
            if self._dies(task, (other, pair)):
                return other
        return pair

    def _guilty_with(self, earlier: Sequence[Case], task: Task, suspect: Pair, code: Code) -> Pair:
        """Who kills, but only after the cases ``earlier``: the first pair of which, run alone on all of them, a worker
        dies as it did; or which makes ``suspect`` die. Failing that ``suspect``, which was in flight."""
        until = time.monotonic() + GUILTY_S
        cases = (*earlier, task.case)
        alone: list[tuple[Pair, ...]] = [(suspect,), *((it,) for it in task.pairs if it != suspect)]
        before: list[tuple[Pair, ...]] = [(it, suspect) for it in task.pairs if it != suspect]
        for pairs in alone + before:
            if time.monotonic() < until and self.dies_of([Task(it, pairs) for it in cases]) is code:
                return pairs[0]
        return suspect

    def _dies(self, task: Task, pairs: tuple[Pair, ...]) -> bool:
        return self._one_by_one(msgspec.structs.replace(task, pairs=pairs))[1] is not None

    def _judgement(self, task: Task, pair: Pair, starting: Starting, death: Death) -> Judgement:
        return Judgement(_verdict(task.case, pair, starting.modes, death), starting.skips)

    def _suspect(self, death: Death, sent: tuple[Task, ...]) -> Pair | None:
        """The pair that was in flight, if one was."""
        mark = death.mark
        if mark.phase in (Phase.IDLE, Phase.LOADING) or not 0 <= mark.job < len(sent):
            return None
        pairs = sent[mark.job].pairs
        return pairs[mark.pair] if 0 <= mark.pair < len(pairs) else None

    def _accused(self, task: Task, pair: Pair, death: Death, alone: Judgement) -> Judgement:
        """The death did not come again, so the pair that was in flight has it; ``alone`` is what it does alone."""
        again = f"{death.sentence}; not again when the case was run alone"
        return Judgement(_verdict(task.case, pair, alone.verdict.modes, death._replace(sentence=again)), alone.skips)

    def _count_unexplained(self, death: Death) -> None:
        self._unexplained += 1
        if self._unexplained > 3:
            raise EngineError(f"workers die again and again, and no case is to blame: {death.sentence}")

    def _without(self, task: Task, dead: dict[Pair, str]) -> Task:
        return msgspec.structs.replace(task, pairs=tuple(pair for pair in task.pairs if pair not in dead))

    def _in_order(self, task: Task, judged: dict[Pair, Judgement]) -> list[Judgement]:
        return [judged[pair] for pair in task.pairs]

    def _patience_s(self, mark: Mark) -> float:
        """How long silence at ``mark`` may last."""
        if mark.phase is Phase.LOADING:
            return START_S
        if mark.phase is Phase.COMPILING:
            return COMPILE_S
        if self._plan.deadline_s:
            return self._plan.deadline_s
        device = self._now.hello.device if self._now.hello is not None else "cuda"
        pairs = self._sent[mark.job].pairs if 0 <= mark.job < len(self._sent) else ()
        pair = pairs[mark.pair] if 0 <= mark.pair < len(pairs) else None
        least = LEAST_S[device] if pair in self._slowest else FIRST_S[device]
        if pair in self._hung:
            least /= 3
        return max(least, SLOWER * self._slowest.get(pair, 0.0) if pair is not None else 0.0)


_SHORT: Final = {Code.DEATH: "it killed its worker", Code.HANG: "it hung"}


def _left_out(pair: Pair, reason: str) -> Judgement:
    verdict = Verdict(implementation=pair[0], executor=pair[1], outcome=Outcome.NOT_APPLICABLE, reason=reason)
    return Judgement(verdict)


def _verdict(case: Case, pair: Pair, modes: tuple[Mode, ...], death: Death) -> Verdict:
    replay = max(0, death.mark.replay)
    during = "while it was captured: " if death.mark.phase is Phase.CAPTURING and pair[1] != EAGER else ""
    finding = Finding(
        implementation=pair[0],
        executor=pair[1],
        code=death.code,
        replay=replay,
        mode=case.replays[replay].mode,
        message=during + death.sentence,
    )
    return Verdict(implementation=pair[0], executor=pair[1], outcome=Outcome.DISAGREE, modes=modes, findings=(finding,))


class Inside(Judging):
    """The same without a process of its own: what kills the worker kills the engine. For debuggers."""

    replaced = 0

    def __init__(self, plan: Plan, stopped: Callable[[], bool] = lambda: False) -> None:
        super().__init__(stopped)
        self._desk = worker.Desk(plan)
        self._tasks: tuple[Task, ...] = ()
        self._until = 0.0

    def hello(self) -> Hello:
        """As ``Keeper.hello``."""
        return self._desk.hello

    def applicable(self, case: Case) -> tuple[Pair, ...]:
        """As ``Keeper.applicable``."""
        return self._desk.applicable(case)

    def start(self, tasks: Sequence[Task], until: float = 0.0) -> None:
        """As ``Keeper.start``."""
        self._tasks, self._until = tuple(tasks), until

    def finish(self) -> Outcomes:
        """As ``Keeper.finish``, but nothing is run before."""
        found: list[list[Judgement]] = []
        replies = self._desk.judge(self._tasks)
        try:
            while True:
                with spending(JUDGE):
                    reply = next(replies, None)
                if reply is None:
                    break
                if self._stopped():
                    break
                if isinstance(reply, Judged):
                    found.append(list(reply.judgements))
                if self._until and time.time() > self._until:
                    break
        except Exception as error:
            if not worker.is_death(error):
                raise
            raise EngineError(
                f"the device died, and this process with it: {error}; run without --no-isolation to see which"
                " implementation it was"
            ) from error
        return Outcomes(found, {})

    def judge_alone(
        self,
        case: Case,
        pair: Pair,
        careful: bool,  # noqa: ARG002 - see there
        rerun: bool = True,
    ) -> Verdict | None:
        """As ``Keeper.judge_alone``."""
        return self._judged(case, pair, rerun)

    def renew(self) -> None:
        """A process cannot be had again."""

    def close(self) -> None:
        """Give back what was kept."""
        worker.close()
