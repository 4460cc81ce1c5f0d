"""``offload-opt plan``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import arguments
from .arguments import with_default as _of
from .config import DURABILITIES, STATE_DTYPES, OffloadConfig, format_bytes, parse_bytes
from .doctor import check_for_data
from .errors import ConfigError, UnsupportedOptimizerError
from .folders import free_bytes
from .model_sizes import load_model, of_count, parse_count
from .planner import Bandwidth, Prediction
from .planning import (
    Given,
    Layout,
    Question,
    Row,
    advise,
    answer,
    find_bandwidth,
    find_optimizer,
    in_days,
    lay_out,
    layout_name,
    measure_checksums,
    measure_update,
)
from .terminal import make_console, progress_bar

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OPTIONS = {
    name: f"--{name.replace('_', '-')}"
    for name in ("host_memory", "unit_size", "state_dtype", "master_weights", "persist_params", "durability")
}
_ENDURANCE = "600TB"
_SLOWEST = 1_000_000
"""Bytes a second of a drive that may be meant."""


def add_plan(commands: Any) -> None:
    """Add the command's parser."""
    text = "say what offloading will cost: bytes and seconds a step, memory, disk space, and the drive's life"
    plan = commands.add_parser(
        "plan",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. What is not given is measured, in a few seconds for each.",
    )
    add = plan.add_argument
    add("path", nargs="?", type=arguments.folder, metavar="PATH", help="the folder that is to hold the state")
    model = plan.add_mutually_exclusive_group(required=True)
    model.add_argument("--parameters", type=_count, metavar="N", help="how many there are, for example 7B")
    model.add_argument(
        "--model",
        metavar="MODEL",
        help="package.module:Class, a .safetensors file, a folder with some, or a Hugging Face config.json",
    )
    add("--model-args", type=_object, metavar="JSON", help="what the class is called with: '{\"width\": 512}'")
    add("--dtype", choices=_DTYPES, help="of the parameters (default: the model's own, else fp32)")
    add("--optimizer", default="AdamW", metavar="NAME", help=_of("of torch.optim"))
    add("--optimizer-args", type=_object, default={}, metavar="JSON", help="its options: '{\"momentum\": 0.9}'")
    add(
        "--state-dtype",
        type=_state_dtype,
        default="exact",
        metavar="KIND",
        help=f"{', '.join(STATE_DTYPES)}, or by names of state: exp_avg=bf16,exp_avg_sq=int8 (default: exact)",
    )
    add("--master-weights", action="store_true", help="keep fp32 masters of bf16 and fp16 parameters")
    add("--persist-params", action="store_true", help="commits hold the weights, too")
    add("--durability", choices=DURABILITIES, default="snapshot", help=_of("when the state is committed"))
    add("--host-memory", type=arguments.size, default="2GiB", metavar="SIZE", help=_of("of the buffers"))
    add("--unit-size", type=arguments.size, metavar="SIZE", help="bytes that are paged together")
    add("--bandwidth", type=_bandwidth, metavar="RATE", help='of the drive, reads and writes together: "3.2GB/s"')
    add("--update-rate", type=_count, metavar="N", help="parameters a second that the optimizer updates: 300M")
    add("--iteration", type=arguments.seconds, metavar="S", help="seconds of one (default: steps without a pause)")
    add("--endurance", type=_rated_writes, default=_ENDURANCE, metavar="TBW", help=_of("the drive's rated writes"))
    add("--json", action="store_true", help="print the figures as JSON, in bytes and seconds")
    plan.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    """The command. What cannot work is refused before anything is measured."""
    if args.path is None and args.bandwidth is None:
        raise ConfigError("the drive's speed is needed: name a folder on it, to measure there, or give --bandwidth")
    if args.path is not None:
        check_for_data(args.path)
    try:
        question = _question(args)
        with progress_bar() as advance:
            advance(0, "laying out the state")
            layouts, left_out = lay_out(question)
            given = _given(args, question, layouts, advance)
    except (ConfigError, UnsupportedOptimizerError) as error:
        raise ConfigError(_in_options(str(error))) from None
    rows = answer(question, layouts, given)
    advice = [_in_options(line) for line in advise(question, rows, given)]
    left_out = [_in_options(line) for line in left_out]
    if args.json:
        print(json.dumps(_content(question, rows, given, advice, left_out), indent=2))
    else:
        _print(make_console(), question, rows, given, [*advice, *map(_left_out, left_out)])
    return 0


