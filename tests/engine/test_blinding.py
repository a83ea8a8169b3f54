"""What a verdict is without a check."""

from __future__ import annotations

import pytest

from nsa_verify import Code, Mode, Outcome, Verdict
from nsa_verify.core.findings import Finding
from nsa_verify.engine.blinding import CHECKS, blinded


def _finding(code: Code, region: str | None = None) -> Finding:
    return Finding(implementation="it", executor="eager", code=code, replay=0, mode=Mode.DECODE, region=region)


def _verdict(*findings: Finding) -> Verdict:
    outcome = Outcome.DISAGREE if findings else Outcome.AGREE
    return Verdict(implementation="it", executor="eager", outcome=outcome, findings=findings)


LIVE, SLACK = _finding(Code.POISON, "live"), _finding(Code.WRONG_VALUE, "slack")
GUARD, SECOND, FROZEN = _finding(Code.GUARD_WRITTEN), _finding(Code.NOT_IDEMPOTENT), _finding(Code.FROZEN)
RACE = _finding(Code.NOT_DETERMINISTIC)


@pytest.mark.parametrize(
    ("findings", "without", "left"),
    [
        ((LIVE, SLACK), (), (LIVE, SLACK)),
        ((LIVE, SLACK), ("live cells",), (SLACK,)),
        ((LIVE, SLACK), ("slack cells",), (LIVE,)),
        ((LIVE, SLACK), ("slack cells", "live cells"), ()),
        ((GUARD, LIVE), ("guard zones",), (LIVE,)),
        ((GUARD,), ("frame cells",), (GUARD,)),
        ((FROZEN, LIVE), ("live cells",), ()),
        ((SECOND, LIVE), ("second call",), ()),
        ((SECOND, LIVE), ("guard zones",), (SECOND, LIVE)),
        ((), ("live cells",), ()),
        ((RACE,), ("guard zones",), (RACE,)),
        ((RACE, LIVE), ("guard zones",), (RACE, LIVE)),
        ((RACE, LIVE), ("live cells",), ()),
    ],
)
def test_blinded(findings: tuple[Finding, ...], without: tuple[str, ...], left: tuple[Finding, ...]) -> None:
    assert blinded(_verdict(*findings), without) == _verdict(*left)


def test_every_code_is_some_checks() -> None:
    """But for those that say more about others, those of the engine for deaths, and what only a sanitizer sees."""
    seen = {
        code
        for code in Code
        for region in ("live", "slack")
        if any(it(_finding(code, region)) for it in CHECKS.values())
    }
    assert {*Code} - seen == {Code.FROZEN, Code.NOT_DETERMINISTIC, Code.DEATH, Code.HANG, Code.OUT_OF_BOUNDS}
