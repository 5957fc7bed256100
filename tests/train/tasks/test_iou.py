"""The mean IoU against hand arithmetic and loops over classes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train.tasks import VOID
from train.tasks.classes import ConfusionIoU


def logits_of(classes: torch.Tensor, count: int) -> torch.Tensor:
    """Logits (n, count, H, W) whose largest is the given class."""
    return F.one_hot(classes.long(), count).movedim(-1, 1).float()


def scored(prediction: list[int], label: list[int], count: int) -> ConfusionIoU:
    metric = ConfusionIoU(count)
    metric.update(logits_of(torch.tensor([[prediction]]), count), torch.tensor([[label]], dtype=torch.uint8))
    return metric


def test_by_hand():
    # class 0: 1 of 1 + 1 FN + 1 FP = 1/3; class 1: 2 of 2 + 1 FP = 2/3; class 2: 0 of 1 FN = 0; void is nobody's.
    metric = scored([0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 2, VOID], count=3)
    torch.testing.assert_close(metric.per_class(), torch.tensor([100 / 3, 200 / 3, 0], dtype=torch.float64))
    assert metric.compute() == pytest.approx({"mIoU": 100 / 3, "mIoU_field": 100 / 3}, rel=1e-12)


def test_classes_without_labels_are_left_out_or_count_as_0():
    # Class 2 is predicted once and never labelled: its false positive is class 1's false negative.
    metric = scored([0, 2, 1], [0, 1, 1], count=4)
    assert metric.per_class()[:2].tolist() == [100, 50]
    assert metric.per_class()[2:].isnan().all()
    assert metric.compute() == {"mIoU": 75, "mIoU_field": 37.5}


def test_perfect_prediction():
    label = torch.randint(5, (2, 6, 6), dtype=torch.uint8)
    metric = ConfusionIoU(5)
    metric.update(logits_of(label, 5), label)
    assert metric.compute() == {"mIoU": 100, "mIoU_field": 100}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_batches_equal_the_naive_loop(dtype):
    random = torch.Generator().manual_seed(0)
    metric = ConfusionIoU(6)
    hits, unions, labelled = np.zeros(6), np.zeros(6), np.zeros(6)
    for _ in range(3):
        prediction = torch.randn(2, 6, 7, 5, generator=random).to(dtype)
        label = torch.randint(5, (2, 7, 5), generator=random, dtype=torch.uint8)  # class 5 never occurs
        label[torch.rand(label.shape, generator=random) < 0.2] = VOID
        metric.update(prediction, label)
        valid = label.numpy() != VOID
        predicted = prediction.float().numpy().argmax(1)
        for c in range(6):
            p, g = valid & (predicted == c), valid & (label.numpy() == c)
            hits[c] += (p & g).sum()
            unions[c] += (p | g).sum()
            labelled[c] += g.sum()
    expected = 100 * (hits / unions)[labelled > 0]
    np.testing.assert_allclose(metric.per_class()[:5], expected, rtol=1e-12)
    scores = {"mIoU": expected.mean(), "mIoU_field": expected.sum() / 6}
    assert metric.compute() == pytest.approx(scores, rel=1e-12)


def test_random_batches_equal_scikit_learn():
    jaccard_score = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed").jaccard_score
    random = torch.Generator().manual_seed(1)
    prediction = torch.randn(3, 6, 9, 8, generator=random)
    label = torch.randint(5, (3, 9, 8), generator=random, dtype=torch.uint8)
    metric = ConfusionIoU(6)
    metric.update(prediction, label)
    expected = 100 * jaccard_score(label.flatten(), prediction.argmax(1).flatten(), labels=range(6), average="macro")
    assert metric.compute()["mIoU_field"] == pytest.approx(expected, rel=1e-12)


def test_without_labels_there_is_no_score():
    metric = scored([0, 1], [VOID, VOID], count=3)
    assert all(math.isnan(score) for score in metric.compute().values())
