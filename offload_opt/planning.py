"""What ``offload-opt plan`` finds out: the layouts of a model's state, what this machine does with them, what it costs.

Layouts are those that OffloadOptimizer would make, of parameters without memory. The machine's two rates, of the drive
and of the update, are measured by the code that training uses.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .bandwidth import LEAST_MEASURED, Direction, ScratchFiles, run
from .buffers import MAX_BUFFERS
from .checksums import checksum_of
from .config import OffloadConfig, format_bytes
from .errors import ConfigError, OffloadWarning
from .folders import check_folder, free_bytes
from .inner import InnerOptimizer
from .model_sizes import Model
from .optimizer import OffloadOptimizer
from .parameters import check_state_names, parameters_of, plan_parameters
from .planner import Bandwidth, Footprint, Prediction, balancing_memory, footprint, predict
from .tuning import load_tuned, settings_for
from .unit_file import unit_header
from .units import Paging, plan_units
from .weights import plan_weights

_MEASURED_ON = 1 << 30
"""Bytes of test files, where there is room."""
_UPDATED = 16_000_000
"""Parameters of the measured update: they and their state are far larger than a processor's cache."""
_ROUNDS = 3
_CHECKSUMMED = 64 << 20
_PLENTY = 1 << 40
_FAR_ABOVE = 1.25  # times the update's time: less is not worth a line
_FEW_DAYS = 365
_NOISE = 0.25

Progress = Callable[[float, str], None]
"""Called with the part that is done, 0 to 1, and what is being measured."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be trained, and how."""

    model: Model
    optimizer: type[torch.optim.Optimizer]
    config: OffloadConfig
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of the optimizer."""
    dtype: torch.dtype | None = None
    """Of all parameters. None: the model's own or, where nothing says it, float32."""

    def dtype_of(self, own: torch.dtype | None) -> torch.dtype:
        """What a parameter has, whose ``own`` dtype the model says or does not."""
        return self.dtype or own or torch.float32


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to store the state, ``name`` in words, and what it moves and takes."""

    name: str
    config: OffloadConfig
    footprint: Footprint


@dataclasses.dataclass(frozen=True)
class Given:
    """Figures, and in words where they are from."""

    bandwidth: Bandwidth
    bandwidth_source: str
    update_rates: Mapping[str, float]
    """Parameters a second, by the name of a layout."""
    update_source: str
    checksum_rate: float = math.inf
    """Bytes a second."""
    iteration: float | None = None
    """Seconds from one step to the next; None: one step after the other."""
    endurance: float = math.inf
    """Bytes that the drive is rated to have written."""
    folder: Path | None = None
    spread: float = 0.0
    """By how much repeats of a measurement differ, of their median: the most of all that was measured."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A rate a second, the median of a few, and by how much of it they differ."""

    rate: float
    spread: float

    @classmethod
    def of(cls, rates: Sequence[float]) -> Measured:
        """The median of ``rates``."""
        median = statistics.median(rates)
        return cls(median, (max(rates) - min(rates)) / median)


@dataclasses.dataclass(frozen=True)
class Row:
    """A layout, and what it costs here."""

    layout: Layout
    prediction: Prediction


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """An optimizer of torch by its name. Raises ConfigError that says which one is near it."""
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name in classes:
        return classes[name]
    near = {key.lower(): key for key in classes}.get(name.lower()) or next(
        iter(difflib.get_close_matches(name, classes, n=1)), ""
    )
    hint = f"; did you mean {near}?" if near else ""
    raise ConfigError(f"{name!r} is no optimizer of torch.optim{hint or ': it has ' + ', '.join(sorted(classes))}")


# Layouts.


