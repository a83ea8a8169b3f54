"""What a corpus remembers of campaigns: how far they came, what they covered, when each group was seen.

It lies at ``<corpus>/.fuzz/campaign.json``, is replaced in one step after every search, and a campaign that is killed
loses at most the counts of the search that it was in: what that one found is in the corpus or in its own folder.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Signature, symptom_of
from nsa_verify.core.labels import LABELS, Coverage, Pair
from nsa_verify.engine.corpus import CorpusError
from nsa_verify.engine.sharing import Shares
from nsa_verify.engine.triage import Bug

FOLDER: Final = ".fuzz"
FILE: Final = "campaign.json"


class Sighting(Struct):
    """When one group was seen.

    ``signatures`` are those that turned out to be it once they were shrunk, ``symptoms`` what its minimal case shows.
    """

    first_seen: str
    last_seen: str
    seen: int = 0
    """In how many slices."""
    last_slice: int = -1
    signatures: list[Signature] = []
    symptoms: list[str] = []

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for a mode that there is not."""
        of_symptoms = (f"{it} ".split(" ")[1] for it in self.symptoms)
        for mode in (*of_symptoms, *(it.mode for it in self.signatures if it.mode)):
            Mode(mode)


class Record(Struct, forbid_unknown_fields=True):
    """Everything that campaigns over one corpus have in common. ``sightings`` are by ``str`` of their ``Bug``."""

    format: Literal["nsa-verify-campaign"] = "nsa-verify-campaign"
    version: Literal[1] = 1
    seed: int = 0
    slices: Annotated[int, msgspec.Meta(ge=0)] = 0
    cases: Annotated[int, msgspec.Meta(ge=0)] = 0
    seconds: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    shares: Shares = msgspec.field(default_factory=Shares)
    sightings: dict[str, Sighting] = {}
    pairs: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}
    """Cases by pair of labels; ``label`` alone for a pair of itself."""

    @property
    def coverage(self) -> Coverage:
        """What ``pairs`` say; labels that this version does not know are left out."""
        places = {label: place for place, label in enumerate(LABELS)}
        counts: dict[int, int] = {}
        for text, count in self.pairs.items():
            first, _, second = text.partition(" & ")
            if first in places and (second or first) in places:
                counts[places[first] * len(LABELS) + places[second or first]] = count
        return Coverage(counts)

    @coverage.setter
    def coverage(self, found: Coverage) -> None:
        """Keep it by the names of labels, which stay what they are from version to version."""
        self.pairs = {_text(pair): count for pair, count in sorted(found.by_pair())}

    def same(self, bug: Bug, symptoms: Iterable[str], others: Iterable[Bug]) -> Bug | None:
        """Which of ``others`` the minimal case of ``bug``, which shows ``symptoms``, is another sight of, if any.

        It is one bug if the minimal case of either shows what the other one is known by: no smaller case of the one
        was without the other. Two bugs that show in different cases stay apart.
        """
        shown = set(symptoms)
        for other in others:
            if other.implementation == bug.implementation:
                known = self.sightings.get(str(other))
                if other.symptom in shown or (known is not None and bug.symptom in known.symptoms):
                    return other
        return None

    def stands_for(self, bug: Bug, others: Collection[Bug]) -> Bug | None:
        """Which of ``others`` it is: itself, one of the same symptom, or one whose minimal case shows that."""
        if bug in others:
            return bug
        mine = [it for it in others if it.implementation == bug.implementation]
        alike = (it for it in mine if it.symptom == bug.symptom)
        return next(alike, None) or next((it for it in mine if bug.symptom in self.symptoms(it)), None)

    def see(self, bug: Bug, signature: Signature | None, when: str, symptoms: Iterable[str] = ()) -> bool:
        """Count a sighting of ``bug``, whose minimal case shows ``symptoms``; whether it is the first.

        From now on whatever has the ``signature``, if one is given, is taken for it.
        """
        known = self._sighting(bug, when)
        is_first = known.seen == 0
        self._count(known, when)
        if signature is not None and signature not in known.signatures:
            known.signatures.append(signature)
        known.symptoms = list(dict.fromkeys((*known.symptoms, *symptoms)))
        return is_first

    def _sighting(self, bug: Bug, when: str) -> Sighting:
        return self.sightings.setdefault(str(bug), Sighting(first_seen=when, last_seen=when))

    def symptoms(self, bug: Bug, mode: str = "") -> list[str]:
        """What the minimal case of ``bug`` shows; with a ``mode`` only of that."""
        known = self.sightings.get(str(bug))
        return [it for it in known.symptoms if mode in ("", it.split()[1])] if known is not None else []

    def learn(self, bug: Bug, when: str, symptoms: Iterable[str]) -> None:
        """Take ``symptoms`` for what the minimal case of ``bug`` always showed, if nothing is known of that."""
        known = self._sighting(bug, when)
        known.symptoms = known.symptoms or list(dict.fromkeys(symptoms))

    def disown(self, bug: Bug, symptoms: Collection[str]) -> None:
        """The minimal case of ``bug`` shows ``symptoms`` instead: what has these is another bug."""
        if (known := self.sightings.get(str(bug))) is not None:
            known.signatures = [it for it in known.signatures if _symptom(it) not in symptoms]

    def merge(self, bug: Bug, other: Bug) -> None:
        """``bug`` turned out to be ``other``."""
        known, into = self.sightings.pop(str(bug), None), self.sightings.get(str(other))
        if known is not None and into is not None:
            into.first_seen = min(into.first_seen, known.first_seen)
            into.signatures += [it for it in known.signatures if it not in into.signatures]

    def rename(self, bug: Bug, name: Bug) -> None:
        """The group ``bug`` is known by ``name`` from now on."""
        if (known := self.sightings.pop(str(bug), None)) is not None:
            self.sightings[str(name)] = known

    def unlearn(self, bug: Bug) -> None:
        """Its case agrees now: whatever looks like it again is to be shrunk and kept again."""
        known = self.sightings.get(str(bug))
        if known is not None:
            known.signatures.clear()

    def see_again(self, signature: Signature, when: str) -> None:
        """Count a sighting of whatever group ``signature`` turned out to be."""
        for known in self.sightings.values():
            if signature in known.signatures:
                self._count(known, when)

    def _count(self, known: Sighting, when: str) -> None:
        known.seen += known.last_slice != self.slices
        known.last_seen, known.last_slice = when, self.slices

    def forget_all_but(self, bugs: set[str]) -> None:
        """Drop the sightings of groups that are not in the corpus any more: seen again, they are new."""
        self.sightings = {bug: it for bug, it in self.sightings.items() if bug in bugs}


def _symptom(signature: Signature) -> str:
    return symptom_of(signature.code, Mode(signature.mode), signature.place) if signature.mode else ""


def _text(pair: Pair) -> str:
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} & {pair[1]}"


@contextmanager
def recorded(root: Path) -> Iterator[Record]:
    """The record of the corpus ``root``, for one campaign at a time. Raises ``CorpusError``."""
    folder = root / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise CorpusError(f"{root}: another campaign is running on this corpus; wait for it, or end it") from None
    except OSError as error:
        raise CorpusError(
            f"{folder}: cannot be written: {error.strerror}; give another folder with --corpus"
        ) from error
    try:
        yield _read(folder / FILE)
    finally:
        lock.release()


def _read(path: Path) -> Record:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        sentence = f"{path}: cannot be read: {error}; remove it: counts begin again, and no saved case is lost"
        raise CorpusError(sentence) from error


def save_record(root: Path, record: Record) -> None:
    """Replace the file in one step. Raises ``CorpusError``."""
    path = root / FOLDER / FILE
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be written: {error.strerror}; make room there") from error
