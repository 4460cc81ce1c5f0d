"""What every benchmark shares: the machine's description, the result file, and a measurement of the drive itself."""

from __future__ import annotations

import datetime
import itertools
import json
import mmap
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import offload_opt

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release().split("-")[0],
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "offload_opt": offload_opt.__version__,
        "date": datetime.date.today().isoformat(),
    }


def save(name: str, settings: dict[str, Any], results: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "settings": settings, "results": results}, indent=2) + "\n")
    return path


class Disk:
    """Measures the drive: reads and writes at once, ``depth`` blocks in flight, past the page cache.

    ``plain()`` is threads with plain system calls and shares no code with the package; ``handle()`` is a bare
    AioHandle. The faster of the two is the limit that benchmarks compare with.
    """

    def __init__(self, folder: Path, nbytes: int, block_size: int, depth: int) -> None:
        self.block_size = block_size
        self.blocks = nbytes // block_size
        self.depth = depth
        self._blocks = [self._touched_block() for _ in range(self.depth)]
        self.paths = [folder / "plain-read.bin", folder / "plain-write.bin"]
        for path in self.paths:
            self._open_and_write(path)

    def mixed(self) -> float:
        """Bytes a second, reads and writes added up: the faster of the two ways."""
        return max(self.plain(), self.handle())

    def plain(self) -> float:
        """With threads. Each reads and writes in turns, so that neither is left to the end."""
        started = time.perf_counter()
        threads = [threading.Thread(target=self._run, args=(i,)) for i in range(self.depth)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 2 * self.blocks * self.block_size / (time.perf_counter() - started)

    def handle(self, goes_on: Callable[[], bool] | None = None) -> float:
        """With an AioHandle, in transfers of 32 blocks; again and again while ``goes_on()``."""
        with offload_opt.AioHandle(self.block_size, self.depth) as handle:
            size = 32 * self.block_size
            offsets: Iterable[int] = range(0, self.blocks * self.block_size // size * size, size)
            buffers = [handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8)) for _ in range(4)]
            under_way: deque[offload_opt.IoFuture] = deque()
            moved, started = 0, time.perf_counter()
            for i, offset in enumerate(offsets if goes_on is None else itertools.cycle(offsets)):
                if goes_on is not None and not goes_on():
                    break
                while len(under_way) >= 4:
                    under_way.popleft().wait()
                    moved += size
                under_way.append(handle.async_pread(buffers[i % 2], self.paths[0], offset))
                under_way.append(handle.async_pwrite(buffers[2 + i % 2], self.paths[1], offset))
            if goes_on is None:
                handle.wait()
                moved += len(under_way) * size
            seconds = time.perf_counter() - started
            handle.wait()
            for buffer in buffers:
                handle.free_cpu_locked_tensor(buffer)
        return moved / seconds

    def close(self) -> None:
        for path in self.paths:
            path.unlink()

    def _touched_block(self) -> mmap.mmap:
        block = mmap.mmap(-1, self.block_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(os.urandom(self.block_size))
        return block

    def _open_and_write(self, path: Path) -> None:
        block = self._blocks[0]
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(fd, 0, self.blocks * self.block_size)
        for i in range(self.blocks):
            os.pwrite(fd, block, i * self.block_size)
        os.close(fd)

    def _run(self, first: int) -> None:
        block = self._blocks[first]
        reads, writes = (os.open(path, os.O_RDWR | os.O_DIRECT) for path in self.paths)
        for i in range(first, self.blocks, self.depth):
            offset = i * self.block_size
            for moved in (os.preadv(reads, [block], offset), os.pwrite(writes, block, offset)):
                if moved != self.block_size:
                    raise OSError(f"{moved} of {self.block_size} bytes")
        os.close(reads)
        os.close(writes)
