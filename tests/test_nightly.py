"""The nightly job: what the workflow runs is run here, with small budgets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from conftest import NO_GPU

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "nightly"
WORKFLOW = (ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8")
KINDS = ("night", "change", "weekly")

WRONG = """
from nsa_verify import implementation
from nsa_verify.kernels.vectorized import refresh as right

@implementation("wrong", modes=["decode"], extent="full")
def refresh(inputs, steps, setup):
    right(inputs, steps, setup)
    steps[0].cu_seqlens_k[-1:].add_(1)
"""


def nightly(folder: Path, kind: str, arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    own = {
        "PATH": path,
        "NSA_VERIFY_TIME": "6s" if NO_GPU else "30s",
        "NSA_VERIFY_ARGS": arguments,
        "NSA_VERIFY_SANITIZERS": "",
    }
    environment = {key: value for key, value in os.environ.items() if key != "GITHUB_STEP_SUMMARY"} | own | more
    return subprocess.run(
        [SCRIPT, *([kind] if kind else [])],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("kind", ["night", "change"])
def test_a_search_leaves_reports(kind: str, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    done = nightly(tmp_path, kind, "--only vectorized --executor eager -w 1", GITHUB_STEP_SUMMARY=str(summary))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = tmp_path / "reports"
    assert json.loads((reports / f"{kind}.json").read_text(encoding="utf-8"))["exit_code"] == 0
    assert ET.parse(reports / f"{kind}.xml").getroot().tag == "testsuites"
    assert "vectorized" in (reports / f"{kind}.html").read_text(encoding="utf-8")
    assert (reports / f"{kind}.ndjson").read_text(encoding="utf-8").count("\n") > 3
    assert "vectorized" in summary.read_text(encoding="utf-8")


def test_a_finding_is_its_exit_code_and_a_baseline_accepts_it(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    arguments = "--impl wrong.py --only wrong --executor eager -w 1"
    found = nightly(tmp_path, "change", arguments)
    assert found.returncode == 1, found.stdout + found.stderr
    (tmp_path / "baseline.toml").write_text(
        '[[accepted]]\nimplementation = "wrong"\nreason = "planted"\nexpires = 2999-01-01\n', encoding="utf-8"
    )
    accepted = nightly(tmp_path, "change", arguments)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    weekly = nightly(tmp_path, "weekly", "--impl wrong.py -w 1")
    assert weekly.returncode == 0, weekly.stdout + weekly.stderr
    assert "pairs of labels covered" in weekly.stdout


@pytest.mark.parametrize("kind", ["", "daily"])
def test_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    done = nightly(tmp_path, kind, "")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "give night, change or weekly" in done.stderr


def test_the_workflow_runs_the_script_and_nothing_else_of_ours() -> None:
    assert re.findall(r"run: (\.ci/\S+) \"\$KIND\"", WORKFLOW) == [".ci/nightly"]
    assert "nsa-verify fuzz" not in WORKFLOW
    assert f"options: [{', '.join(KINDS)}]" in WORKFLOW
    for kind in KINDS:
        assert f"'{kind}'" in WORKFLOW or f"default: {kind}" in WORKFLOW
    schedules = re.findall(r"cron: \"([^\"]+)\"", WORKFLOW)
    assert f"github.event.schedule == '{schedules[1]}' && 'weekly'" in WORKFLOW
    after = WORKFLOW.partition("name: Search")[2]
    search, _, propose = after.partition("\n  propose:\n")
    assert search.count("- name: ") == search.count("if: always()") == 2
    assert propose.count("if: always()") == 1
    assert "tools/bootstrap.py --extra test" in WORKFLOW


def test_nothing_that_a_pull_request_brings_runs_where_the_repository_can_be_written() -> None:
    before, _, propose = WORKFLOW.partition("\n  propose:\n")
    assert re.findall(r"^ *(?:contents|pull-requests): (\w+)", before, re.MULTILINE) == ["read"]
    assert re.findall(r"^ *(?:contents|pull-requests): (\w+)", propose, re.MULTILINE) == ["write", "write"]
    assert "github.event_name != 'pull_request'" in propose
    assert not re.search(r"\.ci/|tools/|nsa-verify (?:fuzz|replay|corpus)|make ", propose)


STUB = """#!/bin/sh
echo "$*" >> calls
case "$*" in *memcheck*) exit 1 ;; *racecheck*) exit 2 ;; *synccheck*) exit 1 ;; esac
"""


def test_the_weekly_job_runs_every_sanitizer_and_ends_with_the_gravest(tmp_path: Path) -> None:
    stub = tmp_path / "bin" / "nsa-verify"
    stub.parent.mkdir()
    stub.write_text(STUB, encoding="utf-8")
    stub.chmod(0o755)
    own = {"PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}", "NSA_VERIFY_SANITIZER_ARGS": "--impl mine.py"}
    own |= {"NSA_VERIFY_ARGS": "-w 1"}
    environment = {key: value for key, value in os.environ.items() if key != "NSA_VERIFY_SANITIZERS"} | own
    done = subprocess.run([SCRIPT, "weekly"], cwd=tmp_path, env=environment, timeout=30, check=False)
    assert done.returncode == 2
    tools = ("memcheck", "initcheck", "racecheck", "synccheck")
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls == ["fuzz --mode prune -w 1", *(f"replay --sanitizer {it} --impl mine.py" for it in tools)]


def test_the_weekly_job_ends_when_it_is_interrupted(tmp_path: Path) -> None:
    stub = tmp_path / "bin" / "nsa-verify"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$*" >> calls\nexit 130\n', encoding="utf-8")
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([SCRIPT, "weekly"], cwd=tmp_path, env=environment, timeout=30, check=False)
    assert done.returncode == 130
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "fuzz --mode prune\n"
