"""Every implementation under the whole check: the corners that crashed engines, and cases drawn at random."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nsa_verify.kernels
from nsa_verify import Case, CtxLens, Layout, Mode, Outcome, Replay, Request, Setup, SlotKind, verify
from nsa_verify.core.case import longest, shortest
from nsa_verify.core.implementation import registered

NAMES = (
    "python-loop",
    "vectorized",
    "triton-fused",
    "triton-inplace",
    "precomputed-copy",
    "precomputed-batched-copy",
    "onepass",
)
GRAPH = "graph" if torch.cuda.is_available() else "simulated-graph"
DRAWN = 30 if torch.cuda.is_available() else 10
"""Cases at random; interpreted, each launch takes milliseconds."""


def _replays(*requests: tuple[int, int], **fields: Any) -> tuple[Replay, ...]:
    """One replay per mode over ``(seq_len, accept_len)`` requests, then one without a request."""
    rows = tuple(Request(seq_len=seq_len, accept_len=accept_len) for seq_len, accept_len in requests)
    return (*(Replay(mode=mode, requests=rows, **fields) for mode in Mode), Replay(mode=Mode.DRAFT_EXTEND_V2))


def _corners() -> Iterator[Any]:
    wide: dict[str, Any] = {
        "num_draft_tokens": 4,
        "page_size": 16,
        "table_width": 40,
        "pool_width": 52,
        "buckets": (2, 4),
    }
    optional: dict[str, Any] = {"schedule": True, "num_sms": 3, "ctx_lens": CtxLens.OWN}
    yield pytest.param(Setup(**wide, **optional), _replays((20, 4), (7, 0), (40, 1)), id="padded")
    yield pytest.param(Setup(**wide, **optional, fill_seq_len=0), _replays((4, 4)), id="fill-0")
    yield pytest.param(Setup(**wide, ctx_lens=CtxLens.VIEW), _replays((48, 3), (41, 2), (39, 1)), id="context-wall")
    yield pytest.param(Setup(**wide, index_topk=2048, fill_seq_len=0), (Replay(),), id="all-padding")
    aliased: dict[str, Any] = {"aliased_seq_lens": True, "num_steps": 3, "table_row_stride": 43, "stride_skew": 5}
    yield pytest.param(Setup(**wide, **aliased, host_lengths=False), _replays((20, 4), (7, 0)), id="aliased")
    strided: dict[str, Any] = {
        "layout": Layout.STRIDED,
        "input_tail": 3,
        "pool_index_dtype": "int32",
        "pool_row_stride": 55,
    }
    yield pytest.param(Setup(**wide, **strided), _replays((20, 4), (7, 0)), id="strided")
    narrow: dict[str, Any] = {"page_size": 1, "seq_lens_dtype": "int64", "layout": Layout.OFFSET}
    yield pytest.param(Setup(**(wide | narrow), **optional), _replays((20, 4), (7, 2)), id="page-size-1")
    scattered = _replays((20, 4), (9, 1), slots=SlotKind.SCATTERED, pool_seed=7)
    yield pytest.param(Setup(**(wide | {"page_size": 128})), scattered, id="page-size-128")
    rows = tuple((5 + 3 * row, row % 5) for row in range(33))
    many: dict[str, Any] = {
        "num_draft_tokens": 5,
        "table_width": 110,
        "pool_width": 120,
        "buckets": (33,),
        "page_size": 32,
    }
    yield pytest.param(Setup(**many, **optional, index_topk=30), _replays(*rows), id="more-rows-than-a-tile")
    long: dict[str, Any] = {"table_width": 2200, "pool_width": 2210, "page_size": 64, "index_topk": 2048}
    yield pytest.param(Setup(**long, **optional), _replays((2200, 1)), id="more-columns-than-a-program")
    lots: dict[str, Any] = {
        "num_draft_tokens": 8,
        "table_width": 20,
        "pool_width": 30,
        "buckets": (72,),
        "num_sms": 132,
    }
    rows = tuple((8 + row % 13, row % 9) for row in range(71))
    setup = Setup(**lots, schedule=True, page_size=16)
    yield pytest.param(setup, _replays(*rows)[1:3], id="more-lanes-than-a-block", marks=pytest.mark.slow)


@pytest.mark.parametrize(("setup", "replays"), list(_corners()))
@pytest.mark.parametrize("name", NAMES)
def test_corners(name: str, setup: Setup, replays: tuple[Replay, ...]) -> None:
    verdict = verify(Case(setup=setup, replays=replays), name)
    assert verdict.outcome is Outcome.AGREE, verdict


@pytest.mark.parametrize(("setup", "replays"), list(_corners()))
@pytest.mark.parametrize("name", NAMES)
def test_corners_captured(name: str, setup: Setup, replays: tuple[Replay, ...]) -> None:
    verdict = verify(Case(setup=setup, replays=replays), name, executor=GRAPH)
    captured = registered()[name].capturable & {replay.mode for replay in replays}
    assert verdict.outcome is (Outcome.AGREE if captured else Outcome.NOT_APPLICABLE), verdict
    assert set(verdict.modes) == captured


def _draw(rng: random.Random) -> Case:
    tokens = rng.randint(1, 4)
    width = rng.choice([1, 2, 16, 17, 64, 127, 128, 129, 200])
    tail = rng.choice([0, 0, 3])
    layout = rng.choice(list(Layout))
    dtype: Any = rng.choice(["int32", "int64"])
    setup = Setup(
        num_draft_tokens=tokens,
        index_topk=rng.choice([1, 4, 16, 64, 2048]),
        page_size=rng.choice([1, 16, 32, 64, 128]),
        table_width=width,
        table_row_stride=width + rng.choice([0, 1, 9]),
        stride_skew=rng.choice([0, 5]),
        pool_rows=rng.randint(1, 6),
        pool_width=width + tokens + rng.choice([0, 4]),
        num_steps=rng.choice([1, 1, 2, 4]),
        buckets=(2, 4),
        fill_seq_len=rng.choice([0, 1]),
        num_sms=rng.choice([1, 4, 33]),
        seq_lens_dtype=dtype,
        pool_index_dtype=rng.choice(["int32", "int64"]),
        layout=layout,
        aliased_seq_lens=dtype == "int32" and layout is Layout.CONTIGUOUS and not tail and rng.random() < 0.5,
        input_tail=tail,
        host_lengths=rng.random() < 0.5,
        ctx_lens=rng.choice(list(CtxLens)),
        schedule=rng.random() < 0.5,
    )
    return Case(setup=setup, replays=tuple(_draw_replay(rng, setup) for _ in range(rng.randint(1, 3))))


def _draw_replay(rng: random.Random, setup: Setup) -> Replay:
    mode = rng.choice(list(Mode))
    most_accepted = rng.choice([0, setup.num_draft_tokens, setup.num_draft_tokens])
    requests = []
    for _ in range(rng.randint(0, 4)):
        accept_len = rng.randint(0, most_accepted)
        seq_len = rng.randint(shortest(setup, mode, accept_len), longest(setup, mode))
        requests.append(Request(seq_len=seq_len, pool_row=rng.randrange(setup.pool_rows), accept_len=accept_len))
    return Replay(
        mode=mode,
        requests=tuple(requests),
        slots=rng.choice(list(SlotKind)),
        pool_seed=rng.randrange(100),
        padded_accept_len=rng.choice([1, setup.num_draft_tokens]),
        padded_pool_row=rng.randrange(setup.pool_rows),
    )


@pytest.mark.parametrize("executor", ["eager", pytest.param(GRAPH, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_cases_drawn_at_random(name: str, executor: str) -> None:
    rng = random.Random(20)
    agreed = 0
    for _ in range(DRAWN):
        case = _draw(rng)
        verdict = verify(case, name, executor=executor)
        agreed += verdict.outcome is Outcome.AGREE
        assert verdict.outcome in {Outcome.AGREE, Outcome.NOT_APPLICABLE}, (case, verdict)
    assert agreed >= (DRAWN if executor == "eager" else DRAWN // 2) or not registered()[name].capturable


class _NoSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses the operations that read device data on the host or have a shape that depends on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise RuntimeError(f"{func} needs a sync")
        return func(*args, **(kwargs or {}))


def _sparse(folder: Path, elements: int) -> Tensor:
    """So many int32 elements, of which only those that are touched take memory; on a GPU all of them do."""
    if torch.cuda.is_available():
        return torch.empty(elements, dtype=torch.int32, device="cuda")
    path = folder / "sparse"
    memory = torch.from_file(str(path), shared=True, size=elements, dtype=torch.int32)
    path.unlink()
    return memory


@pytest.mark.parametrize("name", NAMES)
def test_row_times_stride_is_64_bit(make_backend: Callable[..., Any], tmp_path: Path, name: str) -> None:
    setup = Setup(page_size=16, table_width=20, pool_width=24, buckets=(3,), fill_seq_len=0)
    backend = make_backend(setup, Mode.DECODE, [3, 17, 20])
    shape, stride = (3, 24), (2**30, 1)
    pool, table = (_sparse(tmp_path, 2**31 + 24).as_strided(shape, stride) for _ in range(2))
    pool.copy_(backend.inputs.req_to_token)
    inputs = replace(backend.inputs, req_to_token=pool)
    (step,) = backend.steps
    real_table = table[:, 22:]
    registered()[name].refresh(inputs, [replace(step, page_table_1=table[:, :20], real_page_table=real_table)], setup)
    for row, seq_len in enumerate((3, 17, 20)):
        assert table[row, :seq_len].tolist() == [1000 * row + 3 * column for column in range(seq_len)]
    assert real_table[1:].tolist() == [[62, 65], [125, 128]]


@pytest.mark.parametrize("name", NAMES)
def test_request_times_stride_is_64_bit(make_backend: Callable[..., Any], tmp_path: Path, name: str) -> None:
    seq_lens, accept_lens = [300, 7, 290], [1, 0, 2]
    setup = Setup(num_draft_tokens=2, page_size=16, table_width=300, pool_width=304, buckets=(3,), fill_seq_len=0)
    backend = make_backend(setup, Mode.DRAFT_EXTEND, seq_lens, accept_lens)
    # The last request is 2**31 elements behind the first; a 32-bit product finds zeros for it, as far before the first.
    memory = _sparse(tmp_path, 2**32 + 3)
    memory[:3].zero_()
    given = {"seq_lens": seq_lens, "req_pool_indices": [2, 1, 0], "accept_lens": accept_lens}
    strided = {at: memory.as_strided((3,), (2**30,), 2**31 + place) for place, at in enumerate(given)}
    for at, values in given.items():
        strided[at].copy_(torch.tensor(values))
    registered()[name].refresh(replace(backend.inputs, **strided), backend.steps, setup)
    (step,) = backend.steps
    assert step.cu_seqlens_k.tolist() == [0, 300, 307, 597]
    assert step.nsa_seqlens_expanded[:3].tolist() == [300, 289, 290]
    for row, (pool_row, length) in enumerate(((2, 300), (0, 290), (0, 290))):
        slots = [1000 * pool_row + 3 * column for column in range(length)]
        assert step.page_table_1[row, :length].tolist() == slots
        assert step.real_page_table[row, : -(-length // 16)].tolist() == [slot // 16 for slot in slots[::16]]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("name", NAMES)
def test_only_what_declares_itself_capturable_does_without_a_sync(
    make_backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, mode: Mode
) -> None:
    setup = Setup(num_draft_tokens=2, page_size=16, table_width=32, pool_width=40, buckets=(2,), schedule=True)
    backend = make_backend(setup, mode, [20, 3], [2, 1])
    implementation = registered()[name]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if mode in implementation.capturable:
        with _NoSync():  # type: ignore[no-untyped-call]
            implementation.refresh(backend.inputs, backend.steps, setup)
    else:
        with _NoSync(), pytest.raises(RuntimeError, match="needs a sync"):  # type: ignore[no-untyped-call]
            implementation.refresh(backend.inputs, backend.steps, setup)


SURFACE = ("__init__.py", "backend.py", "backend_rows.py")
"""No implementations: the backend computes nothing, but calls those that engines have behind these names."""
ARGUMENTS = "nsa_verify.kernels.backend_arguments"
"""Neither: it refuses arguments that no implementation could take, and computes no value."""


def test_no_implementation_imports_another() -> None:
    folder = Path(nsa_verify.kernels.__file__).parent
    files = [path for path in sorted(folder.glob("*.py")) if path.name not in SURFACE]
    assert {path.stem for path in files} >= {module.rpartition(".")[2] for module in nsa_verify.kernels.BUILTIN_MODULES}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            others = [name for name in named if "kernels" in name and name != ARGUMENTS]
            assert not others, f"{path.name} imports another implementation"
