"""Family A (ASTMT, MTI-Net, M3ViT; MTLoRA at 448): flip, turn and scale, stretch to a square.

Predictions meet labels at the photo's size, as the field's 8-bit files: levels are stretched to the photo, then cut off
to 8 bits. Labels are untouched there.
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

OPENCV_NOTE = "OpenCV 5 warps to exact places, OpenCV 4 to 1/32 of a pixel: up to a few grey levels at sharp contrasts"
MTINET_NOTES = (
    UINT8_NOTE,
    "cubic overshoot is clipped to 0..255 and rounded; the field's cast to uint8 wraps it around, -3 to 253",
    "normals are void where nearest interpolation finds void; the field scales what cubic interpolation leaves there, "
    "vectors of arbitrary direction, to length 1",
    OPENCV_NOTE,
)
ASE_NOTES = (
    *MTINET_NOTES,
    "the paper gives 224 x 224 pixels and family A's mIoU of saliency, but no transforms: family A's are assumed",
)


@dataclass(frozen=True)
class ScaleAndRotate:
    """Turns by up to ``degrees`` either way and scales about the centre (W / 2, H / 2), in a frame that stays (H, W).

    Draws the angle, positive counter-clockwise, then the scale, both uniform. What comes in from outside is 0: black,
    and for labels background rather than void. The image is cubic, left as float32 with what overshoots 0..255.
    """

    degrees: float = 20
    scales: tuple[float, float] = (0.75, 1.25)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        angle, scale = rng.uniform(-self.degrees, self.degrees), rng.uniform(*self.scales)
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
    """Resizes to (size, size) whatever the aspect ratio: the image cubic, not antialiased, labels as their tasks do."""

    size: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        def move(array: NDArray, interpolation: int) -> NDArray:
            return cv2.resize(array, (self.size, self.size), interpolation=interpolation)

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
        return StretchTo(self.size), finish_labels

    def fit_photo(self, photo: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Window]:
        image = StretchTo(self.size)({"image": photo}, np.random.default_rng())["image"]
        return image, (slice(0, self.size), slice(0, self.size))

    def align(self, task: str, postprocessed: Tensor, shape: Shape) -> AlignedPrediction:
        levels = stretch(task, TASKS[task].to_levels(postprocessed), shape)
        picture = TASKS[task].to_picture(levels, rounded=False)
        return AlignedPrediction(TASKS[task].from_picture(picture), picture)

    def to_label_grid(self, task: str, picture: Picture, shape: Shape) -> Picture:
        return picture if picture.shape[:2] == shape else stretch(task, picture, shape)


class ASE(FamilyA):
    """Family A at the size of Adaptive Shared Experts, arXiv 2510.00570, for what the paper leaves open."""

    name, own_size = "ase", 224
    published = "ASE"
    notes = ASE_NOTES


def stretch(task: str, levels: NDArray, shape: Shape) -> NDArray:
    """Levels or a picture at ``shape``, by the interpolation of the field's INFER_FLAGVALS."""
    return cv2.resize(levels, shape[::-1], interpolation=TASKS[task].stretching)
