"""What strays is found, named and put down to its line; what does not is not accused.

The kernels are written for this: the length of a request says which of them runs. All of them run in one process, as
triton-viz changes Triton's interpreter for good.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from nsa_verify import Case, Code, Mode, Outcome, Replay, Request, Setup, Verdict
from nsa_verify.core.sanitizers import Sanitizer, Sequence
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.sanitizing import _Processes

pytestmark = pytest.mark.skipif(find_spec("triton_viz") is None, reason="needs triton-viz (the extra sanitize)")

SOURCE = """
import torch
import triton
import triton.language as tl

from nsa_verify import Mode, implementation


@triton.jit
def past(source, n):
    tl.load(source + tl.arange(0, 16))  # past


@triton.jit
def front(source, n):
    tl.load(source + tl.program_id(0) - 2)  # front


@triton.jit
def stores(source, n):
    lane = tl.arange(0, 16)
    tl.store(source + lane, lane, mask=lane < n + 1)  # stores


@triton.jit
def adds(source, n):
    tl.atomic_add(source + n, 1)  # adds


@triton.jit
def swaps(source, n):
    tl.atomic_cas(source + n, 0, 1)  # swaps


@triton.jit
def masked(source, n):
    lane = tl.arange(0, 16)
    found = tl.load(source + lane, mask=lane < n, other=0)
    tl.store(source + lane, found, mask=lane < n)
    for start in range(0, tl.max(found, 0) * 0 + 2):
        tl.load(source + start % n)


@triton.jit
def wild(source, n):
    tl.load((source + (1 << 40)))  # wild


@triton.jit
def beyond_the_first(sources, n):
    for index in tl.static_range(len(sources)):
        tl.load(sources[index] + n + index)  # tuple


@triton.jit
def helper(source, n):
    return tl.load(source + n)  # helper


@triton.jit
def calls(source, n):
    helper(source, n)


@triton.jit
def through_addresses(addresses, n):
    source = tl.load(addresses).to(tl.pointer_type(tl.int32))
    tl.load(source + n - 1)  # address


KERNELS = [past, front, stores, adds, swaps, masked, wild, calls]
kept = torch.zeros(11, dtype=torch.int32)


@implementation("stray", modes=[Mode.DECODE])
def refresh(inputs, steps, setup):
    which = int(inputs.seq_lens_cpu[0])
    table = steps[0].page_table_1
    if which <= len(KERNELS):
        KERNELS[which - 1][(2,)](table, table.numel())
    if which == TUPLE:
        beyond_the_first[(1,)]((table, steps[0].cache_seqlens), 0)
    if which == OF_A_BUFFER:
        through_addresses[(1,)](torch.tensor([table.data_ptr()]), table.numel())
    if which == OF_ITS_OWN:
        through_addresses[(1,)](torch.tensor([kept.data_ptr()]), kept.numel())
    if which == OF_ADDRESS:
        through_addresses[(1,)](torch.tensor([table.data_ptr()]), table.numel() + 1)
    if which == TEMPORARY:
        past[(1,)](torch.empty(4, dtype=torch.int32), 4)
    if which == RAISES:
        raise ValueError("as planned")
