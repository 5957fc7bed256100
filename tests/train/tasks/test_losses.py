"""The losses against hand arithmetic and against loops over single pixels in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.tasks import TASKS, VOID
from train.tasks.classes import class_loss
from train.tasks.edge import edge_loss
from train.tasks.normals import normals_loss, unit
from train.tasks.sal import saliency_loss

CHANNELS = {"seg": 5, "parts": 7, "sal": 2, "normals": 3, "edge": 1, "depth": 1, "cls": 5}
# Float32 rounds at 6e-8; a loss of 24 pixels rounds some dozens of times.
ROUNDING = {"rtol": 1e-5, "atol": 1e-7}


def random_batch(task: str, seed: int = 0, shape: tuple[int, int, int] = (2, 3, 4)) -> tuple[Tensor, Tensor]:
    """Head output and label, about one pixel in four void."""
    random = torch.Generator().manual_seed(seed)
    n, height, width = shape
    prediction = torch.randn(n, CHANNELS[task], height, width, generator=random)
    void = torch.rand(shape, generator=random) < 0.25
    if task == "normals":
        label = F.normalize(torch.randn(n, 3, height, width, generator=random), dim=1)
        return prediction, label * ~void[:, None]
    if task == "depth":
        return prediction, (0.5 + 9 * torch.rand(shape, generator=random)) * ~void
    classes = max(CHANNELS[task], 2)
    one_per_image = task == "cls"
    label = torch.randint(classes, (n, 1, 1) if one_per_image else shape, generator=random).to(torch.uint8)
    return prediction, label.expand(shape).masked_fill(void, VOID)


def void_like(task: str, label: Tensor) -> Tensor:
    return torch.full_like(label, TASKS[task].void)


def with_gradient(loss, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    prediction = prediction.clone().requires_grad_()
    value = loss(prediction, label)
    value.backward()
    return value.detach(), prediction.grad


# --- the naive formulas: one pixel at a time, no logarithm tricks ---


def naive_pixels(prediction: Tensor, label: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(prediction (C,), label) of every valid pixel."""
    columns = prediction.movedim(1, -1).reshape(-1, prediction.shape[1])
    if label.dim() == 4:
        labels = label.movedim(1, -1).reshape(-1, 3)
        return [(z, y) for z, y in zip(columns, labels, strict=True) if y.norm() > 0]
    if label.is_floating_point():
        return [(z, y) for z, y in zip(columns, label.flatten(), strict=True) if y > 0]
    return [(z, int(y)) for z, y in zip(columns, label.flatten(), strict=True) if y != VOID]


def naive_class(prediction: Tensor, label: Tensor) -> Tensor:
    pixels = naive_pixels(prediction, label)
    return sum(-(z.exp()[y] / z.exp().sum()).log() for z, y in pixels) / len(pixels)


def naive_saliency(prediction: Tensor, label: Tensor) -> Tensor:
    pixels = naive_pixels(prediction, label)
    w = sum(y == 0 for _, y in pixels) / len(pixels)
    weights = [1 - w, w]
    return sum(-weights[y] * (z.exp()[y] / z.exp().sum()).log() for z, y in pixels) / len(pixels)


def naive_normals(prediction: Tensor, label: Tensor) -> Tensor:
    pixels = naive_pixels(prediction, label)
    return sum((z / z.norm() - y).abs().sum() for z, y in pixels) / len(pixels)


def naive_depth(prediction: Tensor, label: Tensor) -> Tensor:
    pixels = naive_pixels(prediction, label)
    return sum((z[0].exp() / y).log().abs() for z, y in pixels) / len(pixels)


def naive_edge(prediction: Tensor, label: Tensor) -> Tensor:
    pixels = naive_pixels(prediction, label)
    probabilities = [(1 / (1 + (-z[0]).exp()), y) for z, y in pixels]
    return sum(-0.95 * p.log() if y == 1 else -0.05 * (1 - p).log() for p, y in probabilities) / len(pixels)


def naive_image(prediction: Tensor, label: Tensor) -> Tensor:
    images = [naive_pixels(*pair) for pair in zip(prediction[:, None], label[:, None], strict=True)]
    pooled = [(sum(z for z, _ in pixels) / len(pixels), pixels[0][1]) for pixels in images]
    return sum(-(z.exp()[y] / z.exp().sum()).log() for z, y in pooled) / len(pooled)


