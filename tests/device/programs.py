"""Small programs, legal and illegal in a captured region, for both graph executors to agree on.

Each works on a ``Data``: ``x``, ``y`` and ``out`` int32 ``[8]`` on the device, ``mirror`` the content of ``x`` on the
host. At capture ``x`` is all 1 and ``y`` all 2; at replay they hold other numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from nsa_verify import Code


@dataclass
class Data:
    """The tensors of a program; ``state`` is what it may keep from its warm-up to its capture."""

    x: Tensor
    y: Tensor
    out: Tensor
    mirror: Tensor
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where ``x`` lies."""
        return self.x.device

    @property
    def backend(self) -> Any:
        """``torch.cpu`` or ``torch.cuda``."""
        return torch.get_device_module(self.device)


Program = Callable[[Data], object]


def _side_stream(it: Data) -> None:
    with it.backend.stream(it.backend.Stream()):
        it.out.copy_(it.x)


def _swallowed(it: Data) -> None:
    try:
        it.out.fill_(int(it.x[0].item()))
    except RuntimeError:
        it.out.fill_(0)


def _masked_write(it: Data) -> None:
    it.out.copy_(it.y)
    it.out[it.x > 3] = 7


def _masked_write_of_tensor(it: Data) -> None:
    it.out[it.x > 3] = it.y[:1].expand(1)[0]


def _element_write(it: Data) -> None:
    it.out.copy_(it.y)
    it.out[2] = 9


def _slice_write(it: Data) -> None:
    it.out.copy_(it.y)
    it.out[2:5] = 9


def _index_write(it: Data) -> None:
    it.out.zero_()
    it.out[it.y.long().clamp(0, 7)] = 5


def _index_write_of_tensor(it: Data) -> None:
    it.out.zero_()
    it.out.index_put_((torch.arange(8, device=it.device),), it.x)


def _cached(it: Data) -> None:
    cached = it.state.setdefault("arange", torch.arange(8, device=it.device, dtype=torch.int32))
    it.out.copy_(cached + it.x)


def _workspace(it: Data) -> None:
    workspace = it.state.setdefault("workspace", torch.empty(8, device=it.device, dtype=torch.int32))
    workspace.copy_(it.x)
    it.out.copy_(workspace * 2)


def _branch_on_capturing(it: Data) -> None:
    if it.state.get("warm") and torch.cuda.is_current_stream_capturing():
        it.out.copy_(it.x + 1)
    else:
        it.state["warm"] = True
        it.out.copy_(it.x + int(it.x[0]) * 0 + 1)


def _ragged(it: Data) -> None:
    owner = torch.repeat_interleave(torch.arange(8, device=it.device), it.y.clamp(1, 1).long(), output_size=8)
    it.out.copy_(it.x.index_select(0, owner))


def _two_outputs(it: Data) -> None:
    values, order = it.x.sort()
    it.out.copy_(values + order.to(torch.int32))


def _resized(it: Data) -> None:
    it.out.copy_(torch.cumsum(it.x, 0, out=torch.empty(0, dtype=torch.int32, device=it.device)))


def _scatter(it: Data) -> None:
    it.out.zero_()
    it.out.scatter_add_(0, it.y.long().clamp(0, 7), it.x)


