"""The cost model: what paging a given state costs in bytes, seconds, memory and a drive's rated writes. Pure.

    seconds of a step = longer + 0.15 x shorter, of its bytes / the drive's bandwidth and the time of the update

In a perfect overlap it would be the longer of the two. But drive and cores share the memory, so that each is slower
while the other is busy, and the first and the last unit of a step overlap with nothing.

With n units, of which d stay in memory, a step reads and writes n - d (see swap_manager.py for the order that makes it
so). A commit in each step writes the d, too, and the weights where it holds them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from .units import SwapUnit

_DAY = 86400
"""Seconds."""
_DISTURBANCE = 0.15
"""What the shorter of drive and update adds to the longer, as a share of itself: found by benchmarks/plan.py, on a
virtual machine of 2 cores. Where a GPU updates, or memory is faster, it is less."""
_WRITE_BUFFERS = 4
"""That weights are written by, which the ring has to spare: as in swap_manager.py."""


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """Of a drive, in bytes a second. ``mixed`` counts reads and writes that are made at once, in equal parts."""

    mixed: float
    read: float
    write: float

    def seconds(self, read: float, written: float) -> float:
        """The time that it takes to read and write so many bytes: at once, and then what one has more than the other.

        It is what ``mixed`` says, but where most of a step is writes: with every step committed, and much memory.
        """
        both = min(read, written)
        return 2 * both / self.mixed + (read - both) / self.read + (written - both) / self.write


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a layout moves in a step and takes, once every buffer and file has been made. Sizes are in bytes."""

    units: int
    unit_size: int
    """Of the largest unit: what each buffer takes."""
    kept: int
    """Units that are in memory from one step to the next."""
    state: int
    """Of all units with state, padding included."""
    read: float
    """In a step; the mean of one up and one down, which differ where units do."""
    written: float
    host_memory: int
    """What the buffers take of it."""
    disk_space: int
    snapshot_space: int
    """That each snapshot comes to keep as the steps after it write into other files."""


def footprint(
    state: Sequence[SwapUnit],
    weights: Sequence[SwapUnit],
    *,
    host_memory: int,
    max_buffers: int,
    durability: str,
    file_size: Callable[[SwapUnit], int],
) -> Footprint:
    """What it takes to page ``state``.

    Args:
        state: Units of optimizer state, in order.
        weights: Units of the weights that commits hold; empty where they hold none.
        host_memory: Bytes that buffers may take.
        max_buffers: The most buffers that there are, whatever the memory.
        durability: As in OffloadConfig.
        file_size: Bytes of a unit's file.
    """
    commits = durability == "step"
    size = max((unit.nbytes for unit in [*state, *weights]), default=0)
    buffers = min(host_memory // size, max_buffers) if size else 0
    sizes = [unit.nbytes for unit in state]
    held = kept = min(len(sizes), buffers)
    if weights:
        # They go through a few buffers: free ones or, where there are too few of these, some that the ring gives up.
        given_up = max(min(_WRITE_BUFFERS, buffers) - (buffers - kept), 0)
        if commits:
            kept -= given_up
        held = min(held + max(min(_WRITE_BUFFERS, len(weights)) - given_up, 0), buffers)
    total = sum(sizes)
    read = _mean(sum(sizes[kept:]), sum(sizes[: len(sizes) - kept]))
    in_buffers = min(len(sizes), buffers)
    written = _mean(sum(sizes[in_buffers:]), sum(sizes[: len(sizes) - in_buffers]))
    if commits:
        written = total + sum(unit.nbytes for unit in weights)
    files = sum(map(file_size, [*state, *weights]))
    return Footprint(
        units=len(sizes),
        unit_size=size,
        kept=kept,
        state=total,
        read=read,
        written=written,
        host_memory=held * size,
        disk_space=files * (1 if durability == "scratch" else 2),
        snapshot_space=files,
    )


def _mean(up: int, down: int) -> float:
    return (up + down) / 2


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one way to store the state costs. ``disk_seconds`` and ``update_seconds`` are of a step, each by itself."""

    footprint: Footprint
    disk_seconds: float
    update_seconds: float
    iteration: float | None = None
    """Seconds from one step to the next; None: one step after the other."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        shorter, longer = sorted((self.disk_seconds, self.update_seconds))
        return longer + _DISTURBANCE * shorter

    @property
    def limit(self) -> Literal["disk", "update"]:
        """What the seconds are decided by."""
        return "disk" if self.disk_seconds > self.update_seconds else "update"

    @property
    def written_a_day(self) -> float:
        """Bytes. An iteration takes no less time than its step."""
        pace = max(self.seconds, self.iteration or 0)
        return self.footprint.written * _DAY / pace if pace else 0.0

    def days(self, endurance: float) -> float:
        """Until ``endurance`` bytes are written; infinity where steps write nothing."""
        return endurance / self.written_a_day if self.written_a_day else math.inf


def predict(
    footprint: Footprint,
    *,
    parameters: int,
    bandwidth: Bandwidth,
    update_rate: float,
    checksum_rate: float = math.inf,
    iteration: float | None = None,
) -> Prediction:
    """The time of a step.

    Args:
        footprint: What is moved.
        parameters: How many are updated.
        bandwidth: Of the drive.
        update_rate: Parameters a second with nothing to read or write.
        checksum_rate: Bytes a second that the updating thread makes checksums of, of what is written.
        iteration: Seconds from one step to the next; None: one step after the other.
    """
    update = parameters / update_rate + footprint.written / checksum_rate
    return Prediction(footprint, bandwidth.seconds(footprint.read, footprint.written), update, iteration)


def balancing_memory(prediction: Prediction, host_memory: int, *, commits: bool) -> int | None:
    """The host_memory in bytes, roughly, with which the disk would take no longer than the update.

    None: no memory does it, as each step writes everything.
    """
    now, excess = prediction.footprint, prediction.disk_seconds - prediction.update_seconds
    if excess <= 0:
        return host_memory
    if commits or not now.read:
        return None
    # Each byte that stays is neither read nor written.
    stays = now.read * excess / prediction.disk_seconds
    return host_memory + math.ceil(stays / now.unit_size) * now.unit_size
