"""Where a Cityscapes tree is found, its splits, and every kind of damage to it: one line with path and remedy."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from kernels import UserError
from train.datasets.base import kind_of, open_tree
from train.datasets.files import Access, TreeDataSet
from train.protocols import build_protocol

AACHEN = "aachen/aachen_000000_000000"
TASKS = ("seg", "depth")


def read(root, split="train", tasks=TASKS, **access):
    tree = open_tree(root, access.get("val_images", ""))
    return TreeDataSet(tree, split, tasks, build_protocol("cityscapes", 32), 0, Access(**access))


def mistake(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_is_found_and_its_cities_are_its_splits(city_tree):
    assert str(open_tree(city_tree)) == str(open_tree(city_tree.parent)) == f"layout fine at {city_tree}"
    assert kind_of(str(city_tree)).protocol == "cityscapes"
    assert [image_id.split("/")[0] for image_id in read(city_tree).ids] == ["aachen", "aachen", "bochum", "bochum"]
    assert [image_id.split("/")[0] for image_id in read(city_tree, "val").ids] == ["frankfurt", "frankfurt"]
    assert "leftImg8bit has no cities in test: restore them, or choose among train, val" in mistake(
        lambda: read(city_tree, "test")
    )


def test_samples_are_of_the_protocols_rectangle(city_tree):
    sample = read(city_tree)[0, 0]
    shapes = {name: array.shape for name, array in sample.items()}
    assert shapes == {"image": (32, 64, 3), "seg": (32, 64), "depth": (32, 64)}


def test_all_images_can_be_divided_anew(city_tree):
    train, val = (read(city_tree, split, val_images="0.5:3") for split in ("train", "val"))
    assert len(train) == len(val) == 3 and len({*train.ids, *val.ids}) == 6
    assert train.photo_shape(0) == (32, 64)


def test_a_city_of_two_splits_is_one_line(city_copy):
    shutil.copytree(city_copy / "leftImg8bit/train/aachen", city_copy / "leftImg8bit/val/aachen")
    assert mistake(lambda: open_tree(city_copy)) == f"{city_copy}/leftImg8bit holds aachen in train and val: remove one"


def png(array):
    return lambda path: Image.fromarray(array).save(path)


def text(content):
    return lambda path: path.write_text(content)


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


GREY = np.zeros((32, 64), np.uint8)
DAMAGE = {
    "a torn photo": ("leftImg8bit", "leftImg8bit.png", truncated, "cannot be read"),
    "an id of none": ("gtFine", "gtFine_labelIds.png", png(GREY + 34), "holds 34, which is no label id 0..33"),
    "colours": ("gtFine", "gtFine_labelIds.png", png(np.stack([GREY] * 3, -1)), "mode RGB"),
    "8 bits": ("disparity", "disparity.png", png(GREY), "mode L, not 16 bits"),
    "another photo": ("disparity", "disparity.png", png(np.ones((64, 32), np.uint16)), "not the same picture rescaled"),
    "no camera": ("camera", "camera.json", text("{}"), "has no 'extrinsic'"),
    "a word": ("camera", "camera.json", text("camera"), "cannot be read"),
    "no length": (
        "camera",
        "camera.json",
        text('{"extrinsic": {"baseline": 0}, "intrinsic": {"fx": 1}}'),
        "gives 0 as baseline times focal length",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(case, city_copy):
    folder, suffix, damage, problem = DAMAGE[case]
    path = city_copy / folder / "train" / f"{AACHEN}_{suffix}"
    damage(path)
    message = mistake(lambda: read(city_copy)[0, 0])
    assert message.startswith(str(path)) and problem in message


def test_missing_files_are_named(city_copy):
    path = city_copy / f"disparity/train/{AACHEN}_disparity.png"
    path.unlink()
    assert mistake(lambda: read(city_copy)).startswith(f"{path} does not exist (1 label files of split 'train'")
    assert read(city_copy, partial_labels=True).with_label("depth")[0] == "aachen/aachen_000000_000001"
    shutil.rmtree(city_copy / "disparity")
    assert f"{city_copy}/disparity has no label for 'depth'" in mistake(lambda: read(city_copy, partial_labels=True))
