"""Campaigns on machines that share no disk share their minimal cases, through a database of Hypothesis.

A value of the database is the JSON of a crashing case, as ``corpus.dumps`` writes it, under ``KEY``. The corpus stays
the record: an exchange compares the two and gives each what it lacks, so what one that failed did not send the next one
does. A case is removed from the database by whoever has put a smaller one of its group there, and for nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from nsa_verify.core.case import Case
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, dumps, load, loads, scan
from nsa_verify.engine.events import Exchanged
from nsa_verify.engine.filing import Fate, put_instead
from nsa_verify.engine.keeping import slug_for
from nsa_verify.engine.merging import put
from nsa_verify.engine.process import EngineError
from nsa_verify.engine.triage import Bug, Saved, groups, measure

if TYPE_CHECKING:
    from hypothesis.database import ExampleDatabase
    from redis import Redis

KEY: Final = b"nsa-verify/crashing/1"
"""What values lie under; the number is that of the corpus format. In Redis ``hypothesis-example:`` comes before it."""
SCHEMES: Final = ("redis", "rediss", "unix")
EXPIRES_AFTER: Final = timedelta(days=90)
"""How long Redis keeps the cases if no campaign asks for them."""
CONNECT_S: Final = 5.0
ANSWER_S: Final = 15.0
"""How long Redis may be silent before it counts as gone."""
_READ_WRITE: Final = os.R_OK | os.W_OK | os.X_OK


class ExchangeError(EngineError):
    """The database cannot be used; the message is one sentence that names it, why, and the remedy."""


def shown(text: str) -> str:
    """A URL, or an argument with one in it, without user, password and options: they may be secret."""
    start, separator, rest = text.partition("://")
    if not separator:
        return text
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    if "@" not in place and "@" in rest:  # a password that is not %-encoded: nobody can tell where it ends
        return f"{start}://..."
    return f"{start}://{place.rpartition('@')[2]}"


@contextmanager
def opened(url: str) -> Iterator[Exchange | None]:
    """The database that ``--database`` names, a URL of Redis or a folder; None for ``""``. Raises ``ExchangeError``.

    It is not reached for yet.
    """
    if not url:
        yield None
    elif url.partition("://")[0] in SCHEMES:
        client, failures = _client(url)
        with client:
            from hypothesis.extra.redis import RedisExampleDatabase

            yield Exchange(RedisExampleDatabase(client, expire_after=EXPIRES_AFTER), shown(url), failures)
    else:
        from hypothesis.database import DirectoryBasedExampleDatabase

        folder = _folder(url)
        yield Exchange(DirectoryBasedExampleDatabase(folder), url, (OSError,), lambda: _check_folder(folder))


def _client(url: str) -> tuple[Redis, tuple[type[Exception], ...]]:
    try:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError
        from redis.retry import Retry
    except ImportError as error:
        sentence = "the package redis is not installed; pip install 'nsa-verify[redis]', or give a folder"
        raise ExchangeError(f"--database {shown(url)}: {sentence}") from error
    wrong = ExchangeError(
        f"--database {shown(url)}: is no URL of Redis; write redis://[:password@]host[:port][/number],"
        " with what is special in a password as %XX"
    )
    if not re.match(r"unix://|rediss?://[^/?#]+(/\d*)?([?#]|$)", url):
        raise wrong
    try:
        # Once more, since a server may have closed a connection that was not used for the length of a search.
        once_more = Retry(NoBackoff(), 1)
        client = Redis.from_url(url, socket_connect_timeout=CONNECT_S, socket_timeout=ANSWER_S, retry=once_more)
        client.connection_pool.make_connection()
        is_binary = not client.get_encoder().decode_responses
    except (TypeError, ValueError, RedisError):  # what they say may have a piece of the password in it
        raise wrong from None
    if not is_binary:
        raise wrong
    return client, (OSError, RedisError)


def _folder(url: str) -> Path:
    if "://" in url or (re.match(r"\w+:", url) and not os.path.exists(url)):
        what = f"give a URL that begins with {', '.join(f'{it}://' for it in SCHEMES)}, or the path of a folder"
        raise ExchangeError(f"--database {shown(url)}: there is no such kind of database; {what}")
    folder = Path(url)
    if folder.exists() and not folder.is_dir():
        raise ExchangeError(f"--database {folder}: is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = (error.strerror or str(error)).lower()
        raise ExchangeError(f"--database {folder}: cannot be made: {what}; give another folder") from error
    return folder


def _check_folder(folder: Path) -> None:
    """Hypothesis takes a folder that is gone for an empty one, and makes it anew."""
    if not folder.is_dir():
        raise FileNotFoundError("there is no such folder any more")
    if not os.access(folder, _READ_WRITE):
        raise PermissionError("it may not be read and written")


_Size = tuple[int, tuple[int, ...]]


class _Value(NamedTuple):
    text: bytes
    entry: Entry


class _Lacks(NamedTuple):
    """What the corpus and the database lack of each other."""

    taken: list[tuple[Entry, Saved | None]]
    """Cases for the corpus, each with the larger one of its group there."""
    sent: dict[Bug, bytes]
    replaced: dict[Bug, list[bytes]]
    """What larger cases of these groups the database has."""
    there: dict[Bug, _Size]
    """How large the smallest case of each group of the database is."""


class Exchange:
    """The database of a campaign. ``name`` is its URL, with nothing secret in it.

    ``failures`` are the exceptions that mean that it cannot be reached now; ``check`` raises one if it knows why not.
    """

    def __init__(
        self,
        database: ExampleDatabase,
        name: str,
        failures: tuple[type[Exception], ...],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.waiting, self.problem = name, 0, ""
        self._database, self._failures, self._check = database, failures, check
        self._failed = 0
        self._there: dict[Bug, _Size] = {}
        """``_Lacks.there`` as it was last seen."""
        self._replaced: set[bytes] = set()
        """What is still to be removed."""
        self._told: set[bytes] = set()
        self._rivals: list[tuple[Saved, Path]] = []

    def begin(self, root: Path) -> Exchanged:
        """The first exchange. Raises ``ExchangeError`` if it fails, and ``CorpusError``."""
        told = self.go_on(root)
        if self.problem:
            raise ExchangeError(f"--database {self.problem}; start it or correct --database, or run without it")
        return told

    def go_on(self, root: Path, fixed: Collection[Path] = (), take: bool = True) -> Exchanged:
        """Give the corpus ``root`` and the database what they lack of each other.

        ``fixed`` are crashing cases that agree now: they are not sent, and stand for no group. A database that cannot
        be reached is told, and nothing is lost: the corpus has it all. Raises ``CorpusError``.
        """
        saved = groups(root)[0]
        ours = {bug: still[0] for bug, them in saved.items() if (still := [it for it in them if it.path not in fixed])}
        mended = _mended(root, [it.entry for them in saved.values() for it in them if it.path in fixed])
        left = {bug for bug, it in ours.items() if bug not in self._there or measure(it.entry) < self._there[bug]}
        taken: list[Path] = []
        values: set[bytes] = set()
        sent = removed = 0
        self.problem = ""
        try:
            with self._reaching():
                values = self._values()
                lacks = _compare(self._read(values), ours, mended)
            if take:
                taken = self._take(root, lacks)
            with self._reaching():
                left = set(lacks.sent)
                self._send(lacks)
                now = _compare(self._read(self._values()), ours, mended) if left else lacks
                left, self._there = set(now.sent), now.there
                sent = len(lacks.sent.keys() - left)
                removed = self._remove(it for bug in lacks.replaced.keys() - left for it in lacks.replaced[bug])
            if left:
                self.problem = f"{self.name}: does not keep what it is given; make room there, or let it be written"
        except ExchangeError as error:
            self.problem = str(error)
        self._failed += bool(self.problem)
        self.waiting = len(left)
        problems = self._problems(values)
        return Exchanged(
            database=self.name,
            taken=tuple(taken),
            sent=sent,
            removed=removed,
            unreadable=len(problems),
            example=problems[0] if problems else "",
            waiting=self.waiting,
            failures=self._failed,
            problem=self.problem,
        )

    def unsent(self) -> list[str]:
        """The sentence that says what could not be sent, if anything could not."""
        if not self.waiting:
            return []
        cases = "1 case was" if self.waiting == 1 else f"{self.waiting} cases were"
        return [f"{self.problem}; {cases} not sent, which the next campaign over this corpus does"]

    def settle(self, root: Path, failed: Collection[Path]) -> list[Bug]:
        """Remove the larger case of each group of which a smaller one was taken, if that is in ``failed``; the groups.

        It fails here too, then; if it does not, the larger one is what stands for the group.
        """
        settled = []
        for older, path in self._rivals:
            # Somebody changed one of them meanwhile: both stay.
            with suppress(CorpusError):
                if path in failed:
                    put_instead(root, older.path, older.entry, Kind.CRASHING, load(path))
                    settled.append(Bug.of(older.finding))
        self._rivals.clear()
        return settled

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            self._check()
            yield
        except self._failures as error:
            why = next(iter(str(error).splitlines()), "").rstrip(".") or type(error).__name__
            raise ExchangeError(f"{self.name}: cannot be used: {why}") from error

    def _values(self) -> set[bytes]:
        return set(self._database.fetch(KEY))

    def _read(self, values: Iterable[bytes]) -> dict[Bug, list[_Value]]:
        """The cases by group, in each the smallest first; what cannot be read is left out."""
        found: dict[Bug, list[_Value]] = {}
        for text in values:
            with suppress(CorpusError):
                entry = loads(text, self.name)
                if entry.finding is not None:
                    found.setdefault(Bug.of(entry.finding), []).append(_Value(text, entry))
        for them in found.values():
            them.sort(key=lambda it: (measure(it.entry), it.text))
        return found

    def _problems(self, values: set[bytes]) -> list[str]:
        """What is wrong with values of which it was not told yet."""
        problems = []
        for text in sorted(values - self._told):
            where = f"{self.name}, value {hashlib.sha256(text).hexdigest()[:12]}"
            try:
                if loads(text, where).finding is None:
                    problems.append(f"{where}: has no finding; remove it")
            except CorpusError as error:
                problems.append(str(error))
        self._told |= values
        return problems

    def _take(self, root: Path, lacks: _Lacks) -> list[Path]:
        taken = []
        for entry, older in lacks.taken:
            assert entry.finding is not None
            path, fate = put(root, Kind.CRASHING, entry, slug_for(entry.finding))
            if fate is Fate.COPIED:
                taken.append(path)
                if older is not None:
                    self._rivals.append((older, path))
        return taken

    def _send(self, lacks: _Lacks) -> None:
        for text in lacks.sent.values():
            self._database.save(KEY, text)

    def _remove(self, texts: Iterable[bytes]) -> int:
        """Once the smaller ones are there; what the connection is lost over is removed the next time."""
        self._replaced.update(texts)
        removed = 0
        for text in tuple(self._replaced):
            self._database.delete(KEY, text)
            self._replaced.discard(text)
            removed += 1
        return removed


def _identity(entry: Entry) -> tuple[Case, tuple[Case, ...], Bug | None]:
    return entry.case, entry.before, Bug.of(entry.finding) if entry.finding is not None else None


def _mended(root: Path, fixed: Iterable[Entry]) -> set[tuple[Case, tuple[Case, ...], Bug | None]]:
    """What is known to be mended here: regression cases, and ``fixed``."""
    found = {_identity(entry) for entry in fixed}
    folder = root / Kind.REGRESSION
    for path in scan(folder) if folder.is_dir() else ():
        with suppress(CorpusError):  # the replay of saved cases says what is wrong with it
            found.add(_identity(load(path)))
    return found


def _compare(
    theirs: dict[Bug, list[_Value]],
    ours: dict[Bug, Saved],
    mended: Collection[tuple[Case, tuple[Case, ...], Bug | None]],
) -> _Lacks:
    """Of each group the smaller case is for both; one that is known to be mended here stands for nothing."""
    lacks = _Lacks([], {}, {}, {})
    for bug in sorted({*theirs, *ours}):
        others = [it for it in theirs.get(bug, []) if _identity(it.entry) not in mended]
        mine = ours.get(bug)
        if others:
            lacks.there[bug] = measure(others[0].entry)
        if mine is None or (others and measure(others[0].entry) < measure(mine.entry)):
            lacks.taken.extend((it.entry, mine) for it in others[:1])
        elif not others or measure(mine.entry) < measure(others[0].entry):
            lacks.sent[bug] = dumps(mine.entry).encode()
            lacks.replaced[bug] = [it.text for it in others]
    return lacks
