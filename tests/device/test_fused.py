"""The kernel that compares on CUDA says what torch says on the CPU; without a GPU Triton's interpreter runs it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from device.subjects import subject
from device.test_comparison import CASES, SETUP

from nsa_verify import Case, Extent, Mode, Replay, Request, Setup
from nsa_verify.device.comparing import Comparison, Image, Load, TorchComparison, loads, upload
from nsa_verify.device.fused import FusedComparison
from nsa_verify.device.images import FRAME, LIVE, ImageKey
from nsa_verify.device.rig import Rig
from nsa_verify.device.select import resolve

ALIASED = Setup(page_size=16, pool_rows=3, buckets=(2, 3), aliased_seq_lens=True, seq_lens_dtype="int32")
SCRIPT = Path(__file__).with_name("compile_comparison.py")


def memories(case: Case) -> list[tuple[Rig, Image, Comparison, list[Load]]]:
    """The same case for the kernel, here, and for torch on the CPU."""
    key = ImageKey.of(subject(extent=Extent.FULL), case.setup)
    found = []
    for device, comparison in ((resolve("auto"), FusedComparison), ("cpu", TorchComparison)):
        rig = Rig(case.setup, device)
        made: Comparison = comparison(rig)
        found.append((rig, upload(rig, case, (key,))[key], made, loads(rig, case)))
    return found


def flags_after(case: Case, changes: Sequence[dict[str, list[tuple[int, int]]]]) -> list[list[int]]:
    """The flags of both, where call number k leaves the right content but for ``changes[k]``."""
    kept: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
    for rig, image, comparison, given in memories(case):
        flags = torch.zeros(len(changes) + 2, dtype=torch.int32, device=rig.device)
        comparison.begin(image, given[0])
        for call, changed in enumerate(changes):
            assert torch.equal(rig.pool.memory, given[call].pool)
            inputs = rig.layout.inputs_start
            assert torch.equal(rig.arena[inputs:], image.values[call, inputs:])
            rig.arena[image.classes[call] == LIVE] = image.values[call][image.classes[call] == LIVE]
            for name, cells in changed.items():
                memory = rig.arena if name == "arena" else rig.pool.memory
                for index, value in cells:
                    memory[index] = value
            following = given[call + 1] if call + 1 < len(changes) else None
            comparison.check(image, given[call], flags, call + 1, following)
        kept.append((flags.tolist(), rig.arena.cpu(), rig.pool.memory.cpu()))
    assert torch.equal(kept[0][1], kept[1][1])
    assert torch.equal(kept[0][2], kept[1][2])
    assert {it[0][0] for it in kept} == {it[0][-1] for it in kept} == {0}
    return [it[0][1:-1] for it in kept]


TWO = Case(SETUP, (CASES[Mode.DRAFT_EXTEND].replays[0], Replay(Mode.DECODE, (Request(7, 0),), pool_seed=3)))
ONE_BUFFER = Case(ALIASED, (Replay(Mode.DECODE, (Request(9, 1), Request(3, 2))), Replay(Mode.DECODE, (Request(5),))))


@pytest.mark.parametrize("case", [TWO, ONE_BUFFER], ids=["two modes", "an aliased input"])
def test_nothing_wrong_sets_no_flag(case: Case) -> None:
    assert flags_after(case, [{}, {}]) == [[0, 0]] * 2


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("region", range(3))
def test_one_wrong_cell_of_any_region_sets_its_flag(region: int, call: int) -> None:
    rng = random.Random(f"{region} {call}")
    _, (_, image, _, _) = memories(TWO)
    cells = (image.classes[call] == region).nonzero().flatten().tolist()
    for index in [cells[0], cells[-1], *rng.sample(cells, 6)]:
        changes: list[dict[str, list[tuple[int, int]]]] = [{}, {}]
        changes[call]["arena"] = [(index, 12_345_678)]
        # What comes behind the first wrong call is of no interest: nobody is told.
        assert [flags[: call + 1] for flags in flags_after(TWO, changes)] == [[0] * call + [1]] * 2


def test_what_a_call_left_in_the_frame_is_what_was_there_before_the_next() -> None:
    _, (_, image, _, _) = memories(TWO)
    both = ((image.classes[0] == FRAME) & (image.classes[1] == FRAME)).nonzero().flatten().tolist()
    index = both[len(both) // 2]
    assert flags_after(TWO, [{"arena": [(index, 5)]}, {}]) == [[1, 0]] * 2


@pytest.mark.parametrize("call", [0, 1])
def test_a_change_of_the_pool_sets_its_flag(call: int) -> None:
    (rig, _, _, _), _ = memories(TWO)
    for index in (0, 70, rig.pool.memory.numel() - 1):
        changes: list[dict[str, list[tuple[int, int]]]] = [{}, {}]
        changes[call]["pool"] = [(index, 1)]
        assert flags_after(TWO, changes) == [[int(call == 0), int(call == 1)]] * 2


def test_it_compiles_once_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["compiled _begin", "compiled _check"]
