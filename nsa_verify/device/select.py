"""Which device a run uses, and how Triton runs on it."""

from __future__ import annotations

import os
import sys


class DeviceError(Exception):
    """The device that was asked for cannot be had; the message is one sentence with the remedy."""


def resolve(device: str) -> str:
    """``auto``, ``cpu`` or ``cuda`` to ``cpu`` or ``cuda``; on the CPU Triton is put into its interpreter.

    Must come before Triton is imported: its language is bound to the interpreter, or not, at import. Raises
    ``DeviceError`` for ``cuda`` without CUDA, and where Triton was imported too early.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or install a CUDA build")
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"--device {device}: must be auto, cpu or cuda")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if chosen == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton.language" in sys.modules:
            raise DeviceError(
                "Triton was imported before its interpreter was chosen; set TRITON_INTERPRET=1 for the CPU"
            )
        os.environ["TRITON_INTERPRET"] = "1"
    return chosen


def import_for_forks() -> None:
    """Import what every worker needs, into a process that they are forked from.

    It must not create a CUDA context, since a forked process could not use CUDA then: whether there is a GPU is asked
    of the driver library. Where there is none, Triton is put into its interpreter.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    from nsa_verify.core.registry import load_builtin

    load_builtin()
    torch.set_num_threads(1)


def warm_up(device: str) -> None:
    """Create the context of ``device`` now and not in the first case."""
    if device == "cuda":
        import torch

        torch.zeros(1, device=device).item()


def single_thread() -> None:
    """Keep torch to one thread: tensors are tiny, and workers share the cores."""
    import torch

    torch.set_num_threads(1)


def describe(device: str) -> str:
    """One line for the header: the device, and how Triton kernels run on it."""
    import torch
    import triton

    triton_runs = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, triton {triton.__version__} ({triton_runs})"
