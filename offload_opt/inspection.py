"""What stores and snapshots hold, read from their manifests. Takes no lock, and changes nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError, StoreError
from .folders import UNIT_FILES, rank_folder
from .manifest import (
    DTYPES,
    MANIFEST,
    Layout,
    Manifest,
    UnitRecord,
    decode_mapping,
    decode_value,
    read_manifest,
    read_part,
    state_tensor,
)

_RANK_FOLDER = re.compile(r"rank-(\d{5,})-of-(\d{5,})")
_SHORT = 200  # characters of `extra`


class NothingCommittedError(StoreError):
    """There is a store, and nothing is committed in it yet."""


@dataclasses.dataclass(frozen=True)
class RankPlace:
    """Where a rank's store or snapshot is: ``folder`` has the manifest, if there is one; ``parts`` are the others."""

    folder: Path
    parts: Mapping[tuple[int, int], Path]  # by what PART.json says: (number of the folder, folders)

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST

    def folders(self, count: int) -> list[Path]:
        """The ``count`` folders that the manifest speaks of. Raises StoreError where some of them were not given."""
        found = [self.folder, *(self.parts.get((number, count)) for number in range(1, count))]
        missing = [str(number + 1) for number, folder in enumerate(found) if folder is None]
        if missing:
            given = ", ".join(f"{number + 1} ({folder})" for number, folder in enumerate(found) if folder)
            raise StoreError(
                f"{self.folder} is the first of {count} folders of its store: give folder {', '.join(missing)} too; "
                f"here is {given}"
            )
        return [folder for folder in found if folder]


@dataclasses.dataclass(frozen=True)
class StateSummary:
    """One kind of state, summed up over the parameters. ``held``: as state, as weights, or in the manifest."""

    name: str
    held: str
    dtype: str
    codec: str
    parameters: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class SnapshotSummary:
    """A snapshot of the run that is still there. ``own_bytes`` would be free without it; the rest is shared."""

    path: str
    epoch: int | None
    created: str
    nbytes: int
    own_bytes: int
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class RankSummary:
    """What a rank has committed. Bytes are those of unit files; ``weights_*`` are among ``units`` and ``nbytes``."""

    folder: str
    rank: int
    world_size: int
    epoch: int
    created: str
    run: str
    optimizer: str
    folders: int
    parameters: int
    parameters_in_groups: int
    units: int
    nbytes: int
    weights_units: int | None
    weights_bytes: int | None
    units_with_checksum: int
    states: Sequence[StateSummary]
    extra: Any
    """As the manifest has it: JSON, in which tensors and the like are tagged."""
    snapshots: Sequence[SnapshotSummary]


def find_ranks(paths: Iterable[Path]) -> list[RankPlace]:
    """The ranks' stores in ``paths``: folders of stores, of ranks, or of snapshots.

    A store over several folders is one, put together from those that are given.

    Raises:
        ConfigError: A path that is no store, or folders that cannot be told apart.
        StoreError: Folders of a store without its first one, or a damaged PART.json.
    """
    folders = [folder for path in dict.fromkeys(path.resolve() for path in paths) for folder in _rank_folders(path)]
    parts = {folder: part for folder in folders if (part := _part_of(folder))}
    firsts = [folder for folder in folders if folder not in parts]
    owned: dict[Path, dict[tuple[int, int], Path]] = {first: {} for first in firsts}
    for folder, part in parts.items():
        owners = [first for first in firsts if first.name == folder.name]
        number, count = part[0] + 1, part[1]
        if not owners:
            raise StoreError(f"{folder} is folder {number} of {count} of a store: give its first folder, too")
        if len(owners) > 1 or part in owned[owners[0]]:
            other = owned[owners[0]].get(part, owners[-1])
            raise ConfigError(
                f"{folder} is folder {number} of {count} of a store, but of which is not clear beside {other}: give "
                "the folders of one store at a time"
            )
        owned[owners[0]][part] = folder
    return [RankPlace(folder, its) for folder, its in owned.items()]


def _rank_folders(path: Path) -> list[Path]:
    if _RANK_FOLDER.fullmatch(path.name):
        return [path]
    found = sorted(f for f in path.glob("rank-*-of-*") if _RANK_FOLDER.fullmatch(f.name) and f.is_dir())
    if found:
        return found
    inner = sorted({folder.parent.name for folder in path.glob("*/rank-*-of-*")})
    hint = f"; {', '.join(inner[-3:])} in it can be looked at" if inner else ""
    raise ConfigError(f"{path} is not a store or a snapshot: it has no folder such as {rank_folder('', 0, 1)}{hint}")


def _part_of(folder: Path) -> tuple[int, int] | None:
    return None if (folder / MANIFEST).exists() else read_part(folder)


def read_commit(place: RankPlace) -> Manifest:
    """The manifest of a rank's last commit, or of its snapshot.

    Raises:
        NothingCommittedError: There is none yet. StoreError: it is damaged, or of another rank.
        OSError: It cannot be read.
    """
    try:
        manifest = read_manifest(place.manifest)
    except FileNotFoundError:
        raise NothingCommittedError(_nothing_committed(place.folder)) from None
    if place.folder.name != rank_folder("", manifest.rank, manifest.world_size).name:
        raise StoreError(f"{place.manifest} is of rank {manifest.rank} of {manifest.world_size}")
    return manifest


