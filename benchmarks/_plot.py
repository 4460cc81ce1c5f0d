"""The picture of benchmarks/aio.py: bars for the contenders, grouped by block size, a panel for each setting."""

from __future__ import annotations

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


def plot(path: Path, cases: list[dict[str, Any]], machine: dict[str, Any], subtitle: str) -> None:
    """``cases`` is the list of the same name in results/aio.json."""
    columns = sorted({(case["threads"], case["depth"]) for case in cases})
    rows = [direction for direction in DIRECTIONS if any(case["direction"] == direction for case in cases)]
    colours = _colours(list(dict.fromkeys(name for case in cases for name in case["median"])))
    widths = [len({case["block_size"] for case in cases if (case["threads"], case["depth"]) == c}) for c in columns]
    figure, panels = plt.subplots(
        len(rows),
        len(columns),
        figsize=(width := max(9.0, 1 + 1.5 * sum(widths)), 1.8 + 2.2 * len(rows)),
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
    figure.suptitle(
        f"{subtitle}\n{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, {machine['date']}",
        fontsize=11,
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(int(width / 1.5), len(labels)), frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)


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
    panel.grid(axis="y", color="#e4e4e4", lw=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=10)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
