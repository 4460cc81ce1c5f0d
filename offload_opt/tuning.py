"""How fast folders are, and the I/O settings that suit them: what ``offload-opt tune`` finds, and keeps in a file.

Measured is what a step does: page-locked buffers go round, and each transfer is the whole of a file of a unit's size,
begun when the oldest one has ended. Reads and writes take turns, as most drives are slower at both than at either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import platform
import stat
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch

from .aio import AioHandle, IoFuture, engines
from .config import AioConfig, format_bytes
from .errors import ConfigError

Direction = Literal["read", "write", "mixed"]

TUNED_FILE = "offload-opt.json"
"""Name of the file with the settings, in the folder that they are for."""

_FORMAT = 1
_MAX_FILE_BYTES = 1 << 16
_IN_FLIGHT = 8
_MAX_TRANSFER = 16 << 20
"""Bytes: the largest block that is tried."""
_PAGE = 4096
_LEAST_MEASURED = _IN_FLIGHT * 128 << 10
_TUNED_ON = 1 << 30
"""Bytes of test files, where there is room: more than drives keep in memory of their own."""
_LEAST_TUNED_ON = 256 << 20
_ROUNDS = 3
_LONGEST_RUN = 1.0  # seconds
_GAIN_WORTH_A_CHANGE = 0.03

_BLOCKS = [256 << 10, 1 << 20, 4 << 20, 16 << 20]
_DEPTHS = [8, 16, 32, 64, 128]
_THREADS = [1, 2, 4]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The settings found for a folder, and its bandwidths with them in bytes/s."""

    aio: AioConfig
    read: float
    write: float
    mixed: float
    """Bytes read and bytes written together, at once and in equal parts."""
    date: str
    """When it was measured, in ISO 8601."""


def measure(
    folders: Sequence[str | os.PathLike[str]], aio: AioConfig, *, direction: Direction, nbytes: int, seconds: float
) -> list[float]:
    """Measure the bandwidth of folders that are used at once, through one handle.

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
    if nbytes < _LEAST_MEASURED:
        raise ConfigError(f"at least {format_bytes(_LEAST_MEASURED)} are needed to measure, not {format_bytes(nbytes)}")
    with contextlib.ExitStack() as stack:
        drives = [stack.enter_context(_TestFiles(Path(folder), nbytes, seconds)) for folder in folders]
        return _run(drives, aio, direction, seconds)


def tune(
    folder: str | os.PathLike[str], *, seconds: float = 40.0, progress: Callable[[float, str], None] | None = None
) -> Tuned:
    """Search the settings with which a folder reads and writes fastest at once.

    One setting is searched after the other: engine and block size, queue depth, threads. The candidates of a stage are
    measured in turns, so that what else the machine does hits all of them. A gain under 3 % is not worth a change.

    Args:
        folder: An existing folder with 256 MiB of free space or more; up to 1 GiB of temporary files are made in it.
        seconds: The time that it takes in all.
        progress: Called with the part that is done, 0 to 1, and what is being measured.

    Raises:
        ConfigError: No files can be made in the folder, or they do not fit. OSError: a transfer failed.
    """
    search = _Search(Path(folder), seconds, progress)
    try:
        return search.run()
    finally:
        search.close()


class _TestFiles:
    """Files in one folder, written once so that all of them lies on the drive, and the buffers that go with them.

    Writing stops after ``seconds``, with at least one file for each buffer.
    """

    def __init__(self, folder: Path, nbytes: int, seconds: float) -> None:
        self.paths: list[Path] = []
        self.buffers: list[torch.Tensor] = []
        self.folder = folder
        self._stack = contextlib.ExitStack()
        transfer = min(_MAX_TRANSFER, nbytes // _IN_FLIGHT // _PAGE * _PAGE)
        with self._stack as stack:  # closes all of it if the rest fails
            try:
                made = stack.enter_context(tempfile.TemporaryDirectory(prefix=".offload-opt-", dir=folder))
                handle = stack.enter_context(contextlib.closing(AioHandle()))
                self._allocate(handle, transfer)
                ends = time.perf_counter() + seconds
                while len(self.paths) < nbytes // transfer:
                    if len(self.paths) >= _IN_FLIGHT and time.perf_counter() > ends:
                        break
                    self._write_file(handle, Path(made) / f"{len(self.paths)}")
            except OSError as error:
                raise _no_files(folder, nbytes, error) from error
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Remove the files and free the buffers."""
        self._stack.close()

    def __enter__(self) -> _TestFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _allocate(self, handle: AioHandle, size: int) -> None:
        # Random: some drives and file systems compress. From a generator of its own: the user's is left alone.
        words = torch.empty(size // 8, dtype=torch.int64)
        pattern = words.random_(generator=torch.Generator().manual_seed(0)).view(torch.uint8)
        for _ in range(_IN_FLIGHT):
            buffer = handle.new_cpu_locked_tensor(size, pattern)
            self._stack.callback(handle.free_cpu_locked_tensor, buffer)
            self.buffers.append(buffer.copy_(pattern))

    def _write_file(self, handle: AioHandle, path: Path) -> None:
        data = self.buffers[len(self.paths) % _IN_FLIGHT]
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, data.nbytes)
        finally:
            os.close(fd)
        handle.sync_pwrite(data, path)
        self.paths.append(path)


