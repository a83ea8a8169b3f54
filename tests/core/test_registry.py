"""Declaring an implementation, and fetching it from a file or a module: each mistake is one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nsa_verify import CtxLens, Extent, MetadataBuffers, Mode, ReplayInputs, Setup, implementation
from nsa_verify.core import implementation as declaring
from nsa_verify.core.implementation import registered
from nsa_verify.core.registry import ImplementationError, load_reference

GOOD = """
from nsa_verify import Mode, implementation

@implementation("mine", modes={Mode.DECODE}, extent="row", block=64, optional_outputs=["paged_mqa_schedule"])
def refresh(inputs, steps, setup):
    pass
"""


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declaring, "_registered", {})


def _refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """Does nothing; it is declared, not called."""


def _another_refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
    """As ``_refresh``, under a name of its own."""


def _file(folder: Path, text: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_file_registers_what_it_declares(tmp_path: Path) -> None:
    assert load_reference(_file(tmp_path, GOOD)) == ("mine",)
    mine = registered()["mine"]
    assert (mine.modes, mine.extent, mine.block) == (frozenset({Mode.DECODE}), Extent.ROW, 64)
    assert mine.source.startswith(str(tmp_path / "mine.py"))


def test_a_file_named_twice_is_loaded_once(tmp_path: Path) -> None:
    reference = _file(tmp_path, GOOD)
    assert load_reference(reference) == load_reference(reference) == ("mine",)


def test_a_module_and_a_name_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _file(tmp_path, GOOD, "module_of_test_registry.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reference("module_of_test_registry") == ("mine",)
    assert load_reference("module_of_test_registry:mine") == ("mine",)
    with pytest.raises(ImplementationError, match="module_of_test_registry registers mine, not 'yours'"):
        load_reference("module_of_test_registry:yours")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1 / 0\n", r"importing it raised ZeroDivisionError: division by zero \(mine\.py:1\)"),
        ("import no_such_module\n", "importing it raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("\ndef refresh(:\n", r"importing it raised SyntaxError: .* \(mine\.py:2\)"),
        ("import sys\nsys.exit(0)\n", r"importing it raised SystemExit: 0 \(mine\.py:2\)"),
        ("x = 1\n", "registers no implementation; decorate its refresh function"),
        ("", "registers no implementation"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ImplementationError, match=sentence) as caught:
        load_reference(_file(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert registered() == {}


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("nowhere/mine.py", "there is no such file"),
        ("no_such_module_at_all", "there is no module 'no_such_module_at_all'"),
    ],
)
def test_a_reference_to_nothing(reference: str, sentence: str) -> None:
    with pytest.raises(ImplementationError, match=f"--impl {reference}: {sentence}"):
        load_reference(reference)


@pytest.mark.parametrize(
    ("declaration", "sentence"),
    [
        ({"optional_outputs": ["logits"]}, "unknown optional output 'logits'"),
        ({"block": 0}, "block = 0 must be at least 1"),
        ({"modes": ()}, "declares no mode"),
        ({"modes": ("warp",)}, "'warp' is not a valid Mode"),
        ({"extent": "most"}, "'most' is not a valid Extent"),
    ],
)
def test_a_declaration_that_is_refused(declaration: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        implementation("mine", **declaration)(_refresh)


def test_a_name_belongs_to_one_function() -> None:
    implementation("mine")(_refresh)
    implementation("mine")(_refresh)
    with pytest.raises(ValueError, match="two implementations are called 'mine'"):
        implementation("mine")(_another_refresh)


@pytest.mark.parametrize(
    ("capturable", "modes"),
    [
        (True, {Mode.DECODE, Mode.TARGET_VERIFY}),
        (False, set()),
        ({Mode.DECODE}, {Mode.DECODE}),
        ("decode", {Mode.DECODE}),
    ],
)
def test_only_declared_modes_are_capturable(capturable: Any, modes: set[Mode]) -> None:
    implementation("mine", modes=(Mode.DECODE, Mode.TARGET_VERIFY), capturable=capturable)(_refresh)
    assert registered()["mine"].capturable == modes


@pytest.mark.parametrize("capturable", [{Mode.DECODE, Mode.DRAFT_EXTEND}, {"nonsense"}, "nonsense"])
def test_capturable_in_a_mode_that_is_not_declared_is_refused(capturable: Any) -> None:
    with pytest.raises(ValueError, match=r"draft-extend, which it does not declare|is not a valid Mode"):
        implementation("mine", modes=(Mode.DECODE,), capturable=capturable)


def test_a_function_that_cannot_be_called_is_refused() -> None:
    def short(inputs: object, steps: object) -> None:
        del inputs, steps

    with pytest.raises(ValueError, match=r"must take \(inputs, steps, setup\)"):
        implementation("mine")(short)  # type: ignore[type-var]


def test_why_it_does_not_apply() -> None:
    implementation("mine", modes=(Mode.DECODE,), host_lengths=True)(_refresh)
    mine = registered()["mine"]
    assert mine.not_applicable(Setup(), Mode.DECODE) is None
    assert mine.not_applicable(Setup(), Mode.DRAFT_EXTEND) == "mode not declared"
    assert mine.not_applicable(Setup(host_lengths=False), Mode.DECODE) == "needs seq_lens_cpu"


def test_it_gets_the_optional_outputs_that_it_declares_and_the_setup_keeps() -> None:
    implementation("mine", optional_outputs=["paged_mqa_schedule", "paged_mqa_ctx_lens"])(_refresh)
    implementation("plain")(_refresh)
    mine, plain = registered()["mine"], registered()["plain"]
    assert mine.writes(Setup()) == frozenset()
    assert mine.writes(Setup(schedule=True)) == {"paged_mqa_schedule"}
    assert mine.writes(Setup(ctx_lens=CtxLens.OWN)) == {"paged_mqa_ctx_lens"}
    assert plain.writes(Setup(schedule=True, ctx_lens=CtxLens.VIEW)) == frozenset()
