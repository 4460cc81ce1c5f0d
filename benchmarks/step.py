"""How long an exact AdamW step takes with its state on disk, beside the limit that the drive sets.

    python benchmarks/step.py /mnt/nvme

Limit: the bytes of a step over the mixed bandwidth of the drive (T_step >= bytes / B_mixed), measured in the same run,
interleaved, with O_DIRECT reads and writes of the same block size and depth: plain system calls in threads, or the bare
handle, whichever is faster in that round. The in-memory row is the same optimizer
without offloading. Medians over the rounds; the ratio is the median of the ratios of each round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _report import Disk, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import offload_opt
from offload_opt.config import AioConfig, parse_bytes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder on the drive to measure")
    parser.add_argument("--parameters", type=float, default=200e6)
    parser.add_argument("--host-memory", default="512MiB")
    parser.add_argument("--unit-size", default=None)
    parser.add_argument("--block-size", default="1MiB")
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="I/O worker threads")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True)")
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


def make_parameters(count: int, width: int = 2048) -> list[torch.nn.Parameter]:
    """The matrices of a transformer, and a small one, until there are ``count`` elements; with gradients."""
    parameters = []
    while count > 0:
        rows = min(4 * width, -(-count // width))
        parameters.append(torch.nn.Parameter(torch.randn(rows, width) * 0.02))
        count -= rows * width
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return parameters


def timed(step: object) -> float:
    started = time.perf_counter()
    step()  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    block_size = parse_bytes(args.block_size, "block-size")
    parameters = make_parameters(int(args.parameters))
    count = sum(p.numel() for p in parameters)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = parameter.grad
    in_memory = torch.optim.AdamW(copies, lr=1e-4, fused=args.fused)
    aio = AioConfig(block_size=block_size, queue_depth=args.depth, num_threads=args.threads, engine=args.engine)

    rows: dict[str, list[float]] = {name: [] for name in ("limit", "offloaded", "in_memory", "wait", "bandwidth")}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, Progress(transient=True) as progress:
        disk = Disk(Path(folder), 1 << 30, block_size, args.depth)
        optimizer = offload_opt.OffloadOptimizer(
            torch.optim.AdamW(parameters, lr=1e-4, fused=args.fused),
            folder,
            host_memory=args.host_memory,
            unit_size=args.unit_size,
            aio=aio,
        )
        for _ in range(2):  # the first step makes the state, the second is the first to read it
            optimizer.step()
            in_memory.step()
        for _ in progress.track(range(args.rounds), description="rounds"):
            optimizer.synchronize()
            bandwidth = disk.mixed()
            before = optimizer.stats
            # Two steps: the reads ahead that the first one finds done are paid for by those that the last one starts.
            seconds = (timed(optimizer.step) + timed(optimizer.step) + timed(optimizer.synchronize)) / 2
            after = optimizer.stats
            moved = (after.bytes_read - before.bytes_read + after.bytes_written - before.bytes_written) / 2
            rows["bandwidth"].append(bandwidth)
            rows["limit"].append(moved / bandwidth)
            rows["offloaded"].append(seconds)
            rows["wait"].append((after.io_wait_seconds - before.io_wait_seconds) / 2)
            rows["in_memory"].append(timed(in_memory.step))
        stats = optimizer.stats
        optimizer.close()
        disk.close()

    ratio = statistics.median(a / b for a, b in zip(rows["offloaded"], rows["limit"], strict=True))
    median = {name: statistics.median(values) for name, values in rows.items()}
    table = Table(title=f"AdamW step, {count / 1e6:.0f} M fp32 parameters, state {stats.state_bytes / 2**30:.2f} GiB")
    for column in ("", "seconds", "x limit", "M parameters/s"):
        table.add_column(column, justify="left" if not column else "right")
    for label, name in (("limit of the drive", "limit"), ("offloaded", "offloaded"), ("in memory", "in_memory")):
        shown = ratio if name == "offloaded" else median[name] / median["limit"]
        table.add_row(label, f"{median[name]:.3f}", f"{shown:.2f}", f"{count / median[name] / 1e6:.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"{moved / 1e9:.2f} GB a step; mixed O_DIRECT {median['bandwidth'] / 1e9:.2f} GB/s with {args.depth} x "
        f"{args.block_size}; waiting for I/O {median['wait']:.3f} s; buffers {stats.host_memory_bytes / 2**20:.0f} MiB"
    )
    if not args.no_save:
        settings = {name: value for name, value in vars(args).items() if name not in ("folder", "no_save")}
        results = {
            "ratio_to_limit": ratio,
            "bytes_per_step": moved,
            "parameters": count,
            "median": median,
            "rounds": rows,
        }
        console.print(f"written to {save('step', settings, results)}")


if __name__ == "__main__":
    main()
