"""What ``run --coverage`` tells: which labels the cases had, how many pairs of labels, and which pairs no case had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from nsa_verify.core.case import Mode
from nsa_verify.core.labels import DIMENSIONS, Coverage, Dimension, Label, Pair, possible_labels, possible_pairs
from nsa_verify.shell.render import columns, counted

MOST_GROUPS: Final = 20
"""Lines of pairs that no case had; the rest is counted."""
MOST_CHARACTERS: Final = 100
"""Of the labels on one of these lines; the rest is counted."""


def coverage_lines(coverage: Coverage, modes: Sequence[Mode]) -> list[str]:
    """For people: a line per dimension, how many pairs of how many were met, and the others in groups."""
    never = _never(coverage, modes)
    possible = len(possible_pairs(tuple(modes)))
    lines = ["coverage, in cases:", *columns(_dimension_rows(coverage, modes), "  ")]
    lines.append(f"pairs: {possible - len(never)} of {possible} that can be were met")
    if never:
        rows, left = never_met(coverage, modes)
        told = [(label, "with", others) for label, others in rows]
        lines += [f"never met, {counted(len(never), 'pair')}:", *columns(told, "  ")]
        if left:
            lines.append(f"  ... and {counted(left, 'more pair')}; --json has them all")
    return lines


def never_met(coverage: Coverage, modes: Sequence[Mode]) -> tuple[list[tuple[Label, str]], int]:
    """Labels, each with those that it was never met with; and how many pairs are left out, since they are too many."""
    rows: list[tuple[Label, str]] = []
    never = _never(coverage, modes)
    left = len(never)
    for label, others in _groups(coverage, never, modes):
        if len(rows) == MOST_GROUPS:
            break
        rows.append((label, _cut(others) if coverage.of(label) else "anything"))
        left -= len(others)
    return rows, left


def coverage_document(coverage: Coverage, modes: Sequence[Mode]) -> dict[str, Any]:
    """For programs: the counts of all labels and of all pairs that can be, 0 for what no case had."""
    labels = {
        dimension.name: {value: coverage.of(label) for value, label in labels.items()}
        for dimension, labels in _dimensions(modes)
    }
    pairs: dict[Label, dict[Label, int]] = {}
    for pair in possible_pairs(tuple(modes)):
        pairs.setdefault(pair[0], {})[pair[1]] = coverage.of_pair(pair)
    possible = len(possible_pairs(tuple(modes)))
    return {"labels": labels, "pairs": pairs, "possible": possible, "met": possible - len(_never(coverage, modes))}


def _dimensions(modes: Sequence[Mode]) -> Iterator[tuple[Dimension, Mapping[str, Label]]]:
    """Each dimension that cases in ``modes`` have values of, and the labels by value."""
    possible = frozenset(possible_labels(modes))
    for dimension in DIMENSIONS:
        labels = {value: label for value, label in dimension.labels.items() if label in possible}
        if labels:
            yield dimension, labels


def _dimension_rows(coverage: Coverage, modes: Sequence[Mode]) -> list[tuple[str, str]]:
    return [
        (dimension.name, ", ".join(f"{value} {coverage.of(label)}" for value, label in labels.items()))
        for dimension, labels in _dimensions(modes)
    ]


def _never(coverage: Coverage, modes: Sequence[Mode]) -> list[Pair]:
    return [pair for pair in possible_pairs(tuple(modes)) if not coverage.of_pair(pair)]


def _groups(coverage: Coverage, never: Sequence[Pair], modes: Sequence[Mode]) -> Iterator[tuple[Label, list[Label]]]:
    """Each pair once, under the label that is in most of those that are left; first the labels that no case had."""
    order = possible_labels(modes)
    partners: dict[Label, list[Label]] = {label: [] for label in order}
    for first, second in never:
        partners[first].append(second)
        partners[second].append(first)
    while any(partners.values()):
        label = max(order, key=lambda it: (bool(partners[it]) and not coverage.of(it), len(partners[it])))
        others, partners[label] = partners[label], []
        for other in others:
            partners[other].remove(label)
        yield label, others


def _cut(labels: Sequence[Label]) -> str:
    """As many as a line holds, and how many more."""
    shown = ""
    for index, label in enumerate(labels):
        longer = f"{shown}, {label}" if shown else label
        if len(longer) > MOST_CHARACTERS:
            return f"{shown} and {len(labels) - index} more"
        shown = longer
    return shown
