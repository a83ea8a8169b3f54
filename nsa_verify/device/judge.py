"""The judgement of one case under one implementation and executor.

All replays run, a snapshot of the arena is kept after each, and then the snapshots are compared with the oracle's
images in one comparison and one synchronisation. Only a case that disagrees is looked at byte by byte.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from nsa_verify.core.case import Case
from nsa_verify.core.findings import SEVERITY, Code, Finding, Outcome, Verdict
from nsa_verify.core.implementation import Implementation, Refresh
from nsa_verify.core.invariants import content_of, violations
from nsa_verify.core.oracle import expect
from nsa_verify.core.registry import find
from nsa_verify.device.diagnosis import Snapshot, diagnose
from nsa_verify.device.executors import EXECUTORS, Executor, ImplementationRaised, session
from nsa_verify.device.images import ImageKey, is_allowed, paint
from nsa_verify.device.pool import Difference
from nsa_verify.device.rig import rig_for
from nsa_verify.device.select import resolve

RERUNS = 2
"""How often a case that disagrees is run again to see whether it does so every time."""


def verify(
    case: Case, implementation: Implementation | Refresh | str, executor: str = "eager", device: str = "auto"
) -> Verdict:
    """Run ``case`` and judge it; see ``nsa_verify.verify``."""
    chosen = resolve(device)
    if not isinstance(implementation, Implementation):
        implementation = find(implementation)
    if executor not in EXECUTORS:
        raise ValueError(f"executor {executor!r}: must be one of {', '.join(EXECUTORS)}")
    return Judge(case, chosen).judge(implementation, EXECUTORS[executor])


@dataclass(slots=True)
class _Run:
    """What running the replays left. ``served`` are the replays that were run, in order; after the last of them comes
    one repeated call. ``snapshots`` holds the arena before the first and after every call."""

    served: list[int]
    snapshots: list[Tensor]
    pool_mutated: list[Tensor] = field(default_factory=list)
    host_differences: list[Difference | None] = field(default_factory=list)
    raised: BaseException | None = None


class Judge:
    """One case, ready to be run: its images are computed once and shared by the implementations."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self._images: dict[ImageKey, tuple[Tensor, Tensor]] = {}
        try:
            self.rig = rig_for(case.setup, device)
            self._own_fault = self._check_oracle()
        except Exception as error:  # noqa: BLE001 - every verdict on the case is unknown and says why
            self._own_fault = _fault(error)

    def judge(self, implementation: Implementation, executor: Executor, repeat: bool = True) -> Verdict:
        """The verdict. A fault of the checker itself is ``unknown``, never ``agree``.

        With ``repeat`` the last replay is served twice, and must leave the same again.
        """
        setup = self.case.setup
        reasons = [implementation.not_applicable(setup, replay.mode) for replay in self.case.replays]
        served = [index for index, reason in enumerate(reasons) if reason is None]
        said = Verdict(implementation=implementation.name, executor=executor.name, outcome=Outcome.NOT_APPLICABLE)
        if not served:
            return replace(said, reason=str(reasons[0]))
        if self._own_fault:
            return replace(said, outcome=Outcome.UNKNOWN, reason=self._own_fault)
        modes = tuple(dict.fromkeys(self.case.replays[index].mode for index in served))
        try:
            findings = self._findings(implementation, executor, served, repeat)
        except Exception as error:  # noqa: BLE001 - whatever fails here, the verdict is unknown and says why
            return replace(said, outcome=Outcome.UNKNOWN, modes=modes, reason=_fault(error))
        outcome = Outcome.DISAGREE if findings else Outcome.AGREE
        return replace(said, outcome=outcome, modes=modes, findings=tuple(findings))

    def _check_oracle(self) -> str:
        for replay in range(len(self.case.replays)):
            for broken in violations(self.case, replay, content_of(expect(self.case, replay))):
                return f"the oracle breaks its own invariant: {broken.buffer}: {broken.sentence}"
        return ""

    def _findings(
        self, implementation: Implementation, executor: Executor, served: list[int], repeat: bool
    ) -> list[Finding]:
        run = self._run(implementation, executor, served, repeat)
        failing, wrong = self._compare(implementation, run)
        if failing is None and run.raised is None:
            return []
        findings = self._describe(implementation, executor, run, failing)
        for rerun in range(1, RERUNS + 1):
            again = self._run(implementation, executor, served, repeat)
            failing_again, wrong_again = self._compare(implementation, again)
            raised = (type(run.raised), len(run.served)), (type(again.raised), len(again.served))
            if failing_again != failing or wrong_again != wrong or raised[0] != raised[1]:
                seen = "agreed" if failing_again is None and again.raised is None else "disagreed elsewhere"
                first = findings[0]
                message = f"run 1: {first.code} {first.message}; run {rerun + 1} {seen}"
                return [replace(first, code=Code.NOT_DETERMINISTIC, message=message), *findings]
        return findings

    def _run(self, implementation: Implementation, executor: Executor, served: list[int], repeat: bool) -> _Run:
        rig, case = self.rig, self.case
        rig.reset()
        run = _Run(served=[], snapshots=[rig.arena.clone()])
        values, _ = self._image(implementation)
        calls = [*served, *served[-1:]] if repeat else served
        with session(executor, rig, implementation) as opened:
            for number, replay in enumerate(calls):
                if number < len(served):
                    rig.load(case, replay, values[replay])
                try:
                    opened.replay(case.replays[replay].mode, case.bucket(replay))
                except ImplementationRaised as caught:
                    run.raised = caught.error
                run.served.append(replay)
                run.snapshots.append(rig.arena.clone())
                run.pool_mutated.append(rig.pool.mutated())
                run.host_differences.append(rig.host_difference(case, replay))
                if run.raised is not None:
                    break
        return run

    def _image(self, implementation: Implementation) -> tuple[Tensor, Tensor]:
        key = ImageKey.of(implementation, self.case.setup)
        found = self._images.get(key)
        if found is None:
            values, classes = paint(self.case, key)
            shape = (len(self.case.replays), self.rig.layout.size)
            found = self._images[key] = (
                torch.frombuffer(values, dtype=torch.int32).view(shape).to(self.rig.device),
                torch.frombuffer(classes, dtype=torch.uint8).view(shape).to(self.rig.device),
            )
        return found

    def _compare(self, implementation: Implementation, run: _Run) -> tuple[int | None, object]:
        """The first call that left something wrong, and a value that is equal when the same is wrong."""
        values, classes = self._image(implementation)
        wanted, region = values[run.served], classes[run.served]
        snapshots = torch.stack(run.snapshots)
        before, after = snapshots[:-1], snapshots[1:]
        allowed = is_allowed(after, before, wanted, region)
        bad = ~allowed
        marks = (bad.any(dim=1) | torch.stack(run.pool_mutated)).tolist()
        raised_at = len(run.served) - 1 if run.raised is not None else None
        for call, marked in enumerate(marks):
            if call != raised_at and (marked or run.host_differences[call]):
                cells = bad[call].nonzero().flatten()
                inputs = bool(run.pool_mutated[call]), run.host_differences[call]
                return call, (cells.tolist(), after[call][cells].tolist(), inputs)
        return None, None

    def _describe(
        self, implementation: Implementation, executor: Executor, run: _Run, failing: int | None
    ) -> list[Finding]:
        if failing is None:
            replay = run.served[-1]
            return [self._exception(implementation, executor, run, replay)]
        replay = run.served[failing]
        values, classes = self._image(implementation)
        snapshot = Snapshot(
            case=self.case,
            replay=replay,
            layout=self.rig.layout,
            wanted=values[replay].cpu(),
            classes=classes[replay].cpu(),
            before=run.snapshots[failing].cpu(),
            after=run.snapshots[failing + 1].cpu(),
            inputs={
                "req_to_token": self._pool_difference(implementation, executor, run, failing),
                "seq_lens_cpu": run.host_differences[failing],
            },
        )
        alone = self._alone(implementation, executor, replay) if replay != run.served[0] else None
        findings = diagnose(snapshot, implementation.name, executor.name, alone)
        findings.sort(key=lambda finding: SEVERITY.index(finding.code))
        if failing == len(run.served) - 1 and failing > 0 and run.served[failing - 1] == replay:
            first = findings[0]
            message = f"the first call was right; after a second with the same inputs: {first.message}"
            findings.insert(0, replace(first, code=Code.NOT_IDEMPOTENT, message=message))
        return findings

    def _pool_difference(
        self, implementation: Implementation, executor: Executor, run: _Run, failing: int
    ) -> Difference | None:
        """What call number ``failing`` changed in ``req_to_token``: a further run stops there, to look."""
        if not bool(run.pool_mutated[failing]):
            return None
        calls = run.served[: failing + 1]
        served = list(dict.fromkeys(calls))
        self._run(implementation, executor, served, repeat=len(served) < len(calls))
        return self.rig.pool.difference() or Difference((), 0, 0, 1)

    def _alone(self, implementation: Implementation, executor: Executor, replay: int) -> Tensor | None:
        """The arena after ``replay`` alone, from poison: tells what is stale from what would be wrong anyway."""
        run = self._run(implementation, executor, [replay], repeat=False)
        return None if run.raised is not None else run.snapshots[-1].cpu()

    def _exception(self, implementation: Implementation, executor: Executor, run: _Run, replay: int) -> Finding:
        error = run.raised
        assert error is not None
        source = implementation.source.rpartition(":")[0]
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if frame.filename == source), frames[-1])
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        # A compiler's message starts with the place and ends with what is wrong there.
        sentence = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
        where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        second = len(run.served) > 1 and run.served[-2] == replay
        return Finding(
            implementation=implementation.name,
            executor=executor.name,
            code=Code.NOT_IDEMPOTENT if second else Code.EXCEPTION,
            replay=replay,
            mode=self.case.replays[replay].mode,
            message=f"{type(error).__name__}: {sentence} ({where})" + (", on a second call" if second else ""),
        )


def _fault(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"the check itself failed: {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
