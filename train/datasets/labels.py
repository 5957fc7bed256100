"""Reads and checks the photo and the labels of one image: what data sets of files share.

A raw sample is a dict of "image" uint8 (H, W, 3) RGB and the image's labels at the photo's size, as
:mod:`train.protocols.base` describes them. A label whose size differs from its photo's is resized if it is the same
picture rescaled, and refused otherwise. Every fault is a UserError of one line.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.datasets.cache import Cache
from train.files.images import read_image, read_photo
from train.protocols import Sample

# Ratios within (1/1.25, 1.25), other than 1, mean the label of another photo.
RESCALED = 1.25
SMALLEST = 1 / 8  # of the photo's sides: a smaller label has too few pixels to compare their shapes


@dataclass(frozen=True)
class ImageFiles:
    """The files of one image.

    ``labels``: label files of the requested tasks. ``companions``: {task: a further file that its label is read with},
    where one exists. ``guide``: the segmentation, where the crop needs it and it is not a requested label; None where
    there is no such file. ``missing``: files that should exist.
    """

    id: str
    photo: Path
    labels: dict[str, Path]
    companions: dict[str, Path]
    guide: Path | None
    missing: tuple[Path, ...]

    @property
    def read(self) -> dict[str, Path]:
        """The label files to read by task, the guide as "seg"."""
        return self.labels | ({"seg": self.guide} if self.guide else {})

    def files(self, task: str) -> tuple[Path, ...]:
        """The files that the image and its label of ``task`` are read from."""
        further = (self.companions[task],) if task in self.companions else ()
        return self.photo, self.read[task], *further


@dataclass(frozen=True)
class LabelReader(ABC):
    """Reads the files of an image; with ``edges_at_input`` "edge" is the map that edges are derived from.

    ``background`` are the classes of "seg" that are no objects: :mod:`train.datasets.handedness` looks at the contours
    of the others.
    """

    cache: Cache = Cache()
    edges_at_input: bool = False

    background: ClassVar[tuple[int, ...]] = (0,)
    label_maps: ClassVar[bool] = False  # whether "edge" is derived from label maps

    def sample(self, image: ImageFiles) -> Sample:
        """The raw sample of an image, whose labels have the orientation of its photo. It also has "seg" where the
        segmentation is not a label but guides the crop."""
        photo = read_photo(image.photo)
        sample = {task: self.label(image, task, photo.shape[:2]) for task in image.read}
        return {"image": photo} | sample

    @abstractmethod
    def label(self, image: ImageFiles, task: str, shape: tuple[int, int]) -> NDArray:
        """One label of a raw sample at the photo's ``shape``."""

    @staticmethod
    def boundary_map(image: ImageFiles) -> Callable[[], NDArray]:
        """A picklable function that returns what the image's boundaries are scored against, at the photo's size; of
        data sets with edges."""
        raise NotImplementedError


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


def match_normals(
    path: Path, vectors: NDArray[np.float32], known: NDArray[np.bool_], shape: tuple[int, int]
) -> NDArray[np.float32]:
    """``vectors`` (h, w, 3), which are ``known`` (h, w) at some pixels, at the photo's ``shape``, (0, 0, 0) elsewhere.

    Vectors are resized cubically and ``known`` by the nearest pixel.
    """
    vectors = match_photo(path, vectors * known[..., None], shape, cv2.INTER_CUBIC)
    return vectors * match_photo(path, known.astype(np.uint8), shape)[..., None]


def read_vector_png(path: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(2 * stored / 255 - 1 of a PNG (H, W, 3), where another triple than (0, 0, 0) is stored (H, W))."""
    stored = np.asarray(read_image(path, ("RGB",)))
    return 2 * (stored.astype(np.float32) / np.float32(255)) - 1, np.any(stored, axis=-1)
