"""Cityscapes as it is stored: every label against the arrays that were written."""

import numpy as np
import pytest
from PIL import Image

from train.datasets.base import open_tree
from train.datasets.cityscapes.labels import CITYSCAPES_CLASSES, TRAIN_IDS, Reader, read_depth
from train.datasets.tree import list_images
from train.tasks import VOID

PUBLISHED = {  # trainId: id, as the benchmark's labels.py has them
    0: 7, 1: 8, 2: 11, 3: 12, 4: 13, 5: 17, 6: 19, 7: 20, 8: 21, 9: 22, 10: 23, 11: 24, 12: 25, 13: 26, 14: 27, 15: 28,
    16: 31, 17: 32, 18: 33,
}  # fmt: skip


def image(root, image_id):
    return next(one for one in list_images(open_tree(root), "train", ("seg", "depth")) if one.id == image_id)


def test_there_are_nineteen_classes_by_their_train_ids():
    assert len(CITYSCAPES_CLASSES) == 19
    assert {int(TRAIN_IDS[stored]): stored for stored in range(34) if TRAIN_IDS[stored] != VOID} == PUBLISHED


@pytest.mark.parametrize(
    ("image_id", "camera"),
    [("aachen/aachen_000000_000000", 0.25 * 2000), ("aachen/aachen_000000_000001", 0.209313 * 2262.52)],
)
def test_every_label_is_what_was_written(image_id, camera, city_tree, labels_of):
    """With the camera of the image, or without one the usual camera."""
    sample, written = Reader().sample(image(city_tree, image_id)), labels_of(image_id)
    np.testing.assert_array_equal(sample["image"], written["image"])
    train_id = {stored: index for index, stored in PUBLISHED.items()}
    assert sample["seg"].tolist() == [[train_id.get(value, VOID) for value in row] for row in written["seg"].tolist()]
    stored = written["depth"].astype(np.float64)
    with np.errstate(divide="ignore"):
        expected = np.where(stored > 0, camera / ((stored - 1) / 256), 0)
    np.testing.assert_allclose(sample["depth"], np.where(expected < 65.535, expected, 0), rtol=1e-5)
    assert sample["depth"].dtype == np.float32 and (sample["depth"] == 0).mean() >= 0.2


def test_what_is_farther_than_a_prediction_can_say_is_void(tmp_path):
    Image.fromarray(np.array([[0, 1, 2, 256 + 1, 51 * 256 + 1]], np.uint16)).save(tmp_path / "a.png")
    assert read_depth(tmp_path / "a.png", 510.0).tolist() == [[0, 0, 0, 0, 10]]


def test_a_digest_covers_the_camera(city_tree):
    with_camera, without = (image(city_tree, f"aachen/aachen_000000_00000{n}") for n in (0, 1))
    assert [path.suffix for path in with_camera.files("depth")] == [".png", ".png", ".json"]
    assert len(without.files("depth")) == len(with_camera.files("seg")) == 2
