"""Shared fixtures."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from offload_opt import _C

# Their assertions explain themselves, and hold under `python -O` too.
pytest.register_assert_rewrite(
    "tests.aio.support",
    "tests.crash.power_loss",
    "tests.crash.zygote",
    "tests.optim.support",
    "tests.scripts",
    "tests.unit.codec_values",
)

if TYPE_CHECKING:
    from tests.optim.support import Pair

# What is imported by now stays; collecting after each test need not look at it again.
gc.collect()
gc.freeze()


def pytest_report_header() -> str:
    """The seed of the randomised tests: OFFLOAD_OPT_TEST_SEED repeats a run."""
    return f"OFFLOAD_OPT_TEST_SEED={seed()}"


_seed = int(os.environ.get("OFFLOAD_OPT_TEST_SEED", random.SystemRandom().randrange(1 << 31)))


def seed() -> int:
    return _seed


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(seed())
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    gc.collect()  # an optimizer that a test left open gives its folder and memory back


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder for optimizer state."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def pair(store: Path) -> Pair:
    """Three parameters under AdamW, plain and offloaded."""
    from tests.optim import support

    return support.Pair(support.adam, store, support.SHAPES)


@pytest.fixture(params=[name for name, works, _ in _C.engines() if works])
def engine(request: pytest.FixtureRequest) -> str:
    """Every engine that works here."""
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_configure() -> None:
    # An ordinary user may lock only a little memory; the package warns once, which is no failure of a test.
    warnings.filterwarnings("ignore", message="could not lock")
