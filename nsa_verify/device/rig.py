"""A ``Rig``: the memory of one setup on one device, and what implementations are handed of it.

Rigs are cached and used for case after case; ``reset`` brings the memory back to poison, so that a case does not
depend on the case before it.
"""

from __future__ import annotations

import atexit
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol, TypeVar, cast

import torch
from torch import Tensor

from nsa_verify.core.buffers import shapes
from nsa_verify.core.case import Case, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, MetadataBuffers, ReplayInputs
from nsa_verify.core.oracle import batch
from nsa_verify.device.images import aliased_place, initial_image, tail_length
from nsa_verify.device.layout import TWO_DIMENSIONAL, InputPlace, Place, arena_layout
from nsa_verify.device.pool import Difference, Pool

KEPT_RIGS: Final = 4


VIEWS: Final = tuple(MetadataBuffers.__dataclass_fields__)


class Closable(Protocol):
    """What a rig keeps for whoever drives implementations over it."""

    def close(self) -> None:
        """Give back what it holds."""


ClosableT = TypeVar("ClosableT", bound=Closable)


class Rig:
    """Arena, inputs and views of ``setup`` on ``device``. ``arena`` is one int32 tensor laid out by ``layout``."""

    def __init__(self, setup: Setup, device: str) -> None:
        self.setup, self.device = setup, device
        self.layout = arena_layout(setup)
        self.initial = torch.frombuffer(initial_image(setup), dtype=torch.int32).to(device, copy=True)
        self.arena = self.initial.clone()
        self.pool = Pool(setup, device)
        self.host_seq_lens = torch.zeros(
            setup.buckets[-1] + setup.input_tail, dtype=getattr(torch, setup.seq_lens_dtype)
        )
        self._buffers: dict[tuple[int, Mode, int, frozenset[str]], MetadataBuffers] = {}
        self._inputs: dict[tuple[Mode, int], ReplayInputs] = {}
        self._made: dict[tuple[Mode, int, frozenset[str]], object] = {}
        self._kept: dict[Callable[[Rig], Closable], Closable] = {}

    def keeping(self, make: Callable[[Rig], ClosableT]) -> ClosableT:
        """The one ``make(self)`` that this rig keeps, and closes."""
        found = self._kept.get(make)
        if found is None:
            found = self._kept[make] = make(self)
        return cast("ClosableT", found)

    def close(self) -> None:
        """Close what is kept; the rig may be used again."""
        while self._kept:
            self._kept.popitem()[1].close()

    def reset(self) -> None:
        """Poison everything again, and make new views: an implementation may have changed the shape of those it got."""
        self.arena.copy_(self.initial)
        self.pool.restore()
        self.forget_views()

    def forget_views(self) -> None:
        """Make new views when they are asked for next: an implementation may have changed those it got."""
        self.pool.table = self.pool.view()
        self._buffers.clear()
        self._inputs.clear()
        self._made.clear()

    def remember_views(self, mode: Mode, bucket: int, writes: frozenset[str]) -> None:
        """Call before views of ``(mode, bucket)`` are handed out, to ask ``are_views_intact`` afterwards.

        Where that says no, ``forget_views`` must follow. Views that were handed out without this are made anew.
        """
        if not self._made:
            self.forget_views()
        if (mode, bucket, writes) not in self._made:
            self._made[mode, bucket, writes] = self._looks(mode, bucket, writes)

    def are_views_intact(self, mode: Mode, bucket: int, writes: frozenset[str]) -> bool:
        """Whether the views of ``(mode, bucket)`` lie where they did when they were remembered, in the same shape."""
        return self._made.get((mode, bucket, writes)) == self._looks(mode, bucket, writes)

    def _looks(self, mode: Mode, bucket: int, writes: frozenset[str]) -> object:
        inputs = self.inputs(mode, bucket)
        views = [inputs.seq_lens, inputs.seq_lens_cpu, inputs.req_pool_indices, inputs.req_to_token, inputs.accept_lens]
        for step in self.steps(mode, bucket, writes):
            views += [getattr(step, name) for name in VIEWS]
        return [it if it is None else (it.data_ptr(), it.shape, it.stride(), it.dtype) for it in views]

    def load(self, case: Case, replay: int, expected: Tensor) -> None:
        """Put the inputs of replay number ``replay`` in place; ``expected`` is that replay's image on the device."""
        given = batch(case, replay)
        self.arena[self.layout.inputs_start :].copy_(expected[self.layout.inputs_start :])
        alias = aliased_place(self.layout, given.mode, given.bucket)
        if alias is not None:
            self._flat(alias).copy_(expected[alias.offset : alias.offset + alias.columns])
        self.pool.fill(case.replays[replay])
        if self.setup.host_lengths:
            self.host_seq_lens.copy_(self.host_image(case, replay))

    def load_capture(self, mode: Mode, bucket: int) -> None:
        """Put in place what an engine captures with: every length at its fill, pool rows and tables zero, all N tokens
        accepted; the outputs as they are before the first replay."""
        setup = self.setup
        self.reset()
        self.pool.zero()
        alias = aliased_place(self.layout, mode, bucket)
        inputs = [(self._all(name), value) for name, value in self._capture_inputs().items()]
        if alias is not None:
            inputs.append((self._flat(alias), setup.fill_seq_len))
        for tensor, value in inputs:
            tensor.fill_(value)
        self.host_seq_lens.fill_(setup.fill_seq_len)

    def moved(self, mode: Mode, bucket: int, writes: frozenset[str]) -> str | None:
        """Which buffer no longer lies where it was handed out, in words, or None."""
        for step, buffers in enumerate(self.steps(mode, bucket, writes)):
            for name in shapes(self.setup, mode, bucket):
                view = getattr(buffers, name)
                place = self.layout.places[step, mode, bucket, name]
                if view is not None and view.data_ptr() != self.arena.data_ptr() + 4 * place.offset:
                    return f"step {step}'s {name} was moved to other memory, where it should be written in place"
        return None

    def host_image(self, case: Case, replay: int) -> Tensor:
        """What ``seq_lens_cpu``'s whole memory must hold: the lengths, then what ``seq_lens`` has past the bucket."""
        given = batch(case, replay)
        image = torch.full_like(self.host_seq_lens, tail_length(self.setup, given.mode))
        image[: given.bucket] = torch.tensor(given.seq_lens, dtype=image.dtype)
        return image

    def host_difference(self, case: Case, replay: int) -> Difference | None:
        """Where the host mirror differs from what it must hold, if it does; costs no synchronisation."""
        if not self.setup.host_lengths:
            return None
        image = self.host_image(case, replay)
        if torch.equal(self.host_seq_lens, image):
            return None
        wrong = (self.host_seq_lens != image).nonzero().flatten().tolist()
        return Difference((wrong[0],), int(image[wrong[0]]), int(self.host_seq_lens[wrong[0]]), len(wrong))

    def inputs(self, mode: Mode, bucket: int) -> ReplayInputs:
        """The inputs of ``(mode, bucket)``: the same tensors until ``reset``, the same addresses for ever."""
        found = self._inputs.get((mode, bucket))
        if found is None:
            found = self._inputs[mode, bucket] = self._make_inputs(mode, bucket)
        return found

    def steps(self, mode: Mode, bucket: int, writes: frozenset[str]) -> tuple[MetadataBuffers, ...]:
        """The buffers of every step; of the optional outputs those in ``writes``."""
        return tuple(self._step(step, mode, bucket, writes) for step in range(self.setup.num_steps))

    def _capture_inputs(self) -> dict[str, int]:
        setup = self.setup
        return {"seq_lens": setup.fill_seq_len, "req_pool_indices": 0, "accept_lens": setup.num_draft_tokens}

    def _all(self, name: str) -> Tensor:
        place = self.layout.inputs[name]
        return self._input(place, place.capacity)

    def _make_inputs(self, mode: Mode, bucket: int) -> ReplayInputs:
        setup, places = self.setup, self.layout.inputs
        length = bucket + setup.input_tail
        alias = aliased_place(self.layout, mode, bucket)
        seq_lens = self._flat(alias) if alias is not None else self._input(places["seq_lens"], length)
        return ReplayInputs(
            mode=mode,
            batch_size=bucket,
            seq_lens=seq_lens,
            seq_lens_cpu=self.host_seq_lens[:length] if setup.host_lengths else None,
            req_pool_indices=self._input(places["req_pool_indices"], length),
            req_to_token=self.pool.table,
            accept_lens=self._input(places["accept_lens"], length),
        )

    def _input(self, place: InputPlace, length: int) -> Tensor:
        memory = self.arena if place.words == 1 else self.arena.view(torch.int64)
        return memory.as_strided((length,), (place.stride,), place.offset // place.words)

    def _step(self, step: int, mode: Mode, bucket: int, writes: frozenset[str]) -> MetadataBuffers:
        key = (step, mode, bucket, writes)
        found = self._buffers.get(key)
        if found is None:
            views = {
                name: self._view(name, self.layout.places[step, mode, bucket, name])
                for name in shapes(self.setup, mode, bucket)
                if name not in OPTIONAL_OUTPUTS or name in writes
            }
            if self.setup.page_size == 1:
                views["real_page_table"] = views["page_table_1"]
            found = self._buffers[key] = MetadataBuffers(**views)
        return found

    def _view(self, name: str, place: Place) -> Tensor:
        if name in TWO_DIMENSIONAL:
            return self.arena.as_strided((place.rows, place.columns), (place.stride, 1), place.offset)
        return self._flat(place)

    def _flat(self, place: Place) -> Tensor:
        return self.arena[place.offset : place.offset + place.columns]


_RIGS: OrderedDict[tuple[Setup, str], Rig] = OrderedDict()


def rig_for(setup: Setup, device: str) -> Rig:
    """The rig of ``setup`` on ``device``; the last few are kept, and closed when others take their place."""
    rig = _RIGS.pop((setup, device), None) or Rig(setup, device)
    _RIGS[setup, device] = rig
    while len(_RIGS) > KEPT_RIGS:
        _RIGS.popitem(last=False)[1].close()
    return rig


@atexit.register
def close_rigs() -> None:
    """Close every rig that is kept, and with it its graphs."""
    while _RIGS:
        _RIGS.popitem()[1].close()
