"""The cost model: against arithmetic, and against what a real optimizer moves and takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_opt import OffloadConfig, OffloadOptimizer
from offload_opt.model_sizes import Model, Parameter
from offload_opt.planner import Bandwidth, Footprint, Prediction, balancing_memory, footprint, predict
from offload_opt.planning import Question, lay_out, layout_name
from offload_opt.units import SwapUnit

SHAPES = [(300, 200), (70_000,), (64, 1000), (129,), (33, 77)]


def units(*sizes: int) -> list[SwapUnit]:
    return [SwapUnit(index, (), size, torch.device("cpu")) for index, size in enumerate(sizes)]


def cost(state: Sequence[SwapUnit], weights: Sequence[SwapUnit] = (), **fields: Any) -> Footprint:
    given: dict[str, Any] = {"host_memory": 300, "max_buffers": 256, "durability": "snapshot"}
    return footprint(state, weights, **{**given, "file_size": lambda unit: unit.nbytes + 10, **fields})


def test_units_that_stay_in_memory_are_not_moved() -> None:
    found = cost(units(*[100] * 10))
    assert (found.units, found.kept, found.read, found.written) == (10, 3, 700, 700)
    assert (found.host_memory, found.disk_space, found.snapshot_space) == (300, 2200, 1100)
    assert cost(units(*[100] * 10), max_buffers=2).read == 800


def test_a_state_that_fits_is_not_moved_at_all() -> None:
    found = cost(units(100, 100, 50))
    assert (found.kept, found.read, found.written, found.host_memory) == (3, 0, 0, 300)


def test_steps_up_and_down_are_averaged() -> None:
    assert cost(units(100, 100, 100, 40)).read == (40 + 100) / 2


def test_a_commit_in_each_step_writes_everything_and_the_weights() -> None:
    found = cost(units(*[100] * 10), units(100, 50), durability="step")
    assert (found.written, found.read) == (1150, 1000)  # the three buffers are taken from the ring for the weights
    found = cost(units(*[100] * 10), units(100, 50), durability="step", host_memory=800)
    assert (found.kept, found.read) == (4, 600)


def test_scratch_has_one_file_for_each_unit() -> None:
    assert cost(units(*[100] * 10), durability="scratch").disk_space == 1100


def test_nothing_to_page() -> None:
    found = cost([])
    assert (found.read, found.written, found.host_memory, found.disk_space) == (0, 0, 0, 0)


def test_the_slower_of_drive_and_update_decides_and_the_other_disturbs_it() -> None:
    found = cost(units(*[100] * 10))
    drive = Bandwidth(mixed=140, read=200, write=400)
    slow = predict(found, parameters=1000, bandwidth=drive, update_rate=500)
    assert (slow.disk_seconds, slow.update_seconds, slow.seconds, slow.limit) == (10, 2, 10.3, "disk")
    fast = predict(found, parameters=1000, bandwidth=drive, update_rate=50, checksum_rate=700)
    assert (fast.update_seconds, fast.seconds, fast.limit) == (21, 22.5, "update")


def test_what_is_only_written_goes_at_the_speed_of_writes() -> None:
    drive = Bandwidth(mixed=100, read=50, write=200)
    assert drive.seconds(100, 100) == 2
    assert drive.seconds(100, 500) == 4
    assert drive.seconds(200, 100) == 4


def test_days_until_the_rated_writes_are_used_up() -> None:
    found = cost(units(*[100] * 10))
    prediction = Prediction(found, disk_seconds=2, update_seconds=1)
    assert prediction.seconds == 2.15
    assert prediction.written_a_day == 700 * 86400 / 2.15
    assert prediction.days(prediction.written_a_day * 32) == 32
    assert Prediction(found, 2, 1, iteration=4).written_a_day == 700 * 21600
    assert Prediction(found, 2, 1, iteration=1).written_a_day == prediction.written_a_day  # it has its step in it
    assert Prediction(cost(units(100)), 0, 1).days(1) == math.inf


def test_the_memory_with_which_the_drive_keeps_up() -> None:
    state = units(*[100] * 10)
    drive = Bandwidth(mixed=140, read=140, write=140)
    slow = predict(cost(state), parameters=1000, bandwidth=drive, update_rate=200)
    needed = balancing_memory(slow, 300, commits=False)
    assert needed == 700
    assert predict(cost(state, host_memory=needed), parameters=1000, bandwidth=drive, update_rate=200).limit == "update"
    assert balancing_memory(slow, 300, commits=True) is None
    assert balancing_memory(Prediction(cost(state), 1, 2), 300, commits=False) == 300


# Against the real thing.

SETTINGS: list[dict[str, Any]] = [
    {},
    {"durability": "scratch"},
    {"durability": "step"},
    {"durability": "step", "persist_params": True},
    {"durability": "step", "persist_params": True, "unit_size": "16KiB"},
    {"durability": "step", "persist_params": True, "host_memory": "8MiB"},
    {"durability": "step", "persist_params": True, "unit_size": "16KiB", "host_memory": "8MiB"},
    {"durability": "snapshot", "persist_params": True, "unit_size": "80KiB"},
    {"durability": "snapshot", "persist_params": True, "unit_size": "16KiB", "host_memory": "8MiB"},
    {"durability": "snapshot", "persist_params": True, "host_memory": "8MiB"},
    {"host_memory": "1MiB"},
    {"host_memory": "8MiB"},
    {"state_dtype": "bf16"},
    {"state_dtype": "int8", "host_memory": "64KiB"},
    {"state_dtype": {"exp_avg": "int8"}, "unit_size": "20KiB"},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master_weights": True},
    {"dtype": torch.bfloat16, "master_weights": True, "state_dtype": "int8", "durability": "step"},
    {"dtype": torch.float16, "master_weights": True, "state_dtype": "bf16", "host_memory": "96KiB"},
    {"optimizer": torch.optim.SGD, "options": {"momentum": 0.9}},
    {"optimizer": torch.optim.Adafactor, "host_memory": "2MiB"},
    {"optimizer": torch.optim.Adam, "options": {"amsgrad": True}, "durability": "step"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_is_what_a_run_moves_and_takes(store: Path, settings: dict[str, Any]) -> None:
    fields = {"host_memory": "256KiB", **settings}
    dtype, kind = fields.pop("dtype", torch.float32), fields.pop("optimizer", torch.optim.AdamW)
    options = fields.pop("options", {})
    config = OffloadConfig(path=str(store), **fields)
    model = Model("", tuple(Parameter(str(number), shape) for number, shape in enumerate(SHAPES)))
    layouts, _ = lay_out(Question(model, kind, config, options, dtype))
    expected = next(layout.footprint for layout in layouts if layout.name == layout_name(config))

    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with OffloadOptimizer(kind(parameters, **options), config) as optimizer:
        optimizer.step()
        if config.durability == "snapshot" and config.holds_weights:
            optimizer.snapshot()  # makes files of the weights, and buffers that they fit
        for _ in range(2):
            optimizer.step()
        before = optimizer.stats
        for _ in range(2):  # one up, one down
            optimizer.step()
        stats = optimizer.stats
        optimizer.synchronize()
        files = [file.stat().st_size for file in store.glob("rank-*/units/*")]
    assert stats.bytes_read - before.bytes_read == 2 * expected.read
    assert stats.bytes_written - before.bytes_written == 2 * expected.written
    assert stats.host_memory_bytes == expected.host_memory
    assert sum(files) == expected.disk_space
    assert expected.state <= stats.state_bytes
