"""Faults of the real system. Each ends in the right bytes or in an exception; never in a hang, a crash or a wrong byte.

A full device and a file that may not grow are in test_errors.py, more of fork and exit in test_lifetime.py. What the
kernel does not do on demand is injected in the native driver: tests/native/test_plans.cpp.
"""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from offload_opt import AioHandle
from tests import scripts
from tests.aio.support import random_bytes
from tests.conftest import seed

NO_DESCRIPTORS = """
import contextlib, errno, os, resource, sys
from offload_opt import AioHandle
engine, folder = sys.argv[1:]
size = 300_001
with AioHandle(block_size=65536, queue_depth=4, num_threads=2, engine=engine) as handle:
    handle.write(bytearray(size), f"{folder}/warm")
    handle.sync_pwrite(bytearray(size), f"{folder}/warm")
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 12
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    accepted = {}
    for number in range(60):
        path = f"{folder}/{number}"
        try:
            accepted[number] = handle.async_pwrite(bytearray([number]) * size, path)
        except OSError as error:  # unless the drive is so fast that they end first
            assert (error.errno, error.filename) == (errno.EMFILE, path), error
    held = []
    for use in (handle.write, handle.sync_pwrite, handle.async_pwrite):
        while True:  # transfers of above that end meanwhile give descriptors back
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            try:
                use(bytearray(10), f"{folder}/never")
            except OSError as error:
                assert (error.errno, error.filename) == (errno.EMFILE, f"{folder}/never"), error
                break
    done = {}
    for number, future in accepted.items():
        try:
            done[number] = future.wait()
        except OSError as error:  # its second descriptor, for what goes through the page cache, was not to be had
            assert (error.errno, error.filename) == (errno.EMFILE, f"{folder}/{number}"), error
    for fd in held:
        os.close(fd)
    for number, moved in done.items():
        with open(f"{folder}/{number}", "rb") as file:
            assert moved == size and file.read() == bytes([number]) * size, number
    with contextlib.suppress(OSError):
        handle.wait()
    for number in range(60):
        back = bytearray(size)
        assert handle.async_pwrite(bytearray([number]) * size, f"{folder}/{number}").wait() == size
        assert handle.sync_pread(back, f"{folder}/{number}") == size
        assert back == bytes([number]) * size
"""


def test_no_descriptors_left(engine: str, tmp_path: Path) -> None:
    scripts.run_well(NO_DESCRIPTORS, engine, tmp_path)


MAY_LOCK_NOTHING = """
import os, resource, sys, warnings, torch
from offload_opt import AioHandle, OffloadWarning
engine, folder = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.geteuid() == 0:  # root is not held to the limit
    os.chmod(folder, 0o777)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with AioHandle(65536, 8, num_threads=2, engine=engine) as handle, AioHandle(engine=engine) as other:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))  # only now: a ring of io_uring may count against it
        late = AioHandle()
        for owner in (handle, other, handle, late):
            tensor = owner.new_cpu_locked_tensor(3_000_001, torch.empty(0, dtype=torch.uint8))
            for number in range(6):  # often enough for an engine to try to register the memory
                tensor.fill_(number)
                assert owner.async_pwrite(tensor, f"{folder}/file").wait() == 3_000_001
                tensor.fill_(255)
                assert owner.sync_pread(tensor, f"{folder}/file") == 3_000_001
                assert bool((tensor == number).all())
            assert owner.free_cpu_locked_tensor(tensor)
        late.close()
assert [warning.category for warning in caught] == [OffloadWarning], caught
assert "ulimit -l" in str(caught[0].message), caught[0]
"""


