"""Boundary maps, thinning, matching and non-maximum suppression, each against a definition or another program."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.ndimage import gaussian_filter, label
from skimage.morphology import thin as skimage_thin

from train.datasets.pascal.mat import read_label_map
from train.metrics import boundary
from train.metrics.boundary import boundaries, count_matches, suppress_non_maxima
from train.metrics.thinning import thin

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


def relabelled(label_map: np.ndarray) -> np.ndarray:
    """A label of its own for each 4-connected component of equal label."""
    components = np.zeros(label_map.shape, int)
    for value in np.unique(label_map):
        found, _ = label(label_map == value)
        components += np.where(found, found + components.max(), 0)
    return components


def naive_boundaries(label_map: np.ndarray) -> np.ndarray:
    height, width = label_map.shape
    found = np.zeros(label_map.shape, bool)
    for y, x in np.ndindex(height, width):
        others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        found[y, x] = any(
            label_map[other] != label_map[y, x] for other in others if other[0] < height and other[1] < width
        )
    return found


def test_boundaries_by_hand():
    label_map = np.array([[1, 1, 2], [1, 2, 2], [1, 1, 1]])
    assert boundaries(label_map).astype(int).tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(0, 2)))
def test_boundaries_equal_a_loop_over_pixels_of_the_relabelled_map(label_map):
    assert np.array_equal(boundaries(label_map), naive_boundaries(relabelled(label_map)))


@settings(max_examples=500)
@given(MASKS)
def test_thin_equals_scikit_image_on_noise(mask):
    assert np.array_equal(thin(mask), skimage_thin(mask))


@pytest.mark.parametrize("width", [1, 62, 63, 64, 65, 127, 128, 129])
def test_thin_equals_scikit_image_on_blobs_that_cross_words(width):
    random = np.random.default_rng(width)
    for sigma in (0.5, 1, 2, 4, 8):
        blobs = gaussian_filter(random.random((40, width)), sigma)
        for quantile in (0.0, 0.05, 0.3, 0.7, 0.95):
            mask = blobs >= np.quantile(blobs, quantile)
            assert np.array_equal(thin(mask), skimage_thin(mask))


def test_thin_of_real_boundaries(pascal_mini):
    paths = sorted((pascal_mini / "pascal-context" / "trainval").glob("bsds_*.mat"))[:20]
    for path in paths:
        mask = boundaries(read_label_map(path))
        thinned = thin(mask)
        assert np.array_equal(thinned, skimage_thin(mask)) and np.array_equal(thin(thinned), thinned)
        assert np.count_nonzero(thinned) > 100


def most_matches(predicted: np.ndarray, true: np.ndarray, radius: float) -> int:
    """By trying for each predicted pixel every partner, and none."""
    partners = [
        frozenset(j for j, q in enumerate(np.argwhere(true)) if np.hypot(*(p - q)) <= radius)
        for p in np.argwhere(predicted)
    ]

    def best(i: int, taken: frozenset) -> int:
        if i == len(partners):
            return 0
        return max([best(i + 1, taken)] + [1 + best(i + 1, taken | {j}) for j in partners[i] - taken])

    return best(0, frozenset())


@settings(deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6),
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6),
    st.sampled_from([0.5, 1, 1.5, 2, 2.3, 3]),
)
def test_matching_equals_brute_force(predicted, true, radius):
    masks = np.zeros((2, 5, 6), bool)
    for mask, pixels in zip(masks, (predicted, true), strict=True):
        for pixel in pixels:
            mask[pixel] = True
    assert count_matches(*masks, radius) == most_matches(*masks, radius)
    assert count_matches(*masks, radius) == count_matches(*masks[::-1], radius)


def test_a_pixel_is_matched_once():
    three, one = np.zeros((2, 3, 3), bool)
    three[1] = one[1, 1] = True
    assert count_matches(three, one, 2) == count_matches(one, three, 2) == 1


def test_the_distance_is_euclidean_and_reached():
    a, b = np.zeros((2, 9, 9), bool)
    a[0, 0] = b[3, 4] = True
    assert count_matches(a, b, 5) == 1
    assert count_matches(a, b, 4.99) == 0


def test_suppression_keeps_the_crest_of_a_ridge():
    x = np.arange(31)
    kept = suppress_non_maxima(np.tile(np.exp(-(((x - 15) / 3) ** 2)), (31, 1)), reach=1)
    assert np.allclose(kept[:, 15], np.minimum(np.minimum(x, 30 - x) / 5, 1)), "faded over five pixels"
    assert np.count_nonzero(kept) == 29, "zero at the border and beside the crest"


def test_suppression_by_a_loop_over_pixels():
    random = np.random.default_rng(0)
    edges = gaussian_filter(random.random((24, 29)), 1.5)
    angle, height, width = boundary.orientation(edges), *edges.shape

    def sample(y: float, x: float) -> float:
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        y0, x0 = min(int(y), height - 2), min(int(x), width - 2)
        fy, fx = y - y0, x - x0
        top = (1 - fx) * edges[y0, x0] + fx * edges[y0, x0 + 1]
        return (1 - fy) * top + fy * ((1 - fx) * edges[y0 + 1, x0] + fx * edges[y0 + 1, x0 + 1])

    for reach in (1, 4):
        kept = suppress_non_maxima(edges, reach)
        for y, x in np.ndindex(height, width):
            steps = [d for d in range(-reach, reach + 1) if d]
            samples = [sample(y + d * np.sin(angle[y, x]), x + d * np.cos(angle[y, x])) for d in steps]
            fade = min(y / 5, (height - 1 - y) / 5, 1) * min(x / 5, (width - 1 - x) / 5, 1)
            expected = edges[y, x] * fade if 1.01 * edges[y, x] >= max(samples) else 0
            assert kept[y, x] == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("degrees", [10, 45, 75, 90, 100, 135, 170])
def test_orientation_of_a_line(degrees):
    """Of a line along (cos a, sin a): across is a + 90 degrees, whose tangent is squared but for its sign."""
    y, x = np.indices((61, 61)) - 30
    a = np.radians(degrees)
    line = np.exp(-(((x * np.sin(a) - y * np.cos(a)) / 3) ** 2))
    across = np.tan(a + np.pi / 2)
    expected = np.degrees(np.arctan(across * abs(across)))
    found = np.degrees(boundary.orientation(line)[30, 30])
    assert abs((found - expected + 90) % 180 - 90) < 2


def test_smoothing_by_hand():
    spike = np.zeros((5, 5))
    spike[2, 2] = 16
    assert np.array_equal(boundary.smooth(spike, 1)[1:4, 1:4], [[1, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert np.allclose(boundary.smooth(np.ones((3, 7)), 4), 1), "the border is mirrored"


def test_against_pyedgeeval():
    """Suppression exactly, matches to the few that its random outlier links lose.

    Its thinning is not compared: it stops where its first pass removes nothing though the second still would.
    """
    reason = "pyEdgeEval is not installed (pip install --no-build-isolation pyEdgeEval)"
    nms = pytest.importorskip("pyEdgeEval._lib.nms", reason=reason).nms
    correspond_pixels = pytest.importorskip("pyEdgeEval._lib.correspond_pixels", reason=reason).correspond_pixels
    random = np.random.default_rng(0)
    for _ in range(5):
        edges, other = gaussian_filter(random.random((2, 90, 120)), (0, 2, 2))
        for reach in (1, 4):
            theirs = nms(edges, boundary.orientation(edges), reach, 5, 1.01)
            np.testing.assert_allclose(suppress_non_maxima(edges, reach), theirs, rtol=0, atol=1e-15)
        masks = [thin(image > np.quantile(image, 0.8)) for image in (edges, other)]
        matched = np.count_nonzero(correspond_pixels(*masks, max_dist=0.0075 * 2)[0])
        assert 0 <= count_matches(*masks, 0.015 * np.hypot(90, 120)) - matched <= 0.005 * matched + 2
