"""Scenes: what is drawn is what is labelled, and the geometry behind both."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.morphology import thin

from kernels.errors import UserError
from train.datasets.scenes.compose import SEG_NAMES, compose_scene
from train.datasets.scenes.dataset import Scenes, rasterize
from train.datasets.scenes.raster import Box, Cone, Cylinder, Pill, Plane, ZBuffer, triangular_axes, upright_frame
from train.tasks import DEFAULT_TASKS, PART_NAMES
from train.tasks.edge import edges_from_label_map

ROOT = Path(__file__).resolve().parents[4]
SIZE, COUNT = 64, 120
PERSON = SEG_NAMES.index("person")


def digest(sample):
    return hashlib.sha256(b"".join(sample[key].tobytes() for key in sorted(sample))).hexdigest()


def scene_of(index):
    """The geometry of sample ``index`` of the training split, by the stream that the data set documents."""
    return compose_scene(np.random.default_rng([0, 0, index]))


@pytest.fixture(scope="module")
def samples():
    scenes = Scenes("train", SIZE, COUNT)
    return [scenes[index, 0] for index in range(COUNT)]


@pytest.fixture(scope="module")
def owners():
    """For every sample its surfaces and, per pixel, the index of the one that shows."""
    scenes = [scene_of(index) for index in range(COUNT)]
    return [(scene.surfaces, rasterize(scene, SIZE).owner) for scene in scenes]


# The data set's contract


@pytest.mark.parametrize("size", [64, 50])
def test_a_sample_has_the_shapes_and_types_of_the_contract(size):
    sample = Scenes("val", size, 3)[2, 0]
    types = {key: (array.shape, array.dtype.name) for key, array in sample.items()}
    plain = ((size, size), "uint8")
    image, normals = ((size, size, 3), "uint8"), ((3, size, size), "float32")
    assert types == {"image": image, "normals": normals} | dict.fromkeys(("seg", "parts", "sal", "edge"), plain)


def test_length_groups_and_classes():
    scenes = Scenes("train", SIZE, 9)
    assert len(scenes) == 9 and [group.tolist() for group in scenes.groups] == [list(range(9))]
    assert scenes.classes == {"seg": SEG_NAMES, "parts": PART_NAMES, "cls": SEG_NAMES}


def test_a_sample_depends_on_seed_split_and_index_only(samples):
    backwards = Scenes("train", SIZE, 5)
    assert [digest(backwards[index, 7]) for index in range(4, -1, -1)] == [digest(s) for s in samples[4::-1]]
    others = [Scenes("val", SIZE, 5)[0, 0], Scenes("train", SIZE, 5, seed=1)[0, 0], samples[1]]
    assert len({digest(sample) for sample in [samples[0], *others]}) == 4


def test_another_process_draws_the_same(samples):
    code = (
        "import hashlib; from train.datasets.scenes.dataset import Scenes; sample = Scenes('train', 64, 9)[3, 0]\n"
        "print(hashlib.sha256(b''.join(sample[key].tobytes() for key in sorted(sample))).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(samples[3])


def test_only_the_tasks_asked_for_are_labelled(samples):
    sample = Scenes("train", SIZE, 9, tasks=("parts", "edge"))[3, 0]
    assert sorted(sample) == ["edge", "image", "parts"]
    assert all(np.array_equal(sample[key], samples[3][key]) for key in sample)


def test_an_unknown_split_is_named():
    with pytest.raises(UserError, match="unknown split 'test': choose among train, val"):
        Scenes("test", SIZE, 1)


def test_size_only_sets_how_finely_a_scene_is_sampled():
    """The centres of a third of the pixels of 192 x 192 are the pixel centres of 64 x 64."""
    tasks = ("seg", "parts", "normals")
    for index in range(10):
        coarse, fine = (Scenes("train", size, 10, tasks=tasks)[index, 0] for size in (64, 192))
        differ = sum((coarse[task] != fine[task][1::3, 1::3]).mean() for task in ("seg", "parts"))
        assert differ < 0.001  # a silhouette may pass through a pixel centre
        assert np.mean(abs(coarse["normals"] - fine["normals"][:, 1::3, 1::3]) > 1e-5) < 0.001


# The labels follow from the geometry


def test_parts_lie_on_persons_and_cover_them(samples):
    assert all(np.array_equal(sample["parts"] > 0, sample["seg"] == PERSON) for sample in samples)


def test_classes_and_parts_are_those_of_the_surface_that_shows(samples, owners):
    for sample, (surfaces, owner) in zip(samples, owners, strict=True):
        assert all((sample["seg"][owner == i] == s.seg).all() for i, s in enumerate(surfaces))
        assert all((sample["parts"][owner == i] == s.part).all() for i, s in enumerate(surfaces))


def test_a_class_is_the_shape_that_its_name_says(owners):
    shapes = {"person": Pill, "ball": Pill, "box": Box, "cylinder": Cylinder, "cone": Cone}
    drawn = [surface for surfaces, _ in owners for surface in surfaces[2:]]
    assert all(type(surface.shape) is shapes[SEG_NAMES[surface.seg]] for surface in drawn)


def test_the_salient_object_is_the_one_that_shows_most(samples, owners):
    for sample, (surfaces, owner) in zip(samples, owners, strict=True):
        things = {}
        for i, surface in enumerate(surfaces):
            if surface.seg:
                things.setdefault(surface.object, np.zeros(owner.shape, bool))[owner == i] = True
        salient = next(mask for mask in things.values() if np.array_equal(mask, sample["sal"] == 1))
        assert salient.sum() == max(mask.sum() for mask in things.values()) > 0


def test_normals_are_unit_vectors_towards_the_viewer(samples):
    for sample in samples:
        assert np.allclose(np.linalg.norm(sample["normals"], axis=0), 1, atol=1e-6)
        assert (sample["normals"][2] > -1e-6).all()


def test_normals_point_left_at_the_left_contour_and_up_at_the_top(samples, owners):
    """The convention of the whole project: +x left, +y up, +z towards the camera."""
    checked = 0
    for sample, (surfaces, owner) in zip(samples, owners, strict=True):
        for i, surface in enumerate(surfaces):
            rows, columns = np.nonzero(owner == i)
            if (
                isinstance(surface.shape, Pill)
                and np.array_equal(surface.shape.start, surface.shape.end)
                and len(rows) > 40
            ):
                x, y, _ = sample["normals"][:, rows, columns]
                checked += 1
                assert np.corrcoef(columns, x)[0, 1] < -0.5 and np.corrcoef(rows, y)[0, 1] < -0.5
    assert checked > 50


def test_wall_and_floor_are_at_right_angles_and_the_floor_is_level():
    for index in range(20):
        scene = scene_of(index)
        wall, floor = (surface.shape.normal for surface in scene.surfaces[:2])
        assert abs(wall @ floor) < 1e-12 and floor[0] == 0 and floor[1] > floor[2] > 0 and wall[2] > 0.8


def differs_from_a_neighbour(array):
    """True where one of the four neighbours, those within the picture, has another value."""
    differs = np.zeros(array.shape, bool)
    for axis in (0, 1):
        unlike = np.diff(array, axis=axis) != 0
        before, after = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        before[axis], after[axis] = (1, 0), (0, 1)
        differs |= np.pad(unlike, before) | np.pad(unlike, after)
    return differs


def test_edges_are_where_surfaces_change(samples, owners):
    for sample, (surfaces, owner) in zip(samples, owners, strict=True):
        names = [(surface.object, surface.part) for surface in surfaces]
        label_map = np.array([names.index(name) for name in names])[owner]
        assert np.array_equal(sample["edge"], thin(differs_from_a_neighbour(label_map)))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_powers_of_five_never_cancel_in_the_laplacian(seed):
    labels = np.random.default_rng(seed).integers(0, 20, (12, 12))
    assert np.array_equal(edges_from_label_map(5**labels), thin(differs_from_a_neighbour(labels)))


def test_the_edge_rule_is_a_laplacian_with_reflected_border():
    ramp = np.array([[1, 1, 2, 3, 3]] * 5)
    assert edges_from_label_map(ramp).any(0).tolist() == [False, True, False, True, False]
    corner = np.zeros((4, 4), int)
    corner[0, 0] = 1  # the neighbours of (0, 0) across the border are (1, 0) and (0, 1) again: no cancellation
    assert edges_from_label_map(corner)[:2, :2].any() and not edges_from_label_map(corner)[2:].any()
    assert edges_from_label_map(np.full((4, 4), 459, np.uint16)).dtype == np.uint8
    assert not edges_from_label_map(np.full((4, 4), 459, np.uint16)).any()


# What the scenes hold


def test_figures_are_frequent_tall_and_their_limbs_thick_enough():
    heights, thinnest, with_figure = [], [], 0
    for index in range(200):
        surfaces = scene_of(index).surfaces
        people = {surface.object for surface in surfaces if surface.seg == PERSON}
        with_figure += bool(people)
        for person in people:
            alone = ZBuffer(SIZE)
            for surface in surfaces:
                if surface.object == person:
                    alone.paint(surface.shape, 1)
                    thinnest.append(2 * surface.shape.axes[0, 0] * SIZE / 2)
            heights.append(alone.owner.any(1).mean())
    assert with_figure >= 160
    assert min(heights) >= 1 / 3
    assert min(thinnest) >= 3


def test_no_task_is_won_by_a_constant(samples):
    share = {task: np.mean([sample[task] != 0 for sample in samples]) for task in DEFAULT_TASKS if task != "normals"}
    assert 0.35 < share["seg"] < 0.5
    assert 0.12 < share["parts"] < share["seg"]
    assert 0.13 < share["sal"] < 0.25
    assert 0.05 < share["edge"] < 0.12
    assert all(sample["sal"].sum() < (sample["seg"] > 0).sum() for sample in samples)
    normals = np.stack([sample["normals"] for sample in samples]).transpose(0, 2, 3, 1).reshape(-1, 3)
    best = normals.mean(0) / np.linalg.norm(normals.mean(0))
    assert np.degrees(np.arccos(np.clip(normals @ best, -1, 1))).mean() > 30


def test_every_class_and_part_is_frequent(samples):
    for task, names in (("seg", SEG_NAMES), ("parts", PART_NAMES)):
        shows = np.mean([np.bincount(sample[task].ravel(), minlength=len(names)) > 0 for sample in samples], 0)
        assert (shows > 0.3).all(), dict(zip(names, shows, strict=True))


@pytest.mark.parametrize("task", ["seg", "parts"])
def test_colour_alone_tells_much_but_not_all(samples, task):
    """A table of colours (512 bins) from half of the scenes, applied to the pixels of the things in the others."""
    pixels = [(s["image"][s[task] > 0] // 32 @ [64, 8, 1], s[task][s[task] > 0]) for s in samples]
    half = COUNT // 2
    known, seen = (np.concatenate([pair[which] for pair in pixels[:half]]) for which in (0, 1))
    table = np.zeros((512, 7))
    np.add.at(table, (known, seen), 1)
    colours, truth = (np.concatenate([pair[which] for pair in pixels[half:]]) for which in (0, 1))
    accuracy = (table.argmax(1)[colours] == truth).mean()
    most_frequent = np.bincount(truth).max() / len(truth)
    assert most_frequent + 0.2 < accuracy < 0.95


def test_light_falls_from_the_lamp(samples, owners):
    """On a solid, the brighter side faces the light; the dark rim is not Lambert's, so the relation is not strict."""
    correlations = []
    for index, (sample, (surfaces, owner)) in enumerate(zip(samples, owners, strict=True)):
        facing = np.tensordot(scene_of(index).light * [-1, 1, 1], sample["normals"], 1)
        brightness = sample["image"].sum(-1)
        for i, surface in enumerate(surfaces):
            lit = (owner == i) & (facing > 0)
            if surface.seg > PERSON and lit.sum() > 50 and facing[lit].std() > 0.1:
                correlations.append(np.corrcoef(facing[lit], brightness[lit])[0, 1])
    assert len(correlations) > 50 and min(correlations) > 0 and np.mean(correlations) > 0.85


