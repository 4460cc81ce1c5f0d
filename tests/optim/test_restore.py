"""restore(): what it brings back, and into which optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_opt import ConfigError, StoreError
from tests.optim.support import SHAPES, Pair, Resumed, adam, assert_same_state, bits_equal

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": adam,
    "amsgrad": lambda p: adam(p, amsgrad=True),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01)


# What comes back.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fields", [{}, {"host_memory": "500KiB", "unit_size": "50KiB"}], ids=["same", "other units"])
def test_it_goes_on_bit_for_bit(store: Path, name: str, fields: dict[str, Any]) -> None:
    shapes = [(60, 130), (50, 40)] if name in ("muon", "adafactor") else SHAPES
    pair = Resumed(OPTIMIZERS[name], store, shapes, host_memory="300KiB")
    for step in range(4):
        pair.step()
        if step % 2 == 0:
            pair.reopen(**fields)
            assert pair.offloaded.epoch == step + 1
            pair.check()
    pair.check()


@pytest.mark.parametrize("durability", ["snapshot", "step", "scratch"])
def test_each_durability_brings_back_what_it_promises(store: Path, tmp_path: Path, durability: str) -> None:
    pair = Resumed(adam, store, SHAPES, durability=durability)
    pair.step()
    pair.offloaded.snapshot(tmp_path / "snap")
    then = pair.offloaded.state_dict()
    pair.step()
    pair.offloaded.synchronize()
    if durability == "step":
        pair.reopen()
        pair.check()
    elif durability == "snapshot":
        pair.reopen()
        assert_same_state(then, pair.offloaded.state_dict())
    else:
        with pytest.raises(StoreError, match="no committed epoch"):
            pair.reopen()
    pair.offloaded.restore(tmp_path / "snap")
    assert pair.offloaded.epoch == 1
    assert_same_state(then, pair.offloaded.state_dict())


def test_options_of_the_groups_and_extra_come_back_as_they_were(store: Path) -> None:
    extra = {
        "tuple": (1, [2.5, (3,)], {"a": None}),
        "numbers": [math.inf, -math.inf, -0.0, 5e-324, 0.1, 1e300, 2**80, -(2**63), True],
        "nan": math.nan,
        "bytes": b"\x00\xff",
        "$odd key": {1: "int", ("t", 2): "tuple"},
        "tensors": [torch.randn(3, 2), torch.tensor(7), torch.zeros(0, 4), torch.randn(5).bfloat16()],
        "generator": torch.get_rng_state(),
        "text": 'é\n"\\',
    }
    pair = Resumed(adam, store, SHAPES)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9) for optimizer in (pair.plain, pair.offloaded)
    ]
    for _ in range(3):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    pair.offloaded.snapshot(extra=extra)
    found = pair.reopen()
    pair.check()  # lr, betas, initial_lr, max_lr, ...
    assert repr(found) == repr(extra)
    assert found["$odd key"] == extra["$odd key"]
    for value, expected in zip(found["tensors"], extra["tensors"], strict=True):
        assert bits_equal(value, expected)
    assert bits_equal(found["generator"], extra["generator"])
    assert pair.offloaded.extra is found
    pair.step()
    pair.check()
    assert repr(pair.reopen()) == repr(extra)  # commits of steps hold it too


def test_what_extra_cannot_hold_is_refused_before_anything_is_written(pair: Pair, tmp_path: Path) -> None:
    pair.step()
    with pytest.raises(ConfigError, match=r"extra\['a'\] is a set"):
        pair.offloaded.snapshot(tmp_path / "snap", extra={"a": {1}})
    assert not (tmp_path / "snap").exists()
    assert pair.offloaded.committed_epoch is None
    pair.step()
    pair.check()


def test_no_extra_is_an_empty_dict(store: Path) -> None:
    pair = Resumed(adam, store, SHAPES)
    pair.step()
    assert pair.reopen() == {}


def test_parameters_that_are_frozen_or_get_gradients_later(store: Path) -> None:
    pair = Resumed(adam, store, [(50_000,), (400, 30), (3,), ()])
    for parameter in (pair.plain_parameters[2], pair.parameters[2]):
        parameter.requires_grad_(False)
    for without in ([1], [1, 3], [0], []):
        pair.step(without)
        pair.reopen()
        pair.check()


def test_groups_that_were_added(store: Path) -> None:
    pair = Resumed(adam, store, SHAPES)
    pair.step()
    plain = torch.nn.Parameter(torch.randn(500, 7))
    own = torch.nn.Parameter(plain.detach().clone())
    pair.plain.add_param_group({"params": [plain], "weight_decay": 0.3})
    pair.offloaded.add_param_group({"params": [own], "weight_decay": 0.3})
    pair.plain_parameters.append(plain)
    pair.parameters.append(own)
    with pytest.raises(ConfigError, match=r"add_param_group\(\) comes before"):
        pair.offloaded.restore()  # the last commit is of before
    pair.step()
    pair.reopen()
    pair.check()
    pair.step()
    pair.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"unit_size": "20KiB"}], ids=["same", "other units"])
def test_channels_last_and_bf16(store: Path, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    pair = Resumed(adam, store, [(16, 8, 9, 9), (200, 3)], dtype)
    for parameter in (pair.plain_parameters[0], pair.parameters[0]):
        parameter.data = parameter.data.to(memory_format=torch.channels_last)
    for _ in range(2):
        pair.step()
        pair.reopen(**fields)
        pair.check()


@pytest.mark.parametrize("threads", [(1, 2), (2, 3)])
def test_another_number_of_threads(store: Path, threads: tuple[int, int]) -> None:
    torch.set_num_threads(threads[0])
    pair = Resumed(adam, store)  # shapes that threads share at odd places
    pair.step()
    torch.set_num_threads(threads[1])
    pair.reopen()
    pair.step()
    pair.check()


def test_other_units_leave_no_files_of_the_old_ones(store: Path, tmp_path: Path) -> None:
    pair = Resumed(adam, store, SHAPES)
    for _ in range(2):
        pair.step()
    pair.offloaded.snapshot(tmp_path / "snap")
    sizes = []
    for fields, directory in (
        ({}, None),
        ({"unit_size": "20KiB"}, None),
        ({}, None),
        ({}, tmp_path / "snap"),
        ({"unit_size": "20KiB"}, tmp_path / "snap"),
        ({}, None),
    ):
        pair.reopen(directory=directory, **fields)
        for _ in range(2):
            pair.set_gradients()
            pair.offloaded.step()
        pair.offloaded.synchronize()
        data = [file.stat().st_size - 4096 for file in store.glob("*/units/*")]
        sizes.append(sum(data))
    assert max(sizes) < 1.1 * min(sizes), sizes


def test_momentum_that_was_turned_on_is_committed_with_its_step(store: Path) -> None:
    pair = Resumed(OPTIMIZERS["sgd"], store, SHAPES)
    pair.step()
    for optimizer in (pair.plain, pair.offloaded):
        optimizer.param_groups[0]["momentum"] = 0.9
    pair.step()
    pair.reopen()
    pair.check()
    pair.step()
    pair.check()


def test_weights_are_committed_after_load_state_dict_too(store: Path) -> None:
    pair = Resumed(adam, store, SHAPES)
    pair.step()
    pair.offloaded.load_state_dict(pair.offloaded.state_dict())
    pair.step()
    pair.reopen()
    pair.check()


# Several folders.


def test_several_folders_in_their_order_and_all_of_them(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    a, b, c = folders
    pair = Resumed(adam, [a, b], SHAPES, unit_size="20KiB")
    pair.step()
    pair.reopen()
    pair.check()
    assert all(list(folder.glob("*/units/*")) for folder in (a, b))
    for wrong in ([b, a], [a], [b], [a, b, c], [c, a]):
        pair.offloaded_folder = wrong
        with pytest.raises((ConfigError, StoreError), match="in the order of its run"):
            pair.reopen(restore=False)
    pair.offloaded_folder = [a, b]
    pair.reopen()
    pair.step()
    pair.reopen(unit_size=None)
    pair.check()
