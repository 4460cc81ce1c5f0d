"""ParameterPager: which parameter's state is where, and the update of a unit by the inner optimizer.

The state tensors that the inner optimizer updates are views of the page-locked buffer: nothing is copied but state that
the optimizer has just made, once.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, overload

import torch

from .aio import trim_heap
from .errors import ConfigError, OffloadError, UnsupportedOptimizerError
from .inner import InnerOptimizer
from .state_file import WholeTensor
from .swap_manager import SwapManager
from .unit_file import check_storable
from .units import Chunking, Paging, ParameterPlan, Piece, StateTemplate, SwapUnit, plan_units

Key = tuple[int, int]
"""A parameter by its place: group, and position in the group. Frameworks replace parameters, but keep their places."""

ParameterState = Mapping[str, Any]
"""What an optimizer keeps in ``state[parameter]``."""


@dataclasses.dataclass(eq=False)
class Entry:
    """Where one parameter's state is: in the pieces of units or, when there is nothing to page, in ``resident``."""

    plan: ParameterPlan
    owner: weakref.ref[torch.Tensor]
    pieces: list[tuple[SwapUnit, Piece]] = dataclasses.field(default_factory=list)
    resident: dict[str, Any] | None = None

    @property
    def small_state(self) -> dict[str, Any] | None:
        """The state that stays in memory: the same in each piece. None: the parameter has no state yet."""
        return self.pieces[0][1].resident if self.pieces else self.resident


@dataclasses.dataclass
class _Chunk:
    """A run of a parameter's elements as the inner optimizer sees it: a parameter, and the views that are its state."""

    piece: Piece
    target: torch.Tensor
    views: dict[str, torch.Tensor]
    state: dict[str, Any]
    is_last: bool  # of its piece


