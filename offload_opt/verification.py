"""Whether the files of a commit or a snapshot hold what was written: every byte of them is read. Takes no lock.

A run may commit meanwhile, and then writes to files of the commit before. So whenever something seems damaged the
manifest is read again: unless it is the same, the rank is started anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .aio import AioHandle, IoFuture
from .checksums import RunningChecksum
from .errors import StoreError
from .inspection import RankPlace, file_bytes, read_commit, units_of
from .manifest import Manifest, UnitRecord, decode_mapping, decode_value
from .unit_file import check_files, unit_header
from .units import SwapUnit

_CHUNK = 8 << 20
_DEPTH = 3  # chunks in memory: while one is looked at, the next two are read
_TRIES = 5

Progress = Callable[[int, int, str], None]
"""Told the bytes that are done, all bytes, and what is being read."""


@dataclasses.dataclass(frozen=True)
class DamagedTensor:
    """A state tensor in a damaged unit, and where its bytes lie in the unit's file."""

    name: str
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Damage:
    """A unit file that is not as it was written; ``tensors`` are those whose bytes may be wrong."""

    path: str
    problem: str
    tensors: Sequence[DamagedTensor]


@dataclasses.dataclass
class RankReport:
    """What was found of a rank. ``problem``: why it could not be verified at all."""

    folder: str
    epoch: int | None = None
    units: int = 0
    nbytes: int = 0
    unchecked_units: int = 0
    unchecked_bytes: int = 0
    damages: list[Damage] = dataclasses.field(default_factory=list)
    problem: str = ""

    @property
    def is_whole(self) -> bool:
        return not self.problem and not self.damages


class _Superseded(Exception):
    """The commit that is being verified is not the last one any more."""


@dataclasses.dataclass
class _Unit:
    """A unit under way."""

    unit: SwapUnit
    record: UnitRecord
    path: Path
    checksum: RunningChecksum
    problem: str = ""
    state_is_at_risk: bool = False
    failed: bool = False  # to be read

    def damaged(self, problem: str, *, state_is_at_risk: bool = True) -> None:
        """A later problem is the worse one."""
        self.problem = problem
        self.state_is_at_risk = state_is_at_risk

    def damage(self) -> Damage:
        tensors = [
            DamagedTensor(piece.tensor_label(tensor), self.record.data_start + tensor.offset, tensor.nbytes)
            for piece in self.unit.pieces
            for tensor in (stored for each in piece.tensors for stored in each.stored)
            if self.state_is_at_risk
        ]
        return Damage(str(self.path), self.problem, tensors)


def verify(places: Sequence[RankPlace], progress: Progress) -> list[RankReport]:
    """Verify the last commits, or snapshots, of the ranks. What is damaged is in the reports; nothing is raised."""
    sizes = [_size(place) for place in places]
    reports: list[RankReport] = []
    with AioHandle() as handle:
        for number, place in enumerate(places):
            done = sum(report.nbytes for report in reports)

            def told(nbytes: int, total: int, number: int = number, done: int = done) -> None:
                sizes[number] = total
                progress(done + nbytes, sum(sizes), places[number].folder.name)

            reports.append(_verify_rank(place, handle, told))
    return reports


def _size(place: RankPlace) -> int:
    try:
        return file_bytes(units_of(read_commit(place)))
    except (OSError, StoreError):
        return 0


def _verify_rank(place: RankPlace, handle: AioHandle, told: Callable[[int, int], None]) -> RankReport:
    for _ in range(_TRIES):
        try:
            manifest = read_commit(place)
            verifier = _Verifier(place, manifest, handle, told)
            verifier.run()
            return verifier.report
        except _Superseded:
            continue
        except (OSError, StoreError) as error:
            return RankReport(str(place.folder), problem=_in_words(error))
    return RankReport(
        str(place.folder),
        problem=f"{place.folder}: a run commits faster than its files can be read: verify a snapshot of it instead",
    )


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.filename else str(error)
    return str(error)


