"""What ``nsa-verify bench`` measures, and in which order: what agrees with the oracle is timed, and nothing else.

Its cases are small. So at every size the results on the very inputs that are timed are compared once more, before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from nsa_verify import __version__
from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Outcome
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, Implementation, take_fallbacks
from nsa_verify.engine.events import Matrix, RunFinished, RunStarted, StopReason, Subject
from nsa_verify.engine.plan import EAGER, Plan
from nsa_verify.engine.search import search
from nsa_verify.kernels import BACKEND_ROWS
from nsa_verify.shell.options import ExitCode

BASELINES = ("python-loop", "python-loop (stage 0)")
"""What the others are compared with: of whole refreshes, and of the ragged expansion alone."""
EXPANSION = "ragged expansion alone"
EXPANSION_ROWS = ("engine-expansion", "engine-expansion-inplace")
"""Of ``BACKEND_ROWS`` those that judge an expansion by itself, which no built-in implementation calls."""

GRAPH = "graph"
"""The executor whose verdict a time on the device needs."""
LEAST = 5
"""Fewer cases of an implementation, mode and executor are no verdict."""

Judged = dict[str, dict[Mode, set[str]]]
"""By implementation and mode the executors under which it was judged in ``LEAST`` cases or more, and agreed."""


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
    not be captured, or without a GPU), ``launches`` the nodes of that graph (None likewise: nobody counts what is
    launched outside of one), ``syncs`` and ``allocations`` those of one call. ``live_bytes`` must move at least;
    ``floor_us`` is an empty node and those bytes at the bandwidth of a copy through DRAM, which a node whose bytes fit
    into L2 can beat, since it finds them warm there. ``extent_bytes`` move at least by the write extent that the
    implementation declares; what it writes elsewhere first, and reads again, is not counted. ``fallbacks`` are the
    reasons that it reported at this size for not taking its fast path.
    """

    implementation: str
    mode: str
    size: str
    host: Spread
    node: Spread | None = None
    launches: int | None = None
    syncs: int = 0
    allocations: int = 0
    live_bytes: int = 0
    extent_bytes: int = 0
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


class Unjudged(Struct, frozen=True):
    """What was asked for and is not timed, since only so many ``cases`` of ``executor`` were judged: of others than
    ``eager`` that is the time on the device alone."""

    implementation: str
    mode: str
    executor: str
    cases: int


class Compilations(Struct, frozen=True, kw_only=True):
    """How many forms of how many Triton kernels an implementation launched in one mode, over all ``sizes`` measured of
    so many steps, with the paged-MQA schedule or without: as many as ``kernels`` where each is compiled once."""

    implementation: str
    mode: str
    steps: int
    schedule: bool
    sizes: int
    kernels: int
    compilations: int


class Timings(Struct, kw_only=True):
    """All that one run measured, and how."""

    version: str = __version__
    device: str = ""
    seed: int = 0
    cases: int = 0
    """That were drawn; before it was timed, each implementation agreed on those of them that it runs."""
    judged: dict[str, dict[Mode, dict[str, int]]] = {}
    """By implementation, mode and executor on how many it agreed, also where they are too few."""
    repetitions: int = 0
    empty_node_us: float = 0.0
    bytes_per_us: float = 0.0
    rejected: list[Rejected] = []
    interpreted: list[str] = []
    """Implementations that are not timed since their kernels only run in Triton's interpreter here."""
    unscheduled: list[str] = []
    """Implementations that are not timed with the paged-MQA schedule and its lengths, since they do not write them."""
    undeclared: list[str] = []
    """Implementations that are not timed since they declare none of the modes that were asked for."""
    unjudged: list[Unjudged] = []
    skipped: list[str] = []
    """What did not fit into memory, or could not be measured since the device died, and so says nothing of anyone."""
    fallbacks: dict[str, dict[str, int]] = {}
    """By implementation the reasons why it did not take its fast path in those cases, counted as ``run`` counts."""
    timings: list[Timing] = []
    compilations: list[Compilations] = []
    """On a GPU, of everything that was timed."""


