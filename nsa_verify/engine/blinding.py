"""Checks switched off one at a time: one whose absence lets no planted bug live is idle, or lacks the bug."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from msgspec.structs import replace

from nsa_verify.core.findings import Code, Finding, Outcome, Verdict

_CONTENT: Final = (Code.WRONG_VALUE, Code.STALE, Code.POISON, Code.INVARIANT)


def _coded(*codes: Code) -> Callable[[Finding], bool]:
    return lambda finding: finding.code in codes


CHECKS: Final[Mapping[str, Callable[[Finding], bool]]] = {
    "live cells": lambda finding: finding.code in _CONTENT and finding.region == "live",
    "slack cells": lambda finding: finding.code in _CONTENT and finding.region == "slack",
    "frame cells": _coded(Code.FRAME_WRITTEN),
    "guard zones": _coded(Code.GUARD_WRITTEN),
    "inputs": _coded(Code.INPUT_MUTATED),
    "second call": _coded(Code.NOT_IDEMPOTENT),
    "capture": _coded(Code.ILLEGAL_IN_CAPTURE),
    "moved memory": _coded(Code.MOVED),
    "streams": _coded(Code.OTHER_STREAM),
    "synchronisation": _coded(Code.NEEDS_SYNC),
    "exceptions": _coded(Code.EXCEPTION),
    "compilations": _coded(Code.RECOMPILES),
    "swallowed errors": _coded(Code.SILENT_FALLBACK),
}
"""What each check alone is answerable for: the findings that are not made without it."""
_NAMES_OF_CONTENT: Final = (Code.FROZEN, Code.NOT_DETERMINISTIC)
"""Findings that say more about what stands behind them, and nothing alone."""


def blinded(verdict: Verdict, without: tuple[str, ...]) -> Verdict:
    """``verdict`` as it would be without the checks named; of the first replay that disagrees, as verdicts are.

    A verdict that the second call brought about is gone without it, whatever that call left.
    """
    if not without or verdict.outcome is not Outcome.DISAGREE:
        return verdict
    unseen = [CHECKS[name] for name in without]
    left = [it for it in verdict.findings if not any(check(it) for check in unseen)]
    if len(left) == len(verdict.findings):
        return verdict
    second = any(it.code is Code.NOT_IDEMPOTENT for it in verdict.findings)
    if (second and "second call" in without) or all(it.code in _NAMES_OF_CONTENT for it in left):
        left = []
    return replace(verdict, findings=tuple(left), outcome=Outcome.DISAGREE if left else Outcome.AGREE)
