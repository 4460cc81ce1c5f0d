"""The pictures: of benchmarks/aio.py, bars grouped by block size, a panel for each setting; and of convergence.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from _contenders import DIRECTIONS

from offload_opt.config import format_bytes

# A colour for each project, a shade for each of its engines. The colours differ for colour-blind eyes too.
SHADES = {
    "offload_opt": ["#08519c", "#3182bd", "#6baed6"],
    "fio": ["#d95f0e", "#fe9929", "#fed98e", "#ffffd4"],
    "DeepSpeed": ["#636363"],
}
# Colour and dashes of a curve: where curves lie on each other, each shows in the gaps of those above it.
CURVES: list[tuple[str, Any]] = [
    ("#000000", "-"),
    ("#08519c", (0, (7, 2))),
    ("#56b4e9", (2, (5, 4))),
    ("#d55e00", (0, (3, 3))),
    ("#009e73", (1, (2, 3))),
    ("#cc79a7", (0, (1, 1.5))),
]


def plot(path: Path, cases: list[dict[str, Any]], machine: dict[str, Any], subtitle: str) -> None:
    """``cases`` is the list of the same name in results/aio.json."""
    columns = sorted({(case["threads"], case["depth"]) for case in cases})
    rows = [direction for direction in DIRECTIONS if any(case["direction"] == direction for case in cases)]
    colours = _colours(list(dict.fromkeys(name for case in cases for name in case["median"])))
    widths = [len({case["block_size"] for case in cases if (case["threads"], case["depth"]) == c}) for c in columns]
    figure, panels = plt.subplots(
        len(rows),
        len(columns),
        figsize=(width := max(10.5, 1 + 1.5 * sum(widths)), 1.8 + 2.2 * len(rows)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": widths},
    )
    for panel_row, direction in zip(panels, rows, strict=True):
        panel_row[0].set_ylabel(f"{direction}, GB/s", fontsize=11)
        for panel, (threads, depth) in zip(panel_row, columns, strict=True):
            shown = [c for c in cases if (c["direction"], c["threads"], c["depth"]) == (direction, threads, depth)]
            _panel(panel, sorted(shown, key=lambda case: int(case["block_size"])), colours)
            if direction == rows[0]:
                panel.set_title(f"depth {depth}, {threads} thread{'s' if threads > 1 else ''}", fontsize=11)
    figure.suptitle(f"{subtitle}\n{_described(machine)}", fontsize=11)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(int(width / 1.5), len(labels)), frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)


def plot_curves(
    path: Path, contenders: dict[str, Any], steps: int, baseline: str, machine: dict[str, Any], subtitle: str
) -> None:
    """``contenders`` is the mapping of the same name in results/convergence.json."""
    figure, (losses, differences) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    its = contenders[baseline]["training"]
    xs = [steps * (point + 0.5) / len(its[0]) for point in range(len(its[0]))]
    for (name, row), (colour, dashes) in zip(contenders.items(), CURVES, strict=False):
        label = f"{name} ({row['parameters']})"
        _curve(losses, xs, row["training"], colour, dashes, label)
        if name != baseline:
            paired = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(row["training"], its, strict=True)]
            _curve(differences, xs, paired, colour, "-", None)
    losses.set_title("training loss", fontsize=11)
    differences.set_title(f"training loss less that of {baseline}, paired by seed", fontsize=11)
    differences.axhline(0, color="#000000", lw=1.0)
    for panel in (losses, differences):
        panel.set_xlabel("step", fontsize=11)
        panel.set_xlim(0, steps)
        _bare(panel)
    figure.suptitle(f"{subtitle}: means, with bands of the standard deviation\n{_described(machine)}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, handlelength=3.5)
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)


def _curve(
    panel: Any, xs: list[float], by_seed: list[list[float]], colour: str, dashes: Any, label: str | None
) -> None:
    """The mean over the seeds, and a band of one standard deviation around it."""
    points = list(zip(*by_seed, strict=True))
    means = [statistics.mean(point) for point in points]
    panel.plot(xs, means, color=colour, linestyle=dashes, lw=1.6, label=label)
    if len(by_seed) > 1:
        bands = [(m - statistics.stdev(p), m + statistics.stdev(p)) for m, p in zip(means, points, strict=True)]
        panel.fill_between(xs, *zip(*bands, strict=True), color=colour, alpha=0.12, lw=0)


def _described(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, {machine['date']}"


def _colours(names: list[str]) -> dict[str, str]:
    shades = {project: iter(row) for project, row in SHADES.items()}
    return {name: next(shades[name.partition(" ")[0]]) for name in names}


def _panel(panel: Any, cases: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """A bar for the median of each contender, with a line from its slowest round to its fastest."""
    width = 0.84 / len(colours)
    for number, (name, colour) in enumerate(colours.items()):
        xs = [x + width * (number - (len(colours) - 1) / 2) for x in range(len(cases))]
        rounds = [[figure / 1e9 for figure in case["rounds"][name]] for case in cases]
        panel.bar(xs, [case["median"][name] / 1e9 for case in cases], width * 0.92, color=colour, label=name)
        panel.vlines(xs, [min(row) for row in rounds], [max(row) for row in rounds], "#222222", lw=0.9)
    panel.set_xticks(range(len(cases)), [format_bytes(case["block_size"]).replace(".0 ", " ") for case in cases])
    panel.set_xlim(-0.5, len(cases) - 0.5)
    _bare(panel)


def _bare(panel: Any) -> None:
    """No frame, and a grid behind what is shown."""
    panel.grid(axis="y", color="#e4e4e4", lw=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=10)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
