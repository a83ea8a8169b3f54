"""``nsa-verify fuzz --database``: its sentences, and what no report may say."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine.databases import Server
from shell.commands import invoke, refused, saved, written
from shell.test_fuzz import QUICK, fuzz

from nsa_verify.engine.corpus import scan
from nsa_verify.engine.exchange import opened

SECRET = "hush"


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSA_VERIFY_DATABASE", raising=False)


def test_a_server_that_is_not_there_ends_it_before_anything_is_drawn() -> None:
    server = Server()
    server.stop()
    case = saved(Path())
    told = invoke("fuzz", *QUICK, "--only", "vectorized", "--database", server.url.replace("//", f"//me:{SECRET}@"))
    said = refused(told)
    assert said.startswith(f"--database {server.url}: cannot be used: ")
    assert said.endswith("; start it or correct --database, or run without it")
    assert SECRET not in told.output
    assert list(scan(Path("corpus/crashing"))) == [case]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--database", "http://host"), "--database http://host: there is no such kind of database"),
        (("--database", f"redis://:{SECRET}@host/x"), "--database redis://host/x: is no URL of Redis"),
        (("--database", "a-file"), "--database a-file: is a file; give a folder"),
        (("--database", "shared", "--mode", "prune"), "--mode prune finds nothing to share: leave out --database"),
    ],
)
def test_what_is_no_database_is_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    Path("a-file").touch()
    limits = () if "prune" in arguments else QUICK
    said = refused(invoke("fuzz", *limits, *arguments))
    assert words in said
    assert SECRET not in said


def test_prune_leaves_the_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_VERIFY_DATABASE", "shared")
    Path("corpus/crashing").mkdir(parents=True)
    told = invoke("fuzz", "--mode", "prune", "--only", "vectorized", "--no-isolation")
    assert told.exit_code == 0, told.output
    assert not Path("shared").exists()


def test_a_password_is_in_no_report_and_in_no_case() -> None:
    server = Server()
    try:
        server.require(SECRET)
        written(Path())
        url = server.url.replace("//", f"//:{SECRET}@")
        reports = [argument for kind in ("ndjson", "json", "observability") for argument in ("--report", kind)]
        mine = ("--impl", "mine.py", "--only", "short-top-k")
        told = fuzz(*mine, *QUICK, "--max-time", "1s", "--slice", "1s", f"--database={url}", *reports)
        assert told.exit_code == 1, told.output
        assert f"database {server.url}: 1 case sent" in told.stdout
        assert SECRET not in told.output
        files = [path for path in Path().rglob("*") if path.is_file()]
        assert any("ndjson" in path.name for path in files)
        assert not [path for path in files if SECRET.encode() in path.read_bytes()]
        # Without the option, what stands in for Redis lets anybody in.
        with opened(url.replace(SECRET, f"not-{SECRET}") + "?protocol=2") as exchange:
            assert exchange is not None
            problem = exchange.go_on(Path("other")).problem
            assert problem.startswith(f"{server.url}: cannot be used: ")
            assert "password" in problem
            assert SECRET not in problem
        with opened(url) as exchange:
            assert exchange is not None
            assert exchange.begin(Path("other")).taken
    finally:
        server.stop()
