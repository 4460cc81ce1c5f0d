"""The codecs of codecs.py in tensor operations, bit for bit as csrc/codec.cpp has them: for tensors on any device.

All functions take checked tensors. Unsigned 32-bit numbers are held in int64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

BLOCK = 128
"""Elements that share an exponent in int8."""
STRETCH = 1024
"""Elements that share the numbers from which their random bits are made."""
NOT_FINITE = 255
"""The exponent of a block of int8 that has an inf or NaN."""

_LOW32 = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_QUIET = 0x00400000
_NAN = 0x7FC00000
# Elements that are looked at together: a bound of temporary memory, in whole blocks.
_CHUNK = 1 << 20


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """The bits of fp32 values, as int64."""
    return values.view(torch.int32).to(torch.int64) & _LOW32


def floats_of(bits: torch.Tensor) -> torch.Tensor:
    """Back from ``bits_of``."""
    return bits.to(torch.int32).view(torch.float32)  # the conversion keeps the low 32 bits


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _CHUNK):
        yield slice(start, min(start + _CHUNK, count))


def random_bits(key: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """For each of ``count`` elements 32 bits, of which the upper 23 are random: as in csrc/codec.cpp."""
    stretch = torch.arange(first // STRETCH, (first + count - 1) // STRETCH + 1, dtype=torch.int64, device=device)
    x = (stretch + 1) * _signed(0x9E3779B97F4A7C15) + _signed(key)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = (x ^ _shifted(x, 31))[:, None]
    bits = x + _shifted(x, 32) * torch.arange(STRETCH, dtype=torch.int64, device=device) & _LOW32
    return bits.flatten()[first % STRETCH :][:count]


def _signed(number: int) -> int:
    """An unsigned number of 64 bits as int64 has it."""
    return number - (number >> 63 << 64)


def _shifted(x: torch.Tensor, places: int) -> torch.Tensor:
    """int64 as unsigned numbers, shifted to the right."""
    return x >> places & (1 << 64 - places) - 1


def encode_bf16(values: torch.Tensor, stored: torch.Tensor, key: int, first: int) -> None:
    """``encode`` of a Bf16."""
    for chunk in _chunks(values.numel()):
        bits = bits_of(values[chunk])
        magnitude = bits & _MAGNITUDE
        random = random_bits(key, first + chunk.start, len(bits), bits.device)
        rounded = (magnitude + (random >> 16)).clamp(max=_INF - 1)
        special = torch.where(magnitude > _INF, magnitude | _QUIET, magnitude)
        result = torch.where(magnitude >= _INF, special, rounded) | bits & ~_MAGNITUDE
        stored[chunk].view(torch.int16).copy_(result >> 16)


def decode_bf16(stored: torch.Tensor, out: torch.Tensor) -> None:
    """``decode`` of a Bf16."""
    torch.bitwise_left_shift(stored.view(torch.int16).to(torch.int32), 16, out=out.view(torch.int32))


@dataclasses.dataclass(frozen=True)
class Minifloat:
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


def blocks(elements: torch.Tensor) -> torch.Tensor:
    """(n,) -> (blocks, BLOCK), filled up with zeros."""
    return torch.nn.functional.pad(elements, (0, -len(elements) % BLOCK)).view(-1, BLOCK)


def encode_int8(
    is_signed: bool, values: torch.Tensor, codes: torch.Tensor, exponents: torch.Tensor, key: int, first: int
) -> int:
    """``encode`` of an Int8. Returns where one is below zero, or ``n``."""
    for chunk in _chunks(values.numel()):
        bits = bits_of(values[chunk])
        if not is_signed:
            negative = (bits > _MAGNITUDE + 1) & (bits <= _MAGNITUDE + 1 + _INF)
            if negative.any():
                return int(chunk.start) + int(negative.to(torch.uint8).argmax())
        random = random_bits(key, first + chunk.start, len(bits), bits.device)
        chunk_codes, chunk_exponents = encode_blocks(Minifloat(is_signed), blocks(bits), blocks(random))
        codes[chunk].copy_(chunk_codes.flatten()[: len(bits)])
        exponents[chunk.start // BLOCK :][: len(chunk_exponents)].copy_(chunk_exponents)
    return values.numel()


def encode_blocks(form: Minifloat, bits: torch.Tensor, random: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (blocks, BLOCK) and exponents (blocks,), all int64."""
    magnitude = bits & _MAGNITUDE
    largest = magnitude.amax(1)
    exponents = (largest + ((1 << form.shift) - 1) >> 23).clamp(form.least, 254)
    bases = form.bases(exponents)
    even = bits_of(floats_of(magnitude) + floats_of(bases))
    place = torch.where(magnitude < bases, even, magnitude + (1 << 23)) - bases
    codes = (place + (random >> 32 - form.shift) >> form.shift).clamp(max=form.top)
    if form.is_signed:
        codes |= (bits & ~_MAGNITUDE) >> 24
    else:
        codes = torch.where(magnitude == 0, 0, codes.clamp(min=1))
    finite = largest < _INF
    return torch.where(finite[:, None], codes, 0), torch.where(finite, exponents, NOT_FINITE)


def decode_int8(is_signed: bool, codes: torch.Tensor, exponents: torch.Tensor, out: torch.Tensor) -> None:
    """``decode`` of an Int8."""
    for chunk in _chunks(out.numel()):
        code = blocks(codes[chunk].to(torch.int64))
        exponent = exponents[chunk.start // BLOCK :][: len(code)].to(torch.int64)
        out[chunk].copy_(decode_blocks(Minifloat(is_signed), code, exponent).flatten()[: chunk.stop - chunk.start])


def decode_blocks(form: Minifloat, codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """fp32 (blocks, BLOCK), of codes of that shape and exponents (blocks,), all int64."""
    bases = form.bases(exponents)
    magnitude = codes & form.top
    place = bases + (magnitude << form.shift)
    even = bits_of(floats_of(place) - floats_of(bases))
    bits = torch.where(magnitude < 1 << form.mantissa, even, place - (1 << 23))
    if form.is_signed:
        bits |= (codes & 0x80) << 24
    return floats_of(torch.where(exponents[:, None] == NOT_FINITE, _NAN, bits))


def split_master(master: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """``encode`` of a Master. Returns the ties."""
    ties = []
    for chunk in _chunks(master.numel()):
        bits = bits_of(master[chunk])
        rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        rounded = torch.where((bits & _MAGNITUDE) > _INF, _NAN >> 16, rounded)
        weight[chunk].view(torch.int16).copy_(rounded)
        remainder[chunk].copy_(bits)
        ties.append(((bits & 0x1FFFF) == 0x8000).nonzero().flatten() + chunk.start)
    return torch.cat([master.new_empty(0, dtype=torch.int32), *(found.to(torch.int32) for found in ties)])


def join_master(weight: torch.Tensor, remainder: torch.Tensor, ties: torch.Tensor, out: torch.Tensor) -> None:
    """``decode`` of a Master; ``ties`` are those of the run."""
    for chunk in _chunks(out.numel()):
        low = remainder[chunk].to(torch.int64) & 0xFFFF
        high = weight[chunk].view(torch.int16).to(torch.int64) & 0xFFFF
        out[chunk].copy_(floats_of((high << 16) + low - ((low & 0x8000) << 1)))
    bits = out.view(torch.int32)
    bits[ties.to(torch.int64)] += 0x10000
