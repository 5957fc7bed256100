"""Saliency. Label: uint8 (H, W), 0 or 1, 255 void; scores are the maximal F-measures of both protocol families and the
mean IoU of family A."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.metrics.base import Metric, histogram
from train.metrics.constant import Constant
from train.tasks.base import VOID, Headline, Picture, Task, by_rows, log_probability, paint_binary, paint_probability
from train.tasks.classes import class_loss

BETA2 = 0.3
F_THRESHOLDS = torch.arange(1, 20) / 20  # arange(0.05, 1, 0.05), 19 of them
A_THRESHOLDS = torch.arange(4, 19) / 20  # linspace(0.2, 0.9, 15)


def saliency_totals(label: Tensor) -> Tensor:
    """Negative and valid pixels."""
    return torch.stack([(label == 0).sum(), (label != VOID).sum()])


def saliency_loss(prediction: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
    """Cross-entropy with class weights [1 - w, w], w = N_neg / N_valid over the batch: the rarer class weighs more."""
    negative, valid = saliency_totals(label) if totals is None else totals
    w = negative / valid.clamp(min=1)
    return class_loss(prediction, label, valid[None], torch.stack([1 - w, w]))


class Saliency(Metric):
    """All scores threshold p, the softmax probability of "salient", and take the best threshold of the set.

    - ``maxF`` (ATRC): max over t of (1 + b) P R / (b P + R), b = beta^2 = 0.3, where p >= t and precision P and
      recall R come from counts pooled over all valid pixels. NaN for a set without salient pixels.
    - ``maxF_invpt``: the same of sigmoid(p) instead of p, only to compare with the tables of InvPT, TaskPrompter,
      MLoRE and MTMamba, whose code applies a sigmoid to p. As sigmoid(p) is 0.5 to 0.731, its thresholds reduce to
      "all is salient" and p >= 0.2007, 0.4055, 0.6190 and 0.8473.
    - ``mIoU`` (family A): max over t of the mean over images of the IoU, where p > t and an image without a salient
      pixel has IoU 1 if none is predicted. Images that are void everywhere do not count.
    - ``maxF_A``: max over t of 2 P R / (P + R), where p > t and P and R are means over the same images; P is 0 for
      an image where nothing is predicted, and R for one without a salient pixel.

    ``state`` (126,) is the pooled counts of :func:`pixels_above` for p and for sigmoid(p) (20 x 2 each), the sums over
    images of IoU, P and R (15 each) and the number of images.
    """

    def __init__(self) -> None:
        super().__init__(2 * 2 * (len(F_THRESHOLDS) + 1) + 3 * len(A_THRESHOLDS) + 1)

    @staticmethod
    def postprocess(prediction: Tensor) -> Tensor:
        """Logits (n, 2, H, W) -> p, float32 (n, H, W): the softmax of two."""
        logits = prediction.float()
        return (logits[:, 1] - logits[:, 0]).sigmoid()

    def count(self, postprocessed: Tensor, label: Tensor) -> None:
        """``postprocessed`` p, float32 (n, H, W), ``label`` uint8 (n, H, W)."""
        pooled = [
            pixels_above(value, label, F_THRESHOLDS, inclusive=True).sum(0).flatten()
            for value in (postprocessed, postprocessed.sigmoid())
        ]
        counts = pixels_above(postprocessed, label, A_THRESHOLDS, inclusive=False)
        labelled = counts[:, 0].sum(1) > 0
        self.add(torch.cat([*pooled, _sum_over_images(counts[labelled]).flatten(), labelled.sum()[None]]))

    def compute(self) -> dict[str, float | None]:
        """``maxF``, ``maxF_invpt``, ``mIoU`` and ``maxF_A`` in percent."""
        pooled = 2 * (len(F_THRESHOLDS) + 1)
        true, squashed, sums, images = self.state.split([pooled, pooled, 3 * len(A_THRESHOLDS), 1])
        iou, precision, recall = (sums / images).view(3, -1)
        f_measure = 2 * precision * recall / (precision + recall + 1e-12)  # the field's guard against 0 / 0
        scores = {"maxF": _max_f(true), "maxF_invpt": _max_f(squashed), "mIoU": iou.max(), "maxF_A": f_measure.max()}
        return {name: 100 * score.item() for name, score in scores.items()}


def _sum_over_images(counts: Tensor) -> Tensor:
    """(3, T): sums of IoU, precision and recall, from the counts (n, 1 + T, 2) of :func:`pixels_above`."""
    false_positive, true_positive = counts[:, 1:].unbind(2)
    salient = counts[:, :1, 1]
    union = false_positive + salient
    iou = torch.where(union > 0, true_positive / union, 1.0)
    precision = true_positive / (true_positive + false_positive).clamp(min=1)
    recall = true_positive / salient.clamp(min=1)
    return torch.stack([iou, precision, recall]).sum(1)


def _max_f(pooled: Tensor) -> Tensor:
    """The best F of beta^2 = 0.3 among pooled counts (2 (1 + T),)."""
    false_positive, true_positive = pooled.view(-1, 2)[1:].unbind(1)
    salient = pooled[1]
    # P = TP / (TP + FP) and R = TP / salient, put into F; no 0 / 0 where nothing is predicted.
    f_measure = (1 + BETA2) * true_positive / (BETA2 * salient + true_positive + false_positive)
    return f_measure.max().where(salient > 0, torch.nan)


def pixels_above(probability: Tensor, label: Tensor, thresholds: Tensor, inclusive: bool) -> Tensor:
    """Counts of valid pixels, float64 (n, 1 + T, 2): per image, above each of [all, t_1, ..., t_T], with label 0 or 1.

    ``probability`` and ``label`` are (n, H, W); "above" is p >= t if ``inclusive``, else p > t. Each pixel is sorted
    once among the thresholds, rather than compared with each of them.
    """
    images, levels = len(label), len(thresholds) + 1
    passed = torch.bucketize(probability, thresholds.to(probability.device), right=inclusive)
    image = torch.arange(images, device=label.device).view(-1, 1, 1)
    counts = histogram((image * levels + passed) * 2 + (label == 1), label != VOID, images * levels * 2)
    return counts.view(images, levels, 2).flip(1).cumsum(1).flip(1).double()


class ConstantSaliency(Constant):
    """p = 1/2, the best for maxF and mIoU alike whatever the labels are.

    At any threshold a constant predicts all pixels or none as salient, and both scores take their best threshold.
    p = 1/2 is above some thresholds and below others, so it has both cases. Nothing is fitted, and ``state`` is empty.
    """

    def __init__(self) -> None:
        super().__init__(0)

    def update(self, label: Tensor) -> None:
        """Does nothing."""

    def output(self) -> Tensor:
        """Logits."""
        return torch.zeros(2)


class SaliencyTask(Task):
    name = "sal"
    channels = 2
    weight = 5
    headlines = (Headline("maxF", True, "%"), Headline("maxF_invpt", True, "%"), Headline("mIoU", True, "%"))
    delta_key = "mIoU"
    folder = "sal"
    modes = ("L",)
    content = "255 times the probability, 8 bits"
    values = ("rest", "salient")
    totals = staticmethod(saliency_totals)
    loss = staticmethod(saliency_loss)
    metric_type = Saliency
    constant_type = ConstantSaliency

    def soft_label(self, prediction: Tensor) -> Tensor:
        """The probabilities of both classes."""
        return prediction.softmax(1)

    def from_soft_label(self, soft: Tensor) -> Tensor:
        return log_probability(soft)

    def to_levels(self, postprocessed: Tensor) -> NDArray[np.float32]:
        """255 p, (H, W)."""
        return (255 * postprocessed).numpy()

    def from_picture(self, picture: Picture) -> Tensor:
        return torch.from_numpy(picture.astype(np.float32) / 255)

    def paint_label(self, label: NDArray) -> NDArray[np.uint8]:
        return paint_binary(label)

    def paint_prediction(self, prediction: Tensor) -> NDArray[np.uint8]:
        return paint_probability(prediction.softmax(0)[1])

    def overlay(self, photo: NDArray[np.uint8], picture: Picture) -> NDArray[np.uint8]:
        """The photo, faded to dark grey where it is not salient."""
        return by_rows(_fade, photo, picture)


def _fade(photo: NDArray[np.uint8], picture: Picture) -> NDArray[np.uint8]:
    shade = 0.4 * photo.mean(-1, keepdims=True)
    return (shade + (photo - shade) * (picture[..., None] / 255)).astype(np.uint8)
