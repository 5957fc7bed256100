"""Delta_m, the mean relative gain over a baseline, and published rows to take as baselines."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, TypedDict


class Reference(TypedDict):
    """A task's score in a baseline: its key in ``compute()``, its value there, and which way is better."""

    metric: str
    value: float
    higher: bool


def delta_m(scores: Mapping[str, Mapping[str, float | None]], baseline: Mapping[str, Reference]) -> float | None:
    """Percent: 100 / T sum_t (-1)^{l_t} (M_t - B_t) / B_t over the T tasks of the baseline, l_t = 1 where lower is
    better (ASTMT, CVPR 2019).

    ``scores`` is {task: {key: value}}; without one of the baseline's there is no Delta_m, but None. By the field's
    rule the baseline is one single-task model per task, of the same backbone and under the same protocol.
    """
    gains = []
    for task, reference in baseline.items():
        value = scores.get(task, {}).get(reference["metric"])
        if value is None:
            return None
        gain = value / reference["value"] - 1
        gains.append(gain if reference["higher"] else -gain)
    return 100 * sum(gains) / len(gains)


def published_rows() -> dict[str, dict[str, Any]]:
    """PASCAL-Context results by name, as they were printed: method, backbone, protocol, source, and scores.

    ``protocol`` says which published numbers a row may stand beside: "A" (ASTMT, MTI-Net: resized to a square,
    saliency by mIoU), "B" (ATRC, InvPT: original size, saliency by maxF) or "ASE". ``scores`` is a baseline of
    :func:`delta_m`.
    """
    return json.loads((resources.files("train.evaluation") / "baselines.json").read_text())
