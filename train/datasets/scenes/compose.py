"""What is in a scene: a room, solids and jointed figures, drawn at random.

Looks are correlated with classes so that a small network learns them in minutes: each kind of solid has a hue about
which its colour is drawn, and figures wear a blue shirt, pale sleeves, dark trousers and pale socks in random shades.
"""

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi, sin, tan
from typing import NamedTuple

import numpy as np

from train.datasets.scenes.raster import Box, Cone, Cylinder, Pill, Plane, Shape, triangular_axes, upright_frame
from train.tasks import PART_NAMES

SEG_NAMES = ("background", "person", "ball", "box", "cylinder", "cone")
WALL, FLOOR, FIRST_OBJECT = 0, 1, 2
HUES = {"ball": 0.98, "box": 0.12, "cylinder": 0.36, "cone": 0.78}
BONES = {
    "head": ("face", "hair"),
    "torso": ("shirt",),
    "upper arm": ("sleeve",),
    "lower arm": ("forearm",),
    "upper leg": ("trousers",),
    "lower leg": ("sock", "shoe"),
}
PART_OF_BONE = {bone: PART_NAMES.index(part) for part, bones in BONES.items() for bone in bones}

Colour = tuple[float, float, float]  # RGB in [0, 1]


@dataclass(frozen=True)
class Surface:
    """A shape, the number of the object it belongs to, its class in SEG_NAMES, its part in PART_NAMES, its colour."""

    shape: Shape
    object: int
    seg: int
    part: int
    colour: Colour


class Bone(NamedTuple):
    """A segment in units of the body height and the radius, or the semi-axes, of what sheathes it."""

    name: str
    start: np.ndarray
    end: np.ndarray
    girth: float | tuple[float, float, float]


class Spot(NamedTuple):
    """Where on the floor, in camera space, an object stands, how large it is, and how far the camera looks down."""

    point: np.ndarray
    scale: float
    pitch: float


@dataclass(frozen=True)
class Scene:
    """``room`` has the wall's axes as rows (along, up, out of it); ``light`` is the unit vector to the lamp."""

    surfaces: list[Surface]
    spots: list[Spot]
    room: np.ndarray
    light: np.ndarray

    def table(self, field: str) -> np.ndarray:
        """A field of all surfaces, by the surface's index."""
        return np.array([getattr(surface, field) for surface in self.surfaces])


def compose_scene(rng: np.random.Generator) -> Scene:
    """Draws a room and three to five objects in it, figures among them in seven scenes of eight."""
    pitch, yaw = rng.uniform(0.3, 0.45), rng.uniform(-0.45, 0.45)
    azimuth, elevation = rng.uniform(-0.9, 0.9), rng.uniform(0.5, 0.9)
    light = np.array([cos(elevation) * sin(azimuth), sin(elevation), cos(elevation) * cos(azimuth)])
    room = upright_frame(pitch, yaw)
    figures = rng.choice(3, p=[1 / 8, 1 / 2, 3 / 8])
    spots = _spots(rng, figures + rng.integers(2, 4) if figures else 4, pitch)

    surfaces = _wall_and_floor(rng, room, pitch)
    for number, spot in enumerate(spots):
        draw = _figure if number < figures else _solid
        surfaces.extend(draw(rng, spot, FIRST_OBJECT + number))
    return Scene(surfaces, spots, room, light)


def _spots(rng: np.random.Generator, count: int, pitch: float) -> list[Spot]:
    """A Latin square: no two spots share a column of the picture nor a row, so that objects hide each other without
    running into each other. What stands lower in the picture is nearer, hence larger."""
    columns, rows = ((rng.permutation(count) + rng.uniform(0.2, 0.8, count)) / count for _ in range(2))
    spots = []
    for x, y in zip(1.8 * columns - 0.9, 0.55 * rows - 0.98, strict=True):
        spots.append(Spot(np.array([x, y, -y / tan(pitch)]), (1 - y) * rng.uniform(0.9, 1.1), pitch))
    return spots


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def _wall_and_floor(rng: np.random.Generator, room: np.ndarray, pitch: float) -> list[Surface]:
    _, up, front = room
    seam = rng.uniform(-0.2, 0.05)
    foot_of_wall = np.array([0, seam, -seam / tan(pitch)])
    wall = _hsv(rng.uniform(), rng.uniform(0.05, 0.25), rng.uniform(0.8, 1))
    floor = _hsv(rng.uniform(0.05, 0.12), rng.uniform(0.1, 0.4), rng.uniform(0.65, 0.9))
    return [Surface(Plane(foot_of_wall, front), WALL, 0, 0, wall), Surface(Plane(foot_of_wall, up), FLOOR, 0, 0, floor)]


