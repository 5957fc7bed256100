"""PASCAL_MT in protocol mini: each rule of the labels, the layout, the flip, the groups and the user's mistakes.

test_labels.py has the labels as they are stored, test_damage.py every kind of damaged file.
"""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import loadmat, savemat
from skimage.morphology import thin

from kernels.errors import UserError
from train.datasets.base import fingerprint, open_tree
from train.datasets.files import Access, TreeDataSet, group_by_tasks
from train.datasets.pascal.labels import valid_classes
from train.datasets.pascal.tree import PascalTree
from train.evaluation.results import describe_set
from train.protocols import build_protocol
from train.protocols.square import centres, resize_nearest
from train.tasks import DEFAULT_TASKS

SIZE = 32
# images of the fabricated tree, see conftest.py
CROWD, NO_PERSON, NO_PARTS, CONTEXT_ONLY, SPECK, ALL_PARTS = (f"2008_{n:06d}" for n in range(6))
PIL_NEAREST = Image.Resampling.NEAREST


def read(root, tasks=DEFAULT_TASKS, split="all", protocol="mini", size=SIZE, seed=0, **access):
    return TreeDataSet(open_tree(root), split, tasks, build_protocol(protocol, size), seed, Access(**access))


@pytest.mark.parametrize("folder", ["JPEGImages", "semseg/VOC12", "human_parts", "pascal-context/trainval"])
def test_a_fingerprint_covers_what_files_hold(folder, pascal_copy):
    """But not what belongs to other tasks, nor where the tree is."""
    before = read(pascal_copy, ("seg", "normals"))
    assert fingerprint(before)
    file = next((pascal_copy / folder).iterdir())
    file.write_bytes(file.read_bytes() + b" ")
    after = read(pascal_copy, ("seg", "normals"))
    assert (fingerprint(after) == fingerprint(before)) == (folder == "human_parts")
    told = [describe_set(data, ("seg",), "all", "")["labelled"]["seg"] for data in (before, after)]
    assert (told[0] == told[1]) == (folder in ("human_parts", "pascal-context/trainval"))


def item(root, id, *tasks, **options):
    dataset = read(root, tasks, **options)
    return dataset[dataset.ids.index(id), 0]


def nearest(array, size=SIZE):
    """Pillow's own nearest resize of an integer array, band by band."""
    if array.ndim == 3:
        return np.stack([nearest(array[..., band], size) for band in range(array.shape[2])], axis=-1)
    return np.asarray(Image.fromarray(array.astype(np.int32)).resize((size, size), PIL_NEAREST)).astype(array.dtype)


def stored(path):
    return np.asarray(Image.open(path))


def label_map(root, id):
    return loadmat(root / f"pascal-context/trainval/{id}.mat")["LabelMap"]


def unit_normals(rgb):
    """uint8 (H, W, 3) -> float64 (3, H, W) of length 1, void not yet considered."""
    vectors = rgb.transpose(2, 0, 1) / 255 * 2 - 1
    return vectors / np.sqrt((vectors**2).sum(axis=0))


def edges(labels):
    """thin(|Laplacian| > 0) with the border reflected about the outermost pixels' centres."""
    p = np.pad(labels.astype(np.int64), 1, mode="reflect")
    return thin(p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * p[1:-1, 1:-1] != 0)


# Photos and the resize


def test_photo_is_rgb_and_bilinear_with_antialiasing(pascal_tree):
    photo = item(pascal_tree, CROWD, "sal")["image"]
    expected = Image.open(pascal_tree / f"JPEGImages/{CROWD}.jpg").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    assert photo.dtype == np.uint8
    np.testing.assert_array_equal(photo, np.asarray(expected))


