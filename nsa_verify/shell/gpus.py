"""Which GPUs there are for us, how many workers they carry, and which worker gets which.

The driver is asked through NVML and never through CUDA, so that no context comes into being and a worker can still be
bound to one GPU. Without a GPU, or without a driver, there are simply none.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
WORKER_BYTES: Final = 2 * 2**30
"""What one worker needs on its GPU.

A CUDA context takes about 0.5 GiB with our kernels loaded, and a second one lives beside it while a dead worker is
replaced. The other GiB is for arenas, inputs and the pools of captured graphs.
"""
MOST_PER_GPU: Final = 16
"""Contexts take turns on a GPU: beyond this many, workers wait for each other."""
MOST_WORKERS: Final = 256
TOO_LATE: Final = (
    "this process uses CUDA already, so it cannot be bound to one GPU and runs on the first that it sees; set"
    f" {VISIBLE}, or let nothing use CUDA before the tests are collected"
)


class Slice(NamedTuple):
    """A MIG device: a part of a GPU that CUDA takes for a GPU."""

    uuid: str
    gpu_instance: int
    compute_instance: int
    free_bytes: int | None


class Board(NamedTuple):
    """A GPU as NVML lists it; in MIG mode only its ``slices`` can be used, and there may be none."""

    uuid: str
    model: str
    free_bytes: int | None
    slices: tuple[Slice, ...] | None = None


class Gpu(NamedTuple):
    """What ``CUDA_VISIBLE_DEVICES`` may be set to, and the free memory behind it; None: the driver does not say."""

    entry: str
    free_bytes: int | None

    @property
    def room(self) -> int:
        """How many workers it carries; one if its memory is not known."""
        return 1 if self.free_bytes is None else min(self.free_bytes // WORKER_BYTES, MOST_PER_GPU)


def gpus_for(device: str, environ: Mapping[str, str] | None = None) -> tuple[Gpu, ...]:
    """The GPUs of a run with ``--device``: none for ``cpu``, nor where torch is built without CUDA."""
    if device == "cpu":
        return ()
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            return ()
    return visible_gpus(os.environ if environ is None else environ)


def visible_gpus(environ: Mapping[str, str], boards: Sequence[Board] | None = None) -> tuple[Gpu, ...]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, in its order and in its words.

    As CUDA reads it: entries are indices, prefixes of a GPU's UUID, or MIG devices (``MIG-<uuid>``, or
    ``MIG-GPU-<uuid>/<gpu instance>/<compute instance>``), all of one kind; the first that is none of these, or names
    nothing here, ends the list; one GPU named twice empties it. Several MIG devices are all returned, although a
    process sees the first only: each worker is given one.

    Without the variable every GPU is there, by index; where one is in MIG mode an index means little, and UUIDs are
    used.
    """
    found = read_boards() if boards is None else boards
    listed = environ.get(VISIBLE)
    if listed is not None:
        return _listed(listed, found, environ)
    if all(board.slices is None for board in found):
        return tuple(Gpu(str(index), _free_at(found, index, environ)) for index in range(len(found)))
    return tuple(
        gpu
        for board in found
        for gpu in (
            [Gpu(board.uuid, board.free_bytes)]
            if board.slices is None
            else [Gpu(part.uuid, part.free_bytes) for part in board.slices]
        )
    )


def _listed(listed: str, boards: Sequence[Board], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    gpus: dict[str | int, Gpu] = {}
    kinds = set()
    for entry in (it.strip() for it in listed.split(",")):
        kinds.add(entry[:4] if entry.startswith(("GPU-", "MIG-")) else "")
        found = _named(entry, boards, environ)
        if found is None or len(kinds) > 1:
            break
        name, free_bytes = found
        if name in gpus:
            return ()
        gpus[name] = Gpu(entry, free_bytes)
    return tuple(gpus.values())


def _named(entry: str, boards: Sequence[Board], environ: Mapping[str, str]) -> tuple[str | int, int | None] | None:
    """What an entry names, and its free memory; None if it names nothing."""
    if entry.startswith("GPU-"):
        of = [board for board in boards if board.uuid.startswith(entry)]
        return (of[0].uuid, _free(of[0])) if len(of) == 1 else None
    if entry.startswith("MIG-"):
        for board in boards:
            for part in board.slices or ():
                if entry in (part.uuid, f"MIG-{board.uuid}/{part.gpu_instance}/{part.compute_instance}"):
                    return part.uuid, part.free_bytes
        return None
    # CUDA reads an index as strtol does: up to what is no digit.
    number = re.match(r"\+?([0-9]{1,9})", entry)
    if number is None or int(number[1]) >= len(boards):
        return None
    return int(number[1]), _free_at(boards, int(number[1]), environ)


def _free_at(boards: Sequence[Board], index: int, environ: Mapping[str, str]) -> int | None:
    """Free memory of CUDA's GPU ``index``.

    NVML counts GPUs in the order of the PCI bus. So does CUDA if it is told to, or if they are all alike; otherwise it
    puts the fastest first, and which that is NVML cannot tell: then the least of all is true of any.
    """
    in_bus_order = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({board.model for board in boards}) == 1
    return _free(boards[index]) if in_bus_order else _least(_free(board) for board in boards)


def _free(board: Board) -> int | None:
    """In MIG mode CUDA takes one of the slices."""
    return board.free_bytes if board.slices is None else _least(part.free_bytes for part in board.slices)


def _least(amounts: Iterable[int | None]) -> int | None:
    """The smallest, None if one is not known, 0 if there is none."""
    known = list(amounts)
    return None if None in known else min((it for it in known if it is not None), default=0)


def read_boards(nvml: Any = None) -> tuple[Board, ...]:
    """Every GPU that the driver lists, in the order of the PCI bus; ``nvml`` stands in for ``pynvml``."""
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()
    try:
        return tuple(_read_boards(nvml))
    except nvml.NVMLError:
        return ()
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _read_boards(nvml: Any) -> Iterator[Board]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
        except nvml.NVMLError:
            continue  # lost, or not for this user: CUDA does not count it either
        try:
            model = nvml.nvmlDeviceGetName(handle)
        except nvml.NVMLError:
            model = uuid
        try:
            in_mig_mode = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
        except nvml.NVMLError:
            in_mig_mode = False
        yield Board(uuid, model, _read_free(nvml, handle), tuple(_read_slices(nvml, handle)) if in_mig_mode else None)


def _read_slices(nvml: Any, board: Any) -> Iterator[Slice]:
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(board)):
        # Places without a slice raise, and the others may lie behind them.
        with suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(board, index)
            yield Slice(
                nvml.nvmlDeviceGetUUID(handle),
                nvml.nvmlDeviceGetGpuInstanceId(handle),
                nvml.nvmlDeviceGetComputeInstanceId(handle),
                _read_free(nvml, handle),
            )


