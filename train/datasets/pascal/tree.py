"""The trees in which users have PASCAL-Context with five tasks: where they lie and what their files are called.

One data set in four layouts, all with ``JPEGImages/<id>.jpg``, ``ImageSets/Context/<split>.txt``, one id per line, and
``ImageSets/Parts/<split>.txt``, JSON: id -> VOC classes of its objects:

======  ==============  =============================================================================================
layout  usual folder    label folders
======  ==============  =============================================================================================
A       PASCAL_MT       semseg/{VOC12,pascal-context}, human_parts, sal_distill, normals_distill,
                        pascal-context/trainval
B       PASCALContext   as A
B'      PASCALContext   as A, beside json/ with class tables that are not needed here
C       PASCAL_MT       SemanticSegmentation/Context, PascalParts, SaliencyDistill, NormalsDistill, Context/trainval
======  ==============  =============================================================================================

A tree is only ever read.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import UserError
from train.datasets.pascal.voc import PERSON
from train.files.reading import reading, require_file

IMAGE_ID = re.compile(r"[\w-]+")
OFFICIAL: dict[str, tuple[str, ...]] = {  # of several files the first that exists counts
    "seg": ("semseg/VOC12/{}.png", "semseg/pascal-context/{}.png"),
    "parts": ("human_parts/{}.mat",),
    "sal": ("sal_distill/{}.png",),
    "normals": ("normals_distill/{}.png",),
    "edge": ("pascal-context/trainval/{}.mat",),  # the LabelMap
}
RENAMED: dict[str, tuple[str, ...]] = {
    "seg": ("SemanticSegmentation/Context/{}.png",),
    "parts": ("PascalParts/{}.mat",),
    "sal": ("SaliencyDistill/{}.png",),
    "normals": ("NormalsDistill/{}.png",),
    "edge": ("Context/trainval/{}.mat",),
}


@dataclass(frozen=True)
class Tree:
    """A tree on disk; ``files`` are its layout's label files by task, patterns that take an id."""

    root: Path
    layout: str
    files: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        folders = {os.path.dirname(pattern): None for patterns in self.files.values() for pattern in patterns}
        lacking = [folder for folder in folders if not (self.root / folder).is_dir()]
        return f"layout {self.layout} at {self.root}" + (f", without {', '.join(lacking)}" if lacking else "")

    def photo(self, image_id: str) -> Path:
        return self.root / f"JPEGImages/{image_id}.jpg"

    def labels(self, task: str, image_id: str) -> list[Path]:
        """Where the label may lie, the best first; UserError for a task that PASCAL-Context has no labels of."""
        if task not in self.files:
            raise UserError(f"PASCAL-Context has no labels for {task!r}: choose --tasks among {', '.join(self.files)}")
        return [self.root / pattern.format(image_id) for pattern in self.files[task]]

    def label_map(self, image_id: str) -> Path:
        """The edges' source, which also tells where normals are valid."""
        return self.labels("edge", image_id)[0]


def find_tree(given: Path) -> Tree:
    """The tree at ``given`` or in its folder PASCAL_MT or PASCALContext, in whichever layout it is."""
    with reading(given):
        for root in (given, given / "PASCAL_MT", given / "PASCALContext"):
            if (root / "JPEGImages").is_dir():
                return _recognise(root)
        problem = "holds no folder JPEGImages" if given.is_dir() else "is not a folder"
    raise UserError(
        f"{given} {problem}: give the folder PASCAL_MT or PASCALContext of the unpacked data set, or the one around it"
    )


def _recognise(root: Path) -> Tree:
    if any((root / os.path.dirname(pattern)).is_dir() for patterns in RENAMED.values() for pattern in patterns):
        return Tree(root, "C", RENAMED)
    if (root / "json").is_dir():
        return Tree(root, "B'", OFFICIAL)
    return Tree(root, "B" if root.name == "PASCALContext" else "A", OFFICIAL)


