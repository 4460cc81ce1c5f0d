"""How much memory an offloaded optimizer takes: the peak resident set, over that of a run without optimizer state.

    python benchmarks/memory.py /mnt/nvme

Three processes take the same steps over the same parameters and gradients: SGD without momentum, which keeps no state;
AdamW offloaded; AdamW in memory. Each reports the peak that the kernel counted for it (VmHWM), page-locked buffers
included, but not the pages of libraries: the kernel drops them where memory is short, and maps four times as many of a
library that was just installed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _report import save
from rich.console import Console
from rich.table import Table

import offload_opt
from offload_opt.config import parse_bytes

MIB = 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder on the drive to use")
    parser.add_argument("--state", default="1GiB", help="size of the optimizer state (default: %(default)s)")
    parser.add_argument("--host-memory", default="128MiB")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--run", choices=["none", "offloaded", "memory"], help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """One process's work. Prints its peak in bytes, and the state's size."""
    width = 2048
    rows = parse_bytes(args.state, "state") // 8 // width
    shapes = [(min(4 * width, rows - i), width) for i in range(0, rows, 4 * width)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer: torch.optim.Optimizer
    if args.run == "none":
        optimizer = torch.optim.SGD(parameters, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    if args.run == "offloaded":
        optimizer = offload_opt.OffloadOptimizer(optimizer, args.folder, host_memory=args.host_memory)
    for _ in range(args.steps):
        optimizer.step()
    state = optimizer.stats.state_bytes if isinstance(optimizer, offload_opt.OffloadOptimizer) else 0
    counts = dict(re.findall(r"(VmHWM|RssFile):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    print(json.dumps({"peak": (int(counts["VmHWM"]) - int(counts["RssFile"])) * 1024, "state": state}))


def measure(args: argparse.Namespace, kind: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        options = ["--state", args.state, "--host-memory", args.host_memory, "--steps", str(args.steps), "--run", kind]
        done = subprocess.run([sys.executable, __file__, folder, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def main() -> None:
    args = parse()
    if args.run:
        run(args)
        return
    peaks = {kind: measure(args, kind) for kind in ("none", "offloaded", "memory")}
    growth = {kind: peaks[kind]["peak"] - peaks["none"]["peak"] for kind in ("offloaded", "memory")}
    table = Table(title=f"Peak resident set, {peaks['offloaded']['state'] / MIB:.0f} MiB of AdamW state")
    for column in ("", "MiB", "over no state, MiB"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("no optimizer state", f"{peaks['none']['peak'] / MIB:.0f}", "")
    table.add_row(
        f"offloaded, {args.host_memory}", f"{peaks['offloaded']['peak'] / MIB:.0f}", f"{growth['offloaded'] / MIB:.0f}"
    )
    table.add_row("in memory", f"{peaks['memory']['peak'] / MIB:.0f}", f"{growth['memory'] / MIB:.0f}")
    Console().print(table)
    results = {"peak_bytes": {k: v["peak"] for k, v in peaks.items()}, "growth_bytes": growth}
    if args.no_save:
        print(json.dumps(results))
    else:
        settings = {"state": args.state, "host_memory": args.host_memory, "steps": args.steps}
        print(f"written to {save('memory', settings, results)}")


if __name__ == "__main__":
    main()
