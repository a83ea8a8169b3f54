"""What CUDA refuses while a graph is captured, told from the calls alone, so that it can be told without a GPU.

Two levels see a call: the functions of ``torch`` that an implementation calls (``CaptureFunctions``) and the operators
they come down to (``check_operator``). The first knows what is lost further down: where a literal or a factory was
asked to lie, and that ``tolist`` or ``numpy`` read memory without any operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _device

from nsa_verify.device.memory import Memory, tensors_in

aten = torch.ops.aten

Refuse = Callable[[str], NoReturn]
"""Raises with this sentence."""

_READS: Final = {
    torch.Tensor.tolist: ".tolist()",
    torch.Tensor.item: ".item()",
    torch.Tensor.numpy: ".numpy()",
    torch.Tensor.__array__: "numpy",
    torch.Tensor.cpu: ".cpu()",
    torch.Tensor.__bool__: "bool()",
    torch.Tensor.__int__: "int()",
    torch.Tensor.__float__: "float()",
    torch.Tensor.__index__: "using it as a Python index",
    torch.Tensor.__contains__: "in",
    torch.Tensor.__repr__: "printing",
}
"""Functions that need a tensor's content on the host, and how a person writes them."""

_LITERALS: Final = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor})
"""Functions that make a tensor of Python data: on the host first, then copied to where it is asked for."""

_FACTORIES: Final = frozenset(
    getattr(torch, name)
    for name in (
        *("arange", "empty", "empty_strided", "empty_permuted", "eye", "full", "linspace", "logspace", "ones", "rand"),
        *("randint", "randn", "randperm", "range", "scalar_tensor", "tril_indices", "triu_indices", "zeros"),
    )
)
"""Functions that make a tensor on the host unless they are told a device."""

_HOST_ONLY: Final = frozenset({torch.from_numpy, torch.frombuffer})


class CaptureFunctions(TorchFunctionMode):
    """The rules for functions.

    ``making_host`` is set while a factory makes a host tensor; with ``paused`` calls pass.
    """

    def __init__(self, memory: Memory, refuse: Refuse) -> None:
        super().__init__()
        self._memory = memory
        self.refuse: Refuse | None = refuse
        """None: nothing is refused, and only host memory noted."""
        self.making_host = False
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func is torch.nn.functional.one_hot and _classes(args, kwargs) > 0:
            # Its CPU form reads the largest number to check it, its CUDA form does not.
            classes = torch.arange(_classes(args, kwargs), device=args[0].device)
            return (args[0].unsqueeze(-1) == classes).to(torch.int64)
        if func in _READS:
            on_host = self._memory.is_host(args[0])
            if not on_host:
                self._refuse(f"{_READS[func]} reads device data on the host")
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and not on_host:
                result = result.clone()  # on the CPU it would be the device's own memory
                self._memory.add_host(result)
            return result
        if func is torch.Tensor.to or func is torch.Tensor.cuda:
            return self._move(func, args, kwargs)
        if func in _LITERALS:
            return self._make(func, args, kwargs)
        if func in _HOST_ONLY:
            result = func(*args, **kwargs)
            self._memory.add_host(result)
            return result
        if func in _FACTORIES and not _on_device(kwargs.get("device")):
            self.making_host = True
            try:
                return func(*args, **kwargs)
            finally:
                self.making_host = False
        return func(*args, **kwargs)

    def _refuse(self, sentence: str) -> None:
        if self.refuse is not None:
            self.refuse(sentence)

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of Python data, or of another tensor: host memory, unless a device is asked for."""
        method = func is torch.Tensor.new_tensor
        data = args[1:2] if method else args[:1]
        of_device = isinstance(data[0] if data else None, Tensor) and not self._memory.is_host(data[0])
        asked = _on_device(kwargs.get("device")) or (method and not self._memory.is_host(args[0]))
        if of_device and kwargs.get("device") == "cpu" and not asked:
            self._refuse(f"{func.__name__}() reads device data on the host")
        if of_device:
            return func(*args, **kwargs)
        if asked:
            self._refuse(f"{func.__name__}() of host data copies from pageable host memory to the device")
            return func(*args, **kwargs).clone()
        result = func(*args, **kwargs)
        self._memory.add_host(result)
        return result

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``to`` and ``cuda``: between the host and the device they copy, and wait or use pageable memory."""
        tensor, targets = args[0], [*args[1:], *kwargs.values()]
        on_host = self._memory.is_host(tensor)
        to_host = any(self._names_host(target) for target in targets) and not on_host
        to_device = any(self._names_device(target) for target in targets) and on_host
        if to_host:
            self._refuse(f".{func.__name__}() to the host reads device data there")
        if to_device:
            self._refuse(f".{func.__name__}() copies from pageable host memory to the device")
        result = func(*args, **kwargs)
        if to_host or to_device:
            result = result.clone()  # on the CPU it would be the same memory
        if to_host:
            self._memory.add_host(result)
        return result

    def _names_host(self, target: Any) -> bool:
        return target == "cpu" if isinstance(target, str) else self._is(target, on_host=True)

    def _names_device(self, target: Any) -> bool:
        if isinstance(target, str):
            return target != "cpu"
        return isinstance(target, torch.device) or self._is(target, on_host=False)

    def _is(self, target: Any, on_host: bool) -> bool:
        return isinstance(target, Tensor) and self._memory.is_host(target) is on_host


