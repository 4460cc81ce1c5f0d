"""SwapStore: the unit files of one rank, in folders that one process owns.

    <path>/rank-00000-of-00001/            one such folder in each path, on each drive
      LOCK                                 flock: one process owns the store
      units/unit-00000.0.safetensors       one file a unit, in one of the folders

A unit file is a valid safetensors file. Its header is padded so that the data starts on a page, and alignment gaps and
the tail are named as padding entries, so that the whole data region is one aligned transfer and any tool can read the
file. Tensors that are not contiguous, and runs of a larger tensor, are stored flat, in the order of their memory.

This store is scratch space: the state in it is that of the last finished step, and it is not committed to survive a
crash.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import format_bytes
from .errors import ConfigError, StoreError
from .units import PAGE, StateTensor, SwapUnit, least_loaded

if TYPE_CHECKING:
    from .aio import AioHandle, IoFuture

_UNIT_FILES = "unit-*.safetensors"

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# A forked child shares the lock's open file, and would hold the store after its parent has let go of it or has died.
_open_stores: weakref.WeakSet[SwapStore] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for store in list(_open_stores):
        store.close()


os.register_at_fork(after_in_child=_let_go_in_child)


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Raise ConfigError unless ``path`` is a folder that files can be made in. Touches nothing."""
    folder = Path(path)
    if not folder.exists():
        raise ConfigError(
            f"path {str(folder)!r} does not exist: make the folder first, on the drive that is to hold the state"
        )
    if not folder.is_dir():
        raise ConfigError(f"path {str(folder)!r} is not a folder")
    if (
        not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
        or os.statvfs(folder).f_flag & os.ST_RDONLY
    ):
        raise ConfigError(f"path {str(folder)!r} is not writable")
    return folder


