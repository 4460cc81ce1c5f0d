"""What the optimizer tests share: the same parameters under a plain and under an offloaded optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from offload_opt import OffloadOptimizer, verification
from offload_opt.inspection import find_ranks
from tests.conftest import seed

HOST_MEMORY = "200KiB"
SHAPES = [(60_000,), (50, 40), (3,)]
# Shapes that are cut, whole, odd, empty and scalar. With two threads, the first is split between them at an odd place.
SHAPES_OF_ALL_KINDS = [(100_003,), (300, 257), (64, 64), (7,), (0,), (), (1, 5)]


class Pair:
    """The same parameters twice: under the optimizer by itself, and under the wrapped one."""

    def __init__(
        self,
        make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        store: Path | Sequence[Path],
        shapes: Sequence[tuple[int, ...]] = SHAPES_OF_ALL_KINDS,
        dtype: torch.dtype = torch.float32,
        **fields: Any,
    ) -> None:
        self.plain_parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        self.parameters = [torch.nn.Parameter(p.detach().clone()) for p in self.plain_parameters]
        self.plain = make(self.plain_parameters)
        fields.setdefault("host_memory", HOST_MEMORY)
        self.offloaded_folder = store
        self.offloaded = OffloadOptimizer(make(self.parameters), store, **fields)

    def set_gradients(self, without: Sequence[int] = ()) -> None:
        for i, (plain, own) in enumerate(zip(self.plain_parameters, self.parameters, strict=True)):
            plain.grad = own.grad = None
            if i not in without and plain.requires_grad:
                plain.grad = torch.randn(plain.shape).to(plain.dtype) * 0.1
                own.grad = plain.grad.clone()

    def step(self, without: Sequence[int] = ()) -> None:
        self.set_gradients(without)
        self.plain.step()
        self.offloaded.step()

    def check(self) -> None:
        for i, (plain, own) in enumerate(zip(self.plain_parameters, self.parameters, strict=True)):
            assert bits_equal(plain, own), f"parameter {i} of shape {tuple(plain.shape)}, seed {seed()}"
        assert_same_state(self.plain.state_dict(), self.offloaded.state_dict())


class Resumed(Pair):
    """A Pair whose offloaded side is left and taken up again: new parameters and a new optimizer, in the same store."""

    def __init__(
        self, make: Callable[[Any], torch.optim.Optimizer], store: Path | Sequence[Path], *args: Any, **fields: Any
    ) -> None:
        fields = {"durability": "step", "persist_params": True, "host_memory": HOST_MEMORY, **fields}
        super().__init__(make, store, *args, **fields)
        self.make, self.fields = make, fields

    def reopen(self, restore: bool = True, directory: Path | None = None, **fields: Any) -> Any:
        """Close, and come back as another process would, with other values in the parameters."""
        self.offloaded.close()
        groups = [
            {**group, "params": [self.blank(p) for p in group["params"]]} for group in self.offloaded.param_groups
        ]
        self.parameters = [p for group in groups for p in group["params"]]
        fields = {**self.fields, **fields}
        self.offloaded = OffloadOptimizer(self.make_groups(groups), self.offloaded_folder, **fields)
        return self.offloaded.restore(directory) if restore else None

    def make_groups(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer = self.make([p for group in groups for p in group["params"]])
        if len(groups) == 1:
            return optimizer
        rest = [{name: group[name] for name in ("params", "weight_decay")} for group in groups]
        return type(optimizer)(rest, lr=optimizer.param_groups[0]["lr"])

    @staticmethod
    def blank(parameter: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.full_like(parameter, 0.5), requires_grad=parameter.requires_grad)


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, so that NaN equals itself and 0 does not equal -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_same_state(expected: dict[str, Any], actual: dict[str, Any]) -> None:
    assert actual["param_groups"] == expected["param_groups"]
    assert set(actual["state"]) == set(expected["state"])
    for index, state in expected["state"].items():
        other = actual["state"][index]
        assert list(other) == list(state)
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert bits_equal(value, other[name]), f"{name} of parameter {index}, seed {seed()}"
                if value.numel() > 1:
                    assert value.stride() == other[name].stride()
            else:
                assert type(other[name]) is type(value)
                assert other[name] == value


def adam(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, **options)


def parameters(*sizes: int) -> list[torch.nn.Parameter]:
    result = [torch.nn.Parameter(torch.randn(size)) for size in sizes or (60_000, 2_000)]
    for parameter in result:
        parameter.grad = torch.randn_like(parameter)
    return result


def check_commit(store: Path) -> None:
    """Every byte that the last commit names is what was written."""
    (report,) = verification.verify(find_ranks([store]), lambda *_: None)
    assert report.is_whole, report
