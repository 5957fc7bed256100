"""Surface normals. Label: float32 (3, H, W), unit vectors, +x left, +y up, +z towards the camera; (0, 0, 0) is void."""

import math
from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from train.metrics.base import Metric, histogram
from train.metrics.constant import Constant
from train.tasks.base import GREY, Headline, Label, Picture, Task, at_least_fp32, count_valid, over_valid

BINS_PER_DEGREE = 100
LIMITS = (11.25, 22.5, 30)  # degrees


def valid_normals(label: Tensor) -> Tensor:
    return (label != 0).any(1)


def normals_totals(label: Tensor) -> Tensor:
    """Valid pixels."""
    return count_valid(valid_normals(label))


def normals_loss(prediction: Tensor, label: Tensor, totals: Tensor | None = None) -> Tensor:
    """L1 distance of the normalised prediction to the label, summed over the 3 channels / max(#valid pixels, 1).

    Family A divides by the number of elements instead: a third of this.
    """
    valid = valid_normals(label)
    (count,) = count_valid(valid) if totals is None else totals
    per_pixel = (unit(at_least_fp32(prediction)) - label).abs().sum(1)
    return over_valid(per_pixel * valid, count)


def unit(vectors: Tensor) -> Tensor:
    """Vectors along dim 1 of (n, 3, ...) over max(their length, 1e-12), so (0, 0, 0) stays as it is.

    ``F.normalize`` computes the same, but its norm over a strided dimension is some forty times slower on CPUs.
    """
    return vectors * vectors.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()


class Normals(Metric):
    """Statistics of the angle between prediction and label, both normalised, over the valid pixels of the set:

        angle = 2 atan2(|p - g|, |p + g|)

    This stays accurate near 0, where the arc cosine does not.

    ``state`` (18002,) is the sums of the angle in degrees and of its square, then a histogram of it in bins of 0.01
    degrees. The limits of ``within_*`` are bin edges.
    """

    def __init__(self) -> None:
        super().__init__(2 + 180 * BINS_PER_DEGREE)

    @staticmethod
    def postprocess(prediction: Tensor) -> Tensor:
        """Vectors of any length -> unit vectors, float32 (n, 3, H, W)."""
        return unit(prediction.float())

    def count(self, postprocessed: Tensor, label: Tensor) -> None:
        """``postprocessed`` unit vectors, ``label`` of any length, both float32 (n, 3, H, W)."""
        p, g = postprocessed, unit(label)
        degrees = torch.rad2deg(2 * torch.atan2(_length(p - g), _length(p + g)))
        valid = (label != 0).any(1)
        bins = len(self.state) - 2
        counts = histogram((degrees * BINS_PER_DEGREE).long().clamp(max=bins - 1), valid, bins)
        degrees = (degrees * valid).double()
        self.add(torch.cat([degrees.sum()[None], degrees.square().sum()[None], counts]))

    def compute(self) -> dict[str, float | None]:
        """In degrees ``mErr``, the mean, ``median``, to half a bin, and ``rmse``; in percent ``within_11.25``,
        ``within_22.5`` and ``within_30``, the share of pixels with a smaller error.

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


class ConstantNormals(Constant):
    """The direction with the smallest mean angle to the labels: their geometric median on the sphere.

    ``state`` (180 * 360, 3) sums the unit vectors in each cell of one degree of polar angle by one of azimuth: the
    direction of a sum is the mean direction of its cell, and its length the number of pixels, to 1 in 10,000.
    """

    def __init__(self) -> None:
        super().__init__(180 * 360, 3)

    def update(self, label: Tensor) -> None:
        """``label`` float32 (n, 3, H, W). Void is the zero vector: it adds nothing to its cell."""
        vectors = unit(label.double()).movedim(1, -1).reshape(-1, 3)
        x, y, z = vectors.unbind(1)
        polar = torch.rad2deg(z.clamp(-1, 1).acos()).long().clamp(max=179)
        azimuth = torch.rad2deg(torch.atan2(y, x) + math.pi).long().clamp(max=359)
        sums = torch.zeros(self.state.shape, dtype=torch.float64, device=label.device)
        self.add(sums.index_add_(0, polar * 360 + azimuth, vectors))

    def output(self) -> Tensor:
        """A unit vector: the best of a coarse grid and of the heaviest cells, then of ever finer grids around it."""
        sums = self.state[self.state.any(1)].cpu()
        mass = sums.norm(dim=1)
        directions = sums / mass[:, None]

        sphere = _sphere(128)
        # Flat walls make sharp minima, at their own normal, which the coarse grid may miss.
        candidates = torch.cat([sphere, directions[mass.topk(min(256, len(mass))).indices]])
        for zoom in range(10):
            best = candidates[(_angles(candidates, directions) @ mass).argmin()]
            candidates = torch.cat([best[None], F.normalize(best + 0.3 ** (zoom + 1) * sphere)])
        return best.float()


def _angles(a: Tensor, b: Tensor) -> Tensor:
    """Radians between the unit vectors of (m, 3) and (n, 3): (m, n)."""
    return (a @ b.T).clamp(-1, 1).acos()


def _sphere(points: int) -> Tensor:
    """Nearly even points on the unit sphere, float64 (points, 3): Fibonacci's spiral."""
    step = torch.arange(points, dtype=torch.float64)
    z = 1 - (2 * step + 1) / points
    azimuth = step * math.pi * (3 - math.sqrt(5))
    radius = (1 - z * z).sqrt()
    return torch.stack([radius * azimuth.cos(), radius * azimuth.sin(), z], dim=1)


