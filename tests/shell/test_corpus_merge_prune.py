"""``corpus merge`` and ``corpus prune``: what they say, what they refuse, and other processes beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine.corpora import content, entry_of, saved
from shell.commands import invoke, refused

from nsa_verify.engine.corpus import Kind, load, scan


def test_merge(folder: Path) -> None:
    saved(folder / "corpus", entry_of(8, date="2025-02-01"), entry_of(9))
    one, two = (
        saved(folder / "other", it)[0].relative_to(folder) for it in (entry_of(8, date="2025-01-01"), entry_of(10))
    )
    (mended,) = saved(folder / "other", entry_of(9), kind=Kind.REGRESSION)
    done = invoke("corpus", "merge", "other")
    assert (done.exit_code, done.stderr) == (0, "")
    left = mended.relative_to(folder)
    assert sorted(done.stdout.splitlines()[:-1]) == [
        f"copied corpus/{two.relative_to('other')}",
        f"left   {left}: the case is here as corpus/crashing/decode/{mended.name}",
        f"older  corpus/{one.relative_to('other')}",
    ]
    assert done.stdout.endswith("\n1 copied, 1 given an older provenance, 0 here already, 1 left out\n")
    again = invoke("corpus", "merge", "other")
    told = "0 copied, 0 given an older provenance, 2 here already, 1 left out; nothing was changed"
    assert (again.exit_code, again.stdout.splitlines()[-1]) == (0, told)


def test_merge_into_a_corpus_that_is_not_there_yet(folder: Path) -> None:
    saved(folder / "other", entry_of(8))
    done = invoke("corpus", "merge", "other", "--corpus", "new/corpus", "--json")
    told = json.loads(done.stdout)
    assert told["counts"] == {"copied": 1, "older": 0, "here": 0, "left": 0}
    assert (told["cases"][0]["fate"], told["problems"]) == ("copied", [])
    assert content(folder / "new" / "corpus") == content(folder / "other")


@pytest.mark.parametrize("as_json", [False, True])
def test_merge_names_damaged_files_and_copies_the_others(folder: Path, as_json: bool) -> None:
    (good,) = saved(folder / "other", entry_of(8))
    good.with_name("aaa.json").write_text("{")
    done = invoke("corpus", "merge", "other", *(["--json"] if as_json else []))
    assert refused(done).startswith("other/crashing/decode/aaa.json: not valid JSON")
    assert content(folder / "corpus") == {f"crashing/decode/{good.name}": good.read_bytes()}
    assert not as_json or len(json.loads(done.stdout)["problems"]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("merge",), "Missing argument 'DIR...' (see nsa-verify corpus merge --help)"),
        (("merge", "nowhere"), "nowhere: there is no such folder; check it"),
        (("merge", "text.md"), "text.md: is a file; give the folder of a corpus"),
        (("merge", "empty"), "empty: is no corpus: it holds none of seeds, regression, crashing; give the folder"),
        (("merge", "corpus"), "corpus: is the corpus corpus itself; give another corpus, or another --corpus"),
        (("merge", "corpus/crashing"), "corpus/crashing: lies in the corpus corpus itself; give another corpus"),
        (("merge", "corpus", "--corpus", "text.md"), "text.md: cannot save cases here: "),
        (("merge", "corpus", "--corpus", "corpus/crashing/x"), "corpus: the corpus corpus/crashing/x lies in its"),
        (("prune", "--corpus", "nowhere"), "nowhere: there is no such file or folder; check the path"),
        (("prune", "surplus"), "Got unexpected extra argument (surplus) (see nsa-verify corpus prune --help)"),
        (("minimize", "--corpus", "nowhere"), "nowhere: there is no such file or folder; check the path"),
        (("minimize", "abc"), "abc: no crashing case of corpus has this path, stem or start of hash; see nsa-verify"),
        (("minimize", "text.md"), "text.md: no crashing case of corpus has this path, stem or start of hash"),
        (("minimize", "--deadline", "soon"), "--deadline soon: must be a time such as 90, 90s, 15m or 6h"),
        (("minimize", "--impl", "nowhere.py"), "--impl nowhere.py: there is no such file"),
        (("promote", "--corpus", "nowhere"), "nowhere: there is no such file or folder; check the path"),
        (("promote", "nv101-short-top-k"), "nv101-short-top-k: no crashing case of corpus has this path, stem or"),
        (("promote", "--only", "warp"), "--only warp: no such implementation; there are onepass, "),
        (("promote", "-w", "many"), "--workers many: must be a number from 1 to 256, or auto"),
        (("promote", "--max-memory", "much"), "--max-memory much: must be a size such as 900M or 4G"),
    ],
)
def test_one_sentence(folder: Path, arguments: tuple[str, ...], sentence: str) -> None:
    (folder / "empty").mkdir()
    (folder / "text.md").write_text("# A text\n")
    saved(folder / "corpus", entry_of(8))
    before = content(folder / "corpus")
    told = refused(invoke("corpus", *arguments))
    assert told.startswith(sentence)
    assert content(folder / "corpus") == before


def test_a_short_name_that_means_two(folder: Path) -> None:
    paths = saved(folder / "corpus", *(entry_of(length) for length in range(8, 26)))
    starts = [path.stem[-12] for path in paths]
    shared = next(start for start in starts if starts.count(start) > 1)
    told = refused(invoke("corpus", "promote", shared))
    assert told.startswith(f"{shared}: {starts.count(shared)} crashing cases of corpus are called so (")


def test_prune(folder: Path) -> None:
    small, large = saved(folder / "corpus", entry_of(10), entry_of(12))
    other, free = (saved(folder / "corpus", entry_of(n, found=False), slug="none")[0] for n in (13, 4))
    (seed,) = saved(folder / "corpus", entry_of(10, found=False), kind=Kind.SEEDS, slug="seed")
    before = content(folder / "corpus")
    kept_in = f"short-top-k NV101 decode nsa_cache_seqlens inside is kept in corpus/crashing/decode/{small.name}"
    lines = [
        f"remove corpus/crashing/decode/{large.name}: {kept_in}, and others have its pairs of labels",
        f"remove corpus/crashing/decode/{other.name}: others have its pairs of labels",
    ]
    dry = invoke("corpus", "prune", "--dry-run")
    assert (dry.exit_code, dry.stderr) == (0, "")
    *told, summary = dry.stdout.splitlines()
    assert sorted(told) == sorted(f"would {line}" for line in lines)
    assert summary.startswith("2 to remove, 3 kept; pairs of labels covered: ")
    assert content(folder / "corpus") == before
    done = invoke("corpus", "prune")
    *told, summary = done.stdout.splitlines()
    assert sorted(told) == sorted(line.replace("remove", "removed", 1) for line in lines)
    assert summary.startswith("2 removed, 3 kept; pairs of labels covered: ")
    (pairs_before, pairs_after) = (word for word in summary.split() if word.isdigit() and int(word) > 9)
    assert pairs_before == pairs_after
    assert set(scan(folder / "corpus")) == {small, free, seed}
    again = invoke("corpus", "prune")
    assert again.stdout.splitlines()[0].startswith("0 removed, 3 kept; ")
    assert again.stdout.splitlines()[1] == "nothing is superfluous"


def test_prune_names_damaged_files(folder: Path) -> None:
    small, large = saved(folder / "corpus", entry_of(10), entry_of(12))
    small.with_name("aaa.json").write_text("{")
    done = invoke("corpus", "prune", "--json")
    assert refused(done).startswith("corpus/crashing/decode/aaa.json: not valid JSON")
    told = json.loads(done.stdout)
    assert [it["path"] for it in told["removed"]] == [str(large.relative_to(folder))]
    assert told["removed"][0]["kept_in"] == str(small.relative_to(folder))
    assert (told["kept"], told["dry_run"], len(told["problems"])) == (1, False, 1)
    assert told["pairs_before"] == told["pairs_after"] > 0


SAVES = """
import sys
from pathlib import Path
from engine.corpora import entry_of, saved

