"""Are compilations counted as Triton counts them, and is growth told from what a setup needs?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from conftest import NO_GPU
from device.subjects import Steps, capturable
from triton.runtime.jit import JITFunction

from nsa_verify import Case, Code, Mode, Outcome, Replay, ReplayInputs, Request, Setup, verify
from nsa_verify.core.marks import MARKS, Phase, note
from nsa_verify.device.launches import CompileKey, announce_compilations, compile_key, intercepted
from nsa_verify.device.recompiling import Served, growth

DEVICE = "cpu" if NO_GPU else "cuda"
DECODE, VERIFY = Mode.DECODE, Mode.TARGET_VERIFY
SETUP = Setup(num_draft_tokens=3, table_width=40, pool_rows=3, pool_width=48, buckets=(3, 5))


@triton.jit(do_not_specialize=["plain"])  # type: ignore[untyped-decorator]
def _kernel(
    out: tl.tensor, number: tl.tensor, plain: tl.tensor, size: tl.constexpr, flag: tl.constexpr = False
) -> None:
    lane = tl.arange(0, 16)
    tl.store(out + lane, lane * 0 + number + plain + size, mask=lane < 0)


@triton.jit(do_not_specialize=["numbers"])  # type: ignore[untyped-decorator]
def _of_tuples(outs: tl.tuple, numbers: tl.tuple) -> None:
    lane = tl.arange(0, 16)
    for index in tl.static_range(len(outs)):
        tl.store(outs[index] + lane, lane + numbers[index], mask=lane < 0)


TUPLES: list[tuple[int, ...]] = [(3,), (5,), (16,), (1,), (3, 3), (3, 16), (3, 5), (2**40,)]


@contextmanager
def compiled() -> Iterator[list[object]]:
    """What Triton itself compiles inside the block."""
    seen: list[object] = []

    def hook(*args: object, **kwargs: object) -> None:
        seen.append((args, kwargs))

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = hook
    try:
        yield seen
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


LAUNCHES: list[tuple[int, int, int, dict[str, Any]]] = [
    (2, 2, 8, {}),
    (3, 2, 8, {}),
    (16, 2, 8, {}),
    (32, 2, 8, {}),
    (1, 2, 8, {}),
    (2, 1, 8, {}),
    (2, 16, 8, {}),
    (2**40, 2, 8, {}),
    (2, 2, 9, {}),
    (2, 2, 9, {"flag": True}),
    (2, 2, 8, {"num_warps": 8}),
]


def keys_of(launches: list[tuple[int, int, int, dict[str, Any]]], offset: int = 0) -> list[CompileKey]:
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)[offset:]
    keys: list[CompileKey] = []

    def listen(launch: Any) -> object:
        keys.append(compile_key(launch))
        return launch.run(launch.kernel, *launch.args, **launch.kwargs)

    with intercepted(listen):
        for number, plain, size, options in launches:
            _kernel[(1,)](out, number, plain, size, **options)
    return keys


def test_the_key_follows_constants_and_specialisation() -> None:
    keys = [str(key) for key in keys_of(LAUNCHES)]
    two, three, sixteen, thirty_two, one, plain_one, plain_sixteen, wide, nine, flagged, warps = keys
    assert two == three == plain_one == plain_sixteen
    assert sixteen == thirty_two
    assert len({two, sixteen, one, wide, nine, flagged, warps}) == 7
    assert "size=8" in two
    assert keys_of(LAUNCHES[:1]) != keys_of(LAUNCHES[:1], offset=1), "a pointer that is not aligned"


def keys_of_tuples() -> list[CompileKey]:
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    keys: list[CompileKey] = []

    def listen(launch: Any) -> object:
        keys.append(compile_key(launch))
        return launch.run(launch.kernel, *launch.args, **launch.kwargs)

    with intercepted(listen):
        for numbers in TUPLES:
            _of_tuples[(1,)]((out,) * len(numbers), numbers)
    return keys


def test_the_key_follows_the_elements_of_tuples() -> None:
    three, five, sixteen, one, two_threes, mixed, three_five, wide = keys_of_tuples()
    assert three == five
    assert two_threes == three_five
    assert len({three, sixteen, one, two_threes, mixed, wide}) == 6


@pytest.mark.gpu
def test_the_key_counts_what_triton_compiles_for_tuples() -> None:
    _of_tuples.device_caches.clear()
    with compiled() as seen:
        keys = keys_of_tuples()
    assert len(seen) == len(set(keys))


@pytest.mark.gpu
def test_the_key_counts_what_triton_compiles() -> None:
    _kernel.device_caches.clear()
    with compiled() as seen:
        aligned, shifted = keys_of(LAUNCHES), keys_of(LAUNCHES, offset=1)
    assert len(seen) == len({*aligned, *shifted})


def key(kernel: str = "k", **constants: object) -> CompileKey:
    return CompileKey(kernel, tuple((name, repr(value)) for name, value in constants.items()), ())


@pytest.mark.parametrize(
    ("calls", "grows"),
    [
        ([Served(DECODE, 2, {key(LENGTH=5)}), Served(DECODE, 2, {key(LENGTH=6)})], True),
        ([Served(DECODE, 2, {key(LENGTH=4)}), Served(DECODE, 2, {key(LENGTH=8)})], True),
        ([Served(DECODE, 3, {key(B=3)}), Served(DECODE, 5, {key(B=5)})], True),
        ([Served(DECODE, 3, {key(B=4)}), Served(DECODE, 5, {key(B=8)})], False),
        ([Served(DECODE, 3, {key(B=4)}), Served(DECODE, 5, {key(B=5)})], True),
        ([Served(DECODE, 2, {key(FLAG=True)}), Served(DECODE, 2, {key(FLAG=False)})], False),
        ([Served(DECODE, 2, {key(N=1)}), Served(VERIFY, 2, {key(N=3)})], False),
        ([Served(DECODE, 2, {key("a", N=1)}), Served(DECODE, 2, {key("b", N=3)})], False),
        ([Served(DECODE, 2, {key(N=1)}), Served(DECODE, 2, set())], False),
        ([Served(DECODE, 2, {key(N=3)}), Served(DECODE, 2, {key(N=3)})], False),
    ],
)
def test_growth(calls: list[Served], grows: bool) -> None:
    found = growth(calls)
    assert (found is not None) is grows
    if found is not None:
        assert found[0] == 1
        assert "k is compiled anew" in found[1]


def _by_length(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
    _kernel[(1,)](steps[0].cache_seqlens, 2, 2, int(inputs.seq_lens.max()))


def _by_batch(inputs: ReplayInputs, steps: Steps, _: Setup) -> None:
    _kernel[(1,)](steps[0].cache_seqlens, 2, 2, inputs.batch_size)


def _by_setup(inputs: ReplayInputs, steps: Steps, setup: Setup) -> None:
    _kernel[(1,)](steps[0].cache_seqlens, int(inputs.seq_lens.max()), inputs.batch_size, setup.page_size)


def case(*lengths: tuple[int, ...]) -> Case:
    return Case(SETUP, tuple(Replay(DECODE, tuple(Request(it, 0) for it in batch)) for batch in lengths))


def test_nv503_a_constant_that_follows_the_lengths() -> None:
    verdict = verify(case((7,), (9,)), capturable(_by_length))
    assert verdict.primary is not None
    assert (verdict.primary.code, verdict.primary.replay) == (Code.RECOMPILES, 1)
    assert "size went from 7 to 9" in verdict.primary.message
    assert len(verdict.compile_keys) == 2
    assert verify(case((7,), (7,)), capturable(_by_length)).outcome is Outcome.AGREE


def test_nv503_a_constant_that_follows_the_batch_size() -> None:
    verdict = verify(case((7,), (7, 7, 7, 7)), capturable(_by_batch))
    assert verdict.primary is not None
    assert verdict.primary.code is Code.RECOMPILES
    assert "the batch size goes from 3 to 5" in verdict.primary.message


def test_arguments_may_vary() -> None:
    verdict = verify(case((7,), (9, 16, 1, 32)), capturable(_by_setup))
    assert verdict.outcome is Outcome.AGREE
    assert verdict.compile_keys


@pytest.mark.skipif(not NO_GPU, reason="it stays for as long as the process")
def test_a_compilation_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[Phase] = []

    def compiles(_: object, fails: bool) -> str:
        phases.append(MARKS[0].read().phase)
        if fails:
            raise RuntimeError("does not compile")
        return "compiled"

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    for _ in range(2):
        announce_compilations()  # once is enough
    note(Phase.CALLING, 1)
    beat = MARKS[0].read().beat
    assert JITFunction._do_compile(None, False) == "compiled"
    assert MARKS[0].read()[3:] == (Phase.CALLING, 1)
    assert MARKS[0].read().beat == beat + 2
    with pytest.raises(RuntimeError, match="does not compile"):
        JITFunction._do_compile(None, True)
    assert MARKS[0].read()[3:] == (Phase.CALLING, 1)
    assert phases == [Phase.COMPILING] * 2
