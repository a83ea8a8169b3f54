"""What ``nsa-verify bench`` measures, and in which order: what agrees with the oracle is timed, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from msgspec import Struct

from nsa_verify import __version__
from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Outcome
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS
from nsa_verify.engine.events import RunFinished, RunStarted
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.search import search
from nsa_verify.shell.options import ExitCode

BASELINE = "python-loop"


class Spread(Struct, frozen=True):
    """Microseconds: the median of the repetitions, the least, the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of at least one value; else None."""
        return cls(median(values), min(values), max(values)) if values else None

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"


class Timing(Struct, frozen=True, kw_only=True):
    """One implementation in one mode at one size.

    ``host`` is a call's time on the host, ``node`` its time on the device inside a captured graph (None where it may
    not be captured, or without a GPU), ``launches`` the nodes of that graph, ``syncs`` and ``allocations`` those of one
    call. ``live_bytes`` must move at least; ``floor_us`` is an empty node and those bytes at the measured bandwidth.
    ``moved_bytes`` move at least by the write extent that the implementation declares.
    """

    implementation: str
    mode: str
    size: str
    host: Spread
    node: Spread | None = None
    launches: int = 0
    syncs: int = 0
    allocations: int = 0
    live_bytes: int = 0
    moved_bytes: int = 0
    floor_us: float = 0.0
    host_ratio: float | None = None
    """Times the host time of ``python-loop`` in the same mode at the same size, from the same repetitions."""

    @property
    def floor_ratio(self) -> float | None:
        """How many times the floor the node takes."""
        return self.node.median / self.floor_us if self.node is not None and self.floor_us else None


class Rejected(Struct, frozen=True):
    """What the verifier has not passed in this run, and so is not timed."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} is not timed: it {self.reason}"


class Timings(Struct, kw_only=True):
    """All that one run measured, and how."""

    version: str = __version__
    device: str = ""
    seed: int = 0
    cases: int = 0
    """That each implementation was verified with before it was timed."""
    repetitions: int = 0
    empty_node_us: float = 0.0
    bytes_per_us: float = 0.0
    rejected: list[Rejected] = []
    interpreted: list[str] = []
    """Implementations that are not timed since their kernels only run in Triton's interpreter here."""
    unscheduled: list[str] = []
    """Implementations that are not timed since they do not write the paged-MQA schedule and its lengths."""
    timings: list[Timing] = []


class Ask(Struct, frozen=True, kw_only=True):
    """The options of a run; ``sizes`` are those of ``nsa_verify.device.timing``."""

    plan: Plan
    sizes: tuple[Any, ...]
    expansions: tuple[int, ...]
    repetitions: int


Say = Callable[[str], None]


def verified(plan: Plan, told: Timings, device: str) -> tuple[dict[str, set[Mode]], ExitCode]:
    """Run ``plan`` and note who disagreed; the modes in which the others agreed, and the exit code of such a run."""
    names: list[str] = []
    for event in search(plan, lambda found: found, __version__, {}):
        if isinstance(event, RunStarted):
            names, told.device = [it.name for it in event.subjects], event.device
        elif isinstance(event, RunFinished):
            told.cases = event.cases
            accused: dict[str, str] = {}
            for signature in event.signatures:
                accused.setdefault(signature.implementation, f"disagrees with the oracle ({signature})")
            for (name, executor, _), cell in event.matrix.cells.items():
                if cell.unknown:
                    accused.setdefault(name, f"could not be judged [{executor}]")
            judged: dict[str, set[Mode]] = {name: set() for name in names}
            for (name, _, mode), cell in event.matrix.cells.items():
                judged[name] |= {mode} if cell.cases else set()
            for name in names:
                if not judged[name]:
                    accused.setdefault(name, "was not judged in any case")
            told.rejected = [Rejected(name, reason) for name, reason in accused.items()]
            unknown = ExitCode.UNABLE if event.matrix.total(Outcome.UNKNOWN) else ExitCode.AGREE
            code = ExitCode.DISAGREE if event.signatures else unknown
            if device == "cpu":
                told.interpreted = [name for name in names if event.tally.compile_keys.get(name)]
            out = {*accused, *told.interpreted}
            return {name: modes for name, modes in judged.items() if name not in out}, code
    raise AssertionError("a search ends with RunFinished")


def measured(ask: Ask, passed: Mapping[str, Collection[Mode]], told: Timings, device: str, say: Say) -> None:
    """Time what ``passed``, at every size in the modes in which it did, and what expands ragged rows; into ``told``."""
    from nsa_verify.core.registry import load
    from nsa_verify.device import timing
    from nsa_verify.shell.expansions import expansions

    known = load(ask.plan.references)
    asked_for = OPTIONAL_OUTPUTS if any(size.schedule for size in ask.sizes) else frozenset()
    told.unscheduled = [name for name in passed if not asked_for <= known[name].optional_outputs]
    chosen = [known[name] for name in passed if name not in told.unscheduled]
    floor = None
    if device == "cuda":
        floor = timing.floor(ask.repetitions)
        told.empty_node_us, told.bytes_per_us = floor.empty_node_us, floor.bytes_per_us
    for size in ask.sizes if chosen else ():
        for mode in ask.plan.modes:
            given = timing.work(size, mode, device, ask.plan.seed)
            subjects = [
                timing.prepared(it.name, timing.refresh_of(it, given), mode in it.capturable, device)
                for it in chosen
                if mode in passed[it.name] and it.not_applicable(given.setup, mode) is None
            ]
            timing.measure(subjects, device, ask.repetitions)
            moved = {it.name: given.moved_bytes(known[it.name].extent, known[it.name].block) for it in subjects}
            told.timings += _timings(subjects, str(mode), str(size), given.live_bytes, moved, floor)
            say(f"{mode}, {size}")
            del given, subjects
            timing.forget(device)
    for batch_size in ask.expansions if device == "cuda" else ():
        subjects, live_bytes = expansions(batch_size, device)
        timing.measure(subjects, device, ask.repetitions)
        moved = {it.name: live_bytes for it in subjects}
        told.timings += _timings(subjects, EXPANSION, f"B {batch_size}", live_bytes, moved, floor)
        say(f"{EXPANSION}, B {batch_size}")


EXPANSION = "ragged expansion alone"


def _timings(
    subjects: Sequence[Any], mode: str, size: str, live_bytes: int, moved: Mapping[str, int], floor: Any
) -> Iterator[Timing]:
    baseline = next((median(it.host_us) for it in subjects if it.name.startswith(BASELINE)), None)
    for it in subjects:
        host = Spread.of(it.host_us)
        assert host is not None
        yield Timing(
            implementation=it.name,
            mode=mode,
            size=size,
            host=host,
            node=Spread.of(it.node_us),
            launches=it.launches,
            syncs=it.syncs,
            allocations=it.allocations,
            live_bytes=live_bytes,
            moved_bytes=moved[it.name],
            floor_us=floor.us(live_bytes) if floor is not None else 0.0,
            host_ratio=baseline / host.median if baseline else None,
        )
