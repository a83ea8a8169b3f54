"""What is timed reads what it was given, and whoever changes that is named."""

from __future__ import annotations

import re
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from conftest import NO_GPU

from nsa_verify.core.buffers import FROZEN
from nsa_verify.core.case import Mode
from nsa_verify.core.registry import find
from nsa_verify.device.answers import CELLS, SLOT_LIMIT, Answers, Slots, WrongResult
from nsa_verify.device.timing import Size, Work, refresh_of, work

SIZE = Size(batch_size=3, table_width=40, longest=20, num_draft_tokens=2, page_size=16, num_steps=2)
DEVICE = "cpu" if NO_GPU else "cuda"


def given_in(mode: Mode) -> Work:
    """The work of ``SIZE``, its lengths on the host in memory of their own."""
    given = work(SIZE, mode, DEVICE, seed=5)
    assert given.inputs.seq_lens_cpu is not None
    inputs = replace(given.inputs, seq_lens_cpu=given.inputs.seq_lens_cpu.clone())
    return Work(given.setup, inputs, given.steps, given.slots)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("cells", [1, 80, CELLS])
def test_what_was_changed_is_named_and_restored(
    mode: Mode, keeps: bool, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_verify.device.answers.CELLS", cells)
    given = given_in(mode)
    answers = Answers(given.inputs, given.steps, given.setup, None if keeps else given.slots)
    refresh = refresh_of(find("vectorized"), given)
    answers.check(refresh)
    for path, name, at in (
        *((f"inputs.{it}", it, (1,)) for it in ("seq_lens", "seq_lens_cpu", "req_pool_indices", "accept_lens")),
        *(("inputs.req_to_token", "req_to_token", at) for at in ((0, 0), (1, 30), (2, 39))),
        *((f"steps.{step}.{it}", f"{it} of step {step}", (1,)) for step in (0, 1) for it in FROZEN),
    ):
        tensor = attr(given, path)
        before, role = tensor.clone(), "an input" if "inputs" in path else "frozen"

        def spoil(tensor: torch.Tensor = tensor, at: tuple[int, ...] = at) -> None:
            refresh()
            tensor[at] += 1

        was = int(tensor[at])
        element = ", ".join(map(str, at))
        sentence = f"{name}, which is {role}, was changed: [{element}] was {was} and is {was + 1}"
        with pytest.raises(WrongResult, match=f"^{re.escape(sentence)}$"):
            answers.check(spoil)
        answers.restore()
        assert tensor.equal(before)
        answers.check(refresh)


def attr(given: Work, path: str) -> torch.Tensor:
    """``inputs.name``, or ``steps.index.name``."""
    owner, _, name = path.rpartition(".")
    step = owner.removeprefix("steps.")
    found = given.inputs if owner == "inputs" else given.steps[int(step)]
    tensor = attrgetter(name)(found)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def test_slots_are_drawn_again_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_verify.device.answers.CELLS", 200)
    slots = Slots(5, 70, DEVICE, seed=2**64 - 1)
    before = slots.table.clone()
    assert 0 <= int(before.min()) < int(before.max()) < SLOT_LIMIT
    assert len(set(before.flatten().tolist())) > 340, "no piece is another one's"
    slots.refuse_changed()
    slots.table.zero_()
    slots.restore()
    assert slots.table.equal(before)
    assert Slots(5, 70, DEVICE, seed=2**64 - 1).table.equal(before)
    assert not Slots(5, 70, DEVICE, seed=1).table.equal(before)


@pytest.mark.parametrize("mode", list(Mode))
def test_frozen_buffers_are_aranges(mode: Mode) -> None:
    for step in work(SIZE, mode, DEVICE).steps:
        for name in FROZEN:
            buffer = getattr(step, name)
            assert buffer.tolist() == list(range(len(buffer)))
