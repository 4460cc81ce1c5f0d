"""The manifest: it comes back as it was, what is refused and why, and that it is replaced whole."""

from __future__ import annotations

import errno
import math
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from offload_opt.errors import StoreError
from offload_opt.manifest import (
    MANIFEST,
    Layout,
    Manifest,
    ParameterRecord,
    PieceRecord,
    TensorRecord,
    UnitRecord,
    checksum,
    decode_value,
    encode_value,
    read_manifest,
    write_manifest,
)
from offload_opt.unit_file import check_files

PAGE = 4096

# A manifest of two parameters: `a` is cut over two units, and `b` lies whole in the second.


def records(*shape: int, offsets: tuple[int, int] = (0, 0)) -> list[TensorRecord]:
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    names = ("exp_avg", "exp_avg_sq")
    return [
        TensorRecord(name=name, dtype="F32", shape=shape, stride=stride, offset=offset)
        for name, offset in zip(names, offsets, strict=True)
    ]


def parameter(number: int, name: str, *shape: int) -> ParameterRecord:
    tensors = records(*shape)
    stride = tensors[0].stride
    return ParameterRecord(
        key=(0, number),
        name=name,
        shape=shape,
        stride=stride,
        dtype="F32",
        tensors=tensors,
        chunking=(1, True, 1 << 20),
        resident=None,
    )


def piece(number: int, start: int, stop: int, tensors: list[TensorRecord], whole: bool = False) -> PieceRecord:
    return PieceRecord(
        parameter=number,
        start=start,
        stop=stop,
        cuts=[start, stop],
        is_whole=whole,
        tensors=tensors,
        resident={"step": 1.0},
    )


def unit(index: int, *pieces: PieceRecord) -> UnitRecord:
    return UnitRecord(
        folder=0,
        file=f"unit-{index:05d}.0.safetensors",
        nbytes=PAGE,
        data_start=PAGE,
        checksum=checksum(bytes(PAGE)),
        device="cpu",
        pieces=list(pieces),
    )


