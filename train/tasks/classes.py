"""Semantic segmentation and human parts: the mean intersection over union."""

import torch
from torch import Tensor

from train.metrics.base import Metric, histogram
from train.tasks.names import VOID


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
    def decide(prediction: Tensor) -> Tensor:
        """Logits (n, C, H, W) -> class ids int64 (n, H, W)."""
        return prediction.max(1).indices  # argmax(1) takes twice the time on a CPU

    def count(self, decided: Tensor, label: Tensor) -> None:
        """``decided`` class ids (n, H, W), ``label`` uint8 (n, H, W)."""
        classes = len(self.state)
        counts = histogram(label.long() * classes + decided, label != VOID, classes**2)
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