def _question(args: argparse.Namespace) -> Question:
    if args.parameters is not None and args.model_args is not None:
        raise ConfigError("--model-args is for --model package.module:Class")
    model = of_count(args.parameters) if args.parameters is not None else load_model(args.model, args.model_args)
    config = OffloadConfig(
        path=args.path or ".",
        host_memory=args.host_memory,
        unit_size=args.unit_size,
        state_dtype=args.state_dtype,
        master_weights=args.master_weights,
        persist_params=args.persist_params,
        durability=args.durability,
    )
    dtype = None if args.dtype is None else _DTYPES[args.dtype]
    return Question(model, find_optimizer(args.optimizer), config, args.optimizer_args, dtype)


def _given(args: argparse.Namespace, question: Question, layouts: Sequence[Layout], advance: Any) -> Given:
    if args.bandwidth is not None:
        bandwidth, source, spread = Bandwidth(*[args.bandwidth] * 3), "given", 0.0
    else:
        bandwidth, source, spread = find_bandwidth(args.path, lambda part, text: advance(0.5 * part, text))
    checksums = math.inf
    if args.update_rate is not None:
        rates, update_source = {layout.name: float(args.update_rate) for layout in layouts}, "given"
    else:
        rates, update_source = {}, f"measured now on this CPU, {torch.get_num_threads()} threads"
        for number, layout in enumerate(layouts):
            advance(0.5 + 0.5 * number / len(layouts), f"the update, {layout.name}")
            found = measure_update(question, layout, args.path)
            rates[layout.name], spread = found.rate, max(spread, found.spread)
        if args.durability != "scratch":
            checksums = measure_checksums()
    return Given(bandwidth, source, rates, update_source, checksums, args.iteration, args.endurance, args.path, spread)


def _in_options(text: str) -> str:
    """An error that names settings as options."""
    return re.sub(rf"(?<![-\w])({'|'.join(_OPTIONS)})\b(=True\b)?", lambda match: _OPTIONS[match[1]], text)


def _left_out(reason: str) -> str:
    return f"Left out is {reason}."


# The arguments.


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bandwidth(text: str) -> float:
    try:
        rate = parse_bytes(re.sub(r"\s*/\s*s$", "", text), "")
    except ConfigError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a bandwidth: write it as 3.2GB/s") from None
    if rate < _SLOWEST:
        raise argparse.ArgumentTypeError(f"{text!r} is {rate} bytes a second: write it with its unit, as 3.2GB/s")
    return rate


def _rated_writes(text: str) -> int:
    try:
        return parse_bytes(re.sub(r"(?<=[Bb])[Ww]\s*$", "", text), "")
    except ConfigError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes: write it as 600TB, or 1.2PB") from None


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object: write '{{\"name\": value}}'")
    return content


def _state_dtype(text: str) -> str | Mapping[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    for name, equals, kind in pairs:
        if (kind if equals else name) not in STATE_DTYPES or not name:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(STATE_DTYPES)}, nor names with these")
    if "=" not in text:
        if len(pairs) > 1:
            raise argparse.ArgumentTypeError(f"{text!r} names several: write one, or which state gets which")
        return text
    return {name: kind for name, _, kind in pairs}


# Output.


def _print(console: Console, question: Question, rows: Sequence[Row], given: Given, notes: Sequence[str]) -> None:
    chosen = next(row for row in rows if row.layout.name == layout_name(question.config))
    console.print(Text(_title(question), style="bold"))
    console.print()
    _print_pairs(console, "Taken as given", _assumptions(question, chosen, given))
    _print_pairs(console, f"So, with state_dtype {chosen.layout.name}", _results(chosen, given))
    if len(rows) > 1:
        console.print(_comparison(rows, chosen, given))
        console.print("bf16 and int8 round the state each time it is stored; exact is bit for bit.", style="dim")
        if notes:
            console.print()
    for note in notes:
        console.print(Text(note, style="yellow"))


def _title(question: Question) -> str:
    dtypes = {question.dtype_of(p.dtype) for p in question.model.parameters}
    names = {dtype: name for name, dtype in _DTYPES.items()}
    shown = ", ".join(sorted(names.get(dtype, str(dtype).removeprefix("torch.")) for dtype in dtypes))
    masters = " with fp32 masters" if question.config.master_weights and dtypes - {torch.float32} else ""
    return f"{question.optimizer.__name__} of {_rounded(question.model.numel)} parameters in {shown}{masters}"


def _print_pairs(console: Console, title: str, pairs: Iterator[tuple[str, str]]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, min_width=12)
    grid.add_column(overflow="fold")
    for name, text in pairs:
        grid.add_row(Text(name), Text(text))
    console.print(Text(title, style="bold"))
    console.print(Padding(grid, (0, 0, 1, 2), expand=False))


