"""What tests of planted bugs rely on: a registry of their own, and no graph left behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from nsa_verify.core import implementation as registry
from nsa_verify.core.registry import load_builtin
from nsa_verify.device import graph, rig
from nsa_verify.engine import searcher
from nsa_verify.engine.worker import prepare


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Copies with and without a bug have the same name; each test starts without those of the others."""
    load_builtin()
    modules = set(sys.modules)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    prepare.cache_clear()
    yield
    searcher.close()
    prepare.cache_clear()
    rig.close_rigs()
    assert graph.CapturedGraph.open_graphs == 0
    unload(set(sys.modules) - modules)


def unload(modules: set[str]) -> None:
    """Forget those of ``modules`` that were given as files."""
    for name in modules:
        if name.startswith("nsa_verify_impl_"):
            del sys.modules[name]
