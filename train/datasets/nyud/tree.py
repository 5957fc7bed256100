"""Folder layouts of NYUD-v2 with four tasks.

The data set exists in two releases. Both have ``gt_sets/<split>.txt`` (one id per line), ``segmentation/<id>.png`` and
``depth/<id>.npy``. They differ in the format of the other files, by which they are told apart:

======  ============  ===============================  ============================================================
layout  usual folder  from                             other files
======  ============  ===============================  ============================================================
npy     NYUD_MT       Multi-Task-Learning-PyTorch      images/<id>.jpg, normals/<id>.npy, edge/<id>.npy
png     NYUDv2        ATRC, InvPT, MLoRE, MTMamba      images/<id>.png, normals/<id>.png, edge/<id>.png
======  ============  ===============================  ============================================================
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from train.datasets.nyud.labels import NYUD_CLASSES, Reader
from train.datasets.tree import Tree, files_in
from train.tasks import Classes


@dataclass(frozen=True)
class NyudTree(Tree):
    """A tree of NYUD-v2."""

    name = "NYUD"
    title = "NYUD-v2"
    folders = ("NYUD_MT", "NYUDv2")
    marks = ("gt_sets", "images")
    example = "0001"
    lists = "gt_sets/{}.txt"
    classes: ClassVar[Classes] = {"seg": NYUD_CLASSES}
    reader = Reader
    boundary_distance = 0.011
    protocol = "nyud_invpt"
    official: ClassVar[dict[str, int]] = {"train": 795, "val": 654}

    @classmethod
    def open(cls, root: Path) -> "NyudTree":
        npy, png = (files_in(root, [f"images/{{}}.{photo}"]) for photo in ("jpg", "png"))
        kind, photos = ("png", "png") if png > npy else ("npy", "jpg")
        files: dict[str, tuple[str, ...]] = {
            "seg": ("segmentation/{}.png",),
            "normals": (f"normals/{{}}.{kind}",),
            "edge": (f"edge/{{}}.{kind}",),
            "depth": ("depth/{}.npy",),
        }
        return cls(root, kind, f"images/{{}}.{photos}", files)
