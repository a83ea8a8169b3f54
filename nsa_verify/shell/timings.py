"""What ``nsa-verify bench`` measures, and in which order: what agrees with the oracle is timed, and nothing else.

Its cases are small. So at every size the results on the very inputs that are timed are compared once more, before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from msgspec import Struct

from nsa_verify import __version__
from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Outcome
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Implementation, take_fallbacks
from nsa_verify.engine.events import RunFinished, RunStarted
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.search import search
from nsa_verify.shell.options import ExitCode

BASELINES = ("python-loop", "python-loop (stage 0)")
"""What the others are compared with: of whole refreshes, and of the ragged expansion alone."""
EXPANSION = "ragged expansion alone"


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
    call. ``live_bytes`` must move at least; ``floor_us`` is an empty node and those bytes at the bandwidth of a copy
    through DRAM, which a node whose bytes fit into L2 can beat, since it finds them warm there.
    ``moved_bytes`` move at least by the write extent that the implementation declares. ``fallbacks`` are the reasons
    that it reported at this size for not taking its fast path.
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
    fallbacks: tuple[str, ...] = ()
    host_ratio: float | None = None
    """Times the host time of ``python-loop`` in the same mode at the same size, from the same repetitions."""

    @property
    def floor_ratio(self) -> float | None:
        """How many times the floor the node takes."""
        return self.node.median / self.floor_us if self.node is not None and self.floor_us else None


class Rejected(Struct, frozen=True):
    """What the verifier has not passed in this run, and so is not timed.

    With a ``size``: what was ``wrong`` there, on the inputs that are timed, and so is timed nowhere; or what raised.
    """

    implementation: str
    reason: str
    mode: str = ""
    size: str = ""
    wrong: bool = False

    def __str__(self) -> str:
        where = f" in {self.mode} at {self.size}" if self.size else ""
        if self.wrong:
            return f"{self.implementation} is not timed:{where}, {self.reason}"
        return f"{self.implementation} is not timed{where}: it {self.reason}"


class Timings(Struct, kw_only=True):
    """All that one run measured, and how."""

    version: str = __version__
    device: str = ""
    seed: int = 0
    cases: int = 0
    """That were drawn; before it was timed, each implementation agreed on those of them that it runs."""
    repetitions: int = 0
    empty_node_us: float = 0.0
    bytes_per_us: float = 0.0
    rejected: list[Rejected] = []
    interpreted: list[str] = []
    """Implementations that are not timed since their kernels only run in Triton's interpreter here."""
    unscheduled: list[str] = []
    """Implementations that are not timed since they do not write the paged-MQA schedule and its lengths."""
    skipped: list[str] = []
    """What did not fit into memory, or could not be measured since the device died, and so says nothing of anyone."""
    fallbacks: dict[str, dict[str, int]] = {}
    """By implementation the reasons why it did not take its fast path in those cases, counted as ``run`` counts."""
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
            told.cases, told.fallbacks = event.cases, event.tally.fallbacks
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
    from nsa_verify.device.health import DeviceDied

    known = load(ask.plan.references)
    asked_for = OPTIONAL_OUTPUTS if any(size.schedule for size in ask.sizes) else frozenset()
    told.unscheduled = [name for name in passed if not asked_for <= known[name].optional_outputs]
    chosen = [known[name] for name in passed if name not in told.unscheduled]
    floor = None
    if device == "cuda":
        floor = timing.floor(ask.repetitions)
        told.empty_node_us, told.bytes_per_us = floor.empty_node_us, floor.bytes_per_us
    bench = _Bench(told, device, floor, ask.repetitions, say)
    try:
        for size in ask.sizes if chosen else ():
            for mode in ask.plan.modes:
                bench.refreshes(size, mode, [it for it in chosen if mode in passed[it.name]], ask.plan.seed)
        for batch_size in ask.expansions if device == "cuda" else ():
            bench.expansions(batch_size, {name for name, modes in passed.items() if Mode.DRAFT_EXTEND in modes})
    except DeviceDied as death:
        told.skipped.append(f"nothing more is measured: the device died ({death})")


