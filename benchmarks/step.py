"""How long an iteration takes with the optimizer's state on disk: beside its own limit, and beside the peers.

    python benchmarks/step.py /mnt/nvme

All train the same model with AdamW (see _peers.py): bf16 Linear layers whose forward and backward cost little, from the
same weights, with the same batches. Each has a process of its own, which stays alive; they take turns, in an order that
rotates, and only one works at a time. Those that live in the page cache, the last ones below, have their turns after
the others, so that memory is not short. A turn is two whole iterations and the wait for what they left under way.
Figures are medians over the rounds, and ratios medians of the ratios of each round.

- exact, bf16, int8: OffloadOptimizer with ``master_weights``, and with that ``state_dtype``.
- deepspeed: ZeRO-3 with its optimizer offload to NVMe, pipelined both ways, and DeepSpeedCPUAdam. It writes gradients
  to the drive in backward, so whole iterations are compared with it.
- memory: AdamW over fp32 masters in memory, by hand. fp32, memory-fp32: fp32 parameters, which need no masters.
- mmap: masters and moments in a mapped file, by hand. While free memory suffices, that measures the page cache; what
  reached the drive of it is in the columns of bytes. mmap-cold: as it is where the state is far larger than the memory.
- tensornvme, tensornvme-cold: TensorNVMe's offloader moves masters and moments around the same AdamW, also through the
  page cache.

The limit of a step is max(bytes / B_mixed, T_update): what it would take if nothing disturbed anything. B_mixed is what
the drive reads and writes at once past the page cache, measured just before and after each turn: by plain system calls
in threads or by the bare handle, whichever is faster; the mean of the two. T_update is the step of the same contender
with so much ``host_memory`` that nothing moves (for DeepSpeed: offload to the CPU), in a process of its own that takes
turns, too, on a model of at most 100 M parameters, from which it is scaled.

The limit "at once" is what a perfect overlap would take: the drive's bytes and the update begin together, each as slow
as the other makes it, until the shorter one ends. How slow that is, is measured: that process trains while a bare
handle in another one reads and writes. Cores and drive share the memory, and in a virtual machine the cores, too.

The threads are as many as torch takes. OpenMP's wait as its runtime has it: they spin for a while. DeepSpeed's sleep,
since its I/O threads want the cores. OMP_WAIT_POLICY sets it for all.
Bytes and memory are what the kernel counted for the process (/proc/self/io, VmHWM since its start was over).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _report import Disk, save
from _results import CACHED, agreements, show, summary
from _turns import Player, user_seconds
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from offload_opt.config import parse_bytes

PEERS = Path(__file__).with_name("_peers.py")
OURS = {"exact": 10.0, "bf16": 6.0, "int8": 4.1, "fp32": 8.0}
"""Our contenders, and the bytes of state that each keeps for a parameter."""
DEFAULT = ("compute", "exact", "bf16", "int8", "deepspeed", "memory", "mmap", "mmap-cold", "tensornvme-cold")
OPTIONAL = ("tensornvme", "fp32", "memory-fp32")
RESIDENT_PARAMETERS = 100e6
"""The most that a contender has whose state is all in memory, for T_update."""

SLEEPING = {"OMP_WAIT_POLICY": "passive"}

DISTURBED = 0.1
"""How many cores others may use during a turn that counts as undisturbed."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder on the drive to measure")
    names = [*DEFAULT, *OPTIONAL]
    parser.add_argument(
        "--contenders", nargs="+", choices=names, default=DEFAULT, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--width", type=int, default=2048, help="of the layers (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="of a batch (default: %(default)s)")
    parser.add_argument("--host-memory", default="128MiB", help="ours (default: %(default)s)")
    parser.add_argument("--durability", default="snapshot", help="ours (default: %(default)s)")
    parser.add_argument(
        "--half", action="store_true", help="ours with host_memory for 1/32 and for half of the state, too"
    )
    parser.add_argument("--sub-group", default="16Mi", help="elements of DeepSpeed's groups (default: %(default)s)")
    parser.add_argument("--deepspeed-threads", type=int, default=2, help="its I/O threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=2, help="of a turn; even, as our order alternates")
    parser.add_argument("--one-by-one", action="store_true", help="each takes all its turns at once: for large models")
    parser.add_argument(
        "--patience",
        type=float,
        default=0,
        help="on a machine that others use: seconds to wait before a turn for them to be idle. A turn during which "
        "they were not is taken again, up to five times (default: %(default)s)",
    )
    parser.add_argument("--file-size", default="1GiB", help="of the files that the drive is measured with")
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Seat:
    """One process at the table."""

    name: str
    contender: str
    parameters: float
    host_memory: int
    resident: str = ""  # the seat that tells its T_update


def seats(args: argparse.Namespace) -> list[Seat]:
    """Who is to be measured, and who is needed to tell their limits."""
    host_memory = parse_bytes(args.host_memory, "host-memory")
    small = min(args.parameters, RESIDENT_PARAMETERS)
    found = []
    for name in args.contenders:
        limited_by = f"{name} resident" if name in OURS or name == "deepspeed" else ""
        found.append(Seat(name, name, args.parameters, host_memory, limited_by))
        if name in OURS:
            if args.half:
                state = int(args.parameters * OURS[name])
                found.append(Seat(f"{name} least", name, args.parameters, state // 32, limited_by))
                found.append(Seat(f"{name} half", name, args.parameters, state // 2, limited_by))
            found.append(Seat(limited_by, name, small, int(small * 16) + (256 << 20)))
        elif name == "deepspeed":
            found.append(Seat(limited_by, "deepspeed-cpu", small, 0))
    return found


def wait_for_quiet(patience: float) -> None:
    """Return when no other process has computed for a while, or after ``patience`` seconds."""
    until, quiet = time.monotonic() + patience, 0
    while time.monotonic() < until and quiet < 3:
        before = user_seconds()
        time.sleep(0.2)
        quiet = quiet + 1 if user_seconds() - before < DISTURBED * 0.2 else 0


class Comparison:
    """The processes, their turns, and the drive's own figures."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, folder
        self.seats = seats(args)
        self.notes: list[str] = []
        self.about: dict[str, dict[str, Any]] = {}
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self._disk = Disk(folder, parse_bytes(args.file_size, "file-size"), 1 << 20, 32)

    def run(self, progress: Progress) -> None:
        task = progress.add_task("", total=len(self.seats) * (1 + self._args.rounds))

        def tick(what: str) -> None:
            progress.update(task, description=what, refresh=True)
            progress.advance(task)

        cached = [seat for seat in self.seats if seat.name in CACHED]
        tables = [[seat for seat in self.seats if seat not in cached], cached]
        if self._args.one_by_one:
            tables = [[seat] for seat in self.seats]
        for table in filter(None, tables):
            with self._players(table, tick) as players:
                for number in range(self._args.rounds):
                    self._round(number, players, tick)
        self._disk.close()

    def weights(self, name: str) -> Path:
        """The file with a contender's weights after its first iterations."""
        return self._folder / f"{name} weights".replace(" ", "-")

    def _round(self, number: int, players: dict[str, Player], tick: Any) -> None:
        twins = {seat.name: seat.resident for seat in self.seats if seat.resident}
        first = number % max(1, len(players))
        order = list(players)[first:] + list(players)[:first]
        for name in order[:: -1 if number % 2 else 1]:
            tick(name)
            before = self._disk.mixed() if name in twins else 0.0
            try:
                turn = self._turn(players[name])
                if name in twins:
                    turn["bandwidth"] = (before + self._disk.mixed()) / 2
                if name in twins.values():
                    turn["busy"] = self._busy(players[name], turn["iteration"])
            except RuntimeError as error:
                self.notes.append(f"{name} ended in round {number + 1}: {error}")
                players.pop(name).close()
                continue
            self.rounds.setdefault(name, []).append(turn)

    def _busy(self, player: Player, iteration: float) -> dict[str, Any]:
        """A turn while the drive is busy; its bandwidth is the drive's meanwhile. ``iteration``: seconds of one."""
        until = time.monotonic() + 60 + 20 * iteration * self._args.iterations
        begun = False

        def goes_on() -> bool:
            nonlocal begun
            if not begun:
                player.begin_turn(self._args.iterations)
                begun = True
            return player.is_busy() and time.monotonic() < until

        bandwidth = self._disk.handle(goes_on)
        return {**player.end_turn(), "bandwidth": bandwidth}

    def _turn(self, player: Player) -> dict[str, Any]:
        """A turn; the least disturbed one of some, where others use the machine and there is patience."""
        turns: list[dict[str, Any]] = []
        while len(turns) < (6 if self._args.patience else 1):
            wait_for_quiet(self._args.patience)
            turns.append(player.turn(self._args.iterations))
            if turns[-1]["others"] < DISTURBED * turns[-1]["iteration"]:
                break
        return {**min(turns, key=lambda turn: turn["others"] / turn["iteration"]), "tries": len(turns)}

    @contextlib.contextmanager
    def _players(self, table: list[Seat], tick: Any) -> Iterator[dict[str, Player]]:
        players: dict[str, Player] = {}
        try:
            for seat in table:
                tick(f"starting {seat.name}")
                with contextlib.suppress(_Absent):
                    players[seat.name] = self._sit_down(seat)
            yield players
        finally:
            for player in players.values():
                player.close()

    def _sit_down(self, seat: Seat) -> Player:
        args = self._args
        folder = self._folder / seat.name.replace(" ", "-")
        folder.mkdir()
        job = {
            "contender": seat.contender,
            "folder": str(folder),
            "parameters": int(seat.parameters),
            "width": args.width,
            "rows": args.rows,
            "host_memory": seat.host_memory,
            "durability": args.durability,
            "sub_group": parse_bytes(args.sub_group, "sub-group"),
            "deepspeed_threads": args.deepspeed_threads,
            "weights": str(self.weights(seat.name)),
        }
        try:
            player = Player(PEERS, [json.dumps(job)], SLEEPING if seat.contender.startswith("deepspeed") else None)
        except RuntimeError as error:
            self.notes.append(f"without {seat.name}: {error}")
            raise _Absent from error
        self.about[seat.name] = player.about
        return player


class _Absent(Exception):
    """A contender that does not run here."""


def main() -> None:
    args = parse()
    if parse_bytes(args.file_size, "file-size") < 32 << 20:
        raise SystemExit("--file-size: the drive is measured by transfers of 32 MiB")
    console = Console()
    if not console.is_terminal:
        console.width = 140
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn only between the turns: a thread that draws all the while would be measured along.
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, bar as progress:
        comparison = Comparison(args, Path(folder))
        comparison.run(progress)
        agreed = agreements({name: comparison.weights(name) for name in comparison.about})
    rows = summary(comparison.rounds, comparison.about, {s.name: s.resident for s in comparison.seats})
    show(console, args, rows, agreed, comparison.notes)
    results = {"rows": rows, "agreement": agreed, "notes": comparison.notes}
    results |= {"about": comparison.about, "rounds": comparison.rounds}
    if not args.no_save:
        settings = {name: value for name, value in vars(args).items() if name not in ("folder", "no_save")}
        settings["deepspeed_environment"] = SLEEPING
        settings["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "")
        console.print(f"written to {save('step_half' if args.half else 'step', settings, results)}")


if __name__ == "__main__":
    main()
