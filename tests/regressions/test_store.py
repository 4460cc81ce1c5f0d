"""What was wrong with stores, commits and snapshots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offload_opt import OffloadOptimizer, StoreError, verification
from offload_opt.folders import free_bytes
from offload_opt.inspection import find_ranks
from tests.optim.support import Pair, adam, bits_equal


def make(store: Path, *names: str, **fields: Any) -> OffloadOptimizer:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(30_000))
    parameter.grad = torch.ones_like(parameter)
    return OffloadOptimizer(adam([(name, parameter) for name in names] or [parameter]), store, **fields)


def test_unit_files_have_the_names_of_the_run_that_goes_on_with_them(store: Path) -> None:
    # Units were taken up as they were, with the names of the run before in their headers, which the manifest had not.
    with make(store) as optimizer:
        optimizer.step()
        optimizer.snapshot()
    with make(store, "weight") as optimizer:
        optimizer.restore()
        optimizer.step()
        optimizer.snapshot()
        (report,) = verification.verify(find_ranks([store]), lambda *_: None)
        assert report.is_whole, report
    names = {name for file in store.glob("*/units/*") for name in load_file(file) if not name.startswith("__")}
    assert names == {"weight.exp_avg", "weight.exp_avg_sq"}


@pytest.mark.parametrize("source", ["commit", "snapshot"])
def test_files_of_a_commit_that_was_laid_out_anew_are_deleted(store: Path, source: str) -> None:
    # They stayed until the store was opened again, beside the new ones: up to twice the space.
    with make(store, host_memory="2MiB") as optimizer:
        optimizer.step()
        optimizer.snapshot(store / "snapshot")
    with make(store, host_memory="200KiB" if source == "commit" else "2MiB") as optimizer:
        optimizer.restore(None if source == "commit" else store / "snapshot")
        for _ in range(2):
            optimizer.step()
            optimizer.snapshot()
        files = len(list(store.glob("rank-*/units/*")))
    (report,) = verification.verify(find_ranks([store]), lambda *_: None)
    assert (report.is_whole, files) == (True, 2 * report.units)


def test_a_learning_rate_that_numpy_computed_can_be_committed(store: Path) -> None:
    # The commit failed on its thread: JSON is made of floats themselves only.
    numpy = pytest.importorskip("numpy")
    with make(store) as optimizer:
        optimizer.param_groups[0]["lr"] = numpy.float64(0.125)
        optimizer.step()
        optimizer.snapshot()
    with make(store) as optimizer:
        optimizer.restore()
        assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_snapshot_in_a_folder_whose_name_is_no_unicode(store: Path) -> None:
    # Its path did not go into the manifest, and the snapshot failed.
    place = Path(os.fsdecode(bytes(store) + b"/caf\xe9"))
    try:
        place.mkdir()
        place.rmdir()
    except OSError:
        pytest.skip("the file system has Unicode names only")
    with make(store) as optimizer:
        for name in ("first", "second"):
            optimizer.step()
            optimizer.snapshot(place / name)
        optimizer.restore(place / "first")
        assert optimizer.epoch == 1


def test_a_state_dict_of_many_tensors_takes_few_descriptors(store: Path) -> None:
    # Each tensor had a mapping of its own, and each mapping a descriptor of the file.
    parameters = [torch.nn.Parameter(torch.zeros(16 << 10)) for _ in range(150)]
    with OffloadOptimizer(adam(parameters), store, host_memory="2MiB") as optimizer:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.synchronize()
        before = len(list(Path("/proc/self/fd").iterdir()))
        taken = optimizer.state_dict()
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
        for state in taken["state"].values():
            assert bits_equal(state["exp_avg"], parameters[0].grad * 0.1)


def test_what_a_killed_process_left_of_a_manifest_is_deleted(store: Path) -> None:
    make(store).close()
    remains = store / "rank-00000-of-00001" / ".MANIFEST.json.123.new"
    remains.write_bytes(b"half of it")
    make(store).close()
    assert not remains.exists()


def test_weights_that_found_no_room_are_not_counted(small_disk: Path) -> None:
    pair = Pair(adam, small_disk, [(20_000,)], persist_params=True)
    pair.step()
    before = pair.offloaded.stats.state_bytes
    full = small_disk / "full"
    full.write_bytes(bytes(free_bytes(small_disk)))
    for _ in range(3):
        with pytest.raises(StoreError, match="free"):
            pair.offloaded.snapshot()
        assert pair.offloaded.stats.state_bytes == before
    full.unlink()
    pair.offloaded.snapshot()
    assert before + 80_000 <= pair.offloaded.stats.state_bytes < before + 80_000 + 4096
    pair.step()
    pair.check()
