"""Surface normals: the angular errors."""

import torch
from torch import Tensor

from train.metrics.base import Metric, histogram
from train.tasks.losses import unit

BINS_PER_DEGREE = 100
LIMITS = (11.25, 22.5, 30)  # degrees


class Normals(Metric):
    """Of the angle between prediction and label, both normalised, over the valid pixels of the whole set:

        angle = 2 atan2(|p - g|, |p + g|)

    which keeps its digits near 0, where the arc cosine loses them.

    ``state`` (18002,) is the sums of the angle in degrees and of its square, then a histogram of it in bins of 0.01
    degrees. Limits are edges of bins.
    """

    def __init__(self) -> None:
        super().__init__(2 + 180 * BINS_PER_DEGREE)

    @staticmethod
    def decide(prediction: Tensor) -> Tensor:
        """Vectors of any length -> unit vectors, float32 (n, 3, H, W)."""
        return unit(prediction.float())

    def count(self, decided: Tensor, label: Tensor) -> None:
        """``decided`` unit vectors, ``label`` of any length, both float32 (n, 3, H, W)."""
        p, g = decided, unit(label)
        degrees = torch.rad2deg(2 * torch.atan2(_length(p - g), _length(p + g)))
        valid = (label != 0).any(1)
        bins = len(self.state) - 2
        counts = histogram((degrees * BINS_PER_DEGREE).long().clamp(max=bins - 1), valid, bins)
        degrees = (degrees * valid).double()
        self.add(torch.cat([degrees.sum()[None], degrees.square().sum()[None], counts]))

    def compute(self) -> dict[str, float | None]:
        """In degrees ``mErr``, the mean, ``median``, to half a bin, and ``rmse``; in percent ``within_11.25``,
        ``within_22.5`` and ``within_30``, the pixels whose error is smaller.

        The ``rmse`` of the field's training logs is the mean by mistake; this is the root of the mean square.
        """
        (total, squares), cumulative = self.state[:2], self.state[2:].cumsum(0)
        pixels = cumulative[-1]
        # Of an even number of pixels the median is the mean of the middle two.
        middle = torch.stack([((pixels - 1) / 2).floor(), (pixels / 2).floor()])
        median = (torch.searchsorted(cumulative, middle, right=True) + 0.5).mean() / BINS_PER_DEGREE
        scores = {"mErr": total / pixels, "median": median.where(pixels > 0, torch.nan)}
        scores["rmse"] = (squares / pixels).sqrt()
        for limit in LIMITS:
            scores[f"within_{limit}"] = 100 * cumulative[int(limit * BINS_PER_DEGREE) - 1] / pixels
        return {name: score.item() for name, score in scores.items()}


def _length(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1).sqrt()
