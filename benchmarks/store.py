"""What it costs that the state survives: commits, snapshots, and a checkpoint through ``state_dict()``.

    python benchmarks/store.py /mnt/nvme

- The same AdamW steps with each ``durability``, which take turns in shuffled order; two steps and the wait for their
  last write or commit are timed at once. "step + weights" has ``persist_params``, too. The ratio is the median of the
  ratios of each round.
- A snapshot, and beside it a copy of the files that it links, brought to the device, in turns. Then the steps after a
  snapshot: the first one writes into fresh files, the later ones are to be as fast as without a snapshot.
- Peak anonymous memory (RssAnon, sampled from outside) of ``torch.save(optimizer.state_dict(), file)`` and of
  ``load_state_dict(torch.load(file, mmap=True))``, over what the process had before. Pages that are mapped from a file
  are not counted: the kernel drops them where memory is short.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _report import save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from offload_opt import OffloadOptimizer
from offload_opt.config import format_bytes, parse_bytes

MODES: dict[str, dict[str, Any]] = {
    "scratch": {"durability": "scratch"},
    "snapshot": {"durability": "snapshot"},
    "step": {"durability": "step"},
    "step + weights": {"durability": "step", "persist_params": True},
}
SNAPSHOT_ROWS = ("snapshot", "delete the one before", "copy", "plain step", "first step", "later step")
MEMORY_KINDS = ("save", "load", "hold")
"""The last one holds all state in memory, to show that the measurement sees that."""
TARGETS = {"step": 1.1, "snapshot": 0.1, "memory": 64 << 20}
_SETTLE = 0.4
"""Seconds in which what an optimizer reads ahead comes to an end before another one's turn."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder on the drive to measure")
    parser.add_argument("--parameters", type=float, default=200e6)
    parser.add_argument("--host-memory", default="128MiB", help="of the steps (default: %(default)s)")
    parser.add_argument("--state", default="2GiB", help="size of the state that is snapshot (default: %(default)s)")
    parser.add_argument("--saved", default="1GiB", help="size of the state that is saved (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=["steps", "snapshot", "memory"], help="a part of it")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--run", choices=MEMORY_KINDS, help=argparse.SUPPRESS)
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


@contextlib.contextmanager
def wrapped(parameters: list[torch.nn.Parameter], folder: Path, **fields: Any) -> Iterator[OffloadOptimizer]:
    with (
        tempfile.TemporaryDirectory(dir=folder) as store,
        OffloadOptimizer(torch.optim.AdamW(parameters, lr=1e-4), store, **fields) as optimizer,
    ):
        for _ in range(3):  # the first step makes the state; then both slots of each unit have been written once
            optimizer.step()
        yield optimizer


