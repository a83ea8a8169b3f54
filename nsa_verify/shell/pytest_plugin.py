"""The pytest plugin: saved cases are test items.

It does nothing until a corpus is named (``--nsa-corpus``, the ini option ``nsa_corpus`` or ``NSA_VERIFY_CORPUS``), and
imports torch only when a saved case is collected. Each file gives an item per applicable implementation and executor,
called ``<file stem>[<implementation>]`` where it is called eagerly and ``<file stem>[<implementation>-<executor>]``
where it is captured; a damaged file gives one item that fails with the sentence that says why.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from nsa_verify.core.case import Case
    from nsa_verify.core.findings import Verdict
    from nsa_verify.core.implementation import Implementation
    from nsa_verify.device.driving import Executor
    from nsa_verify.engine.corpus import Entry


PREFIX = "nsa-"
"""What sets our options apart from those of pytest and of other plugins."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options ``--nsa-*``; none of them does anything without a corpus."""
    group = parser.getgroup("nsa-verify", "verification of sparse-attention metadata kernels")
    group.addoption("--nsa-corpus", metavar="DIR", help="collect the saved cases of this folder as tests")
    group.addoption("--nsa-impl", action="append", default=[], metavar="REF", help="run this implementation as well")
    group.addoption("--nsa-only", action="append", default=[], metavar="NAME", help="run this implementation only")
    group.addoption("--nsa-device", choices=["auto", "cpu", "cuda"], default=None, help="where to run saved cases")
    group.addoption(
        "--nsa-executor",
        action="append",
        default=[],
        choices=["eager", "graph", "simulated-graph"],
        help="drive implementations this way only (default: every way that the device has)",
    )
    parser.addini("nsa_corpus", "folder of saved cases, relative to the ini file", default="")


def pytest_configure(config: pytest.Config) -> None:
    """What ``--nsa-corpus`` names is collected wherever it lies, or the part of it that was asked for."""
    corpus = _corpus(config) if config.getoption("--nsa-corpus") else None
    if corpus is None:
        return
    if not corpus.exists():
        raise pytest.UsageError(f"--nsa-corpus {config.getoption('--nsa-corpus')}: there is no such folder")
    here = config.invocation_params.dir
    asked = [Path(os.path.abspath(here / argument.partition("::")[0])) for argument in config.args]
    if not any(corpus.is_relative_to(path) or path.is_relative_to(corpus) for path in asked):
        config.args.append(str(corpus))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """A saved case under the corpus."""
    if file_path.suffix != ".json":
        return None
    corpus = _corpus(parent.config)
    if corpus is None or not file_path.is_relative_to(corpus) or file_path.name.startswith("."):
        return None
    return SavedCase.from_parent(parent, path=file_path)


def pytest_sessionfinish() -> None:
    """Close the graphs of the cases that were run."""
    if "nsa_verify.engine.worker" in sys.modules:
        from nsa_verify.engine.worker import close

        close()


def _corpus(config: pytest.Config) -> Path | None:
    given = config.getoption("--nsa-corpus") or os.environ.get("NSA_VERIFY_CORPUS")
    if given:
        return Path(os.path.abspath(config.invocation_params.dir / given))
    named = config.getini("nsa_corpus")
    return Path(os.path.abspath(config.rootpath / named)) if named else None


class SavedCase(pytest.File):
    """One file of the corpus."""

    def collect(self) -> Iterable[pytest.Item]:
        """One item per applicable implementation and executor, or one that says what is wrong with the file."""
        from nsa_verify.engine.corpus import CorpusError, load

        try:
            entry = load(self.path)
        except CorpusError as error:
            yield DamagedCase.from_parent(self, name=self.path.stem, problem=str(error))
            return
        device, implementations, executors = _chosen(self.config)
        idle = True
        for it in implementations:
            for executor in executors:
                if _applies(executor, it, entry.case):
                    idle = False
                    way = "" if executor.name == "eager" else f"-{executor.name}"
                    name = f"{self.path.stem}[{it.name}{way}]"
                    run = Run(entry, it, executor.name, device)
                    yield CaseItem.from_parent(self, name=name, run=run)
        if idle:
            yield IdleCase.from_parent(self, name=self.path.stem)


