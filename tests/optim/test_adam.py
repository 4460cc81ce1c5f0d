"""The native loop for fused Adam and AdamW over rounded state: the same bits as by the optimizer and the codecs."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim as O

from offload_opt import OffloadOptimizer
from offload_opt.adam import NativeAdam, NativeUpdate
from offload_opt.store import SwapStore
from tests.conftest import seed
from tests.optim.support import HOST_MEMORY, assert_same_state, bits_equal

CASES: list[tuple[Any, dict[str, Any]]] = [
    (O.AdamW, {}),
    (O.AdamW, {"maximize": True, "betas": (0.4, 0.95), "weight_decay": 0.0}),
    (O.Adam, {"weight_decay": 0.1, "eps": 1e-3}),
    (O.Adam, {"lr": torch.tensor(0.02)}),
]
# Of lengths at which torch's kernel has vector code alone: its scalar code rounds otherwise.
SHAPES = [(100_352,), (8, 16, 4, 4), (64, 128), (16,), (0,)]
STATES: list[Any] = ["int8", "bf16", {"exp_avg": "bf16"}, {"exp_avg_sq": "int8"}]

CAPABILITY = torch.backends.cpu.get_cpu_capability()
needs_avx2 = pytest.mark.skipif(CAPABILITY != "AVX2", reason=f"torch's kernel for {CAPABILITY} may round otherwise")


class Run:
    """An optimizer over parameters and gradients that are the same for each run of a test."""

    def __init__(
        self,
        folder: Path,
        make: Any = O.AdamW,
        options: dict[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        shapes: Any = SHAPES,
        **fields: Any,
    ) -> None:
        folder.mkdir()
        self._random = torch.Generator().manual_seed(seed())
        self.parameters = [torch.nn.Parameter(self._tensor(shape).to(dtype)) for shape in shapes]
        for parameter in self.parameters:
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        inner = make(self.parameters, **{"lr": 0.01, "fused": True, **(options or {})})
        fields = {"host_memory": HOST_MEMORY, "state_dtype": "int8", "master_weights": True, **fields}
        self.optimizer = OffloadOptimizer(inner, folder, **fields)

    def _tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._random)

    def step(self) -> None:
        for parameter in self.parameters:
            gradient = (self._tensor(tuple(parameter.shape)) * 0.1).to(parameter.dtype)
            if parameter.dtype == torch.float32:  # torch's kernel takes any gradient for one laid out as the parameter
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        self.optimizer.step()

    def check_same(self, other: Run) -> None:
        for mine, others in zip(self.parameters, other.parameters, strict=True):
            assert bits_equal(mine, others), f"seed {seed()}"
        assert_same_state(self.optimizer.state_dict(), other.optimizer.state_dict())


def count_updates(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of pieces that the native loop updates from now on."""
    names: list[str] = []
    run = NativeUpdate.run

    def counted(self: NativeUpdate, *args: Any) -> None:
        names.append(self.piece.name)
        run(self, *args)

    monkeypatch.setattr(NativeUpdate, "run", counted)
    return names


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeAdam, "of", lambda inner, group: None)