def lay_out(question: Question) -> tuple[list[Layout], list[str]]:
    """The layouts of a model's state: stored as it is, as bf16, as int8, and as the config says. Nothing is measured.

    Returns:
        The layouts, that of the config among them, and why others are left out.

    Raises:
        ConfigError: The config's layout is not possible, or nothing needs to be stored.
        UnsupportedOptimizerError: The optimizer cannot be paged.
    """
    own = question.config
    kinds: dict[str, OffloadConfig] = {
        kind: dataclasses.replace(own, state_dtype=kind) for kind in ("exact", "bf16", "int8")
    }
    kinds[layout_name(own)] = own
    inner = _optimizer_of(question)
    layouts, left_out = [], []
    for name, config in kinds.items():
        try:
            layouts.append(Layout(name, config, _footprint(question, inner, config)))
        except ConfigError as error:
            if config is own:
                raise
            left_out.append(f"{name}: {error}")
    return layouts, left_out


def layout_name(config: OffloadConfig) -> str:
    """How the state is stored, in a word."""
    kinds = config.state_dtype
    return kinds if isinstance(kinds, str) else ", ".join(f"{name}={kind}" for name, kind in kinds.items())


def _footprint(question: Question, inner: InnerOptimizer, config: OffloadConfig) -> Footprint:
    groups = inner.optimizer.param_groups
    plans = plan_parameters(inner, groups, list(parameters_of(groups)), config)
    check_state_names(plans, config)
    state = plan_units(plans, *config.memory)
    if not state:
        raise ConfigError(f"{inner.name} keeps no state to speak of with these options, so there is nothing to offload")
    weights = plan_units(plan_weights(groups), *config.memory, first_index=len(state)) if config.holds_weights else []
    return footprint(
        state,
        weights,
        host_memory=config.memory[0],
        max_buffers=MAX_BUFFERS,
        durability=config.durability,
        file_size=lambda unit: len(unit_header(unit)) + unit.nbytes,
    )


def _optimizer_of(question: Question) -> InnerOptimizer:
    """The optimizer, over parameters on the meta device."""
    parameters = [
        torch.nn.Parameter(torch.empty(p.shape, dtype=question.dtype_of(p.dtype), device="meta"))
        for p in question.model.parameters
    ]
    inner = InnerOptimizer(_make(question, parameters))
    if inner.paging is Paging.WHOLE and not question.model.has_shapes:
        raise ConfigError(
            f"the state of {inner.name} depends on the shapes of the parameters: name the model, not only their number"
        )
    return inner


