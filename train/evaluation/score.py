"""Scores by a protocol: predictions of a model or of files, aligned with their labels.

Whether predictions or labels are resized for that is the protocol's choice: :meth:`train.protocols.Protocol.align`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from kernels.errors import UserError
from model import MultiTaskModel
from train.datasets.base import DataSet
from train.evaluation.augmented import AugmentedModel
from train.evaluation.predictions import picture_path, read_picture, require_shape, shorten
from train.evaluation.validate import finite, require_finite, scores_of
from train.metrics.base import Metric
from train.metrics.odsf import MAX_DISTANCE, score_boundaries
from train.protocols import AlignedPrediction, Protocol, Sample
from train.protocols.family_a import stretch
from train.tasks import TASKS, Metrics, Picture, Shape

Predicted = tuple[Sample, dict[str, AlignedPrediction]]  # one image's labels and predictions
FAST = 100  # images of a fast odsF


def predictions_of_model(
    model: MultiTaskModel | AugmentedModel,
    tasks: Sequence[str],
    batches: Iterable[list[Sample]],
    protocol: Protocol,
    every: bool,
) -> Iterator[Predicted]:
    """The model's predictions of those ``tasks`` that an image is labelled for or, with ``every``, of all ``tasks``."""
    for samples in batches:
        wanted = {t: [i for i, sample in enumerate(samples) if every or t in sample] for t in tasks}
        wanted = {task: positions for task, positions in wanted.items() if positions}
        postprocessed = _predict(model, np.stack([sample["image"] for sample in samples]), wanted)
        for i, sample in enumerate(samples):
            shape, rows = label_shape(sample), {t: at.index(i) for t, at in wanted.items() if i in at}
            yield sample, {t: protocol.align(t, postprocessed[t][row], shape) for t, row in rows.items()}


@torch.inference_mode()
def _predict(
    model: MultiTaskModel | AugmentedModel, images: np.ndarray, wanted: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """``images`` uint8 (B, H, W, 3) -> postprocessed predictions at the ``wanted`` positions of each task, on the
    CPU."""
    device = model.device
    index = {task: torch.tensor(positions, device=device) for task, positions in wanted.items()}
    outputs = model(torch.from_numpy(images).permute(0, 3, 1, 2).to(device), index)
    require_finite(outputs)
    return {task: TASKS[task].postprocess(output).cpu() for task, output in outputs.items()}


def label_shape(sample: Sample) -> Shape:
    """(height, width) of an image's labels; it has at least one."""
    return next(sample[task].shape[-2:] for task in TASKS if task in sample)


def predictions_of_files(
    folder: Path, dataset: DataSet, batches: Iterable[list[Sample]], protocol: Protocol
) -> Iterator[Predicted]:
    """The predictions in ``folder`` of the tasks that an image is labelled for.

    All files are read even if one has a fault. UserError then gives the number of faults and the first of them.
    """
    faults: list[str] = []
    files = 0
    samples = (sample for batch in batches for sample in batch)
    for index, (image_id, sample) in enumerate(zip(dataset.ids, samples, strict=True)):
        shape, predictions = dataset.photo_shape(index), {}
        for task in (task for task in TASKS if task in sample):
            files += 1
            try:
                picture = read_picture(folder, task, image_id, dataset.classes.get(task, ()))
                require_shape(picture_path(folder, task, image_id), picture, shape, protocol.shape)
            except UserError as error:
                faults.append(str(error).removesuffix(": restore it"))
                continue
            picture = protocol.to_label_grid(task, picture, shape)
            predictions[task] = AlignedPrediction(TASKS[task].from_picture(picture), picture)
        if not faults:
            yield sample, predictions
    if faults:
        shown = shorten(faults, "; ")
        raise UserError(f"{len(faults)} of {files} predictions cannot be scored: {shown}: write them again")


@dataclass
class Scoring:
    """Scores predictions in the order of ``ids``; iterating over it does the work and yields the jobs of odsF.

    ``boundaries[id]`` loads the LabelMap, or the boundaries themselves, of an image that odsF is computed on, and
    ``max_distance`` is that of matched boundaries. ``save(id, pictures)``, if given, writes
    the predictions of an image. Streams: only images queued for odsF stay in memory.
    """

    predicted: Iterable[Predicted]
    ids: Sequence[str]
    metrics: dict[str, Metric]
    boundaries: Mapping[str, Callable[[], NDArray]]
    save: Callable[[str, dict[str, Picture]], None] | None = None
    max_distance: float = MAX_DISTANCE

    def __length_hint__(self) -> int:
        return len(self.boundaries)

    def __iter__(self) -> Iterator[Callable]:
        bar = tqdm(self.predicted, "evaluate", total=len(self.ids), leave=False, disable=None)
        for image_id, (sample, predictions) in zip(self.ids, bar, strict=True):
            for task in self.metrics:
                if task in sample:
                    label = torch.tensor(sample[task])[None]
                    self.metrics[task].count(predictions[task].postprocessed[None], label)
            if self.save:
                self.save(image_id, {task: prediction.picture for task, prediction in predictions.items()})
            if image_id in self.boundaries:
                yield partial(load_boundaries, predictions["edge"].picture, self.boundaries[image_id])


def load_boundaries(picture: Picture, load: Callable[[], NDArray]) -> tuple[Picture, NDArray]:
    """A job of :func:`train.metrics.odsf.score_boundaries`: prediction and LabelMap, both at the photo's size."""
    label_map = load()
    return picture if picture.shape == label_map.shape else stretch("edge", picture, label_map.shape), label_map


def score_predictions(scoring: Scoring, variant: str, workers: int) -> Metrics:
    """The metrics of all tasks, odsF among them where ``scoring`` has boundaries."""
    if not scoring.boundaries:
        for _ in scoring:
            pass
        return scores_of(scoring.metrics)
    boundary = score_boundaries(scoring, variant, workers, "odsF", scoring.max_distance)
    scores = scores_of(scoring.metrics)
    return scores | {"edge": scores["edge"] | finite(boundary.compute())}


def choose_boundaries(dataset: DataSet, mode: str) -> dict[str, Callable[[], NDArray]]:
    """The LabelMap loaders of the images that odsF is computed on: "full" all with edge labels, "fast" at most FAST of
    them, evenly spaced, "off" none."""
    maps = list(dataset.boundary_maps().items())
    if mode == "fast" and len(maps) > FAST:
        maps = [maps[i * len(maps) // FAST] for i in range(FAST)]
    return dict(maps) if mode != "off" else {}
