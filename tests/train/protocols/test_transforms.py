"""Each transform by hand: the rules of the field that it stands for, and its draws."""

import colorsys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.protocols.base import finish_labels, flip, random_flip
from train.protocols.family_a import ScaleAndRotate, StretchTo
from train.protocols.family_b import PadTo, RandomCrop, RandomScale, distort_colours
from train.protocols.square import ShrinkTo, derive_edges
from train.tasks import VOID

LABELS = ("seg", "parts", "sal", "edge")
RNG = np.random.default_rng(0)  # for steps that draw nothing
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


class Script:
    """A Generator that plays what it is told: coins for random(), places in 0..1 for uniform(), whole integers."""

    def __init__(self, coins=(), places=(), integers=()):
        self.left = {"coin": list(coins), "uniform": list(places), "integer": list(integers)}
        self.asked = []

    def _next(self, kind, *bounds):
        self.asked.append((kind, *bounds))
        return self.left[kind].pop(0)

    def random(self):
        return self._next("coin")

    def uniform(self, low, high):
        return low + (high - low) * self._next("uniform", low, high)

    def integers(self, low, high=None, endpoint=False):
        low, high = (0, low) if high is None else (low, high)
        return self._next("integer", low, high if endpoint else high - 1)


YES, NO = 0.49, 0.5  # coins


