"""State over several folders, and the settings that were found for a folder."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_opt import AioConfig, AioHandle, ConfigError, OffloadOptimizer, StoreError
from offload_opt.bandwidth import ScratchFiles
from offload_opt.tuning import TUNED_FILE, Tuned, save_tuned
from tests.conftest import seed
from tests.optim.support import SHAPES, SHAPES_OF_ALL_KINDS, Pair, adam, assert_same_state, bits_equal, parameters

UNIT_SIZE = 16 << 10


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two folders of one disk."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture
def disk_and_memory(tmp_path: Path) -> Iterator[list[Path]]:
    """Two folders of different devices."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    (tmp_path / "disk").mkdir()
    other = Path(tempfile.mkdtemp(dir=memory))
    yield [tmp_path / "disk", other]
    shutil.rmtree(other)


def tuned(mixed: float, **settings: Any) -> Tuned:
    return Tuned(AioConfig(**settings), read=mixed, write=mixed, mixed=mixed, date="2030-01-02T03:04:05+00:00")


def test_the_engine_is_told_once(disk_and_memory: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="offload_opt")
    OffloadOptimizer(adam(parameters()), disk_and_memory).close()  # measures both
    assert sum("I/O engine" in record.message for record in caplog.records if record.levelno == logging.INFO) == 1


def unit_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*/units/unit-*"))


def data_bytes(folder: Path) -> int:
    """Bytes of the units in a folder, without the headers, which are a page each here."""
    return sum(file.stat().st_size - 4096 for file in unit_files(folder))


def assert_in_proportion(folders: Sequence[Path], shares: Sequence[float]) -> None:
    held = [data_bytes(folder) for folder in folders]
    for folder, amount, share in zip(folders, held, shares, strict=True):
        assert abs(amount - sum(held) * share / sum(shares)) <= UNIT_SIZE, f"{folder}: {held}"


# Several folders.


@pytest.mark.parametrize("make", [adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)], ids=["adamw", "sgd"])
def test_it_is_exact_over_two_file_systems(disk_and_memory: list[Path], make: Any) -> None:
    pair = Pair(make, disk_and_memory, SHAPES_OF_ALL_KINDS, unit_size=UNIT_SIZE)
    for without in ((), (1,), ()):
        pair.step(without)
    pair.check()
    assert all(unit_files(folder) for folder in disk_and_memory)


def test_units_lie_in_proportion_to_the_bandwidths_that_were_found(disk_and_memory: list[Path]) -> None:
    for folder, mixed in zip(disk_and_memory, (1e9, 3e9), strict=True):
        save_tuned(folder, tuned(mixed))
    pair = Pair(adam, disk_and_memory, [(60_000,), (50_000,)], unit_size=UNIT_SIZE, durability="scratch")
    pair.step(without=[1])
    assert_in_proportion(disk_and_memory, [1, 3])
    pair.step()  # more units, for the other parameter
    assert_in_proportion(disk_and_memory, [1, 3])
    numbers = [int(file.name.split(".")[0].removeprefix("unit-")) for file in unit_files(disk_and_memory[0])]
    assert max(b - a for a, b in pairwise(numbers)) <= 5  # they take turns
    pair.check()


