"""Defects of the native core that a review or a fault plan has found."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from offload_opt import AioHandle, ConfigError
from offload_opt.aio import engines
from tests import scripts

BYTES = torch.empty(0, dtype=torch.uint8)
WORKING = [name for name, works, _ in engines() if works]
MIB = 1 << 20


def flags_of(file: Path) -> list[int]:
    """The open flags of each of this process's descriptors of a file."""
    flags = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if entry.readlink() == file:
                info = (Path("/proc/self/fdinfo") / entry.name).read_text()
                flags.append(int(info.split("flags:")[1].split()[0], 8))
    return flags


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["cached", "O_DIRECT"])
def test_transfers_are_as_synchronous_as_the_descriptor(engine: str, direct: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_DSYNC | direct)
    with AioHandle(4096, 2, engine=engine) as handle:
        handle.async_pwrite(torch.zeros(4 * MIB + 5, dtype=torch.uint8), fd, 3)
        os.close(fd)
        seen = flags_of(file)  # those of the transfer alone
        handle.wait()
    assert len(seen) >= 1
    assert all(flags & os.O_DSYNC for flags in seen)


@pytest.mark.skipif("io_uring" not in WORKING, reason="io_uring registers memory")
def test_a_forked_child_does_not_keep_registered_memory(tmp_path: Path) -> None:
    code = """
import os, sys, time, torch
from offload_opt import AioHandle

def available():
    return int(open("/proc/meminfo").read().split("MemAvailable:")[1].split()[0]) << 10

size = 256 << 20
handle = AioHandle(1 << 20, 8, engine="io_uring")
before = available()
buffer = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))
handle.exclude_from_fork(buffer)
for _ in range(3):
    handle.sync_pwrite(buffer, sys.argv[1])
assert before - available() > size // 2
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.close(writer)
    os.read(reader, 1)
    os._exit(0)
handle.free_cpu_locked_tensor(buffer)
handle.close()
del buffer
deadline = time.monotonic() + 20
while before - available() > size // 2 and time.monotonic() < deadline:
    time.sleep(0.05)
freed = before - available() < size // 2
os.close(writer)
os.waitpid(child, 0)
assert freed
"""
    # What is free on the whole machine: other processes disturb it.
    ends = [scripts.run(code, tmp_path / "file")]
    while ends[-1].returncode != 0 and len(ends) < 5:
        ends.append(scripts.run(code, tmp_path / "file"))
    assert ends[-1].returncode == 0, ends[-1].stderr


@pytest.mark.skipif("io_uring" not in WORKING, reason="io_uring registers memory")
@pytest.mark.parametrize("registered", [True, False])
def test_memory_is_registered_when_it_is_used_again(registered: bool, tmp_path: Path) -> None:
    def is_registered(tensor: torch.Tensor) -> bool:
        """Whether a ring of this process has the memory, by what the kernel says of it."""
        listed = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the one that lists them
                if "io_uring" in str(entry.readlink()):
                    listed.append((Path("/proc/self/fdinfo") / entry.name).read_text())
        if not any("UserBufs" in text for text in listed):
            pytest.skip("this kernel does not list registered memory")
        return any(f"0x{tensor.data_ptr():x}/{tensor.nbytes}" in text for text in listed)

    with AioHandle(65536, 8, engine="io_uring", registered=registered) as handle:
        tensor = handle.new_cpu_locked_tensor(MIB, BYTES)
        handle.sync_pwrite(tensor, tmp_path / "file")
        assert not is_registered(tensor)  # once is not worth it
        handle.sync_pread(tensor, tmp_path / "file")
        assert is_registered(tensor) == registered


