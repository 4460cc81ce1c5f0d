"""Contenders that take turns: each in a process of its own, which stays alive and works only when it is told to.

``Player`` is the driver's side, ``serve`` the process's. They talk in lines of JSON. A turn is some whole iterations,
and its answer what they took: seconds, bytes, CPU seconds and memory, counted by the process itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

_PATIENCE_AT_END = 60
"""Seconds in which a process is to end."""


class Contender(Protocol):
    """A training loop. Only ``backward``, ``step`` and ``settle`` are on the clock."""

    def prepare(self) -> None:
        """What comes before an iteration, off the clock."""

    def backward(self) -> None:
        """Forward and backward of the next batch."""

    def step(self) -> None: ...

    def settle(self) -> None:
        """Wait for what a step has left under way: the end of a turn."""

    def release(self) -> None:
        """Give back what is not needed until the next turn, off the clock. Afterwards the process does nothing."""

    def figures(self) -> dict[str, float]:
        """The contender's own counters, of all its life."""

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Counters:
    """What the kernel has counted for this process, all its threads together, and for all programs together."""

    read: int
    written: int
    cpu: float
    system: float
    others: float
    """User-mode CPU seconds of all other processes."""

    @classmethod
    def now(cls) -> Counters:
        found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        # read_bytes and write_bytes: what went to the drive or came from it, O_DIRECT too. A page of a mapped file
        # counts as written when it becomes dirty.
        others = user_seconds() - usage.ru_utime
        both = usage.ru_utime + usage.ru_stime
        return cls(int(found["read_bytes"]), int(found["write_bytes"]), both, usage.ru_stime, others)


def user_seconds() -> float:
    """CPU seconds that all processes have had in user mode since the machine started."""
    user, nice = Path("/proc/stat").read_text().split(maxsplit=3)[1:3]
    return (int(user) + int(nice)) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, int]:
    """Bytes of this process: the peak resident set since ``forget_peak()``, and what is in memory now, by kind."""
    status = Path("/proc/self/status").read_text()
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}
    return {
        "peak": found["VmHWM"],
        "anonymous": found["RssAnon"] + found["RssShmem"],
        "mapped_files": found["RssFile"],
        "locked": found["VmLck"],
    }


def forget_peak() -> None:
    """Let VmHWM start anew, so that it does not tell of how the process started."""
    with contextlib.suppress(OSError):  # some sandboxes forbid it
        Path("/proc/self/clear_refs").write_text("5")


def take_turn(contender: Contender, iterations: int) -> dict[str, Any]:
    """Some iterations, and what one of them took. The wait at the end is part of the last step."""
    own, before = contender.figures(), Counters.now()
    total = backward = 0.0
    for number in range(iterations):
        contender.prepare()
        started = time.perf_counter()
        contender.backward()
        backward += time.perf_counter() - started
        contender.step()
        if number == iterations - 1:
            contender.settle()
        total += time.perf_counter() - started
    used = memory()
    after = Counters.now()
    now = contender.figures()
    started = time.perf_counter()
    contender.release()
    released = time.perf_counter() - started
    return {
        "iteration": total / iterations,
        "backward": backward / iterations,
        "step": (total - backward) / iterations,
        "read": (after.read - before.read) / iterations,
        "written": (after.written - before.written) / iterations,
        "cpu": (after.cpu - before.cpu) / iterations,
        "system": (after.system - before.system) / iterations,
        "others": max(0.0, after.others - before.others) / iterations,
        "release": released,
        "memory": used,
        "own": {name: (now[name] - own[name]) / iterations for name in now},
    }


def serve(make: Any) -> None:
    """The process's life: ``make`` the contender, then turns until the input ends.

    ``make`` returns (contender, what the driver is to know of it).
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    contender, about = make()
    contender.release()
    answer = {**about, "start_peak": memory()["peak"]}
    forget_peak()
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(take_turn(contender, json.loads(line))), file=answers, flush=True)
    contender.close()


class Player:
    """A contender's process, from the driver's side. Raises RuntimeError, with its last words, where it has ended.

    ``environment`` is for what the driver's own does not have.
    """

    def __init__(self, script: Path, arguments: list[str], environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close())
        # DeepSpeed's build runs ninja, which may be in this environment only.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={"DS_ACCELERATOR": "cpu", **(environment or {}), **os.environ, "PATH": path},
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self, iterations: int) -> dict[str, Any]:
        self.begin_turn(iterations)
        return self.end_turn()

    def begin_turn(self, iterations: int) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and there will be no answer
            self._process.stdin.write(f"{iterations}\n")
            self._process.stdin.flush()

    def is_busy(self) -> bool:
        """Whether there is no answer yet to ``begin_turn``."""
        return self._process.poll() is None and not select.select([self._process.stdout], [], [], 0)[0]

    def end_turn(self) -> dict[str, Any]:
        """Wait for the answer."""
        return self._answer()

    def close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.communicate(timeout=_PATIENCE_AT_END)  # closes its input, at which it ends
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        raise RuntimeError(f"ended with {self._process.returncode}{f': {said[-1]}' if said else ''}")
