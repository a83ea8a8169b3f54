"""What every test relies on: which way Triton runs, one thread per process, a Hypothesis profile of the suite's own."""

from __future__ import annotations

import gc
import os
import signal
from importlib import metadata

import pynvml
import pytest
from hypothesis import HealthCheck, settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: tests of Ctrl-C, and what they start, would wait for it in vain.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _missing_gpu() -> str | None:
    """Why there is no CUDA here, or None if there is; asks the driver, so that no CUDA context is created."""
    if metadata.version("torch").endswith("+cpu"):
        return "torch is a CPU build"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver: {error}"
    return None if count else "the driver sees no GPU"


NO_GPU = _missing_gpu()

if NO_GPU:
    # Triton decides at import whether it interprets, and some test module imports it first.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# One process per core is what -n auto starts; torch reads these once, when it is imported, in worker processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# Complete, so that neither CI=1 nor a database of earlier failures changes what the suite does.
settings.register_profile(
    "suite",
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """What is there by now, thousands of tests among it, lasts: no garbage is looked for in it, which takes time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none, with the reason; the longest test comes first, so that none waits."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    if NO_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs CUDA: {NO_GPU}"))
