"""Metrics and constants add up: neither batches nor processes change a score."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from train.tasks import PART_NAMES, TASKS, VOID, build_constants, build_metrics, output_channels

CLASSES = {"seg": ("background", "cat", "dog", "bird"), "parts": PART_NAMES, "cls": ("cat", "dog", "bird")}
CHANNELS = output_channels(TASKS, CLASSES)
IMAGES = 6
# A float32 function rounds a pixel's value by its place in the vector lanes; the sums are float64, counts are exact.
ROUNDING = {"rtol": 2e-7, "atol": 0.0}


def random_set(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and labels of a set whose images differ in how much of them is void, the last entirely."""
    random = torch.Generator().manual_seed(0)
    shape = (IMAGES, 5, 7)
    prediction = torch.randn(IMAGES, CHANNELS[task], 5, 7, generator=random)
    void = torch.rand(shape, generator=random) < torch.linspace(0, 1, IMAGES)[:, None, None]
    if task == "normals":
        return prediction, F.normalize(torch.randn(prediction.shape, generator=random), dim=1) * ~void[:, None]
    if task == "depth":
        return prediction, (0.5 + 9 * torch.rand(shape, generator=random)) * ~void
    sizes = (IMAGES, 1, 1) if task == "cls" else shape
    label = torch.randint(max(CHANNELS[task], 2), sizes, generator=random, dtype=torch.uint8).expand(shape)
    return prediction, label.masked_fill(void, VOID)


def metric_of(task: str, images: slice):
    metric = build_metrics((task,), CLASSES)[task]
    prediction, label = random_set(task)
    metric.update(prediction[images], label[images])
    return metric


def scores(metric) -> dict[str, float]:
    """Without odsF, which is None."""
    return {key: score for key, score in metric.compute().items() if score is not None}


def constant_of(task: str, images: slice):
    constant = build_constants((task,), CLASSES)[task]
    constant.update(random_set(task)[1][images])
    return constant


@pytest.mark.parametrize("accumulated", [metric_of, constant_of])
@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, IMAGES - 1)))
def test_any_division_of_the_set_gives_the_same_state(accumulated, task, cuts):
    bounds = [0, *sorted(cuts), IMAGES]
    parts = [accumulated(task, slice(*pair)) for pair in pairwise(bounds)]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    torch.testing.assert_close(merged.state, accumulated(task, slice(None)).state, **ROUNDING)


@pytest.mark.parametrize("task", TASKS)
def test_updates_in_turn_equal_one_update_and_a_sum_of_states(task):
    """As a loop over batches and an all-reduce over processes do it."""
    in_turn = build_metrics((task,), CLASSES)[task]
    prediction, label = random_set(task)
    for images in (slice(0, 1), slice(1, 4), slice(4, 6)):
        in_turn.update(prediction[images], label[images])
    once = metric_of(task, slice(None))
    reduced = build_metrics((task,), CLASSES)[task]
    reduced.state = metric_of(task, slice(0, 2)).state + metric_of(task, slice(2, 6)).state
    expected = pytest.approx(scores(once), rel=ROUNDING["rtol"])
    assert scores(in_turn) == expected
    assert scores(reduced) == expected


@pytest.mark.parametrize("task", TASKS)
def test_void_pixels_have_no_influence(task):
    prediction, label = random_set(task)
    void = (label == 0).all(1) if task == "normals" else label == VOID
    metric = build_metrics((task,), CLASSES)[task]
    metric.update(torch.where(void[:, None], -30 * prediction, prediction), label)
    assert torch.equal(metric.state, metric_of(task, slice(None)).state)


@pytest.mark.parametrize("task", TASKS)
def test_predictions_that_still_carry_gradients_leave_none_in_the_state(task):
    prediction, label = random_set(task)
    metric = build_metrics((task,), CLASSES)[task]
    metric.update(prediction.requires_grad_(), label)
    assert not metric.state.requires_grad and metric.state.dtype == torch.float64


def test_headlines_name_scores_that_exist():
    for name, key in ((name, h.key) for name, task in TASKS.items() for h in task.headlines):
        score = metric_of(name, slice(None)).compute()[key]
        assert isinstance(score, float) or key == "odsF"  # which takes LabelMaps


def test_only_the_tasks_asked_for_are_built():
    assert tuple(build_metrics(("parts", "edge"), CLASSES)) == ("parts", "edge")
    assert tuple(build_constants(("parts", "edge"), CLASSES)) == ("parts", "edge")
