"""What the tests of AioHandle share: ways to transfer, kinds of buffers, and what to draw them from."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from offload_opt import AioHandle, IoFuture
from tests.conftest import seed

# The engine fixture is a name only, so it may be shared by all examples of a test.
EXAMPLES = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FOLDERS = {"disk": tempfile.gettempdir(), "tmpfs": "/dev/shm"}
PAGE = os.sysconf("SC_PAGESIZE")
O_DIRECT = getattr(os, "O_DIRECT", 0)
GUARD = 0xEE


@contextlib.contextmanager
def new_folder(kind: str) -> Iterator[Path]:
    if not os.access(FOLDERS[kind], os.W_OK):
        pytest.skip(f"{FOLDERS[kind]} is not writable")
    with tempfile.TemporaryDirectory(dir=FOLDERS[kind]) as path:
        yield Path(path)


def random_bytes(count: int, salt: int = 0) -> bytes:
    return random.Random(seed() + salt).randbytes(count)


# The ways in which a transfer can be asked for.


def finish(result: int | IoFuture) -> int:
    return result.wait() if isinstance(result, IoFuture) else result


Transfer = Callable[[AioHandle, Any, Any, int], int]

WRITES: dict[str, Transfer] = {
    "write": lambda h, b, f, o: h.write(b, f, file_offset=o),
    "write, validated": lambda h, b, f, o: h.write(b, f, True, o),
    "pwrite": lambda h, b, f, o: finish(h.pwrite(b, f, False, False, o)),
    "pwrite, validated": lambda h, b, f, o: finish(h.pwrite(b, f, True, False, o)),
    "pwrite, asynchronous": lambda h, b, f, o: finish(h.pwrite(b, f, False, True, o)),
    "pwrite, asynchronous, validated": lambda h, b, f, o: finish(h.pwrite(b, f, True, True, o)),
    "sync_pwrite": lambda h, b, f, o: h.sync_pwrite(b, f, o),
    "async_pwrite": lambda h, b, f, o: h.async_pwrite(b, f, o).wait(),
}
READS: dict[str, Transfer] = {
    "read": lambda h, b, f, o: h.read(b, f, file_offset=o),
    "read, validated": lambda h, b, f, o: h.read(b, f, True, o),
    "pread": lambda h, b, f, o: finish(h.pread(b, f, False, False, o)),
    "pread, validated": lambda h, b, f, o: finish(h.pread(b, f, True, False, o)),
    "pread, asynchronous": lambda h, b, f, o: finish(h.pread(b, f, False, True, o)),
    "pread, asynchronous, validated": lambda h, b, f, o: finish(h.pread(b, f, True, True, o)),
    "sync_pread": lambda h, b, f, o: h.sync_pread(b, f, o),
    "async_pread": lambda h, b, f, o: h.async_pread(b, f, o).wait(),
}


# Looped over inside a test where it matters little which way failed: each test of its own costs a garbage collection.
WAYS = WRITES | READS


def is_counted(way: str) -> bool:
    """Whether AioHandle.wait() counts it."""
    return "async" in way


@dataclasses.dataclass
class Buffer:
    """A buffer of some kind. ``memory`` is all of the memory that it was cut from."""

    whole: Any
    contents: Callable[[], bytes]
    memory: memoryview
    begin: int

    def is_alone_changed(self) -> bool:
        """Whether the bytes around the buffer are as they were made."""
        end = self.begin + len(self.contents())
        return set(self.memory[: self.begin]) | set(self.memory[end:]) <= {GUARD}


def make_buffer(kind: str, handle: AioHandle, data: bytes, shift: int) -> Buffer:
    """A buffer with ``data``, ``shift`` bytes into its memory."""
    end = shift + len(data)
    if kind == "locked tensor":
        locked = handle.new_cpu_locked_tensor(end + 64, torch.empty(0, dtype=torch.uint8))
        # Its only view is the one returned: the memory goes with it.
        assert handle.free_cpu_locked_tensor(locked)
        array: Any = locked.numpy()
        memory = memoryview(array)
    else:
        memory = memoryview(bytearray(end + 64))
    memory[:] = bytes([GUARD]) * len(memory)
    memory[shift:end] = data
    makers: dict[str, Callable[[], Any]] = {
        "tensor": lambda: torch.frombuffer(memory, dtype=torch.uint8)[shift:end],
        "locked tensor": lambda: locked[shift:end],
        "bytearray": lambda: bytearray(data),
        "numpy array": lambda: np.frombuffer(memory, dtype=np.uint8)[shift:end],
        "memoryview": lambda: memory[shift:end],
    }
    whole = makers[kind]()
    if kind == "bytearray":
        return Buffer(whole, lambda: bytes(whole), memoryview(whole), 0)
    return Buffer(whole, lambda: bytes(memory[shift:end]), memory, shift)


KINDS = ["tensor", "locked tensor", "bytearray", "numpy array", "memoryview"]

EDGES = [0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 65536, 131072, 262144]
SIZES = st.one_of(st.integers(0, 300_000), st.sampled_from(EDGES))
OFFSETS = st.one_of(st.just(0), st.integers(0, 100_000), st.sampled_from(EDGES))
SHIFTS = st.sampled_from([0, 0, 1, 64, 512, 4096])
SETTINGS = st.fixed_dictionaries(
    {
        "block_size": st.one_of(st.sampled_from([512, 1000, 4096, 5000, 65536, 1 << 20]), st.integers(512, 1 << 20)),
        "queue_depth": st.sampled_from([1, 2, 3, 8, 32]),
        "single_submit": st.booleans(),
        "overlap_events": st.booleans(),
        "num_threads": st.sampled_from([1, 1, 2, 3, 5]),
    }
)


def overlay(before: bytes, data: bytes, offset: int) -> bytes:
    """What a file with ``before`` is after a write of ``data``."""
    if not data:
        return before
    return before[:offset].ljust(offset, b"\0") + data + before[offset + len(data) :]


def fails(handle: AioHandle) -> IoFuture:
    """A transfer that is accepted, and then fails with ENOSPC."""
    return handle.async_pwrite(bytearray(100_000), "/dev/full")
