"""Optimizer state as fewer bytes: fp32 values <-> what is stored for them. Pure: nothing here knows units or files.

A codec works on a *run*: contiguous elements of one parameter's state; ``first`` is the number that the first one has
in its parameter. What does not fit into the stored bits is rounded up or down at random, so that the mean of what is
stored is the value: an average that moves by less than a step of the stored numbers still moves, on average. The random
numbers are counter-based: they depend on ``key`` and on an element's number alone. So the same step gives the same
bytes however the state is cut, and again after a crash.

Tensors on the CPU go through the native loops (csrc/codec.cpp) on torch's threads, as many as torch.set_num_threads
allows; those on other devices through the ``reference_`` functions, which do the same in tensor operations, bit for
bit.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from . import _C
from .errors import ConfigError

BLOCK = 128
"""Elements that share an exponent in int8."""
MASTER = "master"
"""The name under which an fp32 master weight is kept, beside the state that the optimizer makes."""
REMAINDER = "remainder"
"""How the master of a bf16 weight is stored: as what the weight in memory lacks; see ``split_master``."""
NOT_FINITE = 255
"""The exponent of a block of int8 that has an inf or NaN."""

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

_LOW32 = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_QUIET = 0x00400000
_NAN = 0x7FC00000
# Elements that a reference function looks at together: a bound of its temporary memory, in whole blocks.
_CHUNK = 1 << 20


class StateCodec(Protocol):
    """How one state tensor is stored. Tensors are 1-D, contiguous and on one device, and do not overlap."""

    @property
    def name(self) -> str: ...

    @property
    def granule(self) -> int:
        """Inside what has been encoded as one, a run may be decoded by itself if it starts at a multiple of this."""

    def parts(self, numel: int) -> tuple[tuple[str, torch.dtype, int], ...]:
        """(suffix of the name, dtype, number of elements) of each tensor that is stored for ``numel`` values."""

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor], key: int, first: int) -> None:
        """fp32 ``values`` into ``stored``, which is as ``parts`` says.

        Raises TypeError for a dtype, ValueError for anything else that is not as said; nothing is touched then.
        """

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """What ``encode`` stored into ``out``, fp32. Raises as it does."""


@dataclasses.dataclass(frozen=True)
class Bf16:
    """The high half of the fp32: relative steps of 2^-8 to 2^-7. Inf and NaN stay; what is finite stays finite."""

    name: str = dataclasses.field(default="bf16", init=False)
    granule: int = dataclasses.field(default=1, init=False)

    def parts(self, numel: int) -> tuple[tuple[str, torch.dtype, int], ...]:
        return (("", torch.bfloat16, numel),)

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor], key: int, first: int) -> None:
        numel = _check_run(self, "values", values, stored)
        _check_numbers(key, first, numel)
        if values.device.type != "cpu":
            reference_encode_bf16(values, stored[0], key, first)
        else:
            _C.encode_bf16(values.data_ptr(), stored[0].data_ptr(), numel, key, first, torch.get_num_threads())

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        numel = _check_run(self, "out", out, stored)
        if out.device.type != "cpu":
            reference_decode_bf16(stored[0], out)
        else:
            _C.decode_bf16(stored[0].data_ptr(), out.data_ptr(), numel, torch.get_num_threads())


@dataclasses.dataclass(frozen=True)
class Int8:
    """A byte for each value, and one for each block of ``BLOCK`` of them: csrc/codec.h describes the format.

    A value is a floating-point number of 4 bits of mantissa, relative to a power of two that its block's largest value
    sets, with gradual underflow. Relative steps are 2^-5 to 2^-4 over the upper 7 (``is_signed``) or 15 octaves of the
    block; below, steps are even and end in zero. With ``is_signed=False`` nothing but zero becomes zero: what is less
    than the smallest code becomes that. No result is a denormal: a block below 2^-112 or so has fewer octaves, and what
    is below 2^-126 is rounded to that or, signed, to zero.

    A block with an inf or NaN comes back as NaN everywhere, so that trouble is not hidden. ``encode`` with
    ``is_signed=False`` raises ValueError for a value below zero (-0.0 and NaN are not), which it finds on the way: what
    is stored is of no use then.
    """

    is_signed: bool
    name: str = dataclasses.field(default="int8", init=False)
    granule: int = dataclasses.field(default=BLOCK, init=False)

    def parts(self, numel: int) -> tuple[tuple[str, torch.dtype, int], ...]:
        return (("", torch.uint8, numel), (".exponent", torch.uint8, -(-numel // BLOCK)))

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor], key: int, first: int) -> None:
        numel = _check_run(self, "values", values, stored)
        _check_numbers(key, first, numel)
        codes, exponents = stored
        if values.device.type != "cpu":
            negative = reference_encode_int8(self.is_signed, values, codes, exponents, key, first)
        else:
            pointers = values.data_ptr(), codes.data_ptr(), exponents.data_ptr()
            threads = torch.get_num_threads()
            negative = _C.encode_int8(self.is_signed, *pointers, numel, key, first, threads)
        if negative != numel:
            value = float(values[negative])
            raise ValueError(f"element {first + negative} is {value:g}: this state cannot be below zero")

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        numel = _check_run(self, "out", out, stored)
        codes, exponents = stored
        if out.device.type != "cpu":
            reference_decode_int8(self.is_signed, codes, exponents, out)
        else:
            pointers = codes.data_ptr(), exponents.data_ptr(), out.data_ptr()
            _C.decode_int8(self.is_signed, *pointers, numel, torch.get_num_threads())


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
    raise ConfigError(f"state is stored as 'exact', 'bf16' or 'int8', not as {kind!r}")


def stored_parts(kind: str, state_name: str, numel: int) -> tuple[tuple[str, torch.dtype, int], ...]:
    """What lies in a unit for ``numel`` fp32 values: as ``StateCodec.parts``, of ``REMAINDER``, too."""
    if kind == REMAINDER:
        return ((".remainder", torch.int16, numel),)
    codec = codec_for(kind, state_name)
    return (("", torch.float32, numel),) if codec is None else codec.parts(numel)


def granule_of(kind: str, state_name: str) -> int:
    """Elements at whose multiples a run of a tensor may begin."""
    codec = None if kind == REMAINDER else codec_for(kind, state_name)
    return 1 if codec is None else codec.granule


@functools.lru_cache(maxsize=1024)  # of the parameters of the units that are under way
def rounding_key(step: int, parameter: int, state_name: str) -> int:
    """The ``key`` of ``encode``: 64 bits that differ between steps, parameters and state tensors, and never change."""
    text = f"{step} {parameter} {state_name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def split_master(master: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """An fp32 master into a bf16 ``weight`` and the 16 bits of ``remainder`` (int16) that the weight lacks.

    ``weight`` is rounded to nearest even, as ``master.to(torch.bfloat16)`` rounds. A NaN becomes 0x7FC0; torch's vector
    code gives 0xFFFF, which joins as well. ``remainder`` has the master's low bits. Where they are above one half, the
    weight was rounded up; at one half exactly, it was rounded to even, and does not tell which way. So the result has
    the positions of those that were rounded down: *ties*, an int32 tensor, in ascending order; in the mean, one value
    in 2^17. (apex's DistributedFusedAdam keeps remainders, too: store_param_remainders.)

    Tensors are 1-D, contiguous, of one length below 2^31, on one device. Raises TypeError or ValueError; nothing is
    touched then.
    """
    count = _check_master(master, weight, remainder)
    if master.device.type != "cpu":
        return reference_split_master(master, weight, remainder)
    threads = torch.get_num_threads()
    pointers = master.data_ptr(), weight.data_ptr(), remainder.data_ptr()
    ties = torch.empty(64 + (count >> 15), dtype=torch.int32)
    found = _C.split_master(*pointers, count, ties.data_ptr(), ties.numel(), threads)
    if found > ties.numel():  # not weights of a real model
        ties = torch.empty(found, dtype=torch.int32)
        _C.split_master(*pointers, count, ties.data_ptr(), found, threads)
    return ties[:found].clone()


def join_master(weight: torch.Tensor, remainder: torch.Tensor, ties: torch.Tensor, out: torch.Tensor) -> None:
    """The master that ``split_master`` split, into ``out``: bit for bit, but for a NaN, which may be another NaN."""
    numel, tie_count = _check_master(out, weight, remainder), ties.numel()
    _check("ties", ties, torch.int32, out.device, tie_count)
    if tie_count and (int(ties.min()) < 0 or int(ties.max()) >= numel):
        raise ValueError(f"ties has positions outside of 0 to {numel - 1}")
    if out.device.type != "cpu":
        reference_join_master(weight, remainder, ties, out)
    else:
        pointers = weight.data_ptr(), remainder.data_ptr()
        _C.join_master(*pointers, numel, ties.data_ptr(), tie_count, out.data_ptr(), torch.get_num_threads())


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, numel: int) -> None:
    shape = tensor.shape
    if tensor.dtype == dtype and tensor.device == device and shape == (numel,) and tensor.is_contiguous():
        return  # at once: every chunk of an update comes by, several times
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is of {tensor.dtype}, not {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not {device}")
    if len(shape) != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} is not 1-D and contiguous")
    raise ValueError(f"{name} has {shape[0]} elements, not {numel}")


def _check_run(codec: StateCodec, name: str, values: torch.Tensor, stored: Sequence[torch.Tensor]) -> int:
    """Returns the number of elements of ``values``."""
    numel, device = values.numel(), values.device
    _check(name, values, torch.float32, device, numel)
    parts = codec.parts(numel)
    if len(stored) != len(parts):
        raise ValueError(f"{len(stored)} stored tensors, not {len(parts)}")
    for (suffix, dtype, count), tensor in zip(parts, stored, strict=True):
        _check("stored" + suffix, tensor, dtype, device, count)
    return numel


def _check_numbers(key: int, first: int, count: int) -> None:
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key {key} is not an unsigned integer of 64 bits")
    if not 0 <= first <= (1 << 63) - count:
        raise ValueError(f"first is {first}")


def _check_master(master: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> int:
    """Returns the number of elements."""
    numel, device = master.numel(), master.device
    _check("the master", master, torch.float32, device, numel)
    _check("weight", weight, torch.bfloat16, device, numel)
    _check("remainder", remainder, torch.int16, device, numel)
    if numel >= 1 << 31:
        raise ValueError("positions of ties are of 32 bits: split 2^31 elements and more in parts")
    return numel


# The same in tensor operations. Unsigned 32-bit numbers are held in int64.


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32).to(torch.int64) & _LOW32


def _floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)  # the conversion keeps the low 32 bits


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _CHUNK):
        yield slice(start, min(start + _CHUNK, count))


def _random_bits(key: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """32 random bits for each of ``count`` elements: lowbias32 of the number and the key, as in csrc/codec.cpp."""
    parts = []
    while count > 0:
        length = min(count, (1 << 32) - (first & _LOW32))  # the elements that share the high half of their number
        x = (key + ((first >> 32) + 1) * 0x9E3779B97F4A7C15) & (1 << 64) - 1
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        x ^= x >> 31
        bits = torch.arange(length, dtype=torch.int64, device=device) + (first + x & _LOW32) & _LOW32
        bits = (bits ^ bits >> 16) * 0x7FEB352D & _LOW32
        bits = bits ^ bits >> 15 ^ x >> 32
        bits = bits * (0x846CA68B - (1 << 32)) & _LOW32  # less 2^32, so that the product fits
        parts.append(bits ^ bits >> 16)
        first += length
        count -= length
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def reference_encode_bf16(values: torch.Tensor, stored: torch.Tensor, key: int, first: int) -> None:
    """``Bf16.encode``, of checked tensors on any device."""
    for chunk in _chunks(values.numel()):
        bits = _bits(values[chunk])
        magnitude = bits & _MAGNITUDE
        random = _random_bits(key, first + chunk.start, len(bits), bits.device)
        rounded = (magnitude + (random >> 16)).clamp(max=_INF - 1)
        special = torch.where(magnitude > _INF, magnitude | _QUIET, magnitude)
        result = torch.where(magnitude >= _INF, special, rounded) | bits & ~_MAGNITUDE
        stored[chunk].view(torch.int16).copy_(result >> 16)


def reference_decode_bf16(stored: torch.Tensor, out: torch.Tensor) -> None:
    """``Bf16.decode``, of checked tensors on any device."""
    torch.bitwise_left_shift(stored.view(torch.int16).to(torch.int32), 16, out=out.view(torch.int32))


@dataclasses.dataclass(frozen=True)
class _Minifloat:
    """The numbers of csrc/codec.cpp's Minifloat."""

    is_signed: bool
    mantissa: int = 4

    @property
    def shift(self) -> int:
        return 23 - self.mantissa

    @property
    def top(self) -> int:
        return 127 if self.is_signed else 255

    @property
    def octaves(self) -> int:
        return (self.top + 1 >> self.mantissa) - 2

    @property
    def least(self) -> int:
        return self.octaves + self.mantissa + 1

    def bases(self, exponents: torch.Tensor) -> torch.Tensor:
        """(blocks, 1), from (blocks,) int64."""
        return (exponents.clamp(min=self.least) - self.octaves << 23)[:, None]


def _blocks(elements: torch.Tensor) -> torch.Tensor:
    """(n,) -> (blocks, BLOCK), filled up with zeros."""
    return torch.nn.functional.pad(elements, (0, -len(elements) % BLOCK)).view(-1, BLOCK)


def reference_encode_int8(
    is_signed: bool, values: torch.Tensor, codes: torch.Tensor, exponents: torch.Tensor, key: int, first: int
) -> int:
    """``Int8.encode``, of checked tensors on any device. Returns the index of the first value below zero, or ``n``."""
    for chunk in _chunks(values.numel()):
        bits = _bits(values[chunk])
        if not is_signed:
            negative = (bits > _MAGNITUDE + 1) & (bits <= _MAGNITUDE + 1 + _INF)
            if negative.any():
                return int(chunk.start) + int(negative.to(torch.uint8).argmax())
        random = _random_bits(key, first + chunk.start, len(bits), bits.device)
        chunk_codes, chunk_exponents = _encode_blocks(_Minifloat(is_signed), _blocks(bits), _blocks(random))
        codes[chunk].copy_(chunk_codes.flatten()[: len(bits)])
        exponents[chunk.start // BLOCK :][: len(chunk_exponents)].copy_(chunk_exponents)
    return values.numel()


def _encode_blocks(form: _Minifloat, bits: torch.Tensor, random: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (blocks, BLOCK) and exponents (blocks,), all int64."""
    magnitude = bits & _MAGNITUDE
    largest = magnitude.amax(1)
    exponents = (largest + ((1 << form.shift) - 1) >> 23).clamp(form.least, 254)
    bases = form.bases(exponents)
    even = _bits(_floats(magnitude) + _floats(bases))
    place = torch.where(magnitude < bases, even, magnitude + (1 << 23)) - bases
    codes = (place + (random >> 32 - form.shift) >> form.shift).clamp(max=form.top)
    if form.is_signed:
        codes |= (bits & ~_MAGNITUDE) >> 24
    else:
        codes = torch.where(magnitude == 0, 0, codes.clamp(min=1))
    finite = largest < _INF
    return torch.where(finite[:, None], codes, 0), torch.where(finite, exponents, NOT_FINITE)


def reference_decode_int8(is_signed: bool, codes: torch.Tensor, exponents: torch.Tensor, out: torch.Tensor) -> None:
    """``Int8.decode``, of checked tensors on any device."""
    for chunk in _chunks(out.numel()):
        code = _blocks(codes[chunk].to(torch.int64))
        exponent = exponents[chunk.start // BLOCK :][: len(code)].to(torch.int64)
        out[chunk].copy_(_decode_blocks(_Minifloat(is_signed), code, exponent).flatten()[: chunk.stop - chunk.start])


def _decode_blocks(form: _Minifloat, codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """fp32 (blocks, BLOCK), of codes of that shape and exponents (blocks,), all int64."""
    bases = form.bases(exponents)
    magnitude = codes & form.top
    place = bases + (magnitude << form.shift)
    even = _bits(_floats(place) - _floats(bases))
    bits = torch.where(magnitude < 1 << form.mantissa, even, place - (1 << 23))
    if form.is_signed:
        bits |= (codes & 0x80) << 24
    return _floats(torch.where(exponents[:, None] == NOT_FINITE, _NAN, bits))


def reference_split_master(master: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """``split_master``, of checked tensors on any device."""
    ties = []
    for chunk in _chunks(master.numel()):
        bits = _bits(master[chunk])
        rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        rounded = torch.where((bits & _MAGNITUDE) > _INF, _NAN >> 16, rounded)
        weight[chunk].view(torch.int16).copy_(rounded)
        remainder[chunk].copy_(bits)
        ties.append(((bits & 0x1FFFF) == 0x8000).nonzero().flatten() + chunk.start)
    return torch.cat([master.new_empty(0, dtype=torch.int32), *(found.to(torch.int32) for found in ties)])


def reference_join_master(weight: torch.Tensor, remainder: torch.Tensor, ties: torch.Tensor, out: torch.Tensor) -> None:
    """``join_master``, of checked tensors on any device."""
    for chunk in _chunks(out.numel()):
        low = remainder[chunk].to(torch.int64) & 0xFFFF
        high = weight[chunk].view(torch.int16).to(torch.int64) & 0xFFFF
        out[chunk].copy_(_floats((high << 16) + low - ((low & 0x8000) << 1)))
    bits = out.view(torch.int32)
    bits[ties.to(torch.int64)] += 0x10000
