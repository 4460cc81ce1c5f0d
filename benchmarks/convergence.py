"""Whether training is as good with rounded optimizer state: a small GPT's loss, at several seeds.

    python benchmarks/convergence.py
    python benchmarks/convergence.py --dtype fp32

The GPT of examples/gpt.py learns the sources of Python's standard library; the last tenth of them is never trained on,
and gives the validation loss. Compared are torch's AdamW, fused, on fp32 parameters; ours around it with exact, bf16
and int8 state, on bf16 parameters with fp32 masters (or, with ``--dtype fp32``, on fp32 parameters); bitsandbytes'
8-bit AdamW on fp32 parameters, where it is installed (`pip install --no-deps bitsandbytes`); and, as a check that lost
precision would be seen here, torch's AdamW on bf16 parameters that have no masters.

The same seed is the same initial weights and the same batches for everybody. Each run has a process and one thread; the
contenders take turns within a seed. Validation is in fp32, of the weights that the model was trained with. After Ctrl-C
the seeds that were finished are reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import logging
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, machine, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from offload_opt import OffloadOptimizer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from gpt import GPT, HEAD, batches, positive, standard_library, width

VALIDATION = 0.1  # of the text
VALIDATION_SEED = 2**31
HOST_MEMORY = "1MiB"  # less than the state, so that it moves
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TORCH, EXACT, NO_MASTERS, INT8 = "torch AdamW", "ours, exact", "torch AdamW, no masters", "ours, int8"


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer, made by ``make(parameters, lr, folder)``, and the parameters that it has."""

    dtype: str
    parameters: str  # in words
    make: Callable[[Iterable[torch.nn.Parameter], float, str], torch.optim.Optimizer]


def plain(parameters: Iterable[torch.nn.Parameter], lr: float, folder: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr, fused=True)


def ours(state_dtype: str, masters: bool) -> Callable[..., torch.optim.Optimizer]:
    def make(parameters: Iterable[torch.nn.Parameter], lr: float, folder: str) -> torch.optim.Optimizer:
        return OffloadOptimizer(
            torch.optim.AdamW(parameters, lr, fused=True),
            folder,
            master_weights=masters,
            state_dtype=state_dtype,
            host_memory=HOST_MEMORY,
            durability="scratch",
        )

    return make


def bitsandbytes(parameters: Iterable[torch.nn.Parameter], lr: float, folder: str) -> torch.optim.Optimizer:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are not used here
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr, weight_decay=0.01)  # torch's default


def contenders(dtype: str) -> dict[str, Contender]:
    masters = dtype == "bf16"
    words = "bf16, fp32 masters" if masters else "fp32"
    found = {TORCH: Contender("fp32", "fp32", plain)}
    for kind in ("exact", "bf16", "int8"):
        found[f"ours, {kind}"] = Contender(dtype, words, ours(kind, masters))
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes, 8-bit"] = Contender("fp32", "fp32", bitsandbytes)
    return found | {NO_MASTERS: Contender("bf16", "bf16", plain)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="bf16", help="parameters of ours: bf16 ones have fp32 masters")
    add("--seeds", type=positive, default=5, help="how many")
    add("--steps", type=positive, default=1000)
    add("--layers", type=positive, default=2)
    add("--width", type=width, default=128, help=f"a multiple of {HEAD}")
    add("--batch", type=positive, default=8)
    add("--context", type=positive, default=48)
    add("--lr", type=float, default=1e-3, help="the highest; it warms up and decays")
    add("--points", type=positive, default=50, help="of the training curve: means over the steps between them")
    add("--validation-batches", type=positive, default=40, help="of 32 sequences")
    add("--jobs", type=positive, default=2, help="runs at a time, with a thread each")
    add("--folder", help="for the state; else a temporary one")
    add("--no-save", action="store_true")
    return parser.parse_args()


def train(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    contender = contenders(args.dtype)[name]
    text = standard_library()
    held_out = int(len(text) * VALIDATION)
    torch.manual_seed(seed)
    model = GPT(args.layers, args.width, args.width // HEAD, args.context).to(DTYPES[contender.dtype])
    model.head.register_forward_hook(lambda module, inputs, logits: logits.float())  # a loss in bf16 has 3 digits
    losses, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="convergence-", dir=args.folder) as folder:
        optimizer = contender.make(model.parameters(), args.lr, folder)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, args.lr, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
        )
        for tokens in itertools.islice(batches(text[:-held_out], args.batch, args.context, seed), args.steps):
            loss = model(tokens)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        bytes_read = 0
        if isinstance(optimizer, OffloadOptimizer):
            optimizer.synchronize()
            bytes_read = optimizer.stats.bytes_read
            optimizer.close()
    seconds = time.perf_counter() - started
    model.float()
    unseen = batches(text[-held_out:], 32, args.context, VALIDATION_SEED)
    with torch.no_grad():
        validation = [model(tokens).item() for tokens in itertools.islice(unseen, args.validation_batches)]
    return {
        "validation": statistics.mean(validation),
        "training": thinned(losses, args.points),
        "seconds": round(seconds, 1),
        "bytes_read": bytes_read,
    }


