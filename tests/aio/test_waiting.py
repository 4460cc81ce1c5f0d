"""wait(), futures, errors, and transfers behind others."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest

from offload_opt import AioHandle, IoFuture
from tests.aio.support import fails, random_bytes


def test_wait_counts_what_was_asynchronous(handle: AioHandle, tmp_path: Path) -> None:
    assert handle.wait() == 0
    data = bytearray(random_bytes(200_000))
    futures = [handle.async_pwrite(data, tmp_path / str(i)) for i in range(7)]
    assert [future.wait() for future in futures] == [200_000] * 7
    handle.sync_pwrite(data, tmp_path / "8")
    handle.write(data, tmp_path / "9")
    handle.pread(bytearray(10), tmp_path / "9", False, True)
    handle.async_pwrite(bytearray(), tmp_path / "10")
    assert handle.wait() == 9
    assert handle.wait() == 0
    assert all(future.done() for future in futures)
    assert futures[0].wait() == 200_000


def test_a_blocking_call_waits_for_itself_alone(handle: AioHandle, tmp_path: Path) -> None:
    failed = fails(handle)
    assert handle.sync_pwrite(bytearray(10), tmp_path / "file") == 10
    with pytest.raises(OSError, match="/dev/full"):
        failed.wait()
    assert handle.wait() == 1


def test_wait_raises_when_all_has_ended(handle: AioHandle, tmp_path: Path) -> None:
    data = bytearray(random_bytes(1_000_000))
    first = fails(handle)
    while not first.done():
        os.sched_yield()
    after = handle.async_pwrite(bytearray(1), tmp_path / "never", after=[first])
    good = [handle.async_pwrite(data, tmp_path / str(i)) for i in range(8)]
    with pytest.raises(OSError, match="/dev/full") as caught:
        handle.wait()
    assert caught.value.errno == errno.ENOSPC
    assert all(future.done() for future in [first, after, *good])
    assert all((tmp_path / str(i)).read_bytes() == data for i in range(8))
    assert handle.wait() == 0
    for future, number in ((first, errno.ENOSPC), (after, errno.ECANCELED)):
        for _ in range(2):  # a future's error is its own, however often asked
            with pytest.raises(OSError, match="/dev/full") as caught:
                future.wait()
            assert caught.value.errno == number


def test_an_error_is_told_once(handle: AioHandle, tmp_path: Path) -> None:
    first, second = fails(handle), fails(handle)
    for future in (first, second):
        with pytest.raises(OSError, match="/dev/full"):
            future.wait()
    assert handle.wait() == 2

    told, untold = fails(handle), fails(handle)
    with pytest.raises(OSError, match="/dev/full"):
        told.wait()
    with pytest.raises(OSError, match="/dev/full"):
        handle.wait()
    assert handle.wait() == 0
    assert untold.done()
    assert handle.async_pwrite(bytearray(5), tmp_path / "file").wait() == 5  # the handle still works
    assert handle.wait() == 1


def test_an_error_outlives_its_future(handle: AioHandle) -> None:
    fails(handle)
    gc.collect()
    with pytest.raises(OSError, match="/dev/full"):
        handle.wait()


def test_after_orders_transfers(handle: AioHandle, tmp_path: Path) -> None:
    file = tmp_path / "file"
    size = 300_000
    last: list[IoFuture] = []
    reads = []
    for number in range(30):
        write = handle.async_pwrite(bytearray([number]) * size, file, after=last)
        target = bytearray(size)
        reads.append((number, target))
        # The file is new, and has these bytes only when the write has ended.
        last = [handle.async_pread(target, file, after=[write])]
    assert handle.wait() == 60
    for number, target in reads:
        assert target == bytearray([number]) * size


def test_after_several_and_after_what_has_ended(handle: AioHandle, tmp_path: Path) -> None:
    file = tmp_path / "file"
    size = 200_000
    for _ in range(5):
        parts = [handle.async_pwrite(bytearray([i]) * size, file, i * size) for i in range(6)]
        target = bytearray(6 * size)
        read = handle.async_pread(target, file, after=parts)
        assert read.wait() == 6 * size
        assert target == b"".join(bytes([i]) * size for i in range(6))
        again = bytearray(size)
        assert handle.async_pread(again, file, after=[*parts, read, read]).wait() == size
        assert again == bytes(size)
        file.unlink()


def test_behind_a_failed_transfer_nothing_starts(handle: AioHandle, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before")
    for _ in range(10):
        failed = fails(handle)
        good = handle.async_pwrite(bytearray(3), tmp_path / "other")
        behind = handle.async_pwrite(bytearray(6), file, after=[good, failed])
        behind_that = handle.async_pread(bytearray(6), file, after=[behind])
        beside = handle.async_pwrite(bytearray(3), tmp_path / "third", after=[good])
        for future in (behind, behind_that):
            with pytest.raises(OSError, match="/dev/full") as caught:
                future.wait()
            assert caught.value.errno == errno.ECANCELED
        assert (good.wait(), beside.wait()) == (3, 3)
        with pytest.raises(OSError, match="/dev/full") as caught:
            failed.wait()
        assert caught.value.errno == errno.ENOSPC
        assert handle.wait() == 5
        assert file.read_bytes() == b"before"


def test_behind_others_the_end_of_the_file_is_looked_at_late(handle: AioHandle, tmp_path: Path) -> None:
    file = tmp_path / "file"
    write = handle.async_pwrite(bytearray(100_000), file)
    read = handle.async_pread(bytearray(100_001), file, after=[write])
    with pytest.raises(OSError, match=r"100001 bytes.*100000 bytes") as caught:
        read.wait()
    assert caught.value.errno == errno.ENODATA
    assert handle.wait() == 2


def test_after_a_transfer_of_another_handle(handle: AioHandle, engine: str, tmp_path: Path) -> None:
    with AioHandle(engine=engine) as other:
        future = other.async_pwrite(bytearray(1), tmp_path / "file")
        with pytest.raises(ValueError, match="another handle"):
            handle.async_pwrite(bytearray(1), tmp_path / "file", after=[future])
    assert handle.wait() == 0
