"""Defects that a review found once, before the first release."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import offload_opt
from offload_opt import (
    OffloadError,
    OffloadOptimizer,
    StepFailedError,
    StoreError,
)
from tests.optim.support import HOST_MEMORY, SHAPES, Pair, adam, bits_equal, parameters


def test_a_parameter_that_is_laid_out_anew_is_refused_and_a_reload_helps(store: Path) -> None:
    plain, own = (torch.nn.Parameter(torch.ones(8, 30, 15, 15)) for _ in range(2))
    a = adam([plain])
    b = OffloadOptimizer(adam([own]), store, host_memory=HOST_MEMORY)

    def gradients() -> None:
        plain.grad = torch.randn(plain.shape).to(memory_format=torch.channels_last)
        own.grad = plain.grad.clone()

    gradients()
    a.step()
    b.step()
    for parameter in (plain, own):
        parameter.data = parameter.data.to(memory_format=torch.channels_last)
    gradients()
    with pytest.raises(OffloadError, match="not what its state was laid out for"):
        b.step()
    b.load_state_dict(b.state_dict())
    a.step()
    b.step()
    assert bits_equal(plain, own)


@pytest.mark.parametrize("change", ["reorder", "remove a group", "remove the last group", "remove the last parameter"])
def test_parameters_that_change_places_are_refused(store: Path, change: str) -> None:
    first, second, third = parameters(60_000, 60_000, 5)
    with OffloadOptimizer(adam([{"params": [first]}, {"params": [second, third]}]), store) as optimizer:
        optimizer.step()
        if change == "reorder":
            optimizer.param_groups.reverse()
        elif change == "remove the last parameter":
            optimizer.param_groups[-1]["params"].pop()
        else:
            del optimizer.param_groups[-1 if "last" in change else 0]
        for call in (optimizer.step, optimizer.state_dict, lambda: len(optimizer.state)):
            with pytest.raises(OffloadError, match="changed its place"):
                call()


def test_a_parameter_whose_state_was_brought_along_is_not_removed(store: Path) -> None:
    own = parameters(60_000, 5)
    inner = adam(own)
    inner.step()
    with OffloadOptimizer(inner, store) as optimizer:
        optimizer.param_groups[0]["params"].pop()
        for call in (optimizer.step, optimizer.state_dict):
            with pytest.raises(OffloadError, match="changed its place"):
                call()


def test_a_load_that_fails_on_the_way_does_not_start_over(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.step()
    checkpoint = pair.offloaded.state_dict()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match="no space"):
            pair.offloaded.load_state_dict(checkpoint)
    pair.set_gradients()
    for call in (pair.offloaded.step, pair.offloaded.state_dict, lambda: bool(pair.offloaded.state)):
        with pytest.raises(StepFailedError):
            call()
    pair.offloaded.load_state_dict(checkpoint)
    pair.plain.step()
    pair.offloaded.step()
    pair.check()


def test_state_brought_along_is_seen_before_the_first_step(store: Path) -> None:
    inner = torch.optim.Adagrad(parameters(), initial_accumulator_value=0.5)
    with OffloadOptimizer(inner, store) as optimizer:
        assert len(optimizer.state) == 2
        state = optimizer.state[inner.param_groups[0]["params"][0]]
        assert state["sum"].unique().tolist() == [0.5]
        assert state["step"] == 0


def test_zero_grad_frees_the_gradients(store: Path) -> None:
    numpy = pytest.importorskip("numpy")
    parameter = torch.nn.Parameter(torch.zeros(300_000))
    gradient = numpy.ones(300_000, dtype=numpy.float32)
    alive = weakref.ref(gradient)
    parameter.grad = torch.from_numpy(gradient)
    del gradient
    with OffloadOptimizer(adam([parameter]), store, host_memory=HOST_MEMORY) as optimizer:
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert alive() is None


def test_momentum_that_is_turned_on_later(store: Path) -> None:
    pair = Pair(lambda p: torch.optim.SGD(p, lr=0.01), store, SHAPES)
    pair.step()
    for optimizer in (pair.plain, pair.offloaded):
        optimizer.param_groups[0]["momentum"] = 0.9
    pair.step()
    pair.check()  # the new state is still in memory, and goes to the disk before the next update
    for _ in range(2):
        pair.step()
    pair.check()
    assert pair.offloaded.stats.state_bytes > 0


def test_a_full_disk_when_momentum_is_turned_on_is_known_before_an_update(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(lambda p: torch.optim.SGD(p, lr=0.01), store, SHAPES)
    pair.step()
    for optimizer in (pair.plain, pair.offloaded):
        optimizer.param_groups[0]["momentum"] = 0.9
    pair.step()
    pair.set_gradients()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match="no space"):
            pair.offloaded.step()
    pair.plain.step()
    pair.offloaded.step()  # with space again, the step is taken once
    pair.check()


def test_amsgrad_that_is_turned_on_later_is_an_error_that_sticks(pair: Pair) -> None:
    pair.step()
    pair.offloaded.param_groups[0]["amsgrad"] = True
    pair.set_gradients()
    with pytest.raises(KeyError):  # torch's own answer
        pair.offloaded.step()
    with pytest.raises(StepFailedError):
        pair.offloaded.step()


def test_a_relative_path_survives_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    pair = Pair(adam, Path("store"), SHAPES)
    pair.step()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pair.step()
    pair.check()


def test_groups_without_a_gradient_are_stepped_too(store: Path) -> None:
    class CountingGroups(torch.optim.Optimizer):
        """Counts steps in its groups."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"k": 0})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["k"] += 1
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p].setdefault("m", torch.zeros_like(p)).add_(p.grad)
                        p.sub_(self.state[p]["m"] / group["k"])

    OffloadOptimizer.register(CountingGroups, "elementwise")
    pair = Pair(lambda p: CountingGroups([{"params": p[:1]}, {"params": p[1:]}]), store, [(60_000,), (60_000,)])
    pair.step()
    pair.step(without=[1])
    pair.step(without=[0, 1])
    pair.step()
    assert [group["k"] for group in pair.offloaded.param_groups] == [4, 4]
    pair.check()


