"""Which mutants live when one check, or one feature of the cases, is switched off: no arguments are needed.

Prints a page in Markdown, and progress on standard error; ``docs/what-each-check-is-for.md`` has its tables. A
check or a feature whose absence lets no mutant live, and slows none down, is idle: it can go, or it lacks a mutant.
``--seed N``, ``--max-cases N`` and ``-w N`` are those of ``nsa-verify mutants``; ``--only TEXT`` asks for those checks
and features whose name holds it, ``--mutant NAME`` (repeatable) for that mutant, ``--quick`` leaves out the mutants of
Triton kernels, which take long without a GPU, ``--kind check`` or ``--kind feature`` asks for one table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from msgspec.structs import replace

from nsa_verify.core.invariants import INVARIANTS
from nsa_verify.engine.blinding import CHECKS
from nsa_verify.engine.mutation import Hunt, Hunted, hunt_all
from nsa_verify.mutants import CATALOGUE, Mutant
from nsa_verify.strategies import Feature

SLOWER = 3.0
"""A mutant that needs so many times more cases is named as well."""
PATIENCE = 20
"""Without something, a mutant may take so many times the cases that it took with everything, and at least ``LEAST``."""
LEAST = 60
INTERPRETED = ("triton_fused", "triton_inplace", "precomputed_batched_copy", "onepass")


class Told(NamedTuple):
    """What the absence of something did: the mutants that lived, with the executor, and those that lived longer."""

    name: str
    lived: list[str]
    slower: list[str]


def cases_by_executor(found: Hunted) -> dict[tuple[str, str], int]:
    """The number of the case that killed the mutant, for each executor; 0 if none did."""
    return {(found.name, kill.executor): kill.cases for kill in found.kills}


def hunted(mutants: list[Mutant], given: Hunt, workers: int) -> dict[tuple[str, str], int]:
    """``cases_by_executor`` of all ``mutants`` together."""
    told: dict[tuple[str, str], int] = {}
    for found in hunt_all(mutants, given, workers):
        told |= cases_by_executor(found)
    return told


def without(name: str, given: Hunt, usual: dict[tuple[str, str], int], mutants: list[Mutant], workers: int) -> Told:
    """Hunt again without something, for as long as suits each mutant; those that live must do so for ``max_cases``."""
    groups: dict[int, list[Mutant]] = {}
    for mutant in mutants:
        slowest = max((cases for (it, _), cases in usual.items() if it == mutant.name), default=0)
        bound = next(it for it in (LEAST, 150, 400, given.max_cases) if it >= min(PATIENCE * slowest, given.max_cases))
        groups.setdefault(min(bound, given.max_cases), []).append(mutant)
    found: dict[tuple[str, str], int] = {}
    for bound, group in groups.items():
        found |= hunted(group, replace(given, max_cases=bound), workers)
    suspects = [it for it in mutants if any(key[0] == it.name and not cases for key, cases in found.items())]
    found |= hunted(suspects, given, workers) if suspects else {}
    lived = [f"{mutant} ({executor})" for (mutant, executor), cases in found.items() if not cases]
    slower = [
        f"{mutant} ({executor}: {usual[mutant, executor]} -> {cases})"
        for (mutant, executor), cases in found.items()
        if cases > SLOWER * usual[mutant, executor] and cases > LEAST // 2
    ]
    return Told(name, sorted(lived), sorted(slower))


def table(title: str, told: list[Told]) -> Iterator[str]:
    """One of the page's tables."""
    yield f"| {title} | without it live | without it live longer |"
    yield "|---|---|---|"
    for it in told:
        yield f"| {it.name} | {', '.join(it.lived) or 'none'} | {', '.join(it.slower) or 'none'} |"
    yield ""


def main() -> None:
    """Hunt with everything, then without each in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-cases", type=int, default=500)
    parser.add_argument("-w", "--workers", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--mutant", action="append", choices=list(CATALOGUE), metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kind", choices=["check", "feature"])
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        given = Hunt(seed=asked.seed, max_cases=asked.max_cases, folder=folder, shrink=False)
        mutants = [it for it in CATALOGUE.values() if it.seen_by and not (asked.quick and it.module in INTERPRETED)]
        mutants = [it for it in mutants if asked.mutant is None or it.name in asked.mutant]
        usual = hunted(mutants, given, asked.workers)
        if alive := sorted({name for (name, _), cases in usual.items() if not cases}):
            say(f"left out, since they live with everything: {', '.join(alive)}")
        mutants = [it for it in mutants if it.name not in alive and any(name == it.name for name, _ in usual)]
        say(f"{len(mutants)} mutants with everything: {time.monotonic() - began:.0f} s")
        told: dict[str, list[Told]] = {"check": [], "feature": []}
        for kind, names in (("check", list(CHECKS)), ("feature", [str(it) for it in Feature])):
            for name in names:
                if asked.only in name and asked.kind in (None, kind):
                    less = replace(given, blind=(name,)) if kind == "check" else replace(given, without=(name,))
                    told[kind].append(without(name, less, usual, mutants, asked.workers))
                    say(f"{kind} {name}: {told[kind][-1].lived}, {time.monotonic() - began:.0f} s")
    about = (
        f"{len(mutants)} mutants{' of torch implementations' * asked.quick}, seed {asked.seed}, {asked.max_cases} cases"
    )
    for line in page(about, told):
        sys.stdout.write(line + "\n")


def page(hunted_for: str, told: dict[str, list[Told]]) -> Iterator[str]:
    """The page's lines."""
    yield "# What each check is for"
    yield ""
    yield f"{hunted_for} at most; printed by `python -P benchmarks/idle_checks.py {' '.join(sys.argv[1:])}`."
    yield "One check, or one feature of the cases, is switched off at a time, and the mutants are hunted again: those"
    yield "that live are what it alone is good for. The last column names those that need more than"
    yield f"{SLOWER:g} times as many cases (with -> without)."
    yield ""
    for kind, rows in told.items():
        yield from table(kind, rows) if rows else ()
    yield "A second call with the same inputs is a replay that repeats a batch; sequences do that too, and rarely. So"
    yield "without it nothing lives for good, and what adds to what it finds lives long."
    yield ""
    yield "The invariants hold the oracle to account, and name findings (NV104); what they see of an implementation,"
    yield "the live cells see too. So their mutants are faulty oracles (`tests/core/test_invariants.py`), and each of"
    yield f"these catches one that no other does: {'; '.join(INVARIANTS)}."


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
