"""The same GPT through accelerate: accumulation, clipping and a scheduler, with the optimizer state on disk.

    torchrun --nproc-per-node 2 examples/train_accelerate.py --cpu --offload /mnt/nvme/run1

Each process keeps its state in a folder of its own below that one. Without --offload the state stays in memory; the
loss and the fingerprint of the weights at the end are the same.
"""

from __future__ import annotations

import argparse
import hashlib
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from gpt import GPT, HEAD, Formatter, batches, directory, positive, standard_library, width
from rich.progress import track

from offload_opt import OffloadOptimizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--offload", type=directory, metavar="DIR", help="keep the optimizer state in this folder; else in memory")
    add("--host-memory", default="8MiB", metavar="SIZE", help="host memory for optimizer state")
    add("--steps", type=positive, default=20, help="optimizer steps")
    add("--accumulate", type=positive, default=2, help="batches an optimizer step")
    add("--layers", type=positive, default=4, help="layers of the model")
    add("--width", type=width, default=256, help=f"width of the model, a multiple of {HEAD}")
    add("--batch", type=positive, default=4, help="sequences a batch")
    add("--context", type=positive, default=128, help="bytes of text in a sequence")
    add("--cpu", action="store_true", help="train on the CPU also where there is a GPU")
    return parser.parse_args()


def main() -> None:
    args = parse()
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate, cpu=args.cpu)
    set_seed(1)
    model = GPT(args.layers, args.width, args.width // HEAD, args.context)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if args.offload is not None:
        if accelerator.is_main_process:
            args.offload.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        optimizer = OffloadOptimizer(optimizer, args.offload, host_memory=args.host_memory)
    # accelerate steps the scheduler once for each process.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps * accelerator.num_processes + 1)
    model, prepared, scheduler = accelerator.prepare(model, optimizer, scheduler)

    text = standard_library()
    data = batches(text, args.batch, args.context, seed=accelerator.process_index)  # each process sees other text
    batch_count = args.steps * args.accumulate
    loss = torch.zeros(())
    watched = accelerator.is_main_process
    for tokens in track(islice(data, batch_count), "training, in batches", total=batch_count, disable=not watched):
        with accelerator.accumulate(model):
            loss = model(tokens.to(accelerator.device))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            prepared.step()
            scheduler.step()
            prepared.zero_grad()

    weights = hashlib.sha256()
    for parameter in model.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    loss = accelerator.reduce(loss.detach(), "mean")
    accelerator.print(f"loss {loss.item():.6f}, weights {weights.hexdigest()[:16]}")
    if isinstance(optimizer, OffloadOptimizer):
        stats = optimizer.stats
        state, buffers = (count / 2**20 for count in (stats.state_bytes, stats.host_memory_bytes))
        accelerator.print(f"state {state:.1f} MiB, buffers {buffers:.1f} MiB a process")
        optimizer.close()
    # A thread of gloo's may still have to let go of the last collective's tensor, and torch 2.13 aborts a process whose
    # interpreter ends in that moment. Collecting garbage here gives it the time.
    model, prepared, scheduler = accelerator.free_memory(model, prepared, scheduler)
    accelerator.end_training()


if __name__ == "__main__":
    main()
