"""Bytes go where they should, and nowhere else."""

from __future__ import annotations

import errno
import os
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_opt import AioHandle, ConfigError
from tests.aio.support import (
    EXAMPLES,
    FOLDERS,
    KINDS,
    OFFSETS,
    READS,
    SETTINGS,
    SHIFTS,
    SIZES,
    WAYS,
    WRITES,
    is_counted,
    make_buffer,
    new_folder,
    overlay,
    random_bytes,
)
from tests.conftest import seed


@pytest.mark.parametrize("kind_of_folder", FOLDERS)
@EXAMPLES
@given(data=st.data())
def test_any_size_offset_setting_buffer_and_way(engine: str, kind_of_folder: str, data: st.DataObject) -> None:
    options: Any = data.draw(SETTINGS, "settings")
    size, offset = data.draw(SIZES, "size"), data.draw(OFFSETS, "offset")
    kind, shift = data.draw(st.sampled_from(KINDS), "buffer"), data.draw(SHIFTS, "shift")
    write, read = data.draw(st.sampled_from(sorted(WRITES)), "write"), data.draw(st.sampled_from(sorted(READS)), "read")
    before = random_bytes(data.draw(SIZES, "bytes before"), 1)
    with new_folder(kind_of_folder) as folder, AioHandle(**options, engine=engine) as handle:
        file = folder / "file"
        file.write_bytes(before)
        payload = random_bytes(size, 2)
        source = make_buffer(kind, handle, payload, shift)
        assert WRITES[write](handle, source.whole, file, offset) == size
        assert source.contents() == payload
        expected = overlay(before, payload, offset)
        assert file.read_bytes() == expected

        begin = data.draw(st.integers(0, len(expected)), "read offset")
        length = data.draw(st.integers(0, len(expected) - begin), "read size")
        target = make_buffer(kind, handle, b"\xaa" * length, shift)
        assert READS[read](handle, target.whole, file, begin) == length
        assert target.contents() == expected[begin : begin + length]
        assert target.is_alone_changed()
        assert file.read_bytes() == expected
        assert handle.wait() == is_counted(write) + is_counted(read)


@pytest.mark.parametrize("block_size", [1, 3, 511])
def test_blocks_smaller_than_a_sector(engine: str, block_size: int, folder: Path) -> None:
    payload = random_bytes(5000)
    with AioHandle(block_size=block_size, queue_depth=4, num_threads=2, engine=engine) as handle:
        assert handle.sync_pwrite(bytearray(payload), folder / "file", 4000) == 5000
        back = bytearray(5000)
        assert handle.sync_pread(back, folder / "file", 4000) == 5000
    assert back == payload


@EXAMPLES
@given(data=st.data())
def test_transfers_at_once_to_parts_that_share_pages(engine: str, data: st.DataObject) -> None:
    # Parts of a page through the page cache beside parts past it: the kernel orders nothing of that for us.
    total = data.draw(st.integers(1, 200_000), "total")
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=12), "cuts")})
    order = data.draw(st.permutations(list(pairwise(cuts))), "order")
    shift = data.draw(SHIFTS, "shift")
    payload = random_bytes(total)
    options: Any = data.draw(SETTINGS, "settings")
    with new_folder("disk") as folder, AioHandle(**options, engine=engine) as handle:
        file = folder / "file"
        for begin, end in order:
            handle.async_pwrite(make_buffer("tensor", handle, payload[begin:end], shift).whole, file, begin)
        assert handle.wait() == len(order)
        assert file.read_bytes() == payload
        targets = [make_buffer("tensor", handle, bytes(end - begin), shift) for begin, end in order]
        for target, (begin, _) in zip(targets, order, strict=True):
            handle.async_pread(target.whole, file, begin)
        assert handle.wait() == len(order)
        for target, (begin, end) in zip(targets, order, strict=True):
            assert target.contents() == payload[begin:end]


Step = tuple[str, int, int]


