"""Fake /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path


def write(root: Path, files: dict[str, str]) -> Path:
    """Make files under ``root``: path -> text."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def block_device(root: Path, name: str, number: str, parent: str = "virtual", **files: str) -> Path:
    """Make /sys of one block device, as the kernel lays it out: its folder, and links to it by number and by name.

    ``files`` are named with ``__`` for ``/``. Returns its folder.
    """
    folder = root / "sys/devices" / parent / name
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, {path.replace("__", "/"): text for path, text in files.items()})
    for link in (root / "sys/dev/block" / number, root / "sys/class/block" / name):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
    return folder


def stack(upper: Path, *lower: Path) -> None:
    """Let the device ``upper`` be made of ``lower``."""
    (upper / "slaves").mkdir()
    for device in lower:
        (upper / "slaves" / device.name).symlink_to(device)


def nvme(root: Path, name: str = "nvme0n1", number: str = "259:0", **files: str) -> Path:
    """An NVMe drive as it should be, but for ``files``."""
    good = {
        "size": "1953525168",
        "device__model": "Samsung SSD 990 PRO 1TB                 ",
        "queue__rotational": "0",
        "queue__scheduler": "[none] mq-deadline kyber",
        "queue__max_sectors_kb": "128",
        "queue__write_cache": "write back",
    }
    return block_device(root, name, number, "pci0000:00", **{**good, **files})


def mounted(root: Path, *lines: str) -> Path:
    """Make /proc/self/mountinfo of lines "MAJ:MIN POINT OPTIONS - TYPE SOURCE OPTIONS"."""
    full = []
    for number, line in enumerate(lines, start=20):
        device, rest = line.split(" ", 1)
        full.append(f"{number} 1 {device} / {rest.replace(' - ', ' shared:1 - ')}")
    return write(root, {"proc/self/mountinfo": "\n".join(full)})
