"""A model that cannot be trained in the memory that there is, trained: its optimizer state is on the drive.

    python examples/beyond_memory.py /mnt/nvme

A GPT of a billion bf16 parameters takes 2 GB, and its gradients as much. AdamW with fp32 masters takes 12 GB more,
which a process of 6 GiB does not have. ``train`` does both, each in a process of its own, which is killed with SIGKILL
when it takes more than ``--memory``, as a kernel or a batch system would do.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from gpt import GPT, HEAD, Formatter, batches, directory, positive, standard_library, width
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from offload_opt import OffloadOptimizer
from offload_opt.config import format_bytes, parse_bytes

WAYS = {"memory": "in memory", "drive": "offloaded"}


class MastersInMemory:
    """AdamW over fp32 copies of the parameters, as one writes it by hand."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        self.parameters = parameters
        self.masters = [torch.nn.Parameter(p.detach().float()) for p in parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, fused=True)

    def step(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        self.optimizer.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.detach().copy_(master)
            master.grad = None


def multiply_in_fp32(model: torch.nn.Module) -> None:
    """Have the linear layers cast a bf16 weight as they use it.

    What a processor without bf16 instructions is given in bf16, torch multiplies by one thread, some fifty times as
    slowly.
    """

    def multiply(linear: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        bias = None if linear.bias is None else linear.bias.float()
        return F.linear(inputs.float(), linear.weight.float(), bias).to(inputs.dtype)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            # Checkpointed: backward casts the weight anew, where else an fp32 copy of all of them would be kept.
            module.forward = partial(checkpoint, partial(multiply, module), use_reentrant=False)  # type: ignore[method-assign]


def train(args: argparse.Namespace, way: str) -> None:
    """Train some steps one way, and say what each was."""
    torch.manual_seed(args.seed)
    torch.set_default_dtype(torch.bfloat16)  # from the beginning: in fp32 the weights alone would take 4 GB
    model = GPT(args.layers, args.width, args.width // HEAD, args.context)
    multiply_in_fp32(model)
    parameters = list(model.parameters())
    optimizer: MastersInMemory | OffloadOptimizer
    if way == "memory":
        optimizer = MastersInMemory(parameters, args.lr)
    else:
        optimizer = OffloadOptimizer(
            torch.optim.AdamW(parameters, lr=args.lr, fused=True),
            args.folder,
            host_memory=args.host_memory,
            master_weights=True,  # fp32, of which the drive has what the bf16 weight lacks
            state_dtype=args.state_dtype,
            durability="scratch",  # nothing is to be taken up later: half of the space
        )
    print(json.dumps({"parameters": sum(p.numel() for p in parameters)}), flush=True)
    text = batches(standard_library(), args.batch, args.context, args.seed)
    for _ in range(args.steps):
        started = time.perf_counter()
        loss = model(next(text))
        loss.backward()
        stepped = time.perf_counter()
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        ended = time.perf_counter()
        print(json.dumps({"loss": loss.item(), "step": ended - stepped, "all": ended - started}), flush=True)


@dataclass
class Run:
    """What became of a process: its reports, its largest memory in bytes, and the signal that ended it, or 0."""

    lines: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0
    killed: int = 0


def watch(args: argparse.Namespace, way: str) -> Run:
    """Run ``train`` in a process of its own, and kill it when it takes more memory than it may."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--folder-of-run", folder]
        process = subprocess.Popen(command, stdout=output)
        run = Run()
        try:
            with Console(stderr=True).status("") as status:
                while process.poll() is None:
                    run.peak = max(run.peak, resident(process.pid))
                    if run.peak > args.memory:
                        process.kill()
                    most = f"{format_bytes(run.peak)} at most, of {format_bytes(args.memory)}"
                    status.update(f"training {WAYS[way]}: {most}")
                    time.sleep(0.005)
        finally:
            process.kill()
        output.seek(0)
        run.lines = [json.loads(line) for line in output]
    run.killed = max(0, -process.returncode)
    if run.killed not in (0, signal.SIGKILL) or process.returncode > 0:
        raise SystemExit(f"training {WAYS[way]} failed with status {process.returncode}")
    return run


def resident(pid: int) -> int:
    """Bytes of memory that a process takes; 0 when it has ended."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except FileNotFoundError:
        return 0
    return int(found[1]) << 10 if found else 0


def show(args: argparse.Namespace, runs: dict[str, Run]) -> None:
    console = Console()
    parameters = max(run.lines[0]["parameters"] for run in runs.values() if run.lines)
    table = Table(title=f"GPT of {parameters / 1e6:.1f} M bf16 parameters, in {format_bytes(args.memory)} of memory")
    table.add_column("")
    for name in runs:
        table.add_column(WAYS[name], justify="right")

    def row(label: str, *values: str) -> None:
        table.add_row(label, *values)

    steps = {name: run.lines[1:] for name, run in runs.items()}
    row("steps", *(f"{len(steps[name])} of {args.steps}" + ", killed" * (run.killed > 0) for name, run in runs.items()))
    row("most memory", *(format_bytes(run.peak) for run in runs.values()))
    for label, index in (("loss at the first step", 0), ("loss at the last step", -1)):
        row(label, *(f"{lines[index]['loss']:.4f}" if lines else "-" for lines in steps.values()))
    for label, part in (("optimizer step", "step"), ("whole iteration", "all")):
        # The first step makes the state.
        row(
            label, *(f"{min(line[part] for line in lines[1:]):.1f} s" if lines[1:] else "-" for lines in steps.values())
        )
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("folder", type=directory, help="a folder on the drive that is to hold the optimizer state")
    parser.add_argument("--memory", default="6GiB", help="what a process may take")
    parser.add_argument("--host-memory", default="256MiB", help="bound of the state's share of it")
    parser.add_argument("--state-dtype", default="exact", choices=("exact", "bf16", "int8"), help="of the two moments")
    parser.add_argument("--steps", type=positive, default=3, help="steps to train")
    parser.add_argument("--layers", type=positive, default=20, help="layers of the model")
    parser.add_argument("--width", type=width, default=2048, help=f"width of the model, a multiple of {HEAD}")
    parser.add_argument("--context", type=positive, default=64, help="bytes of text in a sequence")
    parser.add_argument("--batch", type=positive, default=1, help="sequences in a step")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the text")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder-of-run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.memory = parse_bytes(args.memory, "--memory")
    return args


def main() -> None:
    args = parse()
    if args.way:
        args.folder = args.folder_of_run
        train(args, args.way)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    show(args, {way: watch(args, way) for way in WAYS})


if __name__ == "__main__":
    main()
