"""Labels as they are stored: each rule by which the field reads them, before any transform."""

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat
from skimage.morphology import thin

from kernels import UserError
from train.datasets.base import open_tree
from train.datasets.labels import match_photo
from train.datasets.pascal.labels import Reader, read_sal, read_seg, valid_classes
from train.datasets.tree import list_images
from train.tasks import DEFAULT_TASKS
from train.tasks.palette import PALETTE

# images of the fabricated tree, see conftest.py
CROWD, NO_PERSON, NO_PARTS = (f"2008_{n:06d}" for n in range(3))


def raw(root, id, *tasks, split="all", reader=Reader(), partial=False):
    images = list_images(open_tree(root), split, tasks or DEFAULT_TASKS, partial)
    return reader.sample(next(image for image in images if image.id == id))


def stored(path):
    return np.asarray(Image.open(path))


def label_map(root, id):
    return loadmat(root / f"pascal-context/trainval/{id}.mat")["LabelMap"]


def cv_edges(labels):
    """The field's own code: the default Laplacian of OpenCV, thinned."""
    return thin(np.abs(cv2.Laplacian(labels, cv2.CV_64F)) > 0)


def test_a_raw_sample_has_the_size_of_the_photo_and_the_dtypes_of_its_labels(pascal_tree):
    sample = raw(pascal_tree, CROWD)
    assert {name: (array.dtype.name, array.shape) for name, array in sample.items()} == {
        "image": ("uint8", (37, 50, 3)),
        "seg": ("uint8", (37, 50)),
        "parts": ("uint8", (37, 50)),
        "sal": ("uint8", (37, 50)),
        "normals": ("float32", (37, 50, 3)),
        "edge": ("uint8", (37, 50)),
    }
    np.testing.assert_array_equal(sample["image"], stored(pascal_tree / f"JPEGImages/{CROWD}.jpg"))
    np.testing.assert_array_equal(sample["seg"], stored(pascal_tree / f"semseg/VOC12/{CROWD}.png"))


def test_without_a_person_and_without_parts_the_label_is_zero(pascal_tree):
    """Rule of human_parts: zeros; it is the protocol that makes them void."""
    for id, shape in ((NO_PERSON, (50, 37)), (NO_PARTS, (33, 41))):
        np.testing.assert_array_equal(raw(pascal_tree, id, "parts", "sal")["parts"], np.zeros(shape, np.uint8))


def test_normals_are_decoded_but_not_made_unit(pascal_tree):
    """Rule of normals: 2 u / 255 - 1 in RGB order where the class is one of 170; the stored (0, 0, 0) is void."""
    normals = raw(pascal_tree, CROWD, "normals")["normals"]
    rgb = stored(pascal_tree / f"normals_distill/{CROWD}.png")
    valid = np.isin(label_map(pascal_tree, CROWD), valid_classes()) & rgb.any(axis=-1)
    np.testing.assert_allclose(normals, (rgb / 127.5 - 1) * valid[..., None], atol=1e-6)
    assert 0 < valid.sum() < rgb.any(axis=-1).sum() < valid.size


def test_edges_are_the_thinned_laplacian_of_the_stored_label_map(pascal_tree):
    """Rule of edge, against OpenCV's Laplacian with its default border."""
    np.testing.assert_array_equal(raw(pascal_tree, CROWD, "edge")["edge"], cv_edges(label_map(pascal_tree, CROWD)))


def test_a_protocol_may_take_the_label_map_itself(pascal_tree):
    edge = raw(pascal_tree, CROWD, "edge", reader=Reader(edges_at_input=True))["edge"]
    assert edge.dtype == np.uint16
    np.testing.assert_array_equal(edge, label_map(pascal_tree, CROWD))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float64, bool])
def test_a_label_map_may_have_any_type_of_number(dtype, pascal_copy):
    values = np.random.default_rng(0).integers(0, 2, (37, 50)).astype(dtype)
    savemat(pascal_copy / f"pascal-context/trainval/{CROWD}.mat", {"LabelMap": values})
    np.testing.assert_array_equal(raw(pascal_copy, CROWD, "edge")["edge"], cv_edges(values.astype(np.uint8)))


