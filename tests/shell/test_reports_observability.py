"""Observations have the shape of Hypothesis's own, so that what reads those reads these."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.internal import observability
from shell import reading
from shell.campaigns import run_events


def _hypothesis_own() -> list[dict[str, Any]]:
    """What Hypothesis says of a test that fails, as its file would have it."""
    from hypothesis.strategies._internal.utils import to_jsonable

    seen: list[Any] = []

    @settings(max_examples=20, database=None, derandomize=True)
    @given(st.integers())
    def test(number: int) -> None:
        event("sign", "negative" if number < 0 else "other")
        assert number < 50

    with observability.with_observability_callback(seen.append), suppress(AssertionError):
        test()
    return [json.loads(json.dumps(to_jsonable(it, avoid_realization=False))) for it in seen]


def _kind(value: object) -> str:
    return "number" if isinstance(value, int | float) else type(value).__name__


def test_test_cases_have_the_same_keys_and_kinds_of_values(folder: Path) -> None:
    theirs = [it for it in _hypothesis_own() if it["type"] == "test_case"]
    ours = [it for it in reading.lines(reading.written(run_events(), "observability=x")) if it["type"] == "test_case"]
    assert theirs
    assert ours
    known = {key: {_kind(it[key]) for it in theirs} for key in theirs[0]}
    metadata = {key: {_kind(it["metadata"][key]) for it in theirs} for key in theirs[0]["metadata"]}
    for it in ours:
        assert set(it) == set(known)
        assert set(it["metadata"]) == set(metadata)
        for key in set(known) - {"coverage", "features"}:
            assert _kind(it[key]) in known[key], key
        for key, kinds in metadata.items():
            assert _kind(it["metadata"][key]) in kinds | {"NoneType", "str"}, key
    assert {it["status"] for it in ours} <= {"passed", "failed", "gave_up"}
    assert {_kind(it["features"]) for it in ours} == {"dict"}
    drawn = [it for it in theirs if it["metadata"]["phase"] == "generate"]
    statuses = {it["status"]: it["metadata"]["data_status"] for it in drawn}
    assert statuses.items() <= {it["status"]: it["metadata"]["data_status"] for it in [*drawn, *ours]}.items()
    assert {it["metadata"]["phase"] for it in ours} == {"generate"}


def test_messages_have_the_keys_of_theirs(folder: Path) -> None:
    fields = set(observability.InfoObservation.__dataclass_fields__)
    ours = [it for it in reading.lines(reading.written(run_events(), "observability=x")) if it["type"] != "test_case"]
    assert {it["type"] for it in ours} == {"alert", "info", "error"}
    assert all(set(it) == fields for it in ours)
    assert all(isinstance(it["content"], str) for it in ours)


def test_what_stopped_a_run_is_an_error(folder: Path) -> None:
    last = reading.lines(reading.written([], "observability=x", 2, "nothing was tested"))[-1]
    assert (last["type"], last["title"], last["content"]) == ("error", "Exit code 2", "nothing was tested")
