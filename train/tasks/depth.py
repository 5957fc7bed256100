"""Depth. Label: float32 (H, W), metres along the line of sight; 0 is void. A head gives log depth (n, 1, H, W)."""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.metrics.constant import Constant
from train.metrics.depth import FARTHEST, NEAREST, DepthErrors
from train.tasks.base import GREY, Headline, Label, Picture, Task, at_least_fp32, by_rows, count_valid, over_valid

BINS_PER_UNIT = 1000  # of log depth
PAINTED = (0.5, 20.0)  # metres, the brightest and the darkest colour


def depth_totals(label: Tensor) -> Tensor:
    """Valid pixels."""
    return count_valid(label > 0)


def depth_loss(prediction: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
    """L1 distance of log depths, mean over valid pixels.

    The field uses L1 in metres. With logs an error of 10 % weighs the same near and far, any output is a positive
    depth, and a transform that divides depth only shifts the target.
    """
    valid = label > 0
    target = torch.where(valid, label, 1).log()
    (count,) = depth_totals(label) if totals is None else totals
    return over_valid((at_least_fp32(prediction[:, 0]) - target).abs() * valid, count)


class ConstantDepth(Constant):
    """The median of log depth, where the derivative of the loss is zero.

    ``state`` counts valid pixels in bins of 0.001 of log depth.
    """

    def __init__(self) -> None:
        super().__init__(int((np.log(FARTHEST) - np.log(NEAREST)) * BINS_PER_UNIT) + 1)

    def update(self, label: Tensor) -> None:
        """``label`` float32 (n, H, W)."""
        logs = label[label > 0].clamp(NEAREST, FARTHEST).log() - float(np.log(NEAREST))
        bins = (logs * BINS_PER_UNIT).long().clamp(max=len(self.state) - 1)
        self.add(torch.bincount(bins, minlength=len(self.state)))

    def output(self) -> Tensor:
        """Log depth (1,), to half a bin."""
        cumulative = self.state.cumsum(0)
        middle = torch.searchsorted(cumulative, cumulative[-1] / 2).clamp(max=len(self.state) - 1)
        return ((middle + 0.5) / BINS_PER_UNIT + float(np.log(NEAREST))).float()[None]


class DepthTask(Task):
    name = "depth"
    channels = 1
    weight = 1
    headlines = (Headline("rmse", False, "m"), Headline("absRel", False, "%"), Headline("within_1.25", True, "%"))
    delta_key = "rmse"
    folder = "depth"
    label_type = (np.float32, ())
    modes = ("I;16",)
    content = "millimetres, 16 bits"
    values = ("void", "valid")
    void = 0
    totals = staticmethod(depth_totals)
    loss = staticmethod(depth_loss)
    metric_type = DepthErrors
    constant_type = ConstantDepth

    def rescale(self, label: Label, factor: float) -> Label:
        """What looks larger is nearer: both families of the field divide depth by the factor."""
        return label / np.float32(factor)

    def soft_label(self, prediction: Tensor) -> Tensor:
        """Metres."""
        return self.postprocess(prediction)[:, None]

    def from_soft_label(self, soft: Tensor) -> Tensor:
        return soft.log()

    def label_values(self, label: Label) -> Label:
        return (label > 0).astype(np.uint8)

    def to_levels(self, postprocessed: Tensor) -> NDArray[np.float32]:
        """Millimetres (H, W)."""
        return (1000 * postprocessed).numpy()

    def to_picture(self, levels: NDArray, rounded: bool) -> Picture:
        """16 bits of millimetres; at least 1, since 0 is void."""
        return (levels + 0.5 if rounded else levels).clip(1, 65535).astype(np.uint16)

    def from_picture(self, picture: Picture) -> Tensor:
        """A file's 0, by which other programs mark missing predictions, counts as the nearest depth."""
        return torch.from_numpy(picture.astype(np.float32) / 1000).clamp(min=NEAREST)

    def paint_label(self, label: NDArray) -> NDArray[np.uint8]:
        return np.where((label > 0)[..., None], _paint(label), GREY)

    def paint_prediction(self, prediction: Tensor) -> NDArray[np.uint8]:
        return _paint(DepthErrors.postprocess(prediction[None])[0].numpy())

    def overlay(self, photo: NDArray[np.uint8], picture: Picture) -> NDArray[np.uint8]:
        """Depth alone: it covers the photo."""
        return by_rows(lambda millimetres: _paint(millimetres.astype(np.float32) / 1000), picture)


def _paint(metres: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Log depth (H, W) in colours (H, W, 3), near bright and far dark, on one scale for all pictures."""
    near, far = np.log(PAINTED)
    share = (far - np.log(np.maximum(metres, NEAREST))) / (far - near)
    return cv2.applyColorMap((255 * share.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