def test_a_grey_photo_becomes_rgb(pascal_copy):
    Image.fromarray(np.full((37, 50), 77, np.uint8)).save(pascal_copy / f"JPEGImages/{CROWD}.jpg")
    np.testing.assert_array_equal(item(pascal_copy, CROWD, "sal")["image"], np.full((SIZE, SIZE, 3), 77))


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 600))
def test_nearest_picks_the_pixels_that_pillow_picks(length, size):
    line = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    np.testing.assert_array_equal(centres(length, size), np.asarray(line.resize((size, 1), PIL_NEAREST))[0])


@pytest.mark.parametrize("size", [96, 224, 384, 448])
def test_nearest_breaks_ties_as_pillow_does(size):
    line = Image.fromarray(np.arange(256, dtype=np.int32)[None])
    np.testing.assert_array_equal(centres(256, size), np.asarray(line.resize((size, 1), PIL_NEAREST))[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32])
@pytest.mark.parametrize("bands", [(), (3,)])
def test_nearest_works_for_any_dtype_and_bands(dtype, bands):
    array = np.random.default_rng(0).integers(0, 200, (37, 50, *bands)).astype(dtype)
    resized = resize_nearest(array, SIZE)
    assert resized.dtype == dtype
    np.testing.assert_array_equal(resized, nearest(array))


# seg


def test_seg_prefers_voc12_with_palette_indices_and_its_void_border(pascal_tree):
    label = item(pascal_tree, CROWD, "seg")["seg"]
    palette = Image.open(pascal_tree / f"semseg/VOC12/{CROWD}.png")
    assert palette.mode == "P" and label.dtype == np.uint8 and (label == 255).any()
    np.testing.assert_array_equal(label, np.asarray(palette.resize((SIZE, SIZE), PIL_NEAREST)))


def test_seg_falls_back_to_pascal_context(pascal_tree):
    label = item(pascal_tree, CONTEXT_ONLY, "seg")["seg"]
    np.testing.assert_array_equal(label, nearest(stored(pascal_tree / f"semseg/pascal-context/{CONTEXT_ONLY}.png")))


def test_classes_are_named_in_the_order_of_voc():
    seg, parts = PascalTree.classes["seg"], PascalTree.classes["parts"]
    assert (len(seg), seg[0], seg[1], seg[15], seg[20]) == (21, "background", "aeroplane", "person", "tvmonitor")
    assert parts == ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")


# parts


def test_parts_of_persons_are_painted_in_file_order_and_those_of_a_dog_are_not(pascal_tree):
    objects = loadmat(pascal_tree / f"human_parts/{CROWD}.mat")["anno"][0][0][1][0]
    expected = np.zeros(objects[0][2].shape, np.uint8)
    for person, part, value in ((0, 0, 2), (0, 1, 1), (3, 0, 4), (3, 1, 6)):  # torso, head, hand, foot
        expected[objects[person][3][0][part][1] > 0] = value
    label = item(pascal_tree, CROWD, "parts")["parts"]
    assert label.dtype == np.uint8 and set(np.unique(label)) == {0, 1, 2, 4, 6}
    np.testing.assert_array_equal(label, nearest(expected))


def test_the_24_parts_of_a_person_form_six_groups(pascal_tree):
    label = item(pascal_tree, ALL_PARTS, "parts", size=96)["parts"]
    cells = label[12::24, 8::16]  # the grid has 4 x 6 cells, in the order of PARTS_IN_A_GRID
    head, torso, arms, legs = [1] * 10, [2] * 2, [3] * 2 + [4] * 4, [5] * 2 + [6] * 4
    assert cells.ravel().tolist() == head + torso + arms + legs


@pytest.mark.parametrize("id", [NO_PERSON, NO_PARTS, SPECK])
def test_parts_are_void_without_person_without_parts_and_where_the_resize_loses_them(pascal_tree, id):
    assert (item(pascal_tree, id, "seg", "parts")["parts"] == 255).all()


def test_a_small_part_counts_where_the_resize_keeps_it(pascal_tree):
    label = item(pascal_tree, SPECK, "parts", size=300)["parts"]
    assert set(np.unique(label)) == {0, 1}


