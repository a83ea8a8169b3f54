"""What happens in a run, as values. Reporters listen to them and can change nothing."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import msgspec
from msgspec import Struct

from nsa_verify.core.case import Case, Mode
from nsa_verify.core.findings import Code, Finding, Outcome, Picture, Signature, Verdict
from nsa_verify.core.labels import Coverage


class StopReason(StrEnum):
    """Why a run ended; the value is the sentence shown."""

    EXAMPLES = "all cases were drawn"
    SEEN = "all that was looked for was seen"
    TIME = "the time was up"
    INTERRUPTED = "interrupted"
    NEW = "something new was found"


class Subject(Struct, frozen=True):
    """An implementation as the run shows it: its name, where it comes from, its declared extent and modes."""

    name: str
    source: str
    extent: str
    modes: tuple[Mode, ...]


class Cell(Struct):
    """Counts of one (implementation, executor, mode): cases it ran in, and how they ended.

    ``not_capturable`` are those of ``not_applicable`` that the implementation runs, but not under this executor.
    """

    cases: int = 0
    disagree: int = 0
    unknown: int = 0
    not_applicable: int = 0
    not_capturable: int = 0
    reasons: dict[str, int] = {}
    """Why cases were not applicable, or could not be judged, and how often."""

    def add(self, other: Cell) -> None:
        """Count ``other`` in."""
        self.cases += other.cases
        self.disagree += other.disagree
        self.unknown += other.unknown
        self.not_applicable += other.not_applicable
        self.not_capturable += other.not_capturable
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count


CellKey = tuple[str, str, Mode]
"""Implementation, executor, mode."""


class Matrix(Struct):
    """Implementation x executor x mode, filled case by case."""

    cells: dict[CellKey, Cell] = {}

    def cell(self, implementation: str, executor: str, mode: Mode) -> Cell:
        """The cell, created when first asked for."""
        return self.cells.setdefault((implementation, executor, mode), Cell())

    def add(self, other: Matrix) -> None:
        """Count ``other`` in."""
        for key, cell in other.cells.items():
            self.cells.setdefault(key, Cell()).add(cell)

    def total(self, outcome: Outcome) -> int:
        """How often ``outcome`` (disagree or unknown) occurred, over all cells."""
        counts = {Outcome.DISAGREE: "disagree", Outcome.UNKNOWN: "unknown"}
        return sum(getattr(cell, counts[outcome]) for cell in self.cells.values())


class Tally(Struct):
    """What implementations did besides filling buffers, by implementation.

    ``fallbacks`` counts the reasons reported with ``nsa_verify.fallback`` by eager calls; a reason that was reported
    only while a graph was captured has count 0, since how often that happens depends on which graphs are kept.
    ``compile_keys`` name what Triton compiles, or would compile, for the launches of eager calls.
    """

    fallbacks: dict[str, dict[str, int]] = {}
    compile_keys: dict[str, set[str]] = {}

    def count(self, verdict: Verdict, eager: bool) -> None:
        """Count a verdict in; ``eager`` says whether it is about eager calls."""
        reasons = dict.fromkeys(verdict.fallbacks, 0)
        for reason in verdict.fallbacks if eager else ():
            reasons[reason] += 1
        keys = set(verdict.compile_keys)
        self.add(
            Tally({verdict.implementation: reasons} if reasons else {}, {verdict.implementation: keys} if keys else {})
        )

    def add(self, other: Tally) -> None:
        """Count ``other`` in; the order in which tallies are added makes no difference."""
        for name, reasons in other.fallbacks.items():
            known = self.fallbacks.setdefault(name, {})
            for reason, count in reasons.items():
                known[reason] = known.get(reason, 0) + count
        for name, keys in other.compile_keys.items():
            self.compile_keys.setdefault(name, set()).update(keys)

    def in_order(self) -> Tally:
        """The same in the order of names and reasons, whatever the order in which it was counted."""
        return Tally(
            {name: dict(sorted(reasons.items())) for name, reasons in sorted(self.fallbacks.items())},
            dict(sorted(self.compile_keys.items())),
        )


class RunStarted(Struct, frozen=True):
    """The run's options, the device line and the subjects; everything the run is a function of."""

    seed: int
    options: dict[str, str]
    device: str
    version: str
    subjects: tuple[Subject, ...]
    executors: tuple[str, ...]
    planned_cases: int
    workers: int