for length in range(100, 130):
    saved(Path(sys.argv[1]), entry_of(length, buffer=f"page_table_{length}"))
print("done", flush=True)
"""


def test_another_process_that_saves_meanwhile_loses_nothing(folder: Path) -> None:
    saved(folder / "corpus", *(entry_of(length) for length in range(10, 26)))
    saved(folder / "other", *(entry_of(length, buffer="page_table_1") for length in range(30, 50)))
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n{SAVES}"]
    with subprocess.Popen([*command, "corpus"], stdout=subprocess.PIPE, text=True) as writer:
        while writer.poll() is None:
            assert invoke("corpus", "merge", "other").exit_code == 0
            assert invoke("corpus", "prune").exit_code == 0
    assert writer.returncode == 0
    kept = [load(path) for path in scan(folder / "corpus")]
    lengths = {it.case.replays[0].requests[0].seq_len for it in kept}
    assert lengths >= set(range(100, 130))
    assert invoke("corpus", "prune").exit_code == 0
    found = [it.finding.buffer for it in map(load, scan(folder / "corpus")) if it.finding is not None]
    assert set(found) == {"nsa_cache_seqlens", "page_table_1", *(f"page_table_{n}" for n in range(100, 130))}


KILLED = """
import os, sys
from nsa_verify.shell.cli import cli

calls, moment, name = 0, int(sys.argv[1]), sys.argv[2]
real = getattr(os, name)

def deadly(*arguments, **options):
    global calls
    calls += 1
    if calls == moment:
        os._exit(9)
    real(*arguments, **options)

setattr(os, name, deadly)
cli(sys.argv[3:], prog_name="nsa-verify")
"""


@pytest.mark.parametrize(
    ("name", "command"),
    [("replace", ("merge", "other")), ("unlink", ("prune",))],
)
def test_killed_and_run_again(folder: Path, name: str, command: tuple[str, ...]) -> None:
    saved(folder / "corpus", *(entry_of(length) for length in (10, 12, 20)))
    saved(folder / "other", entry_of(8, buffer="page_table_1"), entry_of(9))
    done = subprocess.run([sys.executable, "-c", KILLED, "2", name, "corpus", *command], check=False)
    assert done.returncode == 9
    files = len(content(folder / "corpus"))
    assert invoke("corpus", *command).exit_code == 0
    assert len(content(folder / "corpus")) == files + (1 if name == "replace" else -1)
    assert not list((folder / "corpus").rglob("*.tmp"))
