"""The commit record of a store: what an epoch consists of, as one JSON file that is replaced whole.

The file is ``{"format", "version", "checksum", "body"}``, where ``checksum`` is of the body's bytes as they stand in
the file. Everything that is read is validated: types by msgspec, and what types cannot say (sizes, ranges, file names)
by ``Layout.units``. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from .codecs import REMAINDER
from .config import STATE_DTYPES
from .errors import ConfigError, StoreError
from .folders import replacing
from .units import PAGE, Piece, StateTensor, SwapUnit, is_dense

MANIFEST = "MANIFEST.json"
PART = "PART.json"
"""What the other folders of a store have in the manifest's place: [number of the folder, folders]."""
_FORMAT = "offload_opt manifest"
_VERSION = 2
# What msgspec raises for bytes that it cannot read.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_UNIT_FILE = re.compile(r"unit-[0-9]{5,9}\.[0-9]{1,9}\.safetensors")

DTYPES = {
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
"""What can be stored, under safetensors' names."""
_DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


# Records are frozen; what is read is checked against their fields and types.


class TensorRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A state tensor of a parameter or of a piece; see units.StateTensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    codec: str = "exact"


class PieceRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run of a parameter's elements; see units.Piece.

    ``resident`` is encoded, or null where there is no state; so is the tensor ``ties``.
    """

    parameter: int
    start: int
    stop: int
    cuts: list[int]
    is_whole: bool
    tensors: list[TensorRecord]
    resident: dict[str, Any] | None
    ties: Any = None


class UnitRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A unit: its file, in the folder of that number, its bytes, where they start in the file, and their checksum."""

    folder: int
    file: str
    nbytes: int
    data_start: int
    checksum: str | None
    device: str
    pieces: list[PieceRecord]


class ParameterRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A parameter by its place (group, position), and what an optimizer keeps for it; see units.ParameterPlan.

    ``resident`` is the state of a parameter that has nothing to page. ``chunking`` says where it was allowed to be cut.
    """

    key: tuple[int, int]
    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    tensors: list[TensorRecord]
    chunking: tuple[int, bool, int]
    resident: dict[str, Any] | None


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which bytes of which unit belong to which parameter."""

    parameters: list[ParameterRecord]
    units: list[UnitRecord]

    def swap_units(self, where: Path) -> list[SwapUnit]:
        """The units, checked: no tensor outside its unit, no byte or element missing or there twice.

        Raises StoreError, which names the manifest ``where``.
        """
        units = []
        covered: list[list[tuple[int, int]]] = [[] for _ in self.parameters]
        files = set()
        for index, record in enumerate(self.units):
            try:
                _check_file(record)
                if (record.folder, record.file) in files:
                    raise StoreError("has the file of another unit")
                files.add((record.folder, record.file))
                pieces = tuple(self._piece(piece, record) for piece in record.pieces)
                _check_apart(pieces)
            except StoreError as error:
                raise StoreError(f"{where} is damaged: unit {index} ({record.file}) {error}") from None
            for piece in record.pieces:
                covered[piece.parameter].append((piece.start, piece.stop))
            units.append(SwapUnit(index, pieces, record.nbytes, _device(record.device, where), is_blank=False))
        for owner, runs in zip(self.parameters, covered, strict=True):
            expected = math.prod(owner.shape) if owner.tensors else 0
            end = 0
            for start, stop in runs:
                if start != end:
                    raise StoreError(f"{where} is damaged: elements of {owner.name} are missing or there twice")
                end = stop
            if end != expected:
                raise StoreError(f"{where} is damaged: it has {end} of the {expected} elements of {owner.name}")
        return units

    def _piece(self, record: PieceRecord, unit: UnitRecord) -> Piece:
        """A piece, checked against its parameter and its unit. Raises StoreError with what is wrong with the unit."""
        if not 0 <= record.parameter < len(self.parameters):
            raise StoreError(f"names parameter {record.parameter}, which is not there")
        owner = self.parameters[record.parameter]
        run = [record.start, *record.cuts[1:-1], record.stop]
        is_wrong = record.cuts != run or any(a >= b for a, b in itertools.pairwise(run))
        if is_wrong or (record.is_whole and len(run) > 2):
            raise StoreError(f"has a piece of {owner.name} with cuts that do not fit it")
        tensors = tuple(state_tensor(tensor) for tensor in record.tensors)
        if any(not _lies_in(tensor, unit.nbytes) for tensor in tensors):
            raise StoreError(f"has state of {owner.name} outside its {unit.nbytes} bytes")
        if [(t.name, t.dtype) for t in record.tensors] != [(t.name, t.dtype) for t in owner.tensors]:
            raise StoreError(f"does not hold the state of {owner.name} that the parameter has")
        if record.is_whole:
            fits = (record.start, record.stop) == (0, math.prod(owner.shape))
            fits = fits and [t.shape for t in tensors] == [t.shape for t in owner.tensors]
        else:
            fits = all(t.shape == (record.stop - record.start,) for t in tensors)
        if not fits:
            raise StoreError(f"has state of {owner.name} in a size that is not its elements'")
        key = (owner.key[0], owner.key[1])
        small = decode_mapping(record.resident)
        cuts = tuple(record.cuts)
        ties = decode_value(record.ties)
        if ties is not None and not _are_ties(ties, record.stop - record.start):
            raise StoreError(f"has ties of {owner.name} that are no positions in it")
        return Piece(key, owner.name, record.start, record.stop, cuts, record.is_whole, tensors, small, ties)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A committed epoch. ``groups`` are the param groups' options, encoded; ``extra`` is the user's, encoded too.

    ``store`` is the identity of the store that made it, and ``run`` that of the training, which ends with the store's
    ``discard=True``, and goes on with ``restore()``.
    """

    store: str
    run: str
    epoch: int
    created: str
    rank: int
    world_size: int
    folders: int
    optimizer: str
    groups: list[dict[str, Any]]
    group_sizes: list[int]
    state: Layout
    weights: Layout | None
    extra: Any
    snapshots: list[str]


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    version: int
    checksum: str
    body: msgspec.Raw


def checksum(data: bytes) -> str:
    """The checksum of a manifest's body: 128 bits of XXH3."""
    return f"xxh3_128:{xxhash.xxh3_128(data).hexdigest()}"


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        StoreError: It is truncated, damaged, of a newer version, or not a manifest; the message says which.
        FileNotFoundError: There is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        text = file.read()
    try:
        envelope = msgspec.json.decode(text, type=_Envelope)
    except _UNREADABLE as error:
        raise StoreError(f"{path} is truncated or damaged, or not a manifest of a store: {error}") from None
    if envelope.format != _FORMAT:
        raise StoreError(f"{path} is not a manifest of a store: its format is {envelope.format!r}")
    if envelope.version != _VERSION:
        raise StoreError(
            f"{path} has version {envelope.version} of the format, and this offload_opt knows version {_VERSION}: "
            "it was written by another version of the package; use that one"
        )
    if checksum(bytes(envelope.body)) != envelope.checksum:
        raise StoreError(f"{path} is damaged: its bytes do not have the checksum {envelope.checksum}")
    try:
        return msgspec.json.decode(envelope.body, type=Manifest)
    except _UNREADABLE as error:
        raise StoreError(f"{path} is not a valid manifest: {error}") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put a manifest in place, whole or not at all, and on the device when it returns."""
    body = msgspec.json.encode(manifest)
    envelope = _Envelope(format=_FORMAT, version=_VERSION, checksum=checksum(body), body=msgspec.Raw(body))
    with replacing(path) as file:
        file.write(msgspec.json.encode(envelope))


def read_part(folder: Path) -> tuple[int, int] | None:
    """(number of the folder, folders of its store), or None where it does not say. Raises StoreError for bad bytes."""
    try:
        return msgspec.json.decode((folder / PART).read_bytes(), type=tuple[int, int])
    except FileNotFoundError:
        return None
    except _UNREADABLE:
        raise StoreError(f"{folder / PART} is damaged: it should be [folder, folders]") from None


def write_part(folder: Path, index: int, count: int) -> None:
    """Say in a folder of a store, other than the first, which it is."""
    with replacing(folder / PART) as file:
        file.write(msgspec.json.encode((index, count)))


# Values: what JSON has no word for is an object with one key that starts with "$".


def encode_value(value: Any, what: str) -> Any:
    """A value as JSON that ``decode_value`` turns into the same value: floats to the bit, tuples, tensors and bytes.

    Raises ConfigError, with ``what`` in the message, for a value of another type.
    """
    if value is None or isinstance(value, bool):
        return value
    # What derives from these, such as numpy's float64, comes back as the plain type.
    if isinstance(value, str):
        return _text(value, what)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [encode_value(item, what) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [encode_value(item, what) for item in value]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {_text(key, what): encode_value(item, f"{what}[{key!r}]") for key, item in value.items()}
        return {"$dict": [[encode_value(k, what), encode_value(v, f"{what}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor) and value.dtype in DTYPES:
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""
        return {"$tensor": [DTYPES[value.dtype], list(value.shape), base64.b64encode(data).decode()]}
    raise ConfigError(
        f"{what} is a {type(value).__name__}, which a store cannot hold: numbers, strings, lists, tuples, dicts, bytes "
        "and small tensors can be"
    )


def _text(value: str, what: str) -> str:
    try:
        return value.encode().decode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{what} has a string that is not valid Unicode, which a store cannot hold: {value!r}"
        ) from None


def decode_value(value: Any) -> Any:
    """The value that ``encode_value`` was given. Tensors are on the CPU. Raises StoreError for what it never gives."""
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: decode_value(item) for key, item in value.items()}
    try:
        ((tag, content),) = value.items()
        if tag == "$int":
            return int(content, 0)
        if tag == "$float":
            return float(content)
        if tag == "$tuple":
            return tuple(decode_value(item) for item in content)
        if tag == "$dict":
            return {decode_value(key): decode_value(item) for key, item in content}
        if tag == "$bytes":
            return base64.b64decode(content, validate=True)
        if tag == "$tensor":
            name, shape, text = content
            data = bytearray(base64.b64decode(text, validate=True))
            dtype = _DTYPES_BY_NAME[name]
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
            return flat.reshape(shape).clone()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise StoreError(f"the manifest has a value that cannot be read: {error}") from None
    raise StoreError(f"the manifest has a value of an unknown kind: {tag!r}")


def encode_mapping(values: Mapping[str, Any] | None, what: str) -> dict[str, Any] | None:
    """``encode_value`` of each value; None stays None."""
    return None if values is None else {name: encode_value(value, f"{what}.{name}") for name, value in values.items()}


def decode_mapping(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The opposite of ``encode_mapping``."""
    return None if values is None else {name: decode_value(value) for name, value in values.items()}


def tensor_records(tensors: Iterable[StateTensor]) -> list[TensorRecord]:
    """State tensors as records."""
    return [
        TensorRecord(name=t.name, dtype=DTYPES[t.dtype], shape=t.shape, stride=t.stride, offset=t.offset, codec=t.codec)
        for t in tensors
    ]


def piece_records(pieces: Sequence[Piece], numbers: Mapping[tuple[int, int], int]) -> list[PieceRecord]:
    """Pieces as records; ``numbers`` gives the position of each parameter in ``Layout.parameters``."""
    return [
        PieceRecord(
            parameter=numbers[piece.key],
            start=piece.start,
            stop=piece.stop,
            cuts=list(piece.cuts),
            is_whole=piece.is_whole,
            tensors=tensor_records(piece.tensors),
            resident=encode_mapping(piece.resident, piece.name),
            ties=encode_value(piece.ties, piece.name),
        )
        for piece in pieces
    ]


def state_tensor(record: TensorRecord) -> StateTensor:
    """The opposite of ``tensor_records``. Raises StoreError for what cannot be."""
    try:
        dtype = _DTYPES_BY_NAME[record.dtype]
    except KeyError:
        raise StoreError(f"the manifest has state of an unknown dtype, {record.dtype!r}") from None
    if len(record.shape) != len(record.stride) or min(record.shape, default=1) < 0 or min(record.stride, default=0) < 0:
        raise StoreError(f"the manifest has state {record.name!r} of an impossible shape")
    if record.codec not in (*STATE_DTYPES, REMAINDER) or (record.codec != "exact" and dtype is not torch.float32):
        raise StoreError(f"the manifest has state {record.name!r} stored in an unknown way, {record.codec!r}")
    return StateTensor(record.name, dtype, record.shape, record.stride, record.offset, record.codec)


def _are_ties(ties: Any, numel: int) -> bool:
    """Whether a manifest's value is what encoding a ``codecs.Master`` gives for so many elements."""
    if not isinstance(ties, torch.Tensor) or ties.dtype is not torch.int32 or ties.dim() != 1:
        return False
    positions = ties.tolist()
    return all(a < b for a, b in itertools.pairwise([-1, *positions, numel]))


def _check_file(record: UnitRecord) -> None:
    if not _UNIT_FILE.fullmatch(record.file):
        raise StoreError("has a name that is not a unit file's, and may point outside the store")
    if min(record.data_start, record.nbytes) <= 0 or record.data_start % PAGE or record.nbytes % PAGE:
        raise StoreError(f"has {record.nbytes} bytes from byte {record.data_start} on, which are not whole pages")


def _check_apart(pieces: Sequence[Piece]) -> None:
    """Raise StoreError where state tensors of a unit share bytes."""
    ends = 0
    for tensor in sorted((t for piece in pieces for t in piece.tensors), key=lambda tensor: tensor.offset):
        if tensor.offset < ends:
            raise StoreError(f"has state {tensor.name!r} at byte {tensor.offset}, within other state")
        ends = tensor.end


def _lies_in(tensor: StateTensor, nbytes: int) -> bool:
    return tensor.offset >= 0 < tensor.nbytes and tensor.end <= nbytes and is_dense(tensor.shape, tensor.stride)


def _device(name: str, where: Path) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise StoreError(f"{where} is damaged: there is no device {name!r}") from None
