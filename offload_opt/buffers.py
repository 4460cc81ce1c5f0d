"""Page-locked host buffers for units, within one bound."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .aio import AioHandle, IoFuture

MAX_BUFFERS = 256
"""Each transfer under way holds a file open, and an ordinary process may open 1024. More would gain nothing."""


@dataclasses.dataclass(eq=False)
class PinnedBuffer:
    """``data`` is 1-D uint8, page-aligned and page-locked. ``last_use`` is the latest transfer from or to it."""

    data: torch.Tensor
    last_use: IoFuture | None = None


class BufferPool:
    """Buffers of one size, made when they are first needed and at most ``limit`` bytes of them.

    The pool owns the memory; whoever takes a buffer gives it back, and may do so while a transfer still uses it: the
    next one to take it starts its own transfers after ``last_use``.
    """

    def __init__(self, handle: AioHandle, limit: int) -> None:
        self._handle = handle
        self._limit = limit
        self._buffers: list[PinnedBuffer] = []
        self._free: list[PinnedBuffer] = []
        self.buffer_size = 0

    @property
    def capacity(self) -> int:
        """How many buffers there can be."""
        return min(self._limit // self.buffer_size, MAX_BUFFERS) if self.buffer_size else 0

    @property
    def free(self) -> int:
        """How many buffers can be taken now."""
        return len(self._free) + self.capacity - len(self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken now."""
        return len(self._buffers) * self.buffer_size

    def fit(self, nbytes: int) -> None:
        """Make buffers large enough for ``nbytes``. All buffers must have been given back, and be out of use."""
        if nbytes > self.buffer_size:
            self.release()
            self.buffer_size = nbytes

    def take(self) -> PinnedBuffer | None:
        """A buffer, or None when all are out."""
        if self._free:
            return self._free.pop(0)
        if len(self._buffers) >= self.capacity:
            return None
        data = self._handle.new_cpu_locked_tensor(self.buffer_size, torch.empty(0, dtype=torch.uint8))
        self._handle.exclude_from_fork(data)
        buffer = PinnedBuffer(data)
        self._buffers.append(buffer)
        return buffer

    def give_back(self, buffer: PinnedBuffer) -> None:
        """Return a buffer, which a transfer may still be using."""
        self._free.append(buffer)

    def release(self) -> None:
        """Free all memory. No transfer may be using it."""
        for buffer in self._buffers:
            self._handle.free_cpu_locked_tensor(buffer.data)
        self._buffers.clear()
        self._free.clear()
