"""A fabricated PASCAL_MT tree in the official format."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from train.cli import main

PERSON, DOG = 15, 12
FOLDERS = (
    "JPEGImages",
    "ImageSets/Context",
    "ImageSets/Parts",
    "semseg/VOC12",
    "semseg/pascal-context",
    "human_parts",
    "sal_distill",
    "normals_distill",
    "pascal-context/trainval",
)
SHAPES = [(37, 50), (50, 37), (33, 41), (64, 48), (300, 40), (48, 64), (45, 45), (40, 52)]

TRAIN = [f"2008_{n:06d}" for n in range(8)]
VAL = [f"2009_{n:06d}" for n in range(4)]
CROWD, NO_PERSON, NO_PARTS, CONTEXT_ONLY, SPECK, ALL_PARTS = TRAIN[:6]

PARTS_IN_A_GRID = [
    "hair",
    "head",
    "lear",
    "rear",
    "lebrow",
    "rebrow",
    "leye",
    "reye",
    "mouth",
    "nose",
    "neck",
    "torso",
    "luarm",
    "ruarm",
    "llarm",
    "rlarm",
    "lhand",
    "rhand",
    "luleg",
    "ruleg",
    "llleg",
    "rlleg",
    "lfoot",
    "rfoot",
]


def box(shape, top, bottom, left, right):
    """A mask that covers the given fractions of its image."""
    mask = np.zeros(shape, np.uint8)
    height, width = shape
    mask[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = 1
    return mask


def struct(fields, records):
    """A 1 x n MATLAB struct array."""
    array = np.empty((1, len(records)), [(field, object) for field in fields])
    for i, record in enumerate(records):
        array[0, i] = record
    return array


def thing(class_id, mask, parts):
    """One object of ``anno``; MATLAB's [] where it has no parts."""
    parts = struct(("part_name", "mask"), parts) if parts else np.zeros((0, 0))
    return {DOG: "dog", PERSON: "person"}[class_id], class_id, mask, parts


def objects_of(id, shape):
    whole = box(shape, 0, 1, 0, 1)
    dog = thing(DOG, whole, [("head", box(shape, 0.8, 1, 0.8, 1))])
    if id == CROWD:
        first = [("torso", box(shape, 0.2, 0.7, 0, 0.6)), ("head", box(shape, 0, 0.3, 0.1, 0.5))]
        second = [("lhand", box(shape, 0.4, 0.6, 0.3, 0.9)), ("rfoot", box(shape, 0.5, 0.8, 0.5, 0.7))]
        return [thing(PERSON, whole, first), dog, thing(PERSON, whole, []), thing(PERSON, whole, second)]
    if id == NO_PERSON:
        return [dog]
    if id == NO_PARTS:
        return [dog, thing(PERSON, whole, [])]
    if id == SPECK:
        return [thing(PERSON, whole, [("nose", box(shape, 0.5, 0.5 + 1 / shape[0], 0.5, 0.7))])]
    if id == ALL_PARTS:
        cells = [(row, column) for row in range(4) for column in range(6)]
        return [
            thing(PERSON, whole, [(name, box(shape, r / 4, (r + 1) / 4, c / 6, (c + 1) / 6))])
            for name, (r, c) in zip(PARTS_IN_A_GRID, cells, strict=True)
        ]
    return [thing(PERSON, whole, [("torso", box(shape, 0.1, 0.9, 0.2, 0.5))])]


def blocks(high, shape, rng):
    """Random integers below ``high``, constant in squares of 8 pixels."""
    height, width = shape
    return np.kron(rng.integers(0, high, (40, 40)), np.ones((8, 8), int))[:height, :width]


