"""Optimizer state as fewer bytes: fp32 values <-> what is stored for them. Pure: nothing here knows units or files.

A codec works on a *run*: contiguous elements of one parameter's state; ``first`` is the number that the first one has
in its parameter. What does not fit into the stored bits is rounded up or down at random, so that the mean of what is
stored is the value: an average that moves by less than a step of the stored numbers still moves, on average. The random
numbers are counter-based: they depend on ``key`` and on an element's number alone. So the same step gives the same
bytes however the state is cut, and again after a crash.

Tensors on the CPU go through the native loops (csrc/codec.cpp, coding.cpp) on torch's threads, as many as
torch.set_num_threads allows; those on other devices through reference.py, which does the same in tensor operations, bit
for bit. ``decode`` and ``encode`` take all tensors of a run at once: of a short run, waking the threads is what costs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from . import _C, reference
from .checksums import Checksum
from .errors import ConfigError
from .reference import BLOCK

MASTER = "master"
"""The name under which an fp32 master weight is kept, beside the state that the optimizer makes."""
REMAINDER = "remainder"
"""How the master of a bf16 weight is stored: as what the weight in memory lacks; see ``Master``."""

NON_NEGATIVE = frozenset(
    {
        "exp_avg_sq",  # Adam, AdamW, NAdam, RAdam, SparseAdam
        "max_exp_avg_sq",  # Adam(amsgrad=True)
        "exp_inf",  # Adamax
        "square_avg",  # RMSprop, Adadelta
        "acc_delta",  # Adadelta
        "sum",  # Adagrad
        "step_size",  # Rprop
        "row_var",  # Adafactor
        "col_var",
        "variance",
    }
)
"""torch's names of state that is never below zero. It is divided by, or multiplied, so none of it may become zero."""


class StateCodec(Protocol):
    """How one state tensor is stored."""

    @property
    def name(self) -> str: ...

    @property
    def granule(self) -> int:
        """Inside what has been encoded as one, a run may be decoded by itself if it starts at a multiple of this."""

    def parts(self, numel: int) -> tuple[tuple[str, torch.dtype, int], ...]:
        """(suffix of the name, dtype, number of elements) of each tensor that is stored for ``numel`` values."""


@dataclasses.dataclass(frozen=True)
class Bf16:
    """The high half of the fp32: relative steps of 2^-8 to 2^-7. Inf and NaN stay; what is finite stays finite."""

    name: str = dataclasses.field(default="bf16", init=False)
    granule: int = dataclasses.field(default=1, init=False)

    def parts(self, numel: int) -> tuple[tuple[str, torch.dtype, int], ...]:
        return (("", torch.bfloat16, numel),)


