"""``nsa-verify run``: what it prints, what it saves, and the exit code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from shell.commands import invoke, refused, written

from nsa_verify import Mode, Outcome
from nsa_verify.device import batch
from nsa_verify.engine.corpus import load

EAGER = ("--executor", "eager")
FOUND = (
    *("run", "--impl", "mine.py", "--only", "short-top-k", "--only", "vectorized", "-n", 40, "--seed", 5, "-w", 1),
    *EAGER,
)


@pytest.fixture(name="found", scope="module")
def _found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run that finds the one bug there is; nobody changes it."""
    folder = tmp_path_factory.mktemp("found")
    written(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, invoke(*FOUND)


def test_agreement(folder: Path) -> None:
    done = invoke("run", "--only", "python-loop", "--only", "vectorized", "-n", 20, "--seed", 1, "-w", 1)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "\nno disagreement\n" in done.stdout
    assert not (folder / "corpus").exists()
    assert not list(folder.iterdir())


def test_the_header_says_what_the_run_is_a_function_of(found: tuple[Path, Result]) -> None:
    first, second, third = found[1].stdout.splitlines()[:3]
    assert re.fullmatch(r"nsa-verify \S+ on .*, torch \S+, triton \S+ \((interpreted|compiled)\)", first)
    assert second == (
        "seed 5; cases 40; modes decode,target-verify,draft-extend,draft-extend-v2; executors eager; profile dev;"
        " workers 1; corpus corpus; only short-top-k,vectorized"
    )
    assert third == "2 implementations: vectorized, short-top-k"


def test_the_minimal_case_is_printed(found: tuple[Path, Result]) -> None:
    folder, done = found
    assert (done.exit_code, done.stderr) == (1, "")
    (saved,) = folder.glob("corpus/crashing/decode/*.json")
    at = done.stdout.index("short-top-k [eager] NV101 wrong value")
    assert done.stdout[at:].startswith(
        """\
short-top-k [eager] NV101 wrong value in the live region
  setup   N=1 K=8 p=1 W=8 pool=1x8 buckets=1 steps=1 fill=1
  replay 1 of 1: decode, bucket 1  <- disagrees
          row  seq_len  pool_row
          0    8        0
  replay 1, step 0, 1 wrong cell: nsa_cache_seqlens[0]: expected 8, got 7
          element   0
          region    live
          expected  8
          got       7
                    ^
  minimal case, """
    ), done.stdout[at:]
    assert "probes; disagreed in 5 of 5 further runs\n" in done.stdout
    assert f"\n  saved     {saved.relative_to(folder)}\n" in done.stdout


def test_what_is_saved_is_what_was_printed(found: tuple[Path, Result]) -> None:
    folder, _ = found
    (saved,) = folder.glob("corpus/crashing/**/*.json")
    entry = load(saved)
    assert entry.finding is not None
    assert (entry.finding.code, entry.finding.expected, entry.finding.got) == ("NV101", 8, 7)
    assert (entry.provenance.seed, entry.provenance.impl, entry.provenance.attempts) == (5, ("mine.py",), 5)
    assert entry.title == "short-top-k: wrong value in the live region: nsa_cache_seqlens[0]: expected 8, got 7"


def test_the_line_to_reproduce_it_does(found: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, done = found
    (line,) = [it for it in done.stdout.splitlines() if it.startswith("  reproduce ")]
    program, *arguments = shlex.split(line.removeprefix("  reproduce "))
    monkeypatch.chdir(folder)
    again = invoke(*arguments)
    assert (program, again.exit_code) == ("nsa-verify", 1)
    assert "short-top-k [eager] NV101" in again.stdout
    assert "0 FIXED, 1 FAILED, 0 ERROR" in again.stdout


def test_the_line_to_reproduce_is_quoted_for_a_shell(folder: Path) -> None:
    mine = written(folder / "my kernels", name="it's [mine]")
    done = invoke(
        "run", "--impl", mine, "--only", "it's [mine]", "--mode", "decode", "-n", 20, "--seed", 7, "-w", 1, *EAGER
    )
    assert done.exit_code == 1
    (line,) = [it for it in done.stdout.splitlines() if it.startswith("  reproduce ")]
    assert invoke(*shlex.split(line)[2:]).exit_code == 1


def test_the_matrix_says_how_many_and_why_not(found: tuple[Path, Result]) -> None:
    lines = found[1].stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("implementation "))
    header, *rows, why = (re.split(r"  +", line) for line in lines[at : at + 2 + 2 * len(Mode)])
    vectorized, mine = rows[: len(Mode)], rows[len(Mode) :]
    assert header == ["implementation", "mode", "eager"]
    assert [row[:2] for row in rows] == [[name, mode] for name in ("vectorized", "short-top-k") for mode in Mode]
    assert all(re.fullmatch(r"\d+ agree", row[2]) for row in vectorized)
    assert re.fullmatch(r"(\d+ agree, )?\d+ DISAGREE", mine[0][2])
    assert all(re.fullmatch(r"\d+ n/a", row[2]) for row in mine[1:])
    assert why[:2] == ["n/a", "short-top-k"]
    assert re.fullmatch(r"mode not declared \(draft-extend \d+, draft-extend-v2 \d+, target-verify \d+\)", why[2])


def test_rate_and_digest_are_printed(found: tuple[Path, Result]) -> None:
    pattern = (
        r"\n40 cases in \d+\.\d s \(\d+\.\d cases/s, after \d+\.\d s to start\), all cases were drawn;"
        r" digest [0-9a-f]{16}\n1 distinct disagreement:\n"
    )
    assert re.search(pattern, found[1].stdout)


def test_nothing_but_text_goes_into_a_pipe(found: tuple[Path, Result]) -> None:
    assert found[1].stdout.isascii()
    assert "\x1b" not in found[1].stdout
    assert not any(line.endswith(" ") for line in found[1].stdout.splitlines())


def _digest(text: str) -> str:
    return str(re.findall("digest ([0-9a-f]{16})", text)[0])


def test_json_states_the_same_facts(found: tuple[Path, Result], folder: Path) -> None:
    written(folder)
    done = invoke(*FOUND, "--json")
    assert (done.exit_code, done.stderr) == (1, "")
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["seed"], told["cases"], told["exit_code"], told["error"]) == (5, 40, 1, "")
    assert told["digest"] == _digest(found[1].stdout)
    assert told["stop"] == "all cases were drawn"
    assert [it["name"] for it in told["subjects"]] == ["vectorized", "short-top-k"]
    (finding,) = told["findings"]
    assert (finding["code"], finding["expected"], finding["got"], finding["shrunk"]) == ("NV101", 8, 7, True)
    assert load(Path(finding["path"])).finding is not None
    assert finding["reproduce"].startswith("nsa-verify replay corpus/crashing/decode/nv101-short-top-k-")
    cells = told["matrix"]["short-top-k"]["eager"]
    assert cells["decode"]["disagree"] >= 1
    assert cells["draft-extend"]["reasons"] == {"mode not declared": cells["draft-extend"]["not_applicable"]}


