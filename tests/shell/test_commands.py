"""``corpus list``, ``corpus show``, ``explain`` and ``doctor``."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from shell.commands import graph_executor, invoke, refused, saved

from nsa_verify.core.findings import EXPLANATIONS, Code
from nsa_verify.engine.corpus import load
from nsa_verify.shell import doctor


def test_list(folder: Path) -> None:
    paths = sorted(saved(folder, seq_len) for seq_len in (8, 16))
    done = invoke("corpus", "list")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"crashing/decode/{it.name}  NV101 short-top-k  written for a test" for it in paths]
    assert lines[2:] == ["2 cases"]
    told = json.loads(invoke("corpus", "list", "--json").stdout)
    assert [it["path"] for it in told["cases"]] == [f"crashing/decode/{it.name}" for it in paths]
    assert told["problems"] == []


def test_show_by_path_stem_and_hash(folder: Path) -> None:
    path = saved(folder)
    names = (path, path.relative_to(folder), path.stem, path.stem[-12:], path.stem[-12:-7])
    shown = [invoke("corpus", "show", name) for name in names]
    assert {it.exit_code for it in shown} == {0}
    assert len({it.stdout.split("\n", 1)[1] for it in shown}) == 1
    assert shown[1].stdout.splitlines() == [
        str(path.relative_to(folder)),
        "written for a test",
        "setup   N=1 K=8 p=1 W=8 pool=1x8 buckets=1 steps=1 fill=1",
        "replay 1 of 1: decode, bucket 1  <- disagrees",
        "        row  seq_len  pool_row",
        "        0    8        0",
        "NV101 short-top-k [eager]: 8 is expected",
        "(seed 7)",
    ]
    assert json.loads(invoke("corpus", "show", path.stem, "--json").stdout)["entry"]["title"] == "written for a test"


def test_show_what_is_not_one_case(folder: Path) -> None:
    stems = sorted(saved(folder, seq_len).stem for seq_len in range(1, 18))
    starts = [stem[-12] for stem in stems]
    shared = next(start for start in starts if starts.count(start) > 1)
    called = ", ".join(stem for stem in stems if stem[-12] == shared)
    sentence = refused(invoke("corpus", "show", shared))
    assert sentence == (
        f"{shared}: {starts.count(shared)} saved cases of corpus are called so ({called}); give more of the name"
    )
    missing = refused(invoke("corpus", "show", "nowhere"))
    assert (
        missing == "nowhere: no saved case of corpus has this path, stem or start of hash; see nsa-verify corpus list"
    )


def test_show_a_damaged_case(folder: Path) -> None:
    (folder / "damaged.json").write_text("{")
    assert refused(invoke("corpus", "show", "damaged.json")).startswith(
        "damaged.json: not valid JSON, perhaps truncated"
    )


@pytest.mark.parametrize("code", list(Code))
def test_explain(code: Code) -> None:
    done = invoke("explain", code.lower())
    assert (done.exit_code, done.stderr) == (0, "")
    text = EXPLANATIONS[code]
    assert done.stdout.startswith(f"{code}: {text.title}\n\n{text.meaning}\n")
    assert f"\nTypical cause: {text.typical_cause}\nRemedy: {text.remedy}\n" in done.stdout


def test_a_healthy_machine(folder: Path) -> None:
    saved(folder)
    done = invoke("doctor")
    assert (done.exit_code, done.stderr) == (0, "")
    assert all(line.startswith("ok       ") for line in done.stdout.splitlines())
    assert (
        "ok       implementations: python-loop, vectorized, triton-fused, triton-inplace, precomputed-" in done.stdout
    )
    assert f"ok       device: graphs can be captured and replayed ({graph_executor()})\n" in done.stdout
    assert "ok       corpus: corpus: writable, 1 case\n" in done.stdout


def test_a_machine_on_which_graphs_cannot_be_captured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.device.rig import Rig

    monkeypatch.setattr(Rig, "moved", lambda *_: "a buffer was moved")
    done = invoke("doctor")
    assert (done.exit_code, done.stderr) == (2, "")
    (problem,) = (line for line in done.stdout.splitlines() if line.startswith("PROBLEM  "))
    executor = graph_executor()
    assert problem == (
        f"PROBLEM  device: graphs cannot be captured with {executor}:"
        " while capturing (decode, bucket 1): a buffer was moved"
    )


def test_everything_that_is_wrong_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def version(package: str) -> str:
        if package == "hypothesis":
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (folder / "text").write_text("no folder")
    done = invoke("doctor", "--impl", "nowhere.py", "--corpus", "text", "--device", "cuda")
    assert (done.exit_code, done.stderr) == (2, "")
    problems = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM  ")]
    told = ("versions: hypothesis not installed; ", "device: --device cuda: ", "implementations: --impl nowhere.py: ")
    for problem, start in zip(problems, (*told, "corpus: text: cannot save cases here: "), strict=True):
        assert problem.startswith(f"PROBLEM  {start}")


def test_what_show_prints_is_what_was_saved(folder: Path) -> None:
    path = saved(folder, implementation="mine[2]")
    assert load(path).finding is not None
    assert "NV101 mine[2] [eager]" in invoke("corpus", "show", path).stdout