@dataclasses.dataclass(frozen=True)
class Int8:
    """A byte for each value, and one for each block of ``BLOCK`` of them: csrc/codec.h describes the format.

    A value is a floating-point number of 4 bits of mantissa, relative to a power of two that its block's largest value
    sets, with gradual underflow. Relative steps are 2^-5 to 2^-4 over the upper 7 (``is_signed``) or 15 octaves of the
    block; below, steps are even and end in zero. With ``is_signed=False`` nothing but zero becomes zero: what is less
    than the smallest code becomes that. No result is a denormal: a block below 2^-112 or so has fewer octaves, and what
    is below 2^-126 is rounded to that or, signed, to zero.

    A block with an inf or NaN comes back as NaN everywhere, so that trouble is not hidden. With ``is_signed=False``,
    a value below zero (-0.0 and NaN are not) cannot be encoded.
    """

    is_signed: bool
    name: str = dataclasses.field(default="int8", init=False)
    granule: int = dataclasses.field(default=BLOCK, init=False)

    def parts(self, numel: int) -> tuple[tuple[str, torch.dtype, int], ...]:
        return (("", torch.uint8, numel), (".exponent", torch.uint8, -(-numel // BLOCK)))


@dataclasses.dataclass(frozen=True)
class Master:
    """An fp32 master as what its bf16 weight in memory lacks of it: the 16 bits of a remainder.

    The weight is the master rounded to nearest even, as ``master.to(torch.bfloat16)`` rounds. A NaN becomes 0x7FC0;
    torch's vector code gives 0xFFFF, which decodes as well, to a NaN. The remainder has the master's low bits. Where
    they are above one half, the weight was rounded up; at one half exactly, it was rounded to even, and does not tell
    which way. So encoding returns the positions of those that were rounded down: *ties*; in the mean, one value in
    2^17. (apex's DistributedFusedAdam keeps remainders, too: store_param_remainders.)
    """

    name: str = dataclasses.field(default=REMAINDER, init=False)
    granule: int = dataclasses.field(default=1, init=False)

    def parts(self, numel: int) -> tuple[tuple[str, torch.dtype, int], ...]:
        return ((".remainder", torch.int16, numel),)


@dataclasses.dataclass(frozen=True, eq=False)
class Coding:
    """fp32 ``values`` of a run and what is ``stored`` for them, as ``codec.parts`` says.

    A Master has the ``weight`` beside, and belongs to a longer run, in which it begins at ``position``; to be decoded,
    it has the ``ties`` of that, int32 and ascending, on the CPU; None is none. Everything is 1-D and contiguous.

    Raises TypeError for a dtype, ValueError for tensors of another number, shape or device.
    """

    codec: StateCodec
    stored: Sequence[torch.Tensor]
    values: torch.Tensor
    weight: torch.Tensor | None = None
    ties: torch.Tensor | None = None
    position: int = 0
    numel: int = dataclasses.field(init=False)
    device: torch.device = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stored", tuple(self.stored))
        object.__setattr__(self, "numel", self.values.numel())
        object.__setattr__(self, "device", self.values.device)
        self._check()

    def native(self) -> NativeCoding:
        """Of one on the CPU: good as long as this is."""
        stored = self.stored[0].data_ptr()
        beside = self.stored[-1] if self.weight is None else self.weight
        place = _FORMATS[self.codec], self.numel, self.values.data_ptr(), stored, beside.data_ptr()
        return NativeCoding(*place, *native_ties(self.ties), self.position)

    def _check(self) -> None:
        numel, device = self.numel, self.device
        _check("values", self.values, torch.float32, device, numel)
        parts = self.codec.parts(numel)
        if len(self.stored) != len(parts):
            raise ValueError(f"{len(self.stored)} stored tensors, not {len(parts)}")
        for (suffix, dtype, count), tensor in zip(parts, self.stored, strict=True):
            _check("stored" + suffix, tensor, dtype, device, count)
        if not isinstance(self.codec, Master):
            if self.weight is not None:
                raise ValueError(f"a weight, which {self.codec.name} has no use for")
            return
        if self.position + numel > 1 << 31:
            raise ValueError("positions of ties are of 32 bits: split 2^31 elements and more in parts")
        if self.weight is None:
            raise ValueError("a master has a weight")
        _check("weight", self.weight, torch.bfloat16, device, numel)
        if self.ties is not None:
            _check("ties", self.ties, torch.int32, torch.device("cpu"), self.ties.numel())


class NativeCoding(NamedTuple):
    """A Coding on the CPU by addresses, as csrc/bindings.cpp takes it. Nothing is checked, and no memory is held.

    For an update, which has planned where everything lies, and needs many. ``beside`` is where the last of the stored
    parts lies, or a master's weight. adam.py has values of its own, at no address here, and the ``EXACT`` ones, which
    are stored as they are.
    """

    format: int
    numel: int
    values: int
    stored: int
    beside: int
    ties: int = 0
    tie_count: int = 0
    position: int = 0


def native_ties(ties: torch.Tensor | None) -> tuple[int, int]:
    """The address and number of ``ties`` for a NativeCoding."""
    return (0, 0) if ties is None else (ties.data_ptr(), ties.numel())


class BelowZeroError(ValueError):
    """A value is below zero, which its codec does not have. ``index``: of its coding."""

    def __init__(self, index: int, element: int, value: float) -> None:
        super().__init__(f"element {element} is {value:g}: this state cannot be below zero")
        self.index = index


def decode(codings: Sequence[Coding]) -> None:
    """Fill the ``values`` of each coding with what ``encode`` stored: a master bit for bit, but for NaNs.

    All is on one device, and nothing overlaps. Neighbours of one length share a loop. Raises ValueError where there are
    two devices or two masters; nothing is touched then.
    """
    if _are_native(codings):
        decode_native([coding.native() for coding in codings])
    else:
        for coding in codings:
            _reference_decode(coding)


def decode_native(codings: Sequence[NativeCoding]) -> None:
    """``decode`` of what lies on the CPU and has been checked."""
    _C.decode(codings, torch.get_num_threads())


def encode(
    codings: Sequence[Coding], keys: Sequence[int], first: int, checksum: Checksum | None = None
) -> torch.Tensor | None:
    """Store the ``values`` of each coding, rounded by its key, and round a master, of which there is one at most.

    ``first`` is the number that the run's first element has in its parameter. Returns the ties of the master, if there
    are any: int32, on the CPU, in ascending order, counted as its ``position`` is. What is stored in the memory of
    ``checksum`` is added to it. Raises as ``decode`` does and, with what is stored and the weight of no use then,
    BelowZeroError.
    """
    for key in keys:
        if not 0 <= key < 1 << 64:
            raise ValueError(f"key {key} is not an unsigned integer of 64 bits")
    if len(keys) != len(codings):
        raise ValueError(f"{len(keys)} keys for {len(codings)} tensors")
    if not 0 <= first <= (1 << 63) - max((coding.numel for coding in codings), default=0):
        raise ValueError(f"first is {first}")
    if _are_native(codings):
        return encode_native([coding.native() for coding in codings], keys, first, checksum)
    found = [_reference_encode(coding, keys[i], first, i) for i, coding in enumerate(codings)]
    return next((ties for ties in found if ties is not None and len(ties)), None)


def encode_native(
    codings: Sequence[NativeCoding], keys: Sequence[int], first: int, checksum: Checksum | None
) -> torch.Tensor | None:
    """``encode`` of what lies on the CPU and has been checked."""
    hashes = None if checksum is None else checksum.native
    index, negative, ties = _C.encode(codings, keys, first, torch.get_num_threads(), hashes)
    if index < len(codings):
        value = ctypes.c_float.from_address(codings[index].values + negative * 4).value
        raise BelowZeroError(index, first + negative, value)
    return torch.frombuffer(bytearray(ties), dtype=torch.int32) if ties else None


def thread_count() -> int:
    """How many threads share a long loop of a codec: torch.get_num_threads(), or 1 where torch has no OpenMP."""
    return _C.thread_count(torch.get_num_threads())


@functools.cache
def codec_for(kind: str, state_name: str) -> StateCodec | None:
    """The codec of a state tensor that torch calls ``state_name``; ``None`` for "exact": the tensor as it is."""
    if kind == "exact":
        return None
    if kind == "bf16":
        return Bf16()
    if kind == "int8":
        return Int8(is_signed=state_name not in NON_NEGATIVE)
    if kind == REMAINDER:
        return Master()
    raise ConfigError(f"state is stored as 'exact', 'bf16' or 'int8', not as {kind!r}")


def stored_parts(kind: str, state_name: str, numel: int) -> tuple[tuple[str, torch.dtype, int], ...]:
    """What lies in a unit for ``numel`` fp32 values: as ``StateCodec.parts``."""
    codec = codec_for(kind, state_name)
    return (("", torch.float32, numel),) if codec is None else codec.parts(numel)


def granule_of(kind: str, state_name: str) -> int:
    """Elements at whose multiples a run of a tensor may begin."""
    codec = codec_for(kind, state_name)
    return 1 if codec is None else codec.granule


def native_format(kind: str, state_name: str) -> int:
    """The ``format`` of a NativeCoding."""
    codec = codec_for(kind, state_name)
    assert codec is not None
    return _FORMATS[codec]


def bf16_gradient(numel: int, values: int, address: int) -> NativeCoding:
    """A gradient's bf16 numbers at ``address``, which are decoded as state is."""
    return NativeCoding(_FORMATS[Bf16()], numel, values, address, address)


@functools.lru_cache(maxsize=1024)  # of the parameters of the units that are under way
def rounding_key(step: int, parameter: int, state_name: str) -> int:
    """The ``key`` of ``encode``: 64 bits that differ between steps, parameters and state tensors, and never change."""
    text = f"{step} {parameter} {state_name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# The numbers of csrc/coding.h's Format.
EXACT = 4
_FORMATS: dict[StateCodec, int] = {Bf16(): 0, Int8(is_signed=True): 1, Int8(is_signed=False): 2, Master(): 3}


def _are_native(codings: Sequence[Coding]) -> bool:
    """Whether they lie on the CPU. Raises ValueError where they cannot be of one run."""
    for coding in codings:
        if coding.device != codings[0].device:
            raise ValueError(f"values are on {coding.device}, not {codings[0].device}")
    masters = sum(coding.weight is not None for coding in codings)
    if masters > 1:
        raise ValueError(f"{masters} masters in one run")
    return not codings or codings[0].device.type == "cpu"


def _reference_decode(coding: Coding) -> None:
    if isinstance(coding.codec, Master):
        assert coding.weight is not None
        ties = torch.empty(0, dtype=torch.int32, device="cpu") if coding.ties is None else coding.ties - coding.position
        ties = ties[(ties >= 0) & (ties < coding.numel)].to(coding.values.device)
        reference.join_master(coding.weight, coding.stored[0], ties, coding.values)
    elif isinstance(coding.codec, Int8):
        reference.decode_int8(coding.codec.is_signed, coding.stored[0], coding.stored[1], coding.values)
    else:
        reference.decode_bf16(coding.stored[0], coding.values)


def _reference_encode(coding: Coding, key: int, first: int, index: int) -> torch.Tensor | None:
    """Returns the ties of a master."""
    values, stored = coding.values, coding.stored
    if isinstance(coding.codec, Master):
        assert coding.weight is not None
        return reference.split_master(values, coding.weight, stored[0]).cpu() + coding.position
    if isinstance(coding.codec, Int8):
        negative = reference.encode_int8(coding.codec.is_signed, values, stored[0], stored[1], key, first)
        if negative < values.numel():
            raise BelowZeroError(index, first + negative, float(values[negative]))
    else:
        reference.encode_bf16(values, stored[0], key, first)
    return None


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, numel: int) -> None:
    shape = tensor.shape
    if tensor.dtype == dtype and tensor.device == device and shape == (numel,) and tensor.is_contiguous():
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is of {tensor.dtype}, not {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not {device}")
    if len(shape) != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} is not 1-D and contiguous")
    raise ValueError(f"{name} has {shape[0]} elements, not {numel}")