class ParameterPager:
    """Plans units for parameters when they first need state, and updates them unit by unit."""

    def __init__(self, inner: InnerOptimizer, manager: SwapManager, host_memory: int, unit_size: int | None) -> None:
        self._inner = inner
        self._manager = manager
        self._host_memory = host_memory
        self._unit_size = unit_size
        self.entries: dict[Key, Entry] = {}
        self._brought: dict[Key, ParameterState] = {}  # state in memory that goes to the disk at the next step
        # For the time of a step: the groups as they were before it, and as the inner optimizer left them.
        self._groups: list[dict[str, Any]] = []
        self._groups_after: dict[int, dict[str, Any]] = {}
        # How often each group lists a parameter, by id: torch steps it that often.
        self._listed: list[Counter[int]] = []

    def step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Update every parameter that has a gradient; the same as the inner optimizer's step over ``groups``."""
        active = {key: p for key, p in self.parameters(groups).items() if p.grad is not None}
        for key, parameter in active.items():
            self._check_as_planned(groups, key, parameter)
        self.page_out_brought(groups)
        self.plan(groups, [key for key in active if key not in self.entries])
        self._groups = [dict(group) for group in groups]
        self._groups_after = {}
        self._listed = [Counter(map(id, group["params"])) for group in groups]
        try:
            self._update_unpaged([key for key in active if not self.entries[key].pieces], {key[0] for key in active})
            units = {unit: None for key in active if key in self.entries for unit, _ in self.entries[key].pieces}
            self._manager.walk(units, self._update)
        except BaseException as error:
            self._manager.fail(error)  # some parameters are updated, and others are not
            raise
        finally:
            self._groups = []
        for index, after in self._groups_after.items():
            for name, value in after.items():
                if groups[index].get(name) is not value:
                    groups[index][name] = value

    def bring(self, groups: Sequence[dict[str, Any]], states: Mapping[torch.Tensor, ParameterState]) -> None:
        """Take over state that the inner optimizer has in memory. It goes to the disk at the next step."""
        self._brought = {key: states[p] for key, p in parameters_of(groups).items() if states.get(p)}

    def parameters(self, groups: Sequence[Mapping[str, Any]]) -> dict[Key, torch.Tensor]:
        """Every parameter once, by its place. Raises OffloadError where one has changed its place."""
        parameters = parameters_of(groups)
        places = {id(owner): key for key, entry in self.entries.items() if (owner := entry.owner()) is not None}
        moved = [places[id(p)] for key, p in parameters.items() if places.get(id(p), key) != key]
        moved += [key for key in (*self.entries, *self._brought) if key not in parameters]
        for group, position in moved:
            entry = self.entries.get((group, position))
            name = entry.plan.name if entry else f"parameter {position} of group {group}"
            raise OffloadError(
                f"{name} has changed its place in the param_groups, by which its state is kept: groups and parameters "
                "may be added, but not removed or reordered"
            )
        return parameters

    def plan(self, groups: Sequence[dict[str, Any]], keys: Sequence[Key]) -> list[SwapUnit]:
        """Give the parameters at ``keys`` their place in new units, with the files for them. Returns the new units."""
        if not keys:
            return []
        plans = plan_parameters(self._inner, groups, keys)
        units = plan_units(plans, self._host_memory, self._unit_size, first_index=self._manager.next_index)
        self._manager.add(units)
        parameters = parameters_of(groups)
        self.entries.update((plan.key, Entry(plan, weakref.ref(parameters[plan.key]))) for plan in plans)
        self._add_pieces(units)
        return units

    def _add_pieces(self, units: Sequence[SwapUnit]) -> None:
        for unit in units:
            for piece in unit.pieces:
                self.entries[piece.key].pieces.append((unit, piece))

    def page_out_brought(self, groups: Sequence[dict[str, Any]]) -> None:
        """Store the state that was brought along: that of parameters which have none here yet."""
        if not self._brought:
            return
        keyed = self._brought
        units = self.plan(groups, list(keyed))

        def fill(unit: SwapUnit, data: torch.Tensor) -> None:
            for piece in unit.pieces:
                plan, state = self.entries[piece.key].plan, keyed[piece.key]
                for tensor in piece.tensors:
                    source = torch.as_tensor(state[tensor.name]).detach()
                    if not piece.is_whole:
                        source = _in_memory_order(source, plan.shape, plan.stride)[piece.start : piece.stop]
                    tensor.view(data).copy_(source)
                piece.resident = resident_from(plan.template, state)

        self._manager.walk(units, fill)
        for key, state in keyed.items():
            if not self.entries[key].pieces:
                self.entries[key].resident = resident_from(self.entries[key].plan.template, state)
        self._brought = {}

    def replace_all(self, groups: Sequence[dict[str, Any]], states: Mapping[torch.Tensor, ParameterState]) -> None:
        """Drop all state, on disk and in memory, and store the given one."""
        try:
            self.entries.clear()
            self._manager.forget_all()
            self.bring(groups, states)
            self.page_out_brought(groups)
        except BaseException as error:
            self._manager.fail(error)  # there is neither the old state nor the new one
            raise

    def adopt(self, groups: Sequence[Mapping[str, Any]], states: Mapping[Key, Any], units: Sequence[SwapUnit]) -> None:
        """Drop all state in memory and take up that of ``units``, which the store has.

        ``states`` gives each parameter's plan, and its state where there is nothing to page of it.
        """
        parameters = parameters_of(groups)
        self.entries = {
            key: Entry(plan, weakref.ref(parameters[key]), resident=resident)
            for key, (plan, resident) in states.items()
        }
        self._brought = {}
        self._add_pieces(units)

    def stored_keys(self) -> list[Key]:
        """The parameters that have their place in the store, by their place in the groups."""
        return sorted(key for key, entry in self.entries.items() if entry.small_state is not None)

    def units(self) -> list[SwapUnit]:
        """The units of all parameters."""
        units = {unit: None for key in self.stored_keys() for unit, _ in self.entries[key].pieces}
        return sorted(units, key=lambda unit: unit.index)

    def keys_with_state(self) -> Iterator[Key]:
        """The parameters that the optimizer has made state for."""
        self._manager.check()
        kept = {key for key, entry in self.entries.items() if entry.small_state is not None}
        return iter(sorted(kept | set(self._brought)))

    def names(self, key: Key) -> list[str]:
        """The names of a parameter's state, in the inner optimizer's order. Empty when it has none."""
        if key in self._brought:
            return list(self._brought[key])
        entry = self.entries.get(key)
        if entry is None or entry.small_state is None:
            return []
        paged = [tensor.name for tensor in entry.plan.template.paged]
        known = [name for name in entry.plan.template.names if name in paged or name in entry.small_state]
        return known + [name for name in entry.small_state if name not in known]

    def read(self, key: Key, name: str) -> Any:
        """A copy of one value of a parameter's state. Tensors of paged state come from the disk, and are on the CPU."""
        if key in self._brought:
            return _copy(self._brought[key][name])
        entry = self.entries[key]
        if entry.small_state is not None and name in entry.small_state:
            return _copy(entry.small_state[name])
        plan = entry.plan
        spec = next(tensor for tensor in plan.whole_tensors() if tensor.name == name)
        result = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype)
        flat = result.as_strided((spec.numel,), (1,))
        for unit, piece in entry.pieces:
            tensor = next(tensor for tensor in piece.tensors if tensor.name == name)
            part = flat if piece.is_whole else flat[piece.start : piece.stop]
            self._manager.read_tensor(unit, tensor, part)
        return result

    def whole_tensors(self) -> dict[Key, list[WholeTensor]]:
        """The paged state of every parameter, as what it is when put together."""
        return {
            key: [WholeTensor(f"{entry.plan.name}.{t.name}", t, entry.pieces) for t in entry.plan.whole_tensors()]
            for key, entry in self.entries.items()
            if entry.pieces and entry.small_state is not None
        }

    def mapped(self) -> dict[Key, dict[str, Any]]:
        """All state, by parameter and name. Paged tensors are mapped from a file of their own; see ``map_state``."""
        keys = list(self.keys_with_state())
        wholes = {key: tensors for key, tensors in self.whole_tensors().items() if key not in self._brought}
        flat_list = [whole for tensors in wholes.values() for whole in tensors]
        mapped = iter(self._manager.map_state(flat_list))
        paged = {(key, whole.spec.name): next(mapped) for key, tensors in wholes.items() for whole in tensors}
        return {
            key: {name: paged[key, name] if (key, name) in paged else self.read(key, name) for name in self.names(key)}
            for key in keys
        }

    # The update.

    def _update(self, unit: SwapUnit, data: torch.Tensor) -> None:
        """Visit of the step: update the parameters of a resident unit."""
        on_cpu = unit.device.type == "cpu"
        work = data if on_cpu else data[: unit.nbytes].to(unit.device)
        batch: list[_Chunk] = []
        elements = 0
        for chunk in self._chunks(unit, work):
            batch.append(chunk)
            elements += chunk.target.numel()
            if elements >= self._inner.batch_elements(unit.device):
                self._update_batch(batch)
                batch, elements = [], 0
        self._update_batch(batch)
        if not on_cpu:
            data[: unit.nbytes].copy_(work)  # waits for the device
        if unit.is_blank:
            # The optimizer made its state in memory of its own, and small tensors that stay among it: without this,
            # what it freed between them adds up to the size of the whole state (measured with glibc).
            trim_heap()

    def _chunks(self, unit: SwapUnit, data: torch.Tensor) -> Iterator[_Chunk]:
        for piece in unit.pieces:
            parameter = self._parameter(piece.key)
            if parameter.grad is None:
                continue
            small = piece.resident  # the value before this step, for every chunk of the piece
            if not piece.is_whole:
                elements, gradient = flat(parameter), _flat_gradient(parameter)
            for begin, end in pairwise(piece.cuts):
                if piece.is_whole:
                    target = parameter
                else:
                    target = elements[begin:end]
                    target.grad = gradient[begin:end]
                views = piece.chunk_views(data, begin, end)
                state: dict[str, Any] = {}
                if small is not None:
                    state.update(small if len(piece.cuts) == 2 else {name: _copy(v) for name, v in small.items()})
                    state.update(views)
                yield _Chunk(piece, target, views, state, is_last=end == piece.stop)

    def _update_batch(self, batch: list[_Chunk]) -> None:
        if not batch:
            return
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        targets: dict[int, list[torch.Tensor]] = defaultdict(list)
        for chunk in batch:
            group = chunk.piece.key[0]
            state[chunk.target] = chunk.state
            targets[group].extend([chunk.target] * self._listed[group][id(self._parameter(chunk.piece.key))])
        self._step_inner(targets, state)
        for chunk in batch:
            self._adopt(chunk, state[chunk.target])

    def _update_unpaged(self, keys: Sequence[Key], busy_groups: set[int]) -> None:
        """Update parameters whose state has nothing to page: zero-size ones, or an optimizer that keeps none.

        Groups without any gradient come along with no parameters, for what a step may do to the groups themselves.
        """
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        targets: dict[int, list[torch.Tensor]] = defaultdict(list)
        targets.update((index, []) for index in range(len(self._groups)) if index not in busy_groups)
        if not keys and not targets:
            return
        for key in keys:
            parameter = self._parameter(key)
            resident = self.entries[key].resident
            if resident is not None:
                state[parameter] = resident
            targets[key[0]].extend([parameter] * self._listed[key[0]][id(parameter)])
        self._step_inner(targets, state)
        for key in keys:
            parameter = self._parameter(key)
            if parameter not in state:
                continue
            if any(map(_is_large, state[parameter].values())):  # SGD whose momentum was turned on, for example
                self._brought[key] = state[parameter]
                del self.entries[key]
            else:
                self.entries[key].resident = dict(state[parameter])

    def _step_inner(self, targets: Mapping[int, list[torch.Tensor]], state: defaultdict[Any, dict[str, Any]]) -> None:
        lent = {index: {**self._groups[index], "params": params} for index, params in sorted(targets.items())}
        self._inner.step_on(list(lent.values()), state)
        for index, group in lent.items():  # without the parameters: their gradients would outlive zero_grad()
            self._groups_after[index] = {name: value for name, value in group.items() if name != "params"}

    def _adopt(self, chunk: _Chunk, state: dict[str, Any]) -> None:
        """Take over what the inner optimizer left as a chunk's state."""
        small: dict[str, Any] = {}
        for name, value in state.items():
            if name not in chunk.views:
                if _is_large(value):
                    raise OffloadError(
                        f"{self._inner.name} made a new state tensor {name!r} for {chunk.piece.name}, which it did not "
                        "keep when the parameter's place was planned: the options that decide it must stay as they were"
                    )
                small[name] = value
            elif value is not chunk.views[name]:
                chunk.views[name].copy_(value)
        if chunk.is_last:
            chunk.piece.resident = _updated(chunk.piece.resident or {}, small)

    def _check_as_planned(self, groups: Sequence[dict[str, Any]], key: Key, parameter: torch.Tensor) -> None:
        """Raise unless the parameter, and its gradient, are such as its state was laid out for."""
        assert parameter.grad is not None
        if parameter.grad.layout is not torch.strided:
            raise UnsupportedOptimizerError(f"{name_of(groups, key)} has a sparse gradient: its state cannot be paged")
        if key not in self.entries:
            return
        plan = self.entries[key].plan
        now = (tuple(parameter.shape), tuple(parameter.stride()), parameter.dtype, parameter.device)
        planned = (plan.shape, plan.stride, plan.dtype, plan.device)
        if now != planned:
            raise OffloadError(
                f"{plan.name} is not what its state was laid out for any more: shape, stride, dtype and device were "
                f"{planned} and are {now}. load_state_dict(state_dict()) lays the state out anew"
            )

    def _parameter(self, key: Key) -> torch.Tensor:
        parameter = self._groups[key[0]]["params"][key[1]]
        assert isinstance(parameter, torch.Tensor)
        return parameter


