"""What the crash tests share: the process that forks children, and what an undisturbed run gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.training import STEPS, Job
from tests.crash.zygote import Zygote


@pytest.fixture(scope="package")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="package")
def digests(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What an undisturbed run has after each step."""
    ((_, found),) = zygote.run("reference", Job(root=str(tmp_path_factory.mktemp("reference"))))
    assert len(set(found)) == STEPS + 1
    return list(found)
