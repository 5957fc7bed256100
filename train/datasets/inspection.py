"""Reads all files of every image of a split, in several processes, and reports their content and faults."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.datasets.handedness import Asymmetry, asymmetry_of
from train.datasets.labels import ImageFiles, LabelReader
from train.files.images import read_photo
from train.files.processes import process_map
from train.files.progress import progress
from train.tasks import TASKS


@dataclass(frozen=True)
class Finding:
    """What was found in one image.

    ``size``: (H, W) of the photo, None if it cannot be read. ``pixels[task]``: {label value: number of pixels}, where
    normals count as void (0) or valid (1). ``faults``: one line each. ``asymmetry``: that of the normals at contours.
    """

    id: str
    size: tuple[int, int] | None
    pixels: dict[str, dict[int, int]]
    faults: tuple[str, ...]
    asymmetry: Asymmetry | None = None


def inspect_images(images: Sequence[ImageFiles], reader: LabelReader, workers: int, title: str = "") -> list[Finding]:
    """A finding per image, in order, by ``workers`` processes (0: this one).

    Shows a progress bar on stderr. UserError if a process is killed. An interrupt takes effect after the current image.
    """
    title = f"inspect {title}".strip()
    with process_map(workers, "inspects the images", preload=__name__) as run:
        findings = run(partial(inspect_image, reader=reader), images)
        return list(progress(findings, title, len(images), "image"))


def inspect_image(image: ImageFiles, reader: LabelReader) -> Finding:
    """Reads the files of one image as training would, and goes on after a fault.

    Labels are checked against the photo's size, so they are read only if the photo can be read.
    """
    faults = [_missing(path, image) for path in image.missing]
    labels = {}
    if image.photo in image.missing:
        return Finding(image.id, None, {}, tuple(dict.fromkeys(faults)))
    try:
        size = read_photo(image.photo).shape[:2]
    except UserError as error:
        return Finding(image.id, None, {}, tuple(dict.fromkeys([*faults, str(error)])))
    for task in image.read:
        try:
            labels[task] = reader.label(image, task, size)
        except UserError as error:
            faults.append(str(error))
    pixels = {task: _count(task, label) for task, label in labels.items()}
    return Finding(image.id, size, pixels, tuple(dict.fromkeys(faults)), asymmetry_of(labels, reader.background))


def _missing(path: Path, image: ImageFiles) -> str:
    remedy = "restore it" if path == image.photo else "restore it, or pass --partial-labels"
    return f"{path} does not exist: {remedy}"


def _count(task: str, label: NDArray) -> dict[int, int]:
    label = TASKS[task].label_values(label)  # the void that every protocol applies
    counts = np.bincount(label.ravel())
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