def parameters_of(groups: Sequence[Mapping[str, Any]]) -> dict[Key, torch.Tensor]:
    """Every parameter once, by its (first) place."""
    places: dict[torch.Tensor, Key] = {}
    for g, group in enumerate(groups):
        for i, parameter in enumerate(group["params"]):
            places.setdefault(parameter, (g, i))
    return {key: parameter for parameter, key in places.items()}


def plan_parameters(
    inner: InnerOptimizer, groups: Sequence[Mapping[str, Any]], keys: Sequence[Key]
) -> list[ParameterPlan]:
    """What there is to page of the parameters at ``keys``. Zero-size ones have no paged state."""
    found: dict[Any, StateTemplate] = {}
    plans = []
    for key in keys:
        group = groups[key[0]]
        parameter = group["params"][key[1]]
        if hasattr(parameter, "_local_tensor"):
            raise UnsupportedOptimizerError(
                f"{name_of(groups, key)} is a DTensor: sharded parameters cannot be paged yet"
            )
        kind = (key[0], parameter.dtype, parameter.device, inner.shape_matters(parameter))
        if kind not in found:
            found[kind] = inner.template_for(group, parameter)
            for tensor in found[kind].paged:
                check_storable(tensor)
        template = found[kind]
        if parameter.numel() == 0:
            template = dataclasses.replace(template, paged=())
        device = parameter.device
        chunking: Chunking = inner.chunking_for(group, device)
        shape, stride = tuple(parameter.shape), tuple(parameter.stride())
        plans.append(
            ParameterPlan(key, name_of(groups, key), shape, stride, parameter.dtype, template, device, chunking)
        )
    return plans


