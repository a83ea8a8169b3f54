"""The judgement of one case under one implementation and executor.

All replays run, a snapshot of the arena is kept after each, and then the snapshots are compared with the oracle's
images in one comparison and one synchronisation. Only a case that disagrees is looked at byte by byte.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from nsa_verify.core.case import Case
from nsa_verify.core.findings import SEVERITY, Code, Finding, Outcome, Picture, Verdict
from nsa_verify.core.implementation import Implementation, Refresh, take_fallbacks
from nsa_verify.core.invariants import content_of, violations
from nsa_verify.core.marks import Phase, note
from nsa_verify.core.oracle import expect
from nsa_verify.core.registry import find
from nsa_verify.core.spent import CAPTURE, ORACLE, spending
from nsa_verify.device.blame import line_of
from nsa_verify.device.comparing import Image, Load, loads, upload
from nsa_verify.device.diagnosis import Snapshot, diagnose
from nsa_verify.device.driving import Executor, Note, Session, captures
from nsa_verify.device.eager import DELAY_CYCLES, EagerSession
from nsa_verify.device.executors import EAGER, executors_for
from nsa_verify.device.health import refuse_dead, settle
from nsa_verify.device.images import ImageKey, is_allowed
from nsa_verify.device.kept import KeptGraphs
from nsa_verify.device.launches import announce_compilations
from nsa_verify.device.picturing import pictures
from nsa_verify.device.pool import Difference
from nsa_verify.device.rig import Rig, rig_for
from nsa_verify.device.select import DeviceError, resolve
from nsa_verify.device.state import state_of
from nsa_verify.device.stops import CaptureRefused, GraphKey, ImplementationRaised, Stop, words_of

_LASTING: Final = frozenset({Code.RECOMPILES, Code.SILENT_FALLBACK})
"""What an implementation may do once and not again: it remembers."""

RERUNS = 2
"""How often a case that disagrees is run again to see whether it does so every time."""


def verify(
    case: Case, implementation: Implementation | Refresh | str, executor: str = "eager", device: str = "auto"
) -> Verdict:
    """Run ``case`` and judge it; see ``nsa_verify.verify``."""
    chosen = resolve(device)
    if not isinstance(implementation, Implementation):
        implementation = find(implementation)
    try:
        (driver,) = executors_for(chosen, (executor,))
    except DeviceError as error:
        raise ValueError(str(error)) from error
    return Judge(case, chosen).judge(implementation, driver)


class Doubt(NamedTuple):
    """What a screening saw of replay number ``replay``."""

    code: Code
    replay: int
    sentence: str


@dataclass(slots=True)
class _Run:
    """What running the replays left. ``wanted`` are the replays to run, ``served`` those that were, in order; after the
    last of them comes one repeated call. ``snapshots`` holds the arena before the first and after every call."""

    wanted: tuple[int, ...]
    served: list[int]
    snapshots: list[Tensor]
    pool_mutated: list[Tensor] = field(default_factory=list)
    host_differences: list[Difference | None] = field(default_factory=list)
    stop: Stop | None = None
    """What ended the run at its last call; where a graph could not be captured, that call was never made."""
    notes: list[Note] = field(default_factory=list)
    compared: tuple[int | None, object] | None = None
    kept: bool = False
    """Whether one of its graphs was captured for an earlier case."""
    fallbacks: tuple[str, ...] = ()
    compile_keys: frozenset[str] = frozenset()

    @property
    def trouble(self) -> tuple[object, ...]:
        """What besides content is wrong: equal for runs that end alike.

        An implementation may remember that something failed, and not try again; that is no lack of determinism.
        """
        said = (type(self.stop), len(self.served)) if self.stop is not None else ()
        passing = (it for it in self.notes if it.code not in _LASTING)
        return said, tuple((it.code, it.call) for it in passing)


class Judge:
    """One case, ready to be run: its images are computed once and shared by the implementations."""

    def __init__(self, case: Case, device: str, careful: bool = False) -> None:
        """With ``careful`` the device has finished each call before the next one begins."""
        self.case = case
        self._device, self._careful = device, careful and device == "cuda"
        self._delay = False
        self._reruns = RERUNS
        self._picture = False
        self._pictures: tuple[Picture, ...] = ()
        self._images: dict[ImageKey, Image] = {}
        if device == "cuda":
            announce_compilations()
        try:
            with spending(ORACLE):
                self.rig = rig_for(case.setup, device)
                self.own_fault = self._check_oracle()
        except Exception as error:  # noqa: BLE001 - every verdict on the case is unknown and says why
            refuse_dead(device, error)
            self.own_fault = fault_of(error)

    def judge(
        self,
        implementation: Implementation,
        executor: Executor,
        repeat: bool = True,
        delay: bool = True,
        afresh: bool = True,
        doubts: Sequence[Doubt] = (),
        picture: bool = False,
        rerun: bool = True,
    ) -> Verdict:
        """The verdict. A fault of the checker itself is ``unknown``, never ``agree``.

        With ``repeat`` the last replay is served twice, and must leave the same again. With ``delay`` the eager calls
        of a case run behind a long kernel, on CUDA. With ``afresh`` the graphs were captured together, for the keys of
        this case and in its order; without, graphs that other cases captured may serve.
        ``doubts`` were seen when the pair was screened, with graphs that were captured for it: they are no less true if
        they are not seen again. With ``picture`` the verdict has the buffers of the replay whose content is wrong.
        Without ``rerun`` it is not asked whether what disagrees does so every time.
        """
        said, served = self.applicable(implementation, executor)
        if not served:
            return said
        self._delay, self._reruns = delay and len(served) > 1, RERUNS if rerun else 0
        self._picture, self._pictures = picture, ()
        try:
            settle(self._device, implementation)
            run = self._run(implementation, executor, served, repeat, afresh)
            if run.kept and not doubts and not self._is_clean(implementation, run):
                # What an implementation did for other cases since its graphs were captured is no fault of this one.
                self.rig.keeping(KeptGraphs).forget(implementation)
                run = self._run(implementation, executor, served, repeat)
            findings = self._findings(implementation, executor, run, repeat)
            if doubts and not findings:
                findings = self._confirmed(implementation, executor, served, repeat, doubts)
            settle(self._device, implementation)
        except Exception as error:  # noqa: BLE001 - whatever fails here, the verdict is unknown and says why
            refuse_dead(self._device, error)
            return replace(said, outcome=Outcome.UNKNOWN, reason=fault_of(error))
        return replace(
            said,
            outcome=Outcome.DISAGREE if findings else Outcome.AGREE,
            findings=tuple(findings),
            fallbacks=run.fallbacks,
            compile_keys=run.compile_keys,
            pictures=self._pictures,
        )

    def applicable(self, implementation: Implementation, executor: Executor) -> tuple[Verdict, list[int]]:
        """The replays that are run, and the verdict that they agree; or no replays, and the verdict that stands."""
        setup = self.case.setup
        reasons = [executor.not_applicable(implementation, setup, replay.mode) for replay in self.case.replays]
        served = [index for index, reason in enumerate(reasons) if reason is None]
        said = Verdict(implementation=implementation.name, executor=executor.name, outcome=Outcome.NOT_APPLICABLE)
        if not served:
            return replace(said, reason=str(reasons[0])), []
        if self.own_fault:
            return replace(said, outcome=Outcome.UNKNOWN, reason=self.own_fault), []
        modes = tuple(dict.fromkeys(self.case.replays[index].mode for index in served))
        return replace(said, outcome=Outcome.AGREE, modes=modes), served

    def prepare(self, pairs: Iterable[tuple[Implementation, Executor]]) -> None:
        """Bring the images for all of ``pairs`` to the device at once. Raises ``DeviceDied``."""
        keys = dict.fromkeys(
            ImageKey.of(it, self.case.setup) for it, executor in pairs if self.applicable(it, executor)[1]
        )
        try:
            if missing := [key for key in keys if key not in self._images]:
                with spending(ORACLE):
                    self._images |= upload(self.rig, self.case, missing)
        except Exception as error:  # noqa: BLE001 - every verdict on the case is unknown and says why
            refuse_dead(self._device, error)
            self.own_fault = fault_of(error)

    @cached_property
    def loads(self) -> list[Load]:
        """What each replay needs in place."""
        return loads(self.rig, self.case)

    def key(self, replay: int) -> GraphKey:
        """The key of replay number ``replay``."""
        return self.case.replays[replay].mode, self.case.bucket(replay)

    def keys(self, served: Iterable[int]) -> tuple[GraphKey, ...]:
        """The keys of ``served`` in the order of their captures: the last one first."""
        return tuple(dict.fromkeys(map(self.key, served)))[::-1]

    def _check_oracle(self) -> str:
        for replay in range(len(self.case.replays)):
            for broken in violations(self.case, replay, content_of(expect(self.case, replay))):
                return f"the oracle breaks its own invariant: {broken.buffer}: {broken.sentence}"
        return ""

    def _findings(self, implementation: Implementation, executor: Executor, run: _Run, repeat: bool) -> list[Finding]:
        if self._is_clean(implementation, run):
            return []
        failing, wrong = self._compare(implementation, run)
        served = list(dict.fromkeys(run.wanted))
        findings = self._describe(implementation, executor, run, failing)
        if self._is_frozen(implementation, executor, run, findings[0], repeat):
            message = f"called eagerly it agrees, replayed from the graph not: {findings[0].message}"
            findings = [replace(findings[0], code=Code.FROZEN, message=message), *findings]
        for rerun in range(1, self._reruns + 1):
            again = self._run(implementation, executor, served, repeat)
            failing_again, wrong_again = self._compare(implementation, again)
            if failing_again != failing or wrong_again != wrong or again.trouble != run.trouble:
                agreed = failing_again is None and again.stop is None and not again.trouble[1]
                seen = "agreed" if agreed else "disagreed elsewhere"
                first = findings[0]
                message = f"run 1: {first.code} {first.message}; run {rerun + 1} {seen}"
                return [replace(first, code=Code.NOT_DETERMINISTIC, message=message), *findings]
        return findings

    def _confirmed(
        self,
        implementation: Implementation,
        executor: Executor,
        served: list[int],
        repeat: bool,
        doubts: Sequence[Doubt],
    ) -> list[Finding]:
        """The findings for what was seen once, and not when the case was run again."""
        self.rig.close()
        self.rig.pool.forget_images()
        found = [
            replace(self._blank(implementation, executor, it.code, it.replay), message=it.sentence) for it in doubts
        ]
        lasting = [finding for finding in found if finding.code in _LASTING]
        passing = [finding for finding in found if finding.code not in _LASTING]
        if not passing:
            return lasting
        runs = [self._run(implementation, executor, served, repeat) for _ in range(RERUNS)]
        agreed = 1 + sum(self._is_clean(implementation, run) for run in runs)
        message = f"run 1, among other cases: {passing[0].message}; run alone it agreed {agreed} of {RERUNS + 1} times"
        return [replace(passing[0], code=Code.NOT_DETERMINISTIC, message=message), *lasting]

    def _is_clean(self, implementation: Implementation, run: _Run) -> bool:
        return run.stop is None and not run.notes and self._compare(implementation, run)[0] is None

    def _is_frozen(
        self, implementation: Implementation, executor: Executor, run: _Run, first: Finding, repeat: bool
    ) -> bool:
        """Whether wrong content, or an error at a replay, comes from the graph alone."""
        raised = isinstance(run.stop, ImplementationRaised) and run.stop.while_capturing is None
        if executor is EAGER or not (first.code in _CONTENT or raised):
            return False
        state_of(implementation).restore()
        eager = self._run(implementation, EAGER, list(dict.fromkeys(run.wanted)), repeat)
        return eager.stop is None and self._compare(implementation, eager)[0] is None

    def _run(
        self, implementation: Implementation, executor: Executor, served: list[int], repeat: bool, afresh: bool = True
    ) -> _Run:
        rig, case = self.rig, self.case
        keys = self.keys(served)
        take_fallbacks()
        note(Phase.CAPTURING, served[0])
        try:
            opened, kept, _ = open_session(rig, executor, implementation, keys, afresh)
        except (ImplementationRaised, CaptureRefused) as stop:
            refuse_dead(self._device, stop)
            return self._never_ran(stop, served)
        values = self.image(implementation).values
        rig.reset()
        run = _Run(wanted=tuple(served), served=[], snapshots=[rig.arena.clone()], kept=kept)
        opened.begin()
        if isinstance(opened, EagerSession):
            opened.delay_cycles = DELAY_CYCLES if self._delay else 0
        for number, replay in enumerate([*served, *served[-1:]] if repeat else served):
            if number < len(served):
                rig.load(case, replay, values[replay])
            note(Phase.CALLING, replay)
            try:
                opened.replay(*self.key(replay))
                if self._careful:
                    torch.cuda.synchronize()
            except (ImplementationRaised, CaptureRefused) as stop:
                refuse_dead(self._device, stop)
                run.stop = stop
            self._keep(run, replay)
            if run.stop is not None:
                break
        note(Phase.CHECKING, served[-1])
        run.notes = opened.end()
        run.fallbacks = opened.fallbacks + take_fallbacks()
        if isinstance(opened, EagerSession):
            run.compile_keys = frozenset(str(key) for it in opened.served for key in it.keys)
        return run

    def _keep(self, run: _Run, replay: int) -> None:
        """Keep what the call for ``replay`` left."""
        run.served.append(replay)
        run.snapshots.append(self.rig.arena.clone())
        run.pool_mutated.append(self.rig.pool.mutated())
        run.host_differences.append(self.rig.host_difference(self.case, replay))

    def _never_ran(self, stop: Stop, served: list[int]) -> _Run:
        """A run that ended while a graph was captured: at the first replay which that graph was to serve."""
        case, rig = self.case, self.rig
        at = next(it for it in served if self.key(it) == stop.while_capturing)
        rig.reset()
        run = _Run(wanted=tuple(served), served=[], snapshots=[rig.arena.clone()], stop=stop)
        run.fallbacks = take_fallbacks()
        rig.load(case, at, rig.initial)
        self._keep(run, at)
        return run

    def image(self, implementation: Implementation) -> Image:
        """The images of the case for ``implementation``, on the device."""
        key = ImageKey.of(implementation, self.case.setup)
        if key not in self._images:
            self._images |= upload(self.rig, self.case, (key,))
        return self._images[key]

    def _compare(self, implementation: Implementation, run: _Run) -> tuple[int | None, object]:
        """The first call that left something wrong, and a value that is equal when the same is wrong."""
        if run.compared is None:
            run.compared = self._compared(implementation, run)
        return run.compared

    def _compared(self, implementation: Implementation, run: _Run) -> tuple[int | None, object]:
        values, classes, _ = self.image(implementation)
        wanted, region = values[run.served], classes[run.served]
        snapshots = torch.stack(run.snapshots)
        before, after = snapshots[:-1], snapshots[1:]
        allowed = is_allowed(after, before, wanted, region)
        bad = ~allowed
        marks = (bad.any(dim=1) | torch.stack(run.pool_mutated)).tolist()
        raised_at = len(run.served) - 1 if run.stop is not None else None
        for call, marked in enumerate(marks):
            if call != raised_at and (marked or run.host_differences[call]):
                cells = bad[call].nonzero().flatten()
                inputs = bool(run.pool_mutated[call]), run.host_differences[call]
                return call, (cells.tolist(), after[call][cells].tolist(), inputs)
        return None, None

    def _describe(
        self, implementation: Implementation, executor: Executor, run: _Run, failing: int | None
    ) -> list[Finding]:
        findings = [] if failing is None else self._content(implementation, executor, run, failing)
        if failing is None and run.stop is not None:
            findings.append(self._stopped(implementation, executor, run, run.stop))
        for seen in run.notes:
            blank = self._blank(implementation, executor, seen.code, run.served[seen.call])
            findings.append(replace(blank, message=seen.sentence))
        return sorted(findings, key=lambda finding: SEVERITY.index(finding.code))

    def _content(self, implementation: Implementation, executor: Executor, run: _Run, failing: int) -> list[Finding]:
        replay = run.served[failing]
        values, classes, _ = self.image(implementation)
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
        if self._picture:
            self._pictures = pictures(snapshot, findings[0])
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
        return None if run.stop is not None else run.snapshots[-1].cpu()

    def _stopped(self, implementation: Implementation, executor: Executor, run: _Run, stop: Stop) -> Finding:
        """The finding for what ended the run."""
        replay = run.served[-1]
        during = ""
        if stop.while_capturing is not None:
            mode, bucket = stop.while_capturing
            during = f"while capturing ({mode}, bucket {bucket}): "
        if isinstance(stop, CaptureRefused):
            return replace(self._blank(implementation, executor, stop.code, replay), message=during + stop.sentence)
        error = stop.error
        lines = [line.strip() for line in words_of(error).splitlines() if line.strip()] or ["no message"]
        # A compiler's message starts with the place and ends with what is wrong there.
        sentence = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
        where = stop.line or line_of(error, implementation.file)
        second = len(run.served) > 1 and run.served[-2] == replay
        code = Code.NOT_IDEMPOTENT if second else Code.EXCEPTION
        message = f"{during}{type(error).__name__}: {sentence} ({where})" + (", on a second call" if second else "")
        return replace(self._blank(implementation, executor, code, replay), message=message)

    def _blank(self, implementation: Implementation, executor: Executor, code: Code, replay: int) -> Finding:
        mode = self.case.replays[replay].mode
        return Finding(implementation=implementation.name, executor=executor.name, code=code, replay=replay, mode=mode)


class Opened(NamedTuple):
    """A session; whether a graph of it was kept from an earlier case, and whether one is new."""

    session: Session
    kept: bool
    new: bool


def open_session(
    rig: Rig, executor: Executor, implementation: Implementation, keys: tuple[GraphKey, ...], afresh: bool = True
) -> Opened:
    """A session for ``keys``. Raises ``ImplementationRaised`` and ``CaptureRefused``."""
    if not captures(executor):
        state_of(implementation)  # what it keeps before its first call
        return Opened(executor.open(rig, implementation, {}), kept=False, new=False)
    with spending(CAPTURE):
        graphs, kept, new = rig.keeping(KeptGraphs).serve(executor, implementation, keys, afresh)
    return Opened(executor.open(rig, implementation, graphs), kept, new)


_CONTENT: Final = frozenset(
    {
        *(Code.WRONG_VALUE, Code.STALE, Code.POISON, Code.INVARIANT),
        *(Code.GUARD_WRITTEN, Code.FRAME_WRITTEN, Code.NOT_IDEMPOTENT),
    }
)
"""What a value frozen in a graph can look like."""


def fault_of(error: Exception) -> str:
    """What is said of a verdict that is unknown because of ``error``."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    at = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"the check itself failed: {type(error).__name__}: {words_of(error)} ({at})"