def test_an_anno_without_objects_is_void(pascal_copy):
    anno = np.empty((1, 1), [("imname", object), ("objects", object)])
    anno[0, 0] = (CROWD, np.zeros((0, 0)))
    savemat(pascal_copy / f"human_parts/{CROWD}.mat", {"anno": anno})
    assert (item(pascal_copy, CROWD, "parts")["parts"] == 255).all()


# sal


def test_sal_is_one_above_one_half(pascal_tree):
    label = item(pascal_tree, CROWD, "sal")["sal"]
    grey = nearest(stored(pascal_tree / f"sal_distill/{CROWD}.png"))
    assert label.dtype == np.uint8 and {127, 128} <= set(np.unique(grey))
    np.testing.assert_array_equal(label, grey >= 128)


# normals


def test_170_classes_have_valid_normals():
    assert len(valid_classes()) == 170
    assert {427, 23} <= set(valid_classes())  # tvmonitor, bicycle


def test_normals_are_unit_vectors_where_the_label_map_is_valid_and_the_stored_triple_is_not_zero(pascal_tree):
    label = item(pascal_tree, CROWD, "normals")["normals"]
    rgb = nearest(stored(pascal_tree / f"normals_distill/{CROWD}.png"))
    trusted = np.isin(nearest(label_map(pascal_tree, CROWD)), valid_classes())
    valid = trusted & (rgb != 0).any(axis=-1)
    assert label.shape == (3, SIZE, SIZE) and label.dtype == np.float32
    assert 0 < valid.sum() < trusted.sum() < SIZE**2
    np.testing.assert_allclose(label, unit_normals(rgb) * valid, atol=1e-6)
    assert not label[:, ~valid].any()


def test_without_label_map_every_stored_normal_counts(pascal_copy):
    (pascal_copy / f"pascal-context/trainval/{CROWD}.mat").unlink()
    label = item(pascal_copy, CROWD, "normals")["normals"]
    rgb = nearest(stored(pascal_copy / f"normals_distill/{CROWD}.png"))
    np.testing.assert_allclose(np.linalg.norm(label, axis=0), (rgb != 0).any(axis=-1), atol=1e-6)


# edge


def test_edges_are_derived_from_the_resized_label_map(pascal_tree):
    label = item(pascal_tree, CROWD, "edge")["edge"]
    assert label.dtype == np.uint8 and label.any()
    np.testing.assert_array_equal(label, edges(nearest(label_map(pascal_tree, CROWD))))


# Flip


def test_train_is_flipped_with_probability_one_half_by_seed_epoch_and_index(pascal_tree):
    plain, train, again = read(pascal_tree), *(read(pascal_tree, split="train", seed=3) for _ in range(2))
    keys = [(index, epoch) for epoch in range(5) for index in range(len(train))]
    flipped = [not np.array_equal(train[key]["image"], plain[key]["image"]) for key in keys]
    assert flipped == [np.random.default_rng([3, epoch, index]).random() < 0.5 for index, epoch in keys]
    assert flipped == [not np.array_equal(again[key]["image"], plain[key]["image"]) for key in keys[::-1]][::-1]
    assert 0.25 < np.mean(flipped) < 0.75


def test_a_flip_mirrors_the_photo_and_every_label_and_turns_the_normals_in_x(pascal_tree):
    plain, train = read(pascal_tree), read(pascal_tree, split="train")
    key = next((0, epoch) for epoch in range(20) if np.random.default_rng([0, epoch, 0]).random() < 0.5)
    before, after = plain[key], train[key]
    np.testing.assert_array_equal(after["image"], before["image"][:, ::-1])
    for task in ("seg", "parts", "sal", "edge"):
        np.testing.assert_array_equal(after[task], before[task][:, ::-1])
    x, y, z = before["normals"]
    np.testing.assert_array_equal(after["normals"], np.stack([-x, y, z])[..., ::-1])
    assert {task: label.dtype for task, label in after.items()} == {task: label.dtype for task, label in before.items()}


