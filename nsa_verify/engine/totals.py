"""What a campaign is asked, and what it gave so far."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Finding
from nsa_verify.engine.events import CaseReplayed, Matrix, Reliability, Tally
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.triage import Baseline, Bug


class Ask(Struct, frozen=True, kw_only=True):
    """A campaign's options. ``plan`` says what all its searches have in common, ``slice_s`` of 0 is chosen here."""

    kind: str
    plan: Plan
    root: Path
    budget_s: float
    version: str
    command: str
    environment: dict[str, str] = {}
    baseline: Baseline = Baseline()
    slice_s: float = 0.0
    database: str = ""
    """What other campaigns share their cases through, as ``exchange.opened`` takes it."""


class Totals(Struct):
    """What the campaign gave so far."""

    cases: int = 0
    seconds: float = 0.0
    replaced: int = 0
    matrix: Matrix = msgspec.field(default_factory=Matrix)
    tally: Tally = msgspec.field(default_factory=Tally)
    rates: list[tuple[float, int]] = []
    new: set[Bug] = set()
    """Groups that this campaign found first."""
    findings: dict[Bug, tuple[Finding, Reliability]] = {}
    """What its own searches say of groups, in more detail than the corpus has."""
    executors: dict[Bug, set[str]] = {}
    subjects: dict[str, tuple[Mode, ...]] = {}
    """The implementations, and the modes that each declares; empty until the first search has started."""
    failing: list[CaseReplayed] = []
    """Regression cases that disagree again."""
    unclaimed: dict[Bug, Path] = {}
    """What crashing cases showed of implementations or places that have no group."""
    fixed: set[Path] = set()
    """Crashing cases that agree now."""
    failed: set[Path] = set()
    """Crashing cases that fail as they did."""
    tried: set[str] = set()
    """Groups whose case could not be shrunk; not tried again by this campaign."""
    instead: dict[Bug, str] = {}
    """Of groups whose case does not show them any more, what it shows."""
    unknown: int = 0
    problems: list[str] = []
