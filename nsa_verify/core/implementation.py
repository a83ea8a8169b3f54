"""What an implementation is: a function under a name, with what it declares about itself.

Nothing here imports torch; tensors appear in annotations only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from inspect import signature
from typing import TYPE_CHECKING, Final, TypeVar

from nsa_verify.core.case import CtxLens, Mode, Setup

if TYPE_CHECKING:
    from torch import Tensor


class Extent(StrEnum):
    """How far past the live prefix of a defined page-table row an implementation may write (contract, section 3)."""

    LIVE = "live"
    ROW = "row"
    """The live prefix rounded up to the declared block of columns, clipped to the table's width."""
    MAX = "max"
    """Every defined row up to the batch's largest KV length."""
    FULL = "full"
    """Every defined row up to the table's width."""


@dataclass(frozen=True, slots=True)
class ReplayInputs:
    """What one refresh reads. The tensors are the engine's static inputs: their addresses do not change.

    ``seq_lens`` ``[>=B]`` int32 or int64, any element stride and storage offset; ``seq_lens_cpu`` the same values on
    the host, or None where the engine keeps no mirror; ``req_pool_indices`` ``[>=B]`` int64 or int32;
    ``req_to_token`` ``[pool_rows, pool_width]`` int32, row stride >= pool_width; ``accept_lens`` ``[>=B]`` int32,
    meaningful in the two DRAFT_EXTEND modes and poison in the others. Only the first ``batch_size`` (B, the bucket)
    elements may be used; the padded ones among them are filled as the contract's section 4 says.
    """

    mode: Mode
    batch_size: int
    seq_lens: Tensor
    seq_lens_cpu: Tensor | None
    req_pool_indices: Tensor
    req_to_token: Tensor
    accept_lens: Tensor


@dataclass(frozen=True, slots=True)
class MetadataBuffers:
    """The buffers of one step for one (mode, bucket), all int32; R_max is B in DECODE and B*N elsewhere.

    ``cache_seqlens`` ``[B]``; ``cu_seqlens_k`` ``[B+1]``; ``nsa_seqlens_expanded`` ``[R_max]`` (DECODE: the same memory
    as ``cache_seqlens``); ``nsa_cache_seqlens`` ``[R_max]``; ``nsa_cu_seqlens_k`` ``[R_max+1]``; ``page_table_1``
    ``[R_max, W]``; ``real_page_table`` ``[R_max, ceil(W/p)]`` (p = 1: the same tensor as ``page_table_1``), both with a
    row stride that may exceed their width. ``cu_seqlens_q`` ``[B+1]`` and ``nsa_cu_seqlens_q`` ``[R_max+1]`` are frozen
    aranges. The last two are None where the backend does not keep them or the implementation does not declare them:
    ``paged_mqa_ctx_lens`` ``[rows, 1]`` a view, or ``[B, N]`` of its own; ``paged_mqa_schedule`` ``[num_sms+1, 2]``.
    """

    cache_seqlens: Tensor
    cu_seqlens_k: Tensor
    nsa_seqlens_expanded: Tensor
    nsa_cache_seqlens: Tensor
    nsa_cu_seqlens_k: Tensor
    page_table_1: Tensor
    real_page_table: Tensor
    cu_seqlens_q: Tensor
    nsa_cu_seqlens_q: Tensor
    paged_mqa_ctx_lens: Tensor | None = None
    paged_mqa_schedule: Tensor | None = None


Refresh = Callable[[ReplayInputs, Sequence[MetadataBuffers], Setup], None]
RefreshT = TypeVar("RefreshT", bound=Refresh)

OPTIONAL_OUTPUTS: Final = frozenset({"paged_mqa_ctx_lens", "paged_mqa_schedule"})


@dataclass(frozen=True, slots=True)
class Implementation:
    """A named ``refresh`` and its declarations; see ``implementation``."""

    name: str
    refresh: Refresh = field(repr=False)
    modes: frozenset[Mode]
    extent: Extent
    block: int
    capturable: frozenset[Mode]
    host_lengths: bool
    optional_outputs: frozenset[str]
    source: str = "built-in"

    @property
    def file(self) -> str:
        """The file whose lines are blamed; empty where ``source`` names none."""
        return self.source.rpartition(":")[0]

    @property
    def is_builtin(self) -> bool:
        """Whether it is one of ``nsa_verify.kernels``."""
        return str(getattr(self.refresh, "__module__", "")).startswith("nsa_verify.kernels.")

    def not_applicable(self, setup: Setup, mode: Mode) -> str | None:
        """Why this implementation does not run ``mode`` under ``setup``, or None if it does."""
        if mode not in self.modes:
            return "mode not declared"
        if self.host_lengths and not setup.host_lengths:
            return "needs seq_lens_cpu"
        return None

    def writes(self, setup: Setup) -> frozenset[str]:
        """The optional outputs that are handed to it, and checked, under ``setup``."""
        kept = {
            "paged_mqa_ctx_lens": setup.ctx_lens is not CtxLens.ABSENT,
            "paged_mqa_schedule": setup.schedule,
        }
        return frozenset(name for name in self.optional_outputs if kept[name])


