"""What an engine and its worker tell each other, as msgpack: requests one way, replies the other."""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import Struct

from nsa_verify.core.case import Case, Mode
from nsa_verify.core.findings import Verdict
from nsa_verify.engine.events import Subject
from nsa_verify.engine.plan import Plan

Pair = tuple[str, str]
"""The names of an implementation and of an executor."""


class Hello(Struct, frozen=True, tag=True):
    """What a worker says once it is up."""

    device: str
    """``cpu`` or ``cuda``."""
    description: str
    subjects: tuple[Subject, ...]
    executors: tuple[str, ...]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every implementation under every executor, in the order in which they are judged."""
        return tuple((it.name, executor) for executor in self.executors for it in self.subjects)


class Skip(Struct, frozen=True):
    """Why replays in ``mode`` are left out; ``not_capturable`` if the implementation runs them, but not this way."""

    mode: Mode
    reason: str
    not_capturable: bool = False


class Judgement(Struct, frozen=True):
    """A verdict, and what was left out of it."""

    verdict: Verdict
    skips: tuple[Skip, ...] = ()


class Task(Struct, frozen=True):
    """A case and the pairs to judge on it; ``repeat`` and ``delay`` are those of ``Judge.judge``."""

    case: Case
    pairs: tuple[Pair, ...]
    repeat: bool = True
    delay: bool = True
    fresh: bool = True
    """Whether graphs are captured for this case alone; else those of earlier cases may serve it."""
    picture: bool = False
    """Whether verdicts that disagree have ``Verdict.pictures``."""
    rerun: bool = True
    """Whether what disagrees is run again to see whether it is deterministic."""


class Prepare(Struct, frozen=True, tag=True):
    """The first request: settle the device, load the implementations. Answered by ``Hello`` or ``Refused``."""

    plan: Plan


class Batch(Struct, frozen=True, tag=True):
    """Judge the tasks, in order. Answered by ``Judged`` for each, then ``Done``.

    ``careful`` has the device finish every call before the next, and announces every pair with ``Starting``. Tasks that
    are not begun at ``until`` (epoch seconds, 0: never) are left out.
    """

    tasks: tuple[Task, ...]
    careful: bool = False
    until: float = 0.0
    allowance: int = 0
    """Bytes of memory that the worker may have taken since it was up when a task is done; 0: no limit."""


class Ask(Struct, frozen=True, tag=True):
    """Which pairs run at least one replay of this case? Answered by ``Applicable``."""

    case: Case


class Applicable(Struct, frozen=True, tag=True):
    """Those pairs, in the order of ``Hello.pairs``."""

    pairs: tuple[Pair, ...]


class Refused(Struct, frozen=True, tag=True):
    """The worker cannot do its job: a sentence of the user's, and the kind of exception it was."""

    kind: Literal["implementation", "device", "value"]
    sentence: str


class Starting(Struct, frozen=True, tag=True):
    """The next pair of a careful batch: the modes that it will run, and what it leaves out."""

    task: int
    pair: int
    modes: tuple[Mode, ...]
    skips: tuple[Skip, ...]


class Judged(Struct, frozen=True, tag=True):
    """Judgements on a task, of its pairs from number ``first`` on; ``slowest_s`` has the longest time between two marks
    of each."""

    task: int
    first: int
    judgements: tuple[Judgement, ...]
    slowest_s: tuple[float, ...]


class Done(Struct, frozen=True, tag=True):
    """The batch is over; the tasks after the first ``tasks`` were left out. ``spent`` has seconds by name."""

    tasks: int
    spent: dict[str, float] = {}


class Died(Struct, frozen=True, tag=True):
    """The device's context is dead, or the memory's limit is passed: so the worker ends itself, with this sentence."""

    sentence: str


class Broken(Struct, frozen=True, tag=True):
    """The worker itself failed, which no case can be blamed for."""

    sentence: str


Request = Prepare | Batch | Ask
Reply = Hello | Applicable | Refused | Starting | Judged | Done | Died | Broken

REQUESTS: Final = msgspec.msgpack.Decoder(Request)
REPLIES: Final = msgspec.msgpack.Decoder(Reply)
ENCODER: Final = msgspec.msgpack.Encoder()