class WorkersReady(Struct, frozen=True):
    """The workers are up; ``seconds`` is what starting them took."""

    seconds: float


class Observed(Struct, frozen=True):
    """One case that was judged: who disagreed on it, why verdicts are unknown, and how many pairs ran it."""

    case: Case
    disagreed: tuple[Signature, ...] = ()
    unknown: tuple[str, ...] = ()
    ran: int = 0


class RoundFinished(Struct, frozen=True):
    """A round of cases was judged. ``cases_done`` counts all rounds so far; ``digest`` identifies its cases, ``spent``
    says what took how many seconds. ``observed`` has every case of it, if that was asked for.

    ``pairs`` counts the pairs of labels that the search has met so far, if they are counted, ``replaced`` the workers
    that died so far.
    """

    round: int
    cases: int
    cases_done: int
    digest: str
    spent: dict[str, float] = {}
    observed: tuple[Observed, ...] = ()
    pairs: int = 0
    replaced: int = 0


class DisagreementSeen(Struct, frozen=True):
    """The first case of a signature; it is shrunk when all cases were drawn. ``number`` counts the run's cases from 1;
    0: it was not drawn in this run."""

    signature: Signature
    finding: Finding
    number: int = 0


class Shrinking(Struct, frozen=True):
    """A shrink began."""

    signature: Signature


class Reliability(Struct, frozen=True):
    """How often the minimal case disagreed when it was run ``runs`` times more."""

    disagreed: int
    runs: int


class Disagreement(Struct, frozen=True):
    """A signature's minimal case and finding; ``path`` is where it was saved, ``problem`` why it could not be.

    ``shrunk`` is False for a case that was kept as it was drawn.
    """

    signature: Signature
    case: Case
    finding: Finding
    reliability: Reliability
    shrunk: bool
    probes: int
    path: Path | None = None
    problem: str = ""
    note: str = ""
    before: tuple[Case, ...] = ()
    """Cases to run first, in the same process, for a disagreement that does not show alone."""
    symptoms: tuple[str, ...] = ()
    """Everything that the minimal case shows, ``Finding.symptom`` of each; of a case as it was drawn nothing."""
    same_as: str = ""
    """The group of a campaign that it turned out to be, and which was there before; ``path`` is that one's then."""
    json: str = ""
    """The corpus entry itself where it could not be saved, so that nothing is lost."""
    pictures: tuple[Picture, ...] = ()
    """The buffers of the replay that disagrees, if they were asked for and the case was shrunk."""


class Recovered(Struct, frozen=True):
    """What runs that were killed had left was looked after.

    ``saved`` are findings that they had reported, in the corpus now; ``judged`` cases that were in flight are judged
    again first of all; ``waiting`` is how many were not, because ``missing`` implementations are not loaded.
    ``unsaved`` says of findings that they had reported why they are not in the corpus: the run cannot be green.
    """

    saved: tuple[Path, ...]
    judged: int
    waiting: int
    missing: tuple[str, ...]
    problems: tuple[str, ...]
    unsaved: tuple[str, ...] = ()


class Exchanged(Struct, frozen=True):
    """A campaign's corpus and the ``database`` that it shares with others were compared, and gave each other cases.

    ``taken`` are new in the corpus, ``sent`` and ``removed`` count values of the database. ``unreadable`` counts those
    that were not told before and are no cases to this version, ``example`` says what is wrong with one; they stay.
    ``waiting`` counts cases that are still to be sent, ``problem`` says why, ``failures`` how often that was so.
    """

    database: str
    taken: tuple[Path, ...] = ()
    sent: int = 0
    removed: int = 0
    unreadable: int = 0
    example: str = ""
    waiting: int = 0
    failures: int = 0
    problem: str = ""


class CheckFailed(Struct, frozen=True):
    """A verdict was unknown: the checker failed on a case. Red, whatever else was seen."""

    implementation: str
    executor: str
    reason: str
    case: Case


