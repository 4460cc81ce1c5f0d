"""What is wrong is refused, and says what it is."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offload_opt import AioHandle
from tests import scripts
from tests.aio.support import READS, WAYS, WRITES, is_counted


def test_past_the_end_of_the_file(handle: AioHandle, folder: Path) -> None:
    file = folder / "file"
    file.write_bytes(bytes(5000))
    for way, read in READS.items():
        for offset, size in ((0, 5001), (4096, 8192), (5000, 1), (70_000, 4096), (2**40, 4096)):
            with pytest.raises(OSError, match=rf"{size} bytes.*{offset}.*5000 bytes") as caught:
                read(handle, bytearray(size), file, offset)
            assert caught.value.errno == errno.ENODATA
            assert caught.value.filename == str(file)
        assert read(handle, bytearray(904), file, 4096) == 904
        assert handle.wait() == is_counted(way)


def test_a_missing_file(handle: AioHandle, tmp_path: Path) -> None:
    for read in READS.values():
        with pytest.raises(FileNotFoundError) as caught:
            read(handle, bytearray(1), tmp_path / "missing", 0)
        assert caught.value.filename == str(tmp_path / "missing")
        assert not (tmp_path / "missing").exists()


def test_a_missing_file_or_folder_is_an_error_at_once(handle: AioHandle, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        handle.async_pread(bytearray(1), tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        handle.async_pwrite(bytearray(1), tmp_path / "missing" / "file")
    assert handle.wait() == 0


def test_a_directory_as_file(handle: AioHandle, tmp_path: Path) -> None:
    for transfer in WAYS.values():
        with pytest.raises(IsADirectoryError) as caught:
            transfer(handle, bytearray(10), tmp_path, 0)
        assert caught.value.filename == str(tmp_path)


def test_a_negative_offset(handle: AioHandle, tmp_path: Path) -> None:
    for transfer in WAYS.values():
        with pytest.raises(ValueError, match="-1"):
            transfer(handle, bytearray(10), tmp_path / "file", -1)
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "offset",
    [
        2**63 - 50,
        2**63,
        2**64 - 10,
    ],
)
def test_an_offset_that_no_file_has(handle: AioHandle, offset: int, tmp_path: Path) -> None:
    for transfer in WAYS.values():
        with pytest.raises((OSError, ValueError)):
            transfer(handle, bytearray(100), tmp_path / "file", offset)


def read_only_array() -> Any:
    array = np.zeros(10, dtype=np.uint8)
    array.flags.writeable = False
    return array


def test_a_read_only_buffer(handle: AioHandle, tmp_path: Path) -> None:
    for buffer in (bytes(10), read_only_array(), memoryview(bytes(10))):
        for read in READS.values():
            # The file is missing: the buffer is looked at first.
            with pytest.raises(TypeError, match="read-only"):
                read(handle, buffer, tmp_path / "missing", 0)


def test_a_read_only_buffer_can_be_written(handle: AioHandle, tmp_path: Path) -> None:
    assert handle.sync_pwrite(b"0123456789", tmp_path / "file") == 10
    assert handle.async_pwrite(read_only_array(), tmp_path / "file", 5).wait() == 10
    assert (tmp_path / "file").read_bytes() == b"01234" + bytes(10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(10, 10).t(),
        lambda: torch.zeros(10)[::2],
        lambda: torch.zeros(1).expand(10),
        lambda: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: np.zeros(10)[::2],
        lambda: memoryview(bytearray(10))[::2],
    ],
    ids=["transposed", "strided", "expanded", "channels last", "numpy", "memoryview"],
)
def test_a_buffer_that_is_not_contiguous(handle: AioHandle, make: Callable[[], Any], tmp_path: Path) -> None:
    for transfer in WAYS.values():
        with pytest.raises(ValueError, match="contiguous"):
            transfer(handle, make(), tmp_path / "file", 0)
    assert not (tmp_path / "file").exists()


def test_what_is_no_buffer(handle: AioHandle, tmp_path: Path) -> None:
    for buffer in ([1, 2], "text", 5, None, torch.empty(4, device="meta")):
        with pytest.raises(TypeError, match="buffer"):
            handle.async_pwrite(buffer, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_lazy_conjugate(handle: AioHandle, tmp_path: Path) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j]).conj()
    with contextlib.suppress(ValueError, TypeError):  # to refuse it would be right as well
        handle.write(values, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == values.resolve_conj().numpy().tobytes()


def test_a_closed_handle(engine: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    handle = AioHandle(engine=engine)
    handle.close()
    handle.close()
    for transfer in WAYS.values():
        with pytest.raises(ValueError, match="closed"):
            transfer(handle, bytearray(6), tmp_path / "file", 0)
    assert (tmp_path / "file").read_bytes() == b"before"


def test_the_disk_is_full(handle: AioHandle) -> None:
    for write in WRITES:
        with pytest.raises(OSError, match="offset 8192") as caught:
            WRITES[write](handle, bytearray(10_000), "/dev/full", 8192)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == "/dev/full"
    assert handle.wait() == sum(is_counted(write) for write in WRITES)


FILE_TOO_LARGE = """
import errno, os, resource, signal, sys, torch
from offload_opt import AioHandle
engine, path = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_001, 1_000_001))
buffer = torch.full((3_000_000,), 7, dtype=torch.uint8)
with AioHandle(block_size=300_000, num_threads=2, engine=engine) as handle:
    for write in (
        lambda: handle.async_pwrite(buffer, path).wait(),
        lambda: handle.write(buffer, path),
        lambda: handle.sync_pwrite(buffer, path, 999_999),
        lambda: handle.sync_pwrite(buffer[:100_000], path, 950_000),  # one block, of which a part fits
        lambda: (handle.async_pwrite(buffer, path), handle.wait()),
    ):
        try:
            write()
        except OSError as error:
            assert error.errno == errno.EFBIG, error
            assert error.filename == path, error
            assert "offset" in str(error), error
        else:
            sys.exit("there was no error")
    assert handle.sync_pwrite(buffer[:2], path, 999_999) == 2
assert os.path.getsize(path) == 1_000_001
"""


def test_a_file_that_may_not_grow(engine: str, tmp_path: Path) -> None:
    scripts.run_well(FILE_TOO_LARGE, engine, tmp_path / "file")


def test_validation_finds_a_difference(handle: AioHandle) -> None:
    ones = bytearray(b"\1" * 10_000)
    for write in (name for name in WRITES if "validated" in name):
        with pytest.raises(OSError, match=r"validation.*differ at offset 4096") as caught:
            WRITES[write](handle, ones, "/dev/zero", 4096)  # takes anything, and gives back zeros
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == "/dev/zero"
    for read in (name for name in READS if "validated" in name):
        with pytest.raises(OSError, match=r"validation.*differ"):
            READS[read](handle, bytearray(10_000), "/dev/urandom", 0)
    assert WRITES["pwrite"](handle, ones, "/dev/zero", 0) == 10_000
