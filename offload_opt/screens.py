"""What ``offload-opt inspect`` and ``offload-opt verify`` show."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .config import format_bytes
from .inspection import RankSummary, SnapshotSummary, in_short
from .manifest import decode_value
from .verification import Damage, RankReport

_TENSORS_SHOWN = 20  # of a damaged unit
_HELD = {"state": "state", "weights": "weights", "manifest": "in the manifest"}


def print_store(console: Console, store: Path, ranks: Sequence[RankSummary]) -> None:
    """The ranks' commits in one folder, as tables."""
    console.print(Text(str(store), style="bold"), soft_wrap=True)
    console.print(_ranks_table(ranks))
    console.print(_facts(ranks))
    console.print(_states_table(ranks))
    if any(rank.snapshots for rank in ranks):
        console.print(_snapshots_table(ranks))
    console.print()


def _table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """Only the first column is folded where the screen is narrow."""
    table = Table(title=title and escape(title), title_justify="left")
    for column in columns:
        side: JustifyMethod = "right" if column in right else "left"
        table.add_column(column, justify=side, overflow="fold", no_wrap=bool(table.columns))
    return table


def _ranks_table(ranks: Sequence[RankSummary]) -> Table:
    right = ("epoch", "params", "units", "bytes")
    table = _table("rank", "epoch", "committed", "run", "params", "units", "bytes", right=right)
    for rank in ranks:
        without = rank.parameters_in_groups - rank.parameters
        table.add_row(
            f"{rank.rank} of {rank.world_size}",
            str(rank.epoch),
            _local_time(rank.created),
            Text(rank.run[:6]),
            f"{rank.parameters} of {rank.parameters_in_groups}" if without else str(rank.parameters),
            str(rank.units),
            format_bytes(rank.nbytes),
        )
    return table


def _facts(ranks: Sequence[RankSummary]) -> Padding:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, values in (
        ("optimizer", [rank.optimizer for rank in ranks]),
        ("weights", [_weights(rank) for rank in ranks]),
        ("checksums", [_checksums(rank) for rank in ranks]),
        ("extra", [in_short(decode_value(rank.extra)) for rank in ranks]),
    ):
        different = len(set(values)) > 1
        for rank, value in zip(ranks, values, strict=True) if different else [(None, values[0])]:
            grid.add_row(name, Text(f"rank {rank.rank}: {value}" if rank else value))
            name = ""
    spread = {rank.folders for rank in ranks} - {1}
    if spread:
        grid.add_row("folders", f"the units lie in {max(spread)} folders, of which this is the first")
    for note in _notes(ranks):
        grid.add_row(Text("note", style="yellow"), Text(note, style="yellow"))
    return Padding(grid, (0, 0, 0, 2), expand=False)


def _weights(rank: RankSummary) -> str:
    if rank.weights_units is None or rank.weights_bytes is None:
        return "no: only the optimizer's state"
    return f"yes, {format_bytes(rank.weights_bytes)} in {rank.weights_units} of the units"


def _checksums(rank: RankSummary) -> str:
    if rank.units_with_checksum == rank.units:
        return "of every unit"
    return f"of {rank.units_with_checksum} of {rank.units} units" if rank.units_with_checksum else "none"


def _notes(ranks: Sequence[RankSummary]) -> list[str]:
    """What is odd about the ranks beside each other."""
    notes = []
    for size in sorted({rank.world_size for rank in ranks}):
        own = [rank for rank in ranks if rank.world_size == size]
        missing = sorted(set(range(size)) - {rank.rank for rank in own})
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            notes.append(f"nothing is here of rank {shown} of {size}")
        if len({rank.epoch for rank in own}) > 1:
            notes.append("the ranks' epochs differ")
    return notes


def _states_table(ranks: Sequence[RankSummary]) -> Table:
    """Kinds of state, summed up over the ranks."""
    table = _table("tensor", "held as", "dtype", "codec", "parameters", "bytes", right=("parameters", "bytes"))
    sums: dict[tuple[str, str, str, str], tuple[int, int]] = {}
    for state in (state for rank in ranks for state in rank.states):
        kind = (state.name, state.held, state.dtype, state.codec)
        parameters, nbytes = sums.get(kind, (0, 0))
        sums[kind] = parameters + state.parameters, nbytes + state.nbytes
    names = list(dict.fromkeys(name for name, *_ in sums))
    for kind in sorted(sums, key=lambda kind: (list(_HELD).index(kind[1]), names.index(kind[0]))):
        (name, held, dtype, codec), (parameters, nbytes) = kind, sums[kind]
        table.add_row(Text(name), _HELD[held], dtype, codec, str(parameters), format_bytes(nbytes) if nbytes else "")
    return table


