"""The functions under the engines' own names: values, errors, and what they leave alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsa_verify import kernels

CASES = [
    pytest.param([2, 3, 1], [13, 5, 1], id="the contract's vector"),
    pytest.param([0, 2, 0, 0, 3, 0], [4, 1, 0, 9, 700, 2], id="zero accepts and a padded row"),
    pytest.param([1], [1], id="one row"),
    pytest.param([40, 0, 300, 7], [50, 3, 200, 7], id="more rows than a tile"),
    pytest.param([n % 5 for n in range(300)], [3 * n + 1 for n in range(300)], id="more requests than a block"),
]
TOPK = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Layout = Callable[[list[int]], Tensor]


def _expected(extend_lens: list[int], seq_lens: list[int]) -> tuple[list[int], list[int]]:
    expanded = [
        max(0, seq_len - extend_len + token + 1)
        for extend_len, seq_len in zip(extend_lens, seq_lens, strict=True)
        for token in range(extend_len)
    ]
    return expanded, [min(length, TOPK) for length in expanded]


def _contiguous(values: list[int]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def _poisoned(*shape: int) -> Tensor:
    return torch.full(shape, -77, dtype=torch.int32, device=DEVICE)


def _strided(values: list[int]) -> Tensor:
    """``values`` in every third element behind an offset, junk between."""
    storage = torch.full((3 * len(values) + 2,), 123_456_789, device=DEVICE)
    view = storage[2::3]
    view.copy_(torch.tensor(values))
    return view


@pytest.mark.parametrize("layout", [_contiguous, _strided])
@pytest.mark.parametrize(("extend_lens", "seq_lens"), CASES)
def test_fused_simple(extend_lens: list[int], seq_lens: list[int], layout: Layout) -> None:
    got = kernels.fill_draft_extend_metadata_fused_simple(layout(extend_lens), layout(seq_lens), TOPK)
    assert [tensor.dtype for tensor in got] == [torch.int32, torch.int32]
    assert tuple(tensor.tolist() for tensor in got) == _expected(extend_lens, seq_lens)


@pytest.mark.parametrize("layout", [_contiguous, _strided])
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize(("extend_lens", "seq_lens"), CASES)
def test_inplace(extend_lens: list[int], seq_lens: list[int], spare: int, layout: Layout) -> None:
    rows = sum(extend_lens)
    expanded, clamped = _poisoned(2, rows + spare)
    total = kernels.fill_draft_extend_metadata_inplace(layout(extend_lens), layout(seq_lens), TOPK, expanded, clamped)
    assert total == rows
    assert (expanded[:rows].tolist(), clamped[:rows].tolist()) == _expected(extend_lens, seq_lens)
    assert expanded[rows:].tolist() == clamped[rows:].tolist() == [-77] * spare


@pytest.mark.parametrize(("short", "name"), [(0, "out_seqlens_expanded"), (1, "out_nsa_cache_seqlens")])
def test_inplace_refuses_a_short_output_and_writes_nothing(short: int, name: str) -> None:
    outputs = [_poisoned(6 - (index == short)) for index in range(2)]
    lens = _contiguous([2, 3, 1]), _contiguous([13, 5, 1])
    with pytest.raises(ValueError, match=f"{name} holds 5 rows, the batch expands to 6; nothing was written"):
        kernels.fill_draft_extend_metadata_inplace(*lens, TOPK, outputs[0], outputs[1])
    assert all(output.eq(-77).all() for output in outputs)


def test_inplace_refuses_what_the_kernel_would_misread() -> None:
    good = _poisoned(8)
    lens = _contiguous([2, 3, 1]), _contiguous([13, 5, 1])
    for bad in (good.long(), _poisoned(16)[::2], good.view(2, 4)):
        with pytest.raises(ValueError, match="out_nsa_cache_seqlens is torch"):
            kernels.fill_draft_extend_metadata_inplace(*lens, TOPK, good, bad)
        assert bad.eq(-77).all()
    assert good.eq(-77).all()


@pytest.mark.parametrize("layout", [_contiguous, _strided])
@pytest.mark.parametrize(("extend_lens", "seq_lens"), CASES)
def test_onepass(extend_lens: list[int], seq_lens: list[int], layout: Layout) -> None:
    rows = sum(extend_lens)
    expanded, clamped = _poisoned(2, rows + 3)
    kernels.fill_draft_extend_metadata_onepass(layout(extend_lens), layout(seq_lens), TOPK, expanded, clamped)
    assert (expanded[:rows].tolist(), clamped[:rows].tolist()) == _expected(extend_lens, seq_lens)
    assert expanded[rows:].tolist() == clamped[rows:].tolist() == [-77] * 3
    wide = clamped.long()
    with pytest.raises(ValueError, match=r"out_nsa_cache_seqlens is torch\.int64"):
        kernels.fill_draft_extend_metadata_onepass(layout(extend_lens), layout(seq_lens), TOPK, expanded, wide)


@pytest.mark.parametrize("lens", [[], [0], [0, 0, 0]])
def test_nothing_accepted(lens: list[int]) -> None:
    accept_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.ones_like(accept_lens)
    expanded, clamped = kernels.fill_draft_extend_metadata_fused_simple(accept_lens, seq_lens, TOPK)
    assert expanded.shape == clamped.shape == (0,)
    outputs = _poisoned(2, 4)
    assert kernels.fill_draft_extend_metadata_inplace(accept_lens, seq_lens, TOPK, outputs[0], outputs[1]) == 0
    kernels.fill_draft_extend_metadata_onepass(accept_lens, seq_lens, TOPK, outputs[0], outputs[1])
    assert outputs.eq(-77).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_compute_nsa_seqlens(dtype: torch.dtype) -> None:
    lengths = torch.tensor([0, 7, 8, 9, 130_000], dtype=dtype, device=DEVICE)
    got = kernels.compute_nsa_seqlens(lengths, TOPK)
    assert got.dtype == torch.int32
    assert got.tolist() == [0, 7, 8, 8, 8]
    assert lengths.tolist() == [0, 7, 8, 9, 130_000]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fill_nothing'"):
        kernels.__getattr__("fill_nothing")


def test_the_package_imports_neither_torch_nor_triton() -> None:
    script = "import sys, nsa_verify.kernels; sys.exit(len({'torch', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
