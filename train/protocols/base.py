"""What every protocol is, and the steps that all of them share.

A protocol is one object that owns both ends of an evaluation: what an image and its labels go through on their way to
the model, and how the model's predictions meet labels afterwards. Numbers are comparable only within one protocol.

Steps are functions ``step(sample, rng) -> sample``. Until its last step a sample has the layout in which OpenCV works:
"image" uint8 (H, W, 3) RGB, and of the tasks' labels those that there are, as :class:`train.tasks.Task` transforms
them. :func:`finish_labels` turns them into the arrays of :mod:`train.tasks`. No step changes the arrays that it is
given.

A step draws from ``rng`` alone, in the order that its docstring gives, and draws the same whichever labels the sample
has. The one exception is RandomCrop, which draws again where "seg" tells it to.
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

from train.tasks import TASKS, Picture, Shape

Sample = dict[str, NDArray]
Step = Callable[[Sample, np.random.Generator], Sample]
Window = tuple[slice, slice]  # rows, columns

PHOTO_SIZE = "the photo's size"
UINT8_NOTE = "images are uint8 up to the model, which normalises them; the field normalises in its transforms"

# The images of a batch are shared among processes already; threads of OpenCV in each would fight for the same cores.
cv2.setNumThreads(0)


class AlignedPrediction(NamedTuple):
    """One image's prediction of one task where it meets its label: what metrics count, and its picture."""

    postprocessed: Tensor
    picture: Picture


@dataclass(frozen=True)
class Protocol(ABC):
    """``size`` is the side of the model's square input. With ``scoring``, samples of every split are not augmented, and
    their labels are those that predictions meet.

    With ``edges_at_input``, "edge" enters as the LabelMap (H, W). With ``needs_seg``, training wants "seg" even where
    it is no task, to guide the crop. ``notes`` are where ours differs from the field's code, and why.
    """

    size: int
    scoring: bool = False

    name: ClassVar[str]
    own_size: ClassVar[int]
    published: ClassVar[str] = ""  # the protocol of published rows that these scores may stand beside
    saliency: ClassVar[str] = "mIoU"  # the score of saliency in its tables
    edges_at_input: ClassVar[bool] = False
    needs_seg: ClassVar[bool] = False
    resizes_photos: ClassVar[bool] = True  # whether any photo fits into any size
    notes: ClassVar[tuple[str, ...]] = ()

    @property
    def reported(self) -> str:
        """The name under which results are reported: "invpt", or "invpt@256" at a size that is not its own."""
        return self.name if self.size == self.own_size else f"{self.name}@{self.size}"

    @property
    def resolution(self) -> str:
        """Where predictions meet labels, in words; results that differ in it cannot be compared."""
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
        """The steps of a sample to be scored: the labels stay as they are where predictions come to the photo's
        size."""
        first, *rest = self.val
        return OnlyImage(first), *rest

    def for_scoring(self) -> "Protocol":
        return replace(self, scoring=True)

    def apply(self, sample: Sample, training: bool, rng: np.random.Generator) -> Sample:
        """Raw arrays -> "image" uint8 (size, size, 3) and labels as in :mod:`train.tasks`."""
        steps = self.scored if self.scoring else self.train if training else self.val
        return reduce(lambda arrays, step: step(arrays, rng), steps, sample)

    @abstractmethod
    def fit_photo(self, photo: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Window]:
        """(a photo of any size as the model gets it, where in that input the photo is)."""

    @abstractmethod
    def align(self, task: str, postprocessed: Tensor, shape: Shape) -> AlignedPrediction:
        """A prediction (..., size, size), without its batch axis, where it meets the label of a photo of ``shape``."""

    @abstractmethod
    def to_label_grid(self, task: str, picture: Picture, shape: Shape) -> Picture:
        """A picture of the photo's ``shape`` or of (size, size), brought to where it meets its label."""


@dataclass(frozen=True)
class OnlyImage:
    """A step that leaves the labels as they are."""

    step: Step

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample | self.step({"image": sample["image"]}, rng)


def change_labels(sample: Sample, change: Callable[[str, NDArray], NDArray]) -> Sample:
    """The labels, ``change(task, label)`` each, without the image."""
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
