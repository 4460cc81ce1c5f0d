"""SwapStore: the unit files of one rank, in a folder that one process owns.

    <path>/rank-00000-of-00001/
      LOCK                                 flock: one process owns the store
      units/unit-00000.0.safetensors       one file a unit

A unit file is a valid safetensors file. Its header is padded so that the data starts on a page, and alignment gaps and
the tail are named as padding entries, so that the whole data region is one aligned transfer and any tool can read the
file. Tensors that are not contiguous, and runs of a larger tensor, are stored flat, in the order of their memory.

This store is scratch space: the state in it is that of the last finished step, and it is not committed to survive a
crash.
"""

from __future__ import annotations

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
from .units import PAGE, StateTensor, SwapUnit

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


def rank_folder(path: str | os.PathLike[str], rank: int, world_size: int) -> Path:
    """Where a rank keeps its store."""
    return Path(path) / f"rank-{rank:05d}-of-{world_size:05d}"


def check_space(folder: Path, nbytes: int) -> None:
    """Raise ConfigError where ``nbytes`` of state do not fit into the store ``folder``, which need not exist yet.

    Units that an earlier run left there count as free space: they are replaced.
    """
    disk = os.statvfs(folder.parent)
    left_over = sum(file.stat().st_blocks * 512 for file in (folder / "units").glob(_UNIT_FILES))
    free = disk.f_bavail * disk.f_frsize + left_over
    if nbytes > free:
        raise ConfigError(
            f"path {str(folder.parent)!r} is too small for the optimizer state: it needs {format_bytes(nbytes)}, and "
            f"{format_bytes(free)} are free"
        )


class SwapStore:
    """The unit files in ``folder``, which is made where it is missing.

    The store owns its folder (by a lock that dies with the process) and its files; it borrows ``handle``.

    Raises:
        StoreError: Another process, or another optimizer of this one, owns the store.
    """

    def __init__(self, folder: Path, handle: AioHandle) -> None:
        self._handle = handle
        self.folder = folder
        self._units = folder / "units"
        for path in (self.folder, self._units):
            path.mkdir(mode=0o700, exist_ok=True)
        self._release_lock = weakref.finalize(self, _unlock, _lock(self.folder / "LOCK"), os.getpid())
        _open_stores.add(self)
        self._data_start: dict[SwapUnit, int] = {}

    def create(self, units: Sequence[SwapUnit]) -> None:
        """Make the files of new units, with their space allocated. Raises StoreError when the disk is full."""
        for file in self._stale():
            file.unlink()
        try:
            for unit in units:
                self._data_start[unit] = self._create_file(self.path_of(unit), _header(unit), unit.nbytes)
        except BaseException:
            self.forget([unit for unit in units if unit in self._data_start])
            raise

    def forget(self, units: Sequence[SwapUnit]) -> None:
        """Delete the files of units that are no longer wanted."""
        for unit in units:
            self._data_start.pop(unit, None)
            self.path_of(unit).unlink(missing_ok=True)

    def path_of(self, unit: SwapUnit) -> Path:
        """The file of a unit, slot 0."""
        return self._units / f"unit-{unit.index:05d}.0.safetensors"

    def read(self, unit: SwapUnit, data: torch.Tensor, after: Sequence[IoFuture] = ()) -> IoFuture:
        """Start to read a unit into the first bytes of ``data``, when the transfers in ``after`` have ended."""
        return self._handle.async_pread(data[: unit.nbytes], self.path_of(unit), self._data_start[unit], after=after)

    def write(self, unit: SwapUnit, data: torch.Tensor) -> IoFuture:
        """Start to write a unit from the first bytes of ``data``."""
        return self._handle.async_pwrite(data[: unit.nbytes], self.path_of(unit), self._data_start[unit])

    def read_into(self, unit: SwapUnit, tensor: StateTensor, data: torch.Tensor) -> None:
        """Read one state tensor of a unit, in the order of its memory, into the contiguous ``data``."""
        self._handle.sync_pread(data, self.path_of(unit), self._data_start[unit] + tensor.offset)

    def close(self) -> None:
        """Let go of the lock. The files stay. In a forked child: of its copy; the lock is the parent's."""
        self._release_lock()
        _open_stores.discard(self)

    def _create_file(self, path: Path, header: bytes, nbytes: int) -> int:
        """Make a unit file. Returns where its data starts."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, len(header) + nbytes)
            if os.write(fd, header) != len(header):
                raise OSError(errno.EIO, "the header was written in part", str(path))
        except OSError as error:
            path.unlink()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                error.filename = str(path)
                raise
            disk = os.statvfs(self.folder)
            raise StoreError(
                f"no space for the optimizer state: {path} needs {format_bytes(len(header) + nbytes)}, and "
                f"{format_bytes(disk.f_bavail * disk.f_frsize)} are free"
            ) from error
        finally:
            os.close(fd)
        return len(header)

    def _stale(self) -> list[Path]:
        own = {self.path_of(unit) for unit in self._data_start}
        return [file for file in self._units.glob(_UNIT_FILES) if file not in own]


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


def _unlock(fd: int, owner: int) -> None:
    """Let go of the lock, if this is the process that took it. A forked child only closes its copy of the file."""
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
