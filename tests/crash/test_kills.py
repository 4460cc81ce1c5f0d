"""SIGKILL at random instants: what was reported as durable is there afterwards, whole, and training goes on from it."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

from tests.conftest import seed
from tests.crash.calls import NAMES, SYNCS
from tests.crash.training import STEPS, Job, count_files, unaccounted
from tests.crash.zygote import Zygote

KILLS = int(os.environ.get("OFFLOAD_OPT_KILLS", "20"))
KILLS_PER_RUN = 8
# The files of a unit: what is committed, what is newest, one to turn to, and one more while a snapshot has the first.
FILES_OF_A_UNIT = 4


class Run:
    """One run of training over all of its lives, and what it has reported so far."""

    def __init__(self, zygote: Zygote, job: Job, digests: list[str]) -> None:
        self.zygote, self.job, self.digests = zygote, job, digests
        self.durable = 0
        self.snapshots: list[str] = []
        self.is_over = False
        for path in job.paths:
            path.mkdir(parents=True)

    def live(self, kill: tuple[str, int, float] | None) -> str | None:
        """One life. ``kill``: the report, the how manieth of its kind, and how many seconds after it to kill.

        Returns at what the process was when it was killed; None where it came to the end.
        """
        seen: Counter[str] = Counter()
        at = "the start"
        killed = False
        for word, *values in self.zygote.start("train", self.job):
            kind = values[0] if word == "call" else word
            seen[kind] += 1
            if kill is not None and not killed and (kind, seen[kind]) == kill[:2]:
                time.sleep(kill[2])
                self.zygote.kill()  # what it has reported meanwhile is still to be read
                killed = True
            if word == "call":
                at = kind
            elif word == "fresh":
                assert self.durable == 0, values
                assert "no committed epoch" in values[0]
            elif word == "restored":
                epoch, digest, extra = values
                assert epoch >= self.durable
                assert digest == self.digests[epoch]
                assert extra == {"step": epoch}
                most, others = count_files(self.job)
                assert most <= FILES_OF_A_UNIT
                assert len(others) <= 1  # what the process is about to put in place just now
                assert all(name.startswith(".MANIFEST.json.") for name in others)
            elif word == "durable":
                self.durable = values[0]
                at = "training"
            elif word == "snapshot":
                self.snapshots.append(values[0])
            elif word == "trained":
                assert values == [STEPS, self.digests[STEPS]]
                self.is_over = True
        assert killed or self.is_over
        self.look_at_snapshots()
        self.job = dataclasses.replace(self.job, life=self.job.life + 1)
        return at if killed else None

    def look_at_snapshots(self) -> None:
        """Those that were reported are there and, like every folder that looks like one, whole."""
        whole, rest = [], []
        for word, name, *values in self.zygote.run("look", self.job):
            if word == "no snapshot":
                rest.append((name, values))
                continue
            assert word == "whole", (word, name, *values)
            epoch, digest, extra = values
            assert name.startswith(f"epoch-{epoch:02d}.")
            assert digest == self.digests[epoch]
            assert extra == {"step": epoch}
            whole.append(name)
        assert unaccounted(self.snapshots, set(whole), self.job.keep) == []
        if self.is_over:
            assert [name for name, files in rest if files != [[]]] == []
            if self.job.keep is not None and self.snapshots[-1].endswith(f"life-{self.job.life}"):
                assert len(whole) == self.job.keep  # else the process died before it deleted the older ones


def test_what_was_durable_is_there_after_sigkill(zygote: Zygote, digests: list[str], tmp_path: Path) -> None:
    print(f"seed {seed()}, {KILLS} kills")
    dice = random.Random(seed())
    at: Counter[str] = Counter()
    runs = 0
    while at.total() < KILLS:
        job = Job(
            root=str(tmp_path / f"run-{runs}"),
            folders=dice.choice((1, 1, 2)),
            durability=dice.choice(("step", "snapshot")),
            commit_every=dice.randint(1, 3),
            snapshot_every=dice.randint(2, 4),
            keep=dice.choice((None, 1, 2)),
            checksum=dice.choice(("read", "write")),
        )
        print(job)
        run = Run(zygote, job, digests)
        kills = 0
        while not run.is_over:
            kill = _random_kill(dice) if kills < KILLS_PER_RUN and at.total() < KILLS else None
            where = run.live(kill)
            print(f"  {kill} -> {where}, durable: epoch {run.durable}, {len(run.snapshots)} snapshots")
            if where is not None:
                at[where] += 1
                kills += 1
        runs += 1
        shutil.rmtree(job.root)
    print(f"{runs} runs; killed at {dict(at.most_common())}")


def _random_kill(dice: random.Random) -> tuple[str, int, float]:
    """A third at any time, the others soon after the begin of a call by which a commit or a snapshot is made."""
    if dice.random() < 1 / 3:
        return "started", 1, dice.uniform(0, 0.5)
    delay = dice.choice((0.0, dice.uniform(0, 0.0005), dice.uniform(0, 0.01)))
    call = dice.choice((*SYNCS, *NAMES))
    often = call in (*SYNCS, "link", "unlink")
    return call, 1 + int(dice.expovariate(1 / 20 if often else 1 / 3)), delay
