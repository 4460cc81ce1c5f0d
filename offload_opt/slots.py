"""The slots of units: which file has a unit's newest bytes, which one a commit names, and which is written to next."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from .config import format_bytes
from .errors import StoreError
from .folders import UNIT_FILES, free_bytes
from .manifest import UnitRecord
from .snapshots import FilePair
from .unit_file import make_unit_file, unit_header
from .units import SwapUnit, least_loaded


@dataclasses.dataclass(eq=False)
class UnitFile:
    """A file of a unit. ``shared``: a snapshot linked it at some time, and may have it still."""

    path: Path
    checksum: str | None = None
    shared: bool = False
    synced: bool = False  # on the device as it is

    def is_shared(self) -> bool:
        """Whether a snapshot has the file, too."""
        self.shared = self.shared and self.path.stat().st_nlink > 1
        return self.shared

    def bring_to_device(self) -> None:
        """Unless it is there as it is."""
        if self.synced:
            return
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        except OSError as error:
            error.filename = str(self.path)
            raise
        finally:
            os.close(fd)
        self.synced = True


@dataclasses.dataclass(eq=False)
class Slots:
    """A unit's files: the one with its newest bytes, the one that the last commit names, and those to be written to."""

    folder: int
    data_start: int
    current: UnitFile
    committed: UnitFile | None = None
    spares: list[UnitFile] = dataclasses.field(default_factory=list)