NAIVE = {
    "seg": naive_class,
    "parts": naive_class,
    "sal": naive_saliency,
    "normals": naive_normals,
    "edge": naive_edge,
    "depth": naive_depth,
    "cls": naive_image,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_equal_the_naive_formula(task, seed):
    prediction, label = random_batch(task, seed)
    value, gradient = with_gradient(TASKS[task].loss, prediction, label)
    target = label.double() if task == "normals" else label
    naive_value, naive_gradient = with_gradient(NAIVE[task], prediction.double(), target)
    torch.testing.assert_close(value, naive_value.float(), **ROUNDING)
    torch.testing.assert_close(gradient, naive_gradient.float(), **ROUNDING)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_that_is_void_everywhere_costs_nothing(task):
    prediction, label = random_batch(task)
    value, gradient = with_gradient(TASKS[task].loss, prediction, void_like(task, label))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("task", TASKS)
def test_void_pixels_have_no_influence(task):
    prediction, label = random_batch(task)
    void = (label == 0).all(1) if task == "normals" else label == TASKS[task].void
    assert void.any() and not void.all()
    value, gradient = with_gradient(TASKS[task].loss, prediction, label)
    other = torch.where(void[:, None], 30 * torch.randn(prediction.shape), prediction)
    other_value, other_gradient = with_gradient(TASKS[task].loss, other, label)
    assert torch.equal(value, other_value)
    assert torch.equal(gradient, other_gradient)
    assert not gradient.movedim(1, -1)[void].any()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_computed_in_at_least_float32(task, dtype):
    prediction, label = random_batch(task)
    prediction = prediction.to(dtype)
    value, gradient = with_gradient(TASKS[task].loss, prediction, label)
    exact = torch.promote_types(dtype, torch.float32)
    assert value.dtype == exact
    assert torch.equal(value, TASKS[task].loss(prediction.to(exact), label))
    assert gradient.dtype == dtype


@pytest.mark.parametrize("task", TASKS)
def test_nothing_depends_on_values_the_host_would_wait_for(task):
    """Meta tensors have shapes but no values: ``.item()`` and boolean indexing fail on them."""
    prediction, label = random_batch(task)
    value, gradient = with_gradient(TASKS[task].loss, prediction.to("meta"), label.to("meta"))
    assert value.shape == () and gradient.shape == prediction.shape


def test_class_loss_of_even_logits_is_the_logarithm_of_the_classes():
    label = torch.tensor([[[0, 3, VOID]]], dtype=torch.uint8)
    assert class_loss(torch.zeros(1, 4, 1, 3), label).item() == pytest.approx(math.log(4), rel=1e-6)


def test_saliency_loss_by_hand():
    # Three valid pixels, two negative: w = 2/3. Even logits cost ln 2 each, so (2/3 + 1/3 + 1/3) ln 2 / 3.
    label = torch.tensor([[[1, 0, 0, VOID]]], dtype=torch.uint8)
    loss = saliency_loss(torch.zeros(1, 2, 1, 4), label)
    assert loss.item() == pytest.approx(4 / 9 * math.log(2), rel=1e-6)


def test_saliency_is_balanced_over_the_batch_and_not_per_image():
    prediction, label = random_batch("sal", shape=(4, 3, 3))
    whole = saliency_loss(prediction, label)
    merged = saliency_loss(prediction.movedim(1, 0).reshape(1, 2, 4, 9), label.reshape(1, 4, 9))
    torch.testing.assert_close(whole, merged, **ROUNDING)


def test_normals_loss_by_hand():
    # (3, 4, 0) points to (0.6, 0.8, 0), which is |0.6 - 1| + 0.8 = 1.2 away from (1, 0, 0). The other pixel is void.
    prediction = torch.tensor([[3.0, 4.0, 0.0], [5.0, 5.0, 5.0]]).T.reshape(1, 3, 1, 2)
    label = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).T.reshape(1, 3, 1, 2)
    assert normals_loss(prediction, label).item() == pytest.approx(1.2, rel=1e-6)


def test_unit_equals_normalize():
    vectors = torch.randn(2, 3, 5, 7) * torch.logspace(-15, 15, 7)
    vectors[0, :, 0, 0] = 0
    torch.testing.assert_close(unit(vectors), F.normalize(vectors, dim=1), rtol=1e-6, atol=1e-9)


def test_edge_loss_by_hand():
    # p = 3/4 on an edge, 1/4 beside it; the third pixel is void.
    prediction = torch.tensor([math.log(3), math.log(1 / 3), 7.0]).reshape(1, 1, 1, 3)
    label = torch.tensor([[[1, 0, VOID]]], dtype=torch.uint8)
    expected = (0.95 + 0.05) * math.log(4 / 3) / 2
    assert edge_loss(prediction, label).item() == pytest.approx(expected, rel=1e-6)


def test_edge_loss_is_the_pos_weight_form():
    prediction, label = random_batch("edge")
    valid = label != VOID
    bce = F.binary_cross_entropy_with_logits(
        prediction.squeeze(1)[valid], label[valid].float(), pos_weight=torch.tensor(0.95 / 0.05)
    )
    torch.testing.assert_close(edge_loss(prediction, label), 0.05 * bce, **ROUNDING)


def test_every_task_has_a_loss_and_a_weight():
    assert {name: task.weight for name, task in TASKS.items()} == {
        "seg": 1,
        "parts": 2,
        "sal": 5,
        "normals": 10,
        "edge": 50,
        "depth": 1,
        "cls": 1,
    }
