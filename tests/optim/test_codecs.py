"""Master weights and compressed state: against a reference in memory, and over restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim as O

from offload_opt import ConfigError, OffloadError, OffloadOptimizer, StepFailedError
from tests.conftest import seed
from tests.optim.support import HOST_MEMORY, assert_same_state, bits_equal

SHAPES = [(100_003,), (300, 257), (64, 64), (7,), (0,), (), (1, 5), (6, 4, 5, 5)]
CASES: list[tuple[Any, dict[str, Any]]] = [
    (O.AdamW, {}),
    (O.AdamW, {"fused": True, "amsgrad": True}),
    (O.Adam, {"foreach": True, "weight_decay": 0.1}),
    (O.SGD, {}),
    (O.SGD, {"momentum": 0.9, "nesterov": True}),
    (O.RMSprop, {"centered": True, "momentum": 0.9}),
    (O.Adagrad, {}),
    (O.NAdam, {}),
    (O.Adafactor, {}),
]
if hasattr(O, "Muon"):
    CASES.append((O.Muon, {}))

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def shapes_for(make: Any) -> list[tuple[int, ...]]:
    if make.__name__ == "Muon":
        return [(64, 32), (33, 33), (50, 7)]
    # Adafactor fails for an empty parameter, and Adagrad has made state for it in the parameter's dtype already.
    return [shape for shape in SHAPES if make not in (O.Adafactor, O.Adagrad) or 0 not in shape]


class Masters:
    """Low-precision parameters under an OffloadOptimizer, and fp32 masters in memory, as one keeps them by hand."""

    def __init__(
        self,
        make: Any,
        options: dict[str, Any],
        store: Path,
        dtype: torch.dtype,
        shapes: Any,
        device: str = "cpu",
        **fields: Any,
    ) -> None:
        initial = [torch.randn(shape).to(device, dtype) for shape in shapes]
        if len(initial) > 7:
            initial[7] = initial[7].to(memory_format=torch.channels_last)
        self.masters = [torch.nn.Parameter(p.float()) for p in initial]
        self.plain = make(self.masters, lr=0.01, **options)
        self.make = lambda p: make(p, lr=0.01, **options)
        self.store, self.dtype = store, dtype
        self.fields = {"host_memory": "3MiB" if make.__name__ in ("Muon", "Adafactor") else HOST_MEMORY, **fields}
        self.open([torch.nn.Parameter(p.clone()) for p in initial])

    def open(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.offloaded = OffloadOptimizer(self.make(parameters), self.store, master_weights=True, **self.fields)

    def reopen(self, **fields: Any) -> None:
        self.offloaded.close()
        self.fields.update(fields)
        self.open([torch.nn.Parameter(torch.zeros_like(p)) for p in self.parameters])
        self.offloaded.restore()

    def step(self, without: Any = ()) -> None:
        for i, (master, own) in enumerate(zip(self.masters, self.parameters, strict=True)):
            own.grad = None if i in without else torch.randn_like(own) * 0.1
            master.grad = None if own.grad is None else own.grad.float()
        self.plain.step()
        self.offloaded.step()

    def check(self) -> None:
        for i, (master, own) in enumerate(zip(self.masters, self.parameters, strict=True)):
            assert bits_equal(master.to(self.dtype), own), f"parameter {i}, seed {seed()}"
        actual = self.offloaded.state_dict()
        for index, state in actual["state"].items():
            if "master" in state:  # an empty parameter has none
                assert bits_equal(state.pop("master"), self.masters[index]), f"master {index}, seed {seed()}"
        expected = self.plain.state_dict()
        for index in set(actual["state"]) - set(expected["state"]):
            assert actual["state"].pop(index) == {}  # an optimizer without state has a master all the same
        assert_same_state(expected, actual)


# Masters.


@pytest.mark.parametrize(("make", "options"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_masters_are_bit_equal_to_masters_in_memory(
    make: Any, options: dict[str, Any], dtype: torch.dtype, device: str, store: Path
) -> None:
    run = Masters(make, options, store, dtype, shapes_for(make), device)
    for number in range(4):
        run.step(without=[1] if number == 2 else [])
    run.check()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_at_any_number_of_threads(threads: int, store: Path) -> None:
    torch.set_num_threads(threads)
    run = Masters(O.AdamW, {"fused": True}, store, torch.bfloat16, [(300_007,), (131_072,)])
    for _ in range(3):
        run.step()
    run.check()


def test_ties_of_masters_are_kept(store: Path) -> None:
    # Masters half way between two bf16 numbers: the weight does not tell on which side they are.
    parameter = torch.nn.Parameter(torch.ones(5_000, dtype=torch.bfloat16))
    with OffloadOptimizer(O.SGD([parameter], lr=1.0), store, master_weights=True, host_memory=HOST_MEMORY) as optimizer:
        master = torch.ones(5_000)
        for move in (2.0**-8, 2.0**-7, 2.0**-9, 2.0**-9, 3 * 2.0**-8):
            parameter.grad = torch.full_like(parameter, -move)
            optimizer.step()
            master += move
            assert bits_equal(parameter, master.bfloat16())
            assert bits_equal(optimizer.state[parameter]["master"], master)
        optimizer.snapshot()
        optimizer.step()
        optimizer.restore()
        assert bits_equal(optimizer.state[parameter]["master"], master)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"unit_size": "40KiB", "host_memory": "150KiB"}], ids=["same", "other units"])
def test_masters_come_back(dtype: torch.dtype, fields: dict[str, Any], store: Path) -> None:
    run = Masters(O.AdamW, {}, store, dtype, SHAPES, durability="step")
    for _ in range(3):
        run.step()
        run.reopen(**fields)
        run.check()


def test_masters_go_through_a_state_dict(store: Path, tmp_path: Path) -> None:
    run = Masters(O.AdamW, {}, store, torch.bfloat16, SHAPES)
    for _ in range(2):
        run.step()
    torch.save(run.offloaded.state_dict(), tmp_path / "checkpoint.pt")
    run.offloaded.close()
    (tmp_path / "other").mkdir()
    run.store = tmp_path / "other"
    run.fields["unit_size"] = "30KiB"
    run.open([torch.nn.Parameter(torch.zeros_like(p)) for p in run.parameters])
    run.offloaded.load_state_dict(torch.load(tmp_path / "checkpoint.pt", mmap=True))  # sets the parameters, too
    run.check()
    run.step()
    run.check()


def test_a_state_without_masters_takes_them_from_the_parameters(store: Path) -> None:
    run = Masters(O.AdamW, {}, store, torch.bfloat16, SHAPES)
    run.step()
    for master, own in zip(run.masters, run.parameters, strict=True):
        master.data.copy_(own)
    run.offloaded.load_state_dict(run.plain.state_dict())
    run.check()
    run.step()
    run.check()


def test_whatever_the_default_dtype_is(store: Path) -> None:
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        parameter = torch.nn.Parameter(torch.randn(50_000))
        fields = {"state_dtype": "int8", "master_weights": True, "host_memory": HOST_MEMORY}
        with OffloadOptimizer(O.AdamW([parameter]), store, **fields) as optimizer:
            for _ in range(2):
                parameter.grad = torch.randn_like(parameter)
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            assert optimizer.state[parameter]["exp_avg"].dtype is torch.float32
            optimizer.snapshot()
            optimizer.restore()
    finally:
        torch.set_default_dtype(default)


def test_parameters_of_full_precision_have_no_master(store: Path) -> None:
    run = Masters(O.AdamW, {}, store, torch.float32, SHAPES)
    for _ in range(2):
        run.step()
    assert "master" not in run.offloaded.state[run.parameters[0]]
    run.check()


# Codecs.


def rounded(
    store: Path, state_dtype: Any, steps: int = 4, reopen: bool = False, device: str = "cpu", **fields: Any
) -> tuple[Any, Any]:
    """The weights and the state of a run that does not depend on how it is cut, or on whether it is interrupted."""
    generator = torch.Generator().manual_seed(7)
    folder = store / f"run-{len(list(store.iterdir()))}"
    folder.mkdir()
    fields = {"host_memory": "300KiB", "durability": "step", "master_weights": True, **fields}
    shapes = [(100_003,), (300, 257), (130,), ()]
    initial = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]

    def make(parameters: list[torch.nn.Parameter]) -> OffloadOptimizer:
        return OffloadOptimizer(O.AdamW(parameters, lr=0.01), folder, state_dtype=state_dtype, **fields)

    parameters = [torch.nn.Parameter(p.clone()) for p in initial]
    optimizer = make(parameters)
    for step in range(steps):
        for p in parameters:
            p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(device, torch.bfloat16)
        optimizer.step()
        if reopen and step % 2:
            optimizer.close()
            parameters = [torch.nn.Parameter(torch.zeros_like(p)) for p in initial]
            optimizer = make(parameters)
            optimizer.restore()
    state = optimizer.state_dict()
    optimizer.close()
    return [p.detach() for p in parameters], state


@pytest.mark.parametrize("state_dtype", ["bf16", "int8", {"exp_avg": "bf16", "exp_avg_sq": "int8"}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupted_run_rounds_as_one_that_was_not(store: Path, state_dtype: Any, device: str) -> None:
    weights, state = rounded(store, state_dtype, device=device)
    again, state_again = rounded(store, state_dtype, device=device, reopen=True)
    assert all(bits_equal(a, b) for a, b in zip(weights, again, strict=True))
    assert_same_state(state, state_again)


@pytest.mark.parametrize("state_dtype", ["exact", "bf16", "int8", {"exp_avg": "bf16", "exp_avg_sq": "int8"}], ids=str)
def test_tensors_are_coded_as_what_is_given_by_address(
    store: Path, state_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for parameters on other devices: the update's other way, which needs none here."""
    weights, state = rounded(store, state_dtype)
    monkeypatch.setattr("offload_opt.update._by_address", lambda tensor: False)
    again, state_again = rounded(store, state_dtype)
    assert all(bits_equal(a, b) for a, b in zip(weights, again, strict=True))
    assert_same_state(state, state_again)