def check_folders(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The folders without links. Raises ConfigError for one that no files can be made in, or that is there twice."""
    folders: list[Path] = []
    for path in paths:
        folder = check_folder(path).resolve()
        if folder in folders:
            raise ConfigError(f"path {str(path)!r} is given twice: it is the folder {str(folder)!r}")
        folders.append(folder)
    return folders


def rank_folder(path: str | os.PathLike[str], rank: int, world_size: int) -> Path:
    """Where a rank keeps its store."""
    return Path(path) / f"rank-{rank:05d}-of-{world_size:05d}"


def check_space(folders: Sequence[Path], nbytes: int) -> None:
    """Raise ConfigError where ``nbytes`` of state do not fit into the store ``folders``, which need not exist yet.

    Units that an earlier run left there count as free space: they are replaced.
    """
    free_on: dict[int, int] = {}  # folders on one device share its space
    for folder in folders:
        free_on.setdefault(folder.parent.stat().st_dev, free_bytes(folder.parent))
    left_over = [file for folder in folders for file in (folder / "units").glob(_UNIT_FILES)]
    free = sum(free_on.values()) + sum(file.stat().st_blocks * 512 for file in left_over)
    if nbytes > free:
        paths = [str(folder.parent) for folder in folders]
        shown = paths if len(paths) > 1 else repr(paths[0])
        raise ConfigError(
            f"path {shown} is too small for the optimizer state: it needs {format_bytes(nbytes)}, and "
            f"{format_bytes(free)} are free{_other_state(folders)}"
        )


def _other_state(folders: Sequence[Path]) -> str:
    """What takes space beside the store's folders: state of runs with another number of ranks, of other ranks too."""
    sizes = {}
    for folder in folders:
        for other in sorted(folder.parent.glob("rank-*-of-*")):
            size = sum(file.stat().st_blocks * 512 for file in (other / "units").glob(_UNIT_FILES))
            if size and other != folder:
                sizes[other] = size
    if not sizes:
        return ""
    listed = ", ".join(f"{format_bytes(size)} in {other}" for other, size in sizes.items())
    return f"; other ranks or earlier runs have {listed}, which can be deleted if no run uses it"


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to files in ``folder``."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a unit lies: the number of its folder, its file, and where in the file its data starts."""

    folder: int
    path: Path
    data_start: int


class SwapStore:
    """The unit files in ``folders``, which are made where they are missing.

    The store owns its folders (each by a lock that dies with the process) and its files; it borrows ``handle``. Units
    are spread over the folders by ``bandwidths``, of which there is one for each; none means that all are alike.

    Raises:
        StoreError: Another process, or another optimizer of this one, owns the store.
    """

    def __init__(self, folders: Sequence[Path], handle: AioHandle, bandwidths: Sequence[float] = ()) -> None:
        self._handle = handle
        self.folders = tuple(folders)
        self._bandwidths = tuple(bandwidths) or (1.0,) * len(self.folders)
        self._assigned = [0] * len(self.folders)  # bytes of units
        self._places: dict[SwapUnit, _Place] = {}
        locks: list[int] = []
        self._release_locks = weakref.finalize(self, _unlock, locks, os.getpid())
        try:
            for folder in self.folders:
                for path in (folder, folder / "units"):
                    path.mkdir(mode=0o700, exist_ok=True)
                locks.append(_lock(folder / "LOCK"))
        except BaseException:
            self._release_locks()
            raise
        _open_stores.add(self)

    def create(self, units: Sequence[SwapUnit]) -> None:
        """Make the files of new units, with their space allocated. Raises StoreError when the disks are full."""
        for file in self._stale():
            file.unlink()
        try:
            for unit in units:
                place = self._places[unit] = self._create_file(unit)
                self._assigned[place.folder] += unit.nbytes
        except BaseException:
            self.forget([unit for unit in units if unit in self._places])
            raise

    def forget(self, units: Sequence[SwapUnit]) -> None:
        """Delete the files of units that are no longer wanted."""
        for unit in units:
            place = self._places.pop(unit, None)
            if place is not None:
                self._assigned[place.folder] -= unit.nbytes
                place.path.unlink(missing_ok=True)

    def path_of(self, unit: SwapUnit) -> Path:
        """The file of a unit that has been created, slot 0."""
        return self._places[unit].path

    def read(self, unit: SwapUnit, data: torch.Tensor, after: Sequence[IoFuture] = ()) -> IoFuture:
        """Start to read a unit into the first bytes of ``data``, when the transfers in ``after`` have ended."""
        place = self._places[unit]
        return self._handle.async_pread(data[: unit.nbytes], place.path, place.data_start, after=after)

    def write(self, unit: SwapUnit, data: torch.Tensor) -> IoFuture:
        """Start to write a unit from the first bytes of ``data``."""
        place = self._places[unit]
        return self._handle.async_pwrite(data[: unit.nbytes], place.path, place.data_start)

    def read_into(self, unit: SwapUnit, tensor: StateTensor, data: torch.Tensor) -> None:
        """Read one state tensor of a unit, in the order of its memory, into the contiguous ``data``."""
        place = self._places[unit]
        self._handle.sync_pread(data, place.path, place.data_start + tensor.offset)

    def close(self) -> None:
        """Let go of the locks. The files stay. In a forked child: of its copies; the locks are the parent's."""
        self._release_locks()
        _open_stores.discard(self)

    def _create_file(self, unit: SwapUnit) -> _Place:
        """Make the file of a unit, in the folder whose turn it is."""
        header, name = _header(unit), f"unit-{unit.index:05d}.0.safetensors"
        nbytes = len(header) + unit.nbytes
        free = [free_bytes(folder) for folder in self.folders]
        full: OSError | None = None
        for _ in self.folders:  # each attempt that fails rules a folder out
            index = least_loaded(nbytes, self._assigned, self._bandwidths, free)
            if index is None:
                break
            path = self.folders[index] / "units" / name
            try:
                _write_header(path, header, nbytes)
                return _Place(index, path, len(header))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    error.filename = str(path)
                    raise
                full, free[index] = error, 0  # a quota, or somebody was quicker
        rest = ", ".join(f"{format_bytes(free_bytes(folder))} are free in {folder}" for folder in self.folders)
        raise StoreError(
            f"no space for the optimizer state: the file {name} needs {format_bytes(nbytes)}, and {rest}"
        ) from full

    def _stale(self) -> list[Path]:
        own = {place.path for place in self._places.values()}
        return [file for folder in self.folders for file in (folder / "units").glob(_UNIT_FILES) if file not in own]


def _write_header(path: Path, header: bytes, nbytes: int) -> None:
    """Make a file of ``nbytes`` that starts with the header."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        if os.write(fd, header) != len(header):
            raise OSError(errno.EIO, "the header was written in part", str(path))
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(fd)


def check_storable(tensor: StateTensor) -> None:
    """Raise ConfigError for a dtype that a unit file cannot hold."""
    if tensor.dtype not in _SAFETENSORS_DTYPES:
        raise ConfigError(f"state {tensor.name!r} has dtype {tensor.dtype}, which cannot be stored")


def _lock(path: Path) -> int:
    """Lock the store and write our pid into it. The descriptor holds the lock; it goes with the process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        whose = "this process" if owner == str(os.getpid()) else f"process {owner}"
        raise StoreError(
            f"the store {path.parent} is in use by {whose}: give each optimizer its own folder, or close() the other"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _unlock(locks: Sequence[int], owner: int) -> None:
    """Let go of the locks, if this process took them. A forked child only closes its copies of the files."""
    for fd in locks:
        if os.getpid() == owner:
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _header(unit: SwapUnit) -> bytes:
    """The safetensors header of a unit: 8 bytes of length, then JSON, padded with spaces to a whole page."""
    entries: dict[str, Any] = {}
    position = 0

    def pad_to(offset: int) -> None:
        if offset > position:
            entries[f"__padding__.{len(entries)}"] = _entry("U8", [offset - position], position, offset)

    for piece in unit.pieces:
        for tensor in piece.tensors:
            pad_to(tensor.offset)
            position = tensor.offset + tensor.nbytes
            shape = list(tensor.shape) if _is_row_major(tensor) else [tensor.numel]
            label = piece.tensor_label(tensor)
            if label in entries:  # two groups may have parameters of the same name
                label += f"#{len(entries)}"
            entries[label] = _entry(_SAFETENSORS_DTYPES[tensor.dtype], shape, tensor.offset, position)
    pad_to(unit.nbytes)
    entries["__metadata__"] = {"format": "pt", "offload_opt": "unit 1"}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // PAGE) * PAGE - 8)
    return struct.pack("<Q", len(text)) + text


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _is_row_major(tensor: StateTensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