def read_split(tree: Tree, split: str) -> list[str]:
    """The ids of a split in the order of its list; UserError for what is no id, and for an id given twice."""
    path = tree.root / f"ImageSets/Context/{split}.txt"
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist: name a split whose list is in that folder, or restore the list")
    require_file(path)
    with reading(path):
        ids = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    seen = set()
    for image_id in ids:
        if not IMAGE_ID.fullmatch(image_id):
            raise UserError(f"{path} lists {image_id!r}, which is not an image id such as 2008_000008: mend the list")
        if image_id in seen:
            raise UserError(f"{path} lists {image_id} twice: mend the list")
        seen.add(image_id)
    if not ids:
        raise UserError(f"{path} lists no image: restore the list")
    return ids


def with_persons(tree: Tree, split: str, ids: list[str]) -> list[str]:
    """Those ``ids`` that ImageSets/Parts lists with a person, or not at all; all where the tree has no such list."""
    path = tree.root / f"ImageSets/Parts/{split}.txt"
    if not os.path.lexists(path):
        return ids
    require_file(path)
    with reading(path):
        objects = json.loads(path.read_text("utf-8-sig"))
        return [image_id for image_id in ids if PERSON in objects.get(image_id, (PERSON,))]


@dataclass(frozen=True)
class ImageFiles:
    """The files of one image.

    ``labels`` by task, of those asked for. ``label_map`` says where normals count, ``guide`` is the segmentation where
    a crop needs it and it is no label; both None where there is no such file. ``missing``: files that should exist.
    """

    id: str
    photo: Path
    labels: dict[str, Path]
    label_map: Path | None
    guide: Path | None
    missing: tuple[Path, ...]

    @property
    def read(self) -> dict[str, Path]:
        """The label files to read by task, the guide as "seg"."""
        return self.labels | ({"seg": self.guide} if self.guide else {})


def list_images(
    tree: Tree, split: str, tasks: Sequence[str], partial_labels: bool = False, guided: bool = False
) -> list[ImageFiles]:
    """The images of a split in the order of its list, without reading any.

    With ``partial_labels`` a missing label file means that its image is not labelled for that task, and images without
    any label are left out. As is usual in the field, ``tasks == ("parts",)`` keeps the images that show a person.
    """
    exists, guides = _Listing(), ("seg",) if guided and "seg" not in tasks else ()
    ids = read_split(tree, split)
    if tuple(tasks) == ("parts",):
        ids = with_persons(tree, split, ids)
    images = []
    for image_id in ids:
        photo, label_map = tree.photo(image_id), tree.label_map(image_id)
        choices = {task: tree.labels(task, image_id) for task in (*tasks, *guides)}
        found = {task: next((path for path in paths if path in exists), None) for task, paths in choices.items()}
        labels = {task: path for task in tasks if (path := found[task])}
        lacking = [] if partial_labels else [choices[task][0] for task in tasks if not found[task]]
        missing = (*([] if photo in exists else [photo]), *lacking)
        if labels or missing:
            found_map, guide = label_map if label_map in exists else None, found["seg"] if guides else None
            images.append(ImageFiles(image_id, photo, labels, found_map, guide, missing))
    if partial_labels:
        _require_labels(tree, split, tasks, images)
    return images


def _require_labels(tree: Tree, split: str, tasks: Sequence[str], images: list[ImageFiles]) -> None:
    """UserError for a task that no image is labelled for."""
    for task in tasks:
        if not any(task in image.labels for image in images):
            folder = tree.labels(task, "")[0].parent
            raise UserError(f"{folder} has no label for {task!r} in split {split!r}: add its files, or drop the task")


def require_complete(split: str, images: Sequence[ImageFiles]) -> None:
    """UserError for the photos that are missing, else for the labels."""
    missing = [path for image in images for path in image.missing]
    if photos := [image.photo for image in images if image.photo in image.missing]:
        raise UserError(f"{photos[0]} does not exist ({len(photos)} of {len(images)} photos are missing): restore them")
    if missing:
        raise UserError(
            f"{missing[0]} does not exist ({len(missing)} label files of split {split!r} are missing): "
            "restore them, or pass --partial-labels to use the labels there are"
        )


class _Listing:
    """Which files exist: lists each folder once, which spares a call to the file system per file."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def __contains__(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.names:
            with reading(Path(folder)):
                self.names[folder] = set(os.listdir(folder)) if os.path.lexists(folder) else set()
        return name in self.names[folder]
