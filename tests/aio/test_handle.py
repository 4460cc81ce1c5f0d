"""The contract of AioHandle, DESIGN.md section 3, held by every engine that works here."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_opt import AioHandle, ConfigError, IoFuture
from tests.conftest import seed

# The engine fixture is a name only, so it may be shared by all examples of a test.
EXAMPLES = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FOLDERS = {"disk": tempfile.gettempdir(), "tmpfs": "/dev/shm"}
PAGE = os.sysconf("SC_PAGESIZE")
O_DIRECT = getattr(os, "O_DIRECT", 0)
GUARD = 0xEE


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections() -> Iterator[None]:
    # The collection after each test, in conftest.py, would look at all of torch's objects: a tenth of a second.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def handle(engine: str) -> Iterator[AioHandle]:
    with AioHandle(block_size=65536, queue_depth=8, num_threads=2, engine=engine) as handle:
        yield handle


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on each kind of file system."""
    with new_folder(request.param) as path:
        yield path


@contextlib.contextmanager
def new_folder(kind: str) -> Iterator[Path]:
    if not os.access(FOLDERS[kind], os.W_OK):
        pytest.skip(f"{FOLDERS[kind]} is not writable")
    with tempfile.TemporaryDirectory(dir=FOLDERS[kind]) as path:
        yield Path(path)


def random_bytes(count: int, salt: int = 0) -> bytes:
    return random.Random(seed() + salt).randbytes(count)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own; it must end well, and in silence."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr or result.stdout
    assert result.stderr == ""
    return result


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


# What it was made with.


def test_getters(engine: str) -> None:
    with AioHandle(12345, 7, True, False, 3, engine=engine) as handle:
        assert handle.get_block_size() == 12345
        assert handle.get_queue_depth() == 7
        assert handle.get_single_submit() is True
        assert handle.get_overlap_events() is False
        assert handle.get_thread_count() == handle.get_intra_op_parallelism() == 3
        assert handle.get_alignment() % PAGE == 0
        assert handle.engine == engine
        assert engine in repr(handle)


def test_defaults() -> None:
    with AioHandle() as handle:
        assert (handle.get_block_size(), handle.get_queue_depth(), handle.get_thread_count()) == (1 << 20, 32, 1)
        assert (handle.get_single_submit(), handle.get_overlap_events()) == (False, True)


@pytest.mark.parametrize("field", ["block_size", "queue_depth", "num_threads"])
def test_a_setting_out_of_range_is_refused(engine: str, field: str) -> None:
    for value in (0, 1 << 31):
        with pytest.raises(ValueError, match=f"{field}.*not {value}"):
            AioHandle(engine=engine, **{field: value})  # type: ignore[arg-type]


def test_the_environment_chooses_the_engine_for_auto_alone(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_OPT_ENGINE", engine)
    with AioHandle() as handle, AioHandle(engine="threads") as explicit:
        assert handle.engine == engine
        assert explicit.engine == "threads"


def test_an_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'warp'"):
        AioHandle(engine="warp")
    monkeypatch.setenv("OFFLOAD_OPT_ENGINE", "weft")
    with pytest.raises(ConfigError, match="'weft'"):
        AioHandle()


# Bytes go where they should, and nowhere else.


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


# Files: by path and by descriptor.


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


# What is wrong is refused, and says what it is.


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
    run_python(FILE_TOO_LARGE, engine, tmp_path / "file")


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


# wait(), futures and errors.


def fails(handle: AioHandle) -> IoFuture:
    """A transfer that is accepted, and then fails with ENOSPC."""
    return handle.async_pwrite(bytearray(100_000), "/dev/full")


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


# Lifetimes: buffers, descriptors, threads and processes.


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
    run_python(LEAVE_WITH_WORK_PENDING, engine, tmp_path)
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
    run_python(FORK_WITH_WORK_PENDING, engine, tmp_path)
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


# Page-locked memory.


def test_a_locked_tensor_is_aligned_and_zeroed(handle: AioHandle) -> None:
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.bool]
    for dtype, count, _ in product(dtypes, [1, 1000, 100_003], range(3)):  # later ones may get the memory of earlier
        tensor = handle.new_cpu_locked_tensor(count, torch.empty(3, 4, dtype=dtype))
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((count,), dtype, "cpu")
        assert tensor.data_ptr() % PAGE == 0
        assert tensor.data_ptr() % handle.get_alignment() == 0
        assert not tensor.any()
        tensor.fill_(1)
        assert handle.free_cpu_locked_tensor(tensor)


