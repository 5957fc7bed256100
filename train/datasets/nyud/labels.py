"""Reads and checks the labels of NYUD-v2, in the formats of both releases.

In a raw sample "seg" and "edge" are uint8 (H, W), "depth" is float32 (H, W) in metres, 0 where void, and "normals" is
float32 (H, W, 3), (0, 0, 0) where void. Normals keep the axes of their files. Which axes those are is not documented;
``train.check`` estimates them.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.datasets.labels import ImageFiles, LabelReader, match_normals, match_photo, read_vector_png
from train.files.arrays import read_npy
from train.files.images import image_shape, read_image

NYUD_CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter",
    "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books",
    "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand",
    "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture", "otherprop",
)  # fmt: skip
# Flat or hollow: their normals do not turn outward at the contour.
NOT_CONVEX = (
    "wall", "floor", "door", "window", "picture", "counter", "blinds", "curtain", "mirror", "floor mat", "ceiling",
    "paper", "shower curtain", "whiteboard", "sink", "bathtub", "otherstructure",
)  # fmt: skip
LARGEST_DEPTH = 1000  # metres: a file with more holds another unit
SHORTEST = 0.5  # a shorter vector is void: PNGs hold zero vectors as grey


class Reader(LabelReader):
    """Reads the files of an image."""

    background: ClassVar[tuple[int, ...]] = tuple(NYUD_CLASSES.index(name) for name in NOT_CONVEX)

    def label(self, image: ImageFiles, task: str, shape: tuple[int, int]) -> NDArray:
        path = image.read[task]
        if task == "normals":
            return match_normals(path, *read_normals(path), shape)
        return match_photo(path, READERS[task](path), shape)

    @staticmethod
    def boundary_map(image: ImageFiles) -> Callable[[], NDArray]:
        """Loads the edges themselves, as a mask."""
        return partial(read_edges_at, image.labels["edge"], image.photo)


def read_seg(path: Path) -> NDArray[np.uint8]:
    """Class ids 0..39 (H, W) and 255 for void; a file holds 1..40, and 0 for void."""
    stored = np.asarray(read_image(path, ("L", "P")))
    if stored.max() > len(NYUD_CLASSES):
        raise UserError(f"{path} holds {stored.max()}, which is no class 1..{len(NYUD_CLASSES)} nor 0: restore it")
    return stored - np.uint8(1)  # 0 wraps around to 255


def read_depth(path: Path) -> NDArray[np.float32]:
    """Metres (H, W), 0 for void."""
    depth = read_npy(path, axes=2)
    if depth.min() < 0 or depth.max() > LARGEST_DEPTH:
        raise UserError(f"{path} holds depths from {depth.min():g} to {depth.max():g}, which are no metres: restore it")
    return depth.astype(np.float32)


def read_normals(path: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(vectors (H, W, 3), where they are not void (H, W)) of a .npy file, or of a PNG of 255 (n + 1) / 2."""
    if path.suffix == ".png":
        vectors, known = read_vector_png(path)
    else:
        vectors = read_npy(path, axes=3).astype(np.float32)
        if vectors.shape[2] != 3:
            raise UserError(f"{path} holds {vectors.shape[2]} numbers per pixel, not vectors of 3: restore it")
        known = np.ones(vectors.shape[:2], bool)
    return vectors, known & (np.linalg.norm(vectors, axis=-1) >= SHORTEST)


def read_edges(path: Path) -> NDArray[np.uint8]:
    """0 or 1 (H, W): the stored value, 0..1 in a .npy file and 0..255 in a PNG, is cut at half."""
    if path.suffix == ".png":
        strength = np.asarray(read_image(path, ("L", "1")).convert("L")) / 255
    else:
        strength = read_npy(path, axes=2, kinds="buif")
        if strength.min() < 0 or strength.max() > 1:
            raise UserError(f"{path} holds edges from {strength.min():g} to {strength.max():g}, not 0..1: restore it")
    return (strength > 0.5).astype(np.uint8)


def read_edges_at(edges: Path, photo: Path) -> NDArray[np.bool_]:
    """The edges at their photo's size, which is what boundaries are scored against."""
    return match_photo(edges, read_edges(edges), image_shape(photo)) == 1


READERS: dict[str, Callable[[Path], NDArray]] = {"seg": read_seg, "depth": read_depth, "edge": read_edges}
