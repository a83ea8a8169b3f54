"""What a mutant is: a small change to the text of one of our own implementations, and what must be seen of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Code

EAGER: Final = "eager"
GRAPH: Final = "graph"
"""Stands for ``simulated-graph`` where there is no GPU."""
BOTH: Final = (EAGER, GRAPH)
LEFT: Final = (Code.POISON, Code.STALE)
"""What is not written holds poison, or what an earlier replay left."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a case is: its replays, the most expanded rows that one of its graphs has, its longest ``seq_len``."""

    replays: int = 1
    rows: int = 1
    length: int = 1

    @classmethod
    def of(cls, case: Case) -> Size:
        """The size of ``case``."""
        setup = case.setup
        return cls(
            replays=len(case.replays),
            rows=max(setup.captured_rows(it.mode, case.bucket(at)) for at, it in enumerate(case.replays)),
            length=max((request.seq_len for it in case.replays for request in it.requests), default=0),
        )

    def fits(self, most: Size) -> bool:
        """Whether it is at most ``most`` in every respect."""
        return self.replays <= most.replays and self.rows <= most.rows and self.length <= most.length

    def __str__(self) -> str:
        return f"{self.replays} x {self.rows} x {self.length}"


class MutantError(Exception):
    """The mutant cannot be made of the implementation as it is now."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """``kernels/<module>.py`` with each key of ``changes``, which stands there exactly once, replaced by its value.

    ``kind`` is the class of bug in a few words, ``trigger`` what a case needs to show it, in one line. It is killed
    when each executor of ``seen_by`` has reported it under one of ``codes``; the minimal cases are at most of ``size``,
    unless it may race (NV501 is among ``codes``).
    ``needs_gpu`` says that a machine without one cannot see it.
    """

    name: str
    kind: str
    trigger: str
    module: str
    changes: Mapping[str, str]
    codes: tuple[Code, ...]
    seen_by: tuple[str, ...] = BOTH
    size: Size = Size()
    needs_gpu: bool = False

    @property
    def original(self) -> str:
        """The name of the implementation that it is made of."""
        return self.module.replace("_", "-")

    @property
    def copy_name(self) -> str:
        """What it registers itself as."""
        return f"mutant-{self.name}"

    def text(self, changed: bool = True) -> str:
        """The source of the copy; without ``changed`` of a correct one. Raises ``MutantError``."""
        spec = find_spec(f"nsa_verify.kernels.{self.module}")
        if spec is None or spec.origin is None:
            raise MutantError(f"{self.name}: there is no implementation {self.module}")
        text = Path(spec.origin).read_text(encoding="utf-8")
        text = self._replaced(text, f'"{self.original}"', f'"{self.copy_name}"')
        for right, wrong in self.changes.items() if changed else ():
            text = self._replaced(text, right, wrong)
        return text

    def plant(self, folder: Path, changed: bool = True) -> Path:
        """Write the copy into ``folder``, and return its path. Raises ``MutantError``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name.replace('-', '_')}.py"
        path.write_text(self.text(changed), encoding="utf-8")
        return path

    def _replaced(self, text: str, right: str, wrong: str) -> str:
        times = text.count(right)
        if times != 1:
            stands = f"{right!r} stands {times} times in {self.module}.py"
            raise MutantError(f"{self.name}: {stands}, and must stand there once")
        return text.replace(right, wrong)
