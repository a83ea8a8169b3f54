"""Ten bugs as people make them, each planted into a copy of one of the project's own implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nsa_verify import Case, Code, Mode
from nsa_verify.core.case import shortest
from nsa_verify.core.oracle import batch, expect

KERNELS: Final = Path(__file__).resolve().parent.parent.parent / "kernels"

Smallest = Callable[[Case], bool]
"""Whether a case is the one that a person would have written to show the bug."""


@dataclass(frozen=True)
class Bug:
    """One change to the text of ``kernels/<module>.py``, the code it must be found under, and its smallest cases."""

    name: str
    module: str
    right: str
    wrong: str
    code: Code
    smallest: Smallest

    @property
    def copy_name(self) -> str:
        """What the implementation is called once the bug is in it."""
        return f"bug-{self.name}"

    def text(self, planted: bool = True) -> str:
        """The source of the copy, with the bug or without."""
        original = self.module.replace("_", "-")
        text = (KERNELS / f"{self.module}.py").read_text(encoding="utf-8")
        text = _replace_once(text, f'"{original}"', f'"{self.copy_name}"')
        return _replace_once(text, self.right, self.wrong) if planted else text

    def plant(self, folder: Path, planted: bool = True) -> Path:
        """Write the copy into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name.replace('-', '_')}.py"
        path.write_text(self.text(planted), encoding="utf-8")
        return path


def _replace_once(text: str, old: str, new: str) -> str:
    found = text.count(old)
    if found != 1:
        raise ValueError(f"{old!r} stands {found} times in the implementation, so the bug cannot be planted")
    return text.replace(old, new)


def requests_of(case: Case) -> list[tuple[int, int]]:
    """``(seq_len, accept_len)`` of every request of a case that has one replay."""
    (replay,) = case.replays
    return [(request.seq_len, request.accept_len) for request in replay.requests]


def _one_request_of_length_1(case: Case) -> bool:
    return [seq_len for seq_len, _ in requests_of(case)] == [1]


def _only_padding_underflows(case: Case) -> bool:
    """At most one real request, as short as its mode allows."""
    (replay,) = case.replays
    lengths = [(it.seq_len, shortest(case.setup, replay.mode, it.accept_len)) for it in replay.requests]
    given = batch(case, 0)
    too_short = given.seq_lens[-1] - given.accept_lens[-1] + 1 < 0
    return len(lengths) <= 1 and all(length == least for length, least in lengths) and too_short


def _one_row_of_length_top_k(case: Case) -> bool:
    (row,) = expect(case, 0).buffers["nsa_seqlens_expanded"]
    return len(requests_of(case)) == 1 and case.setup.index_topk in row.values


def _one_row_past_the_total(case: Case) -> bool:
    """Two tokens of which one is accepted; or of two requests with one token each, one accepted and one not."""
    if case.replays[0].mode is not Mode.DRAFT_EXTEND or any(seq_len != 1 for seq_len, _ in requests_of(case)):
        return False
    rows = case.setup.captured_rows(Mode.DRAFT_EXTEND, case.bucket(0))
    return (rows, expect(case, 0).defined_rows) == (2, 1)


def _verify_of_one_token(case: Case) -> bool:
    return case.replays[0].mode is Mode.TARGET_VERIFY and _one_request_of_length_1(case)


def _two_steps(case: Case) -> bool:
    return case.setup.num_steps == 2 and _one_request_of_length_1(case)


def _two_then_one(case: Case) -> bool:
    lengths = [[request.seq_len for request in replay.requests] for replay in case.replays]
    return lengths == [[2], [1]] and case.replays[0].mode is case.replays[1].mode


def _nothing_accepted(case: Case) -> bool:
    return case.replays[0].mode is Mode.DRAFT_EXTEND and requests_of(case) == [(1, 0)]


BUGS: Final = (
    Bug(
        name="no-clamp-at-0",
        module="python_loop",
        right="torch.cat(ranges).clamp(min=0)",
        wrong="torch.cat(ranges)",
        code=Code.INVARIANT,
        smallest=_only_padding_underflows,
    ),
    Bug(
        name="top-k-comparison",
        module="vectorized",
        right="original_seq_lens.clamp(max=nsa_index_topk).to(torch.int32)",
        wrong=(
            "((original_seq_lens < nsa_index_topk) * original_seq_lens"
            " + (original_seq_lens > nsa_index_topk) * nsa_index_topk).to(torch.int32)"
        ),
        code=Code.WRONG_VALUE,
        smallest=_one_row_of_length_top_k,
    ),
    Bug(
        name="page-column-off-by-one",
        module="vectorized",
        right="inputs.req_to_token[:, : setup.table_width]",
        wrong="inputs.req_to_token.roll(-1, dims=1)[:, : setup.table_width]",
        code=Code.WRONG_VALUE,
        smallest=_one_request_of_length_1,
    ),
    Bug(
        name="prefix-sum-without-0",
        module="python_loop",
        right="    out[:1].zero_()\n",
        wrong="",
        code=Code.POISON,
        smallest=_one_request_of_length_1,
    ),
    Bug(
        name="one-past-the-prefix-sum",
        module="python_loop",
        right="    _prefix_sum(step.nsa_cache_seqlens[:rows], step.nsa_cu_seqlens_k)\n",
        wrong=(
            "    _prefix_sum(step.nsa_cache_seqlens[:rows], step.nsa_cu_seqlens_k)\n"
            "    sums = step.nsa_cu_seqlens_k\n"
            "    sums.as_strided((1,), (1,), sums.storage_offset() + sums.shape[0]).fill_(rows)\n"
        ),
        code=Code.GUARD_WRITTEN,
        smallest=_one_request_of_length_1,
    ),
    Bug(
        name="row-past-the-total-zeroed",
        module="vectorized",
        right="    step.page_table_1[:rows].copy_(page_table)\n",
        wrong="    step.page_table_1[:rows].copy_(page_table)\n    step.page_table_1[rows : rows + 1].zero_()\n",
        code=Code.FRAME_WRITTEN,
        smallest=_one_row_past_the_total,
    ),
    Bug(
        name="seq-lens-in-place",
        module="python_loop",
        right="inputs.seq_lens[:batch_size] + added",
        wrong="inputs.seq_lens[:batch_size].add_(added)",
        code=Code.INPUT_MUTATED,
        smallest=_verify_of_one_token,
    ),
    Bug(
        name="last-step-not-written",
        module="vectorized",
        right="    for step in steps:\n",
        wrong="    for step in steps[: max(1, len(steps) - 1)]:\n",
        code=Code.POISON,
        smallest=_two_steps,
    ),
    Bug(
        name="earlier-replay-left",
        module="python_loop",
        right="out[1 : count + 1].copy_(torch.cumsum(lengths, dim=0, dtype=torch.int32))",
        wrong=(
            "out[1 : count + 1].copy_("
            "torch.maximum(out[1 : count + 1], torch.cumsum(lengths, dim=0, dtype=torch.int32)))"
        ),
        code=Code.STALE,
        smallest=_two_then_one,
    ),
    Bug(
        name="zero-accept-counted",
        module="vectorized",
        right="_expand_ragged(inputs.accept_lens[:batch_size].long(), seq_lens, requests)",
        wrong="_expand_ragged(inputs.accept_lens[:batch_size].long().clamp(min=1), seq_lens, requests)",
        code=Code.FRAME_WRITTEN,
        smallest=_nothing_accepted,
    ),
)
