"""What there is to page of each parameter, and what must hold of it: plans, and everything that is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .codecs import MASTER, REMAINDER
from .config import OffloadConfig
from .errors import ConfigError, OffloadError, UnsupportedOptimizerError
from .inner import InnerOptimizer
from .unit_file import check_storable
from .units import (
    LARGEST_PIECE,
    Chunking,
    Paging,
    ParameterPlan,
    StateTemplate,
    StateTensor,
    is_dense,
    row_major,
)
from .update import Key, copy_value, is_large

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Parameters that may have an fp32 master."""

ParameterState = Mapping[str, Any]
"""What an optimizer keeps in ``state[parameter]``."""


def parameters_of(groups: Sequence[Mapping[str, Any]]) -> dict[Key, torch.Tensor]:
    """Every parameter once, by its (first) place."""
    places: dict[torch.Tensor, Key] = {}
    for g, group in enumerate(groups):
        for i, parameter in enumerate(group["params"]):
            places.setdefault(parameter, (g, i))
    return {key: parameter for parameter, key in places.items()}


def name_of(groups: Sequence[Mapping[str, Any]], key: Key) -> str:
    """A parameter's name where the optimizer was given names, or else its number, counted as state_dict() does."""
    names = groups[key[0]].get("param_names")
    if names:
        return str(names[key[1]])
    return f"param_{sum(len(group['params']) for group in groups[: key[0]]) + key[1]}"


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
        is_plain = parameter.layout is torch.strided and not is_traceable_wrapper_subclass(parameter)
        if not (parameter.requires_grad and is_plain) or parameter.is_meta or not _has_memory(parameter):
            continue
        if is_dense(parameter.shape, parameter.stride()):
            start = parameter.data_ptr()
            runs.append((str(parameter.device), start, start + parameter.nbytes, key))
    for (device, _, end, key), (other_device, start, _, other) in itertools.pairwise(sorted(runs)):
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


def check_as_planned(
    groups: Sequence[Mapping[str, Any]], key: Key, parameter: torch.Tensor, plan: ParameterPlan | None
) -> None:
    """Raise unless the parameter, and its gradient, are such as its state was laid out for, if it was."""
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
    if plan is None:
        return
    now = (tuple(parameter.shape), tuple(parameter.stride()), parameter.dtype, parameter.device)
    planned = (plan.shape, plan.stride, plan.dtype, plan.device)
    if now != planned:
        # A master cannot be read without its weight.
        is_readable = MASTER not in plan.template.names or now[::2] == planned[::2]
        raise OffloadError(
            f"{plan.name} is not what its state was laid out for any more: shape, stride, dtype and device were "
            f"{planned} and are {now}" + ". load_state_dict(state_dict()) lays the state out anew" * is_readable
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
