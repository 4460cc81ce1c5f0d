"""Which engine ``"auto"`` takes and what it says of it, registration with the kernel, and queues by device."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from offload_opt import AioConfig, AioHandle, ConfigError
from offload_opt.aio import direct_io, engines
from tests import scripts
from tests.conftest import seed

BYTES = torch.empty(0, dtype=torch.uint8)

# Run in a process of its own: forbids io_uring as containers do, and takes all requests of fs.aio-max-nr if asked to.
CHOOSE = """
import ctypes, logging, struct, sys
libc = ctypes.CDLL(None, use_errno=True)

IO_SETUP = {"x86_64": 206, "aarch64": 0}[__import__("platform").machine()]
IO_URING_SETUP = 425
load = lambda offset: struct.pack("HBBI", 0x20, 0, 0, offset)
allow, forbid = (struct.pack("HBBI", 0x06, 0, 0, action) for action in (0x7FFF0000, 0x00050001))
jump_if_equal = struct.pack("HBBI", 0x15, 0, 1, IO_URING_SETUP)
program = ctypes.create_string_buffer(load(0) + jump_if_equal + forbid + allow)
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]
filter = Filter(4, ctypes.addressof(program))
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter), 0, 0) == 0

def exhaust():
    size = 1 << 16
    while size > 0:
        if libc.syscall(IO_SETUP, size, ctypes.byref(ctypes.c_ulong(0))) != 0:
            size //= 2

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
from offload_opt import AioHandle
from offload_opt.aio import engines
for _ in range(100 if "exhausted" in sys.argv else 0):  # other processes may give some back meanwhile
    exhaust()
    if not engines()[1][1]:
        break
print([name for name, works, _ in engines() if works])
with AioHandle(4096) as handle:
    print(handle.engine)
    handle.write(b"some bytes", sys.argv[1])
    back = bytearray(10)
    handle.read(back, sys.argv[1])
    print(bytes(back))
