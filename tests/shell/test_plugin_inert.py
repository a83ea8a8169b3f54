"""The pytest plugin does nothing to projects that do not use it, and binds workers to GPUs in those that do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import pytest

RECORDER = """
import json, os, sys
from pathlib import Path

def pytest_sessionfinish(session):
    worker = getattr(session.config, "workerinput", {}).get("workerid", "main")
    seen = {"modules": sorted(sys.modules), "environ": dict(os.environ)}
    Path(f"seen-{worker}.txt").write_text(json.dumps(seen))
"""
"""A conftest that writes down what each process has imported, and its environment, when its session ends."""
FAILING = "import pytest\n\ndef test_that_fails():\n    assert {'a': 1} == {'a': 2}\n"
PASSING = "import warnings\n\ndef test_one():\n    warnings.warn('mine')\n\ndef test_two():\n    pass\n"
SLOW = pytest.mark.slow
HEAVY = (
    *("torch", "triton", "hypothesis", "numpy", "rich", "pynvml"),
    *("nsa_verify.shell.gpus", "nsa_verify.engine", "nsa_verify.device"),
)
OURS = "nsa_verify.shell.pytest_plugin"
INHERITED = r"PATH|HOME|TMPDIR|LANG|LC_ALL|PYTHONPATH|LD_LIBRARY_PATH|CUDA_\w+|NSA_VERIFY_\w+|PYTEST_\w+"


class Seen(NamedTuple):
    """What a run printed, less times; and of each of its processes what it imported and its environment."""

    code: int
    text: str
    imported: dict[str, set[str]]
    environ: dict[str, dict[str, str]]

    def heavy(self) -> dict[str, list[str]]:
        """What of ``HEAVY`` the processes imported."""
        return {process: [it for it in HEAVY if it in names] for process, names in self.imported.items()}


@pytest.fixture(name="project")
def _project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that has nothing to do with us, with JSON files of all sorts, and an environment without pytest's."""
    for name in [it for it in os.environ if it.startswith(("PYTEST_", "NSA_VERIFY_"))]:
        monkeypatch.delenv(name)
    (folder / "conftest.py").write_text(RECORDER)
    (folder / "corpus").mkdir()
    for name, text in ("data.json", "{"), ("corpus/case.json", '{"format": 1}'), ("corpus/.hidden.json", ""):
        (folder / name).write_text(text)
    return folder


def _pytest(project: Path, *arguments: str) -> Seen:
    """Run pytest on the project, with what plugins there are besides ours and pytest-xdist left out."""
    others = {it.name for it in entry_points(group="pytest11")} - {"nsa_verify", "xdist", "xdist.looponfail"}
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider"]
    command += [it for name in sorted(others) for it in ("-p", f"no:{name}")]
    for path in project.glob("seen-*.txt"):
        path.unlink()
    # Not the environment of this process, to which the plugin may have done the very thing that is looked for.
    environ = {name: value for name, value in os.environ.items() if re.fullmatch(INHERITED, name)}
    done = subprocess.run([*command, *arguments], cwd=project, capture_output=True, text=True, check=False, env=environ)
    times = r"in \d+\.\d+s(?: \(.*?\))?|(?<==) *=+|^plugins: .*\n"
    text = re.sub(times, "", done.stdout, flags=re.MULTILINE) + done.stderr
    seen = {path.stem.removeprefix("seen-"): json.loads(path.read_text()) for path in project.glob("seen-*.txt")}
    return Seen(
        done.returncode,
        text,
        {process: set(it["modules"]) for process, it in seen.items()},
        {process: {k: v for k, v in it["environ"].items() if k[:7] != "PYTEST_"} for process, it in seen.items()},
    )


NO_XDIST = ("-p", "no:xdist", "-p", "no:xdist.looponfail")


@pytest.mark.parametrize(
    ("tests", "arguments", "processes"),
    [
        (FAILING, (), {"main"}),
        (FAILING, ("-v", "-ra", "--collect-only", "."), {"main"}),
        (PASSING, NO_XDIST, {"main"}),
        (PASSING, ("-n", "2"), {"main", "gw0", "gw1"}),
        (PASSING, ("-n", "auto", "--maxprocesses", "1"), {"main", "gw0"}),
    ],
    ids=["plain", "collected", "no-xdist", "two", "auto"],
)
def test_inert(project: Path, tests: str, arguments: tuple[str, ...], processes: set[str]) -> None:
    (project / "test_theirs.py").write_text(tests)
    with_us = _pytest(project, *arguments)
    without = _pytest(project, *arguments, "-p", "no:nsa_verify")
    assert with_us.text == without.text
    assert with_us.code == without.code
    assert set(with_us.imported) == set(without.imported) == processes
    assert with_us.environ == without.environ
    assert with_us.heavy() == {process: [] for process in processes}
    for process, names in with_us.imported.items():
        assert OURS in names, "the plugin is installed"
        assert OURS not in without.imported[process]


def test_what_a_corpus_brings_is_seen(project: Path) -> None:
    (project / "test_theirs.py").write_text(PASSING)
    with (project / "conftest.py").open("a") as file:
        file.write("from nsa_verify.shell import gpus\ngpus.version = lambda _: '2.13.0+cu130'\n")
    used = _pytest(project, "-n", "1", "--nsa-corpus", "corpus")
    assert used.code == 1
    assert "case.json" in used.text
    assert used.heavy() == {
        "main": ["pynvml", "nsa_verify.shell.gpus"],
        "gw0": ["nsa_verify.shell.gpus", "nsa_verify.engine"],
    }