def thinned(losses: list[float], points: int) -> list[float]:
    """The means of stretches of equal length."""
    length = max(1, len(losses) // points)
    return [round(statistics.mean(losses[i : i + length]), 5) for i in range(0, len(losses) - length + 1, length)]


def deaf() -> None:
    """A worker's run is not ended by Ctrl-C, but with its parent: it would go on to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def measure(args: argparse.Namespace, console: Console) -> dict[str, list[dict[str, Any]]]:
    """The runs of each contender, by seed."""
    names = list(contenders(args.dtype))
    context = multiprocessing.get_context("spawn")
    with Progress(transient=True, console=console) as progress, ProcessPoolExecutor(args.jobs, context, deaf) as pool:
        bar = progress.add_task("training", total=len(names) * args.seeds)
        started = {pool.submit(train, args, name, seed): (name, seed) for seed in range(args.seeds) for name in names}
        try:
            for future in as_completed(started):
                name, seed = started[future]
                run = future.result()
                console.print(f"seed {seed}, {name}: {run['validation']:.4f} in {run['seconds']:.0f} s")
                progress.advance(bar)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # waits for the runs that are under way
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    runs = {key: future.result() for future, key in started.items() if not future.cancelled()}
    finished = [seed for seed in range(args.seeds) if all((name, seed) in runs for name in names)]
    if not finished:
        raise SystemExit("no seed was finished")
    return {name: [runs[name, seed] for seed in finished] for name in names}


def spread(values: list[float]) -> dict[str, Any]:
    """Values by seed, their mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return {"mean": statistics.mean(values), "spread": deviation, "seeds": values}


def summary(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What is saved of each contender."""
    losses = {name: [run["validation"] for run in by_seed] for name, by_seed in runs.items()}

    def to(other: str, name: str) -> dict[str, Any]:
        return spread([mine - its for mine, its in zip(losses[name], losses[other], strict=True)])

    return {
        name: {
            "parameters": contender.parameters,
            "validation": spread(losses[name]),
            "to_torch": to(TORCH, name),
            "to_exact": to(EXACT, name),
            **{figure: [run[figure] for run in runs[name]] for figure in ("training", "seconds", "bytes_read")},
        }
        for name, contender in contenders(args.dtype).items()
    }


def show(console: Console, found: dict[str, Any], title: str) -> None:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    table.add_column("parameters", no_wrap=True)
    for column in (
        "validation\nloss",
        "spread",
        "less that of\ntorch AdamW",
        "less that of\nours, exact",
        "worse\nthan it",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found.items():
        seeds = row["to_exact"]["seeds"]
        table.add_row(
            name,
            row["parameters"],
            f"{row['validation']['mean']:.4f}",
            f"{row['validation']['spread']:.4f}",
            "" if name == TORCH else paired(row["to_torch"]),
            "" if name == EXACT else paired(row["to_exact"]),
            "" if name == EXACT else f"{sum(value > 0 for value in seeds)} of {len(seeds)}",
        )
    console.print(table)


def paired(difference: dict[str, Any]) -> str:
    return f"{difference['mean']:+.4f} ± {difference['spread']:.4f}"


def verdict(found: dict[str, Any]) -> str:
    """Whether int8's mean is within the seeds' spread of torch's AdamW, and of ours with exact state."""
    mine = found[INT8]["validation"]["mean"]
    if len(found[INT8]["validation"]["seeds"]) == 1:
        return "Verdict: none, as one seed has no spread."
    parts = []
    for other in (TORCH, EXACT):
        its = found[other]["validation"]
        inside = abs(mine - its["mean"]) <= its["spread"]
        parts.append(f"{'within' if inside else 'NOT within'} the seeds' spread ({its['spread']:.4f}) of {other}")
    return f"Verdict: the mean with int8 state is {parts[0]}, and {parts[1]}."


def main() -> None:
    args = parse()
    console = Console(width=120)
    started = time.perf_counter()
    runs = measure(args, console)
    found = summary(args, runs)
    parameters = sum(p.numel() for p in GPT(args.layers, args.width, args.width // HEAD, args.context).parameters())
    what = f"GPT of {parameters / 1e6:.2g} M parameters, {args.steps} steps, {len(runs[TORCH])} seeds"
    show(console, found, what)
    console.print("± and spread: standard deviation over the seeds; differences are paired by seed. Less is better.")
    console.print(line := verdict(found))
    notes = [] if importlib.util.find_spec("bitsandbytes") else ["left out, as it is not installed: bitsandbytes"]
    for note in notes:
        console.print(note)
    if not args.no_save:
        settings = {name: value for name, value in vars(args).items() if name not in ("no_save", "folder")}
        results = {"parameters": parameters, "verdict": line, "notes": notes, "contenders": found}
        results["seconds"] = round(time.perf_counter() - started)
        console.print(f"written to {save('convergence', settings, results)}")
        from _plot import plot_curves  # needs matplotlib, which the table does not

        plot_curves(RESULTS / "convergence.png", found, args.steps, TORCH, machine(), what)
        console.print(f"drawn in {RESULTS / 'convergence.png'}")


if __name__ == "__main__":
    main()
