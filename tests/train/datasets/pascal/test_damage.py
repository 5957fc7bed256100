"""Damage of every kind: one line that names the file or, where that is wished, the image left out. Never a label that
is made up, a traceback or a wait."""

import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from kernels import UserError
from train.datasets import tree
from train.datasets.base import open_tree
from train.datasets.files import Access, TreeDataSet
from train.protocols import build_protocol
from train.tasks import DEFAULT_TASKS
from train.tasks.palette import PALETTE

TRAIN = [f"2008_{n:06d}" for n in range(8)]  # of the fabricated tree, see conftest.py
HURT = TRAIN[0]
SHAPE = (37, 50)
FILES = {
    "photo": f"JPEGImages/{HURT}.jpg",
    "seg": f"semseg/VOC12/{HURT}.png",
    "parts": f"human_parts/{HURT}.mat",
    "sal": f"sal_distill/{HURT}.png",
    "normals": f"normals_distill/{HURT}.png",
    "edge": f"pascal-context/trainval/{HURT}.mat",
}
PNGS = ("seg", "sal", "normals")
CLASSES = np.random.default_rng(0).integers(0, 21, SHAPE, np.uint8)
CONTEXT = 1.0 + 20 * CLASSES


# Damage: what happens to one file, given its path


def truncated(share):
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


def holding(content):
    return lambda path: path.write_bytes(content)


def flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[-40] ^= 4  # in the pixels: IEND and the checksum before it take 16 bytes
    path.write_bytes(content)


def folder(path):
    path.unlink()
    path.mkdir()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def link(target):
    def damage(path):
        path.unlink()
        path.symlink_to(target or path)

    return damage


def image(mode, shape=SHAPE, format="PNG"):
    """A healthy image of another kind."""
    size = shape[::-1]
    return lambda path: Image.new(mode, size).save(path, format)


def pixels(array):
    return lambda path: Image.fromarray(array).save(path)


def renumbered(path):
    """As an optimiser saves a PNG in which only background and persons are left."""
    picture = Image.fromarray((CLASSES == 15).astype(np.uint8), "P")
    picture.putpalette(PALETTE[[0, 15]].tobytes())
    picture.save(path)


def png(path, shape, bits, colour, rows):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", shape[1], shape[0], bits, colour, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def png_of_16_bits(path):
    """RGB, which Pillow opens as if it had 8."""
    png(path, SHAPE, 16, 2, (b"\0" + bytes(6 * SHAPE[1])) * SHAPE[0])


def bomb(path):
    """More pixels than any camera makes, said by a small file."""
    png(path, (20_000, 20_000), 8, 0, b"")


def mat(**variables):
    return lambda path: savemat(path, variables, do_compression=True)


def label_map(value):
    changed = CONTEXT.copy()
    changed[3, 4] = value
    return mat(LabelMap=changed)


def cells(*values):
    """A MATLAB cell array."""
    array = np.empty((1, len(values)), object)
    array[0] = values
    return array


PART = {"part_name": "head", "mask": (CLASSES > 5).astype(np.uint8)}
PERSON = {"class": "person", "class_ind": 15, "mask": np.ones(SHAPE, np.uint8), "parts": PART}


def without(record, field):
    return {name: value for name, value in record.items() if name != field}


def anno(**changes):
    """A person of one part whose struct is healthy but for ``changes``."""
    return mat(anno={"imname": HURT, "objects": PERSON | changes})


def anno_part(**changes):
    return anno(parts=PART | changes)


def structs(*records):
    array = np.empty((1, len(records)), [(name, object) for name in records[0]])
    for i, record in enumerate(records):
        array[0, i] = tuple(record.values())
    return array


