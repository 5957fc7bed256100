"""odsF, oisF and AP of boundaries as SEISM computes them (https://github.com/jponttuset/seism, measure ``fb``), without
MATLAB.

A prediction is the uint8 (H, W) that the field writes to a PNG, at the size of its truth; :func:`quantise` makes it.
The truth is a LabelMap or, as a mask, the boundaries themselves. At each threshold a prediction becomes a mask, which
is thinned and matched with the thinned true boundaries, within a share of the diagonal. Counts are integers, so scores
do not depend on how a set is divided over processes.
Published numbers differ in how a prediction becomes a mask; each such rule is a :class:`Variant`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from operator import length_hint
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.errors import UserError
from train.files.processes import process_map
from train.files.progress import progress
from train.metrics.base import Additive
from train.metrics.boundary import Map, Mask, boundaries, count_matches, smooth, suppress_non_maxima
from train.metrics.thinning import thin

MAX_DISTANCE = 0.0075  # of the diagonal, on PASCAL-Context
PERCENT = np.arange(1, 100) / 100

Prediction = NDArray[np.uint8]
Truth = NDArray  # a LabelMap, or a mask of boundaries
Counts = NDArray[np.int64]
Load = Callable[[], tuple[Prediction, Truth]]


class Variant(NamedTuple):
    """How a prediction is read: its values in [0, 1], and the thresholds that they have to exceed or, if
    ``inclusive``, to reach. Values are compared as float64, so that 51 / 255 equals 0.2."""

    read: Callable[[Prediction], Map]
    thresholds: Map
    inclusive: bool


def _as_it_is(prediction: Prediction) -> Map:
    return prediction / 255


def _suppressed(prediction: Prediction) -> Map:
    return suppress_non_maxima(prediction / 255, reach=1)


def _smoothed_suppressed(prediction: Prediction) -> Map:
    """Rounded to steps of 1 / 255, since the original program writes a PNG in between."""
    return np.floor(255 * suppress_non_maxima(smooth(prediction / 255, 1), reach=4) + 0.5) / 255


VARIANTS = {
    # InvPT, TaskPrompter, MLoRE and MTMamba (their Boundary-Detection-Evaluation-Tools), ASTMT, RCM, TADFormer
    "seism": Variant(_suppressed, np.concatenate([[0.001], PERCENT, [0.999]]), inclusive=False),
    # Multi-Task-Learning-PyTorch (MTI-Net)
    "none": Variant(_as_it_is, PERCENT, inclusive=True),
    # MTDP and SAK (innovator-zero/seism)
    "iz": Variant(_smoothed_suppressed, PERCENT, inclusive=True),
}


def quantise(logits: Tensor) -> Prediction:
    """The field's PNG of edge logits of any shape: 255 x their sigmoid, truncated."""
    return (255 * logits.float().sigmoid()).to(torch.uint8).cpu().numpy()


def count_image(prediction: Prediction, truth: Truth, variant: str, max_distance: float = MAX_DISTANCE) -> Counts:
    """SEISM's counts, int64 (thresholds, 4): matched and all true pixels (cntR, sumR), then predicted (cntP, sumP)."""
    if prediction.shape != truth.shape:
        raise UserError(f"a prediction {prediction.shape} and its LabelMap {truth.shape} differ in size")
    read, thresholds, inclusive = VARIANTS[variant]
    passed = np.searchsorted(thresholds, read(prediction), side="right" if inclusive else "left")
    occurs = np.bincount(passed.ravel(), minlength=len(thresholds) + 1) > 0

    true = thin(truth if truth.dtype == bool else boundaries(truth))
    radius = max_distance * np.hypot(*truth.shape)
    counts = np.empty((len(thresholds), 4), np.int64)
    for i in range(len(thresholds)):
        # Where no value lies between two thresholds, the mask is the same.
        same = i and not occurs[i]
        counts[i] = counts[i - 1] if same else _count_mask(passed > i, true, radius)
    return counts


