"""The four layouts hold one data set, and a list that is wrong is never read as if it were right."""

import shutil

import numpy as np
import pytest

from kernels import UserError
from train.datasets.base import open_tree
from train.datasets.files import TreeDataSet
from train.protocols import build_protocol
from train.tasks import DEFAULT_TASKS

RENAMED = {
    "human_parts": "PascalParts",
    "sal_distill": "SaliencyDistill",
    "normals_distill": "NormalsDistill",
    "pascal-context/trainval": "Context/trainval",
    "semseg/pascal-context": "SemanticSegmentation/Context",
}


def lay_out(layout, source, folder):
    """The official tree ``source`` as users of another release have it."""
    root = folder / ("PASCAL_MT" if layout in "AC" else "PASCALContext")
    shutil.copytree(source, root)
    if layout == "B'":
        (root / "json").mkdir()
        (root / "json/nyu_classes.json").write_text("{}")
    if layout == "C":  # one folder of segmentations, VOC12's where there are any
        for path in (root / "semseg/VOC12").iterdir():
            path.replace(root / "semseg/pascal-context" / path.name)
        for old, new in RENAMED.items():
            (root / new).parent.mkdir(parents=True, exist_ok=True)
            (root / old).rename(root / new)
        shutil.rmtree(root / "semseg")
        shutil.rmtree(root / "pascal-context")
    return root


@pytest.mark.parametrize("layout", ["A", "B", "B'", "C"])
@pytest.mark.parametrize("given", ["tree", "folder around it"])
def test_every_layout_gives_identical_samples(layout, given, pascal_tree, tmp_path):
    root = lay_out(layout, pascal_tree, tmp_path)
    official = TreeDataSet(open_tree(pascal_tree), "all", DEFAULT_TASKS, build_protocol("mini", 32), 0)
    dataset = TreeDataSet(
        open_tree(root if given == "tree" else root.parent), "all", DEFAULT_TASKS, build_protocol("mini", 32), 0
    )
    assert str(dataset.tree) == f"layout {layout} at {root}"
    assert dataset.ids == official.ids
    for index in range(len(official)):
        ours, theirs = dataset[index, 0], official[index, 0]
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", ["A", "C"])
def test_what_strays_into_a_tree_does_not_turn_its_layout(layout, pascal_tree, tmp_path):
    root = lay_out(layout, pascal_tree, tmp_path)
    for folder in (*RENAMED, *RENAMED.values()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "._2008_000000.png").touch()
    for folder in ("sal_distill", "SaliencyDistill"):
        (root / folder / "0.png").touch()
    assert open_tree(root).layout == layout


def test_detection_names_what_is_missing(pascal_copy):
    shutil.rmtree(pascal_copy / "sal_distill")
    shutil.rmtree(pascal_copy / "semseg" / "VOC12")
    assert str(open_tree(pascal_copy)) == f"layout A at {pascal_copy}, without semseg/VOC12, sal_distill"


@pytest.mark.parametrize("text", ["2008_000000\r\n2008_000001\r\n", " 2008_000000 \n\n\t2008_000001"])
def test_line_ends_and_spaces_around_an_id_do_not_matter(text, pascal_copy):
    (pascal_copy / "ImageSets/Context/train.txt").write_bytes(text.encode())
    assert open_tree(pascal_copy).ids("train") == ["2008_000000", "2008_000001"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2008_000000\n2008_000000\n", "lists 2008_000000 twice"),
        ("../2008_000000\n", "'../2008_000000', which is not an image id"),
        ("/etc/passwd\n", "'/etc/passwd', which is not an image id"),
        ("2008 000000\n", "'2008 000000', which is not an image id"),
        ("2008_000000.jpg\n", "'2008_000000.jpg', which is not an image id"),
        ("\n \n", "lists no image"),
    ],
)
def test_a_wrong_list_is_one_line_with_its_path(text, message, pascal_copy):
    path = pascal_copy / "ImageSets/Context/train.txt"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        open_tree(pascal_copy).ids("train")
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_that_is_no_text_is_one_line_with_its_path(pascal_copy):
    path = pascal_copy / "ImageSets/Context/train.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="train.txt cannot be read"):
        open_tree(pascal_copy).ids("train")
