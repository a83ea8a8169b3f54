"""``benchmarks/idle_checks.py``: what it says lives without a check does, and what does not, does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "idle_checks.py"


@pytest.fixture(name="script")
def _script(monkeypatch: pytest.MonkeyPatch) -> object:
    spec = importlib.util.spec_from_file_location("idle_checks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "idle_checks", module)
    spec.loader.exec_module(module)
    return module


def test_the_page(script: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    guard, frame = "one-past-the-prefix-sum", "row-past-the-total-zeroed"
    arguments = [
        "--mutant",
        guard,
        "--mutant",
        frame,
        "--only",
        "zones",
        "--kind",
        "check",
        "--max-cases",
        "40",
        "-w",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["idle_checks.py", *arguments])
    script.main()  # type: ignore[attr-defined]
    told = capsys.readouterr()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in told.out.splitlines() if line.startswith("| ")}
    assert f"{guard} (eager)" in rows["guard zones"]
    assert frame not in rows["guard zones"]
    assert set(rows) == {"check", "guard zones"}
    assert "check guard zones" in told.err
