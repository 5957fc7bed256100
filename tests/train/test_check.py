"""``python -m train.check``: counts, faults, the exit status and the contact sheet."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from train.check import build_parser, main, share
from train.datasets.pascal.voc import VOC_CLASSES
from train.output.tables import format_table

HURT = "2008_000000"  # of the fabricated tree, see conftest.py


def tables(text):
    """{heading: {first column: the others}} of every table that is printed."""
    blocks = [[re.split(r"  +", line.strip()) for line in block.splitlines()] for block in text.split("\n\n")]
    return {block[0][0]: {row[0]: row[1:] for row in block if len(row) > 1} for block in blocks}


@pytest.fixture(scope="module")
def checked(pascal_tree, tmp_path_factory):
    """(printed tables, folder, stderr) of a whole check as a user types it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "train.check", "--data", str(pascal_tree.parent)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"tree  layout A at {pascal_tree}\n" in done.stdout and "\nnothing is wrong\n" in done.stdout
    return tables(done.stdout), folder / "runs/check", done.stderr


def test_splits_stand_beside_the_official_ones(checked):
    assert checked[0]["split"] == {
        "split": ["images", "official", "faulty", "width", "height"],
        "train": ["8", "4998", "0", "37/46/64", "33/46/300"],
        "val": ["4", "5105", "0", "37/44/50", "33/44/64"],
    }


def test_shares_of_pixels_are_right(checked, pascal_tree):
    labels = [np.asarray(Image.open(pascal_tree / f"sal_distill/2009_{n:06d}.png")) >= 128 for n in range(4)]
    salient = 100 * sum(label.sum() for label in labels) / sum(label.size for label in labels)
    assert checked[0]["sal"]["salient"][1] == f"{salient:.3f}"
    for task in ("seg", "parts", "sal", "normals", "edge"):
        table = checked[0][task]
        assert table.pop(task) == ["train %", "val %"] and table.pop("images") == ["8", "4"]
        for column in zip(*table.values(), strict=True):
            assert sum(float(cell) for cell in column if cell != "-") == pytest.approx(100, abs=0.02)
    assert list(checked[0]["seg"]) == [*VOC_CLASSES, "void"]
    assert checked[0]["parts"]["head"][1] == "-"


def test_the_contact_sheet_shows_a_dozen_images(checked):
    sheet = Image.open(checked[1] / "sheet.png").convert("RGB")
    assert sheet.width > 12 * 224 and sheet.height > 6 * 224
    assert len(sheet.getcolors(2**24)) > 5000
    assert (checked[1] / "faults.txt").read_text() == ""


def test_faults_are_counted_and_the_first_are_shown(pascal_copy, tmp_path, capsys):
    for path in (pascal_copy / "sal_distill").iterdir():
        path.write_bytes(b"")
    (pascal_copy / f"JPEGImages/{HURT}.jpg").unlink()
    out = tmp_path / "out"
    assert main(["--data", str(pascal_copy), "--out", str(out), "--workers", "0"]) == 1
    text = capsys.readouterr().out
    lines = (out / "faults.txt").read_text().splitlines()
    assert len(lines) == 12 and "faults: 12\n" in text and "and 2 more" in text
    assert lines[0] == f"{pascal_copy}/JPEGImages/{HURT}.jpg does not exist: restore it"
    assert all(line in text for line in lines[:10]) and lines[10] not in text
    assert tables(text)["split"]["val"][:3] == ["4", "5105", "4"]
    assert not (out / "sheet.png").exists()  # nothing is whole


def test_only_the_tasks_that_are_asked_for_are_looked_at(pascal_copy, tmp_path, capsys):
    (pascal_copy / f"sal_distill/{HURT}.png").write_bytes(b"")
    options = ["--data", str(pascal_copy), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert main([*options, "--tasks", "semseg,edge", "--cache", str(tmp_path / "cache")]) == 0
    assert set(tables(capsys.readouterr().out)) >= {"split", "seg", "edge"}
    assert len(list((tmp_path / "cache").iterdir())) == 12  # what training will find there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/no/such/folder"], "error: /no/such/folder is not a folder"),
        (["--data", "DATA", "--tasks", "flow"], "error: unknown task 'flow'"),
        (["--data", "DATA", "--workers", "-1"], "error: workers is -1"),
        (["--data", "DATA", "--cache", "DATA"], "lies inside the data set"),
        (["--data", "DATA", "--out", "FILE/out"], "error: cannot make the folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(options, message, pascal_tree, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {"DATA": str(pascal_tree), "FILE/out": str(tmp_path / "file/out")}
    defaults = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    assert main([*(places.get(option, option) for option in options), *defaults]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_data_must_be_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "--data (python -m train.check --help explains)" in error and error.count("\n") == 1


def test_help_states_the_exit_status():
    assert "0 nothing is wrong, 1 files are missing or damaged, 2 a user's mistake" in build_parser().format_help()


def test_shares_never_round_to_nothing():
    assert [share(0, 10), share(1, 10), share(10, 10), share(1, 10**9)] == ["-", "10.000", "100.000", "<0.001"]


def test_columns_are_aligned():
    assert format_table([["a", "one"], ["long", "2"]]) == "a     one\nlong    2"


def test_pascal_mini_is_whole(pascal_mini, tmp_path):
    command = [sys.executable, "-m", "train.check", "--data", str(pascal_mini), "--partial-labels"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = tables(done.stdout)
    assert [found["split"][split][0] for split in ("train", "val")] == ["1425", "555"]
    assert {task: found[task]["images"] for task in ("seg", "parts", "sal", "normals", "edge")} == {
        "seg": ["750", "250"],
        "parts": ["300", "80"],
        "sal": ["1050", "330"],
        "normals": ["75", "25"],
        "edge": ["300", "200"],
    }
    assert found["parts"]["upper arm"] == ["0.128", "0.052"]
    assert float(found["normals"]["void"][0]) == pytest.approx(24, abs=1)
    assert found["seg"]["aeroplane"] == ["-", "-"]


def test_a_data_set_is_not_written_to(pascal_copy, capsys):
    before = sorted(pascal_copy.rglob("*"))
    assert main(["--data", str(pascal_copy), "--out", str(pascal_copy / "check")]) == 2
    assert "lies inside the data set" in capsys.readouterr().err and sorted(pascal_copy.rglob("*")) == before