_registered: dict[str, Implementation] = {}


def implementation(
    name: str,
    *,
    modes: Iterable[Mode] = tuple(Mode),
    extent: Extent | str = Extent.LIVE,
    block: int = 128,
    capturable: bool | Collection[Mode] = True,
    host_lengths: bool = False,
    optional_outputs: Iterable[str] = (),
) -> Callable[[RefreshT], RefreshT]:
    """Register ``refresh(inputs, steps, setup)`` as an implementation called ``name``.

    ``extent`` is the write extent that the oracle holds it to, ``block`` the columns that ``row`` rounds up to.
    ``capturable`` says in which modes it may be captured in a CUDA graph, ``host_lengths`` that it cannot work without
    ``seq_lens_cpu``. Of ``optional_outputs`` (``paged_mqa_ctx_lens``, ``paged_mqa_schedule``) it gets, and must write,
    those that the setup keeps; the others are None. Raises ``ValueError`` for a name already taken by another
    function, and for unknown modes, extents or outputs.
    """
    outputs = frozenset(optional_outputs)
    if unknown := outputs - OPTIONAL_OUTPUTS:
        raise ValueError(f"implementation {name!r}: unknown optional output {min(unknown)!r}")
    if block < 1:
        raise ValueError(f"implementation {name!r}: block = {block} must be at least 1")
    declared = frozenset(Mode(mode) for mode in modes)
    if not declared:
        raise ValueError(f"implementation {name!r} declares no mode")
    graph_modes = _graph_modes(name, capturable, declared)

    def register(refresh: RefreshT) -> RefreshT:
        try:
            signature(refresh).bind(None, None, None)
        except TypeError as error:
            raise ValueError(f"implementation {name!r}: must take (inputs, steps, setup): {error}") from error
        taken = _registered.get(name)
        if taken is not None and _origin(taken.refresh) != _origin(refresh):
            raise ValueError(
                f"two implementations are called {name!r}: {_origin(taken.refresh)} and {_origin(refresh)}"
            )
        _registered[name] = Implementation(
            name=name,
            refresh=refresh,
            modes=declared,
            extent=Extent(extent),
            block=block,
            capturable=graph_modes,
            host_lengths=host_lengths,
            optional_outputs=outputs,
            source=_origin(refresh),
        )
        return refresh

    return register


def _graph_modes(name: str, capturable: bool | Collection[Mode], declared: frozenset[Mode]) -> frozenset[Mode]:
    if isinstance(capturable, bool):
        return declared if capturable else frozenset()
    modes = frozenset([Mode(capturable)] if isinstance(capturable, str) else map(Mode, capturable))
    if undeclared := modes - declared:
        raise ValueError(f"implementation {name!r}: capturable in {min(undeclared)}, which it does not declare")
    return modes


_fallbacks: deque[str] = deque(maxlen=256)
"""Bounded, since nobody takes them where an implementation runs in service."""
_counts: Counter[str] = Counter()
_REASONS: Final = 256
_OTHERS: Final = "other reasons"
"""What reasons are counted as once there are ``_REASONS``: some name what is different every time."""


def fallback(reason: str) -> None:
    """Report, from inside ``refresh``, that the fast path was not taken, and why.

    A reported fallback is counted and shown, and is no fault; an error that an implementation swallows without this is
    a finding (NV504).
    """
    _counts[reason if reason in _counts or len(_counts) < _REASONS else _OTHERS] += 1
    _fallbacks.append(reason)


def fallbacks() -> dict[str, int]:
    """How often each reason was reported through ``fallback`` since this process began."""
    return dict(_counts)


def put_back_fallbacks(reasons: Iterable[str]) -> None:
    """Have ``take_fallbacks`` give them again; they were counted when they were reported."""
    _fallbacks.extend(reasons)


def reported_fallbacks() -> int:
    """How many fallbacks wait to be taken."""
    return len(_fallbacks)


def take_fallbacks() -> tuple[str, ...]:
    """The reasons reported in this process since this was asked last, in order."""
    taken = tuple(_fallbacks)
    _fallbacks.clear()
    return taken


def registered() -> dict[str, Implementation]:
    """The implementations registered so far in this process, by name, in order of registration."""
    return dict(_registered)


def _origin(refresh: Refresh) -> str:
    code = getattr(refresh, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(refresh)