EVERY_FILE = {
    "empty": holding(b""),
    "cut after 20 bytes": lambda path: os.truncate(path, 20),
    "cut in half": truncated(0.5),
    "cut at nine tenths": truncated(0.9),
    "text": holding(b"<html>404 Not Found</html>\n" * 9),
    "folder": folder,
    "pipe": pipe,
    "loop of links": link(None),
    "link to nowhere": link("nowhere"),
    "missing": os.unlink,
}
DAMAGE = [(task, name, damage, "") for task in FILES for name, damage in EVERY_FILE.items()]
DAMAGE += [(task, "a bit flipped", flipped_bit, "cannot be read") for task in PNGS]
DAMAGE += [(task, "a bomb", bomb, "DecompressionBomb") for task in ("photo", "sal")]
DAMAGE += [
    (task, f"transposed {task}", image(mode, SHAPE[::-1]), "its photo 50 x 37")
    for task, mode in (("seg", "L"), ("sal", "L"), ("normals", "RGB"))
]
DAMAGE += [
    (task, f"{task} off by one", image(mode, (37, 51)), "is 51 x 37 pixels, its photo 50 x 37")
    for task, mode in (("seg", "P"), ("sal", "L"), ("normals", "RGB"))
]
DAMAGE += [
    ("normals", "16 bits of colour", png_of_16_bits, "not 8 bits"),
    ("photo", "PostScript", holding(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 37\n"), "cannot identify"),
    ("photo", "32 bits of grey", image("I", format="TIFF"), "integers of 32 bits"),
    ("seg", "colours", image("RGB"), "mode RGB, not 8 bits of P or L"),
    ("seg", "one bit", image("1"), "mode 1"),
    ("seg", "a JPEG", image("L", format="JPEG"), "cannot identify"),
    ("seg", "class 21", pixels(np.where(CLASSES == 3, 21, CLASSES).astype(np.uint8)), "holds 21"),
    ("seg", "class 254", pixels(np.where(CLASSES == 3, 254, CLASSES).astype(np.uint8)), "holds 254"),
    ("seg", "renumbered palette", renumbered, "the colour of class 15 at index 1"),
    ("sal", "colours", image("RGB"), "mode RGB"),
    ("sal", "palette", image("P"), "mode P"),
    ("sal", "16 bits", image("I;16"), "mode I;16"),
    ("normals", "grey", image("L"), "mode L"),
    ("normals", "alpha", image("RGBA"), "mode RGBA"),
    ("normals", "16 bits", png_of_16_bits, "not 8 bits of RGB"),
    ("edge", "no LabelMap", mat(labelmap=CONTEXT), "holds no variable 'LabelMap'"),
    ("edge", "HDF5", holding(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n"), "HDF5"),
    ("edge", "bare HDF5", holding(b"\x89HDF\r\n\x1a\n" + bytes(600)), "HDF5"),
    ("edge", "NaN", label_map(np.nan), "other values than the classes 0..459"),
    ("edge", "infinity", label_map(np.inf), "other values"),
    ("edge", "class 460", label_map(460), "other values"),
    ("edge", "class -1", label_map(-1), "other values"),
    ("edge", "class 1.5", label_map(1.5), "other values"),
    ("edge", "three dimensions", mat(LabelMap=np.ones((*SHAPE, 2))), "not a matrix"),
    ("edge", "nothing", mat(LabelMap=np.zeros((0, 0))), "not a matrix"),
    ("edge", "text in it", mat(LabelMap="dog"), "not a matrix"),
    ("edge", "complex numbers", mat(LabelMap=CONTEXT * 1j), "complex"),
    ("edge", "off by one", mat(LabelMap=CONTEXT[:-1]), "is 50 x 36 pixels, its photo 50 x 37"),
    ("edge", "transposed", mat(LabelMap=CONTEXT.T), "is 37 x 50 pixels"),
    ("parts", "no anno", mat(annotation=1), "holds no variable 'anno'"),
    ("parts", "HDF5", holding(b"MATLAB 7.3 MAT-file".ljust(600)), "HDF5"),
    ("parts", "anno a number", mat(anno=3), "anno is not a struct"),
    ("parts", "anno empty", mat(anno=np.zeros((0, 0))), "anno has 0 records"),
    ("parts", "anno twice", mat(anno=structs({"objects": PERSON}, {"objects": PERSON})), "anno has 2 records"),
    ("parts", "no objects", mat(anno={"imname": HURT}), "anno has no field 'objects'"),
    ("parts", "objects text", mat(anno={"objects": "none"}), "objects is not a struct"),
    ("parts", "objects in cells", mat(anno={"objects": cells(PERSON)}), "objects is not a struct"),
    ("parts", "no class", mat(anno={"objects": without(PERSON, "class_ind")}), "objects has no field 'class_ind'"),
    ("parts", "no mask", mat(anno={"objects": without(PERSON, "mask")}), "objects has no field 'mask'"),
    ("parts", "no parts", mat(anno={"objects": without(PERSON, "parts")}), "objects has no field 'parts'"),
    ("parts", "two classes", anno(class_ind=[15, 15]), "class_ind is not one whole number"),
    ("parts", "class in words", anno(class_ind="person"), "class_ind is not one"),
    ("parts", "no class given", anno(class_ind=np.zeros((0, 0))), "class_ind is not one"),
    ("parts", "class NaN", anno(class_ind=np.nan), "class_ind is not one"),
    ("parts", "parts a number", anno(parts=4), "parts is not a struct"),
    ("parts", "part without name", anno(parts=without(PART, "part_name")), "parts has no field 'part_name'"),
    ("parts", "part without mask", anno(parts=without(PART, "mask")), "parts has no field 'mask'"),
    ("parts", "unknown part", anno_part(part_name="tail"), "a part named 'tail'"),
    ("parts", "part named 7", anno_part(part_name=7), "a part named array([[7]])"),
    ("parts", "mask of 0 and 255", anno_part(mask=255 * PART["mask"]), "not a matrix of 0 and 1"),
    ("parts", "mask NaN", anno_part(mask=np.full(SHAPE, np.nan)), "not a matrix of 0 and 1"),
    ("parts", "mask empty", anno_part(mask=np.zeros((0, 0))), "not a matrix"),
    ("parts", "mask of three dimensions", anno_part(mask=np.ones((*SHAPE, 3))), "not a matrix"),
    ("parts", "masks differ", anno_part(mask=PART["mask"][:, :-1]), "another size than those before"),
    ("parts", "off by one", anno(mask=np.ones((36, 50)), parts=PART | {"mask": np.ones((36, 50))}), "is 50 x 36"),
    ("parts", "transposed", anno(mask=np.ones((50, 37)), parts=PART | {"mask": np.ones((50, 37))}), "is 37 x 50"),
]


def read(root, tasks=DEFAULT_TASKS, **access):
    return TreeDataSet(open_tree(root), "train", tasks, build_protocol("mini", 32), 0, Access(**access))


def mistake(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "damage", "message"),
    [(t, d, m) for t, _, d, m in DAMAGE],
    ids=[f"{task}: {name}" for task, name, *_ in DAMAGE],
)
def test_damage_is_one_line_or_an_image_left_out(task, damage, message, pascal_copy, capfd):
    path = pascal_copy / FILES[task]
    damage(path)
    if task == "seg" and not os.path.lexists(path):  # then another file counts
        path = pascal_copy / f"semseg/pascal-context/{HURT}.png"
        path.unlink()
    line = mistake(lambda: read(pascal_copy)[0, 0])
    assert str(pascal_copy) in line and HURT in line and message in line

    dataset = read(pascal_copy, skip_bad=True)
    assert [image.id for image in dataset.images] == TRAIN[1:] and len(dataset) == 7
    assert len(dataset.skipped) == 1 and HURT in dataset.skipped[0] and "\n" not in dataset.skipped[0]
    assert capfd.readouterr().err.startswith("skipped 1 of 8 train images, the first: ")


def test_a_person_whose_struct_is_healthy_is_read(pascal_copy):
    """The struct from which the odd ones above are made."""
    anno()(pascal_copy / FILES["parts"])
    assert read(pascal_copy, ("parts",))[0, 0]["parts"].any()


def test_what_is_no_person_may_have_any_parts(pascal_copy):
    anno(class_ind=12, parts=PART | {"part_name": "tail"})(pascal_copy / FILES["parts"])
    assert (read(pascal_copy, ("seg", "parts"))[0, 0]["parts"] == 255).all()


def test_a_label_map_that_does_not_fit_the_normals(pascal_copy):
    """Also where edges are no task: it says which normals count."""
    mat(LabelMap=CONTEXT.T)(pascal_copy / FILES["edge"])
    line = mistake(lambda: read(pascal_copy, ("normals",))[0, 0])
    assert FILES["edge"] in line and "is 37 x 50 pixels" in line


@pytest.mark.parametrize("damage", [link("nowhere"), link(None), holding(b"")], ids=["nowhere", "loop", "empty"])
def test_a_label_that_is_broken_is_not_taken_for_one_that_is_missing(damage, pascal_copy):
    damage(pascal_copy / FILES["sal"])
    assert FILES["sal"] in mistake(lambda: read(pascal_copy, partial_labels=True)[0, 0])
    damage(pascal_copy / FILES["edge"])
    assert FILES["edge"] in mistake(lambda: read(pascal_copy, ("normals",), partial_labels=True)[0, 0])


def test_links_may_lead_out_of_the_tree(pascal_copy, tmp_path):
    """How a user lays out his disks is his own affair."""
    before = read(pascal_copy)[0, 0]
    for file in FILES.values():
        outside = tmp_path / file.replace("/", "_")
        (pascal_copy / file).rename(outside)
        (pascal_copy / file).symlink_to(outside)
    after = read(pascal_copy)[0, 0]
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("text", ["[1, 2]", '{"2008_000000": 7}', "{", "", "[" * 100_000])
def test_a_list_of_persons_that_is_none(text, pascal_copy):
    path = pascal_copy / "ImageSets/Parts/train.txt"
    path.write_text(text)
    assert str(path) in mistake(lambda: read(pascal_copy, ("parts",)))


def test_images_that_the_list_of_persons_does_not_mention_stay(pascal_copy):
    (pascal_copy / "ImageSets/Parts/train.txt").write_text(json.dumps({TRAIN[3]: [12], TRAIN[4]: [12, 15]}))
    assert read(pascal_copy, ("parts",)).ids == tuple(id for id in TRAIN if id != TRAIN[3])


@pytest.mark.parametrize("damage", [folder, pipe, link(None)], ids=["folder", "pipe", "loop"])
@pytest.mark.parametrize("file", ["ImageSets/Context/train.txt", "ImageSets/Parts/train.txt"])
def test_a_list_that_is_no_file(damage, file, pascal_copy):
    damage(pascal_copy / file)
    assert f"{pascal_copy / file} is not a file" in mistake(lambda: read(pascal_copy, ("parts",)))


def test_a_tree_that_is_a_loop_of_links(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert str(tmp_path / "loop") in mistake(lambda: read(tmp_path / "loop"))


@pytest.mark.parametrize("name", ["sal_distill", "JPEGImages"])
def test_a_folder_that_may_not_be_listed(name, pascal_copy, monkeypatch):
    listdir = os.listdir

    def refuse(path):
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(tree.os, "listdir", refuse)
    line = mistake(lambda: read(pascal_copy))
    assert line.startswith(f"{pascal_copy / name} cannot be read: Permission denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not hold for root")
@pytest.mark.parametrize("task", FILES)
def test_a_file_without_permission(task, pascal_copy):
    (pascal_copy / FILES[task]).chmod(0)
    assert "cannot be read: Permission denied" in mistake(lambda: read(pascal_copy)[0, 0])


def test_a_file_where_a_folder_of_labels_is_due(pascal_copy):
    for path in (pascal_copy / "sal_distill").iterdir():
        path.unlink()
    (pascal_copy / "sal_distill").rmdir()
    (pascal_copy / "sal_distill").write_text("")
    assert str(pascal_copy / "sal_distill") in mistake(lambda: read(pascal_copy))


def test_a_split_in_which_nothing_is_whole(pascal_copy, capfd):
    for path in (pascal_copy / "sal_distill").iterdir():
        path.write_bytes(b"")
    line = mistake(lambda: read(pascal_copy, skip_bad=True))
    assert "every image of split 'train' has a fault" in line and str(pascal_copy / "sal_distill") in line


# The command line


def run(root, out, *options):
    command = [
        sys.executable,
        "-m",
        "train",
        "--data",
        str(root),
        "--tasks",
        ",".join(DEFAULT_TASKS),
        "--protocol",
        "mini",
        "--steps",
        "1",
        "--batch-size",
        "4",
        "--model",
        "vit_micro",
        "--head",
        "light",
        "--image-size",
        "32",
        "--out",
        str(out),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("file", "damage", "workers"),
    [
        (FILES["photo"], truncated(0.5), 1),
        (FILES["normals"], pipe, 1),
        (FILES["seg"], renumbered, 0),
        (FILES["parts"], anno_part(part_name="tail"), 1),
        (FILES["sal"], os.unlink, 1),
        ("ImageSets/Context/train.txt", holding(b"../../etc/passwd\n"), 1),
    ],
    ids=["photo", "pipe", "palette", "anno", "missing", "list"],
)
@pytest.mark.integration
def test_a_run_ends_in_one_line_and_status_2(file, damage, workers, pascal_copy, tmp_path):
    damage(pascal_copy / file)
    done = run(pascal_copy, tmp_path / "run", "--set", f"workers={workers}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert str(pascal_copy / file) in done.stderr


@pytest.mark.integration
def test_a_run_without_the_bad_images_says_how_many_there_are(pascal_copy, tmp_path):
    truncated(0.5)(pascal_copy / FILES["photo"])
    (pascal_copy / "sal_distill" / f"{TRAIN[3]}.png").unlink()
    (pascal_copy / "human_parts" / "2009_000001.mat").write_bytes(b"")
    out = tmp_path / "run"
    done = run(pascal_copy, out, "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "skipped 2 of 8 train images, the first: " in done.stderr
    assert "skipped 1 of 4 val images, the first: " in done.stderr
    assert done.stdout.count("6 train, 3 val images (2 and 1 skipped, see skipped.txt)") == 2
    results = json.loads((out / "results.json").read_text())["dataset"]
    assert (results["train"], results["val"], results["skipped"]) == (6, 3, {"train": 2, "val": 1})
    lines = (out / "skipped.txt").read_text().splitlines()
    assert [str(pascal_copy) in line for line in lines] == [True] * 3
