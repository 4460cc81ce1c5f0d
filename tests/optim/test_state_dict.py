"""The state reads through, and checkpoints interchange with the unwrapped optimizer's."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from offload_opt import (
    ConfigError,
    OffloadError,
    OffloadOptimizer,
)
from tests import scripts
from tests.optim.support import SHAPES, Pair, adam, assert_same_state, bits_equal


def test_state_reads_through(pair: Pair) -> None:
    assert not pair.offloaded.state
    pair.step()
    pair.step()
    state = pair.offloaded.state
    assert state
    assert len(state) == len(SHAPES)
    assert list(state) == pair.parameters
    for plain, own in zip(pair.plain_parameters, pair.parameters, strict=True):
        assert own in state
        assert list(state[own]) == list(pair.plain.state[plain])
        for name, value in state[own].items():
            assert bits_equal(value, pair.plain.state[plain][name])
        assert state[own].get("nothing") is None
        with pytest.raises(KeyError):
            state[own]["nothing"]
    with pytest.raises(TypeError, match="load_state_dict"):
        state[pair.parameters[0]] = {}  # type: ignore[assignment]


def test_looking_at_the_state_reads_only_what_is_looked_at(pair: Pair) -> None:
    for _ in range(2):  # one up the units and one down: the last ones are not in memory then
        pair.step()
    before = pair.offloaded.stats.bytes_read
    for _, state in pair.offloaded.state.items():
        assert "exp_avg" in state
    assert pair.offloaded.stats.bytes_read == before
    pair.offloaded.state[pair.parameters[1]]["exp_avg"]
    assert pair.offloaded.stats.bytes_read == before + 50 * 40 * 4


def test_replacing_the_state_attribute_is_refused(pair: Pair) -> None:
    pair.step()
    pair.offloaded.state = {}  # type: ignore[assignment]
    with pytest.raises(OffloadError, match="load_state_dict"):
        pair.offloaded.step()


@pytest.mark.parametrize("host_memory", ["64KiB", "1MiB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_interchange_with_the_unwrapped_optimizer(
    pair: Pair, tmp_path: Path, host_memory: str, dtype: torch.dtype
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    first = Pair(lambda p: adam(p, amsgrad=True), folders[0], SHAPES, dtype)
    for _ in range(2):
        first.step()
    file = io.BytesIO()
    torch.save(first.offloaded.state_dict(), file)
    file.seek(0)
    from_offloaded = torch.load(file)  # weights_only: plain dicts and tensors
    # Each side goes on from what the other one saved.
    second = Pair(lambda p: adam(p, amsgrad=True), folders[1], SHAPES, dtype, host_memory=host_memory)
    for old, new in (
        (first.plain_parameters, second.plain_parameters),
        (first.parameters, second.parameters),
    ):
        for p, q in zip(old, new, strict=True):
            q.data.copy_(p.data)
    second.step()  # state that the load is to replace
    for old, new in ((first.plain_parameters, second.plain_parameters), (first.parameters, second.parameters)):
        for p, q in zip(old, new, strict=True):
            q.data.copy_(p.data)
    second.plain.load_state_dict(from_offloaded)
    second.offloaded.load_state_dict(first.plain.state_dict())
    assert_same_state(first.plain.state_dict(), second.offloaded.state_dict())
    for _ in range(2):
        second.step()
    second.check()


def test_loading_before_the_first_step_and_options_from_the_checkpoint(store: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    trained = Pair(lambda p: adam(p, amsgrad=True), tmp_path / "other", SHAPES)
    trained.step()
    fresh = Pair(adam, store, SHAPES)  # without amsgrad: the checkpoint brings it along
    fresh.plain.load_state_dict(trained.plain.state_dict())
    fresh.offloaded.load_state_dict(trained.offloaded.state_dict())
    for _ in range(2):
        fresh.step()
    fresh.check()
    assert "max_exp_avg_sq" in fresh.offloaded.state[fresh.parameters[0]]


def test_load_state_dict_keeps_the_dtype_of_moments(store: Path) -> None:
    class WideMoments(torch.optim.Optimizer):
        """fp32 moments for whatever parameters: torch's load_state_dict would cast them down."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p, dtype=torch.float32))
                m.add_(p.grad.float())
                p.sub_(m * 0.01)

    OffloadOptimizer.register(WideMoments, "elementwise")
    pair = Pair(WideMoments, store, [(60_000,)], torch.bfloat16)
    for _ in range(3):
        pair.step()
    saved = pair.offloaded.state_dict()
    assert saved["state"][0]["m"].dtype == torch.float32
    pair.offloaded.load_state_dict(saved)
    assert_same_state(pair.plain.state_dict(), pair.offloaded.state_dict())


def test_loading_an_empty_state_starts_over(pair: Pair) -> None:
    empty = pair.offloaded.state_dict()
    pair.step()
    pair.offloaded.load_state_dict(empty)
    pair.plain.load_state_dict(empty)
    assert not pair.offloaded.state
    for _ in range(2):
        pair.step()
    pair.check()


def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_lost(pair: Pair) -> None:
    for _ in range(2):
        pair.step()
    good = pair.offloaded.state_dict()
    wrong_groups = {**good, "param_groups": good["param_groups"] * 2}
    with pytest.raises(ValueError, match="parameter groups"):
        pair.offloaded.load_state_dict(wrong_groups)
    wrong_shape = copy.deepcopy(good)
    wrong_shape["state"][1]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ConfigError, match=r"param_1 should have 'exp_avg' of shape \(50, 40\)"):
        pair.offloaded.load_state_dict(wrong_shape)
    missing = copy.deepcopy(good)
    del missing["state"][0]["exp_avg_sq"]
    with pytest.raises(ConfigError, match="exp_avg_sq"):
        pair.offloaded.load_state_dict(missing)
    pair.step()
    pair.check()


