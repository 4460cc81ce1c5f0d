"""Parameters on a CUDA device: the state goes through page-locked memory to the device, is updated there, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload_opt import AioHandle, OffloadOptimizer
from tests.optim.support import bits_equal

pytestmark = pytest.mark.gpu

CASES = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    (torch.optim.AdamW, {"capturable": True}),
    (torch.optim.Adam, {"foreach": False}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
]


@pytest.mark.parametrize(("make", "options"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_equal_the_unwrapped_optimizer(
    make: Any, options: dict[str, Any], dtype: torch.dtype, store: Path
) -> None:
    plain = [torch.nn.Parameter(torch.randn(n, device="cuda").to(dtype)) for n in (300_007, 70_000, 5, 0)]
    own = [torch.nn.Parameter(p.detach().clone()) for p in plain]
    on_cpu = [torch.nn.Parameter(torch.randn(50_000).to(dtype)) for _ in range(2)]  # one model on two devices
    on_cpu[1].data.copy_(on_cpu[0].data)
    if options:  # fused and capturable want one device
        on_cpu = []
    a = make([*plain, *on_cpu[:1]], lr=0.01, **options)
    b = OffloadOptimizer(make([*own, *on_cpu[1:]], lr=0.01, **options), store, host_memory="512KiB")
    for _ in range(4):
        for p, q in zip([*plain, *on_cpu[:1]], [*own, *on_cpu[1:]], strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    assert all(bits_equal(p, q) for p, q in zip([*plain, *on_cpu[:1]], [*own, *on_cpu[1:]], strict=True))
    expected, actual = a.state_dict()["state"], b.state_dict()["state"]
    for index, state in expected.items():
        for name, value in state.items():
            assert bits_equal(torch.as_tensor(value), torch.as_tensor(actual[index][name])), name
    # What was saved on the CPU, or in the store, goes back to where the optimizer wants it.
    for way in ("load_state_dict", "restore"):
        if way == "restore":
            b.snapshot()
            b.restore()
        else:
            b.load_state_dict(b.state_dict())
        for p, q in zip([*plain, *on_cpu[:1]], [*own, *on_cpu[1:]], strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        assert all(bits_equal(p, q) for p, q in zip(plain, own, strict=True))
    b.close()


def test_locked_memory_is_known_to_cuda() -> None:
    with AioHandle() as handle:
        tensor = handle.new_cpu_locked_tensor(1 << 20, torch.empty(0))
        assert tensor.is_pinned()
        assert handle.is_pinned(tensor[5:])
        handle.free_cpu_locked_tensor(tensor)
        del tensor
        again = handle.new_cpu_locked_tensor(1 << 20, torch.empty(0))
        assert again.is_pinned()
