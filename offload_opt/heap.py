"""Memory that an optimizer took for a unit's update and freed: given back to the system before it adds up."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .aio import trim_heap

_GROWTH = 8 << 20  # bytes; less costs more page faults


class HeapTrim:
    """Trims malloc's heap when the updates under ``watched`` have made the process grow by 8 MiB.

    An optimizer's temporary tensors of some MiB each do not reuse the holes that those before them left: glibc looks
    for one that has room for the alignment too, and keeps the bytes that it cuts off for it, so that no hole is as
    large again. The temporaries of a step wander over fresh memory, by 100 MiB and more (measured with glibc 2.36 and
    torch's AdamW that is not fused). What the process frees and takes between updates is not looked at: trimming that
    would cost the model its page faults again in each step.
    """

    def __init__(self) -> None:
        self._grown = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Counts what is done under it, and trims after it. An error passes as it is."""
        before = _anonymous_bytes()
        yield
        self._grown = max(0, self._grown + _anonymous_bytes() - before)
        if self._grown > _GROWTH:
            trim_heap()
            self._grown = 0


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
