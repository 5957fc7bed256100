"""The angular errors against hand arithmetic and the arc cosine."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train.tasks.normals import Normals


def scored(prediction: list, label: list) -> dict[str, float]:
    """Scores of lists of vectors, one per pixel."""
    metric = Normals()
    metric.update(torch.tensor(prediction).T[None, :, None], torch.tensor(label).T[None, :, None])
    return metric.compute()


def scored_angles(*degrees: float) -> dict[str, float]:
    """Scores of pixels with these errors."""
    angles = [math.radians(angle) for angle in degrees]
    return scored([[math.sin(a), 0, math.cos(a)] for a in angles], [[0, 0, 1.0]] * len(angles))


def test_by_hand():
    prediction = [[2.0, 0, 0], [0, 3.0, 0], [1.0, 1.0, 0], [0, 0, -5.0], [1.0, 2.0, 3.0]]
    label = [[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0], [0, 0, 0]]
    # 0, 90, 45 and 180 degrees; the last pixel is void.
    scores = scored(prediction, label)
    assert scores["mErr"] == pytest.approx((0 + 90 + 45 + 180) / 4, rel=1e-6)
    assert scores["rmse"] == pytest.approx(math.sqrt((90**2 + 45**2 + 180**2) / 4), rel=1e-6)
    assert scores["median"] == pytest.approx((45 + 90) / 2, abs=0.011)
    assert (scores["within_11.25"], scores["within_22.5"], scores["within_30"]) == (25, 25, 25)


def test_the_limits_are_strict():
    scores = scored_angles(11.246, 11.254, 22.496, 22.504, 29.996, 30.004, 90, 180)
    assert (scores["within_11.25"], scores["within_22.5"], scores["within_30"]) == (12.5, 37.5, 62.5)


@pytest.mark.parametrize("degrees, median", [([7], 7), ([180], 180), ([1, 2, 50], 2), ([1, 2, 50, 60], 26)])
def test_the_median_is_right_to_a_bin(degrees, median):
    assert scored_angles(*degrees)["median"] == pytest.approx(median, abs=0.011)


def test_small_angles_keep_their_digits():
    # The float32 arc cosine is no better than 0.02 degrees here. The label itself is off by up to 6e-8 rad.
    angle = 1e-4
    label = [[math.sin(angle), 0, math.cos(angle)]]
    assert scored([[0, 0, 1.0]], label)["mErr"] == pytest.approx(math.degrees(angle), abs=math.degrees(1e-7))


def test_perfect_prediction():
    label = F.normalize(torch.randn(2, 3, 5, 6), dim=1)
    metric = Normals()
    metric.update(4 * label, label)
    scores = metric.compute()
    assert scores["mErr"] == scores["rmse"] == 0 and scores["within_11.25"] == 100


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
        pairs = zip(*(v.double().movedim(1, -1).reshape(-1, 3).numpy() for v in (prediction, label)), strict=True)
        angles += [np.arccos(p @ g / np.linalg.norm(p) / np.linalg.norm(g)) for p, g in pairs if g.any()]
    degrees, scores = np.degrees(angles), metric.compute()
    assert scores["mErr"] == pytest.approx(degrees.mean(), rel=1e-6)
    assert scores["rmse"] == pytest.approx(np.sqrt((degrees**2).mean()), rel=1e-6)
    assert scores["median"] == pytest.approx(np.median(degrees), abs=0.0051)
    for limit in (11.25, 22.5, 30):
        assert scores[f"within_{limit}"] == pytest.approx(100 * (degrees < limit).mean(), rel=1e-12)


def test_without_labels_there_is_no_score():
    assert all(math.isnan(score) for score in scored([[1.0, 0, 0]], [[0.0, 0, 0]]).values())
