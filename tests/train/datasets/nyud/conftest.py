"""A fabricated NYUD-v2 tree in the formats of both releases."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TRAIN, VAL = ["0001", "0002", "0003", "0004"], ["0101", "0102"]
SHAPE = (36, 48)  # of the photos, 3:4; it fits into inputs of 56 x 72
RELEASES = {"npy": "NYUD_MT", "png": "NYUDv2"}


def arrays(image_id):
    """Photo and labels of an image as both releases mean them: vectors and metres, class 0 for void."""
    rng = np.random.default_rng(int(image_id))
    vectors = rng.normal(size=(*SHAPE, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[:, ::6] = 0
    depth = rng.uniform(0.7, 9.9, SHAPE).astype(np.float32)
    depth[::5] = 0
    return {
        "image": rng.integers(0, 256, (*SHAPE, 3), np.uint8),
        "seg": np.kron(rng.integers(0, 41, (6, 8)), np.ones((6, 6), int)).astype(np.uint8),
        "normals": vectors,
        "edge": (rng.random(SHAPE) < 0.1).astype(np.float32),
        "depth": depth,
    }


def fabricate(root, release):
    for folder in ("gt_sets", "images", "segmentation", "depth", "normals", "edge"):
        (root / folder).mkdir(parents=True)
    for split, ids in {"train": TRAIN, "val": VAL}.items():
        (root / f"gt_sets/{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    for image_id in TRAIN + VAL:
        of = arrays(image_id)
        Image.fromarray(of["seg"]).save(root / f"segmentation/{image_id}.png")
        np.save(root / f"depth/{image_id}.npy", of["depth"])
        if release == "npy":
            Image.fromarray(of["image"]).save(root / f"images/{image_id}.jpg")
            np.save(root / f"normals/{image_id}.npy", of["normals"])
            np.save(root / f"edge/{image_id}.npy", of["edge"])
        else:
            Image.fromarray(of["image"]).save(root / f"images/{image_id}.png")
            levels = np.rint(127.5 * (of["normals"] + 1)).astype(np.uint8)
            Image.fromarray(levels).save(root / f"normals/{image_id}.png")
            Image.fromarray((255 * of["edge"]).astype(np.uint8)).save(root / f"edge/{image_id}.png")
    return root


@pytest.fixture(scope="session")
def nyud_trees(tmp_path_factory):
    """{layout: tree} of both releases, with the same 4 train and 2 val images; do not change them."""
    return {
        release: fabricate(tmp_path_factory.mktemp(release) / folder, release) for release, folder in RELEASES.items()
    }


@pytest.fixture(params=RELEASES)
def layout(request):
    return request.param


@pytest.fixture
def nyud_tree(nyud_trees, layout):
    return nyud_trees[layout]


@pytest.fixture
def nyud_copy(nyud_tree, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(nyud_tree, tmp_path / nyud_tree.name))


@pytest.fixture
def labels_of():
    return arrays