def test_rounding_does_not_depend_on_the_units(store: Path) -> None:
    weights, state = rounded(store, "bf16")
    again, state_again = rounded(store, "bf16", host_memory="1MiB", unit_size="100KiB")
    assert all(bits_equal(a, b) for a, b in zip(weights, again, strict=True))
    assert_same_state(state, state_again)


@pytest.mark.parametrize(("state_dtype", "most"), [("bf16", 0.01), ("int8", 0.06)])
@pytest.mark.parametrize("device", DEVICES)
def test_rounded_state_is_near_the_exact_one(store: Path, state_dtype: str, most: float, device: str) -> None:
    _, exact = rounded(store, "exact", device=device)
    _, state = rounded(store, state_dtype, device=device)
    for index, values in exact["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            error = (state["state"][index][name] - values[name]).norm() / values[name].norm()
            assert 0 < error < most, (index, name)
        assert (state["state"][index]["exp_avg_sq"] > 0).all()


@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_of_other_lengths_than_its_parameter_is_rounded(
    store: Path, state_dtype: str, dtype: torch.dtype
) -> None:
    """Adafactor keeps one value for each row, and one for each column."""
    start = torch.randn(300, 257).to(dtype)
    fields: dict[str, Any] = {"host_memory": "3MiB", "master_weights": dtype != torch.float32}
    exact, coarse = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    (store / "exact").mkdir()
    (store / "coarse").mkdir()
    with (
        OffloadOptimizer(O.Adafactor([exact]), store / "exact", **fields) as one,
        OffloadOptimizer(O.Adafactor([coarse]), store / "coarse", state_dtype=state_dtype, **fields) as other,
    ):
        for _ in range(4):
            exact.grad = torch.randn_like(exact)
            coarse.grad = exact.grad.clone()
            one.step()
            other.step()
        for name in ("row_var", "col_var"):
            expected, actual = one.state[exact][name], other.state[coarse][name]
            assert not torch.equal(expected, actual)
            assert torch.allclose(expected, actual, rtol=0.15), f"{name}, seed {seed()}"
    assert torch.allclose(exact.detach().float(), coarse.detach().float(), atol=0.05)


class GradientAsVariance(O.Optimizer):
    """Keeps the last gradient under a name whose state is never below zero."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_avg_sq"] = parameter.grad.clone()


@pytest.mark.parametrize("numel", [100, 50_000], ids=["whole", "in several units"])
def test_state_that_a_codec_cannot_hold_is_named(store: Path, numel: int) -> None:
    OffloadOptimizer.register(GradientAsVariance, "elementwise")
    parameter = torch.nn.Parameter(torch.ones(numel))
    with OffloadOptimizer(
        GradientAsVariance([("layer", parameter)]), store, state_dtype="int8", host_memory="48KiB"
    ) as optimizer:
        parameter.grad = torch.ones(numel)
        optimizer.step()
        parameter.grad[70] = -1.0
        with pytest.raises(OffloadError, match=r"exp_avg_sq of .* cannot be stored as int8: element 70 is -1"):
            optimizer.step()
        with pytest.raises(StepFailedError):
            optimizer.step()
    taken = {"state": {0: {"exp_avg_sq": -torch.ones(numel)}}, "param_groups": [{"params": [0]}]}
    with (
        OffloadOptimizer(GradientAsVariance([parameter]), store, state_dtype="int8", discard=True) as optimizer,
        pytest.raises(OffloadError, match=r"exp_avg_sq of .* cannot be stored as int8: element 0 is -1"),
    ):
        optimizer.load_state_dict(taken)


@pytest.mark.parametrize(("state_dtype", "bytes_each"), [("exact", 10), ("bf16", 6), ("int8", 4 + 2 / 128)])
def test_bytes_for_a_parameter(store: Path, state_dtype: str, bytes_each: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1 << 20, dtype=torch.bfloat16))
    fields = {"state_dtype": state_dtype, "master_weights": True, "host_memory": "1MiB"}
    with OffloadOptimizer(O.AdamW([parameter]), store, **fields) as optimizer:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert bytes_each <= optimizer.stats.state_bytes / (1 << 20) < 1.03 * bytes_each


def test_full_precision_parameters_may_have_rounded_state(store: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(50_000))
    with OffloadOptimizer(O.AdamW([parameter]), store, state_dtype="int8", host_memory=HOST_MEMORY) as optimizer:
        for _ in range(3):
            parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        taken = optimizer.state_dict()
        optimizer.load_state_dict(taken)
        assert_same_state(taken, optimizer.state_dict())  # what is rounded already is stored as it is
        optimizer.export_safetensors(store / "state.safetensors")
        assert bits_equal(optimizer.state[parameter]["exp_avg"], taken["state"][0]["exp_avg"])


def test_a_store_of_another_codec_is_taken_up(store: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(50_000))
    with OffloadOptimizer(O.AdamW([parameter]), store, host_memory="400KiB") as optimizer:
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.snapshot()
        exact = optimizer.state_dict()
        exact = {name: value.clone() for name, value in exact["state"][0].items()}
    with OffloadOptimizer(O.AdamW([parameter]), store, host_memory="400KiB", state_dtype="bf16") as optimizer:
        optimizer.restore()
        for name in ("exp_avg", "exp_avg_sq"):
            error = (optimizer.state[parameter][name] - exact[name]).norm() / exact[name].norm()
            assert 0 < error < 0.01


def test_a_store_that_is_laid_out_anew_is_rounded_by_its_epoch(store: Path, tmp_path: Path) -> None:
    # Not by the steps that the optimizer had made before it was restored.
    parameter = torch.nn.Parameter(torch.randn(50_000))
    with OffloadOptimizer(O.AdamW([parameter]), store, host_memory="400KiB") as optimizer:
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.snapshot(tmp_path / "snap")
    found = []
    for steps in (0, 2):
        (tmp_path / f"after-{steps}").mkdir()
        fields = {"host_memory": "400KiB", "state_dtype": "int8"}
        with OffloadOptimizer(O.AdamW([parameter]), tmp_path / f"after-{steps}", **fields) as optimizer:
            for _ in range(steps):
                optimizer.step()
            optimizer.restore(tmp_path / "snap")
            found.append(optimizer.state[parameter]["exp_avg"])
    assert bits_equal(*found)


# What is refused.


def test_what_cannot_be_rounded_is_refused(store: Path) -> None:
    low = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    full = torch.nn.Parameter(torch.zeros(10))
    for optimizer, fields, problem in (
        (O.AdamW([low]), {"state_dtype": "int8"}, "master_weights=True keeps it in float32"),
        (O.RMSprop([full], centered=True), {"state_dtype": "bf16"}, "centered=True"),
        (O.AdamW([full]), {"state_dtype": "int4"}, "must be one of exact, bf16, int8, not 'int4'"),
        (O.AdamW([full]), {"state_dtype": {"exp_avg_squared": "int8"}}, "no state 'exp_avg_squared'"),
        (O.AdamW([full]), {"state_dtype": 8}, "not int"),
        (O.AdamW([full]), {"master_weights": "yes"}, "True or False"),
    ):
        with pytest.raises(ConfigError, match=problem):
            OffloadOptimizer(optimizer, store, **fields)
    assert list(store.iterdir()) == []


def test_a_master_in_several_units_is_read(store: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(100_000).bfloat16())
    with OffloadOptimizer(O.AdamW([parameter]), store, host_memory=HOST_MEMORY, master_weights=True) as optimizer:
        for _ in range(2):
            parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        master = optimizer.state[parameter]["master"]
        assert bits_equal(master, optimizer.state_dict()["state"][0]["master"])
        assert bits_equal(master.bfloat16(), parameter.detach())
