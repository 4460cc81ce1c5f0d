"""SwapManager: pages units through a ring of buffers around their update. The one place where overlap lives.

Units are visited in order, step after step, so the order is a cycle. Each buffer of the ring holds the unit that it
will be visited with next, from the moment the buffer was free: when a unit's write is started, the read of the unit
that follows the last one in the ring is queued behind that write, into the same buffer. The native handle runs the
chain, so reads go on through the end of a step, and through the forward and backward that follow, with no thread of
Python's.

              visit
    ring:   [ unit 4 | unit 5 | unit 6 ] <- read of unit 7, queued behind the write of unit 3 in the same buffer
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .aio import AioHandle, IoFuture
from .buffers import BufferPool, PinnedBuffer
from .errors import StepFailedError
from .folders import free_bytes
from .state_file import WholeTensor, export, map_state
from .store import SwapStore
from .trace import SwapStats
from .units import StateTensor, SwapUnit, UnitState

_WRITE_BUFFERS = 4
"""Of write_out: one is filled while the others are being written."""

Visit = Callable[[SwapUnit, torch.Tensor], None]
"""Called with a resident unit and the 1-D uint8 tensor that holds its bytes, which it may change."""


class Failure:
    """The first error that left the state on disk incomplete.

    Not a part of the manager, which lives until it is closed: an error's traceback holds what was on the way, the
    optimizer too, which would then never be collected.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None


