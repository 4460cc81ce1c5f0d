"""One unit's file: a valid safetensors file whose data region is one aligned transfer.

The header is padded so that the data starts on a page, and alignment gaps and the tail are named as padding entries.
Tensors that are not contiguous, and runs of a larger tensor, are stored flat, in the order of their memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checksums import RunningChecksum, checksum_of
from .errors import ConfigError, StoreError
from .manifest import DTYPES, UnitRecord
from .units import PAGE, StateTensor, SwapUnit, is_row_major

if TYPE_CHECKING:
    from .aio import AioHandle, IoFuture

CHUNK_BYTES = 8 << 20
"""Of a file that is read from beginning to end: it is not to take more memory than this, however large its unit is."""


def check_storable(tensor: StateTensor) -> None:
    """Raise ConfigError for a dtype that a unit file cannot hold."""
    if tensor.dtype not in DTYPES:
        raise ConfigError(f"state {tensor.name!r} has dtype {tensor.dtype}, which cannot be stored")


def check_files(units: Sequence[UnitRecord], folders: Sequence[Path]) -> None:
    """Raise StoreError unless each unit's file is there, a plain file of the right size."""
    for unit in units:
        if not 0 <= unit.folder < len(folders):
            raise StoreError(f"the manifest places {unit.file} in folder {unit.folder + 1} of {len(folders)}")
        path = folders[unit.folder] / "units" / unit.file
        expected = unit.data_start + unit.nbytes
        if path.is_symlink() or not path.is_file():
            raise StoreError(f"{path}, which the manifest names, is missing or not a plain file")
        if path.stat().st_size != expected:
            raise StoreError(f"{path} has {path.stat().st_size} bytes, and should have {expected}: it was changed")


@dataclasses.dataclass(frozen=True)
class StoredUnit:
    """A unit, its file, where in that its bytes start, and the checksum that they had, if one was made."""

    unit: SwapUnit
    path: Path
    data_start: int
    checksum: str | None


def stored_units(units: Sequence[SwapUnit], records: Sequence[UnitRecord], folders: Sequence[Path]) -> list[StoredUnit]:
    """The units of a manifest, in its folders."""
    return [
        StoredUnit(unit, folders[record.folder] / "units" / record.file, record.data_start, record.checksum)
        for unit, record in zip(units, records, strict=True)
    ]


def check_bytes(handle: AioHandle, stored: Iterable[StoredUnit]) -> None:
    """Read units from their files, through small buffers, and raise OSError where one is not what was written."""
    buffers = itertools.cycle([torch.empty(CHUNK_BYTES // 2, dtype=torch.uint8, device="cpu") for _ in range(2)])
    flight: deque[tuple[StoredUnit, RunningChecksum, torch.Tensor, IoFuture, bool]] = deque()

    def finish_first() -> None:
        each, checksum, part, future, is_last = flight.popleft()
        future.wait()
        checksum.update(part)
        if is_last and checksum.text() != each.checksum:
            raise _damaged(each.unit, each.path)

    try:
        for each in stored:
            if each.checksum is None:
                continue
            checksum, nbytes = RunningChecksum(), each.unit.nbytes
            for begin in range(0, nbytes, CHUNK_BYTES // 2):
                if len(flight) == 2:  # while one is hashed, the next one is read
                    finish_first()
                part = next(buffers)[: nbytes - begin]
                future = handle.async_pread(part, each.path, each.data_start + begin)
                flight.append((each, checksum, part, future, begin + part.nbytes == nbytes))
        while flight:
            finish_first()
    finally:
        # An error that nobody has waited for would be raised by a later wait of the handle.
        for *_, future, _ in flight:
            with contextlib.suppress(OSError):
                future.wait()


def check_unit(unit: SwapUnit, data: torch.Tensor, expected: str | None, path: Path) -> None:
    """Raise OSError where a unit's bytes, read from ``path``, do not have the checksum that they were written with."""
    if expected is not None and checksum_of(data[: unit.nbytes]) != expected:
        raise _damaged(unit, path)


def _damaged(unit: SwapUnit, path: Path) -> OSError:
    names = ", ".join(piece.tensor_label(tensor) for piece in unit.pieces for tensor in piece.tensors)
    problem = f"the bytes are not those that were written (checksum); damaged are among {names}"
    return OSError(errno.EIO, problem, str(path))


def make_unit_file(path: Path, header: bytes, nbytes: int) -> None:
    """Make a file of ``nbytes`` that starts with the header."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        if os.write(fd, header) != len(header):
            raise OSError(errno.EIO, "the header was written in part", str(path))
        os.utime(fd, ns=(0, 0))  # until a unit is written to it: see SwapStore.uncommitted
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(fd)


def unit_header(unit: SwapUnit) -> bytes:
    """The safetensors header of a unit: 8 bytes of length, then JSON, padded with spaces to a whole page."""
    entries: dict[str, Any] = {}
    position = 0

    def pad_to(offset: int) -> None:
        if offset > position:
            entries[f"__padding__.{len(entries)}"] = _entry("U8", [offset - position], position, offset)

    for piece in unit.pieces:
        for tensor in (stored for each in piece.tensors for stored in each.stored):
            pad_to(tensor.offset)
            position = tensor.offset + tensor.nbytes
            shape = list(tensor.shape) if is_row_major(tensor) else [tensor.numel]
            label = piece.tensor_label(tensor)
            if label in entries:  # two groups may have parameters of the same name
                label += f"#{len(entries)}"
            entries[label] = _entry(DTYPES[tensor.dtype], shape, tensor.offset, position)
    pad_to(unit.nbytes)
    entries["__metadata__"] = {"format": "pt", "offload_opt": "unit 1"}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // PAGE) * PAGE - 8)
    return struct.pack("<Q", len(text)) + text


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
