"""maxF and mIoU against hand arithmetic and one pass per threshold in NumPy."""

import math

import numpy as np
import pytest
import torch

from train.metrics import Saliency
from train.tasks import VOID


def logits_of(probability: torch.Tensor) -> torch.Tensor:
    """Logits (n, 2, H, W) whose softmax is (1 - p, p)."""
    return torch.stack([torch.zeros_like(probability), probability.logit()], dim=1)


def scored(probability: list, label: list) -> dict[str, float]:
    """Scores of images (n, W) of one row."""
    metric = Saliency()
    metric.update(logits_of(torch.tensor(probability)[:, None]), torch.tensor(label, dtype=torch.uint8)[:, None])
    return metric.compute()


def naive_max_f(probability: np.ndarray, label: np.ndarray) -> float:
    valid = label != VOID
    p, g = probability[valid], label[valid] == 1
    best = 0.0
    for t in np.arange(0.05, 1, 0.05, dtype=np.float32):
        hits = ((p >= t) & g).sum()
        if hits:
            precision, recall = hits / (p >= t).sum(), hits / g.sum()
            best = max(best, 1.3 * precision * recall / (0.3 * precision + recall))
    return 100 * best


def naive_miou(probability: np.ndarray, label: np.ndarray) -> float:
    means = []
    for t in np.linspace(0.2, 0.9, 15, dtype=np.float32):
        ious = []
        for p, g in zip(probability, label):
            valid = g != VOID
            if valid.any():
                p_above, salient = p[valid] > t, g[valid] == 1
                union = (p_above | salient).sum()
                ious.append((p_above & salient).sum() / union if union else 1.0)
        means.append(np.mean(ious))
    return 100 * max(means)


def test_by_hand():
    # From t = 0.65 to 0.9 the prediction is {first}: P = 1, R = 1/2, F = 1.3 * 0.5 / (0.3 + 0.5), IoU = 1/2.
    # From 0.45 to 0.6 it is the first two: P = R = 1/2, so F = 1/2. Below, all but the void one: P = 2/3, R = 1.
    scores = scored([[0.92, 0.62, 0.42, 0.99]], [[1, 0, 1, VOID]])
    assert scores["maxF"] == pytest.approx(100 * 1.3 * 0.5 / 0.8, rel=1e-12)
    assert scores["mIoU"] == pytest.approx(100 * 2 / 3, rel=1e-12)


def test_a_probability_of_one_half_is_above_one_half_for_max_f_only():
    # Were 0.5 above the threshold 0.5 for mIoU too, or not for maxF, the scores would be lower: below 0.5
    # the third pixel is a false positive in either.
    scores = scored([[0.5, 0.5, 0.499, 0.1]], [[1, 1, 0, 0]])
    assert scores["maxF"] == 100
    assert scores["mIoU"] == pytest.approx(100 * 2 / 3, rel=1e-12)


@pytest.mark.parametrize(
    "pair, max_f, miou",
    [
        ((0.04, 0.06), True, False),  # only 0.05 parts them
        ((0.16, 0.19), False, False),  # no threshold does
        ((0.16, 0.21), True, True),  # 0.2
        ((0.86, 0.91), True, True),  # 0.9
        ((0.91, 0.96), True, False),  # 0.95
        ((0.96, 0.99), False, False),  # none
    ],
)
def test_the_range_of_the_thresholds(pair, max_f, miou):
    """Two pixels, the second salient: a threshold between them scores 100."""
    scores = scored([pair], [[0, 1]])
    assert (scores["maxF"] == 100, scores["mIoU"] == 100) == (max_f, miou)


def test_max_f_pools_pixels_and_miou_averages_images():
    # Every threshold in between gives image 1 IoU 1/3 (one hit of three salient) and image 2 IoU 1.
    scores = scored([[0.99, 0.01, 0.01], [0.99, 0.01, 0.01]], [[1, 1, 1], [1, 0, 0]])
    assert scores["mIoU"] == pytest.approx(100 * (1 / 3 + 1) / 2, rel=1e-12)
    assert scores["maxF"] == pytest.approx(100 * 1.3 * 0.5 / (0.3 + 0.5), rel=1e-12)  # P = 1, R = 2/4


def test_empty_images_count_and_void_images_do_not():
    # Image 1 is half right, image 2 rightly empty, image 3 not labelled.
    scores = scored([[0.99, 0.01], [0.01, 0.01], [0.99, 0.99]], [[1, 1], [0, 0], [VOID, VOID]])
    assert scores["mIoU"] == pytest.approx(75, rel=1e-12)


def test_perfect_prediction():
    label = [[0, 1, 1, 0], [0, 0, 0, 0]]
    scores = scored([[0.01, 0.99, 0.99, 0.01], [0.01, 0.01, 0.01, 0.01]], label)
    assert scores == {"maxF": 100, "mIoU": 100}


@pytest.mark.parametrize("seed", range(4))
def test_random_batches_equal_one_pass_per_threshold(seed):
    random = torch.Generator().manual_seed(seed)
    label = (torch.rand(7, 9, 11, generator=random) < 0.3).to(torch.uint8)
    logits = torch.randn(7, 2, 9, 11, generator=random)
    logits[:, 1] += label
    label[torch.rand(label.shape, generator=random) < 0.2] = VOID
    label[5] = VOID
    label[6][label[6] == 1] = 0
    metric = Saliency()
    metric.update(logits, label)
    probability = logits.double().softmax(1)[:, 1].numpy()
    expected = {"maxF": naive_max_f(probability, label.numpy()), "mIoU": naive_miou(probability, label.numpy())}
    assert metric.compute() == pytest.approx(expected, rel=1e-12)


def test_probabilities_on_the_thresholds_equal_one_pass_per_threshold():
    random = torch.Generator().manual_seed(0)
    label = torch.randint(2, (3, 8, 8), generator=random, dtype=torch.uint8)
    # Logits hit only the threshold 0.5 exactly.
    probability = torch.tensor([0.3333, 0.5, 0.6666])[torch.randint(3, label.shape, generator=random)]
    metric = Saliency()
    metric.update(logits_of(probability), label)
    pair = probability.numpy(), label.numpy()
    expected = {"maxF": naive_max_f(*pair), "mIoU": naive_miou(*pair)}
    assert metric.compute() == pytest.approx(expected, rel=1e-12)


def test_without_salient_pixels_there_is_no_max_f():
    scores = scored([[0.3, 0.8]], [[0, 0]])
    assert math.isnan(scores["maxF"])
    assert scores["mIoU"] == 100


def test_without_labels_there_is_no_score():
    assert all(math.isnan(score) for score in scored([[0.3, 0.8]], [[VOID, VOID]]).values())