class SwapManager:
    """Owns the ring, the pool and the transfers under way; borrows the handle, the store and the failure.

    After any error of a walk the state on disk is incomplete, and everything but ``forget_all`` and ``close`` raises
    StepFailedError, with the first error as its cause.
    """

    def __init__(
        self, handle: AioHandle, store: SwapStore, host_memory: int, stats: SwapStats, failure: Failure
    ) -> None:
        self._handle = handle
        self._store = store
        self._stats = stats
        self._pool = BufferPool(handle, host_memory)
        self._ring: deque[tuple[SwapUnit, PinnedBuffer]] = deque()
        self._writes: dict[SwapUnit, IoFuture] = {}  # oldest first
        self._failure_of = weakref.ref(failure)
        self.units: list[SwapUnit] = []

    @property
    def _failure(self) -> BaseException | None:
        failure = self._failure_of()
        return None if failure is None else failure.error

    @_failure.setter
    def _failure(self, error: BaseException | None) -> None:
        failure = self._failure_of()
        if failure is not None:  # else nobody is left who could ask
            failure.error = error

    @property
    def next_index(self) -> int:
        """An index that no unit has had."""
        return max((unit.index for unit in self.units), default=-1) + 1

    @property
    def has_failed(self) -> bool:
        """Whether an error left the state on disk incomplete."""
        return self._failure is not None

    def add(self, units: Sequence[SwapUnit]) -> None:
        """Take on new, blank units: make their files and, where they are larger than those before, larger buffers."""
        self._fit(units)
        self._store.create(units)
        self._take_on(units)

    def adopt(self, units: Sequence[SwapUnit]) -> None:
        """Take on units whose bytes the store has already."""
        self._fit(units)
        self._take_on(units)

    def walk(self, order: Sequence[SwapUnit], visit: Visit, *, cyclic: bool = True) -> None:
        """Bring each unit of ``order`` into memory, ``visit`` it, and write it back.

        With ``cyclic``, the first units of ``order`` are read again for the next walk when the last ones are written.
        Returns when all have been visited; transfers go on. Raises what a transfer or ``visit`` raised.
        """
        self.check()
        try:
            self._walk(order, visit, cyclic)
        except BaseException as error:
            self.fail(error)
            raise

    def read_tensor(self, unit: SwapUnit, tensor: StateTensor, into: torch.Tensor) -> None:
        """Read one state tensor of a unit as it is after the last walk into the contiguous CPU tensor ``into``."""
        self.synchronize()
        self._store.check_stored([unit])
        self._store.read_into(unit, tensor, into)
        self._stats.bytes_read += tensor.nbytes

    def write_out(self, units: Sequence[SwapUnit], fill: Visit) -> None:
        """Write units whose bytes ``fill`` makes anew, by a few buffers that are read ahead into less meanwhile.

        Returns when all are filled; transfers go on. Raises what a transfer or ``fill`` raised.
        """
        self.check()
        while self._pool.free < min(_WRITE_BUFFERS, self._pool.capacity) and self._ring:
            read_ahead, buffer = self._ring.pop()
            read_ahead.move_to(UnitState.ON_DISK)
            self._pool.give_back(buffer)
        try:
            for unit in units:
                taken = self._pool.take()
                assert taken is not None
                self._stats.host_memory_bytes = self._pool.nbytes
                self._finish_ended_writes()
                if unit in self._writes:  # of a write_out before: two writes to one file would race
                    self._finish_write(unit)
                unit.move_to(UnitState.READING)
                self._arrive(unit, taken)
                fill(unit, taken.data)
                self._start_write(unit, taken)
                self._pool.give_back(taken)
        except BaseException as error:
            self.fail(error)
            raise

    def writes(self) -> list[IoFuture]:
        """The writes that may still be under way."""
        return list(self._writes.values())

    def map_state(self, tensors: Sequence[WholeTensor]) -> list[torch.Tensor]:
        """Copies of state as it is after the last walk, mapped from a file in the store; see ``state_file``."""
        self.synchronize()
        self._store.check_stored(unit for tensor in tensors for unit, _ in tensor.pieces)
        return map_state(tensors, self._store.place, max(self._store.folders, key=free_bytes))

    def export(
        self, path: Path, tensors: Sequence[WholeTensor], small: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Write state as it is after the last walk to one safetensors file; see ``state_file``."""
        self.synchronize()
        self._store.check_stored(unit for tensor in tensors for unit, _ in tensor.pieces)
        export(path, tensors, self._store.place, small, metadata)

    def synchronize(self) -> None:
        """Wait until every unit that was visited is on disk. Raises the first error of a transfer."""
        self.check()
        try:
            while self._writes:
                self._finish_write(next(iter(self._writes)))
            self._store.finish_commit()
        except OSError as error:  # an interrupted wait harms nothing
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Note that the state on disk is incomplete because of ``error``. The first error stays."""
        self._failure = self._failure or error

    def forget(self, units: Sequence[SwapUnit]) -> None:
        """Drop some units, none of which is read ahead, and their files."""
        self.synchronize()
        self._store.forget(units)
        gone = set(units)
        self.units = [unit for unit in self.units if unit not in gone]
        self._stats.state_bytes -= sum(unit.nbytes for unit in units)

    def forget_all(self) -> None:
        """Drop every unit and its file, failed or not: a fresh start. What the last commit names stays."""
        self._abandon()
        self._store.forget(self.units)
        self._store.give_up_commit()
        self.units.clear()
        self._stats.state_bytes = 0
        self._failure = None

    def close(self) -> None:
        """Wait for the transfers under way and free the memory. Never raises for a failed transfer."""
        try:
            self._abandon()
        finally:
            self._release()

    def check(self) -> None:
        """Raise StepFailedError if an earlier transfer or update failed."""
        if self._failure is not None:
            raise StepFailedError(
                f"an earlier error left the optimizer state on disk incomplete ({self._failure!r}). The parameters may "
                f"have been updated in part. To go on, {self._store.ways_on()}"
            ) from self._failure

    def _fit(self, units: Sequence[SwapUnit]) -> None:
        """Make the buffers large enough for new units."""
        self.check()
        largest = max((unit.nbytes for unit in units), default=0)
        if largest > self._pool.buffer_size:
            self.synchronize()
            self._empty_ring()
            self._handle.wait()
            self._pool.fit(largest)
            self._stats.host_memory_bytes = self._pool.nbytes

    def _take_on(self, units: Sequence[SwapUnit]) -> None:
        self.units.extend(units)
        self._stats.state_bytes += sum(unit.nbytes for unit in units)

    # A walk.

    def _walk(self, order: Sequence[SwapUnit], visit: Visit, cyclic: bool) -> None:
        if [unit for unit, _ in self._ring] != list(order[: len(self._ring)]):
            self._empty_ring()  # read ahead for another order: rare, when other parameters get gradients
        upcoming = iter(order[len(self._ring) :])
        self._read_ahead(upcoming)
        depth = len(self._ring)
        for position, unit in enumerate(order):
            _, buffer = self._ring.popleft()
            self._arrive(unit, buffer)
            if not unit.is_blank:
                self._store.check_read(unit, buffer.data)
            started = time.perf_counter()
            visit(unit, buffer.data)
            self._stats.update_seconds += time.perf_counter() - started
            self._start_write(unit, buffer)
            following = order[(position + depth) % len(order)]
            if cyclic or position + depth < len(order):
                # A unit that follows itself, because every unit has a buffer, is where it should be.
                self._start_read(following, buffer, is_there=following is unit)
            else:
                self._pool.give_back(buffer)
            self._finish_ended_writes()

    def _read_ahead(self, upcoming: Iterable[SwapUnit]) -> None:
        """Fill free buffers with the units that come next."""
        for unit in upcoming:
            buffer = self._pool.take()
            if buffer is None:
                return
            self._stats.host_memory_bytes = self._pool.nbytes
            self._start_read(unit, buffer)

    def _start_read(self, unit: SwapUnit, buffer: PinnedBuffer, *, is_there: bool = False) -> None:
        # Behind the write of what the buffer held, and behind the unit's own last write: both may be under way.
        after = [future for future in (buffer.last_use, self._writes.get(unit)) if future is not None]
        unit.move_to(UnitState.READING)
        if not (is_there or unit.is_blank):  # a blank unit has no bytes yet
            buffer.last_use = self._store.read(unit, buffer.data, after)
            self._stats.bytes_read += unit.nbytes
        self._ring.append((unit, buffer))

    def _arrive(self, unit: SwapUnit, buffer: PinnedBuffer) -> None:
        """READING to RESIDENT: wait until the buffer is the unit's alone, with the unit's bytes in it."""
        try:
            if buffer.last_use is not None:
                self._wait(buffer.last_use)
        except OSError:
            self._finish_ended_writes()  # a read that was called off names the error of the write before it: raise that
            raise
        buffer.last_use = None
        self._writes.pop(unit, None)  # ended: the read came behind it
        unit.move_to(UnitState.RESIDENT)

    def _start_write(self, unit: SwapUnit, buffer: PinnedBuffer) -> None:
        unit.move_to(UnitState.WRITING)
        unit.is_blank = False
        buffer.last_use = self._writes[unit] = self._store.write(unit, buffer.data)
        self._stats.bytes_written += unit.nbytes

    def _finish_write(self, unit: SwapUnit) -> None:
        self._wait(self._writes[unit])
        del self._writes[unit]
        if unit.state is UnitState.WRITING:  # else it is being read again
            unit.move_to(UnitState.ON_DISK)

    def _finish_ended_writes(self) -> None:
        for unit in [unit for unit, future in self._writes.items() if future.done()]:
            self._finish_write(unit)

    def _wait(self, future: IoFuture) -> None:
        if future.done():
            future.wait()
            return
        started = time.perf_counter()
        try:
            future.wait()
        finally:
            self._stats.io_wait_seconds += time.perf_counter() - started

    def _empty_ring(self) -> None:
        """Give back the buffers of units that were read ahead. Their reads may still be running."""
        while self._ring:
            unit, buffer = self._ring.popleft()
            unit.move_to(UnitState.ON_DISK)
            self._pool.give_back(buffer)

    def _abandon(self) -> None:
        """Wait for all transfers, whatever comes of them, and take every buffer back."""
        while True:
            try:
                self._handle.wait()
                break
            except OSError:
                continue  # already told, or about a state that is given up
        self._store.abandon_commit()
        self._ring.clear()
        self._writes.clear()
        self._release()
        for unit in self.units:
            unit.state = UnitState.ON_DISK

    def _release(self) -> None:
        self._pool.release()
        self._stats.host_memory_bytes = 0