def _applies(executor: Executor, implementation: Implementation, case: Case) -> bool:
    return any(executor.not_applicable(implementation, case.setup, replay.mode) is None for replay in case.replays)


def _chosen(config: pytest.Config) -> tuple[str, tuple[Implementation, ...], tuple[Executor, ...]]:
    """The device, and what runs on it by the options."""
    from nsa_verify.core.registry import ImplementationError
    from nsa_verify.device.select import DeviceError
    from nsa_verify.engine.worker import drivers, prepare

    wanted = config.getoption("--nsa-device") or os.environ.get("NSA_VERIFY_DEVICE") or "auto"
    references, only, executors = (
        tuple(dict.fromkeys(config.getoption(f"--nsa-{name}"))) for name in ("impl", "only", "executor")
    )
    try:
        device, implementations = prepare(wanted, references, only)
        return device, implementations, drivers(device, executors)
    except (ImplementationError, DeviceError) as error:
        # A sentence of this exception is shown without a traceback.
        raise pytest.Collector.CollectError(re.sub("^--", "--" + PREFIX, str(error))) from error


class CaseFailed(Exception):
    """A saved case that does not agree; carries the verdict."""

    def __init__(self, case: Case, verdict: Verdict) -> None:
        super().__init__(f"{verdict.implementation}: {verdict.outcome}")
        self.case, self.verdict = case, verdict


class Run(NamedTuple):
    """What one item does."""

    entry: Entry
    implementation: Implementation
    executor: str
    device: str


class CaseItem(pytest.Item):
    """One saved case under one implementation and executor."""

    def __init__(self, name: str, parent: pytest.Collector, run: Run) -> None:
        super().__init__(name, parent)
        self._run = run

    def runtest(self) -> None:
        """Judge the case."""
        from nsa_verify.core.findings import Outcome
        from nsa_verify.engine.worker import judge_case

        entry, implementation, executor, device = self._run
        for verdict in judge_case(entry.case, (implementation,), (executor,), device):
            if verdict.outcome is not Outcome.AGREE:
                raise CaseFailed(entry.case, verdict)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """The case and the first difference, instead of a traceback through the checker."""
        if isinstance(excinfo.value, CaseFailed):
            return "\n".join(self._lines(excinfo.value))
        return str(super().repr_failure(excinfo, style))

    def _lines(self, failed: CaseFailed) -> Iterator[str]:
        from nsa_verify.shell.render import case_lines, finding_lines, title

        verdict, finding = failed.verdict, failed.verdict.primary
        yield self._run.entry.title
        if finding is None:
            yield f"{verdict.outcome}: {verdict.reason}"
            return
        yield f"{finding.implementation} [{finding.executor}] {title(finding.code)}"
        yield from case_lines(failed.case, finding.replay)
        yield from finding_lines(finding)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the item comes from."""
        return self.path, None, self.name


class IdleCase(pytest.Item):
    """A saved case that none of the chosen implementations can run: skipped, and so not silently untested."""

    def runtest(self) -> None:
        """Skip with the reason."""
        pytest.skip("no implementation is applicable; choose others with --nsa-only, --nsa-impl or --nsa-executor")

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the item comes from."""
        return self.path, None, self.name


class DamagedCase(pytest.Item):
    """A file of the corpus that cannot be read."""

    def __init__(self, name: str, parent: pytest.Collector, problem: str) -> None:
        super().__init__(name, parent)
        self._problem = problem

    def runtest(self) -> None:
        """Fail with the sentence that says why."""
        pytest.fail(self._problem, pytrace=False)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the item comes from."""
        return self.path, None, self.name
