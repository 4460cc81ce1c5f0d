"""The handle under DeepSpeed's names and conventions, and DeepSpeed itself on it."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_opt.integrations import deepspeed as offload_deepspeed
from offload_opt.integrations.deepspeed import aio_handle, aio_read, aio_write, deepspeed_memcpy

BYTE = torch.empty(0, dtype=torch.uint8)
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None  # importing it here would cost all tests seconds
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed")


def random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


@pytest.fixture
def handle() -> aio_handle:
    return aio_handle(4096, 8, False, True, 2)


# Names, defaults and returns.


def test_settings() -> None:
    handle = aio_handle()
    assert (handle.get_block_size(), handle.get_queue_depth()) == (1 << 20, 128)
    assert (handle.get_single_submit(), handle.get_overlap_events()) == (False, False)
    assert (handle.get_intra_op_parallelism(), handle.get_alignment()) == (1, 512)
    by_name = aio_handle(
        block_size=8192, queue_depth=4, single_submit=True, overlap_events=True, intra_op_parallelism=3
    )
    for handle in (by_name, aio_handle(8192, 4, True, True, 3)):
        assert (handle.get_block_size(), handle.get_queue_depth()) == (8192, 4)
        assert (handle.get_single_submit(), handle.get_overlap_events()) == (True, True)
        assert (handle.get_intra_op_parallelism(), handle.get_alignment()) == (3, 1536)


@needs_deepspeed
def test_every_name_of_deepspeed_is_there_with_its_arguments() -> None:
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    bindings = (Path(spec.origin).parent / "ops/csrc/aio/py_lib/py_ds_aio.cpp").read_text()
    functions = re.findall(r'm\.def\("(\w+)"', bindings)
    assert {"aio_read", "aio_write", "deepspeed_memcpy"} <= set(functions)
    assert [name for name in functions if not hasattr(offload_deepspeed, name)] == []
    # Its "async" is a keyword in Python, and its other name is misspelt.
    ours = {"async": "async_op", "example_tenosr": "example_tensor"}
    methods = re.split(r"\.def\(\s*", bindings[bindings.index("py::class_") :])[1:]
    assert len(methods) > 15
    for method in methods:
        named = re.match(r'"(\w+)"', method)
        if named is None:
            continue  # the constructor, of which test_settings knows
        names = [ours.get(name, name) for name in re.findall(r'"(\w+)"_a', method)]
        signature = inspect.signature(getattr(aio_handle, named[1]))
        signature.bind("self", **dict.fromkeys(names))  # every name is taken
        if names and "fd" not in names:
            assert list(signature.parameters)[1 : 1 + len(names)] == names, named[1]


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 511, 1000, 4096, 10_000, 3 * 4096 + 8]),
    offset=st.sampled_from([0, 512, 1000, 8192]),
    threads=st.integers(1, 3),
    how=st.sampled_from(["sync", "async", "both", "blocking"]),
)
def test_any_size_moves_whole(
    tmp_path_factory: pytest.TempPathFactory, size: int, offset: int, threads: int, how: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any_size"
    file.write_bytes(b"x" * offset)
    handle = aio_handle(4096, 8, False, False, threads)
    data, back = random_bytes(size), torch.zeros(size, dtype=torch.uint8)
    if how == "sync":
        assert handle.sync_pwrite(data, str(file), offset) == 1
        assert handle.sync_pread(back, str(file), offset) == 1
    elif how == "async":
        assert handle.async_pwrite(data, str(file), offset) == 0
        assert handle.wait() == 1
        assert handle.async_pread(back, str(file), offset) == 0
        assert handle.wait() == 1
    elif how == "both":
        assert handle.pwrite(data, str(file), True, True, offset) == 0
        assert handle.wait() == 1
        assert handle.pread(back, str(file), True, False, offset) == 1
    else:
        assert handle.write(data, str(file), True, offset) == 0
        assert handle.read(back, str(file), True, offset) == 0
    assert handle.wait() == 0
    assert torch.equal(data, back)
    assert file.read_bytes() == b"x" * offset + bytes(data.tolist())


def test_a_synchronous_call_waits_for_all_and_counts_them(handle: aio_handle, tmp_path: Path) -> None:
    data = [random_bytes(50_000) for _ in range(4)]
    for index, tensor in enumerate(data[:3]):
        assert handle.async_pwrite(tensor, str(tmp_path / str(index))) == 0
    assert handle.sync_pwrite(data[3], str(tmp_path / "3")) == 4
    assert handle.wait() == 0
    assert [(tmp_path / str(i)).read_bytes() for i in range(4)] == [bytes(t.tolist()) for t in data]


def test_filename_and_fd(handle: aio_handle, tmp_path: Path) -> None:
    data, file = random_bytes(2000), tmp_path / "file"
    assert handle.async_pwrite(buffer=data, filename=str(file)) == 0
    assert handle.wait() == 1
    for flags in (0, os.O_DIRECT):
        try:
            descriptor = os.open(file, os.O_WRONLY | flags)
        except OSError:
            if flags == 0:
                raise
            continue  # a file system without direct I/O
        assert handle.async_pwrite(buffer=data, fd=descriptor, file_offset=2000) == 0
        assert handle.async_pwrite(data, descriptor, 4000) == 0
        os.close(descriptor)  # the handle has its own by now
        assert handle.wait() == 2
        assert file.read_bytes() == bytes(data.tolist()) * 3
        os.truncate(file, 2000)
    with pytest.raises(TypeError, match="either filename or fd"):
        handle.async_pwrite(data)
    with pytest.raises(TypeError, match="either filename or fd"):
        handle.async_pwrite(data, str(file), fd=1)


def test_functions(tmp_path: Path) -> None:
    data, back = random_bytes(10_000), torch.zeros(10_000, dtype=torch.uint8)
    assert aio_write(data, str(tmp_path / "file"), 4096, 4, False, True, True) == 0
    assert aio_read(back, str(tmp_path / "file"), 4096, 4, True, False, True) == 0
    assert torch.equal(data, back)
    source, destination = torch.randn(6, 7), torch.zeros(6, 7)
    assert deepspeed_memcpy(destination, source) == 0
    assert torch.equal(source, destination)
    with pytest.raises(ValueError, match="shape"):
        deepspeed_memcpy(destination, torch.ones(7))


# Page-locked memory.


def test_locked_memory_is_known_to_all_handles(handle: aio_handle) -> None:
    other = aio_handle()
    locked = handle.new_cpu_locked_tensor(5000, torch.empty(0, dtype=torch.bfloat16))
    assert (locked.dtype, locked.shape, locked.data_ptr() % 4096) == (torch.bfloat16, (5000,), 0)
    assert other.is_pinned(locked)
    assert other.is_pinned(locked.narrow(0, 4990, 10))
    assert not other.is_pinned(torch.empty(5000))
    del handle
    assert other.free_cpu_locked_tensor(locked)
    assert not other.free_cpu_locked_tensor(locked)
    assert locked.fill_(1).sum() == 5000  # the memory lives as long as a tensor on it


# Buffers that files cannot be read into.


def test_what_is_not_locked_may_change_once_its_write_has_started(handle: aio_handle, tmp_path: Path) -> None:
    data = torch.full((8 << 20,), 1, dtype=torch.uint8)
    for number in range(4):
        handle.async_pwrite(data, str(tmp_path / str(number)))
    data.zero_()
    assert handle.wait() == 4
    assert {byte for number in range(4) for byte in set((tmp_path / str(number)).read_bytes())} == {1}


def test_strided_buffers_move_through_host_memory(handle: aio_handle, tmp_path: Path) -> None:
    file = str(tmp_path / "file")
    data = torch.randn(40, 30)
    assert handle.sync_pwrite(data.t(), file) == 1
    for read in (handle.sync_pread, handle.async_pread, lambda t, f: handle.read(t, f, False)):
        back = torch.zeros(40, 30)
        read(back.t(), file)
        handle.wait()
        assert torch.equal(back, data)


@pytest.mark.gpu
def test_device_buffers_move_through_host_memory(handle: aio_handle, tmp_path: Path) -> None:
    file = str(tmp_path / "file")
    data = torch.randn(1000, device="cuda")
    back = torch.zeros_like(data)
    assert handle.async_pwrite(data, file) == 0
    assert handle.wait() == 1
    assert handle.async_pread(back, file) == 0
    assert handle.wait() == 1
    assert torch.equal(back, data)


# Where DeepSpeed's handle prints, says -1, reports success or aborts.


def test_errors_are_raised(handle: aio_handle, tmp_path: Path) -> None:
    data, short = torch.zeros(1000), tmp_path / "short"
    short.write_bytes(b"x" * 3999)
    calls = [
        lambda file: handle.sync_pread(data, file),
        lambda file: handle.async_pread(data, file),
        lambda file: handle.read(data, file, False),
        lambda file: aio_read(data, file, 4096, 1, False, False, False),
    ]
    for call in calls:
        with pytest.raises(FileNotFoundError, match="missing"):
            call(str(tmp_path / "missing"))
        with pytest.raises(OSError, match=r"4000 bytes.*3999 bytes"):
            call(str(short))
    assert handle.wait() == 0


def test_a_full_disk_is_an_error_of_wait_after_all_have_ended(handle: aio_handle, tmp_path: Path) -> None:
    data = random_bytes(100_000)
    assert handle.async_pwrite(data, "/dev/full") == 0
    for index in range(3):
        assert handle.async_pwrite(data, str(tmp_path / str(index))) == 0
    with pytest.raises(OSError, match="offset") as raised:
        handle.wait()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "/dev/full")
    assert [(tmp_path / str(i)).stat().st_size for i in range(3)] == [100_000] * 3
    assert handle.wait() == 0
    with pytest.raises(OSError, match="full"):
        handle.sync_pwrite(data, "/dev/full")
    with pytest.raises(OSError, match="full"):
        handle.write(data, "/dev/full", False)


def test_a_failed_wait_leaves_no_read_behind(handle: aio_handle, tmp_path: Path) -> None:
    file = str(tmp_path / "file")
    data, back = torch.randn(40, 30), torch.zeros(40, 30)
    handle.sync_pwrite(data, file)
    handle.async_pread(back.t(), file)
    handle.async_pwrite(data, "/dev/full")
    with pytest.raises(OSError, match="full"):
        handle.wait()
    assert handle.wait() == 0
    assert torch.equal(back, torch.zeros(40, 30))  # nothing arrives late


def test_tensors_and_handles_may_be_dropped_with_work_pending(tmp_path: Path) -> None:
    handle = aio_handle(4096, 8, False, True, 2)
    expected = []
    for index in range(8):
        data = random_bytes(300_000)
        expected.append(bytes(data.tolist()))
        handle.async_pwrite(data, str(tmp_path / str(index)))
        del data
    del handle
    assert [(tmp_path / str(i)).read_bytes() for i in range(8)] == expected


def test_threads_share_a_handle(handle: aio_handle, tmp_path: Path) -> None:
    counts: list[int] = []

    def work(name: str) -> None:
        data, back = random_bytes(20_000), torch.zeros(20_000, dtype=torch.uint8)
        for _ in range(20):
            counts.append(handle.sync_pwrite(data, str(tmp_path / name)))
            counts.append(handle.sync_pread(back, str(tmp_path / name)))
        assert torch.equal(data, back)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [1] * 160


# DeepSpeed itself.


def run(*command: str | Path) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **{name: str(value) for name, value in alone.items()}}
    environment.pop("PYTHONOPTIMIZE", None)  # DeepSpeed reads and writes inside `assert`
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_install_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match="pip install deepspeed"):
        offload_deepspeed.install()


INSTALL = """
import sys
from offload_opt.integrations import deepspeed as ours
if sys.argv[1] == "before":
    ours.install()
    ours.install()
