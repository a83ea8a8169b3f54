"""A search over a corpus: what is left of killed runs comes first, and what it finds is kept whatever happens to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec.structs import replace

from nsa_verify.engine.corpus import Provenance
from nsa_verify.engine.events import Disagreement, Event, RunStarted
from nsa_verify.engine.inflight import RunFolder, recover
from nsa_verify.engine.keeping import entry_of, keep
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.search import search

Save = Callable[[Disagreement, Path, Provenance], Disagreement]
"""Puts a disagreement into the corpus, as ``keep`` does."""


def search_and_save(
    plan: Plan, root: Path, version: str, options: dict[str, str], command: str, save: Save = keep
) -> Iterator[Event]:
    """``search``, with what it finds saved under ``root``. Raises as ``search`` does, and ``CorpusError``.

    Until a disagreement is saved it lies in the run's own folder, where the next run looks for it.
    """
    device = plan.device

    def provenance() -> Provenance:
        return Provenance(version=version, seed=plan.seed, command=command, device=device, impl=plan.references)

    left = recover(root)
    with RunFolder(root) as folder:

        def note(found: Disagreement) -> None:
            folder.remember(found.signature, entry_of(found, provenance()))

        def kept(found: Disagreement) -> Disagreement:
            told = save(found, root, provenance())
            if told.path is not None:
                folder.forget(found.signature)
            return told

        for event in search(replace(plan, folder=str(folder.path)), kept, version, options, note, left):
            if isinstance(event, RunStarted):
                device = event.device
            yield event
