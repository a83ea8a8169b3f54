"""``nsa-verify corpus``: look at the saved cases, and keep them few and in order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console

from nsa_verify.engine.corpus import CorpusError, Entry, load
from nsa_verify.engine.filing import Fate
from nsa_verify.engine.merging import Merged, merge
from nsa_verify.engine.pruning import Pruned, prune
from nsa_verify.shell import options as opt
from nsa_verify.shell.corpus_judging import minimize, promote
from nsa_verify.shell.corpus_names import scanned, the_one
from nsa_verify.shell.options import ExitCode, Unable
from nsa_verify.shell.render import case_lines, columns, counted, json_text
from nsa_verify.shell.reporter import console, say


@click.group()
def corpus() -> None:
    """Look at saved cases, and keep them few and in order."""


@corpus.command("list")
@opt.together(opt.CORPUS, opt.JSON, opt.NO_COLOR)
def list_cases(corpus: str, as_json: bool, no_color: bool) -> None:
    """One line a case, sorted by path; a damaged file is named and makes the exit code 2."""
    root = Path(corpus)
    rows, problems = [], []
    for path in scanned(root):
        try:
            entry = load(path)
        except CorpusError as error:
            problems.append(str(error))
            continue
        code = f"{entry.finding.code} {entry.finding.implementation}" if entry.finding else "-"
        rows.append((str(path.relative_to(root)) if path.is_relative_to(root) else str(path), code, entry.title))
    out = console(no_color)
    if as_json:
        cases = [dict(zip(("path", "finding", "title"), row, strict=True)) for row in rows]
        say(out, json_text({"cases": cases, "problems": problems}))
    else:
        for line in columns(rows) if rows else []:
            say(out, line)
        say(out, counted(len(rows), "case"))
    _end(problems)


def _end(problems: Iterable[str]) -> None:
    """Name the files that cannot be read; there being any is exit code 2."""
    told = list(problems)
    for problem in told:
        click.echo(f"Error: {problem}", err=True)
    if told:
        raise SystemExit(ExitCode.UNABLE)


@corpus.command()
@click.argument("name")
@opt.together(opt.CORPUS, opt.JSON, opt.NO_COLOR)
def show(name: str, corpus: str, as_json: bool, no_color: bool) -> None:
    """Show one case: NAME is a path, a file's stem, or the start of its hash."""
    root = Path(corpus)
    path = Path(name) if Path(name).is_file() else the_one(name, scanned(root), "saved case", root)
    try:
        entry = load(path)
    except CorpusError as error:
        raise Unable(str(error)) from error
    out = console(no_color)
    if as_json:
        say(out, json_text({"path": str(path), "entry": entry}))
        return
    for line in entry_lines(path, entry):
        say(out, line)


def entry_lines(path: Path, entry: Entry) -> list[str]:
    """A saved case as ``corpus show`` prints it."""
    lines = [str(path), entry.title]
    if entry.bug_classes:
        lines.append(f"bug classes {', '.join(map(str, entry.bug_classes))}")
    lines += case_lines(entry.case, entry.finding.replay if entry.finding else None)
    if finding := entry.finding:
        lines.append(f"{finding.code} {finding.implementation} [{finding.executor}]: {finding.message}")
    origin = entry.provenance
    told = {"seed": origin.seed, "found": origin.date, "version": origin.version, "command": origin.command}
    known = [f"{name} {value}" for name, value in told.items() if value not in (None, "")]
    return [*lines, *([f"({'; '.join(known)})"] if known else [])]


@corpus.command("merge")
@click.argument("sources", metavar="DIR...", nargs=-1, required=True)
@opt.together(opt.CORPUS, opt.JSON, opt.NO_COLOR)
def merge_corpora(sources: tuple[str, ...], corpus: str, as_json: bool, no_color: bool) -> None:
    """Copy the cases of other corpora into this one; nothing is changed in those.

    A case that is here already stays as it is, with the older provenance of both. A case that crashes in one corpus and
    is a regression case of another is crashing here, unless it is a regression case here already: nobody knows yet that
    it is mended here. A damaged file is named, and makes the exit code 2.
    """
    out = console(no_color)
    results: list[Merged] = []
    try:
        for result in merge(Path(corpus), [Path(source) for source in sources]):
            results.append(result)
            if not as_json:
                _show_merged(out, result)
    except CorpusError as error:
        raise Unable(str(error)) from error
    counts = {fate: sum(it.fate is fate for it in results) for fate in Fate}
    problems = [it.problem for it in results if it.problem]
    if as_json:
        cases = [{"source": str(it.source), "path": str(it.path), "fate": it.fate} for it in results if it.fate]
        say(out, json_text({"cases": cases, "counts": counts, "problems": problems}))
    else:
        told = [
            f"{counts[Fate.COPIED]} copied",
            f"{counts[Fate.OLDER]} given an older provenance",
            f"{counts[Fate.HERE]} here already",
            f"{counts[Fate.LEFT]} left out",
        ]
        say(out, ", ".join(told) + ("" if counts[Fate.COPIED] + counts[Fate.OLDER] else "; nothing was changed"))
    _end(problems)


def _show_merged(out: Console, result: Merged) -> None:
    if result.fate is Fate.LEFT:
        assert result.path is not None
        say(out, f"left   {result.source}: the case is here as {result.path}")
    elif result.fate in (Fate.COPIED, Fate.OLDER):
        say(out, f"{result.fate:6} {result.path}")


@corpus.command("prune")
@click.option("--dry-run", is_flag=True, help="Only tell what would be removed.")
@opt.together(opt.CORPUS, opt.JSON, opt.NO_COLOR)
def prune_corpus(dry_run: bool, corpus: str, as_json: bool, no_color: bool) -> None:
    """Remove the cases that nothing is lost without.

    What stays: the seeds, the smallest case of each group of findings, and cases with every pair of labels that the
    corpus had (run --coverage tells them). A damaged file is named and stays, and makes the exit code 2.
    """
    try:
        pruned = prune(Path(corpus), dry_run)
    except CorpusError as error:
        raise Unable(str(error)) from error
    out = console(no_color)
    if as_json:
        removed = [
            {"path": str(it.path), "reason": _reason(it.group, it.kept_in), "kept_in": it.kept_in and str(it.kept_in)}
            for it in pruned.removed
        ]
        told = {"removed": removed, "dry_run": dry_run, "kept": pruned.kept, "problems": pruned.problems}
        say(out, json_text(told | {"pairs_before": pruned.pairs_before, "pairs_after": pruned.pairs_after}))
    else:
        _show_pruned(out, pruned, dry_run)
    _end(pruned.problems)


def _show_pruned(out: Console, pruned: Pruned, dry_run: bool) -> None:
    for it in pruned.removed:
        say(out, f"{'would remove' if dry_run else 'removed'} {it.path}: {_reason(it.group, it.kept_in)}")
    said = f"{len(pruned.removed)} {'to remove' if dry_run else 'removed'}, {pruned.kept} kept"
    say(out, f"{said}; pairs of labels covered: {pruned.pairs_before} before, {pruned.pairs_after} after")
    if not pruned.removed:
        say(out, "nothing is superfluous")


def _reason(group: str, kept_in: Path | None) -> str:
    labels = "others have its pairs of labels"
    return labels if kept_in is None else f"{group} is kept in {kept_in}, and {labels}"


corpus.add_command(minimize)
corpus.add_command(promote)
