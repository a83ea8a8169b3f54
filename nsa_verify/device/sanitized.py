"""The process that runs saved cases under a sanitizer: ``python -P -m nsa_verify.device.sanitized FOLDER``.

It reads its errand from the folder, calls one implementation directly, case after case, over memory in which every
tensor is an allocation of its own, and writes a line for each case that begins and that is done.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import torch
from msgspec.structs import replace

from nsa_verify.core.case import Case
from nsa_verify.core.findings import SEVERITY, Code, Finding, Outcome, Verdict
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.registry import ImplementationError, load
from nsa_verify.core.sanitizers import ERRAND, REPORT, UNABLE, Errand, Sanitizer, Sequence, Told
from nsa_verify.device.blame import line_of
from nsa_verify.device.driving import unseeded
from nsa_verify.device.health import DeviceDied, refuse_dead
from nsa_verify.device.judge import fault_of
from nsa_verify.device.launches import intercepted
from nsa_verify.device.select import DeviceError, resolve, single_thread
from nsa_verify.device.separate import Separate
from nsa_verify.device.stops import words_of

if TYPE_CHECKING:
    from nsa_verify.device.bounds import Bounds, Place, Stray

EXECUTOR: Final = "eager"


class Subject:
    """One implementation on one device, run over case after case under ``sanitizer``."""

    def __init__(self, implementation: Implementation, sanitizer: Sanitizer) -> None:
        self._implementation, self._sanitizer = implementation, sanitizer

    def judge(self, sequence: Sequence) -> Verdict:
        """What can be told of the case from inside the process. Raises ``DeviceDied``."""
        name, case = self._implementation.name, sequence.case
        said = Verdict(implementation=name, executor=EXECUTOR, outcome=Outcome.NOT_APPLICABLE)
        reasons = [self._implementation.not_applicable(case.setup, replay.mode) for replay in case.replays]
        if None not in reasons:
            return replace(said, reason=str(reasons[0]))
        modes = [it.mode for it, reason in zip(case.replays, reasons, strict=True) if reason is None]
        said = replace(said, modes=tuple(dict.fromkeys(modes)))
        try:
            for earlier in sequence.before:
                self._run(earlier)
            launches, findings = self._run(case)
        except DeviceDied:
            raise
        except Exception as error:  # noqa: BLE001 - a check that fails, however, says nothing of the implementation
            refuse_dead(self._sanitizer.device, error)
            return replace(said, outcome=Outcome.UNKNOWN, reason=fault_of(error))
        if self._sanitizer is Sanitizer.OOB and not launches and not findings:
            return replace(said, outcome=Outcome.NOT_APPLICABLE, modes=(), reason="it launched no Triton kernel")
        return replace(said, outcome=Outcome.DISAGREE if findings else Outcome.AGREE, findings=tuple(findings))

    def _run(self, case: Case) -> tuple[int, list[Finding]]:
        """The number of launches that were looked at, and the findings of the first replay that has any."""
        implementation, device = self._implementation, self._sanitizer.device
        memory = Separate(case, device)
        bounds = _bounds(memory) if self._sanitizer is Sanitizer.OOB else None
        for replay, it in enumerate(case.replays):
            if implementation.not_applicable(case.setup, it.mode) is not None:
                continue
            blank = Finding(
                implementation=implementation.name, executor=EXECUTOR, code=Code.EXCEPTION, replay=replay, mode=it.mode
            )
            steps = memory.steps(replay, implementation.writes(case.setup))
            inputs = memory.inputs(replay, steps)
            findings = []
            if device == "cuda":
                torch.cuda.synchronize()  # a stream of the implementation's own must not overtake what was asked for
            try:
                with intercepted(bounds.launch) if bounds is not None else nullcontext(), unseeded():
                    implementation.refresh(inputs, steps, case.setup)
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                refuse_dead(device, error)
                if _is_own_fault(error):
                    raise
                sentence = (words_of(error).splitlines() or ["no message"])[0]
                where = line_of(error, implementation.file)
                findings.append(replace(blank, message=f"{type(error).__name__}: {sentence} ({where})"))
            if bounds is not None:
                findings += [_finding(blank, place, stray) for place, stray in bounds.strays.items()]
            if findings:
                findings.sort(key=lambda finding: SEVERITY.index(finding.code))
                return bounds.launches if bounds is not None else 0, findings
        return bounds.launches if bounds is not None else 0, []


def _bounds(memory: Separate) -> Bounds:
    from nsa_verify.device.bounds import Bounds

    return Bounds(memory.spans)


def _is_own_fault(error: Exception) -> bool:
    """Whether triton-viz raised it, and not the implementation."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and f"{os.sep}triton_viz{os.sep}" in frames[-1].filename


def _finding(blank: Finding, place: Place, stray: Stray) -> Finding:
    """What is said of accesses that strayed from one line."""
    did = "reads" if place.code is Code.OUT_OF_BOUNDS else "writes"
    often = f"; {stray.times} elements in all" if stray.times > 1 else ""
    finding = replace(blank, code=place.code, count=stray.times)
    span = place.span
    if span is None:
        return replace(finding, message=f"{did} memory that is no tensor's{often} ({place.line})")
    side = "past the end" if stray.element >= 0 else "in front"
    length = (span.end - span.start) // span.itemsize
    return replace(
        finding,
        buffer=span.name,
        step=span.step,
        element=(stray.element,),
        message=f"{did} {side} of {span.name}: element {stray.element} where it has {length}{often} ({place.line})",
    )


def main() -> int:
    """Do the errand; return the exit code."""
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    errand = msgspec.json.decode((folder / ERRAND).read_bytes(), type=Errand)
    try:
        resolve(errand.sanitizer.device)
        single_thread()
        subject = Subject(load(errand.references)[errand.implementation], errand.sanitizer)
        if errand.sanitizer is Sanitizer.OOB:
            import nsa_verify.device.bounds  # noqa: F401 - what is missing is told now
    except (DeviceError, ImplementationError, KeyError, ImportError) as error:
        print(error)
        return UNABLE
    with open(folder / REPORT, "ab", buffering=0) as report:

        def say(told: Told) -> None:
            report.write(msgspec.json.encode(told) + b"\n")

        return _do(errand, subject, say)


def _do(errand: Errand, subject: Subject, say: Callable[[Told], None]) -> int:
    for number, sequence in enumerate(errand.sequences):
        say(Told(number))
        try:
            verdict = subject.judge(sequence)
        except DeviceDied as death:
            print(death, flush=True)
            os._exit(UNABLE)  # Python's own end would call into a context that is dead
        say(Told(number, verdict))
    return 0


def _end_with_parent() -> None:
    """Standard input is a pipe that closes when whoever started this is gone; unless the tool in between changed it."""
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(0).st_mode):
            while os.read(0, 1):
                pass
            os._exit(UNABLE)


if __name__ == "__main__":
    sys.exit(main())
