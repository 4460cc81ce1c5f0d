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
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from .checksums import Checksum
from .commit import Commit
from .errors import ConfigError, StoreError
from .folders import LOCK, lock, make_folder, remove_unfinished, sync_folder, unlock
from .manifest import (
    MANIFEST,
    PART,
    Layout,
    Manifest,
    UnitRecord,
    piece_records,
    read_manifest,
    read_part,
    write_manifest,
    write_part,
)
from .slots import Slots, UnitFile, UnitSlots
from .snapshots import FilePair, link_or_copy
from .unit_file import StoredUnit, check_bytes, check_unit
from .units import StateTensor, SwapUnit

if TYPE_CHECKING:
    from .aio import AioHandle, IoFuture

# A forked child shares the lock's open file, and would hold the store after its parent has let go of it or has died.
_open_stores: weakref.WeakSet[SwapStore] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for store in list(_open_stores):
        store.close()


os.register_at_fork(after_in_child=_let_go_in_child)


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
        discard: Give up the last commit, also one that is damaged. Its files are deleted when new ones are made.

    Raises:
        StoreError: Another process, or another optimizer of this one, owns the store; or its manifest is damaged.
        ConfigError: The folders are not those of the last commit, in its order.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        handle: AioHandle,
        bandwidths: Sequence[float] = (),
        *,
        durable: bool = False,
        checksum: str = "off",
        discard: bool = False,
    ) -> None:
        self._handle = handle
        self.folders = tuple(folders)
        self._checksum = checksum
        self._units = UnitSlots(self.folders, tuple(bandwidths) or (1.0,) * len(self.folders), durable)
        self._retired: list[Path] = []  # named by the last commit, and of units that are no longer wanted
        self._commit: Commit | None = None
        self._committing: dict[SwapUnit, UnitFile] = {}
        self._owner = os.getpid()
        locks: list[int] = []
        self._release_locks = weakref.finalize(self, unlock, locks, os.getpid())
        try:
            for folder in self.folders:
                for path in (folder, folder / "units"):
                    make_folder(path)
                fd, identity = lock(folder / LOCK)
                locks.append(fd)
                if folder == self.folders[0]:
                    self.identity = identity
                remove_unfinished(folder)
            self._check_order(discard)
            if discard:
                self._discard()
            self.committed = self._read_committed()
        except BaseException:
            self._release_locks()
            raise
        _open_stores.add(self)

    # Files of units.

    def create(self, units: Sequence[SwapUnit]) -> None:
        """Make the files of new units, with their space allocated. Raises StoreError when the disks are full."""
        self.finish_commit()
        if not self._units.slots:
            self._delete_others()
        made: list[SwapUnit] = []
        try:
            for unit in units:
                self._units.make(unit)
                made.append(unit)
        except BaseException:
            self.forget(made)
            raise

    def forget(self, units: Sequence[SwapUnit]) -> None:
        """Delete the files of units that are no longer wanted; those that the last commit names, with the next one."""
        self.abandon_commit()
        for unit in units:
            slots = self._units.drop(unit)
            if slots is None:
                continue
            # A commit that failed may be in place all the same.
            named = {file for file in (slots.committed, self._committing.get(unit)) if file}
            for file in {slots.current, *slots.spares, *named}:
                if file in named:
                    self._retired.append(file.path)
                else:
                    file.path.unlink(missing_ok=True)

    def forget_all(self) -> None:
        """Forget every unit, also one that nobody else knows of, since its making was interrupted."""
        self.forget(list(self._units.slots))

    def retire_all(self) -> None:
        """Once all units are forgotten: what the last commit names goes with the next one, all else now.

        Files of an earlier run are among them, of which no unit here has ever known.
        """
        self._retired = sorted({*self._retired, *self.named_by_commit()})
        self._delete_others()

    def path_of(self, unit: SwapUnit) -> Path:
        """The file with the newest bytes of a unit."""
        return self._units.slots[unit].current.path

    def place(self, unit: SwapUnit) -> tuple[Path, int]:
        """The file with the newest bytes of a unit, and where in it they start."""
        return self._units.slots[unit].current.path, self._units.slots[unit].data_start

    def read(self, unit: SwapUnit, data: torch.Tensor, after: Sequence[IoFuture] = ()) -> IoFuture:
        """Start to read a unit into the first bytes of ``data``, when the transfers in ``after`` have ended."""
        slots = self._units.slots[unit]
        return self._handle.async_pread(data[: unit.nbytes], slots.current.path, slots.data_start, after=after)

    def check_read(self, unit: SwapUnit, data: torch.Tensor) -> None:
        """With ``checksum="read"``: raise OSError unless what was read into ``data`` is what was written."""
        if self._checksum == "read":
            file = self._units.slots[unit].current
            check_unit(unit, data, file.checksum, file.path)

    def check_stored(self, units: Iterable[SwapUnit]) -> None:
        """With ``checksum="read"``: raise OSError unless the files have the bytes that were written to them."""
        if self._checksum == "read":
            slots = {unit: self._units.slots[unit] for unit in units}
            check_bytes(
                self._handle,
                (StoredUnit(u, s.current.path, s.data_start, s.current.checksum) for u, s in slots.items()),
            )

    def new_checksum(self, unit: SwapUnit, data: torch.Tensor) -> Checksum | None:
        """For what ``write`` will be given, to add parts of it beforehand. None where checksums are off."""
        return None if self._checksum == "off" else Checksum(data[: unit.nbytes])

    def write(self, unit: SwapUnit, data: torch.Tensor, checksum: Checksum | None = None) -> IoFuture:
        """Start to write a unit from the first bytes of ``data``; ``checksum`` is theirs, where there is one."""
        self.finish_commit()
        file = self._units.turn(unit)
        file.synced = False
        checksum = checksum or self.new_checksum(unit, data)
        file.checksum = None if checksum is None else checksum.text()
        return self._handle.async_pwrite(data[: unit.nbytes], *self.place(unit))

    def read_into(self, unit: SwapUnit, tensor: StateTensor, data: torch.Tensor) -> None:
        """Read one state tensor of a unit, in the order of its memory, into the contiguous ``data``."""
        slots = self._units.slots[unit]
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
            for unit, slots in ((unit, self._units.slots[unit]) for unit in units)
        ]

    def start_commit(self, manifest: Manifest, writes: Sequence[IoFuture]) -> None:
        """Commit the newest bytes of every unit, beside the caller, once ``writes`` have ended."""
        self.finish_commit()
        self._committing = {unit: slots.current for unit, slots in self._units.slots.items()}
        # Kept before it is started: an interrupt must not leave a commit running that nobody knows of.
        self._commit = Commit(lambda commit: self._bring_to_device(commit, manifest, list(writes)))
        self._commit.start()

    def finish_commit(self) -> None:
        """Wait for a commit that is under way. Raises OSError where it failed: the commit before it holds then."""
        if self._commit is None:
            return
        self._commit.wait()  # one that failed stays, and says so each time: what is on disk is in doubt
        while self._committing:  # an interrupt at any point leaves the rest to the next call
            unit, file = next(iter(self._committing.items()))
            self._units.commit(unit, file)
            del self._committing[unit]
        for path in self._retired:
            path.unlink(missing_ok=True)
        self._retired.clear()
        self._commit = None
        self._units.provide_spares()

    def give_up_commit(self) -> None:
        """Once its units are forgotten: a commit that failed is no longer in the way."""
        if self._commit is not None and self._commit.is_done:
            self._commit, self._committing = None, {}

    def abandon_commit(self) -> None:
        """Wait for a commit that is under way, whatever comes of it."""
        if self._commit is not None and self._commit.is_this_thread:
            return  # garbage collection, on one of its own threads, closes the store: it would wait for itself
        with contextlib.suppress(Exception):
            self.finish_commit()

    def _bring_to_device(self, commit: Commit, manifest: Manifest, writes: Sequence[IoFuture]) -> None:
        """On a thread of its own. Nothing that it looks at is changed before finish_commit()."""
        for write in writes:
            write.wait()
        commit.each(file.bring_to_device for file in self._committing.values() if not file.synced)
        for index, folder in enumerate(self.folders):
            if self._units.names_changed:
                sync_folder(folder / "units")
            if index and self.committed is None:
                write_part(folder, index, len(self.folders))
        self._units.names_changed = False  # nobody makes files while a commit is under way
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
        self.abandon_commit()  # of the step before, which may be under way still
        load = "load the parameters and the state from a checkpoint: after load_state_dict() it works again"
        if self.committed is None:
            return load
        weights = "" if self.committed.weights else " (it holds no weights: load those of the same step, too)"
        return (
            f"call restore(), which goes back to the last commit, of epoch {self.committed.epoch}{weights}; or {load}"
        )

    def bring_to_device(self) -> None:
        """Bring the newest bytes of every unit, all of them written, to the device.

        Raises OSError where that failed: the bytes are lost then, and to ask again would seem to succeed.
        """
        for slots in self._units.slots.values():
            slots.current.bring_to_device()

    def snapshot(self, folder: Path, manifest: Manifest) -> None:
        """Fill ``folder`` with the newest bytes of every unit, all of them on the device, and a manifest.

        Raises:
            StoreError: There is no space for the files that take the place of those that the snapshot shares.
            OSError: Linking or copying failed.
        """
        try:
            self._units.provide_spares(for_snapshot=folder)
        except BaseException:
            self._units.provide_spares()  # without those that were made
            raise
        pairs = []
        for unit, slots in self._units.slots.items():
            target = folder / "units" / slots.current.path.name
            pairs.append(FilePair(slots.current.path, target, slots.data_start + unit.nbytes))
        linked = link_or_copy(pairs, "snapshot")
        for slots in self._units.slots.values():
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
            file = UnitFile(path, record.checksum, shared=True, synced=True)
            self._units.add(unit, Slots(record.folder, record.data_start, file, committed=file))
        self._retired = sorted(self.named_by_commit() - self._units.paths())
        self._delete_others()
        self._units.provide_spares()

    def bring(self, units: Mapping[SwapUnit, UnitRecord], source: Path) -> None:
        """Take up units from the snapshot folder ``source``: by links, or by copies from another file system."""
        try:
            link_or_copy(self._units.bring(units, source / "units"), "restore")
            self._units.provide_spares(for_snapshot=source)
        except BaseException:
            self.forget(list(units))
            raise

    def named_by_commit(self) -> set[Path]:
        """The unit files of the last commit, which stay as they are until the next one."""
        if self.committed is None:
            return set()
        layouts = [layout for layout in (self.committed.state, self.committed.weights) if layout]
        return {
            self.folders[unit.folder] / "units" / unit.file
            for layout in layouts
            for unit in layout.units
            if unit.folder < len(self.folders)
        }

    def uncommitted(self) -> list[Path]:
        """Unit files that were written after the last commit: what a crash left of the steps after it."""
        committed_at = (self.folders[0] / MANIFEST).stat().st_mtime_ns
        named = self.named_by_commit()
        return [
            file for file in self._units.paths_there() if file not in named and file.stat().st_mtime_ns > committed_at
        ]

    def close(self) -> None:
        """Let go of the locks. The files stay. In a forked child: of its copies; the locks are the parent's.

        A commit that nobody has waited for goes on, and has the locks until it has ended.
        """
        _open_stores.discard(self)
        if self._owner != os.getpid():  # a child has the locks' files, but not the threads
            self._release_locks()
            return
        if self._commit is None:
            self._release_locks()
        else:
            self._commit.cancel()
            self._commit.when_done(self._release_locks)

    # Helpers.

    def _delete_others(self) -> None:
        """Delete unit files of earlier runs, which neither this one nor the last commit has a use for."""
        for file in set(self._units.paths_there()) - self._units.paths() - set(self._retired) - self.named_by_commit():
            file.unlink()

    def _discard(self) -> None:
        (self.folders[0] / MANIFEST).unlink(missing_ok=True)
        sync_folder(self.folders[0])
        for folder in self.folders[1:]:
            (folder / PART).unlink(missing_ok=True)

    def _check_order(self, discard: bool) -> None:
        """Raise ConfigError where the folders are not those of the last commit, in its order."""
        for index, folder in enumerate(self.folders):
            if index and (folder / MANIFEST).exists():
                raise ConfigError(f"{folder} is the first folder of a store: give the paths in the order of its run")
            try:
                part = read_part(folder)
            except StoreError:
                if not discard:
                    raise
                part = None
            if part and part != (index, len(self.folders)):
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
