"""Files by path and by descriptor."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
from pathlib import Path

import pytest

from offload_opt import AioHandle
from tests.aio.support import O_DIRECT, READS, WRITES, make_buffer, random_bytes


@pytest.mark.parametrize("direct", [0, O_DIRECT], ids=["cached", "O_DIRECT"])
def test_a_descriptor_may_be_closed_at_once(handle: AioHandle, direct: int, folder: Path) -> None:
    file, other = folder / "file", folder / "other"
    for size, offset in ((65536, 0), (300_001, 77), (10, 5)):
        payload = random_bytes(size)
        file.write_bytes(b"")
        try:
            fd = os.open(file, os.O_RDWR | direct)
        except OSError as error:
            pytest.skip(f"no O_DIRECT here: {error}")
        future = handle.async_pwrite(make_buffer("locked tensor", handle, payload, 0).whole, fd, offset)
        with other.open("wb") as opened:
            os.dup2(opened.fileno(), fd)  # closes it, and gives its number to another file
        assert future.wait() == size
        os.close(fd)
        assert file.read_bytes() == bytes(offset) + payload
        assert other.stat().st_size == 0

        fd = os.open(file, os.O_RDONLY | direct)
        target = make_buffer("locked tensor", handle, bytes(size), 0)
        future = handle.async_pread(target.whole, fd, offset)
        os.close(fd)
        assert future.wait() == size
        assert target.contents() == payload


@pytest.mark.parametrize("direct", [0, O_DIRECT], ids=["cached", "O_DIRECT"])
def test_a_descriptor_stays_as_it_was(handle: AioHandle, direct: int, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | direct, 0o600)
    try:
        os.lseek(fd, 123, os.SEEK_SET)
        for number, (write, read) in enumerate(zip(WRITES.values(), READS.values(), strict=True)):
            payload = random_bytes(10_000, number)
            assert write(handle, bytearray(payload), fd, 300) == 10_000
            back = bytearray(10_000)
            assert read(handle, back, fd, 300) == 10_000
            assert back == payload
            assert os.lseek(fd, 0, os.SEEK_CUR) == 123
    finally:
        os.close(fd)


def test_a_descriptor_of_a_file_without_a_name(handle: AioHandle, folder: Path) -> None:
    payload = random_bytes(100_000)
    with tempfile.TemporaryFile(dir=folder) as file:
        handle.sync_pwrite(bytearray(payload), file.fileno(), 1)
        back = bytearray(100_000)
        handle.sync_pread(back, file.fileno(), 1)
        assert back == payload


def test_an_appending_descriptor_writes_where_it_is_told(handle: AioHandle, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    with file.open("ab") as opened:
        with contextlib.suppress(OSError, ValueError):  # to refuse it would be right as well
            handle.sync_pwrite(bytearray(b"abc"), opened.fileno(), 2)
        assert file.read_bytes() in (b"01abc56789", b"0123456789")


def test_a_descriptor_that_is_closed_or_open_the_other_way(handle: AioHandle, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10))
    for flags, transfer in ((os.O_RDONLY, handle.async_pwrite), (os.O_WRONLY, handle.async_pread)):
        fd = os.open(file, flags)
        with pytest.raises(OSError, match=f"<fd {fd}>") as caught:
            transfer(bytearray(10), fd)
        assert caught.value.errno == errno.EBADF
        os.close(fd)
        with pytest.raises(OSError, match=f"<fd {fd}>") as caught:
            transfer(bytearray(10), fd)
        assert caught.value.errno == errno.EBADF


def test_what_has_no_offsets_is_refused_at_once(handle: AioHandle) -> None:
    fds = [os.eventfd(0), *os.openpty(), *os.pipe()]
    fds += [end.detach() for end in socket.socketpair()]
    try:
        terminal = os.ttyname(fds[2])
        for filename, name in [*((fd, f"<fd {fd}>") for fd in fds), (terminal, terminal)]:
            for start in (handle.async_pread, handle.async_pwrite):
                with pytest.raises(OSError, match="Illegal seek: neither a regular file") as caught:
                    start(bytearray(8), filename)
                assert (caught.value.errno, caught.value.filename) == (errno.ESPIPE, name)
        assert handle.wait() == 0
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("name", [b"caf\xc3\xa9 \"'\n", b"\xff\xfe not UTF-8"])
def test_names_with_any_bytes(handle: AioHandle, name: bytes, tmp_path: Path) -> None:
    for filename in (tmp_path / os.fsdecode(name), str(tmp_path / os.fsdecode(name))):
        assert handle.write(bytearray(b"abc"), filename) == 3
        with pytest.raises(OSError, match="4 bytes") as caught:
            handle.read(bytearray(4), filename)
        assert caught.value.filename == str(filename)


def test_what_is_no_file_name(handle: AioHandle) -> None:
    for filename in ("", "a\0b", -1, True):
        with pytest.raises(ValueError, match="filename"):
            handle.async_pwrite(bytearray(1), filename)
    with pytest.raises(TypeError):
        handle.async_pwrite(bytearray(1), 1.5)  # type: ignore[arg-type]


def test_a_new_file_is_made_and_an_old_one_is_not_cut(handle: AioHandle, tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert handle.sync_pwrite(bytearray(), file) == 0
    assert file.read_bytes() == b""
    handle.sync_pwrite(bytearray(b"0123456789"), file)
    handle.sync_pwrite(bytearray(b"ab"), file, 3)
    assert file.read_bytes() == b"012ab56789"