def test_no_shrink_keeps_the_case_as_it_was_drawn(folder: Path) -> None:
    written(folder)
    done = invoke(*FOUND, "--no-shrink")
    assert done.exit_code == 1
    assert "  case as it was drawn; not shrunk\n" in done.stdout
    assert "minimal" not in done.stdout
    (saved,) = folder.glob("corpus/crashing/decode/*.json")
    assert load(saved).provenance.attempts is None


@pytest.mark.parametrize("mode", ["draft-extend-v2", "DRAFT_EXTEND_V2"])
def test_one_mode_only(folder: Path, mode: str) -> None:
    done = invoke("run", "--only", "vectorized", "--mode", mode, "-n", 5, "--seed", 1, "-w", 1, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert list(told["matrix"]["vectorized"]["eager"]) == ["draft-extend-v2"]


def test_the_time_can_be_limited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "judge_batch", _slow(batch.judge_batch))
    done = invoke(
        "run",
        "--only",
        "vectorized",
        "--max-time",
        "0.3s",
        "-n",
        15,
        "--seed",
        1,
        "-w",
        1,
        "--json",
        *EAGER,
        "--no-isolation",
    )
    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert 1 <= told["cases"] < 15
    assert told["stop"] == "the time was up"
    assert told["options"]["max-time"] == "0.3 s"


