"""The F-measures and mIoU against hand arithmetic and one pass per threshold in NumPy."""

import math

import numpy as np
import pytest
import torch

from train.tasks import VOID
from train.tasks.sal import Saliency


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


def naive_max_f_invpt(probability: np.ndarray, label: np.ndarray) -> float:
    """The code of InvPT: the sigmoid of a probability."""
    return naive_max_f(1 / (1 + np.exp(-probability)), label)


def naive_max_f_a(probability: np.ndarray, label: np.ndarray) -> float:
    scores = []
    for t in np.linspace(0.2, 0.9, 15, dtype=np.float32):
        pairs = []
        for p, g in zip(probability, label, strict=True):
            valid = g != VOID
            if valid.any():
                above, salient = p[valid] > t, g[valid] == 1
                hits = (above & salient).sum()
                pairs.append((hits / (above.sum() + 1e-12), hits / (salient.sum() + 1e-12)))
        precision, recall = np.mean(pairs, axis=0)
        scores.append(2 * precision * recall / (precision + recall + 1e-12))
    return 100 * max(scores)


def naive_scores(probability: np.ndarray, label: np.ndarray) -> dict[str, float]:
    functions = {"maxF": naive_max_f, "maxF_invpt": naive_max_f_invpt, "mIoU": naive_miou, "maxF_A": naive_max_f_a}
    return {name: function(probability, label) for name, function in functions.items()}


def naive_miou(probability: np.ndarray, label: np.ndarray) -> float:
    means = []
    for t in np.linspace(0.2, 0.9, 15, dtype=np.float32):
        ious = []
        for p, g in zip(probability, label, strict=True):
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
    assert (scores["maxF"], scores["mIoU"]) == (100, 100)
    # The empty image has P = R = 0, and squashing twice changes nothing.
    assert scores["maxF_A"] == pytest.approx(50) and scores["maxF_invpt"] == 100


def test_two_empty_images_of_three_leave_a_third_of_max_f_a():
    scores = scored([[0.99, 0.01], [0.01, 0.01], [0.99, 0.01]], [[1, 0], [0, 0], [0, 0]])
    # Image 1: P = R = 1; image 2 predicts nothing, image 3 wrongly something: P = R = 0.
    assert scores["maxF_A"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("threshold", [0.2007, 0.4055, 0.6190, 0.8473])
def test_squashing_twice_leaves_four_thresholds(threshold):
    scores = scored([[threshold - 1e-3, threshold + 1e-3]], [[0, 1]])
    assert scores["maxF_invpt"] == 100


@pytest.mark.parametrize("low, high", [(0.01, 0.19), (0.21, 0.39), (0.41, 0.61), (0.63, 0.84), (0.86, 0.99)])
def test_squashing_twice_blurs_what_lies_between(low, high):
    """No threshold parts them, so the best is "all is salient": P = 1/2, R = 1."""
    assert scored([[low, high]], [[0, 1]])["maxF_invpt"] == pytest.approx(100 * 1.3 * 0.5 / (0.3 * 0.5 + 1))


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
    assert metric.compute() == pytest.approx(naive_scores(probability, label.numpy()), rel=1e-10)


def test_probabilities_on_the_thresholds_equal_one_pass_per_threshold():
    random = torch.Generator().manual_seed(0)
    label = torch.randint(2, (3, 8, 8), generator=random, dtype=torch.uint8)
    # Logits hit only the threshold 0.5 exactly.
    probability = torch.tensor([0.3333, 0.5, 0.6666])[torch.randint(3, label.shape, generator=random)]
    metric = Saliency()
    metric.update(logits_of(probability), label)
    assert metric.compute() == pytest.approx(naive_scores(probability.numpy(), label.numpy()), rel=1e-10)


def test_without_salient_pixels_there_is_no_max_f():
    scores = scored([[0.3, 0.8]], [[0, 0]])
    assert math.isnan(scores["maxF"]) and math.isnan(scores["maxF_invpt"])
    assert (scores["mIoU"], scores["maxF_A"]) == (100, 0)


def test_without_labels_there_is_no_score():
    assert all(math.isnan(score) for score in scored([[0.3, 0.8]], [[VOID, VOID]]).values())