def _snapshots_table(ranks: Sequence[RankSummary]) -> Table:
    """The runs' snapshots, summed up over the ranks."""
    parts: dict[str, list[SnapshotSummary]] = {}
    for part in (snapshot for rank in ranks for snapshot in rank.snapshots):
        parts.setdefault(part.path, []).append(part)
    parents = {str(Path(path).parent) for path in parts}
    title = f"Snapshots in {parents.pop()}" if len(parents) == 1 else "Snapshots"
    right = ("epoch", "bytes", "shared", "its own")
    table = _table("snapshot", "epoch", "made", "bytes", "shared", "its own", right=right, title=title)
    for path, of_ranks in parts.items():
        nbytes, own = sum(part.nbytes for part in of_ranks), sum(part.own_bytes for part in of_ranks)
        whole = [part for part in of_ranks if part.epoch is not None]
        name = Text(path if title == "Snapshots" else Path(path).name)
        for problem in dict.fromkeys(part.problem for part in of_ranks if part.problem):
            name.append(f"\n{problem}", style="bold red")
        epoch, made = (str(whole[0].epoch), _local_time(whole[0].created)) if whole else ("", "")
        table.add_row(name, epoch, made, format_bytes(nbytes), format_bytes(nbytes - own), format_bytes(own))
    return table


def _local_time(text: str) -> str:
    """A manifest's time for people, in their time zone."""
    try:
        return f"{datetime.datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError):
        return text[:16]


def print_verified(console: Console, reports: Sequence[RankReport]) -> None:
    """What is damaged, and a closing line."""
    for report in reports:
        if report.is_whole:
            continue
        if report.folder not in report.problem:
            epoch = "" if report.epoch is None else f", epoch {report.epoch}"
            console.print(Text(f"{report.folder}{epoch}", style="bold"), soft_wrap=True)
        if report.problem:
            console.print(Text(report.problem, style="bold red"), soft_wrap=True)
        for damage in report.damages:
            _print_damage(console, damage)
        console.print()
    console.print(_closing_line(reports))


def _print_damage(console: Console, damage: Damage) -> None:
    console.print(Text(f"  {damage.path}", style="red"), soft_wrap=True)
    console.print(Text(f"    {damage.problem}", style="bold red"), soft_wrap=True)
    if not damage.tensors:
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold")
    for _ in range(2):
        grid.add_column(no_wrap=True, justify="right")
    for tensor in damage.tensors[:_TENSORS_SHOWN]:
        grid.add_row(Text(tensor.name), f"at byte {tensor.offset}", format_bytes(tensor.nbytes))
    console.print("    Damaged is some of:")
    console.print(Padding(grid, (0, 0, 0, 6), expand=False))
    rest = len(damage.tensors) - _TENSORS_SHOWN
    if rest > 0:
        console.print(f"      and {rest} more tensors: --json names them all")


def _closing_line(reports: Sequence[RankReport]) -> Text:
    units, nbytes = sum(report.units for report in reports), sum(report.nbytes for report in reports)
    all_units = f"{units} unit{'s' * (units != 1)} ({format_bytes(nbytes)})"
    unchecked = sum(report.unchecked_units for report in reports)
    rest = ""
    if unchecked:
        size = format_bytes(sum(report.unchecked_bytes for report in reports))
        rest = f", of which {unchecked} ({size}) had no checksum: they can be read, and were not compared"
    damaged = sum(len(report.damages) for report in reports)
    failed = sum(bool(report.problem) for report in reports)
    if not damaged and not failed:
        return Text(f"All is well: {all_units} verified{rest}.", style="green")
    parts = [f"{failed} of {len(reports)} ranks could not be verified"] if failed else []
    if units:
        parts.append(f"{damaged} of {all_units} damaged{rest}")
    return Text(f"{'; '.join(parts)}.", style="bold red")