class _Verifier:
    """One pass over the files of one commit."""

    def __init__(
        self, place: RankPlace, manifest: Manifest, handle: AioHandle, told: Callable[[int, int], None]
    ) -> None:
        self._place = place
        self._manifest = manifest
        self._handle = handle
        self._told = told
        self._total = file_bytes(units_of(manifest))
        self._folders = place.folders(manifest.folders)
        self.report = RankReport(str(place.folder), manifest.epoch)

    def run(self) -> None:
        """Verify every unit. Raises StoreError for a damaged manifest, _Superseded when there is a newer one."""
        units = self._checked_units()
        self._told(0, self._total)
        buffers = itertools.cycle([torch.empty(_CHUNK, dtype=torch.uint8, device="cpu") for _ in range(_DEPTH)])
        flight: deque[tuple[_Unit, int, torch.Tensor, IoFuture | OSError]] = deque()
        try:
            for unit, begin, nbytes in self._chunks(units):
                if len(flight) == _DEPTH:
                    self._look_at(*flight.popleft())
                buffer = next(buffers)[:nbytes]
                flight.append((unit, begin, buffer, self._start(unit, begin, buffer)))
            while flight:
                self._look_at(*flight.popleft())
            self.report.damages = [unit.damage() for unit in units if unit.problem]
        finally:
            for *_, transfer in flight:
                _finish(transfer)

    def _checked_units(self) -> list[_Unit]:
        """The units of a manifest all of which can be read. Raises StoreError where it cannot."""
        where = self._place.manifest
        units = []
        for layout in (self._manifest.state, self._manifest.weights):
            if layout is None:
                continue
            for parameter in layout.parameters:
                decode_mapping(parameter.resident)
            for unit, record in zip(layout.swap_units(where), layout.units, strict=True):
                if not 0 <= record.folder < len(self._folders):
                    raise StoreError(f"{where} is damaged: it places {record.file} in folder {record.folder + 1}")
                path = self._folders[record.folder] / "units" / record.file
                units.append(_Unit(unit, record, path, RunningChecksum()))
        decode_value([self._manifest.groups, self._manifest.extra])
        return units

    def _chunks(self, units: Sequence[_Unit]) -> Iterator[tuple[_Unit, int, int]]:
        """(unit, where in its bytes, how many of them): what is to be read, one after another."""
        for unit in units:
            try:
                check_files([unit.record], self._folders)
                header = unit_header(unit.unit)
                if unit.record.data_start != len(header) or _read_start(unit.path, len(header)) != header:
                    rest = "" if unit.record.checksum is None else "; the state in it is"
                    unit.damaged(f"its header is not as it was written{rest}", state_is_at_risk=not rest)
            except (OSError, StoreError) as error:
                unit.damaged(_without_path(error, unit.path))
                self._conclude(unit)
                continue
            for begin in range(0, unit.record.nbytes, _CHUNK):
                yield unit, begin, min(_CHUNK, unit.record.nbytes - begin)

    def _start(self, unit: _Unit, begin: int, buffer: torch.Tensor) -> IoFuture | OSError:
        try:
            return self._handle.async_pread(buffer, unit.path, unit.record.data_start + begin)
        except OSError as error:
            return error

    def _look_at(self, unit: _Unit, begin: int, buffer: torch.Tensor, transfer: IoFuture | OSError) -> None:
        error = _finish(transfer)
        if error is None:
            unit.checksum.update(buffer)
        elif not unit.failed:
            unit.failed = True
            unit.damaged(_without_path(error, unit.path))
        self._told(self.report.nbytes + unit.record.data_start + begin + buffer.nbytes, self._total)
        if begin + buffer.nbytes == unit.record.nbytes:
            expected = unit.record.checksum
            if expected and not unit.failed and unit.checksum.text() != expected:
                unit.damaged("its bytes are not those that were written (checksum)")
            self._conclude(unit)

    def _conclude(self, unit: _Unit) -> None:
        nbytes = file_bytes([unit.record])
        self.report.units += 1
        self.report.nbytes += nbytes
        if unit.problem:
            self._check_still_last()
        elif unit.record.checksum is None:
            self.report.unchecked_units += 1
            self.report.unchecked_bytes += nbytes
        self._told(self.report.nbytes, self._total)

    def _check_still_last(self) -> None:
        if read_commit(self._place) != self._manifest:
            raise _Superseded


def _finish(transfer: IoFuture | OSError) -> OSError | None:
    if isinstance(transfer, OSError):
        return transfer
    try:
        transfer.wait()
        return None
    except OSError as error:
        return error


def _read_start(path: Path, nbytes: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        return file.read(nbytes)


def _without_path(error: Exception, path: Path) -> str:
    """The message of an error, without the path at its start, which is said beside it."""
    text = str(error.strerror) if isinstance(error, OSError) else str(error)
    return text.removeprefix(str(path)).lstrip(", ")
