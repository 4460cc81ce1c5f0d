"""SwapManager: pages units through a ring of buffers around their update. The one place where overlap lives.

Each buffer of the ring holds the unit that it will be visited with next, from the moment the buffer was free: when a
unit's write is started, the read of the unit that follows the last one in the ring is queued behind that write, into
the same buffer. The native handle runs the chain, with no thread of Python's.

              visit
    ring:   [ unit 4 | unit 5 | unit 6 ] <- read of unit 7, queued behind the write of unit 3 in the same buffer

The order alternates: one walk visits the units upwards, the next one downwards. The last units of a walk, as many as
there are buffers, are not written but kept, and are the first of the next walk. So of n units and d buffers a walk
reads and writes n - d, and none where all fit. (In one direction only, d reads and d writes would be hidden behind the
forward and backward in between, which leaves as many for the step itself, and moves more bytes: 2 n a step.)
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from .aio import AioHandle, IoFuture
from .buffers import BufferPool, PinnedBuffer
from .checksums import Checksum
from .errors import StepFailedError
from .folders import free_bytes
from .state_file import WholeTensor, export, map_state
from .store import SwapStore
from .trace import SwapStats
from .units import StateTensor, SwapUnit, UnitState

_WRITE_BUFFERS = 4
"""Of write_out: one is filled while the others are being written."""

Visit = Callable[[SwapUnit, torch.Tensor, Checksum | None], None]
"""Called with a resident unit and the 1-D uint8 tensor that holds its bytes, which it may change. If they are to be
written after it, their checksum comes along, to be added to."""


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

    def walk(self, units: Iterable[SwapUnit], visit: Visit) -> None:
        """Bring each unit into memory and ``visit`` it, by their numbers up or down; write back those that do not fit.

        Returns when all have been visited; transfers go on. Raises what a transfer or ``visit`` raised.
        """
        self.check()
        order = sorted(units, key=lambda unit: unit.index)
        if not order:
            return
        if self._ring and self._ring_matches(order[::-1]):
            order.reverse()
        with self.failing():
            self._walk(order, visit)

    def flush(self) -> None:
        """Start to write what is in memory only. It stays there, too."""
        self.check()
        for unit, buffer in self._ring:
            if unit.is_dirty:
                self._write(unit, buffer)

    def read_tensor(self, unit: SwapUnit, tensor: StateTensor, into: torch.Tensor) -> None:
        """Read one state tensor of a unit as it is after the last walk into the contiguous CPU tensor ``into``."""
        self.check()
        for kept, buffer in self._ring:
            if kept is unit and unit.state is UnitState.RESIDENT:
                into.copy_(buffer.data[tensor.offset : tensor.offset + tensor.nbytes].view(tensor.dtype).view_as(into))
                return
        self.synchronize()
        self._store.check_stored([unit])
        self._store.read_into(unit, tensor, into)
        self._stats.bytes_read += tensor.nbytes

    def write_out(self, units: Sequence[SwapUnit], fill: Visit) -> None:
        """Write units whose bytes ``fill`` makes anew, by a few buffers that the ring is to spare meanwhile.

        Returns when all are filled; transfers go on. Raises what a transfer or ``fill`` raised.
        """
        self.check()
        with self.failing():
            while units and self._ring and self._pool.available < min(_WRITE_BUFFERS, self._pool.capacity):
                self._evict_last()
            self._reserve(min(_WRITE_BUFFERS, len(units)))
            for unit in units:
                taken = self._pool.take()
                assert taken is not None
                self._finish_ended_writes()
                if unit in self._writes:  # of a write_out before: two writes to one file would race
                    self._finish_write(unit)
                unit.move_to(UnitState.READING)
                self._arrive(unit, taken)
                checksum = self._store.new_checksum(unit, taken.data)
                fill(unit, taken.data, checksum)
                unit.move_to(UnitState.WRITING)
                self._write(unit, taken, checksum)
                self._pool.give_back(taken)

    def writes(self) -> list[IoFuture]:
        """The writes that may still be under way."""
        return list(self._writes.values())

    def map_state(self, tensors: Sequence[WholeTensor]) -> list[torch.Tensor]:
        """Copies of state as it is after the last walk, mapped from a file in the store; see ``state_file``."""
        self.flush()
        self.synchronize()
        self._store.check_stored(unit for tensor in tensors for unit, _ in tensor.pieces)
        return map_state(tensors, self._store.place, max(self._store.folders, key=free_bytes))

    def export(
        self, path: Path, tensors: Sequence[WholeTensor], small: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Write state as it is after the last walk to one safetensors file; see ``state_file``."""
        self.flush()
        self.synchronize()
        self._store.check_stored(unit for tensor in tensors for unit, _ in tensor.pieces)
        export(path, tensors, self._store.place, small, metadata)

    def synchronize(self) -> None:
        """Wait for every write and commit that was started. Raises the first error of a transfer."""
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

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """What is begun here is done whole, or the state is incomplete: whatever is raised, an interrupt too."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def forget(self, units: Sequence[SwapUnit]) -> None:
        """Drop some units, none of which is in the ring, and their files."""
        self.synchronize()
        self._store.forget(units)
        gone = set(units)
        self.units = [unit for unit in self.units if unit not in gone]
        self._stats.state_bytes -= sum(unit.nbytes for unit in units)

    def forget_all(self) -> None:
        """Drop every unit and its file, failed or not: a fresh start. What the last commit names stays.

        Of ``failing`` callers: until it has returned there is no state.
        """
        self._abandon()
        self._store.forget_all()
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
            while self._ring:
                self._evict_last()
            self.synchronize()
            self._handle.wait()
            self._pool.fit(largest)
            self._stats.host_memory_bytes = self._pool.nbytes

    def _take_on(self, units: Sequence[SwapUnit]) -> None:
        self.units.extend(units)
        self._stats.state_bytes += sum(unit.nbytes for unit in units)

    # A walk.

    def _ring_matches(self, order: Sequence[SwapUnit]) -> bool:
        return [unit for unit, _ in self._ring] == list(order[: len(self._ring)])

    def _walk(self, order: Sequence[SwapUnit], visit: Visit) -> None:
        if not self._ring_matches(order):  # kept for another order: rare, when other parameters get gradients
            while self._ring:
                self._evict_last()
        self._read_ahead(order[len(self._ring) :])
        depth = len(self._ring)
        next_in_buffer: list[SwapUnit | None] = [*order[depth:], *[None] * depth]
        for unit, following in zip(order, next_in_buffer, strict=True):
            _, buffer = self._ring.popleft()
            if self._arrive(unit, buffer):
                self._store.check_read(unit, buffer.data)
            checksum = None if following is None else self._store.new_checksum(unit, buffer.data)
            started = time.perf_counter()
            visit(unit, buffer.data, checksum)
            self._stats.update_seconds += time.perf_counter() - started
            unit.is_dirty, unit.is_blank = True, False
            if following is None:  # it stays
                self._ring.append((unit, buffer))
            else:
                unit.move_to(UnitState.WRITING)
                self._write(unit, buffer, checksum)
                self._start_read(following, buffer)
            self._finish_ended_writes()
        self._ring.reverse()

    def _reserve(self, buffers: int) -> None:
        self._pool.reserve(buffers)
        self._stats.host_memory_bytes = self._pool.nbytes

    def _read_ahead(self, upcoming: Sequence[SwapUnit]) -> None:
        """Fill free buffers with the units that come next."""
        self._reserve(len(upcoming))
        for unit in upcoming:
            buffer = self._pool.take()
            if buffer is None:
                return
            self._start_read(unit, buffer)

    def _start_read(self, unit: SwapUnit, buffer: PinnedBuffer) -> None:
        # Behind the write of what the buffer held, and behind the unit's own last write: both may be under way.
        after = [future for future in (buffer.last_use, self._writes.get(unit)) if future is not None]
        unit.move_to(UnitState.READING)
        if not unit.is_blank:  # a blank unit has no bytes yet
            buffer.last_use = self._store.read(unit, buffer.data, after)
            self._stats.bytes_read += unit.nbytes
        self._ring.append((unit, buffer))

    def _arrive(self, unit: SwapUnit, buffer: PinnedBuffer) -> bool:
        """Wait until the unit is RESIDENT, and its buffer free of transfers. Returns whether it has been read."""
        try:
            if buffer.last_use is not None:
                self._wait(buffer.last_use)
        except OSError:
            self._finish_ended_writes()  # a read that was called off names the error of the write before it: raise that
            raise
        buffer.last_use = None
        self._writes.pop(unit, None)  # ended: the read came behind it, or it is what the buffer was used for
        if unit.state is UnitState.RESIDENT:
            return False
        unit.move_to(UnitState.RESIDENT)
        return not unit.is_blank

    def _write(self, unit: SwapUnit, buffer: PinnedBuffer, checksum: Checksum | None = None) -> None:
        with self.failing():
            buffer.last_use = self._writes[unit] = self._store.write(unit, buffer.data, checksum)
        unit.is_dirty, unit.is_blank = False, False
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

    def _evict_last(self) -> None:
        """Give back the buffer of the unit that will be visited last. A transfer from or to it may still be running."""
        unit, buffer = self._ring[-1]
        if unit.is_dirty:
            unit.move_to(UnitState.WRITING)
            self._write(unit, buffer)
        else:
            unit.move_to(UnitState.ON_DISK)
        self._ring.pop()
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
        self._pool.take_back()
        for unit in self.units:
            unit.state, unit.is_dirty = UnitState.ON_DISK, False

    def _release(self) -> None:
        self._pool.release()
        self._stats.host_memory_bytes = 0
