"""Saved cases under a sanitizer: every implementation in a process of its own, over all cases at once if it is clean.

On CUDA it is compute-sanitizer that starts the process, and what it writes down belongs to no case: so where it wrote
anything, each case is run alone, and then one replay more at a time. A process that ends early, and a report that
cannot be read, leave the verdict unknown.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from nsa_verify.core.case import Case
from nsa_verify.core.findings import SEVERITY, Finding, Outcome, Verdict
from nsa_verify.core.sanitizers import ERRAND, REPORT, Errand, Sanitizer, Sequence, Told
from nsa_verify.engine.crew import Crew
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import EAGER, Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.records import Damaged, Record, records_in
from nsa_verify.engine.replaying import Replayed, Status, opened_entry, status_of

TOGETHER: Final = 64
"""Cases that one process is given: their results are known together."""
SILENCE_S: Final = 300.0
"""How long a case may take; kernels are compiled meanwhile, and run many times slower than alone."""
POLL_S: Final = 0.05
OUTPUT: Final = "output.txt"
RECORDS: Final = "records-%p.xml"
COUNTED: Final = 86
"""Exit code of compute-sanitizer where it counted an error."""
PADDING_BYTES: Final = 1 << 16
"""Memory behind every allocation that memcheck keeps free, so that what strays does not land in the next one."""


class Running(Struct, frozen=True):
    """An implementation begins with a case: number ``number`` of ``cases``, the first being 1."""

    implementation: str
    path: Path
    number: int
    cases: int


class _Ran(NamedTuple):
    """What became of a process. ``problem`` says why some of the rest is missing, and is empty if nothing is."""

    verdicts: dict[int, Verdict]
    records: tuple[Record, ...]
    problem: str

    @property
    def is_clean(self) -> bool:
        return not self.records and not self.problem


def compute_sanitizer() -> str | None:
    """The path of NVIDIA's tool: on the PATH, or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.path.join(home, "bin"))


def require(sanitizer: Sanitizer) -> None:
    """Raise ``EngineError`` if what ``sanitizer`` needs is not installed; nothing is imported."""
    if sanitizer is Sanitizer.OOB and find_spec("triton_viz") is None:
        raise EngineError(f"--sanitizer {sanitizer}: triton-viz is not installed; pip install 'nsa-verify[sanitize]'")
    if sanitizer is not Sanitizer.OOB and compute_sanitizer() is None:
        raise EngineError(
            f"--sanitizer {sanitizer}: compute-sanitizer is neither on the PATH nor in $CUDA_HOME/bin; install the CUDA"
            " toolkit, or set CUDA_HOME"
        )


def sanitize_saved(plan: Plan, sanitizer: Sanitizer, paths: list[Path]) -> Iterator[Hello | Running | Replayed]:
    """Run the cases of ``paths`` under ``sanitizer``: a ``Hello``, then ``Running`` and, in order, ``Replayed``.

    A case is FIXED if the sanitizer has nothing to say of any applicable implementation. Raises ``KeyboardInterrupt``,
    and ``ImplementationError``, ``DeviceError`` and ``EngineError``.
    """
    require(sanitizer)
    plan = replace(plan, device=sanitizer.device, executors=(EAGER,), workers=1)
    with Crew(plan.workers, plan.device) as crew:
        said = crew.hello(plan)
    yield said
    known = {subject.name for subject in said.subjects}
    for start in range(0, len(paths), TOGETHER):
        opened = [(path, *opened_entry(path)) for path in paths[start : start + TOGETHER]]
        usable = [(path, Sequence(entry.case, entry.before)) for path, entry, _ in opened if entry is not None]
        found: dict[Path, list[Verdict]] = {path: [] for path, _ in usable}
        for subject in said.subjects if usable else ():
            verdicts = yield from _Processes(plan, sanitizer, subject.name, usable, len(paths), start).judge()
            for (path, _), verdict in zip(usable, verdicts, strict=True):
                found[path].append(verdict)
        for path, entry, problem in opened:
            if entry is None:
                yield Replayed(path, Status.ERROR, None, problem=problem)
            else:
                yield status_of(path, entry, tuple(found[path]), known, plan)


