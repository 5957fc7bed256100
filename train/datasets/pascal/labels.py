"""Reads and checks the photo and the labels of one image, at the size of the photo.

A raw sample is a dict of "image" uint8 (H, W, 3) RGB and the image's labels: "seg", "parts", "sal", "edge" uint8
(H, W), and "normals" float32 (H, W, 3). Normals are 2 * stored / 255 - 1, not normalised, and (0, 0, 0) where void. A
label whose size differs from its photo's is resized if it is the same picture rescaled, and refused otherwise. Every
fault is a UserError of one line.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from kernels.errors import UserError
from train.datasets.cache import Cache
from train.datasets.pascal.mat import read_label_map, read_parts
from train.datasets.pascal.tree import ImageFiles
from train.datasets.pascal.voc import VOC_CLASSES
from train.files.images import image_shape, read_image
from train.protocols import Sample
from train.tasks import VOID
from train.tasks.edge import edges_from_label_map
from train.tasks.palette import PALETTE

# Ratios within (1/1.25, 1.25), other than 1, mean the label of another photo.
RESCALED = 1.25
SMALLEST = 1 / 8  # of the photo's sides: a smaller label has too few pixels to compare their shapes


@dataclass(frozen=True)
class Reader:
    """Reads the files of an image; with ``edges_at_input`` "edge" is the LabelMap itself, uint16 (H, W)."""

    cache: Cache = Cache()
    edges_at_input: bool = False

    def sample(self, image: ImageFiles) -> Sample:
        """The raw sample of an image. It also has "seg" where the segmentation is not a label but guides the crop."""
        photo = read_photo(image.photo)
        sample = {task: self.label(image, task, photo.shape[:2]) for task in image.read}
        return {"image": photo} | sample

    def label(self, image: ImageFiles, task: str, shape: tuple[int, int]) -> NDArray:
        """One label of a raw sample at the photo's ``shape``."""
        path = image.read[task]
        if task == "normals":
            return _normals(path, image.label_map, shape)
        if task == "parts":
            parts = self.cache.get(path, "parts 1", read_parts)
            return match_photo(path, parts, shape) if parts.any() else np.zeros(shape, np.uint8)
        if task == "edge" and not self.edges_at_input:
            return match_photo(path, self.cache.get(path, "edges 1", read_edges), shape)
        return match_photo(path, READERS[task](path), shape)


def match_photo(path: Path, label: NDArray, shape: tuple[int, int], interpolation: int = cv2.INTER_NEAREST) -> NDArray:
    """``label`` (h, w, ...) at the photo's ``shape``; UserError where it is not the same picture rescaled."""
    height, width = label.shape[:2]
    if (height, width) == shape:
        return label
    low = max((height - 1) / shape[0], (width - 1) / shape[1])  # scale factors that fit both sides to a pixel
    high = min((height + 1) / shape[0], (width + 1) / shape[1])
    factor = (low + high) / 2
    if low > high or factor < SMALLEST or 1 / RESCALED < factor < RESCALED:
        raise UserError(
            f"{path} is {width} x {height} pixels, its photo {shape[1]} x {shape[0]}, which is not the same picture "
            "rescaled: restore it"
        )
    return cv2.resize(label, (shape[1], shape[0]), interpolation=interpolation)


def read_label_map_at(label_map: Path, photo: Path) -> NDArray[np.uint16]:
    """The LabelMap at its photo's size, which is what boundaries are scored against."""
    return match_photo(label_map, read_label_map(label_map), image_shape(photo))


def read_photo(path: Path) -> NDArray[np.uint8]:
    """RGB (H, W, 3) of a JPEG or PNG in colour or grey, oriented by EXIF: its labels have that orientation too."""
    image = read_image(path, ("RGB", "L"), ("JPEG", "PNG"))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


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


def read_normals(path: Path) -> NDArray[np.uint8]:
    """The stored triples (H, W, 3)."""
    return np.asarray(read_image(path, ("RGB",)))


def read_edges(path: Path) -> NDArray[np.uint8]:
    """0 or 1 (H, W): where the LabelMap changes."""
    return edges_from_label_map(read_label_map(path))


READERS: dict[str, Callable[[Path], NDArray]] = {"seg": read_seg, "sal": read_sal, "edge": read_label_map}


def _normals(path: Path, label_map: Path | None, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Vectors (H, W, 3), void where (0, 0, 0) is stored or the LabelMap, if any, has an invalid class."""
    stored = read_normals(path)
    known = np.any(stored, axis=-1).astype(np.uint8)
    vectors = (2 * stored.astype(np.float32) / 255 - 1) * known[..., None]
    vectors, valid = match_photo(path, vectors, shape, cv2.INTER_CUBIC), match_photo(path, known, shape) == 1
    if label_map:
        valid &= np.isin(match_photo(label_map, read_label_map(label_map), shape), valid_classes())
    return vectors * valid[..., None]


@cache
def valid_classes() -> NDArray[np.int64]:
    """The 170 LabelMap classes whose normals are valid."""
    text = (resources.files("train.datasets.pascal") / "normals_valid_classes.json").read_text()
    return np.array(sorted(json.loads(text)["ids"].values()))
