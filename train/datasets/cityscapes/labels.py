"""Reads and checks the labels of Cityscapes.

In a raw sample "seg" is uint8 (H, W), the 19 evaluated classes by their train ids, and "depth" is float32 (H, W) in
metres, 0 where void.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.datasets.labels import ImageFiles, LabelReader, match_photo
from train.files.images import read_image
from train.files.reading import read_json
from train.metrics.depth import FARTHEST
from train.tasks import VOID

CITYSCAPES_CLASSES = {  # by train id: the name and the id in labelIds files; all other ids are void
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
LARGEST_ID = 33
TRAIN_IDS = np.full(LARGEST_ID + 1, VOID, np.uint8)
TRAIN_IDS[list(CITYSCAPES_CLASSES.values())] = np.arange(len(CITYSCAPES_CLASSES))
LEVELS = 256  # of a disparity file in one pixel of disparity; level 0 is void and level 1 no disparity
CAMERA = 0.209313 * 2262.52  # baseline in metres times focal length in pixels, where an image has no file of them
SCHEMA = {"extrinsic": {"baseline": (int, float)}, "intrinsic": {"fx": (int, float)}}  # of a camera file


class Reader(LabelReader):
    """Reads the files of an image."""

    def label(self, image: ImageFiles, task: str, shape: tuple[int, int]) -> NDArray:
        path = image.read[task]
        if task == "seg":
            return match_photo(path, read_seg(path), shape)
        camera = image.companions.get("depth")
        return match_photo(path, read_depth(path, read_camera(camera) if camera else CAMERA), shape)


def read_seg(path: Path) -> NDArray[np.uint8]:
    """Train ids 0..18 (H, W), and 255 for void, of a labelIds file."""
    stored = np.asarray(read_image(path, ("L",)))
    if stored.max() > LARGEST_ID:
        raise UserError(f"{path} holds {stored.max()}, which is no label id 0..{LARGEST_ID}: restore the labelIds file")
    return TRAIN_IDS[stored]


def read_depth(path: Path, camera: float) -> NDArray[np.float32]:
    """Metres (H, W) of a disparity file, ``camera`` / disparity; 0 for void, and beyond what predictions can reach."""
    stored = np.asarray(read_image(path, ("I;16",))).astype(np.float32)
    disparity = (stored - 1) / LEVELS
    near = disparity > camera / FARTHEST
    return np.where(near, np.float32(camera) / np.where(near, disparity, 1), np.float32(0))


def read_camera(path: Path) -> float:
    """Baseline times focal length, in metres times pixels, of a camera file."""
    values = read_json(path, SCHEMA)
    product = values["extrinsic"]["baseline"] * values["intrinsic"]["fx"]
    if not 0 < product < float("inf"):
        raise UserError(f"{path} gives {product:g} as baseline times focal length, which is no length: restore it")
    return product
