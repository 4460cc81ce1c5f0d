"""Failures in the background, and the end: close(), collection, exit, fork."""

from __future__ import annotations

import errno
import gc
import os
import resource
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import offload_opt
from offload_opt import (
    OffloadError,
    OffloadOptimizer,
    OffloadWarning,
    StepFailedError,
    StoreError,
    aio,
)
from offload_opt.inner import InnerOptimizer
from tests import scripts
from tests.optim.support import HOST_MEMORY, Pair, adam, parameters


def test_a_background_error_is_raised_at_the_next_call_and_sticks(pair: Pair) -> None:
    pair.step()
    pair.step()
    pair.offloaded.synchronize()
    checkpoint = pair.offloaded.state_dict()
    weights = [p.detach().clone() for p in pair.parameters]
    files = sorted(pair.offloaded_folder.glob("*/units/*.safetensors"))
    for file in files:
        os.truncate(file, 4096)
    pair.set_gradients()
    with pytest.raises(OSError, match="bytes at offset 4096") as failed:
        pair.offloaded.step()
    assert failed.value.errno == errno.ENODATA
    assert Path(failed.value.filename) in files
    for call in (pair.offloaded.step, pair.offloaded.state_dict, pair.offloaded.synchronize):
        with pytest.raises(StepFailedError, match="load_state_dict") as sticks:
            call()
        assert sticks.value.__cause__ is failed.value
    # A checkpoint brings it back.
    for parameter, weight in zip(pair.parameters, weights, strict=True):
        parameter.data.copy_(weight)
    pair.offloaded.load_state_dict(checkpoint)
    pair.plain.step()
    pair.offloaded.step()
    pair.check()


def test_an_update_that_fails_makes_the_optimizer_unusable(pair: Pair) -> None:
    pair.step()
    pair.set_gradients()
    pair.offloaded.param_groups[0]["betas"] = "no betas"
    with pytest.raises(ValueError, match="unpack"):
        pair.offloaded.step()
    with pytest.raises(StepFailedError):
        pair.offloaded.step()
    pair.offloaded.close()


def test_a_failing_closure_harms_nothing(pair: Pair) -> None:
    pair.step()

    def closure() -> float:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        pair.offloaded.step(closure)
    pair.step()
    pair.check()


def test_a_write_error_has_errno_path_and_offset_and_the_process_exits_cleanly(store: Path) -> None:
    script = """
        import errno, resource, sys, torch, offload_opt
        p = torch.nn.Parameter(torch.zeros(300_000))
        opt = offload_opt.OffloadOptimizer(torch.optim.Adam([p]), sys.argv[1], host_memory="600KiB")
        p.grad = torch.ones_like(p)
        opt.step()
        opt.synchronize()
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # every write past 8 KiB into a file now fails
        try:
            for _ in range(3):
                opt.step()
        except OSError as error:
            assert error.errno == errno.EFBIG, error
            assert "units/unit-0" in error.filename and "at offset" in str(error), error
            print("raised")
        # Neither closed nor collected: the interpreter's exit has to cope.
    """
    done = scripts.run(script, str(store))
    assert (done.returncode, done.stdout, done.stderr) == (0, "raised\n", "")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 8192


def test_exit_without_close_is_clean(store: Path) -> None:
    script = """
        import sys, torch, offload_opt
        p = torch.nn.Parameter(torch.zeros(3_000_000))
        opt = offload_opt.OffloadOptimizer(torch.optim.Adam([p]), sys.argv[1], host_memory="3MiB")
        for _ in range(2):
            p.grad = torch.ones_like(p)
            opt.step()
    """
    done = scripts.run(script, str(store))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_close_gives_everything_back(store: Path) -> None:
    optimizer = OffloadOptimizer(adam(parameters()), store, host_memory=HOST_MEMORY)
    optimizer.step()
    optimizer.close()
    optimizer.close()
    assert optimizer.stats.host_memory_bytes == 0
    for call in (optimizer.step, optimizer.state_dict, optimizer.synchronize):
        with pytest.raises(OffloadError, match="closed"):
            call()
    OffloadOptimizer(adam(parameters()), store).close()


