"""What the doctor says of machines that lack something: fake /proc and /sys trees, and the real machine."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import offload_opt
from offload_opt import _C, aio, doctor
from offload_opt.config import AioConfig
from offload_opt.doctor import Finding
from offload_opt.drives import Drive, Mount, find_drives, find_mount
from offload_opt.tuning import TUNED_FILE, Tuned, save_tuned
from tests import scripts
from tests.cli.support import block_device, mounted, nvme, stack, write

GIB = 1 << 30
INFINITE = resource.RLIM_INFINITY


def check(finding: Finding, status: str, found: str = "", advice: str = "") -> None:
    """``found`` and ``advice`` are parts of what it says; there is advice just where there is a shortfall."""
    assert finding.status == status, finding
    assert found in finding.found, finding
    assert advice in finding.advice, finding
    assert bool(finding.advice) == (status != "ok"), finding


# The machine.


@pytest.mark.parametrize(
    ("release", "status", "found"),
    [
        ("6.18.44-generic", "ok", "Linux 6.18.44-generic: has all of io_uring"),
        ("5.19.0", "ok", "has all"),
        ("5.15.0-91-generic", "warn", "interrupts"),
        ("5.10.0-28-amd64", "warn", "without registered buffers"),
        ("5.6", "warn", "without registered buffers"),
        ("5.4.0-1", "warn", "too old for io_uring"),
        ("4.18.0-553.el8", "warn", "too old for io_uring"),
        ("10.0.1", "ok", "has all"),
        ("6.12+", "ok", "has all"),
    ],
)
def test_kernel(tmp_path: Path, release: str, status: str, found: str) -> None:
    check(doctor.kernel(write(tmp_path, {"proc/sys/kernel/osrelease": release})), status, found)


@pytest.mark.parametrize(
    ("files", "status", "found"),
    [
        ({}, "ok", "has none"),
        ({"io_uring_disabled": "0"}, "ok", "= 0"),
        ({"io_uring_disabled": "2"}, "warn", "off for everyone"),
        ({"io_uring_disabled": "1", "io_uring_group": "-1"}, "warn", "privileged"),
        ({"io_uring_disabled": "1", "io_uring_group": str(os.getegid())}, "ok", "this process is"),
    ],
)
def test_io_uring_switch(tmp_path: Path, files: dict[str, str], status: str, found: str) -> None:
    root = write(tmp_path, {f"proc/sys/kernel/{name}": text for name, text in files.items()})
    check(doctor.io_uring_switch(root), status, found, "sysctl kernel.io_uring_disabled=0" if status == "warn" else "")


def test_privileged_processes_may_use_io_uring_all_the_same(tmp_path: Path) -> None:
    files = {"proc/sys/kernel/io_uring_disabled": "1", "proc/self/status": "Name:\tx\nCapEff:\t0000000000200000"}
    check(doctor.io_uring_switch(write(tmp_path, files)), "ok", "this process is")


def engines(monkeypatch: pytest.MonkeyPatch, *table: tuple[str, bool, str]) -> list[Finding]:
    monkeypatch.delenv("OFFLOAD_OPT_ENGINE", raising=False)
    monkeypatch.setattr(_C, "engines", lambda: list(table))
    return doctor.engine_findings()


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = engines(
        monkeypatch, ("io_uring", False, "io_uring_setup: Operation not permitted"), ("threads", True, "")
    )
    assert (first.name, second.name) == ("engine io_uring", "engine threads")
    check(first, "warn", "io_uring_setup: Operation not permitted", "seccomp")
    check(second, "ok", "works; taken by default")


def test_no_engine_at_all_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = engines(monkeypatch, ("io_uring", False, "forbidden"), ("threads", False, "no threads"))
    assert [finding.status for finding in findings] == ["fail", "warn", "warn"]
    check(findings[0], "fail", "no I/O engine", "seccomp")


def test_an_engine_that_the_environment_names_and_that_does_not_work_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines(monkeypatch, ("io_uring", False, "forbidden"), ("threads", True, ""))
    monkeypatch.setenv("OFFLOAD_OPT_ENGINE", "io_uring")
    check(doctor.engine_findings()[0], "fail", "forbidden", "unset OFFLOAD_OPT_ENGINE")
    monkeypatch.setenv("OFFLOAD_OPT_ENGINE", "floppy")
    check(doctor.engine_findings()[0], "fail", "floppy", "unset OFFLOAD_OPT_ENGINE")


@pytest.mark.parametrize(
    ("limit", "used", "status"), [("65536", "0", "ok"), ("65536", "65000", "warn"), ("1048576", "65000", "ok")]
)
def test_libaio_limit(tmp_path: Path, limit: str, used: str, status: str) -> None:
    root = write(tmp_path, {"proc/sys/fs/aio-max-nr": limit, "proc/sys/fs/aio-nr": used})
    check(doctor.aio_events(root), status, f"{used} of fs.aio-max-nr = {limit}", "" if status == "ok" else "sysctl fs.")


def test_locked_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def with_limits(soft: int, hard: int, why_not: str) -> Finding:
        monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
        return doctor.locked_memory(tmp_path, lambda nbytes: (tried.append(nbytes), why_not)[1])

    forbidden = "Cannot allocate memory"
    check(with_limits(INFINITE, INFINITE, ""), "ok", "2.0 GiB can be locked (no limit)")
    low = "at most 8.0 MiB, and the default host_memory is 2.0 GiB"
    check(with_limits(8 << 20, 8 << 20, forbidden), "warn", low, "limits.conf")
    check(with_limits(8 << 20, INFINITE, forbidden), "warn", low, "ulimit -l unlimited")
    check(with_limits(8 << 20, 4 * GIB, forbidden), "warn", low, f"ulimit -l {4 * GIB // 1024}")
    check(with_limits(INFINITE, INFINITE, forbidden), "warn", f"cannot be locked: {forbidden}", "limits.conf")
    assert "CAP_IPC_LOCK" not in with_limits(8 << 20, 8 << 20, "").found
    write(tmp_path, {"proc/self/status": f"CapEff:\t{1 << 14:016x}"})
    check(with_limits(8 << 20, 8 << 20, ""), "ok", "which CAP_IPC_LOCK lifts")
    assert set(tried) == {offload_opt.OffloadConfig(path=".").host_memory}


def test_locking_is_really_tried() -> None:
    # An ordinary user with a low limit gets an error, a privileged one does not; no one can lock 2**60 bytes.
    assert doctor._try_lock(4096) == ""
    assert doctor._try_lock(1 << 60) == os.strerror(errno.ENOMEM)


LOW_LIMIT = """
import os, resource, sys
from offload_opt import doctor
try:
    if os.geteuid() == 0:
        os.setgid(65534), os.setuid(65534)
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    limit = 8 << 20 if hard == resource.RLIM_INFINITY else min(8 << 20, hard)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
except OSError as error:
    print(error)
    sys.exit(77)
