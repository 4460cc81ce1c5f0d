"""Training that is killed with SIGKILL, several times, and ends with the weights of a run that was not.

    python examples/resume.py /mnt/nvme

``train`` is the part to copy. The rest of the file starts it in a process of its own, kills that at random instants,
starts it again, and compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, batches, directory, standard_library
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from offload_opt import OffloadOptimizer


def train(args: argparse.Namespace, folder: Path) -> None:
    """Train to the last step from wherever the run in ``folder`` has come to."""
    torch.manual_seed(args.seed)
    text = standard_library()
    model = GPT(args.layers, args.width, args.width // 64, args.context)
    optimizer = OffloadOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        folder,
        host_memory=args.host_memory,
        durability="step",  # each step is committed,
        persist_params=True,  # and the weights with it
    )
    if optimizer.committed_epoch is not None:
        optimizer.restore()  # the weights, the state and the options of the param groups, bit for bit
    say(start=optimizer.epoch)
    for step in range(optimizer.epoch, args.steps):
        # What a step needs depends on its number alone: then the number is all that there is to remember.
        tokens = next(batches(text, args.batch, args.context, seed=step))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        say(step=step, loss=loss.item())
    optimizer.synchronize()
    state = (value for each in optimizer.state.values() for value in each.values())
    say(weights=fingerprint(model.parameters()), state=fingerprint(state))
    optimizer.close()


# The rest is the supervisor: it starts the training as a process, kills it, starts it again, and compares.


@dataclass
class Run:
    """What was seen of a run, over all of its processes. Steps count from 0 here, and from 1 on the screen."""

    losses: dict[int, float] = field(default_factory=dict)  # by step
    repeated: dict[int, bool] = field(default_factory=dict)  # steps that were done again: whether the loss was the same
    starts: list[int] = field(default_factory=list)  # the step that each process began with
    killed: list[int] = field(default_factory=list)  # the step in which each process was killed
    weights: str = ""
    state: str = ""
    seconds: float = 0.0


def say(**facts: Any) -> None:
    """Tell the supervisor, in a line of JSON: a float comes out as it went in."""
    print(json.dumps(facts), flush=True)


def fingerprint(values: Iterable[Any]) -> str:
    """A hash of all bytes of all tensors."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(torch.as_tensor(value).detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def supervise(args: argparse.Namespace, folder: Path, kills: Sequence[int], console: Console) -> Run:
    """Run the training to its end, in as many processes as it takes: each but the last is killed in its step."""
    folder.mkdir()
    run, started = Run(), time.perf_counter()
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("killed" if kills else "undisturbed", total=args.steps, loss="")
        for kill in [*kills, None]:
            for facts in process(folder, kill):
                if "start" in facts:
                    run.starts.append(facts["start"])
                    if run.killed:
                        console.print(f"killed in step {run.killed[-1] + 1}, goes on with step {facts['start'] + 1}")
                elif "step" in facts:
                    step, loss = facts["step"], facts["loss"]
                    if step in run.losses:
                        run.repeated[step] = loss == run.losses[step]
                    run.losses[step] = loss
                    progress.update(bar, completed=step + 1, loss=f"loss {loss:.4f}")
                else:
                    run.weights, run.state = facts["weights"], facts["state"]
            if kill is not None:
                run.killed.append(max(run.losses) + 1)
    run.seconds = time.perf_counter() - started
    return run


def process(folder: Path, kill: int | None) -> Iterator[dict[str, Any]]:
    """What one process of the training says. It is killed at a random instant of step ``kill``, or just after."""
    child = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--train-in", str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    killed = False
    try:
        before = time.perf_counter()
        for line in child.stdout:  # what it said before its end is read to the end
            facts = json.loads(line)
            yield facts
            now = time.perf_counter()
            if kill is not None and not killed and facts.get("step", -1) + 1 >= kill:
                time.sleep(random.uniform(0, now - before))  # a step takes about as long as the one before it
                child.kill()  # SIGKILL
                killed = True
            before = now
    except BaseException:
        child.kill()
        raise
    finally:
        status = child.wait()
    if status != (-signal.SIGKILL if killed else 0):
        raise SystemExit(f"the training ended with status {status}")


def report(args: argparse.Namespace, plain: Run, killed: Run) -> tuple[Table, bool]:
    """The table at the end, and whether everything is equal."""
    table = Table(title=f"{args.steps} steps of AdamW, killed {len(killed.killed)} times")
    table.add_column()
    table.add_column("undisturbed", justify="right")
    table.add_column("killed", justify="right")

    def numbers(steps: Iterable[int]) -> str:
        return ", ".join(str(step + 1) for step in steps) or "none"

    def compared(equal: bool) -> str:
        return "bit-equal" if equal else "DIFFERENT"

    again = list(killed.repeated.values())
    equal = [killed.losses == plain.losses and all(again), killed.weights == plain.weights, killed.state == plain.state]
    table.add_row("killed in step", "", numbers(killed.killed))
    table.add_row("went on with step", "", numbers(killed.starts[1:]))
    table.add_row("steps done twice", "", numbers(killed.repeated))
    for step in (0, args.steps - 1):
        table.add_row(f"loss at step {step + 1}", f"{plain.losses[step]:.6f}", f"{killed.losses[step]:.6f}")
    table.add_row(f"all {args.steps} losses", "", compared(equal[0]))
    table.add_row("weights at the end", plain.weights[:12], compared(equal[1]))
    table.add_row("optimizer state at the end", plain.state[:12], compared(equal[2]))
    table.add_row("seconds", f"{plain.seconds:.0f}", f"{killed.seconds:.0f}")
    return table, all(equal)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=directory, help="on the drive to use; what is made in it is removed at the end")
    parser.add_argument("--kills", type=int, default=3, help="how often it is killed (default: %(default)s)")
    parser.add_argument("--host-memory", default="4MiB", help="host memory for optimizer state (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)  # this process is one that may be killed
    args = parser.parse_args()
    if not 1 <= args.kills <= args.steps // 4 - 1:
        parser.error("--kills must be 1 or more, and there must be four --steps for each, and four more")
    return args


def main() -> None:
    args = parse()
    if args.train_in:
        logging.getLogger("offload_opt").setLevel(logging.ERROR)  # that something is discarded is what this is about
        train(args, args.train_in)
        return
    console = Console()
    args.folder.mkdir(parents=True, exist_ok=True)
    stretch = args.steps // (args.kills + 1)
    kills = [stretch * number + random.randrange(2, stretch) for number in range(args.kills)]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="resume-") as made:
        plain = supervise(args, Path(made, "undisturbed"), [], console)
        killed = supervise(args, Path(made, "killed"), kills, console)
    table, equal = report(args, plain, killed)
    console.print(table)
    if not equal:
        raise SystemExit("the run that was killed is not the run that was not")


if __name__ == "__main__":
    main()
