"""The five training losses of protocol family B (ATRC, InvPT): one formula per task.

``loss(prediction, label)`` takes the raw output of a head and the collated labels of :mod:`train.tasks.names`:

=======  ==========================  =================================
task     prediction                  label
=======  ==========================  =================================
seg      (n, classes, H, W) logits   uint8 (n, H, W)
parts    (n, 7, H, W) logits         uint8 (n, H, W)
sal      (n, 2, H, W) logits         uint8 (n, H, W)
normals  (n, 3, H, W) unnormalised   float32 (n, 3, H, W)
edge     (n, 1, H, W) logit          uint8 (n, H, W)
=======  ==========================  =================================

and gives a float32 scalar: a sum over valid pixels / max(#valid, 1), computed in float32 whatever the dtype of the
prediction. A batch that is void everywhere costs 0 and has zero gradients. Nothing here waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from train.tasks.names import VOID

EDGE_WEIGHT = 0.95


def class_loss(prediction: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy, family B: sum over valid / max(#valid, 1). ``weight`` (C,) scales the pixels of each class."""
    # Not reduction="sum": on CUDA that has no deterministic implementation.
    per_pixel = F.cross_entropy(prediction.float(), label.long(), weight, ignore_index=VOID, reduction="none")
    return _mean_over_valid(per_pixel, label != VOID)


def saliency_loss(prediction: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy with class weights [1 - w, w], w = N_neg / N_valid over the batch: the rarer class weighs more."""
    w = (label == 0).sum() / (label != VOID).sum().clamp(min=1)
    return class_loss(prediction, label, torch.stack([1 - w, w]))


def normals_loss(prediction: Tensor, label: Tensor) -> Tensor:
    """L1 distance of the normalised prediction to the label, summed over the 3 channels / max(#valid pixels, 1).

    Family A divides by the number of elements instead: a third of this.
    """
    valid = (label != 0).any(1)
    per_pixel = (unit(prediction.float()) - label).abs().sum(1)
    return _mean_over_valid(per_pixel * valid, valid)


def edge_loss(prediction: Tensor, label: Tensor) -> Tensor:
    """Balanced binary cross-entropy: the mean over valid pixels of 0.95 l_pos + 0.05 l_neg."""
    return _mean_over_valid(balanced_bce(prediction, label), label != VOID)


def balanced_bce(prediction: Tensor, label: Tensor) -> Tensor:
    """Per pixel (n, H, W), float32: 0.95 x BCE on edges, 0.05 x BCE elsewhere, 0 on void.

    The same as 0.05 x BCE with pos_weight = w / (1 - w) = 19.
    """
    positive = label == 1
    weight = torch.where(positive, EDGE_WEIGHT, 1 - EDGE_WEIGHT) * (label != VOID)
    logit = prediction.squeeze(1).float()
    return F.binary_cross_entropy_with_logits(logit, positive.float(), weight, reduction="none")


def unit(vectors: Tensor) -> Tensor:
    """Vectors along dim 1 of (n, 3, ...) over max(their length, 1e-12), so (0, 0, 0) stays as it is.

    ``F.normalize`` computes the same, but its norm over a strided dimension is some forty times slower on CPUs.
    """
    return vectors * vectors.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()


def _mean_over_valid(per_pixel: Tensor, valid: Tensor) -> Tensor:
    return per_pixel.sum() / valid.sum().clamp(min=1)


LOSSES = {"seg": class_loss, "parts": class_loss, "sal": saliency_loss, "normals": normals_loss, "edge": edge_loss}
LOSS_WEIGHTS = {"seg": 1, "parts": 2, "sal": 5, "normals": 10, "edge": 50}