class RunFinished(Struct, frozen=True):
    """The end: the matrix, how many cases in how many seconds of drawing and judging, and why it stopped.

    ``replaced`` counts the workers that died and were replaced; ``coverage`` is empty if it was not asked for.
    """

    matrix: Matrix
    tally: Tally
    cases: int
    seconds: float
    stop: StopReason
    signatures: tuple[Signature, ...]
    digest: str
    replaced: int = 0
    spent: dict[str, float] = {}
    coverage: Coverage = msgspec.field(default_factory=Coverage)


class CampaignStarted(Struct, frozen=True):
    """A campaign of many searches over one corpus begins; ``slices`` were made by earlier ones, which it goes on from.

    ``kind`` is ``change``, ``batch`` or ``prune``, ``budget_s`` how long it may last, ``environment`` what it runs on.
    """

    version: str
    command: str
    kind: str
    seed: int
    budget_s: float
    workers: int
    corpus: Path
    slices: int
    environment: dict[str, str] = {}


class CaseReplayed(Struct, frozen=True):
    """A saved case was run again before anything was drawn: FIXED, FAILED, ERROR or NOT RUN, and of the last two why.

    ``group`` is that of its finding (``str`` of a ``Bug``), if it has one.
    """

    path: Path
    status: str
    title: str = ""
    problem: str = ""
    group: str = ""


class SliceStarted(Struct, frozen=True):
    """A search of ``seconds`` begins, over these modes, implementations and executors."""

    number: int
    seconds: float
    modes: tuple[Mode, ...]
    implementations: tuple[str, ...]
    executors: tuple[str, ...]


class SliceFinished(Struct, frozen=True):
    """A search ended. All but ``number``, ``slice_cases`` and ``new_pairs`` count from the campaign's start."""

    number: int
    slice_cases: int
    new_pairs: int
    """Pairs of labels that no case had had before, in this campaign or in those that it goes on from."""
    cases: int
    seconds: float
    groups: int
    pairs: int
    possible_pairs: int
    replaced: int


class Group(Struct, frozen=True, kw_only=True):
    """One bug as it is reported: its minimal case in the corpus, and what is known of it."""

    implementation: str
    code: Code
    mode: Mode
    place: str
    path: Path
    case: Case
    finding: Finding
    executors: tuple[str, ...]
    modes: tuple[Mode, ...]
    """In which it was seen, that of the minimal case among them."""
    first_seen: str
    last_seen: str
    seen: int
    """In how many searches it showed."""
    reliability: Reliability
    is_new: bool = True
    """Whether this campaign found it first."""
    is_fixed: bool = False
    """Whether its case agreed when it was replayed, and nothing like it was seen since."""
    accepted: str = ""
    """The reason that a baseline gives for it."""
    instead: str = ""
    """What its case shows now in its place."""


class CampaignFinished(Struct, frozen=True):
    """The end of a campaign: every open group, the matrix of all its searches, and why it stopped.

    ``expired`` and ``unmatched`` are entries of the baseline that accept nothing any more, or nothing that is there.
    """

    stop: StopReason
    cases: int
    seconds: float
    matrix: Matrix
    tally: Tally
    groups: tuple[Group, ...]
    coverage: Coverage
    replaced: int
    exit_code: int = 0
    failing: tuple[CaseReplayed, ...] = ()
    """Regression cases that disagree again."""
    stray: tuple[str, ...] = ()
    """Disagreements that no group stands for, or only one that is accepted in other modes, in words."""
    unknown: int = 0
    """Verdicts that are unknown: the check itself failed."""
    expired: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    rates: tuple[tuple[float, int], ...] = ()
    """Cases so far at some seconds since the start."""


Event = (
    RunStarted
    | WorkersReady
    | Recovered
    | Exchanged
    | RoundFinished
    | DisagreementSeen
    | Shrinking
    | Disagreement
    | CheckFailed
    | RunFinished
    | CampaignStarted
    | CaseReplayed
    | SliceStarted
    | SliceFinished
    | CampaignFinished
)
