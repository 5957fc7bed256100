"""The built-in data set: rendered rooms, whose labels of all tasks follow from their geometry.

A scene is a list of surfaces. A surface is a shape with its object number, class, body part and colour. One z-buffer
finds the visible surface of each pixel; every label is then a table look-up.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.datasets.scenes.compose import FIRST_OBJECT, FLOOR, SEG_NAMES, WALL, Scene, compose_scene
from train.datasets.scenes.raster import ZBuffer
from train.metrics.odsf import MAX_DISTANCE
from train.protocols import Protocol, Rendered, Sample
from train.tasks import DEFAULT_TASKS, PART_NAMES, Classes, Shape
from train.tasks.edge import edges_from_label_map

SPLITS = ("train", "val")
CAMERA = 5.0  # z of the plane that depth is measured from; every object lies behind it


def rasterize(scene: Scene, size: int) -> ZBuffer:
    """The z-buffer of a scene; the owner of a pixel is an index into ``scene.surfaces``."""
    buffer = ZBuffer(size)
    for index, surface in enumerate(scene.surfaces):
        buffer.paint(surface.shape, index)
    return buffer


def label_seg(scene: Scene, buffer: ZBuffer) -> np.ndarray:
    """Background (wall and floor), person, ball, box, cylinder, cone."""
    return scene.table("seg").astype(np.uint8)[buffer.owner]


def label_parts(scene: Scene, buffer: ZBuffer) -> np.ndarray:
    """The six parts of every figure."""
    return scene.table("part").astype(np.uint8)[buffer.owner]


def label_sal(scene: Scene, buffer: ZBuffer) -> np.ndarray:
    """The object (figure or solid) with the most visible pixels."""
    objects = scene.table("object")
    shown = np.bincount(objects, np.bincount(buffer.owner.ravel(), minlength=len(objects)))
    salient = FIRST_OBJECT + shown[FIRST_OBJECT:].argmax()
    return (objects == salient).astype(np.uint8)[buffer.owner]


def label_normals(scene: Scene, buffer: ZBuffer) -> np.ndarray:
    """Normals of all surfaces, wall and floor included. Camera space has +x right, labels have +x left."""
    return (buffer.normal * [[[-1]], [[1]], [[1]]]).astype(np.float32)


def label_edge(scene: Scene, buffer: ZBuffer) -> np.ndarray:
    """Edges, by the field's rule, of a map that labels each solid, each part of each figure, the wall and the floor."""
    # Powers of five: four neighbours cannot sum to four times the centre unless all are equal to it.
    _, group = np.unique(len(PART_NAMES) * scene.table("object") + scene.table("part"), return_inverse=True)
    return edges_from_label_map((5**group)[buffer.owner])


def label_depth(scene: Scene, buffer: ZBuffer) -> np.ndarray:
    """Metres behind the plane z = CAMERA; camera space has z towards the viewer and is in metres."""
    return (CAMERA - buffer.depth).astype(np.float32)


def label_cls(scene: Scene, buffer: ZBuffer) -> np.ndarray:
    """The class of the salient object, by the numbers of segmentation, at every pixel."""
    seg, sal = label_seg(scene, buffer), label_sal(scene, buffer)
    return np.full_like(seg, seg[sal == 1].max())


LABELS: dict[str, Callable[[Scene, ZBuffer], np.ndarray]] = {
    "seg": label_seg, "parts": label_parts, "sal": label_sal, "normals": label_normals, "edge": label_edge,
    "depth": label_depth, "cls": label_cls,
}  # fmt: skip


def shade(scene: Scene, buffer: ZBuffer, rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 (size, size, 3): texture of wall and floor, Lambert's light, soft shadows, noise."""
    colours = np.array([surface.colour for surface in scene.surfaces], np.float32)[buffer.owner]
    light = 0.55 + 0.6 * np.maximum(np.tensordot(scene.light, buffer.normal, 1), 0)
    light *= 0.75 + 0.25 * buffer.normal[2]  # the rim of a solid is darker than its middle
    light *= _room_texture(scene, buffer)
    light += rng.normal(0, 0.012, light.shape)
    return np.minimum(colours * (255 * light[..., None]).astype(np.float32), 255).astype(np.uint8)


def _room_texture(scene: Scene, buffer: ZBuffer) -> np.ndarray:
    """(size, size) factors: stripes on the wall, tiles and contact shadows on the floor, 1 on objects."""
    along, height, away = (ax * buffer.x + ay * buffer.y + az * buffer.depth for ax, ay, az in scene.room)
    tile, stripe, row = (np.floor(length).astype(int) for length in (along / 0.4, along / 0.25, away / 0.4))
    wall = 1 - 0.05 * (stripe & 1) - 0.1 * np.clip(1 - height, 0, 1)
    floor = 1 - 0.1 * (tile + row & 1)
    for (x, y, z), *_ in scene.spots:
        distance2 = (buffer.x - x) ** 2 + (buffer.y - y) ** 2 + (buffer.depth - z) ** 2
        floor *= 1 - 0.5 * np.maximum(1 - distance2 / 0.25, 0) ** 2
    return np.select([buffer.owner == WALL, buffer.owner == FLOOR], [wall, floor], 1)


class Scenes:
    """``length`` scenes of ``split`` ("train" or "val"), rendered at size x size on access.

    A scene is a function of (seed, split, index) alone; ``size`` only sets how finely it is sampled. The epoch is
    ignored, since a larger ``length`` does what augmentation would. A data set as :mod:`train.datasets.base` defines
    it.
    """

    name = "scenes"
    origin = ""
    boundary_distance = MAX_DISTANCE
    skipped: tuple[str, ...] = ()
    classes: Classes = {"seg": SEG_NAMES, "parts": PART_NAMES, "cls": SEG_NAMES}

    def __init__(
        self, split: str, size: int, length: int, seed: int = 0, tasks: tuple[str, ...] = DEFAULT_TASKS
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}: choose among {', '.join(SPLITS)}")
        self.size, self.length, self.tasks = size, length, tasks
        self.protocol: Protocol = Rendered(size)
        self.split, self.stream = split, (seed, SPLITS.index(split))
        self.groups: tuple[NDArray[np.int64], ...] = (np.arange(length),)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"scene-{self.split}-{self.stream[0]}-{index:05d}" for index in range(self.length))

    @property
    def digests(self) -> tuple[dict[str, str], ...]:
        return ({},) * self.length

    def with_label(self, task: str) -> list[str]:
        return list(self.ids)

    def labelled(self, task: str) -> list[str]:
        return list(self.ids)

    def photo_shape(self, index: int) -> Shape:
        return self.size, self.size

    def boundary_maps(self) -> dict[str, Callable[[], np.ndarray]]:
        """Empty: odsF is defined on PASCAL-Context's LabelMaps."""
        return {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """``dataset[index, epoch]``: no pixel is void."""
        index, _ = key
        rng = np.random.default_rng([*self.stream, index])
        scene = compose_scene(rng)
        buffer = rasterize(scene, self.size)
        return {"image": shade(scene, buffer, rng)} | {task: LABELS[task](scene, buffer) for task in self.tasks}
