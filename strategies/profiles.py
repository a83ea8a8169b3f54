"""Hypothesis settings by name. Each sets every field, so nothing that Hypothesis guesses from the environment counts.

(Hypothesis loads a derandomised profile of its own when ``CI`` is set, and fields left open are taken from there.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from hypothesis import HealthCheck, Phase, Verbosity, settings

PROFILES: Final = {"dev": 200, "ci": 120, "nightly": 5000}
"""Name and default number of examples of each profile."""

FIELDS: Final[dict[str, Any]] = {
    "derandomize": False,
    "database": None,
    "verbosity": Verbosity.quiet,
    "phases": (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink),
    "stateful_step_count": 50,
    "report_multiple_bugs": True,
    "suppress_health_check": tuple(HealthCheck),
    "deadline": None,
    "print_blob": False,
    "backend": "hypothesis",
}
"""Every settings field but ``max_examples``. The explain phase is left out: it reruns a shrunk case many times over."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A name, the Hypothesis settings behind it, and how many examples it draws unless told otherwise."""

    name: str
    settings: settings
    max_examples: int


def profile(name: str) -> Profile:
    """The profile called ``name``. Raises ``ValueError`` if there is none."""
    if name not in PROFILES:
        raise ValueError(f"profile = {name!r}: must be one of {', '.join(PROFILES)}")
    return Profile(name, settings(max_examples=PROFILES[name], **FIELDS), PROFILES[name])
