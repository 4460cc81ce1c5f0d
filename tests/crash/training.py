"""The run that crashes: a small model whose every step follows from its number, and what is looked at afterwards.

Everything here runs in a process of its own, forked by ``zygote``. It asserts nothing: it reports, and the test that
started it judges.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from offload_opt import OffloadError, OffloadOptimizer, StoreError

STEPS = 16
RANK = "rank-00000-of-00001"
# Of state and weights; some 20 units with UNIT_SIZE.
WIDTHS = (16, 72, 72, 8)
UNIT_SIZE = 8192

Report = Callable[..., None]
"""Tells the parent of something that has happened: a word, and what belongs to it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run, of which every life has the same job but ``life``; also one look at what it left."""

    root: str
    """Folder of everything."""
    folders: int = 1
    """How many the store is spread over."""
    durability: str = "step"
    commit_every: int = 2
    """Steps, with durability="snapshot"."""
    snapshot_every: int = 3
    """Steps between snapshots in folders of their own."""
    keep: int | None = None
    checksum: str = "read"
    life: int = 0
    """Counts the processes: each names its snapshots anew, so that what a dead one left in a folder stays there."""
    steps: int = STEPS
    """The last one to take."""
    record: str | None = None
    """File for the record of this life's system calls, for ``power_loss``."""
    die_after: tuple[str, int] | None = None
    """With ``record``: the call, and the how manieth of them, after which the process kills itself."""

    @property
    def paths(self) -> list[Path]:
        return [Path(self.root) / f"drive-{index}" for index in range(self.folders)]

    @property
    def snapshots(self) -> Path:
        """Its parents do not exist before the first snapshot: making them last is the package's business too."""
        return Path(self.root) / "backups" / "run" / "snapshots"


def reference(job: Job, report: Report) -> None:
    """What an undisturbed run has at each epoch, by the optimizer without the package."""
    del job
    model, optimizer = _model()
    digests = [digest(model, optimizer)]
    for step in range(1, STEPS + 1):
        _set_gradients(model, optimizer, step)
        optimizer.step()
        digests.append(digest(model, optimizer))
    report("digests", digests)


def train(job: Job, report: Report) -> None:
    """Train from where the store is to the end, and report everything that a crash may then not take back."""
    report("started")
    model, inner = _model()
    optimizer = _offload(inner, job, durability=job.durability)
    try:
        extra = optimizer.restore()
    except StoreError as error:
        report("fresh", str(error))
    else:
        report("restored", optimizer.epoch, digest(model, optimizer), extra)
    for step in range(optimizer.epoch + 1, job.steps + 1):
        _set_gradients(model, optimizer, step)
        optimizer.extra = {"step": step}
        report("steps", step)
        optimizer.step()
        if job.durability == "step":
            if step % 2:  # so that a commit often runs beside what comes next
                optimizer.synchronize()
                report("durable", step)
        elif step % job.commit_every == 0:
            report("commits", step)
            optimizer.snapshot()
            report("durable", step)
        if step % job.snapshot_every == 0:
            name = f"epoch-{step:02d}.life-{job.life}"
            report("snapshots", name)
            optimizer.snapshot(job.snapshots / name, keep=job.keep)
            report("durable", step)
            report("snapshot", name)
    optimizer.synchronize()
    report("trained", optimizer.epoch, digest(model, optimizer))
    optimizer.close()


def look_at_snapshots(job: Job, report: Report) -> None:
    """Restore every folder that looks like a snapshot, into a store that is thrown away."""
    scratch = Path(job.root) / "scratch"
    for directory in sorted(job.snapshots.iterdir()) if job.snapshots.exists() else []:
        if not (directory / RANK).exists():
            report("no snapshot", directory.name, sorted(path.name for path in directory.iterdir()))
            continue
        scratch.mkdir()
        model, inner = _model()
        with OffloadOptimizer(inner, scratch, **_sizes(), durability="scratch", checksum="read") as optimizer:
            try:
                extra = optimizer.restore(directory)
            except (OffloadError, OSError) as error:
                report("damaged", directory.name, repr(error))
            else:
                report("whole", directory.name, optimizer.epoch, digest(model, optimizer), extra)
        shutil.rmtree(scratch)


def count_files(job: Job) -> tuple[int, list[str]]:
    """The most files that any unit of the store has, and the names of what is neither a unit's nor should be there."""
    known = {"LOCK", "MANIFEST.json", "PART.json", "units"}
    most, others = 0, []
    for path in job.paths:
        files = [file.name for file in (path / RANK / "units").glob("*")]
        most = max([most, *Counter(name.split(".")[0] for name in files).values()])
        others += [name for name in files if not name.startswith("unit-")]
        others += [file.name for file in (path / RANK).glob("*") if file.name not in known]
    return most, others


def unaccounted(reported: list[str], whole: set[str], keep: int | None) -> list[str]:
    """Snapshots that were reported and are gone, though there are not ``keep`` newer ones."""
    newer = {name: sum(_epoch_of(other) > _epoch_of(name) for other in whole) for name in reported}
    return [name for name in reported if name not in whole and (keep is None or newer[name] < keep)]


def _epoch_of(name: str) -> str:
    return name.split(".")[0]


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every bit of the weights, of the optimizer's state and of its groups."""
    state = optimizer.state_dict()
    summary = hashlib.sha256(repr(state["param_groups"]).encode())
    for parameter in model.parameters():
        _add(summary, parameter)
    for index, values in sorted(state["state"].items()):
        for name, value in values.items():
            summary.update(f"{index}.{name}".encode())
            _add(summary, value)
    return summary.hexdigest()


def _add(summary: Any, tensor: torch.Tensor) -> None:
    summary.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    summary.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)]
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def _set_gradients(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The batch follows from the step's number; so does the learning rate, which a commit has to hold, too."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(4, WIDTHS[0], generator=generator)
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.01 / step


def _sizes() -> dict[str, Any]:
    return {"host_memory": 4 * UNIT_SIZE, "unit_size": UNIT_SIZE}


def _offload(inner: torch.optim.Optimizer, job: Job, **fields: Any) -> OffloadOptimizer:
    return OffloadOptimizer(inner, job.paths, persist_params=True, checksum=job.checksum, **_sizes(), **fields)
