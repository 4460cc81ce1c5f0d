"""Power loss at random instants of recorded runs: what was reported as durable is on any disk that may be left."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import seed
from tests.crash import calls
from tests.crash.calls import Event
from tests.crash.power_loss import Disk
from tests.crash.training import Job, unaccounted
from tests.crash.zygote import Line, Zygote

CUTS = int(os.environ.get("OFFLOAD_OPT_CUTS", "30"))
RECORDED_STEPS = 8

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib calls the system past os there")


@dataclasses.dataclass
class Told:
    """What a run had told its user at some time."""

    durable: int = 0
    snapshots: list[str] = dataclasses.field(default_factory=list)

    def add(self, line: Line) -> None:
        word, *values = line
        if word == "durable":
            self.durable = values[0]
        elif word == "snapshot":
            self.snapshots.append(values[0])


def record(zygote: Zygote, job: Job, deaths: list[tuple[str, int]], digests: list[str], file: Path) -> list[Event]:
    """The events of a run that dies after each of ``deaths``, and then goes on to its end."""
    events: list[Event] = []
    for path in job.paths:
        path.mkdir(parents=True)
    for life, death in enumerate([*deaths, None]):
        of_life = dataclasses.replace(job, life=life, die_after=death, record=str(file), steps=RECORDED_STEPS)
        reports = zygote.run("record", of_life)
        assert (reports[-1] == ["trained", RECORDED_STEPS, digests[RECORDED_STEPS]]) is (death is None)
        # Numbers pair events of one life only.
        numbered = {"write", "sync", "ended"}
        events += [(e[0], (life, e[1]), *e[2:]) if e[0] in numbered else e for e in calls.load(file)]
    shutil.rmtree(job.root)
    return events


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what the disk would hold is thought out, and real syncs take time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        dir=memory if memory.is_dir() and os.access(memory, os.W_OK) else tmp_path
    ) as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("job", "deaths"),
    [
        (Job(root="", durability="step", folders=2), []),
        (
            Job(root="", durability="snapshot", commit_every=1, snapshot_every=2, keep=2),
            [("replace", 4), ("rename", 2)],
        ),
        (Job(root="", durability="step", keep=1, snapshot_every=2), [("replace", 1), ("replace", 3), ("unlink", 20)]),
    ],
    ids=["two drives", "snapshots that replace older ones", "processes that die"],
)
def test_what_was_durable_is_there_after_power_loss(
    job: Job, deaths: list[tuple[str, int]], zygote: Zygote, digests: list[str], tmp_path: Path, quick: Path
) -> None:
    print(f"seed {seed()}, {CUTS} cuts")
    dice = random.Random(seed())
    root = quick / "run"
    job = dataclasses.replace(job, root=str(root))
    events = record(zygote, job, deaths, digests, tmp_path / "record")
    disk = Disk(root, job.paths, events)
    # Half of the cuts just behind what has told somebody that something lasts, or changes what does.
    telling = [i for i, e in enumerate(events, 1) if e[0] in ("rename", "unlink") or e[:2] == ("report", "durable")]
    for _ in range(CUTS):
        cut = dice.choice(telling) if dice.random() < 0.5 else dice.randint(1, len(events))
        told = Told()
        for event in events[:cut]:
            if event[0] == "report":
                told.add(list(event[1:]))
        root.mkdir()
        disk.lose_power(cut, dice)
        about = f"after {cut} of {len(events)} events, the last {events[cut - 1][:3]}, with {told}"
        whole = check_snapshots(zygote.run("look", job), digests, about)
        assert unaccounted(told.snapshots, whole, job.keep) == [], (whole, about)
        on = dataclasses.replace(job, life=99, steps=told.durable + 2)
        check_store(zygote.run("train", on), told.durable, digests, about)
        shutil.rmtree(root)


def check_snapshots(looked: list[Line], digests: list[str], about: str) -> set[str]:
    """Everything that looks like a snapshot is one. Returns their names."""
    whole = set()
    for word, name, *values in looked:
        if word == "no snapshot":
            continue
        assert word == "whole", (name, *values, about)
        epoch, digest, extra = values
        assert digest == digests[epoch], about
        assert extra == {"step": epoch}, about
        whole.add(name)
    return whole


def check_store(reports: list[Line], durable: int, digests: list[str], about: str) -> None:
    """Of a run that goes on with what the disk holds."""
    found = {word: values for word, *values in reports if word in ("restored", "fresh", "trained")}
    if "fresh" in found:
        assert durable == 0, (found["fresh"], about)
        assert "no committed epoch" in found["fresh"][0], about
    else:
        epoch, digest, extra = found["restored"]
        assert epoch >= durable, about
        assert digest == digests[epoch], about
        assert extra == {"step": epoch}, about
    epoch, digest = found["trained"]
    assert epoch >= durable + 2, about
    assert digest == digests[epoch], about
