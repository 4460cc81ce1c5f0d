"""Processes that start in no time: forked from one that has imported torch, and has done nothing else with it.

The zygote reads jobs from its standard input, a line each, and forks a child for each, one at a time. The child's
reports, lines of JSON, come through the same pipe as the zygote's own. A child that has ended is not reaped before the
next line comes, so its process id stays its own while somebody may kill it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.crash.training import Job

Line = list[Any]
"""A report: a word, and what belongs to it."""


class Zygote:
    """Starts children. A context manager: at its end the zygote is gone, and the child with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "RANK": "0", "WORLD_SIZE": "1"},
        )
        self._pid: int | None = None

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.read()
        self._process.stdout.close()
        self._process.wait(timeout=60)

    def start(self, work: str, job: Job) -> Iterator[Line]:
        """Let a child do the ``work`` (see ``_serve``). Yields its reports as they come, until it is dead.

        Raises RuntimeError, with its traceback, where it raised something.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([work, dataclasses.asdict(job)]).encode() + b"\n")
        self._process.stdin.flush()
        raised = None
        for text in self._process.stdout:
            line = json.loads(text)
            if line[0] == "pid":
                self._pid = line[1]
            elif line[0] == "raised":
                raised = line[1]
            elif line[0] == "dead":
                self._pid = None
                self._process.stdin.write(b"\n")
                self._process.stdin.flush()
                if raised is not None:
                    raise RuntimeError(f"a child that did {work!r} for {job} raised\n{raised}")
                return
            else:
                yield line
        raise RuntimeError("the zygote has ended")

    def run(self, work: str, job: Job) -> list[Line]:
        """All reports of a child that is left alone."""
        return list(self.start(work, job))

    def kill(self) -> None:
        """SIGKILL the child, if there is one."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)


def report(word: str, *values: Any) -> None:
    """In a child: one write, so that no kill cuts a line in two, nor lets it lag behind what it tells of."""
    os.write(sys.stdout.fileno(), json.dumps([word, *values]).encode() + b"\n")


def _serve() -> None:
    import torch
    import torch._dynamo  # seconds, which each child's first optimizer would take

    from tests.crash import calls, training

    works = {
        "reference": training.reference,
        "train": calls.train_reporting_calls,
        "record": calls.train_recording,
        "look": training.look_at_snapshots,
    }
    torch.set_num_threads(1)
    for text in sys.stdin.buffer:
        work, fields = json.loads(text)
        child = os.fork()
        if child == 0:
            _do(works[work], Job(**fields))
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        report("dead")
        sys.stdin.buffer.readline()
        os.waitpid(child, 0)


def _do(work: Any, job: Job) -> None:
    """Never returns: what stands on the stack belongs to the zygote."""
    report("pid", os.getpid())
    try:
        work(job, report)
    except BaseException:
        report("raised", traceback.format_exc())
    os._exit(0)


if __name__ == "__main__":
    _serve()
