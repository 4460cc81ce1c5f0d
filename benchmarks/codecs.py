"""How fast the codecs of optimizer state are, and what they lose.

    python benchmarks/codecs.py

Speed: one thread, on data that lies in the cache and on data that does not, beside a copy of the same fp32 values: what
the memory allows. In turns; medians over the rounds.

Loss: a small GPT is trained with AdamW in fp32. Beside it each codec keeps moments of its own, made from the same
gradients but stored and taken back in every step, as an offloaded optimizer would. Compared are those moments with the
exact ones, and exact ones that were stored just once; errors are relative, root mean square over all elements. With
them are bitsandbytes' and torchao's 8-bit states where these are installed (`pip install --no-deps bitsandbytes
torchao`; both heavy, so no extra of ours has them), and other splits of our 8 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from offload_opt import codecs, reference

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from gpt import GPT, batches, standard_library

BETAS = (0.9, 0.999)
EPS = 1e-8
STATES = ("exp_avg", "exp_avg_sq")

# (values, state name, key) -> what comes back
RoundTrip = Callable[[torch.Tensor, str, int], torch.Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 18, 1 << 26], help="elements")
    parser.add_argument("--rounds", type=int, default=9, help="0: no measurement of speed")
    parser.add_argument("--steps", type=int, default=300, help="of training; 0: no measurement of what is lost")
    parser.add_argument("--layers", type=int, default=1, help="of the GPT, which is 256 wide")
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


# Speed.


def codec_jobs(codec: codecs.StateCodec, label: str, values: torch.Tensor, out: torch.Tensor) -> dict[str, Any]:
    stored = [torch.empty(numel, dtype=dtype) for _, dtype, numel in codec.parts(values.numel())]
    return {
        f"{label}, encode": lambda: codecs.encode([codecs.Coding(codec, stored, values)], [1], 0),
        f"{label}, decode": lambda: codecs.decode([codecs.Coding(codec, stored, out)]),
    }


def jobs(numel: int) -> dict[str, Callable[[], Any]]:
    """What is timed. Those that decode come after those that encode the same."""
    values, out = torch.randn(numel), torch.zeros(numel)
    weight, remainder = torch.zeros(numel, dtype=torch.bfloat16), torch.zeros(numel, dtype=torch.int16)
    master = codecs.Coding(codecs.Master(), [remainder], values, weight)
    joined = dataclasses.replace(master, values=out, ties=codecs.encode([master], [0], 0))
    return {
        "copy": lambda: out.copy_(values),
        **codec_jobs(codecs.Bf16(), "bf16", values, out),
        **codec_jobs(codecs.Int8(is_signed=True), "int8", values, out),
        **codec_jobs(codecs.Int8(is_signed=False), "int8, non-negative", values.abs(), out),
        "master, split": lambda: codecs.encode([master], [0], 0),
        "master, join": lambda: codecs.decode([joined]),
    }


def measure_speed(sizes: list[int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Bytes of fp32 a second, by number of elements and job, of every round."""
    speeds: dict[str, dict[str, list[float]]] = {}
    for numel in sizes:
        work = jobs(numel)
        repeats = max(1, (1 << 24) // numel)
        speeds[str(numel)] = {name: [] for name in work}
        for round_ in range(rounds + 1):
            for name, job in work.items():
                started = time.perf_counter()
                for _ in range(repeats):
                    job()
                if round_ > 0:  # the first one touches the memory
                    speeds[str(numel)][name].append(4 * numel * repeats / (time.perf_counter() - started))
    return speeds


def show_speed(console: Console, speeds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    medians = {size: {name: statistics.median(values) for name, values in by.items()} for size, by in speeds.items()}
    table = Table(title="GB/s of fp32, one thread")
    table.add_column("", no_wrap=True)
    for size in medians:
        table.add_column(f"{int(size) / 2**20:.3g} Mi elements", justify="right")
        table.add_column("x copy", justify="right")
    for name in next(iter(medians.values())):
        cells = [(f"{by[name] / 1e9:.1f}", f"{by[name] / by['copy']:.2f}") for by in medians.values()]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    console.print(table)
    return medians


# Loss.


@dataclasses.dataclass(frozen=True)
class Contender:
    bytes_per_element: float  # of one state tensor
    round_trip: RoundTrip


def ours(kind: str) -> RoundTrip:
    def round_trip(values: torch.Tensor, state: str, key: int) -> torch.Tensor:
        codec = codecs.codec_for(kind, state)
        assert codec
        stored = [torch.empty(numel, dtype=dtype) for _, dtype, numel in codec.parts(values.numel())]
        codecs.encode([codecs.Coding(codec, stored, values)], [key], 0)
        out = torch.empty_like(values)
        codecs.decode([codecs.Coding(codec, stored, out)])
        return out

    return round_trip


def other_split(mantissa: int, at_random: bool = True) -> RoundTrip:
    """int8 with another number of bits for the mantissa, or rounded to nearest."""

    def round_trip(values: torch.Tensor, state: str, key: int) -> torch.Tensor:
        form = reference.Minifloat(state not in codecs.NON_NEGATIVE, mantissa)
        bits = reference.blocks(reference.bits_of(values))
        if at_random:
            random = reference.blocks(reference.random_bits(key, 0, values.numel(), values.device))
        else:
            random = torch.full_like(bits, 1 << 31)
        return reference.decode_blocks(form, *reference.encode_blocks(form, bits, random)).flatten()[: values.numel()]

    return round_trip


def bitsandbytes() -> RoundTrip:
    """Its dynamic map in blocks of 256, as its 8-bit optimizers have it, by its own functions."""
    from bitsandbytes import functional

    maps = {state: functional.create_dynamic_map(signed=state not in codecs.NON_NEGATIVE) for state in STATES}

    def round_trip(values: torch.Tensor, state: str, key: int) -> torch.Tensor:
        return functional.dequantize_blockwise(*functional.quantize_blockwise(values, code=maps[state], blocksize=256))

    return round_trip


def torchao() -> RoundTrip:
    """The state of its 8-bit optimizers, in blocks of 256."""
    from torchao.optim.subclass_8bit import OptimState8bit

    def round_trip(values: torch.Tensor, state: str, key: int) -> torch.Tensor:
        stored = OptimState8bit.zeros(values.shape, signed=state not in codecs.NON_NEGATIVE, block_size=256)
        stored.copy_(values)
        return stored.dequantize()

    return round_trip


def contenders() -> dict[str, Contender]:
    ours_8bit = 1 + 1 / reference.BLOCK
    found = {
        "bf16": Contender(2, ours("bf16")),
        "bf16, to nearest": Contender(2, lambda values, state, key: values.to(torch.bfloat16).float()),
        "int8": Contender(ours_8bit, ours("int8")),
        "int8, to nearest": Contender(ours_8bit, other_split(4, at_random=False)),
        "int8, 3-bit mantissa": Contender(ours_8bit, other_split(3)),
        "int8, 5-bit mantissa": Contender(ours_8bit, other_split(5)),
    }
    for make in (bitsandbytes, torchao):
        if importlib.util.find_spec(make.__name__):
            found[make.__name__] = Contender(1 + 4 / 256, make())
    return found


Moments = tuple[torch.Tensor, torch.Tensor]


def update(moments: Moments, step: int) -> torch.Tensor:
    """Adam's, but for the learning rate."""
    m, v = (moment / (1 - beta**step) for moment, beta in zip(moments, BETAS, strict=True))
    return m / (v.sqrt() + EPS)


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


def losses(moments: Moments, exact: Moments, step: int) -> dict[str, float]:
    """Relative errors, the share of nonzero values that are zero now, and that of v that is off by a factor of two.

    A small v in a block of large ones hardly shows in the error of all, yet its own update is as far off as it is.
    """
    found = {"update": error(update(moments, step), update(exact, step))}
    for state, value, right in zip(STATES, moments, exact, strict=True):
        found[state] = error(value, right)
        found[f"{state}_zeros"] = float((value[right != 0] == 0).double().mean())
    v, exact_v = moments[1], exact[1]
    found["exp_avg_sq_off"] = float(((v > 2 * exact_v) | (2 * v < exact_v)).double().mean())
    return found


def stored(moments: Moments, contender: Contender, step: int) -> Moments:
    m, v = (
        contender.round_trip(moment, state, codecs.rounding_key(step, 0, state))
        for moment, state in zip(moments, STATES, strict=True)
    )
    return m, v


def averaged(moments: Moments, gradient: torch.Tensor) -> Moments:
    """A step of Adam's averages, as torch computes them."""
    m, v = moments
    return m.lerp(gradient, 1 - BETAS[0]), (v * BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])


def measure_loss(steps: int, layers: int) -> dict[str, Any]:
    """What each codec loses at once, and in ``steps`` steps of training."""
    model = GPT(layers, width=256, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS, eps=EPS)
    parameters = list(model.parameters())
    text = batches(standard_library(1 << 22), 8, 128, seed=0)
    # Each parameter is a multiple of 256, so no block has elements of two.
    exact = tuple(torch.zeros(sum(p.numel() for p in parameters)) for _ in STATES)
    everyone = contenders()
    kept = dict.fromkeys(everyone, exact)
    with Progress(transient=True) as progress:
        for step in progress.track(range(1, steps + 1), description="training"):
            optimizer.zero_grad()
            loss = model(next(text))
            loss.backward()
            optimizer.step()
            gradient = torch.cat([p.grad.flatten() for p in parameters])
            exact = averaged(exact, gradient)
            for name, contender in everyone.items():
                kept[name] = stored(averaged(kept[name], gradient), contender, step)
    assert error(exact[1], torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in parameters])) < 1e-5
    return {
        name: {
            "bytes_per_element": contender.bytes_per_element,
            "once": losses(stored(exact, contender, steps), exact, steps),
            "each_step": losses(kept[name], exact, steps),
        }
        for name, contender in everyone.items()
    }


