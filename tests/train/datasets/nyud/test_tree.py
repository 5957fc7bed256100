"""Where a NYUD-v2 tree is found, and every kind of damage to it: one line with the path and the remedy."""

import os

import numpy as np
import pytest
from PIL import Image

from kernels import UserError
from train.datasets.base import Source, kind_of, open_dataset, open_tree
from train.datasets.files import Access, TreeDataSet
from train.protocols import build_protocol

TASKS = ("seg", "normals", "edge", "depth")
HURT = "0001"
SHAPE = (36, 48)


def read(root, split="train", tasks=TASKS, **access):
    return TreeDataSet(open_tree(root), split, tasks, build_protocol("nyud_invpt", 56), 0, Access(**access))


def mistake(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_releases_are_told_apart_by_their_files(nyud_tree, layout):
    assert str(open_tree(nyud_tree)) == str(open_tree(nyud_tree.parent)) == f"layout {layout} at {nyud_tree}"
    assert kind_of(str(nyud_tree)).protocol == "nyud_invpt"


def test_a_file_that_strays_into_a_tree_does_not_turn_its_layout(nyud_copy, layout):
    for name in ("sheet.png", "cover.jpg", "._0001.png", "._0001.jpg", ".DS_Store"):
        (nyud_copy / "images" / name).touch()
    assert open_tree(nyud_copy).layout == layout


def test_a_wrong_folder_names_all_data_sets(tmp_path):
    message = mistake(lambda: open_tree(tmp_path))
    assert message.startswith(
        f"{tmp_path} holds no folder JPEGImages (PASCAL-Context) and no folder gt_sets with images (NYUD-v2) and no "
        "folder leftImg8bit (Cityscapes): give the folder PASCAL_MT, PASCALContext, NYUD_MT, NYUDv2, cityscapes or "
    )
    assert message.endswith(" of a data set, or its parent")
    assert kind_of(str(tmp_path)) is None


def test_a_folder_of_two_data_sets_is_ambiguous(nyud_copy):
    (nyud_copy.parent / "PASCAL_MT/JPEGImages").mkdir(parents=True)
    assert "give one of them" in mistake(lambda: open_tree(nyud_copy.parent))


@pytest.mark.parametrize("protocol", ["invpt", "mtinet", "ase", "cityscapes"])
def test_a_protocol_of_another_data_set_takes_the_images(protocol, nyud_tree):
    source = Source(str(nyud_tree), TASKS, protocol, 64, dataset="NYUD")
    sample, (height, width) = open_dataset(source, "train")[0, 0], source.protocol.shape
    assert sample["image"].shape == (height, width, 3) and sample["depth"].shape == (height, width)
    assert source.classes["seg"] == open_tree(nyud_tree).classes["seg"]


def test_edges_are_not_derived_where_there_are_no_label_maps(nyud_tree):
    message = mistake(lambda: open_dataset(Source(str(nyud_tree), TASKS, "mini", 64), "train"))
    assert message == (
        "protocol mini derives edges from label maps, which NYUD-v2 does not have: choose another --protocol, such as "
        "nyud_invpt, or --tasks without edge"
    )
    assert len(open_dataset(Source(str(nyud_tree), ("seg", "depth"), "mini", 64), "train")) == 4


def test_it_has_four_tasks(nyud_tree):
    message = mistake(lambda: read(nyud_tree, tasks=("seg", "parts")))
    assert message == "NYUD-v2 has no labels for 'parts': choose --tasks among seg, normals, edge, depth"


def text(content):
    return lambda path: path.write_text(content)


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def npy(array):
    return lambda path: np.save(path, array)


def png(array):
    return lambda path: Image.fromarray(array).save(path)


def pickled(path):
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


FLOATS = np.ones(SHAPE, np.float32)
DAMAGE = {
    "a list with another word": ("gt_sets", "train.txt", text("../0001\n"), "not an image id such as 0001"),
    "an empty list": ("gt_sets", "train.txt", text("\n"), "lists no image"),
    "a torn photo": ("images", HURT, truncated, "cannot be read"),
    "a torn segmentation": ("segmentation", HURT, truncated, "cannot be read"),
    "class 41": ("segmentation", HURT, png(np.full(SHAPE, 41, np.uint8)), "holds 41, which is no class 1..40 nor 0"),
    "colours": ("segmentation", HURT, png(np.zeros((*SHAPE, 3), np.uint8)), "mode RGB"),
    "torn depth": ("depth", HURT, truncated, "cannot be read"),
    "code": ("depth", HURT, pickled, "cannot be read"),
    "another photo's depth": ("depth", HURT, npy(np.ones((48, 36), np.float32)), "not the same picture rescaled"),
    "millimetres": ("depth", HURT, npy(3000 * FLOATS), "from 3000 to 3000, which are no metres"),
    "whole numbers": ("depth", HURT, npy(np.ones(SHAPE, np.uint16)), "holds uint16 (36, 48), not floats on 2 axes"),
    "negative depth": ("depth", HURT, npy(-FLOATS), "from -1 to -1, which are no metres"),
    "depth that is no number": ("depth", HURT, npy(np.nan * FLOATS), "numbers that are not finite"),
    "depth with colours": ("depth", HURT, npy(np.ones((*SHAPE, 3))), "holds float64 (36, 48, 3), not floats on 2 axes"),
}
OF_NPY = {
    "flat normals": ("normals", HURT, npy(FLOATS), "holds float32 (36, 48), not floats on 3 axes"),
    "two numbers": ("normals", HURT, npy(np.ones((*SHAPE, 2), np.float32)), "2 numbers per pixel"),
    "grey levels": ("edge", HURT, npy(255 * FLOATS), "edges from 255 to 255, not 0..1"),
}
OF_PNG = {
    "grey normals": ("normals", HURT, png(np.zeros(SHAPE, np.uint8)), "mode L"),
    "coloured edges": ("edge", HURT, png(np.zeros((*SHAPE, 3), np.uint8)), "mode RGB"),
}


def hurt(root, folder, name, damage):
    (path,) = [path for path in (root / folder).iterdir() if path.name == name or path.stem == name]
    damage(path)
    return path


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(case, nyud_copy):
    folder, name, damage, problem = DAMAGE[case]
    path = hurt(nyud_copy, folder, name, damage)
    message = mistake(lambda: read(nyud_copy)[0, 0])
    assert message.startswith(str(path)) and problem in message


@pytest.mark.parametrize(
    ("layout", "case"), [*(("npy", case) for case in OF_NPY), *(("png", case) for case in OF_PNG)], indirect=["layout"]
)
def test_damage_of_one_release_is_one_line(case, layout, nyud_copy):
    folder, name, damage, problem = (OF_NPY | OF_PNG)[case]
    path = hurt(nyud_copy, folder, name, damage)
    message = mistake(lambda: read(nyud_copy)[0, 0])
    assert message.startswith(str(path)) and problem in message


@pytest.mark.parametrize("folder", ["images", "depth", "normals"])
def test_a_missing_file_is_named(folder, nyud_copy):
    path = hurt(nyud_copy, folder, HURT, os.unlink)
    assert mistake(lambda: read(nyud_copy)).startswith(f"{path} does not exist (1 ")


def test_images_with_a_fault_may_be_skipped_and_labels_be_partial(nyud_copy):
    hurt(nyud_copy, "depth", HURT, truncated)
    dataset = read(nyud_copy, skip_bad=True)
    assert dataset.ids == ("0002", "0003", "0004") and len(dataset.skipped) == 1
    hurt(nyud_copy, "depth", HURT, os.unlink)
    assert read(nyud_copy, partial_labels=True).with_label("depth") == ["0002", "0003", "0004"]


def test_a_photo_larger_than_the_canvas_names_the_height_that_holds_it(nyud_tree):
    dataset = TreeDataSet(open_tree(nyud_tree), "val", TASKS, build_protocol("nyud_invpt", 35), 0)
    message = mistake(lambda: dataset[0, 0])
    assert "48 x 36 pixels does not fit into 45 x 35" in message and "an image size of at least 42" in message
