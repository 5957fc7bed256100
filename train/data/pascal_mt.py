"""PASCAL_MT: PASCAL-Context with five dense tasks, read from the official tree and never written to.

::

    <root>/JPEGImages/<id>.jpg                     photos
    <root>/ImageSets/Context/{train,val}.txt       one id per line
    <root>/ImageSets/Parts/{train,val}.txt         JSON: id -> VOC classes of its objects; 15 is a person
    <root>/semseg/{VOC12,pascal-context}/<id>.png  class indices; VOC12 where it exists
    <root>/human_parts/<id>.mat                    PASCAL-Part's struct ``anno``
    <root>/sal_distill/<id>.png                    grey
    <root>/normals_distill/<id>.png                RGB
    <root>/pascal-context/trainval/<id>.mat        ``LabelMap``: the edges, and where normals are valid

Protocol "mini": everything is resized to a square, photos bilinear, labels nearest. A label need not
have the size of its photo, and edges are derived from the resized LabelMap, so that they stay one pixel thin.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

from kernels.errors import UserError
from train.data.edges import edges_from_label_map
from train.tasks import PART_NAMES, TASKS, VOID

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
PERSON = VOC_CLASSES.index("person")

# PASCAL-Part's parts of a person, by the part of train.tasks that each belongs to.
PERSON_PARTS = {
    "head": ("hair", "head", "lear", "rear", "lebrow", "rebrow", "leye", "reye", "mouth", "nose"),
    "torso": ("neck", "torso"),
    "upper arm": ("luarm", "ruarm"),
    "lower arm": ("llarm", "rlarm", "lhand", "rhand"),
    "upper leg": ("luleg", "ruleg"),
    "lower leg": ("llleg", "rlleg", "lfoot", "rfoot"),
}
PART_IDS = {name: PART_NAMES.index(part) for part, names in PERSON_PARTS.items() for name in names}

PHOTO = "JPEGImages/{}.jpg"
LABEL_MAP = "pascal-context/trainval/{}.mat"
LABELS = {  # the first that exists counts
    "seg": ("semseg/VOC12/{}.png", "semseg/pascal-context/{}.png"),
    "parts": ("human_parts/{}.mat",),
    "sal": ("sal_distill/{}.png",),
    "normals": ("normals_distill/{}.png",),
    "edge": (LABEL_MAP,),
}


class PascalMT:
    """One split of PASCAL_MT as a data set in the sense of :mod:`train.data`; images are (size, size).

    ``root`` is the tree or the folder that holds it as ``PASCAL_MT``. With ``partial_labels`` a missing
    label file means that its image is not labelled for that task; images without any label for ``tasks``
    are left out. As is usual in the field, ``tasks == ("parts",)`` keeps the images that show a person.
    The split "train" is flipped left to right with probability 1/2.

    Raises UserError for a tree that lacks a folder, a list, a photo or a label, and, on reading an item,
    for a file that cannot be decoded.
    """

    name = "PASCAL_MT"
    protocol = "mini"
    classes = {"seg": VOC_CLASSES, "parts": PART_NAMES}

    def __init__(
        self, root: str | Path, split: str, tasks: Sequence[str], size: int, seed: int, partial_labels: bool = False
    ) -> None:
        self.root = find_root(Path(root))
        self.split, self.size, self.seed = split, size, seed
        ids = read_split(self.root, split)
        if tuple(tasks) == ("parts",):
            ids = with_persons(self.root, split, ids)
        labels = find_files(self.root, split, ids, tasks, partial_labels)
        self.ids = tuple(id for id in ids if labels[id])
        self.labels = tuple(labels[id] for id in self.ids)
        self.groups = group_by_tasks([tuple(paths) for paths in self.labels])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, NDArray]:
        """``dataset[index, epoch]``: "image", uint8 (size, size, 3), and the labels that the image has."""
        index, epoch = key
        sample = {"image": load_photo(self.root / PHOTO.format(self.ids[index]), self.size)}
        for task, path in self.labels[index].items():
            sample[task] = LOADERS[task](path, self.size)
        flipped = self.split == "train" and np.random.default_rng([self.seed, epoch, index]).random() < 0.5
        return flip(sample) if flipped else sample


# What the tree holds


def find_root(given: Path) -> Path:
    """The folder with JPEGImages: ``given`` or its ``PASCAL_MT``."""
    for root in (given, given / "PASCAL_MT"):
        if (root / "JPEGImages").is_dir():
            return root
    problem = "holds no folder JPEGImages" if given.is_dir() else "is not a folder"
    raise UserError(f"{given} {problem}: give the folder PASCAL_MT of the unpacked data set as the data root")


def read_split(root: Path, split: str) -> list[str]:
    """The ids of a split in the order of its list."""
    path = root / "ImageSets/Context" / f"{split}.txt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a split whose list is in that folder, or restore the list")
    with reading(path):
        return path.read_text().split()


def with_persons(root: Path, split: str, ids: list[str]) -> list[str]:
    """Those ``ids`` that ImageSets/Parts lists with a person; all of them where the tree has no such list."""
    path = root / "ImageSets/Parts" / f"{split}.txt"
    if not path.is_file():
        return ids
    with reading(path):
        objects = json.loads(path.read_text())
        return [id for id in ids if PERSON in objects.get(id, ())]


def find_files(
    root: Path, split: str, ids: list[str], tasks: Sequence[str], partial_labels: bool
) -> dict[str, dict[str, Path]]:
    """For each id the label file of every task that has one; UserError for what must exist and does not."""
    exists = Listing()
    photos = [root / PHOTO.format(id) for id in ids]
    if lost := [path for path in photos if path not in exists]:
        raise UserError(f"{lost[0]} does not exist ({len(lost)} of {len(ids)} photos are missing): restore them")
    labels: dict[str, dict[str, Path]] = {id: {} for id in ids}
    missing = []
    for task in tasks:
        for id in ids:
            choices = [root / pattern.format(id) for pattern in LABELS[task]]
            if path := next((path for path in choices if path in exists), None):
                labels[id][task] = path
            else:
                missing.append(choices[0])
    if missing and not partial_labels:
        raise UserError(
            f"{missing[0]} does not exist ({len(missing)} label files of split {split!r} are missing): "
            "restore them, or pass --partial-labels to use the labels there are"
        )
    for task in tasks:
        if not any(task in paths for paths in labels.values()):
            folder = (root / LABELS[task][0]).parent
            raise UserError(f"{folder} has no label for {task!r} in split {split!r}: add its files, or drop the task")
    return labels


class Listing:
    """Which files exist: lists each folder once, which spares a call to the file system per file."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def __contains__(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.names:
            self.names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in self.names[folder]


