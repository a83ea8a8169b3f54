"""The functions under the engines' own names: values, errors, and what they leave alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsa_verify import Case, Mode, Replay, Request, Setup, kernels
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS
from nsa_verify.core.registry import find
from nsa_verify.device.images import ImageKey, paint
from nsa_verify.device.rig import Rig

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
Fill = Callable[[Tensor, Tensor, int, Tensor, Tensor], object]
FILLS: tuple[Fill, ...] = (kernels.fill_draft_extend_metadata_inplace, kernels.fill_draft_extend_metadata_onepass)
"""Those that write into given buffers."""


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


@pytest.mark.parametrize("fill", FILLS)
def test_outputs_that_the_kernel_would_misread_are_refused(fill: Fill) -> None:
    good = _poisoned(8)
    lens = _contiguous([2, 3, 1]), _contiguous([13, 5, 1])
    nothing = _contiguous([]).int(), _contiguous([]).int()
    for bad in (good.long(), _poisoned(16)[::2], good.view(2, 4)):
        for given in (lens, nothing):
            with pytest.raises(ValueError, match="out_nsa_cache_seqlens is torch"):
                fill(*given, TOPK, good, bad)
        assert bad.eq(-77).all()
    assert good.eq(-77).all()


@pytest.mark.parametrize("fill", FILLS)
def test_outputs_that_share_memory_or_are_elsewhere_are_refused(fill: Fill) -> None:
    memory = _poisoned(12)
    lens = _contiguous([2, 3, 1]), _contiguous([13, 5, 1])
    for first, second in ((memory, memory), (memory[:7], memory[6:]), (memory[5:], memory[:6])):
        words = "^out_seqlens_expanded and out_nsa_cache_seqlens share memory, must be tensors of their own$"
        with pytest.raises(ValueError, match=words):
            fill(*lens, TOPK, first, second)
    with pytest.raises(ValueError, match=r"^out_nsa_cache_seqlens is on meta, must be on .* as extend_seq_lens is$"):
        fill(*lens, TOPK, memory, memory.to("meta"))
    assert memory.eq(-77).all()
    fill(*lens, TOPK, memory[6:], memory[:6])
    assert (memory[6:].tolist(), memory[:6].tolist()) == _expected([2, 3, 1], [13, 5, 1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({1: _contiguous([13, 5])}, "seq_lens has 2 elements, must have 3 as extend_seq_lens has"),
        ({0: _contiguous([2, 3])}, "seq_lens has 3 elements, must have 2 as extend_seq_lens has"),
        (
            {0: _contiguous([2, 3, 1]).float()},
            r"extend_seq_lens is torch.float32 of shape \[3\], not 1-D and int32 or in",
        ),
        ({1: _contiguous([13, 5, 1]).to(torch.int16)}, r"seq_lens is torch.int16 of shape \[3\], not 1-D"),
        ({0: _contiguous([2, 3, 1])[:, None]}, r"extend_seq_lens is torch.int64 of shape \[3, 1\], not 1-D"),
        ({1: _contiguous([13, 5, 1])[:, None]}, r"seq_lens is torch.int64 of shape \[3, 1\], not 1-D"),
        ({1: _contiguous([13, 5, 1]).to("meta")}, "seq_lens is on meta, must be on .* as extend_seq_lens is"),
    ],
)
def test_lengths_that_the_kernel_would_misread_are_refused(wrong: dict[int, Tensor], words: str) -> None:
    lens = [wrong.get(place, good) for place, good in enumerate((_contiguous([2, 3, 1]), _contiguous([13, 5, 1])))]
    expanded, clamped = _poisoned(2, 8)
    with pytest.raises(ValueError, match=f"^{words}"):
        kernels.fill_draft_extend_metadata_fused_simple(lens[0], lens[1], TOPK)
    for fill in FILLS:
        with pytest.raises(ValueError, match=f"^{words}"):
            fill(lens[0], lens[1], TOPK, expanded, clamped)
    assert expanded.eq(-77).all()
    assert clamped.eq(-77).all()


@pytest.mark.parametrize("layout", [_contiguous, _strided])
@pytest.mark.parametrize(("extend_lens", "seq_lens"), CASES)
def test_onepass(extend_lens: list[int], seq_lens: list[int], layout: Layout) -> None:
    rows = sum(extend_lens)
    expanded, clamped = _poisoned(2, rows + 3)
    kernels.fill_draft_extend_metadata_onepass(layout(extend_lens), layout(seq_lens), TOPK, expanded, clamped)
    assert (expanded[:rows].tolist(), clamped[:rows].tolist()) == _expected(extend_lens, seq_lens)
    assert expanded[rows:].tolist() == clamped[rows:].tolist() == [-77] * 3


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_onepass_leaves_out_rows_that_the_outputs_do_not_have(rows: int) -> None:
    extend_lens, seq_lens = [2, 3, 1], [13, 5, 1]
    memory = _poisoned(2, 7)
    kernels.fill_draft_extend_metadata_onepass(
        _contiguous(extend_lens), _contiguous(seq_lens), TOPK, memory[0, :rows], memory[1, :6]
    )
    assert [it[:rows] for it in memory.tolist()] == [it[:rows] for it in _expected(extend_lens, seq_lens)]
    assert memory[:, rows:].eq(-77).all()


@pytest.mark.parametrize("batch_size", [3, 20])
def test_an_accept_length_beyond_n_writes_no_row_that_is_not_there(batch_size: int) -> None:
    """No engine may pass one; what is behind the buffers is safe from it, and the rows are those of N."""
    setup = Setup(
        num_draft_tokens=2, page_size=16, table_width=300, pool_width=304, buckets=(batch_size,), schedule=True
    )
    case = Case(setup, (Replay(Mode.DRAFT_EXTEND, (Request(300, accept_len=2),) * batch_size),))
    rig = Rig(setup, DEVICE)
    values, _ = paint(case, ImageKey.of(find("onepass"), setup))
    rig.load(case, 0, torch.frombuffer(values, dtype=torch.int32).to(DEVICE))
    inputs = rig.inputs(Mode.DRAFT_EXTEND, batch_size)
    steps = rig.steps(Mode.DRAFT_EXTEND, batch_size, OPTIONAL_OUTPUTS)
    find("onepass").refresh(inputs, steps, setup)
    outputs = rig.arena[: rig.layout.inputs_start]
    right = outputs.clone()
    inputs.accept_lens.fill_(7)
    find("onepass").refresh(inputs, steps, setup)
    assert torch.equal(outputs, right)


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
