"""Family B (ATRC, InvPT, TaskPrompter, MLoRE, MTMamba): scale, crop, flip, distort colours, pad; original pixels in
val.

Predictions meet labels at the photo's size: their padding is cut off. Padding is void, so cutting it off changes no
score.
"""

from dataclasses import dataclass

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
INVPT_NOTES = (
    UINT8_NOTE,
    "scaled images are rounded to grey levels; the field keeps fractions and drops them in the colour distortion",
    "padding is ImageNet's mean colour rounded to grey levels; the field pads with 0 after normalisation",
    "normals have length 1; the field lets its loss and its meter normalise them",
    "without seg a crop is drawn once; the field's code stops with a KeyError",
)


@dataclass(frozen=True)
class RandomScale:
    """Scales by a factor, drawn uniformly, to the whole pixels below; image bilinear, labels nearest."""

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
    """Cuts out (size, size), or less along a side that is shorter: the whole of it.

    Draws the top, then the left, among the places where the crop fits. A place is drawn anew, up to 10 times, while
    "seg" shows fewer than two classes there, or one class on ``max_share`` of the pixels that are not void or more.
    The last place counts whatever it shows, and the first where there is no "seg".
    """

    size: int
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
        spare = [max(length - self.size, 0) for length in sample["image"].shape[:2]]
        top, left = (int(rng.integers(length, endpoint=True)) for length in spare)
        return slice(top, top + self.size), slice(left, left + self.size)

    def _is_varied(self, seg: NDArray[np.uint8]) -> bool:
        areas = np.bincount(seg.ravel(), minlength=256)[:VOID]
        return bool(np.count_nonzero(areas) > 1 and areas.max() / areas.sum() < self.max_share)


def distort_colours(sample: Sample, rng: np.random.Generator) -> Sample:
    """Brightness, contrast, saturation and hue of the image, each changed with probability 1/2.

    Draws a coin for brightness, a coin for the place of contrast, before or after the two others, and a coin for each
    of the three in their order. Where a coin falls for a change (below 1/2), its amount is drawn right after it.
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
    """Centres the sample on (size, size), of odd margins the smaller one first; around it the mean colour and void."""

    size: int

    def window(self, shape: Shape) -> Window:
        """Where a photo of ``shape`` is in the padded square."""
        top, left = ((self.size - side) // 2 for side in shape)
        return slice(top, top + shape[0]), slice(left, left + shape[1])

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample["image"].shape[:2]
        if max(height, width) > self.size:
            raise UserError(
                f"a photo of {width} x {height} pixels does not fit into {self.size} x {self.size}, and this protocol "
                f"does not shrink it: choose an image size of at least {max(height, width)}, or another protocol"
            )
        labels = change_labels(sample, lambda task, label: self._pad(label, TASKS[task].void))
        return {"image": self._pad(sample["image"], MEAN_COLOUR)} | labels

    def _pad(self, array: NDArray, around: int | tuple[int, int, int]) -> NDArray:
        canvas = np.full((self.size, self.size, *array.shape[2:]), around, array.dtype)
        canvas[self.window(array.shape[:2])] = array
        return canvas


class FamilyB(Protocol):
    name, own_size = "invpt", 512
    published, saliency = "B", "maxF"
    needs_seg = True
    resizes_photos = False
    notes = INVPT_NOTES

    @property
    def train(self) -> tuple[Step, ...]:
        return RandomScale(), RandomCrop(self.size), random_flip, distort_colours, *self.val

    @property
    def val(self) -> tuple[Step, ...]:
        return PadTo(self.size), finish_labels

    def fit_photo(self, photo: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Window]:
        """A photo larger than the input is shrunk to fit."""
        sides = np.array(photo.shape[:2])
        if (scale := self.size / sides.max()) < 1:
            height, width = map(int, np.maximum(np.rint(scale * sides).astype(int), 1))
            photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
        pad = PadTo(self.size)
        return pad({"image": photo}, np.random.default_rng())["image"], pad.window(photo.shape[:2])

    def align(self, task: str, postprocessed: Tensor, shape: Shape) -> AlignedPrediction:
        rows, columns = PadTo(self.size).window(shape)
        cropped = postprocessed[..., rows, columns].contiguous()
        return AlignedPrediction(cropped, TASKS[task].to_picture(TASKS[task].to_levels(cropped), rounded=True))

    def to_label_grid(self, task: str, picture: Picture, shape: Shape) -> Picture:
        return picture if picture.shape[:2] == shape else picture[PadTo(self.size).window(shape)]