def group_by_tasks(labelled: Sequence[tuple[str, ...]]) -> tuple[NDArray[np.int64], ...]:
    """Indices of the images that are labelled for the same tasks, groups in the order of their tasks."""
    members = defaultdict(list)
    for index, tasks in enumerate(labelled):
        members[tuple(TASKS.index(task) for task in tasks)].append(index)
    return tuple(np.array(members[tasks]) for tasks in sorted(members))


# One file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a decoder raises on a broken file, each its own kinds of error, into one line with the path."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} cannot be read ({reason}): restore the file") from error


def read_image(path: Path, mode: str | None = None) -> NDArray[np.uint8]:
    """Pixels converted to Pillow's ``mode``, or as stored, where those of a palette image are its indices."""
    with reading(path), Image.open(path) as image:
        return np.asarray(image.convert(mode) if mode else image)


def read_label_map(path: Path) -> NDArray[np.integer]:
    """PASCAL-Context's LabelMap (H, W), class ids 1..459 as stored."""
    with reading(path):
        return loadmat(path, variable_names="LabelMap")["LabelMap"]


def read_parts(path: Path) -> NDArray[np.uint8]:
    """PASCAL-Part's persons painted in the order of the file, later parts over earlier ones; 0 elsewhere."""
    with reading(path):
        objects = loadmat(path, variable_names="anno")["anno"][0, 0][1].ravel()
        label = np.zeros(objects[0][2].shape if len(objects) else (1, 1), np.uint8)
        for _, class_id, _, parts in objects:
            if class_id.item() == PERSON:
                for part in parts.ravel():
                    label[part[1].astype(bool)] = PART_IDS[part[0].item()]
        return label


