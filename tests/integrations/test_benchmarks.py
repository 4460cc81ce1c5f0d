"""The benchmarks run, with whatever of their contenders there is here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from offload_opt import _C

pytest.importorskip("rich")

AIO = Path(__file__).parents[2] / "benchmarks" / "aio.py"
CODECS = AIO.with_name("codecs.py")
PLAN = AIO.with_name("plan.py")
CONVERGENCE = AIO.with_name("convergence.py")
STEP = AIO.with_name("step.py")
# DeepSpeed's handle may have to be compiled, which takes minutes.
SMALL = ["--blocks", "64KiB", "--depths", "4", "--size", "4MiB", "--rounds", "1", "--without", "deepspeed", "--no-save"]


def test_aio_measures_every_engine_in_every_direction(tmp_path: Path) -> None:
    command = [sys.executable, AIO, tmp_path, *SMALL, "--operations", "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for direction in ("read", "write", "mixed"):
        _, _, table = done.stdout.partition(f"{direction}, GB/s")
        heading, row = table.split("┡", 1)[0], re.search(r"│ *64\.0 KiB.*", table)
        assert row, done.stdout
        columns = len(re.findall(r"\bours\b(?!/)", heading))
        assert columns == sum(works for _, works, _ in _C.engines())
        speeds = [float(cell) for cell in row[0].split("│")[4 : 4 + columns]]
        assert min(speeds) > 0
    assert re.search(r"│ unregistered .*\d", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_aio_refuses_what_does_not_divide(tmp_path: Path) -> None:
    command = [sys.executable, AIO, tmp_path, *SMALL, "--threads", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "divide" in done.stderr


def test_codecs_are_measured_for_speed_and_loss() -> None:
    command = [sys.executable, CODECS, "--sizes", "5000", "--rounds", "1", "--steps", "2", "--no-save"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("bf16, encode", "int8, decode", "master, split", "master, join"):
        row = re.search(rf"│ {name} *│ +([0-9.]+)", done.stdout)
        assert row, done.stdout
        assert float(row[1]) > 0
    rows = re.findall(r"│ int8 +│ +1\.01 │ +([0-9.]+)% │.* ([0-9.]+)% │\n", done.stdout)
    assert len(rows) == 2, done.stdout  # stored once, and in each step
    assert all(0 < float(share) < 20 for row in rows for share in row)


def test_a_plan_is_held_against_a_run(tmp_path: Path) -> None:
    settings = ["fp32", "masters, bf16"]
    command = [sys.executable, PLAN, tmp_path, "--parameters", "5M", "--rounds", "1", "--steps", "2", "--no-save"]
    done = subprocess.run([*command, "--settings", *settings], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in settings:
        row = re.search(rf"│ {name} *│ +([0-9.]+) │ +([0-9.]+) s │ +([0-9.]+) s │ +([0-9.]+) │", done.stdout)
        assert row, done.stdout  # a row with bytes that differ would not look like that
        assert all(float(figure) > 0 for figure in row.groups())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_convergence_trains_every_contender(dtype: str, tmp_path: Path) -> None:
    command = [sys.executable, CONVERGENCE, "--dtype", dtype, "--seeds", "1", "--steps", "4", "--layers", "1"]
    command += ["--width", "64", "--validation-batches", "1", "--folder", str(tmp_path), "--no-save"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = {name: float(loss) for name, loss in re.findall(r"seed 0, (.*): ([0-9.]+) in", done.stdout)}
    assert {"torch AdamW", "ours, exact", "ours, bf16", "ours, int8"} <= losses.keys(), done.stdout
    assert all(4 < loss < 7 for loss in losses.values()), losses  # ln 256 is 5.5
    if dtype == "fp32":
        assert losses["ours, exact"] == losses["torch AdamW"]
    assert "Verdict: " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_step_takes_turns_with_its_peers(tmp_path: Path) -> None:
    command = [
        sys.executable,
        STEP,
        tmp_path,
        "--contenders",
        "exact",
        "memory",
        "mmap-cold",
        "--rounds",
        "1",
        "--half",
    ]
    command += ["--parameters", "1e6", "--width", "256", "--host-memory", "2MiB", "--file-size", "32MiB", "--no-save"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("exact", "memory", "mmap-cold", "exact resident"):
        row = re.search(rf"│ {name} *│ +([0-9.]+) │", done.stdout)
        assert row, done.stdout
        assert float(row[1]) > 0
    assert "weights of exact, in rounding steps from those in memory: all equal" in done.stdout
    assert "weights of mmap-cold, in rounding steps from those in memory: all equal" in done.stdout
    assert list(tmp_path.iterdir()) == []