def sample_of(shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return {
        "image": rng.integers(0, 256, (*shape, 3), np.uint8),
        "normals": rng.normal(size=(*shape, 3)).astype(np.float32),
    } | {name: rng.choice(np.array([0, 1, 3, VOID], np.uint8), shape) for name in LABELS}


def ball(shape, radius):
    """Normals of a ball about the middle of the picture, +x left, +y up; (0, 0, 0) around it."""
    x = (shape[1] / 2 - np.arange(shape[1])) / radius
    y = (shape[0] / 2 - np.arange(shape[0])[:, None]) / radius
    z = np.sqrt(np.maximum(1 - x**2 - y**2, 0))
    return (np.stack(np.broadcast_arrays(x, y, z), -1) * (z > 0)[..., None]).astype(np.float32)


# Flip


@given(shapes)
@settings(max_examples=25, deadline=None)
def test_a_sample_flipped_twice_is_itself(shape):
    sample = sample_of(shape)
    assert all(np.array_equal(array, sample[name]) for name, array in flip(flip(sample)).items())


def test_a_mirrored_normal_points_to_the_other_side_in_x():
    """mtl 1.5: horizontal flip, the x channel of normals times -1."""
    sample = sample_of((4, 5))
    mirrored = flip(sample)
    assert np.array_equal(mirrored["normals"], sample["normals"][:, ::-1] * np.float32([-1, 1, 1]))
    assert all(np.array_equal(mirrored[name], sample[name][:, ::-1]) for name in ("image", *LABELS))


@pytest.mark.parametrize(("coin", "mirrored"), [(YES, True), (NO, False)])
def test_the_flip_has_probability_one_half(coin, mirrored):
    sample, rng = sample_of((4, 5)), Script(coins=[coin])
    assert np.array_equal(random_flip(sample, rng)["seg"], sample["seg"][:, ::-1] if mirrored else sample["seg"])
    assert rng.asked == [("coin",)]


# Void


@pytest.mark.parametrize("values", [[0], [VOID], [0, VOID]])
def test_parts_without_a_person_are_void(values):
    """mtl 1.3: in A an image that is all 0, in B one that is all in {0, 255}, becomes all 255."""
    parts = np.resize(np.array(values, np.uint8), (4, 6))
    assert (finish_labels({"parts": parts}, RNG)["parts"] == VOID).all()


@pytest.mark.parametrize("part", [1, 6])
def test_one_pixel_of_a_part_keeps_the_background(part):
    parts = np.zeros((4, 6), np.uint8)
    parts[2, 3] = part
    assert np.array_equal(finish_labels({"parts": parts}, RNG)["parts"], parts)


def test_a_crop_that_misses_the_person_is_void_for_parts():
    """mtl 1.3: in B the rule is applied to the crop."""
    parts = np.zeros((8, 20), np.uint8)
    parts[:, :4] = 2
    sample = {"image": np.zeros((8, 20, 3), np.uint8), "parts": parts}
    for left, void in ((0, False), (12, True)):
        crop = RandomCrop((8, 8))(sample, Script(integers=[0, left]))
        label = finish_labels(PadTo((10, 10))(crop, RNG), RNG)["parts"]
        assert (label == VOID).all() == void
        assert (label[1:9, 1:9] == VOID).all() == void


def test_zero_normals_stay_void_and_others_get_length_one():
    """mtl 1.3: norm == 0 is void."""
    normals = np.float32([[[0, 0, 0], [3, 0, 4], [0, -1e-3, 0]]])
    unit = finish_labels({"normals": normals}, RNG)["normals"]
    assert unit.dtype == np.float32 and unit.flags.c_contiguous
    np.testing.assert_allclose(unit[:, 0].T, [[0, 0, 0], [0.6, 0, 0.8], [0, -1, 0]], rtol=1e-6)


# Family A


@pytest.mark.parametrize("place", [0, 0.2, 0.5, 1])
@pytest.mark.parametrize("size", [0, 0.4, 1])
def test_a_ball_that_is_turned_looks_as_before(place, size):
    """mtl 1.5: normals rotated in the plane. A ball has the same normals from wherever it is seen."""
    rng = Script(places=[place, size])
    turned = ScaleAndRotate()({"image": np.zeros((80, 90, 3), np.uint8), "normals": ball((80, 90), 25)}, rng)
    expected = ball((80, 90), 25 * (0.75 + 0.5 * size))
    inside = expected[..., 2] > 0.4  # away from the rim, where cubic interpolation meets the void
    assert rng.asked == [("uniform", -20, 20), ("uniform", 0.75, 1.25)]
    assert np.abs(turned["normals"] - expected)[inside].max() < 0.02


def test_a_positive_angle_turns_counter_clockwise():
    """mtl 1.5: rotation within 20 degrees about the centre. What lies to the right moves up.

    A normal to the left turns down, as a thing on the left would move.
    """
    sample = {"image": np.zeros((81, 81, 3), np.uint8), "seg": np.zeros((81, 81), np.uint8)}
    sample["seg"][39:42, 60:63] = 1
    sample["normals"] = np.zeros((81, 81, 3), np.float32) + np.float32([1, 0, 0])
    turned = ScaleAndRotate()(sample, Script(places=[1, 0.5]))
    y, x = (index.mean() - 40.5 for index in np.nonzero(turned["seg"]))
    assert np.degrees(np.arctan2(-y, x)) == pytest.approx(20, abs=2) and np.hypot(x, y) == pytest.approx(20.5, abs=1)
    nx, ny, nz = turned["normals"][40, 40]
    assert (np.degrees(np.arctan2(-ny, nx)), nz) == (pytest.approx(20, abs=1e-4), 0)


def test_corners_turned_in_are_background_and_not_void():
    """mtl 1.3: family A warps with border 0; normals alone are void there."""
    ones = {name: np.ones((40, 40), np.uint8) for name in LABELS}
    sample = ones | {"image": np.full((40, 40, 3), 255, np.uint8), "normals": np.ones((40, 40, 3), np.float32)}
    turned = ScaleAndRotate()(sample, Script(places=[1, 0]))
    assert all(set(turned[name].flat) == {0, 1} and turned[name][0, 0] == 0 for name in LABELS)
    assert not turned["normals"][0, 0].any() and not turned["image"][0, 0].any()


def test_cubic_overshoot_is_clipped():
    """mtl 1.3: bicubic overshoot must not wrap, -3 to 253, as it does in the field's code."""
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 4:] = 255
    stretched = StretchTo((64, 64))({"image": image}, RNG)["image"]
    assert stretched.dtype == np.uint8
    assert (np.diff(stretched[0, :, 0].astype(int)) >= 0).all()  # dark, then bright, and no ringing left


def test_images_stay_unrounded_between_the_two_cubic_steps():
    """mtl 1.5: image CUBIC twice; the rounding comes after both."""
    turned = ScaleAndRotate()({"image": sample_of((30, 30))["image"]}, Script(places=[0.9, 0.9]))["image"]
    assert turned.dtype == np.float32 and turned.min() < 0 and turned.max() > 255


def test_the_stretch_ignores_the_aspect_ratio():
    """mtl 1.5: FixedResize to a square; image and normals CUBIC, the rest NEAREST."""
    sample = sample_of((20, 7))
    stretched = StretchTo((10, 10))(sample, RNG)
    assert {name: array.shape[:2] for name, array in stretched.items()} == dict.fromkeys(sample, (10, 10))
    rows, columns = np.arange(10) * 2, np.floor(np.arange(10) * 0.7).astype(int)
    assert all(np.array_equal(stretched[name], sample[name][np.ix_(rows, columns)]) for name in LABELS)


