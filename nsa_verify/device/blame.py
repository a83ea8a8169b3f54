"""Which line of an implementation is to blame for what happens now."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Final

import torch

_MACHINERY: Final = (str(Path(__file__).parent), str(Path(torch.__file__).parent), "<")


def line_now(source: str) -> str:
    """``file.py:12 in name``: the innermost running line of the file ``source``, or failing that of anything but torch,
    Triton and the executors."""
    frame: FrameType | None = sys._getframe(1)
    outside: FrameType | None = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name == source:
            return _said(frame)
        if outside is None and not name.startswith(_MACHINERY) and "/triton/" not in name:
            outside = frame
        frame = frame.f_back
    return _said(outside) if outside is not None else "unknown line"


def line_of(error: BaseException, source: str) -> str:
    """``file.py:12 in name``: where ``error`` passed through the file ``source`` last, or else where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "unknown line"
    frame = next((frame for frame in reversed(frames) if frame.filename == source), frames[-1])
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


def _said(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
