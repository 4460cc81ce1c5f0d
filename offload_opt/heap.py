"""Memory that an optimizer takes for a unit's update and frees: used again by the next, or given back to the system."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .aio import settle_heap, trim_heap

_GROWTH = 8 << 20  # bytes; less costs more page faults


class Heap:
    """Keeps the temporary tensors of updates, usually of up to ``largest`` bytes, in the same few MiB of malloc's heap.

    By itself glibc's malloc does either of two things with them, by what the process happened to free before. It gives
    their pages back each time, and a step takes up to three times as long. Or it finds no hole of those before them
    large enough, for the bytes that it cut off for their alignment, and they wander over fresh memory, by 100 MiB and
    more. (Measured with glibc 2.36 and torch's AdamW that is not fused.) So it is settled before an update that has
    temporaries, and what grows all the same is trimmed: all that the process has freed, so this is to be rare.

    Settling costs memory, too: a model's own blocks of some MiB are then no longer mapped, and break up the heap; a
    model of 100 M bf16 parameters took up to 170 MiB more. So it is not done where there are no temporaries.
    """

    def __init__(self, largest: int) -> None:
        self._kept = 4 * largest  # of what is free twice that: a few temporaries, with holes between them
        self._enough = max(_GROWTH, 4 * largest)
        self._trimmed = -2 * largest  # what the temporaries take when they take their pages again is no growth
        self._grown = self._trimmed
        self._after = 0

    @contextmanager
    def watched(self, *, has_temporaries: bool) -> Iterator[None]:
        """Settles the heap for temporaries; adds up by how much the process grew, and trims where that is too much.

        What was freed since the time before is taken off. After an exception nothing is counted.
        """
        if has_temporaries:
            settle_heap(self._kept)
        before = _anonymous_bytes()
        yield
        after = _anonymous_bytes()
        freed = max(0, self._after - before)
        self._grown = max(self._trimmed, self._grown - freed + after - before)
        self._after = after
        if self._grown > self._enough:
            trim_heap()
            self._grown = self._trimmed
            self._after = _anonymous_bytes()  # what the trim freed is not to be taken off once more


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