def test_no_memory_may_be_locked(engine: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which another user may not enter
        scripts.run_well(MAY_LOCK_NOTHING, engine, folder)


SIGNAL_STORM = """
import random, signal, sys
from offload_opt import AioHandle
engine, folder, seed = sys.argv[1:]
choose = random.Random(int(seed))
seen = 0

def handler(number, frame):
    global seen
    seen += 1

signal.signal(signal.SIGALRM, handler)
signal.siginterrupt(signal.SIGALRM, True)
with AioHandle(block_size=4096, queue_depth=4, num_threads=2, engine=engine) as handle:
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    for number in range(40):
        data = choose.randbytes(choose.randrange(1, 400_000))
        path, offset, back = f"{folder}/{number % 3}", choose.randrange(10_000), bytearray(len(data))
        assert handle.write(data, path, True, offset) == len(data)
        assert handle.read(back, path, True, offset) == len(data)
        assert back == data
        write = handle.async_pwrite(data[::-1], path, offset)
        read = handle.async_pread(back, path, offset, after=[write])
        if number % 2:
            assert (write.wait(), read.wait()) == (len(data), len(data))
        assert handle.wait() == 2
        assert back == data[::-1]
        assert handle.sync_pread(back, path, offset) == len(data)
        assert back == data[::-1]
    signal.setitimer(signal.ITIMER_REAL, 0)
assert seen > 0
"""


def test_a_storm_of_signals(engine: str, tmp_path: Path) -> None:
    scripts.run_well(SIGNAL_STORM, engine, tmp_path, seed())


RAISING_HANDLER = """
import signal, sys
from offload_opt import AioHandle
engine, folder = sys.argv[1:]

class Interrupted(Exception):
    pass

def handler(number, frame):
    raise Interrupted

signal.signal(signal.SIGALRM, handler)
size = 30_000_000
interrupted = 0
with AioHandle(block_size=4096, queue_depth=1, engine=engine) as handle:
    for number in range(6):
        data = bytearray([number + 1]) * size
        future = handle.async_pwrite(data, f"{folder}/{number}")
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            handle.sync_pwrite(data, f"{folder}/{number}-sync") if number % 2 else future.wait()
            handle.wait()
            while True:
                signal.pause()
        except Interrupted:
            interrupted += 1
        del data  # the transfer goes on, and keeps its buffer
        assert future.wait() == size
    assert handle.wait() <= 6
    for number in range(6):
        for path in (f"{folder}/{number}", *([f"{folder}/{number}-sync"] if number % 2 else [])):
            with open(path, "rb") as file:
                assert file.read() == bytes([number + 1]) * size, path
assert interrupted == 6
"""


def test_a_wait_that_a_signal_handler_leaves(engine: str, tmp_path: Path) -> None:
    scripts.run_well(RAISING_HANDLER, engine, tmp_path)


TWO_THREADS = """
import faulthandler, gc, sys, threading
import torch
from offload_opt import AioHandle
engine, folder = sys.argv[1:]
faulthandler.dump_traceback_later(90, exit=True)
size = 200_000
handle = AioHandle(block_size=4096, queue_depth=4, num_threads=2, engine=engine)
failures, stop = [], threading.Event()

class Owner:  # garbage whose end goes through the handle, with whatever lock is held there
    def __init__(self, future):
        self.itself, self.future = self, future
    def __del__(self):
        self.future.done()
        handle.async_pwrite(bytearray(1), f"{folder}/del")

def wait():
    try:
        while not stop.is_set():
            handle.wait()
    except BaseException as error:
        failures.append(error)

def submit(thread):
    try:
        for number in range(60):
            path = f"{folder}/{thread}-{number % 4}"
            future = handle.async_pwrite(torch.full((size,), number, dtype=torch.uint8), path)
            Owner(future)
            back = torch.empty(size, dtype=torch.uint8)
            read = handle.async_pread(back, path, after=[future])
            gc.collect() if number % 3 else None
            assert read.wait() == size and bool((back == number).all())
            back = future = read = None
    except BaseException as error:
        failures.append(error)

gc.collect()
gc.freeze()
threads = [threading.Thread(target=wait), *(threading.Thread(target=submit, args=(n,)) for n in range(2))]
for thread in threads:
    thread.start()
for thread in threads[1:]:
    thread.join()
stop.set()
threads[0].join()
gc.collect()
assert not failures, failures
handle.close()
"""


def test_two_threads_do_not_lock_each_other_out(engine: str, tmp_path: Path) -> None:
    scripts.run_well(TWO_THREADS, engine, tmp_path)


LEAVE_WHILE_THREADS_WAIT = """
import sys, threading, torch
from offload_opt import AioHandle
engine, folder = sys.argv[1:]
handle = AioHandle(block_size=65536, queue_depth=2, engine=engine)
futures = [
    handle.async_pwrite(torch.full((2_000_000,), number, dtype=torch.uint8), f"{folder}/{number}")
    for number in range(8)
]

def wait_for_one():
    while True:
        futures[-1].wait()

def wait_for_all():
    while True:
        handle.wait()

for target in (wait_for_one, wait_for_all) * 3:
    threading.Thread(target=target, daemon=True).start()
"""


def test_the_interpreter_ends_while_threads_wait(engine: str, tmp_path: Path) -> None:
    scripts.run_well(LEAVE_WHILE_THREADS_WAIT, engine, tmp_path)
    assert all((tmp_path / str(i)).read_bytes() == bytes([i]) * 2_000_000 for i in range(8))


FORK_AND_LEAVE = """
import multiprocessing, os, sys, warnings, torch
from offload_opt import AioHandle
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: a fork of a process with threads
engine, folder = sys.argv[1:]
owner = os.getpid()
handle = AioHandle(block_size=65536, queue_depth=2, num_threads=2, engine=engine)
locked = handle.new_cpu_locked_tensor(4_000_000, torch.empty(0, dtype=torch.uint8)).fill_(7)
futures = [
    handle.async_pwrite(torch.full((4_000_000,), number, dtype=torch.uint8), f"{folder}/{number}")
    for number in range(8)
]
futures += [handle.async_pwrite(locked, f"{folder}/locked", after=futures[-1:])]

def child(name):
    with AioHandle(engine=engine) as own:
        assert own.async_pwrite(bytearray(10), f"{folder}/{name}").wait() == 10
    if name == "collects":
        global handle, futures, locked
        del handle, futures, locked

forked = os.fork()
if forked == 0:
    child("exits")
    sys.exit(0)  # runs what is registered with atexit, in the child
context = multiprocessing.get_context("fork")
processes = [context.Process(target=child, args=(name,)) for name in ("ends", "collects")]
for process in processes:
    process.start()
for process in processes:
    process.join()
    assert process.exitcode == 0, process.exitcode
assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
assert handle.wait() == 9
assert [future.wait() for future in futures] == [4_000_000] * 9
"""


def test_children_leave_their_parents_work_alone(engine: str, tmp_path: Path) -> None:
    scripts.run_well(FORK_AND_LEAVE, engine, tmp_path)
    assert all((tmp_path / str(i)).read_bytes() == bytes([i]) * 4_000_000 for i in range(8))
    assert (tmp_path / "locked").read_bytes() == b"\7" * 4_000_000
    assert all((tmp_path / name).stat().st_size == 10 for name in ("ends", "collects", "exits"))


def test_a_file_cut_short_under_its_reader(engine: str, folder: Path) -> None:
    file = folder / "file"
    payload = random_bytes(2_000_000)
    with AioHandle(block_size=4096, queue_depth=2, num_threads=2, engine=engine) as handle:
        for cut in (0, 5000, 4096 * 300, 1_999_999):
            file.write_bytes(payload)
            target = bytearray(b"\xaa" * len(payload))
            future = handle.async_pread(target, file)
            with file.open("r+b") as opened:
                opened.truncate(cut)
            try:
                assert future.wait() == len(payload)
                assert target == payload
            except OSError as error:
                assert_cut_short(error, file)
                assert all(
                    target[i : i + 512] in (payload[i : i + 512], b"\xaa" * 512) for i in range(0, cut - 512, 512)
                )
            # What is gone stays an error, and the rest can be read.
            if cut > 0:
                part = bytearray(cut)
                assert handle.read(part, file) == handle.sync_pread(part, file) == cut
                assert part == payload[:cut]
        assert handle.wait() == 4


def assert_cut_short(error: OSError, file: Path) -> None:
    assert error.errno == errno.ENODATA
    assert error.filename == str(file)
    assert "cut short" in str(error)
