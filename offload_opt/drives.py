"""What lies under a folder: its mount, and the drives that hold its bytes. Read from /proc and /sys.

Every function takes ``root``, under which ``proc`` and ``sys`` are. What cannot be read there, as in many containers,
is left out: nothing here raises for a missing file.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Models of drives that are elsewhere, behind a network, though they look like NVMe. As the kernel names them.
_REMOTE_MODELS = ("Amazon Elastic Block Store", "nvme_card-pd", "MSFT NVMe Accelerator")
_VIRTUAL_NAMES = ("vd", "xvd")
_VIRTUAL_MODELS = ("QEMU", "VMware", "Virtual", "PersistentDisk")


@dataclasses.dataclass(frozen=True)
class Mount:
    """The mount that a folder is on, a line of /proc/self/mountinfo."""

    point: str
    fstype: str
    source: str
    """What is mounted: a device's path, or a server's address, or a name without meaning."""
    options: tuple[str, ...]
    """Of the mount, and then of the file system."""
    device: str
    """MAJOR:MINOR. Major 0 is no block device."""


@dataclasses.dataclass(frozen=True)
class Drive:
    """A block device that is not made of others. Empty text and None: the system does not say."""

    name: str
    model: str
    nbytes: int
    rotates: bool | None
    scheduler: str
    max_request: int
    """Bytes of the largest request that reaches the drive in one piece. 0: unknown."""
    write_cache: str
    """``"write back"``: what is written is safe only after a flush; ``"write through"``: at once."""
    above: tuple[str, ...]
    """What is stacked on it, from the file system down: ``"dm-0 (LVM)"``, ``"md0 (raid0)"``."""

    @property
    def is_nvme(self) -> bool:
        """Whether it is spoken to by the NVMe protocol."""
        return self.name.startswith("nvme")

    @property
    def is_remote(self) -> bool:
        """Whether its model is known to be a volume behind a network."""
        return any(model in self.model for model in _REMOTE_MODELS)

    @property
    def is_virtual(self) -> bool:
        """Whether a virtual machine's host invented it: what it says of itself may be wrong."""
        return self.name.startswith(_VIRTUAL_NAMES) or any(word in self.model for word in _VIRTUAL_MODELS)


def read_text(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> str:
    """The text of ``root/path`` without blanks at its ends, or "" where it cannot be read."""
    try:
        return Path(root, path).read_text(errors="replace").strip()
    except OSError:
        return ""


def find_mount(folder: Path, device: str, root: str | os.PathLike[str] = "/") -> Mount | None:
    """The mount of ``folder``, an absolute path without symbolic links, whose files have the st_dev ``device``.

    Of the mounts above the folder the deepest is it, and of several at one place the last. ``device`` decides first, so
    that mounts which a later one hides do not count; but Btrfs and some others give their files numbers of no mount.
    """
    above = [mount for mount in _mounts(root) if folder.is_relative_to(mount.point)]
    candidates = [mount for mount in above if mount.device == device] or above
    return max(candidates, key=lambda mount: (len(Path(mount.point).parts), candidates.index(mount)), default=None)


def find_drives(mount: Mount, root: str | os.PathLike[str] = "/") -> list[Drive]:
    """The drives under a mount. Empty where there are none, or the system does not show them."""
    folder = Path(root, "sys/dev/block", mount.device)
    if mount.device.startswith("0:"):
        # Btrfs: the number is the file system's own, and the mount's source names one of its devices.
        if not mount.source.startswith("/dev/"):
            return []
        source = Path(root, mount.source.lstrip("/"))
        folder = Path(root, "sys/class/block", source.resolve().name)
    if not folder.exists():
        return []
    drives: dict[str, Drive] = {}
    for drive in _drives_of(folder.resolve(), ()):
        drives.setdefault(drive.name, drive)
    return list(drives.values())


def _mounts(root: str | os.PathLike[str]) -> Iterator[Mount]:
    for line in read_text(root, "proc/self/mountinfo").splitlines():
        # ID PARENT MAJ:MIN ROOT POINT OPTIONS [TAGS...] - TYPE SOURCE SUPER_OPTIONS
        left, _, right = line.partition(" - ")
        fields, types = left.split(" "), right.split(" ")
        if len(fields) >= 6 and len(types) >= 3:
            options = dict.fromkeys(fields[5].split(",") + types[2].split(","))
            yield Mount(_unescape(fields[4]), types[0], _unescape(types[1]), tuple(options), fields[2])


def _unescape(text: str) -> str:
    """Blanks, tabs, line ends and backslashes are written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _drives_of(folder: Path, above: tuple[str, ...]) -> Iterator[Drive]:
    """The drives that the block device of a /sys folder is made of."""
    if (folder / "partition").exists():
        folder = folder.parent
    try:
        parts = [entry.resolve() for entry in sorted((folder / "slaves").iterdir())]
    except OSError:
        parts = []
    if parts and len(above) < 16:
        for part in parts:
            yield from _drives_of(part, (*above, _stacked_name(folder)))
    else:
        yield _drive(folder, above)


def _stacked_name(folder: Path) -> str:
    level, uuid = read_text(folder, "md/level"), read_text(folder, "dm/uuid")
    kinds = {"LVM": "LVM", "CRYPT": "encrypted", "mpath": "multipath"}
    kind = level or kinds.get(uuid.partition("-")[0], "")
    return f"{folder.name} ({kind})" if kind else folder.name


def _drive(folder: Path, above: tuple[str, ...]) -> Drive:
    schedulers = read_text(folder, "queue/scheduler")
    chosen = re.search(r"\[(.+?)\]", schedulers)
    rotational = read_text(folder, "queue/rotational")
    return Drive(
        name=folder.name,
        model=" ".join(read_text(folder, "device/model").split()),
        nbytes=512 * _number(read_text(folder, "size")),  # always counted in 512 bytes
        rotates=None if not rotational else rotational == "1",
        scheduler=chosen[1] if chosen else schedulers,
        max_request=1024 * _number(read_text(folder, "queue/max_sectors_kb")),
        write_cache=read_text(folder, "queue/write_cache"),
        above=above,
    )


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
