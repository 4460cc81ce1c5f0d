"""The command ``offload-opt``: what a machine offers (doctor), how fast a drive is (bench), what suits it (tune), what
offloading will cost (plan), and what is in a store (inspect) and whether it is still what was written (verify)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, cast

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import arguments
from .aio import AioHandle, engines
from .arguments import CommandParser
from .arguments import with_default as _of
from .bandwidth import LEAST_MEASURED, Direction, ScratchFiles, run
from .config import ENGINES, AioConfig, format_bytes
from .doctor import Finding, check_for_data, describe, examine_folder, examine_machine, file_system, is_in_memory
from .errors import ConfigError, OffloadError, StoreError
from .inspection import NothingCommittedError, RankSummary, find_ranks, summarise
from .plan_command import add_plan
from .screens import print_store, print_verified
from .terminal import byte_progress_bar, make_console, progress_bar
from .tuning import Tuned, save_tuned, tune
from .verification import verify

_DIRECTIONS: tuple[Direction, ...] = ("read", "write", "mixed")
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_WRITING = 0.15  # the part of a measurement's time in which its files are written
_NOISE = 0.25
_OPTIONS = {"aio.block_size": "--block-size", "aio.queue_depth": "--queue-depth", "aio.num_threads": "--threads"}
_TEMPORARY = re.compile(r"/\.offload-opt(-|\.json\.)\w{8}(/\d+)?$")
"""The end of a temporary file's path, below a folder that the user knows."""

