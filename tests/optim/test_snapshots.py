"""Snapshots: what they cost, that they never change, and what is left of one that fails."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offload_opt import ConfigError, OffloadOptimizer, StoreError
from tests.optim.support import HOST_MEMORY, SHAPES, Pair, adam, assert_same_state, bits_equal

RANK = "rank-00000-of-00001"
DURABILITIES = ["snapshot", "step", "scratch"]


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    folder = Path("/dev/shm") / f"offload_opt-test-{os.getpid()}"
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def units(folder: Path) -> list[Path]:
    return sorted((folder / RANK / "units").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def names_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def restored(pair: Pair, directory: Path | None, store: Path, **fields: Any) -> OffloadOptimizer:
    """A new optimizer on new parameters in ``store``, brought to what is in ``directory``."""
    parameters = [torch.nn.Parameter(torch.zeros_like(p)) for p in pair.parameters]
    store.mkdir(exist_ok=True)
    optimizer = OffloadOptimizer(adam(parameters), store, host_memory=HOST_MEMORY, persist_params=True, **fields)
    optimizer.restore(directory)
    return optimizer


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_snapshot_is_links_that_no_later_step_writes_to(store: Path, tmp_path: Path, durability: str) -> None:
    pair = Pair(adam, store, SHAPES, durability=durability, persist_params=True)
    pair.step()
    pair.offloaded.snapshot(tmp_path / "snap")
    live = {file.stat().st_ino for file in units(store)}
    assert units(tmp_path / "snap")
    assert {file.stat().st_ino for file in units(tmp_path / "snap")} <= live
    before = contents(tmp_path / "snap")
    then = pair.plain.state_dict()
    expected = {i: {name: value.clone() for name, value in state.items()} for i, state in then["state"].items()}
    weights = [p.detach().clone() for p in pair.parameters]
    for number in range(4):
        pair.step()
        if number == 1:
            pair.offloaded.snapshot(tmp_path / "later")
    pair.offloaded.synchronize()
    assert contents(tmp_path / "snap") == before
    pair.check()
    assert pair.offloaded.epoch == 5

    # It stands by itself: without the store, and in another one.
    pair.offloaded.close()
    shutil.rmtree(store)
    optimizer = restored(pair, tmp_path / "snap", tmp_path / "other", durability=durability)
    assert optimizer.epoch == 1
    assert_same_state({**then, "state": expected}, optimizer.state_dict())
    for weight, parameter in zip(weights, optimizer.param_groups[0]["params"], strict=True):
        assert bits_equal(weight, parameter)
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        optimizer.step()
    optimizer.synchronize()
    assert contents(tmp_path / "snap") == before


def test_what_is_no_place_for_a_snapshot_or_none_is_named(store: Path, tmp_path: Path) -> None:
    pair = Pair(adam, store, SHAPES)
    pair.step()
    with pytest.raises(StoreError, match=f"{store} is a store, with the state of a run: name another folder"):
        pair.offloaded.snapshot(store)
    with pytest.raises(StoreError, match=r"the snapshot .*nowhere does not exist"):
        pair.offloaded.restore(tmp_path / "nowhere")
    pair.step()
    pair.check()


def test_any_tool_reads_a_snapshot(pair: Pair, tmp_path: Path) -> None:
    pair.step()
    pair.offloaded.snapshot(tmp_path / "snap")
    found = {name: value for file in units(tmp_path / "snap") for name, value in load_file(file).items()}
    assert bits_equal(found["param_1.exp_avg"], pair.plain.state[pair.plain_parameters[1]]["exp_avg"])


def test_in_another_file_system_it_is_a_copy_and_says_so(
    pair: Pair, memory_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair.step()
    with caplog.at_level(logging.INFO, "offload_opt"):
        pair.offloaded.snapshot(memory_disk / "snap")
    assert [record.message for record in caplog.records if "another file system" in record.message]
    assert all(file.stat().st_nlink == 1 for file in units(memory_disk / "snap"))
    before = contents(memory_disk / "snap")
    expected = pair.offloaded.state_dict()
    for _ in range(2):
        pair.step()
    pair.offloaded.synchronize()
    assert contents(memory_disk / "snap") == before
    pair.offloaded.restore(memory_disk / "snap")  # a copy too, this time
    assert_same_state(expected, pair.offloaded.state_dict())
    pair.offloaded.step()
    pair.offloaded.synchronize()
    assert contents(memory_disk / "snap") == before


def test_a_second_one_in_the_same_directory_is_refused(pair: Pair, tmp_path: Path) -> None:
    pair.step()
    pair.offloaded.snapshot(tmp_path / "snap")
    before = contents(tmp_path / "snap")
    pair.step()
    with pytest.raises(StoreError, match="never change"):
        pair.offloaded.snapshot(tmp_path / "snap")
    assert contents(tmp_path / "snap") == before
    pair.step()
    pair.check()


def test_only_the_owner_can_read_it(pair: Pair, tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        pair.step()
        pair.offloaded.snapshot(tmp_path / "deep" / "snap")
    finally:
        os.umask(mask)
    for path in [tmp_path / "deep" / "snap", *(tmp_path / "deep" / "snap").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_keep_deletes_older_ones_of_this_run_and_nothing_else(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent, elsewhere = tmp_path / "snaps", tmp_path / "elsewhere"
    (tmp_path / "other").mkdir()
    other = Pair(adam, tmp_path / "other", SHAPES)
    other.step()
    other.offloaded.snapshot(parent / "other run")
    (parent / "notes").mkdir()
    (parent / "a file").write_text("mine")
    for name in ("1", "2", "3"):
        pair.step()
        pair.offloaded.snapshot(parent / name)
    pair.offloaded.snapshot(elsewhere / "same run")
    pair.step()
    with caplog.at_level(logging.INFO, "offload_opt"):
        pair.offloaded.snapshot(parent / "4", keep=2)
    assert sorted(path.name for path in parent.iterdir()) == ["3", "4", "a file", "notes", "other run"]
    assert (elsewhere / "same run").exists()
    assert [record.args[0].name for record in caplog.records if "deleted" in record.message] == ["1", "2"]  # type: ignore[index,union-attr]
    pair.step()
    pair.offloaded.restore(parent / "3")
    assert pair.offloaded.epoch == 3


def test_keep_never_deletes_what_was_just_made(pair: Pair, tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        pair.step()
        pair.offloaded.snapshot(tmp_path / "snaps" / name)
    pair.offloaded.restore(tmp_path / "snaps" / "1")
    pair.offloaded.snapshot(tmp_path / "snaps" / "again", keep=1)  # of an earlier epoch than those that are there
    assert [path.name for path in (tmp_path / "snaps").iterdir()] == ["again"]


@pytest.mark.parametrize("keep", [0, -1, True, 1.5, "2"])
def test_a_keep_that_makes_no_sense_is_refused(pair: Pair, tmp_path: Path, keep: Any) -> None:
    pair.step()
    with pytest.raises(ConfigError, match="keep must be"):
        pair.offloaded.snapshot(tmp_path / "snap", keep=keep)
    assert not (tmp_path / "snap").exists()


def test_a_commit_alone_is_refused_where_nothing_is_committed(store: Path) -> None:
    pair = Pair(adam, store, SHAPES, durability="scratch")
    pair.step()
    with pytest.raises(ConfigError, match="scratch"):
        pair.offloaded.snapshot()


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_full_disk_harms_neither_the_last_commit_nor_the_training(small_disk: Path, durability: str) -> None:
    pair = Pair(adam, small_disk, [(30_000,), (300,)], host_memory="300KiB", durability=durability)
    pair.step()
    if durability != "scratch":
        pair.offloaded.snapshot()
    epoch = pair.offloaded.committed_epoch
    left = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(bytes(left - (64 << 10)))
    before = names_below(small_disk)
    with pytest.raises(StoreError, match=r"needs \S+ KiB, and \S+ KiB are free"):
        pair.offloaded.snapshot(small_disk / "snap")
    assert names_below(small_disk) == before
    assert pair.offloaded.committed_epoch == epoch
    for _ in range(3):
        pair.step()
    pair.offloaded.synchronize()
    (small_disk / "filler").unlink()  # a state_dict() needs some room
    pair.check()
    pair.offloaded.snapshot(small_disk / "snap")
    pair.offloaded.close()
    assert units(small_disk / "snap")


def test_a_copy_that_does_not_fit_leaves_nothing_behind(pair: Pair, small_disk: Path) -> None:
    pair.step()
    (small_disk / "filler").write_bytes(bytes(700 << 10))
    with pytest.raises(StoreError, match=r"needs \S+ KiB, and \S+ KiB are free in"):
        pair.offloaded.snapshot(small_disk / "new" / "deep" / "snap")
    assert names_below(small_disk) == ["filler"]
    pair.step()
    pair.offloaded.snapshot()
    pair.check()


def test_what_a_killed_snapshot_left_is_cleared_away(pair: Pair, tmp_path: Path) -> None:
    pair.step()
    partial = tmp_path / "snap" / f".{RANK}.partial"
    (partial / "units").mkdir(parents=True)
    (partial / "units" / "unit-00000.0.safetensors").write_bytes(b"half of it")
    pair.offloaded.snapshot(tmp_path / "snap")
    assert [path.name for path in (tmp_path / "snap").iterdir()] == [RANK]
    pair.offloaded.restore(tmp_path / "snap")
    pair.step()
    pair.check()


def test_deleted_snapshots_give_their_space_back(pair: Pair, tmp_path: Path) -> None:
    for _ in range(2):
        pair.step()
        pair.offloaded.snapshot()
    steady = len(units(pair.offloaded_folder))
    for _ in range(3):
        pair.step()
        pair.offloaded.snapshot(tmp_path / "snap")
        shutil.rmtree(tmp_path / "snap")
    for _ in range(2):
        pair.step()
        pair.offloaded.snapshot()
    assert len(units(pair.offloaded_folder)) == steady
    pair.check()
