"""Which experts a model uses for the patches of a photo, as maps beside the photo."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from train.output.figures import plt, write_figure

# Any two differ in hue or saturation, not in lightness alone.
COLOURS = (
    "#4363d8", "#f58231", "#3cb44b", "#e6194b", "#42d4f4", "#ffd500", "#f032e6", "#8c5a2b", "#9fe03c", "#911eb4",
    "#fabed4", "#469990", "#7d8500", "#c0a5ff", "#b0305a",
)  # fmt: skip
OTHERS = "#bdbdbd"
CELL, GAP = 1.25, 0.07  # inches: the longer side of a map, what lies between two
NARROWEST = 2.1  # inches, for titles over one map
FOOTER = 0.65  # inches, the least height of legend and colour bar
ENTRY = 0.45  # inches, the width of an expert in the legend
SHARPEST = 640  # pixels, the longer side of the photo


@dataclass(frozen=True)
class ExpertMaps:
    """``gates`` (layers, tasks, rows, columns, N) of the patches of one image, in which the last ``shared`` experts are
    always on."""

    layers: Sequence[int]
    tasks: Sequence[str]
    gates: Tensor
    shared: int

    @property
    def best(self) -> NDArray[np.int64]:
        """The sparse expert with the largest gate, (layers, tasks, rows, columns)."""
        return self.gates[..., : self.gates.shape[-1] - self.shared].argmax(-1).numpy()

    @property
    def mass(self) -> NDArray[np.float32]:
        """The sum of the shared experts' gates, (layers, tasks, rows, columns)."""
        return self.gates[..., self.gates.shape[-1] - self.shared :].sum(-1).numpy()


@dataclass(frozen=True)
class Place:
    """Where the photo, of ``photo`` (height, width), lies in the model's input of ``shape``: in its ``window``."""

    photo: tuple[int, int]
    shape: tuple[int, int]
    window: tuple[slice, slice]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of the input in the photo's pixels; padding lies outside the photo."""
        bounds = []
        for side, whole, part in zip(self.photo, self.shape, self.window, strict=True):
            scale = side / (part.stop - part.start)
            bounds.append((-part.start * scale, (whole - part.start) * scale))
        (top, bottom), (left, right) = bounds
        return left, right, bottom, top


def save_expert_maps(path: Path, photo: NDArray[np.uint8], place: Place, maps: ExpertMaps) -> None:
    """From left to right: the photo; by task and layer the sparse expert with the largest gate; the gate mass of the
    shared experts, if there are any."""
    height, width = (CELL * side / max(place.photo) + GAP for side in place.photo)
    widths = [1.5 * width, *[max(len(maps.layers) * width, NARROWEST) + 0.3] * (2 if maps.shared else 1)]
    colours = colours_of(maps.best)
    palette = np.array([to_rgb(colours.get(expert, OTHERS)) for expert in range(maps.gates.shape[-1])])
    columns = int(widths[1] / ENTRY)
    rows = math.ceil(min(len(colours), len(COLOURS) + 1) / columns)
    heights = max(len(maps.tasks) * height, 1.5 * height) + 0.5, max(0.3 + 0.16 * rows, FOOTER)
    figure = plt.figure(figsize=(sum(widths), sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(2, len(widths), width_ratios=widths, height_ratios=heights)
    blocks, footers = parts
    _draw_photo(blocks[0], photo, place)
    _draw_maps(blocks[1], "sparse expert with the largest gate", maps, palette[maps.best], place)
    _draw_legend(footers[1], colours, columns)
    if maps.shared:
        title = f"gate mass of the {f'{maps.shared} shared experts' if maps.shared > 1 else 'shared expert'}"
        image = _draw_maps(blocks[2], title, maps, maps.mass, place)
        bar = figure.colorbar(image, footers[2].subplots(), orientation="horizontal")
        bar.set_label("gate mass", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    write_figure(figure, path, dpi=200)


def colours_of(best: NDArray[np.int64]) -> dict[int, str]:
    """A colour for each expert that ``best`` names, in their order; OTHERS for all but those that most patches use."""
    experts, counts = np.unique(best, return_counts=True)
    common = experts[np.argsort(-counts, kind="stable")[: len(COLOURS)]]
    colours = iter(COLOURS)
    return {expert: next(colours) if expert in common else OTHERS for expert in experts.tolist()}


def _draw_photo(block: SubFigure, photo: NDArray[np.uint8], place: Place) -> None:
    small = Image.fromarray(photo)
    small.thumbnail((SHARPEST, SHARPEST))
    axis = block.subplots()
    axis.imshow(np.asarray(small), extent=(0, place.photo[1], place.photo[0], 0))
    axis.set_title("photo", fontsize=8)
    axis.set_anchor("N")
    axis.axis("off")
    block.suptitle(" ", fontsize=8)  # as high as the titles beside it


def _draw_maps(block: SubFigure, title: str, maps: ExpertMaps, values: NDArray, place: Place) -> AxesImage:
    """A row per task, a column per layer; each map shows what the photo covers. ``values`` (layers, tasks, rows,
    columns) are on one scale from 0, or have colours as a further axis. Returns one of the maps."""
    axes = block.subplots(len(maps.tasks), len(maps.layers), squeeze=False)
    height, width = place.photo
    for axis, of_one in zip(axes.T.flat, values.reshape(-1, *values.shape[2:]), strict=True):
        image = axis.imshow(of_one, "viridis", interpolation="nearest", extent=place.extent, vmin=0, vmax=values.max())
        axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for axis, layer in zip(axes[0], maps.layers, strict=True):
        axis.set_title(f"layer {layer}", fontsize=8)
    for axis, task in zip(axes[:, 0], maps.tasks, strict=True):
        axis.set_ylabel(task, fontsize=8)
    block.suptitle(title, fontsize=8)
    return image


def _draw_legend(block: SubFigure, colours: Mapping[int, str], columns: int) -> None:
    """The experts that have a colour of their own, row by row."""
    entries = [Patch(color=colour, label=str(expert)) for expert, colour in colours.items() if colour != OTHERS]
    if len(entries) < len(colours):
        entries.append(Patch(color=OTHERS, label="others"))
    by_column = [entry for column in range(columns) for entry in entries[column::columns]]  # as legend() fills it
    title = "number of the expert in its layer"
    sizes: dict[str, Any] = {"fontsize": 7, "title_fontsize": 7, "handlelength": 1, "handleheight": 1}
    shape: dict[str, Any] = {"ncols": min(columns, len(entries)), "columnspacing": 1, "frameon": False}
    block.legend(handles=by_column, title=title, loc="center", **sizes, **shape)