def play(engine: str, steps: list[Step], options: dict[str, Any]) -> tuple[list[int | str], bytes]:
    """Do the steps. Returns the result of each, bytes or the name of an errno, and the file afterwards."""
    results: list[int | str] = []
    with new_folder("disk") as folder, AioHandle(**options, engine=engine) as handle:
        file = folder / "file"
        file.touch()
        for number, (way, offset, size) in enumerate(steps):
            transfer = WAYS[way]
            buffer = bytearray(random_bytes(size, number))
            try:
                results.append(transfer(handle, buffer, file, offset))
            except OSError as error:
                results.append(errno.errorcode[error.errno or 0])
        return results, file.read_bytes()


@EXAMPLES
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(WAYS)), OFFSETS, SIZES), min_size=1, max_size=6),
    options=SETTINGS,
)
def test_engines_do_the_same(steps: list[Step], options: dict[str, Any]) -> None:
    results, content = play("threads", steps, options)
    model = b""
    for number, ((way, offset, size), result) in enumerate(zip(steps, results, strict=True)):
        if way in WRITES:
            model = overlay(model, random_bytes(size, number), offset)
            assert result == size
        else:
            assert result == (size if size == 0 or offset + size <= len(model) else "ENODATA")
    assert content == model
    try:
        other = play("io_uring", steps, options)
    except ConfigError as error:
        pytest.skip(str(error))
    assert other == (results, content)


def test_tensors_of_any_dtype_and_shape(handle: AioHandle, tmp_path: Path) -> None:
    dtypes = [torch.bfloat16, torch.float64, torch.bool, torch.int16, torch.complex64]
    shapes: list[tuple[int, ...]] = [(), (1,), (3, 5, 7), (100, 333)]
    for dtype, shape in product(dtypes, shapes):
        source = (torch.randn(shape) * 10).to(dtype)
        target = torch.zeros(shape, dtype=dtype)
        assert handle.sync_pwrite(source, tmp_path / "file") == source.nbytes
        assert handle.read(target, tmp_path / "file") == source.nbytes
        assert torch.equal(source, target), f"seed {seed()}"


def test_a_parameter_that_requires_grad(handle: AioHandle, tmp_path: Path) -> None:
    source, target = torch.nn.Parameter(torch.randn(1000)), torch.nn.Parameter(torch.zeros(1000))
    handle.sync_pwrite(source, tmp_path / "file")
    handle.sync_pread(target, tmp_path / "file")
    assert torch.equal(source, target), f"seed {seed()}"


@pytest.mark.parametrize("array", [np.asfortranarray(np.arange(12.0).reshape(3, 4)), np.array(3.5)], ids=["F", "0-dim"])
def test_arrays_are_moved_in_the_order_of_their_memory(handle: AioHandle, array: Any, tmp_path: Path) -> None:
    assert handle.write(array, tmp_path / "file") == array.nbytes
    assert (tmp_path / "file").read_bytes() == array.tobytes(order="A")


def test_far_into_a_sparse_file(handle: AioHandle, folder: Path) -> None:
    for offset in (2**31 - 10, 2**32 + 12_345, 5 * 2**30 + 4096):
        file = folder / str(offset)
        payload = random_bytes(70_001)
        assert handle.sync_pwrite(bytearray(payload), file, offset) == len(payload)
        assert file.stat().st_size == offset + len(payload)
        for read in ("read", "async_pread"):
            back = bytearray(len(payload) + 10)
            assert READS[read](handle, back, file, offset - 10) == len(back)
            assert back == bytes(10) + payload


@pytest.mark.skipif(not os.environ.get("OFFLOAD_OPT_LARGE_TESTS"), reason="slow: set OFFLOAD_OPT_LARGE_TESTS")
def test_one_transfer_of_more_than_two_gib(engine: str, tmp_path: Path) -> None:
    source = torch.arange((2**31 + 4104) // 8)
    target = torch.zeros_like(source)
    with AioHandle(num_threads=2, engine=engine) as handle:
        for write, read in (("async_pwrite", "async_pread"), ("write", "read")):
            assert WRITES[write](handle, source, tmp_path / "file", 0) == source.nbytes
            assert READS[read](handle, target.zero_(), tmp_path / "file", 0) == source.nbytes
            assert torch.equal(source, target)