def _read_free(nvml: Any, handle: Any) -> int | None:
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
    except nvml.NVMLError:
        return None


def worker_budget(gpus: Sequence[Gpu], most: int | None = None) -> int:
    """How many workers these GPUs carry, at most ``most`` (default: the cores), at least 1."""
    return max(1, min(sum(gpu.room for gpu in gpus), cores() if most is None else most))


def workers_wanted(text: str) -> int | None:
    """The number that ``N|auto`` means, None for auto; raises ``ValueError`` that says what may stand there."""
    if text == "auto":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MOST_WORKERS:
        raise ValueError(f"must be a number from 1 to {MOST_WORKERS}, or auto")
    return int(text)


def placement(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """The entries that workers take, worker k the k-th, modulo their number: by turns, and none where there is no room.

    If all GPUs have the same room, that is the (k mod number of GPUs)-th GPU. To be settled once and before the first
    worker starts, because free memory changes as they come. With fewer than two GPUs it is empty: nothing is to be set.
    """
    if len(gpus) < 2:
        return ()
    turns = range(max(gpu.room for gpu in gpus))
    taken = tuple(gpu.entry for turn in turns for gpu in gpus if gpu.room > turn)
    return taken or tuple(gpu.entry for gpu in gpus)


def pin(worker: int, environ: MutableMapping[str, str], entries: Sequence[str] | None = None) -> str | None:
    """Have worker number ``worker`` see one GPU only, and return its entry of ``CUDA_VISIBLE_DEVICES``.

    ``entries`` is what ``placement`` gave; without it, what it gives now. ``environ`` is changed; if it is that of this
    process and this process uses CUDA already, a ``RuntimeWarning`` says so and nothing is changed. None: not pinned.
    """
    chosen = placement(visible_gpus(environ)) if entries is None else entries
    if not chosen:
        return None
    if environ is os.environ and uses_cuda():
        warnings.warn(TOO_LATE, RuntimeWarning, stacklevel=2)
        return None
    environ[VISIBLE] = chosen[worker % len(chosen)]
    return environ[VISIBLE]


def uses_cuda() -> bool:
    """Whether this process has read ``CUDA_VISIBLE_DEVICES``, which CUDA does once; imports nothing, starts nothing."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return True
    # torch.cuda.is_available() starts the driver without what torch calls initialised. Until it has been started the
    # driver answers any question with an error.
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0)
    except (OSError, AttributeError):
        return False


def cores(root: Path = Path("/")) -> int:
    """How many cores this process may use: its affinity, and no more than the CPU time its control groups grant."""
    allowed = len(os.sched_getaffinity(0))
    granted = min(_quotas(root), default=None)
    return allowed if granted is None else max(1, min(allowed, int(granted)))


def _quotas(root: Path) -> Iterator[float]:
    """CPU seconds per second that each control group around this process may spend, of either version."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in ("cpu", "cpu,cpuacct") if controllers else ("", "unified"):
            top = root / "sys/fs/cgroup" / mount
            # In a container the path may be the host's, which is not there; the container's limit stands at the top.
            inner = top / path.lstrip("/")
            for folder in (inner, *inner.parents):
                yield from _quota(folder)
                if folder == top:
                    break


def _quota(folder: Path) -> Iterator[float]:
    limit = _text(folder / "cpu.max").split()  # "150000 100000", or "max 100000"
    limit = limit or [
        text.strip() for text in (_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))
    ]
    if len(limit) == 2 and all(re.fullmatch(r"[1-9][0-9]*", it) for it in limit):
        yield int(limit[0]) / int(limit[1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