def _count_mask(mask: Mask, true: Mask, radius: float) -> tuple[int, int, int, int]:
    predicted = thin(mask)
    matched = count_matches(predicted, true, radius)
    return matched, int(np.count_nonzero(true)), matched, int(np.count_nonzero(predicted))


class BoundaryScore(Additive):
    """The scores of a set of images.

    ``state`` (thresholds + 1, 4) sums the counts of :func:`count_image` over the images. The last row sums
    the counts of each image at its best threshold, the lowest if several are equal.
    """

    def __init__(self, variant: str) -> None:
        self.thresholds = VARIANTS[variant].thresholds
        super().__init__(len(self.thresholds) + 1, 4)

    def add_image(self, counts: Counts) -> None:
        """Adds the counts of an image."""
        best = f_measure(*precision_recall(counts)).argmax()
        self.add(torch.from_numpy(np.concatenate([counts, counts[best, None]])))

    def compute(self) -> dict[str, float]:
        """``odsF``, ``oisF``, ``AP`` in percent, ``threshold`` in [0, 1]; NaN for a set without a boundary.

        - ``odsF`` is the best F over the thresholds, with one threshold for all images and no interpolation;
        - ``oisF`` takes for each image the threshold that is best for it;
        - ``AP`` is the mean precision over recalls, by :func:`average_precision`;
        - ``threshold`` is that of odsF, the lowest if several are equal.
        """
        counts = self.state.cpu().numpy()
        if not counts[-1, 1]:
            return dict.fromkeys(("odsF", "oisF", "AP", "threshold"), np.nan)
        precision, recall = precision_recall(counts)
        f = 100 * f_measure(precision, recall)
        best = f[:-1].argmax()
        ap = 100 * average_precision(precision[:-1], recall[:-1])
        return {"odsF": float(f[best]), "oisF": float(f[-1]), "AP": ap, "threshold": float(self.thresholds[best])}


def precision_recall(counts: NDArray) -> tuple[Map, Map]:
    """Of counts (..., 4). They are (1, 0) where nothing is predicted, (0, 1) where only predictions exist."""
    matched_true, true, matched, predicted = np.moveaxis(counts, -1, 0)
    precision = np.where(predicted > 0, matched / np.maximum(predicted, 1), 1)
    recall = np.where(true > 0, matched_true / np.maximum(true, 1), predicted > 0)
    return precision, recall


def f_measure(precision: Map, recall: Map) -> Map:
    """2 P R / (P + R), which is 0 where both are."""
    total = precision + recall
    return 2 * precision * recall / np.where(total > 0, total, 1)


def average_precision(precision: Map, recall: Map) -> float:
    """1/100 of the sum of the precisions at the recalls 0, 0.01 .. 1.

    Precision is linear between measured recalls and 0 outside their range. Of equal recalls the first is used. A single
    recall gives 0. The sum has 101 terms, so a perfect curve has 1.01.
    """
    recall, first = np.unique(recall, return_index=True)
    if len(recall) < 2:
        return 0.0
    return float(np.interp(np.arange(101) / 100, recall, precision[first], left=0, right=0).sum() / 100)


def score_boundaries(
    jobs: Iterable[Load], variant: str, workers: int, title: str, max_distance: float = MAX_DISTANCE
) -> BoundaryScore:
    """The score of the images that ``jobs`` load, the same for any number of ``workers``; 0 starts no process.

    Each job is called by a worker and gives (prediction, truth). It has to be picklable; one that only holds
    paths costs least. Jobs are taken from the iterable as workers become free, so it may also make the predictions.
    """
    score = BoundaryScore(variant)
    count = partial(_count_job, variant=variant, max_distance=max_distance)
    with process_map(workers, "matches boundaries", preload=__name__) as run:
        for counts in progress(run(count, jobs), title, length_hint(jobs) or None):
            score.add_image(counts)
    return score


def _count_job(load: Load, variant: str, max_distance: float) -> Counts:
    return count_image(*load(), variant, max_distance)
