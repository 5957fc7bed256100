"""What every task has in common: the interface that the rest of train/ uses, and its defaults.

A task is one object in one file of train/tasks/. It owns its label (type, void, geometry), its loss, its scores, its
files and its colours. Nothing outside train/tasks/ asks for the name of a task to decide what to do with its arrays.

While transforms act on it, a label has the layout of OpenCV: (H, W), or (H, W, 3) for vectors. :meth:`Task.finish`
turns it into what losses and metrics get. A *picture* is a prediction as a file stores it, (H, W) or (H, W, 3), of 8 or
16 bits. Between a prediction and its picture lie the *levels*, the same values before they are rounded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.metrics.base import Metric
from train.metrics.constant import Constant

VOID = 255  # the value of ignored pixels in an integer label
STRIP = 2**20  # numbers of a photo's size that are processed at a time
GREY = np.array([160, 160, 160], dtype=np.uint8)  # the colour of void

Label = NDArray
Picture = NDArray[np.uint8] | NDArray[np.uint16]
Shape = tuple[int, int]  # height, width


class Headline(NamedTuple):
    """A score that reports show: its key in ``Metric.compute()``, which way is better, and its unit.

    One that is a ``variant_of`` another key is shown only where their values differ.
    """

    key: str
    higher_is_better: bool
    unit: str
    variant_of: str = ""


class Task(ABC):
    """One dense prediction task. ``classes``, where a method takes them, names its classes in the data set, if any."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    channels: ClassVar[int]  # of its head; tasks whose classes depend on the data set override head_channels()
    weight: ClassVar[float]  # of its loss in the sum over tasks
    metric_type: ClassVar[type[Metric]]
    constant_type: ClassVar[type[Constant]]
    headlines: ClassVar[tuple[Headline, ...]]
    delta_key: ClassVar[str]  # the score that enters Delta_m; a protocol may name another for saliency
    folder: ClassVar[str]  # of prediction files: <folder>/<id>.png
    modes: ClassVar[tuple[str, ...]]  # Pillow's modes that such a file may have
    content: ClassVar[str]  # what the values of such a file mean, for people
    label_type: ClassVar[tuple[type, tuple[int, ...]]] = (np.uint8, ())  # finished: dtype and the axes before (H, W)
    values: ClassVar[tuple[str, ...]]  # names of the values that label_values() returns
    palette: ClassVar[NDArray[np.uint8] | None] = None  # (256, 3), which colours a file of class ids
    void: ClassVar[int] = VOID  # the value that pads a label
    stretching: ClassVar[int] = cv2.INTER_LINEAR  # OpenCV's interpolation of levels that family A resizes

    def head_channels(self, classes: Sequence[str]) -> int:
        return self.channels

    # The label under transforms: NumPy, OpenCV's layout

    def resample(self, label: Label, move: Callable[[Label, int], Label]) -> Label:
        """The label under ``move(array, interpolation)``, a warp or a resize of family A."""
        return move(label, cv2.INTER_NEAREST)

    def flip(self, label: Label) -> Label:
        """The label of the image mirrored left to right."""
        return np.ascontiguousarray(label[:, ::-1])

    def rotate(self, label: Label, rotation: NDArray[np.float64]) -> Label:
        """The label with its values adjusted to an in-plane rotation, after its pixels were moved. ``rotation`` (2, 2)
        maps offsets (x right, y down)."""
        return label

    def rescale(self, label: Label, factor: float) -> Label:
        """The label with its values adjusted to an image enlarged by ``factor``, as if the camera had come nearer."""
        return label

    def finish(self, label: Label) -> Label:
        """The last step of every protocol: the label as losses and metrics get it."""
        return label

    def label_values(self, label: Label) -> Label:
        """A raw label as integers to count: indices of ``value_names``, or VOID."""
        return label

    def value_names(self, classes: Sequence[str]) -> Sequence[str]:
        return self.values

    # Learning and scores

    @staticmethod
    @abstractmethod
    def totals(label: Tensor, /) -> Tensor:
        """What the loss divides by or weighs with: numbers counted over collated labels, int64 (k,). Those of two sets
        of labels add up. The host does not wait for the device."""

    @staticmethod
    @abstractmethod
    def loss(prediction: Tensor, label: Tensor, totals: Tensor | None = None, /) -> Tensor:
        """Of raw output (n, C, H, W) and collated labels, a scalar, at least float32: the sum over valid pixels /
        max(#valid, 1). Without valid pixels it is 0 with zero gradients. The host does not wait for the device.

        ``totals`` are those of a larger batch that these images belong to: then it is their share of its loss."""

    def metric(self, classes: Sequence[str]) -> Metric:
        """A fresh accumulator of the task's scores."""
        return self.metric_type()

    def constant(self, classes: Sequence[str]) -> Constant:
        """The best prediction that ignores the image, not yet fitted."""
        return self.constant_type()

    def postprocess(self, prediction: Tensor) -> Tensor:
        """Raw output (n, C, H, W) -> what metrics count: class ids, probabilities, unit vectors or logits."""
        return self.metric_type.postprocess(prediction)

    # The mean of several predictions

    def soft_label(self, prediction: Tensor) -> Tensor:
        """Raw output (n, C, H, W) -> (n, K, H, W) in the terms of the label, of which a mean makes sense:
        probabilities, unit vectors or metres. :meth:`flip` and :meth:`rescale` take it as (H, W, K). By default the
        raw output."""
        return prediction

    def from_soft_label(self, soft: Tensor) -> Tensor:
        """The raw output whose soft label it is."""
        return soft

    # Files

    @abstractmethod
    def to_levels(self, postprocessed: Tensor) -> NDArray:
        """The levels of one image's prediction, without its batch axis."""

    def to_picture(self, levels: NDArray, rounded: bool) -> Picture:
        """``levels`` as the file stores them: truncated, as in the field, or ``rounded``, which is closer."""
        return (levels + 0.5 if rounded else levels).clip(0, 255).astype(np.uint8)

    @abstractmethod
    def from_picture(self, picture: Picture) -> Tensor:
        """The postprocessed prediction that a file holds, without a batch axis."""

    def check_picture(self, path: Path, picture: Picture, classes: Sequence[str]) -> None:
        """UserError where the file at ``path`` holds an invalid value; by default all are valid."""
        return

    def at_photo(self, output: NDArray[np.float32], shape: Shape) -> Picture:
        """The picture of a raw output (C, h, w) at the photo's ``shape``. The output is resized before it is
        postprocessed, so that borders are smooth."""
        resized = np.stack([resize_channel(channel, shape) for channel in output], axis=1)  # rows first
        return by_rows(self._picture_of_rows, resized)

    def _picture_of_rows(self, output: NDArray[np.float32]) -> Picture:
        """The picture of some rows of a resized output, (rows, C, W)."""
        postprocessed = self.postprocess(torch.from_numpy(output).movedim(1, 0)[None])[0]
        return self.to_picture(self.to_levels(postprocessed), rounded=True)

    # Colours: (H, W, 3) uint8

    @abstractmethod
    def paint_label(self, label: NDArray) -> NDArray[np.uint8]:
        """A finished label; void is GREY."""

    @abstractmethod
    def paint_prediction(self, prediction: Tensor) -> NDArray[np.uint8]:
        """A raw output (C, H, W) on the CPU, float32."""

    @abstractmethod
    def overlay(self, photo: NDArray[np.uint8], picture: Picture) -> NDArray[np.uint8]:
        """A prediction over its photo."""


