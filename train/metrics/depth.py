"""Errors of depth maps (Eigen, Puhrsch and Fergus, NeurIPS 2014), pooled over the valid pixels of the whole set."""

import torch
from torch import Tensor

from train.metrics.base import Metric

RATIO = 1.25
NEAREST, FARTHEST = 0.001, 65.535  # metres: what 16 bits of millimetres hold, 0 being void


class DepthErrors(Metric):
    """Predictions d and labels g in metres; 0 in a label is void.

    ``state`` (8,) is the number of valid pixels and the sums of (d - g)^2, (log d - log g)^2, |d - g| / g,
    (d - g)^2 / g, and of max(d / g, g / d) < 1.25^n for n = 1, 2, 3.
    """

    def __init__(self) -> None:
        super().__init__(8)

    @staticmethod
    def postprocess(prediction: Tensor) -> Tensor:
        """Log depth (n, 1, H, W) -> metres, float32 (n, H, W), within what a file can hold."""
        return prediction[:, 0].float().exp().clamp(NEAREST, FARTHEST)

    def count(self, postprocessed: Tensor, label: Tensor) -> None:
        """``postprocessed`` and ``label`` in metres, float32 (n, H, W)."""
        valid = label > 0
        d, g = postprocessed[valid].double(), label[valid].double()
        error, ratio = d - g, torch.maximum(d / g, g / d)
        terms = [torch.ones_like(g), error**2, (d / g).log() ** 2, error.abs() / g, error**2 / g]
        terms += [(ratio < RATIO**n).double() for n in (1, 2, 3)]
        self.add(torch.stack([term.sum() for term in terms]))

    def compute(self) -> dict[str, float | None]:
        """``rmse`` in metres, ``log_rmse``; in percent ``absRel``, ``sqRel`` (of metres) and ``within_1.25``,
        ``within_1.25^2``, ``within_1.25^3``."""
        squares, logs, relative, square_relative, *within = (self.state[1:] / self.state[0]).tolist()
        scores: dict[str, float | None] = {"rmse": squares**0.5, "log_rmse": logs**0.5}
        scores |= {"absRel": 100 * relative, "sqRel": 100 * square_relative}
        names = ("within_1.25", "within_1.25^2", "within_1.25^3")
        return scores | {name: 100 * share for name, share in zip(names, within, strict=True)}
