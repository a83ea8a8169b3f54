"""Which GPUs there are, how many workers they carry, and which worker gets which; by an NVML that is made up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pynvml
import pytest

from nsa_verify.shell import gpus, options
from nsa_verify.shell.gpus import Board, Gpu, Slice, placement, read_boards, visible_gpus, worker_budget
from nsa_verify.shell.options import Unable

GIB = 2**30
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Fake(NamedTuple):
    """A GPU or MIG device of ``FakeNvml``; what is None raises."""

    uuid: str | None
    free_bytes: int | None = 100 * GIB
    model: str | None = "H200"
    ids: tuple[int, int] = (0, 0)
    slices: tuple[Fake | None, ...] | None = None


class FakeNvml:
    """As much of ``pynvml`` as is asked for."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *devices: Fake, init: int | None = None, count: int | None = None) -> None:
        self.devices, self.init, self.count, self.open = devices, init, count, 0

    def _known(self, value: Any, code: int = pynvml.NVML_ERROR_NOT_SUPPORTED) -> Any:
        assert self.open == 1, "asked outside of nvmlInit and nvmlShutdown"
        if value is None:
            raise pynvml.NVMLError(code)
        return value

    def nvmlInit(self) -> None:  # noqa: N802 - the name of pynvml, as those below
        if self.init is not None:
            raise pynvml.NVMLError(self.init)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if self.count is not None:
            raise pynvml.NVMLError(self.count)
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Fake:  # noqa: N802
        return self.devices[index]

    def nvmlDeviceGetUUID(self, handle: Fake) -> str:  # noqa: N802
        return str(self._known(handle.uuid, pynvml.NVML_ERROR_GPU_IS_LOST))

    def nvmlDeviceGetName(self, handle: Fake) -> str:  # noqa: N802
        return str(self._known(handle.model))

    def nvmlDeviceGetMemoryInfo(self, handle: Fake) -> Any:  # noqa: N802
        return types.SimpleNamespace(free=self._known(handle.free_bytes))

    def nvmlDeviceGetMigMode(self, handle: Fake) -> list[int]:  # noqa: N802
        if handle.slices is None and handle.model == "GTX":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(handle.slices is not None), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Fake) -> int:  # noqa: N802
        return len(handle.slices or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Fake, index: int) -> Fake:  # noqa: N802
        assert handle.slices is not None
        found: Fake = self._known(handle.slices[index], pynvml.NVML_ERROR_NOT_FOUND)
        return found

    def nvmlDeviceGetGpuInstanceId(self, handle: Fake) -> int:  # noqa: N802
        return handle.ids[0]

    def nvmlDeviceGetComputeInstanceId(self, handle: Fake) -> int:  # noqa: N802
        return handle.ids[1]


FOUR = tuple(
    Board(f"GPU-{start}-0000", "H200", free * GIB) for start, free in (("aa", 10), ("ab", 11), ("b", 12), ("c", 13))
)
"""Four GPUs alike, with 10, 11, 12 and 13 GiB free."""
SLICED = (
    Board("GPU-a", "H200", 90 * GIB, (Slice("MIG-1", 1, 0, 5 * GIB), Slice("MIG-2", 2, 1, 4 * GIB))),
    Board("GPU-b", "H200", 80 * GIB),
    Board("GPU-c", "H200", 70 * GIB, ()),
)
"""One in MIG mode with two slices, one that is whole, one in MIG mode without a slice."""


