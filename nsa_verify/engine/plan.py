"""A run's plan: everything that its cases and verdicts are a function of."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from random import Random
from typing import Any, Final, NamedTuple

from msgspec import Struct

from nsa_verify.core.case import Case, Mode
from nsa_verify.core.findings import Finding, Signature, Verdict

ROUND_CASES: Final = 10
"""Cases of a round: they share a swarm, and a round is drawn by one worker."""

FIRST_SEASON: Final = 20
"""From this round on the cases of a season share their Setup, and so captured graphs and memory serve many cases.

In the rounds before every case has a Setup of its own: short runs meet as many as they can.
"""

LEG_ROUNDS: Final = ((0, 1), (100, 4), (1000, 16))
"""From which round on how many rounds are a leg: the longer a run, the longer it stays with a Setup."""

EAGER: Final = "eager"
"""The executor that calls implementations directly; the others replay captured graphs."""


class Hint(NamedTuple):
    """The minimal case of a signature under any executor, ``Signature.mode`` and ``place`` as there."""

    signature: Signature
    case: Case


class Pattern(NamedTuple):
    """Findings that have something in common; of the first four whatever is empty matches any."""

    implementation: str
    code: str = ""
    mode: str = ""
    place: str = ""
    beside: frozenset[str] = frozenset()
    """``Finding.symptom`` of what else comes with them."""

    def matches(self, found: Any) -> bool:
        """Whether it is about ``found``, a finding or what stands for some."""
        wanted = (self.implementation, self.code, self.mode, self.place)
        there = (found.implementation, found.code, found.mode, found.place)
        return all(not ours or ours == theirs for ours, theirs in zip(wanted, there, strict=True))


class Plan(Struct, frozen=True, kw_only=True):
    """The options of a run.

    ``max_time_s`` of 0 means no limit; ``only`` of () means every implementation, ``executors`` of () all that the
    device has.
    """

    seed: int = 0
    max_examples: int = 200
    max_time_s: float = 0.0
    modes: tuple[Mode, ...] = tuple(Mode)
    executors: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    """Executors that nothing is searched under, but that may be asked about what is found."""
    device: str = "auto"
    references: tuple[str, ...] = ()
    """What ``--impl`` named."""
    only: tuple[str, ...] = ()
    profile: str = "dev"
    workers: int = 1
    engine: str = "local"
    """Where the searchers are: ``local``, processes of this machine, or ``ray``, actors of a Ray cluster."""
    address: str = ""
    """Of the Ray cluster: ``HOST:PORT``, ``auto`` for what runs on this machine, ``local`` for one of this run's own;
    empty: what ``RAY_ADDRESS`` says, else ``auto``."""
    gpu_share: float = 0.0
    """How much of a GPU each searcher of a Ray cluster has; 0: none."""
    shrink: bool = True
    short_cases: bool = False
    """Whether cases are small and of one to three replays on any device, as rates are measured with."""
    isolate: bool = False
    """Whether implementations run in worker processes; else they run where the cases are drawn."""
    folder: str = ""
    """Where the cases in flight are kept; empty: a folder that is gone with the run."""
    gpus: tuple[str, ...] = ()
    """What each worker in turn is given as ``CUDA_VISIBLE_DEVICES``; empty: what the engine has."""
    deadline_s: float = 0.0
    """How long an implementation may be silent before it counts as hung; 0: as long as suits it."""
    memory_bytes: int = 0
    """How much memory an implementation may take; 0: a share of what is free."""
    until: tuple[tuple[str, str], ...] = ()
    """Pairs of implementation and executor: no more is drawn once each of them has disagreed, and of each only what was
    seen first is shrunk."""
    without: tuple[str, ...] = ()
    """Features that no case has (``nsa_verify.strategies.Feature``)."""
    coverage: bool = False
    """Whether it is counted which labels the cases have (``nsa_verify.core.labels``)."""
    observe: bool = False
    """Whether it is told of every case who disagreed on it (``nsa_verify.engine.events.Observed``)."""
    pictures: bool = False
    """Whether the buffers of minimal cases are brought along (``nsa_verify.core.findings.Picture``)."""
    detail: bool = False
    """Whether findings of one code are told apart by their buffer and region, each shrunk for itself."""
    known: tuple[Signature, ...] = ()
    """What earlier runs have shrunk and kept: seen again, it is told, and neither shrunk nor kept."""
    again: tuple[Signature, ...] = ()
    """What earlier runs have kept as it was drawn: seen again, it is shrunk and kept, and is not new."""
    accepted: tuple[Pattern, ...] = ()
    """What is no news: a verdict is about the gravest finding that is not of these, if it has one."""
    hints: tuple[Hint, ...] = ()
    """Minimal cases that earlier runs have kept, to be tried first when what may be the same bug is shrunk."""
    until_new: bool = False
    """Whether no more is drawn once something was seen that is neither ``known`` nor to be shrunk ``again``."""
    blind: tuple[str, ...] = ()
    """Checks that are not made (``nsa_verify.engine.blinding.CHECKS``)."""

    def named(self, verdict: Verdict) -> Finding | None:
        """The finding that ``verdict`` is about: the gravest that is not ``accepted``; if all are, the gravest."""
        return next(iter(self.news(verdict)), None)

    def accepts(self, finding: Finding) -> bool:
        """Whether ``finding`` is one of ``accepted``."""
        return any(it.matches(finding) for it in self.accepted)

    def news(self, verdict: Verdict) -> tuple[Finding, ...]:
        """The findings of ``verdict``, gravest first, that are not ``accepted`` and do not come with such; if none is
        left, all of them."""
        here = [pattern for pattern in self.accepted if any(map(pattern.matches, verdict.findings))]
        found = verdict.findings
        for pattern in here:
            found = tuple(it for it in found if not pattern.matches(it) and it.symptom not in pattern.beside)
        return found or verdict.findings

    @property
    def rounds(self) -> int:
        """How many rounds make ``max_examples`` cases."""
        return -(-self.max_examples // ROUND_CASES)

    def round_cases(self, index: int) -> int:
        """How many cases round ``index`` draws."""
        return min(ROUND_CASES, self.max_examples - index * ROUND_CASES)

    def round_seed(self, index: int) -> int:
        """The seed of round ``index``: rounds are independent of each other and of who draws them."""
        return Random(f"{self.seed}/{index}").getrandbits(62)

    def season(self, index: int) -> int | None:
        """The season of round ``index``, named by its first round; None where every case has a Setup of its own."""
        return _leg_start(index) if index >= FIRST_SEASON else None

    def season_seed(self, index: int) -> int | None:
        """The seed of the Setup that the season of round ``index`` shares, if it does."""
        season = self.season(index)
        return None if season is None else Random(f"season {self.seed}/{season}").getrandbits(62)

    def legs(self) -> Iterator[range]:
        """The rounds in order, those of one season together, so that one worker can take them one after the other."""
        start = 0
        while start < self.rounds:
            stop = start + 1
            while _leg_start(stop) == start:
                stop += 1
            yield range(start, min(stop, self.rounds))
            start = stop


def _leg_start(index: int) -> int:
    """The first round of the leg of round ``index``: a function of the index alone."""
    first, rounds = max(it for it in LEG_ROUNDS if it[0] <= index)
    return index - (index - first) % rounds


def digest(parts: list[str]) -> str:
    """A short name for a list of strings."""
    return sha256("\n".join(parts).encode()).hexdigest()[:16]