class _Processes:
    """The processes that run one implementation over some cases."""

    def __init__(
        self,
        plan: Plan,
        sanitizer: Sanitizer,
        implementation: str,
        cases: list[tuple[Path, Sequence]],
        total: int,
        earlier: int,
    ) -> None:
        self._plan, self._sanitizer, self._implementation = plan, sanitizer, implementation
        self._cases, self._total, self._earlier = cases, total, earlier

    def judge(self) -> Generator[Running, None, list[Verdict]]:
        """The verdict on each case."""
        everything = list(range(len(self._cases)))
        ran = yield from self._run(everything)
        if ran.is_clean:
            return [ran.verdicts[number] for number in everything]
        if len(everything) == 1:
            return [(yield from self._replay_by_replay(0, ran))]
        # Where nothing but the process itself tells, what it told of one case stands whatever another one did.
        told = ran.verdicts if self._sanitizer is Sanitizer.OOB else {}
        verdicts = []
        for number in everything:
            if number in told:
                verdicts.append(told[number])
                continue
            alone = yield from self._run([number])
            verdicts.append((yield from self._replay_by_replay(number, alone)))
        if any(it.outcome in (Outcome.DISAGREE, Outcome.UNKNOWN) for it in verdicts):
            return verdicts
        seen = ran.problem or f"{ran.records[0].words} ({ran.records[0].place})"
        doubt = f"{self._sanitizer} saw this with the cases in one process, and nothing with each alone: {seen}"
        return [replace(it, outcome=Outcome.UNKNOWN, reason=doubt) for it in verdicts]

    def _replay_by_replay(self, number: int, ran: _Ran) -> Generator[Running, None, Verdict]:
        """The verdict on a case that was run alone; what was written down is that of the first replay with which
        anything is."""
        case = self._cases[number][1].case
        last = len(case.replays) - 1
        for replay in range(last) if ran.records else ():
            shorter = yield from self._run([number], replays=replay + 1)
            if shorter.records:
                last, ran = replay, shorter
                break
        return self._verdict(case, last, ran, ran.verdicts.get(number))

    def _verdict(self, case: Case, replay: int, ran: _Ran, told: Verdict | None) -> Verdict:
        said = told or Verdict(implementation=self._implementation, executor=EAGER, outcome=Outcome.UNKNOWN)
        findings = self._findings(case, replay, ran.records)
        strange = "; ".join(record.words for record in ran.records if record.code is None)
        strange = f"{self._sanitizer} wrote what is not understood: {strange}" if strange else ""
        if findings:
            # An exception is then what the tool made of the access: it ends the kernel.
            modes = said.modes or (case.replays[replay].mode,)
            return replace(said, outcome=Outcome.DISAGREE, findings=findings, modes=modes, reason=strange)
        if reason := ran.problem or strange:
            return replace(said, outcome=Outcome.UNKNOWN, findings=(), reason=reason)
        return said

    def _findings(self, case: Case, replay: int, records: tuple[Record, ...]) -> tuple[Finding, ...]:
        """One finding for each code and place, in the words of its first record."""
        count = Counter((it.code, it.place) for it in records)
        first = {(it.code, it.place): it for it in reversed(records)}
        findings = [
            Finding(
                implementation=self._implementation,
                executor=EAGER,
                code=code,
                replay=replay,
                mode=case.replays[replay].mode,
                count=number,
                message=f"{self._sanitizer}: {first[code, place].words}"
                + (f", {number} times" if number > 1 else "")
                + (f" ({place})" if place else ""),
            )
            for (code, place), number in count.items()
            if code is not None
        ]
        return tuple(sorted(findings, key=lambda finding: SEVERITY.index(finding.code)))

    def _run(self, numbers: list[int], replays: int | None = None) -> Generator[Running, None, _Ran]:
        """Run the cases ``numbers`` in one process, of each the first ``replays``."""
        sequences = []
        for number in numbers:
            sequence = self._cases[number][1]
            shorter = Case(sequence.case.setup, sequence.case.replays[:replays])
            sequences.append(Sequence(shorter, sequence.before))
        plan, sanitizer = self._plan, self._sanitizer
        errand = Errand(sanitizer, plan.references, self._implementation, tuple(sequences))
        with tempfile.TemporaryDirectory(prefix="nsa-verify-") as name:
            folder = Path(name)
            (folder / ERRAND).write_bytes(msgspec.json.encode(errand))
            verdicts: dict[int, Verdict] = {}
            problem = ""
            with _Process(folder, sanitizer) as process:
                for told in process.follow(plan.deadline_s or SILENCE_S):
                    number = numbers[told.number]
                    if told.verdict is None:
                        path, place = self._cases[number][0], self._earlier + number + 1
                        yield Running(self._implementation, path, place, self._total)
                    else:
                        verdicts[number] = told.verdict
                problem = process.problem
            if not problem and len(verdicts) < len(numbers):
                problem = f"its process under {sanitizer} ended without a word{_last_words(folder)}"
            if sanitizer is Sanitizer.OOB:
                return _Ran(verdicts, (), problem)
            records, fault = _records(folder, sanitizer, process.counted)
            return _Ran(verdicts, records, problem or fault)


