"""``nsa-verify corpus``: look at the saved cases."""

from __future__ import annotations

from pathlib import Path

import click

from nsa_verify.engine.corpus import CorpusError, Entry, load, scan
from nsa_verify.shell import options as opt
from nsa_verify.shell.options import ExitCode, Unable
from nsa_verify.shell.render import case_lines, columns, counted, json_text
from nsa_verify.shell.reporter import console, say


@click.group()
def corpus() -> None:
    """Look at saved cases."""


@corpus.command("list")
@opt.together(opt.CORPUS, opt.JSON, opt.NO_COLOR)
def list_cases(corpus: str, as_json: bool, no_color: bool) -> None:
    """One line a case, sorted by path; a damaged file is named and makes the exit code 2."""
    root = Path(corpus)
    rows, problems = [], []
    for path in _scan(root):
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
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    if problems:
        raise SystemExit(ExitCode.UNABLE)


@corpus.command()
@click.argument("name")
@opt.together(opt.CORPUS, opt.JSON, opt.NO_COLOR)
def show(name: str, corpus: str, as_json: bool, no_color: bool) -> None:
    """Show one case: NAME is a path, a file's stem, or the start of its hash."""
    path = _resolve(name, Path(corpus))
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


def _resolve(name: str, root: Path) -> Path:
    if Path(name).is_file():
        return Path(name)
    matches = [path for path in _scan(root) if path.stem == name or path.stem.rpartition("-")[2].startswith(name)]
    if not matches:
        raise Unable(
            f"{name}: no saved case of {root} has this path, stem or start of hash; see nsa-verify corpus list"
        )
    if len(matches) > 1:
        stems = ", ".join(path.stem for path in matches)
        raise Unable(f"{name}: {len(matches)} saved cases of {root} are called so ({stems}); give more of the name")
    return matches[0]


def _scan(root: Path) -> list[Path]:
    try:
        return list(scan(root))
    except CorpusError as error:
        raise Unable(str(error)) from error
