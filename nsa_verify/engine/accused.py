"""The finding of a saved case: whether it is that of another, can show here at all, and how often to look for it."""

from __future__ import annotations

from math import ceil, log
from pathlib import Path
from typing import Final

from nsa_verify.engine.corpus import Entry, Provenance, SavedFinding
from nsa_verify.engine.messages import Hello

DOUBT: Final = 0.01
"""How likely it may be that a finding which shows now and then did not show by chance."""
MOST_RUNS: Final = 50


def same_finding(one: SavedFinding, other: SavedFinding) -> bool:
    """Whether two findings may be of one group: what one of them does not say of its place, the other may."""
    if (one.implementation, one.code, one.mode) != (other.implementation, other.code, other.mode):
        return False
    if one.place == other.place or not one.place or not other.place:
        return True
    return one.buffer == other.buffer and None in (one.region, other.region)


def problem_of(path: Path, entry: Entry, said: Hello) -> str:
    """The sentence that says why the finding cannot show here whatever became of it, or ``""`` if it can.

    A finding belongs to an implementation, an executor and a kind of device.
    """
    finding, origin = entry.finding, entry.provenance
    if finding is None:
        return ""
    if finding.implementation not in {it.name for it in said.subjects}:
        given = " ".join(f"--impl {reference}" for reference in origin.impl) or "--impl"
        return f"{path}: was found in {finding.implementation!r}, which is not loaded; give it with {given}"
    if finding.executor not in said.executors:
        here = ", ".join(said.executors)
        return (
            f"{path}: was found under {finding.executor}, and here are {here}; give others with --executor or --device"
        )
    device = _device(origin.device)
    if device not in ("", said.device):
        return f"{path}: was found on {origin.device}, and this is {said.device}; run it with --device {device}"
    return ""


def _device(told: str) -> str:
    """``cpu`` or ``cuda`` from what a provenance says of the device; empty if it does not say."""
    if told in ("", "auto"):
        return ""
    return "cpu" if told.lower().startswith("cpu") else "cuda"


def runs_needed(origin: Provenance) -> int:
    """How many runs must agree before a finding counts as gone: one, unless it did not show in every run before."""
    if origin.failed is None or origin.attempts is None or not 0 <= origin.failed < origin.attempts:
        return 1
    rate = max(origin.failed, 0.5) / origin.attempts
    return min(MOST_RUNS, ceil(log(DOUBT) / log(1 - rate)))
