"""What is never silently lost, what restore() refuses, damage, and processes that come and go."""

from __future__ import annotations

import copy
import logging
import signal
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offload_opt import ConfigError, OffloadOptimizer, StepFailedError, StoreError
from tests import scripts
from tests.optim.support import HOST_MEMORY, SHAPES, Pair, Resumed, adam, bits_equal


def flip_a_byte(file: Path, position: int = 4096 + 100) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def committed_files(store: Path) -> list[Path]:
    """The unit files that the last commit names."""
    manifest = next(store.glob("*/MANIFEST.json")).read_text()
    return sorted(file for file in store.glob("*/units/*") if f'"{file.name}"' in manifest)


def state_and_weights(store: Path) -> tuple[list[Path], list[Path]]:
    """The same, apart by what is in them."""
    files: tuple[list[Path], list[Path]] = ([], [])
    for file in committed_files(store):
        files[any(name.endswith(".parameter") for name in load_file(file))].append(file)
    return files


# What is not silently lost.


def test_a_committed_epoch_is_never_silently_started_over(store: Path) -> None:
    pair = Resumed(adam, store, SHAPES)
    pair.step()
    state = pair.offloaded.state_dict()
    pair.reopen(restore=False)
    empty = pair.offloaded.state_dict()
    assert pair.offloaded.committed_epoch == 1
    pair.set_gradients()
    calls: list[Callable[[], Any]] = [
        pair.offloaded.step,
        pair.offloaded.snapshot,
        lambda: pair.offloaded.load_state_dict(copy.deepcopy(state)),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"epoch, 1, .*restore\(\).*discard=True"):
            call()
    pair.offloaded.load_state_dict(empty)  # as accelerate's prepare() does
    pair.offloaded.restore()
    pair.check()
    pair.step()
    pair.check()


def test_discard_starts_over(store: Path) -> None:
    pair = Resumed(adam, store, SHAPES)
    pair.step()
    pair.reopen(restore=False, discard=True)
    assert (pair.offloaded.committed_epoch, pair.offloaded.epoch, len(pair.offloaded.state)) == (None, 0, 0)
    with pytest.raises(StoreError, match="no committed epoch"):
        pair.offloaded.restore()
    for epoch in (1, 2):
        pair.set_gradients()
        pair.offloaded.step()
        pair.offloaded.synchronize()
        assert pair.offloaded.committed_epoch == epoch