def test_val_is_never_flipped(pascal_tree):
    val, plain = read(pascal_tree, split="val"), read(pascal_tree)
    for epoch in range(8):
        np.testing.assert_array_equal(val[0, epoch]["image"], plain[plain.ids.index(val.ids[0]), 0]["image"])


@pytest.mark.parametrize("protocol", ["invpt", "mtinet", "ase", "mini"])
def test_a_sample_is_a_function_of_seed_epoch_and_index(pascal_tree, protocol):
    """Whatever was read before; the rng of an item is that of (seed, epoch, index)."""
    train, again = (read(pascal_tree, split="train", protocol=protocol, size=320, seed=3) for _ in range(2))
    once, others = train[5, 1], [train[5, epoch]["image"] for epoch in range(2, 12)]
    again[2, 1]
    for name, array in again[5, 1].items():
        np.testing.assert_array_equal(array, once[name])
    assert any(not np.array_equal(once["image"], other) for other in others)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_crop_is_guided_by_a_segmentation_that_is_no_task(pascal_tree, split):
    """Family B: the same crop with and without seg among the tasks, and no label that was not asked for."""
    alone, both = (read(pascal_tree, tasks, split, "invpt", 320) for tasks in (("sal",), ("seg", "sal")))
    for index in range(len(alone)):
        sample, guided = alone[index, 4], both[index, 4]
        assert set(sample) == {"image", "sal"}
        np.testing.assert_array_equal(sample["sal"], guided["sal"])


def test_a_guide_that_does_not_exist_is_not_missed(pascal_copy):
    for folder in ("VOC12", "pascal-context"):
        for path in (pascal_copy / "semseg" / folder).iterdir():
            path.unlink()
    assert set(read(pascal_copy, ("sal",), "train", "invpt", 320)[0, 0]) == {"image", "sal"}


def test_a_photo_that_the_protocol_cannot_take_is_named(pascal_tree):
    dataset = read(pascal_tree, ("sal",), "val", "invpt", 16)
    assert mistake(lambda: dataset[0, 0]).startswith(f"{pascal_tree}/JPEGImages/{dataset.ids[0]}.jpg: a photo of ")


# Layout, groups, partial labels


def test_the_data_root_is_the_tree_or_the_folder_that_holds_it(pascal_tree):
    assert read(pascal_tree.parent).tree.root == read(str(pascal_tree)).tree.root == pascal_tree


def test_ids_come_stripped_and_in_the_order_of_the_list(pascal_copy):
    (pascal_copy / "ImageSets/Context/odd.txt").write_text(f"{NO_PARTS} \r\n{CROWD}\r\n\n")
    assert read(pascal_copy, split="odd").ids == (NO_PARTS, CROWD)


def test_reading_leaves_the_tree_as_it_was(pascal_tree):
    def state():
        return {path: path.stat().st_mtime_ns for path in [pascal_tree, *pascal_tree.rglob("*")]}

    before = state()
    dataset = read(pascal_tree, split="train")
    for index in range(len(dataset)):
        dataset[index, 0]
    assert state() == before


def test_a_fully_labelled_set_is_one_group(pascal_tree):
    dataset = read(pascal_tree)
    assert len(dataset) == 12 and [group.tolist() for group in dataset.groups] == [list(range(12))]
    assert set(dataset[0, 0]) == {"image", *DEFAULT_TASKS}


def test_parts_alone_keeps_the_images_with_persons(pascal_copy):
    assert set(read(pascal_copy, ("seg",)).ids) - set(read(pascal_copy, ("parts",)).ids) == {NO_PERSON}
    (pascal_copy / "ImageSets/Parts/all.txt").unlink()
    assert len(read(pascal_copy, ("parts",))) == 12