class _Bench:
    """Times what is right, size by size, into ``told``. Its methods raise ``DeviceDied``."""

    def __init__(self, told: Timings, device: str, floor: Any, repetitions: int, say: Say) -> None:
        self._told, self._device, self._floor, self._repetitions, self._say = told, device, floor, repetitions, say
        self._wrong: set[str] = set()
        """Implementations that were wrong at a size."""

    def refreshes(self, size: Any, mode: Mode, chosen: Sequence[Implementation], seed: int) -> None:
        """Whole refreshes of one size in one mode."""
        from nsa_verify.device import timing
        from nsa_verify.device.answers import Answers

        try:
            given = timing.work(size, mode, self._device, seed)
            answers = Answers(given.inputs, given.steps, given.setup)
        except timing.NO_MEMORY as error:
            self._told.skipped.append(f"{mode}, {size} is not measured: {timing.sentence(error)}")
            return
        moved = {it.name: given.moved_bytes(it.extent, it.block) for it in chosen}
        candidates = {
            it.name: timing.Candidate(it.name, timing.refresh_of(it, given), mode in it.capturable)
            for it in chosen
            if it.not_applicable(given.setup, mode) is None
        }
        self._time(candidates, answers.check, (str(mode), str(size)), given.live_bytes, moved)
        del given, answers, candidates
        timing.forget(self._device)

    def expansions(self, batch_size: int, passed: Collection[str]) -> None:
        """The ragged expansion alone, of implementations that ``passed``."""
        from nsa_verify.shell.expansions import expansions

        rows, check, live_bytes = expansions(batch_size, self._device)
        moved = {it.name: live_bytes for it in rows.values()}
        candidates = {name: it for name, it in rows.items() if name in passed}
        self._time(candidates, check, (EXPANSION, f"B {batch_size}"), live_bytes, moved)

    def _time(
        self,
        candidates: Mapping[str, Any],
        check: Callable[..., object],
        where: tuple[str, str],
        live_bytes: int,
        moved: Mapping[str, int],
    ) -> None:
        """Time those of ``candidates``, by implementation, that ``check`` finds right."""
        from nsa_verify.device import timing

        found = [self._prepared(it, name, check, where) for name, it in candidates.items() if name not in self._wrong]
        subjects = [it for it in found if it is not None]
        try:
            timing.measure(subjects, self._device, self._repetitions)
        finally:
            self._told.rejected += [Rejected(it.name, f"raised {it.error}", *where) for it in subjects if it.error]
        timed = [it for it in subjects if not it.error]
        self._told.timings += _timings(timed, *where, live_bytes, moved, self._floor)
        self._say(", ".join(where))

    def _prepared(self, it: Any, implementation: str, check: Callable[..., object], where: tuple[str, str]) -> Any:
        """``it`` ready to be timed; None, and a reason in ``told``, if it is wrong or raises."""
        from nsa_verify.device import timing
        from nsa_verify.device.answers import WrongResult
        from nsa_verify.device.health import refuse_dead

        told = self._told
        take_fallbacks()
        try:
            subject = timing.prepared(it.name, it.call, it.capture, self._device, check)
        except WrongResult as wrong:
            self._wrong.add(implementation)
            told.rejected.append(Rejected(it.name, str(wrong), *where, wrong=True))
            alike = (where[0] == EXPANSION, it.name)
            told.timings = [timed for timed in told.timings if (timed.mode == EXPANSION, timed.implementation) != alike]
        except timing.NO_MEMORY as error:
            told.skipped.append(f"{', '.join(where)} is not measured of {it.name}: {timing.sentence(error)}")
        except Exception as error:  # noqa: BLE001 - an implementation may raise anything
            told.rejected.append(Rejected(it.name, f"raised {timing.sentence(error)}", *where))
            refuse_dead(self._device, error)
        else:
            subject.fallbacks = tuple(dict.fromkeys(take_fallbacks()))
            return subject
        return None


def _timings(
    subjects: Sequence[Any], mode: str, size: str, live_bytes: int, moved: Mapping[str, int], floor: Any
) -> Iterator[Timing]:
    baseline = next((median(it.host_us) for it in subjects if it.name in BASELINES), None)
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
            fallbacks=it.fallbacks,
            host_ratio=baseline / host.median if baseline else None,
        )
