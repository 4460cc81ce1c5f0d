"""What benchmarks/step.py makes of its rounds: medians, ratios, limits, and whether the weights agree."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

MIB = 2**20
EXACT_REFERENCE = {"fp32": "memory-fp32"}
"""With whose weights a contender's are compared, if not with those of "memory"."""

CACHED = ("mmap", "mmap-cold", "tensornvme", "tensornvme-cold")
"""Those that live in the page cache. They take their turns after the others, so that memory is not short for these."""

Rounds = Mapping[str, list[dict[str, Any]]]


def summary(rounds: Rounds, about: Mapping[str, Any], resident: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The row of each contender that took every turn: medians of its rounds and of its ratios of each round."""
    most = max(map(len, rounds.values()))
    full = {name: turns for name, turns in rounds.items() if len(turns) == most}
    rows = {}
    for name, turns in full.items():
        row: dict[str, Any] = {
            figure: median(turn[figure] for turn in turns)
            for figure in ("iteration", "backward", "step", "read", "written", "cpu", "release", "system")
        }
        row["others"] = max(turn["others"] / turn["iteration"] for turn in turns)
        row["peak"] = max(turn["memory"]["peak"] for turn in turns)
        row["anonymous"] = max(turn["memory"]["anonymous"] for turn in turns)
        if "compute" in full:
            row["peak_over_compute"] = row["peak"] - max(turn["memory"]["peak"] for turn in full["compute"])
        twin = resident.get(name, "")
        if twin in full:
            row["bandwidth"] = median(turn["bandwidth"] for turn in turns)
            row |= _limits(name, turns, twin, full, about[name]["parameters"] / about[twin]["parameters"])
        if "deepspeed" in full:
            both = list(zip(full["deepspeed"], turns, strict=True))
            ratios = [theirs["iteration"] / own["iteration"] for theirs, own in both]
            if name in CACHED:  # their turns were not beside its
                ratios = [median(theirs["iteration"] for theirs, _ in both) / row["iteration"]]
            row["speed_to_deepspeed"] = median(ratios)
        if "bytes_read" in turns[0]["own"]:  # the optimizer's own counters beside the kernel's
            counted = sum(turn["read"] + turn["written"] for turn in turns)
            own = sum(turn["own"]["bytes_read"] + turn["own"]["bytes_written"] for turn in turns)
            row["own_bytes_to_kernels"] = own / counted if counted else None
            row["io_wait"] = median(turn["own"]["io_wait_seconds"] for turn in turns)
            row["update"] = median(turn["own"]["update_seconds"] for turn in turns)
        rows[name] = row
    return rows


def _limits(name: str, turns: list[dict[str, Any]], twin: str, full: Rounds, scale: float) -> dict[str, Any]:
    """The limits of a step, in each round of its own, and the step's ratios to them."""
    steps = _steps(name, full)
    moved = [turn["read"] + turn["written"] for turn in turns]
    updates = [scale * seconds for seconds in _steps(twin, full)]
    drive = [size / turn["bandwidth"] for size, turn in zip(moved, turns, strict=True)]
    busy = [turn["busy"] for turn in full[twin]]
    updates_at_once = [scale * seconds for seconds in _steps(twin, {**full, twin: busy})]
    at_once = [
        _overlap(size, turn["bandwidth"], at["bandwidth"], free, slowed)
        for size, turn, at, free, slowed in zip(moved, turns, busy, updates, updates_at_once, strict=True)
    ]
    limits = list(map(max, drive, updates))
    return {
        "limit": median(limits),
        "limit_of_drive": median(drive),
        "limit_of_update": median(updates),
        "limit_at_once": median(at_once),
        "ratio_to_limit": median(step / limit for step, limit in zip(steps, limits, strict=True)),
        "ratio_to_at_once": median(step / limit for step, limit in zip(steps, at_once, strict=True)),
    }


def _overlap(size: float, bandwidth: float, slowed_bandwidth: float, update: float, slowed_update: float) -> float:
    """Seconds for ``size`` bytes and an update that begin at once, and slow each other until the shorter one ends."""
    drive = size / slowed_bandwidth
    if drive > slowed_update:
        return slowed_update + (size - slowed_update * slowed_bandwidth) / bandwidth
    return drive + (1 - drive / slowed_update) * update


def _steps(name: str, full: Rounds) -> list[float]:
    """Seconds of a contender's steps. DeepSpeed does a part of it in backward: all but what "compute" takes."""
    if name.startswith("deepspeed") and "compute" in full:
        pairs = zip(full[name], full["compute"], strict=True)
        return [turn["iteration"] - bare["iteration"] for turn, bare in pairs]
    return [turn["step"] for turn in full[name]]


def agreements(files: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """How the weights agree after the first iterations: shares that are equal, or within some steps of their dtype."""
    result = {}
    for name, path in files.items():
        reference = EXACT_REFERENCE.get(name, "memory")
        dtype = torch.int32 if "fp32" in name else torch.int16
        if name == reference or reference not in files or path.stat().st_size != files[reference].stat().st_size:
            continue
        if name.startswith(("compute", "memory")):
            continue
        size = path.stat().st_size // dtype.itemsize
        pair = (torch.from_file(str(p), size=size, dtype=dtype) for p in (path, files[reference]))
        counts = {"equal": 0, "within 1": 0, "within 2": 0}
        for ours, theirs in zip(*(whole.split(1 << 22) for whole in pair), strict=True):
            apart = (_rank(ours) - _rank(theirs)).abs()
            for most, label in enumerate(counts):
                counts[label] += int((apart <= most).sum())
        result[name] = {label: count / size for label, count in counts.items()}
    return result


def _rank(bits: torch.Tensor) -> torch.Tensor:
    """The place of floats, given as integers of their size, among all floats: neighbours are 1 apart."""
    lowest = torch.iinfo(bits.dtype).min
    wide = bits.long()
    return torch.where(wide < 0, lowest - wide, wide)


def show(
    console: Console,
    args: argparse.Namespace,
    rows: Mapping[str, Mapping[str, Any]],
    agreed: Mapping[str, Mapping[str, float]],
    notes: list[str],
) -> None:
    table = Table(title=f"{args.parameters / 1e6:.0f} M parameters, AdamW, our host_memory {args.host_memory}")
    columns = ["", "iteration\ns", "step\ns", "read\nGB", "written\nGB", "CPU\ns", "limit of\ndrive, s"]
    columns += ["limit of\nupdate, s", "step /\nlimit", "step /\nat once", "speed to\nDeepSpeed", "peak\nMiB"]
    for column in (*columns, "over\ncompute"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        figures = [f"{row[figure]:.3f}" for figure in ("iteration", "step")]
        figures += [f"{row['read'] / 1e9:.2f}", f"{row['written'] / 1e9:.2f}", f"{row['cpu']:.2f}"]
        figures += [_cell(row, figure, 3) for figure in ("limit_of_drive", "limit_of_update")]
        figures += [_cell(row, figure, 2) for figure in ("ratio_to_limit", "ratio_to_at_once", "speed_to_deepspeed")]
        figures += [f"{row['peak'] / MIB:.0f}", f"{row.get('peak_over_compute', 0) / MIB:.0f}"]
        table.add_row(name, *figures)
    console.print(table)
    bandwidths = [row["bandwidth"] for row in rows.values() if "bandwidth" in row]
    console.print("limit: max(drive, update); at once: while both are busy, both as slow as they make each other")
    drive = f"mixed O_DIRECT {median(bandwidths) / 1e9:.2f} GB/s; " if bandwidths else ""
    console.print(f"{drive}medians of {args.rounds} rounds")
    for name, shares in agreed.items():
        said = ", ".join(f"{100 * share:.4f}% {label}" for label, share in shares.items())
        said = "all equal" if shares["equal"] == 1 else said
        console.print(f"weights of {name}, in rounding steps from those in memory: {said}")
    for name, row in rows.items():
        if row["release"] > 0.01:
            console.print(f"{name}: {row['release']:.3f} s a turn, off the clock, until the drive had what was written")
    busiest = max(rows, key=lambda name: float(rows[name]["others"]))
    if rows[busiest]["others"] > 0.1:
        notes = [*notes, f"other programs took up to {rows[busiest]['others']:.1f} cores during a turn of {busiest}"]
    for note in notes:
        console.print(note, markup=False)


def _cell(row: Mapping[str, Any], figure: str, digits: int) -> str:
    return f"{row[figure]:.{digits}f}" if figure in row else ""
