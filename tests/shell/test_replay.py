"""``nsa-verify replay``: FIXED, FAILED or ERROR for each saved case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shell.commands import invoke, saved, written

from nsa_verify import Mode

MINE = ("--impl", "mine.py", "--only", "short-top-k", "--executor", "eager")


def test_a_case_that_still_fails(folder: Path) -> None:
    path = saved(folder).relative_to(folder)
    written(folder)
    done = invoke("replay", path, *MINE)
    assert (done.exit_code, done.stderr) == (1, "")
    header, *lines = done.stdout.splitlines()
    assert header.startswith("1 saved case on ")
    assert lines == [
        f"FAILED {path} (0 of 1 agree)",
        "  short-top-k [eager] NV101 wrong value in the live region",
        "    setup   N=1 K=8 p=1 W=8 pool=1x8 buckets=1 steps=1 fill=1",
        "    replay 1 of 1: decode, bucket 1  <- disagrees",
        "            row  seq_len  pool_row",
        "            0    8        0",
        "    replay 1, step 0, 1 wrong cell: nsa_cache_seqlens[0]: expected 8, got 7",
        "            element   0",
        "            region    live",
        "            expected  8",
        "            got       7",
        "                      ^",
        "0 FIXED, 1 FAILED, 0 ERROR",
    ]


def test_a_case_that_was_mended(folder: Path) -> None:
    path = saved(folder).relative_to(folder)
    written(folder, too_low=0)
    done = invoke("replay", path, *MINE)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [f"FIXED  {path} (1 of 1 agree)", "1 FIXED, 0 FAILED, 0 ERROR"]


@pytest.mark.parametrize("where", [(), ("corpus",), ("corpus/crashing/decode",), ("--corpus", "corpus")])
def test_a_folder_is_replayed_in_the_order_of_its_paths(folder: Path, where: tuple[str, ...]) -> None:
    paths = sorted(saved(folder, seq_len) for seq_len in (1, 8, 16))
    written(folder)
    done = invoke("replay", *where, *MINE)
    assert done.exit_code == 1
    told = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FIXED", "FAILED"))]
    assert told == [str(path.relative_to(folder)) for path in paths]
    assert done.stdout.endswith("1 FIXED, 2 FAILED, 0 ERROR\n")


def test_the_implementation_of_the_finding_must_be_there(folder: Path) -> None:
    path = saved(folder).relative_to(folder)
    done = invoke("replay", path)
    assert done.exit_code == 2
    remedy = "which is not loaded; give it with --impl mine.py, or choose others with --only"
    assert done.stdout.splitlines()[1:] == [
        f"ERROR  {path}: was found in 'short-top-k', {remedy}",
        "0 FIXED, 0 FAILED, 1 ERROR",
    ]
    assert invoke("replay", path, "--only", "vectorized").exit_code == 0


def test_an_error_outweighs_a_failure(folder: Path) -> None:
    saved(folder)
    (folder / "corpus/crashing/decode/aaa.json").write_text("{")
    written(folder)
    done = invoke("replay", *MINE)
    assert done.exit_code == 2
    assert done.stdout.endswith("0 FIXED, 1 FAILED, 1 ERROR\n")


def test_a_case_that_suits_no_implementation_is_an_error(folder: Path) -> None:
    path = saved(folder, mode=Mode.TARGET_VERIFY).relative_to(folder)
    written(folder)
    done = invoke("replay", path, *MINE)
    assert done.exit_code == 2
    sentence = "no implementation of this run is applicable; choose others with --only or --impl"
    assert done.stdout.splitlines()[1] == f"ERROR  {path}: {sentence}"


def test_a_check_that_fails_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.device.judge import Judge

    monkeypatch.setattr(Judge, "_check_oracle", lambda _: "the oracle contradicts itself")
    path = saved(folder).relative_to(folder)
    done = invoke("replay", path, "--only", "vectorized", "--no-isolation")
    assert done.exit_code == 2
    assert f"ERROR  {path}: vectorized: the oracle contradicts itself\n" in done.stdout


def test_json(folder: Path) -> None:
    path = saved(folder).relative_to(folder)
    (folder / "corpus/crashing/decode/aaa.json").write_text("{")
    written(folder)
    done = invoke("replay", *MINE, "--json")
    assert (done.exit_code, done.stderr) == (2, "")
    told = json.loads(done.stdout)
    assert (told["counts"], told["not_judged"]) == ({"FIXED": 0, "FAILED": 1, "ERROR": 1}, 0)
    damaged, failed = told["cases"]
    assert "not valid JSON" in damaged["problem"]
    assert (failed["path"], failed["problem"]) == (str(path), "")
    assert failed["verdicts"][0]["findings"][0]["code"] == "NV101"


def test_the_corpus_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(folder / "elsewhere")
    monkeypatch.setenv("NSA_VERIFY_CORPUS", "elsewhere/corpus")
    assert "1 FIXED" in invoke("replay", "--only", "vectorized").stdout
    assert "\n1 case\n" in invoke("corpus", "list").stdout
