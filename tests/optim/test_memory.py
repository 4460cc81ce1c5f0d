"""host_memory bounds what the optimizer state takes: the benchmark of it, at a smaller size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(benchmark: str, folder: Path, *options: str) -> Any:
    """What a benchmark measured."""
    command = [sys.executable, BENCHMARKS / benchmark, folder, *options, "--no-save"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_peak_memory_stays_within_host_memory_and_32_mib(tmp_path: Path) -> None:
    growth = run("memory.py", tmp_path, "--state", "256MiB", "--host-memory", "32MiB")["growth_bytes"]
    assert growth["offloaded"] <= (32 + 32) << 20
    assert growth["memory"] > 256 << 20, "the run in memory is to show that the measurement sees the state"


def test_saving_and_loading_take_hardly_any_memory(tmp_path: Path) -> None:
    peak = run("store.py", tmp_path, "--only", "memory", "--saved", "256MiB")["memory"]
    assert peak["save"] <= 64 << 20
    assert peak["load"] <= 64 << 20
    assert peak["hold"] > 256 << 20, "the run that holds the state is to show that the measurement sees it"
