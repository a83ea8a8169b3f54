"""Do the Triton kernels compile for a GPU, and once for all batches? The interpreter runs what the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_launches.py")


@pytest.mark.parametrize(
    "arguments",
    [
        ["triton-fused"],
        pytest.param(["triton-inplace"], marks=pytest.mark.slow),
        pytest.param(["precomputed-batched-copy"], marks=pytest.mark.slow),
        ["onepass", "few"],
        pytest.param(["onepass"], marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_every_launch_compiles_once_for_a_gpu_that_is_not_there(arguments: list[str], tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("compiled ")
