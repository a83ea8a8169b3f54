"""Implementations that kill their process, or never return, from a length of 9 on or in some odd way."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import time
from contextlib import suppress
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
    """Take memory until somebody ends it, in this very function: where it is then is told."""
    if _is_bad(inputs):
        kept = []
        while True:
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


_calls = [0]
_kept: list[bytearray] = []


@implementation("counts", modes=[Mode.DECODE], extent="full")
def counts(inputs: Any, steps: Any, setup: Any) -> None:
    """Die in the fifth call: each case makes two."""
    _calls[0] += 1
    if _calls[0] == 5:
        os._exit(5)
    right(inputs, steps, setup)


@implementation("always-exits", modes=[Mode.DECODE], extent="full")
def always_exits(inputs: Any, steps: Any, setup: Any) -> None:
    """End the process whatever it is given."""
    os._exit(3)


@implementation("always-hangs", modes=[Mode.DECODE], extent="full")
def always_hangs(inputs: Any, steps: Any, setup: Any) -> None:
    """Never return."""
    ctypes.PyDLL(None).pause()


@implementation("interrupts", modes=[Mode.DECODE], extent="full")
def interrupts(inputs: Any, steps: Any, setup: Any) -> None:
    """Raise what only a terminal should."""
    raise KeyboardInterrupt("not from a terminal")


@implementation("surrogates", modes=[Mode.DECODE], extent="full")
def surrogates(inputs: Any, steps: Any, setup: Any) -> None:
    """Raise with a message that is no text."""
    raise ValueError("\udcff")


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no comment")


@implementation("mute", modes=[Mode.DECODE], extent="full")
def mute(inputs: Any, steps: Any, setup: Any) -> None:
    """Raise without a message to be had."""
    raise _Mute


@implementation("leaks", modes=[Mode.DECODE], extent="full")
def leaks(inputs: Any, steps: Any, setup: Any) -> None:
    """Keep a little of every call."""
    _kept.append(bytearray(b"x") * (8 << 20))
    right(inputs, steps, setup)


@implementation("orphans", modes=[Mode.DECODE], extent="full")
def orphans(inputs: Any, steps: Any, setup: Any) -> None:
    """Die, and leave a child behind that holds everything open."""
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os._exit(4)


@implementation("scribbles", modes=[Mode.DECODE], extent="full")
def scribbles(inputs: Any, steps: Any, setup: Any) -> None:
    """Write into every socket that is open."""
    for descriptor in range(3, 64):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"\x00\x00\x00\x04junk")
    right(inputs, steps, setup)
