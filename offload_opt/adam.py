"""torch's fused Adam and AdamW on the CPU, over state that has codecs, in one native loop (csrc/adam.cpp).

Codec and optimizer one after the other go through memory for each pass: decoded values of a chunk do not fit the
nearest caches. The native loop decodes, updates and encodes a few KiB at a time, and takes about two thirds of the
time for int8 state. It is the one optimizer that is written out here; whatever it does not cover goes to the
optimizer itself.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from . import _C
from .checksums import Checksum
from .codecs import EXACT, MASTER, REMAINDER, NativeCoding, bf16_gradient
from .coding import in_memory_order, is_laid_out_as, native_coding_of, rounding_keys
from .inner import InnerOptimizer, step_below_hooks
from .units import Piece, StateTensor, is_dense

_MOMENTS = ("exp_avg", "exp_avg_sq")
# As torch has them: where somebody has put another in place, that is to run.
_STEPS: dict[Any, Any] = {kind: step_below_hooks(kind) for kind in (torch.optim.Adam, torch.optim.AdamW)}


class NativeAdam(NamedTuple):
    """The options of a group, as csrc/adam.h takes them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    is_decoupled: bool
    is_maximizing: bool

    @classmethod
    def of(cls, inner: InnerOptimizer, group: Mapping[str, Any]) -> NativeAdam | None:
        """Of a group for which the native loop does what the optimizer would do by itself; None of others."""
        optimizer = inner.optimizer
        if inner.step_function is not _STEPS.get(type(optimizer)) or "_init_group" in vars(optimizer):
            return None
        if not group["fused"] or any(group[name] for name in ("amsgrad", "capturable", "differentiable", "foreach")):
            return None
        if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            return None
        numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        if not all(isinstance(number, int | float) or _is_scalar(number) for number in numbers) or not _has_vectors():
            return None
        lr, beta1, beta2, eps, weight_decay = map(float, numbers)
        if not 0 <= beta2 <= 1:  # the second moment might fall below zero
            return None
        is_decoupled = isinstance(optimizer, torch.optim.AdamW)
        if "decoupled_weight_decay" in optimizer.defaults:  # an Adam without it ignores a group's
            is_decoupled = group["decoupled_weight_decay"]
        return cls(lr, beta1, beta2, eps, weight_decay, bool(is_decoupled), bool(group["maximize"]))

    def takes(self, piece: Piece, parameter: torch.Tensor, gradient: torch.Tensor) -> bool:
        """Whether ``prepare`` can do it: the piece has state, rounded by a codec, and all is as Adam makes it."""
        master = piece.master
        moments = [tensor for tensor in piece.tensors if tensor is not master]
        return (
            tuple(tensor.name for tensor in moments) == _MOMENTS
            and any(tensor.codec != "exact" for tensor in moments)
            and all(tensor.dtype == torch.float32 for tensor in moments)
            and piece.resident is not None
            and piece.resident.keys() == {"step"}
            and _is_scalar(piece.resident["step"])
            and piece.resident["step"].dtype == torch.float32
            and (parameter.dtype == torch.float32 if master is None else master.codec == REMAINDER)
            and _is_plain(parameter)
            and (parameter.is_contiguous() or is_dense(parameter.shape, parameter.stride()))
            and _is_plain(gradient)
            and gradient.dtype == parameter.dtype
        )

    def prepare(self, piece: Piece, parameter: torch.Tensor, gradient: torch.Tensor, step: int) -> NativeUpdate:
        """The update of a piece that it ``takes``, in the optimizer's ``step``, to be run in that step.

        Until then the parameter and the gradient are to stay where they are. A gradient that is laid out otherwise than
        the parameter is copied.
        """
        assert piece.resident is not None
        numel = piece.stop - piece.start
        weight = parameter.data_ptr() + piece.start * parameter.element_size()
        ordered = gradient.detach() if is_laid_out_as(gradient, parameter) else in_memory_order(gradient, parameter)
        given = ordered.data_ptr() + piece.start * ordered.element_size()
        is_bf16 = ordered.dtype == torch.bfloat16
        codings = {tensor.name: _coding(piece, tensor, weight) for tensor in piece.tensors}
        run = (
            codings.get(MASTER, NativeCoding(EXACT, numel, weight, 0, 0)),
            bf16_gradient(numel, 0, given) if is_bf16 else NativeCoding(EXACT, numel, given, 0, 0),
            *(codings[name] for name in _MOMENTS),
        )
        keys = [0, 0, *rounding_keys(piece, _MOMENTS, step)]
        steps_taken = piece.resident["step"]
        update = _C.AdamUpdate(run, keys, piece.start, self, steps_taken.data_ptr())
        exact = [(tensor.offset, tensor.nbytes) for tensor in piece.tensors if tensor.codec == "exact"]
        if not parameter.is_inference():
            torch.autograd.graph.increment_version(parameter)  # as any change in place does
        # Detached: memory may be taken from a tensor by assigning to .data, and is to be there until this has run.
        return NativeUpdate(update, piece, exact, (parameter.detach(), ordered, steps_taken, piece.ties))


class NativeUpdate(NamedTuple):
    """The update of a piece, ready but for where its unit's bytes are: see AdamUpdate in csrc/bindings.cpp."""

    update: _C.AdamUpdate
    piece: Piece
    exact: list[tuple[int, int]]
    """What is stored as it is: the first byte of each in the unit, and how many."""
    kept: tuple[torch.Tensor | None, ...]
    """What ``update`` has the addresses of."""

    def run(self, data: int, checksum: Checksum | None) -> None:
        """Do it, once: ``data`` is where the unit's bytes begin. What is stored is added to ``checksum``."""
        ties = self.update.run(data, torch.get_num_threads(), None if checksum is None else checksum.native)
        self.piece.ties = torch.frombuffer(bytearray(ties), dtype=torch.int32) if ties else None
        if checksum is not None:
            checksum.add(self.exact)


def _coding(piece: Piece, tensor: StateTensor, weight: int) -> NativeCoding:
    """What is in the unit is given by where in it."""
    if tensor.codec == "exact":
        return NativeCoding(EXACT, piece.stop - piece.start, tensor.offset, 0, 0)
    return native_coding_of(piece, piece.whole_runs[tensor.name], 0, 0, piece.start, weight)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_cpu


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is what its memory says: no subclass, which may have none, and no lazy negative."""
    is_own = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return is_own and tensor.is_cpu and tensor.layout == torch.strided and not tensor.is_neg()


def _has_vectors() -> bool:
    """Whether multiplying and adding is one instruction. Where it is none, torch has no such code, either."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability().startswith("AVX")
