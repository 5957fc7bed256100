"""Surface normals: the mean angular error."""

import torch
from torch import Tensor

from train.losses import unit
from train.metrics.base import Metric


class Normals(Metric):
    """Mean over the valid pixels of the whole set of the angle between prediction and label, both normalised:

        angle = 2 atan2(|p - g|, |p + g|)

    which keeps its digits near 0, where the arc cosine loses them. ``state`` (2,) is [sum in degrees, valid pixels].
    """

    def __init__(self) -> None:
        super().__init__(2)

    @torch.no_grad()
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """``prediction`` (n, 3, H, W) unnormalised, ``label`` float32 (n, 3, H, W)."""
        p, g = unit(prediction.float()), unit(label)
        degrees = torch.rad2deg(2 * torch.atan2(_length(p - g), _length(p + g)))
        valid = (label != 0).any(1)
        self.add(torch.stack([(degrees * valid).sum(dtype=torch.float64), valid.sum()]))

    def compute(self) -> dict[str, float | None]:
        """``mErr`` in degrees."""
        total, pixels = self.state
        return {"mErr": (total / pixels).item()}


def _length(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1).sqrt()
