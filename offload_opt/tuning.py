"""The I/O settings that suit a folder: what ``offload-opt tune`` finds, and keeps in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import platform
import stat
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from .aio import AioHandle, engines
from .bandwidth import LEAST_MEASURED, Direction, ScratchFiles, run
from .config import AioConfig, format_bytes
from .errors import ConfigError
from .folders import check_folder, free_bytes, replacing

logger = logging.getLogger("offload_opt")

TUNED_FILE = "offload-opt.json"
"""Name of the file with the settings, in the folder that they are for."""

_FORMAT = 1
_MAX_FILE_BYTES = 1 << 16
_TUNED_ON = 1 << 30
"""Bytes of test files, where there is room: more than drives keep in memory of their own."""
_LEAST_TUNED_ON = 256 << 20
_WEIGHED_ON = 64 << 20
_ROUNDS = 3
_LONGEST_RUN = 1.0  # seconds
_GAIN_WORTH_A_CHANGE = 0.03

_DIRECTIONS: tuple[Direction, ...] = ("read", "write", "mixed")
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


def tune(
    folder: str | os.PathLike[str], *, seconds: float = 40.0, progress: Callable[[float, str], None] | None = None
) -> tuple[Tuned, Tuned]:
    """Search the settings with which a folder reads and writes fastest at once.

    One setting is searched after the other: engine and block size, queue depth, threads. The candidates of a stage are
    measured in turns, so that what else the machine does hits all of them, and the winner once more against the
    defaults. A gain under 3 % is not worth a change.

    Args:
        folder: An existing folder with 256 MiB of free space or more; up to 1 GiB of temporary files are made in it.
        seconds: The time that it takes in all.
        progress: Called with the part that is done, 0 to 1, and what is being measured.

    Returns:
        What was found, and the defaults as measured in turns with it; the same twice where the defaults stay.

    Raises:
        ConfigError: No files can be made in the folder, or they do not fit. OSError: a transfer failed.
    """
    if not seconds > 0:
        raise ConfigError(f"seconds must be positive, not {seconds}")
    search = _Search(Path(folder), seconds, progress)
    try:
        return search.run()
    finally:
        search.close()


class _Search:
    """One ``tune``: its files, its time, and the stages."""

    def __init__(self, folder: Path, seconds: float, progress: Callable[[float, str], None] | None) -> None:
        self._started = time.perf_counter()
        self._seconds = seconds
        self._progress = progress or (lambda part, text: None)
        self._tell("writing the test files")
        self._files = ScratchFiles(folder, _room(folder), 0.15 * seconds)

    def close(self) -> None:
        """Remove the files."""
        self._files.close()

    def run(self) -> tuple[Tuned, Tuned]:
        """All stages; then the winner and the defaults, in all directions."""
        default = best = AioConfig()
        grid = [dataclasses.replace(best, engine=e, block_size=b) for e in _engine_names() for b in _BLOCKS]
        best = self._stage("engine and block size", [best, *grid], until=0.45)
        block = cast(int, best.block_size)
        near = [size for size in (block // 2, block * 2) if _BLOCKS[0] <= size <= _BLOCKS[-1]]
        finer = [best, *(dataclasses.replace(best, block_size=size) for size in near)]
        best = self._stage("block size", finer, until=0.53)
        depths = [best, *(dataclasses.replace(best, queue_depth=depth) for depth in _DEPTHS)]
        best = self._stage("queue depth", depths, until=0.65)
        threads = [best, *(dataclasses.replace(best, num_threads=count) for count in _THREADS)]
        best = self._stage("threads", threads, until=0.75)
        # Of many candidates on a busy machine, the winner may owe it to chance.
        last = [(aio, direction) for direction in _DIRECTIONS for aio in dict.fromkeys([default, best])]
        found = self._measure(last, "the find beside the defaults", until=1.0, least=len(last))
        mixed = {aio: statistics.median(rates) for (aio, direction), rates in found.items() if direction == "mixed"}
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._progress(1.0, "done")
        results = []
        for aio in (simplest_of_the_best(mixed), default):
            read, write, both = (statistics.median(found[aio, direction]) for direction in _DIRECTIONS)
            if aio != default and aio.engine == "auto" and "OFFLOAD_OPT_ENGINE" in os.environ:
                # Found for that engine alone, so not for what "auto" takes in another environment.
                aio = dataclasses.replace(aio, engine=os.environ["OFFLOAD_OPT_ENGINE"])
            results.append(Tuned(aio, read, write, both, now))
        return results[0], results[1]

    def _stage(self, text: str, candidates: Iterable[AioConfig], until: float) -> AioConfig:
        found = self._measure([(aio, "mixed") for aio in dict.fromkeys(candidates)], text, until)
        return simplest_of_the_best({aio: statistics.median(rates) for (aio, _), rates in found.items()})

    def _measure(
        self, what: Sequence[tuple[AioConfig, Direction]], text: str, until: float, least: int = 1
    ) -> dict[tuple[AioConfig, Direction], list[float]]:
        """Bandwidths of each, measured in turns until that part of the time is used up.

        Of the ``least`` first ones there is at least one; settings that do not work are left out.
        """
        found: dict[tuple[AioConfig, Direction], list[float]] = {}
        ends = self._started + until * self._seconds
        for turn in range(_ROUNDS):
            for number, (aio, direction) in enumerate(what):
                left = ends - time.perf_counter()
                if left <= 0 and len(found) >= least:
                    return found
                runs = (_ROUNDS - turn) * len(what) - number
                self._tell(text)
                try:
                    rate = run([self._files], aio, direction, min(max(left, 0) / runs, _LONGEST_RUN))[0]
                except ConfigError as error:  # a queue deeper than this machine allows, for example
                    if number == 0:  # the settings that are the best so far
                        raise
                    logger.info("left out: %s", error)
                    continue
                found.setdefault((aio, direction), []).append(rate)
        return found

    def _tell(self, text: str) -> None:
        self._progress(min((time.perf_counter() - self._started) / self._seconds, 1.0), text)


def _engine_names() -> list[str]:
    """Engines to try. The first one that works is what "auto" finds: it goes by that name, which works anywhere."""
    if "OFFLOAD_OPT_ENGINE" in os.environ:
        return ["auto"]
    return ["auto", *_working_engines()[1:]]


def _working_engines() -> list[str]:
    return [name for name, works, _ in engines() if works]


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
    with replacing(path, mode=0o644) as file:  # others may use the folder, too
        file.write(json.dumps(content, indent=2).encode() + b"\n")
    return path


def load_tuned(folder: str | os.PathLike[str]) -> Tuned | None:
    """What ``save_tuned`` kept in the folder; None, with a warning in the log, where we may not read it.

    Raises:
        ConfigError: The file is not what ``save_tuned`` wrote.
    """
    path = Path(folder) / TUNED_FILE
    try:
        content = _read_small_file(path)
        return None if content is None else _parse(json.loads(content))
    except PermissionError as error:
        logger.warning("the settings in %s are not used: %s", path, error)
        return None
    except (OSError, ValueError, RecursionError) as error:  # ConfigError is a ValueError
        raise ConfigError(
            f"{path} cannot be used: {error}. Run `offload-opt tune` on the folder again, or delete the file"
        ) from error


def settings_for(folder: str | os.PathLike[str]) -> AioConfig:
    """The settings to use for a folder: those found for it, or else the defaults. Raises as ``load_tuned`` does.

    An engine that does not work here any more gives way to ``"auto"``, and any to the environment's OFFLOAD_OPT_ENGINE;
    settings that pass a limit of this machine give way to the defaults.
    """
    tuned = load_tuned(folder)
    if tuned is None:
        return AioConfig()
    aio = tuned.aio
    if "OFFLOAD_OPT_ENGINE" in os.environ or aio.engine not in _working_engines():
        aio = dataclasses.replace(aio, engine="auto")
    path = Path(folder) / TUNED_FILE
    try:
        AioHandle.from_config(aio, folder, quiet=True).close()
    except (ConfigError, OSError) as error:
        logger.warning("the settings in %s do not work any more, so the defaults are used: %s", path, error)
        return AioConfig()
    shown = f"blocks of {format_bytes(cast(int, aio.block_size))}, queue depth {aio.queue_depth}"
    logger.info("%s of %s: %s, %d threads, engine %s", path, tuned.date, shown, aio.num_threads, aio.engine)
    return aio


def bandwidths_of(folders: Sequence[Path], aio: AioConfig, memory: int) -> list[float]:
    """Bandwidths of folders that are used at once, by which to spread units over them; all 1 where they are alike.

    They are those that `offload-opt tune` found, where it found them for all; else they are measured, in about half a
    second for each folder. Folders on one device share what it has.

    Args:
        folders: Existing folders.
        aio: The settings to measure with.
        memory: Bytes of buffers that the measuring may take.

    Raises:
        ConfigError: A file of `offload-opt tune` is malformed. OSError: a transfer failed.
    """
    devices = [folder.stat().st_dev for folder in folders]
    sharing = Counter(devices)
    tuned = [load_tuned(folder) for folder in folders] if len(folders) > 1 else []
    if tuned and all(tuned):
        return [found.mixed / sharing[device] for found, device in zip(tuned, devices, strict=True) if found]
    if len(sharing) == 1:
        return [1.0] * len(folders)
    nbytes = max(min(memory // len(folders), _WEIGHED_ON), LEAST_MEASURED)
    rates: dict[Path, float] = {}
    with contextlib.ExitStack() as stack:
        files = {}
        for folder in folders:
            try:
                files[folder] = stack.enter_context(ScratchFiles(folder, nbytes, 0.25))
            except ConfigError as error:  # full, or over a quota
                logger.warning("not measured, and taken to be as fast as the slowest of the others: %s", error)
        if files:
            rates = dict(zip(files, run(list(files.values()), aio, "mixed", 0.25), strict=True))
    slowest = min(rates.values(), default=1.0)
    total: dict[int, float] = defaultdict(float)
    for folder, device in zip(folders, devices, strict=True):
        total[device] += rates.get(folder, slowest)
    bandwidths = [total[device] / sharing[device] for device in devices]
    shown = ", ".join(f"{folder} {rate / 1e9:.2f} GB/s" for folder, rate in zip(folders, bandwidths, strict=True))
    logger.info("measured to spread the state: %s; `offload-opt tune` on each folder saves the time", shown)
    return bandwidths


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
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 1 <= rate < 1e15:
            raise ValueError(f"bytes_per_second.{name} must be a number from 1 to 1e15, not {rate!r:.40}")
    read, write, mixed = (float(rates[name]) for name in ("read", "write", "mixed"))
    date = datetime.datetime.fromisoformat(_entry(content, "date", str)).isoformat()
    return Tuned(_parse_settings(_entry(content, "settings", dict)), read, write, mixed, date)


def _parse_settings(settings: dict[str, Any]) -> AioConfig:
    defaults = dataclasses.asdict(AioConfig())
    for name, value in settings.items():
        if name not in defaults:
            raise ValueError(f"unknown setting {name!r:.40}")
        if type(value) is not type(defaults[name]):
            raise ValueError(f"{name} must be of type {type(defaults[name]).__name__}, not {value!r:.40}")
    return AioConfig(**settings)


def _entry(content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{name!r} is missing or malformed")
    return value


def _room(folder: Path) -> int:
    """Bytes of test files that the folder has room for. Raises ConfigError where they are too few."""
    free = free_bytes(check_folder(folder))
    if free < _LEAST_TUNED_ON * 9 // 8:
        raise ConfigError(
            f"path {str(folder)!r} is too small to tune: {format_bytes(_LEAST_TUNED_ON * 9 // 8)} are needed, "
            f"and {format_bytes(free)} are free"
        )
    return min(_TUNED_ON, free * 8 // 9)