def _assumptions(question: Question, chosen: Row, given: Given) -> Iterator[tuple[str, str]]:
    model = question.model
    count = f", {len(model.parameters)} tensors" if model.has_shapes else ""
    yield "model", f"{model.source}{count}"
    folder = f" in {given.folder}" if given.folder is not None and given.bandwidth_source != "given" else ""
    yield "drive", f"{given.bandwidth.mixed / 1e9:.2f} GB/s of reads and writes, {given.bandwidth_source}{folder}"
    rate = _rounded(given.update_rates[chosen.layout.name])
    yield "update", f"{rate} parameters a second, {given.update_source}"
    pace = "one after the other" if given.iteration is None else f"every {in_seconds(given.iteration)}"
    yield "steps", f"{pace}; durability {question.config.durability}"
    yield "rated writes", f"{given.endurance / 1e12:,.0f} TB"


def _results(chosen: Row, given: Given) -> Iterator[tuple[str, str]]:
    cost, prediction = chosen.layout.footprint, chosen.prediction
    moved = f"{format_bytes(cost.read)} read, {format_bytes(cost.written)} written"
    yield "a step", moved if cost.read or cost.written else "moves nothing: all of the state stays in memory"
    each = f"drive {in_seconds(prediction.disk_seconds)}, update {in_seconds(prediction.update_seconds)}"
    yield "takes", f"{in_seconds(prediction.seconds)}; the {_limit(prediction)} is the limit ({each})"
    stays = f"{cost.kept} of {cost.units} units of {format_bytes(cost.unit_size)} stay there"
    yield "host memory", f"{format_bytes(cost.host_memory)}; {stays}"
    free = f"; {format_bytes(free_bytes(given.folder))} are free" if given.folder is not None else ""
    more = f"; each snapshot that is kept up to {format_bytes(cost.snapshot_space)} more"
    yield "disk space", f"{format_bytes(cost.disk_space)}{free}{more}"
    if not cost.written:
        yield "rated writes", "not used up: steps write nothing"
        return
    last, steps = in_days(prediction.days(given.endurance)), _rounded(given.endurance / cost.written)
    yield "rated writes", f"used up in {last}: {steps} steps, by {prediction.written_a_day / 1e12:,.1f} TB a day"


def _comparison(rows: Sequence[Row], chosen: Row, given: Given) -> Table:
    table = Table()
    table.add_column("state", no_wrap=True)
    for name in ("read", "written", "a step", "limit", "disk space", "writes last"):
        table.add_column(name, justify="left" if name == "limit" else "right")
    for row in rows:
        cost, prediction = row.layout.footprint, row.prediction
        table.add_row(
            row.layout.name,
            format_bytes(cost.read),
            format_bytes(cost.written),
            in_seconds(prediction.seconds),
            _limit(prediction),
            format_bytes(cost.disk_space),
            in_days(prediction.days(given.endurance)),
            style="bold" if row is chosen else "",
        )
    return table


def _limit(prediction: Prediction) -> str:
    return "drive" if prediction.limit == "disk" else "update"


def in_seconds(seconds: float) -> str:
    """A time for people."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"


def _rounded(count: float) -> str:
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:.0f}"


def _content(
    question: Question, rows: Sequence[Row], given: Given, advice: Sequence[str], left_out: Sequence[str]
) -> dict[str, object]:
    """The answer as JSON. Endless is null."""
    results = [
        {
            "state_dtype": row.layout.name,
            "is_asked_for": row.layout.name == layout_name(question.config),
            **dataclasses.asdict(row.layout.footprint),
            "update_rate": given.update_rates[row.layout.name],
            "disk_seconds": row.prediction.disk_seconds,
            "update_seconds": row.prediction.update_seconds,
            "seconds": row.prediction.seconds,
            "limit": row.prediction.limit,
            "written_a_day": row.prediction.written_a_day,
            "days": row.prediction.days(given.endurance) if row.prediction.written_a_day else None,
        }
        for row in rows
    ]
    return {
        "offload_opt": version("offload_opt"),
        "model": question.model.source,
        "parameters": question.model.numel,
        "optimizer": question.optimizer.__name__,
        "path": None if given.folder is None else str(given.folder.resolve()),
        "bandwidth": {**dataclasses.asdict(given.bandwidth), "source": given.bandwidth_source},
        "update_source": given.update_source,
        "checksum_rate": None if given.checksum_rate == math.inf else given.checksum_rate,
        "spread": given.spread,
        "iteration": given.iteration,
        "endurance": given.endurance,
        "results": results,
        "left_out": list(left_out),
        "advice": list(advice),
    }
