"""Who is measured in benchmarks/aio.py: an AioHandle, fio, and DeepSpeed's handle, each doing the same work.

One ``move()`` is one transfer: all of a file read, all of a file written, or ("mixed") one file read while another is
written. Each contender says how many bytes a second that was, without what it takes to start a process or a handle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from _deepspeed import DeepSpeedProcess

from offload_opt import AioHandle
from offload_opt.config import format_bytes

DIRECTIONS = ("read", "write", "mixed")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a transfer is cut up and queued. Each of ``threads`` has ``depth`` requests of ``block_size`` in flight."""

    block_size: int
    depth: int
    threads: int

    def __str__(self) -> str:
        return f"{format_bytes(self.block_size)} x {self.depth} x {self.threads}"


@dataclasses.dataclass(frozen=True)
class Files:
    """Two files of ``size`` bytes that have their space and were written once: one to read, one to write over."""

    read: Path
    write: Path
    size: int

    @classmethod
    def make(cls, folder: Path, content: torch.Tensor) -> Files:
        files = cls(folder / "read.bin", folder / "write.bin", content.nbytes)
        with AioHandle() as handle:
            for path in (files.read, files.write):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                os.posix_fallocate(fd, 0, files.size)
                handle.sync_pwrite(content, path)
                os.fsync(fd)
                os.close(fd)
        return files


class Contender(Protocol):
    name: str

    def move(self, direction: str) -> float:
        """Bytes a second, reads and writes added up."""

    def close(self) -> None: ...


class Ours:
    """An AioHandle. Mixed: one handle, whose queues take both directions in turns, a quarter of the queue each time."""

    def __init__(self, files: Files, setting: Setting, engine: str, buffers: list[torch.Tensor]) -> None:
        self.name = f"offload_opt {engine}"
        self._files, self._setting, self._buffers = files, setting, buffers
        self._handle = AioHandle(setting.block_size, setting.depth, num_threads=setting.threads, engine=engine)
        # Memory is registered with the kernel once as many bytes as it has were moved, so that is done before the clock.
        self.move("read")
        self.move("write")
        self._handle.sync_pread(buffers[0][: setting.block_size], files.read)
        self._handle.sync_pwrite(buffers[1][: setting.block_size], files.write)

    def move(self, direction: str) -> float:
        handle, files = self._handle, self._files
        to_read, to_write = self._buffers
        step = files.size
        if direction == "mixed":
            step = self._setting.threads * max(1, self._setting.depth // 4) * self._setting.block_size
        started = time.perf_counter()
        for offset in range(0, files.size, step):
            if direction != "write":
                handle.async_pread(to_read[offset : offset + step], files.read, offset)
            if direction != "read":
                handle.async_pwrite(to_write[offset : offset + step], files.write, offset)
        handle.wait()
        seconds = time.perf_counter() - started
        return files.size * (2 if direction == "mixed" else 1) / seconds

    def close(self) -> None:
        self._handle.close()


class Fio:
    """fio, by its own clock: the bytes of all jobs over the longest job's run time, which is given in milliseconds.

    Each thread is a job with a part of the file to itself. Mixed: jobs that read and jobs that write, each with half
    the depth. psync has one request a job, so it gets as many jobs as requests are to be in flight. io_uring has its
    buffers and files registered, unless ``registered`` is False.
    """

    def __init__(self, files: Files, setting: Setting, engine: str, *, registered: bool = True) -> None:
        self.name = f"fio {engine}" + ("" if registered or engine != "io_uring" else " unregistered")
        self._files, self._setting, self._engine = files, setting, engine
        self._options = [f"--ioengine={engine}", "--direct=1", f"--bs={setting.block_size}"]
        # Files are used as they are, and nothing of them is in the page cache.
        self._options += ["--fallocate=none", "--overwrite=1", "--invalidate=1"]
        if engine == "io_uring" and registered:
            self._options += ["--fixedbufs=1", "--registerfiles=1"]

    def move(self, direction: str) -> float:
        depth = self._setting.depth
        if direction == "mixed":
            jobs = [*self._job("read", depth - depth // 2), *self._job("write", depth // 2)]
        else:
            jobs = self._job(direction, depth)
        parts = [job[way] for job in self._run(jobs) for way in ("read", "write")]
        return sum(part["io_bytes"] for part in parts) / (max(part["runtime"] for part in parts) / 1000)

    def close(self) -> None:
        pass

    def try_out(self) -> None:
        """One block. Raises RuntimeError where this engine of fio does not work."""
        self._run([*self._job("read", 1), f"--size={self._setting.block_size}"])

    def _run(self, jobs: list[str]) -> list[dict[str, Any]]:
        """The jobs' results. Raises RuntimeError with what fio said."""
        command = ["fio", "--thread", "--output-format=json", *self._options, *jobs]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return list(json.loads(done.stdout[done.stdout.index("{") :])["jobs"])

    def _job(self, direction: str, depth: int) -> list[str]:
        jobs = self._setting.threads * (depth if self._engine == "psync" else 1)
        part = self._files.size // jobs
        path = self._files.read if direction == "read" else self._files.write
        return [
            f"--name={direction}",
            f"--filename={str(path).replace(':', chr(92) + ':')}",  # a bare colon separates file names
            f"--rw={direction}",
            f"--iodepth={1 if self._engine == 'psync' else depth}",
            f"--numjobs={jobs}",
            f"--size={part}",
            f"--offset_increment={part}",
        ]


class DeepSpeed:
    """DeepSpeed's handle, in its own page-locked memory.

    Mixed: two handles, each with half the depth, as DeepSpeed's pipelined swapper takes one to read and one to write.
    """

    name = "DeepSpeed"

    def __init__(self, process: DeepSpeedProcess, setting: Setting) -> None:
        self._process, self._setting = process, setting

    def move(self, direction: str) -> float:
        return self._process.move(direction, **vars(self._setting))

    def close(self) -> None:
        pass


def fio_version() -> tuple[str, str]:
    """(fio's version, ""), or ("", why there is none)."""
    try:
        done = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return "", str(error)
    return done.stdout.strip(), ""