def resize_nearest(array: NDArray, size: int) -> NDArray:
    """(H, W, ...) of any dtype -> (size, size, ...): the pixels under the new pixels' centres, as Pillow does."""
    rows, columns = (centres(length, size) for length in array.shape[:2])
    return array[rows[:, None], columns]


def centres(length: int, size: int) -> NDArray[np.int64]:
    """Where the centres of ``size`` pixels lie among ``length`` pixels."""
    step = length / size
    # A running sum as in Pillow: where a centre falls between two pixels, the sum's rounding decides.
    return np.cumsum([step / 2] + [step] * (size - 1)).astype(np.int64)


# Photo and labels at the size of the protocol


def load_photo(path: Path, size: int) -> NDArray[np.uint8]:
    """RGB (size, size, 3); bilinear, antialiased where it shrinks."""
    with reading(path), Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def load_seg(path: Path, size: int) -> NDArray[np.uint8]:
    """Class indices 0..20, 255 void."""
    label = resize_nearest(read_image(path), size)
    if label.ndim != 2 or (label[label != VOID] >= len(VOC_CLASSES)).any():
        raise UserError(f"{path} is not an image of class indices 0..20 and 255: restore the original PNG")
    return label


def load_parts(path: Path, size: int) -> NDArray[np.uint8]:
    """Parts 0..6; an image left without any part is void altogether."""
    label = resize_nearest(read_parts(path), size)
    return label if label.any() else np.full_like(label, VOID)


def load_sal(path: Path, size: int) -> NDArray[np.uint8]:
    """0 or 1: the distilled grey value is a probability."""
    return (resize_nearest(read_image(path, "L"), size) / 255 > 0.5).astype(np.uint8)


def load_normals(path: Path, size: int) -> NDArray[np.float32]:
    """Unit vectors (3, size, size); void where (0, 0, 0) is stored or the LabelMap, if any, has an invalid class."""
    stored = np.ascontiguousarray(resize_nearest(read_image(path, "RGB"), size).transpose(2, 0, 1))
    valid = stored.any(axis=0)
    label_map = path.parents[1] / LABEL_MAP.format(path.stem)
    if label_map.exists():
        valid &= np.isin(resize_nearest(read_label_map(label_map), size), valid_classes())
    vectors = 2 * stored.astype(np.float32) / 255 - 1  # never of length 0: no stored value decodes to 0
    return vectors / np.linalg.norm(vectors, axis=0) * valid


@cache
def valid_classes() -> NDArray[np.int64]:
    """The 170 LabelMap classes whose normals count."""
    text = (resources.files("train.data") / "normals_valid_classes.json").read_text()
    return np.array(sorted(json.loads(text)["ids"].values()))


def load_edge(path: Path, size: int) -> NDArray[np.uint8]:
    """0 or 1: where the resized LabelMap changes."""
    return edges_from_label_map(resize_nearest(read_label_map(path), size))


LOADERS = {"seg": load_seg, "parts": load_parts, "sal": load_sal, "normals": load_normals, "edge": load_edge}


def flip(sample: dict[str, NDArray]) -> dict[str, NDArray]:
    """The mirror image, left to right: a mirrored normal points to the other side in x."""
    mirrored = {task: array[:, ::-1] if task == "image" else array[..., ::-1] for task, array in sample.items()}
    if "normals" in mirrored:
        mirrored["normals"] = mirrored["normals"] * np.array([-1, 1, 1], np.float32)[:, None, None]
    return {task: np.ascontiguousarray(array) for task, array in mirrored.items()}
