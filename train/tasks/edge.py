"""Edges: the balanced loss."""

import torch
from torch import Tensor

from train.metrics.base import Metric
from train.tasks.losses import balanced_bce
from train.tasks.names import VOID


class EdgeLoss(Metric):
    """The formula of :func:`train.tasks.losses.edge_loss`, pooled over the valid pixels of the whole set.

    The field's edge meters squash the logits before this loss, so their values are no measure of it.
    ``state`` (2,) is [sum of the loss, valid pixels].
    """

    def __init__(self) -> None:
        super().__init__(2)

    @staticmethod
    def decide(prediction: Tensor) -> Tensor:
        """Logits (n, 1, H, W), as they are."""
        return prediction

    def count(self, decided: Tensor, label: Tensor) -> None:
        """``decided`` logits (n, 1, H, W), ``label`` uint8 (n, H, W)."""
        total = balanced_bce(decided, label).sum(dtype=torch.float64)
        self.add(torch.stack([total, (label != VOID).sum()]))

    def compute(self) -> dict[str, float | None]:
        """``loss``; ``odsF``, the F-measure of the benchmark, takes LabelMaps: see :mod:`train.metrics.odsf`."""
        total, pixels = self.state
        return {"loss": (total / pixels).item(), "odsF": None}
