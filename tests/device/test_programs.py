"""Do the simulated graph and CUDA agree on what can be captured, and on what a graph then does?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from device import programs
from device.programs import FROZEN, ILLEGAL, KNOWN_DIFFERENCES, LEGAL, Data, Program

from nsa_verify import Code
from nsa_verify.device import graph
from nsa_verify.device.memory import Memory
from nsa_verify.device.stops import CaptureRefused, ImplementationRaised
from nsa_verify.device.tape import Recorder, Tape
from nsa_verify.device.temporaries import WatchedCalls

SOURCE = programs.__file__
AT_CAPTURE = [1] * 8, [2] * 8
AT_REPLAY = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 0]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass
class Captured:
    """A graph of either kind, and the tensors it works on."""

    data: Data
    play: Callable[[], None]

    def replayed(self) -> list[int]:
        """``out`` after a replay with the other numbers."""
        put(self.data, AT_REPLAY)
        self.play()
        return outcome(self.data)


def make(device: str) -> Data:
    x, y, out = (torch.zeros(8, dtype=torch.int32, device=device) for _ in range(3))
    return Data(x, y, out, mirror=torch.zeros(8, dtype=torch.int32))


def put(data: Data, numbers: tuple[list[int], list[int]]) -> None:
    data.x.copy_(torch.tensor(numbers[0]))
    data.y.copy_(torch.tensor(numbers[1]))
    data.mirror.copy_(torch.tensor(numbers[0]))
    data.out.fill_(-7)


def recorded(region: Callable[[], None], data: Data) -> Tape:
    """The tape of ``region``, which works on ``data``."""
    recorder = Recorder(Memory([data.x, data.y, data.out], host=[data.mirror]), SOURCE)
    with recorder.recording():
        region()
    return recorder.tape


def outcome(data: Data) -> list[int]:
    numbers: list[int] = data.out.tolist()
    return numbers


def called(program: Program, device: str, numbers: tuple[list[int], list[int]]) -> list[int]:
    """``out`` after an eager call, warmed up."""
    data = make(device)
    for given in (AT_CAPTURE, numbers):
        put(data, given)
        program(data)
    return outcome(data)


@contextmanager
def captured(program: Program, device: str) -> Iterator[Captured]:
    """Warm ``program`` up and capture it."""
    data = make(device)
    put(data, AT_CAPTURE)
    program(data)
    put(data, AT_CAPTURE)
    watched = WatchedCalls(SOURCE)

    def region() -> None:
        try:
            with watched:
                program(data)
        except CaptureRefused:
            raise
        except Exception as error:
            raise ImplementationRaised(error) from error

    static = [data.x, data.y, data.out]
    if device == "cpu":
        tape = recorded(region, data)
        tape.scribble()
        yield Captured(data, tape.replay)
        return
    torch.cuda.synchronize()
    work = graph.Region(region, Memory(static, on_cuda=True), SOURCE, watched.errors)
    made = graph.record(work, graph.capture_stream())
    torch.cuda.synchronize()
    try:
        made.scribble()
        yield Captured(data, made.replay)
        torch.cuda.synchronize()
    finally:
        made.graph.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_program_replays_as_it_would_be_called(name: str, device: str) -> None:
    wanted = called(LEGAL[name], "cpu", AT_REPLAY) if name != "branch on capturing" else [4, 2, 5, 2, 6, 10, 3, 7]
    with captured(LEGAL[name], device) as it:
        assert it.replayed() == wanted
        assert it.replayed() == wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FROZEN)
def test_a_host_value_is_frozen(name: str, device: str) -> None:
    with captured(FROZEN[name], device) as it:
        replayed = it.replayed()
    assert replayed != called(FROZEN[name], "cpu", AT_REPLAY)
    data = make("cpu")
    put(data, (AT_REPLAY[0], AT_REPLAY[1]))
    data.mirror.fill_(1)
    FROZEN[name](data)
    assert replayed == outcome(data), "not what the host value at capture gives"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_program_is_refused_with_its_line(name: str, device: str) -> None:
    program, code = ILLEGAL[name]
    with pytest.raises(CaptureRefused) as refused, captured(program, device):
        pass
    assert refused.value.code is code, refused.value.sentence
    assert "programs.py:" in refused.value.sentence
    with captured(LEGAL["add"], device) as it:
        assert it.replayed() == [8, 11, 8, 12, 10, 20, 6, 9], "a refused capture spoils the next"


@pytest.mark.parametrize("name", KNOWN_DIFFERENCES)
def test_known_differences_are_as_stated(name: str) -> None:
    program, simulation, _ = KNOWN_DIFFERENCES[name]
    assert simulation == "refused"
    with pytest.raises(CaptureRefused), captured(program, "cpu"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("name", KNOWN_DIFFERENCES)
def test_known_differences_are_as_stated_on_cuda(name: str) -> None:
    program, _, cuda = KNOWN_DIFFERENCES[name]
    if cuda == "captured":
        with captured(program, "cuda"):
            return
    with pytest.raises(RuntimeError):
        program(make("cuda"))


def test_code_that_is_not_run_again_cannot_count(capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(it: Data) -> None:
        print("called")
        it.out.copy_(it.x)

    with captured(chatty, "cpu") as it:
        capsys.readouterr()
        it.replayed()
    assert capsys.readouterr().out == ""


def test_memory_of_the_graph_holds_nothing_between_replays() -> None:
    """A tensor that was allocated in one capture and is found in a cache by the next was never filled for it."""
    data = make("cpu")
    kept: dict[str, torch.Tensor] = {}

    def program(it: Data) -> None:
        if "ones" not in kept:
            kept["ones"] = torch.ones(8, dtype=torch.int32, device=it.device)
        it.out.copy_(it.x + kept["ones"])

    def record() -> Tape:
        return recorded(lambda: program(data), data)

    first, second = record(), record()
    for tape in (first, second):
        tape.scribble()
    put(data, AT_REPLAY)
    second.replay()
    assert outcome(data) != [4, 2, 5, 2, 6, 10, 3, 7]
    first.replay()
    assert outcome(data) == [4, 2, 5, 2, 6, 10, 3, 7]


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_was_freed_after_the_capture_is_noticed(device: str) -> None:
    kept: dict[str, torch.Tensor] = {}

    def program(it: Data) -> None:
        if "table" not in kept:
            kept["table"] = torch.arange(8, dtype=torch.int32, device=it.device)
        it.out.copy_(it.x + kept["table"])

    with captured(program, device) as it:
        assert it.replayed() == [3, 2, 6, 4, 9, 14, 8, 13]
        kept["table"] = torch.zeros(1, dtype=torch.int32, device=device)
        with pytest.raises(CaptureRefused) as refused:
            it.replayed()
    assert refused.value.code is Code.MOVED
    assert "test_programs.py:" in refused.value.sentence


def test_a_tensor_that_is_moved_later_does_not_move_the_tape() -> None:
    with captured(LEGAL["add"], "cpu") as it:
        before = replace(it.data, out=it.data.out.view(8))
        it.data.out.set_(torch.zeros(8, dtype=torch.int32).untyped_storage())
        put(before, AT_REPLAY)
        it.play()
        assert outcome(before) == [8, 11, 8, 12, 10, 20, 6, 9]


@pytest.mark.gpu
def test_captures_do_not_use_up_memory() -> None:
    def once() -> None:
        with captured(LEGAL["prefix sum into a slice"], "cuda") as it:
            it.replayed()
        with pytest.raises(CaptureRefused), captured(ILLEGAL["nonzero"][0], "cuda"):
            pass

    for _ in range(5):
        once()
    before = torch.cuda.memory_reserved()
    for _ in range(50):
        once()
    assert torch.cuda.memory_reserved() == before


@pytest.mark.parametrize(
    "wait",
    [torch.cpu.synchronize, torch.cuda.synchronize, torch.accelerator.synchronize],
    ids=lambda wait: f"{wait.__module__}",
)
def test_every_way_to_wait_is_refused(wait: Callable[[], None]) -> None:
    # Asked by its name inside, where the region looks it up.
    owner, name = sys.modules[wait.__module__], wait.__name__
    with pytest.raises(CaptureRefused) as refused, captured(lambda it: _inside(it, owner, name), "cpu"):
        pass
    assert refused.value.code is Code.NEEDS_SYNC


def _inside(it: Data, owner: object, name: str) -> None:
    if it.state.setdefault("warm", 0):
        getattr(owner, name)()
    it.state["warm"] += 1


def test_nothing_stays_patched() -> None:
    def names() -> list[object]:
        owners = (torch.cpu, torch.cuda, torch.accelerator, torch.cuda.Stream, torch.cuda.Event)
        return [vars(owner).get("synchronize") for owner in owners] + [torch.cuda.is_current_stream_capturing]

    before = names()
    with captured(LEGAL["add"], "cpu"):
        assert names() == before
    with pytest.raises(CaptureRefused), captured(ILLEGAL[".item()"][0], "cpu"):
        pass
    assert names() == before


def test_an_interruption_leaves_no_mode_behind() -> None:
    def interrupted(it: Data) -> None:
        if it.state.setdefault("warm", 0):
            raise KeyboardInterrupt
        it.state["warm"] = 1

    with pytest.raises(KeyboardInterrupt), captured(interrupted, "cpu"):
        pass
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == 0


def test_memory_that_was_resized_elsewhere_has_moved() -> None:
    kept = torch.zeros(8, dtype=torch.int32)

    def program(it: Data) -> None:
        kept.copy_(it.x)
        it.out.copy_(kept)

    with captured(program, "cpu") as it:
        assert it.replayed() == AT_REPLAY[0]
        kept.resize_(1 << 20)
        with pytest.raises(CaptureRefused) as refused:
            it.replayed()
    assert refused.value.code is Code.MOVED
