"""A fabricated Cityscapes tree in the published layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHAPE = (32, 64)
IDS = {
    "train": [f"{city}/{city}_000000_{frame:06d}" for city in ("aachen", "bochum") for frame in range(2)],
    "val": [f"frankfurt/frankfurt_000000_{frame:06d}" for frame in range(2)],
}
NO_CAMERA = IDS["train"][1]  # all others have one
BASELINE, FOCAL = 0.25, 2000.0


def arrays(image_id):
    """Photo, label ids and stored disparity of an image."""
    rng = np.random.default_rng(list(image_id.encode()))
    disparity = rng.integers(257 * 8, 257 * 90, SHAPE).astype(np.uint16)  # 8 to 90 pixels
    disparity[::5] = 0
    ids = np.kron(rng.integers(0, 34, (4, 8)), np.ones((8, 8), int)).astype(np.uint8)
    return {"image": rng.integers(0, 256, (*SHAPE, 3), np.uint8), "seg": ids, "depth": disparity}


def fabricate(root):
    for split, ids in IDS.items():
        for image_id in ids:
            of = arrays(image_id)
            for folder, kind, array in (
                ("leftImg8bit", "leftImg8bit", of["image"]),
                ("gtFine", "gtFine_labelIds", of["seg"]),
                ("disparity", "disparity", of["depth"]),
            ):
                path = root / folder / split / f"{image_id}_{kind}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
            if image_id != NO_CAMERA:
                path = root / "camera" / split / f"{image_id}_camera.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"extrinsic": {"baseline": BASELINE}, "intrinsic": {"fx": FOCAL}}))
    return root


@pytest.fixture(scope="session")
def city_tree(tmp_path_factory):
    """The folder cityscapes with 4 train images in two cities and 2 val images; do not change it."""
    return fabricate(tmp_path_factory.mktemp("published") / "cityscapes")


@pytest.fixture
def city_copy(city_tree, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(city_tree, tmp_path / "cityscapes"))


@pytest.fixture
def labels_of():
    return arrays