def _slow(judge: Any) -> Any:
    def judge_slowly(*arguments: Any, **more: Any) -> Any:
        import time

        for verdict in judge(*arguments, **more):
            time.sleep(0.15)
            yield verdict

    return judge_slowly


def test_the_same_seed_draws_the_same_cases(folder: Path) -> None:
    same = ("run", "--only", "vectorized", "-n", 25, "-w", 1, *EAGER)
    first, second, other = (_digest(invoke(*same, "--seed", seed).stdout) for seed in (3, 3, 4))
    assert first == second != other


def test_a_seed_is_chosen_and_told(folder: Path) -> None:
    same = ("run", "--only", "vectorized", "-n", 3, "-w", 1, *EAGER)
    chosen = re.findall(r"^seed (\d+);", invoke(*same).stdout, flags=re.MULTILINE)
    assert len(chosen) == 1
    assert _digest(invoke(*same, "--seed", chosen[0]).stdout) == _digest(invoke(*same, "--seed", chosen[0]).stdout)


def test_two_bugs_are_two_findings(folder: Path) -> None:
    written(folder)
    written(folder, name="long-top-k", too_low=-1, file="other.py")
    done = invoke(*FOUND, "--impl", "other.py", "--only", "long-top-k", "--mode", "decode")
    assert done.exit_code == 1
    assert "2 distinct disagreements:\n" in done.stdout
    found = {load(path).finding for path in folder.glob("corpus/crashing/decode/*.json")}
    assert {it.implementation for it in found if it is not None} == {"short-top-k", "long-top-k"}


def test_what_was_never_tested_is_no_agreement(folder: Path) -> None:
    written(folder, too_low=0)
    idle = invoke("run", "--impl", "mine.py", "--only", "short-top-k", "--mode", "draft-extend", "-n", 3, "-w", 1)
    assert refused(idle) == "nothing was tested; draw more cases, or other modes with --mode"
    assert "3 n/a" in idle.stdout
    both = ("--only", "short-top-k", "--only", "vectorized")
    half = invoke("run", "--impl", "mine.py", *both, "--mode", "draft-extend", "-n", 3, "-w", 1)
    assert refused(half).startswith("no case was applicable to short-top-k; ")


def test_a_check_that_fails_is_no_agreement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.device import screening

    def fail(*_: object) -> None:
        raise RuntimeError("planted [here]")

    monkeypatch.setattr(screening, "comparison_for", fail)
    run = ("run", "--only", "vectorized", "-n", 3, "--seed", 1, "-w", 1, "--no-isolation", *EAGER)
    done = invoke(*run)
    assert refused(done) == "some verdicts are unknown: the check itself failed, see above"
    assert done.stdout.count("UNKNOWN vectorized [eager]: ") == 1
    assert "RuntimeError: planted [here]" in done.stdout
    assert "no disagreement" not in done.stdout
    told = json.loads(invoke(*run, "--json").stdout)
    assert (len(told["unknown"]), told["exit_code"]) == (1, 2)  # the first of each reason
    assert told["matrix"]["vectorized"]["eager"]["decode"]["unknown"] == 3
    assert told["error"].startswith("some verdicts are unknown")


def test_a_check_that_cannot_begin_is_no_agreement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.device.judge import Judge

    monkeypatch.setattr(Judge, "_check_oracle", lambda _: "the oracle contradicts itself")
    done = invoke("run", "--only", "vectorized", "-n", 3, "--seed", 1, "-w", 1, "--no-isolation", *EAGER)
    assert done.exit_code == 2
    assert f"3 {Outcome.UNKNOWN.upper()}" in done.stdout or "1 UNKNOWN" in done.stdout
