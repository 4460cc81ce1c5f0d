"""Parameters and gradients whose memory is not what it seems: laid out anew, shared, elsewhere, put in by .data."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing._internal.two_tensor import TwoTensor

from offload_opt import OffloadError, OffloadOptimizer, UnsupportedOptimizerError
from tests import scripts
from tests.conftest import seed
from tests.optim.support import bits_equal


def step(optimizer: OffloadOptimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = (torch.randn(parameter.shape) * 0.1).to(parameter).contiguous()
    optimizer.step()


@pytest.mark.parametrize("host_memory", ["1MiB", "48KiB"], ids=["whole", "cut"])
def test_a_master_is_read_by_the_layout_that_its_weight_had(store: Path, tmp_path: Path, host_memory: str) -> None:
    module = torch.nn.Conv2d(16, 32, 3).bfloat16()
    adam = torch.optim.AdamW(module.parameters(), lr=0.01)
    optimizer = OffloadOptimizer(adam, store, host_memory=host_memory, master_weights=True)
    for layout in (torch.channels_last, torch.contiguous_format):
        for _ in range(2):
            step(optimizer)
        weight, master = module.weight.detach().clone(), optimizer.state[module.weight]["master"].clone()
        assert bits_equal(master.bfloat16(), weight)
        module.to(memory_format=layout)
        assert bits_equal(optimizer.state[module.weight]["master"], master)
        if layout is torch.channels_last:
            optimizer.load_state_dict(optimizer.state_dict())
        else:
            optimizer.snapshot()
            optimizer.restore()
        assert bits_equal(module.weight.contiguous(), weight.contiguous())
        assert bits_equal(optimizer.state[module.weight]["master"].contiguous(), master.contiguous())


def test_a_master_is_not_read_by_a_parameter_that_has_become_another(store: Path) -> None:
    module = torch.nn.Linear(8, 8).bfloat16()
    optimizer = OffloadOptimizer(torch.optim.AdamW(module.parameters()), store, master_weights=True)
    step(optimizer)
    optimizer.snapshot()
    moment = optimizer.state[module.weight]["exp_avg"]
    module.float()
    cannot = pytest.raises(OffloadError, match=r"master of param_0 .*torch.bfloat16.* torch.float32 now")
    with cannot:
        optimizer.state[module.weight]["master"]
    with cannot:  # it would be a commit that nothing restores, in place of the last one
        optimizer.snapshot()
    assert bits_equal(optimizer.state[module.weight]["exp_avg"], moment)
    module.weight.grad = torch.ones_like(module.weight)
    with pytest.raises(OffloadError, match=r"param_0 is not what its state was laid out for any more.*\)$"):
        optimizer.step()
    module.bfloat16()
    optimizer.restore()
    step(optimizer)


class Pointing(torch.optim.Optimizer):
    """Momentum that is handed over by the gradient's ``.data``, as some do for Nesterov's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            if not state:
                state["buffer"] = torch.zeros_like(parameter)
            state["buffer"].mul_(0.9).add_(parameter.grad)
            parameter.grad.data = state["buffer"]
            parameter.add_(parameter.grad, alpha=-0.1)


@pytest.mark.parametrize("shape", [(1000,), (50, 20), (40_000,)])
def test_an_optimizer_may_put_other_memory_into_a_gradient(store: Path, shape: tuple[int, ...]) -> None:
    OffloadOptimizer.register(Pointing, "elementwise")
    parameters = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for _ in range(3)]
    masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
    plain = Pointing(masters)
    optimizer = OffloadOptimizer(Pointing(parameters), store, master_weights=True, host_memory="500KiB")
    for _ in range(4):
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.grad = torch.randn(shape).bfloat16()
            master.grad = parameter.grad.float()
        optimizer.step()
        plain.step()
    for parameter, master in zip(parameters, masters, strict=True):
        assert bits_equal(optimizer.state[parameter]["master"], master), f"seed {seed()}"
        assert bits_equal(optimizer.state[parameter]["buffer"], plain.state[master]["buffer"])


