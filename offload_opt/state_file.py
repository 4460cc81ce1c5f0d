"""One safetensors file that holds the state of all parameters whole, put together from the pieces in unit files.

The bytes go from file to file in the kernel and never through this process's memory; but for what has a codec, a little
at a time. The file is either for other tools (``export``), or has no name and is mapped into memory (``map_state``):
what looks at a mapped tensor, such as ``torch.save``, has its pages read from the disk one after another, and the
kernel may drop them again.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from .coding import decode_run
from .folders import check_room, replacing
from .manifest import DTYPES
from .units import PAGE, Piece, StateTensor, SwapUnit, is_row_major

# Smaller tensors are read into memory, so that they do not keep the file.
_MAP_FROM = 64 << 10
_COPY_BYTES = 8 << 20
_DECODE_ELEMENTS = 1 << 20  # whole granules of every codec

Place = Callable[[SwapUnit], tuple[Path, int]]
"""A unit's file, and where in it the unit's bytes start."""


class WholeTensor(NamedTuple):
    """A state tensor of a parameter, and the pieces in which it is stored, in order.

    ``weight`` gives the parameter, in the order of the tensor's memory, where a master's remainder is stored.
    """

    label: str
    spec: StateTensor
    pieces: Sequence[tuple[SwapUnit, Piece]]
    weight: Callable[[], torch.Tensor | None]


def map_state(tensors: Sequence[WholeTensor], place: Place, folder: Path) -> list[torch.Tensor]:
    """The tensors, mapped from an unnamed file in ``folder``, which goes with the last of them.

    They are the reader's own: what is written to them stays in memory, and later steps do not change them.

    Raises:
        StoreError: There is no space for the file. OSError: making it failed.
    """
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end = -(-(end + tensor.spec.nbytes) // PAGE) * PAGE
    check_room(folder, end, "the copy of the state that state_dict() hands out")
    with tempfile.TemporaryFile(dir=folder, prefix=".state-") as file:  # without a name where the system can
        _allocate(file.fileno(), end)
        for tensor, offset in zip(tensors, offsets, strict=True):
            _copy_pieces(tensor, place, file.fileno(), offset)
        # One mapping, which the tensors share: each mapping holds a descriptor of the file.
        data: Any = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_COPY) if end else b""
        return [_view(data, tensor.spec, offset) for tensor, offset in zip(tensors, offsets, strict=True)]


def export(
    path: Path,
    tensors: Sequence[WholeTensor],
    place: Place,
    small: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, whole or not at all. ``small`` are further tensors.

    Raises:
        StoreError: There is no space for it. OSError: making it failed.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for label, shape, dtype, nbytes in [
        *((t.label, t.spec.shape, t.spec.dtype, t.spec.nbytes) for t in tensors),
        *((label, tuple(t.shape), t.dtype, t.nbytes) for label, t in small.items()),
    ]:
        entries[label] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    header = struct.pack("<Q", len(text)) + text
    check_room(path.parent, len(header) + end, f"the file {path.name}")
    with replacing(path) as file:
        file.write(header)
        file.flush()
        for tensor in tensors:
            offset = len(header) + entries[tensor.label]["data_offsets"][0]
            if is_row_major(tensor.spec):
                _copy_pieces(tensor, place, file.fileno(), offset)
            else:  # stored in the order of its memory; a file has room for the order of dimensions only
                (mapped,) = map_state([tensor], place, path.parent)
                file.seek(offset)
                _write(file, mapped)
        file.seek(len(header) + end - sum(tensor.nbytes for tensor in small.values()))
        for value in small.values():
            _write(file, value)


def _copy_pieces(tensor: WholeTensor, place: Place, target: int, offset: int) -> None:
    weight = tensor.weight()
    for unit, piece in tensor.pieces:
        path, data_start = place(unit)
        stored = next(stored for stored in piece.tensors if stored.name == tensor.spec.name)
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if stored.codec == "exact":
                _copy_range(source, data_start + stored.offset, target, offset, stored.nbytes, path)
            else:
                _decode_range(source, data_start, target, offset, piece, stored, weight)
        finally:
            os.close(source)
        offset += stored.nbytes


def _decode_range(
    source: int,
    data_start: int,
    target: int,
    offset: int,
    piece: Piece,
    stored: StateTensor,
    weight: torch.Tensor | None,
) -> None:
    """Decode a piece's state tensor from file to file, through a little memory."""
    for begin in range(0, stored.numel, _DECODE_ELEMENTS):
        end = min(begin + _DECODE_ELEMENTS, stored.numel)
        parts = []
        for part in stored.run(begin, end):
            data = bytearray(os.pread(source, part.nbytes, data_start + part.offset))
            if len(data) != part.nbytes:
                raise OSError(errno.ENODATA, f"the file ends before the state of {piece.name} does")
            parts.append(torch.frombuffer(data, dtype=part.dtype))
        values = torch.empty(end - begin, dtype=torch.float32, device="cpu")
        first, last = piece.start + begin, piece.start + end
        decode_run(piece, stored, parts, first, None if weight is None else weight[first:last], values)
        _pwrite(target, memoryview(_bytes_of(values)), offset + begin * values.itemsize)


def _copy_range(source: int, begin: int, target: int, offset: int, nbytes: int, path: Path) -> None:
    """Copy bytes from file to file, in the kernel where it can."""
    in_kernel = hasattr(os, "copy_file_range")
    while nbytes > 0:
        if in_kernel:
            try:
                count = os.copy_file_range(source, target, nbytes, begin, offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise
                in_kernel = False
                continue
        else:
            count = os.pwrite(target, os.pread(source, min(nbytes, _COPY_BYTES), begin), offset)
        if count == 0:
            raise OSError(errno.ENODATA, f"the file ends at byte {begin}, before the state in it does", str(path))
        begin, offset, nbytes = begin + count, offset + count, nbytes - count


def _pwrite(target: int, data: memoryview, offset: int) -> None:
    """Write all of it: where there is no more room, the first call writes a part, and the next one fails."""
    while data:
        count = os.pwrite(target, data, offset)
        data, offset = data[count:], offset + count


def _view(data: Any, spec: StateTensor, offset: int) -> torch.Tensor:
    """A tensor with a storage of its own in a mapping that it keeps alive; a small one in memory."""
    if spec.nbytes < _MAP_FROM:
        data, offset = bytearray(data[offset : offset + spec.nbytes]), 0
    flat = torch.frombuffer(data, dtype=spec.dtype, count=spec.numel, offset=offset)
    return flat.as_strided(spec.shape, spec.stride)


def _allocate(fd: int, nbytes: int) -> None:
    if nbytes:
        os.posix_fallocate(fd, 0, nbytes)


def _write(file: IO[bytes], tensor: torch.Tensor) -> None:
    """Write a tensor's bytes, in the order of its dimensions."""
    tensor = tensor.detach().cpu().contiguous()  # has to live until its memory is written
    if tensor.nbytes:
        file.write(memoryview(_bytes_of(tensor)))


def _bytes_of(data: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """A contiguous CPU tensor's memory, as a buffer. Valid as long as the tensor."""
    return (ctypes.c_char * data.nbytes).from_address(data.data_ptr())
