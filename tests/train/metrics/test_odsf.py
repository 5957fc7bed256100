"""odsF, oisF and AP against hand arithmetic, plain loops and, where it is installed, pyEdgeEval."""

import math
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.morphology import thin as skimage_thin

from kernels.errors import UserError
from train.datasets.pascal.mat import read_label_map
from train.metrics import odsf
from train.metrics.boundary import boundaries, count_matches, smooth, suppress_non_maxima
from train.metrics.odsf import (
    VARIANTS,
    BoundaryScore,
    average_precision,
    count_image,
    precision_recall,
    quantise,
    score_boundaries,
)
from train.metrics.thinning import thin


def squares(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A LabelMap of overlapping rectangles."""
    random = np.random.default_rng(seed)
    label_map = np.zeros((height, width), np.uint16)
    for value in range(1, 5):
        y, x = random.integers(0, height - 15), random.integers(0, width - 15)
        label_map[y : y + random.integers(8, 30), x : x + random.integers(8, 40)] = value
    return label_map


def guess(label_map: np.ndarray, seed: int, noise: float = 3) -> np.ndarray:
    """A prediction of its boundaries: displaced, blurred, with noise."""
    random = np.random.default_rng(seed)
    blurred = gaussian_filter(np.roll(boundaries(label_map), 1, axis=1).astype(float), 1.5)
    blobs = gaussian_filter(random.standard_normal(label_map.shape), 1.5)
    return quantise(torch.from_numpy(12 * blurred + noise * blobs - 3))


def image(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return guess(squares(seed), seed), squares(seed)


def naive_counts(prediction: np.ndarray, label_map: np.ndarray, variant: str) -> np.ndarray:
    """Every threshold on its own."""
    values = prediction / 255
    if variant == "seism":
        values = suppress_non_maxima(values, 1)
        masks = [values > float(t) for t in ["0.001", *(f"{i / 100:.2f}" for i in range(1, 100)), "0.999"]]
    else:
        if variant == "iz":
            values = (255 * suppress_non_maxima(smooth(values, 1), 4) + 0.5).astype(int) / 255
        masks = [values >= float(f"{i / 100:.2f}") for i in range(1, 100)]
    true, rows = skimage_thin(boundaries(label_map)), []
    for mask in masks:
        predicted = skimage_thin(mask)
        matched = count_matches(predicted, true, 0.0075 * math.hypot(*label_map.shape))
        rows.append([matched, true.sum(), matched, predicted.sum()])
    return np.array(rows)


def scored(*counts: list) -> dict[str, float]:
    """Scores of images that each have these counts at the first thresholds, and match nothing at the others."""
    score = BoundaryScore("none")
    for rows in counts:
        rest = [[0, rows[0][1], 0, 0]] * (99 - len(rows))
        score.add_image(np.array([*rows, *rest]))
    return score.compute()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(2))
def test_counts_equal_a_loop_over_thresholds(variant, seed):
    counts = count_image(*image(seed), variant)
    assert np.array_equal(counts, naive_counts(*image(seed), variant))
    assert len(np.unique(counts, axis=0)) > 20


@pytest.mark.parametrize("variant, extremes", [("seism", (0.001, 0.999, 101)), ("none", (0.01, 0.99, 99))])
def test_thresholds(variant, extremes):
    thresholds = VARIANTS[variant].thresholds
    assert (thresholds[0], thresholds[-1], len(thresholds)) == extremes
    assert (np.diff(thresholds) > 0).all()


def test_few_levels_are_counted_once_each(monkeypatch):
    """A prediction of three levels above 0 has three masks, and the empty one above them."""
    calls = []
    monkeypatch.setattr(odsf, "_count_mask", lambda *arguments: calls.append(arguments) or (0, 0, 0, 0))
    prediction = np.zeros((6, 8), np.uint8)
    prediction[1, 1], prediction[2, 2], prediction[3, 3] = 60, 120, 250
    count_image(prediction, np.zeros((6, 8), np.uint8), "none")
    assert len(calls) == 4


def test_a_value_on_a_threshold_is_above_it_only_if_inclusive():
    label_map = np.zeros((9, 9), np.uint8)
    prediction = np.full((9, 9), 51, np.uint8)  # 51 / 255 = 0.2
    assert np.count_nonzero(count_image(prediction, label_map, "none")[:, 3]) == 20


@pytest.mark.parametrize("shift, percent", [(4, 100), (5, 0)])
def test_the_distance_at_500_x_375(shift, percent):
    """0.0075 of the diagonal are 4.6875 pixels."""
    label_map = np.zeros((375, 500), np.uint16)
    label_map[:, 250:] = 1
    prediction = np.zeros(label_map.shape, np.uint8)
    prediction[:, 249 + shift] = 255
    score = BoundaryScore("none")
    score.add_image(count_image(prediction, label_map, "none"))
    assert score.compute()["odsF"] == percent


def test_boundaries_that_are_predicted_as_they_are():
    score = BoundaryScore("none")
    for seed in range(3):
        label_map = squares(seed)
        score.add_image(count_image(255 * boundaries(label_map).astype(np.uint8), label_map, "none"))
    assert score.compute() == {"odsF": 100, "oisF": 100, "AP": 0, "threshold": 0.01}  # AP: all recalls are 1


def test_scores_by_hand():
    # Image 1: P = 4/8, R = 4/4 at 0.01 and P = 3/3, R = 3/4 at 0.02. Image 2: P = 6/6, R = 6/12, then nothing.
    scores = scored([[4, 4, 4, 8], [3, 4, 3, 3]], [[6, 12, 6, 6]])
    # Pooled: 10 of 14 predicted and of 16 true at 0.01; 3 of 3 and of 16 at 0.02.
    assert scores["odsF"] == pytest.approx(100 * 2 * 10 / (14 + 16), rel=1e-12)
    assert scores["threshold"] == 0.01
    # Image 1 is best at 0.02 (6/7 against 2/3), image 2 at 0.01: 9 of 9 predicted and of 16 true.
    assert scores["oisF"] == pytest.approx(100 * 2 * 9 / (9 + 16), rel=1e-12)
    # The curve from (R, P) = (0, 1) by (3/16, 1) to (10/16, 10/14): 1 at 19 recalls, then down over 0.19 .. 0.62.
    slope = (10 / 14 - 1) / (7 / 16)
    area = 19 + sum(1 + slope * (r / 100 - 3 / 16) for r in range(19, 63))
    assert scores["AP"] == pytest.approx(area, rel=1e-12)


def test_of_equal_thresholds_the_lowest_is_named():
    assert scored([[1, 2, 1, 2], [2, 2, 2, 2], [2, 2, 2, 2], [0, 2, 0, 0]])["threshold"] == 0.02


def test_precision_and_recall_of_nothing():
    counts = np.array([[0, 5, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0], [0, 5, 0, 5]])
    precision, recall = precision_recall(counts)
    assert precision.tolist() == [1, 0, 1, 0] and recall.tolist() == [0, 1, 0, 0]


def test_average_precision_of_a_perfect_curve_has_101_terms():
    assert average_precision(np.ones(3), np.array([0, 0.3, 1])) == pytest.approx(1.01)
    assert average_precision(np.ones(3), np.full(3, 0.7)) == 0


def test_without_boundaries_there_is_no_score():
    assert all(math.isnan(score) for score in BoundaryScore("none").compute().values())
    assert all(math.isnan(score) for score in scored([[0, 0, 0, 5]]).values())


def test_states_add():
    parts = [BoundaryScore("iz") for _ in range(3)]
    for part, seeds in zip(parts, ((0, 1, 2), (0,), (1, 2)), strict=True):
        for seed in seeds:
            part.add_image(count_image(*image(seed), "iz"))
    parts[1].merge(parts[2])
    assert torch.equal(parts[0].state, parts[1].state)
    assert 0 < parts[0].compute()["odsF"] <= parts[0].compute()["oisF"] < 100


def test_any_number_of_workers_gives_the_same(own_processes):
    jobs = [partial(image, seed) for seed in range(7)]
    alone = score_boundaries(jobs, "seism", workers=0, title="")
    assert 40 < alone.compute()["odsF"] < 100
    for workers in (1, 2, 3):
        assert torch.equal(score_boundaries(iter(jobs), "seism", workers, title="").state, alone.state)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_line(own_processes):
    with pytest.raises(UserError, match="^a process that matches boundaries was killed.*fewer --workers$"):
        score_boundaries([killed], "seism", workers=1, title="")


def test_a_prediction_of_another_size_is_refused():
    with pytest.raises(UserError, match=r"\(4, 5\).*\(5, 4\)"):
        count_image(np.zeros((4, 5), np.uint8), np.zeros((5, 4), np.uint8), "none")


def test_quantising_cuts_off():
    probability = torch.tensor([0, 0.999 / 255, 1.001 / 255, 0.5, 254.9 / 255, 1])
    assert quantise(probability.logit()).tolist() == [0, 0, 1, 127, 254, 255]
    assert quantise(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == np.uint8


def test_against_pyedgeeval(pascal_mini):
    """F at some thresholds on real LabelMaps, within 0.001: its matching draws random numbers and loses some pairs,
    more of them the better the prediction."""
    reason = "pyEdgeEval is not installed (pip install --no-build-isolation pyEdgeEval)"
    correspond_pixels = pytest.importorskip("pyEdgeEval._lib.correspond_pixels", reason=reason).correspond_pixels
    paths = sorted((pascal_mini / "pascal-context" / "trainval").glob("bsds_*.mat"))[:8]
    ours, theirs = np.zeros((2, 99, 4))
    some = slice(4, 99, 15)
    for seed, path in enumerate(paths):
        label_map = read_label_map(path)
        prediction, true = guess(label_map, seed, noise=8), thin(boundaries(label_map))
        ours += count_image(prediction, label_map, "none")
        for i in range(99)[some]:
            predicted = thin(prediction / 255 >= (i + 1) / 100)
            of_predicted, of_true, _, _ = correspond_pixels(predicted, true)
            matched = [np.count_nonzero(found) for found in (of_true, of_predicted)]
            theirs[i] += matched[0], true.sum(), matched[1], predicted.sum()
    f_ours, f_theirs = (odsf.f_measure(*precision_recall(counts[some])) for counts in (ours, theirs))
    assert 0.6 < f_ours.max() < 0.8
    np.testing.assert_allclose(f_ours, f_theirs, rtol=0, atol=0.001)


def test_a_mask_is_taken_for_the_boundaries_themselves():
    """Predicted at the pixels of the mask, all of it matches; two pixels beside it, what the distance allows."""
    mask = np.zeros((40, 60), bool)
    mask[20, 12:48] = True
    counts = count_image(255 * mask.astype(np.uint8), mask, "none")
    assert (counts == np.count_nonzero(mask)).all()
    beside = 255 * np.roll(mask, 2, axis=0).astype(np.uint8)
    reach = 2 / np.hypot(40, 60)
    assert count_image(beside, mask, "none", 1.01 * reach)[0, 0] == np.count_nonzero(mask)
    assert count_image(beside, mask, "none", 0.99 * reach)[0, 0] == 0