def test_a_dropped_optimizer_goes_at_once(store: Path) -> None:
    own = parameters()
    gc.disable()  # reference counting has to do
    try:
        optimizer = OffloadOptimizer(adam(own), store, host_memory=HOST_MEMORY)
        for _ in range(2):
            for parameter in own:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        state = optimizer.state
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
        with pytest.raises(OffloadError, match="is gone"):
            list(state)
        OffloadOptimizer(adam(parameters()), store).close()  # the folder is free again
    finally:
        gc.enable()


def test_a_failed_optimizer_that_is_dropped_is_collected(store: Path) -> None:
    optimizer = OffloadOptimizer(adam(parameters()), store, host_memory=HOST_MEMORY)
    optimizer.step()
    optimizer.param_groups[0]["betas"] = "no betas"
    with pytest.raises(ValueError, match="unpack"):
        optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()  # the error's traceback is a cycle
    assert gone() is None
    OffloadOptimizer(adam(parameters()), store).close()  # the folder is free again


def test_a_forked_child_leaves_the_optimizer_alone(store: Path) -> None:
    script = """
        import os, sys, torch, offload_opt
        p = torch.nn.Parameter(torch.zeros(300_000))
        opt = offload_opt.OffloadOptimizer(torch.optim.Adam([p]), sys.argv[1], host_memory="600KiB")
        p.grad = torch.ones_like(p)
        opt.step()
        child = os.fork()
        if child == 0:
            sys.exit(0)  # with all of Python's exit handlers
        assert os.waitpid(child, 0)[1] == 0
        opt.step()
        assert opt.state[p]["step"] == 2
        print(opt.state[p]["exp_avg"].unique().tolist())
    """
    done = scripts.run(script, str(store))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{[torch.tensor(0.9 * 0.1 + 0.1).item()]}\n"


def test_ranks_have_folders_of_their_own(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    OffloadOptimizer(adam(parameters()), store).close()
    assert [folder.name for folder in store.iterdir()] == ["rank-00001-of-00002"]


def test_what_another_number_of_ranks_has_committed_is_not_silently_started_over(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def wrap(rank: int, world_size: int, **fields: Any) -> OffloadOptimizer:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return OffloadOptimizer(adam(parameters()), store, **fields)

    with wrap(0, 2) as optimizer, wrap(1, 2):
        optimizer.step()
    wrap(0, 1).close()  # nothing was committed
    with wrap(1, 2) as optimizer:
        optimizer.step()
        optimizer.snapshot()
    wrap(0, 2).close()  # killed between the first commits of two ranks
    (store / "rank-00001-of-00002").rename(tmp_path / "elsewhere")
    with wrap(0, 2) as optimizer:
        optimizer.step()
        optimizer.snapshot()
    wrap(0, 2).close()
    wrap(1, 3).close()  # one rank says so for all
    wrap(0, 3, discard=True).close()
    assert not recwarn.list
    with pytest.warns(
        OffloadWarning, match=r"commits of rank-00000-of-00002; this is rank 0 of 1.* run as many"
    ) as seen:
        optimizer = wrap(0, 1)
    assert seen[0].filename == __file__
    with optimizer, pytest.raises(StoreError, match=r"no committed epoch .*\(.* has rank-00000-of-00002\)"):
        optimizer.restore()


def test_public_names() -> None:
    for name in offload_opt.__all__:
        assert getattr(offload_opt, name) is not None
    assert offload_opt.__version__.count(".") == 2


def test_an_error_that_is_held_does_not_hold_a_second_set_of_buffers(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OffloadOptimizer(adam(parameters()), store, host_memory=HOST_MEMORY) as optimizer:
        optimizer.step()
        optimizer.snapshot()
        before = dict(aio._locked)
        with monkeypatch.context() as patch:
            patch.setattr(InnerOptimizer, "step_on", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError) as held:
                optimizer.step()
        optimizer.restore()
        optimizer.step()
        assert held.value.__traceback__ is not None
        assert aio._locked == before
