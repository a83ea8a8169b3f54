"""Planted bugs, each a small change to a correct implementation: the proof that the checks see what they are for."""

from __future__ import annotations

from typing import Final

from nsa_verify.mutants.capture import CAPTURE
from nsa_verify.mutants.incremental import INCREMENTAL
from nsa_verify.mutants.mutant import BOTH, EAGER, GRAPH, Mutant, MutantError, Size
from nsa_verify.mutants.onepass import ONEPASS
from nsa_verify.mutants.sequences import SEQUENCES
from nsa_verify.mutants.triton import TRITON
from nsa_verify.mutants.values import VALUES


def _by_name(*mutants: Mutant) -> dict[str, Mutant]:
    found: dict[str, Mutant] = {}
    for it in mutants:
        if found.setdefault(it.name, it) is not it:
            raise MutantError(f"two mutants are called {it.name}: give one of them another name")
    return found


CATALOGUE: Final = _by_name(*VALUES, *SEQUENCES, *INCREMENTAL, *CAPTURE, *TRITON, *ONEPASS)

__all__ = ["BOTH", "CATALOGUE", "EAGER", "GRAPH", "Mutant", "MutantError", "Size"]
