"""How fast folders are, measured as a step uses them.

Page-locked buffers go round, and each transfer is the whole of a file of a unit's size, begun when the oldest one has
ended. Reads and writes take turns: most drives are slower at both together than at either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from .aio import AioHandle, IoFuture
from .config import AioConfig, format_bytes
from .errors import ConfigError
from .folders import check_folder

Direction = Literal["read", "write", "mixed"]

_MAX_TRANSFER = 16 << 20
"""Bytes."""
LEAST_MEASURED = 1 << 20
"""Bytes of test files in a folder."""
_IN_FLIGHT = 8
_PAGE = 4096


def measure(
    folders: Sequence[str | os.PathLike[str]], aio: AioConfig, *, direction: Direction, nbytes: int, seconds: float
) -> list[float]:
    """Measure the bandwidth of folders that are used at once, through one handle.

    Where a file system has no direct I/O, its page cache is measured along.

    Args:
        folders: Existing folders. Temporary files are made in them, and removed also where an error ends it.
        aio: The settings of the handle.
        direction: ``"mixed"`` reads and writes equal parts at once, and counts both.
        nbytes: Size of the files in each folder, at least 1 MiB; up to 128 MiB, buffers take as much memory.
        seconds: Time to measure for. The files are written before, in about as much time again.

    Returns:
        Bytes per second of each folder.

    Raises:
        ConfigError: No files can be made in a folder, or they do not fit. OSError: a transfer failed.
    """
    if direction not in get_args(Direction):
        raise ConfigError(f"direction must be one of {', '.join(get_args(Direction))}, not {direction!r}")
    if not folders:
        return []
    if nbytes < LEAST_MEASURED:
        raise ConfigError(f"at least {format_bytes(LEAST_MEASURED)} are needed to measure, not {format_bytes(nbytes)}")
    with contextlib.ExitStack() as stack:
        drives = [stack.enter_context(ScratchFiles(Path(folder), nbytes, seconds)) for folder in folders]
        return run(drives, aio, direction, seconds)


class ScratchFiles:
    """Files in one folder, written once so that all of them lies on the drive, and the buffers that go with them.

    Writing stops after ``seconds``, with at least one file for each buffer.
    """

    def __init__(self, folder: Path, nbytes: int, seconds: float) -> None:
        self.paths: list[Path] = []
        self.buffers: list[torch.Tensor] = []
        self.folder = folder
        self._stack = contextlib.ExitStack()
        check_folder(folder)
        transfer = min(_MAX_TRANSFER, nbytes // _IN_FLIGHT // _PAGE * _PAGE)
        with self._stack as stack:  # closes all of it if the rest fails
            try:
                made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".offload-opt-", dir=folder)))
                with contextlib.closing(AioHandle.from_config(AioConfig(), folder, quiet=True)) as handle:
                    self._allocate(handle, transfer)
                    self._write_files(handle, made, nbytes // transfer, seconds)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ConfigError(
                    f"path {str(folder)!r} is too small: there is no room for {format_bytes(nbytes)} of test files"
                ) from error
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Remove the files and free the buffers."""
        self._stack.close()
        self.buffers.clear()

    def __enter__(self) -> ScratchFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _allocate(self, handle: AioHandle, size: int) -> None:
        # Random: some drives and file systems compress. From a generator of its own: the user's is left alone.
        words = torch.empty(size // 8, dtype=torch.int64, device="cpu")
        pattern = words.random_(generator=torch.Generator().manual_seed(0)).view(torch.uint8)
        for _ in range(_IN_FLIGHT):
            buffer = handle.new_cpu_locked_tensor(size, pattern)
            self._stack.callback(handle.free_cpu_locked_tensor, buffer)
            self.buffers.append(buffer.copy_(pattern))

    def _write_files(self, handle: AioHandle, folder: Path, count: int, seconds: float) -> None:
        ends = time.perf_counter() + seconds
        for number in range(count):
            if number >= _IN_FLIGHT and time.perf_counter() > ends:
                return
            path = folder / str(number)
            data = self.buffers[number % _IN_FLIGHT]
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, data.nbytes)
            finally:
                os.close(fd)
            handle.sync_pwrite(data, path)
            self.paths.append(path)


class _Ring:
    """The transfers under way on one folder's files, oldest first: one for each buffer."""

    def __init__(self, handle: AioHandle, files: ScratchFiles, direction: Direction) -> None:
        self._handle = handle
        self._files = files
        self._direction = direction
        self._started = 0
        self._begin = self._end = time.perf_counter()
        self._moved = 0
        self._pending: deque[tuple[IoFuture, torch.Tensor]] = deque()

    def start_all(self) -> None:
        """Start a transfer with each buffer."""
        for buffer in self._files.buffers:
            self._start(buffer)

    def turn(self, going: bool) -> bool:
        """Take in the oldest transfer if it has ended, and start another one if ``going``. False: nothing had ended."""
        if not self._pending or not self._pending[0][0].done():
            return False
        future, buffer = self._pending.popleft()
        self._moved += future.wait()
        self._end = time.perf_counter()
        if going:
            self._start(buffer)
        return True

    @property
    def busy(self) -> bool:
        return bool(self._pending)

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self._moved / (self._end - self._begin)

    def _start(self, buffer: torch.Tensor) -> None:
        paths, number = self._files.paths, self._started
        self._started += 1
        write = self._direction == "write"
        if self._direction == "mixed":  # read here, write at the other end, as a step does
            number, write = number // 2 + number % 2 * (len(paths) // 2), number % 2 == 1
        path = paths[number % len(paths)]
        future = self._handle.async_pwrite(buffer, path) if write else self._handle.async_pread(buffer, path)
        self._pending.append((future, buffer))


def run(drives: Sequence[ScratchFiles], aio: AioConfig, direction: Direction, seconds: float) -> list[float]:
    """Bytes per second of each drive, all at once."""
    with contextlib.closing(AioHandle.from_config(aio, drives[0].folder, quiet=True)) as handle:
        rings = [_Ring(handle, files, direction) for files in drives]
        ends = time.perf_counter() + seconds
        for ring in rings:
            ring.start_all()
        while any(ring.busy for ring in rings):
            going = time.perf_counter() < ends
            if sum(ring.turn(going) for ring in rings) == 0:
                time.sleep(0.0005)  # short beside a transfer, of which several are queued
        return [ring.rate for ring in rings]
