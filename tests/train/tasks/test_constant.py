"""No other constant prediction scores better on the labels that a constant was fitted to."""

import math

import pytest
import torch
import torch.nn.functional as F

from train.metrics.constant import Constant
from train.tasks import TASKS, VOID, build_constants, build_metrics
from train.tasks.normals import ConstantNormals

CLASSES = {"seg": ("background", "cat", "dog", "bird"), "parts": ("background", "head", "torso"), "cls": ("cat", "dog")}


def fitted(task: str, label: torch.Tensor) -> Constant:
    constant = build_constants((task,), CLASSES)[task]
    constant.update(label)
    return constant


def score(task: str, prediction: torch.Tensor, label: torch.Tensor, key: str) -> float:
    metric = build_metrics((task,), CLASSES)[task]
    metric.update(prediction, label)
    return metric.compute()[key]


def everywhere(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return output[:, None, None].expand(len(label), -1, *label.shape[-2:])


def random_classes(seed: int, frequencies: list[float]) -> torch.Tensor:
    """uint8 (4, 9, 8) with these frequencies, the last being void's."""
    random = torch.Generator().manual_seed(seed)
    label = torch.multinomial(torch.tensor(frequencies), 4 * 9 * 8, replacement=True, generator=random)
    return label.masked_fill(label == len(frequencies) - 1, VOID).to(torch.uint8).view(4, 9, 8)


@pytest.mark.parametrize("frequencies", [[0.5, 0.2, 0.1, 0.0, 0.2], [0.1, 0.2, 0.3, 0.1, 0.3], [0, 0, 0.3, 0.2, 0.5]])
def test_no_other_class_is_better(frequencies):
    label = random_classes(0, frequencies)
    best = score("seg", fitted("seg", label).prediction(label), label, "mIoU")
    others = [score("seg", everywhere(row, label), label, "mIoU") for row in torch.eye(4)]
    assert best == max(others) > min(others)


@pytest.mark.parametrize("key", ["maxF", "mIoU"])
@pytest.mark.parametrize("salient", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("empty_images", [0, 3])
def test_no_other_probability_is_better(key, salient, empty_images):
    label = random_classes(1, [0.8 * (1 - salient), 0.8 * salient, 0.2])
    label[:empty_images] = label[:empty_images].where(label[:empty_images] != 1, 0)
    best = score("sal", fitted("sal", label).prediction(label), label, key)
    grid = torch.linspace(0, 1, 41).logit()
    others = [score("sal", everywhere(torch.stack([-z / 2, z / 2]), label), label, key) for z in grid]
    assert best == max(others) > min(others)


@pytest.mark.parametrize("frequencies", [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.49, 0.01, 0.5]])
def test_no_other_logit_is_better(frequencies):
    label = random_classes(2, frequencies)
    constant = fitted("edge", label)
    best = score("edge", constant.prediction(label), label, "loss")
    for step in (1e-3, 0.1, 1.0, 10.0):
        for logit in (constant.output() - step, constant.output() + step):
            # The loss is flat at its minimum: float32 pixels cannot tell a logit 1e-3 away.
            assert score("edge", everywhere(logit, label), label, "loss") > best - 1e-8
    positive, negative = (label == 1).sum().item(), (label == 0).sum().item()
    p = 0.95 * positive / (0.95 * positive + 0.05 * negative)
    assert constant.output().sigmoid().item() == pytest.approx(p, rel=1e-6)


@pytest.mark.parametrize("kind", [0, 1])
def test_edges_of_one_kind_keep_the_logit_finite(kind):
    label = torch.full((1, 4, 4), kind, dtype=torch.uint8)
    loss = score("edge", fitted("edge", label).prediction(label), label, "loss")
    assert loss < 0.05 * math.log(2)


def random_normals(seed: int, spread: float) -> torch.Tensor:
    """float32 (2, 3, 20, 30): three walls of unequal weight with noise, a fifth of the pixels void."""
    random = torch.Generator().manual_seed(seed)
    walls = F.normalize(torch.randn(3, 3, generator=random), dim=1)
    which = torch.multinomial(torch.tensor([0.4, 0.35, 0.25]), 1200, replacement=True, generator=random)
    vectors = F.normalize(walls[which] + spread * torch.randn(1200, 3, generator=random), dim=1)
    vectors[torch.rand(1200, generator=random) < 0.2] = 0
    return vectors.view(2, 20, 30, 3).movedim(-1, 1).contiguous()


def mean_angles(candidates: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Degrees, one per candidate (m, 3), straight from the definition."""
    vectors = label.movedim(1, -1).reshape(-1, 3).double()
    vectors = F.normalize(vectors[vectors.any(1)], dim=1)
    return torch.rad2deg((candidates @ vectors.T).clamp(-1, 1).acos()).mean(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1, 0.5, 3.0])
def test_no_other_direction_is_better(seed, spread):
    label = random_normals(seed, spread)
    output = F.normalize(fitted("normals", label).output().double(), dim=0)  # to float64 digits
    random = torch.Generator().manual_seed(seed)
    far = torch.randn(3000, 3, generator=random, dtype=torch.float64)
    near = output + 0.02 * torch.randn(1000, 3, generator=random, dtype=torch.float64)
    labels = label.movedim(1, -1).reshape(-1, 3).double()
    candidates = F.normalize(torch.cat([far, near, labels[labels.any(1)]]), dim=1)
    # Pixels count as if at the mean direction of their cell, which costs up to 5e-4 degrees in 30 such sets; walls
    # without spread have a cell of their own, and then only float32 rounds the output.
    slack = 1e-3 if spread else 1e-5
    assert mean_angles(output[None], label).item() <= mean_angles(candidates, label).min().item() + slack


def test_the_majority_wall_is_the_geometric_median():
    label = torch.zeros(1, 3, 1, 9)
    label[0, 2, 0, :5] = 1  # five of eight pixels along z, three along x, one void
    label[0, 0, 0, 5:8] = 1
    constant = fitted("normals", label)
    torch.testing.assert_close(constant.output(), torch.tensor([0.0, 0.0, 1.0]), rtol=0, atol=1e-4)
    assert score("normals", constant.prediction(label), label, "mErr") == pytest.approx(3 / 8 * 90, abs=0.01)


def test_cells_cover_the_sphere_and_count_pixels():
    corners = [[0, 0, 1], [0, 0, -1], [-1, 0, 0], [-1, -0.0, 0], [0, -1, 0], [-1e-3, 0, -1], [0, 0, 0]]
    constant = ConstantNormals()
    constant.update(torch.tensor(corners, dtype=torch.float32).T[None, :, None])
    assert constant.state.norm(dim=1).sum().item() == 6


def test_labels_added_later_count():
    few, many = torch.full((1, 2, 2), 1, dtype=torch.uint8), torch.full((1, 3, 3), 2, dtype=torch.uint8)
    constant = fitted("seg", few)
    assert (constant.prediction(few).argmax(1) == 1).all()
    constant.update(many)
    assert (constant.prediction(few).argmax(1) == 2).all()


@pytest.mark.parametrize("task", TASKS)
def test_without_labels_there_still_is_a_constant(task):
    label = torch.full((2, 4, 5), VOID, dtype=torch.uint8)
    label = {"normals": torch.zeros(2, 3, 4, 5), "depth": torch.zeros(2, 4, 5)}.get(task, label)
    prediction = fitted(task, label).prediction(label)
    channels = {"seg": 4, "parts": 3, "sal": 2, "normals": 3, "edge": 1, "depth": 1, "cls": 2}
    assert prediction.shape == (2, channels[task], 4, 5) and prediction.dtype == torch.float32
    assert prediction.isfinite().all()
