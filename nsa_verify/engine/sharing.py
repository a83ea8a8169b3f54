"""How a campaign shares its time: what finds new things, or is behind, gets more of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Annotated, Final, TypeVar

from msgspec import Meta, Struct

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Signature
from nsa_verify.core.labels import Pair

Name = TypeVar("Name", bound=str)

ALL_EVERY: Final = 3
"""Every so many slices have everything: pairs of modes, and implementations side by side on the same cases."""
FADING: Final = 0.8
"""What a slice found counts that much less after each later slice of the same mode, implementation or executor."""
PAIRS_OF_A_FINDING: Final = 10
"""So many new pairs of a mode and another label count as much as an implementation's first finding there."""


class Choice(Struct, frozen=True):
    """What a slice is over; ``implementations`` of () are all."""

    modes: tuple[Mode, ...]
    implementations: tuple[str, ...]
    executors: tuple[str, ...]


class Share(Struct):
    """What one mode, implementation or executor was given so far, and what came of it."""

    cases: Annotated[int, Meta(ge=0)] = 0
    news: Annotated[float, Meta(ge=0.0)] = 0.0
    """New findings, and of modes new pairs of labels, the older the less."""


class Shares(Struct):
    """The shares of modes, implementations and executors, by name."""

    modes: dict[str, Share] = {}
    implementations: dict[str, Share] = {}
    executors: dict[str, Share] = {}

    def count(self, kind: str, name: str, cases: int, news: float) -> None:
        """Count a slice in."""
        share = getattr(self, kind).setdefault(name, Share())
        share.cases += cases
        share.news = FADING * share.news + news

    def count_in(self, choice: Choice, cases: int, pairs: Collection[Pair], found: Collection[Signature]) -> None:
        """Count a slice over ``choice`` in, each for what it found itself: new ``pairs`` of labels, and signatures that
        nobody knew."""
        for mode in choice.modes:
            pairs_here = sum(f"mode:{mode}" in pair for pair in pairs)
            accused = {it.implementation for it in found if it.mode == mode}
            self.count("modes", mode, cases, pairs_here / PAIRS_OF_A_FINDING + len(accused))
        for name in choice.executors:
            accused = {it.implementation for it in found if it.executor == name}
            self.count("executors", name, cases, float(len(accused)))
        accused = {it.implementation for it in found}
        for name in choice.implementations:
            self.count("implementations", name, cases, float(name in accused))


def choose(
    shares: Shares,
    number: int,
    seed: int,
    modes: Sequence[Mode],
    names: Sequence[str],
    executors: Sequence[str],
    has: Mapping[str, Collection[Mode]],
) -> Choice:
    """What slice ``number`` is over, of ``modes``, implementations ``names`` and ``executors``, which are not empty.

    The first slice and every third has everything. The others have half of the modes and of the implementations, those
    with few cases and with news preferred, and one slice in four a single executor. A mode that none of the
    implementations ``has`` is left out. A function of its arguments.
    """
    chance = Random(f"{seed}/share/{number}")  # a string is hashed alike in every process and version
    if number % ALL_EVERY == 0 or not names:
        return Choice(_had(modes, names, has), (), tuple(executors))
    few = _some(chance, shares.executors, executors, 1) if chance.random() < 0.25 else tuple(executors)
    implementations = _some(chance, shares.implementations, names, -(-len(names) // 2))
    able = _had(modes, implementations, has)
    return Choice(_some(chance, shares.modes, able, min(len(able), -(-len(modes) // 2))), implementations, few)


def _had(modes: Sequence[Mode], names: Sequence[str], has: Mapping[str, Collection[Mode]]) -> tuple[Mode, ...]:
    """Those of ``modes`` that one of ``names`` has; all, if that is not known or none is."""
    able = tuple(mode for mode in modes if any(mode in has.get(name, modes) for name in names))
    return able or tuple(modes)


def _some(chance: Random, shares: dict[str, Share], names: Sequence[Name], count: int) -> tuple[Name, ...]:
    """``count`` of ``names`` in their order, drawn by weight without repetition."""
    average = sum(shares.get(name, Share()).cases for name in names) / len(names)
    # The usual way to draw by weight without repetition: the largest of u ** (1 / weight).
    keys = {name: chance.random() ** (1.0 / _weight(shares.get(name, Share()), average)) for name in names}
    chosen = sorted(names, key=lambda name: -keys[name])[:count]
    return tuple(name for name in names if name in chosen)


def _weight(share: Share, average: float) -> float:
    behind = (average + 1.0) / (share.cases + 1.0)
    return behind * (1.0 + share.news)
