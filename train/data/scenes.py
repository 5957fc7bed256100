"""The embedded data set: rendered rooms with solids and jointed figures, whose geometry is the label of all tasks.

A scene is a list of surfaces, each a shape with what it is: object, class, body part, colour. One z-buffer finds the
surface that owns each pixel; every label is then a table look-up:

- seg: background (wall, floor), person, ball, box, cylinder, cone,
- parts: the six parts of every figure,
- sal: the one object that shows the most pixels,
- normals: of all surfaces, wall and floor included; x right, y up, z towards the viewer,
- edge: the field's rule on a label map with one label per solid, per part group of each figure, wall and floor.

Colours help without giving the answer away: the parts of a figure (skin, shirt, paler sleeve, dark trousers, pale
socks) and the hues of solids come from palettes that overlap with each other.
"""

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, sin, tan

import numpy as np

from kernels.errors import UserError
from train.data.edges import edges_from_label_map
from train.data.raster import Box, Cone, Cylinder, Pill, Plane, Shape, ZBuffer, triangular_axes, upright_frame
from train.tasks import PART_NAMES, TASKS

SEG_NAMES = ("background", "person", "ball", "box", "cylinder", "cone")
SPLITS = ("train", "val")
WALL, FLOOR, FIRST_OBJECT = 0, 1, 2
HUES = {"ball": 0.98, "box": 0.12, "cylinder": 0.36, "cone": 0.78}
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)


@dataclass(frozen=True)
class Surface:
    """A shape, the object it belongs to, its class in SEG_NAMES, its part in PART_NAMES, its RGB colour in [0, 1]."""

    shape: Shape
    object: int
    seg: int
    part: int
    colour: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """pitch (radians) is how far the camera looks down, yaw how far the wall is turned; light points to the lamp."""

    surfaces: list[Surface]
    feet: np.ndarray  # (objects, 3): where each stands on the floor
    pitch: float
    yaw: float
    light: np.ndarray  # (3,) unit vector


def compose_scene(rng: np.random.Generator) -> Scene:
    """Draws a room and three to five objects in it, figures among them in seven scenes of eight."""
    pitch, yaw = rng.uniform(0.3, 0.5), rng.uniform(-0.6, 0.6)
    azimuth, elevation = rng.uniform(-1.1, 1.1), rng.uniform(0.6, 1.1)
    light = np.array([cos(elevation) * sin(azimuth), sin(elevation), cos(elevation) * cos(azimuth)])
    figures = rng.choice(3, p=[1 / 8, 1 / 2, 3 / 8])
    feet = _places(rng, figures + rng.integers(2, 4) if figures else 4, pitch)

    surfaces = _room(rng, pitch, yaw)
    for number, place in enumerate(feet):
        draw = _figure if number < figures else _solid
        surfaces.extend(draw(rng, place, pitch, FIRST_OBJECT + number))
    return Scene(surfaces, feet, pitch, yaw, light)


def _places(rng: np.random.Generator, count: int, pitch: float) -> np.ndarray:
    """(count, 3) points of the floor, a Latin square: no two share a column of the picture nor a row, so that objects
    hide each other without running into each other."""
    columns, rows = ((rng.permutation(count) + rng.uniform(0.2, 0.8, count)) / count for _ in range(2))
    x, y = 1.9 * columns - 0.95, -0.92 + 0.62 * rows
    return np.stack([x, y, -y / tan(pitch)], 1)