def test_folders_of_one_device_share_evenly(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("there is nothing to measure")

    monkeypatch.setattr("offload_opt.tuning.run", fail)
    pair = Pair(adam, two, SHAPES, unit_size=UNIT_SIZE, durability="scratch")
    pair.step()
    assert_in_proportion(two, [1, 1])


def test_folders_that_nothing_is_known_of_are_measured(
    two: list[Path], disk_and_memory: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_up(files: Sequence[ScratchFiles], aio: AioConfig, direction: str, seconds: float) -> list[float]:
        assert [each.folder for each in files] == [*two, disk_and_memory[1]]
        return [1.2e9, 0.8e9, 3e9]

    monkeypatch.setattr("offload_opt.tuning.run", made_up)
    folders = [*two, disk_and_memory[1]]
    save_tuned(two[0], tuned(9e9))  # of one folder only: not to be compared with what is measured now
    pair = Pair(adam, folders, SHAPES, unit_size=UNIT_SIZE, durability="scratch")
    pair.step()
    assert_in_proportion(folders, [1, 1, 3])


def test_a_folder_that_has_no_room_to_be_measured(
    tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (small_disk / "full").write_bytes(bytes((os.statvfs(small_disk).f_bavail - 20) * os.statvfs(small_disk).f_frsize))
    pair = Pair(adam, [small_disk, tmp_path], SHAPES, unit_size=UNIT_SIZE, durability="scratch")
    assert f"path {str(small_disk)!r} is too small" in caplog.text
    pair.step()
    pair.step()
    pair.check()
    assert unit_files(tmp_path)


def test_a_folder_that_is_too_small_for_its_share_gets_less(tmp_path: Path, small_disk: Path) -> None:
    folders = [small_disk, tmp_path]
    for folder in folders:
        save_tuned(folder, tuned(1e9))
    pair = Pair(adam, folders, [(300_000,), (200_000,)], unit_size=UNIT_SIZE, durability="scratch")
    pair.step(without=[1])
    pair.step()
    pair.check()
    assert data_bytes(small_disk) > 700 << 10
    assert data_bytes(small_disk) + data_bytes(tmp_path) >= 4_000_000


def test_what_takes_the_space_is_named(small_disk: Path) -> None:
    other = small_disk / "rank-00003-of-00004" / "units"
    other.mkdir(parents=True)
    (other / "unit-00000.0.safetensors").write_bytes(bytes(600 << 10))
    with pytest.raises(ConfigError, match=r"are free; other ranks or earlier runs have 600\.0 KiB in .*00003-of-00004"):
        OffloadOptimizer(adam(parameters(100_000)), small_disk, host_memory="2MiB")


def test_state_comes_and_goes_in_all_folders(two: list[Path]) -> None:
    pair = Pair(adam, two, SHAPES, unit_size=UNIT_SIZE)
    pair.step()
    saved = pair.offloaded.state_dict()
    pair.step()
    counts = [len(unit_files(folder)) for folder in two]
    for optimizer in (pair.plain, pair.offloaded):
        optimizer.load_state_dict(saved)
    assert [len(unit_files(folder)) for folder in two] == counts
    assert_same_state(pair.plain.state_dict(), pair.offloaded.state_dict())

    extra = torch.randn(30_000)
    added = [torch.nn.Parameter(extra.clone()) for _ in range(2)]
    for optimizer, parameter in zip((pair.plain, pair.offloaded), added, strict=True):
        optimizer.add_param_group({"params": [parameter], "lr": 0.1})
        parameter.grad = extra * 0.5
    pair.step()
    pair.check()
    assert bits_equal(*added), f"seed {seed()}"
    assert_in_proportion(two, [1, 1])
    pair.offloaded.close()
    OffloadOptimizer(adam(parameters()), two).close()  # each folder is free again


def test_a_list_of_one_folder_is_that_folder(store: Path) -> None:
    with OffloadOptimizer(adam(parameters()), [store]) as optimizer:
        optimizer.step()
        assert repr(optimizer).startswith(f"OffloadOptimizer(({str(store)!r},), AdamW")
    assert unit_files(store)


# What is refused.


def test_paths_that_are_no_folders_are_named(two: list[Path]) -> None:
    file = two[0].parent / "file"
    file.touch()
    link = two[0].parent / "link"
    link.symlink_to(two[0])
    for second, problem in ((two[0].parent / "missing", "does not exist"), (file, "not a folder"), (link, "twice")):
        with pytest.raises(ConfigError, match=problem) as caught:
            OffloadOptimizer(adam(parameters()), [two[0], second])
        assert repr(str(second)) in str(caught.value)
    for paths, problem in (([], "at least one folder"), ((two[0], 3), "a list of them, not int"), ({}, "not dict")):
        with pytest.raises(ConfigError, match=problem):
            OffloadOptimizer(adam(parameters()), paths)  # type: ignore[arg-type]
    assert list(two[0].iterdir()) == []


def test_the_folder_that_is_not_writable_is_named(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match="not writable") as caught:
        OffloadOptimizer(adam(parameters()), [tmp_path, small_disk])
    assert repr(str(small_disk)) in str(caught.value)
    assert list(tmp_path.iterdir()) == [small_disk]


def test_disks_that_are_too_small_together_are_named(small_disk: Path) -> None:
    folders = [small_disk / "a", small_disk / "b"]
    for folder in folders:
        folder.mkdir()
    # They are one disk: its space counts once.
    with pytest.raises(
        ConfigError, match=r"needs 3\.1 MiB, and (1\.0 MiB|1\d\d\d\.\d KiB|9\d\d\.\d KiB) are free"
    ) as caught:
        OffloadOptimizer(adam(parameters(200_000)), folders)
    assert all(repr(str(folder)) in str(caught.value) for folder in folders)
    assert all(list(folder.iterdir()) == [] for folder in folders)


def test_the_folder_that_another_optimizer_uses_is_named(two: list[Path]) -> None:
    with OffloadOptimizer(adam(parameters()), two[1]):
        with pytest.raises(StoreError, match="in use by this process") as caught:
            OffloadOptimizer(adam(parameters()), two)
        assert str(two[1]) in str(caught.value)
        OffloadOptimizer(adam(parameters()), two[0]).close()  # it was let go of


# The settings that were found.


@pytest.fixture
def settings_used(monkeypatch: pytest.MonkeyPatch) -> list[AioConfig]:
    """What handles are made with."""
    used: list[AioConfig] = []
    from_config = AioHandle.from_config

    def spy(config: AioConfig, folder: Any = None, **options: Any) -> AioHandle:
        used.append(config)
        return from_config(config, folder, **options)

    monkeypatch.setattr(AioHandle, "from_config", spy)
    return used


def test_the_settings_of_the_first_folder_are_used(
    two: list[Path], settings_used: list[AioConfig], caplog: pytest.LogCaptureFixture
) -> None:
    found = tuned(1e9, block_size="2MiB", queue_depth=7)
    save_tuned(two[0], found)
    save_tuned(two[1], tuned(2e9, block_size="4MiB"))
    with caplog.at_level(logging.INFO, logger="offload_opt"):
        for path in (two[0], two):
            OffloadOptimizer(adam(parameters()), path).close()
    assert set(settings_used) == {found.aio}
    lines = [line for line in caplog.messages if TUNED_FILE in line]
    assert len(lines) == 2
    assert "blocks of 2.0 MiB, queue depth 7" in lines[0]


def test_given_settings_win(store: Path, settings_used: list[AioConfig], caplog: pytest.LogCaptureFixture) -> None:
    save_tuned(store, tuned(1e9, queue_depth=7))
    own = AioConfig(queue_depth=9)
    with caplog.at_level(logging.INFO, logger="offload_opt"):
        OffloadOptimizer(adam(parameters()), store, aio=own).close()
    assert settings_used == [own]
    assert TUNED_FILE not in caplog.text


def test_a_malformed_file_of_settings_is_refused(two: list[Path]) -> None:
    broken = two[1] / TUNED_FILE
    broken.write_text("{")
    for path in (two[1], two):
        with pytest.raises(ConfigError, match="offload-opt tune") as caught:
            OffloadOptimizer(adam(parameters()), path)
        assert str(broken) in str(caught.value)
    assert list(two[1].iterdir()) == [broken]
    OffloadOptimizer(adam(parameters()), two[1], aio=AioConfig()).close()
