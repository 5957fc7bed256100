"""Predictions as the field's programs write them, one PNG of 8 bits per image and task:

=====================  ========  ==================================================
file                   mode      value
=====================  ========  ==================================================
semseg/<id>.png        L or P    class id 0..20
human_parts/<id>.png   L or P    class id 0..6
sal/<id>.png           L         255 p, p the probability of "salient"
normals/<id>.png       RGB       255 (n + 1) / 2 of the unit vector n (x, y, z)
edge/<id>.png          L         255 p, p the probability of an edge, cut off, not rounded
=====================  ========  ==================================================

Between a prediction and its PNG lie the *levels*, (H, W) or (H, W, 3), 0..255: class ids in uint8, all else in float32.
What is "decided" is what metrics count, see :mod:`train.tasks.scores`.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kernels.errors import UserError
from train.datasets.pascal.labels import read_image
from train.datasets.pascal.voc import PALETTE
from train.files.reading import reading
from train.output.tables import write_json
from train.tasks.losses import unit

FOLDERS = {"seg": "semseg", "parts": "human_parts", "sal": "sal", "normals": "normals", "edge": "edge"}
MODES = {"seg": ("L", "P"), "parts": ("L", "P"), "sal": ("L",), "normals": ("RGB",), "edge": ("L",)}
NOTE = "predictions.json"  # under which protocol, and from what, a folder was written
SHOWN = 3  # files or ids that a message names

Picture = NDArray[np.uint8]


def to_levels(task: str, decided: Tensor) -> NDArray:
    """The levels of one image's prediction, "decided" without its batch axis."""
    if task in ("seg", "parts"):
        return decided.byte().numpy()
    if task == "normals":
        return (127.5 * (decided + 1)).permute(1, 2, 0).numpy()
    return (255 * (decided.float().sigmoid()[0] if task == "edge" else decided)).numpy()


def to_picture(task: str, levels: NDArray, rounded: bool) -> Picture:
    """``levels`` in 8 bits: cut off, as the field does, or ``rounded``, which is closer; edges are never rounded."""
    return (levels + 0.5 if rounded and task in ("sal", "normals") else levels).clip(0, 255).astype(np.uint8)


def from_picture(task: str, picture: Picture) -> Tensor:
    """What is decided by a PNG, without a batch axis. A level of an edge stands for the middle of what it was cut off
    from, so that its logit is finite."""
    if task in ("seg", "parts"):
        return torch.from_numpy(picture.astype(np.int64))
    if task == "normals":
        return unit(torch.from_numpy(2 * picture.transpose(2, 0, 1).astype(np.float32) / 255 - 1)[None])[0]
    if task == "edge":
        return torch.from_numpy((picture[None] + np.float32(0.5)) / 256).logit()
    return torch.from_numpy(picture.astype(np.float32) / 255)


def write_pictures(folder: Path, image_id: str, pictures: Mapping[str, Picture]) -> None:
    """One PNG per task, also of pictures in colour; class ids get VOC's palette, which no reader minds."""
    for task, picture in pictures.items():
        (folder / FOLDERS[task]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture)
        if task in ("seg", "parts") and picture.ndim == 2:
            image.putpalette(PALETTE.tobytes())
        path = folder / FOLDERS[task] / f"{image_id}.png"
        partial = path.with_name(f".{path.name}.partial")
        image.save(partial, format="PNG")
        partial.replace(path)


def read_picture(folder: Path, task: str, image_id: str, classes: Mapping[str, Sequence[str]]) -> Picture:
    """The PNG; UserError where it is damaged, of another mode, or holds what is no class."""
    path = folder / FOLDERS[task] / f"{image_id}.png"
    picture = np.asarray(read_image(path, MODES[task]))
    if task in classes and picture.max() >= len(classes[task]):
        raise UserError(f"{path} holds {picture.max()}, which is no class 0..{len(classes[task]) - 1}")
    return picture


class Folder:
    """A folder of predictions that appears, whole, when it is closed; UserError where there is something already.

    An error in its ``with`` block leaves nothing.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not an empty folder: choose another --save-predictions")
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.partial}: {error.strerror}; choose another one") from None

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind:
            shutil.rmtree(self.partial)

    def write(self, image_id: str, pictures: Mapping[str, Picture]) -> None:
        write_pictures(self.partial, image_id, pictures)

    def close(self, note: dict[str, Any]) -> None:
        write_json(self.partial / NOTE, note)
        self.partial.replace(self.path)


def read_note(folder: Path) -> dict[str, Any]:
    """What :meth:`Folder.close` noted; {} for the predictions of another program."""
    path = folder / NOTE
    if not path.exists():
        return {}
    with reading(path):
        return dict(json.loads(path.read_text()))


def predicted_tasks(folder: Path) -> tuple[str, ...]:
    """The tasks that ``folder`` has predictions for; UserError where it has none."""
    tasks = tuple(task for task, name in FOLDERS.items() if (folder / name).is_dir())
    if not tasks:
        what = "holds none of the folders" if folder.is_dir() else "is not a folder that holds some of"
        raise UserError(f"{folder} {what} {', '.join(FOLDERS.values())}: give a folder of predictions <task>/<id>.png")
    return tasks


def require_predictions(folder: Path, task: str, ids: Sequence[str], split: str) -> None:
    """UserError where the prediction of one of the ``ids`` is missing."""
    with reading(folder / FOLDERS[task]):
        found = {name.removesuffix(".png") for name in os.listdir(folder / FOLDERS[task]) if name.endswith(".png")}
    if missing := [image_id for image_id in ids if image_id not in found]:
        others = len(found.difference(ids))
        belong = f"; it has {others} of images that are not in it, perhaps of another split" if others else ""
        raise UserError(
            f"{folder / FOLDERS[task]} lacks {len(missing)} of {len(ids)} predictions of split {split!r}, "
            f"{shorten(missing)}{belong}: write them, or name the images there are with --set"
        )


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    """The first few."""
    return separator.join(names[:SHOWN]) + (f"{separator}..." if len(names) > SHOWN else "")
