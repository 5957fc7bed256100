"""The protocols of NYUD-v2: rectangles, the one scale of family A, and where depth is scored."""

import cv2
import numpy as np
import pytest
import torch

from kernels import UserError
from train.protocols import build_protocol
from train.protocols.family_b import RandomCrop
from train.protocols.nyud import ScaleByChoice, limit_depth
from train.tasks import TASKS, VOID

NAMES = ("nyud_invpt", "nyud_mtinet")
SHAPES = {"nyud_invpt": (56, 72), "nyud_mtinet": (48, 64)}
RNG = np.random.default_rng(0)


def raw_sample(shape, seed=0):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(*shape, 3))
    return {
        "image": rng.integers(0, 256, (*shape, 3), np.uint8),
        "seg": rng.integers(0, 40, shape, np.uint8),
        "normals": (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32),
        "edge": rng.integers(0, 2, shape, np.uint8),
        "depth": rng.uniform(0.5, 9.5, shape).astype(np.float32),
    }


def small(name):
    return build_protocol(name, SHAPES[name][0])


class Draws:
    """A generator with one integer to draw."""

    def __init__(self, index):
        self.index = index

    def integers(self, high):
        assert self.index < high
        return self.index


@pytest.mark.parametrize(("name", "shape"), [("nyud_invpt", (448, 576)), ("nyud_mtinet", (480, 640))])
def test_inputs_are_the_fields_rectangles(name, shape):
    protocol = build_protocol(name)
    assert protocol.shape == shape and protocol.reported == name and protocol.dataset == "NYUD"
    assert small(name).shape == SHAPES[name] and small(name).reported == f"{name}@{SHAPES[name][0]}"


def test_a_height_whose_width_is_no_whole_number_is_one_line():
    with pytest.raises(UserError, match="^100 is no height of protocol nyud_invpt.*choose a multiple of 7 as --image"):
        build_protocol("nyud_invpt", 100)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_shape_of_the_input(name, training):
    for seed in range(5):
        sample = small(name).apply(raw_sample((36, 48)), training, np.random.default_rng(seed))
        assert sample["image"].shape == (*SHAPES[name], 3) and sample["image"].dtype == np.uint8
        assert sample["normals"].shape == (3, *SHAPES[name])
        assert {sample[task].shape for task in ("seg", "edge", "depth")} == {SHAPES[name]}
        lengths = np.linalg.norm(sample["normals"], axis=0)
        assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))


def test_family_a_scales_by_one_of_three_and_divides_depth_by_it():
    """A second implementation: the pixel under each pixel of the enlarged image, depth over the scale."""
    raw = raw_sample((40, 60))
    for index, scale in enumerate((1.0, 1.2, 1.5)):
        scaled = ScaleByChoice()(raw, Draws(index))
        matrix = np.array([[scale, 0, 30 * (1 - scale)], [0, scale, 20 * (1 - scale)]])
        moved = cv2.warpAffine(raw["depth"], matrix, (60, 40), flags=cv2.INTER_NEAREST)
        np.testing.assert_array_equal(scaled["depth"], moved / np.float32(scale))
        np.testing.assert_array_equal(scaled["seg"], cv2.warpAffine(raw["seg"], matrix, (60, 40), flags=0))
        assert scaled["depth"].min() > 0  # no border comes into view
        if scale == 1:
            np.testing.assert_allclose(scaled["normals"], raw["normals"], atol=1e-6)  # not rotated


@pytest.mark.parametrize("name", NAMES)
def test_a_mirrored_training_sample_negates_x(name):
    """A constant normal to the left points to the right where the image is mirrored; y and z stay."""
    raw = raw_sample((36, 48)) | {"normals": np.full((36, 48, 3), (0.6, 0.0, 0.8), np.float32)}
    seen = set()
    for seed in range(12):
        normals = small(name).apply(raw, True, np.random.default_rng(seed))["normals"]
        seen |= {tuple(np.round(vector.astype(float), 4)) for vector in normals.reshape(3, -1).T if vector.any()}
    assert seen == {(0.6, 0.0, 0.8), (-0.6, 0.0, 0.8)}


def test_family_a_stretches_normals_cubically_and_the_rest_nearest():
    raw = raw_sample((36, 48))
    sample = small("nyud_mtinet").apply(raw, False, RNG)
    for task in ("seg", "edge", "depth"):
        np.testing.assert_array_equal(sample[task], cv2.resize(raw[task], (64, 48), interpolation=cv2.INTER_NEAREST))
    normals = cv2.resize(raw["normals"], (64, 48), interpolation=cv2.INTER_CUBIC)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    np.testing.assert_allclose(sample["normals"], normals.transpose(2, 0, 1), atol=1e-6)


def test_family_b_centres_the_photo_and_pads_with_void():
    raw, sample = raw_sample((36, 48)), small("nyud_invpt").apply(raw_sample((36, 48)), False, RNG)
    inside = np.s_[10:46, 12:60]
    for task, void in (("seg", VOID), ("edge", VOID), ("depth", 0)):
        np.testing.assert_array_equal(sample[task][inside], raw[task])
        outside = np.ones((56, 72), bool)
        outside[inside] = False
        assert (sample[task][outside] == void).all()
    assert np.count_nonzero(sample["normals"].any(0)) == 36 * 48


def test_a_crop_is_a_rectangle():
    raw = raw_sample((90, 131))
    crop = RandomCrop((56, 72))(raw, np.random.default_rng(3))
    assert crop["image"].shape == (56, 72, 3) and crop["depth"].shape == (56, 72)
    (row, column) = np.argwhere(raw["depth"] == crop["depth"][0, 0])[0]
    np.testing.assert_array_equal(crop["seg"], raw["seg"][row : row + 56, column : column + 72])


@pytest.mark.parametrize("name", NAMES)
def test_depth_is_scored_where_each_family_scores_it(name):
    """A: wherever it is not 0. B: between 0 and 80 m."""
    depth = np.array([[0, 0.5, 79.9, 80, 200]], np.float32).repeat(3, 0)
    raw = {"image": np.zeros((3, 5, 3), np.uint8), "depth": depth}
    label = small(name).for_scoring().apply(raw, False, RNG)["depth"]
    np.testing.assert_array_equal(label, depth if name == "nyud_mtinet" else depth * (depth < 80))
    np.testing.assert_array_equal(limit_depth(raw, RNG)["depth"], depth * (depth < 80))


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_prediction_meets_its_label(name):
    """Aligned with a photo of the input's shape, depth is the label, in family A to a millimetre."""
    protocol = small(name)
    raw = raw_sample(protocol.shape)
    aligned = protocol.align("depth", torch.tensor(raw["depth"]), protocol.shape)
    assert np.abs(aligned.postprocessed.numpy() - raw["depth"]).max() <= (1.01e-3 if name == "nyud_mtinet" else 0)
    assert aligned.picture.dtype == np.uint16
    metric = TASKS["depth"].metric(())
    metric.count(aligned.postprocessed[None], torch.tensor(raw["depth"])[None])
    assert metric.compute()["rmse"] < 1.01e-3


@pytest.mark.parametrize("shape", [(36, 48), (30, 60), (200, 100), (100, 900)])
@pytest.mark.parametrize("name", NAMES)
def test_any_photo_fits(name, shape):
    image, (rows, columns) = small(name).fit_photo(np.full((*shape, 3), 200, np.uint8))
    assert image.shape == (*SHAPES[name], 3)
    assert (image[rows, columns] == 200).all()


def test_the_losses_notes_name_what_differs():
    for name in NAMES:
        assert any("L1 in metres" in note for note in small(name).notes)