@torch.library.custom_op("nsa_verify_programs::doubled", mutates_args=())
def _doubled(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("nsa_verify_programs::first", mutates_args=())
def _first(x: Tensor) -> Tensor:
    return torch.full_like(x, x[0].item())


@torch.library.custom_op("nsa_verify_programs::filled", mutates_args=())
def _filled(x: Tensor, host: Tensor) -> Tensor:
    return torch.full_like(x, int(host.max()))


@torch.library.custom_op("nsa_verify_programs::table", mutates_args=("kept",))
def _read_table(x: Tensor, kept: Tensor) -> Tensor:
    return x + kept.mul_(1)


def _inference(it: Data) -> None:
    with torch.inference_mode():
        it.out.copy_(it.x.view(4, 2).t().reshape(-1) + it.y.contiguous().to(torch.int64).flatten())


def _default_device(it: Data) -> None:
    with it.device:
        it.out.copy_(torch.arange(8) + it.x)


def _through_dlpack(it: Data) -> None:
    from_dlpack(it.out).copy_(from_dlpack(it.x))


def _kept_in_an_operator(it: Data) -> None:
    table = it.state.setdefault("table", torch.arange(8, device=it.device, dtype=torch.int32))
    it.out.copy_(_read_table(it.x, table))


LEGAL: Final[dict[str, Program]] = {
    "copy": lambda it: it.out.copy_(it.x),
    "add": lambda it: it.out.copy_(it.x + it.y + 3),
    "out argument": lambda it: torch.add(it.x, it.y, out=it.out),
    "prefix sum into a slice": lambda it: torch.cumsum(it.x[:7], 0, dtype=torch.int32, out=it.out[1:]),
    "clamp": lambda it: it.out.copy_(it.x.clamp(min=2, max=5)),
    "floor division": lambda it: it.out.copy_(torch.div(it.x, 4, rounding_mode="floor")),
    "in place": lambda it: it.out.copy_(it.y).mul_(2).add_(it.x),
    "view and expand": lambda it: it.out.view(4, 2).copy_(it.x.view(4, 2)[:, :1].expand(4, 2)),
    "where": lambda it: it.out.copy_(torch.where(it.x > 3, it.x, 0)),
    "where with two tensors": lambda it: it.out.copy_(torch.where(it.x > it.y, it.x, it.y)),
    "maximum of all": lambda it: it.out.copy_(it.x.max().expand(8)),
    "0-d device tensor": lambda it: it.out.copy_(it.x + it.x.max()),
    "arange on the device": lambda it: it.out.copy_(torch.arange(8, device=it.device) + it.x),
    "full on the device": lambda it: it.out.copy_(torch.full((8,), 3, device=it.device) + it.x),
    "zeros_like": lambda it: it.out.copy_(torch.zeros_like(it.x)),
    "new_zeros": lambda it: it.out.copy_(it.x.new_zeros(8) + it.y),
    "cat and stack": lambda it: it.out.copy_(
        torch.stack([it.x[:4], it.y[:4]], 1).flatten() + torch.cat([it.x[:4]] * 2)
    ),
    "pad": lambda it: it.out.copy_(torch.nn.functional.pad(it.x[:7].cumsum(0), (1, 0))),
    "index_select": lambda it: it.out.copy_(it.x.index_select(0, it.y.long().clamp(0, 7))),
    "index with a device tensor": lambda it: it.out.copy_(it.x[it.y.long().clamp(0, 7)]),
    "gather": lambda it: it.out.copy_(it.x.gather(0, it.y.long().clamp(0, 7))),
    "scatter_add_": _scatter,
    "index_put_ of a tensor": _index_write_of_tensor,
    "masked_fill": lambda it: it.out.copy_(it.x.masked_fill(it.x > 3, 0)),
    "masked write of a number": _masked_write,
    "slice write": _slice_write,
    "masked_select with a known size": lambda it: it.out.copy_(torch.nonzero_static(it.x > 0, size=8).flatten()),
    "take": lambda it: it.out.copy_(torch.take(it.x, it.y.long().clamp(0, 7))),
    "index_add_": lambda it: it.out.zero_().index_add_(0, it.y.long().clamp(0, 7), it.x),
    "fill_": lambda it: it.out.fill_(4),
    "fill_ with a device scalar": lambda it: it.out.fill_(it.x.max()),
    "repeat_interleave by a number": lambda it: it.out.copy_(it.x[:4].repeat_interleave(2)),
    "repeat_interleave with output_size": _ragged,
    "tile": lambda it: it.out.copy_(it.x[:4].tile(2)),
    "searchsorted": lambda it: it.out.copy_(torch.searchsorted(it.x.cumsum(0), it.y.long(), right=True)),
    "bucketize": lambda it: it.out.copy_(torch.bucketize(it.y.long(), it.x.cumsum(0), right=True)),
    "sort": _two_outputs,
    "to another type": lambda it: it.out.copy_(it.x.to(torch.int64).to(it.out.dtype)),
    "to its own device": lambda it: it.out.copy_(it.x.to(it.device)),
    "type of another": lambda it: it.out.copy_(it.x.long().to(it.y)),
    "as_tensor of a device tensor": lambda it: it.out.copy_(torch.as_tensor(it.x)),
    "flip and roll": lambda it: it.out.copy_(it.x.flip(0) + it.x.roll(1)),
    "split": lambda it: it.out.copy_(torch.cat(it.x.tensor_split(2)[::-1])),
    "iteration": lambda it: it.out.copy_(torch.stack(list(it.x)[::-1])),
    "topk": lambda it: it.out[:3].copy_(it.x.topk(3).values),
    "any": lambda it: it.out.copy_((it.x > 3).any().expand(8)),
    "isin": lambda it: it.out.copy_(torch.isin(it.x, it.y)),
    "median and kthvalue": lambda it: it.out.copy_((it.x.median() + it.x.kthvalue(3).values).expand(8)),
    "cummax and diff": lambda it: it.out[1:].copy_(it.x.cummax(0).values.diff()),
    "linspace": lambda it: it.out.copy_(torch.linspace(0, 7, 8, device=it.device)),
    "scalar_tensor on the device": lambda it: it.out.copy_(it.x + torch.scalar_tensor(3, device=it.device)),
    "result of unknown size": _resized,
    "comparison": lambda it: it.out.copy_((it.x[None, :] <= it.y[:, None]).sum(1)),
    "cached from the warm-up": _cached,
    "workspace from the warm-up": _workspace,
    "inference mode": _inference,
    "no_grad": lambda it: torch.no_grad()(lambda: it.out.copy_(it.x.reshape(2, 4).t().reshape(-1)))(),
    "operator of one's own": lambda it: it.out.copy_(_doubled(it.x)),
    "table kept for an operator of one's own": _kept_in_an_operator,
    "default device": _default_device,
    "DLPack": _through_dlpack,
    "one_hot": lambda it: it.out.copy_(torch.nn.functional.one_hot(it.y.long().clamp(0, 7), 8).sum(0)),
    "shape on the host": lambda it: it.out.copy_(it.x + it.x.shape[0] + it.x.stride(0)),
    "branch on capturing": _branch_on_capturing,
    "host arithmetic on the mirror": lambda it: it.mirror.max() + 1,
    "unused host tensor": lambda it: it.mirror + torch.tensor([1]),
}
"""What a graph holds faithfully: replayed with other numbers it gives what a call would give."""

FROZEN: Final[dict[str, Program]] = {
    "host maximum as a number": lambda it: it.out.fill_(int(it.mirror.max())),
    "host list": lambda it: it.out.copy_(it.x + sum(it.mirror.tolist())),
    "host scalar tensor": lambda it: it.out.copy_(it.y + it.mirror.max()),
    "0-d view of host memory": lambda it: it.out.copy_(it.y + it.mirror[0]),
    "host tensor for an operator of one's own": lambda it: it.out.copy_(_filled(it.x, it.mirror)),
    "bound of a slice": lambda it: it.out.zero_()[: int(it.mirror[0])].copy_(it.x[: int(it.mirror[0])]),
    "branch": lambda it: it.out.copy_(it.x if bool(it.mirror[0] > 1) else it.y),
}
"""Legal, but a host value goes into the graph: replayed it is what it was at capture."""

ILLEGAL: Final[dict[str, tuple[Program, Code]]] = {
    name: (program, Code.ILLEGAL_IN_CAPTURE)
    for name, program in {
        ".item()": lambda it: it.out.fill_(it.x[0].item()),
        ".tolist()": lambda it: it.out.fill_(it.x.tolist()[0]),
        ".cpu()": lambda it: it.x.cpu(),
        '.to("cpu")': lambda it: it.x.to("cpu"),
        ".numpy()": lambda it: it.x.cpu().numpy(),
        "int()": lambda it: it.out.fill_(int(it.x[0])),
        "float()": lambda it: it.out.fill_(float(it.x.sum())),
        "bool()": lambda it: it.out.fill_(1 if it.x[0] > 0 else 0),
        "bound of a slice": lambda it: it.out[: it.x[0]].zero_(),
        "select by a 0-d tensor": lambda it: it.out.copy_(it.x[it.y[0]].expand(8)),
        "arange to a device value": lambda it: torch.arange(it.x.sum(), device=it.device),
        "in": lambda it: 3 in it.x,
        "torch.equal": lambda it: torch.equal(it.x, it.y),
        "allclose": lambda it: torch.allclose(it.x, it.y),
        "boolean mask": lambda it: it.x[it.x > 0].sum(),
        "masked_select": lambda it: it.x.masked_select(it.x > 0),
        "write of tensors through a mask": lambda it: it.out.__setitem__(it.x > 0, it.y[it.x > 0]),
        "nonzero": lambda it: it.x.nonzero(),
        "where with one argument": lambda it: torch.where(it.x > 0),
        "unique": lambda it: it.x.unique(),
        "bincount": lambda it: it.x.long().bincount(),
        "repeat_interleave by a tensor": lambda it: it.x.repeat_interleave(it.y.clamp(1, 1).long()),
        "torch.tensor(list) to the device": lambda it: it.out.copy_(torch.tensor([1] * 8, device=it.device)),
        "torch.as_tensor(list) to the device": lambda it: torch.as_tensor([1] * 8, device=it.device),
        "new_tensor": lambda it: it.x.new_tensor([1, 2]),
        "tensor of a number to the device": lambda it: torch.tensor(5, device=it.device),
        "host tensor to the device": lambda it: torch.arange(8).to(it.device),
        "mirror to the device": lambda it: it.mirror.to(it.device),
        "mirror to another's device": lambda it: it.mirror.to(it.x),
        "copy_ from the host": lambda it: it.out.copy_(it.mirror),
        "copy_ to the host": lambda it: it.mirror.copy_(it.x),
        "index with a host tensor": lambda it: it.out.copy_(it.x[torch.arange(8)]),
        "element write": _element_write,
        "index write of a number": _index_write,
        "write by a list": lambda it: it.out.__setitem__([1, 2], 5),
        "index by a list": lambda it: it.out.copy_(it.x[[0, 1, 2, 3, 4, 5, 6, 7]]),
        "masked write of a 0-d tensor": _masked_write_of_tensor,
        "masked_fill_ by a 0-d tensor": lambda it: it.out.masked_fill_(it.x > 3, it.y[0]),
        "write of a host scalar tensor": lambda it: it.out[0].copy_(torch.tensor(3)),
        "copy_ from the host without waiting": lambda it: it.out.copy_(it.mirror, non_blocking=True),
        "unique_consecutive": lambda it: it.x.unique_consecutive(),
        "combinations": lambda it: torch.combinations(it.x),
        "histc": lambda it: it.x.float().histc(4),
        "item in an operator of one's own": lambda it: it.out.copy_(_first(it.x)),
        "index_fill_ by a 0-d tensor": lambda it: it.out.index_fill_(0, it.y.long().clamp(0, 7), it.x[0]),
        "linspace to a device value": lambda it: torch.linspace(0, it.x[0], 8, device=it.device),
        "printing": lambda it: repr(it.x),
        "swallowed": _swallowed,
    }.items()
} | {
    "synchronize": (lambda it: it.backend.synchronize(), Code.NEEDS_SYNC),
    "side stream": (_side_stream, Code.OTHER_STREAM),
}
"""What cannot be captured, and the code that says so."""

KNOWN_DIFFERENCES: Final[dict[str, tuple[Program, str, str]]] = {
    "host and device mixed": (
        lambda it: it.out.copy_(it.x + torch.arange(8)),
        "refused",
        "raises eagerly",
    ),
    "copy to the host without waiting": (
        lambda it: it.x.to("cpu", non_blocking=True),
        "refused",
        "captured",
    ),
}
"""Programs, and what becomes of them in the simulation and on CUDA; KNOWN-LIMITATIONS lists them."""