@needs_avx2
@pytest.mark.parametrize(("make", "options"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("state_dtype", STATES, ids=str)
def test_the_bits_are_those_of_the_optimizer_between_codecs(
    make: Any,
    options: dict[str, Any],
    dtype: torch.dtype,
    state_dtype: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {"dtype": dtype, "state_dtype": state_dtype}
    updated = count_updates(monkeypatch)
    native = Run(tmp_path / "native", make, options, **fields)
    for _ in range(4):
        native.step()
    assert len(set(updated)) == len([shape for shape in SHAPES if 0 not in shape])
    updated.clear()
    without_native(monkeypatch)
    plain = Run(tmp_path / "plain", make, options, **fields)
    for _ in range(4):
        plain.step()
    assert not updated
    native.check_same(plain)


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_depends_on_neither_threads_nor_units(
    tmp_path: Path, dtype: torch.dtype, state_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"dtype": dtype, "state_dtype": state_dtype, "shapes": [(100_003,), (300, 257), (7,), ()]}
    torch.set_num_threads(2)
    one = Run(tmp_path / "one", **fields)
    # The first step makes the state, by the optimizer itself.
    one.step()
    other = Run(tmp_path / "other", host_memory="2MiB", unit_size="300KiB", **fields)
    other.step()
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    with torch.no_grad():
        for mine, others in zip(one.parameters, other.parameters, strict=True):
            others.copy_(mine)
    one.optimizer.load_state_dict(one.optimizer.state_dict())  # rounded once more, like the other's
    updated = count_updates(monkeypatch)
    for _ in range(3):
        torch.set_num_threads(2)
        one.step()
        torch.set_num_threads(3)
        other.step()
    assert len(set(updated)) == 4
    one.check_same(other)


@pytest.mark.parametrize("state_dtype", ["int8", "bf16"])
def test_what_is_written_is_what_comes_back(tmp_path: Path, state_dtype: str) -> None:
    """Every byte with its checksum, which the native loop has made on the way."""
    run = Run(tmp_path / "run", state_dtype=state_dtype, shapes=[(100_003,), (300, 257)], checksum="read")
    for _ in range(3):
        run.step()
    run.optimizer.snapshot()
    expected, weights = run.optimizer.state_dict(), [p.detach().clone() for p in run.parameters]
    run.step()
    run.optimizer.restore()
    assert_same_state(expected, run.optimizer.state_dict())
    with torch.no_grad():
        for parameter, weight in zip(run.parameters, weights, strict=True):
            parameter.copy_(weight)
    run.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_may_be_laid_out_otherwise(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them, of units that are prepared together with others."""
    shapes = [(64, 129)] * 24
    fields: dict[str, Any] = {"dtype": dtype, "shapes": shapes, "unit_size": "32KiB", "host_memory": "1MiB"}
    alike, otherwise = Run(tmp_path / "alike", **fields), Run(tmp_path / "otherwise", **fields)
    updated = count_updates(monkeypatch)
    for number in range(4):
        for first, second in zip(alike.parameters, otherwise.parameters, strict=True):
            first.grad = torch.randn(first.shape, generator=alike._random).to(dtype)
            second.grad = first.grad.clone()
        if number:  # in the first step the optimizer's own kernel would mix up gradients in fp32
            for parameter in otherwise.parameters[5::7]:
                parameter.grad = parameter.grad.t().contiguous().t()
        alike.optimizer.step()
        updated.clear()
        otherwise.optimizer.step()
    assert len(set(updated)) == len(shapes), "of the last step"
    alike.check_same(otherwise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_does_not_depend_on_how_many_units_are_prepared_together(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three groups, one of which the native loop does not take, and with parameters that have no gradient."""
    shapes = [(64, 129)] * 40
    fields: dict[str, Any] = {"dtype": dtype, "shapes": shapes, "unit_size": "32KiB", "host_memory": "256KiB"}

    def make(parameters: list[torch.nn.Parameter], **options: Any) -> O.AdamW:
        groups = [{"params": parameters[start::3]} for start in range(3)]
        return O.AdamW([{**groups[0], "amsgrad": True}, {**groups[1], "lr": 0.1}, groups[2]], **options)

    runs = []
    for lot in (1, 5, 16):
        monkeypatch.setattr("offload_opt.update._LOT", lot)
        run = Run(tmp_path / str(lot), make, **fields)
        for number in range(6):
            for index, parameter in enumerate(run.parameters):
                gradient = torch.randn(parameter.shape, generator=run._random).to(dtype)
                parameter.grad = None if number and (index + number) % 4 == 0 else gradient
            run.optimizer.step()
        runs.append(run)
    for run in runs[1:]:
        runs[0].check_same(run)


@pytest.mark.parametrize("failing", [(NativeUpdate, "run"), (SwapStore, "write")], ids=["update", "write"])
def test_gradients_do_not_outlive_a_step_that_failed(
    failing: tuple[type, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is kept, and its traceback with it: those of 15 more units would be, too."""
    run = Run(tmp_path / "run", shapes=[(64, 129)] * 24, unit_size="32KiB", host_memory="256KiB")
    for _ in range(2):
        run.step()
    call, calls = getattr(*failing), []

    def third_fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            calls.clear()  # they have gradients, too
            raise RuntimeError("the third one fails")
        return call(*args)

    monkeypatch.setattr(*failing, third_fails)
    with pytest.raises(RuntimeError, match="the third one fails"):
        run.step()
    gradients = [weakref.ref(p.grad.untyped_storage()) for p in run.parameters if p.grad is not None]
    run.optimizer.zero_grad()
    gc.collect()
    kept = sum(gradient() is not None for gradient in gradients)
    assert kept <= 2, "that of the update that failed, and the last one, which a frame of this test's has"


class OwnAdamW(O.AdamW):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    ("make", "options", "fields"),
    [
        (O.AdamW, {"amsgrad": True}, {}),
        (O.AdamW, {"fused": False}, {}),
        (OwnAdamW, {}, {}),
        (O.AdamW, {}, {"state_dtype": "exact"}),
        (O.AdamW, {}, {"dtype": torch.float16}),
    ],
    ids=str,
)
def test_what_it_does_not_cover_is_the_optimizer_s(
    make: Any, options: dict[str, Any], fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updated = count_updates(monkeypatch)
    run = Run(tmp_path / "run", make, options, **fields)
    for _ in range(3):
        run.step()
    assert not updated
    assert run.optimizer.state[run.parameters[0]]["step"] == 3


def test_a_step_that_somebody_has_replaced_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = O.AdamW.step, []

    def own_step(self: Any, closure: Any = None) -> Any:
        calls.append(closure)
        return step(self, closure)

    monkeypatch.setattr(O.AdamW, "step", own_step)
    updated = count_updates(monkeypatch)
    run = Run(tmp_path / "run")
    for _ in range(3):
        run.step()
    assert calls
    assert not updated


def test_a_gradient_that_is_not_what_its_memory_says(tmp_path: Path) -> None:
    """The imaginary part of a conjugate is a lazy negative of what lies there, and torch's kernel refuses it."""
    run = Run(tmp_path / "run", shapes=[(4_096,)], dtype=torch.float32)
    for _ in range(2):
        run.step()
    run.parameters[0].grad = torch.full((4_096,), 1j).conj().imag
    with pytest.raises(RuntimeError, match="negation"):
        run.optimizer.step()


def test_the_learning_rate_of_each_step_counts(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", shapes=[(4_096,)], dtype=torch.float32)
    for _ in range(2):
        run.step()
    before = run.parameters[0].detach().clone()
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.step()
    assert bits_equal(before, run.parameters[0])
    run.optimizer.param_groups[0]["lr"] = 1.0
    run.step()
    assert (run.parameters[0] - before).abs().max() > 0.1


def test_a_change_of_the_parameter_is_seen_by_autograd(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", shapes=[(4_096,)], dtype=torch.float32)
    run.step()
    parameter = run.parameters[0]
    loss = (parameter * parameter).sum()
    run.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
