"""Codings: several tensors of a run at once, on several threads, and masters with their ties."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from offload_opt import codecs, reference
from offload_opt.codecs import BelowZeroError, Bf16, Coding, Int8, Master, StateCodec
from tests import scripts
from tests.conftest import seed
from tests.unit.codec_values import (
    SOURCES,
    bits,
    decoded,
    encoded,
    every_codec,
    floats,
    numbers,
    of_all_sizes,
    same,
    storage,
    suited,
)

# Threads.


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads as torch's loops have; more than there are cores, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_the_threads_are_torchs(threads: int) -> None:
    if "OpenMP not found" in torch.__config__.parallel_info():
        pytest.skip("this torch has no OpenMP")
    assert codecs.thread_count() == threads


LENGTHS = [1 << 15, (1 << 15) + 1, 100_003, 1 << 17]  # from one thread's worth on


@every_codec
@pytest.mark.parametrize("numel", LENGTHS)
def test_bytes_do_not_depend_on_the_number_of_threads(codec: StateCodec, numel: int, threads: int) -> None:
    values = suited(codec, of_all_sizes(numel))
    stored = encoded(codec, values, 5, 11)
    alone = [encoded(codec, part.clone(), 5, 11 + i * 4096) for i, part in enumerate(values.split(4096))]
    assert all(same(whole, torch.cat(parts)) for whole, parts in zip(stored, zip(*alone, strict=True), strict=True))
    backs = [decoded(codec, part, part[0].numel()) for part in alone]
    assert same(decoded(codec, stored, numel), torch.cat(backs))


@pytest.mark.parametrize("numel", LENGTHS)
def test_ties_come_in_order_from_all_threads(numel: int, threads: int) -> None:
    master = torch.randn(numel)
    at = torch.randperm(numel)[: numel // 50].sort().values
    master[at] = 1.0 + 2.0**-8
    assert set(at.tolist()) <= set(assert_splits(master).tolist())


def test_the_first_value_below_zero_is_named_by_all_threads(threads: int) -> None:
    values = torch.rand(1 << 17)
    values[40_001::30_000] = -1.0  # in the parts of several threads
    with pytest.raises(ValueError, match="element 40001 is -1"):
        encoded(Int8(is_signed=False), values)


# The split master.


def split_master(master: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Returns the ties."""
    ties = codecs.encode([Coding(Master(), [remainder], master, weight)], [0], 0)
    assert ties is None or len(ties)
    return torch.empty(0, dtype=torch.int32) if ties is None else ties


def join_master(weight: torch.Tensor, remainder: torch.Tensor, ties: torch.Tensor | None, out: torch.Tensor) -> None:
    codecs.decode([Coding(Master(), [remainder], out, weight, ties)])


def assert_splits(master: torch.Tensor) -> torch.Tensor:
    """Split and join ``master`` both ways; returns the ties."""
    parts = [
        (torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)) for _ in "ab"
    ]
    ties = split_master(master, *parts[0])
    assert same(reference.split_master(master, *parts[1]), ties)
    assert all(same(a, b) for a, b in zip(*parts, strict=True))
    weight, remainder = parts[0]
    nan = master.isnan()
    assert same(weight[~nan], master.to(torch.bfloat16)[~nan])
    assert bool((bits(weight)[nan] == 0x7FC0).all())
    assert torch.equal(remainder, bits(master).to(torch.int16))
    out, reference_out = torch.empty_like(master), torch.empty_like(master)
    join_master(weight, remainder, ties, out)
    reference.join_master(weight, remainder, ties, reference_out)
    assert same(out, reference_out)
    assert same(out[~nan], master[~nan])
    assert bool(out[nan].isnan().all())
    return ties


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_split_master_of_every_high_half(low: int) -> None:
    pattern = (torch.arange(1 << 16, dtype=torch.int64) << 16) + low
    ties = assert_splits(floats(pattern))
    evens = torch.arange(0, 1 << 16, 2, dtype=torch.int32)
    assert torch.equal(ties, evens if low == 0x8000 else evens[:0])


@pytest.mark.parametrize("source", SOURCES)
def test_split_master_of_random_values(source: str) -> None:
    assert_splits(SOURCES[source](1 << 18))