def test_partial_labels_group_images_by_their_tasks_and_drop_those_without_any(pascal_copy):
    for n, lost in {0: "parts", 1: "parts", 3: "seg parts", 7: "seg"}.items():
        for task in lost.split():
            folders = {"seg": ["semseg/VOC12", "semseg/pascal-context"], "parts": ["human_parts"]}[task]
            for folder in folders:
                for path in (pascal_copy / folder).glob(f"2008_{n:06d}.*"):
                    path.unlink()
    dataset = read(pascal_copy, ("seg", "parts"), split="train", partial_labels=True)
    groups = [[dataset.ids[index][-1] for index in group] for group in dataset.groups]
    assert groups == [["0", "1"], ["2", "4", "5", "6"], ["7"]]  # seg, seg and parts, parts; image 3 is gone
    assert len(dataset) == 7
    assert [set(dataset[group[0], 0]) - {"image"} for group in dataset.groups] == [{"seg"}, {"seg", "parts"}, {"parts"}]


def test_a_pascal_context_semseg_alone_makes_an_image_labelled_for_seg(pascal_tree):
    dataset = read(pascal_tree, ("seg",), partial_labels=True)
    assert CONTEXT_ONLY in dataset.ids


@settings(deadline=None)
@given(st.lists(st.sets(st.sampled_from(DEFAULT_TASKS), min_size=1), min_size=1, max_size=40))
def test_groups_are_a_partition_into_equally_labelled_images(labelled):
    labelled = [tuple(task for task in DEFAULT_TASKS if task in tasks) for tasks in labelled]
    groups = group_by_tasks(labelled)
    assert sorted(np.concatenate(groups)) == list(range(len(labelled)))
    kinds = [{labelled[index] for index in group} for group in groups]
    assert all(len(kind) == 1 for kind in kinds) and len(set.union(*kinds)) == len(groups)


# A user's mistakes


