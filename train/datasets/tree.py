"""A data set's folder on disk: its lists of images and the paths of their files. Nothing is ever written to it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kernels.errors import UserError
from train.datasets.labels import ImageFiles, LabelReader
from train.datasets.splits import divide, find_ids, read_ids
from train.files.reading import reading
from train.metrics.odsf import MAX_DISTANCE
from train.tasks import Classes


@dataclass(frozen=True)
class Tree(ABC):
    """A tree on disk; a subclass describes a data set.

    ``photos`` is the pattern of the photos' paths, and ``files[task]`` are those of its label files, of which the first
    that exists is used. ``{}`` stands for the image id, whose folders are those below the pattern's. ``val_images``, if
    given, divides all images in the photos' folder, as :func:`train.datasets.splits.divide` says, and no list is read.
    """

    root: Path
    layout: str
    photos: str
    files: dict[str, tuple[str, ...]]
    val_images: str = ""

    name: ClassVar[str]  # in results.json, and by which a protocol names its data set
    title: ClassVar[str]  # in messages
    folders: ClassVar[tuple[str, ...]]  # usual names of its root
    marks: ClassVar[tuple[str, ...]]  # folders in its root that no other data set has
    example: ClassVar[str]  # of an image id
    lists: ClassVar[str]  # the pattern of the lists of ids, {} standing for the split
    classes: ClassVar[Classes]
    reader: ClassVar[type[LabelReader]]
    protocol: ClassVar[str]  # the usual one
    boundary_distance: ClassVar[float] = MAX_DISTANCE  # within which odsF matches boundaries, a share of the diagonal
    official: ClassVar[dict[str, int]]  # images per split of the official release

    @classmethod
    def locate(cls, given: Path) -> Path | None:
        """The root of a tree of this data set, ``given`` or a folder in it; None where there is none."""
        roots = (given, *(given / name for name in cls.folders))
        return next((root for root in roots if all((root / mark).is_dir() for mark in cls.marks)), None)

    @classmethod
    @abstractmethod
    def open(cls, root: Path) -> "Tree":
        """The tree at a root that :meth:`locate` returned, in any layout."""

    def __str__(self) -> str:
        folders = {os.path.dirname(pattern): None for patterns in self.files.values() for pattern in patterns}
        lacking = [folder for folder in folders if not (self.root / folder).is_dir()]
        return f"layout {self.layout} at {self.root}" + (f", without {', '.join(lacking)}" if lacking else "")

    def path(self, pattern: str, image_id: str) -> Path:
        return self.root / pattern.format(image_id)

    def photo(self, image_id: str) -> Path:
        return self.path(self.photos, image_id)

    def labels(self, task: str, image_id: str) -> list[Path]:
        """Possible paths of the label, the preferred one first; UserError for a task that the data set lacks."""
        if task not in self.files:
            raise UserError(f"{self.title} has no labels for {task!r}: choose --tasks among {', '.join(self.files)}")
        return [self.path(pattern, image_id) for pattern in self.files[task]]

    def companions(self, image_id: str) -> dict[str, Path]:
        """{task: the further file that its label is read with, where it exists}."""
        return {}

    def all_ids(self) -> list[str]:
        """The ids of all photos."""
        return find_ids(self.root, self.photos)

    def ids(self, split: str) -> list[str]:
        """The ids of a split; UserError for an unknown one, and for an invalid id."""
        return divide(self.all_ids(), self.val_images, split) if self.val_images else self.own_ids(split)

    def own_ids(self, split: str) -> list[str]:
        """The ids of a split by the tree's own lists, in their order."""
        path = self.root / self.lists.format(split)
        if not os.path.lexists(path):
            raise UserError(
                f"{path} does not exist: name a split whose list is in that folder, restore the list, or divide the "
                "images without lists by --val-images"
            )
        return read_ids(path, self.example)

    def listed(self, split: str, tasks: Sequence[str]) -> list[str]:
        """The ids of a split that are used for these ``tasks``."""
        return self.ids(split)

    def scored(self, split: str, task: str, ids: list[str]) -> list[str]:
        """Those of ``ids``, which are labelled for ``task``, that its scores are reported over."""
        return ids


def files_in(root: Path, patterns: Iterable[str]) -> int:
    """How many files in the folders of ``patterns`` have names that these match. Layouts are told apart by it: a file
    or an empty folder that strayed into a tree does not make it one of another layout."""
    found = 0
    for pattern in patterns:
        folder, suffix = root / os.path.dirname(pattern), os.path.splitext(pattern)[1]
        if folder.is_dir():
            with reading(folder):
                found += sum(name.endswith(suffix) and not name.startswith(".") for name in os.listdir(folder))
    return found


def list_images(
    tree: Tree, split: str, tasks: Sequence[str], partial_labels: bool = False, guided: bool = False
) -> list[ImageFiles]:
    """The images of a split in the order of its list, without reading any.

    With ``partial_labels`` a missing label file means that its image is not labelled for that task, and images without
    any label are left out. With ``guided`` the segmentation guides the crop.
    """
    exists, guides = _Listing(), ("seg",) if guided and "seg" not in tasks else ()
    images = []
    for image_id in tree.listed(split, tasks):
        photo = tree.photo(image_id)
        choices = {task: tree.labels(task, image_id) for task in (*tasks, *guides)}
        found = {task: next((path for path in paths if path in exists), None) for task, paths in choices.items()}
        labels = {task: path for task in tasks if (path := found[task])}
        lacking = [] if partial_labels else [choices[task][0] for task in tasks if not found[task]]
        missing = (*([] if photo in exists else [photo]), *lacking)
        if labels or missing:
            companions = {task: path for task, path in tree.companions(image_id).items() if path in exists}
            guide = found["seg"] if guides else None
            images.append(ImageFiles(image_id, photo, labels, companions, guide, missing))
    if partial_labels:
        _require_labels(tree, split, tasks, images)
    return images


def _require_labels(tree: Tree, split: str, tasks: Sequence[str], images: list[ImageFiles]) -> None:
    """UserError for a task that no image is labelled for."""
    for task in tasks:
        if not any(task in image.labels for image in images):
            folder = tree.root / os.path.dirname(tree.files[task][0])
            raise UserError(f"{folder} has no label for {task!r} in split {split!r}: add its files, or drop the task")


def require_complete(split: str, images: Sequence[ImageFiles]) -> None:
    """UserError if photos are missing or, if none are, label files."""
    missing = [path for image in images for path in image.missing]
    if photos := [image.photo for image in images if image.photo in image.missing]:
        raise UserError(f"{photos[0]} does not exist ({len(photos)} of {len(images)} photos are missing): restore them")
    if missing:
        raise UserError(
            f"{missing[0]} does not exist ({len(missing)} label files of split {split!r} are missing): "
            "restore them, or pass --partial-labels to use the labels that exist"
        )


class _Listing:
    """The files that exist. Lists each folder once, instead of asking the file system for every file."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def __contains__(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.names:
            with reading(Path(folder)):
                self.names[folder] = set(os.listdir(folder)) if os.path.lexists(folder) else set()
        return name in self.names[folder]