def palette_image(path, label, palette):
    image = Image.fromarray(label, "P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(path)


@pytest.mark.parametrize(
    "palette",
    [PALETTE, PALETTE[:21], np.random.default_rng(7).integers(0, 256, (256, 3))],
    ids=["VOC", "its first 21", "unrelated"],
)
def test_seg_counts_by_index_whatever_an_unrelated_palette_shows(palette, tmp_path):
    """Rule of semseg: raw palette indices."""
    label = np.arange(21, dtype=np.uint8).reshape(3, 7)
    palette_image(tmp_path / "a.png", label, palette)
    np.testing.assert_array_equal(read_seg(tmp_path / "a.png"), label)


@pytest.mark.parametrize("first", [1, 15, 255])
def test_seg_with_indices_renumbered_by_its_palette_is_refused(first, tmp_path):
    """Background, void and a class, saved by an optimiser: index 1 is no longer the class that has its colour."""
    palette_image(tmp_path / "a.png", np.array([[0, 2]], np.uint8), PALETTE[[0, 7, first]])
    with pytest.raises(UserError, match=f"a.png has the colour of class {first} at index 2: restore"):
        read_seg(tmp_path / "a.png")


def test_a_saliency_of_one_bit_is_read_too(tmp_path):
    """Rule of sal: stored / 255 > 0.5."""
    mask = np.random.default_rng(0).integers(0, 2, (9, 11)).astype(bool)
    Image.fromarray(mask).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_sal(tmp_path / "a.png"), mask)


# Sizes


@pytest.mark.parametrize("shape", [(74, 100), (75, 100), (73, 101), (18, 25), (19, 25), (47, 63), (370, 500)])
def test_a_rescaled_label_is_brought_to_its_photo_nearest_and_normals_cubic(shape, pascal_copy):
    """Rule of a label of another size: nearest, normals cubic, as OpenCV does."""
    rng = np.random.default_rng(0)
    label, rgb = rng.integers(0, 21, shape, np.uint8), rng.integers(1, 256, (*shape, 3), np.uint8)
    Image.fromarray(label).save(pascal_copy / f"semseg/VOC12/{CROWD}.png")
    Image.fromarray(rgb).save(pascal_copy / f"normals_distill/{CROWD}.png")
    (pascal_copy / f"pascal-context/trainval/{CROWD}.mat").unlink()
    sample = raw(pascal_copy, CROWD, "seg", "normals")
    np.testing.assert_array_equal(sample["seg"], cv2.resize(label, (50, 37), interpolation=cv2.INTER_NEAREST))
    cubic = cv2.resize((rgb / 127.5 - 1).astype(np.float32), (50, 37), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(sample["normals"], cubic, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(36, 50), (37, 51), (38, 51), (50, 37), (40, 54), (100, 74), (74, 97), (37, 100), (1, 1), (4000, 5400)]
)
def test_a_label_of_any_other_size_is_refused(shape, tmp_path):
    """Off by one, transposed, hardly rescaled, rescaled in one direction, of another aspect, a speck, a giant."""
    with pytest.raises(UserError) as caught:
        match_photo(tmp_path / "a.png", np.zeros(shape, np.uint8), (37, 50))
    assert str(caught.value).startswith(f"{tmp_path}/a.png is {shape[1]} x {shape[0]} pixels, its photo 50 x 37")


# Real images


def direct(root, id, task):
    """The label by the field's own lines, none of them ours."""
    if task == "seg":
        return stored(root / f"semseg/VOC12/{id}.png")
    if task == "sal":
        return stored(root / f"sal_distill/{id}.png") / 255.0 > 0.5
    if task == "edge":
        return cv_edges(label_map(root, id))
    if task == "normals":
        rgb = stored(root / f"normals_distill/{id}.png")
        return (2.0 * rgb / 255.0 - 1.0) * (rgb.sum(axis=-1, keepdims=True) > 0)
    groups = [
        "",
        "head hair",
        "torso neck",
        "luarm ruarm",
        "llarm rlarm lhand rhand",
        "luleg ruleg",
        "llleg rlleg lfoot rfoot",
    ]
    objects = loadmat(root / f"human_parts/{id}.mat")["anno"][0][0][1][0]
    label = np.zeros(objects[0][2].shape, np.uint8)
    for name, mask in (part for thing in objects if thing[1][0][0] == 15 and len(thing[3]) for part in thing[3][0]):
        label[mask == 1] = next(i for i, names in enumerate(groups) if name[0] in names.split())
    return label


@pytest.mark.parametrize("split", ["train", "val"])
def test_pascal_mini_agrees_with_a_direct_reading_pixel_for_pixel(pascal_mini, split):
    images = list_images(open_tree(pascal_mini), split, DEFAULT_TASKS, partial_labels=True)
    seen = set()
    for image in images[::15]:
        sample = Reader().sample(image)
        np.testing.assert_array_equal(sample.pop("image"), stored(image.photo))
        for task, label in sample.items():
            expected = direct(pascal_mini, image.id, task)
            np.testing.assert_allclose(label, expected, atol=1e-6 if task == "normals" else 0, err_msg=image.id)
        seen |= set(sample)
    assert seen == set(DEFAULT_TASKS)