# Solids


def draw_shape(kind, rng):
    """A random shape about the centre and the predicate "p (3, ...) is inside"."""
    centre = rng.uniform(-0.2, 0.2, 3)
    if kind in ("ball", "ellipsoid", "capsule", "swept ellipsoid"):
        round_ = kind in ("ball", "capsule")
        axes = rng.uniform(0.1, 0.4) * np.eye(3) if round_ else triangular_axes(rng.normal(0, 0.25, (3, 3)))
        end = centre + (rng.uniform(-0.4, 0.4, 3) if kind in ("capsule", "swept ellipsoid") else 0)
        return Pill(centre, end, axes), lambda p: inside_pill(p, centre, end, axes)
    frame = upright_frame(rng.uniform(0.2, 0.6), rng.uniform(-3, 3))
    a, b, c = rng.uniform(0.15, 0.5, 3)
    half = np.array([a, b, c]) if kind == "box" else np.array([a, max(a, b), a])

    def inside(p):
        x, y, z = np.tensordot(frame, p - centre.reshape(3, *[1] * (p.ndim - 1)), 1)
        radius = half[0] * (1 - y / half[1]) / 2 if kind == "cone" else half[0]
        across = np.hypot(x, z) <= radius if kind != "box" else (abs(x) <= half[0]) & (abs(z) <= half[2])
        return across & (abs(y) <= half[1])

    return {"box": Box, "cylinder": Cylinder, "cone": Cone}[kind](centre, half, frame), inside


