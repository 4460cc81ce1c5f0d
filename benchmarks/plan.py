"""How near what ``offload-opt plan`` predicts is to what the same run takes.

    python benchmarks/plan.py /mnt/nvme

For each of a few settings: predict a step, from bandwidth and update rate measured then and there as the command does,
and run the real thing, its steps after the first three. The settings are taken in turns, and each round predicts and
measures once; the ratio is the median of the ratios of each round. Bytes must be exactly as predicted.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _report import save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import offload_opt
from offload_opt.model_sizes import Model, Parameter, parse_count
from offload_opt.planning import (
    Given,
    Layout,
    Question,
    answer,
    find_bandwidth,
    lay_out,
    layout_name,
    measure_checksums,
    measure_update,
)

# Commits are of every step; masters are of bf16 parameters; int8 and bf16 are how the state is stored.
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, half kept": {"part": 0.5},
    "fp32, commits": {"durability": "step"},
    "fp32, int8": {"state_dtype": "int8"},
    "masters, exact": {"dtype": torch.bfloat16, "master_weights": True},
    "masters, bf16": {"dtype": torch.bfloat16, "master_weights": True, "state_dtype": "bf16"},
}
WIDTH = 2048
WARM_UP = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder on the drive to measure")
    parser.add_argument("--parameters", type=parse_count, default=parse_count("200M"))
    parser.add_argument("--part", type=float, default=0.125, help="of the state that host_memory has room for")
    parser.add_argument("--steps", type=int, default=4, help="that are measured in a round; even: up and down")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


def question_of(name: str, args: argparse.Namespace) -> tuple[Question, Layout]:
    """What the command would be asked, and the layout of it."""
    fields = dict(SETTINGS[name])
    dtype, part = fields.pop("dtype", torch.float32), fields.pop("part", args.part)
    rows = 4 * WIDTH
    shapes = [(rows, WIDTH)] * (args.parameters // (rows * WIDTH))
    rest = (args.parameters - len(shapes) * rows * WIDTH) // WIDTH
    parameters = [Parameter(str(i), shape) for i, shape in enumerate([*shapes, *([(rest, WIDTH)] if rest else [])])]
    config = offload_opt.OffloadConfig(path=args.folder, **fields)
    question = Question(Model("", tuple(parameters)), torch.optim.AdamW, config, dtype=dtype)
    layout = chosen(question)
    # In proportion to the state, so that a codec does not keep all of it in memory.
    memory = max(int(part * layout.footprint.state), 16 << 20)
    question = dataclasses.replace(question, config=dataclasses.replace(config, host_memory=memory))
    return question, chosen(question)


def chosen(question: Question) -> Layout:
    return next(layout for layout in lay_out(question)[0] if layout.name == layout_name(question.config))


def predict(question: Question, layout: Layout, folder: Path) -> dict[str, Any]:
    """Seconds and bytes a step, as the command has them."""
    bandwidth, source, _ = find_bandwidth(folder, lambda *_: None)
    rates = {layout.name: measure_update(question, layout, folder).rate}
    given = Given(bandwidth, source, rates, "", measure_checksums())
    prediction = answer(question, [layout], given)[0].prediction
    return {
        "seconds": prediction.seconds,
        "limit": prediction.limit,
        "disk_seconds": prediction.disk_seconds,
        "update_seconds": prediction.update_seconds,
        "bandwidth": bandwidth.mixed,
        "update_rate": rates[layout.name],
        "bytes": layout.footprint.read + layout.footprint.written,
    }


def measure(question: Question, folder: Path, steps: int) -> dict[str, Any]:
    """Seconds and bytes a step of the real optimizer, whose steps follow each other."""
    parameters = []
    for entry in question.model.parameters:
        parameter = torch.nn.Parameter((torch.randn(entry.shape) * 0.02).to(question.dtype))
        parameter.grad = (torch.randn(entry.shape) * 1e-3).to(question.dtype)
        parameters.append(parameter)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        config = dataclasses.replace(question.config, path=place)
        with offload_opt.OffloadOptimizer(question.optimizer(parameters), config) as optimizer:
            optimizer.step()
            if config.durability == "snapshot" and config.holds_weights:
                optimizer.snapshot()  # the weights' units may need larger buffers, which are there from then on
            for _ in range(WARM_UP):
                optimizer.step()
            optimizer.synchronize()
            before, started = optimizer.stats, time.perf_counter()
            for _ in range(steps):
                optimizer.step()
            optimizer.synchronize()  # what the last step has left to do, as the first one found all done
            seconds = (time.perf_counter() - started) / steps
            after = optimizer.stats
    moved = after.bytes_read - before.bytes_read + after.bytes_written - before.bytes_written
    return {"seconds": seconds, "bytes": moved / steps}


def main() -> None:
    args = parse()
    if args.steps < 2 or args.steps % 2:
        raise SystemExit("--steps must be even: a step up is followed by one down")
    torch.manual_seed(0)
    questions = {name: question_of(name, args) for name in args.settings}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in questions}
    with Progress(transient=True) as progress:
        bar = progress.add_task("", total=args.rounds * len(questions))
        for _ in range(args.rounds):
            for name, (question, layout) in questions.items():
                progress.update(bar, description=name)
                predicted = predict(question, layout, args.folder)
                measured = measure(question, args.folder, args.steps)
                rounds[name].append({"predicted": predicted, "measured": measured})
                progress.advance(bar)

    table = Table(title=f"A step of AdamW, {args.parameters / 1e6:.0f} M parameters: predicted and measured")
    for column in ("", "GB", "predicted", "measured", "ratio", "limit"):
        table.add_column(column, justify="right" if column not in ("", "limit") else "left")
    results = {name: summary(pairs) for name, pairs in rounds.items()}
    for name, found in results.items():
        exactly = "" if found["bytes_are_exact"] else " (bytes differ)"
        table.add_row(
            name,
            f"{found['bytes'] / 1e9:.2f}{exactly}",
            f"{found['predicted']:.3f} s",
            f"{found['measured']:.3f} s",
            f"{found['ratio']:.2f}",
            found["limit"],
        )
    console = Console()
    console.print(table)
    console.print(
        f"Medians of {args.rounds} rounds; the ratio, of measured to predicted, is the median of each round's."
    )
    if not args.no_save:
        settings = {name: value for name, value in vars(args).items() if name not in ("folder", "no_save")}
        console.print(f"written to {save('plan', settings, results)}")


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a setting's rounds, and the rounds."""
    return {
        "bytes": pairs[0]["measured"]["bytes"],
        "bytes_are_exact": all(pair["predicted"]["bytes"] == pair["measured"]["bytes"] for pair in pairs),
        "predicted": statistics.median(pair["predicted"]["seconds"] for pair in pairs),
        "measured": statistics.median(pair["measured"]["seconds"] for pair in pairs),
        "ratio": statistics.median(pair["measured"]["seconds"] / pair["predicted"]["seconds"] for pair in pairs),
        "limit": statistics.mode(pair["predicted"]["limit"] for pair in pairs),
        "rounds": pairs,
    }


if __name__ == "__main__":
    main()