def plan_states(
    inner: InnerOptimizer, groups: Sequence[Mapping[str, Any]], states: Mapping[torch.Tensor, ParameterState]
) -> list[ParameterPlan]:
    """Plans for given states. Raises ConfigError unless ``inner`` keeps such states with the options of ``groups``."""
    places = {key: p for key, p in parameters_of(groups).items() if p in states}
    plans = plan_parameters(inner, groups, list(places))
    for plan in plans:
        _check_complete(plan, states[places[plan.key]])
    return plans


def name_of(groups: Sequence[Mapping[str, Any]], key: Key) -> str:
    """A parameter's name where the optimizer was given names, or else its number, counted as state_dict() does."""
    names = groups[key[0]].get("param_names")
    if names:
        return str(names[key[1]])
    return f"param_{sum(len(group['params']) for group in groups[: key[0]]) + key[1]}"


def flat(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's elements in the order of its memory."""
    detached = parameter.detach()
    return detached.as_strided((detached.numel(),), (1,), detached.storage_offset())


def _flat_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient's elements in the order of the parameter's memory; a copy where it is laid out otherwise."""
    assert parameter.grad is not None
    return _in_memory_order(parameter.grad.detach(), parameter.shape, parameter.stride())


def _in_memory_order(tensor: torch.Tensor, shape: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    tensor = tensor.reshape(shape)
    if tensor.stride() != tuple(stride):
        tensor = torch.empty_strided(tuple(shape), tuple(stride), dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _is_large(value: Any) -> bool:
    """Whether a value of an optimizer's state is to be paged: a tensor with dimensions and elements."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _updated(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new``, in the tensors of ``old`` where they fit: small tensors that outlive a step would break up the heap."""
    for name, value in new.items():
        kept = old.get(name)
        if not (isinstance(kept, torch.Tensor) and isinstance(value, torch.Tensor)) or kept is value:
            continue
        if (kept.shape, kept.dtype, kept.device) == (value.shape, value.dtype, value.device):
            new[name] = kept.copy_(value)
    return new


def _check_complete(plan: ParameterPlan, state: ParameterState) -> None:
    """Raise ConfigError unless ``state`` has just the paged tensors that the plan has, in the right shapes."""
    for tensor in plan.template.paged:
        value = state.get(tensor.name)
        shape = plan.shape if plan.template.paging is Paging.ELEMENTWISE else tensor.shape
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise ConfigError(f"the state of {plan.name} should have {tensor.name!r} of shape {shape}, but has {what}")
    paged = {tensor.name for tensor in plan.template.paged}
    for name, value in state.items():
        if name not in paged and _is_large(value):
            raise ConfigError(f"the state of {plan.name} has a tensor {name!r}, which the optimizer does not keep")


@overload
def resident_from(template: StateTemplate, state: None) -> None: ...
@overload
def resident_from(template: StateTemplate, state: ParameterState) -> dict[str, Any]: ...
def resident_from(template: StateTemplate, state: ParameterState | None) -> dict[str, Any] | None:
    """The small part of a given state, in the dtypes and on the devices that the optimizer itself uses."""
    if state is None:
        return None
    paged = {tensor.name for tensor in template.paged}
    resident = {}
    for name, value in state.items():
        if name in paged:
            continue
        example = template.resident.get(name)
        if isinstance(example, torch.Tensor):
            value = torch.as_tensor(value).detach().to(dtype=example.dtype, device=example.device, copy=True)
        resident[name] = _copy(value)
    return resident
