"""Charts of a study: arms over seeds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes

from fastmoe_lora import MoEConfig
from train.config.arms import Arm
from train.output.figures import plt, write_figure

DELTA = "Delta_m %, against single-task models"
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


def _finish(axis: Axes, note: str) -> None:
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(note, fontsize=8, loc="left")
