"""What stays in memory between steps, and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload_opt import OffloadOptimizer
from tests.optim.support import Pair, Resumed, adam, assert_same_state

UNIT = 16 << 10
SHAPES = [(20_480,)]  # ten units
BUFFERS = 4


def paged(store: Path, **fields: Any) -> Pair:
    return Pair(adam, store, SHAPES, host_memory=BUFFERS * UNIT, unit_size=UNIT, **fields)


def moved_by_a_step(pair: Pair) -> tuple[int, int]:
    """Units read, and written."""
    before = pair.offloaded.stats
    pair.step()
    pair.offloaded.synchronize()
    after = pair.offloaded.stats
    return (after.bytes_read - before.bytes_read) // UNIT, (after.bytes_written - before.bytes_written) // UNIT


def test_a_state_that_fits_is_neither_read_nor_written(store: Path) -> None:
    pair = Pair(adam, store, SHAPES, host_memory="1MiB", unit_size=UNIT)
    for _ in range(3):
        assert moved_by_a_step(pair) == (0, 0)
    pair.offloaded.state[pair.parameters[0]]["exp_avg"]
    assert pair.offloaded.stats.bytes_read == 0
    pair.check()
    pair.offloaded.snapshot()
    assert pair.offloaded.stats.bytes_written == 10 * UNIT
    assert moved_by_a_step(pair) == (0, 0)
    pair.check()


def test_what_has_a_buffer_moves_no_bytes(store: Path) -> None:
    pair = paged(store)
    assert moved_by_a_step(pair) == (0, 10 - BUFFERS)  # the first step has nothing to read
    for _ in range(4):
        assert moved_by_a_step(pair) == (10 - BUFFERS, 10 - BUFFERS)
    assert pair.offloaded.stats.host_memory_bytes == BUFFERS * UNIT
    pair.check()
    for _ in range(2):
        pair.step()
    pair.check()


def test_commits_write_what_is_in_memory_and_leave_it_there(store: Path) -> None:
    pair = paged(store, durability="step")
    pair.step()
    for _ in range(3):
        assert moved_by_a_step(pair) == (10 - BUFFERS, 10)
    pair.offloaded.snapshot()  # nothing is newer than its file
    assert pair.offloaded.stats.bytes_written == 4 * 10 * UNIT
    pair.check()


@pytest.mark.parametrize("way", ["state_dict", "export", "restore", "reopen"])
def test_what_is_in_memory_only_is_not_missed(store: Path, tmp_path: Path, way: str) -> None:
    pair = Resumed(adam, store, SHAPES, host_memory=BUFFERS * UNIT, unit_size=UNIT, durability="snapshot")
    for _ in range(2):
        pair.step()
    if way == "state_dict":
        pair.offloaded.load_state_dict(pair.offloaded.state_dict())
    elif way == "export":
        pair.offloaded.export_safetensors(tmp_path / "file")
    else:
        pair.offloaded.snapshot()
        if way == "restore":
            pair.offloaded.step()
            pair.offloaded.restore()
        else:
            pair.reopen()
    pair.check()
    for _ in range(2):
        pair.step()
    pair.check()


def test_a_later_step_does_not_change_what_a_commit_is_writing(store: Path) -> None:
    # A unit that is kept is updated in the buffer that it is written from.
    pair = Resumed(adam, store, SHAPES, host_memory="1MiB", unit_size=UNIT, durability="step", checksum="read")
    for _ in range(20):
        pair.step()  # without waiting for the commit of the step before
    pair.reopen()
    pair.check()


def test_units_that_were_kept_for_another_order_are_written(store: Path) -> None:
    shapes = [(6_000,), (5_000,), (4_000,), (7_000,)]
    pair = Pair(adam, store, shapes, host_memory=BUFFERS * UNIT, unit_size=UNIT)
    for without in ((), (3,), (0,), (), (1, 2), (0, 1, 2, 3), (), (0, 1, 2)):
        pair.step(without)
    pair.check()


def test_larger_units_that_come_later_do_not_lose_what_is_kept(store: Path) -> None:
    pair = Pair(adam, store, [(900,), (60_000,)], host_memory="400KiB")
    pair.step(without=[1])
    pair.step()
    pair.step()
    pair.check()


def test_weights_that_are_written_push_out_what_is_kept(store: Path) -> None:
    pair = Resumed(adam, store, SHAPES, host_memory=3 * UNIT, unit_size=UNIT, durability="step")
    for _ in range(4):
        pair.step()
    pair.check()
    taken = pair.offloaded.state_dict()
    pair.reopen()
    assert isinstance(pair.offloaded, OffloadOptimizer)
    assert_same_state(taken, pair.offloaded.state_dict())
