"""The axes of a tree's normals, estimated from images that have both normals and masks.

This project and the official release use +x left, +y up. On a convex object the outward normal points left at the left
contour, right at the right one, up at the top and down at the bottom. So x at the left end of a mask's row minus x at
its right end is positive on average, and so is y at the top of a column minus y at its bottom.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.tasks import VOID

INSET = 2  # pixels inward from the contour, where mask and normals may disagree
SMALLEST = 10  # pixels: shorter rows and columns of a mask are ignored
SURE = 3  # standard errors by which a mean must differ from 0
AXES = (("+x left", "+x right"), ("+y up", "+y down"))  # (positive asymmetry, negative asymmetry)
MASKS = ("parts", "sal", "seg")  # labels whose classes, but for the background, are foreground, in order of preference


class Asymmetry(NamedTuple):
    """Mean differences over the normals of one image, each in -2..2.

    x at the left contour minus x at the right one, and y at the top minus y at the bottom.
    """

    left_minus_right: float
    top_minus_bottom: float


def asymmetry_of(labels: Mapping[str, NDArray], background: Sequence[int] = (0,)) -> Asymmetry | None:
    """The asymmetry of an image from its raw labels; None without normals or without foreground."""
    masks = [~np.isin(labels[task], (*background, VOID)) for task in MASKS if task in labels]
    mask = next((mask for mask in masks if mask.any()), None)
    return None if mask is None or "normals" not in labels else contour_asymmetry(mask, labels["normals"])


def contour_asymmetry(mask: NDArray[np.bool_], normals: NDArray[np.float32]) -> Asymmetry | None:
    """The asymmetry of ``normals`` (H, W, 3), void where (0, 0, 0), within the foreground ``mask`` (H, W).

    None where no row or no column is long enough.
    """
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
    """One line: the estimated axes of the normals, with a warning where they are not +x left, +y up."""
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
