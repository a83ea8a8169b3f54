"""Where the tests of the shell run."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and no variables that say otherwise."""
    for name in ("NSA_VERIFY_CORPUS", "NSA_VERIFY_DEVICE", "NSA_VERIFY_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
