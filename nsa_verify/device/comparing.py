"""What a call left in a rig's memory, against the oracle's image; and the memory made ready for the next call.

A ``Comparison`` serves one case after the other without reading anything back: whether something was wrong it notes in
flags on the device. What exactly, is for ``judge.py`` to find out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from nsa_verify.core.case import Case
from nsa_verify.device.images import FRAME, ImageKey, aliased_place, is_allowed, paint
from nsa_verify.device.rig import Rig

PINNED_BYTES: Final = 64 << 20
"""Images beyond this are not staged in pinned memory, which is scarce."""


class Image(NamedTuple):
    """The images of a case for one ``ImageKey``, on the device: ``[replays, size]`` int32 and uint8.

    ``frame`` marks the frame on a CPU, where it is compared in torch; None elsewhere.
    """

    values: Tensor
    classes: Tensor
    frame: Tensor | None


class Load(NamedTuple):
    """What must be in place before a call: the replay's number, where in the arena an alias of its inputs lies (start
    and end, equal if there is none), the content of the pool's memory, and that of the host mirror, if there is one."""

    replay: int
    alias: tuple[int, int]
    pool: Tensor
    host: Tensor | None


class Comparison(Protocol):
    """Compares the memory of one rig."""

    def begin(self, image: Image, load: Load) -> None:
        """Poison everything, and put the inputs of ``load`` in place."""

    def check(self, image: Image, load: Load, flags: Tensor, flag: int, following: Load | None) -> None:
        """Compare what the call for ``load`` left, set ``flags[flag]`` if a cell is wrong, and load ``following``.

        Live cells must hold what the image says, frame cells what they held before the call, slack cells either; the
        pool must be as it was. ``flags`` are int32 on the device.
        """

    def close(self) -> None:
        """Give back what it holds."""


class TorchComparison:
    """``Comparison`` in torch, for the CPU."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._before, self._wanted = torch.empty_like(rig.arena), torch.empty_like(rig.arena)
        self._inputs = rig.arena[rig.layout.inputs_start :]

    def begin(self, image: Image, load: Load) -> None:
        """Poison everything, and put the inputs of ``load`` in place."""
        self._rig.arena.copy_(self._rig.initial)
        self._before.copy_(self._rig.initial)
        self._rig.pool.memory.copy_(load.pool)
        self._put(image, load)

    def check(self, image: Image, load: Load, flags: Tensor, flag: int, following: Load | None) -> None:
        """Compare what the call for ``load`` left, set ``flags[flag]`` if a cell is wrong, and load ``following``."""
        arena, pool, replay = self._rig.arena, self._rig.pool.memory, load.replay
        assert image.frame is not None
        wanted, classes = image.values[replay], image.classes[replay]
        torch.where(image.frame[replay], self._before, wanted, out=self._wanted)
        right = torch.equal(arena, self._wanted) or bool(is_allowed(arena, self._before, wanted, classes).all())
        if not (right and torch.equal(pool, load.pool)):
            flags[flag] = 1
            pool.copy_(load.pool)
        self._before.copy_(arena)
        if following is not None:
            if following.pool is not load.pool:
                pool.copy_(following.pool)
            self._put(image, following)

    def close(self) -> None:
        """Nothing is held."""

    def _put(self, image: Image, load: Load) -> None:
        given = image.values[load.replay]
        self._inputs.copy_(given[self._rig.layout.inputs_start :])
        start, end = load.alias
        if end > start:
            self._rig.arena[start:end].copy_(given[start:end])


def loads(rig: Rig, case: Case) -> list[Load]:
    """What each replay of ``case`` needs in place."""
    found = []
    for number, replay in enumerate(case.replays):
        alias = aliased_place(rig.layout, replay.mode, case.bucket(number))
        place = (0, 0) if alias is None else (alias.offset, alias.offset + alias.columns)
        host = rig.host_image(case, number) if rig.setup.host_lengths else None
        found.append(Load(number, place, rig.pool.image_of(replay), host))
    return found


def upload(rig: Rig, case: Case, keys: Iterable[ImageKey]) -> dict[ImageKey, Image]:
    """The images of ``case`` for ``keys`` on the device of ``rig``, in one copy that nobody waits for."""
    painted = {key: paint(case, key) for key in keys}
    parts = [torch.frombuffer(part, dtype=torch.uint8) for pair in painted.values() for part in pair]
    if rig.device == "cuda":
        # torch hands pinned memory out again only when the copies from it are done.
        staged = torch.empty(
            sum(part.numel() for part in parts),
            dtype=torch.uint8,
            pin_memory=sum(part.numel() for part in parts) <= PINNED_BYTES,
        )
        sizes = [part.numel() for part in parts]
        torch.cat(parts, out=staged)
        parts = list(staged.to("cuda", non_blocking=True).split(sizes))
    shape = (len(case.replays), rig.layout.size)
    images = {}
    for number, key in enumerate(painted):
        values, classes = parts[2 * number].view(torch.int32).view(shape), parts[2 * number + 1].view(shape)
        images[key] = Image(values, classes, classes == FRAME if rig.device == "cpu" else None)
    return images
