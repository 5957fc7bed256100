"""Transforms of a sample, each one step: ``step(sample, rng) -> sample``. A protocol lines them up.

Until its last step a sample has the layout in which OpenCV works: "image" uint8 (H, W, 3) RGB, and of "seg", "parts",
"sal", "edge" uint8 (H, W) and "normals" float32 (H, W, 3) those that there are. :func:`unit_normals` turns it into the
arrays of :mod:`train.tasks.names`. No step changes the arrays that it is given.

A step draws from ``rng`` alone, in the order that its docstring gives, and draws the same whichever labels the sample
has. The one exception is RandomCrop, which draws again where "seg" tells it to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kernels.errors import UserError
from train.tasks.edges import edges_from_label_map
from train.tasks.names import VOID

Sample = dict[str, NDArray]
Step = Callable[[Sample, np.random.Generator], Sample]

# The images of a batch are shared among processes already; threads of OpenCV in each would fight for the same cores.
cv2.setNumThreads(0)

MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean in uint8: nearly 0 once the model has normalised the image
MAX_RETRIES = 10
HUES = 180  # OpenCV's uint8 hue counts in steps of 2 degrees


# Every protocol


def random_flip(sample: Sample, rng: np.random.Generator) -> Sample:
    """Draws one number; below 1/2 the sample is mirrored left to right."""
    return flip(sample) if rng.random() < 0.5 else sample


def flip(sample: Sample) -> Sample:
    """The mirror image: a mirrored normal points to the other side in x."""
    mirrored = {name: np.ascontiguousarray(array[:, ::-1]) for name, array in sample.items()}
    if "normals" in mirrored:
        mirrored["normals"] *= np.array([-1, 1, 1], np.float32)
    return mirrored


def void_absent_parts(sample: Sample, rng: np.random.Generator) -> Sample:
    """Parts are void altogether where no pixel shows one, only background or void.

    Family A asks for background alone, which is the same there: the files of parts know no void.
    """
    if "parts" not in sample or not np.isin(sample["parts"], (0, VOID)).all():
        return sample
    return sample | {"parts": np.full_like(sample["parts"], VOID)}


def unit_normals(sample: Sample, rng: np.random.Generator) -> Sample:
    """Last step. Normals (H, W, 3) of any length -> (3, H, W) of length 1, except that (0, 0, 0) stays void."""
    if "normals" not in sample:
        return sample
    vectors = np.ascontiguousarray(sample["normals"].transpose(2, 0, 1))
    lengths = np.linalg.norm(vectors, axis=0)
    return sample | {"normals": vectors / np.where(lengths > 0, lengths, 1)}


# Family A: ASTMT, MTI-Net


@dataclass(frozen=True)
class ScaleAndRotate:
    """Turns by up to ``degrees`` either way and scales about the centre (W / 2, H / 2), in a frame that stays (H, W).

    Draws the angle, positive counter-clockwise, then the scale, both uniform. What comes in from outside is 0: black,
    and for labels background rather than void. Image and normals are cubic, the image left as float32 with what
    overshoots 0..255; labels are nearest.
    """

    degrees: float = 20
    scales: tuple[float, float] = (0.75, 1.25)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        angle, scale = rng.uniform(-self.degrees, self.degrees), rng.uniform(*self.scales)
        height, width = sample["image"].shape[:2]
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
        warped = _resample(sample, lambda array, flag: cv2.warpAffine(array, matrix, (width, height), flags=flag))
        if "normals" in warped:
            # The matrix without its scale turns points (x right, y down), and normals as the field takes them alike.
            in_plane = warped["normals"][..., :2] @ (matrix[:, :2].T / scale).astype(np.float32)
            warped["normals"] = np.concatenate([in_plane, warped["normals"][..., 2:]], axis=-1)
        return warped


@dataclass(frozen=True)
class StretchTo:
    """Resizes to (size, size) whatever the aspect ratio: image and normals cubic, not antialiased, labels nearest."""

    size: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        side = (self.size, self.size)
        resized = _resample(sample, lambda array, flag: cv2.resize(array, side, interpolation=flag))
        return resized | {"image": np.rint(resized["image"].clip(0, 255)).astype(np.uint8)}


def _resample(sample: Sample, move: Callable[[NDArray, int], NDArray]) -> Sample:
    """``move(array, interpolation)`` of each array as family A has it: the image as float32, normals void as labels."""
    moved = {name: move(array, cv2.INTER_NEAREST) for name, array in sample.items() if name not in ("image", "normals")}
    moved["image"] = move(sample["image"].astype(np.float32), cv2.INTER_CUBIC)
    if "normals" in sample:
        valid = move(sample["normals"].any(axis=-1).astype(np.uint8), cv2.INTER_NEAREST)
        # Beside void, cubic interpolation leaves specks of arbitrary direction, which would become unit vectors.
        moved["normals"] = move(sample["normals"], cv2.INTER_CUBIC) * valid[..., None]
    return moved


# Family B: ATRC, InvPT


@dataclass(frozen=True)
class RandomScale:
    """Scales by a factor, drawn uniformly, to the whole pixels below; image bilinear, labels and normals nearest."""

    low: float = 0.5
    high: float = 2.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        factor = rng.uniform(self.low, self.high)
        height, width = sample["image"].shape[:2]
        side = (int(width * factor), int(height * factor))
        flags = dict.fromkeys(sample, cv2.INTER_NEAREST) | {"image": cv2.INTER_LINEAR}
        return {name: cv2.resize(array, side, interpolation=flags[name]) for name, array in sample.items()}


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
        return np.count_nonzero(areas) > 1 and areas.max() / areas.sum() < self.max_share


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

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample["image"].shape[:2]
        if max(height, width) > self.size:
            raise UserError(
                f"a photo of {width} x {height} pixels does not fit into {self.size} x {self.size}, and this protocol "
                f"does not shrink it: choose an image size of at least {max(height, width)}, or another protocol"
            )
        top, left = (self.size - height) // 2, (self.size - width) // 2
        return {name: self._pad(name, array, top, left) for name, array in sample.items()}

    def _pad(self, name: str, array: NDArray, top: int, left: int) -> NDArray:
        around = {"image": MEAN_COLOUR, "normals": 0}.get(name, VOID)
        canvas = np.full((self.size, self.size, *array.shape[2:]), around, array.dtype)
        canvas[top : top + array.shape[0], left : left + array.shape[1]] = array
        return canvas


# mini


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
    """Where the centres of ``size`` pixels lie among ``length`` pixels."""
    step = length / size
    # A running sum as in Pillow: where a centre falls between two pixels, the sum's rounding decides.
    return np.cumsum([step / 2] + [step] * (size - 1)).astype(np.int64)


def derive_edges(sample: Sample, rng: np.random.Generator) -> Sample:
    """ "edge" from the LabelMap that has held its place."""
    return sample | {"edge": edges_from_label_map(sample["edge"])} if "edge" in sample else sample