def by_rows(paint: Callable[..., NDArray], *arrays: NDArray) -> NDArray:
    """``paint(*arrays)``, computed for some rows of the arrays at a time, so that it needs little memory beside its
    result, whatever the size of a photo."""
    rows = max(1, STRIP * len(arrays[0]) // arrays[0].size)
    tops = range(0, len(arrays[0]), rows)
    return np.concatenate([paint(*(array[top : top + rows] for array in arrays)) for top in tops])


def log_probability(probability: Tensor) -> Tensor:
    """Finite also where a probability has underflown to 0."""
    return probability.clamp(min=torch.finfo(probability.dtype).tiny).log()


def count_valid(valid: Tensor) -> Tensor:
    """:meth:`Task.totals` of a loss that is a mean over the valid pixels."""
    return valid.sum()[None]


def over_valid(per_pixel: Tensor, valid: Tensor) -> Tensor:
    """The sum of ``per_pixel`` / max(``valid``, 1), the number of valid pixels."""
    return per_pixel.sum() / valid.clamp(min=1)


def at_least_fp32(prediction: Tensor) -> Tensor:
    """The type in which losses are computed."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def resize_channel(channel: NDArray[np.float32], shape: Shape) -> NDArray[np.float32]:
    """(h, w) -> ``shape``, bilinear."""
    return cv2.resize(channel, shape[::-1], interpolation=cv2.INTER_LINEAR)


def paint_probability(probability: Tensor) -> NDArray[np.uint8]:
    """(H, W) in 0..1 as grey."""
    return np.repeat((255 * probability).round().byte().numpy()[..., None], 3, axis=-1)


def paint_binary(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """1 in white, 0 in black, void in GREY."""
    picture = np.repeat(255 * (label == 1)[..., None].astype(np.uint8), 3, axis=-1)
    return np.where((label == VOID)[..., None], GREY, picture)
