"""Lifetimes: buffers, descriptors, threads and processes."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offload_opt import AioHandle
from tests import scripts
from tests.aio.support import READS, WRITES, fails, random_bytes
from tests.conftest import seed


@pytest.mark.parametrize("keep_future", [True, False])
@pytest.mark.parametrize("kind", ["tensor", "numpy array", "memoryview"])
def test_buffers_live_until_their_transfer_has_ended(
    handle: AioHandle, kind: str, keep_future: bool, tmp_path: Path
) -> None:
    size = 2_000_000
    makers: dict[str, Callable[[Any], Any]] = {
        "tensor": torch.from_numpy,
        "numpy array": np.asarray,
        "memoryview": memoryview,
    }
    references, futures = [], []
    for number in range(8):
        array = np.full(size, number, dtype=np.uint8)
        references.append(weakref.ref(array))
        buffer = makers[kind](array)
        future = handle.async_pwrite(buffer, tmp_path / str(number))
        if keep_future:
            futures.append(future)
        del array, buffer, future
    gc.collect()
    garbage = [np.full(size, 0xFF, dtype=np.uint8) for _ in range(8)]  # takes the memory, were it free
    if keep_future:
        assert all(reference() is not None for reference in references)
    assert handle.wait() == 8
    assert all((tmp_path / str(i)).read_bytes() == bytes([i]) * size for i in range(8))
    futures.clear()
    gc.collect()
    assert [reference() for reference in references] == [None] * 8
    del garbage


def test_a_tensor_may_be_given_other_memory(handle: AioHandle, tmp_path: Path) -> None:
    array = np.full(1_000_000, 7, dtype=np.uint8)
    memory = weakref.ref(array)
    tensor = torch.from_numpy(array)
    future = handle.async_pwrite(tensor, tmp_path / "file")
    tensor.data = torch.zeros(1, dtype=torch.uint8)  # as frameworks do that move a model
    del array
    gc.collect()
    lives = memory() is not None
    with contextlib.suppress(OSError):
        future.wait()
    assert lives


def test_a_bytearray_cannot_shrink_under_its_transfer(handle: AioHandle, tmp_path: Path) -> None:
    data = bytearray(random_bytes(500_000))
    future = handle.async_pwrite(data, tmp_path / "file")
    with pytest.raises(BufferError):
        data.clear()
    assert future.wait() == 500_000
    assert handle.wait() == 1
    del future
    data.clear()


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_handle_collected_with_work_pending(engine: str, in_a_cycle: bool, tmp_path: Path) -> None:
    size = 1_000_000
    handle = AioHandle(block_size=65536, queue_depth=2, engine=engine)
    for number in range(8):
        handle.async_pwrite(torch.full((size,), number, dtype=torch.uint8), tmp_path / str(number))
    last = handle.async_pwrite(torch.full((size,), 8, dtype=torch.uint8), tmp_path / "8")
    if in_a_cycle:
        handle.itself = handle  # type: ignore[attr-defined]
    gone = weakref.ref(handle)
    del handle
    gc.collect()
    assert gone() is None
    assert last.wait() == size
    assert all((tmp_path / str(i)).read_bytes() == bytes([i]) * size for i in range(9))


def test_close_waits_for_what_is_pending(engine: str, tmp_path: Path) -> None:
    with AioHandle(block_size=65536, queue_depth=2, engine=engine) as handle:
        futures = [handle.async_pwrite(bytearray([i]) * 1_000_000, tmp_path / str(i)) for i in range(8)]
    assert all(future.done() for future in futures)
    assert [future.wait() for future in futures] == [1_000_000] * 8


def test_descriptors_and_threads_are_given_back(engine: str, tmp_path: Path) -> None:
    def counts() -> tuple[int, int]:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))

    def work() -> None:
        with AioHandle(block_size=4096, queue_depth=8, num_threads=3, engine=engine) as handle:
            file = tmp_path / "file"
            handle.write(bytearray(100_001), file, True, 1)
            handle.async_pwrite(bytearray(10), file)
            fails(handle)  # on another device, which gets workers of its own
            with contextlib.suppress(OSError):
                handle.wait()
            descriptors, _ = counts()
            for _ in range(20):
                handle.async_pwrite(bytearray(100_001), file, 3)
                with contextlib.suppress(OSError):
                    handle.async_pread(bytearray(10), file, 200_000)
                with contextlib.suppress(OSError):
                    handle.read(bytearray(10), tmp_path / "missing")
                with contextlib.suppress(OSError):
                    handle.async_pread(bytearray(10), file, 200_000, after=[fails(handle)]).wait()
            with contextlib.suppress(OSError):
                handle.wait()
            assert counts()[0] == descriptors

    work()  # whatever is made once in a process is there now
    before = counts()
    work()
    # The kernel may list a thread a moment longer than it takes to join it.
    deadline = time.monotonic() + 10
    while counts() > before and time.monotonic() < deadline:
        os.sched_yield()
    assert counts() <= before  # in `before`, too, a thread may be listed that is about to go


LEAVE_WITH_WORK_PENDING = """
import sys, torch
from offload_opt import AioHandle
engine, folder = sys.argv[1:]
handle = AioHandle(block_size=65536, queue_depth=2, engine=engine)
futures = []
for number in range(8):
    future = handle.async_pwrite(torch.full((4_000_000,), number, dtype=torch.uint8), f"{folder}/{number}")
    if number % 2:
        futures.append(future)
