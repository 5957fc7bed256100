"""What the tasks with a class per pixel share: segmentation and human parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels.errors import UserError
from train.metrics.base import Metric, histogram
from train.metrics.constant import Constant, LabelCounts
from train.tasks.base import (
    GREY,
    VOID,
    Headline,
    Picture,
    Shape,
    Task,
    at_least_fp32,
    by_rows,
    count_valid,
    log_probability,
    over_valid,
    resize_channel,
)
from train.tasks.palette import PALETTE


def _outline(ids: Picture) -> NDArray[np.bool_]:
    """Mask (H, W) of the pixels near another class: within 1/300 of the longer side, at least one pixel."""
    reach = max(round(max(ids.shape) / 300), 1)
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    return cv2.dilate(ids, kernel) != cv2.erode(ids, kernel)


def _tint(photo: NDArray[np.uint8], ids: Picture, outline: NDArray[np.bool_]) -> NDArray[np.uint8]:
    colours = PALETTE[ids]
    tinted = np.where(outline[..., None], colours, 0.4 * photo + 0.6 * colours)
    return np.where(ids[..., None] > 0, tinted, photo).astype(np.uint8)


def class_totals(label: Tensor) -> Tensor:
    """Valid pixels."""
    return count_valid(label != VOID)


def class_loss(prediction: Tensor, label: Tensor, totals: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy, family B: sum over valid / max(#valid, 1). ``weight`` (C,) scales the pixels of each class."""
    # Not reduction="sum": on CUDA that has no deterministic implementation.
    logits = at_least_fp32(prediction)
    weight = None if weight is None else weight.to(logits.dtype)
    per_pixel = F.cross_entropy(logits, label.long(), weight, ignore_index=VOID, reduction="none")
    (valid,) = class_totals(label) if totals is None else totals
    return over_valid(per_pixel, valid)


class ConfusionIoU(Metric):
    """Mean over classes of TP / (TP + FP + FN), each counted over the valid pixels of the whole set.

    The background is a class like any other. A class that no label of the set shows is left out of ``mIoU`` (its
    false positives still count against the class that the label names) and counts as 0 in ``mIoU_field``, as the
    field's TP / max(TP + FP + FN, 1e-8) has it. The two are equal where the set shows all classes, as the whole of
    PASCAL-Context's validation set does.

    ``state`` (C, C) counts pixels by label (row) and predicted class (column).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, num_classes)

    @staticmethod
    def postprocess(prediction: Tensor) -> Tensor:
        """Logits (n, C, H, W) -> class ids int64 (n, H, W)."""
        return prediction.max(1).indices  # argmax(1) takes twice the time on a CPU

    def count(self, postprocessed: Tensor, label: Tensor) -> None:
        """``postprocessed`` class ids (n, H, W), ``label`` uint8 (n, H, W)."""
        classes = len(self.state)
        counts = histogram(label.long() * classes + postprocessed, label != VOID, classes**2)
        self.add(counts.view(classes, classes))

    def per_class(self) -> Tensor:
        """IoU in percent, float64 (C,): NaN for the classes that no label shows."""
        hits, labelled, predicted = self.state.diag(), self.state.sum(1), self.state.sum(0)
        iou = 100 * hits / (labelled + predicted - hits)
        return torch.where(labelled > 0, iou, torch.nan)

    def compute(self) -> dict[str, float | None]:
        """``mIoU`` and ``mIoU_field`` in percent."""
        iou = self.per_class()
        field = iou.nan_to_num().mean() if self.state.any() else iou.nanmean()
        return {"mIoU": iou.nanmean().item(), "mIoU_field": field.item()}


class ConstantClass(LabelCounts):
    """The most frequent class, which has the highest mIoU: a constant class c has IoU N_c / N, all others have 0."""

    def output(self) -> Tensor:
        """Logits."""
        return F.one_hot(self.state.argmax(), len(self.state)).float()


class ClassTask(Task):
    """Labels uint8 (H, W) of class ids, 255 void; a head gives logits (n, classes, H, W)."""

    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline("mIoU", True, "%"),
        Headline("mIoU_field", True, "%", variant_of="mIoU"),
    )
    delta_key = "mIoU"
    modes = ("L", "P")
    content = "class ids, 8 bits"
    palette = PALETTE
    stretching = cv2.INTER_NEAREST
    totals = staticmethod(class_totals)
    metric_type: ClassVar[type[Metric]] = ConfusionIoU
    constant_type = ConstantClass

    @staticmethod
    def loss(prediction: Tensor, label: Tensor, totals: Tensor | None = None, /) -> Tensor:
        return class_loss(prediction, label, totals)

    def head_channels(self, classes: Sequence[str]) -> int:
        return len(classes)

    def metric(self, classes: Sequence[str]) -> Metric:
        return ConfusionIoU(len(classes))

    def constant(self, classes: Sequence[str]) -> Constant:
        return ConstantClass(len(classes))

    def value_names(self, classes: Sequence[str]) -> Sequence[str]:
        return classes

    def soft_label(self, prediction: Tensor) -> Tensor:
        """The probability of each class."""
        return prediction.softmax(1)

    def from_soft_label(self, soft: Tensor) -> Tensor:
        return log_probability(soft)

    def to_levels(self, postprocessed: Tensor) -> NDArray[np.uint8]:
        """The class ids."""
        return postprocessed.byte().numpy()

    def to_picture(self, levels: NDArray, rounded: bool) -> Picture:
        return levels.astype(np.uint8)

    def from_picture(self, picture: Picture) -> Tensor:
        return torch.from_numpy(picture.astype(np.int64))

    def check_picture(self, path: Path, picture: Picture, classes: Sequence[str]) -> None:
        if picture.max() >= len(classes):
            raise UserError(f"{path} holds {picture.max()}, which is no class 0..{len(classes) - 1}")

    def at_photo(self, output: NDArray[np.float32], shape: Shape) -> Picture:
        """The class with the largest resized logit. Classes are resized one at a time, since all at once may not fit
        into memory for a large photo."""
        best, ids = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.uint8)
        for i, channel in enumerate(output):
            resized = resize_channel(channel, shape)
            ids[resized > best] = i
            np.maximum(best, resized, out=best)
        return ids

    def paint_label(self, label: NDArray) -> NDArray[np.uint8]:
        return np.where((label == VOID)[..., None], GREY, PALETTE[label])

    def paint_prediction(self, prediction: Tensor) -> NDArray[np.uint8]:
        return PALETTE[prediction.argmax(0).numpy()]

    def overlay(self, photo: NDArray[np.uint8], picture: Picture) -> NDArray[np.uint8]:
        """Every class but the background is tinted and outlined."""
        return by_rows(_tint, photo, picture, _outline(picture))