"""


def names() -> list[str]:
    return [name for name, works, _ in engines() if works]


def test_the_probe_goes_through_all_engines() -> None:
    rows = engines()
    assert [name for name, _, _ in rows] == ["io_uring", "libaio", "threads"]
    assert all(bool(why_not) != works for _, works, why_not in rows)
    assert "threads" in names()


def test_auto_takes_the_first_that_works_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OFFLOAD_OPT_ENGINE", raising=False)
    caplog.set_level(logging.INFO, logger="offload_opt")
    with AioHandle(folder=tmp_path) as handle, AioHandle(quiet=True):
        assert handle.engine == names()[0]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.INFO] == [
        f"I/O engine {names()[0]}: the first that works"
    ]


def test_the_environment_overrides_auto_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_OPT_ENGINE", "threads")
    caplog.set_level(logging.INFO, logger="offload_opt")
    with AioHandle() as handle:
        assert handle.engine == "threads"
    assert "OFFLOAD_OPT_ENGINE='threads'" in caplog.text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp is Linux's")
@pytest.mark.parametrize("exhausted", [False, True])
def test_where_io_uring_is_forbidden(exhausted: bool, tmp_path: Path) -> None:
    if {"io_uring", "libaio"} - set(names()):
        pytest.skip("needs a machine where both work")
    arguments = [str(tmp_path / "file"), *(["exhausted"] if exhausted else [])]
    environment = {name: value for name, value in os.environ.items() if name != "OFFLOAD_OPT_ENGINE"}
    done = scripts.run(CHOOSE, *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    works, said, taken, back = done.stdout.splitlines()
    expected = ["threads"] if exhausted else ["libaio", "threads"]
    assert works == str(expected)
    assert taken == expected[0]
    assert back == str(b"some bytes")
    assert said.startswith(f"INFO I/O engine {expected[0]}: io_uring does not work here (io_uring_setup: ")
    assert ("fs.aio-max-nr" in said) == exhausted


def test_an_engine_that_is_asked_for_and_cannot_be_made() -> None:
    code = CHOOSE.replace("AioHandle(4096)", "AioHandle(4096, engine='io_uring')")
    with tempfile.TemporaryDirectory() as folder:
        done = scripts.run(code, f"{folder}/file")
    assert done.returncode == 1
    assert "ConfigError: no I/O engine: asked for by 'io_uring'; io_uring does not work here (" in done.stderr


@pytest.fixture
def without_direct_io(tmp_path: Path) -> Path:
    """A folder on a file system that has no O_DIRECT."""
    folder = tmp_path / "ramfs"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "ramfs", "none", folder], check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    return folder


def test_a_folder_without_direct_io(
    without_direct_io: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    try:
        alignment, why_not = direct_io(without_direct_io)
        assert alignment == 0
        assert "O_DIRECT" in why_not
        data = torch.randint(256, (100_001,), dtype=torch.uint8)
        with AioHandle(4096, engine=engine, num_threads=2) as handle:
            handle.async_pwrite(data, without_direct_io / "file", 3)
            handle.wait()
            back = torch.empty_like(data)
            assert handle.sync_pread(back, without_direct_io / "file", 3) == data.nbytes
        assert torch.equal(back, data)
        # libaio would be asynchronous in name only.
        monkeypatch.delenv("OFFLOAD_OPT_ENGINE", raising=False)
        monkeypatch.setattr("offload_opt.aio.engines", lambda: [row for row in engines() if row[0] != "io_uring"])
        caplog.set_level(logging.INFO, logger="offload_opt")
        with AioHandle(folder=without_direct_io) as handle:
            assert handle.engine == "threads"
        assert (
            f"libaio does not work here (it is asynchronous with direct I/O only, and {without_direct_io}"
            in caplog.text
        )
    finally:
        subprocess.run(["umount", without_direct_io], check=True)


def test_direct_io_of_a_folder(tmp_path: Path) -> None:
    alignment, why_not = direct_io(tmp_path)
    assert (alignment == 0) == bool(why_not)
    assert alignment % 512 == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        direct_io(tmp_path / "missing")


def test_a_handle_from_a_config(tmp_path: Path, engine: str) -> None:
    config = AioConfig(
        block_size="64KiB", queue_depth=3, single_submit=True, overlap_events=False, num_threads=2, engine=engine
    )
    with AioHandle.from_config(config, tmp_path) as handle:
        assert handle.engine == engine
        assert handle.get_block_size() == 65536
        assert (handle.get_queue_depth(), handle.get_thread_count()) == (3, 2)
        assert (handle.get_single_submit(), handle.get_overlap_events()) == (True, False)


def test_an_unknown_engine_in_a_config() -> None:
    with pytest.raises(ConfigError, match=r"aio\.engine must be one of auto, io_uring, libaio, threads"):
        AioConfig(engine="spdk")


# Registration with the kernel. Enough requests that memory and files are registered, and more memory than one ring has
# slots for.


@pytest.mark.parametrize("registered", [True, False])
def test_memory_and_files_that_are_used_much(engine: str, registered: bool, tmp_path: Path) -> None:
    block, rounds, count = 4096, 6, 40
    generator = torch.Generator().manual_seed(seed())
    with AioHandle(block, 16, num_threads=2, engine=engine, registered=registered) as handle:
        buffer = handle.new_cpu_locked_tensor(count * block + 512, BYTES)[512:]
        expected = {}
        for number in range(rounds):
            file = tmp_path / f"{number % 3}"
            buffer.copy_(torch.randint(256, (len(buffer),), dtype=torch.uint8, generator=generator))
            expected[file] = bytes(buffer.numpy())
            for part in torch.randperm(count, generator=generator).tolist():
                handle.async_pwrite(buffer[part * block : (part + 1) * block], file, part * block)
            assert handle.wait() == count
            for _ in range(3):
                buffer.zero_()
                for part in torch.randperm(count, generator=generator).tolist():
                    handle.async_pread(buffer[part * block : (part + 1) * block], file, part * block)
                assert handle.wait() == count
                assert bytes(buffer.numpy()) == expected[file]


def test_memory_that_is_freed_and_made_again_while_a_handle_stays(engine: str, tmp_path: Path) -> None:
    # New memory often lies where the old one was: what was registered of the old one must not be used for it.
    with AioHandle(4096, 8, engine=engine) as handle:
        for number in range(30):
            buffer = handle.new_cpu_locked_tensor(64 * 4096, BYTES)
            for turn in range(3):
                buffer.fill_(number + 50 * turn)
                handle.sync_pwrite(buffer, tmp_path / "file")
                buffer.zero_()
                handle.sync_pread(buffer, tmp_path / "file")
                assert bool((buffer == number + 50 * turn).all())
            handle.free_cpu_locked_tensor(buffer)


def test_a_file_that_is_replaced_while_another_transfer_of_its_name_is_pending(engine: str, tmp_path: Path) -> None:
    name, other = tmp_path / "file", tmp_path / "other"
    with AioHandle(4096, 2, engine=engine) as handle:
        for number in range(20):
            name.write_bytes(bytes([1]) * 400_000)
            other.write_bytes(bytes([2]) * 400_000)
            before = torch.zeros(400_000, dtype=torch.uint8)
            future = handle.async_pread(before, name)
            other.replace(name)
            after = torch.zeros(400_000, dtype=torch.uint8)
            handle.sync_pread(after[: number * 7 + 1], name, number)
            future.wait()
            assert bool((before == 1).all())
            assert bool((after[: number * 7 + 1] == 2).all())


def is_open_for_writing(file: Path) -> bool:
    """By anybody, the kernel included: a read lease is given for files that nobody has open for writing."""
    fd = os.open(file, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_no_file_stays_open(engine: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with file.open("r+b"):
        assert is_open_for_writing(file)
    with AioHandle(512, 32, engine=engine) as handle:
        buffer = handle.new_cpu_locked_tensor(1 << 20, BYTES)
        for _ in range(3):
            handle.async_pwrite(buffer, file)  # thousands of requests: the kernel has been told of the file by its end
            handle.wait()
            assert not is_open_for_writing(file)


def anonymous_huge_pages(tensor: torch.Tensor) -> int:
    """Bytes of huge pages in the mapping that holds the tensor."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0


