"""This project's protocols: ``mini`` for photos (antialiased resize to a square, flip only) and ``scenes`` for scenes.

Labels are resized to the prediction, which is scored as it is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from train.protocols.base import AlignedPrediction, Protocol, Sample, Step, Window, finish_labels, random_flip
from train.tasks import TASKS, Picture, Shape
from train.tasks.edge import edges_from_label_map


@dataclass(frozen=True)
class ShrinkTo:
    """Resizes to (size, size) as Pillow does: image bilinear, antialiased where it shrinks; the rest nearest.

    A label need not have the size of its image.
    """

    size: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        resized = {name: resize_nearest(array, self.size) for name, array in sample.items() if name != "image"}
        photo = Image.fromarray(sample["image"]).resize((self.size, self.size), Image.Resampling.BILINEAR)
        return {"image": np.asarray(photo)} | resized


def resize_nearest(array: NDArray, size: int) -> NDArray:
    """(H, W, ...) of any dtype -> (size, size, ...): the pixels under the new pixels' centres, as Pillow does."""
    rows, columns = (centres(length, size) for length in array.shape[:2])
    return array[rows[:, None], columns]


def centres(length: int, size: int) -> NDArray[np.int64]:
    """Indices, among ``length`` pixels, of those under the centres of ``size`` pixels."""
    step = length / size
    # A running sum as in Pillow: where a centre falls between two pixels, the sum's rounding decides.
    return np.cumsum([step / 2] + [step] * (size - 1)).astype(np.int64)


def derive_edges(sample: Sample, rng: np.random.Generator) -> Sample:
    """Replaces the resized LabelMap, which is stored as "edge" so far, by its edges."""
    return sample | {"edge": edges_from_label_map(sample["edge"])} if "edge" in sample else sample


class Mini(Protocol):
    """Edges are derived from the resized LabelMap, so that they stay one pixel wide. They are flipped afterwards, since
    thinning is not symmetric."""

    name, own_size = "mini", 224
    edges_at_input = True

    @property
    def resolution(self) -> str:
        return f"{self.size} x {self.size}"

    @property
    def train(self) -> tuple[Step, ...]:
        return ShrinkTo(self.size), derive_edges, random_flip, finish_labels

    @property
    def val(self) -> tuple[Step, ...]:
        return ShrinkTo(self.size), derive_edges, finish_labels

    @property
    def scored(self) -> tuple[Step, ...]:
        return self.val

    def fit_photo(self, photo: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Window]:
        image = ShrinkTo(self.size)({"image": photo}, np.random.default_rng())["image"]
        return image, (slice(0, self.size), slice(0, self.size))

    def align(self, task: str, postprocessed: Tensor, shape: Shape) -> AlignedPrediction:
        picture = TASKS[task].to_picture(TASKS[task].to_levels(postprocessed), rounded=True)
        return AlignedPrediction(postprocessed, picture)

    def to_label_grid(self, task: str, picture: Picture, shape: Shape) -> Picture:
        square = picture.shape[:2] == (self.size, self.size)
        return picture if square else resize_nearest(picture, self.size)


class Rendered(Mini):
    """For scenes, which are rendered with their labels at the model's size. A photo to predict is processed as in
    ``mini``."""

    name, own_size, dataset = "scenes", 64, "scenes"

    @property
    def reported(self) -> str:
        return self.name
