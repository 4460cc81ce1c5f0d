"""What was wrong with commits that were interrupted or failed, and with the files that they name."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from offload_opt import ConfigError, OffloadError, StepFailedError, StoreError
from offload_opt.manifest import write_manifest
from offload_opt.pager import ParameterPager
from offload_opt.slots import UnitSlots
from offload_opt.store import SwapStore
from tests import scripts
from tests.optim.support import SHAPES, Pair, Resumed, adam, assert_same_state, bits_equal, check_commit

RANK = "rank-00000-of-00001"


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
    """Let the next call fail."""
    call = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, call)
        raise error

    monkeypatch.setattr(owner, name, failing)


def eio() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO), "here")


# Interrupts and failures.


def test_an_interrupt_after_a_commit_does_not_lose_which_files_it_names(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rest of the bookkeeping was dropped, and the next step wrote into committed files.
    pair.step()
    fail_once(monkeypatch, UnitSlots, "commit", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pair.offloaded.snapshot()
    for _ in range(2):
        pair.step()
        pair.offloaded.synchronize()
        check_commit(pair.offloaded_folder)
    pair.check()


def test_a_failed_commit_does_not_seem_to_succeed_when_it_is_asked_for_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After an fsync that failed the kernel has no dirty pages any more, and the next one has nothing to complain about.
    pair.step()
    fail_once(monkeypatch, os, "fdatasync", eio())
    with pytest.raises(OSError, match="Input/output"):
        pair.offloaded.snapshot()
    for call in (pair.offloaded.snapshot, pair.offloaded.step, pair.offloaded.synchronize):
        with pytest.raises(StepFailedError):
            call()
    assert pair.offloaded.committed_epoch is None


def test_a_snapshot_that_cannot_be_encoded_writes_no_weights(store: Path, tmp_path: Path) -> None:
    # They were on their way already, and those of the next snapshot were written to the same files meanwhile.
    pair = Resumed(adam, store, SHAPES, durability="snapshot")
    pair.step()
    pair.offloaded.synchronize()
    before = pair.offloaded.stats.bytes_written
    with pytest.raises(ConfigError, match="extra is a set"):
        pair.offloaded.snapshot(extra={1})
    assert pair.offloaded.stats.bytes_written == before
    pair.offloaded.snapshot(tmp_path / "snap")
    check_commit(store)
    pair.reopen()
    pair.check()


def test_a_restore_whose_commit_fails_is_a_failure(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The optimizer seemed usable, with the state of the snapshot and the epochs and commit of before.
    pair = Resumed(adam, store, SHAPES, durability="snapshot")
    pair.step()
    then = pair.offloaded.state_dict()
    pair.offloaded.snapshot(tmp_path / "snap", extra="snapshot")
    pair.step()
    pair.offloaded.snapshot(extra="commit")
    fail_once(monkeypatch, SwapStore, "start_commit", StoreError("no space"))
    with pytest.raises(StoreError, match="no space"):
        pair.offloaded.restore(tmp_path / "snap")
    with pytest.raises(StepFailedError):
        pair.offloaded.step()
    assert pair.offloaded.restore() == "commit"
    assert pair.offloaded.epoch == 2
    pair.check()
    assert pair.offloaded.restore(tmp_path / "snap") == "snapshot"
    assert_same_state(then, pair.offloaded.state_dict())


def test_remains_of_a_snapshot_that_cannot_be_deleted_do_not_keep_a_run_from_going_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Resumed(adam, store, SHAPES, durability="snapshot")
    pair.step()
    pair.offloaded.snapshot(tmp_path / "snap")
    (tmp_path / "snap" / f".{RANK}.partial").mkdir()

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING, "offload_opt"):
        pair.reopen()
    assert "could not be deleted" in caplog.text
    pair.step()
    pair.check()


def test_a_store_that_is_closed_keeps_its_lock_until_its_commit_has_ended(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second Ctrl-C in close() let go of the lock, while the commit ran on into what might be another's store by now.
    pair = Pair(adam, store, SHAPES, durability="step")
    may_go_on = threading.Event()
    fdatasync = os.fdatasync

    def slow(fd: int) -> None:
        may_go_on.wait(60)
        fdatasync(fd)

    def interrupted(_: SwapStore) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", slow)
        pair.step()
        patched.setattr(SwapStore, "finish_commit", interrupted)  # each wait for it
        with pytest.raises(KeyboardInterrupt):
            pair.offloaded.close()
        with pytest.raises(StoreError, match="in use by this process"):
            Pair(adam, store, SHAPES)
        may_go_on.set()
    deadline = time.monotonic() + 60
    while True:
        try:
            with Pair(adam, store, SHAPES).offloaded as again:
                assert again.committed_epoch == 1
            break
        except StoreError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    check_commit(store)


def test_garbage_collection_on_a_thread_of_a_commit_does_not_wait_for_the_commit(store: Path) -> None:
    script = """
        import gc, os, sys, threading, torch, offload_opt
        fdatasync, left, holder = os.fdatasync, threading.Event(), []
        def collecting(fd):
            left.wait()
            holder.clear()
            gc.collect()
            fdatasync(fd)
        os.fdatasync = collecting
        p = torch.nn.Parameter(torch.zeros(60_000))
        holder.append(offload_opt.OffloadOptimizer(
            torch.optim.Adam([p]), sys.argv[1], host_memory="200KiB", durability="step"))
        p.grad = torch.ones_like(p)
        holder[0].step()
        left.set()
    """
    scripts.run_well(script, store, timeout=60)
    check_commit(store)


def test_a_commit_when_the_interpreter_ends(store: Path) -> None:
    # Threads cannot be started any more then: the commit raised RuntimeError.
    script = """
        import atexit, sys, torch, offload_opt
        p = torch.nn.Parameter(torch.zeros(60_000))
        optimizer = offload_opt.OffloadOptimizer(torch.optim.Adam([p]), sys.argv[1], host_memory="200KiB")
        p.grad = torch.ones_like(p)
        optimizer.step()
        def at_exit():
            optimizer.snapshot(extra="at exit")
            print(optimizer.committed_epoch)
        atexit.register(at_exit)
    """
    assert scripts.run_well(script, store).stdout == "1\n"
    check_commit(store)


def test_an_interrupt_as_a_commit_begins_does_not_leave_one_running_that_nobody_waits_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The next step wrote into the files that it was about to name.
    pair.step()
    start = threading.Thread.start
    gate = threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "offload_opt-commit":
            monkeypatch.setattr(threading.Thread, "start", start)
            raise KeyboardInterrupt

    def slow(path: Path, manifest: Any) -> None:
        gate.wait(1)
        write_manifest(path, manifest)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    monkeypatch.setattr("offload_opt.store.write_manifest", slow)
    with pytest.raises(KeyboardInterrupt):
        pair.offloaded.snapshot()
    pair.step()
    check_commit(pair.offloaded_folder)
    assert pair.offloaded.committed_epoch == 1
    pair.offloaded.snapshot()
    check_commit(pair.offloaded_folder)
    pair.check()


def test_a_commit_runs_once_where_no_thread_can_be_started(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It ran in place, and once more when a thread could be started later: an old manifest replaced the new one.
    pair = Resumed(adam, store, SHAPES)
    put: list[int] = []

    def spy(path: Path, manifest: Any) -> None:
        put.append(manifest.epoch)
        write_manifest(path, manifest)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("offload_opt.store.write_manifest", spy)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            pair.step()
            pair.offloaded.synchronize()
    for _ in range(2):
        pair.step()
        pair.offloaded.synchronize()
    assert put == [1, 2, 3, 4]
    check_commit(store)
    pair.reopen()
    pair.check()


def test_a_restore_that_was_interrupted_is_a_failure(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What was in memory only was gone by then, and the next step went on from what the files had.
    pair = Resumed(adam, store, SHAPES, host_memory="2MiB", durability="snapshot")
    pair.step()
    pair.offloaded.snapshot()
    pair.offloaded.step()
    for owner, name in ((SwapStore, "forget"), (SwapStore, "retire_all"), (SwapStore, "adopt")):
        fail_once(monkeypatch, owner, name, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pair.offloaded.restore()
        with pytest.raises(StepFailedError):
            pair.offloaded.step()
    pair.offloaded.restore()
    pair.check()
    pair.step()
    pair.check()


def test_an_interrupt_as_a_place_is_planned_leaves_no_half_of_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # A parameter had some of its pieces only: steps updated a part of it, and a commit could not be read.
    fail_once(monkeypatch, SwapStore, "create", KeyboardInterrupt())
    pair.set_gradients()
    with pytest.raises(KeyboardInterrupt):
        pair.offloaded.step()
    pair.plain.step()
    pair.offloaded.step()
    pair.offloaded.snapshot()
    check_commit(pair.offloaded_folder)
    pair.check()


def test_a_call_in_the_middle_of_a_step_is_refused(store: Path, tmp_path: Path) -> None:
    # A handler's snapshot() replaced the last commit by half of a step.
    pair = Resumed(adam, store, SHAPES, durability="snapshot")
    pair.step()
    pair.offloaded.snapshot()
    problems: list[str] = []
    calls: list[Any] = [
        lambda: pair.offloaded.snapshot(tmp_path / "snap"),
        pair.offloaded.restore,
        pair.offloaded.step,
        pair.offloaded.state_dict,
        pair.offloaded.close,
        lambda: pair.offloaded.load_state_dict({"state": {}, "param_groups": pair.plain.state_dict()["param_groups"]}),
        # Of the unit that was being updated, zeros were read, or its bytes from before; and a thread that read broke
        # the step.
        lambda: first["exp_avg"],
        lambda: pair.offloaded.state[pair.parameters[1]],
        lambda: list(pair.offloaded.state),
    ]
    first = pair.offloaded.state[pair.parameters[0]]

    def handler(*_: Any) -> None:
        assert repr(first) == "<paged state: step, exp_avg, exp_avg_sq>"  # as a debugger shows it
        for call in calls:
            try:
                call()
            except OffloadError as error:
                problems.append(str(error))

    inner = pair.offloaded.optimizer
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        inner.param_groups[0]["betas"] = _Signalling((0.9, 0.999))
        pair.step()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(problems) == len(calls)
    assert all("in the middle of step(), by a signal handler" in problem for problem in problems)
    inner.param_groups[0]["betas"] = (0.9, 0.999)
    pair.check()
    pair.step()
    pair.check()


def test_a_step_waits_for_what_another_thread_reads(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.step()
    reads, may_go_on = threading.Event(), threading.Event()
    read = ParameterPager.read

    def slowly(*args: Any) -> Any:
        reads.set()
        may_go_on.wait(10)
        return read(*args)

    monkeypatch.setattr(ParameterPager, "read", slowly)
    then = pair.plain.state[pair.plain_parameters[0]]["exp_avg"].clone()
    with ThreadPoolExecutor() as threads:
        found = threads.submit(lambda: pair.offloaded.state[pair.parameters[0]]["exp_avg"])
        assert reads.wait(10)
        threads.submit(lambda: (time.sleep(0.1), may_go_on.set()))
        pair.step()
        assert bits_equal(found.result(), then)
    monkeypatch.undo()
    pair.check()


class _Signalling(tuple):  # type: ignore[type-arg]
    """Options that send a signal, the first time that an update looks at them."""

    sent = False

    def __iter__(self) -> Any:
        if not _Signalling.sent:
            _Signalling.sent = True
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().__iter__()


def test_a_snapshot_that_did_not_reach_the_device_does_not_succeed_when_it_is_asked_for_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(adam, store, SHAPES, durability="scratch")
    pair.step()
    fail_once(monkeypatch, os, "fdatasync", eio())
    with pytest.raises(OSError, match="Input/output"):
        pair.offloaded.snapshot(tmp_path / "snap")
    with pytest.raises(StepFailedError):
        pair.offloaded.snapshot(tmp_path / "snap")
