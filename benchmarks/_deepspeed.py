"""DeepSpeed's handle in a process of its own: it aborts the process where a system call of it fails.

``DeepSpeedProcess`` starts this file as a script. They talk in lines of JSON: what to move in, bytes a second out.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A transfer that takes longer, in seconds, hangs.
TIMEOUT = 300


class DeepSpeedProcess:
    """Runs transfers of ``size`` bytes. Starts anew what has ended. Raises RuntimeError where there is no DeepSpeed."""

    def __init__(self, read: Path, write: Path, size: int) -> None:
        self.failures: list[str] = []
        self._arguments = [str(read), str(write), str(size)]
        self._start()

    def move(self, direction: str, block_size: int, depth: int, threads: int) -> float:
        """Bytes a second. What a failure interrupted is done again, twice at most."""
        for _ in range(3):
            try:
                return float(self._ask([direction, block_size, depth, threads]))
            except RuntimeError as error:
                self.failures.append(str(error))
                self.close()
                self._start()
        raise RuntimeError(f"DeepSpeed's handle failed three times in a row, last with: {self.failures[-1]}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close())
        self._process = subprocess.Popen(
            [sys.executable, __file__, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Its build runs ninja, which may be in this environment only.
            env={"DS_ACCELERATOR": "cpu", **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        self.version = str(self._answer())

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and there will be no answer
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        raise RuntimeError(f"ended with {self._process.returncode}{f': {said[-1]}' if said else ''}")


def serve(read: str, write: str, size: int) -> None:
    """The process's work, until its input ends."""
    import importlib.metadata
    import logging
    import signal

    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what DeepSpeed prints is no answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    from deepspeed.ops.op_builder import AsyncIOBuilder

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the last line is to say why this process ended
    module = AsyncIOBuilder().load(verbose=False)
    owner = module.aio_handle(1 << 20, 1, False, True, 1)
    buffers = [owner.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8)).random_() for _ in range(2)]
    answer(importlib.metadata.version("deepspeed"))
    for line in sys.stdin:
        direction, block_size, depth, threads = json.loads(line)
        signal.alarm(TIMEOUT)
        # It works off one transfer after the other, so mixed takes two handles. Its wait() aborts with nothing pending.
        halves = (depth - depth // 2, depth // 2) if direction == "mixed" else (depth, depth)
        reads, writes = (module.aio_handle(block_size, half, False, True, threads) for half in halves)
        started = time.perf_counter()
        if direction != "write":
            reads.async_pread(buffers[0], read, 0)
        if direction != "read":
            writes.async_pwrite(buffers[1], write, 0)
        ended = (reads.wait() if direction != "write" else 0) + (writes.wait() if direction != "read" else 0)
        seconds = time.perf_counter() - started
        signal.alarm(0)
        if ended != (2 if direction == "mixed" else 1):
            raise RuntimeError(f"{ended} transfers ended")
        answer(size * ended / seconds)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
