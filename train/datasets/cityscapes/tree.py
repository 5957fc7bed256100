"""The folder layout of Cityscapes, as it is published:

=============================================  ====================================================================
file                                           content
=============================================  ====================================================================
leftImg8bit/SPLIT/<id>_leftImg8bit.png         photo
gtFine/SPLIT/<id>_gtFine_labelIds.png          segmentation
disparity/SPLIT/<id>_disparity.png             disparity, from which depth follows
camera/SPLIT/<id>_camera.json                  baseline and focal length; optional
=============================================  ====================================================================

An id is CITY/CITY_SEQUENCE_FRAME. There are no lists: the cities of leftImg8bit/train and of leftImg8bit/val are the
splits. No city is in both.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from kernels.errors import UserError
from train.datasets.cityscapes.labels import CITYSCAPES_CLASSES, Reader
from train.datasets.splits import find_ids
from train.datasets.tree import Tree
from train.files.reading import reading
from train.tasks import Classes

PHOTOS = "leftImg8bit/{}_leftImg8bit.png"
FILES: dict[str, tuple[str, ...]] = {
    "seg": ("gtFine/{}_gtFine_labelIds.png",),
    "depth": ("disparity/{}_disparity.png",),
}


@dataclass(frozen=True)
class CityscapesTree(Tree):
    """A tree of Cityscapes. ``folders_of[city]`` is the folder, train or val, that holds the city."""

    folders_of: dict[str, str] = field(default_factory=dict)

    name = "Cityscapes"
    title = "Cityscapes"
    folders = ("cityscapes", "Cityscapes")
    marks = ("leftImg8bit",)
    example = "aachen/aachen_000000_000019"
    lists = ""
    classes: ClassVar[Classes] = {"seg": tuple(CITYSCAPES_CLASSES)}
    reader = Reader
    protocol = "cityscapes"
    official: ClassVar[dict[str, int]] = {"train": 2975, "val": 500}

    @classmethod
    def open(cls, root: Path) -> "CityscapesTree":
        folders_of: dict[str, str] = {}
        for split in cls.official:
            for city in _cities(root / "leftImg8bit" / split):
                if city in folders_of:
                    raise UserError(f"{root}/leftImg8bit holds {city} in {folders_of[city]} and {split}: remove one")
                folders_of[city] = split
        return cls(root, "fine", PHOTOS, FILES, folders_of=folders_of)

    def path(self, pattern: str, image_id: str) -> Path:
        city = image_id.partition("/")[0]
        return super().path(pattern, f"{self.folders_of.get(city, '')}/{image_id}")

    def companions(self, image_id: str) -> dict[str, Path]:
        """The camera gives the depth of a disparity."""
        return {"depth": self.path("camera/{}_camera.json", image_id)}

    def all_ids(self) -> list[str]:
        return [image_id for split in self.official if self._has(split) for image_id in self.own_ids(split)]

    def own_ids(self, split: str) -> list[str]:
        if not self._has(split):
            raise UserError(
                f"{self.root}/leftImg8bit has no cities in {split}: restore them, or choose among "
                f"{', '.join(self.official)}"
            )
        return find_ids(self.root / "leftImg8bit" / split, "{}_leftImg8bit.png")

    def _has(self, split: str) -> bool:
        return split in self.folders_of.values()


def _cities(folder: Path) -> list[str]:
    """The folders in ``folder``; none where it does not exist."""
    if not folder.is_dir():
        return []
    with reading(folder):
        return sorted(name for name in os.listdir(folder) if not name.startswith(".") and (folder / name).is_dir())
