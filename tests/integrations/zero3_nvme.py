"""Trains a small model under DeepSpeed's ZeRO-3 in several ways and prints the losses of each, one JSON object.

A process of its own for test_deepspeed.py: DeepSpeed wants one, and says much on the way.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder.builder import OpBuilder

from offload_opt.integrations import deepspeed as offload_deepspeed

STEPS = 4


def refuse_to_compile(self: OpBuilder, verbose: bool = True) -> None:
    raise AssertionError(f"DeepSpeed wants to compile {self.name}")


def losses(**offload: dict[str, Any]) -> list[str]:
    torch.manual_seed(0)
    widths = [512, 1024, 700, 8]  # parameters above 1 MiB are swapped; their sizes are no multiples of anything
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would have to be compiled
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "sub_group_size": 300_000, **offload},
        "aio": {"block_size": 1 << 18, "queue_depth": 16, "intra_op_parallelism": 2},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    result = []
    for _ in range(STEPS):
        loss = engine(torch.randn(4, widths[0], dtype=torch.bfloat16)).float().square().mean()
        engine.backward(loss)
        engine.step()
        result.append(loss.item().hex())
    engine.destroy()
    return result


def main(folder: str) -> None:
    # DeepSpeed's shared memory collectives for CPUs would be compiled too. They are not what is tried here.
    deepspeed.ops.__compatible_ops__ = {}
    OpBuilder.jit_load = refuse_to_compile
    offload_deepspeed.install()
    nvme = {"device": "nvme", "nvme_path": folder, "buffer_count": 12}
    result = {
        "none": losses(),
        "plain": losses(offload_optimizer=nvme),
        "pipelined": losses(offload_optimizer={**nvme, "pipeline_read": True, "pipeline_write": True}),
        "parameters": losses(offload_optimizer=nvme, offload_param={**nvme, "buffer_size": 1 << 20, "max_in_cpu": 0}),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
