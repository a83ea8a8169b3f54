"""Codes are a product surface: every one is explained, ranked, and stays in its hundred."""

from __future__ import annotations

import pytest

from nsa_verify import Code, Finding, Mode, Outcome, Verdict
from nsa_verify.core.findings import EXPLANATIONS, SEVERITY, Signature

NUMBERS = {
    "NV101": Code.WRONG_VALUE,
    "NV102": Code.STALE,
    "NV103": Code.POISON,
    "NV104": Code.INVARIANT,
    "NV201": Code.GUARD_WRITTEN,
    "NV202": Code.FRAME_WRITTEN,
    "NV203": Code.INPUT_MUTATED,
    "NV204": Code.OUT_OF_BOUNDS,
    "NV403": Code.EXCEPTION,
    "NV501": Code.NOT_DETERMINISTIC,
    "NV502": Code.NOT_IDEMPOTENT,
}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_never_changes_its_meaning(number: str) -> None:
    assert Code(number) is NUMBERS[number]


@pytest.mark.parametrize("code", list(Code))
def test_every_code_is_ranked_once_and_explained_in_sentences(code: Code) -> None:
    assert SEVERITY.count(code) == 1
    told = EXPLANATIONS[code]
    assert told.title[0].islower() or told.title.startswith("NV")
    for sentences in (told.meaning, told.typical_cause, told.remedy):
        assert sentences.endswith(".")


def _finding(code: Code) -> Finding:
    return Finding(implementation="mine", executor="eager", code=code, replay=0, mode=Mode.DECODE)


def test_findings_with_one_signature_are_one_bug_to_the_search() -> None:
    assert _finding(Code.STALE).signature == Signature("mine", "eager", Code.STALE)
    assert str(_finding(Code.STALE).signature) == "mine [eager] NV102"
    assert _finding(Code.STALE).signature != _finding(Code.POISON).signature


def test_the_first_finding_names_the_bug() -> None:
    findings = (_finding(Code.FRAME_WRITTEN), _finding(Code.STALE))
    verdict = Verdict(implementation="mine", executor="eager", outcome=Outcome.DISAGREE, findings=findings)
    assert verdict.primary is findings[0]
    assert Verdict(implementation="mine", executor="eager", outcome=Outcome.AGREE).primary is None
