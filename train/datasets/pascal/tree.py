"""Folder layouts of PASCAL-Context with five tasks.

The data set exists in four layouts. All have ``JPEGImages/<id>.jpg``, ``ImageSets/Context/<split>.txt`` (one id per
line) and ``ImageSets/Parts/<split>.txt`` (JSON: id -> VOC classes of its objects). They differ in the label folders:

======  ==============  =============================================================================================
layout  usual folder    label folders
======  ==============  =============================================================================================
A       PASCAL_MT       semseg/{VOC12,pascal-context}, human_parts, sal_distill, normals_distill,
                        pascal-context/trainval
B       PASCALContext   as A
B'      PASCALContext   as A, plus json/ with class tables that are not needed here
C       PASCAL_MT       SemanticSegmentation/Context, PascalParts, SaliencyDistill, NormalsDistill, Context/trainval
======  ==============  =============================================================================================
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

from train.datasets.pascal.labels import Reader
from train.datasets.pascal.voc import PERSON, VOC_CLASSES
from train.datasets.tree import Tree, files_in
from train.files.reading import reading, require_file
from train.tasks import PART_NAMES, Classes

OFFICIAL: dict[str, tuple[str, ...]] = {
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
class PascalTree(Tree):
    """A tree of PASCAL-Context. As is usual in the field, images without a person are used neither for training on
    parts alone nor for the scores of parts."""

    name = "PASCAL_MT"
    title = "PASCAL-Context"
    folders = ("PASCAL_MT", "PASCALContext")
    marks = ("JPEGImages",)
    example = "2008_000008"
    lists = "ImageSets/Context/{}.txt"
    classes: ClassVar[Classes] = {"seg": VOC_CLASSES, "parts": PART_NAMES}
    reader = Reader
    protocol = "ase"
    official: ClassVar[dict[str, int]] = {"train": 4998, "val": 5105}

    @classmethod
    def open(cls, root: Path) -> "PascalTree":
        renamed, official = (files_in(root, chain(*files.values())) for files in (RENAMED, OFFICIAL))
        if renamed > official:
            layout = "C"
        elif (root / "json").is_dir():
            layout = "B'"
        else:
            layout = "B" if root.name == "PASCALContext" else "A"
        return cls(root, layout, "JPEGImages/{}.jpg", RENAMED if layout == "C" else OFFICIAL)

    def companions(self, image_id: str) -> dict[str, Path]:
        """The LabelMap, from which edges are derived, tells the pixels where normals are valid."""
        return {"normals": self.labels("edge", image_id)[0]}

    def listed(self, split: str, tasks: Sequence[str]) -> list[str]:
        ids = self.ids(split)
        return with_persons(self, split, ids) if tuple(tasks) == ("parts",) else ids

    def scored(self, split: str, task: str, ids: list[str]) -> list[str]:
        return with_persons(self, split, ids) if task == "parts" else ids


def with_persons(tree: Tree, split: str, ids: list[str]) -> list[str]:
    """The ``ids`` that may show a person: ImageSets/Parts lists a person for them, or does not list them at all.

    All ``ids`` where the tree has no such list.
    """
    without: set[str] = set()
    for name in tree.official if tree.val_images else (split,):
        path = tree.root / f"ImageSets/Parts/{name}.txt"
        if os.path.lexists(path):
            require_file(path)
            with reading(path):
                objects = json.loads(path.read_text("utf-8-sig"))
                without |= {image_id for image_id, classes in objects.items() if PERSON not in classes}
    return [image_id for image_id in ids if image_id not in without]
