"""Reads and checks the labels of PASCAL-Context.

In a raw sample "seg", "parts", "sal", "edge" are uint8 (H, W), and "normals" is float32 (H, W, 3). Normals are
2 * stored / 255 - 1, not normalised, and (0, 0, 0) where void.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.datasets.labels import ImageFiles, LabelReader, match_normals, match_photo, read_vector_png
from train.datasets.pascal.mat import read_label_map, read_parts
from train.datasets.pascal.voc import VOC_CLASSES
from train.files.images import image_shape, read_image
from train.tasks import VOID
from train.tasks.edge import edges_from_label_map
from train.tasks.palette import PALETTE


@dataclass(frozen=True)
class Reader(LabelReader):
    """Reads the files of an image; with ``edges_at_input`` "edge" is the LabelMap itself, uint16 (H, W)."""

    label_maps: ClassVar[bool] = True

    def label(self, image: ImageFiles, task: str, shape: tuple[int, int]) -> NDArray:
        path = image.read[task]
        if task == "normals":
            return _normals(path, image.companions.get("normals"), shape)
        if task == "parts":
            parts = self.cache.get(path, "parts 1", read_parts)
            return match_photo(path, parts, shape) if parts.any() else np.zeros(shape, np.uint8)
        if task == "edge" and not self.edges_at_input:
            return match_photo(path, self.cache.get(path, "edges 1", read_edges), shape)
        return match_photo(path, READERS[task](path), shape)

    @staticmethod
    def boundary_map(image: ImageFiles) -> Callable[[], NDArray]:
        """Loads the LabelMap."""
        return partial(read_label_map_at, image.labels["edge"], image.photo)


def read_label_map_at(label_map: Path, photo: Path) -> NDArray[np.uint16]:
    """The LabelMap at its photo's size, which is what boundaries are scored against."""
    return match_photo(label_map, read_label_map(label_map), image_shape(photo))


def read_seg(path: Path) -> NDArray[np.uint8]:
    """Class indices 0..20 and 255 (H, W), as stored; a palette does not change them."""
    image = read_image(path, ("P", "L"))
    label = np.asarray(image)
    used = np.flatnonzero(np.bincount(label.ravel()))
    if (strange := used[(used >= len(VOC_CLASSES)) & (used != VOID)]).size:
        raise UserError(f"{path} holds {strange[0]}, which is no class 0..20 nor 255: restore the original PNG")
    if image.mode == "P":
        _check_palette(path, used, np.array(image.getpalette("RGB")).reshape(-1, 3))
    return label


def _check_palette(path: Path, used: NDArray[np.intp], palette: NDArray) -> None:
    """UserError where an index has the VOC colour of another class: a program has renumbered the indices."""
    colours = {tuple(PALETTE[i].tolist()): i for i in (*range(len(VOC_CLASSES)), VOID)}
    for index in used[used < min(len(VOC_CLASSES), len(palette))]:
        meant = colours.get(tuple(palette[index].tolist()), index)
        if meant != index:
            raise UserError(f"{path} has the colour of class {meant} at index {index}: restore the original PNG")


def read_sal(path: Path) -> NDArray[np.uint8]:
    """0 or 1 (H, W): the distilled grey value is a probability, thresholded at 1/2."""
    return (np.asarray(read_image(path, ("L", "1")).convert("L")) / 255 > 0.5).astype(np.uint8)


def read_edges(path: Path) -> NDArray[np.uint8]:
    """0 or 1 (H, W): where the LabelMap changes."""
    return edges_from_label_map(read_label_map(path))


READERS: dict[str, Callable[[Path], NDArray]] = {"seg": read_seg, "sal": read_sal, "edge": read_label_map}


def _normals(path: Path, label_map: Path | None, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Vectors (H, W, 3), void where (0, 0, 0) is stored or the LabelMap, if any, has an invalid class."""
    vectors = match_normals(path, *read_vector_png(path), shape)
    if label_map:
        valid = np.isin(match_photo(label_map, read_label_map(label_map), shape), valid_classes())
        vectors = vectors * valid[..., None]
    return vectors


@cache
def valid_classes() -> NDArray[np.int64]:
    """The 170 LabelMap classes whose normals are valid."""
    text = (resources.files("train.datasets.pascal") / "normals_valid_classes.json").read_text()
    return np.array(sorted(json.loads(text)["ids"].values()))
