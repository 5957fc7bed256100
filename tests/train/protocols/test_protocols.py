"""Protocols against a second implementation in NumPy, and what holds of each of them."""

import pickle
from itertools import chain, combinations, product

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.morphology import thin

from kernels.errors import UserError
from train.protocols import PROTOCOLS, build_protocol
from train.tasks import DEFAULT_TASKS, VOID

SIZE = 48
SHAPES = [(37, 44), (45, 30), (5, 3), (48, 48), (90, 131)]  # (height, width): below SIZE, equal, above
FITS = SHAPES[:4]
FAMILIES = ["invpt", "mtinet", "ase", "mini"]
SUBSETS = list(chain.from_iterable(combinations(DEFAULT_TASKS, n) for n in range(len(DEFAULT_TASKS) + 1)))


def blocks(values, shape, rng):
    """A map of ``values`` that changes every 6 pixels."""
    coarse = rng.choice(values, [length // 6 + 1 for length in shape])
    return np.kron(coarse, np.ones((6, 6), coarse.dtype))[: shape[0], : shape[1]]


def raw_sample(shape, seed, name="invpt"):
    """Every label at the size of the photo; normals change smoothly, beside blocks of void."""
    rng = np.random.default_rng([seed, *shape])
    y, x = np.mgrid[: shape[0], : shape[1]] / 9
    normals = np.stack([np.sin(x + seed), np.cos(y), 1.5 + np.sin(x - y)], axis=-1)
    valid = blocks([0, 1, 1], shape, rng)[..., None]
    label_map = blocks(np.arange(1, 460), shape, rng).astype(np.uint16)
    return {
        "image": rng.integers(0, 256, (*shape, 3), np.uint8),
        "seg": blocks(np.array([*range(21), VOID], np.uint8), shape, rng),
        "parts": blocks(np.arange(7, dtype=np.uint8), shape, rng) * np.uint8(seed % 3 > 0),
        "sal": blocks(np.array([0, 1, VOID], np.uint8), shape, rng),
        "normals": (normals / np.linalg.norm(normals, axis=-1, keepdims=True) * valid).astype(np.float32),
        "edge": label_map if name == "mini" else rng.integers(0, 2, shape, np.uint8),
    }


def run(name, shape, seed, training, size=SIZE):
    rng = np.random.default_rng([7, seed])
    return build_protocol(name, size).apply(raw_sample(shape, seed, name), training, rng)


# The second implementation


def mirror(arrays):
    arrays = {name: np.flip(array, axis=1) for name, array in arrays.items()}
    if "normals" in arrays:
        arrays["normals"] = arrays["normals"] * [-1, 1, 1]
    return arrays


def finish(arrays):
    """The rules of void, and the dtypes of train.tasks.names."""
    if not ((arrays["parts"] > 0) & (arrays["parts"] < VOID)).any():
        arrays["parts"] = np.full_like(arrays["parts"], VOID)
    length = np.sqrt((arrays["normals"] ** 2).sum(-1, keepdims=True))
    normals = np.divide(arrays["normals"], length, out=np.zeros_like(arrays["normals"]), where=length > 0)
    image = np.rint(np.clip(arrays["image"], 0, 255))
    return {name: array for name, array in arrays.items() if name != "valid"} | {
        "image": image,
        "normals": normals.transpose(2, 0, 1),
    }


def at(array, x, y, inside=True):
    """Pixels at integer places: those outside are 0, or the nearest ones at the border with ``inside`` False."""
    height, width = array.shape[:2]
    pixels = array[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]
    within = (x >= 0) & (x < width) & (y >= 0) & (y < height) | (not inside)
    return pixels * within.reshape(within.shape + (1,) * (array.ndim - 2))


def cubic_weight(t, a=-0.75):
    t = abs(t)[..., None]
    return np.where(t <= 1, ((a + 2) * t - (a + 3)) * t**2 + 1, np.where(t < 2, ((t - 5) * t + 8) * a * t - 4 * a, 0))


def cubic(array, x, y, inside):
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    return sum(
        cubic_weight(x - left - i) * cubic_weight(y - top - j) * at(array, left + i, top + j, inside)
        for i, j in product(range(-1, 3), repeat=2)
    )


def warp(array, angle, scale, smooth):
    """Turned counter-clockwise by ``angle`` degrees and scaled: where each pixel comes from, and what is there."""
    height, width = array.shape[:2]
    cos, sin = np.cos(np.radians(angle)) / scale, np.sin(np.radians(angle)) / scale
    dx, dy = np.arange(width) - width / 2, np.arange(height)[:, None] - height / 2
    x, y = width / 2 + cos * dx - sin * dy, height / 2 + sin * dx + cos * dy
    if cv2.__version__.startswith("4."):  # whose places have 10 binary digits, of which cubic uses 5
        places = (np.rint(1024 * v[:, :1]) + np.rint(1024 * (v[0] - v[0, 0])) for v in (x, y))
        x, y = (np.floor(v / 32 + 0.5) / 32 if smooth else np.floor(v / 1024 + 0.5) for v in places)
    if smooth:
        return cubic(array, x, y, inside=True)
    return at(array, np.rint(x).astype(int), np.rint(y).astype(int))


def nearest(array, height, width):
    """The pixel at floor(i * step), in double precision as OpenCV has it."""
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(int), old - 1)
        for old, new in zip(array.shape, (height, width), strict=False)
    )
    return array[np.ix_(rows, columns)]