class _Ring:
    """The transfers under way on one folder's files, oldest first: one for each buffer."""

    def __init__(self, handle: AioHandle, files: _TestFiles, direction: Direction) -> None:
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


def _run(drives: Sequence[_TestFiles], aio: AioConfig, direction: Direction, seconds: float) -> list[float]:
    """Bytes per second of each drive, all at once."""
    with contextlib.closing(AioHandle.from_config(aio, drives[0].folder if drives else None)) as handle:
        rings = [_Ring(handle, files, direction) for files in drives]
        ends = time.perf_counter() + seconds
        for ring in rings:
            ring.start_all()
        while any(ring.busy for ring in rings):
            going = time.perf_counter() < ends
            if sum(ring.turn(going) for ring in rings) == 0:
                time.sleep(0.0005)  # short beside a transfer, of which several are queued
        return [ring.rate for ring in rings]


class _Search:
    """One ``tune``: its files, its time, and the stages."""

    def __init__(self, folder: Path, seconds: float, progress: Callable[[float, str], None] | None) -> None:
        self._started = time.perf_counter()
        self._seconds = seconds
        self._progress = progress or (lambda part, text: None)
        self._engines = [name for name, works, _ in engines() if works]
        self._tell("writing the test files")
        self._files = _TestFiles(folder, _room(folder), 0.15 * seconds)

    def close(self) -> None:
        """Remove the files."""
        self._files.close()

    def run(self) -> Tuned:
        """All stages, and then the bandwidths of the winner."""
        best = AioConfig()
        grid = [dataclasses.replace(best, engine=e, block_size=b) for e in self._engine_names() for b in _BLOCKS]
        best = self._stage("engine and block size", [best, *grid], until=0.5)
        block = cast(int, best.block_size)
        finer = [dataclasses.replace(best, block_size=b) for b in (block // 2, block * 2) if 1 << 18 <= b <= 1 << 24]
        best = self._stage("block size", [best, *finer], until=0.6)
        best = self._stage("queue depth", [dataclasses.replace(best, queue_depth=d) for d in _DEPTHS], until=0.75)
        best = self._stage("threads", [dataclasses.replace(best, num_threads=n) for n in _THREADS], until=0.88)
        directions: list[Direction] = ["read", "write", "mixed"]
        found = self._measure([(best, direction) for direction in directions], "bandwidth", until=1.0)
        read, write, mixed = (statistics.median(found[best, direction]) for direction in directions)
        self._progress(1.0, "done")
        return Tuned(best, read, write, mixed, datetime.datetime.now().astimezone().isoformat(timespec="seconds"))

    def _engine_names(self) -> list[str]:
        """The first engine that works is what "auto" finds: it goes by that name, which works elsewhere too."""
        return ["auto", *self._engines[1:]]

    def _stage(self, text: str, candidates: Iterable[AioConfig], until: float) -> AioConfig:
        found = self._measure([(aio, "mixed") for aio in dict.fromkeys(candidates)], text, until)
        return simplest_of_the_best({aio: statistics.median(rates) for (aio, _), rates in found.items()})

    def _measure(
        self, what: Sequence[tuple[AioConfig, Direction]], text: str, until: float
    ) -> dict[tuple[AioConfig, Direction], list[float]]:
        """Bandwidths of each, measured in turns until that part of the time is used up; of the first, at least one."""
        found: dict[tuple[AioConfig, Direction], list[float]] = {}
        ends = self._started + until * self._seconds
        for turn in range(_ROUNDS):
            for number, (aio, direction) in enumerate(what):
                left = ends - time.perf_counter()
                if left <= 0 and found:
                    return found
                runs = (_ROUNDS - turn) * len(what) - number
                self._tell(text)
                rate = _run([self._files], aio, direction, min(max(left, 0) / runs, _LONGEST_RUN))[0]
                found.setdefault((aio, direction), []).append(rate)
        return found

    def _tell(self, text: str) -> None:
        self._progress(min((time.perf_counter() - self._started) / self._seconds, 1.0), text)


def simplest_of_the_best(rates: Mapping[AioConfig, float]) -> AioConfig:
    """The settings that are as fast as the fastest, but for 3 %, and of those the defaults or the simplest."""
    default = AioConfig()
    base = cast(int, default.block_size)

    def complexity(aio: AioConfig) -> tuple[object, ...]:
        return (
            aio != default,
            aio.num_threads,
            aio.queue_depth,
            aio.engine != default.engine,
            abs(math.log2(cast(int, aio.block_size) / base)),
            -rates[aio],
        )

    least = (1 - _GAIN_WORTH_A_CHANGE) * max(rates.values())
    return min((aio for aio, rate in rates.items() if rate >= least), key=complexity)


def save_tuned(folder: str | os.PathLike[str], tuned: Tuned) -> Path:
    """Keep ``tuned`` in the folder, where an OffloadOptimizer finds it. Returns the file. Raises OSError."""
    content = {
        "format": _FORMAT,
        "settings": dataclasses.asdict(tuned.aio),
        "bytes_per_second": {name: getattr(tuned, name) for name in ("read", "write", "mixed")},
        "kernel": platform.release(),
        "date": tuned.date,
    }
    path = Path(folder) / TUNED_FILE
    fd, name = tempfile.mkstemp(prefix=f".{TUNED_FILE}.", dir=folder)  # mode 0600
    temporary = Path(name)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)
    return path


def load_tuned(folder: str | os.PathLike[str]) -> Tuned | None:
    """What ``save_tuned`` kept in the folder, or None. Raises ConfigError where the file is not what it wrote."""
    path = Path(folder) / TUNED_FILE
    try:
        content = _read_small_file(path)
        return None if content is None else _parse(json.loads(content))
    except (OSError, ValueError, RecursionError) as error:  # ConfigError is a ValueError
        raise ConfigError(
            f"{path} cannot be used: {error}. Run `offload-opt tune` on the folder again, or delete the file"
        ) from error


def _read_small_file(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # does not wait on a pipe
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE_BYTES:
            raise ValueError("it is not a small file")
        return file.read(_MAX_FILE_BYTES)


def _parse(content: Any) -> Tuned:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it does not have format {_FORMAT}")
    rates = _entry(content, "bytes_per_second", dict)
    for name in ("read", "write", "mixed"):
        rate = rates.get(name)
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1e15:
            raise ValueError(f"bytes_per_second.{name} must be a positive number, not {rate!r:.40}")
    read, write, mixed = (float(rates[name]) for name in ("read", "write", "mixed"))
    return Tuned(_parse_settings(_entry(content, "settings", dict)), read, write, mixed, _entry(content, "date", str))


# What a file may ask for: above that, a process takes memory and threads for nothing.
_MOST = {"block_size": 1 << 30, "queue_depth": 1 << 12, "num_threads": 1 << 8}


def _parse_settings(settings: dict[str, Any]) -> AioConfig:
    defaults = dataclasses.asdict(AioConfig())
    for name, value in settings.items():
        if name not in defaults:
            raise ValueError(f"unknown setting {name!r:.40}")
        if type(value) is not type(defaults[name]):
            raise ValueError(f"{name} must be of type {type(defaults[name]).__name__}, not {value!r:.40}")
        if name in _MOST and value > _MOST[name]:
            raise ValueError(f"{name} must be at most {_MOST[name]}, not {value!r:.40}")
    return AioConfig(**settings)


def _entry(content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{name!r} is missing or malformed")
    return value


def _room(folder: Path) -> int:
    """Bytes of test files that the folder has room for. Raises ConfigError where they are too few."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        raise _no_files(folder, _LEAST_TUNED_ON, error) from error
    free = disk.f_bavail * disk.f_frsize
    if free < _LEAST_TUNED_ON * 9 // 8:
        raise ConfigError(
            f"path {str(folder)!r} has too little room to tune: {format_bytes(_LEAST_TUNED_ON * 9 // 8)} are needed, "
            f"and {format_bytes(free)} are free"
        )
    return min(_TUNED_ON, free * 8 // 9)


def _no_files(folder: Path, nbytes: int, error: OSError) -> Exception:
    """What to raise for an error in making test files."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(f"path {str(folder)!r} has no room for {format_bytes(nbytes)} of test files")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"no test files can be made in path {str(folder)!r}: {error.strerror}")
    return error