def test_parameters_of_one_name_give_valid_files(store: Path) -> None:
    from safetensors.torch import load_file

    layers = [torch.nn.Linear(30, 20) for _ in range(2)]
    groups = [{"params": list(layer.named_parameters())} for layer in layers]
    with OffloadOptimizer(adam(groups), store) as optimizer:
        sum(layer(torch.ones(1, 30)).sum() for layer in layers).backward()
        optimizer.step()
        optimizer.snapshot()
        (file,) = store.glob("*/units/*.0.safetensors")
        tensors = {name: t for name, t in load_file(file).items() if not name.startswith("__padding__")}
        assert len(tensors) == 8
        for layer in layers:
            moment = optimizer.state[layer.weight]["exp_avg"]
            assert any(torch.equal(moment, t) for t in tensors.values())


def test_an_optimizer_whose_wrapper_was_collected_can_be_wrapped_again(store: Path) -> None:
    inner = adam(parameters())
    OffloadOptimizer(inner, store)
    gc.collect()
    with OffloadOptimizer(inner, store) as optimizer:
        optimizer.step()
        assert optimizer.stats.steps == 1


def test_using_the_wrapped_optimizer_by_itself_is_noticed(pair: Pair) -> None:
    pair.step()
    pair.offloaded.optimizer.load_state_dict(pair.plain.state_dict())
    pair.set_gradients()
    with pytest.raises(OffloadError, match="by itself"):
        pair.offloaded.step()


def test_an_interrupted_wait_harms_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(offload_opt.IoFuture, "done", lambda _: False)  # so that there is something to wait for
        pair.step()
        patched.setattr(offload_opt.IoFuture, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.offloaded.synchronize()
    pair.offloaded.synchronize()
    pair.step()
    pair.check()


class Rebinding(torch.optim.Optimizer):
    """Momentum by an optimizer that puts other memory into its tensors."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("average", torch.zeros_like(parameter))
                state["average"].data = state["average"] * 0.5 + parameter.grad
                parameter.data = parameter.data - state["average"]


@pytest.mark.parametrize("fields", [{}, {"state_dtype": "bf16"}, {"master_weights": True}], ids=str)
@pytest.mark.parametrize("numel", [100, 50_000], ids=["whole", "in several units"])
def test_an_optimizer_may_put_other_memory_into_its_tensors(store: Path, numel: int, fields: dict[str, Any]) -> None:
    # What it put there was lost.
    OffloadOptimizer.register(Rebinding, "elementwise")
    dtype = torch.bfloat16 if "master_weights" in fields else torch.float32
    parameter = torch.nn.Parameter(torch.ones(numel, dtype=dtype))
    parameter.grad = torch.full_like(parameter, 0.25)
    with OffloadOptimizer(Rebinding([parameter]), store, host_memory="48KiB", **fields) as optimizer:
        for step in range(4):  # numbers that have no more bits than a bf16
            optimizer.step()
            average = 0.5 - 0.25 * 0.5**step
            assert bool((optimizer.state[parameter]["average"] == average).all()), step
        assert bool((parameter == 1 - 4 * 0.5 + 0.5 - 0.5**5).all())