def _make(question: Question, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    kind = question.optimizer
    try:
        return kind(parameters, **question.options)
    except (TypeError, ValueError, RuntimeError) as error:
        hint = "" if question.model.has_shapes else " (a number of parameters has no shapes: name the model)"
        raise ConfigError(f"torch.optim.{kind.__name__} cannot be made for these parameters: {error}{hint}") from error


# What this machine does.


def find_bandwidth(folder: Path, progress: Progress, seconds: float = 4.0) -> tuple[Bandwidth, str, float]:
    """What a folder's drive does: as ``offload-opt tune`` found it or, where it has not been tuned, measured now.

    Returns it, in words where it is from, and by how much of their median repeats differ.

    Raises:
        ConfigError: There is no room for test files, or what `tune` left is malformed. OSError: a transfer failed.
    """
    tuned = load_tuned(folder)
    if tuned is not None:
        return Bandwidth(tuned.mixed, tuned.read, tuned.write), f"found by offload-opt tune on {tuned.date[:10]}", 0.0
    room = free_bytes(check_folder(folder)) * 8 // 9
    if room < LEAST_MEASURED:
        raise ConfigError(f"{folder} has no room for test files: give --bandwidth, or make space")
    progress(0, "writing the test files")
    aio = settings_for(folder)
    directions: tuple[Direction, ...] = ("mixed", "read", "write")
    rates: dict[Direction, list[float]] = {direction: [] for direction in directions}
    with ScratchFiles(folder, min(_MEASURED_ON, room), seconds / 4) as files:
        for number in range(_ROUNDS * len(directions)):
            direction = directions[number % len(directions)]
            progress(0.25 + 0.75 * number / _ROUNDS / len(directions), f"the drive, {direction}")
            rates[direction].append(run([files], aio, direction, 0.75 * seconds / _ROUNDS / len(directions))[0])
    found = [Measured.of(rates[direction]) for direction in directions]
    return Bandwidth(*[each.rate for each in found]), "measured now", max(each.spread for each in found)


def measure_update(question: Question, layout: Layout, folder: Path | None, seconds: float = 0.7) -> Measured:
    """Parameters a second that the optimizer updates here, its state stored as ``layout`` has it, but all in memory.

    It is the real optimizer, over parameters of the model, or as many as there are of a part of it.

    Args:
        question: The model and the optimizer.
        layout: One of its layouts.
        folder: Where files are made, which hardly anything is written to. None: where temporary files go.
        seconds: The time that it takes, once the state is there.

    Raises:
        OSError: There is no room for the files of the state.
    """
    parameters = []
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in _sample(question, layout.footprint):
        parameter = torch.nn.Parameter(torch.empty(shape).normal_(0, 0.02, generator=generator).to(dtype))
        parameter.grad = torch.empty(shape).normal_(0, 1e-3, generator=generator).to(dtype)
        parameters.append(parameter)
    config = dataclasses.replace(
        layout.config, host_memory=_PLENTY, unit_size=layout.footprint.unit_size, durability="scratch"
    )
    with tempfile.TemporaryDirectory(prefix=".offload-opt-", dir=folder) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", OffloadWarning)  # of memory that cannot be locked, which this is not about
        config = dataclasses.replace(config, path=place)
        with OffloadOptimizer(_make(question, parameters), config) as optimizer:
            for _ in range(2):  # the first one makes the state
                optimizer.step()
            times: list[float] = []
            while len(times) < _ROUNDS or sum(times) < seconds:
                started = time.perf_counter()
                optimizer.step()
                times.append(time.perf_counter() - started)
    numel = sum(p.numel() for p in parameters)
    return Measured.of([numel / each for each in times])


def _sample(question: Question, layout: Footprint) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of parameters to measure with: of the model's, as many as are enough and stay in memory."""
    model = question.model
    most = min(_UPDATED, MAX_BUFFERS // 2 * layout.unit_size * model.numel // layout.state)
    sizes = [(math.prod(p.shape), p.shape, question.dtype_of(p.dtype)) for p in model.parameters]
    chosen, total = [], 0
    for numel, shape, dtype in sizes:
        if total + numel <= most:
            chosen.append((shape, dtype))
            total += numel
    if chosen and total >= most // 4:
        return chosen
    # All are large. Where the shape does not matter, a part of one will do.
    numel, shape, dtype = min(size for size in sizes if size[0])
    if model.has_shapes and InnerOptimizer(_make(question, [_meta(shape, dtype)])).paging is Paging.WHOLE:
        return [(shape, dtype)]
    return [((min(most, max(numel, 1)),), dtype)]


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))


def measure_checksums() -> float:
    """Bytes a second that checksums are made of."""
    data = torch.zeros(_CHECKSUMMED, dtype=torch.uint8, device="cpu")
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        checksum_of(data)
        times.append(time.perf_counter() - started)
    return _CHECKSUMMED / statistics.median(times)


# The answer.


def answer(question: Question, layouts: Sequence[Layout], given: Given) -> list[Row]:
    """What each layout costs."""
    return [
        Row(
            layout,
            predict(
                layout.footprint,
                parameters=question.model.numel,
                bandwidth=given.bandwidth,
                update_rate=given.update_rates[layout.name],
                checksum_rate=given.checksum_rate,
                iteration=given.iteration,
            ),
        )
        for layout in layouts
    ]


def advise(question: Question, rows: Sequence[Row], given: Given) -> list[str]:
    """What is off about the way that the question asks for, and what to do about it."""
    chosen = next(row for row in rows if row.layout.name == layout_name(question.config))
    others = [row for row in rows if row is not chosen]
    lines = [_about_noise(given), _about_pace(chosen)]
    lines += [_about_space(chosen, others, given), _about_memory(chosen), _about_speed(chosen, others)]
    lines.append(_about_endurance(chosen, others, given))
    return [line for line in lines if line]


