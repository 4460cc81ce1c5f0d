"""What was wrong with whose files are whose, and with space and memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_opt import ConfigError, OffloadOptimizer, StoreError, verification
from offload_opt.folders import free_bytes
from offload_opt.inspection import find_ranks
from tests import scripts
from tests.optim.support import HOST_MEMORY, SHAPES, Pair, Resumed, adam, assert_same_state, bits_equal, check_commit

RANK = "rank-00000-of-00001"


# Whose files are whose.


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("durability", ["snapshot", "step"])
def test_keep_does_not_take_the_store_for_a_snapshot(tmp_path: Path, durability: str, keep: int) -> None:
    # The store lay beside its snapshots, and was deleted as the oldest of them.
    (tmp_path / "run").mkdir()
    pair = Pair(adam, tmp_path / "run", SHAPES, durability=durability)
    for number in range(4):
        pair.step()
        if number == 1:
            pair.offloaded.synchronize()
            shutil.copytree(tmp_path / "run", tmp_path / "run-backup")
        pair.offloaded.snapshot(tmp_path / f"snap-{number}", keep=keep)
    pair.step()
    pair.check()
    kept = [f"snap-{number}" for number in range(4 - keep, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-backup", *kept]
    assert (tmp_path / "run-backup" / RANK / "LOCK").exists()


def test_a_store_that_is_in_use_is_no_snapshot(tmp_path: Path) -> None:
    # Its files were linked, and its owner, who did not know, wrote to them.
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = Pair(adam, tmp_path / "a", SHAPES)
    first.step()
    first.offloaded.snapshot()
    second = Pair(adam, tmp_path / "b", SHAPES)
    with pytest.raises(StoreError, match=rf"not a snapshot but a store, which process {os.getpid()} uses"):
        second.offloaded.restore(tmp_path / "a")
    then = first.offloaded.state_dict()
    first.offloaded.close()
    second.offloaded.restore(tmp_path / "a")  # nobody changes it now
    assert_same_state(then, second.offloaded.state_dict())
    with pytest.raises(StoreError, match="no committed epoch"):
        Pair(adam, tmp_path / "a", SHAPES, discard=True).offloaded.restore()
    check_commit(tmp_path / "b")


def test_two_snapshots_of_one_name_at_once(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second took what the first had begun for remains, and deleted it meanwhile.
    (tmp_path / "other").mkdir()
    other = Pair(adam, tmp_path / "other", SHAPES)
    for each in (pair, other):
        each.step()
    link = Path.hardlink_to
    problems: list[str] = []

    def linking(target: Path, source: Path) -> None:
        monkeypatch.setattr(Path, "hardlink_to", link)
        with pytest.raises(StoreError, match="another process is making a snapshot") as refused:
            other.offloaded.snapshot(tmp_path / "snap")
        problems.append(str(refused.value))
        link(target, source)

    monkeypatch.setattr(Path, "hardlink_to", linking)
    pair.offloaded.snapshot(tmp_path / "snap")
    assert len(problems) == 1
    (report,) = verification.verify(find_ranks([tmp_path / "snap"]), lambda *_: None)
    assert report.is_whole, report


def test_a_snapshot_is_brought_to_several_folders_by_their_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The whole of it had to fit into the first one.
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with tempfile.TemporaryDirectory(dir=shared) as elsewhere:
        pair = Resumed(adam, folders, [(60_000,)], unit_size="16KiB")
        pair.step()
        pair.offloaded.snapshot(Path(elsewhere) / "snap")
        size = sum(file.stat().st_size for file in Path(elsewhere).rglob("*.safetensors"))

        def free(folder: Path) -> int:
            return size // 3 if "a" in Path(folder).relative_to(tmp_path).parts else 1 << 40

        def device(path: Path, stat: Any = Path.stat, **options: Any) -> Any:
            found = stat(path, **options)
            if path.is_relative_to(folders[1]):  # a drive of its own
                values = list(found)
                values[2] = 12345
                return os.stat_result(values)
            return found

        for module in ("slots", "folders"):
            monkeypatch.setattr(f"offload_opt.{module}.free_bytes", free)
        monkeypatch.setattr(Path, "stat", device)
        pair.offloaded.restore(Path(elsewhere) / "snap")
        monkeypatch.undo()
        pair.check()
        pair.offloaded.close()


def test_a_copied_snapshot_needs_no_room_beside_the_store(small_disk: Path, tmp_path: Path) -> None:
    # It made files to take the place of those that a snapshot shares, though it shares none.
    pair = Pair(adam, small_disk, [(36_000,)], host_memory="300KiB")  # twice 288 KiB
    pair.step()
    (small_disk / "filler").write_bytes(bytes(free_bytes(small_disk) - (20 << 10)))
    pair.offloaded.snapshot(tmp_path / "snap")
    (small_disk / "filler").unlink()
    pair.step()
    pair.check()


def test_keep_does_not_take_a_link_for_one_more_snapshot(pair: Pair, tmp_path: Path) -> None:
    parent = tmp_path / "snaps"
    for name in ("1", "2"):
        pair.step()
        pair.offloaded.snapshot(parent / name, keep=2)
        if name == "1":
            (parent / "latest").symlink_to(parent / "1")
    assert sorted(path.name for path in parent.iterdir()) == ["1", "2", "latest"]
    assert (parent / "latest" / RANK / "MANIFEST.json").exists()


@pytest.mark.parametrize("durability", ["snapshot", "scratch"])
def test_keep_leaves_alone_what_another_run_made_from_the_same_snapshot(
    pair: Pair, tmp_path: Path, durability: str
) -> None:
    # Both were taken for one run, and each deleted the other's snapshots.
    parent = tmp_path / "snaps"
    pair.step()
    pair.offloaded.snapshot(parent / "origin")
    branches = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        branch = Pair(adam, tmp_path / name, SHAPES, durability=durability)
        branch.offloaded.restore(parent / "origin")
        branches.append(branch)
    for number in ("1", "2", "3"):
        for name, branch in zip("ab", branches, strict=True):
            branch.set_gradients()
            branch.offloaded.step()
            branch.offloaded.snapshot(parent / f"{name}{number}", keep=2)
    assert sorted(path.name for path in parent.iterdir()) == ["a2", "a3", "b2", "b3", "origin"]
    # A run that goes on in its own store, from a snapshot of its own, is the same run as before.
    branches[0].offloaded.close()
    again = Pair(adam, tmp_path / "a", SHAPES, durability=durability)
    again.offloaded.restore(parent / "a3")
    again.offloaded.snapshot(parent / "a4", keep=2)
    assert sorted(path.name for path in parent.iterdir()) == ["a3", "a4", "b2", "b3", "origin"]


@pytest.mark.parametrize(("shapes", "without"), [([(13_137,), (13_300,)], [0]), ([(16_387,), (4_683,)], [1])])
def test_names_of_files_are_not_used_twice_in_several_folders(
    tmp_path: Path, shapes: list[tuple[int, ...]], without: list[int]
) -> None:
    # Units get new numbers after a restore, and their files names that were free in their own folder only: a snapshot,
    # which has the files of all folders in one, failed.
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    pair = Resumed(adam, folders, shapes, unit_size="16KiB")
    pair.step(without)
    pair.step()  # the units of the other parameter come behind those of the weights
    for number in range(3):
        pair.reopen()
        pair.step()
        pair.offloaded.snapshot(tmp_path / f"snap {number}")
        pair.check()
        names = [file.name for folder in folders for file in folder.glob("*/units/*")]
        assert len(set(names)) == len(names)


def test_names_that_are_on_other_places_are_refused(store: Path) -> None:
    # Parameters of one shape got each other's state.
    def make(*names: str) -> OffloadOptimizer:
        named = [(name, torch.nn.Parameter(torch.ones(500))) for name in names]
        for number, (_, parameter) in enumerate(named):
            parameter.grad = torch.full_like(parameter, float(number))
        return OffloadOptimizer(adam(named), store, host_memory=HOST_MEMORY)

    with make("first", "second") as optimizer:
        optimizer.step()
        optimizer.snapshot()
    with make("second", "first") as optimizer:
        with pytest.raises(ConfigError, match="the order that they had"):
            optimizer.restore()
        assert len(optimizer.state) == 0
    with make("module.first", "module.second") as optimizer:  # renamed: the places say which is which
        optimizer.restore()
        assert bits_equal(optimizer.state_dict()["state"][0]["exp_avg"], torch.zeros(500))


# Space and memory.


def test_files_that_stay_are_not_counted_as_free(small_disk: Path) -> None:
    # There seemed to be room for state that then did not fit, when the old one was gone already.
    pair = Pair(adam, small_disk, [(30_000,)], host_memory="300KiB")  # twice 240 KiB
    pair.step()
    saved = pair.offloaded.state_dict()
    then = {name: value.clone() for name, value in saved["state"][0].items()}
    taken = {"state": {0: then}, "param_groups": saved["param_groups"]}
    del saved
    pair.offloaded.snapshot()
    (small_disk / "filler").write_bytes(bytes(400 << 10))
    with pytest.raises(ConfigError, match=r"the last commit keeps 2\d\d\.\d KiB until the next one"):
        pair.offloaded.load_state_dict(taken)
    (small_disk / "filler").unlink()  # a state_dict() needs some room
    pair.check()  # nothing has been touched
    pair.step()
    pair.check()

    pair.offloaded.snapshot(small_disk / "snap")
    pair.offloaded.close()
    (small_disk / "filler").write_bytes(bytes(free_bytes(small_disk) - (40 << 10)))
    with pytest.raises(ConfigError, match="too small for the optimizer state"):  # what a snapshot has is not free
        Pair(adam, small_disk, [(38_000,)], host_memory="300KiB", discard=True)


@pytest.mark.parametrize("name", ["MANIFEST.json", "PART.json"])
def test_a_damaged_store_can_be_discarded(tmp_path: Path, name: str) -> None:
    # The damage was refused before discard=True was looked at.
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    pair = Resumed(adam, folders, SHAPES)
    pair.step()
    pair.offloaded.close()
    (damaged,) = tmp_path.glob(f"*/*/{name}")
    damaged.write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        pair.reopen()
    pair.reopen(restore=False, discard=True)
    pair.set_gradients()
    pair.offloaded.step()
    pair.offloaded.synchronize()
    assert pair.offloaded.committed_epoch == 1
    pair.reopen()


def test_a_store_with_larger_units_is_restored_within_host_memory(store: Path) -> None:
    # Checking and reading took two buffers of the size that the units had where they were written.
    script = """
        import re, sys, threading, time, torch, offload_opt
        from pathlib import Path
        def anonymous():
            return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
        p = torch.nn.Parameter(torch.zeros(24 << 20))  # 96 MiB
        def make(**fields):
            fields = {"persist_params": True, "checksum": "read", **fields}
            return offload_opt.OffloadOptimizer(torch.optim.SGD([p], lr=0.1, momentum=0.9), sys.argv[1], **fields)
        with make(host_memory="384MiB", unit_size="128MiB") as optimizer:
            p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.snapshot()
        p.grad = None
        peak, ended = 0, threading.Event()
        def watch():
            global peak
            while not ended.wait(0.0005):
                peak = max(peak, anonymous())
        before = anonymous()
        with make(host_memory="12MiB") as optimizer:
            watcher = threading.Thread(target=watch)
            watcher.start()
            optimizer.restore()
            ended.set()
            watcher.join()
        print(peak - before)
    """
    assert int(scripts.run_well(script, store).stdout) < 12 + 32 << 20
