"""Sanitizers, and what is said between whoever starts one and the process that runs under it: JSON in files."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Verdict


class Sanitizer(StrEnum):
    """What ``replay --sanitizer`` may be: four tools of compute-sanitizer on CUDA, one check on the CPU."""

    MEMCHECK = "memcheck"
    """Every access of every kernel lies in memory that was allocated."""
    INITCHECK = "initcheck"
    """Nothing is read that nobody wrote."""
    RACECHECK = "racecheck"
    """The threads of a block do not race for shared memory."""
    SYNCCHECK = "synccheck"
    """Every thread that must reach a barrier does."""
    OOB = "oob"
    """On the CPU: every access of every Triton kernel lies in a tensor that it was given."""

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu" if self is Sanitizer.OOB else "cuda"


class Sequence(Struct, frozen=True):
    """A case, and the cases to run before it in the same process."""

    case: Case
    before: tuple[Case, ...] = ()


class Errand(Struct, frozen=True):
    """What a process under a sanitizer is to do: run the sequences, in order, with one implementation."""

    sanitizer: Sanitizer
    references: tuple[str, ...]
    implementation: str
    sequences: tuple[Sequence, ...]


class Told(Struct, frozen=True):
    """One line of its report: sequence number ``number`` begins, or has the verdict.

    On CUDA the verdict lacks what only the tool knows.
    """

    number: int
    verdict: Verdict | None = None


ERRAND: Final = "errand.json"
REPORT: Final = "report.jsonl"
"""The names of the two files, in a folder that the process is given."""
UNABLE: Final = 3
"""Exit code of a process that cannot do what it is asked; the last line that it printed says why."""
