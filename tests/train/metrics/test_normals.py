"""The mean angular error against hand arithmetic and the arc cosine."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train.metrics import Normals


def scored(prediction: list, label: list) -> float:
    """mErr of lists of vectors, one per pixel."""
    metric = Normals()
    metric.update(torch.tensor(prediction).T[None, :, None], torch.tensor(label).T[None, :, None])
    return metric.compute()["mErr"]


def test_by_hand():
    prediction = [[2.0, 0, 0], [0, 3.0, 0], [1.0, 1.0, 0], [0, 0, -5.0], [1.0, 2.0, 3.0]]
    label = [[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0], [0, 0, 0]]
    # 0, 90, 45 and 180 degrees; the last pixel is void.
    assert scored(prediction, label) == pytest.approx((0 + 90 + 45 + 180) / 4, rel=1e-6)


def test_small_angles_keep_their_digits():
    # The float32 arc cosine is no better than 0.02 degrees here. The label itself is off by up to 6e-8 rad.
    angle = 1e-4
    label = [[math.sin(angle), 0, math.cos(angle)]]
    assert scored([[0, 0, 1.0]], label) == pytest.approx(math.degrees(angle), abs=math.degrees(1e-7))


def test_perfect_prediction():
    label = F.normalize(torch.randn(2, 3, 5, 6), dim=1)
    metric = Normals()
    metric.update(4 * label, label)
    assert metric.compute()["mErr"] == 0


def test_neither_length_matters():
    random = torch.Generator().manual_seed(0)
    prediction, label = torch.randn(2, 2, 3, 5, 6, generator=random)
    one, other = Normals(), Normals()
    one.update(prediction, label)
    other.update(prediction / 3, 5 * label)
    assert one.compute()["mErr"] == pytest.approx(other.compute()["mErr"], rel=1e-6)


def test_random_batches_equal_the_arc_cosine():
    random = torch.Generator().manual_seed(0)
    metric, angles = Normals(), []
    for _ in range(3):
        prediction, label = torch.randn(2, 2, 3, 7, 5, generator=random)
        label = F.normalize(label, dim=1) * (torch.rand(2, 1, 7, 5, generator=random) > 0.3)
        metric.update(prediction, label)
        pairs = zip(*(v.double().movedim(1, -1).reshape(-1, 3).numpy() for v in (prediction, label)))
        angles += [np.arccos(p @ g / np.linalg.norm(p) / np.linalg.norm(g)) for p, g in pairs if g.any()]
    assert metric.compute()["mErr"] == pytest.approx(np.degrees(np.mean(angles)), rel=1e-6)


def test_without_labels_there_is_no_score():
    assert math.isnan(scored([[1.0, 0, 0]], [[0.0, 0, 0]]))
