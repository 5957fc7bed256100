"""PASCAL-Context with five dense tasks as a data set, read from a user's tree (:mod:`train.data.tree`).

    photos          JPEG
    seg             class indices; VOC12's with their void border where they exist
    parts           PASCAL-Part's struct ``anno``
    sal             grey
    normals         RGB
    edge            ``LabelMap``, which also says where normals are valid

Protocol "mini": everything is resized to a square, photos bilinear, labels nearest. A label need not
have the size of its photo, and edges are derived from the resized LabelMap, so that they stay one pixel thin.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

from kernels.errors import UserError
from train.data.edges import edges_from_label_map
from train.data.reading import reading
from train.data.tree import PERSON, find_labels, find_tree, read_split, with_persons
from train.tasks import PART_NAMES, TASKS, VOID

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)

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


class PascalMT:
    """One split of PASCAL_MT as a data set in the sense of :mod:`train.data`; images are (size, size).

    ``root`` is the tree or the folder around it. With ``partial_labels`` a missing
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
        self.tree = find_tree(Path(root))
        self.split, self.size, self.seed = split, size, seed
        ids = read_split(self.tree, split)
        if tuple(tasks) == ("parts",):
            ids = with_persons(self.tree, split, ids)
        labels = find_labels(self.tree, split, ids, tasks, partial_labels)
        self.ids = tuple(id for id in ids if labels[id])
        self.labels = tuple(labels[id] for id in self.ids)
        self.groups = group_by_tasks([tuple(paths) for paths in self.labels])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, NDArray]:
        """``dataset[index, epoch]``: "image", uint8 (size, size, 3), and the labels that the image has."""
        index, epoch = key
        sample = {"image": load_photo(self.tree.photo(self.ids[index]), self.size)}
        for task, path in self.labels[index].items():
            if task == "normals":
                sample[task] = load_normals(path, self.size, self.tree.label_map(self.ids[index]))
            else:
                sample[task] = LOADERS[task](path, self.size)
        flipped = self.split == "train" and np.random.default_rng([self.seed, epoch, index]).random() < 0.5
        return flip(sample) if flipped else sample


def group_by_tasks(labelled: Sequence[tuple[str, ...]]) -> tuple[NDArray[np.int64], ...]:
    """Indices of the images that are labelled for the same tasks, groups in the order of their tasks."""
    members = defaultdict(list)
    for index, tasks in enumerate(labelled):
        members[tuple(TASKS.index(task) for task in tasks)].append(index)
    return tuple(np.array(members[tasks]) for tasks in sorted(members))


# One file


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


def load_normals(path: Path, size: int, label_map: Path) -> NDArray[np.float32]:
    """Unit vectors (3, size, size); void where (0, 0, 0) is stored or the LabelMap, if any, has an invalid class."""
    stored = np.ascontiguousarray(resize_nearest(read_image(path, "RGB"), size).transpose(2, 0, 1))
    valid = stored.any(axis=0)
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


LOADERS = {"seg": load_seg, "parts": load_parts, "sal": load_sal, "edge": load_edge}


def flip(sample: dict[str, NDArray]) -> dict[str, NDArray]:
    """The mirror image, left to right: a mirrored normal points to the other side in x."""
    mirrored = {task: array[:, ::-1] if task == "image" else array[..., ::-1] for task, array in sample.items()}
    if "normals" in mirrored:
        mirrored["normals"] = mirrored["normals"] * np.array([-1, 1, 1], np.float32)[:, None, None]
    return {task: np.ascontiguousarray(array) for task, array in mirrored.items()}
