"""Reads every image of a split whole, in several processes, and says what is in it and what is wrong with it."""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kernels.errors import UserError
from train.datasets.pascal.labels import Reader, read_photo
from train.datasets.pascal.tree import ImageFiles
from train.tasks import TASKS

CHUNK = 8  # images that a process takes at a time


@dataclass(frozen=True)
class Finding:
    """``size`` (H, W) of the photo, None if it cannot be read; ``pixels[task]``, how many have each value of the
    label, for normals void (0) and not (1); ``faults``, one line each."""

    id: str
    size: tuple[int, int] | None
    pixels: dict[str, dict[int, int]]
    faults: tuple[str, ...]


def inspect_images(images: Sequence[ImageFiles], reader: Reader, workers: int, title: str = "") -> list[Finding]:
    """A finding per image, in order, by ``workers`` processes (0: this one).

    Shows a bar on stderr. A process that is killed ends it with a UserError, an interrupt within a chunk's time.
    """
    look = partial(inspect_image, reader=reader)
    bar = partial(tqdm, total=len(images), desc=f"inspect {title}".strip(), unit="image", leave=False, disable=None)
    if not workers:
        return list(bar(map(look, images)))
    with _processes(workers) as pool:
        return list(bar(pool.map(look, images, chunksize=CHUNK)))


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes, since a fork would copy threads and devices that are in use; an interrupt is ours to handle."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not in every process
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignore)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a process that inspects the images was killed, perhaps for want of memory: use fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def inspect_image(image: ImageFiles, reader: Reader) -> Finding:
    """Reads the files of one image as training would, and goes on after a fault.

    Labels must fit their photo, so they are looked at only where it can be read.
    """
    faults, pixels, size = [_missing(path, image) for path in image.missing], {}, None
    try:
        if image.photo not in image.missing:
            size = read_photo(image.photo).shape[:2]
    except UserError as error:
        faults.append(str(error))
    for task in image.read if size else ():
        try:
            pixels[task] = _count(task, reader.label(image, task, size))
        except UserError as error:
            faults.append(str(error))
    return Finding(image.id, size, pixels, tuple(dict.fromkeys(faults)))


def _missing(path: Path, image: ImageFiles) -> str:
    remedy = "restore it" if path == image.photo else "restore it, or pass --partial-labels"
    return f"{path} does not exist: {remedy}"


def _count(task: str, label: NDArray) -> dict[int, int]:
    label = TASKS[task].label_values(label)  # as every protocol has it
    counts = np.bincount(label.ravel())
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
