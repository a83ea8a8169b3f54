"""``nsa-verify bench``: nothing is printed of what was interrupted, spoils inputs, or lost its baseline."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from conftest import NO_GPU
from shell.commands import invoke

from nsa_verify.core.case import Mode, Setup
from nsa_verify.core.implementation import Implementation, MetadataBuffers, ReplayInputs
from nsa_verify.core.registry import find
from nsa_verify.device import timing
from nsa_verify.device.answers import WrongResult
from nsa_verify.engine.events import Event, RoundFinished
from nsa_verify.engine.search import search
from nsa_verify.shell.timing_tables import sized
from nsa_verify.shell.timings import EXPANSION, Spread, Timing, Timings, _Bench

DEVICE = "cpu" if NO_GPU else "cuda"
(SIZE,) = sized([(2, 64, 20)], False)
ONLY = ("--mode", "decode", "--only", "vectorized", "-w", 1)


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Ctrl-C when the first round that ``module`` searches was judged."""

    def pressed(*arguments: Any) -> Iterator[Event]:
        rounds = 0
        for event in search(*arguments):
            rounds += isinstance(event, RoundFinished)
            if isinstance(event, RoundFinished) and rounds == 1:
                signal.raise_signal(signal.SIGINT)
            yield event

    monkeypatch.setattr(f"{module}.search", pressed)


def test_nothing_is_measured_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    press_ctrl_c(monkeypatch, "nsa_verify.shell.timings")
    for more in ((), ("--json",)):
        done = invoke("bench", "--size", "2,64,20", "--repetitions", 3, *ONLY, *more)
        assert (done.exit_code, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_rate_says_that_it_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    press_ctrl_c(monkeypatch, "nsa_verify.shell.bench_commands")
    done = invoke("bench", "search", *ONLY)
    assert (done.exit_code, done.stderr) == (130, "")
    assert done.stdout.endswith(" per worker, 1 worker; interrupted\n")
    told = invoke("bench", "search", *ONLY, "--json")
    assert (told.exit_code, json.loads(told.stdout)["rate"]["stop"]) == (130, "interrupted")


def spoiling(name: str) -> Implementation:
    """``vectorized``, which fills an input with 1 behind its work: ``name``."""
    right = find("vectorized")

    def refresh(inputs: ReplayInputs, steps: Sequence[MetadataBuffers], setup: Setup) -> None:
        right.refresh(inputs, steps, setup)
        getattr(inputs, name).fill_(1)

    return replace(right, name=name, refresh=refresh)


def raising() -> Implementation:
    """It spoils an input, and raises before anyone could look."""

    def refresh(inputs: ReplayInputs, *_: object) -> NoReturn:
        inputs.seq_lens.fill_(1 << 30)
        raise RuntimeError("too late")

    return replace(find("vectorized"), name="raises", refresh=refresh)


def test_who_spoils_the_inputs_is_blamed_and_nobody_else() -> None:
    told = Timings()
    names = ("seq_lens", "req_pool_indices", "accept_lens", "req_to_token")
    chosen = (*map(spoiling, names), raising(), find("vectorized"))
    _Bench(told, DEVICE, 3, lambda _: None).refreshes(SIZE, Mode.DECODE, {it: {"eager"} for it in chosen}, 0)
    assert [it.implementation for it in told.timings] == ["vectorized"]
    *spoilt, last = map(str, told.rejected)
    for name, sentence in zip(names, spoilt, strict=True):
        where = f"{name} is not timed: in decode at B 2 W 64 to 20, {name}, which is an input, was changed: ["
        assert sentence.startswith(where)
        assert sentence.endswith(" and is 1")
    assert last == "raises is not timed in decode at B 2 W 64 to 20: it raised RuntimeError: too late"


def test_calls_that_are_captured_as_less_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(*_: object) -> NoReturn:
        raise timing.Merged("captures 3 nodes for 40 calls, which are not 40 times the 3 of one call")

    monkeypatch.setattr("nsa_verify.device.timing.prepared", prepared)
    told = Timings()
    _Bench(told, DEVICE, 3, lambda _: None).refreshes(SIZE, Mode.DECODE, {find("vectorized"): {"eager"}}, 0)
    (sentence,) = map(str, told.rejected)
    where = "vectorized is not timed in decode at B 2 W 64 to 20"
    assert sentence == f"{where}: it captures 3 nodes for 40 calls, which are not 40 times the 3 of one call"


@pytest.mark.parametrize(("wrong", "kept"), [("python-loop", [None, 3.0]), ("mine", [2.0, 3.0])])
def test_nothing_is_compared_with_a_baseline_that_is_wrong(
    wrong: str, kept: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(*_: object) -> NoReturn:
        raise WrongResult("cache_seqlens[0] must be 1 and is 2")

    monkeypatch.setattr("nsa_verify.device.timing.prepared", prepared)
    rows = ((wrong, "decode", 1.0), ("vectorized", "draft-extend", 2.0), ("onepass", EXPANSION, 3.0))
    host = Spread(1.0, 1.0, 1.0)
    timings = [
        Timing(implementation=name, mode=mode, size="B 1", host=host, host_ratio=ratio) for name, mode, ratio in rows
    ]
    told = Timings(timings=timings)
    subject = replace(find("python-loop"), name=wrong)
    _Bench(told, DEVICE, 3, lambda _: None).refreshes(SIZE, Mode.DECODE, {subject: {"eager"}}, 0)
    assert [it.implementation for it in told.timings] == ["vectorized", "onepass"]
    assert [it.host_ratio for it in told.timings] == kept
