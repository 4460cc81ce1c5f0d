"""How fast an AioHandle moves bytes, beside fio and DeepSpeed's handle, and what a small read costs in CPU time.

    python benchmarks/aio.py /mnt/nvme

All do the same work, past the page cache: the same files of 1 GiB, written once before, in blocks of the same size, as
many of them in flight in all. They take turns: in each round each runs once, in shuffled order. The tables give the
median over the rounds, and the median of the ratios of each round.

- read, write: one transfer of 1 GiB, from its first call until ``wait()`` has returned.
- mixed: a file is read while another one is written, in flight together as much as when one is alone. fio has a job
  for each with half the depth; DeepSpeed a handle for each with half the depth, as its own pipelined swapper has two;
  an AioHandle takes both into one queue.
- threads: each has a queue of the full depth and a part of the file: jobs of fio, DeepSpeed's intra_op_parallelism.

What is not the same: fio moves through a few buffers of one block, ours and DeepSpeed's through page-locked memory as
large as the file (2 GiB each). Ours is in huge pages where the system has them; fio gets them by way of glibc, too, and
DeepSpeed has none. fio counts from the start of its first job, so that its own start costs nothing; a handle here
exists before the clock starts, and has moved the bytes once. "fio" in a ratio is the one of its engines with the
highest median, "ours" the engine that "auto" takes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _contenders import DIRECTIONS, Contender, DeepSpeed, Files, Fio, Ours, Setting, fio_version
from _cpu import cpu_per_op
from _deepspeed import DeepSpeedProcess
from _report import RESULTS, machine, save
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from offload_opt import AioHandle
from offload_opt.config import ENGINES, format_bytes, parse_bytes
from offload_opt.errors import ConfigError

# What the project promises: at least this much of fio, of DeepSpeed, and of its own best engine.
TARGETS = {"fio": 0.97, "deepspeed": 1.0, "best_engine": 0.9}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder on the drive to measure, with room for two files")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--quick", action="store_true", help="one setting (about two minutes)")
    grid.add_argument("--full", action="store_true", help="many settings (about an hour)")
    parser.add_argument("--blocks", nargs="+", metavar="SIZE", help="block sizes; replaces the grid")
    parser.add_argument("--depths", nargs="+", type=int, metavar="N", help="requests in flight on one thread")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="I/O threads")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--size", default="1GiB", help="bytes of one transfer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operations", type=int, default=20_000, help="4 KiB reads of one of 10 x rounds runs")
    parser.add_argument("--without", nargs="+", choices=["fio", "deepspeed", "cpu"], default=[], help="leave these out")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    args.size = parse_bytes(args.size, "size")
    args.settings = list(settings(args))
    for setting in args.settings:
        if setting.depth < 2 or args.size % (setting.block_size * setting.depth * setting.threads):
            parser.error(f"{setting}: depth must be 2 or more, and block x depth x threads divide {args.size} bytes")
    return args


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    if args.blocks or args.depths or args.threads or args.quick:
        grid = [(args.blocks or ["1MiB"], args.depths or [32], args.threads or [1])]
    elif args.full:
        grid = [(["256KiB", "1MiB", "4MiB", "8MiB"], [4, 8, 32, 64], [1, 2])]
    else:
        grid = [(["256KiB", "1MiB", "4MiB"], [8, 32], [1]), (["1MiB"], [32], [2])]
    for blocks, depths, threads in grid:
        for block, depth, count in itertools.product(blocks, depths, threads):
            yield Setting(parse_bytes(block, "block size"), depth, count)


def our_engines() -> tuple[list[str], list[str]]:
    """(engines that work here, the one that "auto" takes first; what is said of the others)."""
    working, notes = [], []
    for engine in ENGINES:  # the first is "auto"
        try:
            with AioHandle(engine=engine) as handle:
                working.append(handle.engine)
        except ConfigError as error:
            notes.append(str(error))
    return list(dict.fromkeys(working)), notes


class Comparison:
    """The contenders that there are here, on the same two files."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.engines, self.notes = our_engines()
        self.versions: dict[str, str] = {}
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > cores / 2:
            self.notes.append(f"the machine was busy at the start: load average {load:.1f} on {cores} cores")
        self._rounds, self._full = args.rounds, args.full
        self._owner = AioHandle()  # of the page-locked memory
        example = torch.empty(0, dtype=torch.uint8)
        self._buffers = [self._owner.new_cpu_locked_tensor(args.size, example).random_() for _ in range(2)]
        self._files = files = Files.make(folder, self._buffers[1])
        self._fio: list[tuple[str, bool]] = []
        if "fio" not in args.without:
            self._find_fio()
        self._deepspeed: DeepSpeedProcess | None = None
        if "deepspeed" not in args.without:
            try:
                self._deepspeed = DeepSpeedProcess(files.read, files.write, files.size)
                self.versions["deepspeed"] = self._deepspeed.version
            except RuntimeError as error:
                self.notes.append(f"without DeepSpeed: {error}")

    def measure(self, setting: Setting, directions: list[str], tick: Callable[[str], None]) -> list[dict[str, Any]]:
        """One setting in each direction. ``tick`` is told what runs next."""
        contenders = self._contenders(setting)
        order = random.Random(str(setting))
        cases = []
        try:
            for direction in directions:
                rounds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
                for _ in range(self._rounds):
                    for contender in order.sample(contenders, len(contenders)):
                        tick(f"{direction} {setting}: {contender.name}")
                        rounds[contender.name].append(contender.move(direction))
                medians = {name: median(figures) for name, figures in rounds.items()}
                ratios = self._ratios(rounds, medians)
                case = {"direction": direction, **vars(setting), "median": medians, "ratio": ratios, "rounds": rounds}
                cases.append(case)
        finally:
            for contender in contenders:
                contender.close()
        return cases

    def count(self) -> int:
        """How many runs one round of one setting and direction has."""
        return len(self.engines) + len(self._fio) + (self._deepspeed is not None)

    def close(self) -> None:
        for buffer in self._buffers:
            self._owner.free_cpu_locked_tensor(buffer)
        self._owner.close()
        if self._deepspeed:
            self._deepspeed.close()
            self.notes += [
                f"DeepSpeed's process ended and was started again: {why}" for why in self._deepspeed.failures
            ]

    def _find_fio(self) -> None:
        version, why_not = fio_version()
        if not version:
            self.notes.append(f"without fio: {why_not}")
            return
        self.versions["fio"] = version
        variants = [("io_uring", True), ("io_uring", False), ("libaio", True), ("psync", True)]
        for engine, tuned in variants if self._full else [variant for variant in variants if variant[1]]:
            try:
                Fio(self._files, Setting(4096, 1, 1), engine, tuned=tuned).try_out()
                self._fio.append((engine, tuned))
            except RuntimeError as error:
                self.notes.append(f"without fio {engine}: {error}")

    def _contenders(self, setting: Setting) -> list[Contender]:
        contenders: list[Contender] = [Ours(self._files, setting, name, self._buffers) for name in self.engines]
        contenders += [Fio(self._files, setting, name, tuned=tuned) for name, tuned in self._fio]
        if self._deepspeed:
            contenders.append(DeepSpeed(self._deepspeed, setting))
        return contenders

    def _ratios(self, rounds: dict[str, list[float]], medians: dict[str, float]) -> dict[str, float]:
        """Medians of the ratios of each round: ours to others, and each engine of ours to the best one."""

        def ratio(name: str, other: str) -> float:
            return median(a / b for a, b in zip(rounds[name], rounds[other], strict=True))

        ours = [f"offload_opt {engine}" for engine in self.engines]
        best = max(ours, key=medians.__getitem__)
        ratios = {"best_engine": min(ratio(name, best) for name in ours)}
        fio = [name for name in rounds if name.startswith("fio")]
        if fio:
            ratios["fio"] = ratio(ours[0], max(fio, key=medians.__getitem__))
        if self._deepspeed:
            ratios["deepspeed"] = ratio(ours[0], "DeepSpeed")
        return ratios


