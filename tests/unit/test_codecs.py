"""Codecs: what comes back of a state tensor, and that the native loops and the tensor operations agree in every bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch

from offload_opt import ConfigError, codecs, reference
from offload_opt.codecs import BelowZeroError, Bf16, Coding, Int8, Master, StateCodec, rounding_key
from offload_opt.reference import BLOCK, NOT_FINITE
from tests.conftest import seed
from tests.unit.codec_values import (
    ALL,
    HUGE,
    LEAST,
    NOT_A_NUMBER,
    SOURCES,
    bits,
    decoded,
    encoded,
    every_codec,
    every_int8,
    floats,
    numbers,
    of_all_sizes,
    reference_decoded,
    reference_encoded,
    round_trip,
    same,
    storage,
    suited,
)

# Native loops and tensor operations.


@every_codec
@pytest.mark.parametrize("source", SOURCES)
def test_native_and_reference_agree(codec: StateCodec, source: str) -> None:
    key, first = numbers()
    values = suited(codec, SOURCES[source](20_000 + 37))
    stored = encoded(codec, values, key, first)
    for ours, theirs in zip(stored, reference_encoded(codec, values, key, first), strict=True):
        assert same(ours, theirs)
    assert same(decoded(codec, stored, len(values)), reference_decoded(codec, stored, len(values)))


@every_codec
def test_ragged_ends_agree(codec: StateCodec) -> None:
    key, first = numbers()
    values = suited(codec, of_all_sizes(300, finite=False))
    for numel in range(301):
        run = values[:numel].clone()
        stored = encoded(codec, run, key, first)
        for ours, theirs in zip(stored, reference_encoded(codec, run, key, first), strict=True):
            assert same(ours, theirs), numel
        assert same(decoded(codec, stored, numel), reference_decoded(codec, stored, numel)), numel


@every_codec
def test_element_numbers_go_past_32_bits(codec: StateCodec) -> None:
    values = suited(codec, torch.randn(3 * BLOCK))
    for first in (2**32 - BLOCK, 2**32 - 1, 2**32 - 200, 3 * 2**32 - 5, 2**62):
        stored = encoded(codec, values, 5, first)
        for ours, theirs in zip(stored, reference_encoded(codec, values, 5, first), strict=True):
            assert same(ours, theirs), first
    assert not same(encoded(codec, values, 5, 0)[0], encoded(codec, values, 5, 2**32)[0])


@every_codec
def test_any_stored_bytes_decode_alike(codec: StateCodec) -> None:
    stored = [
        torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        for _, dtype, n in codec.parts(100 * BLOCK)
    ]
    assert same(decoded(codec, stored, 100 * BLOCK), reference_decoded(codec, stored, 100 * BLOCK))


@every_codec
def test_chunks_of_the_reference_leave_no_trace(codec: StateCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    values = suited(codec, torch.randn(5 * BLOCK + 3))
    monkeypatch.setattr(reference, "_CHUNK", 2 * BLOCK)
    for ours, theirs in zip(encoded(codec, values), reference_encoded(codec, values, 1, 0), strict=True):
        assert same(ours, theirs)


# Randomness.


@every_codec
def test_same_key_same_bytes(codec: StateCodec) -> None:
    values = suited(codec, torch.randn(5000))
    once, again, other = (encoded(codec, values, key) for key in (3, 3, 4))
    assert all(same(a, b) for a, b in zip(once, again, strict=True))
    assert not same(once[0], other[0])


@every_codec
def test_bytes_do_not_depend_on_where_a_run_starts(codec: StateCodec) -> None:
    values = suited(codec, of_all_sizes(4096))
    first = numbers()[1]
    whole = encoded(codec, values, 9, first)
    cuts = sorted({0, 4096, *(random.Random(seed()).randrange(4096) // BLOCK * BLOCK for _ in range(5))})
    for start, stop in itertools.pairwise(cuts):
        run = encoded(codec, values[start:stop].clone(), 9, first + start)
        assert same(run[0], whole[0][start:stop])
        for exponents, of_whole in zip(run[1:], whole[1:], strict=True):
            assert same(exponents, of_whole[start // BLOCK : -(-stop // BLOCK)])


@every_codec
def test_a_part_that_starts_at_a_granule_decodes_by_itself(codec: StateCodec) -> None:
    values = suited(codec, torch.randn(1000))
    stored = encoded(codec, values)
    start = 3 * codec.granule
    part = [stored[0][start:], *(exponents[start // BLOCK :] for exponents in stored[1:])]
    assert same(decoded(codec, part, 1000 - start), decoded(codec, stored, 1000)[start:])


def errors_of_mean(codec: StateCodec, values: torch.Tensor, keys: int = 4000) -> torch.Tensor:
    """How many standard errors the mean over many keys is off, for each value that is often rounded either way."""
    many = torch.stack([round_trip(codec, values, rounding_key(i, 0, str(seed()))) for i in range(keys)]).double()
    rarer = torch.minimum((many == many.amin(0)).sum(0), (many == many.amax(0)).sum(0))
    return ((many.mean(0) - values.double()) / many.std(0) * keys**0.5)[(rarer > keys / 40) & (many.std(0) > 0)]


@every_codec
@pytest.mark.parametrize("scale", [1e-38, 1e-9, 1.0, 1e37])
def test_rounding_is_unbiased(codec: StateCodec, scale: float) -> None:
    values = suited(codec, torch.randn(2 * BLOCK))
    if codec == Int8(is_signed=False):
        values += 1e-3  # smaller values are rounded up, so as not to vanish
    else:
        values[::5] *= 1e-3  # in int8, between zero and the smallest code
    if codec != ALL[0]:
        scale = max(scale, 1e-35)  # below 2^-126, all is rounded up
    off = errors_of_mean(codec, values * scale)
    assert len(off) > BLOCK
    assert off.abs().max() < 6
    assert 0.7 < off.square().mean().sqrt() < 1.3  # as independent errors are


def test_rounding_errors_of_neighbours_keys_and_states_are_independent() -> None:
    """By pairs, over many stretches of elements that share the numbers from which their random bits are made."""
    values = torch.full((4 * reference.STRETCH,), 1.0 + 2.0**-8)  # halfway
    keys, stretches = 300, 4 * 300

    def errors(step: int, parameter: int, name: str) -> torch.Tensor:
        stored = [round_trip(Bf16(), values, rounding_key(step + i, parameter, name)) for i in range(keys)]
        return torch.stack(stored).gt(1).double() * 2 - 1

    ours, *others = (errors(*key) for key in ((0, 0, "exp_avg"), (keys, 0, "exp_avg"), (0, 1, "exp_avg")))
    others += [errors(0, 0, "exp_avg_sq"), *(ours.roll(far, 1) for far in (1, 2, 7, BLOCK, reference.STRETCH))]
    for other in others:
        assert abs(float((ours * other).mean())) < 5 / stretches**0.5
    sums = ours.view(stretches, reference.STRETCH).sum(1)
    assert abs(float(sums.mean())) < 5 * (reference.STRETCH / stretches) ** 0.5
    # 1 for independent ones; of other keys it may be further off: a step near 0 rounds a whole stretch alike.
    assert 0.5 < float(sums.square().mean()) / reference.STRETCH < 2


# What comes back.


def test_bf16_keeps_what_it_has() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = every.to(torch.float32)
    back = round_trip(Bf16(), values)
    assert same(back[~values.isnan()], values[~values.isnan()])
    assert bool(back[values.isnan()].isnan().all())


def test_bf16_rounds_to_one_of_two_neighbours() -> None:
    values = of_all_sizes(50_000)
    back = bits(round_trip(Bf16(), values)).to(torch.int64)
    down = bits(values).to(torch.int64) & ~0xFFFF
    assert bool(((back == down) | (back == down + 0x10000)).all())


def test_bf16_keeps_finite_finite_and_infinite_infinite() -> None:
    values = torch.tensor([HUGE, -HUGE, *NOT_A_NUMBER]).repeat(500)
    back = round_trip(Bf16(), values)
    largest = float(torch.finfo(torch.bfloat16).max)
    assert torch.equal(back[0::5], torch.full((500,), largest))
    assert torch.equal(back[1::5], torch.full((500,), -largest))
    assert torch.equal(back[2::5], values[2::5])
    assert torch.equal(back[3::5], values[3::5])
    assert bool(back[4::5].isnan().all())
    hidden = floats(torch.arange(0x7F800001, 0x7F810000, 257))  # NaNs that truncating would make an inf
    assert bool(round_trip(Bf16(), hidden).isnan().all())


@every_int8
def test_int8_error_is_bounded(codec: Int8) -> None:
    values = suited(codec, of_all_sizes(100 * BLOCK)).view(-1, BLOCK).double()
    back = round_trip(codec, values.flatten().float()).view(-1, BLOCK).double()
    largest = values.abs().amax(1, keepdim=True)
    step = torch.maximum(values.abs() * 2.0**-4, (largest * 2.0 ** (-9 if codec.is_signed else -17)).clamp(2.0**-126))
    assert bool(((back - values).abs() <= step).all())
    assert bool(((back == 0) | (back.sign() == values.sign())).all())
    assert bool(back.isfinite().all())


@every_int8
def test_int8_keeps_what_it_has(codec: Int8) -> None:
    """Decoded once, values are at codes, and encoding them again changes nothing, whatever the key."""
    once = round_trip(codec, suited(codec, of_all_sizes(100 * BLOCK)), key=1)
    assert same(round_trip(codec, once, key=2), once)


@every_int8
def test_int8_codes_ascend(codec: Int8) -> None:
    codes = torch.arange(128 if codec.is_signed else 256, dtype=torch.uint8)
    exponents = torch.arange(255, dtype=torch.uint8)
    for exponent in exponents:
        values = decoded(codec, [codes, exponent.repeat(len(codes) // BLOCK)], len(codes))
        assert values[0] == 0
        assert bool((values.diff() > 0).all())
        assert bool(values.isfinite().all())
        assert values[1] >= 2.0**-126


@every_int8
def test_int8_zero_is_zero(codec: Int8) -> None:
    values = torch.zeros(2 * BLOCK)
    values[BLOCK:] = 1.0
    values[BLOCK::3] = 0.0
    back = round_trip(codec, values)
    assert same(back, values)
    blank = [torch.zeros(n, dtype=dtype) for _, dtype, n in codec.parts(300)]  # a state that was never written
    assert same(decoded(codec, blank, 300), torch.zeros(300))


@every_int8
def test_int8_shows_what_is_not_finite(codec: Int8) -> None:
    for trouble in (float("inf"), float("nan"), *([float("-inf")] if codec.is_signed else [])):
        values = suited(codec, torch.randn(3 * BLOCK))
        values[BLOCK + 17] = trouble
        stored = encoded(codec, values)
        assert stored[1].tolist().index(NOT_FINITE) == 1
        back = decoded(codec, stored, len(values)).view(3, BLOCK)
        assert bool(back[1].isnan().all())
        assert bool(back[[0, 2]].isfinite().all())


@every_int8
def test_int8_takes_the_largest_there_is(codec: Int8) -> None:
    values = torch.full((BLOCK * 50,), HUGE)
    assert bool((round_trip(codec, values) == 1.9375 * 2.0**127).all())


def test_nothing_but_zero_becomes_zero_without_signs() -> None:
    codec = Int8(is_signed=False)
    for source in SOURCES.values():
        values = source(30_000).abs()
        values = values[values.isfinite()]
        assert torch.equal(round_trip(codec, values) == 0, values == 0)
    least = torch.full((BLOCK,), LEAST)
    least[5] = HUGE
    assert bool((round_trip(codec, least) > 0).all())


def test_a_denormal_block_is_scaled_from_the_least_exponent() -> None:
    values = SOURCES["denormal"](1000)
    least = torch.full_like(values, 2.0**-126)
    assert torch.equal(round_trip(Int8(is_signed=False), values), torch.where(values == 0, 0.0, least))
    back = round_trip(Int8(is_signed=True), values)
    assert set(back.unique().tolist()) == {0.0, 2.0**-126}


@pytest.mark.parametrize("bad", [-1.0, -LEAST, float("-inf")])
@pytest.mark.parametrize("at", [0, 127, 128, 300, 515, 519])
def test_a_value_below_zero_is_named(bad: float, at: int) -> None:
    codec = Int8(is_signed=False)
    values = torch.rand(520)
    values[at:] = bad
    values[0] = -0.0 if at else bad
    values[at - 1 :][:1] = float("nan") if at else bad
    with pytest.raises(BelowZeroError, match=rf"element {1000 + at} is -.*cannot be below zero"):
        encoded(codec, values, 1, 1000)
    stored = storage(codec, 520)
    assert reference.encode_int8(False, values, *stored, 1, 1000) == at


# What is refused.


@every_codec
def test_wrong_arguments_are_refused_before_anything_is_touched(codec: StateCodec) -> None:
    values, stored = torch.rand(256), storage(codec, 256)
    before = [part.clone() for part in stored]
    shorter = [part[:-1] for part in stored]
    wrong: list[tuple[type[Exception], torch.Tensor, list[torch.Tensor], int, int]] = [
        (TypeError, values.double(), stored, 1, 0),
        (TypeError, values.to(torch.bfloat16), stored, 1, 0),
        (TypeError, values, [stored[0].to(torch.int32), *stored[1:]], 1, 0),
        (ValueError, values.view(2, 128), stored, 1, 0),
        (ValueError, torch.rand(512)[::2], stored, 1, 0),
        (ValueError, values[:100], stored, 1, 0),
        (ValueError, values, shorter, 1, 0),
        (ValueError, values, [*stored, stored[0]], 1, 0),
        (ValueError, values, [], 1, 0),
        (ValueError, values, [stored[0].to("meta"), *stored[1:]], 1, 0),
        (ValueError, values, stored, -1, 0),
        (ValueError, values, stored, 1 << 64, 0),
        (ValueError, values, stored, 1, -1),
        (ValueError, values, stored, 1, 1 << 63),
    ]
    for error, bad_values, bad_stored, key, first in wrong:
        with pytest.raises(error):
            codecs.encode([Coding(codec, bad_stored, bad_values)], [key], first)
    for error, bad_values, bad_stored, key, first in wrong:
        if (key, first) == (1, 0):
            with pytest.raises(error):
                codecs.decode([Coding(codec, bad_stored, bad_values)])
    assert all(same(a, b) for a, b in zip(stored, before, strict=True))


# Choosing.


def test_codec_for() -> None:
    assert codecs.codec_for("exact", "exp_avg") is None
    assert codecs.codec_for("bf16", "exp_avg_sq") == Bf16()
    assert codecs.codec_for("remainder", "master") == Master()
    assert codecs.codec_for("int8", "exp_avg") == Int8(is_signed=True)
    assert codecs.codec_for("int8", "momentum_buffer") == Int8(is_signed=True)
    for name in codecs.NON_NEGATIVE:
        assert codecs.codec_for("int8", name) == Int8(is_signed=False)
    with pytest.raises(ConfigError, match="'int4'"):
        codecs.codec_for("int4", "exp_avg")


OPTIMIZERS: list[Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = [
    lambda p: torch.optim.AdamW(p, amsgrad=True),
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    lambda p: torch.optim.SGD(p, momentum=0.9),
    torch.optim.ASGD,
    torch.optim.Rprop,
    torch.optim.Adafactor,
    torch.optim.Muon,
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: getattr(make, "__name__", "lambda"))
def test_state_that_is_never_negative_is_known(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
) -> None:
    parameter = torch.nn.Parameter(torch.randn(40, 40))
    optimizer = make([parameter])
    seen: dict[str, bool] = {}
    for _ in range(20):
        parameter.grad = torch.randn(40, 40)
        optimizer.step()
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                seen[name] = seen.get(name, True) and bool((value >= 0).all())
    for name, is_non_negative in seen.items():
        assert codecs.codec_for("int8", name) == Int8(is_signed=not is_non_negative), name


def test_keys_are_what_they_ever_were() -> None:
    """A run that is resumed by a later version must go on with the same numbers."""
    assert rounding_key(1, 2, "exp_avg") == 11459067232805393054
    assert len({rounding_key(s, p, n) for s in range(20) for p in range(20) for n in ("a", "b")}) == 800
    assert all(0 <= rounding_key(s, 1 << 40, "x") < 1 << 64 for s in range(50))


def test_stored_bytes_are_what_they_ever_were() -> None:
    """Files of an earlier version must be read, and a step repeated, as they were."""
    values = torch.tensor([0.0, 2.0**-20, 0.001, 0.01, 0.1, 1 / 3, 0.7, 1.0])
    key, first = 7, 2**33
    signed, non_negative = (
        encoded(Int8(is_signed), values - 0.01 * is_signed, key, first) for is_signed in (True, False)
    )
    assert [part.tolist() for part in signed] == [[138, 138, 137, 0, 55, 85, 102, 111], [127]]
    assert [part.tolist() for part in non_negative] == [[0, 1, 80, 133, 186, 213, 230, 240], [127]]
    (bf16,) = encoded(Bf16(), values, key, first)
    assert bits(bf16).tolist() == [0, 13696, 14979, 15396, 15821, 16043, 16179, 16256]
    random = reference.random_bits(key, 2**32 - 2, 4, torch.device("cpu")) >> 13  # what is used of them
    assert random.tolist() == [81177, 68003, 204379, 40419]


@pytest.mark.gpu
@every_codec
def test_a_gpu_gives_the_same_bytes(codec: StateCodec) -> None:
    key, first = numbers()
    for source in SOURCES.values():
        values = suited(codec, source(3 * BLOCK * 999 + 5))
        stored = encoded(codec, values, key, first)
        on_gpu = [part.cuda() for part in storage(codec, len(values))]
        codecs.encode([Coding(codec, on_gpu, values.cuda())], [key], first)
        assert all(same(ours, theirs.cpu()) for ours, theirs in zip(stored, on_gpu, strict=True))
        out = torch.empty(len(values), device="cuda")
        codecs.decode([Coding(codec, on_gpu, out)])
        assert same(out.cpu(), decoded(codec, stored, len(values)))
