"""What a machine and a folder on it offer, and what to do about what they lack.

Each check is a function that looks at one thing and returns a ``Finding``. Those that read /proc and /sys take
``root``, under which these are; a file that is not there, as in many containers, is no failure.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import math
import mmap
import os
import platform
import re
import resource
import shlex
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

import torch

from . import aio
from .aio import AioHandle, engines
from .buffers import MAX_BUFFERS
from .codecs import thread_count
from .config import AioConfig, OffloadConfig, format_bytes
from .drives import Drive, Mount, find_drives, find_mount, read_text
from .errors import ConfigError
from .tuning import TUNED_FILE, load_tuned

Status = Literal["ok", "warn", "fail"]

# Bits of CapEff in /proc/self/status.
_CAP_IPC_LOCK, _CAP_SYS_ADMIN = 14, 21
_MLOCK_ONFAULT = 1

_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "afs"}
_NETWORK |= {"ceph", "lustre", "beegfs", "gpfs", "glusterfs", "pvfs2", "orangefs", "ocfs2", "gfs2", "wekafs"}
_IN_MEMORY = {"tmpfs", "ramfs"}
_NOT_FOR_DATA = {"proc", "sysfs", "cgroup", "cgroup2", "devpts", "debugfs", "tracefs", "securityfs", "configfs"}
_NOT_FOR_DATA |= {"bpf", "mqueue", "pstore", "efivarfs", "binfmt_misc", "fusectl", "selinuxfs", "autofs", "nsfs"}
_LOCAL = "choose a folder on a local NVMe drive, with ext4 or XFS"
_ENOUGH_FILES = 1024
_ENOUGH_AIO_EVENTS = 8192
_ALLOW_IO_URING = (
    "see the lines above; in a container, its seccomp profile must pass io_uring_setup, io_uring_enter and "
    "io_uring_register (docker run --security-opt seccomp=PROFILE)"
)
_LITTLE_SPACE = 0.05  # of the file system; drives slow down when they are nearly full


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Status
    """``"fail"``: offloading cannot work. ``"warn"``: it works, but slower or less safely than it could."""
    found: str
    advice: str = ""
    """What to do. Empty where nothing need be done."""


def examine_machine(root: str | os.PathLike[str] = "/") -> list[Finding]:
    """All findings about the machine and the Python environment."""
    return [
        versions(),
        kernel(root),
        io_uring_switch(root),
        *engine_findings(),
        aio_events(root),
        locked_memory(root),
        open_files(),
        threads(),
        memory(root),
        huge_pages(root),
        gpu(root),
    ]


def examine_folder(folder: Path, root: str | os.PathLike[str] = "/") -> list[Finding]:
    """All findings about an existing folder and what lies under it."""
    folder = folder.resolve()
    mount = _mount_of(folder, root)
    if mount is not None and mount.fstype in _NOT_FOR_DATA:
        return [file_system(mount)]
    findings = [writable(folder)]
    if mount is not None:
        findings.append(file_system(mount))
    if findings[0].status != "fail":
        findings.append(direct_io(folder))
    findings.append(space(folder))
    if mount is not None:
        findings += [drive(found) for found in find_drives(mount, root)]
    if findings[0].status != "fail":
        findings.append(tuned(folder))
    return findings


def check_for_data(folder: Path, root: str | os.PathLike[str] = "/") -> Mount | None:
    """The mount of an existing folder, where the system shows it. Raises ConfigError where it is none for data."""
    mount = _mount_of(folder.resolve(), root)
    if mount is not None and mount.fstype in _NOT_FOR_DATA:
        raise ConfigError(f"{folder} is on {mount.fstype}, not a file system for data: {_LOCAL}")
    return mount


def is_in_memory(mount: Mount) -> bool:
    """Whether the mount's files take memory instead of a drive's space."""
    return mount.fstype in _IN_MEMORY


# The machine.


def versions() -> Finding:
    """What is installed."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("offload_opt", "torch", "safetensors"))
    return Finding("versions", "ok", f"{packages}, Python {platform.python_version()}")