"""


def test_the_interpreter_ends_with_work_pending(engine: str, tmp_path: Path) -> None:
    scripts.run_well(LEAVE_WITH_WORK_PENDING, engine, tmp_path)
    assert all((tmp_path / str(i)).read_bytes() == bytes([i]) * 4_000_000 for i in range(8))


FORK_WITH_WORK_PENDING = """
import os, sys, warnings, torch
from offload_opt import AioHandle
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: a fork of a process with threads
engine, folder = sys.argv[1:]
handle = AioHandle(block_size=65536, queue_depth=2, engine=engine)
futures = [
    handle.async_pwrite(torch.full((4_000_000,), number, dtype=torch.uint8), f"{folder}/{number}")
    for number in range(8)
]
child = os.fork()
if child == 0:
    buffer, file = bytearray(10), f"{folder}/child"
    for use in (
        lambda: handle.write(buffer, file),
        lambda: handle.sync_pwrite(buffer, file),
        lambda: handle.async_pwrite(buffer, file),
        lambda: handle.async_pwrite(buffer, file, after=futures),
        handle.wait,
    ):
        try:
            use()
        except RuntimeError as error:
            assert "fork" in str(error), error
        else:
            sys.exit("the child could use its parent's handle")
    assert not os.path.exists(file)
    with AioHandle(engine=engine) as own:
        assert own.async_pwrite(buffer, file).wait() == 10
    handle.close()
    handle.close()
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert handle.wait() == 8
assert [future.wait() for future in futures] == [4_000_000] * 8
handle.close()
"""


def test_fork_with_work_pending(engine: str, tmp_path: Path) -> None:
    scripts.run_well(FORK_WITH_WORK_PENDING, engine, tmp_path)
    assert all((tmp_path / str(i)).read_bytes() == bytes([i]) * 4_000_000 for i in range(8))
    assert (tmp_path / "child").read_bytes() == bytes(10)


def test_threads_share_a_handle(handle: AioHandle, tmp_path: Path) -> None:
    start = threading.Barrier(3)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            start.wait()
            choose = random.Random(seed() + number)
            for _ in range(25):
                payload = choose.randbytes(choose.randrange(1, 200_000))
                write, read = choose.choice(sorted(WRITES)), choose.choice(sorted(READS))
                file, offset = tmp_path / str(number), choose.randrange(10_000)
                assert WRITES[write](handle, bytearray(payload), file, offset) == len(payload)
                back = bytearray(len(payload))
                assert READS[read](handle, back, file, offset) == len(payload)
                assert back == payload, f"{write}, {read}, seed {seed()}"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        handle.wait()  # waits for the others' transfers as well, at any time
    for thread in threads:
        thread.join()
    assert not errors, errors


def slice_of(task: Path) -> int | None:
    """Nanoseconds that a thread runs before another one's turn; None where the kernel does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"^se\.slice\s*:\s*(\d+)", (task / "sched").read_text(), re.MULTILINE)
        return int(found[1]) if found else None
    return None


def test_threads_that_do_io_have_short_slices(engine: str) -> None:
    """By these they interrupt threads that compute: without, a transfer began up to a tick late beside them."""
    release = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    tasks = Path("/proc/self/task")
    own = slice_of(tasks / str(threading.get_native_id()))
    if release < (6, 12) or own is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        pytest.skip("no slices of a thread's own here, or none to be seen")
    before = set(tasks.iterdir())
    with AioHandle(engine=engine):
        until = time.monotonic() + 10
        while True:  # they may not have begun
            slices = [slice_of(task) for task in tasks.iterdir() if task not in before]
            if time.monotonic() > until or all(length is not None and length < own for length in slices):
                break
            time.sleep(0.01)
    assert slices
    assert all(length is not None and length < own for length in slices), (own, slices)
