"""Who is measured in benchmarks/step.py: ways to train one and the same model with AdamW. Each in its own process.

The model is bf16 Linear layers side by side, with a batch of a few rows, so that forward and backward cost little
beside the step. All start from the same weights, see the same batches and have the same settings of AdamW. The peers
keep fp32 master weights; so does ``Offloaded`` with bf16 parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _turns import serve

CHECKED = 3
"""Iterations at the start, after which the weights are compared."""
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process is to train, and how."""

    contender: str
    folder: str
    parameters: int
    width: int
    rows: int  # of a batch
    host_memory: int
    durability: str
    sub_group: int  # DeepSpeed's sub_group_size, in elements
    deepspeed_threads: int  # DeepSpeed's intra_op_parallelism
    weights: str  # the file for the weights after the first iterations


class SideBySide(torch.nn.Module):
    """The sum of what layers make of one batch.

    One after the other they would want the gradient of their inputs, too: on a CPU without instructions for bf16,
    torch takes 0.1 s for each, and optimizers would differ in little else than noise.
    """

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(batch).tanh() for layer in self.layers]).float().sum(0)


class Training:
    """Model, batches and backward: what all have in common. As it is, a contender without an optimizer."""

    dtype = torch.bfloat16

    def __init__(self, job: Job) -> None:
        self.job = job
        layers = max(1, round(job.parameters / job.width**2))
        torch.manual_seed(0)
        make = [torch.nn.Linear(job.width, job.width, bias=False, dtype=self.dtype) for _ in range(layers)]
        for layer in make:
            torch.nn.init.normal_(layer.weight, std=job.width**-0.5)
        self.model: torch.nn.Module = SideBySide(make)
        self.parameters = list(self.model.parameters())
        # torch loads much when the first optimizer is made: where there is none, too.
        torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()
        self._batches = torch.Generator().manual_seed(1)

    def prepare(self) -> None:
        pass

    def loss(self) -> torch.Tensor:
        batch = torch.randn(self.job.rows, self.job.width, generator=self._batches).to(self.dtype)
        loss = self.model(batch).square().mean()
        assert isinstance(loss, torch.Tensor)
        return loss

    def backward(self) -> None:
        self.loss().backward()

    def step(self) -> None:
        self.model.zero_grad()

    def settle(self) -> None:
        pass

    def release(self) -> None:
        pass

    def figures(self) -> dict[str, float]:
        return {}

    def weights(self) -> Sequence[torch.Tensor]:
        return [parameter.detach() for parameter in self.parameters]

    def close(self) -> None:
        pass


class Offloaded(Training):
    """OffloadOptimizer around torch's fused AdamW, with settings of its own beside those of the job."""

    def __init__(self, job: Job, **fields: Any) -> None:
        import offload_opt

        super().__init__(job)
        self.optimizer = offload_opt.OffloadOptimizer(
            torch.optim.AdamW(self.parameters, fused=True, **ADAMW),
            job.folder,
            host_memory=job.host_memory,
            durability=job.durability,
            **fields,
        )

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settle(self) -> None:
        self.optimizer.synchronize()

    def figures(self) -> dict[str, float]:
        return dataclasses.asdict(self.optimizer.stats)

    def close(self) -> None:
        self.optimizer.close()


class OffloadedFp32(Offloaded):
    """The same over fp32 parameters, which need no masters."""

    dtype = torch.float32