def test_a_thread_that_is_joined_late_at_exit(engine: str, tmp_path: Path) -> None:
    # The hook runs after the package's own, which has closed the handles.
    code = """
import atexit, sys, threading
stopping, thread = threading.Event(), None

def leave():
    stopping.set()
    thread.join()
    print(type(raised).__name__)

atexit.register(leave)
import torch
from offload_opt import AioHandle
handle = AioHandle(4096, 2, engine=sys.argv[1])

def work():
    global raised
    try:
        while True:
            handle.write(b"some bytes", sys.argv[2])
    except (ValueError, RuntimeError) as error:
        raised = error
    stopping.wait()

thread = threading.Thread(target=work, daemon=True)
thread.start()
"""
    done = scripts.run_well(code, engine, tmp_path / "file")
    assert done.stdout.strip() in ("ValueError", "RuntimeError", "ConfigError")


@pytest.mark.skipif("libaio" not in WORKING, reason="libaio has a limit for the whole machine")
def test_a_blocking_call_when_no_engine_more_can_be_made(tmp_path: Path) -> None:
    code = """
import ctypes, platform, sys
import torch
from offload_opt import AioHandle
libc = ctypes.CDLL(None, use_errno=True)
io_setup = {"x86_64": 206, "aarch64": 0}[platform.machine()]
handle = AioHandle(4096, 2, engine="libaio")
contexts, size = [], 1 << 16
while size > 0:
    contexts.append(ctypes.c_ulong(0))
    if libc.syscall(io_setup, size, ctypes.byref(contexts[-1])) != 0:
        size //= 2
data = torch.arange(10_000, dtype=torch.int32)
assert handle.write(data, sys.argv[1]) == data.nbytes  # on the caller's thread, were there another engine
back = torch.zeros_like(data)
assert handle.read(back, sys.argv[1]) == data.nbytes
assert torch.equal(data, back)
assert handle.wait() == 0
"""
    scripts.run_well(code, tmp_path / "file")


@pytest.mark.parametrize("write", [False, True])
def test_a_pipe_is_refused_at_once(engine: str, write: bool, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with AioHandle(engine=engine) as handle, pytest.raises(OSError, match="Illegal seek") as caught:
        handle.write(b"x", pipe) if write else handle.read(bytearray(1), pipe)
    assert caught.value.errno == errno.ESPIPE
    assert caught.value.filename == str(pipe)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("block_size", 2 << 30), ("block_size", 1 << 70), ("queue_depth", 5000), ("num_threads", 300)],
)
def test_too_much_of_a_setting(setting: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{setting} must lie in 1.."):
        AioHandle(**{setting: value})


def test_a_folder_that_is_missing_does_not_matter_to_auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OFFLOAD_OPT_ENGINE", raising=False)
    monkeypatch.setattr("offload_opt.aio.engines", lambda: [row for row in engines() if row[0] != "io_uring"])
    with AioHandle(folder=tmp_path / "missing") as handle:
        assert handle.engine == "threads"


def test_memory_goes_when_its_transfer_has_been_waited_for(engine: str, tmp_path: Path) -> None:
    def is_mapped(address: int) -> bool:
        ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)

    with AioHandle(65536, 8, engine=engine) as handle:
        tensor = handle.new_cpu_locked_tensor(64 * MIB, BYTES)
        address = tensor.data_ptr()
        assert is_mapped(address)
        future = handle.async_pwrite(tensor, tmp_path / "file")
        handle.free_cpu_locked_tensor(tensor)
        future.wait()
        del future, tensor
        assert not is_mapped(address)


def test_many_futures_waited_for_in_any_order(engine: str, tmp_path: Path) -> None:
    with AioHandle(4096, 8, engine=engine) as handle:
        data = [torch.full((5000,), number, dtype=torch.uint8) for number in range(100)]
        futures = [handle.async_pwrite(block, tmp_path / "file", 5000 * i) for i, block in enumerate(data)]
        for future in [*futures[::-2], *futures[::2], *futures[1::2]]:
            assert future.wait() == 5000
        assert handle.wait() == 100
    assert (tmp_path / "file").read_bytes() == b"".join(bytes(block.numpy()) for block in data)
