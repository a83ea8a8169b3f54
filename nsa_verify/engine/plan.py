"""A run's plan: everything that its cases and verdicts are a function of."""

from __future__ import annotations

from hashlib import sha256
from random import Random
from typing import Final

from msgspec import Struct

from nsa_verify.core.case import Mode

ROUND_CASES: Final = 10
"""Cases of a round: they share a swarm, and a round is drawn by one worker.

Ten, because from its eleventh example on Hypothesis varies earlier examples more than it draws new ones.
"""

EAGER: Final = "eager"
"""The executor that calls implementations directly; the others replay captured graphs."""


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
    device: str = "auto"
    references: tuple[str, ...] = ()
    """What ``--impl`` named."""
    only: tuple[str, ...] = ()
    profile: str = "dev"
    workers: int = 1
    shrink: bool = True

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


def digest(parts: list[str]) -> str:
    """A short name for a list of strings."""
    return sha256("\n".join(parts).encode()).hexdigest()[:16]
