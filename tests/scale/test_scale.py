"""Sizes of production, past 2**31 elements, past 65,535 rows and at the wall of the context: is every cell right?

Each workload runs eager, and in a graph that was captured with other inputs. A test takes a few seconds, the first of
its kind some more to compile; ``Workload.needed_bytes`` says how much of the GPU's memory, at most 28 GiB.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Final

import pytest
import torch
from filelock import FileLock
from scale.harness import POISON, Workload, first_mismatch, slot, spoil
from scale.vectorised import Mismatch
from scale.workloads import WORKLOADS

from nsa_verify import Mode
from nsa_verify.core.implementation import registered
from nsa_verify.core.registry import load_builtin

pytestmark = [pytest.mark.gpu, pytest.mark.scale]

NAMES: Final = ("onepass", "triton-inplace", "precomputed-batched-copy")
"""Those that claim to be fast."""


@pytest.fixture(autouse=True)
def _gpu_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One of these tests at a time, whatever the number of processes, and nothing left of it."""
    load_builtin()
    with FileLock(tmp_path_factory.getbasetemp().parent / "scale.lock"):
        _free()
        yield
        _free()


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _skip_if_it_does_not_fit(work: Workload) -> None:
    needed, (free, _) = work.needed_bytes(), torch.cuda.mem_get_info()
    if needed > free:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of the GPU's memory, {free / 2**30:.1f} GiB are free")


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_cell_is_right(workload: str, name: str, captured: bool) -> None:
    work = WORKLOADS[workload]()
    _skip_if_it_does_not_fit(work)
    assert first_mismatch(work, registered()[name], "cuda", captured) is None


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(
    ("workload", "buffer", "row", "column", "expected"),
    [
        (f"tall-tables-{Mode.DECODE}", "page_table_1", 2296, 4199, slot(96, 4199)),
        (f"tall-tables-{Mode.DECODE}", "page_table_1", 2296, 999_999, POISON),
        (f"tall-tables-{Mode.DECODE}", "real_page_table", 2296, 65, slot(96, 65 * 64) // 64),
        (f"wide-tables-{Mode.TARGET_VERIFY}", "page_table_1", 2067, (1 << 20) - 1, slot(10, (1 << 20) - 1)),
        (f"long-pool-{Mode.DECODE}", "req_to_token", 2199, 999_999, slot(2199, 999_999)),
    ],
)
def test_one_wrong_cell_past_2_to_the_31_elements_is_found(
    workload: str, buffer: str, row: int, column: int, expected: int, captured: bool
) -> None:
    work = WORKLOADS[workload]()
    _skip_if_it_does_not_fit(work)
    spoiled = spoil(registered()["onepass"], buffer, row, column, 7)
    assert first_mismatch(work, spoiled, "cuda", captured) == Mismatch(buffer, row, column, expected, 7)