def sample(extra: Any = None) -> Manifest:
    units = [
        unit(0, piece(0, 0, 64, records(64, offsets=(0, 256)))),
        unit(
            1,
            piece(0, 64, 100, records(36, offsets=(0, 192))),
            piece(1, 0, 6, records(2, 3, offsets=(384, 448)), whole=True),
        ),
    ]
    return Manifest(
        store="0" * 32,
        run="0" * 32,
        epoch=3,
        created="2026-01-02T03:04:05+00:00",
        rank=0,
        world_size=1,
        folders=1,
        optimizer="AdamW",
        groups=[{"lr": 0.1}],
        group_sizes=[2],
        state=Layout(parameters=[parameter(0, "a", 100), parameter(1, "b", 2, 3)], units=units),
        weights=None,
        extra=encode_value(extra, "extra"),
        snapshots=[],
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / MANIFEST


def test_a_manifest_comes_back(path: Path) -> None:
    manifest = sample({"rng": torch.get_rng_state(), "nan": math.nan, 1: "é\u2028", "large": 10**40})
    write_manifest(path, manifest)
    assert read_manifest(path) == manifest
    units = read_manifest(path).state.swap_units(path)
    assert [[p.name for p in u.pieces] for u in units] == [["a"], ["a", "b"]]
    assert not units[0].is_blank


# What is refused as a whole.


def test_a_manifest_cut_off_anywhere_is_refused(path: Path) -> None:
    write_manifest(path, sample())
    whole = path.read_bytes()
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(StoreError, match="is truncated or damaged") as refused:
            read_manifest(path)
        assert str(path) in str(refused.value)
    path.write_bytes(whole + b"}")
    with pytest.raises(StoreError, match="is truncated or damaged"):
        read_manifest(path)


def test_a_manifest_with_a_flipped_bit_anywhere_is_refused(path: Path) -> None:
    write_manifest(path, sample({"note": "é"}))
    whole = path.read_bytes()
    body = whole.index(b'"body"') + len(b'"body":')
    with path.open("r+b", buffering=0) as file:
        for position in range(len(whole)):
            for bit in range(8) if position < body else (position % 8,):  # a checksum is over the body
                os.pwrite(file.fileno(), bytes([whole[position] ^ 1 << bit]), position)
                with pytest.raises(StoreError) as refused:
                    read_manifest(path)
                assert str(path) in str(refused.value), position
            os.pwrite(file.fileno(), whole[position : position + 1], position)
    read_manifest(path)


def with_body(path: Path, body: bytes, **envelope: Any) -> Path:
    """A manifest file with this body and a checksum that fits it, but for ``envelope``."""
    fields = {"format": "offload_opt manifest", "version": 2, "checksum": checksum(body), **envelope}
    head = msgspec.json.encode(fields)
    path.write_bytes(head[:-1] + b',"body":' + body + b"}")
    return path


BODY = msgspec.json.encode(sample())
NESTED = b"[" * 100_000 + b"]" * 100_000


def body_with(**fields: Any) -> bytes:
    return msgspec.json.encode({**msgspec.json.decode(BODY), **fields})


@pytest.mark.parametrize(
    ("body", "envelope", "said"),
    [
        (BODY, {"version": 1}, "has version 1 of the format, and this offload_opt knows version 2"),
        (BODY, {"version": "1"}, r"Expected `int`, got `str` - at `\$.version`"),
        (BODY, {"format": "safetensors"}, "is not a manifest of a store: its format is 'safetensors'"),
        (BODY, {"checksum": checksum(b"")}, "is damaged: its bytes do not have the checksum"),
        (BODY, {"pickle": "x"}, "unknown field `pickle`"),
        (b"{}", {}, "is not a valid manifest: Object missing required field"),
        (b"[]", {}, "is not a valid manifest"),
        (body_with(epoch="3"), {}, r"\$.epoch"),
        (body_with(epoch=3.5), {}, r"\$.epoch"),
        (body_with(surprise=1), {}, "unknown field `surprise`"),
        (body_with(snapshots=[1]), {}, r"\$.snapshots"),
        (BODY.replace(b'"extra":null', b'"extra":' + NESTED), {}, "recursion"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bodies_and_envelopes_that_are_refused(path: Path, body: bytes, envelope: dict[str, Any], said: str) -> None:
    with pytest.raises(StoreError, match=said) as refused:
        read_manifest(with_body(path, body, **envelope))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("text", [b"", b"\0" * 100, b"null", b"[]", b"{}", b"MANIFEST", b"\xff\xfe", NESTED])
def test_what_is_no_manifest_is_refused(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    with pytest.raises(StoreError, match="is truncated or damaged, or not a manifest"):
        read_manifest(path)


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(path: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps(Canary(canary))
    pickle.loads(data)
    assert canary.exists()
    canary.unlink()
    path.write_bytes(data)
    with pytest.raises(StoreError):
        read_manifest(path)
    write_manifest(path, sample({"bytes": data, "tensor": torch.frombuffer(bytearray(data), dtype=torch.uint8)}))
    extra = decode_value(read_manifest(path).extra)
    assert extra["bytes"] == data
    assert not canary.exists()


def test_a_link_in_the_place_of_a_manifest_is_not_followed(path: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "elsewhere", sample())
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=str(path)) as refused:
        read_manifest(path)
    assert refused.value.errno == errno.ELOOP


def test_no_manifest(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_manifest(path)


# What is refused of units.


def changed(*keys: Any, to: Any) -> Callable[[Any], None]:
    """Sets one field of the state's layout, which is given as plain dicts and lists."""

    def change(layout: Any) -> None:
        for key in keys[:-1]:
            layout = layout[key]
        layout[keys[-1]] = to

    return change


def of_tensor(unit: int, piece: int, tensor: int, field: str, to: Any) -> Callable[[Any], None]:
    return changed("units", unit, "pieces", piece, "tensors", tensor, field, to=to)


def without_first_piece(layout: Any) -> None:
    del layout["units"][0]


def twice(layout: Any) -> None:
    layout["units"].append({**layout["units"][1], "file": "unit-00002.0.safetensors"})


def from_next_element(layout: Any) -> None:
    piece = layout["units"][1]["pieces"][0]
    piece["start"] = piece["cuts"][0] = 65
    for tensor in piece["tensors"]:
        tensor["shape"] = [35]


def from_earlier_element(layout: Any) -> None:
    piece = layout["units"][1]["pieces"][0]
    piece["start"] = piece["cuts"][0] = 60
    for tensor, offset in zip(piece["tensors"], (0, 192), strict=True):
        tensor.update(shape=[40], offset=offset)


OUTSIDE = "may point outside the store"
LIES_OUTSIDE = "has state of . outside its 4096 bytes"
NOT_ITS_OWN = "does not hold the state of . that the parameter has"
BAD_SIZE = "in a size that is not its elements'"
REFUSED = [
    *[
        (changed("units", 0, "file", to=name), OUTSIDE)
        for name in (
            "../unit-00000.0.safetensors",
            "/etc/passwd",
            "/unit-00000.0.safetensors",
            "x/unit-00000.0.safetensors",
            "unit-00000.0.safetensors/../../x",
            "unit-00000.0.safetensors\n",
            "unit-00000.0.safetensors\0",
            "unit-\u0660\u0660\u0660\u0660\u0660.0.safetensors",
            "MANIFEST.json",
            "..",
            "",
        )
    ],
    (changed("units", 1, "file", to="unit-00000.0.safetensors"), "has the file of another unit"),
    *[
        (changed("units", 0, field, to=to), "are not whole pages")
        for field in ("nbytes", "data_start")
        for to in (0, -PAGE, 100, PAGE + 1)
    ],
    (changed("units", 0, "device", to="floppy:0"), "there is no device 'floppy:0'"),
    *[(of_tensor(0, 0, 0, "offset", to), LIES_OUTSIDE) for to in (-1, -4, PAGE, PAGE - 252, 1 << 70)],
    *[(of_tensor(1, 1, 0, "stride", to), LIES_OUTSIDE) for to in ([1, 1], [0, 0], [3, 2], [1 << 40, 1])],
    (of_tensor(1, 1, 0, "shape", [2]), "impossible shape"),
    (of_tensor(1, 1, 0, "shape", [-2, -3]), "impossible shape"),
    (of_tensor(1, 1, 0, "stride", [3, -1]), "impossible shape"),
    (of_tensor(0, 0, 0, "dtype", "C64"), "unknown dtype, 'C64'"),
    (of_tensor(0, 0, 0, "dtype", "I32"), NOT_ITS_OWN),
    (of_tensor(0, 0, 0, "name", "momentum"), NOT_ITS_OWN),
    (of_tensor(0, 0, 0, "shape", [63]), BAD_SIZE),
    (of_tensor(0, 0, 0, "shape", [0]), LIES_OUTSIDE),
    (lambda layout: layout["units"][1]["pieces"][1]["tensors"][0].update(shape=[6], stride=[1]), BAD_SIZE),
    (changed("units", 0, "pieces", 0, "is_whole", to=True), BAD_SIZE),
    (of_tensor(0, 0, 1, "offset", 252), "has state 'exp_avg_sq' at byte 252, within other state"),
    (of_tensor(0, 0, 1, "offset", 0), "has state 'exp_avg"),
    (of_tensor(1, 1, 0, "offset", 190), "within other state"),
    (changed("units", 0, "pieces", 0, "parameter", to=2), "names parameter 2, which is not there"),
    (changed("units", 0, "pieces", 0, "parameter", to=-1), "names parameter -1, which is not there"),
    *[
        (changed("units", 0, "pieces", 0, "cuts", to=cuts), "cuts that do not fit it")
        for cuts in ([], [0], [0, 63], [1, 64], [0, 64, 64], [0, 70, 64], [0, 40, 30, 64])
    ],
    (changed("units", 1, "pieces", 1, "cuts", to=[0, 3, 6]), "cuts that do not fit it"),
    (changed("units", 0, "pieces", 0, "resident", to={"step": {"$evil": 1}}), "unknown kind: '\\$evil'"),
    (without_first_piece, "elements of a are missing or there twice"),
    (from_next_element, "elements of a are missing or there twice"),
    (from_earlier_element, "elements of a are missing or there twice"),
    (twice, "elements of a are missing or there twice"),
    (lambda layout: layout["units"].reverse(), "elements of a are missing or there twice"),
    (lambda layout: layout["units"].pop(), "it has 64 of the 100 elements of a"),
    (lambda layout: layout["units"][1]["pieces"].pop(), "it has 0 of the 6 elements of b"),
    (changed("parameters", 0, "shape", to=[101]), "it has 100 of the 101 elements of a"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[f"{i}-{said}" for i, (_, said) in enumerate(REFUSED)])
def test_units_that_are_refused(path: Path, change: Callable[[Any], None], said: str) -> None:
    content = msgspec.json.decode(BODY)
    change(content["state"])
    manifest = read_manifest(with_body(path, msgspec.json.encode(content)))  # with a checksum that fits
    with pytest.raises(StoreError, match=said) as refused:
        manifest.state.swap_units(path)
    assert str(path) in str(refused.value)


# Files.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a rank, with the files that the sample names."""
    (tmp_path / "units").mkdir()
    for record in sample().state.units:
        (tmp_path / "units" / record.file).write_bytes(bytes(2 * PAGE))
    return tmp_path


def test_files_that_are_refused(folder: Path, tmp_path: Path) -> None:
    units = sample().state.units
    check_files(units, [folder])
    file = folder / "units" / units[1].file
    for nbytes in (0, PAGE, 2 * PAGE - 1, 2 * PAGE + 1):
        os.truncate(file, nbytes)
        with pytest.raises(StoreError, match=rf"has {nbytes} bytes, and should have {2 * PAGE}") as refused:
            check_files(units, [folder])
        assert str(file) in str(refused.value)
    file.unlink()
    gone = rf"{file}, which the manifest names, is missing or not a plain file"
    with pytest.raises(StoreError, match=gone):
        check_files(units, [folder])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(bytes(2 * PAGE))
    for make in (lambda: file.symlink_to(elsewhere), lambda: os.mkfifo(file), file.mkdir):
        make()
        with pytest.raises(StoreError, match=gone):
            check_files(units, [folder])
        file.rmdir() if file.is_dir() else file.unlink()


@pytest.mark.parametrize("number", [-1, 1, 1000])
def test_a_folder_that_the_store_does_not_have_is_refused(folder: Path, number: int) -> None:
    records = [msgspec.structs.replace(sample().state.units[0], folder=number)]
    with pytest.raises(StoreError, match=rf"in folder {number + 1} of 1"):
        check_files(records, [folder])


# Writing.


def test_only_the_owner_can_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        write_manifest(path, sample())
        write_manifest(path, sample())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [MANIFEST]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_the_old_one_stays_when_writing_fails(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    old, new = sample("old"), sample("new" * 1000)
    write_manifest(path, old)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def open_read_only(fd: int, *rest: Any, **fields: Any) -> Any:
        os.close(fd)
        return fdopen(os.open("/dev/full", os.O_WRONLY), *rest, **fields)

    fdopen = os.fdopen
    with monkeypatch.context() as patched:
        if call == "write":
            patched.setattr(os, "fdopen", open_read_only)
        else:
            patched.setattr(*((Path, "replace") if call == "replace" else (os, call)), fail)
        with pytest.raises(OSError, match=r"Input/output|No space") as failed:
            write_manifest(path, new)
    assert failed.value.errno == (errno.ENOSPC if call == "write" else errno.EIO)
    assert read_manifest(path) == old
    write_manifest(path, new)  # whatever the failure has left
    assert read_manifest(path) == new
    assert [file.name for file in path.parent.iterdir()] == [MANIFEST]


def test_a_manifest_is_on_the_device_before_it_takes_its_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink()
        calls.append(f"fsync {name.relative_to(path.parent)}")
        assert name.is_dir() or name.read_bytes() != b""
        fsync(fd)

    def replaced(source: Path, target: Path) -> Path:
        calls.append(f"{source.name} to {target.name}")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_manifest(path, sample())
    temporary = calls[0].removeprefix("fsync ")
    assert temporary != MANIFEST
    assert calls == [f"fsync {temporary}", f"{temporary} to {MANIFEST}", "fsync ."]