def show(console: Console, cases: list[dict[str, Any]]) -> None:
    """A table for each direction, and the lowest ratios of all."""
    names = list(cases[0]["median"])
    titles = {"fio": "ours/\nfio", "deepspeed": "ours/\nDeepSpeed", "best_engine": "slowest/\nbest"}
    headings = [name.replace("offload_opt", "ours").replace(" ", "\n", 1) for name in names]
    titles = {key: title for key, title in titles.items() if key in cases[0]["ratio"]}
    for direction in dict.fromkeys(case["direction"] for case in cases):
        table = Table(title=f"{direction}, GB/s")
        for column in ("block", "depth", "threads", *headings, *titles.values()):
            table.add_column(column, justify="right")
        for case in cases:
            if case["direction"] != direction:
                continue
            figures = [f"{case['median'][name] / 1e9:.2f}" for name in names]
            ratios = [coloured(case["ratio"][key], case["ratio"][key] >= TARGETS[key]) for key in titles]
            setting = (format_bytes(case["block_size"]), str(case["depth"]), str(case["threads"]))
            table.add_row(*setting, *figures, *ratios)
        console.print(table)
    for key, what in (("fio", "ours/fio"), ("deepspeed", "ours/DeepSpeed"), ("best_engine", "engine/best engine")):
        if key in titles:
            lowest = min(case["ratio"][key] for case in cases)
            console.print(f"lowest {what}: {coloured(lowest, lowest >= TARGETS[key])}, target {TARGETS[key]}")


