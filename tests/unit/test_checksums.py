"""Checksums of units: what they are, that parts may be added before, and that a store's are those of its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from offload_opt import OffloadOptimizer
from offload_opt.checksums import LEAF_BYTES, Checksum, RunningChecksum, checksum_of
from offload_opt.manifest import MANIFEST, Manifest, read_manifest
from tests import conftest

SIZES = [0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 33 * LEAF_BYTES, 100 * LEAF_BYTES + 4097]


def reference(data: bytes) -> str:
    leaves = (data[begin : begin + LEAF_BYTES] for begin in range(0, len(data), LEAF_BYTES))
    hashes = b"".join(xxhash.xxh3_64_intdigest(leaf).to_bytes(8, "little") for leaf in leaves)
    return f"xxh3_leaves:{xxhash.xxh3_128_hexdigest(hashes)}"


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", SIZES)
def test_it_is_a_hash_over_the_hashes_of_leaves(size: int) -> None:
    data = random_bytes(size)
    assert checksum_of(data) == reference(data.numpy().tobytes())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("seed", range(10))
def test_parts_that_were_added_change_nothing(seed: int) -> None:
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    data = random_bytes(50 * LEAF_BYTES + 99, seed)
    checksum = Checksum(data)
    for count in (0, 1, 5):
        firsts, lengths = torch.randint(0, len(data), (2, count), generator=generator).tolist()
        checksum.add([(a, min(n, len(data) - a)) for a, n in zip(firsts, lengths, strict=True)])
    assert checksum.text() == reference(data.numpy().tobytes())


def test_of_nothing() -> None:
    empty = torch.empty(0)
    checksum = Checksum(empty)
    checksum.add([])
    checksum.add([(0, 0)])
    assert checksum.text() == checksum_of(empty) == RunningChecksum().text() == reference(b"")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.int64], ids=str)
def test_it_is_of_bytes(dtype: torch.dtype) -> None:
    data = random_bytes(6 * LEAF_BYTES + 8)
    assert checksum_of(data.view(dtype)) == reference(data.numpy().tobytes())


def test_a_part_that_was_added_is_not_looked_at_again() -> None:
    data = random_bytes(4 * LEAF_BYTES)
    checksum, old = Checksum(data), data.clone()
    checksum.add([(LEAF_BYTES - 1, 2 * LEAF_BYTES)])  # one whole leaf
    data += 1
    old[:LEAF_BYTES], old[2 * LEAF_BYTES :] = data[:LEAF_BYTES], data[2 * LEAF_BYTES :]
    assert checksum.text() == checksum_of(old) != checksum_of(data)


@pytest.mark.parametrize("parts", [[LEAF_BYTES, 4 * LEAF_BYTES], [1, LEAF_BYTES, 5, 3 * LEAF_BYTES - 7], [0, 0], []])
def test_parts_one_after_the_other(parts: list[int]) -> None:
    data = random_bytes(7 * LEAF_BYTES + 5)
    running = RunningChecksum()
    begin = 0
    for size in [*parts, len(data) - sum(parts)]:
        buffer = data[begin : begin + size].clone()
        begin += size
        running.update(buffer)
        buffer.zero_()
        assert running.text() == checksum_of(data[:begin])


@pytest.mark.parametrize("seed", range(10))
def test_random_parts_one_after_the_other(seed: int) -> None:
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    most = int(torch.randint(1, 3 * LEAF_BYTES, (), generator=generator))
    running, data = RunningChecksum(), b""
    for size in torch.randint(0, most, (20,), generator=generator).tolist():
        part = random_bytes(size, seed + size)
        running.update(part)
        data += part.numpy().tobytes()
    assert running.text() == reference(data)


def check_files(store: Path) -> Manifest:
    """Each unit that the last commit names, of state and of weights, has the checksum of its bytes."""
    folder = store / "rank-00000-of-00001"
    manifest = read_manifest(folder / MANIFEST)
    for layout in (manifest.state, manifest.weights):
        for unit in () if layout is None else layout.units:
            data = (folder / "units" / unit.file).read_bytes()[unit.data_start :]
            assert len(data) == unit.nbytes
            assert unit.checksum == reference(data), f"{unit.file}, epoch {manifest.epoch}, seed {conftest.seed()}"
    return manifest


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": {"exp_avg": "int8"}}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.bfloat16, {"master_weights": True, "state_dtype": "bf16"}),
        (torch.bfloat16, {"master_weights": True, "state_dtype": "int8"}),
        (torch.float16, {"master_weights": True}),
        (torch.bfloat16, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adafactor])
def test_a_store_has_those_of_its_files(make: Any, dtype: torch.dtype, fields: dict[str, Any], store: Path) -> None:
    """Also where an update goes on with bytes that were hashed: then a read would fail, too."""
    if make is torch.optim.Adafactor and "state_dtype" in fields:
        fields = {**fields, "state_dtype": "bf16"}
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in [(300_017,), (211, 127), (5,), (64, 64, 3)]]
    # Units of more than a leaf, of which some stay in memory from step to step.
    memory = "8MiB" if make is torch.optim.Adafactor else "768KiB"
    optimizer = OffloadOptimizer(make(parameters), store, host_memory=memory, checksum="read", **fields)
    with optimizer:
        for step in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter) if step != 2 or parameter.dim() != 2 else None
            optimizer.step()
            if step % 2:
                optimizer.snapshot()
        assert make is torch.optim.Adafactor or optimizer.stats.bytes_read
    assert check_files(store).state.units


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": "int8"}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.bfloat16, {"master_weights": True, "state_dtype": "bf16"}),
        (torch.bfloat16, {"master_weights": True, "state_dtype": "int8"}),
        (torch.float16, {"master_weights": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("least", "memory"),
    [(70_000, {"host_memory": "64KiB"}), (300_000, {"host_memory": "256KiB", "unit_size": "80KiB"})],
    ids=["units below a leaf", "units of several leaves"],
)
@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, momentum=0.9)], ids=["AdamW", "SGD"])
def test_every_step_commits_those_of_its_files(
    make: Any, least: int, memory: dict[str, str], dtype: torch.dtype, fields: dict[str, Any], store: Path
) -> None:
    sizes = [least + int(torch.randint(20_000, ())), int(torch.randint(1, 20_000, ())), 3]
    parameters = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    fields = {**memory, **fields, "checksum": "read", "durability": "step"}
    with OffloadOptimizer(make(parameters), store, **fields) as optimizer:
        for epoch in range(1, 4):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            optimizer.synchronize()  # the commit, too
            manifest = check_files(store)
            assert manifest.epoch == epoch
        assert len(manifest.state.units) > 2
        assert optimizer.stats.bytes_read
