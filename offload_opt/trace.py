"""Counters of what paging did."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class SwapStats:
    """Totals since the optimizer was wrapped; bytes and seconds."""

    steps: int = 0
    step_seconds: float = 0.0
    """Time inside ``step()``, its closure not counted."""
    io_wait_seconds: float = 0.0
    """The part of ``step_seconds`` in which the update waited for a transfer."""
    update_seconds: float = 0.0
    """The part of ``step_seconds`` in which the inner optimizer ran."""
    bytes_read: int = 0
    bytes_written: int = 0
    state_bytes: int = 0
    """State on disk now, padding included."""
    host_memory_bytes: int = 0
    """What the page-locked buffers take now, less the filling of their memory up to huge pages, under 2 MiB a time."""

    def copy(self) -> SwapStats:
        """The values as they are now."""
        return dataclasses.replace(self)
