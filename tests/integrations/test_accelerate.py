"""A wrapped optimizer under accelerate: what prepare, save_state and load_state do to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload_opt import OffloadOptimizer
from tests.optim.support import assert_same_state, bits_equal

accelerate = pytest.importorskip("accelerate")


def make(store: Path | None) -> tuple[Any, torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(200, 150), torch.nn.Tanh(), torch.nn.Linear(150, 3))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if store is not None:
        optimizer = OffloadOptimizer(optimizer, store, host_memory="128KiB")
    model, prepared = accelerator.prepare(model, optimizer)
    return accelerator, model, prepared


def train(accelerator: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(4, 200)).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def test_save_state_and_load_state(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    accelerator, model, optimizer = make(store)
    train(accelerator, model, optimizer, 3)
    accelerator.save_state(str(tmp_path / "checkpoint"))
    torch.manual_seed(7)
    train(accelerator, model, optimizer, 2)
    optimizer.optimizer.close()  # type: ignore[attr-defined]

    # Resumed on disk, and resumed in memory, from the same checkpoint.
    for folder in (other, None):
        accelerator, resumed, optimizer_again = make(folder)
        accelerator.load_state(str(tmp_path / "checkpoint"))
        torch.manual_seed(7)
        train(accelerator, resumed, optimizer_again, 2)
        assert all(bits_equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_prepare_after_some_steps_keeps_the_state(store: Path) -> None:
    parameters = [torch.nn.Parameter(torch.randn(30_000))]
    optimizer = OffloadOptimizer(torch.optim.Adam(parameters, lr=0.1), store, host_memory="64KiB")
    parameters[0].grad = torch.randn_like(parameters[0])
    optimizer.step()
    before = optimizer.state_dict()
    accelerate.Accelerator(cpu=True).prepare(optimizer)  # loads the state_dict() that it has just asked for
    assert_same_state(before, optimizer.state_dict())
    optimizer.step()