GPUS = """
from nsa_verify.shell import gpus
import os
from pathlib import Path

def _boards():
    with Path("asked.txt").open("a") as file:
        file.write(os.environ.get("PYTEST_XDIST_WORKER", "main") + "\\n")
    return tuple(gpus.Board(f"GPU-{name}", "H200", free * 2**30) for name, free in ROOM.items())

ROOM = {rooms}
gpus.read_boards = _boards
gpus.version = lambda _: "2.13.0+cu130"
gpus.cores = lambda: 5
"""
"""What a conftest adds for a machine with GPUs that NVML would list with so much free memory, and with five cores."""
IDLE = "{'a': 9, 'b': 9}"


@pytest.fixture(name="on_gpus")
def _on_gpus(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with an empty corpus on a machine with two GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (project / "corpus/case.json").unlink()
    (project / "conftest.py").write_text(RECORDER + GPUS.replace("{rooms}", IDLE))
    (project / "test_theirs.py").write_text("def test_one():\n    pass\n")
    return project


CORPUS = ("--nsa-corpus", "corpus")


def _pins(seen: Seen) -> dict[str, str | None]:
    return {process: environ.get("CUDA_VISIBLE_DEVICES") for process, environ in sorted(seen.environ.items())}


def test_workers_of_pytest_are_bound_by_turns(on_gpus: Path) -> None:
    seen = _pytest(on_gpus, "-n", "auto", *CORPUS)
    assert _pins(seen) == {"gw0": "0", "gw1": "1", "gw2": "0", "gw3": "1", "gw4": "0", "main": None}
    assert set((on_gpus / "asked.txt").read_text().split()) == {"main"}
    assert seen.code == 0


def test_the_words_of_the_caller_are_kept_and_full_gpus_left_out(
    on_gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-c,GPU-b,GPU-a")
    (on_gpus / "conftest.py").write_text(RECORDER + GPUS.replace("{rooms}", "{'a': 5, 'b': 1, 'c': 9}"))
    (on_gpus / "pytest.ini").write_text("[pytest]\nnsa_corpus = corpus\n")
    seen = _pytest(on_gpus, "-n", "4")
    listed = "GPU-c,GPU-b,GPU-a"
    assert _pins(seen) == {"gw0": "GPU-c", "gw1": "GPU-a", "gw2": "GPU-c", "gw3": "GPU-a", "main": listed}


def test_a_worker_with_a_list_of_its_own_keeps_to_it(on_gpus: Path) -> None:
    seen = _pytest(on_gpus, "--dist", "load", "--tx", "2*popen//env:CUDA_VISIBLE_DEVICES=1", *CORPUS)
    assert _pins(seen) == {"gw0": "1", "gw1": "1", "main": None}


HOOK = "\ndef pytest_xdist_auto_num_workers(config):\n    return 3\n"


@pytest.mark.parametrize(
    ("arguments", "variables", "hook", "workers"),
    [
        (CORPUS, {}, "", 5),
        (CORPUS, {"CUDA_VISIBLE_DEVICES": "1"}, "", 4),
        ((*CORPUS, "--nsa-workers", "2"), {"NSA_VERIFY_WORKERS": "3"}, HOOK, 2),
        pytest.param((*CORPUS, "--nsa-workers", "auto"), {"NSA_VERIFY_WORKERS": "3"}, "", 5, marks=SLOW),
        ((), {"NSA_VERIFY_CORPUS": "corpus", "NSA_VERIFY_WORKERS": "2"}, "", 2),
        pytest.param((*CORPUS, "--nsa-workers", "2"), {"PYTEST_XDIST_AUTO_NUM_WORKERS": "1"}, "", 1, marks=SLOW),
        (CORPUS, {}, HOOK, 3),
        pytest.param((*CORPUS, "--nsa-device", "cpu"), {}, HOOK, 3, marks=SLOW),
    ],
)
def test_what_auto_means(
    on_gpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    hook: str,
    workers: int,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (on_gpus / "conftest.py").open("a") as file:
        file.write(hook)
    seen = _pytest(on_gpus, "-n", "auto", *arguments)
    assert set(seen.imported) == {"main", *(f"gw{index}" for index in range(workers))}
    if "cpu" in arguments:
        assert set(_pins(seen).values()) == {None}


@pytest.mark.parametrize(
    ("arguments", "variable", "sentence"),
    [
        (("--nsa-workers", "0"), "", "--nsa-workers 0"),
        ((), "many", "NSA_VERIFY_WORKERS=many"),
    ],
)
def test_a_number_of_workers_that_makes_no_sense(
    on_gpus: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], variable: str, sentence: str
) -> None:
    monkeypatch.setenv("NSA_VERIFY_WORKERS", variable)
    seen = _pytest(on_gpus, "-n", "auto", *CORPUS, *arguments)
    assert seen.code == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {sentence}: must be a number from 1 to 256, or auto\n" in seen.text
    assert "Traceback" not in seen.text


@pytest.mark.parametrize(
    ("filters", "said"), [("default", "PytestConfigWarning: this process uses"), ("error", "gw0: this process uses")]
)
def test_too_late_to_bind_is_said_in_one_sentence(on_gpus: Path, filters: str, said: str) -> None:
    with (on_gpus / "conftest.py").open("a") as file:
        file.write("gpus.uses_cuda = lambda: True\n")
    seen = _pytest(on_gpus, "-n", "1", *CORPUS, "-W", filters)
    assert (seen.code, _pins(seen)) == (0, {"gw0": None, "main": None})
    assert seen.text.count(said) == seen.text.count("uses CUDA already") == 1
    assert "Traceback" not in seen.text
