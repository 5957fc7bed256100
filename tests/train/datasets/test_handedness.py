"""The axes of a tree's normals are told from its contours, and only where there is something to tell them from."""

import json

import numpy as np
import pytest
from PIL import Image

from train.check import main
from train.datasets.handedness import asymmetry_of, contour_asymmetry, describe_handedness
from train.datasets.scenes.dataset import Scenes

TASKS = ("parts", "sal", "normals")


@pytest.fixture(scope="module")
def scenes():
    dataset = Scenes("val", 96, 30, 0, TASKS)
    return [dataset[index, 0] for index in range(len(dataset))]


def labels_of(sample, hand=(1, 1, 1)):
    """The raw labels of a scene, its normals of another hand."""
    normals = sample["normals"].transpose(1, 2, 0) * np.float32(hand)
    return {"parts": sample["parts"], "sal": sample["sal"], "normals": normals}


@pytest.mark.parametrize(
    ("hand", "said"),
    [
        ((1, 1, 1), "axes  of normals: +x left, +y up, from the contours of"),
        ((-1, 1, 1), "axes  of normals, a warning: +x right, +y up, from"),
        ((1, -1, 1), "axes  of normals, a warning: +x left, +y down, from"),
        ((-1, -1, 1), "axes  of normals, a warning: +x right, +y down, from"),
    ],
)
def test_scenes_of_every_hand_are_told_apart(scenes, hand, said):
    found = [asymmetry_of(labels_of(sample, hand)) for sample in scenes]
    line = describe_handedness([asymmetry for asymmetry in found if asymmetry])
    assert line.startswith(said) and "\n" not in line
    assert ("convert the files" in line) == (hand != (1, 1, 1))


def test_a_ball_has_the_asymmetry_of_its_contour():
    y, x = (np.mgrid[:81, :81] - 40) / 32
    inside = x**2 + y**2 < 1
    z = np.sqrt(np.maximum(1 - x**2 - y**2, 0))
    normals = np.stack([-x, -y, z], -1).astype(np.float32) * inside[..., None]
    across, down = contour_asymmetry(inside, normals)
    assert 1 < across < 2 and down == pytest.approx(across)


def test_what_cannot_be_told_is_not_told(scenes):
    sample = labels_of(scenes[0])
    assert asymmetry_of({"normals": sample["normals"]}) is None
    assert asymmetry_of({"sal": sample["sal"]}) is None
    assert asymmetry_of(sample | {"parts": 0 * sample["parts"], "sal": 0 * sample["sal"]}) is None
    assert describe_handedness([]) == "axes  of normals cannot be told: no image has both normals and a mask"
    noise = np.random.default_rng(0).normal(size=(20, 2))
    assert "too few images to be sure" in describe_handedness([tuple(row) for row in noise])


@pytest.mark.parametrize("hand", [(1, 1, 1), (-1, 1, 1)])
def test_check_says_it_of_a_tree(scenes, hand, tmp_path, capsys):
    root = tmp_path / "PASCAL_MT"
    for folder in ("JPEGImages", "sal_distill", "normals_distill", "ImageSets/Context", "ImageSets/Parts"):
        (root / folder).mkdir(parents=True)
    ids = [f"2008_{n:06d}" for n in range(len(scenes))]
    for name, sample in zip(ids, scenes, strict=True):
        labels = labels_of(sample, hand)
        Image.fromarray(sample["image"]).save(root / f"JPEGImages/{name}.jpg")
        Image.fromarray(255 * labels["sal"]).save(root / f"sal_distill/{name}.png")
        stored = np.rint(127.5 * (labels["normals"] + 1)).astype(np.uint8)
        Image.fromarray(stored).save(root / f"normals_distill/{name}.png")
    for split, part in {"train": ids[:20], "val": ids[20:]}.items():
        (root / f"ImageSets/Context/{split}.txt").write_text("".join(f"{name}\n" for name in part))
        (root / f"ImageSets/Parts/{split}.txt").write_text(json.dumps({name: [15] for name in part}))
    argv = ["--data", str(root), "--tasks", "sal,normals", "--workers", "0", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    assert ("a warning: +x right" in capsys.readouterr().out) == (hand[0] < 0)
