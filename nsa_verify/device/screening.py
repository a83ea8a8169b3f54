"""Many judgements without waiting for the device: what is right is told from what must be looked at.

The calls of a pair run one behind the other; what they left is compared on the device, which sets a flag where
something is wrong. All flags come to the host at once. A pair without a flag or any other sign agrees; every other one
is judged again by ``Judge``, which looks at each call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from msgspec.structs import replace

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Code, Outcome, Verdict
from nsa_verify.core.implementation import Implementation, take_fallbacks
from nsa_verify.core.marks import Phase, note
from nsa_verify.device.comparing import Comparison, TorchComparison
from nsa_verify.device.driving import Executor, Note, Session, captures
from nsa_verify.device.eager import EagerSession
from nsa_verify.device.health import refuse_dead, settle
from nsa_verify.device.judge import Doubt, Judge, fault_of, open_session
from nsa_verify.device.rig import Rig
from nsa_verify.device.stops import CaptureRefused, GraphKey, ImplementationRaised

SCREENED_CELLS: Final = 1 << 27
"""Setups with more cells than this, of arena and pool together, are not screened: it takes more memory."""
SCREENED_DELAY_CYCLES: Final = 2_000_000
"""As ``DELAY_CYCLES``; the host takes less time here, and processes that share a GPU wait for each other's delays."""
SLOTS_BESIDES_REPLAYS: Final = 2
"""Flags of a pair: one for each replay, one for the repeated call, one for what the session itself sees."""


@dataclass(slots=True)
class Screened:
    """What a screening gave: ``said`` holds unless it is looked at again. ``flags`` are those of its calls, each with
    what it means; ``doubts`` is what was seen without them, ``kept`` whether a graph had been captured earlier."""

    said: Verdict
    flags: dict[int, Doubt] = field(default_factory=dict)
    doubts: list[Doubt] = field(default_factory=list)
    kept: bool = False
    look_again: bool = False


def flags_for(case: Case, pairs: int) -> int:
    """How many flags the screening of ``pairs`` on ``case`` needs."""
    return pairs * (len(case.replays) + SLOTS_BESIDES_REPLAYS)


def is_screened(judge: Judge) -> bool:
    """Whether the case of ``judge`` is one for a ``Screen``."""
    return not judge.own_fault and judge.rig.layout.size + judge.rig.pool.memory.numel() <= SCREENED_CELLS