def _about_noise(given: Given) -> str:
    if given.spread <= _NOISE:
        return ""
    return (
        f"Repeats of what was measured differ by up to {100 * given.spread:.0f} %: the machine is busy, or not steady. "
        "Ask again when it is quiet."
    )


def _about_pace(chosen: Row) -> str:
    now = chosen.prediction
    if now.iteration is None or now.iteration >= now.seconds:
        return ""
    return (
        f"A step takes {now.seconds / now.iteration:.1f} x as long as --iteration says that an iteration does, which "
        "its step is a part of: the pace is that of the steps."
    )


def _about_space(chosen: Row, others: Sequence[Row], given: Given) -> str:
    if given.folder is None:
        return ""
    free, needed = free_bytes(given.folder), chosen.layout.footprint.disk_space
    if needed <= free:
        return ""
    scratch = "--durability scratch"
    wants = [(f"--state-dtype {row.layout.name}", row.layout.footprint.disk_space) for row in others]
    ways = [f"{option} needs {format_bytes(size)}" for option, size in wants if size <= free][:1]
    if chosen.layout.config.durability != "scratch":
        halves = [(scratch, needed // 2), *((f"{option} {scratch}", size // 2) for option, size in wants)]
        ways += [
            f"{options} needs {format_bytes(size)}, and does not survive a crash"
            for options, size in halves
            if size <= free
        ][:1]
    found = f"The state does not fit: it needs {format_bytes(needed)}, and {format_bytes(free)} are free"
    return f"{found} in {given.folder}{_listed(ways) or '. A larger drive is needed.'}"


def _about_memory(chosen: Row) -> str:
    there, taken = physical_memory(), chosen.layout.footprint.host_memory
    if taken <= there:
        return ""
    return (
        f"Buffers would take {format_bytes(taken)}, and this machine has {format_bytes(there)} of memory: give a "
        "smaller --host-memory."
    )


def _about_speed(chosen: Row, others: Sequence[Row]) -> str:
    now = chosen.prediction
    if now.disk_seconds <= _FAR_ABOVE * now.update_seconds:
        return ""
    ways = []
    fastest = min(others, key=lambda row: row.prediction.seconds, default=chosen)
    if fastest.prediction.seconds < 0.9 * now.seconds:
        gain = now.seconds / fastest.prediction.seconds
        ways.append(f"--state-dtype {fastest.layout.name} makes a step {gain:.1f} x faster")
    memory = balancing_memory(now, chosen.layout.config.memory[0], commits=chosen.layout.config.durability == "step")
    if memory is not None and memory <= physical_memory():
        rounded = f"{math.ceil(memory / (1 << 30))}GiB"
        ways.append(f"--host-memory {rounded} keeps so much in memory that the drive keeps up with the update")
    ratio = now.disk_seconds / now.update_seconds
    return f"The drive takes {ratio:.1f} x as long as the update{_listed(ways) or '. A faster drive would help.'}"


def _about_endurance(chosen: Row, others: Sequence[Row], given: Given) -> str:
    days = chosen.prediction.days(given.endurance)
    if days >= _FEW_DAYS:
        return ""
    ways = []
    # Not by days: what makes steps slow makes a drive last.
    least = min(others, key=lambda row: row.layout.footprint.written, default=chosen)
    written = least.layout.footprint.written
    if written < 0.7 * chosen.layout.footprint.written:
        less = f"{chosen.layout.footprint.written / written:.1f} x less" if written else "nothing"
        ways.append(f"--state-dtype {least.layout.name} writes {less} a step")
    if given.iteration is None:
        ways.append("--iteration says how often a step is really made")
    pace = "Steps without a pause use" if given.iteration is None else "Steps at this pace use"
    return f"{pace} up the drive's rated writes in {in_days(days)}{_listed(ways) or '.'}"


def _listed(ways: Sequence[str]) -> str:
    return f": {'; or '.join(ways)}." if ways else ""


def in_days(days: float) -> str:
    """A time for people."""
    if days == math.inf:
        return "for ever"
    if days < 2:
        return f"{24 * days:.1f} hours"
    return f"{days:.0f} days" if days < 1000 else f"{days / 365.25:.0f} years"


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
