"""Predictions as the field's programs write them, one PNG per image and task, in sub-folders where the id has them:

=====================  ========  ==================================================
file                   mode      value
=====================  ========  ==================================================
semseg/<id>.png        L or P    class id, from 0
human_parts/<id>.png   L or P    class id 0..6
sal/<id>.png           L         255 p, p the probability of "salient"
normals/<id>.png       RGB       255 (n + 1) / 2 of the unit vector n (x, y, z)
edge/<id>.png          L         255 p, p the probability of an edge, truncated
depth/<id>.png         I;16      millimetres, at least 1
cls/<id>.png           L or P    the image's class id at every pixel
=====================  ========  ==================================================

Each task encodes and decodes its files: :class:`train.tasks.Task`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kernels.errors import UserError
from train.files.atomic import make_folder, replacing, replacing_folder
from train.files.folders import require_outside_data
from train.files.images import read_image
from train.files.reading import read_json, reading
from train.tasks import TASKS, Picture, Shape

NOTE = "predictions.json"  # the protocol and the source of a folder of predictions
SCHEMA = {"protocol?": str, "tta?": str} | dict.fromkeys(("image_size?", "scenes?", "val_scenes?", "seed?"), int)
SHOWN = 3  # files or ids that a message names


def picture_path(folder: Path, task: str, image_id: str) -> Path:
    return folder / TASKS[task].folder / f"{image_id}.png"


def write_pictures(folder: Path, image_id: str, pictures: Mapping[str, Picture]) -> None:
    """Writes one PNG per task. Class ids get the field's palette, which readers ignore; colours are written as such."""
    for task, picture in pictures.items():
        path, palette = picture_path(folder, task, image_id), TASKS[task].palette
        make_folder(path.parent)
        image = Image.fromarray(picture)
        if palette is not None and picture.ndim == 2:
            image.putpalette(palette.tobytes())
        with replacing(path, sync=False) as partial:
            image.save(partial, format="PNG")


def read_picture(folder: Path, task: str, image_id: str, classes: Sequence[str]) -> Picture:
    """The PNG; UserError where it is damaged, of another mode, or holds an invalid class id."""
    path = picture_path(folder, task, image_id)
    picture = np.asarray(read_image(path, TASKS[task].modes))
    TASKS[task].check_picture(path, picture, classes)
    return picture


def require_shape(path: Path, picture: Picture, shape: Shape, input_shape: Shape) -> None:
    """UserError for a PNG that is neither of the photo's ``shape`` nor of the model's input."""
    if picture.shape[:2] not in (shape, input_shape):
        height, width = picture.shape[:2]
        raise UserError(
            f"{path} is {width} x {height} pixels, neither its photo's {shape[1]} x {shape[0]} nor "
            f"{input_shape[1]} x {input_shape[0]}"
        )


@contextmanager
def keeping(path: Path | None, note: dict[str, Any]) -> Iterator[Callable[[str, Mapping[str, Picture]], None] | None]:
    """Yields ``save(image_id, pictures)``, or None without a ``path``.

    The folder ``path`` appears, complete and with ``note``, when the block ends. After an error in the block there is
    no folder. UserError where ``path`` lies in a data set, or exists and is not an empty folder.
    """
    if path is None:
        yield None
        return
    require_outside_data(path, "--save-predictions")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder: choose another --save-predictions")
    with replacing_folder(path) as unfinished:
        yield partial(write_pictures, unfinished)
        (unfinished / NOTE).write_text(json.dumps(note, indent=1) + "\n")


def read_note(folder: Path) -> dict[str, Any]:
    """What :func:`keeping` noted; {} for the predictions of another program."""
    path = folder / NOTE
    if not path.exists():
        return {}
    return read_json(path, SCHEMA)


def predicted_tasks(folder: Path) -> tuple[str, ...]:
    """The tasks that ``folder`` has predictions for; UserError where it has none."""
    tasks = tuple(name for name, task in TASKS.items() if (folder / task.folder).is_dir())
    if not tasks:
        names = [task.folder for task in TASKS.values()]
        what = "holds none of the folders" if folder.is_dir() else "is not a folder that holds some of"
        raise UserError(f"{folder} {what} {', '.join(names)}: give a folder of predictions <task>/<id>.png")
    return tasks


def require_predictions(folder: Path, task: str, ids: Sequence[str], split: str) -> None:
    """UserError where the prediction of one of the ``ids`` is missing."""
    place = folder / TASKS[task].folder
    with reading(place):
        found = {path.relative_to(place).as_posix().removesuffix(".png") for path in place.rglob("*.png")}
    if missing := [image_id for image_id in ids if image_id not in found]:
        others = len(found.difference(ids))
        belong = f"; it has {others} other files, perhaps of another split" if others else ""
        raise UserError(
            f"{place} lacks {len(missing)} of {len(ids)} predictions of split {split!r}, "
            f"{shorten(missing)}{belong}: write them, or name the predicted images with --ids"
        )


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    """The first few names as text, with "..." for the rest."""
    return separator.join(names[:SHOWN]) + (f"{separator}..." if len(names) > SHOWN else "")
