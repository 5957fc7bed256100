"""Pictures of routing: gate mass by layer and expert, over training, and how the tasks' gradients agree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from train.output.figures import plt, write_figure


def save_maps(path: Path, moments: Mapping[str, Tensor], tasks: Sequence[str], shared: int) -> None:
    """Gate mass (layers, tasks, experts) of each moment: a row of maps per moment, a map per task, in it a row per
    layer and a column per expert, shared experts last, right of the white line."""
    layers, _, experts = next(iter(moments.values())).shape
    size = 2.6 * len(tasks) + 0.8, 0.6 + (0.8 + 0.22 * layers) * len(moments)
    figure, axes = plt.subplots(len(moments), len(tasks), figsize=size, squeeze=False, layout="constrained")
    most = max(float(mass.nan_to_num().max()) for mass in moments.values())
    for position, (name, mass) in enumerate(moments.items()):
        row = axes[position]
        for axis, task, values in zip(row, tasks, mass.numpy().swapaxes(0, 1), strict=True):
            image = axis.imshow(values, aspect="auto", vmin=0, vmax=most, cmap="viridis")
            if shared:
                axis.axvline(experts - shared - 0.5, color="white", linewidth=1)
            axis.tick_params(labelsize=7)
            _whole_numbers(axis)
            if position == 0:
                axis.set_title(task, fontsize=9)
            if position == len(moments) - 1:
                axis.set_xlabel("expert" + (" | shared" if shared else ""), fontsize=8)
        row[0].set_ylabel(f"{name}\nlayer" if name else "layer", fontsize=8)
    figure.colorbar(image, ax=axes, pad=0.01, label="mean gate", aspect=20 * len(moments))
    write_figure(figure, path, dpi=110)


def save_curves(path: Path, steps: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A panel per entry, in it a line per name over the steps, from zero up."""
    size = 4.6 * len(panels), 3.2
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for position, (name, values) in enumerate(lines.items()):
            colour = plt.get_cmap("viridis")(position / max(len(lines) - 1, 1) * 0.9)
            axis.plot(steps, values, linewidth=1.3, marker=".", markersize=4, label=name, color=colour)
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    write_figure(figure, path, dpi=110)


def save_agreement(path: Path, cosines: Mapping[str, Tensor], tasks: Sequence[str]) -> None:
    """A map (tasks, tasks) of cosines between gradients per name, the numbers written into it."""
    size = 3.1 * len(cosines) + 0.8, 3.2
    figure, axes = plt.subplots(1, len(cosines), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, values) in zip(axes[0], cosines.items(), strict=True):
        image = axis.imshow(values.numpy(), vmin=-1, vmax=1, cmap="RdBu")
        for i, row in enumerate(values.tolist()):
            for j, value in enumerate(row):
                dark: dict[str, Any] = {"color": "white" if abs(value) > 0.6 else "black"}
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, **dark)
        axis.set_xticks(range(len(tasks)), tasks, fontsize=8)
        axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
        axis.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes[0], pad=0.02, label="cosine of gradients")
    write_figure(figure, path, dpi=110)


def _whole_numbers(axis: Axes) -> None:
    for numbers in (axis.xaxis, axis.yaxis):  # of experts and layers
        numbers.set_major_locator(MaxNLocator(integer=True, nbins=6))
