"""Implementations that kill their process, or never return, from a length of 9 on."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from nsa_verify import Mode, implementation
from nsa_verify.kernels.vectorized import refresh as right

TRIGGER = 9


def _is_bad(inputs: Any) -> bool:
    return bool((inputs.seq_lens[: inputs.batch_size] >= TRIGGER).any())


@implementation("segfaults", modes=[Mode.DECODE], extent="full")
def segfaults(inputs: Any, steps: Any, setup: Any) -> None:
    """Read through a null pointer."""
    if _is_bad(inputs):
        ctypes.string_at(0)
    right(inputs, steps, setup)


@implementation("exits", modes=[Mode.DECODE], extent="full")
def exits(inputs: Any, steps: Any, setup: Any) -> None:
    """End the process without a word."""
    if _is_bad(inputs):
        os._exit(3)
    right(inputs, steps, setup)


@implementation("aborts", modes=[Mode.DECODE], extent="full")
def aborts(inputs: Any, steps: Any, setup: Any) -> None:
    """Raise a signal in C."""
    if _is_bad(inputs):
        ctypes.CDLL(None)["raise"](6)
    right(inputs, steps, setup)


@implementation("hangs", modes=[Mode.DECODE], extent="full")
def hangs(inputs: Any, steps: Any, setup: Any) -> None:
    """Wait for ever in C, with the interpreter's lock held."""
    if _is_bad(inputs):
        ctypes.PyDLL(None).pause()
    right(inputs, steps, setup)


@implementation("eats", modes=[Mode.DECODE], extent="full")
def eats(inputs: Any, steps: Any, setup: Any) -> None:
    """Take memory until somebody ends it."""
    kept = []
    while _is_bad(inputs):
        kept.append(bytearray(b"x") * (16 << 20))
    right(inputs, steps, setup)


@implementation("raises", modes=[Mode.DECODE], extent="full")
def raises(inputs: Any, steps: Any, setup: Any) -> None:
    """Raise a Python exception from C."""
    if _is_bad(inputs):
        ctypes.pythonapi.PyErr_SetString(ctypes.py_object(ValueError), b"from C")
        ctypes.pythonapi.PyErr_Occurred()
    right(inputs, steps, setup)


@implementation("spoils", modes=[Mode.DECODE], extent="full")
def spoils(inputs: Any, steps: Any, setup: Any) -> None:
    """Leave something behind that another one dies of."""
    if _is_bad(inputs):
        sys.spoilt = True  # type: ignore[attr-defined]
    right(inputs, steps, setup)


@implementation("trips", modes=[Mode.DECODE], extent="full")
def trips(inputs: Any, steps: Any, setup: Any) -> None:
    """Die of what was left behind."""
    if getattr(sys, "spoilt", False):
        ctypes.string_at(0)
    right(inputs, steps, setup)