def _solid(rng: np.random.Generator, spot: Spot, number: int) -> Iterator[Surface]:
    kind = SEG_NAMES[rng.integers(2, len(SEG_NAMES))]
    colour = _hsv(rng.normal(HUES[kind], 0.06), rng.uniform(0.55, 0.9), rng.uniform(0.65, 0.95))
    frame = upright_frame(spot.pitch, rng.uniform(-0.8, 0.8))
    radius, depth = spot.scale * rng.uniform(0.14, 0.22, 2)
    half_height = radius * rng.uniform(1, 1.5)
    if kind == "ball":
        centre = spot.point + radius * frame[1]
        shape: Shape = Pill(centre, centre, radius * np.eye(3))
    else:
        solid = {"box": Box, "cylinder": Cylinder, "cone": Cone}[kind]
        half = np.array([radius, half_height, depth if kind == "box" else radius])
        shape = solid(spot.point + half_height * frame[1], half, frame)
    yield Surface(shape, number, SEG_NAMES.index(kind), 0, colour)


def _direction(splay: float, swing: float, side: int) -> np.ndarray:
    """Of a limb that hangs down, swings forward and is splayed outward (radians); ``side`` is -1 or 1."""
    return np.array([side * sin(splay), -cos(splay) * cos(swing), cos(splay) * sin(swing)])


def _pose(rng: np.random.Generator) -> list[Bone]:
    """A random stance or stride; x is sideways, y up from the hips, z forward."""
    chest = np.array([rng.uniform(-0.04, 0.04), 0.22, rng.uniform(-0.03, 0.03)])
    head = chest + (0, 0.185, 0.01)
    crown = head + (0, 0.02, -0.02)
    bones = [
        Bone("shirt", np.zeros(3), chest, (0.125, 0.08, 0.09)),
        Bone("face", head, head, (0.085, 0.1, 0.09)),
        Bone("hair", crown, crown, (0.092, 0.095, 0.09)),
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
            Bone("sleeve", shoulder, elbow, 0.054),
            Bone("forearm", elbow, hand, 0.05),
            Bone("trousers", hip, knee, 0.066),
            Bone("sock", knee, ankle, 0.055),
            Bone("shoe", ankle, ankle + (side * 0.015, 0, 0.06), 0.05),
        ]
    return bones


def _wardrobe(rng: np.random.Generator) -> dict[str, Colour]:
    """Colours of a figure, by the name of the bone."""
    blue, tone = rng.uniform(0.5, 0.68), rng.uniform()
    skin = _hsv(0.06 + 0.02 * tone, 0.35 + 0.25 * tone, 0.95 - 0.4 * tone)
    return {
        "face": skin,
        "hair": _hsv(rng.uniform(0.05, 0.12), rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.5)),
        "shirt": _hsv(blue, rng.uniform(0.6, 0.9), rng.uniform(0.6, 0.9)),
        "sleeve": _hsv(blue, rng.uniform(0.15, 0.35), 0.95),
        "forearm": skin,
        "trousers": _hsv(rng.uniform(), rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.4)),
        "sock": _hsv(rng.uniform(0.1, 0.2), rng.uniform(0.1, 0.5), rng.uniform(0.85, 1)),
        "shoe": _hsv(rng.uniform(), rng.uniform(0.5, 0.8), rng.uniform(0.3, 0.6)),
    }


def _figure(rng: np.random.Generator, spot: Spot, number: int) -> Iterator[Surface]:
    """Someone who stands or walks, seen from the front or, one time in five, from behind."""
    height = 0.9 * spot.scale
    turn = rng.uniform(-1, 1) + pi * (rng.uniform() < 0.2)
    to_camera = height * upright_frame(spot.pitch, turn)
    bones, colours = _pose(rng), _wardrobe(rng)
    sole = min(bone.end[1] - bone.girth for bone in bones if bone.name == "shoe")
    hips = spot.point - (0, sole, 0) @ to_camera
    for name, start, end, girth in bones:
        axes = height * girth * np.eye(3) if isinstance(girth, float) else triangular_axes(to_camera.T * girth)
        pill = Pill(hips + start @ to_camera, hips + end @ to_camera, axes)
        yield Surface(pill, number, SEG_NAMES.index("person"), PART_OF_BONE[name], colours[name])
