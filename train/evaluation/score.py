"""Scoring: a model over batches as training does, and predictions of any origin as their protocol has it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastmoe_lora import RoutingStatistics
from kernels.errors import UserError
from model import MultiTaskViT
from train.datasets.batches import Batch
from train.datasets.pascal.pascal_mt import PascalMT
from train.evaluation.predictions import FOLDERS, Picture, from_picture, read_picture, shorten
from train.metrics.odsf import score_boundaries
from train.protocols.alignment import Answer, Comparison, Shape, load_boundaries, photo_shape, require_shape
from train.protocols.transforms import Sample
from train.tasks.constant import build_constants
from train.tasks.names import TASKS
from train.tasks.scores import METRICS, Metric, Metrics, build_metrics

Classes = dict[str, tuple[str, ...]]
Answered = tuple[Sample, dict[str, Answer]]  # one image's labels and predictions
FAST = 100  # images of a fast odsF


@torch.inference_mode()
def evaluate(
    model: MultiTaskViT, batches: Iterable[Batch], classes: Classes, title: str
) -> tuple[Metrics, RoutingStatistics | None]:
    """({task: {metric: value}}, what the routers chose) over all batches; the model's mode is left as it was."""
    device = model.task_embed.device
    metrics = build_metrics(model.tasks, classes)
    statistics = RoutingStatistics() if model.routing is not None else None
    if model.routing is not None:
        model.routing.statistics = statistics
    training = model.training
    model.eval()
    for batch in tqdm(batches, title, leave=False, disable=None):
        batch = batch.to(device)
        for task, prediction in model(batch.images, batch.index).items():
            metrics[task].update(prediction, batch.labels[task])
    model.train(training)
    if model.routing is not None:
        model.routing.statistics = None
    return _scores(metrics), statistics


def score_constant(
    train_batches: Iterable[Batch], val_batches: Iterable[Batch], tasks: tuple[str, ...], classes: Classes
) -> Metrics:
    """The metrics of the best constant prediction, fitted on the training labels."""
    constants, metrics = build_constants(tasks, classes), build_metrics(tasks, classes)
    for batch in tqdm(train_batches, "constant: fit", leave=False, disable=None):
        for task, label in batch.labels.items():
            constants[task].update(label)
    for batch in tqdm(val_batches, "constant: score", leave=False, disable=None):
        for task, label in batch.labels.items():
            metrics[task].update(constants[task].prediction(label), label)
    return _scores(metrics)


def _scores(metrics: dict[str, Metric]) -> Metrics:
    """None where nothing was labelled: JSON knows no NaN."""
    return {task: _finite(metric.compute()) for task, metric in metrics.items()}


def _finite(scores: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None or math.isnan(value) else value for name, value in scores.items()}


# As a protocol has it


def answers_of_model(
    model: MultiTaskViT, batches: Iterable[list[Sample]], comparison: Comparison, every: bool
) -> Iterator[Answered]:
    """The model's predictions of the tasks that an image is labelled for or, with ``every``, of all."""
    for samples in batches:
        wanted = {t: [i for i, sample in enumerate(samples) if every or t in sample] for t in model.tasks}
        wanted = {task: positions for task, positions in wanted.items() if positions}
        decided = _decide(model, np.stack([sample["image"] for sample in samples]), wanted)
        for i, sample in enumerate(samples):
            shape, rows = label_shape(sample), {t: at.index(i) for t, at in wanted.items() if i in at}
            yield sample, {t: comparison.answer(t, decided[t][row], shape) for t, row in rows.items()}


@torch.inference_mode()
def _decide(model: MultiTaskViT, images: np.ndarray, wanted: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """``images`` uint8 (B, H, W, 3) -> what is decided for the ``wanted`` positions of each task, on the CPU."""
    device = model.task_embed.device
    index = {task: torch.tensor(positions, device=device) for task, positions in wanted.items()}
    outputs = model(torch.from_numpy(images).permute(0, 3, 1, 2).to(device), index)
    return {task: METRICS[task].decide(output).cpu() for task, output in outputs.items()}


def label_shape(sample: Sample) -> Shape:
    """(height, width) of an image's labels, of which it has one at least."""
    return next(sample[task].shape[-2:] for task in TASKS if task in sample)


def answers_of_files(
    folder: Path, dataset: PascalMT, batches: Iterable[list[Sample]], comparison: Comparison
) -> Iterator[Answered]:
    """The predictions in ``folder`` of the tasks that an image is labelled for.

    All files are read even where one is at fault; UserError then says how many are, and names the first.
    """
    faults, files = [], 0
    samples = (sample for batch in batches for sample in batch)
    for image, sample in zip(dataset.images, samples, strict=True):
        shape, answers = photo_shape(image.photo), {}
        for task in image.labels:
            files += 1
            try:
                picture = read_picture(folder, task, image.id, dataset.classes)
                require_shape(folder / FOLDERS[task] / f"{image.id}.png", picture, shape, comparison.size)
            except UserError as error:
                faults.append(str(error).removesuffix(": restore it"))
                continue
            picture = comparison.fit(task, picture, shape)
            answers[task] = Answer(from_picture(task, picture), picture)
        if not faults:
            yield sample, answers
    if faults:
        raise UserError(f"{len(faults)} of {files} predictions cannot be scored: {shorten(faults, '; ')}: mend them")


@dataclass
class Scoring:
    """Counts answers as they pass, in the order of ``ids``, and on iteration gives the jobs of odsF.

    ``boundaries`` are the photo and the LabelMap of each image that odsF takes; ``save(id, pictures)`` gets what may
    be kept. No image outlives its turn, but for the few that wait for a process.
    """

    answered: Iterable[Answered]
    ids: Sequence[str]
    metrics: dict[str, Metric]
    boundaries: Mapping[str, tuple[Path, Path]]
    save: Callable[[str, dict[str, Picture]], None] | None = None

    def __length_hint__(self) -> int:
        return len(self.boundaries)

    def __iter__(self) -> Iterator[Callable]:
        bar = tqdm(self.answered, "evaluate", total=len(self.ids), leave=False, disable=None)
        for image_id, (sample, answers) in zip(self.ids, bar, strict=True):
            for task in self.metrics:
                if task in sample:
                    label = torch.tensor(sample[task])[None]
                    self.metrics[task].count(answers[task].decided[None], label)
            if self.save:
                self.save(image_id, {task: answer.picture for task, answer in answers.items()})
            if image_id in self.boundaries:
                yield partial(load_boundaries, answers["edge"].picture, *self.boundaries[image_id])


def score_answers(scoring: Scoring, variant: str, workers: int) -> Metrics:
    """The metrics of all tasks, odsF among them where ``scoring`` has boundaries."""
    if not scoring.boundaries:
        for _ in scoring:
            pass
        return _scores(scoring.metrics)
    boundary = score_boundaries(scoring, variant, workers, "odsF")
    scores = _scores(scoring.metrics)
    return scores | {"edge": scores["edge"] | _finite(boundary.compute())}


def choose_boundaries(dataset: PascalMT, mode: str) -> dict[str, tuple[Path, Path]]:
    """The images that odsF takes: "full" all that are labelled for edges, "fast" at most FAST of them, evenly spread,
    "off" none."""
    images = [image for image in dataset.images if "edge" in image.labels]
    if mode == "fast" and len(images) > FAST:
        images = [images[i * len(images) // FAST] for i in range(FAST)]
    return {image.id: (image.photo, image.labels["edge"]) for image in images if mode != "off"}
