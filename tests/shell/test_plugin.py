"""The pytest plugin: saved cases are items, and nothing happens in a project that has none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shell.commands import (
    executor_of_another_device,
    graph_executor,
    invoke,
    registry_of_its_own,
    saved,
    written,
)

from nsa_verify.core.registry import load, load_builtin
from nsa_verify.engine.plan import ROUND_CASES, Plan
from nsa_verify.engine.searcher import run_rounds

pytest_plugins = ("pytester",)

PLAIN = ("-p", "no:cacheprovider", "-p", "no:benchmark")
"""Other plugins of the machine stay out of what inner runs print."""

# An inner run in this process forgets what it imported, and torch cannot be imported twice.
load_builtin()

EAGER = ("--nsa-executor", "eager")
ELSEWHERE, REFUSED = executor_of_another_device()


@pytest.fixture(name="inner")
def _inner(folder: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project beside which pytest runs, in this process."""
    for name in ("PYTEST_ADDOPTS", "NSA_VERIFY_CORPUS", "NSA_VERIFY_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(pytester.path)
    return pytester


def _run(inner: pytest.Pytester, *arguments: object) -> pytest.RunResult:
    with registry_of_its_own():
        return inner.runpytest_inprocess(*PLAIN, *(str(it) for it in arguments))


def _collected(result: pytest.RunResult) -> list[str]:
    return [line.rpartition("::")[2] for line in result.outlines if "::" in line]


def test_a_file_gives_an_item_per_implementation(inner: pytest.Pytester) -> None:
    stems = sorted(saved(inner.path, seq_len).stem for seq_len in (8, 9, 10))
    result = _run(inner, "--nsa-corpus", "corpus", "--collect-only", "-q", *EAGER)
    assert result.ret == 0
    # In the order of the matrix, whichever module some other test imported first.
    names = [name for name in load() if f"{stems[0]}[{name}]" in _collected(result)]
    assert names[:5] == ["python-loop", "vectorized", "triton-fused", "triton-inplace", "precomputed-copy"]
    assert _collected(result) == [f"{stem}[{name}]" for stem in stems for name in names]


def test_an_item_per_executor_that_is_applicable(inner: pytest.Pytester) -> None:
    stem, graph = saved(inner.path).stem, graph_executor()
    written(inner.path)
    two = ("--nsa-only", "python-loop", "--nsa-only", "vectorized")
    every = _run(inner, "--nsa-corpus", "corpus", *two, "-v")
    every.assert_outcomes(passed=3)
    items = [f"{stem}[python-loop]", f"{stem}[vectorized]", f"{stem}[vectorized-{graph}]"]
    every.stdout.fnmatch_lines([f"*::{item.replace('[', '[[]')} PASSED*" for item in items])
    captured = _run(inner, "--nsa-corpus", "corpus", *two, "--nsa-executor", graph, "--collect-only", "-q")
    assert _collected(captured) == items[2:]
    wrong = _run(inner, "--nsa-corpus", "corpus", "--nsa-impl", "mine.py", "--nsa-only", "short-top-k")
    wrong.assert_outcomes(failed=2)
    wrong.stdout.fnmatch_lines([f"*_ {stem}[[]short-top-k-{graph}] _*", f"short-top-k [[]{graph}] NV101 wrong value *"])


def test_graphs_are_closed_when_the_session_ends(inner: pytest.Pytester) -> None:
    from nsa_verify.device import rig

    saved(inner.path)
    inner.makeconftest(
        "from nsa_verify.device import rig\n"
        "import pytest\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_sessionfinish():\n"
        "    print('kept', len(rig._RIGS))\n"
    )
    result = _run(inner, "--nsa-corpus", "corpus", "--nsa-only", "vectorized", "-s", "--nsa-no-isolation")
    result.assert_outcomes(passed=2)
    result.stdout.re_match_lines([".*kept [1-9]"])
    assert not rig._RIGS


@pytest.mark.parametrize("how", ["option", "variable", "ini"])
def test_how_a_corpus_is_named(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    stem = saved(inner.path).stem
    (inner.path / "corpus/note.json.txt").write_text("{")
    (inner.path / "other.json").write_text("{")
    arguments = ["--nsa-corpus", "corpus"] if how == "option" else []
    if how == "variable":
        monkeypatch.setenv("NSA_VERIFY_CORPUS", "corpus")
    if how == "ini":
        inner.makeini("[pytest]\nnsa_corpus = corpus\n")
    result = _run(inner, *arguments, "--collect-only", "-q", "--nsa-only", "vectorized", *EAGER)
    assert _collected(result) == [f"{stem}[vectorized]"]


def test_a_corpus_elsewhere_is_collected_beside_what_was_asked_for(inner: pytest.Pytester, folder: Path) -> None:
    stem = saved(folder / "elsewhere").stem
    inner.makepyfile("def test_mine():\n    pass\n")
    result = _run(inner, "--nsa-corpus", folder / "elsewhere/corpus", "--nsa-only", "vectorized", "-v", *EAGER)
    assert result.ret == 0
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*::test_mine PASSED*", f"*::{stem}[[]vectorized] PASSED*"])


def test_a_failure_shows_the_case_and_no_traceback(inner: pytest.Pytester) -> None:
    path = saved(inner.path)
    written(inner.path)
    (path.parent / "damaged.json").write_text(path.read_text()[:100])
    only = ("--nsa-only", "short-top-k", "--nsa-only", "vectorized", *EAGER)
    result = _run(inner, "--nsa-corpus", "corpus", "--nsa-impl", "mine.py", *only)
    assert result.ret == 1
    result.assert_outcomes(passed=1, failed=2)
    text = result.stdout.str()
    assert "Traceback" not in text
    assert "pytest_plugin.py" not in text
    result.stdout.fnmatch_lines(
        [
            "*_ damaged _*",
            "*/damaged.json: not valid JSON, perhaps truncated, at line * restore or remove it",
            f"*_ {path.stem}[[]short-top-k] _*",
            "written for a test",
            "short-top-k [[]eager] NV101 wrong value in the live region",
            "setup   N=1 K=8 p=1 W=8 pool=1x8 buckets=1 steps=1 fill=1",
            "replay 1 of 1: decode, bucket 1  <- disagrees",
            "        row  seq_len  pool_row",
            "        0    8        0",
            "replay 1, step 0, 1 wrong cell: nsa_cache_seqlens[[]0]: expected 8, got 7",
            "        expected  8",
            "        got       7",
        ]
    )


def test_an_unknown_verdict_fails(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.device.judge import Judge

    monkeypatch.setattr(Judge, "_check_oracle", lambda _: "the oracle contradicts itself")
    saved(inner.path)
    result = _run(inner, "--nsa-corpus", "corpus", "--nsa-only", "vectorized", *EAGER, "--nsa-no-isolation")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["unknown: the oracle contradicts itself"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--nsa-only", "warp"),
            "--nsa-only warp: no such implementation; there are onepass, precomputed-batched-copy, precomputed-copy,*",
        ),
        (("--nsa-impl", "nowhere.py"), "--nsa-impl nowhere.py: there is no such file"),
        (("--nsa-device", "cuda"), "--nsa-device cuda: PyTorch sees no CUDA device here; *"),
        (("--nsa-executor", ELSEWHERE), REFUSED.replace("--", "--nsa-")),
    ],
)
def test_options_that_cannot_be_met(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str
) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU, and it is the worker that asks")
    saved(inner.path)
    result = _run(inner, "--nsa-corpus", "corpus", *arguments)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([sentence])
    assert "Traceback" not in result.stdout.str()
    assert "pytest_plugin.py" not in result.stdout.str()


def test_a_part_of_the_corpus_is_collected_alone(inner: pytest.Pytester) -> None:
    stem = saved(inner.path).stem
    other = saved(inner.path / "elsewhere")
    moved = inner.path / "corpus" / "seeds" / other.name
    moved.parent.mkdir(parents=True)
    other.rename(moved)
    arguments = ("--nsa-corpus", "corpus", "--nsa-only", "vectorized", *EAGER, "corpus/crashing")
    result = _run(inner, "--collect-only", "-q", *arguments)
    assert _collected(result) == [f"{stem}[vectorized]"]


def test_a_case_that_nobody_can_run_is_skipped_and_says_so(inner: pytest.Pytester) -> None:
    (inner.path / "verify_only.py").write_text(
        "from nsa_verify import Mode, implementation\n"
        "@implementation('verify-only', modes={Mode.TARGET_VERIFY})\n"
        "def refresh(inputs, steps, setup): ...\n"
    )
    saved(inner.path)
    result = _run(inner, "--nsa-corpus", "corpus", "--nsa-impl", "verify_only.py", "--nsa-only", "verify-only", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["*no implementation is applicable; choose others with --nsa-only, --nsa-impl or --nsa-executor"]
    )


def test_a_corpus_that_is_not_there(inner: pytest.Pytester) -> None:
    result = _run(inner, "--nsa-corpus", "nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --nsa-corpus nowhere: there is no such folder"])