def test_what_is_discarded_is_said(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = Resumed(adam, store, SHAPES, durability="snapshot")
    pair.step()
    pair.offloaded.snapshot(tmp_path / "snap")
    pair.reopen()  # there is nothing to discard
    assert [record.message for record in caplog.records] == []
    pair.step()
    pair.offloaded.synchronize()
    pair.reopen()
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "back to epoch 1" in message
    assert "discarded" in message


# What is refused.


def test_a_wrong_optimizer_or_model_is_refused_and_nothing_is_changed(store: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    snapshots = {}
    for name, make, shapes in (
        ("optimizer", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), SHAPES),
        ("options", lambda p: adam(p, amsgrad=True), [(60_000,), (40, 50), (3,)]),
        ("shape", adam, [(60_000,), (40, 50), (3,)]),
        ("count", adam, SHAPES[:2]),
    ):
        with Pair(make, tmp_path / "other", shapes, discard=True).offloaded as other:
            for parameter in other.param_groups[0]["params"]:
                parameter.grad = torch.ones_like(parameter)
            other.step()
            snapshots[name] = tmp_path / f"snap {name}"
            other.snapshot(snapshots[name])
    pair = Pair(adam, store, SHAPES)
    pair.step()
    pair.offloaded.snapshot()
    pair.step()
    for directory in snapshots.values():
        with pytest.raises(ConfigError, match="MANIFEST"):
            pair.offloaded.restore(directory)
        pair.check()
    with pytest.raises(StoreError, match=r"does not exist"):
        pair.offloaded.restore(tmp_path / "nowhere")
    pair.step()
    pair.check()


def test_without_a_commit_there_is_nothing_to_restore(pair: Pair) -> None:
    pair.step()
    with pytest.raises(StoreError, match="no committed epoch to go back to: name the folder of a snapshot"):
        pair.offloaded.restore()
    pair.step()
    pair.check()


def test_after_a_failed_step(store: Path) -> None:
    pair = Resumed(adam, store, SHAPES)
    for _ in range(2):
        pair.step()
    pair.set_gradients()
    own = pair.offloaded.param_groups[0]
    own["betas"], betas = "no betas", own["betas"]
    with pytest.raises(ValueError, match="unpack"):
        pair.offloaded.step()
    with pytest.raises(StepFailedError, match=r"restore\(\), which goes back to the last commit, of epoch 2"):
        pair.offloaded.step()
    pair.offloaded.restore()
    assert own["betas"] == betas
    pair.check()
    for _ in range(2):
        pair.step()
    pair.check()


# Damage.


@pytest.mark.parametrize("what", ["step", "state_dict", "state", "export"])
def test_a_flipped_byte_is_noticed_at_each_read(store: Path, what: str) -> None:
    pair = Resumed(adam, store, SHAPES, checksum="read")
    pair.step()
    pair.reopen()
    damaged = state_and_weights(store)[0][0]
    flip_a_byte(damaged)
    pair.set_gradients()
    calls = {
        "step": pair.offloaded.step,
        "state_dict": pair.offloaded.state_dict,
        "state": lambda: pair.offloaded.state[pair.parameters[0]]["exp_avg"],
        "export": lambda: pair.offloaded.export_safetensors(store / "file"),
    }
    with pytest.raises(OSError, match="not those that were written") as raised:
        calls[what]()
    assert raised.value.filename == str(damaged)
    flip_a_byte(damaged)  # repaired
    pair.reopen()
    pair.check()


@pytest.mark.parametrize("which", ["state", "weights"])
@pytest.mark.parametrize("fields", [{}, {"unit_size": "20KiB"}], ids=["same", "other units"])
@pytest.mark.parametrize("source", ["store", "snapshot"])
def test_restore_takes_up_no_damaged_byte(
    store: Path, tmp_path: Path, which: str, fields: dict[str, Any], source: str
) -> None:
    """Whatever ``checksum`` is, and before anything that there is now is given up."""
    pair = Resumed(adam, store, SHAPES, host_memory="300KiB")
    pair.step()
    pair.offloaded.snapshot(tmp_path / "snapshot")
    place = None if source == "store" else tmp_path / "snapshot"
    pair.reopen(checksum="off", **fields)
    files = state_and_weights(place or store)[which == "weights"]
    for damaged in {files[0], files[-1]}:
        flip_a_byte(damaged, -1)
        with torch.no_grad():
            pair.parameters[0].add_(1)
        then = [parameter.detach().clone() for parameter in pair.parameters]
        with pytest.raises(OSError, match="not those that were written") as raised:
            pair.offloaded.restore(place)
        assert raised.value.filename == str(damaged)
        assert all(map(bits_equal, pair.parameters, then))
        flip_a_byte(damaged, -1)  # repaired
    pair.offloaded.restore(place)
    pair.step()
    pair.check()


# Processes.


def test_a_process_that_ends_without_close_commits_its_last_step(store: Path) -> None:
    for epoch in (1, 2):
        ends = worker(f"""
            p, optimizer = make()
            if optimizer.committed_epoch is not None:
                optimizer.restore()
            torch.manual_seed(optimizer.epoch)
            p.grad = torch.randn_like(p)
            optimizer.step()
            assert optimizer.epoch == {epoch}, optimizer.epoch
        """)
        done = scripts.run(ends, store)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


WORKER = """
    import os, sys, torch, offload_opt
    def make(**fields):
        torch.manual_seed(5)
        p = torch.nn.Parameter(torch.randn(60_000))
        optimizer = torch.optim.AdamW([p], lr=0.01)
        fields = {"durability": "step", "persist_params": True, **fields}
        return p, offload_opt.OffloadOptimizer(optimizer, sys.argv[1], host_memory="200KiB", **fields)
    def steps(p, optimizer, count):
        for _ in range(count):
            torch.manual_seed(optimizer.epoch)
            p.grad = torch.randn_like(p)
            optimizer.step()
        optimizer.synchronize()
"""


def worker(code: str) -> str:
    return WORKER + textwrap.indent(textwrap.dedent(code), " " * 4)


def test_a_second_process_is_refused_until_the_first_is_killed(store: Path) -> None:
    holder = worker("""
        p, optimizer = make()
        steps(p, optimizer, 3)
        print("ready", flush=True)
        sys.stdin.read()
    """)
    with subprocess.Popen(
        scripts.command(holder, store), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "ready\n"
            parameter = torch.nn.Parameter(torch.zeros(60_000))
            with pytest.raises(StoreError, match=f"in use by process {first.pid}"):
                OffloadOptimizer(adam([parameter]), store, host_memory=HOST_MEMORY)
        finally:
            first.send_signal(signal.SIGKILL)
    done = scripts.run_well(
        worker("""
            p, optimizer = make()
            optimizer.restore()
            assert optimizer.epoch == 3
            steps(p, optimizer, 2)
            state = optimizer.state_dict()["state"][0]
            optimizer.close()
            q, undisturbed = make(discard=True)
            steps(q, undisturbed, 5)
            assert torch.equal(p, q)
            assert all(torch.equal(value, state[name]) for name, value in undisturbed.state_dict()["state"][0].items())
            print("equal")
        """),
        store,
    )
    assert done.stdout == "equal\n"


def test_a_forked_child_neither_holds_nor_uses_the_store(store: Path) -> None:
    done = scripts.run_well(
        worker("""
            p, optimizer = make()
            steps(p, optimizer, 2)
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                for call in (optimizer.restore, optimizer.snapshot, optimizer.step):
                    try:
                        call()
                    except offload_opt.OffloadError as error:
                        assert "before fork()" in str(error), error
                    else:
                        os._exit(1)
                os.read(reader, 1)  # until the parent has opened the store once more
                sys.exit(0)
            optimizer.close()
            q, again = make()
            again.restore()
            steps(q, again, 1)
            os.write(writer, b".")
            assert os.waitpid(child, 0)[1] == 0
            steps(q, again, 1)
            print(again.epoch)
        """),
        store,
    )
    assert done.stdout == "4\n"


def test_what_a_commit_cannot_hold_is_refused_before_the_step(store: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(100))
    with OffloadOptimizer(torch.optim.AdamW([parameter]), store, durability="step") as optimizer:
        parameter.grad = torch.ones(100)
        optimizer.step()
        before = parameter.detach().clone()
        optimizer.extra = {"model": torch.nn.Linear(2, 2)}
        with pytest.raises(ConfigError, match=r"extra\['model'\] is a Linear"):
            optimizer.step()
        assert torch.equal(parameter, before)
        optimizer.extra = {}
        optimizer.param_groups[0]["note"] = object()
        with pytest.raises(ConfigError, match="group 0's 'note' is a object"):
            optimizer.step()
        assert torch.equal(parameter, before)
        assert optimizer.epoch == 1
