"""Family A (ASTMT, MTI-Net, M3ViT; MTLoRA at 448): flip, rotate and scale, stretch to the input.

Predictions are scored at the photo's size and in 8 bits, like the field's files: levels are stretched to the photo's
size, then truncated to 8 bits. Labels stay as they are stored.
"""

from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from train.protocols.base import (
    UINT8_NOTE,
    AlignedPrediction,
    Protocol,
    Sample,
    Step,
    Window,
    change_labels,
    finish_labels,
    random_flip,
)
from train.tasks import TASKS, Picture, Shape

OPENCV_NOTE = (
    "OpenCV 5 warps with exact positions, OpenCV 4 rounds them to 1/32 of a pixel: they differ by up to a few grey "
    "levels at sharp contrasts"
)
MTINET_NOTES = (
    UINT8_NOTE,
    "cubic overshoot is clipped to 0..255 and rounded; the field's cast to uint8 wraps it around, -3 to 253",
    "normals are void where nearest interpolation finds void; there the field normalises the vectors of arbitrary "
    "direction that cubic interpolation leaves",
    OPENCV_NOTE,
)
ASE_NOTES = (
    *MTINET_NOTES,
    "the paper gives 224 x 224 pixels and family A's mIoU of saliency, but no transforms: family A's are assumed",
)


@dataclass(frozen=True)
class ScaleAndRotate:
    """Rotates by up to ``degrees`` either way and scales as :func:`warp` does.

    Draws the angle, positive counter-clockwise, then the scale, both uniform.
    """

    degrees: float = 20
    scales: tuple[float, float] = (0.75, 1.25)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        angle = rng.uniform(-self.degrees, self.degrees)
        return warp(sample, angle, rng.uniform(*self.scales))


def warp(sample: Sample, angle: float, scale: float) -> Sample:
    """Rotates by ``angle`` degrees and scales about the centre (W / 2, H / 2); the size stays (H, W).

    Pixels from outside the image are 0: black, and in labels background rather than void. The image is interpolated
    cubically and stays float32, with overshoots beyond 0..255.
    """
    height, width = sample["image"].shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
    rotation = matrix[:, :2] / scale

    def move(array: NDArray, interpolation: int) -> NDArray:
        return cv2.warpAffine(array, matrix, (width, height), flags=interpolation)

    def turn(task: str, label: NDArray) -> NDArray:
        moved = TASKS[task].resample(label, move)
        return TASKS[task].rescale(TASKS[task].rotate(moved, rotation), scale)

    return {"image": move(sample["image"].astype(np.float32), cv2.INTER_CUBIC)} | change_labels(sample, turn)


@dataclass(frozen=True)
class StretchTo:
    """Resizes to ``shape`` whatever the aspect ratio: image cubic, not antialiased, labels as tasks define."""

    shape: Shape

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        def move(array: NDArray, interpolation: int) -> NDArray:
            return cv2.resize(array, self.shape[::-1], interpolation=interpolation)

        image = move(sample["image"].astype(np.float32), cv2.INTER_CUBIC)
        labels = change_labels(sample, lambda task, label: TASKS[task].resample(label, move))
        return {"image": np.rint(image.clip(0, 255)).astype(np.uint8)} | labels


class FamilyA(Protocol):
    name, own_size = "mtinet", 512
    published = "A"
    notes: ClassVar[tuple[str, ...]] = MTINET_NOTES

    @property
    def train(self) -> tuple[Step, ...]:
        return random_flip, ScaleAndRotate(), *self.val

    @property
    def val(self) -> tuple[Step, ...]:
        return StretchTo(self.shape), finish_labels

    def fit_photo(self, photo: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Window]:
        image = StretchTo(self.shape)({"image": photo}, np.random.default_rng())["image"]
        return image, (slice(0, self.shape[0]), slice(0, self.shape[1]))

    def align(self, task: str, postprocessed: Tensor, shape: Shape) -> AlignedPrediction:
        levels = stretch(task, TASKS[task].to_levels(postprocessed), shape)
        picture = TASKS[task].to_picture(levels, rounded=False)
        return AlignedPrediction(TASKS[task].from_picture(picture), picture)

    def to_label_grid(self, task: str, picture: Picture, shape: Shape) -> Picture:
        return picture if picture.shape[:2] == shape else stretch(task, picture, shape)


class ASE(FamilyA):
    """Family A at the size of Adaptive Shared Experts, arXiv 2510.00570, whose paper leaves the transforms open."""

    name, own_size = "ase", 224
    published = "ASE"
    notes = ASE_NOTES


def stretch(task: str, levels: NDArray, shape: Shape) -> NDArray:
    """Levels or a picture at ``shape``, by the interpolation of the field's INFER_FLAGVALS."""
    return cv2.resize(levels, shape[::-1], interpolation=TASKS[task].stretching)
