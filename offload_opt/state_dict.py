"""The optimizer's ``state``, read from the store when it is looked at, and the way into ``load_state_dict``."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import OffloadError
from .manifest import DTYPES, encode_value
from .pager import ParameterPager
from .swap_manager import SwapManager
from .update import Key


class PagedParameterState:
    """What ``state[parameter]`` gives: reads like a dict. A tensor is read from the disk each time it is looked at.

    Values are copies, on the CPU: to change state, use ``load_state_dict``. It is not a ``Mapping`` by type, so that
    code that walks the state to move it to a device (Lightning) passes it by instead of loading all of it.
    """

    def __init__(self, pager: ParameterPager, key: Key, renew: Callable[[Key], None]) -> None:
        self._pager = pager
        self._key = key
        self._renew = renew

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        with self._pager.alone(f"state[...][{name!r}]", reads=True):
            self._renew(self._key)
            return self._pager.read(self._key, name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that name, or ``default``."""
        if name not in self:
            return default
        return self[name]

    def keys(self) -> list[str]:
        """The names, in the optimizer's order."""
        return self._pager.names(self._key)

    def values(self) -> Iterator[Any]:
        """The values, each read when it is reached."""
        return (self[name] for name in self.keys())

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and values, each read when it is reached."""
        return ((name, self[name]) for name in self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("the state lies in the store: change it with load_state_dict()")

    def __repr__(self) -> str:
        return f"<paged state: {', '.join(self.keys()) or 'none yet'}>"


class PagedState(Mapping[torch.Tensor, PagedParameterState]):
    """The optimizer's ``state``: parameters and, for each, what the optimizer keeps for it. Iterating loads nothing."""

    def __init__(self, pager: ParameterPager, owner: weakref.ref[torch.optim.Optimizer]) -> None:
        self._pager = pager
        self._owner = owner

    def __getitem__(self, parameter: torch.Tensor) -> PagedParameterState:
        self._pager.check_alone("state[...]")
        for key, other in self._parameters().items():
            if other is parameter:
                return PagedParameterState(self._pager, key, self._renew)
        raise KeyError("not a parameter of this optimizer")

    def __setitem__(self, parameter: torch.Tensor, value: Any) -> None:
        if not isinstance(value, PagedParameterState):  # what it holds already may be put back
            raise TypeError("the state lies in the store: change it with load_state_dict()")

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (parameter for parameter, _ in self._pairs())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, parameter: object) -> bool:
        return any(parameter is other for other in self)

    def items(self) -> list[tuple[torch.Tensor, PagedParameterState]]:  # type: ignore[override]
        """Parameters, and what reads their state."""
        return list(self._pairs())

    def values(self) -> list[PagedParameterState]:  # type: ignore[override]
        """What reads each parameter's state."""
        return [state for _, state in self._pairs()]

    def load(self) -> dict[torch.Tensor, dict[str, Any]]:
        """All of it: large tensors are mapped from a file, see ``state_file``; the others are in memory."""
        parameters = self._parameters()
        return {parameters[key]: state for key, state in self._pager.mapped().items()}

    def _groups(self) -> list[dict[str, Any]]:
        owner = self._owner()
        if owner is None:
            raise OffloadError("the OffloadOptimizer that this state belonged to is gone, and its state with it")
        return owner.param_groups

    def _parameters(self) -> dict[Key, torch.Tensor]:
        return self._pager.parameters(self._groups())

    def _renew(self, key: Key) -> None:
        self._pager.renew(self._groups(), key)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, PagedParameterState]]:
        self._pager.check_alone("state[...]")
        parameters = self._parameters()
        for key in self._pager.keys_with_state():
            yield parameters[key], PagedParameterState(self._pager, key, self._renew)


def export_state(
    path: Path, pager: ParameterPager, manager: SwapManager, optimizer: str, groups: Sequence[dict[str, Any]]
) -> None:
    """Write all state to one safetensors file; see ``OffloadOptimizer.export_safetensors``."""
    pager.parameters(groups)  # as they are now
    pager.page_out_brought(groups)
    keys = pager.stored_keys()
    names = _unique_names({key: pager.entries[key].plan.name for key in keys})
    wholes = [
        whole._replace(label=f"{names[key]}.{whole.spec.name}")
        for key, tensors_of_key in pager.whole_tensors().items()
        for whole in tensors_of_key
    ]
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for key in keys:
        for name, value in (pager.entries[key].small_state or {}).items():
            label = f"{names[key]}.{name}"
            if isinstance(value, torch.Tensor) and value.dtype in DTYPES:
                tensors[label] = value
            else:
                values[label] = encode_value(value, label)
    options = [
        {name: encode_value(value, name) for name, value in group.items() if name != "params"} for group in groups
    ]
    metadata = {
        "format": "pt",
        "optimizer": optimizer,
        "param_groups": json.dumps(options),
        "state": json.dumps(values),
    }
    manager.export(path, wholes, tensors, metadata)


def _unique_names(names: Mapping[Key, str]) -> dict[Key, str]:
    """The names; with the group's number where parameters of two groups have the same one."""
    count = Counter(names.values())
    return {key: name if count[name] == 1 else f"{name}#{key[0]}" for key, name in names.items()}


class Unconverted:
    """A parameter's state on its way through torch's ``load_state_dict``, which converts every tensor it recognises.

    Torch would cast moments to the parameter's dtype and move them to its device; this it passes on as it is.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state


def hide_from_conversion(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A ``load_state_dict`` pre-hook: wraps each parameter's state in Unconverted."""
    hidden = {
        key: Unconverted(state) if isinstance(state, Mapping) else state for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": hidden}
