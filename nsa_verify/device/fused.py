"""The comparison of an arena with its image on CUDA: one launch between two calls of an implementation, no waiting.

A launch compares what a call left, notes a wrong cell in a flag on the device, remembers the content as what was there
before the next call, and puts the inputs of the next replay in place. ``comparing.py`` says the same in torch.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from nsa_verify.device.comparing import Image, Load
from nsa_verify.device.rig import Rig

_BLOCK: Final = 1024

_NUMBERS: Final = ["size", "inputs_start", "alias_start", "alias_end", "offset", "following", "pool_size", "flag"]
"""Parameters for whose values nothing is compiled anew."""


@triton.jit(do_not_specialize=[name for name in _NUMBERS if name not in ("following", "flag")])  # type: ignore[untyped-decorator]
def _begin(
    arena: tl.tensor,
    before: tl.tensor,
    initial: tl.tensor,
    values: tl.tensor,
    pool: tl.tensor,
    pool_image: tl.tensor,
    size: tl.tensor,
    inputs_start: tl.tensor,
    alias_start: tl.tensor,
    alias_end: tl.tensor,
    offset: tl.tensor,
    pool_size: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]: the arena, then the pool
    in_arena = at < size
    is_input = in_arena & ((at >= inputs_start) | ((at >= alias_start) & (at < alias_end)))
    poison = tl.load(initial + at, mask=in_arena, other=0)
    given = tl.load(values + offset + at, mask=is_input, other=0)
    tl.store(before + at, poison, mask=in_arena)
    tl.store(arena + at, tl.where(is_input, given, poison), mask=in_arena)
    cell = at - size
    in_pool = (cell >= 0) & (cell < pool_size)
    tl.store(pool + cell, tl.load(pool_image + cell, mask=in_pool, other=0), mask=in_pool)


@triton.jit(do_not_specialize=_NUMBERS)  # type: ignore[untyped-decorator]
def _check(
    arena: tl.tensor,
    before: tl.tensor,
    values: tl.tensor,
    classes: tl.tensor,
    pool: tl.tensor,
    pool_image: tl.tensor,
    following_pool_image: tl.tensor,
    flags: tl.tensor,
    size: tl.tensor,
    inputs_start: tl.tensor,
    alias_start: tl.tensor,
    alias_end: tl.tensor,
    offset: tl.tensor,
    following: tl.tensor,
    pool_size: tl.tensor,
    flag: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
    FRAME: tl.constexpr,  # noqa: N803
    LIVE: tl.constexpr,  # noqa: N803
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]: the arena, then the pool
    in_arena = at < size
    found = tl.load(arena + at, mask=in_arena, other=0)
    earlier = tl.load(before + at, mask=in_arena, other=0)
    wanted = tl.load(values + offset + at, mask=in_arena, other=0)
    region = tl.load(classes + offset + at, mask=in_arena, other=0)
    allowed = ((found == wanted) & (region != FRAME)) | ((found == earlier) & (region != LIVE))
    tl.store(before + at, found, mask=in_arena)
    is_input = in_arena & ((at >= inputs_start) | ((at >= alias_start) & (at < alias_end))) & (following >= 0)
    given = tl.load(values + following + at, mask=is_input, other=0)
    tl.store(arena + at, given, mask=is_input)
    cell = at - size
    in_pool = (cell >= 0) & (cell < pool_size)
    slots = tl.load(pool + cell, mask=in_pool, other=0)
    right_slots = tl.load(pool_image + cell, mask=in_pool, other=0)
    tl.store(pool + cell, tl.load(following_pool_image + cell, mask=in_pool, other=0), mask=in_pool)
    wrong = (in_arena & (allowed == 0)) | (in_pool & (slots != right_slots))
    tl.store(flags + flag, 1, mask=tl.max(wrong.to(tl.int32), axis=0) != 0)


class FusedComparison:
    """``Comparison`` over the memory of ``rig``."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._before = rig.initial.clone()
        self._size, self._pool_size = rig.layout.size, rig.pool.memory.numel()
        self._grid = (triton.cdiv(self._size + self._pool_size, _BLOCK),)

    def begin(self, image: Image, load: Load) -> None:
        """Poison everything, and put the inputs of ``load`` in place."""
        rig = self._rig
        _begin[self._grid](
            rig.arena,
            self._before,
            rig.initial,
            image.values,
            rig.pool.memory,
            load.pool,
            self._size,
            rig.layout.inputs_start,
            *load.alias,
            load.replay * self._size,
            self._pool_size,
            BLOCK=_BLOCK,
        )

    def check(self, image: Image, load: Load, flags: Tensor, flag: int, following: Load | None) -> None:
        """Compare what the call for ``load`` left, set ``flags[flag]`` if a cell is wrong, and load ``following``."""
        rig = self._rig
        _check[self._grid](
            rig.arena,
            self._before,
            image.values,
            image.classes,
            rig.pool.memory,
            load.pool,
            load.pool if following is None else following.pool,
            flags,
            self._size,
            rig.layout.inputs_start,
            *((0, 0) if following is None else following.alias),
            load.replay * self._size,
            -1 if following is None else following.replay * self._size,
            self._pool_size,
            flag,
            BLOCK=_BLOCK,
            FRAME=0,
            LIVE=1,
        )

    def close(self) -> None:
        """Nothing is held."""
