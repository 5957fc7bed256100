"""NYUD-v2 as it is stored: both releases against the arrays that were written, and the list of classes."""

import cv2
import numpy as np
import pytest
from PIL import Image

from train.datasets.base import Source, open_dataset, open_tree
from train.datasets.files import TreeDataSet
from train.datasets.nyud.labels import NOT_CONVEX, NYUD_CLASSES, Reader, read_edges, read_seg
from train.datasets.tree import list_images
from train.metrics.odsf import MAX_DISTANCE
from train.protocols import build_protocol
from train.tasks import VOID

TASKS = ("seg", "normals", "edge", "depth")


def raw(root, image_id, tasks=TASKS):
    images = list_images(open_tree(root), "train", tasks)
    return Reader().sample(next(image for image in images if image.id == image_id))


def test_every_label_is_the_array_that_was_written(nyud_tree, layout, labels_of):
    for image_id in ("0001", "0004"):
        sample, written = raw(nyud_tree, image_id), labels_of(image_id)
        if layout == "png":  # JPEGs do not keep the pixels
            np.testing.assert_array_equal(sample["image"], written["image"])
        np.testing.assert_array_equal(sample["seg"], np.where(written["seg"], written["seg"] - 1.0, VOID))
        np.testing.assert_array_equal(sample["depth"], written["depth"])
        np.testing.assert_array_equal(sample["edge"], written["edge"])
        void = ~written["normals"].any(-1)
        assert void.any() and not sample["normals"][void].any()
        error = np.abs(sample["normals"] - written["normals"])[~void].max()
        assert error <= (0 if layout == "npy" else 1.001 / 255)  # half a level of 2 / 255


def test_a_raw_sample_has_the_dtypes_of_its_labels(nyud_tree):
    assert {name: (array.dtype.name, array.shape) for name, array in raw(nyud_tree, "0002").items()} == {
        "image": ("uint8", (36, 48, 3)),
        "seg": ("uint8", (36, 48)),
        "normals": ("float32", (36, 48, 3)),
        "edge": ("uint8", (36, 48)),
        "depth": ("float32", (36, 48)),
    }


def test_there_are_forty_classes_stored_from_1(tmp_path):
    assert len(set(NYUD_CLASSES)) == 40 and set(NOT_CONVEX) < set(NYUD_CLASSES)
    Image.fromarray(np.array([[0, 1, 40]], np.uint8)).save(tmp_path / "a.png")
    assert read_seg(tmp_path / "a.png").tolist() == [[VOID, 0, 39]]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8, np.bool_])
def test_edges_are_cut_at_half(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array([[0, 1, 0.5, 0.75]]).astype(dtype))
    assert read_edges(tmp_path / "a.npy").tolist() == (np.array([[0, 1, 0.5, 0.75]]).astype(dtype) > 0.5).tolist()


def test_labels_of_another_size_are_resized_to_the_photo(nyud_copy):
    """Nearest, but normals cubic, and void where the nearest pixel is void."""
    whole = raw(nyud_copy, "0001")
    for folder in ("segmentation", "normals", "edge", "depth"):
        (path,) = (nyud_copy / folder).glob("0001.*")
        if path.suffix == ".npy":
            np.save(path, np.load(path)[::2, ::2])
        else:
            Image.fromarray(np.asarray(Image.open(path))[::2, ::2].copy()).save(path)
    resized = raw(nyud_copy, "0001")
    for task in ("seg", "edge", "depth"):
        half = whole[task][::2, ::2]
        np.testing.assert_array_equal(resized[task], half.repeat(2, axis=0).repeat(2, axis=1))
    half = whole["normals"][::2, ::2]
    known = half.any(-1).repeat(2, axis=0).repeat(2, axis=1)
    cubic = cv2.resize(half, (48, 36), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(resized["normals"], cubic * known[..., None], atol=1e-6)


def test_a_split_of_the_tree(nyud_tree):
    source = Source(str(nyud_tree.parent), TASKS, "nyud_invpt", 56)
    train, val = (open_dataset(source, split) for split in ("train", "val"))
    assert (train.name, train.ids, val.ids) == ("NYUD", ("0001", "0002", "0003", "0004"), ("0101", "0102"))
    assert train.classes == source.classes == {"seg": NYUD_CLASSES} and train.photo_shape(0) == (36, 48)
    sample = train[0, 0]
    assert {name: array.shape for name, array in sample.items()} == {
        "image": (56, 72, 3), "seg": (56, 72), "normals": (3, 56, 72), "edge": (56, 72), "depth": (56, 72),
    }  # fmt: skip


def test_the_segmentation_guides_the_crop_where_it_is_no_task(nyud_tree):
    protocol = build_protocol("nyud_invpt", 28)
    with_seg = TreeDataSet(open_tree(nyud_tree), "train", TASKS, protocol, 3)
    without = TreeDataSet(open_tree(nyud_tree), "train", ("depth",), protocol, 3)
    for index in range(4):
        np.testing.assert_array_equal(with_seg[index, 0]["depth"], without[index, 0]["depth"])
        assert without[index, 0].keys() == {"image", "depth"}


def test_boundaries_are_the_edges_themselves(nyud_tree, labels_of):
    dataset = TreeDataSet(open_tree(nyud_tree), "val", TASKS, build_protocol("nyud_invpt", 56), 0)
    assert dataset.boundary_distance == 0.011 != MAX_DISTANCE
    for image_id, load in dataset.boundary_maps().items():
        assert load().dtype == bool
        np.testing.assert_array_equal(load(), labels_of(image_id)["edge"] == 1)