def _seen(listed: str | None, boards: tuple[Board, ...] = FOUR, **environ: str) -> list[tuple[str, int | None]]:
    """Entries and free GiB under ``CUDA_VISIBLE_DEVICES=listed``."""
    if listed is not None:
        environ[VISIBLE] = listed
    return [
        (it.entry, it.free_bytes if it.free_bytes is None else it.free_bytes // GIB)
        for it in visible_gpus(environ, boards)
    ]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, [("0", 10), ("1", 11), ("2", 12), ("3", 13)]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", [("2", 12), ("0", 10)]),
        (" 2 , 0 ", [("2", 12), ("0", 10)]),
        ("0,2,-1,1", [("0", 10), ("2", 12)]),
        ("0,,1", [("0", 10)]),
        ("1,4,0", [("1", 11)]),
        ("4", []),
        ("99999999999999999999", []),
        ("+1,2nd", [("+1", 11), ("2nd", 12)]),
        ("0,1,0", []),
        ("1,01", []),
        ("0,x,0", [("0", 10)]),
        ("GPU-b", [("GPU-b", 12)]),
        ("GPU-ab-0000,GPU-aa", [("GPU-ab-0000", 11), ("GPU-aa", 10)]),
        ("GPU-a", []),
        ("GPU-c,GPU-a,GPU-b", [("GPU-c", 13)]),
        ("GPU-c,GPU-d,GPU-b", [("GPU-c", 13)]),
        ("GPU-c,GPU-c-00", []),
        ("GPU-c,0", [("GPU-c", 13)]),
        ("0,GPU-c", [("0", 10)]),
        ("MIG-1", []),
    ],
)
def test_the_list_is_read_as_cuda_reads_it(listed: str | None, expected: list[tuple[str, int]]) -> None:
    assert _seen(listed) == expected


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, [("MIG-1", 5), ("MIG-2", 4), ("GPU-b", 80)]),
        ("MIG-2,MIG-1", [("MIG-2", 4), ("MIG-1", 5)]),
        ("MIG-GPU-a/2/1,MIG-GPU-a/1/0", [("MIG-GPU-a/2/1", 4), ("MIG-GPU-a/1/0", 5)]),
        ("MIG-GPU-a/1/0,MIG-1", []),
        ("MIG-1,MIG-GPU-a/1/1,MIG-2", [("MIG-1", 5)]),
        ("MIG-GPU-b/1/0", []),
        ("MIG-", []),
        ("MIG-1,GPU-b", [("MIG-1", 5)]),
        ("GPU-b,MIG-1", [("GPU-b", 80)]),
        ("0,1,2", [("0", 4), ("1", 80), ("2", 0)]),
        ("GPU-a", [("GPU-a", 4)]),
    ],
)
def test_mig_devices(listed: str | None, expected: list[tuple[str, int]]) -> None:
    assert _seen(listed, SLICED) == expected


def test_mig_devices_of_an_old_driver_keep_its_names() -> None:
    old = (Board("GPU-a", "A100", None, (Slice("MIG-GPU-a/7/0", 7, 0, 5 * GIB),)),)
    assert _seen(None, old) == _seen("MIG-GPU-a/7/0", old) == [("MIG-GPU-a/7/0", 5)]


def test_an_index_on_a_mixed_machine_stands_for_the_least_memory_unless_the_order_is_that_of_the_bus() -> None:
    mixed = (*FOUR[:2], Board("GPU-d", "A2", 3 * GIB))
    assert _seen("1,0", mixed) == [("1", 3), ("0", 3)]
    assert _seen(None, mixed, CUDA_DEVICE_ORDER="FASTEST_FIRST") == [("0", 3), ("1", 3), ("2", 3)]
    assert _seen("1,0", mixed, CUDA_DEVICE_ORDER="PCI_BUS_ID") == [("1", 11), ("0", 10)]
    assert _seen("GPU-ab,GPU-aa", mixed) == [("GPU-ab", 11), ("GPU-aa", 10)]
    unknown = (*FOUR[:2], Board("GPU-d", "A2", None))
    assert _seen("0", unknown) == [("0", None)]


def test_what_nvml_says() -> None:
    half = Fake("MIG-1", 40 * GIB, ids=(3, 1))
    nvml = FakeNvml(
        Fake("GPU-a", 7),
        Fake("GPU-b", 8, slices=(None, half, None)),
        Fake(None),
        Fake("GPU-c", None, model="GTX"),
        Fake("GPU-d", 9, model=None, slices=()),
    )
    assert read_boards(nvml) == (
        Board("GPU-a", "H200", 7),
        Board("GPU-b", "H200", 8, (Slice("MIG-1", 3, 1, 40 * GIB),)),
        Board("GPU-c", "GTX", None),
        Board("GPU-d", "GPU-d", 9, ()),
    )
    assert nvml.open == 0


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(Fake("GPU-a"), init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND),
        FakeNvml(Fake("GPU-a"), init=pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        FakeNvml(Fake("GPU-a"), count=pynvml.NVML_ERROR_UNKNOWN),
        FakeNvml(),
    ],
)
def test_no_driver_is_no_gpu(nvml: FakeNvml) -> None:
    assert read_boards(nvml) == ()
    assert nvml.open == 0