def write_image(root, id, shape, rng):
    """Every file of one image."""
    photo = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
    photo.save(root / f"JPEGImages/{id}.jpg")

    for folder, void in (("VOC12", True), ("pascal-context", False)):
        if id == CONTEXT_ONLY and folder == "VOC12":
            continue
        label = blocks(21, shape, rng).astype(np.uint8)
        if void:
            label[:, ::7] = 255
        image = Image.fromarray(label, mode="P")
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        image.save(root / f"semseg/{folder}/{id}.png")

    anno = struct(("imname", "objects"), [(id, struct(("class", "class_ind", "mask", "parts"), objects_of(id, shape)))])
    savemat(root / f"human_parts/{id}.mat", {"anno": anno}, do_compression=True)
    Image.fromarray(rng.integers(120, 136, shape, np.uint8)).save(root / f"sal_distill/{id}.png")
    normals = rng.integers(0, 256, (*shape, 3), np.uint8)
    normals[:, ::5] = 0
    normals[::6, :, :2] = 0
    Image.fromarray(normals).save(root / f"normals_distill/{id}.png")
    label_map = (1 + blocks(459, shape, rng)).astype(np.uint16)
    savemat(root / f"pascal-context/trainval/{id}.mat", {"LabelMap": label_map}, do_compression=True)


@pytest.fixture(scope="session")
def pascal_tree(tmp_path_factory):
    """The folder PASCAL_MT with 8 train and 4 val images, every one labelled for every task; do not change it.

    The split "all" lists them all. CROWD has persons with overlapping parts, NO_PERSON none, NO_PARTS one
    without parts, SPECK one with a single row of pixels; CONTEXT_ONLY has no VOC12 segmentation.
    """
    root = tmp_path_factory.mktemp("pascal") / "PASCAL_MT"
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, id in enumerate(TRAIN + VAL):
        write_image(root, id, SHAPES[i % len(SHAPES)], rng)
    for split, ids in {"train": TRAIN, "val": VAL, "all": TRAIN + VAL}.items():
        (root / f"ImageSets/Context/{split}.txt").write_text("".join(f"{id}\n" for id in ids))
        persons = {id: [DOG] if id == NO_PERSON else [DOG, PERSON] for id in ids}
        (root / f"ImageSets/Parts/{split}.txt").write_text(json.dumps(persons))
    return root


@pytest.fixture
def pascal_copy(pascal_tree, tmp_path):
    """A copy of the fabricated tree that a test may damage."""
    return Path(shutil.copytree(pascal_tree, tmp_path / "PASCAL_MT"))


def train_tiny(tree, out, *options):
    argv = ["--data", str(tree), "--model", "vit_micro", "--head", "light", "--batch-size", "4"]
    assert main([*argv, "--set", "lora_rank=0", "--workers", "0", *options, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def tiny_run(pascal_tree, tmp_path_factory):
    """A run of three steps on the fabricated tree, protocol mtinet at 64 pixels."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return train_tiny(pascal_tree, out, "--steps", "3", "--protocol", "mtinet", "--image-size", "64")


@pytest.fixture(scope="session")
def padded_run(pascal_tree, tmp_path_factory):
    """One step without parts, protocol invpt at 128 pixels, which hold the val photos."""
    out = tmp_path_factory.mktemp("runs") / "padded"
    options = ["--steps", "1", "--tasks", "seg,sal,normals,edge", "--image-size", "128"]
    return train_tiny(pascal_tree, out, "--protocol", "invpt", *options)


@pytest.fixture(scope="session")
def tiny_scenes_run(tmp_path_factory):
    """A run of two steps on four rendered scenes, tasks seg and sal."""
    out = tmp_path_factory.mktemp("runs") / "scenes"
    sizes = ["--set", "scenes=4", "--set", "val_scenes=3", "--batch-size", "2"]
    assert main(["--tasks", "seg,sal", "--steps", "2", *sizes, "--workers", "0", "--out", str(out)]) == 0
    return out


@pytest.fixture
def error_of(capsys):
    """error_of(main, arguments..): the line that a command prints on a user's mistake, with exit status 2."""

    def error(command, *argv) -> str:
        capsys.readouterr()
        assert command([*map(str, argv)]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1, line
        return line

    return error