finding = doctor.locked_memory()
assert finding.status == "warn", finding
assert "at most" in finding.found and "limits.conf" in finding.advice, finding
"""


def test_locked_memory_for_an_ordinary_user_with_a_low_limit() -> None:
    """In a child that gives up its privileges, where it has any, and lowers its limit."""
    done = scripts.run(LOW_LIMIT)
    if done.returncode == 77:
        pytest.skip(f"cannot become an ordinary user here: {done.stdout}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("soft", "hard", "status", "advice"),
    [
        (INFINITE, INFINITE, "ok", ""),
        (1024, 4096, "ok", ""),
        (256, 1 << 20, "warn", "ulimit -n 4096"),
        (256, 2000, "warn", "ulimit -n 2000"),
        (256, INFINITE, "warn", "ulimit -n 4096"),
        (256, 256, "warn", "nofile"),
    ],
)
def test_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, status: str, advice: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    check(doctor.open_files(), status, advice=advice)


@pytest.mark.parametrize("count", [1, 3])
def test_threads(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(count)
    if "OpenMP not found" not in torch.__config__.parallel_info():
        check(doctor.threads(), "ok", f"{count}, ")
    monkeypatch.setattr(doctor, "thread_count", lambda: 1)
    if count == 1:
        check(doctor.threads(), "ok", "1, ")
    else:
        check(doctor.threads(), "warn", "to have 3 for its operations, and the codecs of state get 1", "OpenMP library")
        monkeypatch.setattr(doctor, "thread_count", lambda: 2)
        check(doctor.threads(), "warn", "get 2", "see OMP_THREAD_LIMIT and OMP_DYNAMIC")


MEMINFO = "MemTotal:       33554432 kB\nMemFree:         1 kB\nMemAvailable:   16777216 kB\nHugePages_Total:       0"


def test_memory(tmp_path: Path) -> None:
    check(doctor.memory(tmp_path), "ok", "not shown")
    check(doctor.memory(write(tmp_path, {"proc/meminfo": MEMINFO})), "ok", "32.0 GiB, of which 16.0 GiB are available")
    write(tmp_path, {"proc/meminfo": MEMINFO.replace("16777216", " 1048576")})
    check(doctor.memory(tmp_path), "warn", "of which 1.0 GiB", "smaller host_memory than its default of 2.0 GiB")


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/", "sys/fs/cgroup/memory.max"),
        ("0::/pod/box", "sys/fs/cgroup/pod/memory.max"),
        ("9:cpu:/x\n4:memory:/box", "sys/fs/cgroup/memory/box/memory.limit_in_bytes"),
    ],
)
def test_a_containers_limit_of_memory_counts(tmp_path: Path, groups: str, file: str) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups, file: "max"})
    check(doctor.memory(tmp_path), "ok", "16.0 GiB are available")
    write(tmp_path, {file: str(8 * GIB)})
    check(doctor.memory(tmp_path), "ok", "this container may take 8.0 GiB")
    write(tmp_path, {file: str(GIB)})
    check(doctor.memory(tmp_path), "warn", "this container may take 1.0 GiB", "host_memory")


def test_huge_pages(tmp_path: Path) -> None:
    check(doctor.huge_pages(tmp_path), "ok", "does not say")
    write(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never"})
    check(doctor.huge_pages(tmp_path), "ok", "transparent, madvise")
    write(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"})
    check(doctor.huge_pages(tmp_path), "warn", "small pages", "echo madvise")


def test_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check(doctor.gpu(tmp_path), "ok", "none")
    write(tmp_path, {"proc/driver/nvidia/version": "NVRM version"})
    monkeypatch.setattr(torch.version, "cuda", None)
    check(doctor.gpu(tmp_path), "warn", "built without CUDA", "install a CUDA build")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    check(doctor.gpu(tmp_path), "warn", "CUDA 12.8", "nvidia-smi")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["H100", "H100", "L4"][i])
    registered = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: registered.append(address) or 801,
        cudaHostUnregister=lambda address: 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    check(doctor.gpu(tmp_path), "warn", "2 x H100, L4 (CUDA 12.8); cudaHostRegister fails", "locked memory")
    assert registered
    monkeypatch.setattr(doctor, "_registers_with_cuda", lambda: True)
    check(doctor.gpu(tmp_path), "ok", "cudaHostRegister works")


@pytest.mark.gpu
def test_memory_is_known_to_a_real_gpu() -> None:
    check(doctor.gpu(), "ok", "cudaHostRegister works")


# The folder.


def test_a_folder_that_files_cannot_be_made_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(doctor.writable(tmp_path), "ok")

    def refuse(number: int) -> None:
        def refused(**_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)

    refuse(errno.EACCES)
    check(doctor.writable(tmp_path), "fail", "Permission denied", "chmod u+rwx")
    names = {finding.name for finding in doctor.examine_folder(tmp_path)}
    assert "space" in names
    assert not {"direct I/O", "tuned"} & names  # nothing that would need to write there
    refuse(errno.EROFS)
    check(doctor.writable(tmp_path), "fail", "Read-only", "mount it rw")
    refuse(errno.ENOSPC)
    check(doctor.writable(tmp_path), "fail", "No space", "make space")


@pytest.mark.parametrize(
    ("fstype", "options", "status", "found", "advice"),
    [
        ("ext4", "rw,relatime", "ok", "ext4 on /mnt from /dev/x (rw, relatime)", ""),
        ("xfs", "rw", "ok", "xfs", ""),
        ("ext4", "rw,data=journal", "warn", "twice", "data=ordered"),
        ("ext4", "rw,sync", "warn", "waits for the drive", "without sync"),
        ("btrfs", "rw", "warn", "copies what is overwritten", "chattr +C"),
        ("btrfs", "rw,nodatacow", "ok", "btrfs", ""),
        ("nfs4", "rw", "warn", "network", "local NVMe"),
        ("lustre", "rw", "warn", "network", "local NVMe"),
        ("fuse.sshfs", "rw", "warn", "FUSE", "local NVMe"),
        ("tmpfs", "rw", "warn", "in memory", "local NVMe"),
        ("overlay", "rw", "warn", "container", "docker run -v"),
    ],
)
def test_file_system(fstype: str, options: str, status: str, found: str, advice: str) -> None:
    mount = Mount("/mnt", fstype, "/dev/x", tuple(options.split(",")), "259:1")
    check(doctor.file_system(mount), status, found, advice)


def test_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alignment, _ = aio.direct_io(tmp_path)
    if alignment:
        check(doctor.direct_io(tmp_path), "ok", f"aligned to {alignment} bytes")
    else:
        check(doctor.direct_io(tmp_path), "warn", "does not work", "ext4")
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(aio, "direct_io", lambda folder: (0, "Invalid argument"))
    check(doctor.direct_io(tmp_path), "warn", "does not work: Invalid argument", "ext4")


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(free: int, total: int) -> Finding:
        blocks = SimpleNamespace(f_bavail=free // 4096, f_blocks=total // 4096, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda folder: blocks)
        return doctor.space(tmp_path)

    check(of(80 * GIB, 100 * GIB), "ok", "80.0 GiB of 100.0 GiB are free: AdamW for 10.7 billion fp32 parameters")
    check(of(GIB, 100 * GIB), "warn", "AdamW for 134.2 million", "make space")
    check(of(0, 0), "warn", "AdamW for 0", "make space")


def drive(root: Path, device: str = "259:0") -> Drive:
    mounted(root, f"{device} /mnt rw - ext4 /dev/x rw")
    mount = find_mount(Path("/mnt"), device, root)
    assert mount is not None
    (found,) = find_drives(mount, root)
    return found


def test_a_good_drive(tmp_path: Path) -> None:
    nvme(tmp_path)
    finding = doctor.drive(drive(tmp_path))
    assert finding.name == "drive nvme0n1"
    check(
        finding,
        "ok",
        "NVMe, Samsung SSD 990 PRO 1TB, 931.5 GiB, solid state, scheduler none, requests up to 128.0 KiB, "
        "write cache volatile",
    )


@pytest.mark.parametrize(
    ("name", "files", "status", "found", "advice"),
    [
        ("nvme0n1", {"queue__scheduler": "none [mq-deadline]"}, "warn", "sorting", "echo none > /sys/block/nvme0n1"),
        ("nvme0n1", {"device__model": "Amazon Elastic Block Store"}, "warn", "network", "instance store"),
        ("nvme0n1", {"device__model": "Amazon EC2 NVMe Instance Storage"}, "ok", "Instance Storage", ""),
        ("sda", {"queue__rotational": "1"}, "warn", "rotates", "use an NVMe drive"),
        ("sda", {"queue__scheduler": "[mq-deadline] none"}, "ok", "not NVMe", ""),
        ("vda", {"queue__rotational": "1", "device__model": ""}, "ok", "a virtual machine's drive", ""),
        ("sda", {"queue__rotational": "1", "device__model": "QEMU HARDDISK"}, "ok", "a virtual machine's drive", ""),
    ],
)
def test_a_drive_that_lacks_something(
    tmp_path: Path, name: str, files: dict[str, str], status: str, found: str, advice: str
) -> None:
    nvme(tmp_path, name, **files)
    check(doctor.drive(drive(tmp_path)), status, found, advice)


def test_an_encrypted_drive(tmp_path: Path) -> None:
    crypt = block_device(tmp_path, "dm-0", "253:0", dm__uuid="CRYPT-LUKS2-0123")
    stack(crypt, nvme(tmp_path))
    check(doctor.drive(drive(tmp_path, "253:0")), "warn", "under dm-0 (encrypted)", "without encryption")


def test_tuned(tmp_path: Path) -> None:
    check(doctor.tuned(tmp_path), "warn", "no offload-opt.json", f"offload-opt tune {tmp_path}")
    save_tuned(tmp_path, Tuned(AioConfig(), 3e9, 2e9, 2.5e9, "2026-01-02T03:04:05+00:00"))
    check(doctor.tuned(tmp_path), "ok", "2026-01-02")
    assert "engine auto, blocks of 1.0 MiB, queue depth 32, 1 thread; " in doctor.tuned(tmp_path).found
    assert "read 3.00, write 2.00, both at once 2.50 GB/s" in doctor.tuned(tmp_path).found
    (tmp_path / TUNED_FILE).write_text("{")
    check(doctor.tuned(tmp_path), "fail", str(tmp_path / TUNED_FILE), "offload-opt tune")


# Everything.


def test_a_machine_that_shows_nothing_is_no_failure(tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    findings = doctor.examine_machine(root) + doctor.examine_folder(tmp_path, root)
    assert "fail" not in {finding.status for finding in findings}
    assert {"kernel", "memory", "folder", "direct I/O", "space", "tuned"} <= {finding.name for finding in findings}


def test_this_machine_can_offload(tmp_path: Path) -> None:
    findings = doctor.examine_machine() + doctor.examine_folder(tmp_path)
    assert "fail" not in {finding.status for finding in findings}
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        check(finding, finding.status)
    assert list(tmp_path.iterdir()) == []
