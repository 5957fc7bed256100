"""The floor under every score: the best prediction that ignores the image.

``update(label)`` fits it on the training labels; ``prediction(label)`` then looks like the output of a head, so the
ordinary metrics score it on the validation labels. The states add, as those of the metrics do.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from train.metrics.base import Additive
from train.tasks.losses import EDGE_WEIGHT, unit


class Constant(Additive, ABC):
    """The best constant output of one head."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self._output: Tensor | None = None  # kept between predictions, forgotten when labels are added

    def add(self, increment: Tensor) -> None:
        super().add(increment)
        self._output = None

    @abstractmethod
    def update(self, label: Tensor) -> None:
        """Take in a batch of training labels."""

    @abstractmethod
    def output(self) -> Tensor:
        """The output that is best on them, float32 (channels,)."""

    def prediction(self, label: Tensor) -> Tensor:
        """``output()`` at every pixel of ``label`` (n, ..., H, W): a view, float32 (n, channels, H, W)."""
        if self._output is None:
            self._output = self.output().to(label.device)
        return self._output[:, None, None].expand(len(label), -1, *label.shape[-2:])


class LabelCounts(Constant):
    """A constant that depends on how often each class is labelled: ``state`` (C,) counts valid pixels."""

    def update(self, label: Tensor) -> None:
        """``label`` uint8 (n, H, W)."""
        self.add(torch.bincount(label.flatten(), minlength=256)[: len(self.state)])


class ConstantClass(LabelCounts):
    """The most frequent class, which has the highest mIoU: a constant class c has IoU N_c / N, all others have 0."""

    def output(self) -> Tensor:
        """Logits."""
        return F.one_hot(self.state.argmax(), len(self.state)).float()


class ConstantSaliency(Constant):
    """p = 1/2, the best for maxF and mIoU alike whatever the labels are.

    At any threshold a constant is all salient or all not, and both scores take their best threshold: p = 1/2 has
    both kinds among its thresholds. Nothing is fitted, ``state`` is empty.
    """

    def __init__(self) -> None:
        super().__init__(0)

    def update(self, label: Tensor) -> None:
        """Nothing to learn."""

    def output(self) -> Tensor:
        """Logits."""
        return torch.zeros(2)


class ConstantNormals(Constant):
    """The direction with the smallest mean angle to the labels: their geometric median on the sphere.

    ``state`` (180 * 360, 3) sums the unit vectors in each cell of one degree of polar angle by one of azimuth: the
    direction of a sum is the mean direction of its cell, and its length the number of pixels, to 1 in 10,000.
    """

    def __init__(self) -> None:
        super().__init__(180 * 360, 3)

    def update(self, label: Tensor) -> None:
        """``label`` float32 (n, 3, H, W). Void is the zero vector: it adds nothing to whichever cell it falls in."""
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


class ConstantEdge(LabelCounts):
    """The logit of p = 0.95 N_pos / (0.95 N_pos + 0.05 N_neg), where the derivative of the balanced loss is zero."""

    def __init__(self) -> None:
        super().__init__(2)

    def output(self) -> Tensor:
        """A logit, finite even for labels of one kind."""
        negative, positive = self.state.clamp(min=1e-6)
        return (EDGE_WEIGHT * positive / ((1 - EDGE_WEIGHT) * negative)).log().float()[None]


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


CONSTANTS = {
    "seg": ConstantClass,
    "parts": ConstantClass,
    "sal": ConstantSaliency,
    "normals": ConstantNormals,
    "edge": ConstantEdge,
}


def build_constants(tasks: tuple[str, ...], classes: dict[str, tuple[str, ...]]) -> dict[str, Constant]:
    """One unfitted constant per task; ``classes`` names the classes of seg and parts."""
    return {task: CONSTANTS[task](len(classes[task])) if task in classes else CONSTANTS[task]() for task in tasks}