class Screen:
    """Screens pairs, one behind the other, up to ``capacity`` flags. Runs within ``unseeded``."""

    def __init__(self, device: str, capacity: int) -> None:
        self._device = device
        self._flags = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._used = 0

    def flags(self) -> list[bool]:
        """All flags so far; waits for the device. Raises ``DeviceDied``."""
        try:
            return [bool(flag) for flag in self._flags[: self._used].tolist()]
        except RuntimeError as error:
            refuse_dead(self._device, error)
            raise

    def run(
        self,
        judge: Judge,
        implementation: Implementation,
        executor: Executor,
        repeat: bool = True,
        delay: bool = True,
        afresh: bool = True,
    ) -> Screened:
        """Run the replays of a pair; the parameters are those of ``Judge.judge``. Raises ``DeviceDied``.

        Only with ``repeat`` are eager calls watched: whether their temporaries are initialised, whether they swallow
        errors, and what they compile.
        """
        said, served = judge.applicable(implementation, executor)
        screened = Screened(said)
        if not served:
            return screened
        calls = [*served, *served[-1:]] if repeat else served
        delay = delay and len(served) > 1
        try:
            settle(self._device, implementation)
            session = self._open(judge, executor, implementation, served, afresh, screened, disturb=delay)
            if isinstance(session, EagerSession):
                session.watched = repeat
                session.delay_cycles = SCREENED_DELAY_CYCLES if delay else 0
            self._replay(judge, session, calls, len(served), screened)
            self._finish(judge, session, calls, screened)
            settle(self._device, implementation)
        except (ImplementationRaised, CaptureRefused) as stop:
            judge.rig.forget_views()
            refuse_dead(self._device, stop)
            code = stop.code if isinstance(stop, CaptureRefused) else Code.EXCEPTION
            screened.doubts.append(Doubt(code, served[0], str(stop)))
        except Exception as error:  # noqa: BLE001 - whatever fails here, the verdict is unknown and says why
            judge.rig.forget_views()
            refuse_dead(self._device, error)
            return Screened(replace(said, outcome=Outcome.UNKNOWN, reason=fault_of(error)))
        return screened

    def _open(
        self,
        judge: Judge,
        executor: Executor,
        implementation: Implementation,
        served: list[int],
        afresh: bool,
        screened: Screened,
        disturb: bool,
    ) -> Session:
        rig, keys = judge.rig, judge.keys(served)
        take_fallbacks()
        note(Phase.CAPTURING, served[0])
        session, screened.kept, new = open_session(rig, executor, implementation, keys, afresh)
        if new:
            rig.forget_views()
        image = judge.image(implementation)
        comparison_for(rig).begin(image, judge.loads[served[0]])
        for key in () if captures(executor) else keys:
            rig.remember_views(*key, implementation.writes(rig.setup))
        session.begin(disturb=disturb or new)
        return session

    def _replay(self, judge: Judge, session: Session, calls: list[int], fed: int, screened: Screened) -> None:
        """Make ``calls``, the first ``fed`` of them with inputs put in place."""
        rig, image, comparison = judge.rig, judge.image(session.implementation), comparison_for(judge.rig)
        for number, replay in enumerate(calls):
            load = judge.loads[replay]
            if load.host is not None and number < fed:
                rig.host_seq_lens.copy_(load.host)
            note(Phase.CALLING, replay)
            session.replay(*judge.key(replay))
            following = judge.loads[calls[number + 1]] if number + 1 < fed else None
            again = "a second call for " if number >= fed else ""
            flag = self._flag(screened, Doubt(Code.WRONG_VALUE, replay, f"{again}replay {replay} left wrong content"))
            comparison.check(image, load, self._flags, flag, following)
            if load.host is not None and not torch.equal(rig.host_seq_lens, load.host):
                screened.doubts.append(Doubt(Code.INPUT_MUTATED, replay, "seq_lens_cpu was changed"))
                rig.host_seq_lens.copy_(load.host)
        note(Phase.CHECKING, calls[-1])

    def _finish(self, judge: Judge, session: Session, calls: list[int], screened: Screened) -> None:
        rig, writes = judge.rig, session.implementation.writes(judge.rig.setup)
        trespassed = session.trespassed()
        notes: list[Note] = []
        if trespassed is None:
            notes = session.end()
        else:
            sentence = "a graph wrote to memory that was freed after its capture and handed out again"
            flag = self._flag(screened, Doubt(Code.MOVED, calls[-1], sentence))
            self._flags[flag].copy_(trespassed)
        screened.doubts += [Doubt(it.code, calls[it.call], it.sentence) for it in notes]
        keys: tuple[GraphKey, ...] = ()
        if isinstance(session, EagerSession):
            keys = judge.keys(calls)
            compiled = frozenset(str(key) for it in session.served for key in it.keys)
            screened.said = replace(screened.said, compile_keys=compiled)
        if not all(rig.are_views_intact(*key, writes) for key in keys):
            rig.forget_views()
            screened.look_again = True
        screened.said = replace(screened.said, fallbacks=session.fallbacks + take_fallbacks())

    def _flag(self, screened: Screened, meaning: Doubt) -> int:
        flag = self._used
        self._used += 1
        screened.flags[flag] = meaning
        return flag


def comparison_for(rig: Rig) -> Comparison:
    """The comparison over ``rig``, kept with it."""
    if rig.device == "cuda":
        from nsa_verify.device.fused import FusedComparison

        return rig.keeping(FusedComparison)
    return rig.keeping(TorchComparison)
