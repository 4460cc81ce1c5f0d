"""ParameterPager: which parameter's state is where, and the update of a unit by the inner optimizer.

The state tensors that the inner optimizer updates are views of the page-locked buffer: nothing is copied but state that
the optimizer has just made, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .checksums import Checksum
from .codecs import MASTER, REMAINDER
from .coding import coding_of, decode_run, encode_run, flat, in_memory_order
from .config import OffloadConfig
from .errors import ConfigError, OffloadError, UnsupportedOptimizerError
from .inner import InnerOptimizer
from .state_file import WholeTensor
from .swap_manager import SwapManager
from .unit_file import check_storable
from .units import (
    LARGEST_PIECE,
    Chunking,
    Paging,
    ParameterPlan,
    Piece,
    StateTemplate,
    StateTensor,
    SwapUnit,
    is_dense,
    plan_units,
    row_major,
)
from .update import Key, Scratch, UnitUpdate, copy_value, is_large

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Parameters that may have an fp32 master."""

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


class ParameterPager:
    """Plans units for parameters when they first need state, and updates them unit by unit."""

    def __init__(self, inner: InnerOptimizer, manager: SwapManager, config: OffloadConfig) -> None:
        self._inner = inner
        self._manager = manager
        self._config = config
        self._scratch = Scratch()
        self.entries: dict[Key, Entry] = {}
        self.epoch = 0
        """Steps that the state has been through, over all runs. By it stored values are rounded."""
        self._brought: dict[Key, ParameterState] = {}  # state in memory that goes to the store at the next step
        self._under_way = ""

    @contextlib.contextmanager
    def alone(self, call: str) -> Iterator[None]:
        """``call`` is under way: no other may begin before it has ended.

        A signal handler runs between any two steps of what it interrupts, and another thread beside it: what they found
        half done would be handed out, or committed.
        """
        self.check_alone(call)
        try:
            self._under_way = call
            yield
        finally:
            self._under_way = ""

    def check_alone(self, call: str) -> None:
        """Raise OffloadError where another call is under way."""
        if self._under_way:
            raise OffloadError(
                f"{call} was called in the middle of {self._under_way}, by a signal handler or another thread: set a "
                f"flag there, and look at it when {self._under_way} has returned"
            )

    def step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Update every parameter that has a gradient; the same as the inner optimizer's step over ``groups``."""
        active = {key: p for key, p in self.parameters(groups).items() if p.grad is not None}
        for key, parameter in active.items():
            self._check_as_planned(groups, key, parameter)
        self.page_out_brought(groups)
        self.plan(groups, [key for key in active if key not in self.entries])
        update = UnitUpdate(self._inner, groups, self.epoch, self._scratch)
        with self._manager.failing():  # some parameters are updated, and others are not
            unpaged = {key: self.entries[key].resident for key in active if not self.entries[key].pieces}
            with_master = {key for key in unpaged if MASTER in self.entries[key].plan.template.names}
            for key, state in update.update_unpaged(unpaged, with_master, {key[0] for key in active}).items():
                if any(map(is_large, state.values())):  # SGD whose momentum was turned on, for example
                    self._brought[key] = state
                    del self.entries[key]
                else:
                    self.entries[key].resident = dict(state)
            units = {unit: None for key in active if key in self.entries for unit, _ in self.entries[key].pieces}
            self._manager.walk(units, update.update)
            update.finish(groups)
            self.epoch += 1

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
        for key, entry in self.entries.items():
            entry.owner = weakref.ref(parameters[key])
        return parameters

    def plan(self, groups: Sequence[dict[str, Any]], keys: Sequence[Key]) -> list[SwapUnit]:
        """Give the parameters at ``keys`` their place in new units, with the files for them. Returns the new units."""
        if not keys:
            return []
        plans = plan_parameters(self._inner, groups, keys, self._config)
        units = plan_units(plans, *self._config.memory, first_index=self._manager.next_index)
        parameters = parameters_of(groups)
        new = {plan.key: Entry(plan, weakref.ref(parameters[plan.key])) for plan in plans}
        _add_pieces(new, units)
        self._manager.add(units)
        self.entries.update(new)  # at once: an interrupt must not leave some of the pieces out
        return units

    def page_out_brought(self, groups: Sequence[dict[str, Any]]) -> None:
        """Store the state that was brought along: that of parameters which have none here yet.

        A master that is among it sets its parameter; one that is missing is made of its parameter.
        """
        if not self._brought:
            return
        keyed = self._brought
        units = self.plan(groups, list(keyed))
        parameters = parameters_of(groups)

        def fill(unit: SwapUnit, data: torch.Tensor, _: Checksum | None) -> None:
            for piece in unit.pieces:
                for tensor in piece.tensors:
                    _fill(piece, tensor, keyed[piece.key], parameters[piece.key], data, self.epoch)
                piece.resident = resident_from(self.entries[piece.key].plan, keyed[piece.key])

        self._manager.walk(units, fill)
        for key, state in keyed.items():
            if not self.entries[key].pieces:
                self.entries[key].resident = resident_from(self.entries[key].plan, state)
        self._brought = {}

    def replace_all(self, groups: Sequence[dict[str, Any]], states: Mapping[torch.Tensor, ParameterState]) -> None:
        """Drop all state, in the store and in memory, and store the given one."""
        with self._manager.failing():  # there is neither the old state nor the new one
            self.entries.clear()
            self._manager.forget_all()
            self.bring(groups, states)
            self.page_out_brought(groups)

    def adopt(self, groups: Sequence[Mapping[str, Any]], states: Mapping[Key, Any], units: Sequence[SwapUnit]) -> None:
        """Drop all state in memory and take up that of ``units``, which the store has.

        ``states`` gives each parameter's plan, and its state where there is nothing to page of it.
        """
        parameters = parameters_of(groups)
        entries = {
            key: Entry(plan, weakref.ref(parameters[key]), resident=resident)
            for key, (plan, resident) in states.items()
        }
        _add_pieces(entries, units)
        self.entries, self._brought = entries, {}

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
            return copy_value(self._brought[key][name])
        entry = self.entries[key]
        if entry.small_state is not None and name in entry.small_state:
            return copy_value(entry.small_state[name])
        whole = next(
            whole for whole in whole_tensors(entry.plan, entry.pieces, entry.owner()) if whole.spec.name == name
        )
        result = torch.empty_strided(whole.spec.shape, whole.spec.stride, dtype=whole.spec.dtype, device="cpu")
        for unit, piece in entry.pieces:
            tensor = next(tensor for tensor in piece.tensors if tensor.name == name)
            run = slice(None) if piece.is_whole else slice(piece.start, piece.stop)
            weight = None if whole.weight is None else whole.weight[run]
            stored = [torch.empty(each.numel, dtype=each.dtype, device="cpu") for each in tensor.stored]
            for each, into in zip(tensor.stored, stored, strict=True):
                self._manager.read_tensor(unit, each, into)
            decode_run(piece, tensor, stored, piece.start, weight, flat(result)[run])
        return result

    def whole_tensors(self) -> dict[Key, list[WholeTensor]]:
        """The paged state of every parameter, as what it is when put together."""
        return {
            key: whole_tensors(entry.plan, entry.pieces, entry.owner())
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

    # Helpers.

    def _check_as_planned(self, groups: Sequence[dict[str, Any]], key: Key, parameter: torch.Tensor) -> None:
        """Raise unless the parameter, and its gradient, are such as its state was laid out for."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            raise UnsupportedOptimizerError(f"{name_of(groups, key)} has a sparse gradient: its state cannot be paged")
        if gradient.shape != parameter.shape or gradient.device != parameter.device:
            raise OffloadError(
                f"{name_of(groups, key)} has shape {tuple(parameter.shape)} on {parameter.device}, but its gradient "
                f"{tuple(gradient.shape)} on {gradient.device}: it was changed after backward(), which must come again"
            )
        for what, tensor in (("", parameter), ("the gradient of ", gradient)):
            if not _has_memory(tensor):
                raise OffloadError(
                    f"{what}{name_of(groups, key)} has no memory of its own: it was released before the step, or it is "
                    "of a class that keeps its elements elsewhere"
                )
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


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie in its storage: frameworks release that, and keep the tensor.

    Tensors that stand for others, or for zeros, have a storage without memory.
    """
    if tensor.numel() == 0:
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.data_ptr() != 0 and end <= tensor.untyped_storage().nbytes()


def _add_pieces(entries: Mapping[Key, Entry], units: Sequence[SwapUnit]) -> None:
    for unit in units:
        for piece in unit.pieces:
            entries[piece.key].pieces.append((unit, piece))


def parameters_of(groups: Sequence[Mapping[str, Any]]) -> dict[Key, torch.Tensor]:
    """Every parameter once, by its (first) place."""
    places: dict[torch.Tensor, Key] = {}
    for g, group in enumerate(groups):
        for i, parameter in enumerate(group["params"]):
            places.setdefault(parameter, (g, i))
    return {key: parameter for parameter, key in places.items()}


def plan_parameters(
    inner: InnerOptimizer, groups: Sequence[Mapping[str, Any]], keys: Sequence[Key], config: OffloadConfig
) -> list[ParameterPlan]:
    """What there is to page of the parameters at ``keys``. Zero-size ones have no paged state.

    Raises UnsupportedOptimizerError or ConfigError where a parameter's state cannot be paged, or stored as it is to be.
    """
    found: dict[Any, StateTemplate] = {}
    plans = []
    for key in keys:
        group = groups[key[0]]
        parameter = group["params"][key[1]]
        name = name_of(groups, key)
        if hasattr(parameter, "_local_tensor"):
            raise UnsupportedOptimizerError(f"{name} is a DTensor: sharded parameters cannot be paged yet")
        if is_traceable_wrapper_subclass(parameter):
            raise UnsupportedOptimizerError(
                f"{name} is a {type(parameter).__name__}, which keeps its elements in other tensors: its "
                "state cannot be paged"
            )
        kind = (key[0], parameter.dtype, parameter.device, inner.shape_matters(parameter))
        if kind not in found:
            found[kind] = _template_for(inner, group, parameter, name, config)
        template = found[kind]
        if parameter.numel() == 0:
            template = dataclasses.replace(template, paged=())
        device = parameter.device
        is_exact = all(tensor.codec in ("exact", REMAINDER) for tensor in template.paged)
        chunking: Chunking = inner.chunking_for(group, device, is_exact=is_exact)
        shape, stride = tuple(parameter.shape), tuple(parameter.stride())
        plans.append(ParameterPlan(key, name, shape, stride, parameter.dtype, template, device, chunking))
    _check_apart(groups)
    return plans


def _check_apart(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise where the memory of two parameters that are trained overlaps.

    In memory, torch steps them one after the other. Here that order alternates, and a master would lack what the other
    parameter's update has written to its weight.
    """
    runs = []
    for key, parameter in parameters_of(groups).items():
        has_memory = parameter.layout is torch.strided and not is_traceable_wrapper_subclass(parameter)
        if parameter.requires_grad and has_memory and is_dense(parameter.shape, parameter.stride()):
            start = parameter.data_ptr()
            runs.append((str(parameter.device), start, start + parameter.numel() * parameter.element_size(), key))
    for (device, _, end, key), (other_device, start, _, other) in itertools.pairwise(sorted(r for r in runs if r[1])):
        if device == other_device and start < end:
            raise UnsupportedOptimizerError(
                f"{name_of(groups, key)} and {name_of(groups, other)} share memory: give the optimizer one parameter "
                "for both"
            )


def _template_for(
    inner: InnerOptimizer, group: Mapping[str, Any], parameter: torch.Tensor, name: str, config: OffloadConfig
) -> StateTemplate:
    """What state there is for a parameter and how it is stored; ``name`` is for errors."""
    has_master = config.master_weights and parameter.dtype in LOW_PRECISION
    template = inner.template_for(group, parameter, torch.float32 if has_master else parameter.dtype)
    paged = []
    for tensor in template.paged:
        check_storable(tensor)
        codec = config.codec_of(tensor.name)
        if codec != "exact" and tensor.dtype is not torch.float32:
            hint = ": master_weights=True keeps it in float32" if parameter.dtype in LOW_PRECISION else ""
            raise ConfigError(
                f"state_dtype={codec!r} is for float32 state, and {tensor.name} of {name} is {tensor.dtype}{hint}"
            )
        if codec != "exact" and group.get("centered"):
            raise ConfigError(
                f"state_dtype={codec!r} does not go with centered=True: the difference of two rounded states may be "
                "below zero, and its root is NaN"
            )
        paged.append(dataclasses.replace(tensor, codec=codec if is_dense(tensor.shape, tensor.stride) else "exact"))
    if not has_master:
        return dataclasses.replace(template, paged=tuple(paged))
    dense, is_huge = is_dense(parameter.shape, parameter.stride()), parameter.numel() > LARGEST_PIECE
    shape = tuple(parameter.shape)
    master = StateTensor(MASTER, torch.float32, shape, tuple(parameter.stride()) if dense else row_major(shape))
    if parameter.dtype is torch.bfloat16 and dense and not (template.paging is Paging.WHOLE and is_huge):
        master = dataclasses.replace(master, codec=REMAINDER)
    return dataclasses.replace(template, paged=(*paged, master), names=(*template.names, MASTER))


def check_state_names(plans: Sequence[ParameterPlan], config: OffloadConfig) -> None:
    """Raise ConfigError for a name in ``state_dtype`` that no parameter has state of."""
    if isinstance(config.state_dtype, str) or not plans:
        return
    there = {tensor.name for plan in plans for tensor in plan.template.paged} - {MASTER}
    for name in config.state_dtype:
        if name not in there:
            raise ConfigError(f"state_dtype: there is no state {name!r}, but {', '.join(sorted(there)) or 'none'}")


def plan_states(
    inner: InnerOptimizer,
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[torch.Tensor, ParameterState],
    config: OffloadConfig,
) -> list[ParameterPlan]:
    """Plans for given states. Raises ConfigError unless ``inner`` keeps such states with the options of ``groups``."""
    places = {key: p for key, p in parameters_of(groups).items() if p in states}
    plans = plan_parameters(inner, groups, list(places), config)
    for plan in plans:
        _check_complete(plan, states[places[plan.key]])
    return plans


def name_of(groups: Sequence[Mapping[str, Any]], key: Key) -> str:
    """A parameter's name where the optimizer was given names, or else its number, counted as state_dict() does."""
    names = groups[key[0]].get("param_names")
    if names:
        return str(names[key[1]])
    return f"param_{sum(len(group['params']) for group in groups[: key[0]]) + key[1]}"


def whole_tensors(
    plan: ParameterPlan,
    pieces: Sequence[tuple[SwapUnit, Piece]],
    parameter: torch.Tensor | None,
    stride: tuple[int, ...] | None = None,
) -> list[WholeTensor]:
    """The paged state tensors of a parameter, whole; ``stride`` is for what was stored by another one.

    Raises OffloadError where the parameter is not what its master is a part of any more.
    """

    def weight_for(tensor: StateTensor) -> torch.Tensor | None:
        if tensor.codec != REMAINDER or parameter is None:
            return None
        if (tuple(parameter.shape), parameter.dtype) != (plan.shape, plan.dtype):
            raise OffloadError(
                f"the master of {plan.name} cannot be read, since it is stored as what its weight lacks, of shape "
                f"{plan.shape} and {plan.dtype}: the parameter has shape {tuple(parameter.shape)} and "
                f"{parameter.dtype} now"
            )
        return in_memory_order(parameter, tensor)  # the parameter may have been laid out anew since

    tensors = plan.whole_tensors(stride)
    return [WholeTensor(f"{plan.name}.{each.name}", each, pieces, weight_for(each)) for each in tensors]


def _fill(
    piece: Piece, tensor: StateTensor, state: ParameterState, parameter: torch.Tensor, data: torch.Tensor, epoch: int
) -> None:
    """Store a given state tensor in the unit's bytes ``data``; of a master, set the parameter's run, too."""
    is_master = tensor.name == MASTER
    given: torch.Tensor = (state.get(MASTER, parameter) if is_master else state[tensor.name]).detach()
    like = tensor if piece.is_whole else parameter
    run = slice(None) if piece.is_whole else slice(piece.start, piece.stop)
    if tensor.codec == "exact":
        tensor.view(data).copy_(given if piece.is_whole else in_memory_order(given, like)[run])
        if is_master:
            own = parameter.detach() if piece.is_whole else flat(parameter)[run]
            own.copy_(tensor.view(data))
        return
    values = in_memory_order(given, like)[run].to("cpu", torch.float32)
    weight = values.new_empty(len(values), dtype=torch.bfloat16) if is_master else None
    coding = coding_of(piece, tensor, [part.view(data) for part in tensor.stored], values, piece.start, weight)
    ties = encode_run(piece, [tensor.name], [coding], piece.start, epoch)
    if weight is not None:
        piece.ties = ties
        flat(parameter)[run].copy_(weight)


def _check_complete(plan: ParameterPlan, state: ParameterState) -> None:
    """Raise ConfigError unless ``state`` has just the paged tensors that the plan has, in the right shapes."""
    for tensor in plan.template.paged:
        if tensor.name == MASTER and MASTER not in state:
            continue  # it is made of the parameter
        value = state.get(tensor.name)
        shape = plan.shape if plan.template.paging is Paging.ELEMENTWISE else tensor.shape
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise ConfigError(f"the state of {plan.name} should have {tensor.name!r} of shape {shape}, but has {what}")
    paged = {tensor.name for tensor in plan.template.paged}
    for name, value in state.items():
        if name not in paged and is_large(value):
            raise ConfigError(f"the state of {plan.name} has a tensor {name!r}, which the optimizer does not keep")


def resident_from(plan: ParameterPlan, state: ParameterState) -> dict[str, Any]:
    """The small part of a given state, in the dtypes and on the devices that the optimizer itself uses."""
    paged = {tensor.name for tensor in plan.template.paged}
    resident = {}
    for name, value in state.items():
        if name in paged:
            continue
        example = plan.template.resident.get(name)
        if isinstance(example, torch.Tensor):
            value = torch.as_tensor(value, device=example.device).detach().to(dtype=example.dtype, copy=True)
        elif isinstance(value, torch.Tensor) and value.dim() > 0:  # of an empty parameter, and as empty
            value = value.detach().to(plan.device, copy=True)
        resident[name] = copy_value(value)
    return resident
