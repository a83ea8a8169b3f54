"""The command in this process, and implementations written for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from click.testing import CliRunner, Result

from nsa_verify import Case, Code, Mode, Replay, Request, Setup
from nsa_verify.core import implementation as declaring
from nsa_verify.core.registry import load_builtin
from nsa_verify.engine import searcher, worker
from nsa_verify.engine.corpus import Entry, Kind, Provenance, SavedFinding, save
from nsa_verify.engine.plan import Plan
from nsa_verify.kernels import BACKEND_ROWS, BUILTIN_MODULES
from nsa_verify.shell.cli import cli

PROGRAM = shutil.which("nsa-verify", path=sysconfig.get_path("scripts")) or "nsa-verify"
DECODE = """
import torch
from nsa_verify import Mode, implementation

@implementation({name!r}, modes=[Mode.DECODE], extent="full")
def refresh(inputs, steps, setup):
    lens = inputs.seq_lens[: inputs.batch_size].to(torch.int32)
    for step in steps:
        step.cache_seqlens.copy_(lens)
        step.nsa_cache_seqlens.copy_(lens.clamp(max=setup.index_topk - {too_low}))
        for sums, of in (step.cu_seqlens_k, lens), (step.nsa_cu_seqlens_k, step.nsa_cache_seqlens):
            sums[:1].zero_()
            sums[1:] = of.cumsum(0)
        slots = inputs.req_to_token[inputs.req_pool_indices[: inputs.batch_size].long(), : setup.table_width]
        step.page_table_1.copy_(slots)
        if setup.page_size > 1:
            step.real_page_table.copy_(slots[:, :: setup.page_size] // setup.page_size)
"""
"""An implementation of DECODE; its minimum with the top-k is ``too_low``."""


def started(
    *arguments: str, stdout: int | IO[str] = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """A command in a process group of its own, which hears a signal together with its workers; it tells at once."""
    return subprocess.Popen(
        [PROGRAM, *arguments],
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def written(folder: Path, name: str = "short-top-k", too_low: int = 1, file: str = "mine.py") -> Path:
    """A file that registers ``DECODE`` under ``name``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    path.write_text(DECODE.format(name=name, too_low=too_low), encoding="utf-8")
    return path


def plan_of(folder: Path, cases: int) -> Plan:
    """A plan over ``short-top-k``, written into ``folder``, and a right implementation."""
    references = (str(written(folder)),)
    return Plan(
        seed=7,
        max_examples=cases,
        references=references,
        only=("short-top-k", "vectorized"),
        executors=("eager",),
    )


def saved(folder: Path, seq_len: int = 8, implementation: str = "short-top-k", mode: Mode = Mode.DECODE) -> Path:
    """A case of the corpus of ``folder``, as ``run`` saves it; in DECODE and from 8 tokens on ``short-top-k`` fails."""
    setup = Setup(table_width=max(8, seq_len), pool_width=max(8, seq_len) + (mode is Mode.TARGET_VERIFY))
    entry = Entry(
        title="written for a test",
        case=Case(setup=setup, replays=(Replay(mode=mode, requests=(Request(seq_len=seq_len),)),)),
        finding=SavedFinding(
            implementation=implementation,
            executor="eager",
            code=Code.WRONG_VALUE,
            replay=0,
            mode=mode,
            message="8 is expected",
        ),
        provenance=Provenance(seed=7, impl=("mine.py",)),
    )
    return save(folder / "corpus", Kind.CRASHING, entry, f"nv101-{implementation}")


@contextmanager
def registry_of_its_own() -> Iterator[None]:
    """Built-in implementations alone, for others may end this process; what is registered inside is forgotten."""
    load_builtin()
    before = declaring.registered()
    sys.modules.pop(BACKEND_ROWS, None)  # so that it registers its rows when it is asked for
    for name in [it for it, found in before.items() if found.refresh.__module__ not in BUILTIN_MODULES]:
        del declaring._registered[name]
    searcher.close()
    worker.prepare.cache_clear()
    try:
        yield
    finally:
        for name in [it for it in sys.modules if it.startswith("nsa_verify_impl_") or it == BACKEND_ROWS]:
            del sys.modules[name]
        declaring._registered.clear()
        declaring._registered.update(before)
        searcher.close()
        worker.prepare.cache_clear()


def graph_executor() -> str:
    """The name of the executor that captures graphs on this machine."""
    from nsa_verify.device.select import resolve

    return worker.drivers(resolve("auto"), ())[-1].name


def executor_of_another_device() -> tuple[str, str]:
    """One that this machine's device does not have, and the sentence that refuses it."""
    from nsa_verify.device.executors import EXECUTORS
    from nsa_verify.device.select import resolve

    here, graph = resolve("auto"), graph_executor()
    name, needs = next((name, it.device) for name, it in EXECUTORS.items() if it.device not in (None, here))
    return name, f"--executor {name}: needs {needs} and not {here}; here are eager, {graph}"


def invoke(*arguments: object) -> Result:
    """Run ``nsa-verify`` in this process, with a registry of its own."""
    with registry_of_its_own():
        return CliRunner().invoke(cli, [str(it) for it in arguments], prog_name="nsa-verify")


class Ended(Protocol):
    """What a command gave: click's ``Result``, or whatever says the same."""

    @property
    def exit_code(self) -> int: ...
    @property
    def stderr(self) -> str: ...
    @property
    def output(self) -> str: ...


def refused(result: Ended) -> str:
    """The one sentence on standard error of a command that could not do its job."""
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.output
    return result.stderr.removeprefix("Error: ").rstrip("\n")