def test_no_normals_grow_out_of_the_border_of_void():
    """Cubic interpolation reaches two pixels into void, with the wrong sign from the second on."""
    normals = np.zeros((10, 10, 3), np.float32)
    normals[:, :5] = [0, 0, 1]
    stretched = StretchTo((80, 80))({"image": np.zeros((10, 10, 3), np.uint8), "normals": normals}, RNG)
    unit = finish_labels(stretched, RNG)["normals"]
    assert not unit[:, :, 40:].any()
    np.testing.assert_allclose(unit[2, :, :40], 1, rtol=1e-6)


# Family B


@given(shapes.map(lambda shape: (shape[0] + 1, shape[1] + 1)), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_scaling_keeps_to_the_values_of_labels(shape, place):
    """mtl 1.5: s ~ U(0.5, 2), int(h s) x int(w s), all labels NEAREST, normals too."""
    sample, rng, factor = sample_of(shape), Script(places=[place]), 0.5 + 1.5 * place
    scaled = RandomScale()(sample, rng)
    assert rng.asked == [("uniform", 0.5, 2)]
    for name, array in scaled.items():
        assert array.shape[:2] == tuple(int(length * factor) for length in shape) and array.dtype == sample[name].dtype
        assert name == "image" or set(array.flat) <= set(sample[name].flat)


def test_a_scale_of_one_changes_nothing():
    sample = sample_of((13, 22))
    assert all(np.array_equal(array, sample[name]) for name, array in RandomScale(1, 1)(sample, RNG).items())


def test_scaling_does_not_blur_across_the_photo():
    """mtl 1.5: image LINEAR. Twice as large, a ramp is a finer ramp."""
    ramp = np.repeat(np.arange(0, 200, 8, dtype=np.uint8)[None, :, None], 3, axis=2)
    scaled = RandomScale(2, 2)({"image": np.repeat(ramp, 4, axis=0)}, RNG)["image"]
    assert np.array_equal(scaled[0, 1:-1, 0], np.arange(2, 191, 4))


def seg_of(*columns):
    """A map 8 high, of (class, width) from left to right, and its photo."""
    seg = np.repeat(np.uint8([value for value, _ in columns]), [width for _, width in columns])[None].repeat(8, axis=0)
    return {"image": np.zeros((*seg.shape, 3), np.uint8), "seg": seg}


@pytest.mark.parametrize(
    ("first", "kept"),
    [
        ([(1, 4), (2, 4)], True),
        ([(1, 8)], False),
        ([(VOID, 8)], False),
        ([(1, 4), (VOID, 4)], False),  # void is no class
        ([(0, 6), (1, 2)], False),  # 75 % is not less than 75 %
        ([(0, 5), (1, 3)], True),
        ([(VOID, 6), (1, 1), (2, 1)], True),  # nor has it a share
    ],
)
def test_a_crop_of_one_class_is_drawn_again(first, kept):
    """mtl 1.5: retries until the crop has more than one class that is not void and the largest below 75 %."""
    rng = Script(integers=[0, 0, 0, 8])
    crop = RandomCrop((8, 8))(seg_of(*first, (3, 4), (4, 4)), rng)
    assert set(crop["seg"].flat) == ({value for value, _ in first} if kept else {3, 4})
    assert rng.asked == [("integer", 0, 0), ("integer", 0, 8)] * (1 if kept else 2)


def test_the_eleventh_crop_counts_whatever_it_shows():
    """mtl 1.5: up to 10 retries."""
    places = [value for left in range(12) for value in (0, left)]
    rng = Script(integers=places)
    sample = seg_of((1, 30))
    sample["image"][..., 0] = np.arange(30)
    assert RandomCrop((8, 8))(sample, rng)["image"][0, 0, 0] == 10 and len(rng.asked) == 22


def test_without_seg_a_crop_is_drawn_once():
    """mtl 1.4: the field's code stops with a KeyError."""
    rng = Script(integers=[3, 5])
    image = sample_of((20, 30))["image"]
    assert np.array_equal(RandomCrop((8, 8))({"image": image}, rng)["image"], image[3:11, 5:13])
    assert rng.asked == [("integer", 0, 12), ("integer", 0, 22)]


@pytest.mark.parametrize("shape", [(5, 4), (5, 20), (20, 4), (8, 8), (8, 9)])
def test_smaller_images_pass_uncropped(shape):
    """mtl 1.5: a side that is shorter than the crop stays whole."""
    crop = RandomCrop((8, 8))(sample_of(shape), np.random.default_rng(1))
    assert {array.shape[:2] for array in crop.values()} == {(min(shape[0], 8), min(shape[1], 8))}


IMAGE = sample_of((6, 7))["image"]


def distorted(coins, places=(), integers=(), image=IMAGE):
    rng = Script(coins, places, integers)
    result = distort_colours({"image": image}, rng)["image"]
    assert not any(rng.left.values()) and result.dtype == np.uint8
    return result, rng.asked


def test_every_distortion_has_probability_one_half():
    """mtl 1.5: five coins, and no change where none falls for one."""
    image, asked = distorted([NO] * 5)
    assert np.array_equal(image, IMAGE) and asked == [("coin",)] * 5


@pytest.mark.parametrize(("place", "shift"), [(0, -32), (1, 32), (0.75, 16)])
def test_brightness_shifts_by_up_to_32(place, shift):
    """mtl 1.5: brightness +-32, clipped."""
    image, asked = distorted([YES, NO, NO, NO, NO], [place])
    assert np.array_equal(image, np.clip(IMAGE.astype(int) + shift, 0, 255)) and asked[1] == ("uniform", -32, 32)


@pytest.mark.parametrize("first", [YES, NO])
def test_contrast_comes_first_or_last(first):
    """mtl 1.5: contrast 0.5 to 1.5, its place by coin; clipped, then cut to whole grey levels."""
    coins = [NO, YES, YES, NO, NO] if first == YES else [NO, NO, NO, NO, YES]
    image, asked = distorted(coins, [0.9])
    assert np.array_equal(image, np.minimum(IMAGE * np.float32(1.4), 255).astype(np.uint8))
    assert asked.index(("uniform", 0.5, 1.5)) == (3 if first == YES else 5)


def test_brightness_then_late_contrast_follow_each_other():
    image, _ = distorted([YES, NO, NO, NO, YES], [1, 0])
    assert np.array_equal(image, np.minimum(IMAGE.astype(int) + 32, 255) // 2)


PURE = np.uint8([[[200, 100, 50], [40, 180, 90], [30, 60, 220], [128, 128, 128]]])


def in_hsv(change):
    """PURE with (hue, saturation, value) in 0..1 changed, by the standard library."""
    colours = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(pixel / 255)))) for pixel in PURE[0]]
    return 255 * np.array(colours)[None]


