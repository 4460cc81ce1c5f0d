"""Values that codecs are tried with, and what the tests of codecs have in common."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from offload_opt import codecs, reference
from offload_opt.codecs import Bf16, Coding, Int8, StateCodec
from offload_opt.reference import BLOCK
from tests.conftest import seed

ALL: list[StateCodec] = [Bf16(), Int8(is_signed=True), Int8(is_signed=False)]
IDS = ["bf16", "signed", "non-negative"]
INT8 = ALL[1:]
every_codec = pytest.mark.parametrize("codec", ALL, ids=IDS)
every_int8 = pytest.mark.parametrize("codec", INT8, ids=IDS[1:])

LEAST = 2.0**-149
HUGE = torch.finfo(torch.float32).max
EDGE = 1.9375 * 2.0**127
"""The largest value of a block of int8 whose exponent is as it is; above it, that is the largest there is."""
SPECIAL = [0.0, -0.0, LEAST, -LEAST, 2.0**-127, -(2.0**-126), 1e-20, 1.0, -1.0, 3.3895e38, HUGE, -HUGE]
NOT_A_NUMBER = [float("inf"), float("-inf"), float("nan")]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.view(same_size[tensor.dtype.itemsize])


def floats(pattern: torch.Tensor) -> torch.Tensor:
    """fp32 of these bits, given as int64."""
    return pattern.to(torch.int32).view(torch.float32)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(bits(a), bits(b))


def storage(codec: StateCodec, numel: int) -> list[torch.Tensor]:
    return [torch.full((n,), 77).to(dtype) for _, dtype, n in codec.parts(numel)]


def encoded(codec: StateCodec, values: torch.Tensor, key: int = 1, first: int = 0) -> list[torch.Tensor]:
    stored = storage(codec, values.numel())
    codecs.encode([Coding(codec, stored, values)], [key], first)
    return stored


def decoded(codec: StateCodec, stored: list[torch.Tensor], numel: int) -> torch.Tensor:
    out = torch.full((numel,), 77.0)
    codecs.decode([Coding(codec, stored, out)])
    return out


def round_trip(codec: StateCodec, values: torch.Tensor, key: int = 1, first: int = 0) -> torch.Tensor:
    return decoded(codec, encoded(codec, values, key, first), values.numel())


def suited(codec: StateCodec, values: torch.Tensor) -> torch.Tensor:
    """Values that the codec takes: without signs, but for that of zero, where it must be so."""
    if codec != Int8(is_signed=False):
        return values
    return torch.where((values == 0) | values.isnan(), values, values.abs())


def random_bits(numel: int) -> torch.Tensor:
    """Every pattern is as likely: denormals, huge values, NaN."""
    return floats(torch.randint(0, 1 << 32, (numel,), dtype=torch.int64))


def of_all_sizes(numel: int, finite: bool = True) -> torch.Tensor:
    """Blocks of very different sizes, each with values from its largest down to nothing, and the special ones."""
    sizes = torch.randint(-160, 128, (-(-numel // BLOCK),)).repeat_interleave(BLOCK)[:numel]
    values = torch.randn(numel, dtype=torch.float64) * 2.0 ** (sizes - 40 * torch.rand(numel) ** 4)
    values = values.clamp(-HUGE, HUGE).to(torch.float32)
    at = torch.randint(0, numel, (numel // 40,))
    pool = torch.tensor(SPECIAL if finite else SPECIAL + NOT_A_NUMBER)
    values[at] = pool[torch.randint(0, len(pool), (len(at),))]
    return values


def at_the_edge(numel: int) -> torch.Tensor:
    """Blocks whose largest value is ``EDGE``, or the next one above it."""
    values = EDGE * (1 - torch.rand(numel) ** 4)
    at = torch.arange(0, numel, BLOCK)
    values[at] = floats(torch.tensor(EDGE).view(torch.int32) + torch.randint(0, 2, (len(at),)))
    return values


SOURCES: dict[str, Callable[[int], torch.Tensor]] = {
    "bits": random_bits,
    "normal": torch.randn,
    "finite": of_all_sizes,
    "any": lambda numel: of_all_sizes(numel, finite=False),
    "denormal": lambda numel: floats(torch.randint(0, 1 << 23, (numel,), dtype=torch.int64)),
    "zero": torch.zeros,
    "edge": at_the_edge,
}


def reference_encoded(codec: StateCodec, values: torch.Tensor, key: int, first: int) -> list[torch.Tensor]:
    stored = storage(codec, values.numel())
    if isinstance(codec, Int8):
        negative = reference.encode_int8(codec.is_signed, values, *stored, key, first)
        assert negative == values.numel()
    else:
        reference.encode_bf16(values, *stored, key, first)
    return stored


def reference_decoded(codec: StateCodec, stored: list[torch.Tensor], numel: int) -> torch.Tensor:
    out = torch.full((numel,), 77.0)
    if isinstance(codec, Int8):
        reference.decode_int8(codec.is_signed, *stored, out)
    else:
        reference.decode_bf16(*stored, out)
    return out


def numbers() -> tuple[int, int]:
    """A key and the number of a first element: small, huge, and just before a multiple of 2^32."""
    generator = random.Random(seed())
    firsts = [0, generator.randrange(1 << 31), (generator.randrange(1, 1 << 20) << 32) - generator.randrange(1, 2000)]
    return generator.randrange(1 << 64), generator.choice(firsts)