def _classes(args: Any, kwargs: Any) -> int:
    return int(args[1] if len(args) > 1 else kwargs.get("num_classes", -1))


def _on_device(device: Any) -> bool:
    """Whether a factory was told to make its tensor on the device, itself or by ``torch.set_default_device``.

    On the CPU both are the CPU: ``tensor.device`` is taken for the device, ``"cpu"`` in words for the host.
    """
    if device is None:
        device = _device.CURRENT_DEVICE
    return isinstance(device, torch.device) or (device is not None and device != "cpu")


_MASKABLE: Final = frozenset({aten.index.Tensor})
_MASKED_PUTS: Final = frozenset(
    {aten.index_put_.default, aten.index_put.default, aten._unsafe_index_put.default, aten._index_put_impl_.default}
)
_MASKED_FILLS: Final = frozenset({aten.masked_fill_.Tensor, aten.masked_fill.Tensor})
_READ_INSIDE: Final = frozenset(
    {
        *(aten.index_fill_.int_Tensor, aten.index_fill.int_Tensor),
        *(
            getattr(packet, name)
            for packet in (aten.linspace, aten.logspace)
            for name in packet.overloads()
            if name.startswith("Tensor") or name.endswith("Tensor")
        ),
    }
)
"""Operators that read a 0-d device tensor on the host: those that fill with it, or count between two."""
_COPIES_INSIDE: Final = frozenset({aten.histc.default})
"""Operators whose CUDA form copies from the host on its own."""
_NAMES: Final = {
    aten._local_scalar_dense.default: ".item()",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.repeat_interleave.Tensor: "repeat_interleave without output_size",
    aten.equal.default: "torch.equal",
}


def check_operator(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], host: Sequence[Tensor], memory: Memory, refuse: Refuse
) -> None:
    """Refuse the operator ``func`` where CUDA would. At least one of its tensors is on the device; ``host`` are those
    that are not. A 0-d host tensor is passed by value."""
    reason = _by_data(func, args, kwargs, memory) or _by_transfer(func, args, host, memory)
    if reason is not None:
        refuse(reason)


def _by_data(func: Any, args: Sequence[Any], kwargs: dict[str, Any], memory: Memory) -> str | None:
    """Why ``func`` needs the content of a tensor on the host, if it does."""
    name = _NAMES.get(func, str(func))
    if torch.Tag.data_dependent_output in func.tags:
        return f"{name} reads device data on the host"
    if func in _MASKABLE:
        masked = any(_is_mask(index) for index in args[1])
        return "indexing with a boolean mask: the shape of the result depends on data" if masked else None
    if func in _MASKED_FILLS and not memory.is_host(args[2]):
        return "masked_fill by a device tensor reads device data on the host"
    if func in _READ_INSIDE and any(not memory.is_host(it) for it in _numbers(func, args)):
        return f"{name} reads a 0-d device tensor on the host"
    if torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None:
        return f"{name}: the shape of the result depends on data"
    return None


def _by_transfer(func: Any, args: Sequence[Any], host: Sequence[Tensor], memory: Memory) -> str | None:
    """Why ``func`` copies between the host and the device, if it does."""
    name = _NAMES.get(func, str(func))
    if func in _MASKED_PUTS:
        masks = [index for index in args[1] if _is_mask(index)]
        by_value = args[2].numel() == 1 and memory.is_host(args[2])
        if masks and not (len(masks) == 1 and by_value):
            return "assigning through a boolean mask: the number of elements depends on data"
        if by_value and not masks:
            return "assigning a number through an index tensor copies it from pageable host memory to the device"
    if func in _COPIES_INSIDE:
        return f"{name} copies from pageable host memory to the device"
    if func.overloadpacket is aten.copy_:
        if memory.is_host(args[0]):
            return "copy_() into host memory waits for the device"
        return "copy_() copies from pageable host memory to the device" if host else None
    return f"{name} mixes a host tensor with device tensors" if any(it.dim() > 0 for it in host) else None


def _numbers(func: Any, args: Sequence[Any]) -> Sequence[Tensor]:
    """The tensors among the arguments of an operator of ``_READ_INSIDE`` that stand for numbers."""
    given = args[3:4] if func.overloadpacket in (aten.index_fill_, aten.index_fill) else args[:2]
    return [it for it in given if isinstance(it, Tensor)]


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def is_divisible(func: Any) -> bool:
    """Whether a mode sees the operator ``func`` as a whole although it may be made of others: it is not torch's own, or
    composite (reshape, contiguous, to) under ``torch.inference_mode``."""
    return not is_own(func) or (torch.is_inference_mode_enabled() and _is_composite(func))


def is_own(func: Any) -> bool:
    """Whether ``func`` is an operator of torch itself."""
    return func.namespace in ("aten", "prims", "prim")


def divided(func: Any, args: Any, kwargs: Any, key: torch._C.DispatchKey) -> Any:
    """The result of the divisible ``func``, run as the operators it is made of; inside a mode that mode sees them."""
    if is_own(func):
        return func.decompose(*args, **kwargs)
    return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)


@lru_cache(maxsize=1024)
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def fresh(outputs: Any, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors of ``outputs`` that lie in memory of their own; None in place of those that are inputs or views."""
    # By the storage and not by the tensor: an empty view lies in the memory of what it is a view of.
    taken = {it.untyped_storage().data_ptr() for it in inputs if it.untyped_storage().nbytes()}
    return [None if it.untyped_storage().data_ptr() in taken else it for it in tensors_in(outputs)]