def kernel(root: str | os.PathLike[str] = "/") -> Finding:
    """The kernel's version, and how much of what we use of io_uring it has."""
    release = read_text(root, "proc/sys/kernel/osrelease")
    if not release:
        return Finding("kernel", "warn", f"{platform.system()}, not Linux", "use Linux: only there is it tested")
    numbers = [int(number) for number in re.findall(r"\d+", release)[:2]]
    if numbers < [5, 6]:
        found, advice = "too old for io_uring", "io_uring needs Linux 5.6 or later; until then other engines are used"
    elif numbers < [5, 13]:
        found, advice = "io_uring without registered buffers", "Linux 5.19 or later has all of io_uring that is used"
    elif numbers < [5, 19]:
        found, advice = "io_uring interrupts the training thread's core", "Linux 5.19 or later spares the interrupts"
    else:
        return Finding("kernel", "ok", f"Linux {release}: has all of io_uring that is used")
    return Finding("kernel", "warn", f"Linux {release}: {found}", advice)


def io_uring_switch(root: str | os.PathLike[str] = "/") -> Finding:
    """The sysctl that forbids io_uring. Kernels before 6.6 do not have it."""
    name, setting = "io_uring switch", read_text(root, "proc/sys/kernel/io_uring_disabled")
    advice = "as root: sysctl kernel.io_uring_disabled=0"
    if setting in ("", "0"):
        return Finding(name, "ok", "kernel.io_uring_disabled = 0" if setting else "this kernel has none")
    if setting != "1":
        return Finding(name, "warn", f"kernel.io_uring_disabled = {setting}: off for everyone", advice)
    group = read_text(root, "proc/sys/kernel/io_uring_group")
    if _has_capability(_CAP_SYS_ADMIN, root) or group in {str(number) for number in (*os.getgroups(), os.getegid())}:
        return Finding(name, "ok", "kernel.io_uring_disabled = 1: for the privileged, and this process is")
    return Finding(name, "warn", "kernel.io_uring_disabled = 1: for privileged processes only", advice)


def engine_findings() -> list[Finding]:
    """One finding for each engine, and a failure where none can be used."""
    table = engines()
    some_work = any(works for _, works, _ in table)
    findings = []
    try:
        with AioHandle(quiet=True) as handle:
            chosen = handle.engine
    except ConfigError as error:
        chosen = ""
        advice = "unset OFFLOAD_OPT_ENGINE" if some_work else _ALLOW_IO_URING
        findings.append(Finding("engine", "fail", str(error), advice))
    for name, works, why_not in table:
        if works:
            found = "works; taken by default" if name == chosen else "works"
            findings.append(Finding(f"engine {name}", "ok", found))
        else:
            advice = _ALLOW_IO_URING if name == "io_uring" else "nothing, if another engine works"
            findings.append(Finding(f"engine {name}", "warn", f"does not work: {why_not}", advice))
    return findings


def aio_events(root: str | os.PathLike[str] = "/") -> Finding:
    """How many more requests the kernel's older asynchronous I/O (libaio) takes, all processes together."""
    name = "libaio limit"
    limit, used = (read_text(root, f"proc/sys/fs/{file}") for file in ("aio-max-nr", "aio-nr"))
    if not (limit.isdigit() and used.isdigit()):
        return Finding(name, "ok", "fs.aio-max-nr is not shown here")
    found = f"{used} of fs.aio-max-nr = {limit} requests taken"
    if int(limit) - int(used) < _ENOUGH_AIO_EVENTS:
        return Finding(name, "warn", found, "for the libaio engine, as root: sysctl fs.aio-max-nr=1048576")
    return Finding(name, "ok", found)


