"""NV203: whatever is changed in an input is found, and named by the element that a person would name."""

from __future__ import annotations

import pytest
from device.subjects import Bug, Steps, beyond, subject

from nsa_verify import Case, Code, Finding, Layout, Mode, Outcome, Replay, ReplayInputs, Request, Setup, verify

SETUP = Setup(num_draft_tokens=3, page_size=16, table_width=40, pool_rows=3, pool_width=48, pool_row_stride=50)
RAGGED = Replay(Mode.DRAFT_EXTEND, (Request(13, 1, 2), Request(5, 2, 3)))


def case_of(**fields: object) -> Case:
    plain = {name: getattr(SETUP, name) for name in SETUP.__struct_fields__}
    return Case(Setup(**(plain | {"buckets": (2, 4)} | fields)), (RAGGED,))


def finding_of(case: Case, bug: Bug) -> Finding:
    verdict = verify(case, subject(bug))
    assert verdict.outcome is Outcome.DISAGREE
    (finding,) = verdict.findings
    assert (finding.code, finding.replay, finding.step, finding.region) == (Code.INPUT_MUTATED, 0, None, "input")
    assert finding.before == finding.expected
    return finding


def _add(name: str, at: int) -> Bug:
    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        getattr(inputs, name)[at] += 2

    return bug


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    ("name", "at", "expected"),
    [
        ("seq_lens", 0, 13),
        ("seq_lens", 1, 5),
        ("req_pool_indices", 1, 2),
        ("accept_lens", 0, 2),
        ("seq_lens_cpu", 1, 5),
    ],
)
def test_an_element_of_an_input(name: str, at: int, expected: int, layout: Layout, dtype: str) -> None:
    case = case_of(layout=layout, seq_lens_dtype=dtype, pool_index_dtype=dtype)
    finding = finding_of(case, _add(name, at))
    assert (finding.buffer, finding.element, finding.expected, finding.got) == (name, (at,), expected, expected + 2)
    assert finding.count == 1
    assert finding.message == f"{name}[{at}]: expected {expected}, got {expected + 2}"


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_the_window_of_a_strided_input_shows_its_elements(dtype: str) -> None:
    finding = finding_of(case_of(layout=Layout.STRIDED, seq_lens_dtype=dtype), _add("seq_lens", 1))
    shown = [(cell.element, cell.expected, cell.got, cell.differs) for cell in finding.window]
    assert shown[:2] == [((0,), 13, 13, False), ((1,), 5, 7, True)]


@pytest.mark.parametrize("name", ["seq_lens", "req_pool_indices", "accept_lens"])
def test_an_element_past_the_bucket(name: str) -> None:
    finding = finding_of(case_of(input_tail=2), _add(name, 3))
    assert (finding.buffer, finding.element) == (name, (3,))


@pytest.mark.parametrize("name", ["seq_lens", "req_pool_indices", "accept_lens"])
def test_memory_behind_an_input_is_a_guard(name: str) -> None:
    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        beyond(getattr(inputs, name), 2).fill_(1)

    verdict = verify(case_of(), subject(bug))
    assert [(it.code, it.buffer, it.region) for it in verdict.findings] == [(Code.GUARD_WRITTEN, name, "guard")]


def test_memory_between_the_elements_of_a_strided_input() -> None:
    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        inputs.seq_lens.as_strided((1,), (1,), inputs.seq_lens.storage_offset() + 4).fill_(1)

    finding = finding_of(case_of(layout=Layout.STRIDED), bug)
    assert (finding.buffer, finding.element) == ("seq_lens", (1,))
    assert finding.message.startswith("the memory beside seq_lens[1]: expected poison")


def test_memory_before_an_input_at_an_offset() -> None:
    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        inputs.seq_lens.as_strided((1,), (1,), inputs.seq_lens.storage_offset() - 1).fill_(1)

    finding = finding_of(case_of(layout=Layout.OFFSET), bug)
    assert (finding.buffer, finding.element) == ("seq_lens", (-1,))
    assert finding.message.startswith("the memory beside seq_lens[-1]: expected poison")


def test_accept_lens_are_an_input_in_every_mode() -> None:
    case = Case(SETUP, (Replay(Mode.DECODE, (Request(13),)),))
    finding = finding_of(case, lambda inputs, _, __: inputs.accept_lens.fill_(1))
    assert (finding.buffer, finding.element, finding.got) == ("accept_lens", (0,), 1)


def test_a_cell_of_req_to_token() -> None:
    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        inputs.req_to_token[2, 47] = 5

    finding = finding_of(case_of(), bug)
    assert (finding.buffer, finding.element) == ("req_to_token", (2, 47))
    assert (finding.expected, finding.got, finding.count) == (1000 + 2 * 48 + 47, 5, 1)
    assert finding.message == "req_to_token[2, 47]: expected 1143, got 5"


@pytest.mark.parametrize(("at", "element"), [(48, (0, 48)), (-1, (-1, 49)), (3 * 50, (3, 0))])
def test_memory_beside_req_to_token(at: int, element: tuple[int, int]) -> None:
    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        table = inputs.req_to_token
        table.as_strided((1,), (1,), table.storage_offset() + at).fill_(1)

    finding = finding_of(case_of(), bug)
    assert (finding.buffer, finding.element, finding.got) == ("req_to_token", element, 1)
    assert finding.message.startswith("the memory beside req_to_token")


def test_req_to_token_changed_in_a_later_replay() -> None:
    replays = (RAGGED, Replay(Mode.DECODE, (Request(9, 1),), pool_seed=4), RAGGED)
    case = Case(case_of().setup, replays)

    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        if inputs.mode is Mode.DECODE:
            inputs.req_to_token[0, 3] -= 1

    verdict = verify(case, subject(bug))
    (finding,) = verdict.findings
    assert (finding.replay, finding.mode, finding.element) == (1, Mode.DECODE, (0, 3))
    assert (finding.expected, finding.got) == (5003, 5002)


def test_req_to_token_changed_once_and_never_again() -> None:
    changed: list[bool] = []

    def bug(inputs: ReplayInputs, _: Steps, __: Setup) -> None:
        if not changed:
            changed.append(True)
            inputs.req_to_token[0, 0] = 1

    found = verify(case_of(), subject(bug)).findings
    assert [it.code for it in found] == [Code.NOT_DETERMINISTIC, Code.INPUT_MUTATED]
    assert (found[1].buffer, found[1].region) == ("req_to_token", "input")


def test_the_host_mirror_is_absent_or_named() -> None:
    finding = finding_of(case_of(), _add("seq_lens_cpu", 0))
    assert finding.message == "seq_lens_cpu[0]: expected 13, got 15"
    assert verify(case_of(host_lengths=False), subject()).outcome is Outcome.AGREE
