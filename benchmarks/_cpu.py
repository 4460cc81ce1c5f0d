"""What a 4 KiB random read costs in CPU time, with the kernel's registered buffers and files and without."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from offload_opt import AioHandle

BLOCK = 4096
DEPTH = 32
# Reads that are handed over before they are waited for: many queues full, so that the queue seldom runs dry.
BATCH = 2048

MODES = {"registered": True, "unregistered": False}


def cpu_per_op(
    path: Path, size: int, operations: int, pairs: int, engine: str, tick: Callable[[str], None]
) -> dict[str, Any]:
    """CPU microseconds of one read, and reads a second: by mode, one for each pair.

    Compared is the time of the handle's own thread, which hands requests to the kernel and takes completions back: that
    is where registration matters. The caller's thread, mostly Python, does the same in both modes.
    """
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    handles = {mode: AioHandle(BLOCK, DEPTH, engine=engine, registered=on) for mode, on in MODES.items()}
    example = torch.empty(0, dtype=torch.uint8)
    memory = {mode: handle.new_cpu_locked_tensor(BATCH * BLOCK, example) for mode, handle in handles.items()}
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    shuffled = random.Random(0)
    try:
        for pair in range(-1, pairs):  # the first is for warming up
            offsets = [BLOCK * shuffled.randrange(size // BLOCK) for _ in range(operations)]
            for mode in shuffled.sample(sorted(MODES), len(MODES)):
                tick(f"4 KiB random reads, {mode}")
                figures = _run(handles[mode], list(memory[mode].split(BLOCK)), fd, offsets)
                if pair >= 0:
                    runs[mode].append(figures)
    finally:
        os.close(fd)
        for mode, handle in handles.items():
            handle.free_cpu_locked_tensor(memory[mode])
            handle.close()
    both = list(zip(runs["registered"], runs["unregistered"], strict=True))
    return {
        "operations": operations,
        "engine": engine,
        "median": {
            mode: {figure: median(run[figure] for run in row) for figure in row[0]} for mode, row in runs.items()
        },
        "ratio": median(a["handle"] / b["handle"] for a, b in both),
        "ratio_of_process": median(a["process"] / b["process"] for a, b in both),
        "pairs_cheaper": sum(a["handle"] < b["handle"] for a, b in both),
        "pairs": runs,
    }


def _run(handle: AioHandle, blocks: list[torch.Tensor], fd: int, offsets: list[int]) -> dict[str, float]:
    process, caller, started = _cpu_seconds(resource.RUSAGE_SELF), time.thread_time(), time.perf_counter()
    for first in range(0, len(offsets), BATCH):
        for block, offset in zip(blocks, offsets[first : first + BATCH], strict=False):
            handle.async_pread(block, fd, offset)
        handle.wait()
    seconds = time.perf_counter() - started
    process, caller = _cpu_seconds(resource.RUSAGE_SELF) - process, time.thread_time() - caller
    micro = 1e6 / len(offsets)
    return {
        "handle": (process - caller) * micro,
        "process": process * micro,
        "per_second": len(offsets) / seconds,
    }


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime
