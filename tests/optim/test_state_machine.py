"""Any order of steps, commits, snapshots, restores and reopenings, against the plain optimizer in memory.

The model is the plain optimizer on its own parameters, and deep copies of it for whatever was committed. All
comparisons are bit for bit. In some runs the offloaded parameters are bf16 with masters, which are the model's own.
OFFLOAD_OPT_EXAMPLES is the number of runs.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from offload_opt import ConfigError, OffloadOptimizer, StoreError
from tests.conftest import seed
from tests.optim.support import assert_same_state, bits_equal

# Shapes that are cut over units, share one, are odd, scalar or empty.
SHAPES = [(9_001,), (40, 33), (5,), (), (0,)]
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.01), amsgrad=True),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
}
MEMORY = st.sampled_from([("120KiB", None), ("160KiB", "37KiB"), ("400KiB", "40KiB"), ("1MiB", None)])


@dataclasses.dataclass
class Epoch:
    """What a commit or a snapshot is to bring back; the weights only where the store holds them."""

    number: int
    weights: list[torch.Tensor]
    state: dict[str, Any]
    extra: Any


class Training(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "store").mkdir()
        self.counter = itertools.count()

    @initialize(
        name=st.sampled_from(sorted(OPTIMIZERS)),
        durability=st.sampled_from(["snapshot", "step", "scratch"]),
        persist_params=st.booleans(),
        masters=st.booleans(),
        memory=MEMORY,
    )
    def start(
        self, name: str, durability: str, persist_params: bool, masters: bool, memory: tuple[str, str | None]
    ) -> None:
        self.name = name
        self.fields = {"durability": durability, "persist_params": persist_params, "master_weights": masters}
        self.dtype = torch.bfloat16 if masters else torch.float32
        self.holds_weights = persist_params or masters
        self.generator = torch.Generator().manual_seed(seed())
        parameters = [torch.nn.Parameter(self.random(shape)) for shape in SHAPES]
        if name == "adafactor":
            parameters.pop()  # which divides by the number of elements
        self.plain = self.make([{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.1}])
        self.epoch = 0
        self.committed: Epoch | None = None
        self.snapshots: dict[Path, Epoch] = {}
        self.must_decide = False  # reopened, and not restored yet
        self.open(memory)

    # Helpers.

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        """What the offloaded parameters can hold."""
        return torch.randn(shape, generator=self.generator).to(self.dtype).float()

    def make(self, groups: Any) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS[self.name](groups)
        for options in (optimizer.defaults, *optimizer.param_groups):
            options.setdefault("differentiable", False)  # as torch does at load_state_dict(), which the model uses
        return optimizer

    def open(self, memory: tuple[str, str | None]) -> None:
        """As in a new process: new parameters with other values, a new inner optimizer."""
        if self.name == "adafactor" and self.fields["master_weights"]:
            memory = ("400KiB", None)  # which updates a parameter whole
        groups = [
            {**group, "params": [torch.nn.Parameter(p.detach().clone().to(self.dtype)) for p in group["params"]]}
            for group in self.plain.param_groups
        ]
        self.offloaded = OffloadOptimizer(
            self.make(groups), self.folder / "store", host_memory=memory[0], unit_size=memory[1], **self.fields
        )

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        plain, own = self.plain.param_groups, self.offloaded.param_groups
        return [pair for a, b in zip(plain, own, strict=True) for pair in zip(a["params"], b["params"], strict=True)]

    def here(self) -> Epoch:
        weights = [p.detach().clone() for p, _ in self.pairs()]
        return Epoch(self.epoch, weights, copy.deepcopy(self.plain.state_dict()), copy.deepcopy(self.offloaded.extra))

    def fits(self, epoch: Epoch) -> bool:
        sizes = [len(group["params"]) for group in epoch.state["param_groups"]]
        return sizes == [len(group["params"]) for group in self.plain.param_groups]

    def back_to(self, epoch: Epoch, extra: Any) -> None:
        """The model goes back; where the store has no weights, they are the user's business."""
        for (plain, own), weight in zip(self.pairs(), epoch.weights, strict=True):
            plain.data.copy_(weight)
            if not self.holds_weights:
                own.data.copy_(weight)
        self.plain.load_state_dict(copy.deepcopy(epoch.state))
        self.epoch = epoch.number
        self.must_decide = False
        assert extra == epoch.extra
        assert self.offloaded.extra == epoch.extra

    # Rules.

    @precondition(lambda self: not self.must_decide)
    @rule(
        data=st.data(), lr=st.sampled_from([0.01, 0.003, 1e-9]), extra=st.sampled_from([{}, {"at": (1, float("inf"))}])
    )
    def step(self, data: st.DataObject, lr: float, extra: Any) -> None:
        pairs = self.pairs()
        chosen = data.draw(st.sets(st.integers(0, len(pairs) - 1)))
        for index, (plain, own) in enumerate(pairs):
            plain.grad = own.grad = None
            if index in chosen:
                plain.grad = self.random(tuple(plain.shape))
                own.grad = plain.grad.clone().to(self.dtype)
        for group in [*self.plain.param_groups, *self.offloaded.param_groups]:
            if not isinstance(group["lr"], torch.Tensor):
                group["lr"] = lr
        self.offloaded.extra = extra
        self.plain.step()
        self.offloaded.step()
        self.epoch += 1
        if self.fields["durability"] == "step":
            self.committed = self.here()

    @precondition(lambda self: not self.must_decide and self.fields["durability"] != "scratch")
    @rule()
    def commit(self) -> None:
        self.offloaded.snapshot()
        self.committed = self.here()

    @precondition(lambda self: not self.must_decide)
    @rule()
    def snapshot(self) -> None:
        folder = self.folder / f"snapshot-{next(self.counter)}"
        self.offloaded.snapshot(folder)
        self.snapshots[folder] = self.here()
        if self.fields["durability"] != "scratch":
            self.committed = self.here()

    @rule()
    def restore(self) -> None:
        if self.committed is None:
            with pytest.raises(StoreError, match="no committed epoch"):
                self.offloaded.restore()
        elif not self.fits(self.committed):
            with pytest.raises(ConfigError, match="add_param_group"):
                self.offloaded.restore()
        else:
            self.back_to(self.committed, self.offloaded.restore())

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def restore_a_snapshot(self, data: st.DataObject) -> None:
        folder = data.draw(st.sampled_from(sorted(self.snapshots)))
        epoch = self.snapshots[folder]
        if not self.fits(epoch):
            with pytest.raises(ConfigError, match="add_param_group"):
                self.offloaded.restore(folder)
            return
        self.back_to(epoch, self.offloaded.restore(folder))
        if self.fields["durability"] != "scratch":
            self.committed = epoch

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def delete_a_snapshot(self, data: st.DataObject) -> None:
        folder = data.draw(st.sampled_from(sorted(self.snapshots)))
        shutil.rmtree(folder)
        del self.snapshots[folder]

    @rule(memory=MEMORY)
    def crash(self, memory: tuple[str, str | None]) -> None:
        """What was not committed is lost: close() commits nothing."""
        self.offloaded.close()
        self.open(memory)
        if self.committed is not None:
            with pytest.raises(StoreError, match="restore"):
                self.offloaded.step()
            assert self.offloaded.committed_epoch == self.committed.number
            for plain, own in self.pairs():
                own.data.copy_(plain)
            self.must_decide = True
            if self.fits(self.committed):
                self.restore()
            return
        # A run without a commit starts over.
        state = copy.deepcopy(self.plain.state_dict())
        self.plain.load_state_dict({**state, "state": {}})
        for plain, own in self.pairs():
            plain.data.copy_(own)  # masters are gone
        self.epoch = 0
        self.offloaded.extra = {}

    @precondition(lambda self: not self.must_decide and len(self.plain.param_groups) < 4)
    @rule(shape=st.sampled_from([(3_000,), (7, 5), ()]))
    def add_param_group(self, shape: tuple[int, ...]) -> None:
        plain = torch.nn.Parameter(self.random(shape))
        own = torch.nn.Parameter(plain.detach().clone().to(self.dtype))
        for optimizer, parameter in ((self.plain, plain), (self.offloaded, own)):
            optimizer.add_param_group({"params": [parameter], "weight_decay": 0.2})

    @precondition(lambda self: not self.must_decide)
    @rule(data=st.data())
    def load_state_dict(self, data: st.DataObject) -> None:
        known = [folder for folder, epoch in self.snapshots.items() if self.fits(epoch)]
        source = data.draw(st.sampled_from([None, *known]))
        state = (self.here() if source is None else self.snapshots[source]).state
        self.plain.load_state_dict(copy.deepcopy(state))
        given = copy.deepcopy(state)
        if self.fields["master_weights"]:
            for index, (plain, own) in enumerate(self.pairs()):
                if index in given["state"]:
                    given["state"][index]["master"] = plain.detach().clone()
                else:
                    plain.data.copy_(own)  # without state there is no master
        self.offloaded.load_state_dict(given)

    # What always holds.

    @invariant()
    def same(self) -> None:
        if self.must_decide:
            return
        for index, (plain, own) in enumerate(self.pairs()):
            assert bits_equal(plain.to(self.dtype), own), f"parameter {index}, seed {seed()}"
        actual = self.offloaded.state_dict()
        for index, (plain, _) in enumerate(self.pairs()):
            if "master" in actual["state"].get(index, {}):
                assert bits_equal(actual["state"][index].pop("master"), plain), f"master {index}, seed {seed()}"
                if not actual["state"][index]:
                    del actual["state"][index]  # of an optimizer that keeps nothing else
        assert_same_state(self.plain.state_dict(), actual)
        assert self.offloaded.epoch == self.epoch

    def teardown(self) -> None:
        if hasattr(self, "offloaded"):
            self.offloaded.close()
        shutil.rmtree(self.folder)


def test_any_order_of_calls() -> None:
    run_state_machine_as_test(
        Training,
        settings=settings(
            max_examples=int(os.environ.get("OFFLOAD_OPT_EXAMPLES", 25)),
            stateful_step_count=20,
            deadline=None,
            database=None,
            derandomize=False,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