class _Process:
    """A process under a sanitizer; it is gone when the block ends."""

    def __init__(self, folder: Path, sanitizer: Sanitizer) -> None:
        self._folder, self._sanitizer = folder, sanitizer
        self.problem = ""
        """Why it was ended, or how it ended itself; empty if it did what it was asked."""
        self.counted = False
        """Whether compute-sanitizer counted an error."""
        environment = dict(os.environ)
        if sanitizer is Sanitizer.OOB:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment.pop("TRITON_INTERPRET", None)
            environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_DISABLE_LINE_INFO": "0"}
        with open(folder / OUTPUT, "wb") as output:
            self._process = subprocess.Popen(
                [*_tool(sanitizer, folder), sys.executable, "-P", "-m", "nsa_verify.device.sanitized", str(folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def follow(self, patience_s: float) -> Iterator[Told]:
        """What it tells, until it ends or is silent for ``patience_s``."""
        read, heard = 0, time.monotonic()
        while True:
            ended = self._process.poll() is not None  # asked first: what is read then is all there is
            lines = self._report()
            for line in lines[read:]:
                heard = time.monotonic()
                yield msgspec.json.decode(line, type=Told)
            read = len(lines)
            if ended:
                self._look_at_the_end()
                return
            if time.monotonic() - heard > patience_s:
                self.problem = f"no word for {patience_s:.0f} s under {self._sanitizer}; give more time with --deadline"
                return
            time.sleep(POLL_S)

    def _report(self) -> list[bytes]:
        """Its complete lines."""
        try:
            return (self._folder / REPORT).read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []

    def _look_at_the_end(self) -> None:
        code = self._process.returncode
        self.counted = code == COUNTED and self._sanitizer is not Sanitizer.OOB
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            self.problem = f"its process under {self._sanitizer} was killed by {name}"
        elif code and not self.counted:
            last = _last_words(self._folder)
            self.problem = f"its process under {self._sanitizer} ended with exit code {code}{last}"


def _tool(sanitizer: Sanitizer, folder: Path) -> list[str]:
    """The words that come in front of the process."""
    if sanitizer is Sanitizer.OOB:
        return []
    tool = compute_sanitizer()
    assert tool is not None
    # The processes that it starts itself, such as compilers, use no GPU.
    command = [tool, "--tool", sanitizer, "--target-processes", "application-only", "--xml"]
    command += ["--save", str(folder / RECORDS), "--error-exitcode", str(COUNTED)]
    command += ["--destroy-on-device-error", "kernel"]  # so that the cases that follow are run as well
    if sanitizer is Sanitizer.MEMCHECK:
        # torch itself makes calls of CUDA that fail, to see what there is.
        command += ["--report-api-errors", "no", "--padding", str(PADDING_BYTES)]
    return command


def _records(folder: Path, sanitizer: Sanitizer, counted: bool) -> tuple[tuple[Record, ...], str]:
    """What compute-sanitizer wrote down, and what is wrong with that."""
    files = sorted(folder.glob(RECORDS.replace("%p", "*")))
    if not files:
        return (), f"{sanitizer} left no XML{_last_words(folder)}"
    try:
        records = tuple(record for file in files for record in records_in(file, sanitizer))
    except Damaged as damage:
        return (), f"the XML of {sanitizer} is damaged: {damage}"
    if counted and not records:
        return (), f"{sanitizer} counted errors, and its XML has none{_last_words(folder)}"
    return tuple(record for record in records if not record.is_information), ""


def _last_words(folder: Path) -> str:
    """The last line that the process printed, or failing that the tool, in words to append to a sentence."""
    try:
        lines = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip("= \t")]
    own = [line for line in said if not line.startswith("=====")]
    last = (own or said or [""])[-1].strip("= \t")
    return f": {last}" if last else ""