def test_ties_are_found_wherever_they_are() -> None:
    for numel in (*range(70), 1023, 1024, 1025, 5000):
        master = torch.ones(numel)
        at = torch.randperm(numel)[: numel // 3].sort().values
        master[at] = 1.0 + 2.0**-8
        assert torch.equal(assert_splits(master), at.to(torch.int32))


def test_a_training_run_on_bf16_weights_and_remainders_is_exact() -> None:
    master = torch.randn(3000)
    weight, remainder = torch.empty(3000, dtype=torch.bfloat16), torch.empty(3000, dtype=torch.int16)
    plain = master.clone()
    for _ in range(50):
        ties = split_master(master, weight, remainder)
        master = torch.full_like(master, float("nan"))
        join_master(weight, remainder, ties, master)
        step = torch.randn(3000) * 1e-4
        master += step
        plain += step
    assert same(master, plain)


def test_ties_of_a_longer_run_are_found_from_its_position_on() -> None:
    master = torch.ones(300_000)
    master[::3] = 1.0 + 2.0**-8
    weight, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    ties = split_master(master, weight, remainder)
    bounds = [0, *sorted(random.Random(seed()).randrange(300_000) for _ in range(5)), 300_000]
    for begin, end in itertools.pairwise(bounds):
        out = torch.full((end - begin,), 5.0)
        codecs.decode([Coding(Master(), [remainder[begin:end]], out, weight[begin:end], ties, begin)])
        assert same(out, master[begin:end]), f"seed {seed()}"


def test_the_default_device_does_not_matter() -> None:
    code = """
        import torch
        torch.set_default_device("meta")
        from offload_opt import codecs
        with torch.device("cpu"):
            master, weight = torch.full((64,), 1.0 + 2.0**-8), torch.zeros(64, dtype=torch.bfloat16)
            remainder, back = torch.zeros(64, dtype=torch.int16), torch.zeros(64)
        ties = codecs.encode([codecs.Coding(codecs.Master(), [remainder], master, weight)], [0], 0)
        codecs.decode([codecs.Coding(codecs.Master(), [remainder], back, weight, ties)])
        assert torch.equal(back, master)
    """
    scripts.run_well(code)


# All tensors of a run at once.


def test_tensors_of_several_lengths_are_as_each_alone() -> None:
    values = [torch.randn(300), torch.rand(257), torch.randn(300)]
    kinds: list[StateCodec] = [Int8(True), Int8(False), Bf16()]
    codings = [Coding(codec, storage(codec, len(v)), v) for codec, v in zip(kinds, values, strict=True)]
    codecs.encode(codings, [1, 2, 3], 0)
    for coding, key in zip(codings, [1, 2, 3], strict=True):
        alone = encoded(coding.codec, coding.values, key)
        assert all(same(a, b) for a, b in zip(alone, coding.stored, strict=True))
    back = [Coding(coding.codec, coding.stored, torch.empty_like(coding.values)) for coding in codings]
    codecs.decode(back)
    for coding in back:
        assert same(coding.values, decoded(coding.codec, list(coding.stored), coding.values.numel()))
    values[1][200] = -1.0
    with pytest.raises(BelowZeroError, match="element 200") as caught:
        codecs.encode(codings, [1, 2, 3], 0)
    assert caught.value.index == 1


@pytest.mark.parametrize("numel", LENGTHS)
def test_tensors_together_are_as_each_alone(numel: int, threads: int) -> None:
    key, first = numbers()
    keys = [key, key ^ 1, key ^ 2, key ^ 3]
    values = [suited(codec, torch.randn(numel)) for codec in (Bf16(), Int8(True), Int8(False), Bf16())]
    kinds: list[StateCodec] = [Bf16(), Int8(True), Int8(False), Master()]
    values[3][::7] = 1.0 + 2.0**-8
    weight = torch.empty(numel, dtype=torch.bfloat16)
    weights = [None, None, None, weight]
    together = [Coding(c, storage(c, numel), v, w) for c, v, w in zip(kinds, values, weights, strict=True)]
    ties = codecs.encode(together, keys, first)
    for coding, own_key in zip(together[:3], keys, strict=False):
        alone = encoded(coding.codec, coding.values, own_key, first)
        assert all(same(a, b) for a, b in zip(alone, coding.stored, strict=True)), f"seed {seed()}"
    assert same(weight, values[3].to(torch.bfloat16))
    back = [Coding(c.codec, c.stored, torch.full((numel,), 77.0), c.weight, ties) for c in together]
    codecs.decode(back)
    for coding in back[:3]:
        assert same(coding.values, decoded(coding.codec, list(coding.stored), numel))
    assert same(back[3].values, values[3])


def test_what_runs_on_other_devices_gives_the_same_bytes() -> None:
    numel, (key, first) = 1000, numbers()
    for codec in (Bf16(), Int8(True), Int8(False), Master()):
        values = suited(codec, torch.randn(numel))
        values[::7] = 1.0 + 2.0**-8
        weights = [torch.zeros(numel, dtype=torch.bfloat16) if codec == Master() else None for _ in "ab"]
        ours, theirs = (Coding(codec, storage(codec, numel), values, weight) for weight in weights)
        ties = codecs.encode([ours], [key], first)
        found = codecs._reference_encode(theirs, key, first, 0)
        assert ties is found is None or torch.equal(found, ties)
        assert all(same(a, b) for a, b in zip(ours.stored, theirs.stored, strict=True)), f"seed {seed()}"
        given = None if ties is None else torch.cat([torch.tensor([0, 3]), ties + 5, torch.tensor([numel + 5])]).int()
        back, there = (Coding(codec, c.stored, torch.empty(numel), c.weight, given, 5) for c in (ours, theirs))
        codecs.decode([back])
        codecs._reference_decode(there)
        assert same(back.values, there.values), f"seed {seed()}"
    with pytest.raises(BelowZeroError, match="element 3 is -1") as caught:
        codecs._reference_encode(Coding(Int8(False), storage(Int8(False), 5), torch.arange(2.0, -3, -1)), 1, 0, 4)
    assert caught.value.index == 4


def test_the_tensor_with_a_value_below_zero_is_told(threads: int) -> None:
    bad = torch.rand(1 << 17)
    bad[100_000] = bad[70_000] = -1.0
    kinds: list[tuple[StateCodec, torch.Tensor]] = [(Bf16(), -bad), (Int8(False), bad), (Int8(False), bad)]
    codings = [Coding(codec, storage(codec, len(values)), values) for codec, values in kinds]
    with pytest.raises(BelowZeroError, match="element 70005") as caught:
        codecs.encode(codings, [1, 2, 3], 5)
    assert caught.value.index == 1


def test_split_master_refuses_wrong_arguments() -> None:
    good = torch.rand(10), torch.zeros(10, dtype=torch.bfloat16), torch.zeros(10, dtype=torch.int16)
    for position in range(3):
        for error, change in (
            (TypeError, lambda t: t.to(torch.float64)),
            (ValueError, lambda t: t[:5]),
            (ValueError, lambda t: t.view(2, 5)),
            (ValueError, lambda t: t.to("meta")),
        ):
            bad = [change(tensor) if i == position else tensor for i, tensor in enumerate(good)]
            with pytest.raises(error):
                split_master(*bad)
            with pytest.raises(error):
                join_master(bad[1], bad[2], None, bad[0])
    with pytest.raises(TypeError, match="ties"):
        join_master(good[1], good[2], torch.zeros(1, dtype=torch.int64), good[0])
    with pytest.raises(ValueError, match="a master has a weight"):
        codecs.decode([Coding(Master(), [good[2]], good[0])])
    with pytest.raises(ValueError, match="2 masters"):
        codecs.decode([Coding(Master(), [good[2]], good[0], good[1])] * 2)
    with pytest.raises(ValueError, match="a weight, which bf16 has no use for"):
        codecs.decode([Coding(Bf16(), [good[1]], good[0], good[1])])
    with pytest.raises(dataclasses.FrozenInstanceError):
        Coding(Bf16(), [good[1]], good[0]).values = torch.zeros(10)  # type: ignore[misc]
    with pytest.raises(ValueError, match="1 keys for 2 tensors"):
        codecs.encode([Coding(Bf16(), [good[1].clone()], good[0]) for _ in range(2)], [1], 0)


def test_two_devices_are_refused() -> None:
    here = Coding(Bf16(), [torch.zeros(10, dtype=torch.bfloat16)], torch.ones(10))
    there = Coding(Bf16(), [torch.zeros(10, dtype=torch.bfloat16, device="meta")], torch.ones(10, device="meta"))
    for pair in ([here, there], [there, here]):
        with pytest.raises(ValueError, match="values are on"):
            codecs.decode(pair)
        with pytest.raises(ValueError, match="values are on"):
            codecs.encode(pair, [1, 2], 0)
    assert same(here.values, torch.ones(10))
    assert same(here.stored[0], torch.zeros(10, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_a_gpu_splits_masters_alike() -> None:
    master = torch.cat([source(1 << 16) for source in SOURCES.values()])
    weight, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    ties = split_master(master, weight, remainder)
    on_gpu = weight.cuda(), remainder.cuda()
    assert torch.equal(split_master(master.cuda(), *on_gpu), ties)
    assert same(on_gpu[0].cpu(), weight)
    out = torch.empty_like(master, device="cuda")
    join_master(*on_gpu, ties, out)
    assert same(out.cpu()[~master.isnan()], master[~master.isnan()])
