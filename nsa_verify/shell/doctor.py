"""``nsa-verify doctor``: what this machine has, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from nsa_verify import __version__
from nsa_verify.core.case import Case, Replay, Request, Setup
from nsa_verify.core.findings import Outcome
from nsa_verify.core.registry import ImplementationError, load
from nsa_verify.engine.corpus import CorpusError, check_writable, scan
from nsa_verify.shell import options as opt
from nsa_verify.shell.options import ExitCode
from nsa_verify.shell.render import counted
from nsa_verify.shell.reporter import console, say

PACKAGES = ("torch", "triton", "hypothesis", "pytest", "pytest-xdist", "numpy", "msgspec")


@click.command()
@opt.together(opt.IMPL, opt.CORPUS, opt.DEVICE, opt.NO_COLOR)
def doctor(references: tuple[str, ...], corpus: str, device: str, no_color: bool) -> None:
    """Check this machine; exit code 2 if something needed is missing."""
    out, healthy = console(no_color), True
    checks: list[tuple[str, Callable[[], Iterator[str]]]] = [
        ("versions", _versions),
        ("device", lambda: _device(device)),
        ("implementations", lambda: _implementations(references)),
        ("corpus", lambda: _corpus(Path(corpus))),
    ]
    for name, check in checks:
        try:
            for line in check():
                say(out, f"ok       {name}: {line}", None)
        except Exception as error:  # noqa: BLE001 - a check that fails, however, is a line of the report
            healthy = False
            say(out, f"PROBLEM  {name}: {error}", "bold red")
    raise SystemExit(ExitCode.AGREE if healthy else ExitCode.UNABLE)


def _versions() -> Iterator[str]:
    yield f"nsa-verify {__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    yield ", ".join(found)
    if needed := [package for package in missing if not package.startswith("pytest")]:
        raise RuntimeError(f"{', '.join(needed)} not installed; run make verify, or pip install nsa-verify")


def _device(device: str) -> Iterator[str]:
    from nsa_verify.device.select import describe, resolve

    chosen = resolve(device)
    yield describe(chosen)
    yield _graphs(chosen)
    yield f"compute-sanitizer {shutil.which('compute-sanitizer') or 'not on the PATH (optional)'}"


def _graphs(device: str) -> str:
    """Capture and replay a small graph; raises ``RuntimeError`` if that cannot be done here."""
    from nsa_verify.device.executors import executors_for
    from nsa_verify.device.judge import verify
    from nsa_verify.device.rig import close_rigs

    name = next(it.name for it in executors_for(device) if it.device == device)
    case = Case(Setup(), (Replay(requests=(Request(),)),))
    try:
        verdict = verify(case, "vectorized", name, device)
    finally:
        close_rigs()
    if verdict.outcome is not Outcome.AGREE:
        why = verdict.primary.message if verdict.primary is not None else verdict.reason
        raise RuntimeError(f"graphs cannot be captured with {name}: {why}")
    return f"graphs can be captured and replayed ({name})"


def _implementations(references: tuple[str, ...]) -> Iterator[str]:
    try:
        found = load(references)
    except ImplementationError as error:
        raise RuntimeError(str(error)) from error
    yield ", ".join(found)


def _corpus(root: Path) -> Iterator[str]:
    try:
        check_writable(root)
        count = len(list(scan(root))) if root.is_dir() else 0
    except CorpusError as error:
        raise RuntimeError(str(error)) from error
    yield f"{root}: writable, {counted(count, 'case')}"
