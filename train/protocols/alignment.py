"""Where predictions meet labels: what a protocol does between a head's output, (size, size), and a metric.

=============  ==================  ==================================================================================
protocol       compared at         what the metric gets
=============  ==================  ==================================================================================
mtinet, ase    the photo's size    the field's PNG: levels are stretched to the photo, then cut off to 8 bits
invpt          the photo's size    the output itself without its padding
mini, scenes   size x size         the output itself
=============  ==================  ==================================================================================

Labels are untouched where they are compared at the photo's size. In family A all scores are of 8 bits, elsewhere odsF
alone is: there, saved predictions, rounded to 8 bits, give scores that differ by that rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kernels.errors import UserError
from train.datasets.pascal.labels import fit
from train.datasets.pascal.mat import read_label_map
from train.evaluation.predictions import Picture, from_picture, to_levels, to_picture
from train.files.reading import reading, require_file
from train.protocols.protocols import Protocol
from train.protocols.transforms import Sample, Step, resize_nearest

Shape = tuple[int, int]  # height, width

PHOTO_SIZE = "the photo's size"

STRETCHING = {  # the field's INFER_FLAGVALS
    "seg": cv2.INTER_NEAREST,
    "parts": cv2.INTER_NEAREST,
    "sal": cv2.INTER_LINEAR,
    "normals": cv2.INTER_LINEAR,
    "edge": cv2.INTER_LINEAR,
}


class Answer(NamedTuple):
    """One image's prediction of one task where it meets its label: what is counted, and its PNG."""

    decided: Tensor
    picture: Picture


@dataclass(frozen=True)
class Comparison(ABC):
    """The meeting of predictions (size, size) with labels."""

    size: int

    @property
    def place(self) -> str:
        """For results: what cannot be compared differs in it."""
        return PHOTO_SIZE

    def prepare(self, protocol: Protocol) -> Protocol:
        """The protocol whose labels are those that predictions meet, whatever the split is called."""
        steps = self._steps(protocol)
        return replace(protocol, train=steps, val=steps, needs_seg=False)

    def _steps(self, protocol: Protocol) -> tuple[Step, ...]:
        first, *rest = protocol.val
        return OnlyImage(first), *rest

    @abstractmethod
    def answer(self, task: str, decided: Tensor, shape: Shape) -> Answer:
        """Of a prediction (..., size, size), without batch axis, for a photo of ``shape``."""

    @abstractmethod
    def fit(self, task: str, picture: Picture, shape: Shape) -> Picture:
        """A PNG of the photo's ``shape`` or of (size, size), brought to where it meets its label."""


class Stretched(Comparison):
    """Family A."""

    def answer(self, task: str, decided: Tensor, shape: Shape) -> Answer:
        picture = to_picture(task, stretch(task, to_levels(task, decided), shape), rounded=False)
        return Answer(from_picture(task, picture), picture)

    def fit(self, task: str, picture: Picture, shape: Shape) -> Picture:
        return picture if picture.shape[:2] == shape else stretch(task, picture, shape)


class Cropped(Comparison):
    """Family B: its padding is void, so leaving it away changes no score."""

    def answer(self, task: str, decided: Tensor, shape: Shape) -> Answer:
        rows, columns = self._photo(shape)
        cropped = decided[..., rows, columns].contiguous()
        return Answer(cropped, to_picture(task, to_levels(task, cropped), rounded=True))

    def fit(self, task: str, picture: Picture, shape: Shape) -> Picture:
        return picture if picture.shape[:2] == shape else picture[self._photo(shape)]

    def _photo(self, shape: Shape) -> tuple[slice, slice]:
        """Where :class:`PadTo` has put it."""
        return tuple(slice((self.size - side) // 2, (self.size - side) // 2 + side) for side in shape)


class Square(Comparison):
    """Ours: labels shrink to the prediction."""

    @property
    def place(self) -> str:
        return f"{self.size} x {self.size}"

    def _steps(self, protocol: Protocol) -> tuple[Step, ...]:
        return protocol.val

    def answer(self, task: str, decided: Tensor, shape: Shape) -> Answer:
        return Answer(decided, to_picture(task, to_levels(task, decided), rounded=True))

    def fit(self, task: str, picture: Picture, shape: Shape) -> Picture:
        square = picture.shape[:2] == (self.size, self.size)
        return picture if square else resize_nearest(picture, self.size)


COMPARISONS: dict[str, Callable[[int], Comparison]] = {
    "mtinet": Stretched,
    "ase": Stretched,
    "invpt": Cropped,
    "mini": Square,
    "scenes": Square,
}


@dataclass(frozen=True)
class OnlyImage:
    """A step that leaves the labels as they are."""

    step: Step

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample | self.step({"image": sample["image"]}, rng)


def stretch(task: str, levels: NDArray, shape: Shape) -> NDArray:
    return cv2.resize(levels, shape[::-1], interpolation=STRETCHING[task])


def photo_shape(path: Path) -> Shape:
    """(height, width), read from the head of the file."""
    require_file(path)
    with reading(path), Image.open(path) as image:
        return image.size[::-1]


def require_shape(path: Path, picture: Picture, shape: Shape, size: int) -> None:
    """UserError for a PNG that is neither of the photo's ``shape`` nor (size, size)."""
    if picture.shape[:2] not in (shape, (size, size)):
        height, width = picture.shape[:2]
        raise UserError(
            f"{path} is {width} x {height} pixels, neither its photo's {shape[1]} x {shape[0]} nor {size} x {size}"
        )


def load_boundaries(picture: Picture, photo: Path, label_map: Path) -> tuple[Picture, NDArray]:
    """A job of :func:`train.metrics.odsf.score_boundaries`: both at the photo's size."""
    shape = photo_shape(photo)
    predicted = picture if picture.shape == shape else stretch("edge", picture, shape)
    return predicted, fit(label_map, read_label_map(label_map), shape)
