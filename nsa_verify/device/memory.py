"""Whose memory a captured region uses: the rig's, the host's, the graph's own, or somebody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nsa_verify.core.findings import Code
from nsa_verify.device.stops import CaptureRefused


class Kind(Enum):
    """Whose memory a tensor lies in."""

    STATIC = "static"
    """The arena and ``req_to_token``: they outlive every graph."""
    HOST = "host"
    OWN = "own"
    """Allocated while the region was captured; it belongs to the graph."""
    OTHER = "other"
    """Allocated earlier by the implementation; the graph knows its address and does not keep it alive."""


class Other(NamedTuple):
    """Memory that the graph uses and does not own: where it lay, and the line of the implementation that used it
    first."""

    storage: StorageWeakRef
    address: int
    line: str


def _stretch(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """A key for the memory of ``tensor``; while it is held no other memory can have the same."""
    return StorageWeakRef(tensor.untyped_storage())


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)
    elif isinstance(getattr(values, "base", None), Tensor):
        yield values.base  # Triton's views of a tensor: reinterpreted, or with a descriptor


_HOST: set[StorageWeakRef] = set()
"""The host memory that this process has seen made and that is still there: an implementation may have cached it."""
PRUNE_BEYOND: Final = 1024


class Memory:
    """What is known of the memory that one captured region uses.

    ``host`` are the tensors in host memory; with ``on_cuda`` a tensor's own device says so.
    """

    def __init__(self, static: Iterable[Tensor], host: Iterable[Tensor] = (), on_cuda: bool = False) -> None:
        self._on_cuda = on_cuda
        self._static = [_stretch(tensor) for tensor in static]
        if len(_HOST) > PRUNE_BEYOND:
            _HOST.difference_update([storage for storage in _HOST if storage.expired()])
        self.add_host(list(host))
        self._own: set[StorageWeakRef] = set()
        self.others: dict[StorageWeakRef, Other] = {}

    def kind(self, tensor: Tensor) -> Kind:
        """Whose memory ``tensor`` lies in; what nobody spoke of is somebody else's.

        The rig's is told by its address: it may come back under another storage, through DLPack or NumPy.
        """
        address = tensor.untyped_storage().data_ptr()
        if any(start <= address < end for start, end in self._static):
            return Kind.STATIC
        storage = storage_of(tensor)
        if storage in self._own:
            return Kind.OWN
        if storage in _HOST or (self._on_cuda and not tensor.is_cuda):
            return Kind.HOST
        return Kind.OTHER

    def is_host(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in host memory."""
        return self.kind(tensor) is Kind.HOST

    def add_host(self, values: Any) -> None:
        """Take the tensors among ``values`` for host memory."""
        _HOST.update(storage_of(tensor) for tensor in tensors_in(values))

    def add_own(self, tensor: Tensor) -> None:
        """Take ``tensor`` for the graph's own."""
        self._own.add(storage_of(tensor))

    def use(self, tensors: Sequence[Tensor], line: Callable[[], str]) -> None:
        """Note that the region uses ``tensors`` at ``line()``, which costs something to find out."""
        for tensor in tensors:
            if self.kind(tensor) is Kind.OTHER and tensor.numel():
                storage = storage_of(tensor)
                if storage not in self.others:
                    self.others[storage] = Other(storage, tensor.untyped_storage().data_ptr(), line())

    def refuse_freed(self) -> None:
        """Raise ``CaptureRefused`` if memory that the graph uses has been given back."""
        for other in self.others.values():
            storage = revived(other.storage)
            if storage is None or storage.data_ptr() != other.address:
                raise CaptureRefused(
                    Code.MOVED,
                    f"the graph uses memory that was freed after the capture; it was captured at {other.line}",
                )


def revived(storage: StorageWeakRef) -> torch.UntypedStorage | None:
    """The storage itself while somebody keeps it alive."""
    found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    return found