def test_large_locked_memory_lies_on_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("no transparent huge pages here")
    with AioHandle() as handle:
        tensor = handle.new_cpu_locked_tensor((9 << 20) + 5, BYTES)
        tensor.fill_(7)
        # As far as whole ones fit; fewer only where memory is in pieces.
        assert 0 < anonymous_huge_pages(tensor) <= 8 << 20
        handle.free_cpu_locked_tensor(tensor)


def test_locked_memory_has_its_size_exactly() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")

    with AioHandle() as handle:
        handle.new_cpu_locked_tensor(1, BYTES)  # whatever is made once
        before = mapped()
        tensor = handle.new_cpu_locked_tensor((5 << 20) + 1, BYTES)
        assert mapped() - before == (5 << 20) + 4096
        handle.free_cpu_locked_tensor(tensor)
        del tensor
        assert mapped() == before


# Devices.


def test_transfers_on_several_devices_at_once(engine: str, tmp_path: Path) -> None:
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two devices")
    threads = Path("/proc/self/task")
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as other,
        AioHandle(4096, 4, num_threads=2, engine=engine) as handle,
    ):
        data = torch.randint(256, (300_001,), dtype=torch.uint8)
        handle.sync_pwrite(data, tmp_path / "file")
        one_device = len(list(threads.iterdir()))
        handle.sync_pwrite(data, f"{other}/file")
        assert len(list(threads.iterdir())) > one_device  # workers of its own
        copies = [torch.empty_like(data) for _ in range(2)]
        # A chain over both devices: each copy is what the one before it wrote.
        future = handle.async_pread(copies[0], tmp_path / "file")
        future = handle.async_pwrite(copies[0], f"{other}/copy", after=[future])
        future = handle.async_pread(copies[1], f"{other}/copy", after=[future])
        future = handle.async_pwrite(copies[1], tmp_path / "copy", after=[future])
        future.wait()
        assert (tmp_path / "copy").read_bytes() == bytes(data.numpy())


def test_many_rings_do_not_pass_the_memory_limit_unnoticed(tmp_path: Path) -> None:
    # Registered memory counts against RLIMIT_MEMLOCK: where that is too small, transfers go on unregistered.
    code = """
import os, resource, sys, warnings
import torch
from offload_opt import AioHandle
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.geteuid() == 0:
    os.chmod(sys.argv[1], 0o777)
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
warnings.simplefilter("ignore")
with AioHandle(65536, 8, num_threads=4) as handle:
    buffer = handle.new_cpu_locked_tensor(8 << 20, torch.empty(0, dtype=torch.uint8))
    for number in range(20):
        buffer.fill_(number)
        handle.sync_pwrite(buffer, sys.argv[1] + "/file")
        buffer.zero_()
        handle.sync_pread(buffer, sys.argv[1] + "/file")
        assert bool((buffer == number).all()), number
"""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which an ordinary user may not enter
        done = scripts.run(code, folder)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_drops_memory_that_it_never_had() -> None:
    # What is left out of the child may have something else in its place there, which must not be unmapped with it.
    code = """
import gc, os, sys
import torch
from offload_opt import AioHandle
handle = AioHandle()
tensors = [handle.new_cpu_locked_tensor(4 << 20, torch.empty(0, dtype=torch.uint8)) for _ in range(4)]
for tensor in tensors:
    handle.exclude_from_fork(tensor)
child = os.fork()
if child == 0:
    replacements = [torch.full((4 << 20,), number, dtype=torch.uint8) for number in range(16)]
    for tensor in tensors:
        handle.free_cpu_locked_tensor(tensor)
    tensors.clear()
    del tensor
    gc.collect()
    assert all(bool((r == number).all()) for number, r in enumerate(replacements))
    with AioHandle() as other:
        locked = other.new_cpu_locked_tensor(8 << 20, torch.empty(0, dtype=torch.uint8))
        other.sync_pwrite(locked.fill_(3), sys.argv[1])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
tensors[0].fill_(1)
"""
    with tempfile.TemporaryDirectory() as folder:
        done = scripts.run(code, f"{folder}/file")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
