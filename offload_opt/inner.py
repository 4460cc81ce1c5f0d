"""Drives the wrapped optimizer on a part of its parameters, and finds out what state it keeps."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import _default_to_fused_or_foreach

from .errors import UnsupportedOptimizerError
from .units import Chunking, Paging, StateTemplate, StateTensor, is_dense

# How each optimizer's state may be cut; a string is the reason why it cannot be paged. Those that this torch does not
# have are left out.
_TORCH_OPTIMIZERS: dict[str, Paging | str] = {
    **dict.fromkeys(
        ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "SGD", "ASGD", "Rprop"],
        Paging.ELEMENTWISE,
    ),
    **dict.fromkeys(["Adafactor", "Muon"], Paging.WHOLE),
    "LBFGS": "its state is a history of all parameters at once, and it calls the closure many times a step",
    "SparseAdam": "it updates a few rows of its state, and paging would move all of it for them",
}
_OPTIMIZERS: dict[Any, Paging | str] = {
    getattr(torch.optim, name): paging for name, paging in _TORCH_OPTIMIZERS.items() if hasattr(torch.optim, name)
}

# Chunks of this many elements stay in the processor's cache through the passes of an update, and bound the temporaries
# that the update makes; with fewer, what is between the calls counts.
_CHUNK_ELEMENTS = 512 * 1024

_PROBE_SHAPE = (7,)

# Parameters without memory, of which costs are planned, stand for some on the CPU.
_CPU_LIKE = ("cpu", "meta")


def register(optimizer_class: type[torch.optim.Optimizer], paging: Paging) -> None:
    """Say how the state of ``optimizer_class`` may be cut; see ``OffloadOptimizer.register``."""
    _OPTIMIZERS[optimizer_class] = paging


def settled(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``group`` as torch settles them for all of its parameters that have a gradient.

    Where one of them is on the CPU, or of a class of its own, torch updates all of them one by one: the bits are others
    than those of its foreach loops, which it would choose for the rest by themselves.
    """
    options = dict(group)
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    if options.get("foreach", True) is None and not _default_to_fused_or_foreach(parameters, False)[1]:
        options["foreach"] = False
    return options


def step_below_hooks(optimizer_class: type[torch.optim.Optimizer]) -> Any:
    """The step below torch's profiling wrapper, which would run the global step hooks once for every unit."""
    return inspect.unwrap(optimizer_class.step, stop=lambda f: not getattr(f, "hooked", False))


class InnerOptimizer:
    """The wrapped optimizer: its groups are lent to it a few parameters at a time."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.paging = _find_paging(type(optimizer))
        self.step_function = step_below_hooks(type(optimizer))

    @property
    def name(self) -> str:
        return type(self.optimizer).__name__

    def step_on(self, groups: list[dict[str, Any]], state: defaultdict[Any, dict[str, Any]]) -> None:
        """One step over ``groups`` with ``state`` in place of the optimizer's own; both are changed as by a step."""
        optimizer = self.optimizer
        own_groups, own_state = optimizer.param_groups, optimizer.state
        optimizer.param_groups, optimizer.state = groups, state
        try:
            self.step_function(optimizer)
        finally:
            optimizer.param_groups, optimizer.state = own_groups, own_state

    def template_for(self, group: Mapping[str, Any], parameter: torch.Tensor, dtype: torch.dtype) -> StateTemplate:
        """What state the optimizer keeps for ``parameter``, updated in ``dtype``, with the options of ``group``.

        An elementwise optimizer takes a step on a tiny parameter of the same kind; for the others a parameter without
        memory (on the meta device) has its state made for it.
        """
        if self.shape_matters(parameter) is None:
            paging = Paging.ELEMENTWISE
            device = torch.device("cpu") if parameter.is_meta else parameter.device
            probe = torch.zeros(_PROBE_SHAPE, dtype=dtype, device=device)
            probe.grad = torch.zeros_like(probe)
        else:
            paging = Paging.WHOLE
            probe = torch.empty_strided(parameter.shape, parameter.stride(), dtype=dtype, device=torch.device("meta"))
            probe.grad = torch.empty_like(probe)
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        try:
            self._make_state({**group, "params": [probe]}, state)
        except (RuntimeError, NotImplementedError):
            # Without memory there are no numbers to compute with. The state is there before the first of them is asked
            # for.
            if paging is Paging.ELEMENTWISE or not state[probe]:
                raise
        paged, resident = [], {}
        for name, value in state[probe].items():
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > 0:
                if paging is Paging.ELEMENTWISE and value.shape != probe.shape:
                    raise UnsupportedOptimizerError(
                        f"{self.name} keeps {name!r} in a shape of its own, {tuple(value.shape)} for a parameter of "
                        f"{tuple(probe.shape)}, so it is not elementwise: register it as whole"
                    )
                paged.append(StateTensor(name, value.dtype, tuple(value.shape), tuple(value.stride())))
            else:
                is_meta = isinstance(value, torch.Tensor) and value.is_meta
                # Such as Adafactor's variance of a scalar: the optimizer keeps it where the parameter is.
                resident[name] = torch.zeros_like(value, device=parameter.device) if is_meta else value
        return StateTemplate(paging, tuple(paged), resident, tuple(state[probe]))

    def _make_state(self, group: dict[str, Any], state: defaultdict[Any, dict[str, Any]]) -> None:
        try:
            self.step_on([group], state)
        except KeyError:  # the constructor makes the state, as Adagrad's before torch 2.13
            make: Any = type(self.optimizer)
            state.update(make([group]).state)
            self.step_on([group], state)

    def shape_matters(self, parameter: torch.Tensor) -> tuple[Any, ...] | None:
        """None when the shape of the state follows the parameter's, element by element; else what it depends on."""
        if self.paging is Paging.ELEMENTWISE and is_dense(parameter.shape, parameter.stride()):
            return None
        return tuple(parameter.shape), tuple(parameter.stride())

    def chunking_for(self, group: Mapping[str, Any], device: torch.device, *, is_exact: bool = True) -> Chunking:
        """How the update of a parameter of ``group`` on ``device`` may be cut; anywhere, where its state is rounded."""
        if device.type not in _CPU_LIKE or not is_exact:
            return Chunking(threads=1, cuts_anywhere=True, max_elements=self.batch_elements(device))
        threads = torch.get_num_threads()
        return Chunking(threads, bool(group.get("fused")), self.batch_elements(device))

    def batch_elements(self, device: torch.device) -> int:
        """How many elements to update in one call: what fits a processor's cache, and keeps every thread busy."""
        return max(_CHUNK_ELEMENTS, 32768 * torch.get_num_threads()) if device.type in _CPU_LIKE else 1 << 62


def _find_paging(optimizer_class: type[torch.optim.Optimizer]) -> Paging:
    """The table's word on the class, or on the base class whose ``step`` it inherits."""
    step = inspect.unwrap(optimizer_class.step)
    base: Any
    for base in optimizer_class.__mro__:
        entry = _OPTIMIZERS.get(base)
        if entry is None or inspect.unwrap(base.step) is not step:
            continue
        if isinstance(entry, str):
            raise UnsupportedOptimizerError(f"the state of {optimizer_class.__name__} cannot be paged: {entry}")
        return entry
    raise UnsupportedOptimizerError(
        f"{optimizer_class.__name__} is not known here. Paging updates a few parameters at a time, which is right only "
        "where the update of one parameter needs no other parameter. If that holds, say so once: "
        f"OffloadOptimizer.register({optimizer_class.__name__}, 'elementwise') where each element is updated by itself "
        "(as in Adam), or 'whole' where the update looks at the whole parameter (as in Muon)"
    )
