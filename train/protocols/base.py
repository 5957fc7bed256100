"""The interface of a protocol, and the steps that all protocols share.

A protocol defines both ends of an evaluation: how images and labels are preprocessed for the model, and how its
predictions are aligned with labels to be scored. Numbers are comparable only within one protocol.

Steps are functions ``step(sample, rng) -> sample``. Until the last step a sample has OpenCV's layout: "image" uint8
(H, W, 3) RGB, and the labels that the image has, each transformed by its :class:`train.tasks.Task`.
:func:`finish_labels` then turns labels into the arrays of :mod:`train.tasks`. No step changes its input arrays.

A step draws random numbers from ``rng`` alone, in the order that its docstring gives. What it draws does not depend on
the labels of the sample. The one exception is RandomCrop, which may draw again because of "seg".
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.errors import UserError
from train.tasks import TASKS, Picture, Shape

Sample = dict[str, NDArray]
Step = Callable[[Sample, np.random.Generator], Sample]
Window = tuple[slice, slice]  # rows, columns

PHOTO_SIZE = "the photo's size"
UINT8_NOTE = "images are uint8 up to the model, which normalises them; the field normalises in its transforms"

# Several processes already prepare batches; OpenCV threads in each of them would compete for the same cores.
cv2.setNumThreads(0)


class AlignedPrediction(NamedTuple):
    """One image's prediction of one task on the grid of its label: the values that metrics count, and its picture.

    mtinet, nyud_mtinet and ase score predictions as files store them; the others score raw ones, except odsF.
    """

    postprocessed: Tensor
    picture: Picture


@dataclass(frozen=True)
class Protocol(ABC):
    """``size`` is the height of the model's input, ``shape`` its height and width. With ``scoring``, no split is
    augmented, and labels are on the grid on which predictions are scored.

    With ``edges_at_input``, "edge" enters as the LabelMap (H, W). With ``needs_seg``, training needs "seg" to guide the
    crop, even where it is not a task. ``notes`` list the differences from the field's code.
    """

    size: int
    scoring: bool = False

    name: ClassVar[str]
    own_size: ClassVar[int]
    aspect: ClassVar[tuple[int, int]] = (1, 1)  # of the input: height to width
    dataset: ClassVar[str] = "PASCAL_MT"  # the data set of its published numbers; it takes the images of any
    published: ClassVar[str] = ""  # the protocol of the published rows that are comparable, on that data set
    saliency: ClassVar[str] = "mIoU"  # the score of saliency in published tables
    edges_at_input: ClassVar[bool] = False
    needs_seg: ClassVar[bool] = False
    resizes_photos: ClassVar[bool] = True  # whether it resizes photos to its input
    notes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        rows, columns = self.aspect
        if self.size * columns % rows:
            raise UserError(
                f"{self.size} is no height of protocol {self.name}, whose images are {rows}:{columns}: choose a "
                f"multiple of {rows} as --image-size"
            )

    @property
    def shape(self) -> Shape:
        """(height, width) of the model's input."""
        rows, columns = self.aspect
        return self.size, self.size * columns // rows

    @property
    def reported(self) -> str:
        """The name under which results are reported: "invpt", or "invpt@256" at another size than its default."""
        return self.name if self.size == self.own_size else f"{self.name}@{self.size}"

    @property
    def resolution(self) -> str:
        """The resolution of scoring, in words. Results at different resolutions cannot be compared."""
        return PHOTO_SIZE

    @property
    @abstractmethod
    def train(self) -> tuple[Step, ...]:
        """The steps of a training sample."""

    @property
    @abstractmethod
    def val(self) -> tuple[Step, ...]:
        """The steps of a validation sample."""

    @property
    def scored(self) -> tuple[Step, ...]:
        """The steps of a sample to be scored. By default labels keep the photo's size and predictions are resized."""
        first, *rest = self.val
        return OnlyImage(first), *rest

    def for_scoring(self) -> "Protocol":
        return replace(self, scoring=True)

    def apply(self, sample: Sample, training: bool, rng: np.random.Generator) -> Sample:
        """Raw arrays -> "image" uint8 (*shape, 3) and labels as in :mod:`train.tasks`."""
        steps = self.scored if self.scoring else self.train if training else self.val
        return reduce(lambda arrays, step: step(arrays, rng), steps, sample)

    @abstractmethod
    def fit_photo(self, photo: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Window]:
        """(the model's input for a photo of any size, the window of that input which the photo covers)."""

    @abstractmethod
    def align(self, task: str, postprocessed: Tensor, shape: Shape) -> AlignedPrediction:
        """A prediction (..., *self.shape), without its batch axis, on the label's grid for a photo of ``shape``."""

    @abstractmethod
    def to_label_grid(self, task: str, picture: Picture, shape: Shape) -> Picture:
        """A picture of the photo's ``shape`` or of ``self.shape``, resized or cropped to the label's grid."""


@dataclass(frozen=True)
class OnlyImage:
    """Applies ``step`` to the image and leaves the labels as they are."""

    step: Step

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample | self.step({"image": sample["image"]}, rng)


def change_labels(sample: Sample, change: Callable[[str, NDArray], NDArray]) -> Sample:
    """{task: change(task, label)} of a sample's labels, without the image."""
    return {name: change(name, array) for name, array in sample.items() if name != "image"}


def random_flip(sample: Sample, rng: np.random.Generator) -> Sample:
    """Draws one number; below 1/2 the sample is mirrored left to right."""
    return flip(sample) if rng.random() < 0.5 else sample


def flip(sample: Sample) -> Sample:
    """The mirror image."""
    mirrored = np.ascontiguousarray(sample["image"][:, ::-1])
    return {"image": mirrored} | change_labels(sample, lambda task, label: TASKS[task].flip(label))


def finish_labels(sample: Sample, rng: np.random.Generator) -> Sample:
    """The last step: labels as in :mod:`train.tasks`."""
    return sample | change_labels(sample, lambda task, label: TASKS[task].finish(label))