def mistake(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_root_that_is_no_tree(tmp_path):
    assert f"{tmp_path} holds no folder JPEGImages (PASCAL-Context)" in mistake(lambda: read(tmp_path))
    assert f"{tmp_path / 'no'} is not a folder: give" in mistake(lambda: read(tmp_path / "no"))


def test_a_split_without_list(pascal_tree):
    message = mistake(lambda: read(pascal_tree, split="test"))
    assert f"{pascal_tree}/ImageSets/Context/test.txt does not exist: name a split" in message


def test_a_missing_photo(pascal_copy):
    (pascal_copy / f"JPEGImages/{NO_PARTS}.jpg").unlink()
    message = mistake(lambda: read(pascal_copy, split="train"))
    assert f"{pascal_copy}/JPEGImages/{NO_PARTS}.jpg does not exist (1 of 8 photos are missing): restore" in message


def test_missing_labels_name_the_first_count_them_all_and_suggest_partial_labels(pascal_copy):
    for id in (NO_PARTS, SPECK):
        (pascal_copy / f"semseg/VOC12/{id}.png").unlink()
        (pascal_copy / f"semseg/pascal-context/{id}.png").unlink()
    message = mistake(lambda: read(pascal_copy, ("seg", "sal")))
    assert f"{pascal_copy}/semseg/VOC12/{NO_PARTS}.png does not exist (2 label files" in message
    assert "--partial-labels" in message


def test_a_missing_folder_of_labels(pascal_copy):
    for path in (pascal_copy / "normals_distill").iterdir():
        path.unlink()
    (pascal_copy / "normals_distill").rmdir()
    assert f"{pascal_copy}/normals_distill/{CROWD}.png does not exist (12 label" in mistake(lambda: read(pascal_copy))
    message = mistake(lambda: read(pascal_copy, partial_labels=True))
    assert f"{pascal_copy}/normals_distill has no label for 'normals' in split 'all': add" in message


@pytest.mark.parametrize(
    "task, file",
    [
        ("sal", f"JPEGImages/{CROWD}.jpg"),
        ("seg", f"semseg/VOC12/{CROWD}.png"),
        ("parts", f"human_parts/{CROWD}.mat"),
        ("sal", f"sal_distill/{CROWD}.png"),
        ("normals", f"normals_distill/{CROWD}.png"),
        ("normals", f"pascal-context/trainval/{CROWD}.mat"),
        ("edge", f"pascal-context/trainval/{CROWD}.mat"),
    ],
)
@pytest.mark.parametrize("kept", [0, 20, 0.5, 0.9])
def test_a_truncated_file(pascal_copy, task, file, kept):
    path = pascal_copy / file
    os.truncate(path, int(kept * path.stat().st_size) if kept < 1 else kept)
    assert mistake(lambda: item(pascal_copy, CROWD, task)).startswith(f"{path} cannot be read (")


def test_a_damaged_list_of_persons(pascal_copy):
    path = pascal_copy / "ImageSets/Parts/all.txt"
    path.write_text(path.read_text()[:-1])
    assert mistake(lambda: read(pascal_copy, ("parts",))).startswith(f"{path} cannot be read (JSONDecodeError")


# Real images


@pytest.mark.parametrize("split, sizes", [("train", [750, 300, 75, 300]), ("val", [250, 80, 25, 200])])
def test_groups_of_pascal_mini(pascal_mini, split, sizes):
    dataset = read(pascal_mini, split=split, partial_labels=True)
    tasks = [tuple(dataset.images[group[0]].labels) for group in dataset.groups]
    assert tasks == [("seg", "sal"), ("parts", "sal"), ("normals",), ("edge",)]
    assert [len(group) for group in dataset.groups] == sizes


def second_reading(root, id, task, size):
    """The label read again, with Pillow's resize and none of the code under test."""
    if task == "seg":
        return nearest(stored(root / f"semseg/VOC12/{id}.png"), size)
    if task == "sal":
        return nearest(stored(root / f"sal_distill/{id}.png"), size) > 127
    if task == "edge":
        return edges(nearest(label_map(root, id), size))
    if task == "normals":
        rgb = nearest(stored(root / f"normals_distill/{id}.png"), size)
        return unit_normals(rgb) * (rgb.sum(axis=-1) > 0)
    groups = [
        "",
        "head hair",
        "torso neck",
        "luarm ruarm",
        "llarm rlarm lhand rhand",
        "luleg ruleg",
        "llleg rlleg lfoot rfoot",
    ]
    objects = loadmat(root / f"human_parts/{id}.mat")["anno"][0][0][1][0]
    label = np.zeros(objects[0][2].shape, np.uint8)
    for name, mask in (part for thing in objects if thing[1][0][0] == 15 and len(thing[3]) for part in thing[3][0]):
        label[mask == 1] = next(i for i, names in enumerate(groups) if name[0] in names.split())
    return nearest(label, size)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [96, 224])
def test_pascal_mini_agrees_with_a_second_reading_pixel_for_pixel(pascal_mini, split, size):
    dataset = read(pascal_mini, split=split, size=size, partial_labels=True)
    for index in [index for group in dataset.groups for index in group[:: len(group) // 4]]:
        id, sample = dataset.ids[index], dataset[index, 0]
        mirrored = split == "train" and np.random.default_rng([0, 0, index]).random() < 0.5
        photo = Image.open(pascal_mini / f"JPEGImages/{id}.jpg").convert("RGB")
        photo = np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(sample.pop("image"), photo[:, ::-1] if mirrored else photo)
        for task, label in sample.items():
            expected = second_reading(pascal_mini, id, task, size)
            if mirrored:
                expected = expected[..., ::-1] * (np.array([-1, 1, 1])[:, None, None] if task == "normals" else 1)
            np.testing.assert_allclose(label, expected, atol=1e-6 if task == "normals" else 0, err_msg=f"{id} {task}")