def _hsv(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def _room(rng: np.random.Generator, pitch: float, yaw: float) -> list[Surface]:
    _, up, _ = upright_frame(pitch, 0)
    _, _, front = upright_frame(pitch, yaw)
    seam = rng.uniform(0.0, 0.25)
    foot_of_wall = np.array([0, seam, -seam / tan(pitch)])
    wall = _hsv(rng.uniform(), rng.uniform(0.05, 0.25), rng.uniform(0.75, 0.95))
    floor = _hsv(rng.uniform(0.05, 0.12), rng.uniform(0.1, 0.4), rng.uniform(0.55, 0.8))
    return [
        Surface(Plane(foot_of_wall, front), WALL, 0, 0, wall),
        Surface(Plane(foot_of_wall, up), FLOOR, 0, 0, floor),
    ]


def _solid(rng: np.random.Generator, place: np.ndarray, pitch: float, number: int) -> Iterator[Surface]:
    kind = ("ball", "box", "cylinder", "cone")[rng.integers(4)]
    colour = _hsv(rng.normal(HUES[kind], 0.06), rng.uniform(0.55, 0.9), rng.uniform(0.65, 0.95))
    frame = upright_frame(pitch, rng.uniform(-0.8, 0.8))
    radius, depth = rng.uniform(0.2, 0.34, 2)
    half_height = radius * rng.uniform(1, 1.5)
    if kind == "ball":
        centre = place + radius * frame[1]
        shape = Pill(centre, centre, radius * np.eye(3))
    else:
        make = {"box": Box, "cylinder": Cylinder, "cone": Cone}[kind]
        half = np.array([radius, half_height, depth if kind == "box" else radius])
        shape = make(place + half_height * frame[1], half, frame)
    yield Surface(shape, number, SEG_NAMES.index(kind), 0, colour)


def _direction(splay: float, swing: float, side: int) -> np.ndarray:
    """Of a limb that hangs down, swings forward and is splayed outward (radians); ``side`` is -1 or 1."""
    return np.array([side * sin(splay), -cos(splay) * cos(swing), cos(splay) * sin(swing)])


def _bones(rng: np.random.Generator) -> list[tuple[str, np.ndarray, np.ndarray, float | tuple[float, float, float]]]:
    """A random pose: (name, start, end, radius or semi-axes) in units of the body height; x sideways, y up from the
    hips, z forward."""
    chest = np.array([rng.uniform(-0.04, 0.04), 0.22, rng.uniform(-0.03, 0.03)])
    head = chest + (0, 0.185, 0.01)
    bones = [
        ("torso", np.zeros(3), chest, (0.12, 0.075, 0.085)),
        ("head", head, head, (0.085, 0.1, 0.09)),
        ("hair", head + (0, 0.02, -0.02), head + (0, 0.02, -0.02), (0.092, 0.095, 0.09)),
    ]
    stride = rng.uniform(-0.5, 0.5)
    for side in (-1, 1):
        splay, swing = rng.uniform(0.25, 2.3), rng.uniform(-0.5, 0.6)
        shoulder = chest + (side * 0.13, 0.03, 0)
        elbow = shoulder + 0.17 * _direction(splay, swing, side)
        hand = elbow + 0.18 * _direction(splay + rng.uniform(-0.3, 0.9), swing + rng.uniform(0, 0.9), side)
        splay, swing = rng.uniform(0.05, 0.3), side * stride
        hip = np.array([side * 0.07, -0.04, 0])
        knee = hip + 0.2 * _direction(splay, swing, side)
        ankle = knee + 0.2 * _direction(splay, swing - rng.uniform(0, 0.7), side)
        bones += [
            ("sleeve", shoulder, elbow, 0.054),
            ("arm", elbow, hand, 0.047),
            ("trousers", hip, knee, 0.066),
            ("sock", knee, ankle, 0.055),
            ("shoe", ankle - (0, 0.01, 0), ankle + (side * 0.015, -0.01, 0.06), 0.05),
        ]
    return bones


PARTS = {
    "torso": TORSO, "head": HEAD, "hair": HEAD, "sleeve": UPPER_ARM, "arm": LOWER_ARM,
    "trousers": UPPER_LEG, "sock": LOWER_LEG, "shoe": LOWER_LEG,
}  # fmt: skip


def _wardrobe(rng: np.random.Generator) -> dict[str, tuple[float, float, float]]:
    """Colours of a figure, by the name of the bone."""
    shirt, tan_ = rng.uniform(0.5, 0.68), rng.uniform()
    skin = _hsv(0.06 + 0.02 * tan_, 0.35 + 0.25 * tan_, 0.95 - 0.4 * tan_)
    return {
        "torso": _hsv(shirt, rng.uniform(0.6, 0.9), rng.uniform(0.6, 0.9)),
        "head": skin,
        "hair": _hsv(rng.uniform(0.05, 0.12), rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.5)),
        "sleeve": _hsv(shirt, rng.uniform(0.15, 0.35), 0.95),
        "arm": skin,
        "trousers": _hsv(rng.uniform(), rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.4)),
        "sock": _hsv(rng.uniform(0.1, 0.2), rng.uniform(0.1, 0.5), rng.uniform(0.85, 1)),
        "shoe": _hsv(rng.uniform(), rng.uniform(0.5, 0.8), rng.uniform(0.3, 0.6)),
    }


def _figure(rng: np.random.Generator, place: np.ndarray, pitch: float, number: int) -> Iterator[Surface]:
    """A standing or walking figure, of at most the height that keeps its head in the picture."""
    height = min(rng.uniform(1.15, 1.65), (0.95 - place[1]) / cos(pitch))
    turned = rng.uniform(-1, 1) + (np.pi if rng.uniform() < 0.2 else 0)
    to_camera = height * upright_frame(pitch, turned)
    bones, colours = _bones(rng), _wardrobe(rng)
    ground = min(end[1] for name, _, end, _ in bones if name == "shoe") - 0.05
    origin = place - (0, ground, 0) @ to_camera
    for name, start, end, size in bones:
        ball = np.isscalar(size)
        axes = height * size * np.eye(3) if ball else triangular_axes(to_camera.T * size)
        pill = Pill(origin + start @ to_camera, origin + end @ to_camera, axes)
        yield Surface(pill, number, SEG_NAMES.index("person"), PARTS[name], colours[name])