"""
PAST, FRONT, STORES, ADDS, SWAPS, MASKED, WILD, CALLS = range(1, 9)
TUPLE, OF_A_BUFFER, OF_ITS_OWN, OF_ADDRESS, TEMPORARY, RAISES = range(CALLS + 1, CALLS + 7)
NOT_DECLARED = 0
WIDTH = 10
"""Columns of the page table, which all but the last kernels are given."""


@pytest.fixture(name="verdicts", scope="module")
def _verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Verdict]:
    path = tmp_path_factory.mktemp("stray") / "stray.py"
    names = ["TUPLE", "OF_A_BUFFER", "OF_ITS_OWN", "OF_ADDRESS", "TEMPORARY", "RAISES"]
    path.write_text(SOURCE + "".join(f"{name} = {globals()[name]}\n" for name in names))
    setup = Setup(table_width=WIDTH, pool_width=32)
    cases = {it: Case(setup, (Replay(requests=(Request(it),)),)) for it in range(PAST, RAISES + 1)}
    cases[NOT_DECLARED] = Case(setup, (Replay(Mode.TARGET_VERIFY),))
    given = [(Path(f"{it}.json"), Sequence(case)) for it, case in cases.items()]
    judging = _Processes(Plan(references=(str(path),)), Sanitizer.OOB, "stray", given, len(given), 0).judge()
    while True:
        try:
            next(judging)
        except StopIteration as end:
            return dict(zip(cases, end.value, strict=True))


def _line(mark: str) -> str:
    number = next(at for at, line in enumerate(SOURCE.splitlines(), 1) if line.endswith(f"  # {mark}"))
    return f"stray.py:{number} in "


@pytest.mark.parametrize(
    ("which", "code", "element", "times", "message"),
    [
        (PAST, Code.OUT_OF_BOUNDS, WIDTH, 12, "reads past the end of page_table_1: element 10 where it has 10; 12 "),
        (FRONT, Code.OUT_OF_BOUNDS, -2, 2, "reads in front of page_table_1: element -2 where it has 10; 2 elements"),
        (STORES, Code.GUARD_WRITTEN, WIDTH, 2, "writes past the end of page_table_1: element 10 where it has 10; 2 "),
        (ADDS, Code.GUARD_WRITTEN, WIDTH, 2, "writes past the end of page_table_1: element 10 where it has 10; 2 "),
        (SWAPS, Code.GUARD_WRITTEN, WIDTH, 2, "writes past the end of page_table_1: element 10 where it has 10; 2 "),
        (TUPLE, Code.OUT_OF_BOUNDS, 1, 1, "reads past the end of cache_seqlens: element 1 where it has 1 ("),
        (OF_ADDRESS, Code.OUT_OF_BOUNDS, WIDTH, 1, "reads past the end of page_table_1: element 10 where it has 10 ("),
        (TEMPORARY, Code.OUT_OF_BOUNDS, 4, 12, "reads past the end of argument source: element 4 where it has 4; 12 "),
    ],
)
def test_what_strays(
    verdicts: dict[int, Verdict], which: int, code: Code, element: int, times: int, message: str
) -> None:
    finding = verdicts[which].primary
    assert finding is not None
    assert (finding.code, finding.element, finding.count) == (code, (element,), times)
    assert finding.message.startswith(message)


@pytest.mark.parametrize(
    ("which", "mark", "function"),
    [
        (PAST, "past", "past"),
        (FRONT, "front", "front"),
        (STORES, "stores", "stores"),
        (ADDS, "adds", "adds"),
        (SWAPS, "swaps", "swaps"),
        (TUPLE, "tuple", "beyond_the_first"),
        (CALLS, "helper", "helper"),
        (WILD, "wild", "wild"),
    ],
)
def test_the_line_is_that_of_the_access(verdicts: dict[int, Verdict], which: int, mark: str, function: str) -> None:
    finding = verdicts[which].primary
    assert finding is not None
    assert finding.message.endswith(f"({_line(mark)}{function})")


def test_an_address_near_nothing(verdicts: dict[int, Verdict]) -> None:
    finding = verdicts[WILD].primary
    assert finding is not None
    assert (finding.code, finding.buffer, finding.count) == (Code.OUT_OF_BOUNDS, None, 2)
    assert finding.message.startswith("reads memory that is no tensor's; 2 elements in all (stray.py:")


@pytest.mark.parametrize("which", [MASKED, OF_A_BUFFER, OF_ITS_OWN])
def test_what_stays_inside(verdicts: dict[int, Verdict], which: int) -> None:
    assert (verdicts[which].outcome, verdicts[which].reason) == (Outcome.AGREE, "")


def test_an_exception_is_a_finding(verdicts: dict[int, Verdict]) -> None:
    finding = verdicts[RAISES].primary
    assert finding is not None
    assert finding.code is Code.EXCEPTION
    assert finding.message.startswith("ValueError: as planned (stray.py:")


def test_what_does_not_run_is_not_applicable(verdicts: dict[int, Verdict]) -> None:
    verdict = verdicts[NOT_DECLARED]
    assert (verdict.outcome, verdict.reason) == (Outcome.NOT_APPLICABLE, "mode not declared")