def steps(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Seconds of a step with each durability."""
    torch.manual_seed(0)
    rows: dict[str, list[float]] = {mode: [] for mode in MODES}
    with contextlib.ExitStack() as stack:
        optimizers = {}
        gradients = make_parameters(int(args.parameters))
        for mode, fields in MODES.items():
            copies = [torch.nn.Parameter(p.detach().clone()) for p in gradients]
            for copy, parameter in zip(copies, gradients, strict=True):
                copy.grad = parameter.grad
            optimizers[mode] = stack.enter_context(wrapped(copies, args.folder, host_memory=args.host_memory, **fields))
        for _ in progress.track(range(args.rounds), description="steps"):
            for mode in random.sample(sorted(MODES), len(MODES)):
                optimizer = optimizers[mode]
                optimizer.synchronize()
                time.sleep(_SETTLE)
                seconds = (timed(optimizer.step) + timed(optimizer.step) + timed(optimizer.synchronize)) / 2
                rows[mode].append(seconds)
    return {
        "median": {mode: statistics.median(row) for mode, row in rows.items()},
        "ratio": {
            mode: statistics.median(a / b for a, b in zip(row, rows["scratch"], strict=True))
            for mode, row in rows.items()
        },
        "rounds": rows,
    }


def snapshots(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Seconds of a snapshot and of a copy, and of the steps after a snapshot."""
    torch.manual_seed(0)
    rows: dict[str, list[float]] = {name: [] for name in SNAPSHOT_ROWS}
    parameters = make_parameters(parse_bytes(args.state, "state") // 8)
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as kept,
        wrapped(parameters, args.folder, host_memory=args.host_memory) as optimizer,
    ):
        nbytes = optimizer.stats.state_bytes

        def whole_step() -> None:
            optimizer.step()
            optimizer.synchronize()

        for number in progress.track(range(args.rounds), description="snapshots"):
            whole_step()
            rows["plain step"].append(timed(whole_step))
            before, directory = Path(kept) / str(number - 1), Path(kept) / str(number)
            rows["snapshot"].append(timed(lambda directory=directory: optimizer.snapshot(directory)))
            if before.exists():  # as keep=1 does it: what the newest one has is never given up before the next is there
                rows["delete the one before"].append(timed(lambda before=before: shutil.rmtree(before)))
            rows["first step"].append(timed(whole_step))
            whole_step()
            rows["later step"].append(timed(whole_step))
            rows["copy"].append(timed(lambda directory=directory: copy(directory, Path(kept) / "copy")))
            shutil.rmtree(Path(kept) / "copy")
            os.sync()
    pairs = zip(rows["snapshot"], rows["copy"], strict=True)
    later = zip(rows["later step"], rows["plain step"], strict=True)
    return {
        "state_bytes": nbytes,
        "median": {name: statistics.median(row) for name, row in rows.items()},
        "snapshot_to_copy": statistics.median(a / b for a, b in pairs),
        "later_to_plain": statistics.median(a / b for a, b in later),
        "rounds": rows,
    }


def copy(source: Path, target: Path) -> None:
    """Copy a snapshot as a person would, and bring it to the device."""
    shutil.copytree(source, target)
    for path in target.rglob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of anonymous memory while state is saved, and while it is loaded, over those before."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return {kind: watch(args, Path(folder), kind) for kind in MEMORY_KINDS}


def watch(args: argparse.Namespace, folder: Path, kind: str) -> int:
    """Run ``kind`` in a process of its own; it says when it begins, and waits for an answer."""
    command = [sys.executable, __file__, str(folder), "--saved", args.saved, "--run", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"the process that was to {kind} failed")
        before = peak = anonymous(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                peak = max(peak, anonymous(process.pid))
            time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"the process that was to {kind} failed")
    return peak - before


def anonymous(pid: int) -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    if not found:
        raise ValueError("the process has ended")
    return int(found[1]) * 1024


def run(args: argparse.Namespace) -> None:
    """What is watched: the work between "ready" and the end of the process."""
    parameters = make_parameters(parse_bytes(args.saved, "saved") // 8)
    file = args.folder / "saved.pt"
    with wrapped(parameters, args.folder, host_memory="128MiB") as optimizer:
        optimizer.synchronize()
        print("ready", flush=True)
        sys.stdin.readline()
        if args.run == "save":
            torch.save(optimizer.state_dict(), file)
        elif args.run == "load":
            optimizer.load_state_dict(torch.load(file, mmap=True))
        else:
            held = [{name: torch.clone(v) for name, v in state.items()} for state in optimizer.state.values()]
            print(len(held))


def show(console: Console, results: dict[str, Any], args: argparse.Namespace) -> None:
    if "steps" in results:
        table = Table(title=f"AdamW step, {args.parameters / 1e6:.0f} M fp32 parameters, by durability")
        for column in ("", "seconds", "x scratch"):
            table.add_column(column, justify="right" if column else "left")
        for mode, seconds in results["steps"]["median"].items():
            table.add_row(mode, f"{seconds:.3f}", f"{results['steps']['ratio'][mode]:.3f}")
        console.print(table)
    if "snapshot" in results:
        found = results["snapshot"]
        table = Table(title=f"A snapshot of {format_bytes(found['state_bytes'])} of state")
        for column in ("", "seconds", "ratio"):
            table.add_column(column, justify="right" if column else "left")
        ratios = {
            "snapshot": f"{found['snapshot_to_copy']:.3f} x copy",
            "later step": f"{found['later_to_plain']:.3f} x plain step",
        }
        for name, seconds in found["median"].items():
            table.add_row(name, f"{seconds:.3f}", ratios.get(name, ""))
        console.print(table)
    if "memory" in results:
        for kind, nbytes in results["memory"].items():
            console.print(f"to {kind} {args.saved} of state: {format_bytes(nbytes)} of memory at the peak")


def main() -> None:
    args = parse()
    if args.run:
        run(args)
        return
    parts = args.only or ["steps", "snapshot", "memory"]
    results: dict[str, Any] = {}
    with Progress(transient=True) as progress:
        if "steps" in parts:
            results["steps"] = steps(args, progress)
        if "snapshot" in parts:
            results["snapshot"] = snapshots(args, progress)
    if "memory" in parts:
        results["memory"] = memory(args)
    console = Console()
    show(console, results, args)
    if args.no_save:
        print(json.dumps(results))
    else:
        chosen = {name: value for name, value in vars(args).items() if name not in ("folder", "no_save", "run")}
        console.print(f"written to {save('store', {**chosen, 'targets': TARGETS}, results)}")


if __name__ == "__main__":
    main()
