"""OffloadOptimizer is an optimizer like any other, as schedulers, hooks, scalers and checkpoints see it."""

from __future__ import annotations

import copy
import errno
import gc
import io
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import offload_opt
from offload_opt import (
    ConfigError,
    OffloadConfig,
    OffloadError,
    OffloadOptimizer,
    StepFailedError,
    StoreError,
    UnsupportedOptimizerError,
)
from tests.optim.test_exact import HOST_MEMORY, Pair, assert_same_state, bits_equal

SHAPES = [(60_000,), (50, 40), (3,)]


def adam(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, **options)


@pytest.fixture
def pair(store: Path) -> Pair:
    return Pair(adam, store, SHAPES)


def parameters(*sizes: int) -> list[torch.nn.Parameter]:
    result = [torch.nn.Parameter(torch.randn(size)) for size in sizes or (60_000, 2_000)]
    for parameter in result:
        parameter.grad = torch.randn_like(parameter)
    return result


# Schedulers, hooks, groups.


def test_is_an_optimizer_that_schedulers_take(pair: Pair) -> None:
    assert isinstance(pair.offloaded, torch.optim.Optimizer)
    assert pair.offloaded.defaults["lr"] == 0.01
    for make in (
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ):
        plain, own = make(pair.plain), make(pair.offloaded)
        for loss in (1.0, 2.0, 3.0):
            pair.step()
            for scheduler in (plain, own):
                scheduler.step(loss) if make.__code__.co_names[-1] == "ReduceLROnPlateau" else scheduler.step()
    pair.check()


def test_step_hooks_run_once(pair: Pair) -> None:
    calls: list[str] = []
    pair.offloaded.register_step_pre_hook(lambda *_: calls.append("pre"))
    pair.offloaded.register_step_post_hook(lambda *_: calls.append("post"))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    pair.set_gradients()
    pair.offloaded.step()
    everywhere.remove()
    assert calls == ["pre", "post", "global"]


def test_hooks_of_the_wrapped_optimizer_still_run(store: Path) -> None:
    calls: list[torch.optim.Optimizer] = []
    inner = adam(parameters())
    inner.register_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    with OffloadOptimizer(inner, store, host_memory=HOST_MEMORY) as optimizer:
        optimizer.step()
        assert calls == [optimizer]


def test_closure_runs_before_gradients_are_looked_at(store: Path) -> None:
    own = parameters()
    for parameter in own:
        parameter.grad = None
    with OffloadOptimizer(adam(own), store, host_memory=HOST_MEMORY) as optimizer:
        before = [p.detach().clone() for p in own]
        optimizer.step(lambda: sum(p.sum() for p in own).backward() or 1.0)
        assert not any(torch.equal(a, b) for a, b in zip(own, before, strict=True))


@pytest.mark.parametrize("through_the_wrapped", [False, True])
def test_add_param_group(pair: Pair, through_the_wrapped: bool) -> None:
    pair.step()
    added = [torch.nn.Parameter(torch.randn(70_000)) for _ in range(2)]
    added[1].data.copy_(added[0].data)
    pair.plain_parameters.append(added[0])
    pair.parameters.append(added[1])
    pair.plain.add_param_group({"params": [added[0]], "lr": 0.5})
    owner = pair.offloaded.optimizer if through_the_wrapped else pair.offloaded
    owner.add_param_group({"params": [added[1]], "lr": 0.5})
    for _ in range(3):
        pair.step()
    pair.check()


def test_zero_grad(pair: Pair) -> None:
    pair.set_gradients()
    pair.offloaded.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in pair.parameters if p.grad is not None)
    pair.offloaded.zero_grad()
    assert all(p.grad is None for p in pair.parameters)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step_with_inf_and_moves_no_bytes(store: Path, fused: bool) -> None:
    pair = Pair(lambda p: adam(p, fused=fused), store, SHAPES)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for round_number in range(4):
        moved = pair.offloaded.stats
        for scaler, optimizer, mine in zip(
            scalers, (pair.plain, pair.offloaded), (pair.plain_parameters, pair.parameters), strict=True
        ):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(round_number)
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in mine)
            scaler.scale(loss * (float("inf") if round_number == 2 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        if round_number == 2:
            assert pair.offloaded.stats == moved
    pair.check()
    assert scalers[0].get_scale() == scalers[1].get_scale()


def test_group_values_that_a_step_changes_are_changed_once(store: Path) -> None:
    class Counting(torch.optim.SGD):
        """Keeps a step count in its groups, as schedule-free optimizers do."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                for p in group["params"]:
                    if p.grad is not None:
                        momentum = self.state[p].setdefault("m", torch.zeros_like(p))
                        momentum.mul_(0.9).add_(p.grad)
                        p.sub_(momentum, alpha=group["lr"] / group["k"])

    with pytest.raises(UnsupportedOptimizerError, match="register"):
        OffloadOptimizer(Counting(parameters(), lr=0.1), store)
    OffloadOptimizer.register(Counting, "elementwise")
    pair = Pair(lambda p: Counting(p, lr=0.1), store, [(60_000,), (70_000,), (5,)])
    for _ in range(3):
        pair.step()
    assert pair.offloaded.param_groups[0]["k"] == 3
    pair.check()


# state, state_dict, load_state_dict.


def test_state_reads_through(pair: Pair) -> None:
    assert not pair.offloaded.state
    pair.step()
    pair.step()
    state = pair.offloaded.state
    assert state
    assert len(state) == len(SHAPES)
    assert list(state) == pair.parameters
    for plain, own in zip(pair.plain_parameters, pair.parameters, strict=True):
        assert own in state
        assert list(state[own]) == list(pair.plain.state[plain])
        for name, value in state[own].items():
            assert bits_equal(value, pair.plain.state[plain][name])
        assert state[own].get("nothing") is None
        with pytest.raises(KeyError):
            state[own]["nothing"]
    with pytest.raises(TypeError, match="load_state_dict"):
        state[pair.parameters[0]] = {}  # type: ignore[assignment]


def test_looking_at_the_state_reads_only_what_is_looked_at(pair: Pair) -> None:
    pair.step()
    before = pair.offloaded.stats.bytes_read
    for _, state in pair.offloaded.state.items():
        assert "exp_avg" in state
    assert pair.offloaded.stats.bytes_read == before
    pair.offloaded.state[pair.parameters[1]]["exp_avg"]
    assert pair.offloaded.stats.bytes_read == before + 50 * 40 * 4


def test_replacing_the_state_attribute_is_refused(pair: Pair) -> None:
    pair.step()
    pair.offloaded.state = {}  # type: ignore[assignment]
    with pytest.raises(OffloadError, match="load_state_dict"):
        pair.offloaded.step()


@pytest.mark.parametrize("host_memory", ["64KiB", "1MiB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_interchange_with_the_unwrapped_optimizer(
    pair: Pair, tmp_path: Path, host_memory: str, dtype: torch.dtype
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    first = Pair(lambda p: adam(p, amsgrad=True), folders[0], SHAPES, dtype)
    for _ in range(2):
        first.step()
    file = io.BytesIO()
    torch.save(first.offloaded.state_dict(), file)
    file.seek(0)
    from_offloaded = torch.load(file)  # weights_only: plain dicts and tensors
    # Each side goes on from what the other one saved.
    second = Pair(lambda p: adam(p, amsgrad=True), folders[1], SHAPES, dtype, host_memory=host_memory)
    for old, new in (
        (first.plain_parameters, second.plain_parameters),
        (first.parameters, second.parameters),
    ):
        for p, q in zip(old, new, strict=True):
            q.data.copy_(p.data)
    second.step()  # state that the load is to replace
    for old, new in ((first.plain_parameters, second.plain_parameters), (first.parameters, second.parameters)):
        for p, q in zip(old, new, strict=True):
            q.data.copy_(p.data)
    second.plain.load_state_dict(from_offloaded)
    second.offloaded.load_state_dict(first.plain.state_dict())
    assert_same_state(first.plain.state_dict(), second.offloaded.state_dict())
    for _ in range(2):
        second.step()
    second.check()


def test_loading_before_the_first_step_and_options_from_the_checkpoint(store: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    trained = Pair(lambda p: adam(p, amsgrad=True), tmp_path / "other", SHAPES)
    trained.step()
    fresh = Pair(adam, store, SHAPES)  # without amsgrad: the checkpoint brings it along
    fresh.plain.load_state_dict(trained.plain.state_dict())
    fresh.offloaded.load_state_dict(trained.offloaded.state_dict())
    for _ in range(2):
        fresh.step()
    fresh.check()
    assert "max_exp_avg_sq" in fresh.offloaded.state[fresh.parameters[0]]


def test_load_state_dict_keeps_the_dtype_of_moments(store: Path) -> None:
    class WideMoments(torch.optim.Optimizer):
        """fp32 moments for whatever parameters: torch's load_state_dict would cast them down."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p, dtype=torch.float32))
                m.add_(p.grad.float())
                p.sub_(m * 0.01)

    OffloadOptimizer.register(WideMoments, "elementwise")
    pair = Pair(WideMoments, store, [(60_000,)], torch.bfloat16)
    for _ in range(3):
        pair.step()
    saved = pair.offloaded.state_dict()
    assert saved["state"][0]["m"].dtype == torch.float32
    pair.offloaded.load_state_dict(saved)
    assert_same_state(pair.plain.state_dict(), pair.offloaded.state_dict())


def test_loading_an_empty_state_starts_over(pair: Pair) -> None:
    empty = pair.offloaded.state_dict()
    pair.step()
    pair.offloaded.load_state_dict(empty)
    pair.plain.load_state_dict(empty)
    assert not pair.offloaded.state
    for _ in range(2):
        pair.step()
    pair.check()


def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_lost(pair: Pair) -> None:
    for _ in range(2):
        pair.step()
    good = pair.offloaded.state_dict()
    wrong_groups = {**good, "param_groups": good["param_groups"] * 2}
    with pytest.raises(ValueError, match="parameter groups"):
        pair.offloaded.load_state_dict(wrong_groups)
    wrong_shape = copy.deepcopy(good)
    wrong_shape["state"][1]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ConfigError, match=r"param_1 should have 'exp_avg' of shape \(50, 40\)"):
        pair.offloaded.load_state_dict(wrong_shape)
    missing = copy.deepcopy(good)
    del missing["state"][0]["exp_avg_sq"]
    with pytest.raises(ConfigError, match="exp_avg_sq"):
        pair.offloaded.load_state_dict(missing)
    pair.step()
    pair.check()


def test_state_dict_hooks(pair: Pair) -> None:
    seen: list[Any] = []
    pair.offloaded.register_state_dict_post_hook(lambda _, d: {**d, "extra": 1})
    pair.offloaded.register_load_state_dict_pre_hook(lambda _, d: seen.append(d["state"][0]["exp_avg"].shape))
    pair.offloaded.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    pair.step()
    saved = pair.offloaded.state_dict()
    assert saved["extra"] == 1
    assert isinstance(saved["state"][0], dict)
    pair.offloaded.load_state_dict(saved)
    assert seen == [torch.Size([60_000]), "loaded"]


def test_cannot_be_pickled_or_copied(pair: Pair) -> None:
    for call in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            call(pair.offloaded)


def test_named_parameters_name_the_tensors_in_the_files(store: Path) -> None:
    model = torch.nn.Linear(300, 200)
    with OffloadOptimizer(adam(model.named_parameters()), store, host_memory="200KiB") as optimizer:
        model(torch.randn(4, 300)).sum().backward()
        optimizer.step()
        optimizer.synchronize()
        from safetensors import safe_open

        names = set()
        for file in store.glob("*/units/*.safetensors"):
            with safe_open(file, "pt") as f:
                names |= {name.split("[")[0] for name in f.keys()}  # noqa: SIM118
    assert {"weight.exp_avg", "weight.exp_avg_sq", "bias.exp_avg", "bias.exp_avg_sq"} <= names


# Bad input: a clear error before anything is touched.


@pytest.fixture
def folder_stays_empty(store: Path) -> Iterator[Path]:
    yield store
    assert not any(store.iterdir())


def test_unknown_options_are_refused_with_the_nearest(folder_stays_empty: Path) -> None:
    with pytest.raises(ConfigError, match=r"host_memroy.*did you mean host_memory"):
        OffloadOptimizer(adam(parameters()), folder_stays_empty, host_memroy="1GiB")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("host_memory", "lots", "host_memory='lots' is not a size"),
        ("host_memory", -1, "host_memory must be positive"),
        ("host_memory", 1.5, "host_memory must be a size"),
        ("unit_size", "0", "unit_size must be positive"),
        ("unit_size", "1GiB", "unit_size=1.0 GiB must lie between"),
        ("aio", {"block_size": 1}, "aio must be an AioConfig"),
        ("host_memory", "8KiB", "the least that works is 12288 bytes"),
    ],
)
def test_bad_values_are_refused(folder_stays_empty: Path, field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OffloadOptimizer(adam(parameters()), folder_stays_empty, **{field: value})


def test_host_memory_too_small_for_state_that_cannot_be_cut(folder_stays_empty: Path) -> None:
    matrix = torch.nn.Parameter(torch.randn(300, 300))
    with pytest.raises(ConfigError, match=r"the state of param_0 cannot be cut.*least that works is (\d+)") as refused:
        OffloadOptimizer(torch.optim.Muon([matrix]), folder_stays_empty, host_memory="512KiB")
    least = int(str(refused.value).split("works is ")[1].split()[0])
    assert 3 * 300 * 300 * 4 <= least < 3 * 300 * 300 * 4 + 3 * 4096


def test_the_least_host_memory_that_the_message_names_works(store: Path) -> None:
    matrix = torch.nn.Parameter(torch.randn(300, 300))
    with OffloadOptimizer(torch.optim.Muon([matrix]), store, host_memory=3 * 360448) as optimizer:
        matrix.grad = torch.randn_like(matrix)
        optimizer.step()
        assert optimizer.stats.host_memory_bytes <= 3 * 360448


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    own = adam(parameters())
    with pytest.raises(ConfigError, match="does not exist"):
        OffloadOptimizer(own, tmp_path / "missing")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="not a folder"):
        OffloadOptimizer(own, file)
    with pytest.raises(ConfigError, match="folder's path"):
        OffloadOptimizer(own, 3)  # type: ignore[arg-type]
    OffloadOptimizer(own, tmp_path).close()


def test_a_folder_that_is_not_writable_is_refused() -> None:
    script = """
        import os, tempfile, torch, offload_opt
        inner = torch.optim.Adam([torch.nn.Parameter(torch.zeros(10))])
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o555)
            if os.getuid() == 0:
                os.seteuid(65534)  # root may write anywhere
            try:
                offload_opt.OffloadOptimizer(inner, folder)
            except offload_opt.ConfigError as error:
                print(error)
            os.seteuid(os.getuid())
    """
    done = run_script(script)
    assert "is not writable" in done.stdout, done.stderr


def test_a_disk_too_small_for_the_state_is_refused(folder_stays_empty: Path) -> None:
    huge = torch.nn.Parameter(torch.empty(10**14, device="meta"))
    with pytest.raises(ConfigError, match=r"too small for the optimizer state: it needs 727\.\d TiB"):
        OffloadOptimizer(adam([huge]), folder_stays_empty)


def test_an_optimizer_is_wrapped_once(store: Path, tmp_path: Path) -> None:
    inner = adam(parameters())
    optimizer = OffloadOptimizer(inner, store)
    (tmp_path / "other").mkdir()
    for again in (inner, optimizer):
        with pytest.raises(ConfigError, match="wrapped already"):
            OffloadOptimizer(again, tmp_path / "other")
    optimizer.close()
    OffloadOptimizer(inner, tmp_path / "other").close()
    with pytest.raises(ConfigError, match=r"must be a torch\.optim\.Optimizer"):
        OffloadOptimizer(torch.nn.Linear(2, 2), store)  # type: ignore[arg-type]


def test_two_optimizers_in_one_folder_are_refused(store: Path) -> None:
    with OffloadOptimizer(adam(parameters()), store), pytest.raises(StoreError, match="in use by this process"):
        OffloadOptimizer(adam(parameters()), store)


def test_optimizers_that_cannot_be_paged_are_refused_with_the_reason(folder_stays_empty: Path) -> None:
    class Prodigy(torch.optim.Adam):
        def step(self, closure: Any = None) -> None: ...

    for make, reason in (
        (torch.optim.LBFGS, "history of all parameters"),
        (torch.optim.SparseAdam, "a few rows"),
        (Prodigy, "Prodigy is not known here"),
        (lambda p: torch.optim.Adam(p, differentiable=True), "autograd graph"),
    ):
        with pytest.raises(UnsupportedOptimizerError, match=reason):
            OffloadOptimizer(make(parameters()), folder_stays_empty)
    complex_parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="complex64"):
        OffloadOptimizer(adam([complex_parameter]), folder_stays_empty)


def test_a_subclass_that_inherits_step_is_known(store: Path) -> None:
    class Mine(torch.optim.AdamW):
        pass

    pair = Pair(lambda p: Mine(p, lr=0.01), store, SHAPES)
    for _ in range(2):
        pair.step()
    pair.check()


def test_a_sparse_gradient_is_refused_before_the_update(store: Path) -> None:
    embedding = torch.nn.Embedding(1000, 60, sparse=True)
    with OffloadOptimizer(torch.optim.SGD(embedding.parameters(), lr=1, momentum=0.9), store) as optimizer:
        embedding(torch.tensor([1, 2])).sum().backward()
        before = embedding.weight.detach().clone()
        with pytest.raises(UnsupportedOptimizerError, match="sparse gradient"):
            optimizer.step()
        assert torch.equal(before, embedding.weight)


def test_config_object_and_keywords(store: Path) -> None:
    config = OffloadConfig(path=store, host_memory="1MiB")
    with pytest.raises(ConfigError, match="not in both"):
        OffloadOptimizer(adam(parameters()), config, host_memory="2MiB")
    with OffloadOptimizer(adam(parameters()), config) as optimizer:
        assert optimizer.config is config
        assert config.host_memory == 1 << 20
    with pytest.raises(AttributeError):
        config.host_memory = 1  # type: ignore[misc]


# Failures in the background, and the end.


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
    done = run_script(script, str(store))
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
    done = run_script(script, str(store))
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


def test_a_dropped_optimizer_is_collected(store: Path) -> None:
    optimizer = OffloadOptimizer(adam(parameters()), store, host_memory=HOST_MEMORY)
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
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
    done = run_script(script, str(store))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{[torch.tensor(0.9 * 0.1 + 0.1).item()]}\n"


def test_ranks_have_folders_of_their_own(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    OffloadOptimizer(adam(parameters()), store).close()
    assert [folder.name for folder in store.iterdir()] == ["rank-00001-of-00002"]


def test_public_names() -> None:
    for name in offload_opt.__all__:
        assert getattr(offload_opt, name) is not None
    assert offload_opt.__version__.count(".") == 2


def run_script(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *args], capture_output=True, text=True, timeout=120, check=False
    )


# What a review found once.


def test_a_parameter_that_is_laid_out_anew_is_refused_and_a_reload_helps(store: Path) -> None:
    plain, own = (torch.nn.Parameter(torch.ones(8, 30, 15, 15)) for _ in range(2))
    a = adam([plain])
    b = OffloadOptimizer(adam([own]), store, host_memory=HOST_MEMORY)

    def gradients() -> None:
        plain.grad = torch.randn(plain.shape).to(memory_format=torch.channels_last)
        own.grad = plain.grad.clone()

    gradients()
    a.step()
    b.step()
    for parameter in (plain, own):
        parameter.data = parameter.data.to(memory_format=torch.channels_last)
    gradients()
    with pytest.raises(OffloadError, match="not what its state was laid out for"):
        b.step()
    b.load_state_dict(b.state_dict())
    a.step()
    b.step()
    assert bits_equal(plain, own)


@pytest.mark.parametrize("change", ["reorder", "remove a group"])
def test_parameters_that_change_places_are_refused(store: Path, change: str) -> None:
    first, second = parameters(60_000, 60_000)
    with OffloadOptimizer(adam([{"params": [first]}, {"params": [second]}]), store) as optimizer:
        optimizer.step()
        if change == "reorder":
            optimizer.param_groups.reverse()
        else:
            del optimizer.param_groups[0]
        for call in (optimizer.step, optimizer.state_dict, lambda: len(optimizer.state)):
            with pytest.raises(OffloadError, match="changed its place"):
                call()


def test_a_load_that_fails_on_the_way_does_not_start_over(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.step()
    checkpoint = pair.offloaded.state_dict()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match="no space"):
            pair.offloaded.load_state_dict(checkpoint)
    pair.set_gradients()
    for call in (pair.offloaded.step, pair.offloaded.state_dict, lambda: bool(pair.offloaded.state)):
        with pytest.raises(StepFailedError):
            call()
    pair.offloaded.load_state_dict(checkpoint)
    pair.plain.step()
    pair.offloaded.step()
    pair.check()


def test_state_brought_along_is_seen_before_the_first_step(store: Path) -> None:
    inner = torch.optim.Adagrad(parameters(), initial_accumulator_value=0.5)
    with OffloadOptimizer(inner, store) as optimizer:
        assert len(optimizer.state) == 2
        state = optimizer.state[inner.param_groups[0]["params"][0]]
        assert state["sum"].unique().tolist() == [0.5]
        assert state["step"] == 0


def test_zero_grad_frees_the_gradients(store: Path) -> None:
    numpy = pytest.importorskip("numpy")
    parameter = torch.nn.Parameter(torch.zeros(300_000))
    gradient = numpy.ones(300_000, dtype=numpy.float32)
    alive = weakref.ref(gradient)
    parameter.grad = torch.from_numpy(gradient)
    del gradient
    with OffloadOptimizer(adam([parameter]), store, host_memory=HOST_MEMORY) as optimizer:
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert alive() is None


def test_momentum_that_is_turned_on_later(store: Path) -> None:
    pair = Pair(lambda p: torch.optim.SGD(p, lr=0.01), store, SHAPES)
    pair.step()
    for optimizer in (pair.plain, pair.offloaded):
        optimizer.param_groups[0]["momentum"] = 0.9
    for _ in range(3):
        pair.step()
    pair.check()
    assert pair.offloaded.stats.state_bytes > 0


def test_amsgrad_that_is_turned_on_later_is_an_error_that_sticks(pair: Pair) -> None:
    pair.step()
    pair.offloaded.param_groups[0]["amsgrad"] = True
    pair.set_gradients()
    with pytest.raises(KeyError):  # torch's own answer
        pair.offloaded.step()
    with pytest.raises(StepFailedError):
        pair.offloaded.step()


def test_a_relative_path_survives_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    pair = Pair(adam, Path("store"), SHAPES)
    pair.step()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pair.step()
    pair.check()


def test_groups_without_a_gradient_are_stepped_too(store: Path) -> None:
    class CountingGroups(torch.optim.Optimizer):
        """Counts steps in its groups."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"k": 0})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["k"] += 1
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p].setdefault("m", torch.zeros_like(p)).add_(p.grad)
                        p.sub_(self.state[p]["m"] / group["k"])

    OffloadOptimizer.register(CountingGroups, "elementwise")
    pair = Pair(lambda p: CountingGroups([{"params": p[:1]}, {"params": p[1:]}]), store, [(60_000,), (60_000,)])
    pair.step()
    pair.step(without=[1])
    pair.step(without=[0, 1])
    pair.step()
    assert [group["k"] for group in pair.offloaded.param_groups] == [4, 4]
    pair.check()


def test_parameters_of_one_name_give_valid_files(store: Path) -> None:
    from safetensors.torch import load_file

    layers = [torch.nn.Linear(30, 20) for _ in range(2)]
    groups = [{"params": list(layer.named_parameters())} for layer in layers]
    with OffloadOptimizer(adam(groups), store) as optimizer:
        sum(layer(torch.ones(1, 30)).sum() for layer in layers).backward()
        optimizer.step()
        optimizer.synchronize()
        (file,) = store.glob("*/units/*.safetensors")
        tensors = {name: t for name, t in load_file(file).items() if not name.startswith("__padding__")}
        assert len(tensors) == 8
        for layer in layers:
            moment = optimizer.state[layer.weight]["exp_avg"]
            assert any(torch.equal(moment, t) for t in tensors.values())


def test_an_optimizer_whose_wrapper_was_collected_can_be_wrapped_again(store: Path) -> None:
    inner = adam(parameters())
    OffloadOptimizer(inner, store)
    gc.collect()
    OffloadOptimizer(inner, store).close()


def test_using_the_wrapped_optimizer_by_itself_is_noticed(pair: Pair) -> None:
    pair.step()
    pair.offloaded.optimizer.load_state_dict(pair.plain.state_dict())
    pair.set_gradients()
    with pytest.raises(OffloadError, match="by itself"):
        pair.offloaded.step()


def test_an_interrupted_wait_harms_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(offload_opt.IoFuture, "done", lambda _: False)  # so that there is something to wait for
        pair.step()
        patched.setattr(offload_opt.IoFuture, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.offloaded.synchronize()
    pair.offloaded.synchronize()
    pair.step()
    pair.check()