import deepspeed
from deepspeed.ops.aio import AsyncIOBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.gds import GDSBuilder
from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper, partitioned_param_swapper
from deepspeed.runtime.model_checkpointing import writer_factory
if sys.argv[1] == "after":
    ours.install()
    ours.install()

class Compiles(Exception):
    pass

def refuse_to_compile(self, verbose=True):
    raise Compiles

OpBuilder.jit_load = refuse_to_compile
builders = [
    AsyncIOBuilder,
    deepspeed.ops.op_builder.AsyncIOBuilder,
    deepspeed.ops.op_builder.async_io.AsyncIOBuilder,
    partitioned_optimizer_swapper.AsyncIOBuilder,
    partitioned_param_swapper.AsyncIOBuilder,
    writer_factory.AsyncIOBuilder,
    deepspeed.accelerator.get_accelerator().get_op_builder("AsyncIOBuilder"),
]
for builder in builders:
    assert builder().load() is ours
    assert builder().load(verbose=False) is ours
    assert builder().is_compatible() is True
for kind in ("cpu", "xpu", "npu", "supa", "klxpu"):
    other = getattr(deepspeed.ops.op_builder, kind).AsyncIOBuilder
    other = object.__new__(other)  # some look for their device when they are made
    assert other.load() is ours
    assert other.is_compatible() is True
