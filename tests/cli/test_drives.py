"""Mounts and drives, read from fake /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offload_opt.drives import find_drives, find_mount
from tests.cli.support import block_device, mounted, nvme, stack, write


def point(root: Path, folder: str, device: str) -> str | None:
    mount = find_mount(Path(folder), device, root)
    return None if mount is None else mount.point


def test_the_deepest_mount_above_the_folder_is_its_mount(tmp_path: Path) -> None:
    mounted(
        tmp_path,
        "8:1 / rw - ext4 /dev/sda1 rw",
        "259:1 /mnt rw - ext4 /dev/nvme0n1p1 rw",
        "259:1 /mnt/nvme rw - ext4 /dev/nvme0n1p1 rw",
        "259:1 /mnt/nvme2 rw - ext4 /dev/nvme0n1p1 rw",
    )
    assert point(tmp_path, "/mnt/nvme/run1", "259:1") == "/mnt/nvme"
    assert point(tmp_path, "/mnt/nvme", "259:1") == "/mnt/nvme"
    assert point(tmp_path, "/mnt/nvme20", "259:1") == "/mnt"
    assert point(tmp_path, "/home", "8:1") == "/"


def test_a_mount_that_a_later_one_hides_is_not_taken(tmp_path: Path) -> None:
    mounted(
        tmp_path,
        "259:1 /mnt/a/b rw - ext4 /dev/old rw",
        "259:2 /mnt/a rw - xfs /dev/over rw",
        "259:3 /mnt/a rw - xfs /dev/last rw",
    )
    assert point(tmp_path, "/mnt/a/b", "259:2") == "/mnt/a"
    mount = find_mount(Path("/mnt/a"), "0:99", tmp_path)  # no such number: by place alone
    assert mount is not None
    assert mount.source == "/dev/last"


def test_blanks_in_names_and_both_kinds_of_options_are_read(tmp_path: Path) -> None:
    mounted(tmp_path, r"259:1 /mnt/my\040drive rw,noatime - xfs /dev/mapper/a\134b rw,logbufs=8")
    mount = find_mount(Path("/mnt/my drive/run"), "259:1", tmp_path)
    assert mount is not None
    assert mount.point == "/mnt/my drive"
    assert mount.source == "/dev/mapper/a\\b"
    assert mount.options == ("rw", "noatime", "logbufs=8")


def test_without_proc_there_is_no_mount(tmp_path: Path) -> None:
    assert find_mount(Path("/mnt"), "259:1", tmp_path) is None
    write(tmp_path, {"proc/self/mountinfo": "nonsense\n1 2 3"})
    assert find_mount(Path("/mnt"), "259:1", tmp_path) is None


def drives(root: Path, device: str, source: str = "/dev/x") -> list[str]:
    mounted(root, f"{device} /mnt rw - ext4 {source} rw")
    mount = find_mount(Path("/mnt"), device, root)
    assert mount is not None
    return [f"{drive.name} under {'/'.join(drive.above)}" for drive in find_drives(mount, root)]


def test_a_partition_leads_to_its_drive(tmp_path: Path) -> None:
    block_device(tmp_path, "nvme0n1p2", "259:2", "pci0000:00/nvme0n1", partition="2")
    nvme(tmp_path)
    mounted(tmp_path, "259:2 /mnt rw - ext4 /dev/nvme0n1p2 rw")
    mount = find_mount(Path("/mnt"), "259:2", tmp_path)
    assert mount is not None
    (drive,) = find_drives(mount, tmp_path)
    assert (drive.name, drive.model, drive.nbytes) == ("nvme0n1", "Samsung SSD 990 PRO 1TB", 1953525168 * 512)
    assert (drive.scheduler, drive.rotates, drive.write_cache) == ("none", False, "write back")
    assert drive.max_request == 128 << 10
    assert drive.is_nvme
    assert not drive.is_remote


def test_stacked_devices_lead_to_every_drive_once(tmp_path: Path) -> None:
    first = block_device(tmp_path, "nvme0n1p1", "259:1", "pci0000:00/nvme0n1", partition="1")
    nvme(tmp_path)
    second = nvme(tmp_path, "nvme1n1", "259:4")
    raid = block_device(tmp_path, "md0", "9:0", md__level="raid0")
    stack(raid, first, second)
    crypt = block_device(tmp_path, "dm-0", "253:0", dm__uuid="CRYPT-LUKS2-0123-secret")
    stack(crypt, raid)
    volume = block_device(tmp_path, "dm-1", "253:1", dm__uuid="LVM-abcdef")
    stack(volume, crypt, second)
    assert drives(tmp_path, "253:1") == [
        "nvme0n1 under dm-1 (LVM)/dm-0 (encrypted)/md0 (raid0)",
        "nvme1n1 under dm-1 (LVM)/dm-0 (encrypted)/md0 (raid0)",
    ]


def test_btrfs_is_found_by_its_source(tmp_path: Path) -> None:
    nvme(tmp_path)
    assert drives(tmp_path, "0:33", "/dev/nvme0n1") == ["nvme0n1 under "]
    assert drives(tmp_path, "0:33", "tank/data") == []
    assert drives(tmp_path, "0:33", "server:/export") == []


def test_a_name_under_dev_mapper_is_followed(tmp_path: Path) -> None:
    nvme(tmp_path, "dm-3", "253:3")
    write(tmp_path, {"dev/dm-3": ""})
    (tmp_path / "dev/mapper").mkdir()
    (tmp_path / "dev/mapper/vg-home").symlink_to("../dm-3")
    assert drives(tmp_path, "0:33", "/dev/mapper/vg-home") == ["dm-3 under "]


def test_devices_that_sys_does_not_show_are_left_out(tmp_path: Path) -> None:
    assert drives(tmp_path, "259:1") == []
    block_device(tmp_path, "sda", "8:0")  # shown, but all its files are missing
    mounted(tmp_path, "8:0 /mnt rw - ext4 /dev/sda rw")
    mount = find_mount(Path("/mnt"), "8:0", tmp_path)
    assert mount is not None
    (drive,) = find_drives(mount, tmp_path)
    assert (drive.name, drive.nbytes, drive.rotates, drive.scheduler) == ("sda", 0, None, "")


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs /proc")
def test_this_folder_has_a_mount(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    mount = find_mount(tmp_path.resolve(), f"{os.major(number)}:{os.minor(number)}")
    assert mount is not None
    assert tmp_path.resolve().is_relative_to(mount.point)
    assert mount.fstype