def inside_pill(p, start, end, axes):
    """In the coordinates q in which the ellipsoid is the unit ball: at most 1 from the segment."""
    q = np.tensordot(np.linalg.inv(axes), p - start.reshape(3, *[1] * (p.ndim - 1)), 1)
    segment = np.linalg.solve(axes, end - start)
    t = (np.tensordot(segment, q, 1) / (segment @ segment or 1)).clip(0, 1)
    return ((q - segment.reshape(3, *[1] * (p.ndim - 1)) * t) ** 2).sum(0) <= 1


KINDS = ["ball", "ellipsoid", "capsule", "swept ellipsoid", "box", "cylinder", "cone"]


@pytest.mark.parametrize("kind", KINDS)
def test_depth_is_where_the_ray_enters_the_solid(kind):
    """Against marching along 400 points of every ray."""
    rng = np.random.default_rng(KINDS.index(kind))
    x, y = np.linspace(-1, 1, 33)[None, :], np.linspace(1, -1, 33)[:, None]
    z = np.linspace(2, -2, 400)
    step = z[0] - z[1]
    for _ in range(8):
        shape, inside = draw_shape(kind, rng)
        depth, _ = shape.hit(x, y)
        marched = inside(np.stack(np.broadcast_arrays(x[..., None], y[..., None], z)))
        first = np.where(marched.any(-1), z[marched.argmax(-1)], -np.inf)
        found, hit = np.isfinite(first), np.isfinite(depth)
        assert found.sum() > 5 and hit[found].all()
        gap = depth[found] - first[found]
        assert gap.min() > -1e-9 and gap.max() < step + 1e-9
        just_behind = np.stack([*np.broadcast_arrays(x, y), np.where(hit, depth - 1e-9, 0)])
        assert inside(just_behind)[hit].mean() > 0.99  # a chord may be shorter than that