assert deepspeed.accelerator.get_accelerator().create_op_builder("AsyncIOBuilder").load() is ours
assert deepspeed.ops.__compatible_ops__["async_io"]
assert not GDSBuilder().is_compatible() or GDSBuilder().has_function("cuFileDriverOpen", ("cufile",))
try:
    GDSBuilder().load()
except Compiles:
    print("GDS is DeepSpeed's own")
# An accelerator for which DeepSpeed has no such builder.
deepspeed.ops.op_builder.AsyncIOBuilder = deepspeed.ops.op_builder.cpu.NotImplementedBuilder
try:
    ours.install()
except ValueError as error:
    print(error)
"""


@needs_deepspeed
@pytest.mark.parametrize("when", ["before", "after"])
def test_install_before_and_after_deepspeed_is_imported(when: str) -> None:
    said = run("-c", INSTALL, when)
    assert "GDS is DeepSpeed's own" in said
    assert "no NVMe offload for the accelerator 'cpu'" in said


@needs_deepspeed
def test_zero_3_trains_on_it_with_the_same_losses(tmp_path: Path) -> None:
    losses = json.loads(run(Path(__file__).with_name("zero3_nvme.py"), tmp_path).splitlines()[-1])
    assert set(losses) == {"none", "plain", "pipelined", "parameters"}
    assert len(set(losses["none"])) == 4
    assert all(steps == losses["none"] for steps in losses.values())
    swapped = [file for file in tmp_path.rglob("*.swp") if file.name.startswith("exp_avg_sq")]
    assert swapped
    assert all(any(file.read_bytes()) for file in swapped)
