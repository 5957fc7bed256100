"""Pictures of a data set and of a run: labels, predictions next to labels, and losses."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from train.datasets.batches import Batch
from train.output.figures import plt, write_figure
from train.tasks import TASKS, Classes
from train.tasks.palette import PALETTE

BLANK = 242  # grey of a cell without a label
CELL = 224  # side of a cell on a contact sheet, pixels
CAPTION = 20  # height in a cell for the id, pixels
LEGEND_ENTRY = 1.0  # inches


def spread(groups: Sequence[NDArray[np.int64]], count: int) -> list[int]:
    """About ``count`` indices: the same number from each group, evenly spaced."""
    each = max(count // len(groups), 1)
    return [int(group[len(group) * i // each]) for group in groups for i in range(min(each, len(group)))]


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """A photo or a painted task (H, W, 3) uint8 of any size, at the size at which it fits into a cell above its
    caption."""
    scale = min((CELL - CAPTION) / picture.shape[0], CELL / picture.shape[1])
    width, height = (max(int(scale * side), 1) for side in picture.shape[1::-1])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))


def save_contact_sheet(path: Path, images: dict[str, dict[str, np.ndarray]], classes: Classes) -> None:
    """A grid of ``images[id]["image" or a task]``, each a :func:`thumbnail`, two images side by side. A task that an
    image has no label for is left blank."""
    names = [name for name in ("image", *TASKS) if any(name in image for image in images.values())]
    rows = -(-len(images) // 2)
    halves = [list(images)[:rows], list(images)[rows:]]
    columns = [(name, [_cell(images[i], name) for i in half]) for half in halves if half for name in names]
    for _, cells in columns:
        cells += [np.full_like(cells[0], 255)] * (rows - len(cells))
    figure, axis = plt.subplots(figsize=(1.5 * len(columns), 1.5 * rows + 1.1), layout="constrained")
    pitch = _draw_grid(axis, columns)
    for column, half in enumerate(halves):
        for row, (i, image) in enumerate((i, images[i]["image"]) for i in half):
            left, below = column * len(names) * pitch, row * pitch + len(image)
            axis.text(left + CELL / 2, below + CAPTION / 4, i, ha="center", va="top", fontsize=6, color="dimgrey")
    _draw_legends(figure, names, classes)
    write_figure(figure, path, dpi=170)


def _cell(image: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A white cell (CELL, CELL, 3) with the picture in the middle of its upper edge."""
    picture = image.get(name, np.full_like(image["image"], BLANK))
    height, width = picture.shape[:2]
    left = (CELL - width) // 2
    return np.pad(picture, ((0, CELL - height), (left, CELL - width - left), (0, 0)), constant_values=255)


def save_predictions(path: Path, batch: Batch, predictions: dict[str, dict[str, Tensor]], classes: Classes) -> None:
    """A grid: one row per image of ``batch``; the image, then per task the label and each model's prediction.

    ``predictions[model][task]`` (B, C, H, W) covers every image, labelled or not. The titles of the columns are the
    models' names. A missing label is left blank.
    """
    columns = [("image", list(batch.images.permute(0, 2, 3, 1).cpu().numpy()))]
    tasks = [task for task in TASKS if any(task in outputs for outputs in predictions.values())]
    for task in tasks:
        labels = dict(zip(batch.index[task].tolist(), batch.labels[task], strict=True)) if task in batch.index else {}
        blank = np.full_like(columns[0][1][0], 255)
        rows = range(len(batch.images))
        columns.append(
            (task, [TASKS[task].paint_label(labels[i].cpu().numpy()) if i in labels else blank for i in rows])
        )
        for name, outputs in predictions.items():
            if task in outputs:
                columns.append((name, [TASKS[task].paint_prediction(output.float().cpu()) for output in outputs[task]]))
    figure, axis = plt.subplots(figsize=(1.3 * len(columns), 1.3 * len(batch.images) + 1), layout="constrained")
    _draw_grid(axis, columns)
    _draw_legends(figure, tasks, classes)
    write_figure(figure, path, dpi=120)


def _draw_grid(axis: Axes, columns: list[tuple[str, list[np.ndarray]]]) -> int:
    """Columns of equally large pictures under their titles, with white gaps; returns the pixels from one column to the
    next. Each row is an image, since Matplotlib takes a hundred bytes for each pixel of one while it draws it."""
    height, width = columns[0][1][0].shape[:2]
    gap = max(height // 24, 2)
    for row, cells in enumerate(zip(*(column for _, column in columns), strict=True)):
        strip = np.concatenate([np.pad(c, ((0, gap), (0, gap), (0, 0)), constant_values=255) for c in cells], axis=1)
        top = row * len(strip)
        axis.imshow(strip, interpolation="nearest", extent=(0, strip.shape[1], top + len(strip), top))
    axis.set(xlim=(0, len(columns) * (width + gap)), ylim=(len(columns[0][1]) * (height + gap), 0))
    axis.axis("off")
    for i, (title, _) in enumerate(columns):
        size = min(9, 108 / len(title))  # points; a long name shrinks to its column
        axis.text(i * (width + gap) + width / 2, -gap, title, ha="center", va="bottom", fontsize=size)
    return width + gap


def _draw_legends(figure: Figure, tasks: Iterable[str], classes: Classes) -> None:
    """Legends below the grid, side by side, each with as many columns as fit into half the figure's width."""
    columns = min(7, max(1, int(figure.get_figwidth() / 2 / LEGEND_ENTRY)))
    for task, corner in (("seg", "left"), ("parts", "right")):
        if task in tasks:
            entries = [Patch(facecolor=PALETTE[i] / 255, label=name) for i, name in enumerate(classes[task])]
            place: dict[str, Any] = {"loc": f"outside lower {corner}", "ncols": columns}
            figure.legend(handles=entries, title=task, fontsize=7, title_fontsize=8, frameon=False, **place)


def save_loss_curves(
    path: Path,
    steps: Sequence[int],
    names: Sequence[str],
    curves: dict[str, list[list[float]]],
    apart: dict[str, list[float]],
) -> None:
    """A column per task: above the loss of each named run, ``curves[task][run][step]``, below their relative
    difference ``apart[task][step]`` on a logarithmic axis, where equal losses leave a gap."""
    figure, axes = plt.subplots(
        2, len(curves), figsize=(2.6 * len(curves) + 0.8, 4), sharex=True, squeeze=False, layout="constrained"
    )
    for (above, below), (task, losses) in zip(axes.T, curves.items(), strict=True):
        for name, values, style in zip(names, losses, ("-", "--"), strict=True):
            above.plot(steps, values, style, linewidth=1, label=name)
        above.set_title(task, fontsize=9)
        differing = [value or float("nan") for value in apart[task]]
        below.plot(steps, differing, ".", markersize=3, color="black")
        if any(apart[task]):
            below.set_yscale("log")
        else:
            below.text(0.5, 0.5, "equal", ha="center", va="center", transform=below.transAxes, fontsize=9)
            below.set_yticks([])
        below.set_xlabel("step", fontsize=8)
        for axis in (above, below):
            axis.tick_params(labelsize=7, which="both")
    axes[0, 0].set_ylabel("loss", fontsize=8)
    axes[1, 0].set_ylabel("relative difference", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", fontsize=7, frameon=False)
    write_figure(figure, path, dpi=120)
