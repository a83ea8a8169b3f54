"""Minimizing: saved cases made smaller by our own measure, each still showing the finding that it was saved for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Finding, Outcome, Verdict
from nsa_verify.engine.accused import problem_of, runs_needed, same_finding
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, SavedFinding, load
from nsa_verify.engine.crew import Crew, Promise
from nsa_verify.engine.filing import fold, put_instead
from nsa_verify.engine.isolation import Inside, Keeper
from nsa_verify.engine.messages import Hello
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.searcher import DEATHS, Seen, keeper_of, stopping
from nsa_verify.engine.shrinking import shrink
from nsa_verify.engine.simplifying import simplified

PROBES: Final = 50_000
"""Far more than cases usually take: it ends when no step leads to a smaller one."""
SLOW_PROBES: Final = 500
"""The same for what kills or hangs, which takes its time with every probe."""


class Result(StrEnum):
    """What became of a saved case."""

    SMALLER = "SMALLER"
    """A smaller one is in its place."""
    MINIMAL = "MINIMAL"
    """No step leads to a smaller one."""
    SAME = "SAME"
    """It is minimal, and another file of its group has the same case: that one stays."""
    FIXED = "FIXED"
    """It does not fail any more, and is left as it is."""
    OTHER = "OTHER"
    """It fails, but not as it did when it was saved, and is left as it is."""
    ERROR = "ERROR"
    """It could not be judged, and is left as it is."""


class Shrunk(Struct, frozen=True):
    """What a searcher says of a case; ``entry`` is the smaller one if there is one."""

    result: Result
    entry: Entry | None = None
    probes: int = 0
    reason: str = ""
    done: bool = True
    """Whether it ended by itself, and not for the number of probes."""


class Minimized(Struct, frozen=True):
    """What became of the file ``path``, which held ``before``."""

    path: Path
    status: Result
    target: Path | None = None
    """The file that has its finding now, if it was made SMALLER or another one is the SAME."""
    probes: int = 0
    done: bool = True
    """Whether no further step leads to a smaller case; else the next time goes on."""
    before: Entry | None = None
    after: Entry | None = None
    problem: str = ""
    """What an OTHER shows instead, and the sentence of an ERROR."""


def minimize(plan: Plan, root: Path, paths: Sequence[Path]) -> Iterator[Hello | Minimized]:
    """Make the crashing cases ``paths`` of ``root`` smaller, in their order, after the ``Hello``.

    A smaller case takes the place of its file as soon as it is found. Raises ``KeyboardInterrupt`` on Ctrl-C, and
    ``ImplementationError``, ``DeviceError`` and ``EngineError``.
    """
    with Crew(plan.workers, plan.device) as crew:
        said = crew.hello(plan)
        yield said
        left = deque(paths)
        begun: deque[tuple[Path, Entry | None, Promise[Shrunk] | str]] = deque()
        while left or begun:
            while left and len(begun) < (2 * crew.workers if crew.workers > 1 else 1):
                begun.append(_begin(crew, plan, left.popleft(), said))
            path, entry, promise = begun.popleft()
            if entry is None or isinstance(promise, str):
                yield Minimized(path, Result.ERROR, problem=str(promise))
                continue
            shrunk = crew.result(*crew.wait([promise]))
            if shrunk is not None:
                yield _settled(root, path, entry, shrunk)
            if crew.interrupted:
                raise KeyboardInterrupt


def _begin(crew: Crew, plan: Plan, path: Path, said: Hello) -> tuple[Path, Entry | None, Promise[Shrunk] | str]:
    try:
        entry = load(path)
    except CorpusError as error:
        return path, None, str(error)
    if entry.finding is None:
        return (
            path,
            None,
            f"{path}: has no finding that a smaller case could be held to; leave it, or write one into it",
        )
    problem = problem_of(path, entry, said)
    return path, entry, problem or crew.submit(shrink_saved, plan, entry)


def _settled(root: Path, path: Path, entry: Entry, shrunk: Shrunk) -> Minimized:
    result, target = shrunk.result, None
    problem = f"{path}: {shrunk.reason}" if shrunk.reason else ""
    try:
        if result is Result.SMALLER and shrunk.entry is not None:
            target = put_instead(root, path, entry, Kind.CRASHING, shrunk.entry)
        elif result is Result.MINIMAL:
            stays = fold(root, path, entry)
            result, target = (Result.SAME, stays) if stays != path else (result, None)
    except CorpusError as error:
        result, problem = Result.ERROR, str(error)
    return Minimized(path, result, target, shrunk.probes, shrunk.done, entry, shrunk.entry, problem)


def shrink_saved(plan: Plan, entry: Entry) -> Shrunk:
    """The smallest case that steps lead to from a saved one, each of which shows its finding; by a searcher.

    Implementation, executor, code, place and mode stay: the smaller case is of the same group.
    """
    keeper = keeper_of(plan)
    keeper.hello()
    assert entry.finding is not None
    if entry.before:
        return _shortened(plan, keeper, entry, entry.finding)
    looked = _Looking(keeper, entry.finding)
    runs = runs_needed(entry.provenance)
    if not looked.shows_in(runs, entry.case):
        return _does_not_show(looked)
    most = SLOW_PROBES if entry.finding.code in DEATHS else PROBES
    small = simplified(entry.case, looked.shows, most)
    done = looked.probes < most
    if small == entry.case:
        return Shrunk(Result.MINIMAL, probes=looked.probes, done=done)
    keeper.renew()  # what the cases before it left behind must not be what it needs
    if not looked.shows_in(runs, small):
        reason = "what it shrinks to shows the finding only after other cases; it was left as it is"
        return Shrunk(Result.ERROR, probes=looked.probes, reason=reason)
    finding = looked.found
    assert finding is not None
    smaller = replace(entry, case=small, finding=SavedFinding.of(finding), title=_title(entry, finding))
    return Shrunk(Result.SMALLER, smaller, looked.probes, done=done)


class _Looking:
    """Runs the accused, and says whether a case shows the finding."""

    def __init__(self, keeper: Keeper | Inside, finding: SavedFinding) -> None:
        self._keeper, self._finding = keeper, finding
        self.probes = 0
        self.verdict: Verdict | None = None
        """The last."""
        self.found: Finding | None = None
        """The last that was the one looked for."""

    def shows(self, case: Case) -> bool:
        """Whether this case shows it. Raises ``KeyboardInterrupt`` if the work was asked to end."""
        self.probes += 1
        wanted = self._finding
        careful = wanted.code in DEATHS
        self.verdict = self._keeper.judge_alone(case, (wanted.implementation, wanted.executor), careful)
        if self.verdict is None or stopping():
            raise KeyboardInterrupt
        primary = self.verdict.primary
        if primary is None or primary.executor != wanted.executor:
            return False
        told = SavedFinding.of(primary)
        if not same_finding(told, wanted):
            return False
        self._finding, self.found = told, primary  # from now on at this very place
        return True

    def shows_in(self, runs: int, case: Case) -> bool:
        """Whether one of so many runs shows it."""
        return any(self.shows(case) for _ in range(runs))


def _does_not_show(looked: _Looking) -> Shrunk:
    assert looked.verdict is not None
    primary = looked.verdict.primary
    if primary is not None:
        shown = f"fails otherwise than when it was saved: {primary.signature_in(True)}"
        return Shrunk(Result.OTHER, probes=looked.probes, reason=shown)
    if looked.verdict.outcome is Outcome.AGREE:
        return Shrunk(Result.FIXED, probes=looked.probes)
    reason = f"{looked.verdict.implementation} [{looked.verdict.executor}]: {looked.verdict.reason}"
    return Shrunk(Result.ERROR, probes=looked.probes, reason=reason)


def _shortened(plan: Plan, keeper: Keeper | Inside, entry: Entry, saved: SavedFinding) -> Shrunk:
    """For a death that does not come alone: fewer cases before it. The case itself stays."""
    if not isinstance(keeper, Keeper):
        return Shrunk(Result.ERROR, reason="kills its process after other cases; run it without --no-isolation")
    finding = Finding(**{name: getattr(saved, name) for name in SavedFinding.__struct_fields__})
    seen = Seen(finding.signature_in(True), finding, entry.case, 0, list(entry.before))
    shrunk = shrink(plan, 0, seen)
    if shrunk is None or shrunk.stopped:
        raise KeyboardInterrupt
    if not shrunk.stable:
        return Shrunk(Result.FIXED, probes=shrunk.probes)
    fewer = tuple(shrunk.before)
    if fewer == entry.before:
        return Shrunk(Result.MINIMAL, probes=shrunk.probes)
    return Shrunk(Result.SMALLER, replace(entry, before=fewer), shrunk.probes)


def _title(entry: Entry, finding: Finding) -> str:
    """The title, with the new finding's message in the place of the old one's if it ended with that."""
    assert entry.finding is not None
    old, new = (it.message.partition("\n")[0] for it in (entry.finding, finding))
    return entry.title.removesuffix(old) + new if old and new and entry.title.endswith(old) else entry.title
