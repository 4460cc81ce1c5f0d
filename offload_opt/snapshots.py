"""Snapshots: folders that hold a committed epoch by themselves, made by hard links where the file system allows it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .config import format_bytes
from .errors import StoreError
from .folders import LOCK, check_room, make_folder, rank_folder, sync_folder
from .manifest import MANIFEST, Manifest, read_manifest

_log = logging.getLogger(__name__)

# What link() says where it cannot: another file system, one without hard links, too many links.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_COPY_BYTES = 8 << 20


class FilePair(NamedTuple):
    """A file, where it is to be too, and its size in bytes."""

    source: Path
    target: Path
    nbytes: int


def link_or_copy(pairs: Sequence[FilePair], what: str) -> set[Path]:
    """Make each target a link to its source or, where that cannot be, a copy on the device, with a progress bar.

    Returns the sources that were linked. Raises StoreError when there is no space for the copies; OSError when one
    fails. Targets that were made are left then.
    """
    linked, to_copy = set(), []
    for pair in pairs:
        try:
            pair.target.hardlink_to(pair.source)
            linked.add(pair.source)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            to_copy.append(pair)
    if to_copy:
        _copy_all(to_copy, what)
    return linked


def _copy_all(pairs: Sequence[FilePair], what: str) -> None:
    nbytes = sum(pair.nbytes for pair in pairs)
    folders = {pair.target.parent: pair.target.parent.stat().st_dev for pair in pairs}
    for folder, device in folders.items():
        on_device = sum(pair.nbytes for pair in pairs if folders[pair.target.parent] == device)
        check_room(folder, on_device, f"the {what}")
    _log.info(
        "%s: copying %s to %s, which is on another file system than the store", what, format_bytes(nbytes), folder
    )
    # Not at the top: importing the package would take a tenth of a second more.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{what}: copying", total=nbytes)
        for pair in pairs:
            with pair.source.open("rb") as source, _create(pair.target) as target:
                while data := source.read(_COPY_BYTES):
                    target.write(data)
                    progress.advance(task, len(data))
                target.flush()
                os.fsync(target.fileno())


def _create(path: Path):  # type: ignore[no-untyped-def]
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


class Snapshot:
    """One rank's part of a snapshot on its way: made beside its place, and put there whole by one rename."""

    def __init__(self, directory: Path, rank: int, world_size: int) -> None:
        self.place = rank_folder(directory, rank, world_size)
        self.folder = directory / f".{self.place.name}.partial"
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]  # innermost first

    def check(self) -> None:
        """Raise StoreError where there is such a snapshot already."""
        if (self.place / LOCK).exists():
            raise StoreError(f"{self.place.parent} is a store, with the state of a run: name another folder")
        if self.place.exists():
            raise StoreError(
                f"there is a snapshot in {self.place.parent} already, and snapshots never change: name another folder"
            )

    def remove_remains(self) -> None:
        """Delete what a process that was killed has left of this snapshot, as it made it or as it deleted it."""
        _finish_deleting(self.place)
        if self.folder.exists():
            self._remove_partial()
            _remove_if_empty(self.place.parent)

    def __enter__(self) -> Path:
        """The folder to fill. Raises StoreError where there is such a snapshot already, or another process makes it."""
        self.check()
        make_folder(self.place.parent)
        if self.folder.exists():  # left by a process that was killed
            self._remove_partial()
        self.folder.mkdir(mode=0o700)
        self._lock = self._take_lock()
        (self.folder / "units").mkdir(mode=0o700)
        return self.folder

    def _take_lock(self) -> int:
        """Lock the folder that is being filled, for as long as the descriptor is open."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            problem = f"another process is making a snapshot in {self.place.parent}: name another folder"
            raise StoreError(problem) from None
        return fd

    def _remove_partial(self) -> None:
        lock = self._take_lock()
        try:
            shutil.rmtree(self.folder)
        finally:
            os.close(lock)

    def __exit__(self, failed: type[BaseException] | None, *rest: object) -> None:
        try:
            self._end(failed is None)
        finally:
            os.close(self._lock)

    def _end(self, is_whole: bool) -> None:
        if not is_whole:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another rank may be in it
                for path in self._made:
                    path.rmdir()
            return
        sync_folder(self.folder)
        self.folder.rename(self.place)
        sync_folder(self.place.parent)


def delete_older(directory: Path, manifest: Manifest, keep: int) -> list[Path]:
    """Delete this rank's part of this run's older snapshots beside ``directory``, all but the ``keep`` newest.

    Returns the snapshots that were deleted. Folders that are not snapshots of this run are left alone.
    """
    found = []
    for other in directory.parent.iterdir():
        if other.is_symlink():  # "latest", for example: another name of a snapshot, not one more
            continue
        folder = rank_folder(other, manifest.rank, manifest.world_size)
        if (folder / LOCK).exists():  # a store, ours even, or the copy of one
            continue
        _finish_deleting(folder)
        try:
            known = read_manifest(folder / MANIFEST)
        except (OSError, StoreError):
            continue
        if known.run == manifest.run:
            # By the time: after a restore(), epochs are counted once more.
            found.append(((other == directory, known.created, known.epoch), other))
    deleted = []
    found.sort()
    if found[:-keep]:
        for _, kept in found[-keep:]:  # a process that died may have put one there and not brought it to the device
            sync_folder(kept)
    for _, old in found[:-keep]:
        folder = rank_folder(old, manifest.rank, manifest.world_size)
        folder.rename(_being_deleted(folder))  # first: it is no snapshot any more, wherever this is cut off
        sync_folder(old)
        _finish_deleting(folder)
        deleted.append(old)
    return deleted


def _being_deleted(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.deleted")


def _finish_deleting(folder: Path) -> None:
    """Delete what was a snapshot in ``folder``, also one whose deletion was cut off."""
    remains = _being_deleted(folder)
    if not remains.exists():
        return
    shutil.rmtree(remains)
    _remove_if_empty(folder.parent)  # when the last rank has left


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
