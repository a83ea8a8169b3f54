"""What an implementation's file keeps between calls, put back to what it was before the first.

Caches and workspaces at module level outlive a case. An engine captures its graphs once, in a process of its own; a
search captures them again and again, and what one capture left must not decide about the next.
"""

from __future__ import annotations

from collections import deque
from types import NoneType
from typing import Any

import torch

from nsa_verify.core.implementation import Implementation

_CONTAINERS = (dict, list, set, deque)
_PLAIN = (*_CONTAINERS, int, float, str, tuple, NoneType)
_OURS = ("nsa_verify_impl_", "nsa_verify.kernels.")
"""What the registry imports as files of implementations; what else holds one is somebody else's module."""


class ModuleState:
    """The variables of one module, the content of its containers, and the attributes of objects of its own classes."""

    def __init__(self, variables: dict[str, Any]) -> None:
        self._variables = variables
        self._before = self._named()
        self._contents = [(it, it.copy()) for it in self._containers()]

    def _named(self) -> dict[str, Any]:
        return {name: it for name, it in self._variables.items() if not name.startswith("__")}

    def _containers(self) -> list[Any]:
        found = []
        for it in self._named().values():
            own = getattr(type(it), "__module__", None) == self._variables.get("__name__")
            content = vars(it) if own and hasattr(it, "__dict__") else it
            if isinstance(content, _CONTAINERS):
                found.append(content)
        return found

    def restore(self) -> None:
        """Put everything back. Data that came since is dropped; what else came, Triton's interpreter put there."""
        for name in self._named().keys() - self._before.keys():
            if isinstance(self._variables[name], (*_CONTAINERS, torch.Tensor, int, float, str, tuple, NoneType)):
                del self._variables[name]
        self._variables.update(self._before)
        for it, content in self._contents:
            it.clear()
            (it.extend if isinstance(it, (list, deque)) else it.update)(content)

    def numbers(self) -> object:
        """What is kept now, less the tensors: equal for as long as nothing else of it has changed.

        Tensors are left out because a graph that uses one is known by the memory that it uses.
        """
        variables = {name: _plain(it) for name, it in self._named().items() if isinstance(it, _PLAIN)}
        return variables, [_plain(it) for it in self._containers()]

    def held(self) -> object:
        """What is kept now; whoever holds this keeps it alive."""
        return self._named(), [it.copy() for it in self._containers()]


def _plain(value: Any) -> Any:
    """A copy of ``value`` without tensors; what is neither data nor a container stands for itself."""
    if isinstance(value, dict):
        return {name: _plain(it) for name, it in value.items() if not isinstance(it, torch.Tensor)}
    if isinstance(value, set):
        return {it for it in value if not isinstance(it, torch.Tensor)}
    if isinstance(value, (list, tuple, deque)):
        return [_plain(it) for it in value if not isinstance(it, torch.Tensor)]
    return value


_states: dict[int, ModuleState] = {}
"""By the identity of a module's variables, which a state keeps alive."""


def state_of(implementation: Implementation) -> ModuleState:
    """What the file of ``implementation`` keeps at module level, first asked for before its first call.

    What lies in closures, in other modules, and in modules that were not given as a file, is left as it is.
    """
    ours = str(getattr(implementation.refresh, "__module__", "")).startswith(_OURS)
    variables = getattr(implementation.refresh, "__globals__", {}) if ours else {}
    if not variables:
        return ModuleState({})
    found = _states.get(id(variables))
    if found is None:
        found = _states[id(variables)] = ModuleState(variables)
    return found
