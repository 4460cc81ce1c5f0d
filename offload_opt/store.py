"""SwapStore: the unit files of one rank, in folders that one process owns, and the commits that make them last.

    <path>/rank-00000-of-00001/            one such folder in each path, on each drive
      LOCK                                 flock: one process owns the store
      MANIFEST.json                        the commit record, in the first folder; the others have PART.json
      units/unit-00000.0.safetensors       the files of units, each unit's in one of the folders

**Slots.** A unit has one file that holds its newest bytes, and in a store that commits one more to spare. A file that
a commit names, or that a snapshot links, is never written to: the unit's next write goes to its spare file, and takes
turns so with each commit. A file that was left because a snapshot has it is replaced by a fresh one, made when the
snapshot is. So the steady state allocates nothing.

**A commit** is: every write ended, every file that was written brought to the device, then the manifest replaced by
one rename. It may run beside the caller: until it has ended, nothing that the commit before it names is written to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from .config import format_bytes
from .errors import ConfigError, StoreError
from .folders import UNIT_FILES, free_bytes, lock, make_folder, replace_file, sync_folder, unlock
from .manifest import (
    MANIFEST,
    Layout,
    Manifest,
    UnitRecord,
    checksum_of,
    piece_records,
    read_manifest,
    write_manifest,
)
from .snapshots import FilePair, link_or_copy
from .unit_file import make_unit_file, unit_header
from .units import StateTensor, SwapUnit, least_loaded

if TYPE_CHECKING:
    from .aio import AioHandle, IoFuture

# Flushes that run at once: the kernel makes one of those that wait for the same device.
_SYNC_THREADS = 8
_PART = "PART.json"

# A forked child shares the lock's open file, and would hold the store after its parent has let go of it or has died.
_open_stores: weakref.WeakSet[SwapStore] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for store in list(_open_stores):
        store.close()


os.register_at_fork(after_in_child=_let_go_in_child)


@dataclasses.dataclass(eq=False)
class _UnitFile:
    """A file of a unit. ``shared``: a snapshot linked it at some time, and may have it still."""

    path: Path
    checksum: str | None = None
    shared: bool = False
    synced: bool = False  # on the device as it is

    def is_shared(self) -> bool:
        self.shared = self.shared and self.path.stat().st_nlink > 1
        return self.shared


@dataclasses.dataclass(eq=False)
class _Slots:
    """A unit's files: the one with its newest bytes, the one that the last commit names, and those to be written to."""

    folder: int
    data_start: int
    current: _UnitFile
    committed: _UnitFile | None = None
    spares: list[_UnitFile] = dataclasses.field(default_factory=list)


