"""Cases, findings and matrices as a person reads them: plain lines, aligned by spaces, styled by the caller."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from nsa_verify.core.case import Case, Mode, Setup, SlotKind
from nsa_verify.core.findings import EXPLANATIONS, Code, Finding
from nsa_verify.core.oracle import batch
from nsa_verify.device.layout import is_poison
from nsa_verify.engine.events import Cell, Disagreement, Matrix, Subject, Tally
from nsa_verify.engine.plan import Plan

MAX_ROWS = 12
"""Requests of a replay that are shown; the rest is counted."""


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """``rows`` as lines with aligned columns."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def setup_lines(setup: Setup) -> list[str]:
    """The setup in two lines: the sizes, then whatever is not plain."""
    sizes = (
        f"N={setup.num_draft_tokens} K={setup.index_topk} p={setup.page_size} W={setup.table_width}"
        f" pool={setup.pool_rows}x{setup.pool_width} buckets={','.join(map(str, setup.buckets))}"
        f" steps={setup.num_steps} fill={setup.fill_seq_len}"
    )
    usual = {field: getattr(Setup(), field) for field in Setup.__struct_fields__}
    widths = {"pool_width": setup.pool_width, "table_width": setup.table_width}
    strides = {"pool_row_stride": setup.pool_width, "table_row_stride": setup.table_width}
    plain = usual | widths | strides
    shown = ("num_draft_tokens", "index_topk", "page_size", "pool_rows", "buckets", "num_steps", "fill_seq_len")
    special = [
        f"{name}={getattr(setup, name)}"
        for name in setup.__struct_fields__
        if name not in shown and getattr(setup, name) != plain[name]
    ]
    return [f"setup   {sizes}", *([f"        {' '.join(special)}"] if special else [])]


def replay_lines(case: Case, index: int, mark: bool) -> Iterator[str]:
    """One replay: its mode and bucket, and a table of its rows."""
    replay, given = case.replays[index], batch(case, index)
    slots = "" if replay.slots is SlotKind.SEQUENTIAL else f", {replay.slots} slots"
    seed = f", pool seed {replay.pool_seed}" if replay.pool_seed else ""
    arrow = "  <- disagrees" if mark else ""
    yield f"replay {index + 1} of {len(case.replays)}: {replay.mode}, bucket {given.bucket}{slots}{seed}{arrow}"
    accepts = replay.mode is Mode.DRAFT_EXTEND
    rows = [("row", "seq_len", "pool_row", *(("accept_len",) if accepts else ()))]
    for row, (length, pool_row, accepted) in enumerate(zip(*given[2:], strict=True)):
        name = str(row) if row < len(replay.requests) else f"{row} (padded)"
        rows.append((name, str(length), str(pool_row), *((str(accepted),) if accepts else ())))
    yield from columns(rows[: MAX_ROWS + 1], "        ")
    if len(rows) > MAX_ROWS + 1:
        yield f"        ... and {len(rows) - MAX_ROWS - 1} more rows"


def case_lines(case: Case, failing: int | None = None) -> list[str]:
    """The whole case; ``failing`` is the replay to point at."""
    lines = setup_lines(case.setup)
    for index in range(len(case.replays)):
        lines += replay_lines(case, index, index == failing)
    return lines


def finding_lines(finding: Finding) -> list[str]:
    """The finding: its sentence, and expected and got side by side around the first difference."""
    where = f"replay {finding.replay + 1}"
    where += f", step {finding.step}" if finding.step is not None else ""
    where += f", {finding.count} wrong {'cell' if finding.count == 1 else 'cells'}" if finding.window else ""
    lines = [f"{where}: {finding.message}"]
    if finding.window:
        cells = finding.window
        table = [
            ("element", *(",".join(map(str, cell.element)) for cell in cells)),
            ("region", *(cell.region for cell in cells)),
            ("expected", *(number(cell.expected) for cell in cells)),
            ("got", *(number(cell.got) for cell in cells)),
            ("", *("^" * max(len(number(cell.got)), 1) if cell.differs else "" for cell in cells)),
        ]
        lines += columns(table, "        ")
    return lines


def how_it_was_got(found: Disagreement) -> str:
    """Whether the case was shrunk, and how often it disagreed again."""
    runs = found.reliability
    how = f"minimal case, {found.probes} probes" if found.shrunk else "case as it was drawn"
    again = f"; disagreed in {runs.disagreed} of {runs.runs} further runs" if runs.runs else ""
    return f"{how}{again}{f'; {found.note}' if found.note else ''}"


