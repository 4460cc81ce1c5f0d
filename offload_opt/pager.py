"""ParameterPager: which parameter's state is where, and the update of a unit by the inner optimizer.

The state tensors that the inner optimizer updates are views of the page-locked buffer: nothing is copied but state that
the optimizer has just made, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .checksums import Checksum
from .codecs import MASTER, REMAINDER
from .coding import coding_of, decode_run, encode_run, flat, in_memory_order, rounding_keys
from .config import OffloadConfig
from .errors import OffloadError
from .heap import Heap
from .inner import InnerOptimizer
from .parameters import ParameterState, check_as_planned, parameters_of, plan_parameters, resident_from
from .state_file import WholeTensor
from .swap_manager import SwapManager
from .units import ParameterPlan, Piece, StateTensor, SwapUnit, plan_units
from .update import Key, Scratch, UnitUpdate, copy_value, is_large


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


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A call that is under way."""

    call: str
    reads: bool
    thread: int


class ParameterPager:
    """Plans units for parameters when they first need state, and updates them unit by unit."""

    def __init__(self, inner: InnerOptimizer, manager: SwapManager, config: OffloadConfig) -> None:
        self._inner = inner
        self._manager = manager
        self._config = config
        self._scratch = Scratch()
        self._heap = Heap(inner.batch_elements(torch.device("cpu")) * torch.float32.itemsize)
        self.entries: dict[Key, Entry] = {}
        self.epoch = 0
        """Steps that the state has been through, over all runs. By it stored values are rounded."""
        self._brought: dict[Key, ParameterState] = {}  # state in memory that goes to the store at the next step
        self._turns: dict[str, _Turn] = {}

    @contextlib.contextmanager
    def alone(self, call: str, *, reads: bool = False) -> Iterator[None]:
        """``call`` is under way: no other may begin before it has ended. What another thread ``reads`` is waited for.

        A signal handler runs between any two steps of what it interrupts, and another thread beside it: what they found
        half done would be handed out, or committed.
        """
        mine = _Turn(call, reads, threading.get_ident())
        try:
            while self._turns.setdefault("now", mine) is not mine:  # atomic
                self.check_alone(call)
                time.sleep(0.001)
            yield
        finally:
            if self._turns.get("now") is mine:
                self._turns.clear()

    def check_alone(self, call: str) -> None:
        """Raise OffloadError where another call is under way that is not to be waited for."""
        now = self._turns.get("now")
        if now is not None and not (now.reads and now.thread != threading.get_ident()):
            raise OffloadError(
                f"{call} was called in the middle of {now.call}, by a signal handler or another thread: set a flag "
                f"there, and look at it when {now.call} has returned"
            )

    def renew(self, groups: Sequence[Mapping[str, Any]], key: Key) -> None:
        """Look at the parameter that is at its place now: frameworks replace them."""
        if key in self.entries:
            self.entries[key].owner = weakref.ref(groups[key[0]]["params"][key[1]])

    def check_masters(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise OffloadError where a master could not be put together from what is stored, and its parameter."""
        for key, parameter in self.parameters(groups).items():
            entry = self.entries.get(key)
            if entry is not None and any(tensor.codec == REMAINDER for tensor in entry.plan.template.paged):
                _check_weight(entry.plan, parameter)

    def step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Update every parameter that has a gradient; the same as the inner optimizer's step over ``groups``."""
        active = {key: p for key, p in self.parameters(groups).items() if p.grad is not None}
        for key, parameter in active.items():
            entry = self.entries.get(key)
            check_as_planned(groups, key, parameter, None if entry is None else entry.plan)
        self.page_out_brought(groups)
        self.plan(groups, [key for key in active if key not in self.entries])
        update = UnitUpdate(self._inner, groups, self.epoch, self._scratch, self._heap)
        with self._manager.failing():  # some parameters are updated, and others are not
            unpaged = {key: self.entries[key].resident for key in active if not self.entries[key].pieces}
            with_master = {key for key in unpaged if MASTER in self.entries[key].plan.template.names}
            for key, state in update.update_unpaged(unpaged, with_master, {key[0] for key in active}).items():
                if any(map(is_large, state.values())):  # SGD whose momentum was turned on, for example
                    self._brought[key] = state
                    del self.entries[key]
                else:
                    self.entries[key].resident = dict(state)
            units = {unit for key in active if key in self.entries for unit, _ in self.entries[key].pieces}
            in_order = sorted(units, key=lambda unit: unit.index)
            with update.expecting(in_order):
                self._manager.walk(in_order, update.update)
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
        whole_weight = whole.weight()
        result = torch.empty_strided(whole.spec.shape, whole.spec.stride, dtype=whole.spec.dtype, device="cpu")
        for unit, piece in entry.pieces:
            tensor = next(tensor for tensor in piece.tensors if tensor.name == name)
            run = slice(None) if piece.is_whole else slice(piece.start, piece.stop)
            weight = None if whole_weight is None else whole_weight[run]
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


def _add_pieces(entries: Mapping[Key, Entry], units: Sequence[SwapUnit]) -> None:
    for unit in units:
        for piece in unit.pieces:
            entries[piece.key].pieces.append((unit, piece))


def whole_tensors(
    plan: ParameterPlan,
    pieces: Sequence[tuple[SwapUnit, Piece]],
    parameter: torch.Tensor | None,
    stride: tuple[int, ...] | None = None,
) -> list[WholeTensor]:
    """The paged state tensors of a parameter, whole; ``stride`` is for what was stored by another one."""
    return [
        WholeTensor(
            f"{plan.name}.{tensor.name}", tensor, pieces, functools.partial(_weight_for, plan, tensor, parameter)
        )
        for tensor in plan.whole_tensors(stride)
    ]


def _weight_for(plan: ParameterPlan, tensor: StateTensor, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """What a master's remainder is joined with: the parameter's elements, in the order of the master's."""
    if tensor.codec != REMAINDER or parameter is None:
        return None
    _check_weight(plan, parameter)
    return in_memory_order(parameter, tensor)  # the parameter may have been laid out anew since


def _check_weight(plan: ParameterPlan, parameter: torch.Tensor) -> None:
    """Raise OffloadError where the parameter is not what its master's remainder belongs to any more."""
    if (tuple(parameter.shape), parameter.dtype) != (plan.shape, plan.dtype):
        raise OffloadError(
            f"the master of {plan.name} cannot be read, since it is stored as what its weight lacks, of shape "
            f"{plan.shape} and {plan.dtype}: the parameter has shape {tuple(parameter.shape)} and {parameter.dtype} now"
        )


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
    names = [tensor.name]
    ties = encode_run(piece, names, [coding], rounding_keys(piece, names, epoch), piece.start)
    if weight is not None:
        piece.ties = ties
        flat(parameter)[run].copy_(weight)