class SwapStore:
    """The unit files in ``folders``, which are made where they are missing.

    The store owns its folders (each by a lock that dies with the process) and its files; it borrows ``handle``. Units
    are spread over the folders by ``bandwidths``, of which there is one for each; none means that all are alike.

    Args:
        folders: One on each drive.
        handle: Does the transfers.
        bandwidths: Of each folder, in any unit of measure.
        durable: Whether there will be commits, for which each unit needs a second file.
        checksum: ``"off"``, ``"write"`` (of each unit as it is written) or ``"read"`` (checked, too, at each read).

    Raises:
        StoreError: Another process, or another optimizer of this one, owns the store; or its manifest is damaged.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        handle: AioHandle,
        bandwidths: Sequence[float] = (),
        *,
        durable: bool = False,
        checksum: str = "off",
    ) -> None:
        self._handle = handle
        self.folders = tuple(folders)
        self._bandwidths = tuple(bandwidths) or (1.0,) * len(self.folders)
        self._durable = durable
        self._checksum = checksum
        self._assigned = [0] * len(self.folders)  # bytes of units
        self._slots: dict[SwapUnit, _Slots] = {}
        self._retired: list[Path] = []  # named by the last commit, and of units that are no longer wanted
        # Of each unit's files: no name is used twice.
        self._numbers: dict[int, itertools.count[int]] = defaultdict(itertools.count)
        self._commit: Future[None] | None = None
        self._committing: dict[SwapUnit, _UnitFile] = {}
        self._executor: ThreadPoolExecutor | None = None
        locks: list[int] = []
        self._release_locks = weakref.finalize(self, unlock, locks, os.getpid())
        try:
            for folder in self.folders:
                for path in (folder, folder / "units"):
                    make_folder(path)
                locks.append(lock(folder / "LOCK"))
            self._check_order()
            self.committed = self._read_committed()
        except BaseException:
            self._release_locks()
            raise
        _open_stores.add(self)

    # Files of units.

    def create(self, units: Sequence[SwapUnit]) -> None:
        """Make the files of new units, with their space allocated. Raises StoreError when the disks are full."""
        if self.committed is None and not self._slots:
            self._delete_others()
        made: list[SwapUnit] = []
        try:
            for unit in units:
                self._slots[unit] = self._place(unit)
                self._assigned[self._slots[unit].folder] += unit.nbytes
                made.append(unit)
        except BaseException:
            self.forget(made)
            raise

    def forget(self, units: Sequence[SwapUnit]) -> None:
        """Delete the files of units that are no longer wanted; those that the last commit names, with the next one."""
        self.abandon_commit()
        for unit in units:
            slots = self._slots.pop(unit, None)
            if slots is None:
                continue
            self._assigned[slots.folder] -= unit.nbytes
            # A commit that failed may be in place all the same.
            named = {file for file in (slots.committed, self._committing.get(unit)) if file}
            for file in {slots.current, *slots.spares, *named}:
                if file in named:
                    self._retired.append(file.path)
                else:
                    file.path.unlink(missing_ok=True)

    def path_of(self, unit: SwapUnit) -> Path:
        """The file with the newest bytes of a unit."""
        return self._slots[unit].current.path

    def place(self, unit: SwapUnit) -> tuple[Path, int]:
        """The file with the newest bytes of a unit, and where in it they start."""
        return self._slots[unit].current.path, self._slots[unit].data_start

    def read(self, unit: SwapUnit, data: torch.Tensor, after: Sequence[IoFuture] = ()) -> IoFuture:
        """Start to read a unit into the first bytes of ``data``, when the transfers in ``after`` have ended."""
        slots = self._slots[unit]
        return self._handle.async_pread(data[: unit.nbytes], slots.current.path, slots.data_start, after=after)

    def check_read(self, unit: SwapUnit, data: torch.Tensor) -> None:
        """With ``checksum="read"``: raise OSError unless what was read into ``data`` is what was written."""
        if self._checksum == "read":
            file = self._slots[unit].current
            check_unit(unit, data, file.checksum, file.path)

    def write(self, unit: SwapUnit, data: torch.Tensor) -> IoFuture:
        """Start to write a unit from the first bytes of ``data``."""
        self.finish_commit()
        slots = self._slots[unit]
        left = slots.current
        if left is slots.committed or left.is_shared():
            slots.current = slots.spares.pop(0)
            if left is not slots.committed:
                self._release(slots, left)
        file = slots.current
        file.synced = False
        file.checksum = checksum_of(data[: unit.nbytes]) if self._checksum != "off" else None
        return self._handle.async_pwrite(data[: unit.nbytes], file.path, slots.data_start)

    def read_into(self, unit: SwapUnit, tensor: StateTensor, data: torch.Tensor) -> None:
        """Read one state tensor of a unit, in the order of its memory, into the contiguous ``data``."""
        slots = self._slots[unit]
        self._handle.sync_pread(data, slots.current.path, slots.data_start + tensor.offset)

    # Commits.

    def records(self, units: Sequence[SwapUnit], numbers: Mapping[tuple[int, int], int]) -> list[UnitRecord]:
        """What a manifest says of ``units``; ``numbers`` gives each parameter's position in the manifest."""
        return [
            UnitRecord(
                folder=slots.folder,
                file=slots.current.path.name,
                nbytes=unit.nbytes,
                data_start=slots.data_start,
                checksum=slots.current.checksum,
                device=str(unit.device),
                pieces=piece_records(unit.pieces, numbers),
            )
            for unit, slots in ((unit, self._slots[unit]) for unit in units)
        ]

    def start_commit(self, manifest: Manifest, writes: Sequence[IoFuture]) -> None:
        """Commit the newest bytes of every unit, beside the caller, once ``writes`` have ended."""
        self.finish_commit()
        self._committing = {unit: slots.current for unit, slots in self._slots.items()}
        if self._executor is None:
            self._executor = ThreadPoolExecutor(_SYNC_THREADS + 1, thread_name_prefix="offload_opt-commit")
        self._commit = self._executor.submit(self._bring_to_device, manifest, list(writes))

    def finish_commit(self) -> None:
        """Wait for a commit that is under way. Raises OSError where it failed: the commit before it holds then."""
        if self._commit is None:
            return
        commit, self._commit = self._commit, None
        commit.result()
        for unit, file in self._committing.items():
            slots = self._slots[unit]
            left, slots.committed = slots.committed, file
            if left is not None and left is not file:
                self._release(slots, left)
        self._committing = {}
        for path in self._retired:
            path.unlink(missing_ok=True)
        self._retired.clear()
        self._provide_spares(list(self._slots))

    def abandon_commit(self) -> None:
        """Wait for a commit that is under way, whatever comes of it."""
        with contextlib.suppress(OSError, StoreError):
            self.finish_commit()

    def _bring_to_device(self, manifest: Manifest, writes: Sequence[IoFuture]) -> None:
        """On a thread of its own. Nothing that it looks at is changed before finish_commit()."""
        for write in writes:
            write.wait()
        dirty = [file for file in self._committing.values() if not file.synced]
        assert self._executor is not None
        list(self._executor.map(_sync_data, [file.path for file in dirty]))
        for file in dirty:
            file.synced = True
        for index, folder in enumerate(self.folders):
            sync_folder(folder / "units")
            if index and self.committed is None:
                replace_file(folder / _PART, msgspec.json.encode((index, len(self.folders))))
        write_manifest(self.folders[0] / MANIFEST, manifest)
        self.committed = manifest

    # Snapshots and recovery.

    def reload(self) -> Manifest | None:
        """The last commit, read again. Raises StoreError where its manifest, or a file that it names, is damaged."""
        self.abandon_commit()
        self.committed = self._read_committed()
        if self.committed is not None:
            # Whoever put it in place may have died, or failed, before it was on the device. Until it is, the files of
            # the commit before it must not be touched.
            sync_folder(self.folders[0])
        return self.committed

    def ways_on(self) -> str:
        """What a person can do after a failure."""
        load = "load the parameters and the state from a checkpoint: after load_state_dict() it works again"
        if self.committed is None:
            return load
        weights = "" if self.committed.weights else " (it holds no weights: load those of the same step, too)"
        return (
            f"call restore(), which goes back to the last commit, of epoch {self.committed.epoch}{weights}; or {load}"
        )

    def snapshot(self, folder: Path, manifest: Manifest) -> None:
        """Fill ``folder`` with the newest bytes of every unit, all of them written, and a manifest.

        Raises:
            StoreError: There is no space for the files that take the place of those that the snapshot shares.
            OSError: Linking or copying failed.
        """
        self._provide_spares(list(self._slots), for_snapshot=True)
        for slots in self._slots.values():
            if not slots.current.synced:
                _sync_data(slots.current.path)
                slots.current.synced = True
        pairs = []
        for unit, slots in self._slots.items():
            target = folder / "units" / slots.current.path.name
            pairs.append(FilePair(slots.current.path, target, slots.data_start + unit.nbytes))
        linked = link_or_copy(pairs, "snapshot")
        for slots in self._slots.values():
            slots.current.shared = slots.current.shared or slots.current.path in linked

        def here(layout: Layout | None) -> Layout | None:
            return layout and msgspec.structs.replace(
                layout, units=[msgspec.structs.replace(unit, folder=0) for unit in layout.units]
            )

        whole = msgspec.structs.replace(manifest, folders=1, state=here(manifest.state), weights=here(manifest.weights))
        sync_folder(folder / "units")
        write_manifest(folder / MANIFEST, whole)

    def adopt(self, units: Mapping[SwapUnit, UnitRecord]) -> None:
        """Take up the units of this store's last commit, which are the only ones then; later writes are discarded."""
        for unit, record in units.items():
            path = self.folders[record.folder] / "units" / record.file
            file = _UnitFile(path, record.checksum, shared=True, synced=True)
            self._slots[unit] = _Slots(record.folder, record.data_start, file, committed=file)
            self._assigned[record.folder] += unit.nbytes
        own = {slots.current.path for slots in self._slots.values()}
        self._retired = sorted(self._named_by_commit() - own)
        self._delete_others()
        self._provide_spares(list(units))

    def bring(self, units: Mapping[SwapUnit, UnitRecord], source: Path) -> None:
        """Take up units from the snapshot folder ``source``: by links, or by copies from another file system."""
        if self.committed is None:
            self._delete_others()
        pairs, files = [], []
        try:
            for unit, record in units.items():
                path = source / "units" / record.file
                index = self._folder_for(unit, record.data_start + unit.nbytes, near=path)
                file = _UnitFile(self._new_path(index, unit), record.checksum, shared=True)
                self._slots[unit] = _Slots(index, record.data_start, file)
                self._assigned[index] += unit.nbytes
                files.append(file)
                pairs.append(FilePair(path, file.path, record.data_start + unit.nbytes))
            link_or_copy(pairs, "restore")
            self._provide_spares(list(units), for_snapshot=True)
        except BaseException:
            self.forget(list(units))
            raise

    def uncommitted(self) -> list[Path]:
        """Unit files that were written after the last commit: what a crash left of the steps after it."""
        committed_at = (self.folders[0] / MANIFEST).stat().st_mtime_ns
        named = self._named_by_commit()
        return [file for file in self._files() if file not in named and file.stat().st_mtime_ns > committed_at]

    def discard(self) -> None:
        """Give up the last commit. The files that it names are deleted when new ones are made."""
        (self.folders[0] / MANIFEST).unlink(missing_ok=True)
        sync_folder(self.folders[0])
        for folder in self.folders[1:]:
            (folder / _PART).unlink(missing_ok=True)
        self.committed = None

    def close(self) -> None:
        """Let go of the locks. The files stay. In a forked child: of its copies; the locks are the parent's."""
        if self._executor is not None and self._release_locks.alive:
            self._executor.shutdown(wait=False)
        self._release_locks()
        _open_stores.discard(self)

    # Helpers.

    def _place(self, unit: SwapUnit) -> _Slots:
        """Make the files of a unit, in the folder whose turn it is."""
        header = unit_header(unit)
        count = 2 if self._durable else 1
        nbytes = count * (len(header) + unit.nbytes)
        free = [free_bytes(folder) for folder in self.folders]
        full: OSError | None = None
        for _ in self.folders:  # each attempt that fails rules a folder out
            index = least_loaded(nbytes, self._assigned, self._bandwidths, free)
            if index is None:
                break
            files: list[_UnitFile] = []
            try:
                while len(files) < count:
                    files.append(self._new_file(index, unit, header))
                return _Slots(index, len(header), files[0], spares=files[1:])
            except OSError as error:
                for file in files:
                    file.path.unlink()
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                full, free[index] = error, 0  # a quota, or somebody was quicker
        raise self._no_space(unit, nbytes) from full

    def _new_path(self, folder: int, unit: SwapUnit) -> Path:
        units = self.folders[folder] / "units"
        names = (units / f"unit-{unit.index:05d}.{number}.safetensors" for number in self._numbers[unit.index])
        return next(path for path in names if not path.exists())

    def _new_file(self, folder: int, unit: SwapUnit, header: bytes) -> _UnitFile:
        path = self._new_path(folder, unit)
        try:
            make_unit_file(path, header, len(header) + unit.nbytes)
        except OSError as error:
            error.filename = str(path)
            raise
        return _UnitFile(path)

    def _provide_spares(self, units: Sequence[SwapUnit], *, for_snapshot: bool = False) -> None:
        """Make the files that the next writes of ``units`` will need. Raises StoreError when a disk is full.

        A unit needs one to turn to when its current file is committed or shared, and another where the one that it
        leaves cannot be its spare then because a snapshot has it. ``for_snapshot``: the current files are about to be.
        """
        for unit in units:
            slots = self._slots[unit]
            stays = slots.current is slots.committed or slots.current.is_shared()
            needed = int(self._durable or for_snapshot or stays)
            if self._durable and (for_snapshot or (slots.committed and slots.committed.is_shared())):
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

    def _release(self, slots: _Slots, file: _UnitFile) -> None:
        """What becomes of a file that a unit has left: its spare, unless a snapshot has it."""
        if file.is_shared():
            file.path.unlink()
        else:
            slots.spares.append(file)

    def _folder_for(self, unit: SwapUnit, nbytes: int, near: Path) -> int:
        """The folder for a file that lies at ``near``: on the same device where there is one, else by bandwidth."""
        device = near.stat().st_dev
        there = [index for index, folder in enumerate(self.folders) if folder.stat().st_dev == device]
        if there:
            return min(there, key=lambda index: self._assigned[index])
        index = least_loaded(nbytes, self._assigned, self._bandwidths, [free_bytes(folder) for folder in self.folders])
        if index is None:
            raise self._no_space(unit, nbytes)
        return index

    def _no_space(self, unit: SwapUnit, nbytes: int) -> StoreError:
        rest = ", ".join(f"{format_bytes(free_bytes(folder))} are free in {folder}" for folder in self.folders)
        return StoreError(
            f"no space for the optimizer state: unit {unit.index} needs {format_bytes(nbytes)}, and {rest}"
        )

    def _files(self) -> list[Path]:
        return [file for folder in self.folders for file in (folder / "units").glob(UNIT_FILES)]

    def _named_by_commit(self) -> set[Path]:
        if self.committed is None:
            return set()
        layouts = [layout for layout in (self.committed.state, self.committed.weights) if layout]
        return {
            self.folders[unit.folder] / "units" / unit.file
            for layout in layouts
            for unit in layout.units
            if unit.folder < len(self.folders)
        }

    def _delete_others(self) -> None:
        """Delete unit files of earlier runs, which neither this one nor the last commit has a use for."""
        own = {file.path for slots in self._slots.values() for file in (slots.current, *slots.spares)}
        for file in set(self._files()) - own - self._named_by_commit():
            file.unlink()

    def _check_order(self) -> None:
        """Raise ConfigError where the folders are not those of the last commit, in its order."""
        for index, folder in enumerate(self.folders):
            if index and (folder / MANIFEST).exists():
                raise ConfigError(f"{folder} is the first folder of a store: give the paths in the order of its run")
            if not (folder / _PART).exists():
                continue
            try:
                part = msgspec.json.decode((folder / _PART).read_bytes(), type=tuple[int, int])
            except msgspec.DecodeError:
                raise StoreError(f"{folder / _PART} is damaged: it should be [folder, folders]") from None
            if part != (index, len(self.folders)):
                raise ConfigError(
                    f"{folder} is folder {part[0] + 1} of {part[1]} of a store, and is given as {index + 1} of "
                    f"{len(self.folders)}: give all of its paths, in the order of its run"
                )

    def _read_committed(self) -> Manifest | None:
        path = self.folders[0] / MANIFEST
        if not path.exists():
            return None
        manifest = read_manifest(path)
        if manifest.folders != len(self.folders):
            raise ConfigError(
                f"{path} is of a store in {manifest.folders} folders, and {len(self.folders)} are given: give all of "
                "its paths, in the order of its run"
            )
        return manifest


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


def check_unit(unit: SwapUnit, data: torch.Tensor, expected: str | None, path: Path) -> None:
    """Raise OSError where a unit's bytes, read from ``path``, do not have the checksum that they were written with."""
    if expected is None or checksum_of(data[: unit.nbytes]) == expected:
        return
    names = ", ".join(piece.tensor_label(tensor) for piece in unit.pieces for tensor in piece.tensors)
    raise OSError(
        errno.EIO, f"the bytes are not those that were written (checksum); damaged are among {names}", str(path)
    )


def _sync_data(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)
