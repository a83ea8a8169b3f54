"""``--report observability``: a line of JSON per case, in the shape that Hypothesis gives its own observations.

Viewers made for those show what was drawn: which cases there were, of what kinds, and which of them failed. All keys of
Hypothesis's lines are there, null where there is nothing to say.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Final, TextIO

import msgspec

from nsa_verify.core.case import Case
from nsa_verify.core.labels import DIMENSIONS, labels_of
from nsa_verify.core.spent import DRAW, TRANSPORT, WAIT
from nsa_verify.engine.events import (
    CampaignFinished,
    CheckFailed,
    Disagreement,
    Event,
    Observed,
    RoundFinished,
    RunFinished,
)
from nsa_verify.engine.exchange import shown
from nsa_verify.shell.render import case_lines, counted, finding_lines, how_it_was_got, title
from nsa_verify.shell.reports.plain import plain

PROPERTY: Final = "nsa-verify: all implementations agree with the oracle"
VALID, INTERESTING, INVALID = 2, 3, 1
"""Hypothesis's ``Status``."""
NOT_JUDGING: Final = (DRAW, TRANSPORT, WAIT)
_IMPORTED_AT: Final = time.time()


class Observability:
    """A case passes if all that ran it agree; it fails if one disagrees, or if a check itself failed."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._run_start = time.time()

    def handle(self, event: Event) -> None:
        """Write the cases of a round, what was found, and how it ended."""
        match event:
            case RoundFinished():
                timing = _timing(event)
                for it in event.observed:
                    self._write("test_case", _test_case(it, event.round, timing))
            case Disagreement():
                finding = event.finding
                lines = [*case_lines(event.case, finding.replay), *finding_lines(finding), how_it_was_got(event)]
                head = f"{finding.implementation} [{finding.executor}] {title(finding.code)}"
                self._write("alert", {"title": head, "content": "\n".join(lines)})
            case CheckFailed():
                head = f"{event.implementation} [{event.executor}]: unknown"
                self._write("error", {"title": head, "content": event.reason})
            case RunFinished() | CampaignFinished():
                told = f"{counted(event.cases, 'case')} in {event.seconds:.1f} s, {event.stop}"
                self._write("info", {"title": "The search ended", "content": told})
            case _:
                pass
        self._file.flush()

    def close(self, code: int, problem: str) -> None:
        """Say what stopped the run, if it was stopped."""
        if problem:
            self._write("error", {"title": f"Exit code {int(code)}", "content": problem})
        self._file.flush()

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        told = {"type": kind, "run_start": self._run_start, "property": PROPERTY} | fields
        self._file.write(msgspec.json.encode(plain(told)).decode() + "\n")


def _test_case(it: Observed, round_number: int, timing: dict[str, float]) -> dict[str, Any]:
    reasons = [*map(str, it.disagreed), *it.unknown]
    status, data_status = ("failed", INTERESTING) if reasons else ("passed", VALID)
    if not it.ran:
        status, data_status, reasons = "gave_up", INVALID, ["no implementation was applicable"]
    return {
        "status": status,
        "status_reason": "; ".join(reasons),
        "representation": "\n".join(case_lines(it.case)),
        "arguments": {"case": it.case},
        "how_generated": f"drawn in round {round_number}",
        "features": _features(it.case),
        "coverage": None,
        "timing": timing,
        "metadata": {
            "traceback": None,
            "reproduction_decorator": None,
            "notes": [],
            "predicates": {},
            "backend": {},
            "sys.argv": [shown(it) for it in sys.argv],
            "os.getpid()": os.getpid(),
            "imported_at": _IMPORTED_AT,
            "data_status": data_status,
            "phase": "generate",
            "interesting_origin": reasons[0] if status == "failed" else None,
            "status_reason_location": None,
            "choice_nodes": None,
            "choice_spans": None,
        },
    }


def _features(case: Case) -> dict[str, str]:
    """The labels of ``case``, as ``hypothesis.event(dimension, value)`` would give them."""
    labels = labels_of(case)
    told = {}
    for dimension in DIMENSIONS:
        values = [value for value, label in dimension.labels.items() if label in labels]
        if values:
            told[dimension.name] = ", ".join(values)
    return told


def _timing(event: RoundFinished) -> dict[str, float]:
    """The seconds of a case, which are those of its round, shared out evenly."""
    cases = max(1, event.cases)
    spent = [(name.removeprefix("worker: "), seconds) for name, seconds in event.spent.items()]
    judged = sum(seconds for name, seconds in spent if name not in NOT_JUDGING)
    return {"generate:case": event.spent.get(DRAW, 0.0) / cases, "execute:test": judged / cases}