def test_saturation_is_scaled_in_hsv():
    """mtl 1.5: saturation 0.5 to 1.5. OpenCV's whole numbers for HSV cost up to 3 grey levels."""
    image, asked = distorted([NO, NO, YES, NO, NO], [0], image=PURE)
    assert np.abs(image - in_hsv(lambda h, s, v: (h, s / 2, v))).max() <= 3 and asked[3] == ("uniform", 0.5, 1.5)


@pytest.mark.parametrize("turn", [-18, 17])
def test_hue_is_turned_in_hsv(turn):
    """mtl 1.5: hue +-18 of 180, of which the upper end is never drawn."""
    image, asked = distorted([NO, NO, NO, YES, NO], integers=[turn], image=PURE)
    assert np.abs(image - in_hsv(lambda h, s, v: ((h + turn / 180) % 1, s, v))).max() <= 3
    assert asked[4] == ("integer", -18, 17)


@given(shapes, st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_padding_is_centred_and_void(shape, spare):
    """mtl 1.3 and 1.5: offset delta // 2; labels 255, normals (0, 0, 0), the image ImageNet's mean colour."""
    size, sample = max(shape) + spare, sample_of(shape)
    padded = PadTo((size, size))(sample, RNG)
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    mean = np.rint(255 * np.array([0.485, 0.456, 0.406])).astype(np.uint8)
    for name, fill in {"image": mean, "normals": 0, **dict.fromkeys(LABELS, VOID)}.items():
        expected = np.zeros_like(padded[name]) + np.asarray(fill, padded[name].dtype)
        expected[top : top + shape[0], left : left + shape[1]] = sample[name]
        assert padded[name].shape[:2] == (size, size) and np.array_equal(padded[name], expected)


# mini


def test_labels_of_another_size_than_their_photo_are_resized_alike():
    label = np.arange(20, dtype=np.uint8).reshape(4, 5)
    resized = ShrinkTo(20)({"image": np.zeros((30, 40, 3), np.uint8), "seg": label}, RNG)["seg"]
    assert np.array_equal(resized, label.repeat(5, axis=0).repeat(4, axis=1))


def test_edges_replace_the_label_map():
    label_map = np.full((6, 6), 7, np.uint16)
    label_map[:, 3:] = 300
    edge = derive_edges({"edge": label_map}, RNG)["edge"]
    assert edge.dtype == np.uint8 and edge.any(axis=0).sum() == 1 and edge[1:-1].sum() == 4
    assert "edge" not in derive_edges({}, RNG)


def test_opencv_starts_no_threads_of_its_own():
    """Each process that loads has one, as a loader promises."""
    assert cv2.getNumThreads() == 1
