"""The examples run, and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--steps", "4", "--layers", "2", "--width", "128"]


def run(*command: str | Path, timeout: float = 240) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_train_gpt_compares_memory_and_disk(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "by the example"
    options = ["--offload", folder, "--compare", "--host-memory", "256KiB", *SMALL]
    table = run(sys.executable, EXAMPLES / "train_gpt.py", *options)
    assert "in memory" in table
    assert re.search(r"all 4 losses .*bit-equal", table)
    assert re.search(r"weights at the end .*bit-equal", table)
    assert re.search(r"host memory for it .* 0\.\d MiB", table)


def test_train_gpt_in_memory_only() -> None:
    assert "4/4" in run(sys.executable, EXAMPLES / "train_gpt.py", *SMALL)


def test_train_gpt_offloaded_only(tmp_path: Path) -> None:
    options = ["--offload", tmp_path, "--host-memory", "256KiB", "--steps", "1", "--layers", "1", "--width", "64"]
    out = run(sys.executable, EXAMPLES / "train_gpt.py", *options)
    assert "1 step of AdamW" in " ".join(out.split())
    assert "in memory" not in out


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--width", "32", "32 is not a multiple of 64"), ("--steps", "0", "'0' is not a positive number")],
)
def test_train_gpt_refuses_what_makes_no_model(option: str, value: str, said: str) -> None:
    command = [sys.executable, EXAMPLES / "train_gpt.py", option, value]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    "command",
    [["train_gpt.py", "--offload"], ["train_accelerate.py", "--offload"], ["resume.py"], ["beyond_memory.py"]],
    ids=lambda command: command[0],
)
def test_a_file_is_no_folder_for_state(command: list[str], tmp_path: Path) -> None:
    if command[0] == "train_accelerate.py":
        pytest.importorskip("accelerate")
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, EXAMPLES / command[0], *command[1:], tmp_path / "file"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[-1][-20:]) == (2, "file is not a folder")


def test_train_gpt_refuses_compare_without_a_folder() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_gpt.py", "--compare"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--offload" in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_train_accelerate(processes: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launch: list[str | Path] = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, EXAMPLES / "train_accelerate.py", "--cpu", *SMALL]
    in_memory = run(*command)
    offloaded = run(*command, "--offload", tmp_path / "state", "--host-memory", "256KiB")
    result = re.search(r"loss \S+, weights \S+", in_memory)
    assert result is not None
    assert result[0] in offloaded
    assert re.search(r"state \d+\.\d MiB, buffers 0\.[1-9] MiB a process", offloaded)
    ranks = [f"rank-{rank:05d}-of-{processes:05d}" for rank in range(processes)]
    assert sorted(folder.name for folder in (tmp_path / "state").iterdir()) == ranks
    assert all(any((tmp_path / "state" / rank / "units").iterdir()) for rank in ranks)


def test_resume_is_killed_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    options = ["--kills", "2", "--steps", "12", "--width", "64", "--context", "32", "--host-memory", "512KiB"]
    table = run(sys.executable, EXAMPLES / "resume.py", tmp_path / "drive", *options)
    assert len(re.findall(r"killed in step \d+, goes on with step \d+", table)) == 2
    for what in ("all 12 losses", "weights at the end", "optimizer state at the end"):
        assert re.search(rf"{what} .*bit-equal", table), table
    assert not list((tmp_path / "drive").iterdir())


def test_what_does_not_fit_into_memory_is_trained_offloaded(tmp_path: Path) -> None:
    options = ["--memory", "900MiB", "--layers", "4", "--width", "1024", "--steps", "2", "--host-memory", "32MiB"]
    table = run(sys.executable, EXAMPLES / "beyond_memory.py", tmp_path / "drive", *options)
    assert re.search(r"steps +│ +[01] of 2, killed │ +2 of 2", table), table
    assert not list((tmp_path / "drive").iterdir())
