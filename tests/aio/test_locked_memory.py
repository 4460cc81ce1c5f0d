"""Page-locked memory."""

from __future__ import annotations

import errno
import gc
import tempfile
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch

from offload_opt import AioHandle
from tests import scripts
from tests.aio.support import PAGE


def test_a_locked_tensor_is_aligned_and_zeroed(handle: AioHandle) -> None:
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.bool]
    for dtype, count, _ in product(dtypes, [1, 1000, 100_003], range(3)):  # later ones may get the memory of earlier
        tensor = handle.new_cpu_locked_tensor(count, torch.empty(3, 4, dtype=dtype))
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((count,), dtype, "cpu")
        assert tensor.data_ptr() % PAGE == 0
        assert tensor.data_ptr() % handle.get_alignment() == 0
        assert not tensor.any()
        tensor.fill_(1)
        assert handle.free_cpu_locked_tensor(tensor)


def test_which_tensors_are_pinned(handle: AioHandle, engine: str) -> None:
    tensor = handle.new_cpu_locked_tensor(5000, torch.empty(0, dtype=torch.bfloat16))
    with AioHandle(engine=engine) as other:
        for view in (tensor, tensor[10:20], tensor[4999:], tensor.view(50, 100)[3], tensor.view(torch.uint8)):
            assert handle.is_pinned(view)
            assert other.is_pinned(view)
        for ordinary in (torch.zeros(5000), tensor.clone(), torch.empty(4, device="meta")):
            assert not handle.is_pinned(ordinary)
        assert not handle.is_pinned(tensor[5:5])
        assert other.free_cpu_locked_tensor(tensor)


def test_a_locked_tensor_is_freed_once(handle: AioHandle) -> None:
    tensor = handle.new_cpu_locked_tensor(100, torch.empty(0))
    assert handle.free_cpu_locked_tensor(tensor) is True
    assert handle.free_cpu_locked_tensor(tensor) is False
    assert handle.free_cpu_locked_tensor(torch.zeros(100)) is False


def test_locked_memory_outlives_its_freeing_while_a_view_lives(handle: AioHandle) -> None:
    tensor = handle.new_cpu_locked_tensor(100_000, torch.empty(0))
    view = tensor[500:600]
    view.fill_(7)
    assert handle.free_cpu_locked_tensor(tensor)
    del tensor
    gc.collect()
    others = [handle.new_cpu_locked_tensor(100_000, torch.empty(0)).fill_(1) for _ in range(4)]
    assert torch.equal(view, torch.full((100,), 7.0))
    assert handle.is_pinned(view)
    for other in others:
        handle.free_cpu_locked_tensor(other)


def test_locked_memory_outlives_its_handle(engine: str) -> None:
    with AioHandle(engine=engine) as handle:
        tensor = handle.new_cpu_locked_tensor(1000, torch.empty(0)).fill_(3)
    assert torch.equal(tensor, torch.full((1000,), 3.0))
    assert handle.is_pinned(tensor)
    assert handle.free_cpu_locked_tensor(tensor)


def locked_kib() -> int:
    """Memory of this process that is locked into RAM."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmLck")).split()[1])


def test_locked_memory_goes_with_its_last_view(handle: AioHandle) -> None:
    before = locked_kib()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = handle.new_cpu_locked_tensor(1 << 20, torch.empty(0, dtype=torch.uint8))
    if locked_kib() == before:
        pytest.skip("this user may not lock memory")
    assert locked_kib() == before + 1024
    handle.free_cpu_locked_tensor(tensor)
    view = tensor[5:6]
    del tensor
    gc.collect()
    assert locked_kib() == before + 1024
    del view
    gc.collect()
    assert locked_kib() == before


def test_odd_amounts_of_locked_memory(handle: AioHandle) -> None:
    nothing = handle.new_cpu_locked_tensor(0, torch.empty(0, dtype=torch.float16))
    assert (nothing.shape, nothing.dtype) == ((0,), torch.float16)
    with pytest.raises(ValueError, match="-4"):
        handle.new_cpu_locked_tensor(-1, torch.empty(0))
    with pytest.raises(OSError, match=str(1 << 52)) as caught:
        handle.new_cpu_locked_tensor(1 << 50, torch.empty(0))
    assert caught.value.errno == errno.ENOMEM


MAY_LOCK_NOTHING = """
import os, resource, sys, warnings, torch
from offload_opt import AioHandle, OffloadWarning
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
if os.getuid() == 0:
    os.setuid(65534)  # root is not held to the limit
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with AioHandle() as handle, AioHandle() as other:
        for owner in (handle, other, handle):
            tensor = owner.new_cpu_locked_tensor(100_000, torch.empty(0))
            assert tensor.data_ptr() % 4096 == 0
            assert not tensor.any()
            assert handle.is_pinned(tensor)
            tensor.fill_(5)
            with open(os.memfd_create("file"), "wb") as file:
                assert handle.sync_pwrite(tensor, file.fileno()) == 400_000
            assert owner.free_cpu_locked_tensor(tensor)
assert [warning.category for warning in caught] == [OffloadWarning], caught
assert "ulimit -l" in str(caught[0].message), caught[0]
assert str(caught[0].message).startswith("could not lock 392.0 KiB of memory"), caught[0]
assert caught[0].filename == "<script>", caught[0]
"""

MAY_LOCK_NOTHING_IN_A_STEP = """
import os, resource, sys, warnings, torch, torch._dynamo
from offload_opt import OffloadOptimizer
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
parameter = torch.nn.Parameter(torch.zeros(1000))
optimizer = torch.optim.Adam([parameter])
os.chmod(sys.argv[1], 0o777)
if os.getuid() == 0:
    os.seteuid(65534)  # root is not held to the limit
parameter.grad = torch.ones_like(parameter)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    os.chdir(sys.argv[1])
    OffloadOptimizer(optimizer, ".").step()
assert [warning.filename for warning in caught] == ["<script>"], caught
"""


def test_memory_that_may_not_be_locked_is_warned_of_once() -> None:
    scripts.run_well(MAY_LOCK_NOTHING)


def test_the_warning_points_at_the_line_of_the_user() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not below a folder of root's alone
        scripts.run_well(MAY_LOCK_NOTHING_IN_A_STEP, folder)