PLAN = Plan(seed=11, max_examples=ROUND_CASES + 4, only=("vectorized",), isolate=True)
RECORD = """
import json, os
from pathlib import Path
import pytest
from nsa_verify.engine.plan import ROUND_CASES, Plan
from nsa_verify.engine.searcher import run_rounds

@pytest.mark.parametrize("index", range(2))
def test_round(index):
    plan = Plan(seed=11, max_examples=ROUND_CASES + 4, only=("vectorized",), isolate=True)
    (result,) = run_rounds(plan, [index])
    told = [result.digests, os.environ["PYTEST_XDIST_WORKER"]]
    Path(f"round{index}.json").write_text(json.dumps(told))
"""


def test_two_pytest_workers_see_what_one_process_sees(folder: Path) -> None:
    (folder / "test_rounds.py").write_text(RECORD)
    stems = sorted(saved(folder, seq_len).stem for seq_len in (8, 9))
    command = [sys.executable, "-P", "-m", "pytest", *PLAIN, "-v", "-n", "2", "--dist", "each"]
    done = subprocess.run(
        [*command, "--nsa-corpus", "corpus", "--nsa-only", "vectorized", "--nsa-only", "python-loop"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    passed: dict[str, list[str]] = {"gw0": [], "gw1": []}
    for worker, item in re.findall(r"^\[(gw\d)\] .* PASSED .*::(\S+) *$", done.stdout, flags=re.MULTILINE):
        passed[worker].append(item)
    names = ("python-loop", "vectorized", f"vectorized-{graph_executor()}")
    wanted = [f"{stem}[{name}]" for stem in stems for name in names]
    assert passed == {worker: [*wanted, "test_round[0]", "test_round[1]"] for worker in passed}
    with registry_of_its_own():
        digests = [run_rounds(PLAN, [index])[0].digests for index in range(PLAN.rounds)]
    assert digests == [json.loads((folder / f"round{index}.json").read_text())[0] for index in range(2)]


def test_the_command_and_the_plugin_agree(inner: pytest.Pytester) -> None:
    saved(inner.path)
    written(inner.path)
    command = invoke("replay", "--impl", "mine.py", "--only", "short-top-k")
    result = _run(inner, "--nsa-corpus", "corpus", "--nsa-impl", "mine.py", "--nsa-only", "short-top-k")
    assert (command.exit_code, result.ret) == (1, 1)
    shown = [line.strip() for line in command.stdout.splitlines() if line.startswith("    ")]
    assert set(shown) <= {line.strip() for line in result.outlines}
