"""A split of a user's tree (:mod:`train.datasets.tree`) as a data set."""

import sys
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.datasets.cache import open_cache
from train.datasets.inspection import inspect_images
from train.datasets.labels import ImageFiles, LabelReader
from train.datasets.tree import Tree, list_images, require_complete
from train.files.images import image_shape
from train.files.progress import progress
from train.files.reading import sha256_of
from train.protocols import Protocol, Sample
from train.tasks import TASKS, Shape

READERS = 8  # files that are hashed at a time, which hides the latency of network disks


@dataclass(frozen=True)
class Access:
    """How a tree is read.

    ``partial_labels``: label files may be missing. ``cache``: folder of derived labels, "" for none. ``skip_bad``:
    images with a fault are left out. ``workers``: processes that search for faults. ``val_images``: divides the images
    without lists, see :func:`train.datasets.splits.divide`.
    """

    partial_labels: bool = False
    cache: str = ""
    skip_bad: bool = False
    workers: int = 0
    val_images: str = ""


class TreeDataSet:
    """One split of a tree as a data set in the sense of :mod:`train.datasets.base`.

    ``protocol`` augments the split "train" by (seed, epoch, index). ``only`` keeps the images with these ids. With
    ``access.skip_bad`` the constructor reads every file and leaves out images with a fault. One line on stderr says how
    many, and ``skipped`` holds the first fault of each.

    Raises UserError for a tree that lacks a list, a photo or a label, and, on reading an item, for a file that is
    damaged.
    """

    def __init__(
        self,
        tree: Tree,
        split: str,
        tasks: Sequence[str],
        protocol: Protocol,
        seed: int,
        access: Access = Access(),
        only: Container[str] | None = None,
    ) -> None:
        self.tree, self.name, self.classes = tree, tree.name, tree.classes
        self.boundary_distance = tree.boundary_distance
        self.split, self.seed, self.protocol = split, seed, protocol
        self.training = split == "train" and not protocol.scoring
        self._reader = tree.reader(open_cache(access.cache), protocol.edges_at_input)
        guided = protocol.needs_seg and self.training
        images = list_images(tree, split, tasks, access.partial_labels, guided)
        if only is not None:
            images = [image for image in images if image.id in only]
        self.skipped: tuple[str, ...] = ()
        if access.skip_bad:
            images, self.skipped = leave_out_bad(split, images, self._reader, access.workers)
        else:
            require_complete(split, images)
        self.images = tuple(images)
        self.groups = group_by_tasks([tuple(image.labels) for image in images])

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(image.id for image in self.images)

    @property
    def origin(self) -> str:
        return str(self.tree)

    @cached_property
    def digests(self) -> tuple[dict[str, str], ...]:
        files = [{task: image.files(task) for task in image.read} for image in self.images]
        paths = list(dict.fromkeys(path for tasks in files for several in tasks.values() for path in several))
        with ThreadPoolExecutor(READERS) as pool:
            sums = progress(pool.map(_sum, paths), f"hash {self.split}", len(paths), "file")
            known = dict(zip(paths, sums, strict=True))
        return tuple({task: " ".join(map(known.__getitem__, several)) for task, several in f.items()} for f in files)

    def with_label(self, task: str) -> list[str]:
        return [image.id for image in self.images if task in image.labels]

    def photo_shape(self, index: int) -> Shape:
        return image_shape(self.images[index].photo)

    def boundary_maps(self) -> dict[str, Callable[[], NDArray]]:
        return {image.id: self._reader.boundary_map(image) for image in self.images if "edge" in image.labels}

    def labelled(self, task: str) -> list[str]:
        """The ids of the images that are scored for ``task``."""
        return self.tree.scored(self.split, task, self.with_label(task))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """``dataset[index, epoch]``: "image" and the labels that the image has."""
        index, epoch = key
        image, rng = self.images[index], np.random.default_rng([self.seed, epoch, index])
        raw = self._reader.sample(image)
        try:
            sample = self.protocol.apply(raw, self.training, rng)
        except UserError as error:
            raise UserError(f"{image.photo}: {error}") from None
        return {name: array for name, array in sample.items() if name == "image" or name in image.labels}


def _sum(path: Path) -> str:
    """The hash of a file; UserError where it cannot be read. :func:`train.files.reading.reading` is not for threads."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file: restore it")
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it") from None


def leave_out_bad(
    split: str, images: list[ImageFiles], reader: LabelReader, workers: int
) -> tuple[list[ImageFiles], tuple[str, ...]]:
    """(images without a fault, the first fault of each other image). Prints how many images were left out."""
    faults = {
        finding.id: finding.faults for finding in inspect_images(images, reader, workers, split) if finding.faults
    }
    skipped = tuple(messages[0] for messages in faults.values())
    if len(faults) == len(images):
        raise UserError(f"every image of split {split!r} has a fault, the first: {skipped[0]}")
    if faults:
        print(f"skipped {len(faults)} of {len(images)} {split} images, the first: {skipped[0]}", file=sys.stderr)
    return [image for image in images if image.id not in faults], skipped


def group_by_tasks(labelled: Sequence[tuple[str, ...]]) -> tuple[NDArray[np.int64], ...]:
    """Indices of the images that are labelled for the same tasks, groups in the order of their tasks."""
    members, order = defaultdict(list), list(TASKS)
    for index, tasks in enumerate(labelled):
        members[tuple(order.index(task) for task in tasks)].append(index)
    return tuple(np.array(members[tasks]) for tasks in sorted(members))
