"""Campaigns that share a database: what one machine has found, the others know."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine.corpora import content, entry_of, saved
from engine.databases import Server
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase
from hypothesis.extra.redis import RedisExampleDatabase
from msgspec.structs import replace
from redis import Redis
from shell.commands import registry_of_its_own, written

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Code, Signature
from nsa_verify.engine.campaign import BATCH, CHANGE, campaign
from nsa_verify.engine.corpus import Entry, Kind, dumps, load, loads, scan
from nsa_verify.engine.events import (
    CampaignFinished,
    CaseReplayed,
    Event,
    Exchanged,
    Shrinking,
    SliceFinished,
    SliceStarted,
)
from nsa_verify.engine.exchange import KEY, ExchangeError, opened, shown
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.record import recorded
from nsa_verify.engine.totals import Ask


@pytest.fixture(name="server")
def _server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(name="url", params=["redis", "folder"])
def _url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "shared")
    server: Server = request.getfixturevalue("server")
    return server.url


@contextmanager
def database(url: str) -> Iterator[ExampleDatabase]:
    """As another program has it."""
    if "://" not in url:
        yield DirectoryBasedExampleDatabase(url)
        return
    with Redis.from_url(url) as client:
        yield RedisExampleDatabase(client)


def values(url: str) -> set[bytes]:
    with database(url) as shared:
        return set(shared.fetch(KEY))


def put(url: str, *texts: bytes | Entry) -> None:
    with database(url) as shared:
        for text in texts:
            shared.save(KEY, text if isinstance(text, bytes) else dumps(text).encode())


def exchanged(url: str, root: Path, *fixed: Path) -> Exchanged:
    with opened(url) as exchange:
        assert exchange is not None
        return exchange.go_on(root, fixed)


def crashing(root: Path) -> list[Entry]:
    return [load(path) for path in scan(root / Kind.CRASHING)]


def in_database(url: str) -> list[Entry]:
    return [loads(it, "value") for it in sorted(values(url))]


def test_what_one_has_the_other_gets_once(url: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    here, other = entry_of(9, date="2025-01-01"), entry_of(8, code=Code.STALE)
    saved(one, here)
    saved(two, other, slug="nv102-short-top-k")
    first = exchanged(url, one)
    assert (first.taken, first.sent, first.removed, first.problem) == ((), 1, 0, "")
    second = exchanged(url, two)
    assert ([load(path) for path in second.taken], second.sent) == ([here], 1)
    assert exchanged(url, one).taken
    assert content(one) == content(two)
    # Nothing is left to give.
    before = values(url)
    for root in (one, two):
        told = exchanged(url, root)
        assert (told.taken, told.sent, told.removed, told.unreadable) == ((), 0, 0, 0)
    assert values(url) == before


def test_a_smaller_case_replaces_a_larger_one(url: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    saved(one, entry_of(12))
    exchanged(url, one)
    saved(two, entry_of(8))
    told = exchanged(url, two)
    assert (told.taken, told.sent, told.removed) == ((), 1, 1)
    assert in_database(url) == crashing(two) == [entry_of(8)]
    with opened(url) as exchange:
        assert exchange is not None
        told = exchange.begin(one)
        assert len(told.taken) == 1
        assert len(crashing(one)) == 2  # until it is known to fail here too
        exchange.settle(one, set(told.taken))
    assert crashing(one) == [entry_of(8)]


def test_a_smaller_case_that_agrees_here_replaces_nothing(url: str, tmp_path: Path) -> None:
    saved(tmp_path, entry_of(12))
    put(url, entry_of(8))
    with opened(url) as exchange:
        assert exchange is not None
        told = exchange.begin(tmp_path)
        exchange.settle(tmp_path, ())
        assert crashing(tmp_path) == [entry_of(12), entry_of(8)]
        told = exchange.go_on(tmp_path, told.taken)
    assert (told.taken, told.sent, told.removed) == ((), 1, 0)
    assert {it.case for it in in_database(url)} == {entry_of(12).case, entry_of(8).case}


@pytest.mark.parametrize("slug", ["nv101-short-top-k", "a name of ours"])
def test_what_was_promoted_is_not_taken_again(url: str, tmp_path: Path, slug: str) -> None:
    put(url, entry_of(8))
    saved(tmp_path, entry_of(8, date="2025-01-01"), kind=Kind.REGRESSION, slug=slug)
    assert exchanged(url, tmp_path).taken == ()
    # It stands for nothing here: a larger one that was found since is shared.
    saved(tmp_path, entry_of(9))
    told = exchanged(url, tmp_path)
    assert (told.taken, told.sent, told.removed) == ((), 1, 0)
    assert len(values(url)) == 2


def test_one_case_of_a_group_is_taken(url: str, tmp_path: Path) -> None:
    put(url, entry_of(10), entry_of(8), entry_of(9))
    exchanged(url, tmp_path)
    assert crashing(tmp_path) == [entry_of(8)]


def test_what_cannot_be_read_is_told_once_and_stays(url: str, tmp_path: Path) -> None:
    newer = dumps(entry_of(9)).replace('"version": 1', '"version": 2').encode()
    damaged = [b"\xff", b"", b"{", b"[1]", b'{"format": "nsa-verify-case"}', newer, dumps(entry_of(9)).encode()[:99]]
    put(url, *damaged, entry_of(10, found=False), entry_of(8))
    with opened(url) as exchange:
        assert exchange is not None
        told = exchange.begin(tmp_path)
        assert (len(told.taken), told.unreadable, told.problem) == (1, len(damaged) + 1, "")
        assert f"{url}, value " in told.example
        assert exchange.go_on(tmp_path).unreadable == 0
    assert values(url) >= set(damaged)
    assert crashing(tmp_path) == [entry_of(8)]


def test_a_server_that_is_gone_is_told_and_made_up_for(server: Server, tmp_path: Path) -> None:
    with opened(server.url) as exchange:
        assert exchange is not None
        exchange.begin(tmp_path)
        saved(tmp_path, entry_of(9))
        server.stop()
        for failures in (1, 2):
            told = exchange.go_on(tmp_path)
            assert (told.waiting, told.failures) == (1, failures)
            assert told.problem.startswith(f"{server.url}: cannot be used: ")
        assert exchange.unsent() == [
            f"{told.problem}; 1 case was not sent, which the next campaign over this corpus does"
        ]
        server.start()
        told = exchange.go_on(tmp_path)
        assert (told.sent, told.waiting, told.problem, exchange.unsent()) == (1, 0, "", [])
        server.stop()
        assert exchange.go_on(tmp_path).waiting == 0
        server.start()
    assert in_database(server.url) == [entry_of(9)]


def test_the_larger_one_goes_though_the_connection_was_lost_before_that(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server.url, entry_of(12))
    saved(tmp_path, entry_of(8))
    with opened(server.url) as exchange:
        assert exchange is not None

        def lost(*_: object) -> None:
            raise ConnectionResetError("connection reset")

        with monkeypatch.context() as patched:
            patched.setattr(RedisExampleDatabase, "delete", lost)
            assert "connection reset" in exchange.go_on(tmp_path).problem
        assert len(values(server.url)) == 2
        assert exchange.go_on(tmp_path).removed == 1
    assert in_database(server.url) == [entry_of(8)]


def test_a_folder_that_does_not_keep_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "corpus", entry_of(8))
    with opened(str(tmp_path / "shared")) as exchange:
        assert exchange is not None
        with monkeypatch.context() as patched:
            patched.setattr(DirectoryBasedExampleDatabase, "save", lambda *_: None)
            told = exchange.go_on(tmp_path / "corpus")
        assert (told.waiting, told.sent) == (1, 0)
        assert "does not keep what it is given" in told.problem
        (tmp_path / "shared").rmdir()
        assert "there is no such folder any more" in exchange.go_on(tmp_path / "corpus").problem
        assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://host/0", "there is no such kind of database"),
        ("redis:host", "there is no such kind of database"),
        ("redis://host:port/0", "is no URL of Redis"),
        ("redis://host/name", "is no URL of Redis"),
        ("redis://host/0?nonsense=1", "is no URL of Redis"),
        ("redis://host/0?decode_responses=1", "is no URL of Redis"),
        ("redis://:sec/ret@host/0", "--database redis://host/0: is no URL of Redis"),
        ("redis://:sec?ret@host/0", "--database redis://...: is no URL of Redis"),
        ("file", "file: is a file; give a folder"),
        ("file/folder", "file/folder: cannot be made: not a directory"),
    ],
)
def test_what_is_no_database_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ExchangeError) as caught, opened(url):
        pass
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "sec" not in str(caught.value)


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ExchangeError, match=r"pip install 'nsa-verify\[redis\]'"), opened("redis://host"):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://host:1/2", "redis://host:1/2"),
        ("redis://:secret@host:1/2", "redis://host:1/2"),
        ("rediss://me:secret@host", "rediss://host"),
        ("unix:///run/redis.sock?db=1&password=secret", "unix:///run/redis.sock"),
        ("redis://host?password=secret@more", "redis://..."),
        ("--database=redis://:se@cret@host", "--database=redis://host"),
        ("--max-time", "--max-time"),
    ],
)
def test_secrets_are_not_shown(text: str, expected: str) -> None:
    assert shown(text) == expected


def asked(folder: Path, name: str, url: str, **others: Any) -> Ask:
    """A campaign of the machine ``name``; what it searches is wrong in about every second case."""
    mine = str(written(folder))
    plan = Plan(references=(mine,), only=("short-top-k",), executors=("eager",), seed=3, device="cpu", isolate=False)
    ask = Ask(kind=BATCH, plan=plan, root=folder / name, budget_s=1, version="1", command="", database=url)
    return replace(ask, **others)


def run(ask: Ask, listen: Callable[[Event], object] = lambda _: None) -> list[Event]:
    told = []
    with registry_of_its_own():
        for event in campaign(ask):
            told.append(event)
            listen(event)
    return told


def shrunk(told: list[Event]) -> set[Signature]:
    return {it.signature for it in told if isinstance(it, Shrinking)}


def test_a_finding_of_one_machine_is_known_to_the_other(server: Server, tmp_path: Path) -> None:
    first = run(asked(tmp_path, "one", server.url, kind=CHANGE, budget_s=60))
    found = crashing(tmp_path / "one")
    assert found
    assert in_database(server.url)

    second = run(asked(tmp_path, "two", server.url, budget_s=2))
    assert isinstance(second[1], Exchanged)
    assert [load(path) for path in second[1].taken] == found
    replayed = [it for it in second if isinstance(it, CaseReplayed)]
    assert [(it.path, it.status) for it in replayed] == [(path, "FAILED") for path in second[1].taken]
    assert not shrunk(first) & shrunk(second)
    ended = second[-1]
    assert isinstance(ended, CampaignFinished)
    assert ended.exit_code == 1
    known = [it for it in ended.groups if it.path in second[1].taken]
    assert [(it.is_new, it.is_fixed) for it in known] == [(False, False)] * len(found)


def test_a_finding_that_comes_in_the_middle_is_replayed_at_once(server: Server, tmp_path: Path) -> None:
    ask = asked(tmp_path, "one", server.url)
    ask = replace(ask, plan=replace(ask.plan, modes=(Mode.TARGET_VERIFY,)))  # in which it finds nothing

    def listen(event: Event) -> None:
        if isinstance(event, SliceStarted):
            put(server.url, entry_of(8))

    told = run(ask, listen)
    at = next(index for index, it in enumerate(told) if isinstance(it, SliceFinished))
    came, replayed = told[at + 1 : at + 3]
    assert isinstance(came, Exchanged)
    assert isinstance(replayed, CaseReplayed)
    assert ((replayed.path,), replayed.status) == (came.taken, "FAILED")
    # The next search does not shrink what looks like it.
    with recorded(ask.root) as record:
        (sighting,) = record.sightings.values()
        assert sighting.signatures == [
            Signature("short-top-k", "eager", Code.WRONG_VALUE, "nsa_cache_seqlens inside", Mode.DECODE)
        ]


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_campaign_goes_on_without_the_server(server: Server, tmp_path: Path, comes_back: bool) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, SliceStarted) and event.number == 0:
            server.stop()
        elif isinstance(event, Exchanged) and event.problem and comes_back:
            server.start()

    slices = 2 if comes_back else 1
    told = run(asked(tmp_path, "one", server.url, budget_s=slices, slice_s=1), listen)
    exchanges = [it for it in told if isinstance(it, Exchanged)]
    assert [bool(it.problem) for it in exchanges[:2]] == [False, True]
    assert exchanges[1].waiting > 0
    ended = told[-1]
    assert isinstance(ended, CampaignFinished)
    if comes_back:
        assert sum(it.sent for it in exchanges) >= exchanges[1].waiting
        assert sorted(map(dumps, in_database(server.url))) == sorted(map(dumps, crashing(tmp_path / "one")))
        assert not ended.problems
    else:
        (problem,) = ended.problems
        assert "not sent, which the next campaign over this corpus does" in problem