def test_state_dict_hooks(pair: Pair) -> None:
    seen: list[Any] = []
    pair.offloaded.register_state_dict_post_hook(lambda _, d: {**d, "extra": 1})
    pair.offloaded.register_load_state_dict_pre_hook(lambda _, d: seen.append(d["state"][0]["exp_avg"].shape))
    pair.offloaded.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    pair.step()
    saved = pair.offloaded.state_dict()
    assert saved["extra"] == 1
    assert isinstance(saved["state"][0], dict)
    pair.offloaded.load_state_dict(saved)
    assert seen == [torch.Size([60_000]), "loaded"]


def test_cannot_be_pickled_or_copied(pair: Pair) -> None:
    for call in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            call(pair.offloaded)


def test_named_parameters_name_the_tensors_in_the_files(store: Path) -> None:
    model = torch.nn.Linear(300, 200)
    with OffloadOptimizer(adam(model.named_parameters()), store, host_memory="200KiB") as optimizer:
        model(torch.randn(4, 300)).sum().backward()
        optimizer.step()
        optimizer.synchronize()
        names = set()
        for file in store.glob("*/units/*.safetensors"):
            with safe_open(file, "pt") as f:
                names |= {name.split("[")[0] for name in f.keys()}  # noqa: SIM118
    assert {"weight.exp_avg", "weight.exp_avg_sq", "bias.exp_avg", "bias.exp_avg_sq"} <= names


def test_a_state_dict_is_the_readers_own(pair: Pair) -> None:
    pair.step()
    taken = pair.offloaded.state_dict()
    then = copy.deepcopy(pair.plain.state_dict())
    for _ in range(2):
        pair.step()
    assert_same_state(then, taken)  # later steps do not change it
    for state in pair.offloaded.state_dict()["state"].values():
        for value in state.values():
            value.fill_(7)
    pair.check()  # and it does not change the optimizer
    pair.step()
    pair.check()


def test_a_checkpoint_that_is_mapped_from_its_file(pair: Pair, tmp_path: Path) -> None:
    pair.step()
    torch.save(pair.offloaded.state_dict(), tmp_path / "checkpoint.pt")
    for parameters in zip(pair.plain_parameters, pair.parameters, strict=True):
        for parameter in parameters:
            parameter.data.zero_()
    before = copy.deepcopy(pair.plain.state_dict())
    pair.step()
    mapped = torch.load(tmp_path / "checkpoint.pt", mmap=True)
    pair.offloaded.load_state_dict(mapped)
    pair.plain.load_state_dict(copy.deepcopy(before))
    for _ in range(2):
        pair.step()
    pair.check()
    assert_same_state(before, torch.load(tmp_path / "checkpoint.pt"))  # the file is as it was


@pytest.mark.parametrize("shapes", [SHAPES, [(8, 4, 5, 5), (), (0,), (7,)]], ids=["cut", "channels last and small"])
def test_export_safetensors_is_read_by_load_file(store: Path, tmp_path: Path, shapes: Any) -> None:
    pair = Pair(adam, store, shapes)
    for parameters in (pair.plain_parameters, pair.parameters):
        if parameters[0].dim() == 4:
            parameters[0].data = parameters[0].data.to(memory_format=torch.channels_last)
    for _ in range(2):
        pair.step()
    pair.offloaded.export_safetensors(tmp_path / "state.safetensors")
    read = load_file(tmp_path / "state.safetensors")
    expected = {
        f"param_{index}.{name}": value
        for index, state in pair.plain.state_dict()["state"].items()
        for name, value in state.items()
    }
    assert set(read) == set(expected)
    for name, value in expected.items():
        assert bits_equal(value, read[name]), name
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        options = json.loads(file.metadata()["param_groups"])
    assert options[0]["lr"] == 0.01


def test_parameters_of_one_name_in_two_groups_are_exported_apart(store: Path, tmp_path: Path) -> None:
    first, second = (torch.nn.Parameter(torch.randn(size)) for size in (30_000, 20))
    groups = [{"params": [("weight", first)]}, {"params": [("weight", second)]}]
    with OffloadOptimizer(adam(groups), store, host_memory="200KiB") as optimizer:
        for parameter in (first, second):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.export_safetensors(tmp_path / "state.safetensors")
        read = load_file(tmp_path / "state.safetensors")
        assert len(read) == 6
        for index, parameter in enumerate((first, second)):
            for name, value in optimizer.state[parameter].items():
                assert bits_equal(value, read[f"weight#{index}.{name}"])


def test_adafactors_state_of_a_scalar_parameter_is_loaded(store: Path) -> None:
    pair = Pair(lambda p: torch.optim.Adafactor(p, lr=0.01), store, [(30, 20), ()])
    pair.step()
    pair.offloaded.load_state_dict(pair.plain.state_dict())
    pair.check()
    pair.step()
    pair.check()


FULL = """
    import resource, signal, sys, torch
    from offload_opt import OffloadOptimizer
    store, file = sys.argv[1:]
    parameter = torch.nn.Parameter(torch.randn(100_000))
    sgd = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer = OffloadOptimizer(sgd, store, state_dtype="bf16", durability="scratch")
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))  # the last write ends there
    try:
        optimizer.export_safetensors(file)
    except OSError as error:
        print(error)
"""


def test_an_export_that_is_cut_short_is_an_error_and_leaves_no_file(store: Path, tmp_path: Path) -> None:
    done = scripts.run_well(FULL, store, tmp_path / "state.safetensors")
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == [store]