def test_without_a_driver_library_this_process_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", missing)
    assert visible_gpus({}) == ()


@pytest.fixture(name="cuda_build")
def _cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch with CUDA on a machine with ``FOUR``, of which the caller gives all, and with 40 cores."""
    monkeypatch.setattr(gpus, "version", lambda _: "2.13.0+cu130")
    monkeypatch.setattr(gpus, "read_boards", lambda: FOUR)
    monkeypatch.setattr(gpus, "cores", lambda: 40)
    monkeypatch.delenv(VISIBLE, raising=False)


def test_the_device_decides_whether_gpus_count(cuda_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [gpus.gpus_for(it, {VISIBLE: "2"}) for it in ("auto", "cuda")] == [(Gpu("2", 12 * GIB),)] * 2
    assert gpus.gpus_for("cpu", {}) == ()
    assert len(gpus.gpus_for("auto")) == 4
    monkeypatch.setattr(gpus, "version", lambda _: "2.13.0+cpu")
    assert gpus.gpus_for("auto", {}) == ()


def _free(*gib: float | None) -> tuple[Gpu, ...]:
    return tuple(Gpu(str(at), None if free is None else int(free * GIB)) for at, free in enumerate(gib))


@pytest.mark.parametrize(
    ("free_gib", "most", "expected"),
    [
        ((140,), 64, 16),
        ((140, 140), 64, 32),
        ((140, 140), 10, 10),
        ((2,), 64, 1),
        ((1.99,), 64, 1),
        ((3.9, 4.1), 64, 3),
        ((0, 9), 64, 4),
        ((0, 0), 64, 1),
        ((None, 8), 64, 5),
        ((), 64, 1),
        ((140,), 1, 1),
    ],
)
def test_the_budget(free_gib: tuple[float | None, ...], most: int, expected: int) -> None:
    assert worker_budget(_free(*free_gib), most) == expected


def test_the_budget_is_within_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "cores", lambda: 3)
    assert worker_budget(_free(140)) == 3


def test_workers_auto(cuda_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.worker_count("auto", "auto", False, 100) == 5 + 5 + 6 + 6
    assert options.worker_count("auto", "cuda", False, 7) == 7
    assert options.worker_count("auto", "auto", True, 100) == 1
    assert options.worker_count("auto", "cpu", False, 100) == 40
    assert options.worker_count("9", "auto", False, 100) == 9
    monkeypatch.setenv(VISIBLE, "3")
    assert options.worker_count("auto", "auto", False, 100) == 6
    monkeypatch.setenv(VISIBLE, "")
    assert options.worker_count("auto", "auto", False, 100) == 40


@pytest.mark.parametrize("text", ["0", "257", "-1", "two", "", "\N{SUPERSCRIPT TWO}", "9" * 5000])
def test_workers_that_make_no_sense(text: str) -> None:
    with pytest.raises(Unable, match=r"--workers .*: must be a number from 1 to 256, or auto$"):
        options.worker_count(text, "cpu", False, 8)


def test_workers_take_turns_on_gpus_with_equal_room() -> None:
    entries = placement(_free(140, 140, 140))
    assert [entries[worker % len(entries)] for worker in range(100)] == [str(worker % 3) for worker in range(100)]


@pytest.mark.parametrize(
    ("free_gib", "expected"),
    [
        ((), ""),
        ((140,), ""),
        ((0, 4), "11"),
        ((2, 6, 4), "012121"),
        ((0, 1), "01"),
        ((None, 5), "011"),
    ],
)
def test_no_worker_goes_where_there_is_no_room(free_gib: tuple[float | None, ...], expected: str) -> None:
    assert "".join(placement(_free(*free_gib))) == expected


PINS: list[tuple[str | None, list[str | None]]] = [
    (None, ["0", "1", "2", "3", "0"]),
    ("3, 1", ["3", "1", "3", "1", "3"]),
    ("GPU-c,GPU-ab", ["GPU-c", "GPU-ab", "GPU-c", "GPU-ab", "GPU-c"]),
    ("2", ["2"] * 5),
    ("", [""] * 5),
]


@pytest.mark.parametrize(("listed", "expected"), PINS)
def test_a_worker_sees_one_gpu(
    cuda_build: None, monkeypatch: pytest.MonkeyPatch, listed: str | None, expected: list[str]
) -> None:
    # Alike in memory as well, so that turns are by index alone.
    monkeypatch.setattr(gpus, "read_boards", lambda: tuple(it._replace(free_bytes=80 * GIB) for it in FOUR))
    start: Mapping[str, str] = {} if listed is None else {VISIBLE: listed}
    after = []
    for worker in range(5):
        environ = dict(start)
        entry = gpus.pin(worker, environ)
        assert entry == (environ[VISIBLE] if environ != start else None)
        after.append(environ[VISIBLE])
    assert after == expected


def test_one_gpu_or_none_changes_nothing(cuda_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    for boards in (), FOUR[:1]:
        monkeypatch.setattr(gpus, "read_boards", lambda boards=boards: boards)
        assert gpus.pin(3, environ) is None
    assert environ == {}


def test_what_was_settled_before_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "read_boards", lambda: pytest.fail("asked"))
    environ = {VISIBLE: "0,1"}
    assert gpus.pin(4, environ, ("MIG-1", "MIG-2", "MIG-3")) == environ[VISIBLE] == "MIG-2"
    assert gpus.pin(4, environ, ()) is None
    assert environ[VISIBLE] == "MIG-2"


def test_a_process_that_uses_cuda_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    initialized = [True]
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: initialized[0]))
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.warns(RuntimeWarning, match="uses CUDA already") as told:
        assert gpus.pin(1, os.environ, ("0", "1")) is None
    assert (os.environ[VISIBLE], len(told)) == ("0,1", 1)
    elsewhere = dict(os.environ)
    assert gpus.pin(1, elsewhere, ("0", "1")) == "1", "the environment of another process"
    initialized[0] = False
    monkeypatch.setattr(gpus, "ctypes", types.SimpleNamespace())  # this very process may have started the driver
    assert gpus.pin(1, os.environ, ("0", "1")) == "1"


DRIVER = """
static int started;
int cuInit(unsigned flags) { started = 1; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return started ? 0 : 3; }
"""
ASK = """
import ctypes, sys
from nsa_verify.shell.gpus import uses_cuda
told = [uses_cuda()]
absent = "libcuda" not in open("/proc/self/maps").read()
driver = ctypes.CDLL(sys.argv[1])
told.append(uses_cuda())
driver.cuInit(0)
told.append(uses_cuda())
print(*told, absent, "torch" in sys.modules)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_driver_that_was_started_counts_as_used(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    build = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(tmp_path / "driver.c")]
    subprocess.run(build, check=True)
    command = [sys.executable, "-P", "-c", ASK, str(library)]
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.split() == ["False", "False", "True", "True", "False"]


