"""``python -m train.predict``: photos of any size and kind."""

import errno
import os
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from train.datasets.base import CLASSES
from train.files.images import read_photo
from train.output import pictures
from train.predict import main
from train.protocols import build_protocol
from train.tasks import DEFAULT_TASKS, TASKS

FOLDERS = {name: task.folder for name, task in TASKS.items()}


ORIENTATION = 0x0112


def noise(shape, seed=0):
    """A photo in large blocks of colour."""
    blocks = np.random.default_rng(seed).integers(0, 256, (*(side // 16 + 1 for side in shape), 3), np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((16, 16, 1), np.uint8))[: shape[0], : shape[1]])


def save_turned(photo, path):
    """As a camera held upright does: the pixels lie on their side, EXIF says so."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def processor_seconds():
    """Of the processes that this one has waited for: unlike a clock's, they do not grow with what else is running."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.fixture(scope="module")
def predicted(tiny_run, tmp_path_factory):
    """(folder of photos, what a user's command made of it, its output, its processor seconds)."""
    photos = tmp_path_factory.mktemp("photos")
    noise((40, 1)).save(photos / "thin.png")
    noise((1, 40)).save(photos / "flat.png")
    noise((1, 1)).save(photos / "dot.png")
    noise((333, 517)).save(photos / "odd.jpg")
    save_turned(noise((90, 60)), photos / "portrait.png")
    noise((90, 60)).save(photos / "upright.png")
    noise((50, 70)).convert("L").save(photos / "grey.png")
    noise((50, 70)).convert("P").save(photos / "palette.gif")
    noise((50, 70)).convert("CMYK").save(photos / "print.tif")
    Image.fromarray(np.full((50, 70), 40_000, np.uint16)).save(photos / "deep.png")
    clear = noise((50, 70)).convert("RGBA")
    clear.putalpha(0)
    clear.save(photos / "clear.png")
    noise((50, 70)).save(photos / "odd.webp")  # beside odd.jpg
    (photos / "notes.txt").write_text("no photo")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "folder").mkdir()
    before = processor_seconds()
    command = [sys.executable, "-m", "train.predict", str(tiny_run / "last"), str(photos)]
    done = subprocess.run(command, cwd=photos.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return photos, photos.parent / "runs/predict", done, processor_seconds() - before


SIZES = {
    "thin": (1, 40),
    "flat": (40, 1),
    "dot": (1, 1),
    "odd.jpg": (517, 333),
    "odd.webp": (70, 50),
    "portrait": (60, 90),
    "upright": (60, 90),
    "grey": (70, 50),
    "palette": (70, 50),
    "print": (70, 50),
    "deep": (70, 50),
    "clear": (70, 50),
}


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_every_photo_gets_pngs_of_its_own_size(predicted, task):
    out = predicted[1]
    for name, size in SIZES.items():
        picture = Image.open(out / FOLDERS[task] / f"{name}.png")
        assert picture.size == Image.open(out / "overlays" / FOLDERS[task] / f"{name}.png").size == size
        assert picture.mode == {"seg": "P", "parts": "P", "normals": "RGB"}.get(task, "L")
    assert len(list((out / FOLDERS[task]).iterdir())) == len(SIZES)


def test_raw_arrays_are_what_the_heads_gave(predicted):
    raw = np.load(predicted[1] / "raw/odd.jpg.npz")
    assert {task: raw[task].shape for task in DEFAULT_TASKS} == {
        "seg": (21, 64, 64),
        "parts": (7, 64, 64),
        "sal": (2, 64, 64),
        "normals": (3, 64, 64),
        "edge": (1, 64, 64),
    }
    seg = np.asarray(Image.open(predicted[1] / "semseg/odd.jpg.png"))
    assert set(np.unique(seg)) <= set(range(21))
    assert all(raw[task].dtype == np.float16 for task in DEFAULT_TASKS)


def test_the_orientation_that_the_camera_noted_is_respected(predicted):
    for task in DEFAULT_TASKS:
        turned, upright = (
            np.asarray(Image.open(predicted[1] / FOLDERS[task] / f"{name}.png")) for name in ("portrait", "upright")
        )
        assert np.array_equal(turned, upright)


def test_what_is_no_image_is_told_in_one_line(predicted):
    photos, _, done, _ = predicted
    assert f"skipped 2 files that are not images, the first: {photos / 'broken.jpg'}\n" == done.stderr
    assert "12 photos" in done.stdout


def test_it_takes_seconds_and_the_sheet_shows_all(predicted):
    assert predicted[3] < 20
    sheet = Image.open(predicted[1] / "sheet.png").convert("RGB")
    assert sheet.width > 2000 and len(sheet.getcolors(2**24)) > 1000


def test_colours_are_read_as_they_look(predicted):
    photos = predicted[0]
    assert (read_photo(photos / "clear.png") == 255).all()
    assert (read_photo(photos / "deep.png") == 155).all()
    assert np.ptp(read_photo(photos / "grey.png"), axis=-1).max() == 0
    assert np.array_equal(read_photo(photos / "portrait.png"), np.asarray(noise((90, 60))))


@pytest.mark.parametrize("shape", [(333, 517), (100, 90), (1, 2000), (128, 128)])
def test_invpt_pads_and_shrinks_what_does_not_fit(shape, padded_run, tmp_path):
    noise(shape).save(tmp_path / "photo.png")
    assert main([str(padded_run), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out/semseg/photo.png").size == shape[::-1]
    scale = min(128 / max(shape), 1)
    sides = tuple(max(round(scale * side), 1) for side in shape)
    assert np.load(tmp_path / "out/raw/photo.npz")["edge"].shape == (1, *sides)
    image, where = build_protocol("invpt", 128).fit_photo(np.asarray(noise(shape)))
    assert image.shape == (128, 128, 3) and image[where].shape[:2] == sides
    if scale == 1:
        assert np.array_equal(image[where], np.asarray(noise(shape)))


def test_borders_are_smooth_not_blocks():
    """Logits that cross in the middle between two pixels cross there at any size."""
    logits = np.stack([np.tile([1.0, 0.0], (2, 1)), np.tile([0.0, 1.0], (2, 1))]).astype(np.float32)
    assert np.array_equal(TASKS["seg"].at_photo(logits, (2, 6))[0], [0, 0, 0, 1, 1, 1])
    sal = TASKS["sal"].at_photo(np.stack([np.zeros((1, 2)), [[-9.0, 9.0]]]).astype(np.float32), (1, 7))[0].astype(int)
    assert (np.diff(sal) >= 0).all() and len(set(sal)) > 3


def test_an_overlay_leaves_the_background_and_tints_the_rest():
    photo = np.full((600, 600, 3), 100, np.uint8)
    ids = np.zeros((600, 600), np.uint8)
    ids[200:400, 200:400] = 15
    over = TASKS["seg"].overlay(photo, ids)
    assert (over[0, 0] == 100).all() and (over[300, 300] != 100).any() and (over[201, 300] != over[300, 300]).any()
    salient = TASKS["sal"].overlay(photo, 255 * (ids > 0).astype(np.uint8))
    assert (salient[300, 300] == 100).all() and (salient[0, 0] < 50).all()
    edge = TASKS["edge"].overlay(photo, 255 * (ids > 0).astype(np.uint8))
    assert (edge[0, 0] > 150).all() and (edge[300, 300] < 100).all()


@pytest.mark.parametrize("task", ["seg", "sal", "normals", "edge", "depth"])
def test_a_large_photo_takes_little_more_memory_than_its_pictures(task):
    """Floats of a whole photo were 70 bytes a pixel, 14 GB of a phone's 200 megapixels."""
    shape, output = (
        (1500, 2000),
        np.random.default_rng(0).normal(size=({"seg": 21}.get(task) or TASKS[task].channels, 32, 32)),
    )
    photo = np.zeros((*shape, 3), np.uint8)
    tracemalloc.start()
    TASKS[task].overlay(photo, TASKS[task].at_photo(output.astype(np.float32), shape))
    peak = tracemalloc.get_traced_memory()[1] / (shape[0] * shape[1])
    tracemalloc.stop()
    assert peak < 40, f"{peak:.0f} bytes a pixel"


def test_photos_do_not_pile_up(tiny_run, tmp_path, monkeypatch):
    """The contact sheet keeps thumbnails: in full size each photo and its overlays took 18 bytes a pixel."""
    kept = []
    monkeypatch.setattr(pictures, "save_contact_sheet", lambda path, images, classes: kept.append(images))
    for n in range(2):
        noise((300, 500)).save(tmp_path / f"{n}.png")
    assert main([str(tiny_run), *(str(tmp_path / f"{n}.png") for n in range(2)), "--out", str(tmp_path / "out")]) == 0
    shapes = {picture.shape for thumbnails in kept[0].values() for picture in thumbnails.values()}
    assert len(kept[0]) == 2 and shapes == {(134, 224, 3)}


def test_a_full_contact_sheet_takes_little_memory(tmp_path):
    """As one image of 2796 x 2796 pixels it took a gigabyte."""
    names = ("image", *DEFAULT_TASKS)
    sheet = {f"{n}": {name: np.zeros((204, 224, 3), np.uint8) for name in names} for n in range(24)}
    tracemalloc.start()
    pictures.save_contact_sheet(tmp_path / "sheet.png", sheet, CLASSES["scenes"])
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak < 200


def test_a_checkpoint_of_scenes_predicts_photos_too(tmp_path):
    from train.cli import main as train

    small = ["--set", "scenes=4", "--set", "val_scenes=2", "--tasks", "seg,edge"]
    assert train(["--steps", "1", *small, "--out", str(tmp_path / "run")]) == 0
    noise((50, 70)).save(tmp_path / "photo.png")
    assert main([str(tmp_path / "run"), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        ".written",
        "edge",
        "overlays",
        "raw",
        "semseg",
        "sheet.png",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "/no/such/photo.jpg"], "no such file: /no/such/photo.jpg"),
        (["RUN", "NOTES"], "notes.txt cannot be read (UnidentifiedImageError"),
        (["RUN", "BROKEN"], "broken.jpg cannot be read"),
        (["RUN", "TRUNCATED"], "truncated.png cannot be read"),
        (["RUN", "EMPTY"], "no image is there"),
        (["RUN", "PHOTO", "PHOTO"], "have the same name"),
        (["EMPTY", "PHOTO"], "is not a checkpoint"),
        (["RUN", "PHOTO", "--out", "NOTES"], "cannot make the folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, predicted, tiny_run, tmp_path, capsys):
    photos = predicted[0]
    (tmp_path / "empty").mkdir()
    whole = (photos / "odd.webp").read_bytes()
    (tmp_path / "truncated.png").write_bytes((photos / "upright.png").read_bytes()[:120])
    places = {
        "RUN": tiny_run,
        "NOTES": photos / "notes.txt",
        "BROKEN": photos / "broken.jpg",
        "EMPTY": tmp_path / "empty",
        "PHOTO": photos / "upright.png",
        "TRUNCATED": tmp_path / "truncated.png",
    }
    argv = [str(places.get(word, word)) for word in argv]
    assert main([*argv, *([] if "--out" in argv else ["--out", str(tmp_path / "out")])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert whole == (photos / "odd.webp").read_bytes()


def test_photos_that_cannot_be_read_leave_the_others_predicted(predicted, tiny_run, tmp_path, capsys):
    """Names that are no UTF-8, have line ends and commands of terminals, or as many bytes as a name may have."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    noise((50, 70)).save(photos / "good.png")
    odd = [b"caf\xe9.png", b"two\nlines.png", b"red\x1b[31m.png", b"x" * 251 + b".png"]
    for name in odd:
        shutil.copy(photos / "good.png", os.fsencode(photos / "") + b"/" + name)
    whole = (photos / "good.png").read_bytes()
    (photos / "cut\n.png").write_bytes(whole[: len(whole) // 2])
    assert main([str(tiny_run / "last"), str(photos), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("left out: ") == 1 and r"cut\n.png cannot be read" in printed.err
    assert printed.err.count("\n") == 1 and f"{out}/: 5 photos, 1 left out" in printed.out
    assert (out / "sal" / "good.png").is_file() and (out / "sheet.png").is_file()
    assert {*os.listdir(os.fsencode(out / "sal"))} == {b"good.png", *odd}
    (photos / ("x" * 251 + ".jpg")).write_bytes(whole)
    assert main([str(tiny_run / "last"), str(photos), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "its name is too long for " in error and error.count("\n") == 1


def test_a_full_disk_is_one_line(tiny_run, tmp_path, capsys, monkeypatch):
    noise((50, 70)).save(tmp_path / "photo.png")

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for kind, method in ((Image.Image, "save"), (Figure, "savefig")):
        with monkeypatch.context() as patched:
            patched.setattr(kind, method, refuse)
            assert main([str(tiny_run / "last"), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: cannot write ") and "free some space" in error and error.count("\n") == 1


def test_a_data_set_is_not_written_to(tiny_run, tmp_path, capsys):
    (tmp_path / "JPEGImages").mkdir()
    noise((50, 70)).save(tmp_path / "JPEGImages" / "photo.png")
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tiny_run), str(tmp_path / "JPEGImages"), "--out", str(tmp_path / "JPEGImages" / "out")]) == 2
    assert "lies inside the data set" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
