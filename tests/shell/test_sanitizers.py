"""``nsa-verify replay --sanitizer``: what only a sanitizer sees, and what keeps one from being asked."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import NO_GPU
from shell.commands import invoke, refused, saved

from nsa_verify import Mode
from nsa_verify.engine import sanitizing
from nsa_verify.mutants import CATALOGUE

MUTANT = CATALOGUE["loads-past-the-pool-row"]
OOB = ("--sanitizer", "oob")
MINE = ("--impl", "mine/loads_past_the_pool_row.py", "--only", MUTANT.copy_name)
needs_triton_viz = pytest.mark.skipif(
    find_spec("triton_viz") is None, reason="needs triton-viz (the extra sanitize, which `make lint` installs)"
)
TRITON = [
    word
    for name in ("triton-fused", "triton-inplace", "precomputed-batched-copy", "onepass")
    for word in ("--only", name)
]
SEEDS = Path(__file__).resolve().parents[2] / "corpus" / "seeds"


def _planted(folder: Path, changed: bool = True) -> str:
    """Plant the mutant, or a correct copy, and return what a finding says of the line that reads too far."""
    path = MUTANT.plant(folder / "mine", changed)
    (wrong,) = MUTANT.changes.values()
    lines = path.read_text(encoding="utf-8").splitlines()
    return f"({path.name}:{lines.index(wrong.rstrip()) + 1} in _gather_pages)" if changed else ""


@needs_triton_viz
def test_a_read_that_changes_no_value(folder: Path) -> None:
    line = _planted(folder)
    path = saved(folder).relative_to(folder)
    assert invoke("replay", path, *MINE, "--executor", "eager").exit_code == 0
    done = invoke("replay", path, *MINE, *OOB)
    assert (done.exit_code, done.stderr) == (1, "")
    header, *lines = (it for it in done.stdout.splitlines() if not it.startswith("oob: "))
    assert header.endswith("(interpreted); executors eager; sanitizer oob")
    assert lines[0] == f"FAILED {path} (0 of 1 clean)"
    assert lines[1] == f"  {MUTANT.copy_name} [eager] NV204 read outside every buffer"
    says = "    replay 1: reads past the end of req_to_token: element 8 where it has 8; "
    assert lines[-2].startswith(says)
    assert lines[-2].endswith(line)
    assert lines[-1] == "0 CLEAN, 1 FAILED, 0 ERROR"


@needs_triton_viz
def test_the_same_without_the_bug(folder: Path) -> None:
    _planted(folder, changed=False)
    path = saved(folder).relative_to(folder)
    done = invoke("replay", path, *MINE, *OOB, "--device", "cpu", "--executor", "eager")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = [it for it in done.stdout.splitlines() if not it.startswith("oob: ")]
    assert lines[1:] == [f"CLEAN  {path} (1 of 1 clean)", "1 CLEAN, 0 FAILED, 0 ERROR"]


@needs_triton_viz
def test_json(folder: Path) -> None:
    line = _planted(folder)
    path = saved(folder).relative_to(folder)
    (folder / "corpus/crashing/decode/aaa.json").write_text("{")
    told = json.loads(invoke("replay", *MINE, "--only", "vectorized", *OOB, "--json").stdout)
    assert told["sanitizer"] == "oob"
    assert (told["counts"], told["not_judged"]) == ({"CLEAN": 0, "FAILED": 1, "ERROR": 1}, 0)
    damaged, failed = told["cases"]
    assert "not valid JSON" in damaged["problem"]
    assert (failed["path"], failed["status"]) == (str(path), "FAILED")
    torch_only, mutant = failed["verdicts"]
    assert (torch_only["outcome"], torch_only["reason"]) == ("not applicable", "it launched no Triton kernel")
    (finding,) = mutant["findings"]
    assert (finding["code"], finding["buffer"], finding["element"]) == ("NV204", "req_to_token", [8])
    assert finding["message"].endswith(line)


@needs_triton_viz
def test_what_launches_no_kernel_was_not_looked_at(folder: Path) -> None:
    path = saved(folder).relative_to(folder)
    done = invoke("replay", path, "--only", "vectorized", *OOB)
    assert done.exit_code == 2
    sentence = "no implementation of this run is applicable; choose others with --only or --impl"
    assert f"ERROR  {path}: {sentence}\n" in done.stdout


@needs_triton_viz
@pytest.mark.slow
def test_correct_implementations_are_not_accused(folder: Path) -> None:
    for mode in Mode:
        for path in sorted((SEEDS / mode).iterdir())[::7]:
            shutil.copy(path, folder)
    cases = len(list(folder.iterdir()))
    done = invoke("replay", ".", *TRITON, *OOB)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.count("(4 of 4 clean)\n") == cases
    assert done.stdout.endswith(f"\n{cases} CLEAN, 0 FAILED, 0 ERROR\n")


@needs_triton_viz
def test_an_implementation_that_kills_its_process(folder: Path) -> None:
    lines = "def refresh(inputs, steps, setup):\n    print('good bye', flush=True)\n    os._exit(9)\n"
    (folder / "mine.py").write_text(
        f"import os\nfrom nsa_verify import implementation\n\n@implementation('mine')\n{lines}"
    )
    path = saved(folder).relative_to(folder)
    done = invoke("replay", path, "--impl", "mine.py", "--only", "mine", *OOB)
    assert done.exit_code == 2
    sentence = f"ERROR  {path}: mine: its process under oob ended with exit code 9: good bye\n"
    assert sentence in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--sanitizer", "warp"), "'warp' is not one of 'memcheck', 'initcheck', 'racecheck', 'synccheck', 'oob' (see"),
        ((*OOB, "--executor", "graph"), "implementations are called, not captured; leave out --executor graph"),
        ((*OOB, "--executor", "eager", "--executor", "simulated-graph"), "leave out --executor simulated-graph"),
        ((*OOB, "--no-isolation"), "--sanitizer oob: runs in a process of its own; leave out --no-isolation"),
        ((*OOB, "--workers", "3"), "--sanitizer oob: runs one process at a time; leave out --workers 3"),
        ((*OOB, "--max-memory", "1G"), "--sanitizer oob: memory is not limited under it; leave out --max-memory 1G"),
        ((*OOB, "--device", "cuda"), "--sanitizer oob: runs on the CPU; leave out --device cuda, or take --sanitizer"),
        ((*OOB, "--deadline", "soon"), "--deadline soon: must be a time such as 90, 90s, 15m or 6h"),
        ((*OOB, "--only", "warp"), "--only warp: no such implementation; there are "),
        ((*OOB, "--impl", "nowhere.py"), "--impl nowhere.py: there is no such file"),
        ((*OOB, "nowhere"), "nowhere: there is no such file or folder; check the path"),
        (
            ("--sanitizer", "memcheck", "--device", "cpu"),
            "memcheck: runs on CUDA; leave out --device cpu, or take",
        ),
    ],
)
def test_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str) -> None:
    if not NO_GPU and arguments[-1] in ("warp", "nowhere.py"):
        pytest.skip("in this very process Triton compiles, and cannot be interpreted any more")
    saved(folder)
    monkeypatch.setattr(sanitizing, "find_spec", lambda _: True)
    assert sentence in refused(invoke("replay", *arguments))


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
@pytest.mark.parametrize("sanitizer", ["memcheck", "initcheck", "racecheck", "synccheck"])
def test_without_a_gpu(folder: Path, sanitizer: str) -> None:
    saved(folder)
    assert refused(invoke("replay", "--sanitizer", sanitizer)) == (
        f"--sanitizer {sanitizer}: needs CUDA, and PyTorch sees no CUDA device here; take --sanitizer oob, which runs"
        " on the CPU"
    )


def test_without_triton_viz(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(folder)
    monkeypatch.setattr(sanitizing, "find_spec", lambda _: None)
    assert refused(invoke("replay", *OOB)) == (
        "--sanitizer oob: triton-viz is not installed; pip install 'nsa-verify[sanitize]'"
    )


@pytest.mark.gpu
@pytest.mark.skipif(sanitizing.compute_sanitizer() is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("changed", [True, False])
def test_memcheck(folder: Path, changed: bool) -> None:
    line = _planted(folder, changed)
    path = saved(folder).relative_to(folder)
    done = invoke("replay", path, *MINE, "--sanitizer", "memcheck")
    assert done.exit_code == int(changed), done.output
    assert ("NV204" in done.stdout) == changed
    assert line in done.stdout
