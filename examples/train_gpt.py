"""Train a small GPT with its Adam state on disk, and see that nothing changes but the memory.

python examples/train_gpt.py                                          # in memory, as usual
python examples/train_gpt.py --offload /mnt/nvme/run1                 # the state on disk
python examples/train_gpt.py --offload /mnt/nvme/run1 --compare       # both, from the same seed, side by side
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from gpt import GPT, HEAD, Formatter, batches, directory, positive, standard_library, width
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from offload_opt import OffloadOptimizer, SwapStats


@dataclass
class Run:
    """What one training run left behind."""

    losses: list[torch.Tensor]
    weights: list[torch.Tensor]
    seconds: float
    step_seconds: float
    stats: SwapStats | None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--offload", type=directory, metavar="DIR", help="keep the optimizer state in this folder; else in memory")
    add("--host-memory", default="24MiB", metavar="SIZE", help="host memory for optimizer state")
    add("--compare", action="store_true", help="train in memory too, and compare")
    add("--steps", type=positive, default=110, help="optimizer steps")
    add("--layers", type=positive, default=8, help="layers of the model")
    add("--width", type=width, default=512, help=f"width of the model, a multiple of {HEAD}")
    add("--batch", type=positive, default=4, help="sequences a step")
    add("--context", type=positive, default=128, help="bytes of text in a sequence")
    add("--lr", type=float, default=1e-3, help="the highest learning rate")
    add("--seed", type=int, default=1, help="of the weights and of the order of the text")
    add("--device", default="cpu", help="where the model is, such as cuda")
    args = parser.parse_args()
    if args.compare and args.offload is None:
        parser.error("--compare needs --offload DIR: the folder for the offloaded run")
    return args


def train(args: argparse.Namespace, text: torch.Tensor, folder: Path | None) -> Run:
    """Train from the seed, with the optimizer state in ``folder`` or, without one, in memory."""
    torch.manual_seed(args.seed)
    model = GPT(args.layers, args.width, args.width // HEAD, args.context).to(args.device)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    if folder is not None:
        optimizer = OffloadOptimizer(optimizer, folder, host_memory=args.host_memory)  # the one line that differs
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)

    losses, step_seconds, started = [], 0.0, time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("in memory" if folder is None else "offloaded", total=args.steps, loss="")
        for tokens in islice(batches(text, args.batch, args.context, args.seed), args.steps):
            loss = model(tokens.to(args.device))
            loss.backward()
            before = time.perf_counter()
            optimizer.step()
            step_seconds += time.perf_counter() - before
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            progress.update(bar, advance=1, loss=f"{loss.item():.4f}")
    run = Run(losses, [p.detach() for p in model.parameters()], time.perf_counter() - started, step_seconds, None)
    if isinstance(optimizer, OffloadOptimizer):
        optimizer.synchronize()
        run.stats = optimizer.stats
        optimizer.close()
    return run


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> str:
    """Whether two lists of tensors are equal, in words."""
    different = sum(not torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return "bit-equal" if different == 0 else f"{different} of {len(a)} DIFFER"


def size(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def report(args: argparse.Namespace, plain: Run | None, offloaded: Run) -> Table:
    """The table at the end. ``plain`` is the run in memory, where there was one."""
    stats = offloaded.stats
    assert stats is not None
    parameters = sum(weight.numel() for weight in offloaded.weights)
    steps = "1 step" if args.steps == 1 else f"{args.steps} steps"
    table = Table(title=f"GPT of {parameters / 1e6:.1f} M parameters, {steps} of AdamW")
    table.add_column()
    for name in ("in memory", "offloaded") if plain else ("offloaded",):
        table.add_column(name, justify="right")

    def row(label: str, of_plain: str, of_offloaded: str) -> None:
        table.add_row(label, *([of_plain] if plain else []), of_offloaded)

    for step in sorted({0, args.steps // 2, args.steps - 1}):
        row(
            f"loss at step {step + 1}",
            f"{plain.losses[step].item():.6f}" if plain else "",
            f"{offloaded.losses[step].item():.6f}",
        )
    if plain:
        row(
            "the loss" if args.steps == 1 else f"all {args.steps} losses", "", same_bits(plain.losses, offloaded.losses)
        )
        row("weights at the end", "", same_bits(plain.weights, offloaded.weights))
    row("optimizer state", size(8 * parameters), size(stats.state_bytes))
    row("host memory for it", size(8 * parameters), size(stats.host_memory_bytes))
    row("read from disk", "", size(stats.bytes_read))
    row("written to disk", "", size(stats.bytes_written))
    row(
        "optimizer step",
        f"{1e3 * plain.step_seconds / args.steps:.0f} ms" if plain else "",
        f"{1e3 * stats.step_seconds / args.steps:.0f} ms",
    )
    row("  of it waiting for I/O", "", f"{1e3 * stats.io_wait_seconds / args.steps:.0f} ms")
    row(
        "whole iteration",
        f"{1e3 * plain.seconds / args.steps:.0f} ms" if plain else "",
        f"{1e3 * offloaded.seconds / args.steps:.0f} ms",
    )
    return table


def main() -> None:
    args = parse()
    text = standard_library()
    plain = train(args, text, None) if args.compare or args.offload is None else None
    if args.offload is None:
        return
    args.offload.mkdir(parents=True, exist_ok=True)
    offloaded = train(args, text, args.offload)
    Console().print(report(args, plain, offloaded))
    if plain and "DIFFER" in same_bits(plain.losses + plain.weights, offloaded.losses + offloaded.weights):
        raise SystemExit("the offloaded run is not the run in memory")


if __name__ == "__main__":
    main()