class Ask(Struct, frozen=True, kw_only=True):
    """The options of a run; ``sizes`` are those of ``nsa_verify.device.timing``."""

    plan: Plan
    sizes: tuple[Any, ...]
    expansions: tuple[int, ...]
    added: tuple[str, ...] = ()
    """Implementations that are judged for the sake of the expansions, and not timed themselves."""
    repetitions: int


Say = Callable[[str], None]


def with_expansions(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """``plan`` with ``EXPANSION_ROWS`` among what is judged, and those of them that it had not asked for.

    Call it after ``resolve``, since Triton is imported. Raises ``ImplementationError`` as ``load`` does.
    """
    from nsa_verify.core.registry import load

    known = load(plan.references)
    added = tuple(row for row in EXPANSION_ROWS if row not in known)
    references = (*plan.references, *((BACKEND_ROWS,) if added else ()))
    return replace(plan, references=references, only=(*known, *added)), added


def verified(plan: Plan, told: Timings, device: str) -> tuple[Judged, ExitCode]:
    """Run ``plan`` and note who disagreed; where the others were judged, and the exit code of such a run.

    Raises ``KeyboardInterrupt`` if it was interrupted: what it saw by then is no verdict.
    """
    subjects: tuple[Subject, ...] = ()
    for event in search(plan, lambda found: found, __version__, {}):
        if isinstance(event, RunStarted):
            subjects, told.device = event.subjects, event.device
        elif isinstance(event, RunFinished):
            if event.stop is StopReason.INTERRUPTED:
                raise KeyboardInterrupt
            told.cases, told.fallbacks = event.cases, event.tally.fallbacks
            accused: dict[str, str] = {}
            for signature in event.signatures:
                accused.setdefault(signature.implementation, f"disagrees with the oracle ({signature})")
            for (name, executor, _), cell in event.matrix.cells.items():
                if cell.unknown:
                    accused.setdefault(name, f"could not be judged [{executor}]")
            told.rejected = [Rejected(name, reason) for name, reason in accused.items()]
            unknown = ExitCode.UNABLE if event.matrix.total(Outcome.UNKNOWN) else ExitCode.AGREE
            code = ExitCode.DISAGREE if event.signatures else unknown
            if device == "cpu":
                told.interpreted = [it.name for it in subjects if event.tally.compile_keys.get(it.name)]
            out = {*accused, *told.interpreted}
            return _judged([it for it in subjects if it.name not in out], event.matrix, told), code
    raise AssertionError("a search ends with RunFinished")


def _judged(subjects: Sequence[Subject], matrix: Matrix, told: Timings) -> Judged:
    """Where ``subjects`` were judged; in ``told`` in how many cases, and where too few, though they declare it."""
    told.undeclared = [it.name for it in subjects if not it.modes]
    told.judged = {it.name: {mode: {} for mode in it.modes} for it in subjects if it.modes}
    for (name, executor, mode), cell in matrix.cells.items():
        if name in told.judged and cell.cases:
            told.judged[name][mode][executor] = cell.cases
    judged: Judged = {}
    for name, modes in told.judged.items():
        for mode, counts in modes.items():
            if (cases := counts.get(EAGER, 0)) < LEAST:
                told.unjudged.append(Unjudged(name, mode, EAGER, cases))
            else:
                enough = {executor for executor, count in counts.items() if count >= LEAST}
                judged.setdefault(name, {})[mode] = enough
    return judged


def measured(ask: Ask, judged: Judged, told: Timings, device: str, say: Say) -> None:
    """Time what was ``judged``, at every size in the modes in which it was, and what expands ragged rows.

    Of a mode that was not judged from captured graphs there is no time on the device.
    """
    from nsa_verify.core.registry import load
    from nsa_verify.device.health import DeviceDied

    known = load(ask.plan.references)
    rows = {name: modes[Mode.DRAFT_EXTEND] for name, modes in judged.items() if Mode.DRAFT_EXTEND in modes}
    chosen = [known[name] for name in judged if name not in ask.added]
    if any(size.schedule for size in ask.sizes):
        told.unscheduled = [it.name for it in chosen if not it.optional_outputs >= OPTIONAL_OUTPUTS]
    if device == "cuda":
        told.unjudged += [
            Unjudged(name, mode, GRAPH, told.judged[name][mode].get(GRAPH, 0))
            for name, modes in judged.items()
            for mode, executors in modes.items()
            if mode in known[name].capturable and GRAPH not in executors
        ]
    bench = _Bench(told, device, ask.repetitions, say)
    try:
        if device == "cuda" and not bench.finds_floor():
            return
        for size in ask.sizes:
            those = [it for it in chosen if not size.schedule or it.name not in told.unscheduled]
            for mode in ask.plan.modes:
                here = {it: judged[it.name][mode] for it in those if mode in judged[it.name]}
                if here:
                    bench.refreshes(size, mode, here, ask.plan.seed)
        for batch_size in ask.expansions:
            bench.expansions(batch_size, rows)
    except DeviceDied as death:
        told.skipped.append(f"nothing more is measured: the device died ({death})")
    finally:
        told.compilations = bench.compilations()


class _Where(NamedTuple):
    mode: str
    size: str
    steps: int = 1
    schedule: bool = False


class _Bench:
    """Times what is right, size by size, into ``told``. Its methods raise ``DeviceDied``."""

    def __init__(self, told: Timings, device: str, repetitions: int, say: Say) -> None:
        self._told, self._device, self._repetitions, self._say = told, device, repetitions, say
        self._floor: Any = None
        self._wrong: set[str] = set()
        """Implementations that were wrong at a size."""
        self._sizes: Counter[tuple[str, str, int, bool]] = Counter()
        """Measured, by implementation, mode, steps, schedule."""
        self._compiled: dict[tuple[str, str, int, bool], Any] = {}
        """What Triton launched at those; held, so that no two have the same id."""

    def finds_floor(self) -> bool:
        """Measure what times on a GPU are compared with; False, and why in ``told``, where memory lacks for that."""
        from nsa_verify.device import timing

        told = self._told
        try:
            floor = timing.floor(self._repetitions)
        except Exception as error:
            if not timing.is_no_memory(error):
                raise
            told.skipped.append(f"nothing is measured: {timing.sentence(error)}")
            return False
        self._floor, told.empty_node_us, told.bytes_per_us = floor, floor.empty_node_us, floor.bytes_per_us
        timing.forget(self._device)
        return True

    def refreshes(self, size: Any, mode: Mode, executors: Mapping[Implementation, Collection[str]], seed: int) -> None:
        """Whole refreshes of one size in one mode, of implementations that ``executors`` judged in it."""
        from nsa_verify.device import timing
        from nsa_verify.device.answers import Answers

        try:
            given = timing.work(size, mode, self._device, seed)
            answers = Answers(given.inputs, given.steps, given.setup, given.slots)
        except Exception as error:
            if not timing.is_no_memory(error):
                raise
            self._told.skipped.append(f"{mode}, {size} is not measured: {timing.sentence(error)}")
            timing.forget(self._device)
            return
        moved = {it.name: given.extent_bytes(it.extent, it.block) for it in executors}
        candidates = {
            it.name: timing.Candidate(it.name, timing.refresh_of(it, given), mode in it.capturable and GRAPH in judges)
            for it, judges in executors.items()
        }
        where = _Where(str(mode), str(size), size.num_steps, size.schedule)
        self._time(candidates, answers, where, given.live_bytes, moved)
        del given, answers, candidates
        timing.forget(self._device)

    def expansions(self, batch_size: int, executors: Mapping[str, Collection[str]]) -> None:
        """The ragged expansion alone, of the implementations and ``EXPANSION_ROWS`` that ``executors`` judged."""
        from nsa_verify.device import timing
        from nsa_verify.shell.expansions import expansions

        where = _Where(EXPANSION, f"B {batch_size}")
        try:
            given = expansions(batch_size, self._device)
        except Exception as error:
            if not timing.is_no_memory(error):
                raise
            self._told.skipped.append(f"{where.mode}, {where.size} is not measured: {timing.sentence(error)}")
            return
        candidates = {
            name: it._replace(capture=it.capture and GRAPH in executors[name])
            for name, it in given.rows.items()
            if name in executors
        }
        moved = {it.name: given.live_bytes for it in candidates.values()}
        self._time(candidates, given, where, given.live_bytes, moved)

    def compilations(self) -> list[Compilations]:
        """Of all that is timed and launches Triton kernels."""
        kept = {(it.implementation, it.mode) for it in self._told.timings}
        return [
            Compilations(
                implementation=key[0],
                mode=key[1],
                steps=key[2],
                schedule=key[3],
                sizes=self._sizes[key],
                kernels=len({id(kernel) for kernel, _ in forms.values()}),
                compilations=len(forms),
            )
            for key, forms in self._compiled.items()
            if forms and key[:2] in kept
        ]

    def _time(
        self,
        candidates: Mapping[str, Any],
        answers: Any,
        where: _Where,
        live_bytes: int,
        moved: Mapping[str, int],
    ) -> None:
        """Time those of ``candidates``, by implementation, that ``answers.check`` finds right.

        What others leave in the inputs, ``answers.restore`` mends before the next one.
        """
        from nsa_verify.device import timing

        subjects = []
        for name, it in candidates.items():
            if name not in self._wrong:
                subject = self._prepared(it, name, answers.check, where)
                if subject is not None:
                    subjects.append(subject)
                else:
                    answers.restore()
        try:
            timing.measure(subjects, self._device, self._repetitions)
        finally:
            for it in subjects:
                if it.is_starved:
                    self._skip(it.name, where, it.error)
                elif it.error:
                    self._told.rejected.append(Rejected(it.name, f"raised {it.error}", where.mode, where.size))
        timed = [it for it in subjects if not it.error]
        for it in timed:
            key = (it.name, where.mode, where.steps, where.schedule)
            self._sizes[key] += 1
            self._compiled.setdefault(key, {}).update(it.compiled)
        self._told.timings += _timings(timed, where, live_bytes, moved, self._floor)
        self._say(f"{where.mode}, {where.size}")

    def _skip(self, name: str, where: _Where, reason: str) -> None:
        self._told.skipped.append(f"{where.mode}, {where.size} is not measured of {name}: {reason}")

    def _prepared(self, it: Any, implementation: str, check: Callable[..., object], where: _Where) -> Any:
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
            told.rejected.append(Rejected(it.name, str(wrong), where.mode, where.size, wrong=True))
            told.timings = list(_without(it.name, where.mode == EXPANSION, told.timings))
        except timing.Merged as merged:
            told.rejected.append(Rejected(it.name, str(merged), where.mode, where.size))
        except Exception as error:  # noqa: BLE001 - an implementation may raise anything
            if timing.is_no_memory(error):
                self._skip(it.name, where, timing.sentence(error))
            else:
                told.rejected.append(Rejected(it.name, f"raised {timing.sentence(error)}", where.mode, where.size))
            refuse_dead(self._device, error)
        else:
            subject.fallbacks = tuple(dict.fromkeys(take_fallbacks()))
            return subject
        return None


def _without(name: str, in_expansions: bool, timings: Sequence[Timing]) -> Iterator[Timing]:
    """Those of others, who are not compared with ``name`` any more, in refreshes or expansions."""
    for it in timings:
        if (it.mode == EXPANSION) != in_expansions:
            yield it
        elif it.implementation != name:
            yield replace(it, host_ratio=None) if name in BASELINES else it


def _timings(
    subjects: Sequence[Any], where: _Where, live_bytes: int, moved: Mapping[str, int], floor: Any
) -> Iterator[Timing]:
    baseline = next((median(it.host_us) for it in subjects if it.name in BASELINES), None)
    for it in subjects:
        host = Spread.of(it.host_us)
        assert host is not None
        yield Timing(
            implementation=it.name,
            mode=where.mode,
            size=where.size,
            host=host,
            node=Spread.of(it.node_us),
            launches=it.launches,
            syncs=it.syncs,
            allocations=it.allocations,
            live_bytes=live_bytes,
            extent_bytes=moved[it.name],
            floor_us=floor.us(live_bytes) if floor is not None else 0.0,
            fallbacks=it.fallbacks,
            host_ratio=baseline / host.median if baseline else None,
        )