def rasterize(scene: Scene, size: int) -> ZBuffer:
    """The owner of a pixel is an index of ``scene.surfaces``."""
    buffer = ZBuffer(size)
    for index, surface in enumerate(scene.surfaces):
        buffer.paint(surface.shape, index)
    return buffer


def label(scene: Scene, buffer: ZBuffer, tasks: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The labels of the tasks, as the module docstring defines them."""
    objects, seg, parts = (
        np.array([getattr(surface, field) for surface in scene.surfaces]) for field in ("object", "seg", "part")
    )
    labels = {}
    if "seg" in tasks:
        labels["seg"] = seg.astype(np.uint8)[buffer.owner]
    if "parts" in tasks:
        labels["parts"] = parts.astype(np.uint8)[buffer.owner]
    if "sal" in tasks:
        shown = np.bincount(objects, np.bincount(buffer.owner.ravel(), minlength=len(objects)))
        salient = FIRST_OBJECT + shown[FIRST_OBJECT:].argmax()
        labels["sal"] = (objects == salient).astype(np.uint8)[buffer.owner]
    if "normals" in tasks:
        labels["normals"] = buffer.normal.astype(np.float32)
    if "edge" in tasks:
        # Powers of five: four neighbours cannot sum to four times the centre unless all are equal to it.
        _, group = np.unique(len(PART_NAMES) * objects + parts, return_inverse=True)
        labels["edge"] = edges_from_label_map((5**group)[buffer.owner])
    return labels


def shade(scene: Scene, buffer: ZBuffer, rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 (size, size, 3): texture of wall and floor, Lambert's light, soft shadows, noise."""
    colours = np.array([surface.colour for surface in scene.surfaces])[buffer.owner]
    light = 0.42 + 0.68 * np.maximum(np.tensordot(scene.light, buffer.normal, 1), 0)
    light *= 0.75 + 0.25 * buffer.normal[2]  # the rim of a solid is darker than its middle
    light *= _room_texture(scene, buffer)
    light += rng.normal(0, 0.012, light.shape)
    return (colours * light[..., None] * 255).clip(0, 255).astype(np.uint8)


def _room_texture(scene: Scene, buffer: ZBuffer) -> np.ndarray:
    """(size, size) factors: tiles and contact shadows on the floor, stripes on the wall, 1 on objects."""
    right, up, front = upright_frame(scene.pitch, scene.yaw)
    along, height, away = (ax * buffer.x + ay * buffer.y + az * buffer.depth for ax, ay, az in (right, up, front))
    wall, floor = buffer.owner == WALL, buffer.owner == FLOOR
    texture = np.ones_like(buffer.depth)
    stripes = np.floor(along / 0.25) % 2
    texture[wall] = (1 - 0.05 * stripes - 0.1 * np.clip(1 - height, 0, 1))[wall]
    texture[floor] = (1 - 0.1 * ((np.floor(along / 0.4) + np.floor(away / 0.4)) % 2))[floor]
    for place in scene.feet:
        x, y, z = place
        distance2 = (buffer.x - x) ** 2 + (buffer.y - y) ** 2 + (buffer.depth - z) ** 2
        texture[floor] *= (1 - 0.55 * np.exp(-distance2 / 0.09))[floor]
    return texture


class Scenes:
    """``length`` scenes of ``split`` ("train" or "val"), rendered at size x size when they are asked for.

    A scene is a function of (seed, split, index) alone; ``size`` only sets how finely it is sampled. The epoch is
    ignored: augmentation would add nothing that a greater length does not.
    """

    name = "scenes"
    protocol = "scenes"
    classes = {"seg": SEG_NAMES, "parts": PART_NAMES}

    def __init__(self, split: str, size: int, length: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> None:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}: choose among {', '.join(SPLITS)}")
        self.size, self.length, self.tasks = size, length, tasks
        self.stream = (seed, SPLITS.index(split))
        self.groups = (np.arange(length),)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index_epoch: tuple[int, int]) -> dict[str, np.ndarray]:
        """The arrays of :mod:`train.data`; no pixel is void."""
        index, _ = index_epoch
        rng = np.random.default_rng([*self.stream, index])
        scene = compose_scene(rng)
        buffer = rasterize(scene, self.size)
        return {"image": shade(scene, buffer, rng)} | label(scene, buffer, self.tasks)