def coloured(ratio: float, good: bool) -> str:
    return f"[{'green' if good else 'red'}]{ratio:.3f}[/]"


def show_cpu(console: Console, figures: dict[str, Any]) -> None:
    table = Table(title=f"CPU time of a 4 KiB random read, {figures['engine']}, microseconds")
    for column in ("", "handle's thread", "whole process", "reads/s"):
        table.add_column(column, justify="right" if column else "left")
    for mode, row in figures["median"].items():
        times = [f"{row[name]:.2f}" for name in ("handle", "process")]
        table.add_row(f"{mode} buffers and files", *times, f"{row['per_second']:,.0f}")
    table.add_row("ratio", coloured(figures["ratio"], figures["ratio"] < 1), f"{figures['ratio_of_process']:.3f}", "")
    console.print(table)
    console.print(
        f"registered was cheaper in {figures['pairs_cheaper']} of {len(figures['pairs']['registered'])} pairs"
    )


def main() -> None:
    args = parse()
    console = Console()
    if not console.is_terminal:
        console.width = 140
    torch.manual_seed(0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn only between the runs: a thread that draws all the while would be measured along.
    bar = Progress(*columns, transient=True, auto_refresh=False)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, bar as progress:
        task = progress.add_task("writing the files; DeepSpeed's handle is compiled if it never was (five minutes)")
        comparison = Comparison(args, Path(folder))
        progress.update(task, total=len(args.settings) * len(args.directions) * args.rounds * comparison.count())

        def tick(what: str) -> None:
            progress.update(task, description=what, advance=1, refresh=True)

        cases = []
        for setting in args.settings:
            try:
                cases += comparison.measure(setting, args.directions, tick)
            except (RuntimeError, OSError) as error:  # one of many: the others are worth their time
                comparison.notes.append(f"{setting} is left out: {error}")
        results: dict[str, Any] = {"cases": cases, "versions": comparison.versions, "notes": comparison.notes}
        comparison.close()
        if "cpu" not in args.without:
            pairs = 10 * args.rounds
            progress.update(task, total=2 * (pairs + 1), completed=0)
            path = Path(folder) / "read.bin"
            results["cpu"] = cpu_per_op(path, args.size, args.operations, pairs, comparison.engines[0], tick)

    show(console, cases)
    if "cpu" in results:
        show_cpu(console, results["cpu"])
    for note in comparison.notes:
        console.print(note)
    if not args.no_save:
        chosen = {"size": args.size, "rounds": args.rounds, "operations": args.operations, "targets": TARGETS}
        console.print(f"written to {save('aio', chosen, results)}")
        from _plot import plot  # needs matplotlib, which the tables do not

        versions = "".join(f", {name} {version.removeprefix('fio-')}" for name, version in comparison.versions.items())
        title = (
            f"Transfers of {format_bytes(args.size)} past the page cache{versions}: medians of {args.rounds} rounds, "
        )
        title += "lines from the slowest to the fastest"
        plot(RESULTS / "aio.png", cases, machine(), title)
        console.print(f"drawn in {RESULTS / 'aio.png'}")


if __name__ == "__main__":
    main()