def show_loss(console: Console, lost: dict[str, Any], steps: int) -> None:
    for when, title in (("once", "stored once"), ("each_step", f"stored in each of {steps} steps")):
        table = Table(title=f"What is lost, {title}: relative RMS error, share that became zero")
        for column in ("", "bytes", "m", "m zero", "v", "v zero", "v off 2x", "update"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, row in lost.items():
            found = row[when]
            columns = [state + suffix for state in STATES for suffix in ("", "_zeros")] + ["exp_avg_sq_off", "update"]
            table.add_row(name, f"{row['bytes_per_element']:.2f}", *(f"{found[column]:.2%}" for column in columns))
        console.print(table)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=100)
    results: dict[str, dict[str, Any]] = {}
    if args.rounds:
        speeds = measure_speed(args.sizes, args.rounds)
        results["codecs"] = {"bytes_per_second": {"median": show_speed(console, speeds), "rounds": speeds}}
    if args.steps:
        results["codecs_loss"] = measure_loss(args.steps, args.layers)
        show_loss(console, results["codecs_loss"], args.steps)
    if not args.no_save:
        settings = {name: value for name, value in vars(args).items() if name != "no_save"}
        for name, found in results.items():
            console.print(f"written to {save(name, settings, found)}")


if __name__ == "__main__":
    main()
