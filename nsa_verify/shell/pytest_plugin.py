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
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from nsa_verify.core.case import Case
    from nsa_verify.core.findings import Verdict
    from nsa_verify.engine.corpus import Entry
    from nsa_verify.engine.isolation import Inside, Keeper
    from nsa_verify.engine.messages import Pair


PREFIX = "nsa-"
"""What sets our options apart from those of pytest and of other plugins."""
ENTRIES = "nsa_verify_gpus"
"""What the pytest process tells each worker process of pytest-xdist: the entries of ``gpus.placement``."""
_PLACEMENT = pytest.StashKey[tuple[str, ...]]()
_KEEPER = pytest.StashKey["Keeper | Inside"]()


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
    group.addoption("--nsa-no-isolation", action="store_true", help="run implementations in this very process")
    group.addoption(
        "--nsa-workers", metavar="N|auto", default=None, help="what -n auto means; auto asks GPUs, memory and cores"
    )
    parser.addini("nsa_corpus", "folder of saved cases, relative to the ini file", default="")


def pytest_configure(config: pytest.Config) -> None:
    """What ``--nsa-corpus`` names is collected wherever it lies, or the part of it that was asked for.

    A worker process of pytest-xdist binds itself to one GPU before anything is collected.
    """
    _pin(config)
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


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the worker, and close the graphs of the cases that were run."""
    keeper = session.config.stash.get(_KEEPER, None)
    if keeper is not None:
        keeper.close()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """How many workers the GPUs carry, for ``-n auto``; None leaves it to pytest-xdist.

    ``PYTEST_XDIST_AUTO_NUM_WORKERS``, which pytest-xdist reads, comes first, then ``--nsa-workers`` or
    ``NSA_VERIFY_WORKERS``, then this hook in a conftest, as it would be without us. We must come before pytest-xdist
    itself, which always has an answer.
    """
    if _corpus(config) is None or os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    from nsa_verify.shell import gpus

    option = config.getoption("--nsa-workers")
    text = option or os.environ.get("NSA_VERIFY_WORKERS") or "auto"
    try:
        wanted = gpus.workers_wanted(text)
    except ValueError as error:
        source = "--nsa-workers " if option else "NSA_VERIFY_WORKERS="
        raise pytest.UsageError(f"{source}{text}: {error}") from error
    hooks = config.hook.pytest_xdist_auto_num_workers.get_hookimpls()
    others = {it.function.__module__ for it in hooks} - {__name__, "xdist.plugin"}
    if wanted is not None or others:
        return wanted
    found = gpus.gpus_for(_wanted_device(config))
    return gpus.worker_budget(found) if found else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker process on this machine which GPUs there are: one view of their memory, from before the first."""
    config: pytest.Config = node.config
    spec = node.gateway.spec
    if _corpus(config) is None or not spec.popen or "CUDA_VISIBLE_DEVICES" in spec.env:
        return
    if _PLACEMENT not in config.stash:
        from nsa_verify.shell import gpus

        config.stash[_PLACEMENT] = gpus.placement(gpus.gpus_for(_wanted_device(config)))
    node.workerinput[ENTRIES] = config.stash[_PLACEMENT]


def _pin(config: pytest.Config) -> None:
    told: dict[str, Any] = getattr(config, "workerinput", {})
    number = re.fullmatch(r"gw(\d+)", told.get("workerid", ""))
    if number is None or _corpus(config) is None:
        return
    from nsa_verify.shell import gpus

    entries = told.get(ENTRIES)
    if entries is None:
        entries = gpus.placement(gpus.gpus_for(_wanted_device(config)))
    with warnings.catch_warnings(record=True) as problems:
        warnings.simplefilter("always")
        gpus.pin(int(number[1]), os.environ, entries)
    for problem in problems:
        try:
            config.issue_config_time_warning(pytest.PytestConfigWarning(str(problem.message)), stacklevel=2)
        except pytest.PytestConfigWarning as error:
            # Where warnings are errors it would end this worker, and pytest-xdist with an internal error of its own.
            print(f"{told['workerid']}: {error}", file=sys.stderr)


def _wanted_device(config: pytest.Config) -> str:
    return config.getoption("--nsa-device") or os.environ.get("NSA_VERIFY_DEVICE") or "auto"


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
        from nsa_verify.engine.process import EngineError

        try:
            keeper = _keeper(self.config)
            pairs = keeper.applicable(entry.case)
        except EngineError as error:
            raise self.CollectError(str(error)) from error
        for pair in pairs:
            way = "" if pair[1] == "eager" else f"-{pair[1]}"
            run = Run(entry, pair, keeper)
            yield CaseItem.from_parent(self, name=f"{self.path.stem}[{pair[0]}{way}]", run=run)
        if not pairs:
            yield IdleCase.from_parent(self, name=self.path.stem)


def _keeper(config: pytest.Config) -> Keeper | Inside:
    """This process's worker, which judges on the device and with the implementations that the options name."""
    from nsa_verify.core.registry import ImplementationError
    from nsa_verify.device.select import DeviceError
    from nsa_verify.engine.isolation import Inside, Keeper
    from nsa_verify.engine.plan import Plan

    if _KEEPER in config.stash:
        return config.stash[_KEEPER]
    references, only, executors = (
        tuple(dict.fromkeys(config.getoption(f"--nsa-{name}"))) for name in ("impl", "only", "executor")
    )
    plan = Plan(
        device=_wanted_device(config),
        references=references,
        only=only,
        executors=executors,
        workers=int(getattr(config, "workerinput", {}).get("workercount", 1)),
        isolate=not config.getoption("--nsa-no-isolation"),
    )
    try:
        keeper = Keeper(plan) if plan.isolate else Inside(plan)
        config.stash[_KEEPER] = keeper
        keeper.hello()
    except (ImplementationError, DeviceError) as error:
        # A sentence of this exception is shown without a traceback.
        raise pytest.Collector.CollectError(re.sub("^--", "--" + PREFIX, str(error))) from error
    return keeper


class CaseFailed(Exception):
    """A saved case that does not agree; carries the verdict."""

    def __init__(self, case: Case, verdict: Verdict) -> None:
        super().__init__(f"{verdict.implementation}: {verdict.outcome}")
        self.case, self.verdict = case, verdict


class Run(NamedTuple):
    """What one item does."""

    entry: Entry
    pair: Pair
    keeper: Keeper | Inside


class CaseItem(pytest.Item):
    """One saved case under one implementation and executor."""

    def __init__(self, name: str, parent: pytest.Collector, run: Run) -> None:
        super().__init__(name, parent)
        self._run = run

    def runtest(self) -> None:
        """Judge the case."""
        from nsa_verify.core.findings import Outcome
        from nsa_verify.engine.searcher import judge_after

        entry, pair, keeper = self._run
        if entry.before:
            keeper.renew()
        verdicts = judge_after(keeper, entry.before, entry.case, (pair,))
        if verdicts is None:
            raise KeyboardInterrupt
        verdict = verdicts[0]
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