class NormalsTask(Task):
    name = "normals"
    channels = 3
    weight = 10
    headlines = (Headline("mErr", False, "deg"),)
    delta_key = "mErr"
    folder = "normals"
    label_type = (np.float32, (3,))
    modes = ("RGB",)
    content = "255 (n + 1) / 2, 8 bits; n is a unit vector, +x left, +y up, +z towards the camera"
    values = ("void", "valid")
    void = 0
    totals = staticmethod(normals_totals)
    loss = staticmethod(normals_loss)
    metric_type = Normals
    constant_type = ConstantNormals

    def resample(self, label: Label, move: Callable[[Label, int], Label]) -> Label:
        """Cubic, void where nearest interpolation finds void: next to void, cubic interpolation leaves specks of
        arbitrary direction, which would become unit vectors."""
        valid = move(np.any(label, axis=-1).astype(np.uint8), cv2.INTER_NEAREST)
        return move(label, cv2.INTER_CUBIC) * valid[..., None]

    def flip(self, label: Label) -> Label:
        """Mirroring negates x."""
        return super().flip(label) * np.array([-1, 1, 1], label.dtype)

    def rotate(self, label: Label, rotation: NDArray[np.float64]) -> Label:
        """The matrix for offsets (x right, y down) also holds for vectors (left, up), as both axes are reversed."""
        in_plane = label[..., :2] @ rotation.T.astype(label.dtype)
        return np.concatenate([in_plane, label[..., 2:]], axis=-1)

    def finish(self, label: Label) -> Label:
        """Vectors (H, W, 3) of any length -> (3, H, W) of length 1, but (0, 0, 0) stays void."""
        vectors = np.ascontiguousarray(label.transpose(2, 0, 1))
        lengths = np.linalg.norm(vectors, axis=0)
        return vectors / np.where(lengths > 0, lengths, 1)

    def soft_label(self, prediction: Tensor) -> Tensor:
        """Unit vectors; their mean is shorter."""
        return unit(prediction)

    def label_values(self, label: Label) -> Label:
        return np.any(label, axis=-1)

    def to_levels(self, postprocessed: Tensor) -> NDArray[np.float32]:
        """255 (n + 1) / 2, (H, W, 3)."""
        return (127.5 * (postprocessed + 1)).permute(1, 2, 0).numpy()

    def from_picture(self, picture: Picture) -> Tensor:
        return unit(torch.from_numpy(2 * picture.transpose(2, 0, 1).astype(np.float32) / 255 - 1)[None])[0]

    def paint_label(self, label: NDArray) -> NDArray[np.uint8]:
        picture = np.rint(127.5 * (label.transpose(1, 2, 0) + 1)).astype(np.uint8)
        return np.where(np.any(label, axis=0)[..., None], picture, GREY)

    def paint_prediction(self, prediction: Tensor) -> NDArray[np.uint8]:
        return self.paint_label(F.normalize(prediction, dim=0).numpy())

    def overlay(self, photo: NDArray[np.uint8], picture: Picture) -> NDArray[np.uint8]:
        """The normals alone: they cover the photo."""
        return picture.astype(np.uint8, copy=False)
