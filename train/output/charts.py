"""Charts: the arms of a study over seeds, and the course of runs over steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fastmoe_lora import MoEConfig
from train.config.arms import Arm
from train.output.figures import plt, write_figure

DELTA = "Delta_m %, against single-task models"
DENSE = 40  # points of a line from which on it is smoothed
SWEEPS: dict[str, tuple[str, Callable[[MoEConfig], int]]] = {
    "fig3a": ("active experts of 16, shared ones included", lambda config: config.active + config.shared),
    "fig3b": ("experts, at equal parameters", lambda config: config.experts),
}


def draw(path: Path, figure: str, deltas: Mapping[Arm, Sequence[float]], note: str) -> None:
    """Lines over the number of experts where the figure is a sweep, else one row per arm."""
    if figure not in SWEEPS:
        save_arms(path, {arm.name: values for arm, values in deltas.items()}, note)
        return
    axis_name, position = SWEEPS[figure]
    lines: dict[str, dict[int, Sequence[float]]] = {}
    for arm, values in deltas.items():
        config = MoEConfig.parse(arm.values["moe"])
        lines.setdefault("ASE" if config.shared else "LoRA-MoE", {})[position(config)] = values
    save_lines(path, lines, axis_name, note)


def save_arms(path: Path, deltas: Mapping[str, Sequence[float]], note: str) -> None:
    """One row per arm: Delta_m of every seed as a dot, joined to that of the same seed in the next row, their mean as a
    bar, and a dashed line at the first arm's mean."""
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.4 * len(deltas)), layout="constrained")
    rows = range(len(deltas))[::-1]
    for row, values in zip(rows, deltas.values(), strict=True):
        axis.plot(values, [row] * len(values), "o", markersize=4, color="tab:blue", alpha=0.5, clip_on=False)
        axis.plot([mean(values)] * 2, [row - 0.3, row + 0.3], linewidth=2.5, color="black")
    for pair in zip(*deltas.values(), strict=True):
        axis.plot(pair, list(rows), linewidth=0.7, color="tab:blue", alpha=0.3, zorder=0)
    axis.axvline(mean(next(iter(deltas.values()))), linestyle="--", linewidth=1, color="grey", zorder=0)
    axis.set_yticks(list(rows), list(deltas), fontsize=8)
    axis.set_ylim(-0.6, len(deltas) - 0.4)
    axis.set_xlabel(DELTA, fontsize=8)
    _finish(axis, note)
    write_figure(figure, path, dpi=130)


def save_lines(path: Path, lines: Mapping[str, Mapping[int, Sequence[float]]], axis_name: str, note: str) -> None:
    """One line per kind of expert: the mean Delta_m over ``axis_name``, with the standard deviation over seeds."""
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    ticks = sorted({x for points in lines.values() for x in points})
    for number, (name, points) in enumerate(lines.items()):
        places = [ticks.index(x) + 0.06 * number for x in points]  # side by side, so that no bar hides another
        spreads = [stdev(values) if len(values) > 1 else 0 for values in points.values()]
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.2}
        axis.errorbar(places, list(map(mean, points.values())), spreads, label=name, **style)
    axis.set_xticks(range(len(ticks)), list(map(str, ticks)))
    axis.set_xlabel(axis_name, fontsize=8)
    axis.set_ylabel(DELTA, fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    _finish(axis, note)
    write_figure(figure, path, dpi=130)


@dataclass(frozen=True)
class Panel:
    """A chart over steps: its title, what its values are, and per run the value at each step."""

    title: str
    values: str
    lines: Mapping[str, Mapping[int, float]]


def save_curves(path: Path, rows: Sequence[Sequence[Panel]]) -> None:
    """Rows of panels over the same steps, a line per run in each."""
    columns = max(map(len, rows))
    size = 2.3 * columns + 0.3, 1.9 * len(rows) + 0.5
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    lines = [points for panels in rows for panel in panels for points in panel.lines.values() if points]
    last = max(map(max, lines), default=1)
    for row, panels in zip(axes, rows, strict=True):
        for axis, panel in zip(row, panels, strict=False):
            _draw_panel(axis, panel)
            axis.set_xlim(0, last * 1.02)
        row[0].set_ylabel(panels[0].values, fontsize=8)
        for axis in row[len(panels) :]:
            axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    handles, names = axes[0, 0].get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside upper left", ncols=columns, fontsize=8, frameon=False)
    write_figure(figure, path, dpi=130)


def _draw_panel(axis: Axes, panel: Panel) -> None:
    """Many points are drawn faint, below their running mean."""
    for number, (name, points) in enumerate(panel.lines.items()):
        steps, values, colour = list(points), list(points.values()), f"C{number}"
        style: dict[str, Any] = {"color": colour, "linewidth": 1.3, "label": name}
        if len(points) > DENSE:
            axis.plot(steps, values, linewidth=0.5, color=colour, alpha=0.25)
            axis.plot(steps, running_mean(values, len(values) // DENSE), **style)
        else:
            axis.plot(steps, values, marker=".", markersize=5, **style)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axis.grid(linewidth=0.4, alpha=0.5)
    _finish(axis, panel.title)


def running_mean(values: Sequence[float], window: int) -> NDArray[np.float64]:
    """Of each value and those before it, ``window`` in all where there are so many."""
    sums, ends = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _finish(axis: Axes, note: str) -> None:
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(note, fontsize=8, loc="left")