class InMemoryFp32(Training):
    """torch's fused AdamW over fp32 parameters."""

    dtype = torch.float32

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True, **ADAMW)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class InMemory(Training):
    """torch's fused AdamW over fp32 masters of the parameters, all in memory, as it is written by hand."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.masters = [parameter.detach().float() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, fused=True, **ADAMW)

    @torch.no_grad()
    def step(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self.optimizer.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)
        self.optimizer.zero_grad()
        self.model.zero_grad()


class MemoryMapped(Training):
    """Masters and moments in a file that is mapped into memory; each parameter has an AdamW of its own.

    The kernel reads and writes the pages. While all of them fit into free memory they stay in the page cache, and this
    is as fast as memory: what was dirtied is brought to the drive after the turn, off the clock. ``evicts`` makes it as
    it is where the state exceeds the free memory by far: before each iteration no page is in memory, and the iteration
    has ended when all pages are on the drive.
    """

    def __init__(self, job: Job, *, evicts: bool = False) -> None:
        super().__init__(job)
        self._evicts = evicts
        counts = [parameter.numel() for parameter in self.parameters]
        path = Path(job.folder) / "state.bin"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.posix_fallocate(self._file, 0, 3 * 4 * sum(counts))
        self._map = mmap.mmap(self._file, 3 * 4 * sum(counts))
        self._optimizers = []
        offset = 0
        for parameter in self.parameters:
            count = parameter.numel()
            flat = torch.frombuffer(self._map, dtype=torch.float32, count=3 * count, offset=offset)
            offset += 12 * count
            master, mean, square = (part.view_as(parameter) for part in flat.split(count))
            master.copy_(parameter.detach())
            optimizer = torch.optim.AdamW([master], fused=True, **ADAMW)
            optimizer.state[master] = {"step": torch.tensor(0.0), "exp_avg": mean, "exp_avg_sq": square}
            self._optimizers.append((parameter, master, optimizer))

    def prepare(self) -> None:
        if self._evicts:
            os.fsync(self._file)
            self._map.madvise(21)  # MADV_PAGEOUT
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master, optimizer in self._optimizers:
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            optimizer.step()
            parameter.copy_(master)
            master.grad = parameter.grad = None
        if self._evicts:
            os.fsync(self._file)

    def release(self) -> None:
        os.fsync(self._file)


class TensorNvme(Training):
    """Masters and moments moved by TensorNVMe's DiskOffloader; each parameter has an AdamW of its own.

    TensorNVMe has no optimizer: ColossalAI's, around it, needs CUDA. So this is ColossalAI's order of calls, with all
    state offloaded and one parameter read ahead. Transfers go through the page cache; ``evicts`` as in MemoryMapped.
    """

    def __init__(self, job: Job, *, evicts: bool = False) -> None:
        from tensornvme import DiskOffloader

        super().__init__(job)
        self._evicts = evicts
        self._offloader = DiskOffloader(job.folder, backend="uring")
        self._optimizers = []
        self._state: list[list[torch.Tensor]] = []
        for parameter in self.parameters:
            master = parameter.detach().float()
            state = [master, torch.zeros_like(master), torch.zeros_like(master)]
            optimizer = torch.optim.AdamW([master], fused=True, **ADAMW)
            optimizer.state[master] = {"step": torch.tensor(0.0), "exp_avg": state[1], "exp_avg_sq": state[2]}
            self._optimizers.append(optimizer)
            self._state.append(state)
            self._write(state)
            self._offloader.sync_write_events()

    @torch.no_grad()
    def step(self) -> None:
        self._read(0)
        for number, (parameter, optimizer) in enumerate(zip(self.parameters, self._optimizers, strict=True)):
            # Not sync_read_events(): in 0.1.0 that name is bound to sync_write_events(), and reads may be under way.
            self._offloader.synchronize()
            self._read(number + 1)
            state = self._state[number]
            assert parameter.grad is not None
            state[0].grad = parameter.grad.float()
            optimizer.step()
            parameter.copy_(state[0])
            state[0].grad = parameter.grad = None
            self._write(state)
        self._offloader.sync_write_events()
        if self._evicts:
            self.release()

    def prepare(self) -> None:
        for path in Path(self.job.folder).iterdir() if self._evicts else ():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def release(self) -> None:
        for path in Path(self.job.folder).iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _read(self, number: int) -> None:
        for tensor in self._state[number] if number < len(self._state) else ():
            self._offloader.async_read(tensor)

    def _write(self, state: list[torch.Tensor]) -> None:
        for tensor in state:
            self._offloader.async_write(tensor)


class DeepSpeed(Training):
    """ZeRO-3 with DeepSpeedCPUAdam: its state on NVMe, or (``device="cpu"``) in memory."""

    def __init__(self, job: Job, *, device: str = "nvme") -> None:
        super().__init__(job)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
        import deepspeed
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        self._deepspeed = deepspeed
        paging = {"nvme_path": job.folder, "buffer_count": 12, "pipeline_read": True, "pipeline_write": True}
        offload = {"device": device, "pin_memory": False, "fast_init": False, **(paging if device == "nvme" else {})}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": job.rows,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3, "sub_group_size": job.sub_group, "offload_optimizer": offload},
            "aio": {"block_size": 8 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True},
        }
        config["aio"]["intra_op_parallelism"] = job.deepspeed_threads
        optimizer = DeepSpeedCPUAdam(self.parameters, **ADAMW)
        self.model, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)

    def backward(self) -> None:
        self.model.backward(self.loss())

    def step(self) -> None:
        self.model.step()

    def weights(self) -> Sequence[torch.Tensor]:
        with self._deepspeed.zero.GatheredParameters(self.parameters):
            return [parameter.detach().clone() for parameter in self.parameters]

    def close(self) -> None:
        self.model.destroy()


def _free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


CONTENDERS: dict[str, Callable[[Job], Training]] = {
    "compute": Training,
    "exact": lambda job: Offloaded(job, master_weights=True),
    "bf16": lambda job: Offloaded(job, master_weights=True, state_dtype="bf16"),
    "int8": lambda job: Offloaded(job, master_weights=True, state_dtype="int8"),
    "fp32": OffloadedFp32,
    "memory": InMemory,
    "memory-fp32": InMemoryFp32,
    "mmap": MemoryMapped,
    "mmap-cold": lambda job: MemoryMapped(job, evicts=True),
    "tensornvme": TensorNvme,
    "tensornvme-cold": lambda job: TensorNvme(job, evicts=True),
    "deepspeed": DeepSpeed,
    "deepspeed-cpu": lambda job: DeepSpeed(job, device="cpu"),
}


def start(job: Job) -> tuple[Training, dict[str, Any]]:
    """The contender after its first iterations; and what the driver is to know of it."""
    contender = CONTENDERS[job.contender](job)
    for _ in range(CHECKED):
        contender.prepare()
        contender.backward()
        contender.step()
    contender.settle()
    with Path(job.weights).open("wb") as file:
        for weight in contender.weights():
            file.write(memoryview(weight.contiguous().view(torch.uint8).numpy()))
        os.fsync(file.fileno())  # nothing is to be written during the turns of others
    count = sum(weight.numel() for weight in contender.weights())
    return contender, {"parameters": count, "threads": torch.get_num_threads(), "state": contender.figures()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=json.loads)
    serve(lambda: start(Job(**parser.parse_args(sys.argv[1:]).job)))
