"""Fixtures of the tests of AioHandle."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload_opt import AioHandle
from tests.aio.support import FOLDERS, new_folder


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections() -> Iterator[None]:
    # The collection after each test, in conftest.py, would look at all of torch's objects: a tenth of a second.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def handle(engine: str) -> Iterator[AioHandle]:
    with AioHandle(block_size=65536, queue_depth=8, num_threads=2, engine=engine) as handle:
        yield handle


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on each kind of file system."""
    with new_folder(request.param) as path:
        yield path
