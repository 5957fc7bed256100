"""Test-time augmentation: a model over resized and mirrored copies of each image.

    --tta flip,0.75,1.25    six passes: the image and its copies at 3/4 and 5/4 of its size, each also mirrored

Every prediction is resized to the image as raw output, as the field does, then turned into a soft label: probabilities,
unit vectors or metres (:meth:`train.tasks.Task.soft_label`). The rules that transform labels in training then undo
what was done to the image: a mirrored normal changes the sign of x, and what was enlarged looked nearer. The mean of
the soft labels becomes raw output again, which the protocol treats like that of one pass.

Segmentation averages probabilities rather than logits, as DeepLab and MMSegmentation do: the range of logits differs
from copy to copy, and a confident one would outvote the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.errors import UserError
from model import ExportedModel, MultiTaskModel
from train.tasks import TASKS, Shape, Task

FLIP = "flip"
SCALES = (0.25, 4.0)


@dataclass(frozen=True)
class Copy:
    """One copy of an image of ``shape``: resized to ``resized`` and mirrored if ``mirrored``."""

    shape: Shape
    resized: Shape
    mirrored: bool

    @property
    def factor(self) -> float:
        """By which the copy is larger; the mean of both sides, which are rounded to patches."""
        return float(np.sqrt(np.prod(self.resized) / np.prod(self.shape)))

    def of(self, images: Tensor) -> Tensor:
        """The copies of images (B, 3, H, W), antialiased where they shrink."""
        if self.resized != self.shape:
            images = F.interpolate(images.float(), self.resized, mode="bilinear", antialias=True)
        return images.flip(-1) if self.mirrored else images

    def undo(self, task: Task, output: Tensor) -> Tensor:
        """Raw output for copies (n, C, h, w) -> soft labels of the images (n, K, H, W), on the CPU. All are NaN where
        an output is not finite, which a probability would hide."""
        resized = F.interpolate(output.float(), self.shape, mode="bilinear")
        soft = task.soft_label(resized).where(resized.isfinite().all(), torch.nan)
        labels = [task.rescale(label, 1 / self.factor) for label in soft.movedim(1, -1).cpu().numpy()]
        if self.mirrored:
            labels = [task.flip(label) for label in labels]
        return torch.from_numpy(np.stack(labels)).movedim(-1, 1)


@dataclass(frozen=True)
class AugmentedModel:
    """``model`` over the ``copies`` of its images, called like ``model`` itself: raw outputs, on the CPU."""

    model: MultiTaskModel | ExportedModel
    copies: tuple[Copy, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.model.tasks

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, images: Tensor, *index: Any) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        for copy in self.copies:
            for name, output in self.model(copy.of(images), *index).items():
                share = copy.undo(TASKS[name], output) / len(self.copies)
                means[name] = means[name] + share if name in means else share
        return {name: TASKS[name].from_soft_label(mean) for name, mean in means.items()}


M = TypeVar("M", MultiTaskModel, ExportedModel)


def augment(model: M, text: str, shape: Shape) -> M | AugmentedModel:
    """``model`` with the augmentation that ``text`` says, for images of ``shape``; itself where ``text`` is empty."""
    if not text:
        return model
    mirrored, scales = parse_tta(text)
    resized = [shape]
    if isinstance(model, MultiTaskModel):
        resized += [resized_to(shape, scale, model.patch) for scale in scales]
    elif scales:
        raise UserError(f"--tta {text}: an exported program takes images of one size: use --tta flip, or a checkpoint")
    if len(set(resized)) < len(resized):
        sizes = ", ".join(f"{width} x {height}" for height, width in resized)
        raise UserError(f"--tta {text}: in whole patches two sizes are equal ({sizes}): choose scales further apart")
    return AugmentedModel(model, tuple(Copy(shape, *each) for each in product(resized, (False, True)[: 1 + mirrored])))


def parse_tta(text: str) -> tuple[bool, Sequence[float]]:
    """``"flip,0.75,1.25"`` -> (True, (0.75, 1.25)): whether images are mirrored too, and the scales other than 1."""
    words = [word.strip() for word in text.split(",")]
    scales = [_scale(word, text) for word in words if word != FLIP]
    if twice := [word for word in words if words.count(word) > 1]:
        raise UserError(f"--tta {text}: {twice[0]} is given twice")
    return FLIP in words, tuple(scale for scale in scales if scale != 1)


def _scale(word: str, text: str) -> float:
    low, high = SCALES
    try:
        scale = float(word)
        if low <= scale <= high:
            return scale
    except ValueError:
        pass
    raise UserError(f"--tta {text}: {word!r} is neither flip nor a scale in {low}..{high}, such as flip,0.75,1.25")


def resized_to(shape: Shape, scale: float, patch: int) -> Shape:
    """``shape`` times ``scale``, each side rounded to a multiple of ``patch``, which is the least."""
    height, width = (max(round(side * scale / patch), 1) * patch for side in shape)
    return height, width