def locked_memory(root: str | os.PathLike[str] = "/", try_lock: Callable[[int], str] | None = None) -> Finding:
    """Whether the default ``host_memory`` can be page-locked: by trying, as limits do not bind everyone."""
    wanted = int(OffloadConfig(path=".").host_memory)
    soft, hard = _limits(resource.RLIMIT_MEMLOCK)
    why_not = (try_lock or _try_lock)(wanted)
    limits = "no limit" if soft == math.inf else f"limit {format_bytes(soft)}"
    if not why_not:
        if soft < wanted and _has_capability(_CAP_IPC_LOCK, root):
            limits += ", which CAP_IPC_LOCK lifts"
        return Finding("locked memory", "ok", f"{format_bytes(wanted)} can be locked ({limits})")
    if soft < wanted:
        found = f"at most {format_bytes(soft)}, and the default host_memory is {format_bytes(wanted)}"
    else:
        found = f"{format_bytes(wanted)}, the default host_memory, cannot be locked: {why_not}"
    if soft < wanted <= hard:
        kib = "unlimited" if hard == math.inf else f"{hard // 1024:.0f}"
        advice = f"before starting Python: ulimit -l {kib}"
    else:
        advice = (
            'raise it: "* - memlock unlimited" in /etc/security/limits.conf and a new login, LimitMEMLOCK=infinity in '
            "a service, docker run --ulimit memlock=-1"
        )
    return Finding("locked memory", "warn", found, advice)


def open_files() -> Finding:
    """The limit of open files: each transfer under way has one open."""
    soft, hard = _limits(resource.RLIMIT_NOFILE)
    if soft >= _ENOUGH_FILES:
        return Finding("open files", "ok", "no limit" if soft == math.inf else f"at most {soft:.0f}")
    if soft < hard:
        advice = f"before starting Python: ulimit -n {min(hard, 4 * _ENOUGH_FILES):.0f}"
    else:
        advice = (
            'raise it: "* - nofile 4096" in /etc/security/limits.conf and a new login, LimitNOFILE=4096 in a service'
        )
    return Finding("open files", "warn", f"at most {soft:.0f}; transfers alone may take {MAX_BUFFERS}", advice)


def threads() -> Finding:
    """The threads of an update, and whether the codecs of state share them."""
    count, shared = torch.get_num_threads(), thread_count()
    if shared < count:
        found = f"torch is to have {count} for its operations, and the codecs of state get {shared}"
        advice = "see OMP_THREAD_LIMIT and OMP_DYNAMIC"
        if shared == 1:
            advice += ", and whether this build of torch has an OpenMP library: torch.__config__.parallel_info()"
        return Finding("threads", "warn", found, advice)
    return Finding("threads", "ok", f"{count}, for the update and for the codecs of state")


def memory(root: str | os.PathLike[str] = "/") -> Finding:
    """Host memory: what there is, and what is left."""
    kib = dict(line.split(":", 1) for line in read_text(root, "proc/meminfo").splitlines() if ":" in line)
    numbers = [1024 * int(kib.get(key, "0").split()[0]) for key in ("MemTotal", "MemAvailable")]
    if not all(numbers):
        return Finding("memory", "ok", "/proc/meminfo is not shown here")
    total, available = numbers
    found = f"{format_bytes(total)}, of which {format_bytes(available)} are available"
    limit = _container_limit(root)
    if limit is not None and limit < total:
        available = min(available, limit)
        found += f"; this container may take {format_bytes(limit)}"
    wanted = int(OffloadConfig(path=".").host_memory)
    if available < wanted:
        advice = f"give OffloadOptimizer a smaller host_memory than its default of {format_bytes(wanted)}"
        return Finding("memory", "warn", found, advice)
    return Finding("memory", "ok", found)