def test_which_tensors_are_pinned(handle: AioHandle, engine: str) -> None:
    tensor = handle.new_cpu_locked_tensor(5000, torch.empty(0, dtype=torch.bfloat16))
    with AioHandle(engine=engine) as other:
        for view in (tensor, tensor[10:20], tensor[4999:], tensor.view(50, 100)[3], tensor.view(torch.uint8)):
            assert handle.is_pinned(view)
            assert other.is_pinned(view)
        for ordinary in (torch.zeros(5000), tensor.clone(), torch.empty(4, device="meta")):
            assert not handle.is_pinned(ordinary)
        assert not handle.is_pinned(tensor[5:5])
        assert other.free_cpu_locked_tensor(tensor)


def test_a_locked_tensor_is_freed_once(handle: AioHandle) -> None:
    tensor = handle.new_cpu_locked_tensor(100, torch.empty(0))
    assert handle.free_cpu_locked_tensor(tensor) is True
    assert handle.free_cpu_locked_tensor(tensor) is False
    assert handle.free_cpu_locked_tensor(torch.zeros(100)) is False


def test_locked_memory_outlives_its_freeing_while_a_view_lives(handle: AioHandle) -> None:
    tensor = handle.new_cpu_locked_tensor(100_000, torch.empty(0))
    view = tensor[500:600]
    view.fill_(7)
    assert handle.free_cpu_locked_tensor(tensor)
    del tensor
    gc.collect()
    others = [handle.new_cpu_locked_tensor(100_000, torch.empty(0)).fill_(1) for _ in range(4)]
    assert torch.equal(view, torch.full((100,), 7.0))
    assert handle.is_pinned(view)
    for other in others:
        handle.free_cpu_locked_tensor(other)


def test_locked_memory_outlives_its_handle(engine: str) -> None:
    with AioHandle(engine=engine) as handle:
        tensor = handle.new_cpu_locked_tensor(1000, torch.empty(0)).fill_(3)
    assert torch.equal(tensor, torch.full((1000,), 3.0))
    assert handle.is_pinned(tensor)
    assert handle.free_cpu_locked_tensor(tensor)


def locked_kib() -> int:
    """Memory of this process that is locked into RAM."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmLck")).split()[1])


def test_locked_memory_goes_with_its_last_view(handle: AioHandle) -> None:
    before = locked_kib()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = handle.new_cpu_locked_tensor(1 << 20, torch.empty(0, dtype=torch.uint8))
    if locked_kib() == before:
        pytest.skip("this user may not lock memory")
    assert locked_kib() == before + 1024
    handle.free_cpu_locked_tensor(tensor)
    view = tensor[5:6]
    del tensor
    gc.collect()
    assert locked_kib() == before + 1024
    del view
    gc.collect()
    assert locked_kib() == before


def test_odd_amounts_of_locked_memory(handle: AioHandle) -> None:
    nothing = handle.new_cpu_locked_tensor(0, torch.empty(0, dtype=torch.float16))
    assert (nothing.shape, nothing.dtype) == ((0,), torch.float16)
    with pytest.raises(ValueError, match="-4"):
        handle.new_cpu_locked_tensor(-1, torch.empty(0))
    with pytest.raises(OSError, match=str(1 << 52)) as caught:
        handle.new_cpu_locked_tensor(1 << 50, torch.empty(0))
    assert caught.value.errno == errno.ENOMEM


MAY_LOCK_NOTHING = """
import os, resource, sys, warnings, torch
from offload_opt import AioHandle, OffloadWarning
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
if os.getuid() == 0:
    os.setuid(65534)  # root is not held to the limit
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with AioHandle() as handle, AioHandle() as other:
        for owner in (handle, other, handle):
            tensor = owner.new_cpu_locked_tensor(100_000, torch.empty(0))
            assert tensor.data_ptr() % 4096 == 0
            assert not tensor.any()
            assert handle.is_pinned(tensor)
            tensor.fill_(5)
            with open(os.memfd_create("file"), "wb") as file:
                assert handle.sync_pwrite(tensor, file.fileno()) == 400_000
            assert owner.free_cpu_locked_tensor(tensor)
assert [warning.category for warning in caught] == [OffloadWarning], caught
assert "ulimit -l" in str(caught[0].message), caught[0]
"""


def test_memory_that_may_not_be_locked_is_warned_of_once() -> None:
    run_python(MAY_LOCK_NOTHING)
