"""Do the profiles decide everything themselves?"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.database import InMemoryExampleDatabase

from nsa_verify.strategies import PROFILES, profile
from nsa_verify.strategies.profiles import FIELDS

HYPOTHESIS_FIELDS = set(inspect.signature(settings.__init__).parameters) - {"self", "parent"}


@contextmanager
def hostile_defaults() -> Iterator[None]:
    """Hypothesis defaults that differ from ours in every field that can."""
    before = settings.get_current_profile_name()
    settings.register_profile(
        "hostile",
        max_examples=3,
        derandomize=False,
        database=InMemoryExampleDatabase(),
        verbosity=Verbosity.debug,
        phases=(Phase.explicit,),
        stateful_step_count=3,
        report_multiple_bugs=False,
        suppress_health_check=(HealthCheck.too_slow,),
        deadline=timedelta(milliseconds=1),
        print_blob=True,
        backend="hypothesis",
    )
    settings.load_profile("hostile")
    try:
        yield
    finally:
        settings.load_profile(before)


def test_every_field_of_the_installed_hypothesis_is_set() -> None:
    assert FIELDS.keys() | {"max_examples"} == HYPOTHESIS_FIELDS


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_the_same_under_any_defaults(name: str) -> None:
    plain = profile(name).settings
    with hostile_defaults():
        hostile = profile(name).settings
    assert {field: getattr(hostile, field) for field in HYPOTHESIS_FIELDS} == {
        field: getattr(plain, field) for field in HYPOTHESIS_FIELDS
    }
    assert {field: getattr(plain, field) for field in FIELDS} == FIELDS


def test_ci_in_the_environment_changes_nothing() -> None:
    code = "from nsa_verify.strategies import profile; print(profile('ci'))"
    without = {name: value for name, value in os.environ.items() if name != "CI"}
    printed = {
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        for env in (without, {**without, "CI": "1"})
    }
    assert len(printed) == 1
    assert "derandomize=False" in printed.pop()


@pytest.mark.parametrize(("name", "examples"), [("dev", 200), ("ci", 120), ("nightly", 5000)])
def test_default_numbers_of_examples(name: str, examples: int) -> None:
    found = profile(name)
    assert (found.name, found.max_examples, found.settings.max_examples) == (name, examples, examples)


def test_an_unknown_profile_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="profile = 'fast': must be one of dev, ci, nightly"):
        profile("fast")