def test_gradients_of_gradients_are_not_kept_by_the_step(store: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(30, 40).bfloat16())
    optimizer = OffloadOptimizer(torch.optim.AdamW([parameter]), store, master_weights=True)
    gone = []
    for _ in range(3):
        (gradient,) = torch.autograd.grad(parameter.float().pow(3).sum(), parameter, create_graph=True)
        parameter.grad = gradient
        graph = gradient.grad_fn
        assert graph is not None
        graph.register_hook(lambda *_: None)
        gone.append(_note_end_of(graph))
        optimizer.step()
        optimizer.zero_grad()
        del gradient, graph
    assert all(gone)


def _note_end_of(graph: torch.autograd.graph.Node) -> list[bool]:
    """A list that has an element once the node is gone."""

    class Note:
        def __del__(self) -> None:
            ended.append(True)

    ended: list[bool] = []
    graph.metadata["note"] = Note()
    return ended


def test_tensors_that_keep_their_elements_elsewhere_are_refused(store: Path) -> None:
    weight = torch.randn(64).bfloat16()
    with pytest.raises(UnsupportedOptimizerError, match="param_0 is a TwoTensor"):
        OffloadOptimizer(torch.optim.AdamW([torch.nn.Parameter(TwoTensor(weight, weight))]), store)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = OffloadOptimizer(torch.optim.AdamW([parameter]), store, master_weights=True)
    for gradient in (TwoTensor(weight, weight), torch._efficientzerotensor((64,), dtype=torch.bfloat16)):  # type: ignore[attr-defined]
        parameter.grad = gradient
        with pytest.raises(OffloadError, match=r"the gradient of param_0 has no memory of its own"):
            optimizer.step()
    parameter.grad = weight
    optimizer.step()


def test_parameters_that_share_memory_are_refused(store: Path) -> None:
    memory = torch.randn(1000)
    first, second = torch.nn.Parameter(memory[:600]), torch.nn.Parameter(memory[599:])
    with pytest.raises(UnsupportedOptimizerError, match="param_0 and param_2 share memory"):
        OffloadOptimizer(torch.optim.AdamW([first, torch.nn.Parameter(torch.randn(9)), second]), store)
    beside = [torch.nn.Parameter(memory[:600]), torch.nn.Parameter(memory[600:])]
    with OffloadOptimizer(torch.optim.AdamW(beside), store) as optimizer:
        step(optimizer)
    second.requires_grad_(False)
    OffloadOptimizer(torch.optim.AdamW([first, second]), store).close()


def test_parameters_in_flat_memory_that_is_released_do_not_seem_to_share_it(store: Path) -> None:
    memories = [torch.randn(200) for _ in range(2)]
    parameters = [torch.nn.Parameter(part) for memory in memories for part in memory.split(100)]
    with OffloadOptimizer(torch.optim.AdamW(parameters), store) as optimizer:
        step(optimizer)
        optimizer.snapshot()
        state = optimizer.state_dict()
        for memory in memories:
            memory.untyped_storage().resize_(0)
        optimizer.load_state_dict(state)
    with OffloadOptimizer(torch.optim.AdamW(parameters), store) as optimizer:
        optimizer.restore()
        for index, parameter in enumerate(parameters):
            assert bits_equal(optimizer.state[parameter]["exp_avg"], state["state"][index]["exp_avg"])


def test_the_state_of_a_parameter_that_was_replaced_and_frozen_is_read(store: Path) -> None:
    parameters = [torch.nn.Parameter(torch.randn(50).bfloat16()) for _ in range(2)]
    optimizer = OffloadOptimizer(torch.optim.AdamW(parameters), store, master_weights=True)
    step(optimizer)
    master = optimizer.state[parameters[0]]["master"]
    parameters[0] = torch.nn.Parameter(parameters[0].detach().clone(), requires_grad=False)
    optimizer.param_groups[0]["params"][0] = parameters[0]
    parameters[1].grad = torch.randn(50).bfloat16()
    optimizer.step()
    assert bits_equal(optimizer.state_dict()["state"][0]["master"], master)