def _nothing_committed(folder: Path) -> str:
    count = sum(1 for _ in (folder / "units").glob(UNIT_FILES))
    there = f"only {count} unit files, which a run would write anew" if count else "nor any unit files"
    return f"{folder} has no committed epoch yet, {there}"


def units_of(manifest: Manifest) -> list[UnitRecord]:
    """The units of a manifest, those of the weights too."""
    return [unit for layout in (manifest.state, manifest.weights) if layout for unit in layout.units]


def file_bytes(units: Iterable[UnitRecord]) -> int:
    """Bytes of the units' files."""
    return sum(unit.data_start + unit.nbytes for unit in units)


def summarise(place: RankPlace) -> RankSummary:
    """What a rank's last commit, or its snapshot, holds. Raises as ``read_commit``."""
    manifest = read_commit(place)
    units = units_of(manifest)
    weights = manifest.weights
    decode_value(manifest.extra)  # what cannot be read is damaged
    return RankSummary(
        folder=str(place.folder),
        rank=manifest.rank,
        world_size=manifest.world_size,
        epoch=manifest.epoch,
        created=manifest.created,
        run=manifest.run,
        optimizer=manifest.optimizer,
        folders=manifest.folders,
        parameters=len(manifest.state.parameters),
        parameters_in_groups=sum(manifest.group_sizes),
        units=len(units),
        nbytes=file_bytes(units),
        weights_units=len(weights.units) if weights else None,
        weights_bytes=file_bytes(weights.units) if weights else None,
        units_with_checksum=sum(unit.checksum is not None for unit in units),
        states=_states(manifest),
        extra=manifest.extra,
        snapshots=_snapshots(manifest),
    )


def _states(manifest: Manifest) -> list[StateSummary]:
    parameters: dict[tuple[str, str, str, str], set[tuple[int, int]]] = {}
    nbytes: dict[tuple[str, str, str, str], int] = {}

    def add(layout: Layout, number: int, name: str, held: str, dtype: str, codec: str, size: int) -> None:
        if not 0 <= number < len(layout.parameters):
            raise StoreError(f"the manifest names parameter {number}, which is not there")
        kind = (name, held, dtype, codec)
        parameters.setdefault(kind, set()).add(layout.parameters[number].key)
        nbytes[kind] = nbytes.get(kind, 0) + size

    for layout, held in ((manifest.state, "state"), (manifest.weights, "weights")):
        if layout is None:
            continue
        residents = [(number, record.resident) for number, record in enumerate(layout.parameters)]
        for piece in (piece for unit in layout.units for piece in unit.pieces):
            residents.append((piece.parameter, piece.resident))
            for tensor in map(state_tensor, piece.tensors):
                size = sum(stored.nbytes for stored in tensor.stored)
                add(layout, piece.parameter, tensor.name, held, DTYPES[tensor.dtype], tensor.codec, size)
        for number, resident in residents:
            for name, value in (decode_mapping(resident) or {}).items():
                add(layout, number, name, "manifest", _kind_of(value), "exact", 0)
    return [StateSummary(*kind, len(parameters[kind]), size) for kind, size in nbytes.items()]


def _kind_of(value: Any) -> str:
    return DTYPES[value.dtype] if isinstance(value, torch.Tensor) else type(value).__name__


def _snapshots(manifest: Manifest) -> list[SnapshotSummary]:
    """The snapshots that the manifest names and that are still there, of the same run."""
    found = []
    for path in manifest.snapshots:
        folder = rank_folder(path, manifest.rank, manifest.world_size)
        try:
            known = read_manifest(folder / MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, StoreError) as error:
            found.append(SnapshotSummary(path, None, "", 0, 0, str(error)))
            continue
        if known.run != manifest.run:  # another run has made its own there since
            continue
        nbytes = own = missing = 0
        for unit in units_of(known):
            try:
                status = (folder / "units" / unit.file).lstat()
            except OSError:
                missing += 1
                continue
            nbytes += status.st_size
            own += status.st_size if status.st_nlink == 1 else 0
        problem = f"{missing} of its unit files are missing" if missing else ""
        found.append(SnapshotSummary(path, known.epoch, known.created, nbytes, own, problem))
    return found


def in_short(value: Any, limit: int = _SHORT) -> str:
    """A value for people, in about ``limit`` characters at most: of tensors and bytes, only what they are."""
    text = _shown(value, limit)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _shown(value: Any, room: int) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor({DTYPES[value.dtype]}, {list(value.shape)})" if value.ndim else repr(value.item())
    if isinstance(value, bytes):
        return f"bytes({len(value)})"
    if isinstance(value, str) and len(value) > room:
        return repr(value[:room]) + "…"
    if not isinstance(value, (dict, list, tuple)):
        return repr(value)
    parts: list[str] = []
    for part in value.items() if isinstance(value, dict) else ((item,) for item in value):
        if sum(map(len, parts)) > room:  # nothing of the rest will be seen
            break
        parts.append(": ".join(_shown(of, room) for of in part))
    brackets = {dict: "{}", list: "[]", tuple: "()"}[type(value)]
    return f"{brackets[0]}{', '.join(parts)}{brackets[1]}"
