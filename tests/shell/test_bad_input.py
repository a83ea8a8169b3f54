"""What the command line is given wrongly: one sentence on standard error, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shell.commands import executor_of_another_device, invoke, refused, saved, written

from nsa_verify.engine import keeping
from nsa_verify.engine.corpus import CorpusError, Entry, Kind

RUN = ("run", "-w", 1, "-n", 20, "--seed", 7, "--only", "vectorized")
ELSEWHERE, REFUSED = executor_of_another_device()
MINE = ("run", "--impl", "mine.py", "--only", "short-top-k", "--executor", "eager", "-n", 20, "--seed", 5, "-w", 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", "--impl", "nowhere.py"), "--impl nowhere.py: there is no such file"),
        (("run", "--impl", "./folder"), "--impl ./folder: is a folder; give the Python file in it"),
        (("run", "--impl", "raises.py"), "--impl raises.py: importing it raised ValueError: cannot (raises.py:3);"),
        (("run", "--impl", "exits.py"), "--impl exits.py: importing it raised SystemExit: 0 (exits.py:2); mend"),
        (("run", "--impl", "syntax.py"), "importing it raised SyntaxError: invalid syntax (syntax.py:2); mend that"),
        (("run", "--impl", "deep.py"), "importing it raised JSONDecodeError: Expecting value: line 1 column 1"),
        (("run", "--impl", "deep.py"), "(deep.py:2); mend that line"),
        (("run", "--impl", "nothing.py"), "--impl nothing.py: registers no implementation; decorate"),
        (("run", "--impl", "taken.py"), "two implementations are called 'vectorized': "),
        (("run", "--impl", "taken.py"), " (taken.py:5); mend that line"),
        (("run", "--impl", "text.md"), "--impl text.md: not a Python file; its name must end in .py"),
        (("run", "--impl", "no_such_module"), "there is no module 'no_such_module'; give a file or an importable"),
        (("run", "--impl", "no_such.module:at.all"), "there is no module 'no_such.module'; give a file or"),
        (("run", "--impl", ""), "there is no module ''; give a file or an importable module"),
        (("run", "--impl", "json:tool"), "--impl json:tool: registers no implementation; decorate"),
        (("run", "--impl", "nsa_verify.kernels.vectorized:warp"), "registers vectorized, not 'warp'"),
        (
            ("run", "--only", "warp"),
            "--only warp: no such implementation; there are onepass, precomputed-batched-copy, precomputed-copy,",
        ),
        (("run", "--device", "cuda"), "--device cuda: PyTorch sees no CUDA device here; use --device cpu, or"),
        (("run", "--device", "tpu"), "Invalid value for '--device': 'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (("run", "--warp"), "No such option '--warp'"),
        (("run", "--warp"), "(see nsa-verify run --help)"),
        (("run", "--mode", "encode"), "Invalid value for '--mode': 'encode' is not a valid Mode; there are decode,"),
        (("run", "--profile", "dawn"), "Invalid value for '--profile': 'dawn' is not one of 'dev', 'ci', 'nightly'"),
        (("run", "--executor", "warp"), "'warp' is not one of 'eager', 'graph', 'simulated-graph' (see"),
        (("run", "--executor", ELSEWHERE), REFUSED),
        (("run", "--executor", "eager", "--executor", ELSEWHERE), REFUSED),
        (("replay", "--executor", ELSEWHERE, "text.md"), REFUSED),
        (("run", "--max-time", "soon"), "--max-time soon: must be a time such as 90, 90s, 15m or 6h"),
        (("run", "--max-time", "-1"), "--max-time -1: must be a time"),
        (("run", "--max-time", "nan"), "--max-time nan: must be a time"),
        (("run", "--max-time", ""), "--max-time : must be a time"),
        (("corpus", "list", "--corpus", ""), "Invalid value for '--corpus': is empty; leave it out, or"),
        (("run", "--workers", "many"), "--workers many: must be a number from 1 to 256, or auto"),
        (("run", "--workers", "0"), "--workers 0: must be a number"),
        (("run", "--workers", "-2"), "--workers -2: must be a number"),
        (("run", "-n", "0"), "Invalid value for '-n' / '--max-examples': 0 is not in the range x>=1"),
        (("run", "--seed", "-1"), "Invalid value for '--seed': -1 is not in the range 0<=x<="),
        (("run", "surplus"), "Got unexpected extra argument (surplus) (see nsa-verify run --help)"),
        (("run", "--corpus", "nothing.py"), "nothing.py: cannot save cases here: nothing.py: not a directory; make"),
        (("run", "--corpus", "text.md/below"), "text.md/below: cannot save cases here: "),
        (("replay", "nowhere"), "nowhere: there is no such file or folder; check the path"),
        (("replay",), "corpus: there is no such file or folder; check the path"),
        (("replay", "folder"), "folder: holds no saved case; nothing was tested"),
        (("replay", "--device", "cuda", "text.md"), "--device cuda: PyTorch sees no CUDA device here"),
        (("corpus", "list"), "corpus: there is no such file or folder; check the path"),
        (("corpus", "show", "abc"), "corpus: there is no such file or folder; check the path"),
        (("explain", "NV999"), "NV999: no such code; there are NV101, NV102,"),
        (("warp",), "No such command 'warp' (see nsa-verify --help)"),
    ],
)
def test_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU, and it is the worker that asks")
    (folder / "folder").mkdir()
    texts = {
        "raises.py": "import math\n\nraise ValueError('cannot')\n",
        "exits.py": "import sys\nsys.exit(0)\n",
        "syntax.py": "x = 1\ndef refresh(:\n",
        "deep.py": "import json\njson.loads('')\n",
        "nothing.py": "x = 1\n",
        "text.md": "# A text\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    written(folder, name="vectorized", file="taken.py")
    workers = ("-w", 1) if arguments[0] == "run" and "--workers" not in arguments else ()
    assert sentence in refused(invoke(*arguments, *workers))
    assert not (folder / "corpus").exists()


def _spoilt(**changes: Any) -> Callable[[dict[str, Any]], str]:
    def spoil(content: dict[str, Any]) -> str:
        content = content | {name: value for name, value in changes.items() if name in content or name == "surplus"}
        request = content["case"]["replays"][0]["requests"][0]
        request |= {name: value for name, value in changes.items() if name in request}
        return json.dumps(content)

    return spoil


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "truncated": (lambda content: json.dumps(content)[:200], "not valid JSON, perhaps truncated, at line 1 column "),
    "empty": (lambda _: "", "the file is empty; restore or remove it"),
    "surplus": (_spoilt(surplus=1), "object contains unknown field `surplus`"),
    "version": (_spoilt(version=9), "field version is 9; this program reads 1; use the nsa-verify that wrote the file"),
    "longer": (
        _spoilt(seq_len=999),
        "seq_len = 999: longer than its pool row holds (pool_width = 8, at most 8 in decode",
    ),
    "float": (_spoilt(seq_len=8.5), "field case.replays[0].requests[0].seq_len: expected `int`, got `float`"),
}


@pytest.mark.parametrize("command", [("replay", "--only", "vectorized"), ("corpus", "list")])
def test_damaged_files_are_named_and_the_others_still_count(folder: Path, command: tuple[str, ...]) -> None:
    good = saved(folder)
    content = good.read_text()
    for name, (damage, _) in DAMAGES.items():
        (good.parent / f"{name}.json").write_text(damage(json.loads(content)))
    done = invoke(*command)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    for name, (_, sentence) in DAMAGES.items():
        told = [line for line in done.output.splitlines() if f"/{name}.json" in line]
        assert len(told) == 1, name
        assert told[0].startswith(("ERROR  corpus/", "Error: corpus/"))
        assert sentence in told[0]
    if command[0] == "replay":
        assert f"FIXED  {good.relative_to(folder)} (2 of 2 agree)\n" in done.stdout
        assert f"1 FIXED, 0 FAILED, {len(DAMAGES)} ERROR\n" in done.stdout
    else:
        assert f"crashing/decode/{good.name}  NV101 short-top-k" in done.stdout
        assert "\n1 case\n" in done.stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_a_corpus_that_becomes_unwritable_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def refuse(root: Path, *_: object) -> Path:
        raise CorpusError(f"{root}: cannot save cases here: no space left on device; make room")

    monkeypatch.setattr(keeping, "put_beside", refuse)
    written(folder)
    done = invoke(*MINE, *(["--json"] if as_json else []))
    assert refused(done) == "corpus: cannot save cases here: no space left on device; make room"
    if as_json:
        told = json.loads(done.stdout)
        (finding,) = told["findings"]
        assert (told["exit_code"], finding["path"], finding["reproduce"]) == (2, None, None)
        assert "no space left on device" in finding["problem"]
        assert finding["case"]["replays"][0]["requests"] == [{"seq_len": 8, "pool_row": 0, "accept_len": 1}]
        return
    assert "short-top-k [eager] NV101  NOT SAVED\n" in done.stdout
    text = done.stdout[done.stdout.index("\n{\n") : done.stdout.index("\n}\n") + 2]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    printed = Path("by-hand.json")
    printed.write_text(text)
    again = invoke("replay", printed, "--impl", "mine.py", "--only", "short-top-k")
    assert "(0 of 2 agree)" in again.stdout
    assert (again.exit_code, "1 FAILED" in again.stdout) == (1, True)


def test_a_document_says_that_the_run_failed(folder: Path) -> None:
    done = invoke("run", "--only", "warp", "-w", 1, "--json")
    sentence = refused(done)
    assert json.loads(done.stdout) == {"exit_code": 2, "error": sentence, "findings": [], "unknown": []}


def test_triton_that_was_imported_too_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import triton.language

    assert triton.language.int32 is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    sentence = refused(invoke(*RUN, "--no-isolation"))
    assert sentence == "Triton was imported before its interpreter was chosen; set TRITON_INTERPRET=1 for the CPU"


def test_a_reporter_that_fails_changes_nothing_but_the_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_verify.shell.reporter import TerminalReporter

    def fail(*_: object) -> None:
        raise ValueError("cannot [print]")

    monkeypatch.setattr(TerminalReporter, "_advance", fail)
    written(folder)
    done = invoke(*MINE)
    assert done.exit_code == 1
    assert done.stderr == "Error: the report failed (ValueError: cannot [print]); the run goes on without it\n"
    assert len(list(folder.glob("corpus/crashing/decode/*.json"))) == 1


def test_a_fault_of_the_program_itself_is_no_disagreement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Kind | Entry:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(keeping, "entry_of", fail)
    written(folder)
    done = invoke(*MINE)
    assert done.exit_code == 2
    assert "ZeroDivisionError: planted\n" in done.stderr
    assert done.stderr.endswith("Error: nsa-verify itself failed (ZeroDivisionError); please report the lines above\n")


def test_a_finding_that_a_killed_run_left_and_nobody_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left = Path("corpus", ".inflight", "1-a", "reported.json")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"\xff\xfe")
    assert "reported.json: not UTF-8 text" in refused(invoke(*RUN[:3], "-n", 1, "--only", "vectorized"))
    assert left.exists()
