"""Saliency: the maximal F-measure of family B and the mean IoU of family A."""

import torch
from torch import Tensor

from train.metrics.base import Metric, histogram
from train.tasks import VOID

BETA2 = 0.3
F_THRESHOLDS = torch.arange(1, 20) / 20  # arange(0.05, 1, 0.05), 19 of them
IOU_THRESHOLDS = torch.arange(4, 19) / 20  # linspace(0.2, 0.9, 15)


class Saliency(Metric):
    """Both scores threshold p, the softmax probability of "salient", and take the best threshold of the set.

    - ``maxF`` (ATRC): max over t of (1 + b) P R / (b P + R), b = beta^2 = 0.3, where p >= t and precision P and
      recall R come from counts pooled over all valid pixels. NaN for a set without salient pixels.
    - ``mIoU`` (family A): max over t of the mean over images of the IoU, where p > t and an image without a salient
      pixel has IoU 1 if none is predicted. Images that are void everywhere do not count.

    ``state`` (56,) is the pooled counts of :func:`pixels_above` (20 x 2), the 15 sums of IoU and the images.
    """

    def __init__(self) -> None:
        super().__init__(2 * (len(F_THRESHOLDS) + 1) + len(IOU_THRESHOLDS) + 1)

    @torch.no_grad()
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """``prediction`` (n, 2, H, W) logits, ``label`` uint8 (n, H, W)."""
        logits = prediction.float()
        probability = (logits[:, 1] - logits[:, 0]).sigmoid()  # the softmax of two
        pooled = pixels_above(probability, label, F_THRESHOLDS, inclusive=True).sum(0)
        per_image = pixels_above(probability, label, IOU_THRESHOLDS, inclusive=False)
        union = per_image[:, 1:, 0] + per_image[:, :1, 1]
        iou = torch.where(union > 0, per_image[:, 1:, 1] / union, 1.0)
        labelled = per_image[:, 0].sum(1) > 0
        self.add(torch.cat([pooled.flatten(), (iou * labelled[:, None]).sum(0), labelled.sum()[None]]))

    def compute(self) -> dict[str, float | None]:
        """``maxF`` and ``mIoU`` in percent."""
        pooled, iou_sums, images = self.state.split([2 * (len(F_THRESHOLDS) + 1), len(IOU_THRESHOLDS), 1])
        false_positive, true_positive = pooled.view(-1, 2)[1:].unbind(1)
        salient = pooled[1]
        # P = TP / (TP + FP) and R = TP / salient, put into F; no 0 / 0 where nothing is predicted.
        f_measure = (1 + BETA2) * true_positive / (BETA2 * salient + true_positive + false_positive)
        max_f = f_measure.max().item() if salient > 0 else torch.nan
        return {"maxF": 100 * max_f, "mIoU": 100 * (iou_sums / images).max().item()}


def pixels_above(probability: Tensor, label: Tensor, thresholds: Tensor, inclusive: bool) -> Tensor:
    """Valid pixels above each threshold, float64 (n, 1 + T, 2): per image, from [all, t_1, ..., t_T], by label 0 or 1.

    ``probability`` and ``label`` are (n, H, W); "above" is p >= t if ``inclusive``, else p > t. Each pixel is sorted
    once among the thresholds, rather than compared with each of them.
    """
    images, levels = len(label), len(thresholds) + 1
    passed = torch.bucketize(probability, thresholds.to(probability.device), right=inclusive)
    image = torch.arange(images, device=label.device).view(-1, 1, 1)
    counts = histogram((image * levels + passed) * 2 + (label == 1), label != VOID, images * levels * 2)
    return counts.view(images, levels, 2).flip(1).cumsum(1).flip(1).double()