def stretch(array, smooth):
    if not smooth:
        return nearest(array, SIZE, SIZE)
    y, x = (((np.arange(SIZE) + 0.5) * length / SIZE - 0.5) for length in array.shape[:2])
    return cubic(array, *np.meshgrid(x, y), inside=False)


def family_a(raw, training, rng):
    arrays = {name: array.astype(float) for name, array in raw.items()} | {"valid": raw["normals"].any(-1)}
    if training:
        if rng.random() < 0.5:
            arrays = mirror(arrays)
        angle, scale = rng.uniform(-20, 20), rng.uniform(0.75, 1.25)
        nx, ny, nz = np.moveaxis(arrays["normals"], -1, 0)
        azimuth = np.arctan2(nx, ny) + np.radians(angle)
        arrays["normals"] = np.stack([np.hypot(nx, ny) * np.sin(azimuth), np.hypot(nx, ny) * np.cos(azimuth), nz], -1)
        arrays = {name: warp(array, angle, scale, name in ("image", "normals")) for name, array in arrays.items()}
        arrays["normals"] = arrays["normals"] * arrays["valid"][..., None]
    arrays = {name: stretch(array, name in ("image", "normals")) for name, array in arrays.items()}
    arrays["normals"] = arrays["normals"] * arrays["valid"][..., None]
    return finish(arrays)


def linear(image, height, width):
    """OpenCV's bilinear resize of uint8: weights of 11 bits, products cut to 18 bits, the sum rounded."""

    def taps(old, new):
        place = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
        first = np.floor(place).astype(int)
        share = place - first.astype(np.float32)
        return first, np.rint((1 - share) * 2048).astype(int), np.rint(share * 2048).astype(int)

    image = image.astype(int)
    left, near, far = taps(image.shape[1], width)
    a, b = (image[:, np.clip(left + i, 0, image.shape[1] - 1)] for i in (0, 1))
    lines = (near[:, None] * a + far[:, None] * b) >> 4
    top, near, far = taps(image.shape[0], height)
    a, b = (lines[np.clip(top + i, 0, image.shape[0] - 1)] for i in (0, 1))
    return ((near[:, None, None] * a >> 16) + (far[:, None, None] * b >> 16) + 2 >> 2).astype(np.uint8)


