"""Edges. Label: uint8 (H, W), 0 or 1, 255 void. The scores are the balanced loss here, and odsF, which takes whole
LabelMaps (:mod:`train.metrics.odsf`)."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import laplace
from torch import Tensor

from train.metrics.base import Metric
from train.metrics.constant import LabelCounts
from train.metrics.thinning import thin
from train.tasks.base import (
    VOID,
    Headline,
    Picture,
    Task,
    at_least_fp32,
    by_rows,
    count_valid,
    log_probability,
    over_valid,
    paint_binary,
    paint_probability,
)

EDGE_WEIGHT = 0.95
INK = np.array([20, 30, 90])  # the colour of edges over a photo


def edges_from_label_map(label_map: np.ndarray) -> np.ndarray:
    """Thinned non-zeros of the Laplacian of an integer (H, W) label map -> uint8 (H, W), 1 on an edge.

    Exactly the field's rule, which is a Laplacian and not an inequality of labels: it is 0 in the middle of a ramp n,
    n+1, n+2 with steps of one pixel. Labels stay below 2**50, so that float64 sums them exactly. ``mode="mirror"`` is
    OpenCV's default border (reflect-101).
    """
    return thin(laplace(label_map.astype(np.float64), mode="mirror") != 0).astype(np.uint8)


def edge_totals(label: Tensor) -> Tensor:
    """Valid pixels."""
    return count_valid(label != VOID)


def edge_loss(prediction: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
    """Balanced binary cross-entropy: the mean over valid pixels of 0.95 l_pos + 0.05 l_neg."""
    (valid,) = edge_totals(label) if totals is None else totals
    return over_valid(balanced_bce(prediction, label), valid)


def balanced_bce(prediction: Tensor, label: Tensor) -> Tensor:
    """Per pixel (n, H, W), float32: 0.95 x BCE on edges, 0.05 x BCE elsewhere, 0 on void.

    The same as 0.05 x BCE with pos_weight = w / (1 - w) = 19.
    """
    positive = label == 1
    weight = torch.where(positive, EDGE_WEIGHT, 1 - EDGE_WEIGHT) * (label != VOID)
    logit = at_least_fp32(prediction.squeeze(1))
    return F.binary_cross_entropy_with_logits(logit, positive.to(logit.dtype), weight, reduction="none")


class EdgeLoss(Metric):
    """The formula of :func:`edge_loss`, pooled over the valid pixels of the whole set.

    The field's edge meters apply a sigmoid before this loss, so their values are not comparable with it.
    ``state`` (2,) is [sum of the loss, valid pixels].
    """

    def __init__(self) -> None:
        super().__init__(2)

    @staticmethod
    def postprocess(prediction: Tensor) -> Tensor:
        """Logits (n, 1, H, W), as they are."""
        return prediction

    def count(self, postprocessed: Tensor, label: Tensor) -> None:
        """``postprocessed`` logits (n, 1, H, W), ``label`` uint8 (n, H, W)."""
        total = balanced_bce(postprocessed, label).sum(dtype=torch.float64)
        self.add(torch.stack([total, (label != VOID).sum()]))

    def compute(self) -> dict[str, float | None]:
        """``loss``; ``odsF``, the F-measure of the benchmark, takes LabelMaps: see :mod:`train.metrics.odsf`."""
        total, pixels = self.state
        return {"loss": (total / pixels).item(), "odsF": None}


class ConstantEdge(LabelCounts):
    """The logit of p = 0.95 N_pos / (0.95 N_pos + 0.05 N_neg), where the derivative of the balanced loss is zero."""

    def __init__(self) -> None:
        super().__init__(2)

    def output(self) -> Tensor:
        """A logit, finite even if all labels are of one class."""
        negative, positive = self.state.clamp(min=1e-6)
        return (EDGE_WEIGHT * positive / ((1 - EDGE_WEIGHT) * negative)).log().float()[None]


class EdgeTask(Task):
    name = "edge"
    channels = 1
    weight = 50
    headlines = (Headline("odsF", True, "%"), Headline("loss", False, ""))
    delta_key = "odsF"
    folder = "edge"
    modes = ("L",)
    content = "255 times the probability, 8 bits"
    values = ("rest", "edges")
    totals = staticmethod(edge_totals)
    loss = staticmethod(edge_loss)
    metric_type = EdgeLoss
    constant_type = ConstantEdge

    def soft_label(self, prediction: Tensor) -> Tensor:
        """The probabilities of no edge and of an edge, each exact near 0."""
        return torch.cat([-prediction, prediction], dim=1).sigmoid()

    def from_soft_label(self, soft: Tensor) -> Tensor:
        absent, present = log_probability(soft).chunk(2, dim=1)
        return present - absent

    def to_levels(self, postprocessed: Tensor) -> NDArray[np.float32]:
        """255 p, (H, W)."""
        return (255 * postprocessed.float().sigmoid()[0]).numpy()

    def to_picture(self, levels: NDArray, rounded: bool) -> Picture:
        """Always truncated, never rounded: odsF is defined on the field's files."""
        return super().to_picture(levels, rounded=False)

    def from_picture(self, picture: Picture) -> Tensor:
        """Level k decodes to (k + 0.5) / 256, so that logits stay finite."""
        return torch.from_numpy((picture[None] + np.float32(0.5)) / 256).logit()

    def paint_label(self, label: NDArray) -> NDArray[np.uint8]:
        return paint_binary(label)

    def paint_prediction(self, prediction: Tensor) -> NDArray[np.uint8]:
        return paint_probability(prediction.sigmoid()[0])

    def overlay(self, photo: NDArray[np.uint8], picture: Picture) -> NDArray[np.uint8]:
        """Ink on the faded photo."""
        return by_rows(_ink, photo, picture)


def _ink(photo: NDArray[np.uint8], picture: Picture) -> NDArray[np.uint8]:
    strength = picture[..., None] / 255
    over = (1 - strength) * (255 - 0.3 * (255 - photo.astype(np.float32))) + strength * INK
    return over.astype(np.uint8)
