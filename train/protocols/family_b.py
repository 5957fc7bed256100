"""Family B (ATRC, InvPT, TaskPrompter, MLoRE, MTMamba): scale, crop, flip, distort colours, pad; original pixels in
val.

Predictions are scored at the photo's size: their padding is cropped. Padding is void, so cropping it does not change
any score.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.errors import UserError
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
from train.tasks import TASKS, VOID, Picture, Shape

MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean in uint8: nearly 0 once the model has normalised the image
MAX_RETRIES = 10
HUES = 180  # OpenCV's uint8 hue counts in steps of 2 degrees
INVPT_NOTES: tuple[str, ...] = (
    UINT8_NOTE,
    "scaled images are rounded to grey levels; the field keeps fractions and drops them in the colour distortion",
    "padding is ImageNet's mean colour rounded to grey levels; the field pads with 0 after normalisation",
    "normals have length 1; the field lets its loss and its meter normalise them",
    "without seg a crop is drawn once; the field's code stops with a KeyError",
)


@dataclass(frozen=True)
class RandomScale:
    """Scales by a uniform random factor, with sides rounded down to pixels; image bilinear, labels nearest."""

    low: float = 0.5
    high: float = 2.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        factor = rng.uniform(self.low, self.high)
        height, width = sample["image"].shape[:2]
        side = (int(width * factor), int(height * factor))

        def scale(task: str, label: NDArray) -> NDArray:
            return TASKS[task].rescale(cv2.resize(label, side, interpolation=cv2.INTER_NEAREST), factor)

        return {"image": cv2.resize(sample["image"], side, interpolation=cv2.INTER_LINEAR)} | change_labels(
            sample, scale
        )


@dataclass(frozen=True)
class RandomCrop:
    """Crops to ``shape``; a side shorter than that is kept whole.

    Draws the top, then the left, among the positions where the crop fits. It draws again, up to 10 times, while "seg"
    shows fewer than two classes in the crop, or one class on at least ``max_share`` of its valid pixels. The last draw
    is used whatever it shows. Without "seg" the first draw is used.
    """

    shape: Shape
    max_share: float = 0.75

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        place = self._draw(sample, rng)
        if "seg" in sample:
            for _ in range(MAX_RETRIES):
                if self._is_varied(sample["seg"][place]):
                    break
                place = self._draw(sample, rng)
        return {name: array[place] for name, array in sample.items()}

    def _draw(self, sample: Sample, rng: np.random.Generator) -> tuple[slice, slice]:
        spare = [max(length - side, 0) for length, side in zip(sample["image"].shape[:2], self.shape, strict=True)]
        top, left = (int(rng.integers(length, endpoint=True)) for length in spare)
        return slice(top, top + self.shape[0]), slice(left, left + self.shape[1])

    def _is_varied(self, seg: NDArray[np.uint8]) -> bool:
        areas = np.bincount(seg.ravel(), minlength=256)[:VOID]
        return bool(np.count_nonzero(areas) > 1 and areas.max() / areas.sum() < self.max_share)


def distort_colours(sample: Sample, rng: np.random.Generator) -> Sample:
    """Brightness, contrast, saturation and hue of the image, each changed with probability 1/2.

    Draws a number for brightness, one for the position of contrast (below 1/2: before saturation and hue, else after
    them), and one for each of these three in their order. A change is made where its number is below 1/2, and its
    amount is drawn right after that number.
    """
    image = sample["image"]
    if rng.random() < 0.5:
        image = _linear(image, shift=rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    for change in (_contrast, _saturation, _hue) if contrast_first else (_saturation, _hue, _contrast):
        if rng.random() < 0.5:
            image = change(image, rng)
    return sample | {"image": image}


def _linear(values: NDArray[np.uint8], gain: float = 1, shift: float = 0) -> NDArray[np.uint8]:
    return (values.astype(np.float32) * gain + shift).clip(0, 255).astype(np.uint8)


def _contrast(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    return _linear(image, gain=rng.uniform(0.5, 1.5))


def _saturation(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = _linear(hsv[..., 1], gain=rng.uniform(0.5, 1.5))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _hue(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % HUES
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


@dataclass(frozen=True)
class PadTo:
    """Centres the sample in ``shape``, padding the image with the mean colour and labels with void.

    Where padding is odd, the top or left margin is the smaller one.
    """

    shape: Shape

    def window(self, shape: Shape) -> Window:
        """Where a photo of ``shape`` is in the padded image."""
        top, left = ((whole - side) // 2 for whole, side in zip(self.shape, shape, strict=True))
        return slice(top, top + shape[0]), slice(left, left + shape[1])

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        (height, width), (rows, columns) = sample["image"].shape[:2], self.shape
        if height > rows or width > columns:
            unit = rows // math.gcd(rows, columns)
            least = -(-max(height, width * rows / columns) // unit) * unit
            raise UserError(
                f"a photo of {width} x {height} pixels does not fit into {columns} x {rows}, and this protocol does "
                f"not shrink it: choose an image size of at least {least:.0f}, or another protocol"
            )
        labels = change_labels(sample, lambda task, label: self._pad(label, TASKS[task].void))
        return {"image": self._pad(sample["image"], MEAN_COLOUR)} | labels

    def _pad(self, array: NDArray, around: int | tuple[int, int, int]) -> NDArray:
        canvas = np.full((*self.shape, *array.shape[2:]), around, array.dtype)
        canvas[self.window(array.shape[:2])] = array
        return canvas


class FamilyB(Protocol):
    name, own_size = "invpt", 512
    published, saliency = "B", "maxF"
    needs_seg = True
    resizes_photos = False
    notes: ClassVar[tuple[str, ...]] = INVPT_NOTES

    @property
    def train(self) -> tuple[Step, ...]:
        return RandomScale(), RandomCrop(self.shape), random_flip, distort_colours, *self.val

    @property
    def val(self) -> tuple[Step, ...]:
        return PadTo(self.shape), finish_labels

    def fit_photo(self, photo: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Window]:
        """A photo larger than the input is shrunk to fit."""
        sides = np.array(photo.shape[:2])
        if (scale := min(self.shape / sides)) < 1:
            height, width = map(int, np.maximum(np.rint(scale * sides).astype(int), 1))
            photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
        pad = PadTo(self.shape)
        return pad({"image": photo}, np.random.default_rng())["image"], pad.window(photo.shape[:2])

    def align(self, task: str, postprocessed: Tensor, shape: Shape) -> AlignedPrediction:
        rows, columns = PadTo(self.shape).window(shape)
        cropped = postprocessed[..., rows, columns].contiguous()
        return AlignedPrediction(cropped, TASKS[task].to_picture(TASKS[task].to_levels(cropped), rounded=True))

    def to_label_grid(self, task: str, picture: Picture, shape: Shape) -> Picture:
        return picture if picture.shape[:2] == shape else picture[PadTo(self.shape).window(shape)]