def reproduce(path: Path, implementation: str, executor: str = "", plan: Plan | None = None) -> str:
    """The command that runs a saved case again, as a shell takes it; without ``executor`` under all that there are."""
    words = ["nsa-verify", "replay", str(path), "--only", implementation]
    if executor:
        words += ["--executor", executor]
    for reference in plan.references if plan is not None else ():
        words += ["--impl", reference]
    if plan is not None and plan.device != "auto":
        words += ["--device", plan.device]
    return shlex.join(words)


def number(value: int) -> str:
    """A cell's content; poison by that name."""
    return "poison" if is_poison(value) else str(value)


def title(code: Code) -> str:
    """A code and its title."""
    return f"{code} {EXPLANATIONS[code].title}"


def explanation_lines(code: Code) -> list[str]:
    """What ``nsa-verify explain`` prints."""
    text = EXPLANATIONS[code]
    return [
        f"{code}: {text.title}",
        "",
        text.meaning,
        "",
        f"Typical cause: {text.typical_cause}",
        f"Remedy: {text.remedy}",
    ]


def counted(count: int, noun: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


NOT_CAPTURABLE: Final = "not capturable"


def cell_text(cell: Cell | None) -> str:
    """A matrix cell: how many cases agreed, disagreed, could not be judged, were not applicable."""
    if cell is None:
        return "not drawn"
    if cell.not_capturable and not cell.cases:
        return NOT_CAPTURABLE
    agreed = cell.cases - cell.disagree - cell.unknown
    parts = {"agree": agreed, "DISAGREE": cell.disagree, "UNKNOWN": cell.unknown, "n/a": cell.not_applicable}
    return ", ".join(f"{count} {name}" for name, count in parts.items() if count) or "none"


def matrix_rows(
    matrix: Matrix, subjects: Iterable[Subject], executors: Sequence[str], modes: Sequence[Mode]
) -> list[tuple[str, ...]]:
    """Header and one row per (implementation, mode), a column per executor; no row if no case was judged."""
    rows: list[tuple[str, ...]] = [("implementation", "mode", *executors)]
    for subject in subjects if matrix.cells else ():
        for mode in modes:
            cells = [matrix.cells.get((subject.name, executor, mode)) for executor in executors]
            rows.append((subject.name, mode, *(cell_text(cell) for cell in cells)))
    return rows


def reason_lines(matrix: Matrix) -> list[str]:
    """Why cases were not applicable: a line per implementation and reason, with the modes and how many cases.

    A reason that holds under some executors only is said of each of them.
    """
    executors = {executor for _, executor, _ in matrix.cells}
    modes = {mode for _, _, mode in matrix.cells}
    found: dict[tuple[str, str], dict[str, dict[Mode, int]]] = {}
    for (implementation, executor, mode), cell in sorted(matrix.cells.items()):
        for reason, count in sorted(cell.reasons.items()):
            found.setdefault((implementation, reason), {}).setdefault(executor, {})[mode] = count
    rows = []
    for (implementation, reason), under in found.items():
        first = next(iter(under.values()))
        same = under.keys() == executors and all(counts == first for counts in under.values())
        for which, counts in {"": first}.items() if same else under.items():
            where = ", ".join(f"{mode} {count}" for mode, count in counts.items())
            if len(modes) > 1 and counts.keys() == modes:
                where = f"every mode: {sum(counts.values())}"
            rows.append(("n/a", implementation, f"{which}{': ' if which else ''}{reason} ({where})"))
    return columns(rows) if rows else []


def tally_lines(tally: Tally) -> list[str]:
    """How many kernels were compiled for whom, and which fallbacks were reported; nothing for those who did neither."""
    counts = ", ".join(f"{name} {len(keys)}" for name, keys in tally.compile_keys.items())
    lines = [f"compile keys: {counts}"] if counts else []
    for name, reasons in tally.fallbacks.items():
        for reason, count in reasons.items():
            often = f"x {count}" if count else "(while a graph was captured)"
            lines.append(f"fallbacks: {name}: {reason} {often}")
    return lines


def json_text(value: object) -> str:
    """``value`` as one JSON document with sorted keys."""
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2).decode()