class UnitSlots:
    """The slots of all units, and the files in ``folders`` that fill them.

    Args:
        folders: One on each drive; each has a folder ``units``.
        bandwidths: Of each folder: files are spread in proportion to them.
        durable: Whether there will be commits, for which each unit needs a second file.
    """

    def __init__(self, folders: Sequence[Path], bandwidths: Sequence[float], durable: bool) -> None:
        self._folders = folders
        self._bandwidths = bandwidths
        self._durable = durable
        self._assigned = [0] * len(folders)  # bytes of units
        # Of each unit's files: no name is used twice.
        self._numbers: dict[int, itertools.count[int]] = defaultdict(itertools.count)
        self.slots: dict[SwapUnit, Slots] = {}
        self.names_changed = True  # in the folders of units, since they were brought to the device

    def make(self, unit: SwapUnit) -> None:
        """Make the files of a new unit, in the folder whose turn it is. Raises StoreError when the disks are full."""
        self.add(unit, self._place(unit))

    def add(self, unit: SwapUnit, slots: Slots) -> None:
        """Take on a unit that has its files."""
        self.slots[unit] = slots
        self._assigned[slots.folder] += unit.nbytes

    def bring(self, units: Mapping[SwapUnit, UnitRecord], source: Path) -> list[FilePair]:
        """Take on units whose files are to come from the folder ``source``. Returns what is to be linked or copied.

        Raises StoreError where the disks have no room for the copies.
        """
        device = source.stat().st_dev
        near = [index for index, folder in enumerate(self._folders) if folder.stat().st_dev == device]
        free = [free_bytes(folder) for folder in self._folders]
        pairs = []
        for unit, record in units.items():
            nbytes = record.data_start + unit.nbytes
            index: int | None
            if near:  # links, which take no room
                index = min(near, key=lambda index: self._assigned[index])
            else:
                index = least_loaded(nbytes, self._assigned, self._bandwidths, free)
            if index is None:
                raise self._no_space(unit, nbytes)
            if not near:
                there = self._folders[index].stat().st_dev
                free = [
                    room - nbytes if folder.stat().st_dev == there else room
                    for room, folder in zip(free, self._folders, strict=True)
                ]
            file = UnitFile(self._new_path(index, unit), record.checksum, shared=True)
            self.add(unit, Slots(index, record.data_start, file))
            pairs.append(FilePair(source / record.file, file.path, nbytes))
        return pairs

    def drop(self, unit: SwapUnit) -> Slots | None:
        """Give up a unit. The caller deletes its files."""
        slots = self.slots.pop(unit, None)
        if slots is not None:
            self._assigned[slots.folder] -= unit.nbytes
        return slots

    def turn(self, unit: SwapUnit) -> UnitFile:
        """The file that the unit's next bytes go to, which is its current one from now on.

        It is the one before, unless a commit names that, or a snapshot has it.
        """
        slots = self.slots[unit]
        left = slots.current
        if left is slots.committed or left.is_shared():
            slots.current = slots.spares.pop(0)
            if left is not slots.committed:
                self._release(slots, left)
        return slots.current

    def commit(self, unit: SwapUnit, file: UnitFile) -> None:
        """Note that the last commit names ``file``, and no longer the one before."""
        slots = self.slots[unit]
        left, slots.committed = slots.committed, file
        if left is not None and left is not file:
            self._release(slots, left)

    def provide_spares(self, *, for_snapshot: Path | None = None) -> None:
        """Make the files that the next writes will need. Raises StoreError when a disk is full.

        A unit needs one to turn to when its current file is committed or shared, and another where the one that it
        leaves cannot be its spare then because a snapshot has it. ``for_snapshot``: the current files are about to be
        linked there, those that can be.
        """
        device = None if for_snapshot is None else for_snapshot.stat().st_dev
        linked = [device is not None and folder.stat().st_dev == device for folder in self._folders]
        for unit, slots in self.slots.items():
            is_linked = linked[slots.folder]
            stays = slots.current is slots.committed or slots.current.is_shared()
            needed = int(self._durable or is_linked or stays)
            if self._durable and (is_linked or (slots.committed and slots.committed.is_shared())):
                needed += 1
            while len(slots.spares) > needed:
                slots.spares.pop().path.unlink()
            header = unit_header(unit) if len(slots.spares) < needed else b""
            while len(slots.spares) < needed:
                try:
                    slots.spares.append(self._new_file(slots.folder, unit, header))
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    raise self._no_space(unit, len(header) + unit.nbytes) from error

    def paths(self) -> set[Path]:
        """The files of all units."""
        return {file.path for slots in self.slots.values() for file in (slots.current, *slots.spares)}

    def paths_there(self) -> list[Path]:
        """Every unit file in the folders, whoever made it."""
        return [file for folder in self._folders for file in (folder / "units").glob(UNIT_FILES)]

    def _place(self, unit: SwapUnit) -> Slots:
        """Make the files of a unit, in the folder whose turn it is."""
        header = unit_header(unit)
        count = 2 if self._durable else 1
        nbytes = count * (len(header) + unit.nbytes)
        free = [free_bytes(folder) for folder in self._folders]
        full: OSError | None = None
        for _ in self._folders:  # each attempt that fails rules a folder out
            index = least_loaded(nbytes, self._assigned, self._bandwidths, free)
            if index is None:
                break
            files: list[UnitFile] = []
            try:
                while len(files) < count:
                    files.append(self._new_file(index, unit, header))
                return Slots(index, len(header), files[0], spares=files[1:])
            except OSError as error:
                for file in files:
                    file.path.unlink()
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                full, free[index] = error, 0  # a quota, or somebody was quicker
        raise self._no_space(unit, nbytes) from full

    def _new_path(self, folder: int, unit: SwapUnit) -> Path:
        """A name that no folder has: a snapshot has the files of all of them in one."""
        self.names_changed = True
        names = (f"unit-{unit.index:05d}.{number}.safetensors" for number in self._numbers[unit.index])
        name = next(name for name in names if not any((each / "units" / name).exists() for each in self._folders))
        return self._folders[folder] / "units" / name

    def _new_file(self, folder: int, unit: SwapUnit, header: bytes) -> UnitFile:
        path = self._new_path(folder, unit)
        try:
            make_unit_file(path, header, len(header) + unit.nbytes)
        except OSError as error:
            error.filename = str(path)
            raise
        return UnitFile(path)

    def _release(self, slots: Slots, file: UnitFile) -> None:
        """What becomes of a file that a unit has left: its spare, unless a snapshot has it."""
        if file.is_shared():
            file.path.unlink()
        else:
            slots.spares.append(file)

    def _no_space(self, unit: SwapUnit, nbytes: int) -> StoreError:
        rest = ", ".join(f"{format_bytes(free_bytes(folder))} are free in {folder}" for folder in self._folders)
        return StoreError(
            f"no space for the optimizer state: unit {unit.index} needs {format_bytes(nbytes)}, and {rest}"
        )
