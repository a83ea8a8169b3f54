"""``--report json``: one document at the end, for programs. ``replay`` counts from 0 there, as in events."""

from __future__ import annotations

from typing import Any

import msgspec

from nsa_verify import __version__
from nsa_verify.core.case import Mode
from nsa_verify.engine.events import CampaignFinished
from nsa_verify.shell.coverage import coverage_document
from nsa_verify.shell.render import json_text
from nsa_verify.shell.reports.plain import matrix_document, plain
from nsa_verify.shell.reports.story import Found, Story


def text(story: Story) -> str:
    """The document: what ``--json`` prints, and what the run was a function of."""
    told = document(story) | {
        "kind": story.kind,
        "version": __version__,
        "seed": story.seed,
        "stop": str(story.stop) if story.stop is not None else None,
        "command": story.command,
        "began": story.began.isoformat(timespec="seconds"),
        "environment": story.environment | ({"device": story.device} if story.device else {}),
        "outcome": story.headline,
    }
    if story.campaign is not None:
        told |= _campaign(story)
    return json_text(plain(told)) + "\n"


def document(story: Story) -> dict[str, Any]:
    """What a run came to; no more than it came to know."""
    told: dict[str, Any] = {"findings": [_finding(story, it) for it in story.found], "unknown": story.unknown}
    if story.started is not None:
        told |= msgspec.to_builtins(story.started)
    if story.recovered is not None:
        told["recovered"] = plain(story.recovered)
    if story.finished is not None:
        told |= {"matrix": matrix_document(story.matrix), "cases": story.cases, "seconds": story.seconds}
        told |= {"cases_per_s": story.rate, "stop": str(story.stop), "digest": story.digest, "replaced": story.replaced}
        told |= {"fallbacks": story.tally.fallbacks, "compile_keys": story.tally.compile_keys}
        if story.coverage.counts or (story.plan is not None and story.plan.coverage):
            told["coverage"] = coverage_document(story.coverage, story.modes or tuple(Mode))
    return told | {"exit_code": story.code, "error": story.problem}


def _finding(story: Story, found: Found) -> dict[str, Any]:
    """The finding's own fields, its case, and what became of it."""
    told: dict[str, Any] = msgspec.to_builtins(found.finding) | {
        "case": found.case,
        "path": str(found.path) if found.path is not None else None,
        "problem": found.problem,
        "reliability": found.reliability,
        "reproduce": story.reproduce(found) or None,
    }
    if found.told is not None:
        told |= {"note": found.told.note, "shrunk": found.told.shrunk}
    if found.group is not None:
        told |= {"state": found.state, "place": found.group.place, "executors": found.executors}
        told["modes"] = found.group.modes
        told |= {name: getattr(found.group, name) for name in ("first_seen", "last_seen", "seen", "accepted")}
    return told


def _campaign(story: Story) -> dict[str, Any]:
    """What only campaigns have. Options and digest are those of one search, and not told."""
    assert story.campaign is not None
    begun, ended = story.campaign, story.finished
    told: dict[str, Any] = {name: getattr(begun, name) for name in ("budget_s", "workers")}
    told |= {"corpus": str(begun.corpus), "earlier_slices": begun.slices, "options": {}, "digest": ""}
    told |= {"subjects": list(story.subjects.values()), "executors": story.executors, "planned_cases": None}
    told["replayed"] = [plain(it) for it in story.replayed]
    told["slices"] = [plain(begin) | plain(end) for begin, end in story.slices]
    if isinstance(ended, CampaignFinished):
        told |= {name: getattr(ended, name) for name in ("expired", "unmatched", "problems", "rates")}
        told["failing"] = [plain(it) for it in ended.failing]
    return told
