"""Whether what Triton compiles grows with what varies from replay to replay (NV503)."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import combinations
from typing import NamedTuple

from nsa_verify.core.case import Mode
from nsa_verify.device.launches import CompileKey


class Served(NamedTuple):
    """The compile keys of one call."""

    mode: Mode
    bucket: int
    keys: AbstractSet[CompileKey]


def growth(calls: Sequence[Served]) -> tuple[int, str] | None:
    """The call that needs a compilation which an earlier one of its mode did not, and why in words; or None.

    In one bucket nothing but lengths, accepts and rows differs, and no constant may. Between buckets a constant may
    follow a power of two, which grows to ten values and no further. Flags (true, false, None, 0, 1) are no growth.
    """
    for (_, first), (later, second) in combinations(enumerate(calls), 2):
        if first.mode is not second.mode:
            continue
        one_bucket = first.bucket == second.bucket
        for kernel, name, before, after in _changes(first.keys, second.keys):
            changed = before ^ after
            if any(_may_grow(value, one_bucket) for value in changed):
                cause = (
                    "lengths or accepts vary"
                    if one_bucket
                    else f"the batch size goes from {first.bucket} to {second.bucket}"
                )
                return (
                    later,
                    f"{kernel} is compiled anew as {cause}: {name} went from {_or(before)} to {_or(after)}",
                )
    return None


def _changes(
    first: AbstractSet[CompileKey], second: AbstractSet[CompileKey]
) -> list[tuple[str, str, set[str], set[str]]]:
    """The constants of kernels launched by both whose values are not the same."""
    before, after = _values(first), _values(second)
    return [
        (*key, before[key], after[key]) for key in sorted(before.keys() & after.keys()) if before[key] != after[key]
    ]


def _values(keys: AbstractSet[CompileKey]) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for key in keys:
        for name, value in key.constants:
            found.setdefault((key.kernel, name), set()).add(value)
    return found


def _may_grow(value: str, one_bucket: bool) -> bool:
    if value in ("True", "False", "None", "0", "1"):
        return False
    is_power = value.isdigit() and int(value).bit_count() == 1
    return one_bucket or not is_power


def _or(values: set[str]) -> str:
    return " or ".join(sorted(values))