@pytest.mark.parametrize("kind", KINDS)
def test_normals_are_perpendicular_to_the_surface(kind):
    """Against the slopes of the depth, by differences; a few pixels straddle a crease."""
    rng = np.random.default_rng(KINDS.index(kind))
    x, y = np.linspace(-1, 1, 65)[None, :], np.linspace(1, -1, 65)[:, None]
    step = 1e-6
    for _ in range(8):
        shape, _ = draw_shape(kind, rng)
        depth, normal = shape.hit(x, y)
        normal = np.broadcast_to(normal, (3, *depth.shape))
        with np.errstate(invalid="ignore"):  # -inf less -inf where both rays miss
            slope_x = (shape.hit(x + step, y)[0] - shape.hit(x - step, y)[0]) / (2 * step)
            slope_y = (shape.hit(x, y + step)[0] - shape.hit(x, y - step)[0]) / (2 * step)
        seen = np.isfinite(slope_x) & np.isfinite(slope_y) & np.isfinite(depth)
        numeric = np.stack([-slope_x, -slope_y, np.ones_like(depth)])[:, seen]
        error = np.linalg.norm(numeric / np.linalg.norm(numeric, axis=0) - normal[:, seen], axis=0)
        assert seen.sum() > 10 and np.mean(error < 1e-4) > 0.98
        assert np.allclose(np.linalg.norm(normal[:, seen], axis=0), 1)


def test_the_normals_of_a_ball_point_away_from_its_centre():
    centre, radius = np.array([0.2, -0.1, 0.3]), 0.5
    buffer = ZBuffer(SIZE)
    buffer.paint(Pill(centre, centre, radius * np.eye(3)), 1)
    x, y = np.broadcast_arrays(buffer.x, buffer.y)
    on_ball = buffer.owner == 1
    assert np.array_equal(on_ball, np.hypot(x - centre[0], y - centre[1]) < radius)
    points = np.stack([x, y, buffer.depth])[:, on_ball]
    assert np.allclose(buffer.normal[:, on_ball], (points - centre[:, None]) / radius)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_off_by_the_bounds(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(20):
        shape, _ = draw_shape(kind, rng)
        buffer = ZBuffer(SIZE)
        buffer.paint(shape, 1)
        assert np.array_equal(buffer.owner == 1, np.isfinite(shape.hit(buffer.x, buffer.y)[0]))


@given(st.permutations(range(5)))
@settings(max_examples=20, deadline=None)
def test_the_nearest_surface_shows_in_whatever_order_they_are_painted(order):
    rng = np.random.default_rng(3)
    shapes = [draw_shape(kind, rng)[0] for kind in KINDS[2:6]] + [Plane(np.zeros(3), upright_frame(0.4, 0.3)[2])]
    buffer = ZBuffer(32)
    for i in order:
        buffer.paint(shapes[i], i)
    depths = np.stack([shape.hit(buffer.x, buffer.y)[0] for shape in shapes])
    assert np.array_equal(buffer.owner, depths.argmax(0)) and np.array_equal(buffer.depth, depths.max(0))
    assert len(np.unique(buffer.owner)) > 3


def test_a_shape_outside_the_picture_leaves_no_trace():
    buffer = ZBuffer(8)
    for x in (-3.0, 3.0):
        for y in (-3.0, 0.0, 3.0):
            buffer.paint(Pill(np.array([x, y, 0]), np.array([x, y, 1]), 0.5 * np.eye(3)), 1)
    assert not buffer.owner.any() and np.isneginf(buffer.depth).all()
