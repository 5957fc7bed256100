"""Which images a split has: ids with folders, safe ones only, and images divided without lists."""

import shutil

import pytest

from kernels import UserError
from train.datasets.base import open_tree
from train.datasets.files import Access, TreeDataSet
from train.datasets.splits import IMAGE_ID, divide, find_ids, read_ids
from train.protocols import build_protocol

IDS = [f"{city}/{number:03d}" for city in ("aachen", "ulm") for number in range(20)]


def mistake(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("image_id", ["2008_000008", "aachen/aachen_000000_000019", "a/b/c-d"])
def test_ids_may_have_folders(image_id):
    assert IMAGE_ID.fullmatch(image_id)


@pytest.mark.parametrize(
    "image_id", ["../0001", "a/../b", "/etc/passwd", "a/", "a//b", "./a", "a\\b", "", "{}", "a.b", "~/a", "C:/a", "a\n"]
)
def test_no_id_leads_out_of_its_folder(image_id, tmp_path):
    assert not IMAGE_ID.fullmatch(image_id)
    if image_id.strip() == image_id != "":
        (tmp_path / "train.txt").write_text(f"0001\n{image_id}\n")
        message = mistake(read_ids, tmp_path / "train.txt", "2008_000008")
        assert message.endswith("which is not an image id such as 2008_000008: correct the list")


def test_all_photos_are_found_in_sub_folders_and_linked_ones(tmp_path):
    for name in ("a.jpg", "city/b.jpg", "city/c.png", ".d.jpg", "city/._e.jpg", ".trash/f.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    (tmp_path / "far").mkdir()
    (tmp_path / "far/g.jpg").touch()
    (tmp_path / "images/linked").symlink_to(tmp_path / "far")
    (tmp_path / "images/city/again").symlink_to(tmp_path / "images")  # without end
    assert find_ids(tmp_path, "images/{}.jpg") == ["a", "city/b", "linked/g"]
    (tmp_path / "images/a photo.jpg").touch()
    assert mistake(find_ids, tmp_path, "images/{}.jpg").startswith(f"{tmp_path}/images/a photo.jpg has a name of other")
    (tmp_path / "empty").mkdir()
    assert "holds no photo *.jpg" in mistake(find_ids, tmp_path, "empty/{}.jpg")


def test_a_share_is_chosen_by_id_and_seed_alone():
    for split in ("train", "val"):
        assert divide(IDS, "0.25", split) == divide(IDS, ".25:0", split)
        assert sorted(divide(IDS[::-1], "0.25", split)) == divide(IDS, "0.25", split)
    train, val = divide(IDS, "0.25", "train"), divide(IDS, "0.25", "val")
    assert len(val) == 10 and sorted(train + val) == IDS and val == sorted(val)
    assert divide(IDS, "0.25:1", "val") != val


def test_a_file_lists_the_images_of_val(tmp_path):
    (tmp_path / "val.txt").write_text(f"{IDS[3]}\n{IDS[21]}\n")
    assert divide(IDS, str(tmp_path / "val.txt"), "val") == [IDS[3], IDS[21]]
    assert divide(IDS, str(tmp_path / "val.txt"), "train") == [one for one in IDS if one not in (IDS[3], IDS[21])]


@pytest.mark.parametrize(
    ("val_images", "split", "message"),
    [
        ("0.001", "val", "--val-images 0.001 leaves none of 40 images in val: choose another"),
        ("1.5", "val", "--val-images 1.5 is neither a share such as 0.1 or 0.1:7 nor a file of ids: give one"),
        (
            "/no/such",
            "val",
            "--val-images /no/such is neither a share such as 0.1 or 0.1:7 nor a file of ids: give one",
        ),
        ("0.5", "test", "--val-images divides images into train and val: there is no split 'test'"),
        ("FILE", "val", "FILE lists bonn/001, which has no photo (1 of 2): correct the list"),
    ],
)
def test_a_wrong_division_is_one_line(val_images, split, message, tmp_path):
    path = tmp_path / "val.txt"
    path.write_text(f"{IDS[0]}\nbonn/001\n")
    given = val_images.replace("FILE", str(path))
    assert mistake(divide, IDS, given, split) == message.replace("FILE", str(path))


@pytest.fixture
def unlisted(pascal_copy):
    """A tree without lists of images, of which four lie in a sub-folder of every label folder."""
    (pascal_copy / "ImageSets/Context/train.txt").unlink()
    for photo in sorted((pascal_copy / "JPEGImages").iterdir())[:4]:
        for file in sorted(pascal_copy.rglob(f"{photo.stem}.*")):
            (file.parent / "first").mkdir(exist_ok=True)
            shutil.move(file, file.parent / "first" / file.name)
    return pascal_copy


def read(root, split, val_images, tasks=("parts", "normals", "edge")):
    return TreeDataSet(open_tree(root, val_images), split, tasks, build_protocol("mini", 32), 0, Access())


def test_a_tree_without_lists_is_divided(unlisted, tmp_path):
    train, val = (read(unlisted, split, "0.25") for split in ("train", "val"))
    assert (len(train), len(val)) == (9, 3) and train[0, 0]["image"].shape == (32, 32, 3)
    assert len([one for one in (*train.ids, *val.ids) if one.startswith("first/2008_")]) == 4
    message = mistake(open_tree(unlisted).ids, "train")
    assert message.startswith(f"{unlisted}/ImageSets/Context/train.txt does not exist: ")
    assert message.endswith("or divide the images without lists by --val-images")


def test_lists_of_persons_hold_for_images_divided_anew(pascal_copy, tmp_path):
    """2008_000001, of the split train, has no person: parts are not scored on it in val either."""
    (tmp_path / "val.txt").write_text("2008_000000\n2008_000001\n")
    val = read(pascal_copy, "val", str(tmp_path / "val.txt"))
    assert val.ids == ("2008_000000", "2008_000001")
    assert val.labelled("parts") == ["2008_000000"] and val.labelled("edge") == list(val.ids)