def distort(image, rng):
    """OpenCV's own conversion to HSV and back, whose tables are not the point here."""

    def adjust(values, gain=1.0, shift=0.0):
        return np.trunc(np.clip(np.float32(gain) * values + np.float32(shift), 0, 255)).astype(np.uint8)

    def in_hsv(channel, change):
        hsv = list(cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)))
        hsv[channel] = change(hsv[channel])
        return cv2.cvtColor(cv2.merge(hsv), cv2.COLOR_HSV2RGB)

    if rng.random() < 0.5:
        image = adjust(image, shift=rng.uniform(-32, 32))
    first = rng.random() < 0.5
    if first and rng.random() < 0.5:
        image = adjust(image, rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:
        gain = rng.uniform(0.5, 1.5)
        image = in_hsv(1, lambda saturation: adjust(saturation, gain))
    if rng.random() < 0.5:
        turn = rng.integers(-18, 17, endpoint=True)
        image = in_hsv(0, lambda hue: np.mod(hue + turn, 180).astype(np.uint8))
    if not first and rng.random() < 0.5:
        image = adjust(image, rng.uniform(0.5, 1.5))
    return image


def family_b(raw, training, rng):
    arrays = dict(raw)
    if training:
        factor = rng.uniform(0.5, 2)
        height, width = (int(length * factor) for length in raw["image"].shape[:2])
        arrays = {name: nearest(array, height, width) for name, array in raw.items()}
        arrays["image"] = linear(raw["image"], height, width)
        for _ in range(11):  # a crop and ten more, the last of which nobody looks at
            top, left = (rng.integers(0, max(length - SIZE, 0), endpoint=True) for length in (height, width))
            crop = {name: array[top : top + SIZE, left : left + SIZE] for name, array in arrays.items()}
            _, areas = np.unique(crop["seg"][crop["seg"] != VOID], return_counts=True)
            if len(areas) > 1 and max(areas) < 0.75 * sum(areas):
                break
        arrays = mirror(crop) if rng.random() < 0.5 else crop
        arrays["image"] = distort(np.ascontiguousarray(arrays["image"]), rng)
    below = [(SIZE - length) // 2 for length in arrays["image"].shape[:2]]
    above = [SIZE - length - low for length, low in zip(arrays["image"].shape, below, strict=False)]
    margins = list(zip(below, above, strict=True))
    labels = {name: np.pad(array, margins, constant_values=VOID) for name, array in arrays.items() if array.ndim == 2}
    pads = {"image": (124, 116, 104), "normals": (0, 0, 0)}
    return finish(
        labels
        | {
            name: np.stack([np.pad(arrays[name][..., i], margins, constant_values=pad[i]) for i in range(3)], -1)
            for name, pad in pads.items()
        }
    )


def assert_agree(ours, theirs, ties):
    """Labels exactly, save ``ties`` pixels: OpenCV 5 warps in float32, so that rounding decides ties of nearest.

    Images to a grey level where rounding decides it, one value in a hundred at most. Normals to 1e-5, save for a few
    beside void, which cubic interpolation leaves short: the error of their place, 1e-5 of a pixel, counts more once
    they have length 1.
    """
    assert ours.keys() == theirs.keys() == {"image", *DEFAULT_TASKS}
    for name in ("seg", "parts", "sal", "edge"):
        assert (ours[name] != theirs[name]).sum() <= ties, name
    agree = ours["normals"].any(0) == theirs["normals"].any(0)
    assert (~agree).sum() <= ties
    gap = np.abs(ours["normals"] - theirs["normals"])[:, agree]
    assert np.mean(gap > 1e-5) <= 2e-3 and gap.max() <= 1e-3
    levels = np.abs(ours["image"].astype(int) - theirs["image"])
    assert levels.max() <= 1 and levels.mean() <= 0.01


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_family_a_is_that_of_the_second_implementation(shape, training):
    """mtl 1.5: flip, turn and scale, stretch to a square; in val the last alone."""
    for seed in range(12 if training else 3):
        theirs = family_a(raw_sample(shape, seed), training, np.random.default_rng([7, seed]))
        assert_agree(run("mtinet", shape, seed, training), theirs, ties=1 if training else 0)


@pytest.mark.parametrize(("shape", "training"), [*product(SHAPES, [True]), *product(FITS, [False])])
def test_family_b_is_that_of_the_second_implementation(shape, training):
    """mtl 1.5: scale, crop, flip, distort colours, pad; in val the last alone."""
    for seed in range(24 if training else 3):
        theirs = family_b(raw_sample(shape, seed), training, np.random.default_rng([7, seed]))
        assert_agree(run("invpt", shape, seed, training), theirs, ties=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_mini_is_pillow_with_edges_of_the_resized_label_map(shape, training):
    """The flip comes last: thinning is not symmetric. The seeds draw both sides."""

    def resized(array, resample=Image.Resampling.NEAREST):
        return np.asarray(Image.fromarray(array).resize((SIZE, SIZE), resample))

    sides = set()
    for seed in range(6):
        raw, ours = raw_sample(shape, seed, "mini"), run("mini", shape, seed, training)
        flipped = training and np.random.default_rng([7, seed]).random() < 0.5
        sides.add(flipped)
        p = np.pad(resized(raw["edge"].astype(np.int32)), 1, mode="reflect")
        laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * p[1:-1, 1:-1]
        theirs = {name: resized(raw[name]) for name in ("seg", "parts", "sal")} | {
            "image": resized(raw["image"], Image.Resampling.BILINEAR),
            "edge": thin(laplacian != 0),
            "normals": np.stack([resized(raw["normals"][..., i]) for i in range(3)], -1),
        }
        theirs = finish(mirror(theirs) if flipped else theirs)
        for name in ("image", "seg", "parts", "sal", "edge"):
            np.testing.assert_array_equal(ours[name], theirs[name], name)
        np.testing.assert_allclose(ours["normals"], theirs["normals"], atol=1e-6)
    assert sides == ({True, False} if training else {False})


# Every protocol

EVERY = [
    (name, shape, training)
    for name, shape, training in product(FAMILIES, SHAPES, [True, False])
    if name != "invpt" or training or shape in FITS
]


@pytest.mark.parametrize(("name", "shape", "training"), EVERY)
def test_samples_keep_the_conventions_of_tasks(name, shape, training):
    for seed in range(4):
        raw, sample = raw_sample(shape, seed, name), run(name, shape, seed, training)
        assert sample.keys() == raw.keys()
        assert sample["image"].dtype == np.uint8 and sample["image"].shape == (SIZE, SIZE, 3)
        assert sample["normals"].dtype == np.float32 and sample["normals"].shape == (3, SIZE, SIZE)
        length = np.linalg.norm(sample["normals"], axis=0)
        assert (np.isclose(length, 1, atol=1e-6) | (length == 0)).all()
        for task in ("seg", "parts", "sal", "edge"):
            assert sample[task].dtype == np.uint8 and sample[task].shape == (SIZE, SIZE)
            values = {0, 1} if task == "edge" else set(raw[task].flat)
            assert set(sample[task].flat) <= values | {0, VOID}
        assert all(array.flags.c_contiguous for array in sample.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_is_a_function_of_its_seed_and_leaves_its_input_alone(name):
    protocol, raw = build_protocol(name, SIZE), raw_sample((90, 131), 1, name)
    before = {name: array.copy() for name, array in raw.items()}
    for array in raw.values():
        array.flags.writeable = False
    first, again, *others = (
        protocol.apply(raw, True, np.random.default_rng([0, epoch, 5])) for epoch in (0, 0, *range(1, 12))
    )
    assert all(first[key].tobytes() == again[key].tobytes() for key in raw)
    assert all(np.array_equal(raw[key], before[key]) for key in raw)
    assert any(not np.array_equal(first["image"], other["image"]) for other in others)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_every_subset_of_tasks_gives_the_same_image_and_labels(name, training):
    """Family B keeps "seg" to guide its crop, as Protocol.needs_seg says."""
    protocol, raw = build_protocol(name, SIZE), raw_sample((45, 30), 4, name)
    whole = protocol.apply(raw, training, np.random.default_rng(3))
    for tasks in SUBSETS:
        keys = {"image", *tasks} | ({"seg"} if protocol.needs_seg else set())
        part = protocol.apply({key: raw[key] for key in keys}, training, np.random.default_rng(3))
        assert part.keys() == keys and all(np.array_equal(part[key], whole[key]) for key in keys)


@pytest.mark.parametrize("name", ["mtinet", "ase", "mini"])
def test_val_draws_nothing_and_so_does_not_depend_on_the_seed(name):
    rng = np.random.default_rng(0)
    build_protocol(name, SIZE).apply(raw_sample((90, 131), 0, name), False, rng)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_invpt_evaluates_original_pixels():
    """mtl 1.5: no resize in val; every photo is centred on the canvas."""
    raw, sample = raw_sample((37, 44), 1), run("invpt", (37, 44), 1, False)
    inside = np.s_[5:42, 2:46]  # 11 rows to spare, 5 of them above; 4 columns
    assert all(np.array_equal(sample[name][inside], raw[name]) for name in ("image", "seg", "parts", "sal", "edge"))
    np.testing.assert_allclose(sample["normals"].transpose(1, 2, 0)[inside], raw["normals"], atol=1e-6)


@pytest.mark.parametrize("shape", [(49, 10), (10, 49)])
def test_a_photo_larger_than_the_canvas_is_the_users_mistake(shape):
    with pytest.raises(UserError, match=f"^a photo of {shape[1]} x {shape[0]} pixels does not fit into 48 x 48") as e:
        run("invpt", shape, 0, False)
    assert "\n" not in str(e.value) and "at least 49" in str(e.value)


def test_names_and_sizes():
    """mtl 1.5: 512 for both families; MTLoRA is family A at 448."""
    own = {
        "invpt": 512,
        "mtinet": 512,
        "ase": 224,
        "mini": 224,
        "nyud_invpt": 448,
        "nyud_mtinet": 480,
        "cityscapes": 512,
    }
    assert {name: build_protocol(name).size for name in PROTOCOLS} == own
    assert all(
        build_protocol(name, size).reported == build_protocol(name).reported == name for name, size in own.items()
    )
    assert build_protocol("invpt", 256).reported == "invpt@256"
    assert build_protocol("mtinet", 448).reported == "mtinet@448"
    assert {name for name in PROTOCOLS if build_protocol(name).edges_at_input} == {"mini"}
    assert {name for name in PROTOCOLS if build_protocol(name).needs_seg} == {"invpt", "nyud_invpt"}
    assert {name for name in PROTOCOLS if build_protocol(name).notes} == PROTOCOLS.keys() - {"mini"}


def test_ase_is_family_a():
    ours, theirs = build_protocol("ase", 64), build_protocol("mtinet", 64)
    assert (ours.train, ours.val) == (theirs.train, theirs.val)


def test_an_unknown_protocol_lists_the_choices():
    with pytest.raises(UserError, match=f"^unknown protocol 'pascal': choose among {', '.join(PROTOCOLS)}$"):
        build_protocol("pascal")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_protocol_travels_to_other_processes(name):
    assert pickle.loads(pickle.dumps(build_protocol(name))) == build_protocol(name)
