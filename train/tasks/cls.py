"""The class of whole images, for pretraining. Label: uint8 (H, W), an image's class id at each of its pixels, 255 void.

So an image's class moves through transforms, files and pictures like any label of pixels. Its logits are the mean of
the head's over the image, and where they are large says which pixels speak for the class: class activation maps
(Zhou et al., CVPR 2016).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.metrics.base import Metric
from train.tasks.base import VOID, Headline, Label, Picture, Shape, at_least_fp32, count_valid
from train.tasks.classes import ClassTask, class_loss


def class_of(label: Tensor) -> Tensor:
    """Labels uint8 (n, H, W) -> the class of each image, or VOID, (n,). Padding is void, and no id is larger."""
    return label.flatten(1).amin(1)


def pool(prediction: Tensor, valid: Tensor) -> Tensor:
    """Logits (n, C, H, W) -> (n, C), the mean over ``valid`` (n, H, W), which leaves out padding."""
    kept = at_least_fp32(prediction).masked_fill(~valid[:, None], 0)
    return kept.sum((2, 3)) / valid.sum((1, 2)).clamp(min=1)[:, None]


def image_totals(label: Tensor) -> Tensor:
    """Images that have a class."""
    return count_valid(class_of(label) != VOID)


def image_loss(prediction: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
    """Cross-entropy of the pooled logits, mean over the images that have a class."""
    return class_loss(pool(prediction, label != VOID)[..., None, None], class_of(label)[:, None, None], totals)


class ImageAccuracy(Metric):
    """The share of the images whose class is predicted. ``state`` (2,): right ones, and all that have a class."""

    def __init__(self) -> None:
        super().__init__(2)

    @staticmethod
    def postprocess(prediction: Tensor) -> Tensor:
        """Logits (n, C, H, W) -> class ids int64 (n, H, W), the same at every pixel of an image."""
        return prediction.mean((2, 3)).argmax(1)[:, None, None].expand(-1, *prediction.shape[2:])

    @torch.no_grad()
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """A batch as the loss sees it: padding has no say in the class."""
        self.count(self.postprocess(pool(prediction, label != VOID)[..., None, None]), label)

    def count(self, postprocessed: Tensor, label: Tensor) -> None:
        labels = class_of(label)
        right = (postprocessed[:, 0, 0] == labels) & (labels != VOID)
        self.add(torch.stack([right.sum(), (labels != VOID).sum()]))

    def compute(self) -> dict[str, float | None]:
        """``accuracy`` in percent."""
        right, images = self.state
        return {"accuracy": (100 * right / images).item()}


class ImageClass(ClassTask):
    name, aliases = "cls", ()
    folder = "cls"
    weight = 1
    headlines = (Headline("accuracy", True, "%"),)
    delta_key = "accuracy"
    totals = staticmethod(image_totals)
    loss = staticmethod(image_loss)
    metric_type = ImageAccuracy

    def finish(self, label: Label) -> Label:
        """Class 0, the background, is no image's class: family A pads with it."""
        return np.where(label == 0, VOID, label).astype(np.uint8)

    def soft_label(self, prediction: Tensor) -> Tensor:
        """Of the image, at every pixel."""
        return super().soft_label(prediction.mean((2, 3), keepdim=True)).expand_as(prediction)

    def label_values(self, label: Label) -> Label:
        return self.finish(label)

    def metric(self, classes: object) -> Metric:
        return ImageAccuracy()

    def at_photo(self, output: NDArray[np.float32], shape: Shape) -> Picture:
        """One class for the whole photo."""
        (ids,) = self.postprocess(torch.from_numpy(output)[None])
        return np.full(shape, int(ids[0, 0]), np.uint8)
