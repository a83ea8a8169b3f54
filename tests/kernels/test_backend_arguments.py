"""Forward modes, the switch between the two paths, and the fallback: what the backend does with what it is told."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from nsa_verify import Mode, Setup, kernels
from nsa_verify.core.implementation import fallback, fallbacks, take_fallbacks
from nsa_verify.kernels import (
    ForwardMode,
    NativeSparseAttnBackend,
    NativeSparseAttnMultiStepBackend,
    onepass,
    precomputed_copy,
)
from nsa_verify.kernels.backend_arguments import SWITCH, mode_of, path_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETUP = Setup(num_draft_tokens=2, page_size=16, table_width=18, pool_width=24, buckets=(2,), num_steps=3)


class EngineMode(Enum):
    """An engine's own enumeration: other members, the same predicates."""

    EXTEND = auto()
    DECODE = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()
    DRAFT_EXTEND = auto()
    DRAFT_EXTEND_V2 = auto()

    def is_decode_or_idle(self) -> bool:
        return self in (EngineMode.DECODE, EngineMode.IDLE)

    def is_target_verify(self) -> bool:
        return self is EngineMode.TARGET_VERIFY

    def is_draft_extend(self, include_v2: bool = False) -> bool:
        return self is EngineMode.DRAFT_EXTEND or (include_v2 and self is EngineMode.DRAFT_EXTEND_V2)

    def is_draft_extend_v2(self) -> bool:
        return self is EngineMode.DRAFT_EXTEND_V2


def test_the_predicates() -> None:
    def said(mode: ForwardMode) -> tuple[bool, ...]:
        with_v2 = mode.is_draft_extend(include_v2=True)
        return (
            mode.is_decode_or_idle(),
            mode.is_target_verify(),
            mode.is_draft_extend(),
            with_v2,
            mode.is_draft_extend_v2(),
        )

    assert {mode.name: said(mode) for mode in ForwardMode} == {
        "DECODE": (True, False, False, False, False),
        "IDLE": (True, False, False, False, False),
        "TARGET_VERIFY": (False, True, False, False, False),
        "DRAFT_EXTEND": (False, False, True, True, False),
        "DRAFT_EXTEND_V2": (False, False, False, True, True),
    }


def test_every_forward_mode_has_its_mode() -> None:
    assert all(mode_of(ForwardMode(mode)) is mode for mode in Mode)
    assert mode_of(ForwardMode.IDLE) is mode_of(EngineMode.IDLE) is Mode.DECODE
    assert all(mode_of(EngineMode[mode.name]) is mode for mode in Mode)


@pytest.mark.parametrize("unknown", [EngineMode.EXTEND, "decode", None, 7])
def test_a_forward_mode_without_metadata_is_refused(unknown: Any) -> None:
    backend = NativeSparseAttnBackend(DEVICE, SETUP, req_to_token=torch.zeros(1, 24, device=DEVICE).int())
    ones = torch.ones(2, dtype=torch.int32)
    for call in (
        lambda: mode_of(unknown),
        lambda: backend.init_forward_metadata_capture_cuda_graph(2, 2, ones, ones, None, unknown, None),
        lambda: backend.init_forward_metadata_replay_cuda_graph(2, ones, ones, 2, None, unknown, None, None),
        lambda: backend._precompute_replay_metadata(2, ones, ones, None, unknown, None),
    ):
        with pytest.raises(ValueError, match=r"^forward mode .* has no metadata; those that have: DECODE, .*, IDLE$"):
            call()


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    assert path_for(torch.device(DEVICE)).uses_triton
    for value, uses_triton in (("1", True), ("0", False)):
        monkeypatch.setenv(SWITCH, value)
        assert NativeSparseAttnBackend(DEVICE, SETUP).path.uses_triton is uses_triton
        assert NativeSparseAttnMultiStepBackend(DEVICE, SETUP).path.uses_triton is uses_triton
    for asked in ("1", True):
        assert NativeSparseAttnBackend(DEVICE, SETUP, asked).path.uses_triton
    monkeypatch.setenv(SWITCH, "1")
    for asked in ("0", False):
        steps = NativeSparseAttnMultiStepBackend(DEVICE, SETUP, asked)
        assert not steps.path.uses_triton
        assert not any(it.path.uses_triton for it in steps.attn_backends)


@pytest.mark.parametrize("value", ["", "2", "true", "01", " 1"])
def test_another_value_of_the_switch_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    words = rf"^{SWITCH} = '{value}': must be 1 \(the Triton path\) or 0 \(the Python path\)$"
    for make in (NativeSparseAttnBackend, NativeSparseAttnMultiStepBackend):
        with pytest.raises(ValueError, match=words):
            make(DEVICE, SETUP, value)
    monkeypatch.setenv(SWITCH, value)
    for make in (NativeSparseAttnBackend, NativeSparseAttnMultiStepBackend):
        with pytest.raises(ValueError, match=words):
            make(DEVICE, SETUP)


def _batch(mode: Mode = Mode.DECODE) -> Any:
    return SimpleNamespace(
        forward_mode=ForwardMode(mode),
        batch_size=2,
        req_pool_indices=torch.zeros(2, dtype=torch.int64, device=DEVICE),
        seq_lens=torch.tensor([9, 4], dtype=torch.int32, device=DEVICE),
        seq_lens_cpu=None,
        spec_info=None,
    )


def _captured(switch: str | None, *modes: Mode) -> NativeSparseAttnMultiStepBackend:
    table = torch.arange(24, dtype=torch.int32, device=DEVICE)[None]
    backend = NativeSparseAttnMultiStepBackend(DEVICE, SETUP, switch, req_to_token=table)
    backend.init_cuda_graph_state(2, 4)
    for mode in modes:
        backend.init_forward_metadata_capture_cuda_graph(_batch(mode))
    return backend