def huge_pages(root: str | os.PathLike[str] = "/") -> Finding:
    """The mode of transparent huge pages, which buffers ask for."""
    name = "huge pages"
    modes = read_text(root, "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = modes.partition("[")[2].partition("]")[0]
    if chosen == "never":
        advice = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding(name, "warn", "transparent, never: buffers are made of small pages, which cost CPU", advice)
    return Finding(name, "ok", f"transparent, {chosen}: buffers have them" if chosen else "the system does not say")


def gpu(root: str | os.PathLike[str] = "/") -> Finding:
    """Which GPUs torch sees, and whether page-locked memory can be made known to them."""
    if not torch.cuda.is_available():
        if not Path(root, "proc/driver/nvidia/version").exists():
            return Finding("GPU", "ok", "none: parameters are on the CPU")
        if torch.version.cuda is None:
            found = f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
            return Finding("GPU", "warn", found, "install a CUDA build of torch: https://pytorch.org/get-started")
        found = f"torch is built for CUDA {torch.version.cuda} and there is an NVIDIA driver, but no device is found"
        advice = "see what nvidia-smi says, and CUDA_VISIBLE_DEVICES; in a container, docker run --gpus all"
        return Finding("GPU", "warn", found, advice)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    counted = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
    found = f"{', '.join(counted)} (CUDA {torch.version.cuda or torch.version.hip})"
    if not _registers_with_cuda():
        advice = "copies to the GPU will be slow: allow more locked memory (above), and see the driver's log in dmesg"
        return Finding("GPU", "warn", f"{found}; cudaHostRegister fails", advice)
    return Finding("GPU", "ok", f"{found}; cudaHostRegister works")


# The folder.


def writable(folder: Path) -> Finding:
    """Whether files can be made in the folder, by making one."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding("folder", "ok", "files can be made in it")
    except OSError as error:
        advice = f"as its owner: chmod u+rwx {shlex.quote(str(folder))}"
        if error.errno == errno.EROFS:
            advice = "it is mounted read-only: mount it rw, or choose another folder"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "make space, or choose another folder"
        elif folder.stat().st_uid != os.geteuid():
            advice = f"choose a folder of yours; or as root, chown {os.geteuid()} {shlex.quote(str(folder))}"
        return Finding("folder", "fail", f"no file can be made in it: {os.strerror(error.errno or 0)}", advice)


def file_system(mount: Mount) -> Finding:
    """The kind of file system, and whether that kind suits."""
    name, kind = "file system", mount.fstype
    found = f"{kind} on {mount.point} from {mount.source} ({', '.join(mount.options)})"
    if kind in _NOT_FOR_DATA:
        return Finding(name, "fail", f"{kind} on {mount.point}: not a file system for data", _LOCAL)
    if is_in_memory(mount):
        return Finding(name, "warn", f"{found}: its files are in memory, so offloading there saves none", _LOCAL)
    if kind == "overlay":
        advice = "mount a folder of the host's NVMe drive: docker run -v /mnt/nvme:/mnt/nvme"
        return Finding(name, "warn", f"{found}: a container's own layer, lost with it", advice)
    if kind in _NETWORK:
        return Finding(name, "warn", f"{found}: the state would travel over the network", _LOCAL)
    if kind.startswith("fuse"):
        return Finding(name, "warn", f"{found}: each request passes through a process (FUSE)", _LOCAL)
    if kind == "btrfs" and not {"nodatacow", "nodatasum"} & set(mount.options):
        advice = "in a new, empty folder: chattr +C FOLDER; or use ext4 or XFS"
        return Finding(name, "warn", f"{found}: copies what is overwritten and checksums it", advice)
    if "data=journal" in mount.options:
        return Finding(name, "warn", f"{found}: data=journal writes everything twice", "mount it with data=ordered")
    if {"sync", "dirsync"} & set(mount.options):
        return Finding(name, "warn", f"{found}: waits for the drive at each write", "mount it without sync")
    return Finding(name, "ok", found)


def direct_io(folder: Path) -> Finding:
    """Whether transfers there can go past the page cache."""
    try:
        alignment, why_not = aio.direct_io(folder)
    except OSError as error:
        alignment, why_not = 0, error.strerror or str(error)
    if alignment:
        return Finding("direct I/O", "ok", f"works, aligned to {alignment} bytes")
    advice = "choose another file system (ext4, XFS): through the page cache, transfers take memory and CPU"
    return Finding("direct I/O", "warn", f"does not work: {why_not}", advice)


def space(folder: Path) -> Finding:
    """How much fits."""
    status = os.statvfs(folder)
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    found = f"{format_bytes(free)} of {format_bytes(total)} are free: AdamW for {_count(free // 8)} fp32 parameters"
    if free < _LITTLE_SPACE * total or free == 0:
        advice = "make space: AdamW needs 8 bytes for each fp32 parameter, and a nearly full drive is slow"
        return Finding("space", "warn", found, advice)
    return Finding("space", "ok", found)


def drive(under: Drive) -> Finding:
    """One drive under the folder, and whether it is set up for large transfers."""
    name = f"drive {under.name}"
    kind = "NVMe" if under.is_nvme else "a virtual machine's drive" if under.is_virtual else "not NVMe"
    rotates = None if under.is_virtual else under.rotates  # hosts leave it at what the kernel assumes
    facts = [
        kind,
        under.model,
        format_bytes(under.nbytes) if under.nbytes else "",
        {True: "rotates", False: "solid state", None: ""}[rotates],
        f"scheduler {under.scheduler}" if under.scheduler else "",
        f"requests up to {format_bytes(under.max_request)}" if under.max_request else "",
        f"write cache {'volatile' if under.write_cache == 'write back' else 'none'}" if under.write_cache else "",
        f"under {', '.join(under.above)}" if under.above else "",
    ]
    found = ", ".join(fact for fact in facts if fact)
    if under.is_remote:
        return Finding(
            name, "warn", f"{found}: a volume behind a network", "use the machine's own NVMe (instance store)"
        )
    if any("encrypted" in layer for layer in under.above):
        return Finding(name, "warn", f"{found}: encrypting takes CPU", "use a drive without encryption, if you may")
    if rotates:
        return Finding(name, "warn", found, "use an NVMe drive: a disk that rotates moves 0.2 GB/s at best")
    if under.is_nvme and under.scheduler not in ("none", ""):
        advice = f"as root: echo none > /sys/block/{under.name}/queue/scheduler"
        return Finding(name, "warn", f"{found}: sorting requests only costs time on NVMe", advice)
    return Finding(name, "ok", found)


def tuned(folder: Path) -> Finding:
    """Whether there are settings that ``offload-opt tune`` found for the folder."""
    command = f"offload-opt tune {shlex.quote(str(folder))}"
    try:
        found = load_tuned(folder)
    except ConfigError as error:
        return Finding("tuned", "fail", str(error), command)
    if found is None:
        return Finding("tuned", "warn", f"no {TUNED_FILE} in it: the default I/O settings are used", command)
    rates = f"read {found.read / 1e9:.2f}, write {found.write / 1e9:.2f}, both at once {found.mixed / 1e9:.2f} GB/s"
    return Finding("tuned", "ok", f"on {found.date[:10]}: {describe(found.aio)}; {rates}")


def describe(settings: AioConfig) -> str:
    """I/O settings in words."""
    threads = f"{settings.num_threads} thread{'s' * (settings.num_threads > 1)}"
    block = format_bytes(cast(int, settings.block_size))
    return f"engine {settings.engine}, blocks of {block}, queue depth {settings.queue_depth}, {threads}"


# How it is found out.


def _mount_of(folder: Path, root: str | os.PathLike[str]) -> Mount | None:
    """Of a folder without symbolic links."""
    number = folder.stat().st_dev
    return find_mount(folder, f"{os.major(number)}:{os.minor(number)}", root)


def _has_capability(bit: int, root: str | os.PathLike[str]) -> bool:
    for line in read_text(root, "proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> bit & 1)
    return False


def _try_lock(nbytes: int) -> str:
    """Why so many bytes cannot be page-locked, or "". Takes no memory: pages would be locked as they are touched."""
    try:
        mlock2 = ctypes.CDLL(None, use_errno=True).mlock2
        with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
            first = ctypes.c_char.from_buffer(area)
            failed = mlock2(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), _MLOCK_ONFAULT)
            error = ctypes.get_errno()
            del first  # or the area could not be closed
            return os.strerror(error) if failed else ""
    except AttributeError:
        return "this C library has no mlock2"
    except OSError as error:
        return os.strerror(error.errno or 0)


def _container_limit(root: str | os.PathLike[str]) -> int | None:
    """The lowest memory limit, in bytes, of the control groups that this process is in."""
    limits = []
    for line in read_text(root, "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, file = Path("sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            base, file = Path("sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        limits += [read_text(root, base / folder / file) for folder in (group, *group.parents)]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def _registers_with_cuda() -> bool:
    with AioHandle(quiet=True) as handle:
        tensor = handle.new_cpu_locked_tensor(1, torch.empty(0, dtype=torch.uint8, device="cpu"))
        pinned = tensor.is_pinned()
        handle.free_cpu_locked_tensor(tensor)
    return pinned


def _limits(which: int) -> tuple[float, float]:
    """The soft and the hard limit of a resource; infinity where there is none."""
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(which))
    return soft, hard


def _count(number: int) -> str:
    """A number for people: "10.3 billion"."""
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return str(number)