Rates = dict[tuple[AioConfig, Direction], list[float]]
"""Bytes per second of each repeat."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 1 after an error, 130 after Ctrl-C; usage errors exit with 2."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings(), _ended_by_signals():
        warnings.showwarning = _show_warning
        try:
            return cast(int, args.run(args))
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # the reader, `head` for example, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            where = f": {_TEMPORARY.sub('', os.fsdecode(error.filename))}" if error.filename else ""
            return _fail(f"{error.strerror or error}{where}")
        except OffloadError as error:
            return _fail(str(error))


# The commands.


def _doctor(args: argparse.Namespace) -> int:
    machine = examine_machine()
    folder = examine_folder(args.path) if args.path else []
    findings = machine + folder
    failed = any(finding.status == "fail" for finding in findings)
    if args.json:
        content = [dataclasses.asdict(finding) for finding in findings]
        path = str(args.path.resolve()) if args.path else None
        print(json.dumps({"offload_opt": version("offload_opt"), "path": path, "findings": content}, indent=2))
        return int(failed)
    console = make_console()
    width = max(len(finding.name) for finding in findings)
    _print_findings(console, "This machine", machine, width)
    if folder:
        _print_findings(console, str(args.path.resolve()), folder, width)
    console.print(_summary(findings))
    if not args.path:
        console.print("For a folder's drive: offload-opt doctor FOLDER", style="dim")
    return int(failed)


def _bench(args: argparse.Namespace) -> int:
    check_for_data(args.path)
    names = args.engine or [name for name, works, _ in engines() if works]
    try:
        # "auto" by the name of what it is here.
        names = list(dict.fromkeys(_engine_for(name, args.path) for name in names))
        grid = itertools.product(names, args.block_size, args.queue_depth, args.threads)
        configs = [AioConfig(engine=e, block_size=b, queue_depth=d, num_threads=t) for e, b, d, t in grid]
    except ConfigError as error:
        raise ConfigError(re.sub(r"aio\.\w+", lambda setting: _OPTIONS[setting[0]], str(error))) from None
    with progress_bar() as advance:
        rates = _compare(args.path, configs, args.size, args.seconds, args.repeats, advance)
    if args.json:
        print(json.dumps(_bench_content(args, configs, rates), indent=2))
    else:
        _print_bench(make_console(), args, configs, rates)
    return 0


def _engine_for(name: str, folder: Path) -> str:
    with AioHandle(engine=name, folder=folder, quiet=True) as handle:
        return handle.engine


def _tune(args: argparse.Namespace) -> int:
    mount = check_for_data(args.path)
    with progress_bar() as advance:
        found, default = tune(args.path, seconds=args.seconds, progress=advance)
    console = make_console()
    _print_tuned(console, args.path, found, default)
    if found.aio == default.aio:
        console.print("Nothing else that was tried is faster by 3 % or more.")
    if mount is not None and is_in_memory(mount):
        finding = file_system(mount)
        console.print(Text(f"Warning: {finding.found}. What to do: {finding.advice}.", style="yellow"))
    if args.dry_run:
        console.print("Not saved: --dry-run.")
        return 0
    file = save_tuned(args.path, found)
    said = f"Saved in {file}: OffloadOptimizer uses it from now on."
    if found.aio == default.aio:
        said = f"The defaults suit this drive; recorded in {file}."
    console.print(Text(said), soft_wrap=True)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    stores: dict[Path, list[RankSummary]] = {}
    content: list[dict[str, object]] = []
    failures, uncommitted = [], []
    for place in find_ranks(args.paths):
        try:
            found = summarise(place)
        except NothingCommittedError as error:
            content.append({"folder": str(place.folder), "epoch": None})
            uncommitted.append(str(error))
        except StoreError as error:
            content.append({"folder": str(place.folder), "error": str(error)})
            failures.append(str(error))
        else:
            content.append(dataclasses.asdict(found))
            stores.setdefault(place.folder.parent, []).append(found)
    if args.json:
        print(json.dumps({"offload_opt": version("offload_opt"), "ranks": content}, indent=2))
    else:
        console = make_console()
        for store, ranks in stores.items():
            print_store(console, store, ranks)
        for nothing in uncommitted:
            console.print(Text(f"{nothing}."), soft_wrap=True)
    for failure in failures:
        _fail(failure)
    return int(bool(failures))


def _verify(args: argparse.Namespace) -> int:
    places = find_ranks(args.paths)
    with byte_progress_bar() as advance:
        reports = verify(places, advance)
    is_whole = all(report.is_whole for report in reports)
    if args.json:
        content = [dataclasses.asdict(report) for report in reports]
        print(json.dumps({"offload_opt": version("offload_opt"), "is_whole": is_whole, "ranks": content}, indent=2))
    else:
        print_verified(make_console(), reports)
    return int(not is_whole)


def _compare(
    folder: Path,
    configs: Sequence[AioConfig],
    nbytes: int,
    seconds: float,
    repeats: int,
    advance: Callable[[float, str], None],
) -> Rates:
    """Measure all settings in all directions, in turns, so that what else the machine does hits all of them."""
    if nbytes < LEAST_MEASURED:
        raise ConfigError(f"--size must be at least {format_bytes(LEAST_MEASURED)}, not {format_bytes(nbytes)}")
    for aio in configs:  # what does not work fails before anything is written
        try:
            AioHandle.from_config(aio, folder, quiet=True).close()
        except ValueError as error:
            raise ConfigError(str(error)) from error
    runs = [(aio, direction) for _ in range(repeats) for aio in configs for direction in _DIRECTIONS]
    rates: Rates = {}
    ends = time.perf_counter() + seconds
    advance(0, "writing the test files")
    with ScratchFiles(folder, nbytes, _WRITING * seconds) as files:
        for number, (aio, direction) in enumerate(runs):
            advance(number / len(runs), f"{aio.engine}, {format_bytes(cast(int, aio.block_size))}, {direction}")
            share = max(ends - time.perf_counter(), 0) / (len(runs) - number)
            rates.setdefault((aio, direction), []).append(run([files], aio, direction, share)[0])
    return rates


# Output.


def _print_findings(console: Console, title: str, findings: Sequence[Finding], width: int) -> None:
    arrow = "→" if (console.encoding or "").lower().startswith("utf") else "->"
    console.print(Text(title, style="bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=max(map(len, _STYLES)))
    table.add_column(no_wrap=True, min_width=width)
    table.add_column(overflow="fold")
    for finding in findings:
        style = _STYLES[finding.status]
        table.add_row(Text(finding.status, style=style), Text(finding.name), Text(finding.found))
        if finding.advice:
            table.add_row("", "", Text(f"{arrow} {finding.advice}", style=style))
    console.print(Padding(table, (0, 0, 1, 2)))


def _summary(findings: Sequence[Finding]) -> Text:
    failures, warned = (sum(finding.status == status for finding in findings) for status in ("fail", "warn"))
    parts = [
        f"{count} {word}{'s' * (count > 1)}" for count, word in ((failures, "failure"), (warned, "warning")) if count
    ]
    if failures:
        return Text(f"{', '.join(parts)}: offloading cannot work before the failures are put right.", style="bold red")
    if warned:
        return Text(f"{parts[0]}: offloading works, and could do so better.", style="yellow")
    return Text("All is well.", style="green")


def _print_bench(console: Console, args: argparse.Namespace, configs: Sequence[AioConfig], rates: Rates) -> None:
    table = Table(title=f"GB/s in {escape(str(args.path))}")
    table.add_column("engine")
    for name in ("block", "depth", "threads"):
        table.add_column(name, justify="right")
    best = {direction: max(configs, key=lambda aio: _median(rates, aio, direction)) for direction in _DIRECTIONS}
    for direction in _DIRECTIONS:
        table.add_column(direction, justify="right")
    for number, aio in enumerate(configs):
        if number and aio.engine != configs[number - 1].engine:
            table.add_section()
        cells = [
            Text(f"{_median(rates, aio, direction) / 1e9:.2f}", style="bold green" if best[direction] == aio else "")
            for direction in _DIRECTIONS
        ]
        block = format_bytes(cast(int, aio.block_size))
        table.add_row(aio.engine, block, str(aio.queue_depth), str(aio.num_threads), *cells)
    console.print(table)
    console.print(
        f"Medians of {args.repeats}, on at most {format_bytes(args.size)} of files. Mixed reads and writes at once, as "
        "a step does, and counts both."
    )
    console.print(f"Fastest at it: {describe(best['mixed'])}.")
    spread = max((max(repeats) - min(repeats)) / statistics.median(repeats) for repeats in rates.values())
    if spread > _NOISE:
        console.print(
            f"Repeats differ by up to {100 * spread:.0f} %: the drive is busy, or not steady.", style="yellow"
        )


def _median(rates: Rates, aio: AioConfig, direction: Direction) -> float:
    return statistics.median(rates[aio, direction])


def _bench_content(args: argparse.Namespace, configs: Sequence[AioConfig], rates: Rates) -> dict[str, object]:
    results = [
        {
            **dataclasses.asdict(aio),
            "bytes_per_second": {direction: _median(rates, aio, direction) for direction in _DIRECTIONS},
            "runs": {direction: rates[aio, direction] for direction in _DIRECTIONS},
        }
        for aio in configs
    ]
    return {"offload_opt": version("offload_opt"), "path": str(args.path), "size": args.size, "results": results}


def _print_tuned(console: Console, folder: Path, found: Tuned, default: Tuned) -> None:
    """The defaults, and beside them what was found, where it is something else."""
    table = Table(title=f"I/O settings for {escape(str(folder))}")
    table.add_column("setting")
    for name in ("default",) if found.aio == default.aio else ("default", "found", "change"):
        table.add_column(name, justify="right")

    def row(name: str, of_default: str, of_found: str, change: str) -> None:
        table.add_row(*[name, of_default, of_found, change][: len(table.columns)])

    for field in dataclasses.fields(AioConfig):
        values = [getattr(tuned.aio, field.name) for tuned in (default, found)]
        shown = [format_bytes(value) if field.name == "block_size" else _in_words(value) for value in values]
        row(field.name, shown[0], shown[1], "" if values[0] == values[1] else "changed")
    table.add_section()
    for direction in _DIRECTIONS:
        before, after = (getattr(tuned, direction) for tuned in (default, found))
        change = f"{100 * (after / before - 1):+.0f} %"
        row(direction, f"{before / 1e9:.2f} GB/s", f"{after / 1e9:.2f} GB/s", change)
    console.print(table)
    console.print("Chosen by the mixed figure, of reads and writes together: a step reads and writes at once.")


def _in_words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _fail(message: str) -> int:
    print(f"offload-opt: error: {message}", file=sys.stderr)
    return 1


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"offload-opt: warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does: its temporary files are removed."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What the caller ignores (nohup) or handles stays so.
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


# The arguments.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="offload-opt", description="Keep a PyTorch model's optimizer state on NVMe.")
    parser.add_argument("--version", action="version", version=f"offload-opt {version('offload_opt')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    seconds = "for all of it, roughly (default: %(default)g)"

    text = "say what this machine, and a folder's drive, offer, and what to do about what is missing"
    doctor = commands.add_parser("doctor", help=text, description=f"{text[0].upper()}{text[1:]}.")
    doctor.add_argument(
        "path", nargs="?", type=arguments.folder, metavar="PATH", help="the folder that is to hold the state"
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)

    _add_bench(commands, seconds)

    text = "find the I/O settings that suit a folder's drive, and keep them in the folder"
    tune = commands.add_parser("tune", help=text, description=f"{text[0].upper()}{text[1:]}.")
    tune.add_argument("path", type=arguments.folder, metavar="PATH", help="the folder that OffloadOptimizer is given")
    tune.add_argument("--seconds", type=arguments.seconds, default=40.0, metavar="S", help=seconds)
    tune.add_argument("--dry-run", action="store_true", help="only print what is found")
    tune.set_defaults(run=_tune)

    add_plan(commands)

    text = "say what a store or a snapshot holds, from its manifests"
    inspect = commands.add_parser("inspect", help=text, description=f"{text[0].upper()}{text[1:]}.")
    _add_stores(inspect, "what is found")
    inspect.set_defaults(run=_inspect)

    text = "read all of a store or a snapshot, and say what is not as it was written"
    verify = commands.add_parser(
        "verify", help=text, description=f"{text[0].upper()}{text[1:]}. The exit status is 1 where something is not."
    )
    _add_stores(verify, "the findings")
    verify.set_defaults(run=_verify)
    return parser


def _add_bench(commands: argparse._SubParsersAction[CommandParser], seconds: str) -> None:
    text = "measure how fast a folder's drive reads, writes, and does both"
    bench = commands.add_parser(
        "bench", help=text, description=f"{text[0].upper()}{text[1:]}. A LIST is separated by commas."
    )
    add = bench.add_argument
    add("path", type=arguments.folder, metavar="PATH", help="a folder on the drive; temporary files are made in it")
    add("--size", type=arguments.size, default="1GiB", help=_of("total size of the temporary files, at most"))
    add(
        "--block-size",
        type=arguments.a_list(arguments.size),
        default="256KiB,1MiB,4MiB",
        metavar="LIST",
        help=_of("bytes of a request"),
    )
    add(
        "--queue-depth",
        type=arguments.a_list(arguments.positive),
        default="32",
        metavar="LIST",
        help=_of("requests in flight a thread"),
    )
    add("--threads", type=arguments.a_list(arguments.positive), default="1", metavar="LIST", help=_of("I/O threads"))
    add(
        "--engine",
        type=arguments.a_list(arguments.engine),
        metavar="LIST",
        help=f"of {', '.join(ENGINES)} (default: each that works)",
    )
    add(
        "--repeats",
        type=arguments.positive,
        default=3,
        metavar="N",
        help=_of("times each is measured; the median is shown"),
    )
    add("--seconds", type=arguments.seconds, default=60.0, metavar="S", help=seconds)
    add("--json", action="store_true", help="print the figures as JSON, in bytes a second")
    bench.set_defaults(run=_bench)


def _add_stores(parser: argparse.ArgumentParser, what: str) -> None:
    text = "the path that OffloadOptimizer was given (all of them, where those were several), or a snapshot's folder"
    parser.add_argument("paths", nargs="+", type=arguments.store, metavar="STORE", help=text)
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON")
