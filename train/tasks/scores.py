"""Metrics: small objects that add up over batches and processes.

``update(prediction, label)`` takes the raw output of a head, ``count(decided, label)`` what is made of it, which may
also come from a file; ``state`` is one tensor that may be summed over processes, and ``compute()`` gives the scores by
name. :mod:`train.metrics.odsf` scores edges against whole LabelMaps.
"""

from typing import NamedTuple

from train.metrics.base import Metric
from train.tasks.classes import ConfusionIoU
from train.tasks.edge import EdgeLoss
from train.tasks.normals import Normals
from train.tasks.sal import Saliency

Metrics = dict[str, dict[str, float | None]]  # {task: {score: value}}, None where nothing was labelled

METRICS = {"seg": ConfusionIoU, "parts": ConfusionIoU, "sal": Saliency, "normals": Normals, "edge": EdgeLoss}


class Headline(NamedTuple):
    """A score that reports show: whose it is, its key in ``compute()``, which way is better, and its unit."""

    task: str
    key: str
    higher_is_better: bool
    unit: str


HEADLINES = (
    Headline("seg", "mIoU", True, "%"),
    Headline("parts", "mIoU", True, "%"),
    Headline("sal", "maxF", True, "%"),
    Headline("sal", "maxF_invpt", True, "%"),
    Headline("sal", "mIoU", True, "%"),
    Headline("normals", "mErr", False, "deg"),
    Headline("edge", "odsF", True, "%"),
    Headline("edge", "loss", False, ""),
)


def build_metrics(tasks: tuple[str, ...], classes: dict[str, tuple[str, ...]]) -> dict[str, Metric]:
    """One fresh metric per task; ``classes`` names the classes of seg and parts."""
    return {task: METRICS[task](len(classes[task])) if task in classes else METRICS[task]() for task in tasks}
