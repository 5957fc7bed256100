"""Which way the normals of a tree point: told from images that have both normals and masks.

Ours, and those of the official release, are +x left, +y up. On convex foreground the outward normal points left at the
left contour, right at the right one, up at the top and down at the bottom. So, over the rows of a mask, x at the left
end minus x at the right end is positive on average; over its columns y at the top minus y at the bottom is.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.tasks import VOID

INSET = 2  # pixels from the contour, where labels of two sources may disagree
SMALLEST = 10  # pixels: a shorter row or column of a mask says little
SURE = 3  # standard errors
AXES = (("+x left", "+x right"), ("+y up", "+y down"))  # each as its asymmetry is positive or negative
MASKS = ("parts", "sal", "seg")  # labels whose classes above 0 are foreground, the best first


class Asymmetry(NamedTuple):
    """Of one image: x at the left minus at the right contour, y at the top minus at the bottom; each in -2..2."""

    left_minus_right: float
    top_minus_bottom: float


def asymmetry_of(labels: Mapping[str, NDArray]) -> Asymmetry | None:
    """Of the raw labels of one image; None without normals, or without a mask that shows something."""
    masks = [(labels[task] > 0) & (labels[task] != VOID) for task in MASKS if task in labels]
    mask = next((mask for mask in masks if mask.any()), None)
    return None if mask is None or "normals" not in labels else contour_asymmetry(mask, labels["normals"])


def contour_asymmetry(mask: NDArray[np.bool_], normals: NDArray[np.float32]) -> Asymmetry | None:
    """Of foreground (H, W) and normals (H, W, 3), (0, 0, 0) where void; None where they say nothing."""
    lengths = np.linalg.norm(normals, axis=-1)
    units = normals / np.where(lengths > 0, lengths, 1)[..., None]
    known = mask & (lengths > 0)
    across, down = _ends(known, units[..., 0]), _ends(known.T, units[..., 1].T)
    return None if across is None or down is None else Asymmetry(across, down)


def _ends(known: NDArray[np.bool_], values: NDArray[np.floating]) -> float | None:
    """The mean, over rows, of the value near the first known pixel minus that near the last."""
    rows = np.flatnonzero(known.sum(1) >= SMALLEST)
    if not len(rows):
        return None
    first = known[rows].argmax(1) + INSET
    last = known.shape[1] - 1 - known[rows, ::-1].argmax(1) - INSET
    inside = known[rows, first] & known[rows, last]
    if not inside.any():
        return None
    return float((values[rows, first] - values[rows, last])[inside].mean())


def describe_handedness(images: Sequence[Asymmetry]) -> str:
    """One line: the axes that the normals seem to have, a warning where they are not ours."""
    if not images:
        return "axes  of normals cannot be told: no image has both normals and a mask"
    signs = []
    for values, (positive, negative) in zip(zip(*images, strict=True), AXES, strict=True):
        mean = float(np.mean(values))
        error = float(np.std(values)) / sqrt(len(values)) if len(values) > 1 else abs(mean)
        signs.append(("unclear " + positive[1]) if abs(mean) <= SURE * error else positive if mean > 0 else negative)
    axes, found = ", ".join(signs), f"from the contours of {len(images)} images"
    if axes == "+x left, +y up":
        return f"axes  of normals: {axes}, {found}"
    if any(sign.startswith("unclear") for sign in signs):
        return f"axes  of normals: {axes}, too few images to be sure, {found}"
    return f"axes  of normals, a warning: {axes}, {found}; training expects +x left, +y up: convert the files"
