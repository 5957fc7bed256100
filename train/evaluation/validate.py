"""Scores during training: a model over collated batches, whose labels have the size of the input."""

import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastmoe_lora import RoutingStatistics
from fastmoe_lora.ranks import gathered
from kernels.errors import UserError
from model import MultiTaskModel
from train.datasets.batches import Batch
from train.files.progress import progress
from train.metrics.base import Metric
from train.tasks import Classes, Metrics, build_constants, build_metrics


@torch.inference_mode()
def validate(
    model: MultiTaskModel, batches: Iterable[Batch], classes: Classes, title: str
) -> tuple[Metrics, RoutingStatistics | None]:
    """({task: {metric: value}}, routing statistics) over all batches, of all processes of a data-parallel run. The
    model's training mode is restored."""
    device = model.device
    metrics = build_metrics(model.tasks, classes)
    statistics = RoutingStatistics() if model.routing is not None else None
    if model.routing is not None:
        model.routing.statistics = statistics
    training = model.training
    model.eval()
    for batch in progress(batches, title):
        batch = batch.to(device)
        outputs = model(batch.images, batch.index)
        require_finite(outputs)
        for task, prediction in outputs.items():
            metrics[task].update(prediction, batch.labels[task])
    model.train(training)
    if model.routing is not None:
        model.routing.statistics = None
        statistics = merged(statistics) if statistics else None
    return scores_of({task: merged(metric) for task, metric in metrics.items()}), statistics


def require_finite(outputs: Mapping[str, Tensor], photo: str = "") -> None:
    """UserError for outputs of a model that hold NaN or infinity, which would be scored and drawn as some class.
    ``photo`` names what they are outputs for."""
    good = torch.stack([output.isfinite().all() for output in outputs.values()]).tolist() if outputs else []
    if wrong := [task for task, finite in zip(outputs, good, strict=True) if not finite]:
        on = f" on {photo}" if photo else ""
        raise UserError(f"the model's output for {', '.join(wrong)}{on} is not finite: take an earlier checkpoint")


def score_constant(
    train_batches: Iterable[Batch], val_batches: Iterable[Batch], tasks: tuple[str, ...], classes: Classes
) -> Metrics:
    """The metrics of the best constant prediction, fitted on the training labels."""
    constants, metrics = build_constants(tasks, classes), build_metrics(tasks, classes)
    for batch in progress(train_batches, "baseline: fit the constant"):
        for task, label in batch.labels.items():
            constants[task].update(label)
    constants = {task: merged(constant) for task, constant in constants.items()}
    for batch in progress(val_batches, "baseline: score the constant"):
        for task, label in batch.labels.items():
            metrics[task].update(constants[task].prediction(label), label)
    return scores_of({task: merged(metric) for task, metric in metrics.items()})


class Mergeable(typing.Protocol):
    def merge(self, other: Any, /) -> None: ...


M = TypeVar("M", bound=Mergeable)


def merged(own: M) -> M:
    """The sum of every process's accumulator, in the order of ranks."""
    first, *others = gathered(own)
    for other in others:
        first.merge(other)
    return first


def scores_of(metrics: dict[str, Metric]) -> Metrics:
    """The scores of all tasks; None where nothing was labelled, since JSON has no NaN."""
    return {task: finite(metric.compute()) for task, metric in metrics.items()}


def finite(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None or math.isnan(value) else value for name, value in scores.items()}
