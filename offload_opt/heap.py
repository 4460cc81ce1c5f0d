"""Memory that an optimizer takes for a unit's update and frees: used again by the next, or given back to the system."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .aio import settle_heap, trim_heap

_GROWTH = 8 << 20  # bytes


class Heap:
    """Keeps the temporary tensors of updates, of up to ``largest`` bytes, in the same few MiB of malloc's heap.

    By itself glibc's malloc does either of two things with them, by what the process happened to free before. It gives
    their pages back each time, and a step takes up to three times as long. Or it finds no hole of those before them
    large enough, for the bytes that it cut off for their alignment, and they wander over fresh memory, by 100 MiB and
    more. (Measured with glibc 2.36 and torch's AdamW that is not fused.) So it is settled before an update, and what
    grows all the same is trimmed. What the process frees and takes between updates is not looked at.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._grown = 0
        self._is_trimmed = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Settles the heap for what is done under it, counts what that makes it grow, and trims it. An error passes."""
        settle_heap(4 * self._largest)
        before = _anonymous_bytes()
        yield
        after = _anonymous_bytes()
        if self._is_trimmed:  # the temporaries take their pages again, which is no growth
            self._is_trimmed = False
            return
        self._grown = max(0, self._grown + after - before)
        if self._grown > _GROWTH:
            trim_heap()
            self._grown = 0
            self._is_trimmed = True


def _anonymous_bytes() -> int:
    """The process's resident memory that is of no file, in bytes; 0 where the system does not say."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fields = os.read(descriptor, 128).split()
    finally:
        os.close(descriptor)
    return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE
