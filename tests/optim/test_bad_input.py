"""Bad input gets a clear error before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_opt import (
    ConfigError,
    OffloadConfig,
    OffloadError,
    OffloadOptimizer,
    StoreError,
    UnsupportedOptimizerError,
)
from tests import scripts
from tests.optim.support import SHAPES, Pair, adam, parameters


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
        ("host_memory", "lots", "host_memory='lots' is not a size: write bytes, or a number with K, M, G, T or P"),
        ("host_memory", "2i", "host_memory='2i' is not a size"),
        ("host_memory", -1, "host_memory must be positive"),
        ("host_memory", 1.5, "host_memory must be a size"),
        ("unit_size", "0", "unit_size must be positive"),
        ("unit_size", "1GiB", "unit_size=1.0 GiB must lie between"),
        ("aio", {"block_size": 1}, "aio must be an AioConfig"),
        ("host_memory", 12287, r"host_memory=12287 bytes is too small: at least 12\.0 KiB"),
        ("host_memory", "8KiB", r"host_memory=8\.0 KiB is too small: at least 12\.0 KiB .*\(3 buffers of 4\.0 KiB\)"),
    ],
)
def test_bad_values_are_refused(folder_stays_empty: Path, field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OffloadOptimizer(adam(parameters()), folder_stays_empty, **{field: value})


def test_host_memory_too_small_for_state_that_cannot_be_cut(folder_stays_empty: Path) -> None:
    matrix = torch.nn.Parameter(torch.randn(300, 300))
    with pytest.raises(ConfigError, match=r"the state of param_0 cannot be cut, and at least \d+ bytes") as refused:
        OffloadOptimizer(torch.optim.Muon([matrix]), folder_stays_empty, host_memory="512KiB")
    least = int(str(refused.value).split("at least ")[1].split()[0])
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
    for empty in ("", [tmp_path, ""]):
        with pytest.raises(ConfigError, match="must name a folder, and is empty"):
            OffloadOptimizer(own, empty)
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
    done = scripts.run(script)
    assert "is not writable" in done.stdout, done.stderr


def test_a_disk_too_small_for_the_state_is_refused(folder_stays_empty: Path) -> None:
    huge = torch.nn.Parameter(torch.empty(10**14, device="meta"))
    with pytest.raises(ConfigError, match=r"too small for the optimizer state: it needs 1455\.\d TiB"):
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


def test_what_is_no_optimizer_class_is_not_registered() -> None:
    for wrong in ("MyLion", torch.nn.Linear, adam(parameters()), None):
        with pytest.raises(ConfigError, match="optimizer_class must be"):
            OffloadOptimizer.register(wrong, "elementwise")  # type: ignore[arg-type]
    for paging in ("sideways", None):
        with pytest.raises(ConfigError, match="paging must be"):
            OffloadOptimizer.register(torch.optim.Adam, paging)  # type: ignore[arg-type]


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


def without_memory(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("numel", [1000, 50_000], ids=["whole", "in several units"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: setattr(p, "data", torch.zeros(len(p) + 1, dtype=p.dtype)),
            r"param_0 has shape .* but its gradient",
        ),
        pytest.param(
            lambda p: setattr(p, "data", p.data.cuda()),
            r"param_0 has shape .* on cuda:0, but its gradient .* on cpu",
            marks=pytest.mark.gpu,
        ),
        (without_memory, "param_0 has no memory"),
        (lambda p: without_memory(p.grad), "the gradient of param_0 has no memory"),
    ],
    ids=["longer", "elsewhere", "released", "gradient released"],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_what_was_changed_after_backward_is_refused_before_the_update(
    store: Path, numel: int, change: Any, message: str, steps: int
) -> None:
    parameter, other = (torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (numel, 5))
    with OffloadOptimizer(adam([parameter, other]), store, master_weights=True, host_memory="48KiB") as optimizer:
        for _ in range(steps):
            for p in (parameter, other):
                p.grad = torch.ones_like(p)
            optimizer.step()
        for p in (parameter, other):
            p.grad = torch.ones_like(p)
        before = other.detach().clone()
        change(parameter)
        with pytest.raises(OffloadError, match=message):
            optimizer.step()
        assert torch.equal(other, before)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2GiB", 2 << 30),
        ("2Gi", 2 << 30),
        ("2G", 2 * 10**9),
        ("2GB", 2 * 10**9),
        ("512M", 512 * 10**6),
        ("512 mi", 512 << 20),
        ("1.5K", 1500),
        ("1Ki", 1024),
        ("1T", 10**12),
        ("1Ti", 1 << 40),
        ("77", 77),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert OffloadConfig(path="x", host_memory=text).host_memory == nbytes


def test_config_object_and_keywords(store: Path) -> None:
    config = OffloadConfig(path=store, host_memory="1MiB")
    with pytest.raises(ConfigError, match="not in both"):
        OffloadOptimizer(adam(parameters()), config, host_memory="2MiB")
    with OffloadOptimizer(adam(parameters()), config) as optimizer:
        assert optimizer.config is config
        assert config.host_memory == 1 << 20
    with pytest.raises(AttributeError):
        config.host_memory = 1  # type: ignore[misc]