def _machine(root: Path, groups: str, **files: str) -> Path:
    """Control groups under ``root``: the process's line, and the content of files by their path."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _v1(folder: str, quota: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}


V1 = "9:cpuset:/\n4:cpu,cpuacct:/a/b\n0::/a/b\n"
QUOTAS: list[tuple[str, dict[str, str], int]] = [
    ("", {}, 8),
    ("0::/a/b\n", {}, 8),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 8),
    ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}, 4),
    ("0::/a/b\n", {"a/b/cpu.max": "600000 100000\n", "a/cpu.max": "350000 100000\n"}, 3),
    ("0::/a/b\n", {"a/c/cpu.max": "100000 100000\n"}, 8),
    ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    ("0::/../x\n", {"cpu.max": "200000 100000\n"}, 2),
    ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
    ("0::/\n", {"cpu.max": "?\n"}, 8),
    ("0::/\n", {"cpu.max": ""}, 8),
    (V1, _v1("cpu/a/b", -1), 8),
    (V1, _v1("cpu/a/b", 500000), 5),
    (V1, _v1("cpu,cpuacct/a", 600000), 6),
    (V1, _v1("cpu", 200000), 2),
    (V1, _v1("cpuset/a/b", 200000), 8),
]


@pytest.mark.parametrize(("groups", "files", "expected"), QUOTAS)
def test_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert gpus.cores(_machine(tmp_path, groups, **files)) == expected


def test_cores_of_this_machine() -> None:
    assert 1 <= gpus.cores() <= len(os.sched_getaffinity(0))
