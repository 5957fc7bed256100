"""A metamorphic test of normals: turning, mirroring or moving the camera of a scene, and rendering anew, gives what the
transforms of the protocols make of the label."""

from dataclasses import replace

import numpy as np
import pytest

from train.datasets.scenes.compose import compose_scene
from train.datasets.scenes.dataset import label_normals, rasterize
from train.datasets.scenes.raster import Pill, Plane, triangular_axes
from train.protocols.base import finish_labels, flip
from train.protocols.family_a import ScaleAndRotate, StretchTo
from train.protocols.family_b import PadTo, RandomCrop, RandomScale
from train.protocols.square import ShrinkTo
from train.tasks import TASKS

SIZE = 240
CENTRE = np.s_[SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4]  # nothing comes in here from outside the picture
RNG = np.random.default_rng(0)


class Script:
    """A Generator whose uniform() plays the given places between low and high, and whose integers() are low."""

    def __init__(self, *places):
        self.places = list(places)

    def uniform(self, low, high):
        return low + (high - low) * self.places.pop(0)

    def integers(self, high, endpoint):
        return high // 2


def moved(scene, matrix):
    """The scene after its points p (x right, y up, z towards the viewer) have become matrix @ p."""

    def move(shape):
        if isinstance(shape, Plane):
            normal = np.linalg.inv(matrix).T @ shape.normal
            return Plane(matrix @ shape.point, normal / np.linalg.norm(normal))
        if isinstance(shape, Pill):
            return Pill(matrix @ shape.start, matrix @ shape.end, triangular_axes(matrix @ shape.axes))
        scale = abs(np.linalg.det(matrix)) ** (1 / 3)
        return type(shape)(matrix @ shape.centre, scale * shape.half, shape.frame @ matrix.T / scale)

    return replace(scene, surfaces=[replace(surface, shape=move(surface.shape)) for surface in scene.surfaces])


def rendered(scene):
    """(normals (3, SIZE, SIZE), which surface each pixel shows)."""
    buffer = rasterize(scene, SIZE)
    return label_normals(scene, buffer), buffer.owner


def raw(normals):
    """A sample before its first transform."""
    return {"image": np.zeros((SIZE, SIZE, 3), np.uint8), "normals": np.ascontiguousarray(normals.transpose(1, 2, 0))}


def turn(degrees, scale):
    """A turn counter-clockwise about the line of sight, and an enlargement."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return scale * np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def assert_same(transformed, scene, region):
    """The angle between both labels is small wherever a surface, and not its border, shows.

    The transforms place pixels to half a pixel, which is a degree or two on a curved surface of this size.
    """
    expected, owner = rendered(scene)
    flat = np.ones_like(owner, bool)
    for axis in (0, 1):
        for step in (1, 2):
            flat &= (np.roll(owner, step, axis) == owner) & (np.roll(owner, -step, axis) == owner)
    gap = np.degrees(np.arccos(np.clip((transformed * expected).sum(0), -1, 1)))[region][flat[region]]
    assert len(gap) > 1000 and np.quantile(gap, 0.95) < 4 and np.median(gap) < 1


@pytest.mark.parametrize("index", range(6))
class TestTheLabelFollowsTheCamera:
    @pytest.fixture
    def scene(self, index):
        return compose_scene(np.random.default_rng([3, index]))

    def test_under_a_flip(self, scene):
        label = finish_labels(flip(raw(rendered(scene)[0])), RNG)["normals"]
        assert_same(label, moved(scene, np.diag([-1.0, 1, 1])), np.s_[:, :])

    @pytest.mark.parametrize(("angle", "size"), [(0, 0.5), (1, 0.5), (0.5, 1), (0.9, 0.8)])
    def test_under_family_as_turn_and_scale(self, scene, angle, size):
        step = ScaleAndRotate()
        label = finish_labels(step(raw(rendered(scene)[0]), Script(angle, size)), RNG)["normals"]
        assert_same(label, moved(scene, turn(40 * angle - 20, 0.75 + 0.5 * size)), CENTRE)

    def test_and_a_wrong_hand_would_be_seen(self, scene):
        """With +x to the right the matrix of family A turns normals the wrong way."""
        other = np.array([-1, 1, 1], np.float32)[:, None, None]
        wrong = finish_labels(ScaleAndRotate()(raw(other * rendered(scene)[0]), Script(1, 0.5)), RNG)["normals"]
        with pytest.raises(AssertionError):
            assert_same(other * wrong, moved(scene, turn(20, 1)), CENTRE)

    def test_under_family_bs_scale_crop_and_pad(self, scene):
        sample = raw(rendered(scene)[0])
        for step, rng in (
            (RandomScale(), Script(1 / 3)),
            (RandomCrop((SIZE, SIZE)), Script()),
            (PadTo((SIZE, SIZE)), RNG),
        ):
            sample = step(sample, rng)
        assert_same(finish_labels(sample, RNG)["normals"], scene, CENTRE)  # 0.5 + 1.5 / 3: the factor is 1

    def test_under_family_bs_enlargement(self, scene):
        larger = RandomCrop((SIZE, SIZE))(RandomScale()(raw(rendered(scene)[0]), Script(2 / 3)), Script())
        assert_same(finish_labels(larger, RNG)["normals"], moved(scene, 1.5 * np.eye(3)), np.s_[:, :])

    @pytest.mark.parametrize("step", [StretchTo((SIZE, SIZE)), ShrinkTo(SIZE)])
    def test_under_resizing(self, scene, step):
        buffer = rasterize(scene, 2 * SIZE)
        large = label_normals(scene, buffer).transpose(1, 2, 0)
        sample = {"image": np.zeros((2 * SIZE, 2 * SIZE, 3), np.uint8), "normals": np.ascontiguousarray(large)}
        assert_same(finish_labels(step(sample, RNG), RNG)["normals"], scene, np.s_[:, :])


def test_depths_and_classes_need_no_turning():
    """Only vectors have a direction in the picture."""
    label = RNG.integers(0, 5, (4, 6)).astype(np.uint8)
    for name in ("seg", "parts", "sal", "edge"):
        assert TASKS[name].rotate(label, np.eye(2)) is label
