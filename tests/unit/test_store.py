"""The store on disk: unit files, their folder and its lock."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from offload_opt import AioHandle, ConfigError, StoreError
from offload_opt.folders import check_folder, check_space, rank_folder
from offload_opt.store import SwapStore
from offload_opt.unit_file import StoredUnit, check_bytes, check_storable
from offload_opt.units import PAGE, Piece, StateTensor, SwapUnit
from tests.conftest import seed

CPU = torch.device("cpu")


@pytest.fixture
def handle() -> Iterator[AioHandle]:
    with AioHandle() as handle:
        yield handle


@pytest.fixture
def swap_store(store: Path, handle: AioHandle) -> Iterator[SwapStore]:
    swap_store = SwapStore([rank_folder(store, 0, 1)], handle)
    yield swap_store
    swap_store.close()


def piece(name: str, *tensors: StateTensor, start: int = 0, stop: int | None = None) -> Piece:
    end = tensors[0].numel if stop is None else stop
    return Piece((0, 0), name, start, end, (start, end), stop is None, tensors)


def tensor(name: str, shape: tuple[int, ...], offset: int = 0, dtype: torch.dtype = torch.float32) -> StateTensor:
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return StateTensor(name, dtype, shape, stride, offset)


def unit(*pieces: Piece, index: int = 0, nbytes: int = PAGE) -> SwapUnit:
    return SwapUnit(index, pieces, nbytes, CPU)


def plain_unit(index: int, nbytes: int) -> SwapUnit:
    return unit(piece(f"p{index}", tensor("exp_avg", (nbytes // 4,))), index=index, nbytes=nbytes)


def random_data(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def unit_files(swap_store: SwapStore) -> list[str]:
    return sorted(file.name for file in (swap_store.folders[0] / "units").iterdir())


# Unit files.


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_any_tool_can_read_a_unit_file(swap_store: SwapStore) -> None:
    channels_last = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last).stride()
    conv = StateTensor("exp_avg", torch.float32, (2, 3, 4, 5), channels_last, 7040)
    every_dtype = [
        tensor(str(dtype).removeprefix("torch."), (2, 3), 512 + 64 * i, dtype)
        for i, dtype in enumerate([torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8])
    ]
    swap_unit = unit(
        piece("first", tensor("exp_avg", (5, 7), 64), tensor("exp_avg_sq", (5, 7), 256, torch.bfloat16)),
        piece('wéight "quoted"\n', *every_dtype, tensor("bool", (3,), 960, torch.bool)),
        piece(
            "part", tensor("exp_avg", (1000,), 1024), tensor("flag", (1000,), 5056, torch.uint8), start=64, stop=1064
        ),
        piece("conv", conv),
        nbytes=12288,
    )
    data = random_data(swap_unit.nbytes)
    data[960:963] = torch.tensor([1, 0, 1])
    swap_store.create([swap_unit])
    assert swap_store.write(swap_unit, data).wait() == swap_unit.nbytes
    file = swap_store.path_of(swap_unit)

    loaded = load_file(file)
    expected = {swap_piece.tensor_label(t): t for swap_piece in swap_unit.pieces for t in swap_piece.tensors}
    assert {"first.exp_avg", 'wéight "quoted"\n.float64', "part.exp_avg[64:1064]", "conv.exp_avg"} < set(expected)
    padding = {name for name in loaded if name.startswith("__padding__")}
    assert set(loaded) == set(expected) | padding
    for label, state in expected.items():
        value = loaded[label]
        assert value.dtype == state.dtype
        if label == "conv.exp_avg":
            # Flat, in the order of its memory.
            assert value.shape == (120,)
            value = value.as_strided(state.shape, state.stride)
        assert tuple(value.shape) == state.shape
        assert bits_equal(value, state.view(data)), f"{label}, seed {seed()}"
    # Nothing is left out: tensors and padding fill the file.
    assert sum(value.nbytes for value in loaded.values()) == swap_unit.nbytes
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def header_of(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the entries."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return 8 + length, json.loads(content[8 : 8 + length])


@pytest.mark.parametrize("pieces", [1, 30, 400])
def test_the_data_starts_on_a_page(swap_store: SwapStore, pieces: int) -> None:
    # The names make the header longer, by a little each: it crosses pages.
    for count in range(pieces, pieces + 30):
        parts = [piece(f"layer.{i}.weight", tensor("exp_avg", (4,), 64 * i)) for i in range(count)]
        swap_unit = unit(*parts, nbytes=-(-64 * count // PAGE) * PAGE)
        swap_store.create([swap_unit])
        start, entries = header_of(swap_store.path_of(swap_unit))
        assert start % PAGE == 0
        assert swap_store.path_of(swap_unit).stat().st_size == start + swap_unit.nbytes
        del entries["__metadata__"]
        runs = sorted(entry["data_offsets"] for entry in entries.values())
        assert [begin for begin, _ in runs] == [0] + [end for _, end in runs[:-1]]
        assert runs[-1][1] == swap_unit.nbytes
        swap_store.forget([swap_unit])


def test_a_unit_comes_back_as_it_went(swap_store: SwapStore) -> None:
    units = [plain_unit(index, PAGE * (index + 1)) for index in range(4)]
    swap_store.create(units)
    buffers = [random_data(20_000) for _ in units]  # longer than the units
    writes = [swap_store.write(swap_unit, data) for swap_unit, data in zip(units, buffers, strict=True)]
    for swap_unit, data, write in zip(units, buffers, writes, strict=True):
        target = torch.zeros(20_000, dtype=torch.uint8)
        assert swap_store.read(swap_unit, target, after=[write]).wait() == swap_unit.nbytes
        assert torch.equal(target[: swap_unit.nbytes], data[: swap_unit.nbytes]), f"seed {seed()}"
        assert not target[swap_unit.nbytes :].any()
    load_file(swap_store.path_of(units[-1]))


def test_one_tensor_of_a_unit(swap_store: SwapStore) -> None:
    second = tensor("exp_avg_sq", (333,), 1344, torch.bfloat16)
    swap_unit = unit(piece("p", tensor("exp_avg", (333,)), second))
    data = random_data(PAGE)
    swap_store.create([swap_unit])
    swap_store.write(swap_unit, data).wait()
    target = torch.zeros(333, dtype=torch.bfloat16)
    swap_store.read_into(swap_unit, second, target)
    assert bits_equal(target, second.view(data)), f"seed {seed()}"


def test_only_what_a_file_can_hold_is_storable() -> None:
    check_storable(tensor("exp_avg", (3,), dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"'momentum'.*complex64"):
        check_storable(tensor("momentum", (3,), dtype=torch.complex64))


def test_new_units_leave_the_files_of_earlier_ones(swap_store: SwapStore) -> None:
    first, second = plain_unit(0, PAGE), plain_unit(1, PAGE)
    data = random_data(PAGE)
    swap_store.create([first])
    swap_store.write(first, data).wait()
    swap_store.create([second])
    target = torch.zeros(PAGE, dtype=torch.uint8)
    swap_store.read(first, target).wait()
    assert torch.equal(target, data), f"seed {seed()}"
    swap_store.forget([first])
    assert unit_files(swap_store) == ["unit-00001.0.safetensors"]


def test_what_an_earlier_run_left_is_replaced(swap_store: SwapStore) -> None:
    folder = swap_store.folders[0] / "units"
    stale = [folder / "unit-00000.0.safetensors", folder / "unit-99999.1.safetensors"]
    for file in (*stale, folder / "notes.txt"):
        file.write_bytes(b"left over")
    with stale[0].open("rb") as opened:
        swap_store.create([plain_unit(0, PAGE)])
        assert opened.read() == b"left over"  # whoever still reads the old file reads the old file
    assert unit_files(swap_store) == ["notes.txt", "unit-00000.0.safetensors"]
    assert set(load_file(stale[0])) == {"p0.exp_avg"}


def test_a_link_in_the_place_of_a_unit_file_is_not_followed(swap_store: SwapStore, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (swap_store.folders[0] / "units" / "unit-00000.0.safetensors").symlink_to(target)
    swap_unit = plain_unit(0, PAGE)
    swap_store.create([swap_unit])
    swap_store.write(swap_unit, random_data(PAGE)).wait()
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("mask", [0o022, 0o000])
def test_others_can_neither_read_nor_list(store: Path, handle: AioHandle, mask: int) -> None:
    before = os.umask(mask)
    try:
        with contextlib.closing(SwapStore([rank_folder(store, 3, 16)], handle)) as swap_store:
            swap_unit = plain_unit(0, PAGE)
            swap_store.create([swap_unit])
            swap_store.write(swap_unit, random_data(PAGE)).wait()
    finally:
        os.umask(before)
    folder = store / "rank-00003-of-00016"
    assert {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")} == {
        "LOCK": 0o600,
        "units": 0o700,
        "units/unit-00000.0.safetensors": 0o600,
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# The lock.


def test_the_second_owner_in_this_process_is_refused(swap_store: SwapStore, handle: AioHandle) -> None:
    swap_store.create([plain_unit(0, PAGE)])
    for _ in range(2):
        with pytest.raises(StoreError, match="this process") as caught:
            SwapStore([swap_store.folders[0]], handle)
        assert str(swap_store.folders[0]) in str(caught.value)
    assert unit_files(swap_store) == ["unit-00000.0.safetensors"]
    swap_store.close()
    swap_store.close()
    SwapStore([swap_store.folders[0]], handle).close()


def test_a_store_that_nobody_holds_any_more_is_free(store: Path, handle: AioHandle) -> None:
    swap_store = SwapStore([store / "rank"], handle)
    del swap_store
    again = SwapStore([store / "rank"], handle)
    assert again.folders == (store / "rank",)
    again.close()


def test_ranks_do_not_share_a_lock(store: Path, handle: AioHandle) -> None:
    stores = [SwapStore([rank_folder(store, rank, 2)], handle) for rank in range(2)]
    assert len({swap_store.folders[0] for swap_store in stores}) == 2
    for swap_store in stores:
        swap_store.close()


OWN_A_STORE = """
import sys
from pathlib import Path
from offload_opt import AioHandle
from offload_opt.store import SwapStore
with AioHandle() as handle:
    store = SwapStore([Path(sys.argv[1])], handle)
    print("owner", flush=True)
    sys.stdin.read()
    store.close()
    print("closed", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kill", [False, True], ids=["closed", "killed"])
def test_another_process_owns_the_store(store: Path, handle: AioHandle, kill: bool) -> None:
    folder = rank_folder(store, 0, 1)
    command = [sys.executable, "-c", OWN_A_STORE, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        try:
            assert owner.stdout.readline() == "owner\n"
            with pytest.raises(StoreError, match=rf"\b{owner.pid}\b") as caught:
                SwapStore([folder], handle)
            assert str(folder) in str(caught.value)
            if kill:
                owner.send_signal(signal.SIGKILL)
                owner.wait()
            else:
                owner.stdin.close()
                assert owner.stdout.readline() == "closed\n"
            SwapStore([folder], handle).close()
        finally:
            owner.kill()


FORK_WHILE_OWNING = """
import os, sys, warnings
from pathlib import Path
from offload_opt import AioHandle, StoreError
from offload_opt.store import SwapStore
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: a fork of a process with threads
folder = Path(sys.argv[1])
handle = AioHandle()
store = SwapStore([folder], handle)
reader, writer = os.pipe()


def child(close_first):
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        if close_first:
            store.close()
        os.read(reader, 1)  # until the parent closes its end
        os._exit(0)
    return pid


def check_owned():
    try:
        SwapStore([folder], handle)
    except StoreError:
        return
    sys.exit("a child let go of its parent's lock")


children = [child(True), child(False)]
check_owned()
if sys.argv[2] == "owner closes":
    store.close()
    SwapStore([folder], handle).close()
os.close(writer)
for pid in children:
    os.waitpid(pid, 0)
if sys.argv[2] == "child ends":
    check_owned()
"""


@pytest.mark.parametrize(
    "case",
    ["child ends", "owner closes"],
)
def test_the_lock_belongs_to_the_process_that_took_it(store: Path, case: str) -> None:
    # Data loaders fork workers, which live as long as the training loop and longer than an optimizer.
    command = [sys.executable, "-c", FORK_WHILE_OWNING, str(store / "rank"), case]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


# Space, and folders.


def test_too_little_space_is_found_before_anything_is_made(store: Path) -> None:
    folder = rank_folder(store, 0, 1)
    check_space([folder], 1)
    with pytest.raises(ConfigError, match=r"needs 1024\.0 TiB.* free") as caught:
        check_space([folder], 1 << 50)
    assert str(store) in str(caught.value)
    assert list(store.iterdir()) == []


def test_what_an_earlier_run_left_counts_as_free(small_disk: Path, handle: AioHandle) -> None:
    folder = rank_folder(small_disk, 0, 1)
    with contextlib.closing(SwapStore([folder], handle)) as swap_store:
        swap_store.create([plain_unit(0, 640 << 10)])
    disk = os.statvfs(small_disk)
    assert disk.f_bavail * disk.f_frsize < 600 << 10
    check_space([folder], 900 << 10)
    with pytest.raises(ConfigError, match=r"needs 1\.5 MiB"):
        check_space([folder], 1536 << 10)
    with contextlib.closing(SwapStore([folder], handle)) as swap_store:
        swap_store.create([plain_unit(0, 900 << 10)])


def test_a_full_disk(small_disk: Path, handle: AioHandle) -> None:
    with contextlib.closing(SwapStore([rank_folder(small_disk, 0, 1)], handle)) as swap_store:
        first = plain_unit(0, 256 << 10)
        data = random_data(first.nbytes)
        swap_store.create([first])
        swap_store.write(first, data).wait()
        more = [plain_unit(index, 300 << 10) for index in range(1, 5)]
        with pytest.raises(StoreError, match=r"304\.0 KiB.*\b1\d\d\.\d KiB are free") as caught:
            swap_store.create(more)
        assert "unit 3 needs" in str(caught.value)  # two of them had room
        assert str(swap_store.folders[0]) in str(caught.value)
        assert unit_files(swap_store) == ["unit-00000.0.safetensors"]

        swap_store.create(more[:2])  # what they took is free again
        target = torch.zeros_like(data)
        swap_store.read(first, target).wait()
        assert torch.equal(target, data), f"seed {seed()}"


def test_several_full_folders(small_disk: Path, handle: AioHandle) -> None:
    folders = [small_disk / "a", small_disk / "b"]
    with contextlib.closing(SwapStore(folders, handle)) as swap_store:
        units = [plain_unit(index, 300 << 10) for index in range(4)]
        with pytest.raises(StoreError, match=r"304\.0 KiB") as caught:
            swap_store.create(units)
        assert all(f"are free in {folder}" in str(caught.value) for folder in folders)
        swap_store.create(units[:3])
        assert [swap_store.path_of(swap_unit).parent.parent for swap_unit in units[:3]] == [*folders, folders[0]]


def test_a_folder_over_its_quota_is_passed_by(store: Path, handle: AioHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [store / "a", store / "b"]
    allocate = os.posix_fallocate
    calls = 0

    def refuse_the_first(fd: int, offset: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        allocate(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", refuse_the_first)
    with contextlib.closing(SwapStore(folders, handle)) as swap_store:
        swap_unit, data = plain_unit(0, PAGE), random_data(PAGE)
        swap_store.create([swap_unit])
        assert swap_store.path_of(swap_unit).parent.parent == folders[1]
        assert list((folders[0] / "units").iterdir()) == []
        swap_store.write(swap_unit, data).wait()
        target = torch.zeros_like(data)
        swap_store.read(swap_unit, target).wait()
        assert torch.equal(target, data), f"seed {seed()}"


def test_folders_that_cannot_hold_a_store(tmp_path: Path) -> None:
    assert check_folder(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    for path, problem in (("missing", "does not exist"), ("file", "not a folder")):
        with pytest.raises(ConfigError, match=problem) as caught:
            check_folder(tmp_path / path)
        assert str(tmp_path / path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_file_system(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match="not writable"):
        check_folder(small_disk)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="not writable"):
        check_folder(tmp_path)


class BrokenDrive:
    """In place of a handle: every read fails."""

    def __init__(self) -> None:
        self.not_waited_for: list[BrokenDrive.Future] = []

    class Future:
        def __init__(self, drive: BrokenDrive) -> None:
            self._drive = drive

        def wait(self) -> int:
            self._drive.not_waited_for.remove(self)
            raise OSError(errno.EIO, "unreadable")

    def async_pread(self, *_: object) -> Future:
        self.not_waited_for.append(BrokenDrive.Future(self))
        return self.not_waited_for[-1]


def test_a_check_that_fails_leaves_no_error_to_a_later_wait(tmp_path: Path) -> None:
    drive: Any = BrokenDrive()
    units = [SwapUnit(index, (), nbytes, torch.device("cpu")) for index, nbytes in enumerate((4096, 9 << 20))]
    with pytest.raises(OSError, match="unreadable"):
        check_bytes(drive, [StoredUnit(unit, tmp_path / "file", 4096, "some") for unit in units])
    assert not drive.not_waited_for