def test_a_parameter_that_is_replaced_is_the_one_that_a_master_is_read_by(store: Path, tmp_path: Path) -> None:
    old = torch.nn.Parameter(torch.randn(50).bfloat16())
    optimizer = OffloadOptimizer(torch.optim.AdamW([old]), store, master_weights=True)
    step(optimizer)
    held = optimizer.state[old]
    master = held["master"]
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(old.detach().clone())
    old.data.zero_()
    assert bits_equal(held["master"], master)
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(master.bfloat16())
    optimizer.export_safetensors(tmp_path / "state.safetensors")
    assert bits_equal(load_file(tmp_path / "state.safetensors")["param_0.master"], master)


WITH_DEFAULT_DEVICE = """
    import sys, torch
    from offload_opt import OffloadOptimizer
    from tests.optim.support import bits_equal
    kind, store, snapshot = sys.argv[1:]
    def run(folder, default):
        torch.set_default_device(None)
        torch.manual_seed(0)
        module = torch.nn.Linear(300, 70).bfloat16()
        fields = {"master_weights": True, "persist_params": True, "state_dtype": kind, "host_memory": "200KiB"}
        torch.set_default_device(default)
        make = lambda: torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.01, device="cpu"), amsgrad=True)
        optimizer = OffloadOptimizer(make(), folder, **fields)
        def steps():
            for _ in range(2):
                for parameter in module.parameters():
                    parameter.grad = torch.randn(parameter.shape, device="cpu").bfloat16()
                optimizer.step()
        steps()
        optimizer.snapshot(snapshot + default)
        steps()
        optimizer.restore(snapshot + default)
        steps()
        optimizer.load_state_dict(optimizer.state_dict())
        steps()
        optimizer.snapshot()
        optimizer.export_safetensors(snapshot + default + "/file")
        optimizer.close()
        optimizer = OffloadOptimizer(make(), folder, **{**fields, "unit_size": "20KiB"})
        optimizer.restore()
        steps()
        found = {i: p.detach() for i, p in enumerate(module.parameters())}
        for i, p in enumerate(module.parameters()):
            found.update({(i, name): value for name, value in optimizer.state[p].items()})
        return found
    a, b = run(store + "/a", "cpu"), run(store + "/b", "meta")
    assert a.keys() == b.keys() and len(a) == 12, a.keys()
    for name in a:
        assert b[name].device.type == "cpu" and bits_equal(a[name], b[name]), name
"""


@pytest.mark.parametrize("kind", ["exact", "bf16", "int8"])
def test_the_default_device_does_not_matter(kind: str, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    done = scripts.run(WITH_DEFAULT_DEVICE, kind, tmp_path, tmp_path / "snapshot-")
    assert done.returncode == 0, done.stderr


def test_what_the_optimizer_made_is_given_up_with_its_batch(store: Path) -> None:
    """Else the first step holds all of a unit's state a second time."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    class Momentum(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            alive.append(sum(ref() is not None for ref in made))
            for group in self.param_groups:
                for p in group["params"]:
                    if "buffer" not in self.state[p]:
                        self.state[p]["buffer"] = torch.zeros_like(p)
                        made.append(weakref.ref(self.state[p]["buffer"]))
                    p.sub_(self.state[p]["buffer"].add_(p.grad), alpha=group["lr"])

    OffloadOptimizer.register(Momentum, "elementwise")
    parameters = [torch.nn.Parameter(torch.ones(1 << 20)) for _ in range(4)]
    with OffloadOptimizer(Momentum(parameters), store, unit_size="32MiB", host_memory="128MiB") as optimizer:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        made.clear()
        alive.clear()
        optimizer.step()
        assert len(made) >= 4
        assert max(alive) <= 1
