"""The folders of a store: checks before anything is made in them, and the lock that says whose they are."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from .config import format_bytes
from .errors import ConfigError, StoreError

UNIT_FILES = "unit-*.safetensors"
LOCK = "LOCK"
"""A file that a store has, and a snapshot has not."""


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


def check_folders(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The folders without links. Raises ConfigError for one that no files can be made in, or that is there twice."""
    folders: list[Path] = []
    for path in paths:
        folder = check_folder(path).resolve()
        if folder in folders:
            raise ConfigError(f"path {str(path)!r} is given twice: it is the folder {str(folder)!r}")
        folders.append(folder)
    return folders


def rank_folder(path: str | os.PathLike[str], rank: int, world_size: int) -> Path:
    """Where a rank keeps its store."""
    return Path(path) / f"rank-{rank:05d}-of-{world_size:05d}"


def check_space(folders: Sequence[Path], nbytes: int, stay: Collection[Path] = ()) -> None:
    """Raise ConfigError where ``nbytes`` of state do not fit into the store ``folders``, which need not exist yet.

    Units that an earlier run left there count as free space, since they are replaced: but for the files in ``stay``,
    and for those that a snapshot has, too.
    """
    free_on: dict[int, int] = {}  # folders on one device share its space
    for folder in folders:
        free_on.setdefault(folder.parent.stat().st_dev, free_bytes(folder.parent))
    replaced, kept = 0, 0
    for file in (file for folder in folders for file in (folder / "units").glob(UNIT_FILES)):
        info = file.stat()
        if file in stay:
            kept += info.st_blocks * 512
        elif info.st_nlink == 1:
            replaced += info.st_blocks * 512
    free = sum(free_on.values()) + replaced
    if nbytes > free:
        paths = [str(folder.parent) for folder in folders]
        shown = paths if len(paths) > 1 else repr(paths[0])
        committed = f"; the last commit keeps {format_bytes(kept)} until the next one" if kept else ""
        raise ConfigError(
            f"path {shown} is too small for the optimizer state: it needs {format_bytes(nbytes)}, and "
            f"{format_bytes(free)} are free{committed}{_other_state(folders)}"
        )


def _other_state(folders: Sequence[Path]) -> str:
    """What takes space beside the store's folders: state of runs with another number of ranks, of other ranks too."""
    sizes = {}
    for folder in folders:
        for other in sorted(folder.parent.glob("rank-*-of-*")):
            size = sum(file.stat().st_blocks * 512 for file in (other / "units").glob(UNIT_FILES))
            if size and other != folder:
                sizes[other] = size
    if not sizes:
        return ""
    listed = ", ".join(f"{format_bytes(size)} in {other}" for other, size in sizes.items())
    return f"; other ranks or earlier runs have {listed}, which can be deleted if no run uses it"


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the device."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` at the end: whole or not at all, and on the device by then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask says
            yield file
            file.flush()
            os.fsync(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Delete what a process that was killed in ``replacing`` has left."""
    for file in folder.glob(".*.new"):
        file.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder that is there, with the parents that are missing, also after the power went.

    Where there is one already it may have been made by a process that died before its name was on the device. Not so a
    folder in one that we may not read.
    """
    if not folder.parent.exists():
        make_folder(folder.parent)
    is_new = not folder.exists()
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        sync_folder(folder.parent)
    except PermissionError:
        if is_new:
            raise


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to files in ``folder``."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def check_room(folder: Path, nbytes: int, what: str) -> None:
    """Raise StoreError unless ``folder`` has room for ``nbytes`` of ``what``."""
    free = free_bytes(folder)
    if nbytes > free:
        raise StoreError(
            f"no space for {what}: it needs {format_bytes(nbytes)}, and {format_bytes(free)} are free in {folder}"
        )


def lock(path: Path) -> tuple[int, str]:
    """Lock the store and write our pid into it. Returns the descriptor, and the identity of the store.

    The descriptor holds the lock, which goes with the process. The identity is made up once, and stays in the file.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner, _ = _read_lock(fd)
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        whose = "this process" if owner == str(os.getpid()) else f"process {owner or 'unknown'}"
        raise StoreError(
            f"the store {path.parent} is in use by {whose}: give each optimizer its own folder, or close() the other"
        ) from None
    _, known = _read_lock(fd)
    identity = known if re.fullmatch("[0-9a-f]{32}", known) else uuid.uuid4().hex
    content = f"{os.getpid()}\n{identity}\n".encode()
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, len(content))
    if identity != known:
        os.fsync(fd)
    return fd, identity


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[None]:
    """Keep everybody from using the store in ``folder`` meanwhile, if it is one. Raises StoreError if somebody does."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(
                f"{folder} is not a snapshot but a store, which process {_read_lock(fd)[0]} uses and changes: let that "
                "make a snapshot()"
            ) from None
        yield
    finally:
        os.close(fd)


def _read_lock(fd: int) -> tuple[str, str]:
    """Pid and identity, as they stand in the file."""
    owner, _, rest = os.pread(fd, 128, 0).decode(errors="replace").partition("\n")
    return owner.strip(), rest.strip()


def unlock(locks: Sequence[int], owner: int) -> None:
    """Let go of the locks, if this process took them. A forked child only closes its copies of the files."""
    for fd in locks:
        if os.getpid() == owner:
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