def _replay_one(backend: NativeSparseAttnBackend) -> None:
    it = _batch()
    backend.init_forward_metadata_replay_cuda_graph(
        2, it.req_pool_indices, it.seq_lens, 13, None, it.forward_mode, None, None
    )


def test_each_fallback_is_reported_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    take_fallbacks()
    before = sum(fallbacks().values())
    backend = _captured(None, Mode.DECODE)
    assert not backend.path.uses_triton
    assert len(take_fallbacks()) == SETUP.num_steps  # one capture each
    for _ in range(2):
        backend.init_forward_metadata_replay_cuda_graph(_batch(), 2)
        (reason,) = take_fallbacks()
        assert reason.startswith("Triton cannot be imported (")
        assert reason.endswith("): the metadata takes the Python path")
    for step in backend.attn_backends:
        assert step.captured[Mode.DECODE, 2].cu_seqlens_k.tolist() == [0, 9, 13]
        assert step.captured[Mode.DECODE, 2].page_table_1[0, :9].tolist() == list(range(9))
        _replay_one(step)
    assert take_fallbacks() == (reason,) * SETUP.num_steps
    assert {it.message for it in caplog.records} == {reason}
    for _ in range(300):  # more than wait to be taken
        backend.init_forward_metadata_replay_cuda_graph(_batch(), 2)
    assert sum(fallbacks().values()) == before + 2 * SETUP.num_steps + 302
    assert fallbacks()[reason] >= 302
    take_fallbacks()


class _Broken:
    """Finds ``triton``, and cannot load it."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "triton":
            raise OSError("libcuda.so: wrong ELF class\nand more")


def test_triton_that_is_broken_or_has_no_device_is_the_fallback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "triton")
        patch.setattr(sys, "meta_path", [_Broken(), *sys.meta_path])
        broken = path_for(torch.device(DEVICE), "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace())
    driverless = path_for(torch.device("cuda:0"), "1")
    monkeypatch.setattr(f"{__name__}.DEVICE", "cpu")
    backend = _captured("1", Mode.DECODE)
    backend.init_forward_metadata_replay_cuda_graph(_batch(), 2)
    assert {it.captured[Mode.DECODE, 2].cu_seqlens_k[2].item() for it in backend.attn_backends} == {13}
    assert [(it.uses_triton, it.missing) for it in (broken, driverless, backend.path)] == [
        (False, f"Triton cannot {reason}: the metadata takes the Python path")
        for reason in (
            "be imported (libcuda.so: wrong ELF class)",
            "run on cuda:0 ('types.SimpleNamespace' object has no attribute 'active')",
            "run on the CPU (its interpreter is off: TRITON_INTERPRET=1 before it is imported)",
        )
    ]
    assert take_fallbacks() == (backend.path.missing,) * (SETUP.num_steps + 1)
    assert [it.message for it in caplog.records][-SETUP.num_steps :] == [backend.path.missing] * SETUP.num_steps
    assert path_for(torch.device("cpu"), "0").missing is None


def test_reasons_that_are_different_every_time_are_counted_together() -> None:
    before = sum(fallbacks().values())
    for number in range(400):
        fallback(f"planted {number}")
    assert sum(fallbacks().values()) == before + 400
    assert fallbacks()["other reasons"] >= 144
    assert len(fallbacks()) == 257
    take_fallbacks()


@pytest.mark.parametrize(("switch", "is_missing"), [("1", False), ("0", False), ("0", True)])
def test_a_path_that_was_asked_for_is_no_fallback(
    monkeypatch: pytest.MonkeyPatch, switch: str, is_missing: bool
) -> None:
    if is_missing:
        monkeypatch.setitem(sys.modules, "triton", None)
    take_fallbacks()
    backend = _captured(switch, Mode.DECODE)
    backend.init_forward_metadata_replay_cuda_graph(_batch(), 2)
    _replay_one(backend.attn_backends[0])
    assert take_fallbacks() == ()


def test_one_launch_serves_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, python = _captured("1", *Mode), _captured("0", *Mode)
    kind, launched = type(onepass._refresh), []
    run = kind.run

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counting)
    for mode in Mode:
        triton.init_forward_metadata_replay_cuda_graph(_batch(mode), 2)
        assert launched == ["_refresh"]
        python.init_forward_metadata_replay_cuda_graph(_batch(mode), 2)
        assert launched == ["_refresh"]
        launched.clear()


def test_the_steps_of_the_python_path_share_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, precompute, computed = _captured("0", *Mode), precomputed_copy.precompute, []

    def counting(inputs: Any, setup: Setup) -> Any:
        computed.append(inputs.mode)
        return precompute(inputs, setup)

    monkeypatch.setattr(precomputed_copy, "precompute", counting)
    for mode in Mode:
        backend.init_forward_metadata_replay_cuda_graph(_batch(mode), 2)
    assert computed == list(Mode)


def test_the_names_are_exported_and_need_no_triton() -> None:
    names = ("ForwardMode", "NativeSparseAttnBackend", "NativeSparseAttnMultiStepBackend")
    assert set(names) <= set(kernels.__all__)
    script = f"""
import sys
sys.modules["triton"] = None
from nsa_verify.kernels import {", ".join(names)}, BACKEND_ROWS
from nsa_verify import Setup
from nsa_verify.core.implementation import registered
assert not NativeSparseAttnBackend("cpu", Setup(), "1").path.uses_triton
assert not [name for name in registered() if name.startswith("engine-")]
assert BACKEND_ROWS not in sys.modules
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Triton cannot be imported (")
