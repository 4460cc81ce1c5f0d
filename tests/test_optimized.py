"""Under ``python -O``, as CI runs the tests once, what a test asserts must still hold."""

from __future__ import annotations

import subprocess

import pytest

from tests import scripts
from tests.optim.support import assert_same_state


def test_the_assertions_of_helpers_are_there() -> None:
    with pytest.raises(AssertionError):
        assert_same_state({"param_groups": 1, "state": {}}, {"param_groups": 2, "state": {}})
    with pytest.raises(AssertionError):
        scripts.run_well("raise SystemExit(1)")


def test_the_assertions_of_scripts_are_there() -> None:
    with pytest.raises(AssertionError, match="AssertionError: in a process"):
        scripts.run_well("assert False, 'in a process of its own'")
    with pytest.raises(subprocess.TimeoutExpired):
        scripts.run("while True: pass", timeout=0.2)
