"""Keeping what a run found: a disagreement becomes a file of the corpus, or a problem that says why not."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from nsa_verify.core.findings import EXPLANATIONS, Finding
from nsa_verify.engine.corpus import CorpusError, Entry, Kind, Provenance, SavedFinding, dumps
from nsa_verify.engine.events import Disagreement
from nsa_verify.engine.filing import put_beside
from nsa_verify.engine.plan import EAGER


def entry_of(found: Disagreement, provenance: Provenance) -> Entry:
    """The corpus entry of ``found``."""
    finding = found.finding
    first_line = finding.message.splitlines()[0] if finding.message else EXPLANATIONS[finding.code].title
    runs = found.reliability.runs
    return Entry(
        title=f"{finding.implementation}: {EXPLANATIONS[finding.code].title}: {first_line}",
        case=found.case,
        before=found.before,
        finding=SavedFinding.of(finding),
        provenance=msgspec.structs.replace(
            provenance,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            failed=found.reliability.disagreed if runs else None,
            attempts=runs or None,
        ),
    )


def slug_for(finding: Finding | SavedFinding) -> str:
    """One per signature: the minimal case may be the same under two executors, and each must be kept."""
    executor = "" if finding.executor == EAGER else f"-{finding.executor}"
    return f"{finding.code}-{finding.implementation}{executor}"


def keep(found: Disagreement, root: Path, provenance: Provenance) -> Disagreement:
    """Save ``found`` under ``root/crashing``, beside what stands for another finding of the same case; if that fails
    the entry's text is in the result, so nothing is lost."""
    entry = entry_of(found, provenance)
    finding = found.finding
    try:
        path, _ = put_beside(root, Kind.CRASHING, entry, slug_for(finding))
    except CorpusError as error:
        return msgspec.structs.replace(found, problem=str(error), json=dumps(entry))
    return msgspec.structs.replace(found, path=path)
