"""A ``Rig``: the memory of one setup on one device, and what implementations are handed of it.

Rigs are cached and used for case after case; ``reset`` brings the memory back to poison, so that a case does not
depend on the case before it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nsa_verify.core.buffers import shapes
from nsa_verify.core.case import Case, Mode, Setup
from nsa_verify.core.implementation import OPTIONAL_OUTPUTS, MetadataBuffers, ReplayInputs
from nsa_verify.core.oracle import batch
from nsa_verify.device.images import aliased_place, initial_image, tail_length
from nsa_verify.device.layout import TWO_DIMENSIONAL, InputPlace, Place, arena_layout
from nsa_verify.device.pool import Difference, Pool


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

    def reset(self) -> None:
        """Poison everything again, and make new views: an implementation may have changed the shape of those it got."""
        self.arena.copy_(self.initial)
        self.pool.restore()
        self._buffers.clear()
        self._inputs.clear()

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


@lru_cache(maxsize=4)
def rig_for(setup: Setup, device: str) -> Rig:
    """The rig of ``setup`` on ``device``, cached."""
    return Rig(setup, device)
