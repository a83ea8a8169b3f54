"""The nightly job: what the workflow runs is run here, with small budgets."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import Result
from conftest import NO_GPU
from shell.commands import invoke, refused, saved

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Code, Finding, Outcome, Verdict
from nsa_verify.core.sanitizers import Sanitizer
from nsa_verify.engine.corpus import load
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.replaying import Replayed, Status
from nsa_verify.shell import replay_command
from nsa_verify.shell.sanitizing import interruptible

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
        "NSA_VERIFY_TIME": "3s" if NO_GPU else "30s",
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


@pytest.mark.parametrize("kind", ["night", pytest.param("change", marks=pytest.mark.slow)])
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
    assert re.findall(r"run: exec (\.ci/\S+) \"\$KIND\"", WORKFLOW) == [".ci/nightly"]
    assert re.findall(r"nsa-verify (?:fuzz|replay|corpus \w+)", WORKFLOW) == ["nsa-verify corpus merge"]
    assert f"options: [{', '.join(KINDS)}]" in WORKFLOW
    for kind in KINDS:
        assert f"'{kind}'" in WORKFLOW or f"default: {kind}" in WORKFLOW
    schedules = re.findall(r"cron: \"([^\"]+)\"", WORKFLOW)
    assert f"github.event.schedule == '{schedules[1]}' && 'weekly'" in WORKFLOW
    page = (ROOT / "docs" / "nightly.md").read_text(encoding="utf-8")
    for schedule, kind in zip(schedules, ("night", "weekly"), strict=True):
        assert re.search(rf"^{re.escape(schedule)} .* \.ci/nightly {kind} ", page, re.MULTILINE)
        assert f"nsa-verify@{kind}.timer`" in page
    after = WORKFLOW.partition("name: Search")[2]
    search, _, propose = after.partition("\n  propose:\n")
    assert search.count("- name: ") == search.count("if: always()") == 2
    assert propose.count("always()") == 1
    assert "tools/bootstrap.py --extra test" in WORKFLOW


@cache
def parsed() -> dict[Any, Any]:
    """The workflow as GitHub reads it."""
    yaml = pytest.importorskip("yaml", reason="needs PyYAML, which `make lint` installs")
    workflow: dict[Any, Any] = yaml.safe_load(WORKFLOW)
    return workflow


def test_nothing_that_a_pull_request_brings_runs_where_the_repository_can_be_written() -> None:
    workflow = parsed()
    search, propose = workflow["jobs"]["search"], workflow["jobs"]["propose"]
    assert workflow["permissions"] == {"contents": "read"}
    assert "permissions" not in search
    assert propose["permissions"] == {"contents": "write", "pull-requests": "write"}
    assert propose["runs-on"] == "ubuntu-latest"
    assert "github.event_name != 'pull_request'" in propose["if"]
    text = WORKFLOW.partition("\n  propose:\n")[2]
    assert not re.search(r"\.ci/|tools/|nsa-verify (?:fuzz|replay|corpus)|make ", text)


def test_what_a_fork_brings_does_not_run_on_our_machine() -> None:
    search = parsed()["jobs"]["search"]
    assert "self-hosted" in search["runs-on"]
    ours = "github.event.pull_request.head.repo.full_name == github.repository"
    assert search["if"] == f"github.event_name != 'pull_request' || {ours}"
    assert search["steps"][0]["with"]["persist-credentials"] is False


def test_a_pull_request_is_searched_for_whatever_can_change_a_verdict() -> None:
    on = parsed()[True]  # YAML takes the word for a truth
    paths = on["pull_request"]["paths"]
    for path in paths:
        assert (ROOT / path.removesuffix("/**")).exists() or path == "baseline.toml"
    assert {"kernels/**", "nsa_verify/**", "strategies/**", "corpus/**", ".ci/**"} < set(paths)
    assert {"pyproject.toml", "constraints.txt", ".github/workflows/nightly.yml"} < set(paths)


def commands(job: str, step: str) -> str:
    """What a step of the workflow runs."""
    (found,) = (it["run"] for it in parsed()["jobs"][job]["steps"] if it.get("name", "").startswith(step))
    return str(found)


def planted(folder: Path, **programs: str) -> dict[str, str]:
    """Scripts of a shell in the place of programs; the environment that has them, and a summary as on GitHub."""
    for name, text in programs.items():
        path = folder / "bin" / name.replace("_", "-")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
        path.chmod(0o755)
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("NSA_VERIFY_", "GIT_"))}
    ours |= {"GIT_CONFIG_GLOBAL": os.devnull, "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    return ours | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


STUB = """echo "$*" >> calls
echo said
echo failed >&2
case "$*" in *memcheck*) exit 1 ;; *racecheck*) exit 2 ;; *synccheck*) exit 1 ;; esac
"""


def test_the_weekly_job_runs_every_sanitizer_and_ends_with_the_gravest(tmp_path: Path) -> None:
    environment = planted(tmp_path, nsa_verify=STUB)
    environment |= {"NSA_VERIFY_SANITIZER_ARGS": "--impl mine.py\n", "NSA_VERIFY_ARGS": "-w 1\n--impl mine.py\n"}
    # Its pipe is at its end when everything that was started is.
    done = subprocess.run(
        [SCRIPT, "weekly"], cwd=tmp_path, env=environment, timeout=30, check=False, stdout=subprocess.PIPE
    )
    assert done.returncode == 2
    tools = ("memcheck", "initcheck", "racecheck", "synccheck")
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    reports = "--report json=reports/weekly-{}.json --report github"
    replays = [f"replay --sanitizer {it} {reports.format(it)} --impl mine.py" for it in tools]
    assert calls == ["fuzz --mode prune -w 1 --impl mine.py", *replays]
    assert (tmp_path / "reports" / "weekly.txt").read_text(encoding="utf-8") == "said\nfailed\n" * 5


def test_what_prune_would_refuse_is_kept_from_it(tmp_path: Path) -> None:
    environment = planted(tmp_path, nsa_verify='echo "$*" >> calls\n')
    environment |= {"NSA_VERIFY_ARGS": "--engine ray", "NSA_VERIFY_PRUNE_ARGS": "", "NSA_VERIFY_SANITIZERS": ""}
    for kind in ("night", "weekly"):
        subprocess.run([SCRIPT, kind], cwd=tmp_path, env=environment, timeout=30, check=True)
    night, weekly = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert night.endswith(" --engine ray")
    assert weekly == "fuzz --mode prune"


def test_the_weekly_job_ends_when_it_is_interrupted(tmp_path: Path) -> None:
    environment = planted(tmp_path, nsa_verify='echo "$*" >> calls\nexit 130\n')
    done = subprocess.run([SCRIPT, "weekly"], cwd=tmp_path, env=environment, timeout=30, check=False)
    assert done.returncode == 130
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "fuzz --mode prune\n"


UNTIL_ENDED = """case "$*" in *prune*) exit 0 ;; esac
for it; do case $it in json=*) report=${it#json=} ;; esac; done
trap 'echo interrupted > "$report"; exit 130' INT TERM
echo "$*" >> calls
while :; do sleep 0.02; done
"""


@pytest.mark.parametrize(("kind", "report"), [("night", "night"), ("change", "change"), ("weekly", "weekly-memcheck")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_ends_the_shell_of_the_step_ends_what_it_runs(
    kind: str, report: str, number: signal.Signals, tmp_path: Path
) -> None:
    environment = planted(tmp_path, nsa_verify=UNTIL_ENDED) | {"KIND": kind}
    (tmp_path / "step.sh").write_text(commands("search", "Search"), encoding="utf-8")
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "nightly").symlink_to(SCRIPT)
    calls, shell = tmp_path / "calls", ["bash", "-e", "step.sh"]  # as GitHub's runner does
    with subprocess.Popen(shell, cwd=tmp_path, env=environment, start_new_session=True) as process:
        try:
            deadline_s = time.monotonic() + 30
            while not calls.exists() and time.monotonic() < deadline_s:
                time.sleep(0.01)
            process.send_signal(number)
            assert process.wait(30) == 130
        finally:
            with suppress(ProcessLookupError):  # what the shell left behind, too
                os.killpg(process.pid, signal.SIGKILL)
    assert calls.read_text(encoding="utf-8").count("\n") == 1
    assert (tmp_path / "reports" / f"{report}.json").read_text(encoding="utf-8") == "interrupted\n"


class Repository:
    """A repository of ours with a corpus, and what the steps of the workflow make of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.origin = folder, folder / "origin"
        merge = 'echo "$*" >> calls\ncp -rn "$3"/. corpus\n'
        asked = f'echo "$*" >> {folder}/asked\ntest "$2" != list || cat {folder}/open\n'
        self.environment = planted(folder, nsa_verify=merge, gh=asked) | {"PROPOSED": parsed()["env"]["PROPOSED"]}
        self.git(folder, "init", "-q", "--bare", "-b", "main", "origin")
        start = self.clone("start")
        for name in ("seeds/decode/a", "crashing/decode/old", "regression/decode/mended"):
            self.write(start, f"corpus/{name}.json")
        self.write(start, "corpus/README.md")
        self.git(start, "add", "-A")
        self.git(start, "-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "all")
        self.git(start, "push", "-q", "origin", "HEAD:main")

    def git(self, where: Path, *words: str) -> str:
        told = subprocess.run(
            ["git", *words], cwd=where, env=self.environment, capture_output=True, text=True, check=True
        )
        return told.stdout

    def clone(self, name: str) -> Path:
        self.git(self.folder, "clone", "-q", "origin", name)
        return self.folder / name

    def write(self, where: Path, name: str, text: str = "{}\n") -> None:
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text, encoding="utf-8")

    def step(self, where: Path, job: str, name: str) -> int:
        """Its exit code, run as GitHub's runner does."""
        temporary = where.with_suffix(".temporary")
        temporary.mkdir(exist_ok=True)
        environment = self.environment | {"RUNNER_TEMP": str(temporary)}
        words = ["bash", "-e", "-c", commands(job, name)]
        return subprocess.run(words, cwd=where, env=environment, check=False).returncode

    def propose(self, name: str, searched: Path, already: int = 0) -> int:
        """What the second job does with the corpus of the first; its exit code."""
        (self.folder / "open").write_text(f"{already}\n", encoding="utf-8")
        where = self.clone(name)
        found = self.folder / f"{name}.temporary" / "found"
        shutil.copytree(searched, found, symlinks=True, ignore=shutil.ignore_patterns(".git"))
        return self.step(where, "propose", "Propose")

    def proposed(self) -> list[str] | None:
        """What the branch changes, if there is one."""
        branch = self.environment["PROPOSED"]
        if branch not in self.git(self.origin, "branch"):
            return None
        return self.git(self.origin, "diff", "--no-renames", "--name-status", f"main...{branch}").split("\n")[:-1]

    def asked(self) -> list[str]:
        """The verbs that GitHub was asked."""
        told = self.folder / "asked"
        lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
        told.unlink(missing_ok=True)
        return [line.split()[1] for line in lines]


def test_what_is_proposed_and_not_merged_is_there_the_next_night(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    monday = repository.clone("monday")
    assert repository.step(monday, "search", "Complete") == 0
    assert repository.git(monday, "status", "--short") == ""
    repository.write(monday, "corpus/crashing/decode/new.json")
    (monday / "corpus/crashing/decode/old.json").unlink()
    assert repository.propose("first", monday) == 0
    first = ["A\tcorpus/crashing/decode/new.json", "D\tcorpus/crashing/decode/old.json"]
    assert (repository.proposed(), repository.asked()) == (first, ["list", "create"])

    tuesday = repository.clone("tuesday")
    assert repository.step(tuesday, "search", "Complete") == 0
    names = sorted(str(it.relative_to(tuesday / "corpus")) for it in tuesday.glob("corpus/*/*/*.json"))
    assert names == ["crashing/decode/new.json", "regression/decode/mended.json", "seeds/decode/a.json"]
    assert (tuesday / "calls").read_text(encoding="utf-8").startswith("corpus merge ")
    repository.write(tuesday, "corpus/crashing/decode/newer.json")
    assert repository.propose("second", tuesday, already=1) == 0
    second = [first[0], "A\tcorpus/crashing/decode/newer.json", first[1]]
    assert (repository.proposed(), repository.asked()) == (second, ["list"])

    repository.git(repository.origin, "update-ref", "refs/heads/main", repository.environment["PROPOSED"])
    wednesday = repository.clone("wednesday")
    assert repository.step(wednesday, "search", "Complete") == 0
    assert repository.git(wednesday, "status", "--short") == ""
    assert repository.propose("third", wednesday, already=1) == 0
    assert (repository.proposed(), repository.asked()) == (None, [])


def test_of_what_a_search_leaves_only_cases_are_proposed(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    search = repository.clone("search")
    repository.write(search, "corpus/crashing/decode/new.json")
    for name in ("crashing/decode/new.sh", "crashing/.hidden.json", "more.json", "seeds/decode/b.json", "README.md"):
        repository.write(search, f"corpus/{name}", "text of its own\n")
    (search / "corpus/crashing/decode/link.json").symlink_to(os.devnull)
    (search / "corpus/crashing/elsewhere").symlink_to("/etc")
    (search / "corpus/crashing/decode/new.json").chmod(0o755)
    assert repository.propose("proposal", search) == 0
    assert repository.proposed() == ["A\tcorpus/crashing/decode/new.json"]
    branch = repository.environment["PROPOSED"]
    assert repository.git(repository.origin, "ls-tree", "-r", branch, "corpus/crashing").count("100644") == 2
    shutil.move(search / "corpus", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "corpus").symlink_to(tmp_path / "elsewhere")
    assert repository.propose("another", tmp_path / "elsewhere") != 0


def sanitized(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> Result:
    """``replay --sanitizer memcheck``, which finds an access of a case and cannot judge another one."""
    good, bad = saved(folder, seq_len=1), saved(folder, seq_len=8)
    finding = Finding(
        implementation="mine", executor="eager", code=Code.OUT_OF_BOUNDS, replay=0, mode=Mode.DECODE, message="reads on"
    )
    verdict = Verdict(implementation="mine", executor="eager", outcome=Outcome.DISAGREE, findings=(finding,))

    def told(_: Plan, __: Sanitizer, paths: list[Path]) -> Iterator[Hello | Replayed]:
        yield Hello("cuda", "a device", (), ("eager",))
        assert sorted(paths) == sorted(it.relative_to(folder) for it in (good, bad))
        yield Replayed(bad, Status.FAILED, load(bad), (verdict,))
        yield Replayed(good, Status.ERROR, None, problem=f"{good}: ``` is damaged")

    monkeypatch.setattr(replay_command, "refuse", lambda *_: None)
    monkeypatch.setattr(replay_command, "sanitize_saved", told)
    return invoke("replay", "--sanitizer", "memcheck", *arguments)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("NSA_VERIFY_CORPUS", "NSA_VERIFY_DEVICE", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_a_sanitizer_finds_is_in_the_reports(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    (folder / "summary.md").write_text("before\n", encoding="utf-8")
    done = sanitized(monkeypatch, folder, "--report", "json=weekly.json", "--report", "github")
    assert (done.exit_code, done.stderr) == (2, "")
    assert done.stdout.endswith("\n0 CLEAN, 1 FAILED, 1 ERROR\n")
    told = json.loads((folder / "weekly.json").read_text(encoding="utf-8"))
    assert [it["status"] for it in told["cases"]] == ["FAILED", "ERROR"]
    assert told["cases"][0]["verdicts"][0]["findings"][0]["code"] == "NV204"
    assert (told["kind"], told["exit_code"], told["error"], told["sanitizer"]) == ("replay", 2, "", "memcheck")
    assert (told["outcome"], told["environment"]["device"]) == ("0 CLEAN, 1 FAILED, 1 ERROR", "a device")
    lines = (folder / "summary.md").read_text(encoding="utf-8").splitlines()
    title = "### nsa-verify replay --sanitizer memcheck: 0 CLEAN, 1 FAILED, 1 ERROR"
    assert lines[:5] == ["before", "", title, "", "````text"]
    assert "  mine [eager] NV204 read outside every buffer" in lines
    assert (lines[-1], lines.count("````")) == ("````", 1)


def test_a_report_of_what_could_not_be_run_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(folder)
    done = invoke("replay", "--only", "nobody", "--no-isolation", "--report", "json")
    told = json.loads((folder / "nsa-verify-report.json").read_text(encoding="utf-8"))
    assert (told["exit_code"], told["cases"], told["not_judged"]) == (2, [], 1)
    assert told["error"] == refused(done)

    monkeypatch.setattr(replay_command, "replay_saved", lambda *_: 1 // 0)
    assert invoke("replay", "--report", "json").exit_code == 2
    told = json.loads((folder / "nsa-verify-report.json").read_text(encoding="utf-8"))
    assert (told["exit_code"], told["error"]) == (2, "nsa-verify itself failed")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (("html",), "--report html: replay has no kind 'html'; it has json, github"),
        (("github",), "--report github: GITHUB_STEP_SUMMARY is not set here; name a file, as in github=summary.md"),
        (("json=a", "json=./a"), "--report json=./a: another report writes to ./a already; give each its own"),
        (("json=a", "json=b/c"), "--report json=b/c: b/c cannot be written: No such file or directory; name another"),
    ],
)
def test_a_report_that_cannot_be(folder: Path, values: tuple[str, ...], sentence: str) -> None:
    saved(folder)
    given = [word for value in values for word in ("--report", value)]
    assert refused(invoke("replay", *given, "--no-isolation")) == sentence
    assert not (folder / "a").exists()


def test_under_a_sanitizer_sigterm_is_as_ctrl_c() -> None:
    def ended() -> None:
        with interruptible(Sanitizer.OOB):
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler  # else it would end the tests
            os.kill(os.getpid(), signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        ended()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_ten_mutants_are_of_ten_kinds() -> None:
    mutants = runpy.run_path(str(ROOT / "benchmarks" / "ten_mutants.py"))["MUTANTS"]
    assert len(mutants) == len({it.kind for it in mutants}) == len({it.copy_name for it in mutants}) == 10
    assert len({it.module for it in mutants}) >= 5
    assert len({code for it in mutants for code in it.codes}) >= 7
    assert not any(it.needs_gpu for it in mutants)
