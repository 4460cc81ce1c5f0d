"""OffloadOptimizer is an optimizer like any other, as schedulers, hooks, closures and scalers see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from offload_opt import (
    OffloadOptimizer,
    UnsupportedOptimizerError,
)
from tests.optim.support import HOST_MEMORY, SHAPES, Pair, adam, parameters


def test_is_an_optimizer_that_schedulers_take(pair: Pair) -> None:
    assert isinstance(pair.offloaded, torch.optim.Optimizer)
    assert pair.offloaded.defaults["lr"] == 0.01
    for make in (
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ):
        plain, own = make(pair.plain), make(pair.offloaded)
        for loss in (1.0, 2.0, 3.0):
            pair.step()
            for scheduler in (plain, own):
                scheduler.step(loss) if make.__code__.co_names[-1] == "ReduceLROnPlateau" else scheduler.step()
    pair.check()


def test_step_hooks_run_once(pair: Pair) -> None:
    calls: list[str] = []
    pair.offloaded.register_step_pre_hook(lambda *_: calls.append("pre"))
    pair.offloaded.register_step_post_hook(lambda *_: calls.append("post"))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    pair.set_gradients()
    pair.offloaded.step()
    everywhere.remove()
    assert calls == ["pre", "post", "global"]


def test_hooks_of_the_wrapped_optimizer_still_run(store: Path) -> None:
    calls: list[torch.optim.Optimizer] = []
    inner = adam(parameters())
    inner.register_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    with OffloadOptimizer(inner, store, host_memory=HOST_MEMORY) as optimizer:
        optimizer.step()
        assert calls == [optimizer]


def test_closure_runs_before_gradients_are_looked_at(store: Path) -> None:
    own = parameters()
    for parameter in own:
        parameter.grad = None
    with OffloadOptimizer(adam(own), store, host_memory=HOST_MEMORY) as optimizer:
        before = [p.detach().clone() for p in own]
        optimizer.step(lambda: sum(p.sum() for p in own).backward() or 1.0)
        assert not any(torch.equal(a, b) for a, b in zip(own, before, strict=True))


@pytest.mark.parametrize("through_the_wrapped", [False, True])
def test_add_param_group(pair: Pair, through_the_wrapped: bool) -> None:
    pair.step()
    added = [torch.nn.Parameter(torch.randn(70_000)) for _ in range(2)]
    added[1].data.copy_(added[0].data)
    pair.plain_parameters.append(added[0])
    pair.parameters.append(added[1])
    pair.plain.add_param_group({"params": [added[0]], "lr": 0.5})
    owner = pair.offloaded.optimizer if through_the_wrapped else pair.offloaded
    owner.add_param_group({"params": [added[1]], "lr": 0.5})
    for _ in range(3):
        pair.step()
    pair.check()


def test_zero_grad(pair: Pair) -> None:
    pair.set_gradients()
    pair.offloaded.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in pair.parameters if p.grad is not None)
    pair.offloaded.zero_grad()
    assert all(p.grad is None for p in pair.parameters)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step_with_inf_and_moves_no_bytes(store: Path, fused: bool) -> None:
    pair = Pair(lambda p: adam(p, fused=fused), store, SHAPES)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for round_number in range(4):
        moved = pair.offloaded.stats
        for scaler, optimizer, mine in zip(
            scalers, (pair.plain, pair.offloaded), (pair.plain_parameters, pair.parameters), strict=True
        ):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(round_number)
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in mine)
            scaler.scale(loss * (float("inf") if round_number == 2 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        if round_number == 2:
            assert pair.offloaded.stats == moved
    pair.check()
    assert scalers[0].get_scale() == scalers[1].get_scale()


def test_group_values_that_a_step_changes_are_changed_once(store: Path) -> None:
    class Counting(torch.optim.SGD):
        """Keeps a step count in its groups, as schedule-free optimizers do."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                for p in group["params"]:
                    if p.grad is not None:
                        momentum = self.state[p].setdefault("m", torch.zeros_like(p))
                        momentum.mul_(0.9).add_(p.grad)
                        p.sub_(momentum, alpha=group["lr"] / group["k"])

    with pytest.raises(UnsupportedOptimizerError, match="register"):
        OffloadOptimizer(Counting(parameters(), lr=0.1), store)
    OffloadOptimizer.register(Counting, "elementwise")
    pair = Pair(lambda p: Counting(p, lr=0.1), store, [(60_000,), (70_000,), (5,)])
    for _ in range(3):
        pair.step()
    assert pair.offloaded.param_groups[0]["k"] == 3
    pair.check()


class MakesItsStateAtOnce(torch.optim.Adagrad):
    """As Adagrad does before torch 2.13: its step finds state that is there, or fails."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"]
        return super().step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_that_the_constructor_makes(store: Path, dtype: torch.dtype) -> None:
    OffloadOptimizer.register(MakesItsStateAtOnce, "elementwise")
    pair = Pair(MakesItsStateAtOnce, store, SHAPES, dtype)
    for _ in range(3):
        pair.step()
    pair.check()
