"""The pooled edge loss against hand arithmetic, the training loss and a naive mean."""

import math

import numpy as np
import pytest
import torch

from train.tasks import VOID
from train.tasks.edge import EdgeLoss, edge_loss


def random_batch(seed: int, void: float) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    label = (torch.rand(2, 6, 7, generator=random) < 0.2).to(torch.uint8)
    label[torch.rand(label.shape, generator=random) < void] = VOID
    return 3 * torch.randn(2, 1, 6, 7, generator=random), label


def test_by_hand():
    # p = 3/4 on an edge, 1/2 beside it twice; the last pixel is void.
    logits = torch.tensor([math.log(3), 0.0, 0.0, 9.0]).reshape(1, 1, 1, 4)
    label = torch.tensor([[[1, 0, 0, VOID]]], dtype=torch.uint8)
    metric = EdgeLoss()
    metric.update(logits, label)
    expected = (0.95 * math.log(4 / 3) + 2 * 0.05 * math.log(2)) / 3
    assert metric.compute() == {"loss": pytest.approx(expected, rel=1e-6), "odsF": None}


def test_one_batch_is_the_training_loss():
    prediction, label = random_batch(0, void=0.3)
    metric = EdgeLoss()
    metric.update(prediction, label)
    assert metric.compute()["loss"] == pytest.approx(edge_loss(prediction, label).item(), rel=1e-6)


def test_batches_weigh_by_their_valid_pixels():
    metric, terms = EdgeLoss(), []
    for seed, void in enumerate((0.0, 0.5, 0.95, 1.0)):
        prediction, label = random_batch(seed, void)
        metric.update(prediction, label)
        for z, y in zip(prediction.double().flatten().numpy(), label.flatten().numpy(), strict=True):
            if y != VOID:
                terms.append(0.95 * np.log1p(np.exp(-z)) if y else 0.05 * np.log1p(np.exp(z)))
    assert metric.compute()["loss"] == pytest.approx(np.mean(terms), rel=1e-6)


def test_perfect_prediction():
    _, label = random_batch(0, void=0.3)
    metric = EdgeLoss()
    metric.update(torch.where(label == 1, 200.0, -200.0)[:, None], label)
    assert metric.compute()["loss"] == 0


def test_without_labels_there_is_no_score():
    metric = EdgeLoss()
    metric.update(*random_batch(0, void=1.0))
    assert math.isnan(metric.compute()["loss"])
